"""Test-time training as a decoding method, for `generate(custom_generate=...)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput

from hf_coverage.functional.head_training import follow_tokens
from hf_coverage.functional.ttt_config import TTTCache, TTTConfig, TTTScope
from hf_coverage.inference.forward import is_sharded
from hf_coverage.ttt.head_tap import HeadTap
from hf_coverage.ttt.processor import AdaptiveHead, plain_logits, refuse_nan
from hf_coverage.ttt.row_models import RowModels

__all__ = ["Adapted", "AdaptedHeads", "AdaptedNetworks", "AdaptedScores", "EndWatch", "refuse_paged", "ttt_generate"]


def ttt_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    ttt_lr: float | None = None,
    ttt_scope: TTTScope | None = None,
    ttt_on_prompt: bool | None = None,
    ttt_radius: float | None = None,
    ttt_decay: float | None = None,
    ttt_lam: float | None = None,
    ttt_top_k: int | None = None,
    ttt_steps: int | None = None,
    ttt_rank: int | None = None,
    ttt_cache: TTTCache | None = None,
    ttt_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateNonBeamOutput | Tensor:
    """Sample or decode greedily with one gradient step after every token.

        theta <- Proj( theta + lr grad log p_theta(y_h | x, y_<h) ),    from the model's theta again in each call

    Not called by hand: `model.generate(..., custom_generate=ttt_generate, ttt_lr=0.1)`, with everything that
    `generate` takes for sampling and greedy decoding. Whatever changes scores (penalties, guidance, masks,
    temperature, top-p, ...) acts on those of the adapted model. Rows that have ended make no steps. The model is not
    changed. With `return_dict_in_generate=True` the result has `token_logprobs` `(B, T)`, the log-probability that the
    adapted model itself gave to each new token, in nats, before anything else changed its scores, and 0 after the end
    of a row; their sum is `log p_TTT(y|x)`. `scores`, where asked for, are what tokens were chosen from; `logits`,
    hidden states, attentions and the cache are those of the plain model.

    theta is the output head, whose steps have a closed form and cost little; or adapters, or all parameters, of every
    row on its own. Of these two a step takes the gradient of what the model returns, whatever it does to its logits,
    and with an exact cache reads all that was written so far once more. Their passes are without dropout. During those
    with all parameters the model has the row's in the place of its own: no other thread may use it meanwhile.

    `cache_implementation="paged"` must not be asked for: `generate` then calls no custom method, and says nothing. It
    gives its `tokenizer` to none either: in the place of `stop_strings` give it
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    Settings that are not given are those of the generation configuration, and those that it does not have either are
    the ones below. To save them with a model give it a configuration made by `GenerationConfig(ttt_lr=0.1, ...)`: one
    that `transformers` derived from the model's (`_from_model_config`) is loaded without them.

    Args:
        model: Given by `generate`, as are the next four and `model_kwargs`.
        input_ids: Token ids `(B, L)`.
        logits_processor: What `generate` prepared.
        stopping_criteria: Likewise.
        generation_config: Likewise.
        ttt_lr: Step size eta, at least 0; 0 is plain `generate`, bit for bit. Needed.
        ttt_scope: What is trained: `"head"`, the output head; `"lora"`, adapters of low rank beside all linear layers
            but the head, which begin as PEFT's do; `"all"`, all parameters, in a copy for every row. The head.
        ttt_on_prompt: Whether to take a step after each token of the prompt as well (dynamic evaluation); no.
        ttt_radius: R of the ball `||theta - theta_0|| <= R` that theta is kept in; no ball.
        ttt_decay: Part of the way back to theta_0 that every step begins with, in [0, 1]; 0.
        ttt_lam: Lambda of normalised steps; plain gradient steps.
        ttt_top_k: Cut the error of a step of the head to the chosen token and the k likeliest ones; exact.
        ttt_steps: Steps on each token; 1.
        ttt_rank: Rank of the adapters; 8.
        ttt_cache: For adapters and all parameters: `"exact"` reads the whole prefix with the parameters of each step;
            `"stale"` leaves the keys and values of earlier tokens as they were computed, and takes the gradient
            through the newest token alone, for a cost per token that does not grow with the prefix. Exact.
        ttt_streamer: What gets the tokens as they come. `generate` gives its own `streamer` to no custom method.
        model_kwargs: Arguments of the model.

    Returns:
        As `generate`: token ids `(B, L + T)`, or a dictionary with `sequences`.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3, for adapters and all parameters.
        ValueError: If the mode of decoding, the scope or a number is none that works here; for the head, if the model
            has none that is linear or changes its logits afterwards; for the others, if it is sharded, quantised
            (`"all"`), has adapters already, or reads more than token ids, or `"stale"` finds no keys and values.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=None)
        >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2]])
        >>> settings = {"max_new_tokens": 6, "do_sample": True, "return_dict_in_generate": True}
        >>> result = model.generate(ids, custom_generate=ttt_generate, ttt_lr=1.0, **settings)
        >>> result.sequences.shape, result.token_logprobs.shape
        (torch.Size([1, 8]), torch.Size([1, 6]))

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """
    given = {
        "lr": ttt_lr,
        "scope": ttt_scope,
        "on_prompt": ttt_on_prompt,
        "radius": ttt_radius,
        "decay": ttt_decay,
        "lam": ttt_lam,
        "top_k": ttt_top_k,
        "steps": ttt_steps,
        "rank": ttt_rank,
        "cache": ttt_cache,
    }
    config = _config(given, generation_config.to_dict())
    if config.lr == 0:  # nothing can move, and the prompt is read as ever, bit for bit
        config = replace(config, on_prompt=False)
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"Test-time training works for sampling and greedy decoding, got {mode.value.replace('_', ' ')}; generate "
            "with `num_beams=1` and without what else asks for that."
        )
    adapted = _adapted(model, input_ids, config, generation_config, model_kwargs)
    if config.on_prompt and config.scope == "head":
        model_kwargs.pop("logits_to_keep", None)  # or the head would only see the last position
    if ttt_streamer is not None:
        ttt_streamer.put(input_ids.cpu())
    watch = EndWatch(stopping_criteria)
    scores = AdaptedScores(adapted, watch)
    try:
        # The loop itself is the host's, which has no public name for it.
        result = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([scores, *logits_processor]),
            stopping_criteria=watch,
            generation_config=generation_config,
            synced_gpus=is_sharded(model) and PartialState().num_processes > 1,
            streamer=ttt_streamer,
            **model_kwargs,
        )
    finally:
        adapted.close()
    if generation_config.return_dict_in_generate:
        result["token_logprobs"] = scores.finish(result.sequences, start=input_ids.shape[1])
    return result


def refuse_paged(arguments: dict[str, Any], method: str = "Test-time training") -> None:
    """Raise ValueError if these arguments of `generate` make it batch continuously, and call no custom method."""
    if arguments.get("cache_implementation") == "paged":
        raise ValueError(
            f"{method} does not work with continuous batching, which calls no custom method of decoding: "
            'generate without `cache_implementation="paged"`.'
        )


def _config(given: dict[str, Any], saved_config: dict[str, Any]) -> TTTConfig:
    """What was given, or else what the generation configuration has under its name, or else the default."""
    saved = {name.removeprefix("ttt_"): value for name, value in saved_config.items() if name.startswith("ttt_")}
    unknown = sorted(set(saved) - set(given))
    if unknown:
        names = ", ".join(f"`ttt_{name}`" for name in given)
        raise ValueError(f"`generation_config` has a setting `ttt_{unknown[0]}`, expected some of {names}.")
    chosen = saved | {name: value for name, value in given.items() if value is not None}
    if chosen.get("lr") is None:
        raise ValueError("`ttt_lr` must be given, the step size: `generate(..., ttt_lr=0.1)`.")
    if isinstance(chosen["lr"], Tensor):
        raise ValueError(f"`ttt_lr` must be one number for all rows, got {chosen['lr']}.")
    if "steps" in chosen:
        chosen["num_steps"] = chosen.pop("steps")
    return TTTConfig(**chosen)


def _adapted(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: TTTConfig,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Adapted:
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
    if config.scope == "head":
        new_tokens = generation_config.max_length - input_ids.shape[1]
        return AdaptedHeads(model, config, mask, new_tokens=new_tokens)
    repeats = generation_config.num_return_sequences or 1
    return AdaptedNetworks(model, config, mask, repeats=repeats, arguments=model_kwargs)


_RESERVED = 256
"""The most steps of a head that memory is reserved for before they are made."""

_CACHES = {"cache", "past_key_values"}
_KNOWN = {"attention_mask", "cache_params", "logits_to_keep", "position_ids", "use_cache"} | _CACHES
"""What a model gets beside token ids that tells it nothing more than they do, or is checked."""


class EndWatch(StoppingCriteriaList):
    """The criteria as they are, which remember the rows that have ended."""

    finished: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows end here `(B,)`."""
        done = super().__call__(input_ids, scores, **kwargs)
        self.finished = done if self.finished is None else self.finished | done
        return done


