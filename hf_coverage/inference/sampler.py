"""Sampling from a model through its own `generate`, with the exact density that every token was sampled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_coverage.inference.forward import inference, is_sharded, refuse_zero3, unwrap
from hf_coverage.inference.prefix_cache import is_repeatable
from hf_coverage.inference.processes import map_over_processes

__all__ = ["Sample", "Sampler", "Sampling", "end_token_ids", "own_config", "pad_left", "read_prompts", "require_room"]


@dataclass(frozen=True)
class Sampling:
    """The distribution D(.|x) that responses are drawn from, and nothing else: a model's own defaults do not count.

    Args:
        max_new_tokens: Most tokens H of a response.
        temperature: What logits are divided by; 1 is the model itself.
        top_k: Keep the k likeliest tokens of every step, renormalised; None: all.
        top_p: Keep the likeliest tokens that together reach this mass, renormalised; None: all.
        eos_token_ids: Tokens that end a response, as its last one; without any, all responses have H tokens.

    Raises:
        ValueError: If a number is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive, got {self.temperature}; greedy decoding has one response of density "
                "1: give that to `single_answer_corpus`."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, or None to keep all tokens, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], or None to keep all tokens, got {self.top_p}.")

    def processors(self) -> list[LogitsProcessor]:
        """What turns a model's logits into those of the distribution, in the order of `generate`."""
        steps: list[LogitsProcessor] = []
        if self.temperature != 1:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            steps.append(TopPLogitsWarper(self.top_p))
        return steps


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Args:
        ids: Its tokens, the end-of-sequence token included where it was sampled.
        logprob: log D(ids|x) in nats, the float64 sum over its tokens; where it was cut at H tokens, of the event
            that a response begins with them.
        finished: Whether it ends with an end-of-sequence token.
    """

    ids: list[int]
    logprob: float
    finished: bool


class Sampler:
    """Draws responses on all processes of a job; the result depends on the seed and the batch size alone.

    Args:
        model: Any causal language model; may be wrapped by DDP, sharded by FSDP2, or compiled.
        sampling: The distribution.
        batch_size: Responses drawn at once.
        seed: What all random numbers follow from; the global generators stay as they are.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3.
        TypeError: If the model is wrapped by FSDP1.
        ValueError: If `batch_size` is not positive.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        refuse_zero3()
        self.model: PreTrainedModel = unwrap(model)
        if isinstance(self.model, FullyShardedDataParallel):
            raise TypeError("The model is wrapped by FSDP1, through which `generate` does not run; shard it by FSDP2.")
        self.sharded = is_sharded(self.model)
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed

    def draw(
        self,
        prompts: Sequence[list[int]],
        *,
        stop: Callable[[list[int]], bool] | None = None,
        first_batch: int = 0,
        progress: bool = False,
    ) -> list[Sample]:
        """Draw one response to each prompt; prompts that come again in a batch are read once.

        Args:
            prompts: Token ids, never empty; repeat a prompt for several responses.
            stop: Tells from the tokens of a response so far whether it ends here; None: only EOS ends it early.
            first_batch: Number of the first batch: prompts in ascending order of length, drawn in parts of whole
                batches, get the samples that they get in one call.
            progress: Whether to show a progress bar on the main process.

        Returns:
            One sample per prompt, in their order, on every process.
        """
        require_room(self.model, prompts, [self.sampling.max_new_tokens] * len(prompts))
        # Prompts of like length share a batch, which pads little; a stable sort is the same on every process.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        numbered = list(enumerate(batches, first_batch))
        hidden = not (progress and PartialState().is_main_process)
        with inference(self.model), tqdm(total=len(order), desc="Sampling", unit="response", disable=hidden) as bar:

            def draw(batch: tuple[int, list[int]]) -> list[Sample]:
                return self._draw_batch([prompts[row] for row in batch[1]], batch[0], stop)

            def keep_pace(together: Sequence[tuple[int, list[int]]], own: tuple[int, list[int]] | None) -> None:
                if own is None and self.sharded:  # the others cannot run the model without this process
                    draw((0, order[:1]))
                bar.update(sum(len(rows) for _, rows in together))

            drawn = map_over_processes(draw, numbered, after_round=keep_pace)
        samples = dict(zip(chain.from_iterable(batches), chain.from_iterable(drawn)))
        return [samples[row] for row in range(len(prompts))]

    def _draw_batch(
        self, prompts: list[list[int]], index: int, stop: Callable[[list[int]], bool] | None
    ) -> list[Sample]:
        if not self.model._is_stateful or self.sharded:
            return self._draw_together(prompts, (index,), stop)
        # Some recurrent models read padding as they read any token, so theirs must be of one length.
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[prompt for prompt in prompts if len(prompt) == length] for length in lengths]
        return [s for place, group in enumerate(groups) for s in self._draw_together(group, (index, place), stop)]

    def _draw_together(
        self, prompts: list[list[int]], place: tuple[int, ...], stop: Callable[[list[int]], bool] | None
    ) -> list[Sample]:
        device, eos = self.model.device, self.sampling.eos_token_ids
        ids, mask = pad_left(prompts)
        recorder, stopper = _DensityRecorder(), _Stopper(ids.shape, stop)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            use_cache=True,
        )
        # The passes of a sharded model must be the same in number on all processes, whatever their prompts.
        cache = None if self.sharded else read_prompts(self.model, prompts)
        with own_config(self.model, config), _seeded(device, (self.seed, *place)):
            sequences = self.model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([*self.sampling.processors(), recorder]),
                stopping_criteria=None if stop is None else StoppingCriteriaList([stopper]),
                synced_gpus=self.sharded and PartialState().num_processes > 1,
            )
        logprobs = recorder.finish(sequences, start=ids.shape[1]).double().cpu()
        responses = sequences[:, ids.shape[1] :].tolist()
        samples = []
        for response, terms, limit in zip(responses, logprobs, stopper.lengths):
            length = next((at for at, token in enumerate(response[:limit], 1) if token in eos), limit or len(response))
            samples.append(Sample(response[:length], float(terms[:length].sum()), response[length - 1] in eos))
        return samples


