"""Keys and values that stay as they were computed while the parameters move on, and let no gradient through.

References:
    arXiv 1904.08378 (dynamic evaluation of Transformer language models).
"""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from hf_coverage.measure.prefix_cache import is_repeatable

__all__ = ["copied_cache", "detached_cache", "new_stale_cache"]


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