class Adapted(ABC):
    """What the rows of a batch have become."""

    @abstractmethod
    def begin(self, ids: Tensor) -> None:
        """Take note of the prompts `(B, L)`, before the first logits."""

    @abstractmethod
    def step(self, tokens: Tensor, active: Tensor | None) -> None:
        """Make the steps on tokens `(B,)` that followed upon the last logits, where rows are `active`; None: all."""

    @abstractmethod
    def logits(self, scores: Tensor) -> Tensor:
        """Logits `(B, V)` in the place of the plain model's scores."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model; a second time does nothing."""


class AdaptedHeads(Adapted):
    """Output heads, in closed form.

    Args:
        model: The model that `generate` runs.
        config: How they make steps.
        mask: Boolean `(B, L)`, where the prompts have tokens; needed to follow them.
        new_tokens: The most that will be decoded.

    Raises:
        ValueError: If the model has no linear output head, or no decoder that reads the prompt.
    """

    def __init__(self, model: PreTrainedModel, config: TTTConfig, mask: Tensor, *, new_tokens: int) -> None:
        if config.on_prompt and model.config.is_encoder_decoder:
            raise ValueError(
                f"`ttt_on_prompt` needs a decoder that reads the prompt itself, and {type(model).__name__} has an "
                "encoder for it; leave it out."
            )
        self._config, self._mask = config, mask
        self._tap = HeadTap(model, keep_positions=config.on_prompt)
        self._has_bias = self._tap.head.bias is not None
        reserved = min(config.num_steps * new_tokens, _RESERVED)
        self._heads = AdaptiveHead(config, has_bias=self._has_bias, capacity=reserved)

    def begin(self, ids: Tensor) -> None:
        """Follow the prompts, if that is asked for."""
        if not self._config.on_prompt:
            return
        hidden = self._tap.take_positions()
        if hidden.shape[:2] != ids.shape:
            raise ValueError(
                f"`ttt_on_prompt` needs the model to read the prompt of {ids.shape[1]} tokens in this call, but its "
                f"head saw {hidden.shape[1]}; give token ids, and no cache that knows part of them."
            )
        if ids.shape[1] < 2:
            return
        state, _ = follow_tokens(
            hidden[:, :-1].to(ids.device),
            ids[:, 1:],
            lambda part: self._tap.logits(part).to(ids.device),
            rule=self._config,
            has_bias=self._has_bias,
            mask=self._mask[:, :-1] & self._mask[:, 1:],
        )
        self._heads.begin(state)

    def step(self, tokens: Tensor, active: Tensor | None) -> None:
        """Move the heads."""
        self._heads.step(tokens, active=active)

    def logits(self, scores: Tensor) -> Tensor:
        """Those of the heads, from what the model's own got and gave."""
        return self._heads.logits(*plain_logits(self._tap.take(), scores))

    def close(self) -> None:
        """Take the hooks off."""
        self._tap.close()