class _DensityRecorder(LogitsProcessor):
    """The last processor: notes the log-probability of each token under the very scores it is sampled from."""

    def __init__(self) -> None:
        self._pending: Tensor | None = None
        self._settled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids[:, -1])
        self._pending = scores.float().log_softmax(dim=-1)
        return scores

    def _settle(self, tokens: Tensor) -> None:
        # A step's token is known when the next step begins, so one (B, V) tensor is alive and not one per step.
        if self._pending is not None:
            self._settled.append(self._pending.gather(1, tokens[:, None]).squeeze(1))

    def finish(self, sequences: Tensor, *, start: int) -> Tensor:
        """Log-probabilities (B, T) of the tokens after `start`."""
        steps = sequences.shape[1] - start
        if len(self._settled) < steps:
            self._settle(sequences[:, -1])
        # `generate` may see one step late that all rows have ended, and take that step back.
        return torch.stack(self._settled[:steps], dim=1)


class _Stopper(StoppingCriteria):
    """Ends each response where `stop` says so, and notes its length: a row that has ended goes on being filled."""

    def __init__(self, shape: torch.Size, stop: Callable[[list[int]], bool] | None) -> None:
        rows, self._start = shape
        self._stop = stop
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self._stop is not None:
            for row, response in enumerate(input_ids[:, self._start :].tolist()):
                if self.lengths[row] is None and self._stop(response):
                    self.lengths[row] = len(response)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


@contextmanager
def _seeded(device: torch.device, entropy: tuple[int, ...]) -> Iterator[None]:
    """Seed the generators that sampling on `device` draws from, and put them back."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach the accelerators as well
            yield
    else:
        devices = range(torch.get_device_module(device).device_count())
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            torch.manual_seed(seed)
            yield


def require_room(model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> None:
    """Refuse prompts that leave a model too few positions for what is to follow them."""
    # Recurrent models have no such limit.
    room = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    if room is None:
        return
    for row, (prompt, new) in enumerate(zip(prompts, new_tokens)):
        if len(prompt) + new > room:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens, and with {new} new ones it does not fit into the model's "
                f"{room} positions; shorten either."
            )


def end_token_ids(
    chosen: int | Sequence[int] | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The tokens that end a response: the caller's, or else the model's, or else the tokenizer's."""
    if chosen is None:
        chosen = unwrap(model).generation_config.eos_token_id
    if chosen is None and tokenizer is not None:
        chosen = tokenizer.eos_token_id
    if chosen is None:
        return ()
    return (chosen,) if isinstance(chosen, int) else tuple(chosen)


def read_prompts(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Cache | None:
    """Read all tokens of a batch's prompts but their last ones, equal prompts once.

    `generate` continues from what is returned as from its own: it takes the whole prompts and reads the last tokens.

    Args:
        model: any causal language model, in evaluation mode.
        prompts: token ids, never empty.

    Returns:
        A cache with a line for each prompt, as long as the longest one less one; None where it would save little, or
        where the architecture's cache cannot be repeated.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if model._is_stateful or 2 * len(distinct) > len(prompts) or min(map(len, distinct)) < 2:
        return None
    ids, mask = pad_left([list(prompt[:-1]) for prompt in distinct])
    config = GenerationConfig(max_new_tokens=1, use_cache=True, return_dict_in_generate=True, pad_token_id=0)
    with own_config(model, config):
        # By `generate` itself, which knows what each architecture wants; the token that it finds is not needed.
        read = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    cache = read.get("past_key_values")
    if not is_repeatable(cache):
        return None
    line_of = {prompt: line for line, prompt in enumerate(distinct)}
    # On the CPU, from where they index whatever device a layer is on.
    cache.batch_select_indices(torch.tensor([line_of[tuple(prompt)] for prompt in prompts]))
    return cache


def pad_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and mask (B, L)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@contextmanager
def own_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keep a model's generation defaults out of `generate`, which fills whatever is None with them."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
