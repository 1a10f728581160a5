"""Test-time training as a decoding method, for `generate(custom_generate=...)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput

from hf_coverage.decode.head_tap import HeadTap
from hf_coverage.decode.test_time_training import AdaptiveHead, plain_logits
from hf_coverage.functional.head_training import follow_tokens
from hf_coverage.functional.step_rule import StepRule
from hf_coverage.measure.forward import is_sharded

__all__ = ["TTTScope", "ttt_generate"]

TTTScope = Literal["head"]
"""What is trained: the output head."""

_RESERVED = 256
"""The most steps that memory is reserved for before they are made."""


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
    of a row; their sum is `log p_TTT(y|x)`. `scores`, where asked for, are what tokens were chosen from.

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
        ttt_scope: What is trained; `"head"`.
        ttt_on_prompt: Whether to take a step after each token of the prompt as well (dynamic evaluation); no.
        ttt_radius: R of the ball `||W - W_0||_F <= R` that the head is kept in; no ball.
        ttt_decay: Part of the way back to W_0 that every step begins with, in [0, 1]; 0.
        ttt_lam: Lambda of normalised steps; plain gradient steps.
        ttt_top_k: Cut the error of a step to the chosen token and the k likeliest ones; exact.
        ttt_steps: Steps on each token; 1.
        ttt_streamer: What gets the tokens as they come. `generate` gives its own `streamer` to no custom method.
        model_kwargs: Arguments of the model.

    Returns:
        As `generate`: token ids `(B, L + T)`, or a dictionary with `sequences`.

    Raises:
        ValueError: If the mode of decoding, the scope or a number is none that works here, or the model has no linear
            output head or changes its logits afterwards.

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
    given = {"lr": ttt_lr, "scope": ttt_scope, "on_prompt": ttt_on_prompt, "radius": ttt_radius, "decay": ttt_decay}
    settings = _Settings.resolve(
        given | {"lam": ttt_lam, "top_k": ttt_top_k, "steps": ttt_steps}, generation_config.to_dict()
    )
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"Test-time training works for sampling and greedy decoding, got {mode.value.replace('_', ' ')}; generate "
            "with `num_beams=1` and without what else asks for that."
        )
    rule = settings.rule()
    mask = None
    if settings.on_prompt:
        mask = _prompt_mask(model, input_ids, model_kwargs)
        model_kwargs.pop("logits_to_keep", None)  # or the head would only see the last position
    if ttt_streamer is not None:
        ttt_streamer.put(input_ids.cpu())
    tap = HeadTap(model, keep_positions=settings.on_prompt)
    watch = _Watch(stopping_criteria)
    reserved = min(settings.steps * (generation_config.max_length - input_ids.shape[1]), _RESERVED)
    processor = _FirstProcessor(tap, rule, watch, prompt=mask, reserved=reserved)
    try:
        # The loop itself is the host's, which has no public name for it.
        result = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([processor, *logits_processor]),
            stopping_criteria=watch,
            generation_config=generation_config,
            synced_gpus=is_sharded(model) and PartialState().num_processes > 1,
            streamer=ttt_streamer,
            **model_kwargs,
        )
    finally:
        tap.close()
    if generation_config.return_dict_in_generate:
        result["token_logprobs"] = processor.finish(result.sequences, start=input_ids.shape[1])
    return result


@dataclass(frozen=True)
class _Settings:
    lr: float
    scope: TTTScope = "head"
    on_prompt: bool = False
    radius: float | None = None
    decay: float = 0.0
    lam: float | None = None
    top_k: int | None = None
    steps: int = 1

    @classmethod
    def resolve(cls, given: dict[str, Any], config: dict[str, Any]) -> _Settings:
        """What was given, or else what the configuration has under its name, or else the default."""
        saved = {name.removeprefix("ttt_"): value for name, value in config.items() if name.startswith("ttt_")}
        unknown = sorted(set(saved) - set(given))
        if unknown:
            names = ", ".join(f"`ttt_{name}`" for name in given)
            raise ValueError(f"`generation_config` has a setting `ttt_{unknown[0]}`, expected some of {names}.")
        chosen = saved | {name: value for name, value in given.items() if value is not None}
        if chosen.get("lr") is None:
            raise ValueError("`ttt_lr` must be given, the step size: `generate(..., ttt_lr=0.1)`.")
        settings = cls(**chosen)
        if settings.scope != "head":
            raise ValueError(f'`ttt_scope` must be "head", the one scope there is, got {settings.scope!r}.')
        return settings

    def rule(self) -> StepRule:
        return StepRule(self.lr, self.radius, decay=self.decay, lam=self.lam, top_k=self.top_k, num_steps=self.steps)


class _Watch(StoppingCriteriaList):
    """The criteria as they are, which remember the rows that have ended."""

    finished: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.finished = done if self.finished is None else self.finished | done
        return done


class _FirstProcessor(LogitsProcessor):
    """Puts the logits of the adapted heads before all other processors, in one call of `generate`."""

    def __init__(self, tap: HeadTap, rule: StepRule, watch: _Watch, *, prompt: Tensor | None, reserved: int) -> None:
        self._tap, self._rule, self._watch, self._prompt = tap, rule, watch, prompt
        self._has_bias = tap.head.bias is not None
        self._heads = AdaptiveHead(rule, has_bias=self._has_bias, capacity=reserved)
        self._last: tuple[Tensor, Tensor | None] | None = None
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        hidden, plain = plain_logits(self._tap.take(), scores)
        if self._last is None:
            self._follow_prompt(input_ids)
        else:
            self._heads.step(input_ids[:, -1], active=self._note(*self._last, input_ids[:, -1]))
        logits = self._heads.logits(hidden, plain)
        self._last = logits, None if self._watch.finished is None else ~self._watch.finished
        return logits.clone()

    def finish(self, sequences: Tensor, *, start: int) -> Tensor:
        """Log-probabilities `(B, T)` of the tokens after `start`."""
        steps = sequences.shape[1] - start
        # `generate` may have seen the end one step late, and taken that step back.
        if self._last is not None and len(self._logprobs) < steps:
            self._note(*self._last, sequences[:, -1])
        return torch.stack(self._logprobs[:steps], dim=1)

    def _note(self, logits: Tensor, active: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Note the log-probabilities of tokens that were chosen from `logits`; returns the rows that are `active`."""
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        self._logprobs.append(logprobs if active is None else logprobs.where(active, 0.0))
        return active

    def _follow_prompt(self, ids: Tensor) -> None:
        if self._prompt is None or ids.shape[1] < 2:
            return
        hidden = self._tap.take_positions()
        if hidden.shape[:2] != ids.shape:
            raise ValueError(
                f"`ttt_on_prompt` needs the model to read the prompt of {ids.shape[1]} tokens in this call, but its "
                f"head saw {hidden.shape[1]}; give token ids, and no cache that knows part of them."
            )
        state, _ = follow_tokens(
            hidden[:, :-1].to(ids.device),
            ids[:, 1:],
            lambda part: self._tap.logits(part).to(ids.device),
            rule=self._rule,
            has_bias=self._has_bias,
            mask=self._prompt[:, :-1] & self._prompt[:, 1:],
        )
        self._heads.begin(state)


def _prompt_mask(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Which ids are tokens and not padding `(B, L)`."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`ttt_on_prompt` needs a decoder that reads the prompt itself, and {type(model).__name__} has an encoder "
            "for it; leave it out."
        )
    mask = model_kwargs.get("attention_mask")
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
