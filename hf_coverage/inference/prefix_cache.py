"""Key-value caches from which several responses continue, without a copy of the prompt for each of them.

Repeating a cache K times costs K times its memory in all layers at once. Here a layer repeats its part when attention
asks for it and lets go of it again, so only one layer's repetition exists at a time.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_coverage.functional.checks import IntArray

__all__ = [
    "CACHE",
    "PrefixLayer",
    "cache_argument",
    "continue_lines",
    "copied_cache",
    "detached_cache",
    "is_repeatable",
    "new_stale_cache",
]

_GENERATION = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _GENERATION else "past_key_values"
"""What the installed transformers calls a key-value cache, in arguments and outputs: `cache` from 5.24 on."""


class PrefixLayer(CacheLayerMixin):
    """One layer of a cache whose lines begin as lines of another one.

    Args:
        prefix: What came before, one line per prompt; never changed.
        lines: Line of `prefix` that each sequence continues `(S,)`, int64.
        last: Whether the next pass is the last one, so that its keys and values need not be kept.
    """

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, prefix: DynamicLayer, lines: Tensor, *, last: bool) -> None:
        super().__init__()
        self.is_sliding = prefix.is_sliding
        self.is_initialized = True
        self._prefix = prefix.keys, prefix.values
        self._lines, self._last = lines, last
        # A sliding window's layer has dropped what no later token can see.
        self._dropped = prefix.get_seq_length() - prefix.keys.shape[-2]
        self._own_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the prefix is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values, and return all that the new tokens can see."""
        self._own_length += key_states.shape[-2]
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if not self._last:
            self.keys, self.values = key_states, value_states
        keys, values = (part[self._lines] for part in self._prefix)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what `update` will return, and how many tokens precede it."""
        return self.get_seq_length() - self._dropped + query_length, self._dropped

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self._dropped + self._prefix[0].shape[-2] + self._own_length

    def get_max_length(self) -> int:
        """There is none."""
        return -1


def cache_argument(forward: Callable[..., Any]) -> str:
    """Name the argument by which a model takes a key-value cache; a checkpoint's own code may keep the old name.

    Args:
        forward: The model's `forward`, or that of what it is wrapped in, which hands on what it does not name.
    """
    return "past_key_values" if "past_key_values" in inspect.signature(forward).parameters else CACHE


def is_repeatable(cache: Any) -> bool:
    """Tell whether a cache holds a line of keys and values per sequence, which several responses can continue.

    Recurrent states, quantised and offloaded caches do not.

    Args:
        cache: What a model returned as its cache.

    Returns:
        Whether `continue_lines` takes it.
    """
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) > 0
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    )


def continue_lines(cache: Cache, lines: IntArray, *, last: bool) -> Cache:
    """Make a cache whose sequences continue lines of another one, which stays as it is.

    Args:
        cache: A repeatable cache.
        lines: Line that each new sequence continues `(S,)`; a line may be continued several times.
        last: Whether only one more pass follows.

    Returns:
        A cache of S sequences.
    """
    continued = copy.copy(cache)
    # Layers that share another one's keys have none of their own.
    continued.layers = [
        PrefixLayer(layer, torch.from_numpy(lines).to(layer.keys.device), last=last)
        if layer.is_initialized
        else copy.copy(layer)
        for layer in cache.layers
    ]
    return continued


def new_stale_cache(config: PreTrainedConfig) -> Cache:
    """Make an empty cache for a model.

    Args:
        config: That of the model.

    Returns:
        The cache.

    Raises:
        ValueError: If the model keeps something else than keys and values.
    """
    cache = DynamicCache(config=config)
    if not is_repeatable(cache):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(
            f'`cache="stale"` needs a model that keeps keys and values alone, but this one has {kinds}; take '
            '`cache="exact"`.'
        )
    return cache


def copied_cache(cache: Cache, lines: Tensor | None = None) -> Cache:
    """Copy a cache, so that what one of them gets is not in the other; no keys or values are copied for that.

    Args:
        cache: A cache made here.
        lines: Which of its lines to copy `(c,)`, int64; None: all.

    Returns:
        The copy.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    if lines is not None:
        for layer in copied.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (part[lines.to(part.device)] for part in (layer.keys, layer.values))
    return copied


def detached_cache(cache: Cache, length: int) -> Cache:
    """Copy a cache without the graphs of its keys and values.

    Args:
        cache: A cache made here.
        length: Tokens that the model must have read into it.

    Returns:
        The copy.

    Raises:
        RuntimeError: If there are others.
    """
    if cache.get_seq_length() != length:
        raise RuntimeError(
            f"Expected the model to keep the keys and values of {length} tokens, got {cache.get_seq_length()}; take "
            '`cache="exact"`.'
        )
    detached = copied_cache(cache)
    for layer in detached.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return detached
