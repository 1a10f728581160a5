"""Scores of models that train while they decode, put before all other logits processors of one call of `generate`.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_coverage.functional.head_training import follow_tokens
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.ttt.head_tap import HeadTap
from hf_coverage.ttt.processor import AdaptiveHead, plain_logits, refuse_nan
from hf_coverage.ttt.row_models import RowModels

__all__ = ["Adapted", "AdaptedHeads", "AdaptedNetworks", "AdaptedScores", "EndWatch"]

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