class AdaptedNetworks(Adapted):
    """Adapters or all parameters, by the network's own gradient.

    The host's loop runs the plain model beside them, a token at a time, and its scores are not used.

    Args:
        model: The model that `generate` runs.
        config: How they make steps.
        mask: Boolean `(B, L)`, where the prompts have tokens.
        repeats: How many rows after one another have the same prompt.
        arguments: What `generate` gives the model beside token ids.

    Raises:
        ValueError: If the model reads something that these passes do not; while decoding, if steps were so large that
            logits are NaN.
    """

    def __init__(
        self, model: PreTrainedModel, config: TTTConfig, mask: Tensor, *, repeats: int, arguments: dict[str, Any]
    ) -> None:
        _refuse_more_than_tokens(config, mask, arguments)
        self._model, self._config, self._mask, self._repeats = model, config, mask, repeats
        self._rows: RowModels | None = None

    def begin(self, ids: Tensor) -> None:
        """Read the prompts, each once."""
        if self._config.lr == 0:
            return  # nothing can move: the scores stay the plain ones, bit for bit
        apart = slice(None, None, self._repeats)
        self._rows = RowModels(self._model, ids[apart], config=self._config, mask=self._mask[apart])
        if self._repeats > 1:
            self._rows = self._rows.select(torch.arange(len(ids)) // self._repeats)

    def step(self, tokens: Tensor, active: Tensor | None) -> None:
        """Move the parameters."""
        if self._rows is not None:
            self._rows.step(tokens, active=active)

    def logits(self, scores: Tensor) -> Tensor:
        """Those that the networks give themselves."""
        if self._rows is None:
            return scores
        logits = self._rows.logits().to(scores)
        refuse_nan(logits, self._config)
        return logits

    def close(self) -> None:
        """Free the memory."""
        self._rows = None


class AdaptedScores(LogitsProcessor):
    """The first of the processors in one call of `generate`, which notes what tokens were chosen from.

    Args:
        adapted: What gives the logits.
        watch: What knows the rows that have ended.
    """

    def __init__(self, adapted: Adapted, watch: EndWatch) -> None:
        self._adapted, self._watch = adapted, watch
        self._last: tuple[Tensor, Tensor | None] | None = None
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `(B, V)` of the adapted models."""
        if self._last is None:
            self._adapted.begin(input_ids)
        else:
            self._adapted.step(input_ids[:, -1], self._note(*self._last, input_ids[:, -1]))
        logits = self._adapted.logits(scores)
        self._last = logits, None if self._watch.finished is None else ~self._watch.finished
        return logits.clone()

    def finish(self, sequences: Tensor, *, start: int) -> Tensor:
        """Log-probabilities `(B, T)` of the tokens after `start`."""
        steps = sequences.shape[1] - start
        # `generate` may have seen the end one step late, and taken that step back.
        if self._last is not None and len(self._logprobs) < steps:
            self._note(*self._last, sequences[:, -1])
        return torch.stack(self._logprobs, dim=1)

    def _note(self, logits: Tensor, active: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Note the log-probabilities of tokens that were chosen from `logits`; returns the rows that are `active`."""
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        self._logprobs.append(logprobs if active is None else logprobs.where(active, 0.0))
        return active


def _refuse_more_than_tokens(config: TTTConfig, mask: Tensor, arguments: dict[str, Any]) -> None:
    """Raise if the model reads something that passes over token ids and their padding do not."""
    asked = f'`ttt_scope="{config.scope}"` reads token ids alone'
    given = {name: value for name, value in arguments.items() if value is not None}
    others = sorted(name for name in given if name not in _KNOWN and not name.startswith("output_"))
    if others:
        raise ValueError(f'{asked}, but the model also gets `{others[0]}`; leave it out, or take `ttt_scope="head"`.')
    for name in given.keys() & _CACHES:
        if known := _tokens_known(given[name]):
            raise ValueError(
                f"{asked}, but `{name}` knows {known} of them already, under the plain model; "
                "give the whole prompt as token ids, and no cache that is filled."
            )
    positions = given.get("position_ids")
    usual = (mask.long().cumsum(-1) - 1).where(mask, 0)
    if positions is not None and not torch.equal(positions.expand(usual.shape).where(mask, 0), usual):
        raise ValueError(f"{asked}, from position 0 on, but `position_ids` are others; leave them out.")


def _tokens_known(cache: Cache) -> int | str:
    """How many tokens a cache has read; recurrent layers only tell that there were some."""
    if len(cache) > 0 and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return "some" if cache.has_previous_state() else 0
    return cache.get_seq_length()
