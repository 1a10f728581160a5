"""Stratified sampling as a decoding method, for `generate(custom_generate=...)`: samples that find more together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.generation.utils import GenerateNonBeamOutput, GenerateOutput

from hf_coverage.functional.arithmetic_codes import stratified_codes
from hf_coverage.functional.ttt_config import is_count
from hf_coverage.inference.call_stack import frames
from hf_coverage.inference.code_choice import CodeChoice, code_device
from hf_coverage.inference.forward import is_sharded
from hf_coverage.ttt.generate import Adapted, AdaptedScores, EndWatch, refuse_paged, ttt_generate
from hf_coverage.ttt.mixin import TestTimeTrainingMixin

__all__ = ["METHOD", "StratifiedSamplingMixin", "stratified_generate"]

METHOD = "Stratified sampling"
"""What errors call it."""


def _with_settings_of(other: Callable) -> Callable[[Callable], Callable]:
    """Let a custom method take the settings of another: `generate` hands over those that its signature names."""

    def named(method: Callable) -> Callable:
        own = inspect.signature(method)
        *first, last = own.parameters.values()
        settings = [one for one in inspect.signature(other).parameters.values() if one.kind is one.KEYWORD_ONLY]
        vars(method)["__signature__"] = own.replace(parameters=[*first, *settings, last])
        return method

    return named


@_with_settings_of(ttt_generate)
def stratified_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    group: int | None = None,
    **arguments: Any,
) -> GenerateNonBeamOutput | Tensor:
    """Sample N responses to a prompt that find at least as much between them as N independent samples do.

    Each response alone is a sample of the model, as `generate` would draw it: every penalty, mask, temperature and
    truncation acts first. Together Pass@N, and the expected reward of the best, are never below those of independent
    samples, for any verifier and any reward (Theorem S). Where a single answer of probability p is right, about
    `min(1, N p)` of the prompts are solved, and `1 - (1 - p)^N` by independent samples; where right answers are spread
    over many responses, as after a long reasoning, the gain is small.

    Not called by hand: `model.generate(..., do_sample=True, num_return_sequences=8,
    custom_generate=stratified_generate)`, with everything that `generate` takes for sampling. The rows of a prompt
    share one set of codes, one in each of N strata, in random order; where N is a power of two every aligned block of
    2^m of them is stratified too. All random numbers are of torch's generator. With N = 1 this is plain sampling.

    With return_dict_in_generate the result has `token_logprobs` `(B, T)` as that of `ttt_generate` has: what the model
    itself gave to each new token, in nats, before anything else changed its scores, and 0 after the end of a row. Any
    setting of `ttt_generate` (`ttt_lr=0.1`), given here or saved, lets the rows train while they are sampled.

    The unbiased estimate of Pass@N from counts is for independent samples, and not for these. A policy gradient with
    the group's mean as baseline is `(1 - 1/N)` of the gradient and `1/N` of its part between strata.

    `cache_implementation="paged"` must not be asked for: `generate` then calls no custom method, and says nothing. It
    gives its `tokenizer` to none either: in the place of `stop_strings` give it
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    Args:
        model: Given by `generate`, as are the next four and the arguments of the model.
        input_ids: Token ids `(B, L)`.
        logits_processor: What `generate` prepared.
        stopping_criteria: Likewise.
        generation_config: Likewise; a `group` that is saved in it counts where none is given.
        group: How many rows after one another have the same prompt, where the caller repeats prompts, as TRL does;
            N is that many times `num_return_sequences`. 1.
        arguments: Settings of `ttt_generate`, and arguments of the model.

    Returns:
        As `generate`: token ids `(B, L + T)`, or a dictionary with `sequences`.

    Raises:
        ValueError: If the mode of decoding is not sampling, `group` does not divide the rows into equal prompts, or
            scores are NaN.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, bos_token_id=0, eos_token_id=None)
        >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2]])
        >>> settings = {"do_sample": True, "num_return_sequences": 32, "max_new_tokens": 1}
        >>> responses = model.generate(ids, custom_generate=stratified_generate, **settings)[:, 2:]
        >>> responses.flatten().bincount().tolist()  # of 8 tokens that are about equally likely
        [4, 4, 4, 4, 5, 3, 4, 4]
    """
    host = _host(model)
    _refuse_other_modes(generation_config, host.get("assistant_model"))
    saved = generation_config.to_dict()
    size = _group_size(saved.get("group") if group is None else group, generation_config, input_ids, arguments)
    choice = _choice(len(input_ids), size, input_ids.device)
    # What the choice leaves is one token, for which the host need not draw.
    config = copy.copy(generation_config)
    config.do_sample = False
    prepared: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([*logits_processor, choice]),
        "stopping_criteria": StoppingCriteriaList([_Restore(choice), *stopping_criteria]),
        "generation_config": config,
    }
    if any(name.startswith("ttt_") for name in saved.keys() | arguments):
        if host.get("streamer") is not None:
            raise ValueError("`streamer` does not reach test-time training; give it as `ttt_streamer`.")
        result = ttt_generate(model, input_ids, **prepared, **arguments)
    else:
        result = _sample(model, input_ids, host, **prepared, **arguments)
    choice.refuse_nan()
    return result


class StratifiedSamplingMixin(TestTimeTrainingMixin):
    """Lets `generate` of a causal language model take `stratified=True`, and all settings of `ttt_generate`.

    Put it before the model class. Where `stratified` is given to `generate` or saved in the generation configuration,
    tokens are sampled by `stratified_generate`, with `group` as given or saved; otherwise `generate` is the model's
    own, or that of `TestTimeTrainingMixin`.

    TRL's `GRPOTrainer` repeats prompts itself and takes settings alone, of which `custom_generate` is none: give it a
    model of such a class, and `generation_kwargs={"stratified": True, "group": num_generations}`. Without `group` each
    row has a code of its own, which is plain sampling.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> class Model(StratifiedSamplingMixin, GPT2LMHeadModel):
        ...     pass
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, bos_token_id=0, eos_token_id=None)
        >>> settings = {"do_sample": True, "num_return_sequences": 8, "max_new_tokens": 1}
        >>> Model(config).eval().generate(torch.tensor([[1, 2]]), stratified=True, **settings).shape
        torch.Size([8, 3])
    """

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        custom_generate: str | Callable | None = None,
        stratified: bool | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """Generate as the model class does, with stratified samples where `stratified` asks for them."""
        saved: dict[str, Any] = {}
        for config in (self.generation_config, generation_config):
            saved |= {} if config is None else config.to_dict()
        asked = saved.get("stratified", False) if stratified is None else stratified
        if custom_generate is None and asked:
            refuse_paged(kwargs, METHOD)
            custom_generate = stratified_generate
            if "streamer" in kwargs and "ttt_lr" in saved | kwargs:  # `ttt_generate` begins the stream itself
                kwargs["ttt_streamer"] = kwargs.pop("streamer")
        return super().generate(inputs, generation_config, *args, custom_generate=custom_generate, **kwargs)


def _host(model: PreTrainedModel) -> dict[str, Any]:
    """What the running `generate` was given and hands to no custom method; empty where this is called by hand."""
    for frame in frames(type(model)):
        given = frame.f_locals
        if frame.f_code.co_name == "generate" and given["self"] is model and "assistant_model" in given:
            return {name: given.get(name) for name in ("assistant_model", "streamer", "synced_gpus")}
    return {}


def _refuse_other_modes(config: GenerationConfig, assistant: PreTrainedModel | None) -> None:
    mode = config.get_generation_mode(assistant)
    if mode is GenerationMode.GREEDY_SEARCH:
        raise ValueError(f"{METHOD} is sampling, got greedy search: generate with `do_sample=True`.")
    if mode is not GenerationMode.SAMPLE:
        raise ValueError(
            f"{METHOD} works for sampling alone, got {mode.value.replace('_', ' ')}: generate with `do_sample=True` "
            "and `num_beams=1`, and without an assistant, prompt lookup or what else asks for that."
        )


def _group_size(group: int | None, config: GenerationConfig, ids: Tensor, arguments: dict[str, Any]) -> int:
    """How many rows after one another share their codes."""
    if group is not None and not (is_count(group) and group >= 1):
        raise ValueError(f"`group` must be a whole number of rows, at least 1, got {group!r}.")
    size = (group or 1) * (config.num_return_sequences or 1)
    if len(ids) % size:
        raise ValueError(
            f"`group` must divide the rows of `input_ids`: got {len(ids)} rows, with `num_return_sequences`, and "
            f"groups of {size}. Repeat each prompt `group` times, one after the other."
        )
    mask = arguments.get("attention_mask")
    for rows in (ids,) if mask is None else (ids, mask):
        grouped = rows.view(-1, size, rows.shape[-1])
        differs = (grouped != grouped[:, :1]).flatten(1).any(-1).nonzero()
        if len(differs):
            first = int(differs[0]) * size
            raise ValueError(
                f"`group` must be rows of one prompt, but rows {first} to {first + size - 1} have different ones: "
                "repeat each prompt that many times, one after the other."
            )
    return size


def _sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    host: dict[str, Any],
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **arguments: Any,
) -> GenerateNonBeamOutput | Tensor:
    """The host's loop, and the model's own log-probabilities where there is room for them in what it returns."""
    watch = EndWatch(stopping_criteria)
    noted = AdaptedScores(_AsItIs(), watch)
    keeps = generation_config.return_dict_in_generate
    synced = host.get("synced_gpus")
    result = model._sample(
        input_ids,
        logits_processor=LogitsProcessorList([noted, *logits_processor]) if keeps else logits_processor,
        stopping_criteria=watch,
        generation_config=generation_config,
        synced_gpus=is_sharded(model) and PartialState().num_processes > 1 if synced is None else synced,
        streamer=host.get("streamer"),
        **arguments,
    )
    if keeps:
        result["token_logprobs"] = noted.finish(result.sequences, start=input_ids.shape[1])
    return result


class _AsItIs(Adapted):
    """Rows that make no steps."""

    def begin(self, ids: Tensor) -> None:
        """Nothing to begin."""

    def step(self, tokens: Tensor, active: Tensor | None) -> None:
        """No step."""

    def logits(self, scores: Tensor) -> Tensor:
        """Those of the model."""
        return scores

    def close(self) -> None:
        """Nothing to let go of."""


def _choice(rows: int, size: int, device: torch.device) -> CodeChoice:
    """A choice for so many rows, of which `size` after one another share their codes."""
    device = code_device(device)
    draws = torch.rand(2, rows // size, size, dtype=torch.float64, device=device)
    return CodeChoice(stratified_codes(*draws).flatten(), lambda: torch.rand(rows, dtype=torch.float64, device=device))


class _Restore(StoppingCriteria):
    """The first of the criteria: what the others see, and what `generate` returns, are the scores as they were."""

    def __init__(self, choice: CodeChoice) -> None:
        self._choice = choice

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Ends no row."""
        self._choice.restore()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
