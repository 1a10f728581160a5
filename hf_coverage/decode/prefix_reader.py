"""Logits after prefixes of responses to one prompt, each token read once as long as its keys and values are kept."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_coverage.functional.prefix_tree import Prefix
from hf_coverage.measure.batching import IntArray
from hf_coverage.measure.forward import HeadForward, inference
from hf_coverage.measure.prefix_cache import is_repeatable

__all__ = ["PrefixReader"]

_Added = tuple[Cache, list[Prefix], int]
"""A cache with the keys and values that a pass has added, its prefixes, and how many tokens of each it has read."""


class PrefixReader:
    """A causal language model that reads of a prefix the last token, and of the others those it has forgotten.

    Prefixes of several lengths run together, padded on the left as `generate` pads. Where an architecture's cache does
    not hold keys and values by token (recurrent states), prompt and prefix are read as a whole each time.

    Args:
        model: any causal language model.
        prompt: token ids, never empty; they are read once, and kept.
        size: tokens of responses whose keys and values are kept: those used last.
    """

    def __init__(self, model: nn.Module, prompt: Sequence[int], *, size: int) -> None:
        self._forward = HeadForward(model)
        self._prompt = list(prompt)
        self._kept: _KeptTokens | None = None
        # Wrappers, such as an adapter's, do not say what the model in them takes.
        inner = next((part for part in self._forward.model.modules() if isinstance(part, PreTrainedModel)), None)
        self._takes_positions = inner is not None and "position_ids" in inspect.signature(inner.forward).parameters
        one = np.zeros((1, 1), dtype=np.int64)
        with inference(self._forward.model):
            cache = self._forward(one, one[0], keep_cache=True).cache
            # Prefix tuning brings a cache of its own.
            if inner is not None and cache is not None and is_repeatable(cache) and cache.get_seq_length() == 1:
                self._kept = _KeptTokens(cache, len(self._prompt), size)
                self._kept.keep(*self._read([()], [[]], self._kept)[1])

    def logits(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits `(B, V)` after the prefixes, as the model returns them."""
        with inference(self._forward.model):
            if self._kept is None:
                return self._read_whole(prefixes)
            paths = [self._kept.path(prefix) for prefix in prefixes]
            groups: dict[int, list[int]] = defaultdict(list)
            for row, (prefix, path) in enumerate(zip(prefixes, paths)):
                groups[len(prefix) - len(path)].append(row)  # equally many tokens to read
            parts = [
                self._read([prefixes[row] for row in rows], [paths[row] for row in rows], self._kept)
                for rows in groups.values()
            ]
            for _, added in parts:  # now that all have been read: what is kept may take another one's slot
                self._kept.keep(*added)
        order = torch.tensor([row for rows in groups.values() for row in rows])
        return torch.cat([logits for logits, _ in parts])[order.argsort()]

    def _read(self, prefixes: list[Prefix], paths: list[list[int]], kept: _KeptTokens) -> tuple[Tensor, _Added]:
        """Continue from what is kept of each prefix, by equally many tokens: logits `(B, V)`, and what to keep."""
        known = np.array([len(path) for path in paths])
        width, length = int(known.max()), len(self._prompt) + len(prefixes[0]) - len(paths[0])
        slots = np.zeros((len(paths), width), dtype=np.int64)
        for row, path in enumerate(paths):
            slots[row, width - len(path) :] = path
        mask = np.arange(width + length) >= (width - known)[:, None]
        inputs = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self._takes_positions:
            inputs["position_ids"] = torch.from_numpy(known[:, None] + np.arange(length))
        ids = np.array([[*self._prompt, *prefix][-length:] for prefix in prefixes])
        ends = np.arange(len(prefixes)) * length + length - 1
        cache = kept.continued(slots)
        output = self._forward(ids, ends, cache=cache, inputs=inputs)
        return output.take_logits(slice(None)), (cache, prefixes, length)

    def _read_whole(self, prefixes: Sequence[Prefix]) -> Tensor:
        lines = [[*self._prompt, *prefix] for prefix in prefixes]
        ids = np.zeros((len(lines), max(map(len, lines))), dtype=np.int64)
        for row, line in enumerate(lines):
            ids[row, : len(line)] = line
        ends = np.array([row * ids.shape[1] + len(line) - 1 for row, line in enumerate(lines)])
        return self._forward(ids, ends).take_logits(slice(None))


class _KeptTokens:
    """Keys and values of single tokens, each in a slot of its own: the prompt's first, then those of responses.

    Args:
        template: a repeatable cache of the model.
        prompt_length: tokens of the prompt.
        size: most tokens of responses.
    """

    def __init__(self, template: Cache, prompt_length: int, size: int) -> None:
        self._template, self._prompt_length, self._size = template, prompt_length, size
        self._slots: OrderedDict[Prefix, int] = OrderedDict()
        self._pools = [_Pool(layer) if layer.is_initialized else None for layer in template.layers]

    def path(self, prefix: Prefix) -> list[int]:
        """Slots of the prompt and of the tokens after it up to the first unknown one; the last token is left out."""
        if not prefix:
            return list(range(self._prompt_length - 1))
        slots = list(range(self._prompt_length))
        for length in range(1, len(prefix)):
            slot = self._slots.get(prefix[:length])
            if slot is None:
                break
            slots.append(slot)
        # The first tokens count as used last: without them the others are of no use.
        for length in range(len(slots) - self._prompt_length, 0, -1):
            self._slots.move_to_end(prefix[:length])
        return slots

    def continued(self, slots: IntArray) -> Cache:
        """A cache whose sequences continue the tokens in slots `(B, T)`."""
        cache = copy.copy(self._template)
        # Layers that share another one's keys have none of their own.
        cache.layers = [
            copy.copy(layer) if pool is None else _ContinuedLayer(pool, torch.from_numpy(slots), layer.is_sliding)
            for layer, pool in zip(self._template.layers, self._pools)
        ]
        return cache

    def keep(self, cache: Cache, prefixes: Sequence[Prefix], length: int) -> None:
        """Keep what a pass has added to a continued cache: the last `length` tokens of each prefix."""
        places: dict[int, tuple[int, int]] = {}
        room = self._size
        for row, prefix in enumerate(prefixes):
            for column in range(length):
                end = len(prefix) - length + column + 1
                if end <= 0:
                    places[self._prompt_length + end - 1] = row, column
                elif prefix[:end] not in self._slots and room > 0:
                    places[self._slot_for(prefix[:end])] = row, column
                    room -= 1
        if places:
            rows, columns = map(list, zip(*places.values()))
            for layer, pool in zip(cache.layers, self._pools):
                if pool is not None:
                    pool.put(list(places), layer.keys[rows, :, columns], layer.values[rows, :, columns])

    def _slot_for(self, prefix: Prefix) -> int:
        slot = self._prompt_length + len(self._slots)
        if len(self._slots) == self._size:
            _, slot = self._slots.popitem(last=False)
        self._slots[prefix] = slot
        return slot


class _Pool:
    """Keys and values of one layer `(slots, heads, d)`; grows as slots come into use."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        self._parts = [part[0, :, :0].transpose(0, 1) for part in (layer.keys, layer.values)]

    def take(self, slots: Tensor) -> list[Tensor]:
        """Keys and values `(B, heads, T, d)` in slots `(B, T)`."""
        return [part[slots.to(part.device)].transpose(1, 2) for part in self._parts]

    def put(self, slots: list[int], keys: Tensor, values: Tensor) -> None:
        """Put keys and values `(M, heads, d)` into slots."""
        size = len(self._parts[0])
        if max(slots) >= size:
            more = max(size, max(slots) + 1 - size)
            self._parts = [torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in self._parts]
        for part, new in zip(self._parts, (keys, values)):
            part[slots] = new


class _ContinuedLayer(CacheLayerMixin):
    """One layer of a cache that continues tokens in slots of a pool, and holds only what one pass adds."""

    is_croppable = False

    def __init__(self, pool: _Pool, slots: Tensor, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding, self.is_initialized = is_sliding, True
        self._pool, self._slots = pool, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pool is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of the pass, and return all that its tokens can see."""
        self.keys, self.values = key_states, value_states
        # One layer's copy at a time.
        keys, values = self._pool.take(self._slots)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what `update` will return, and how many tokens precede it."""
        return self._slots.shape[1] + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self._slots.shape[1] + (0 if self.keys is None else self.keys.shape[-2])

    def get_max_length(self) -> int:
        """There is none."""
        return -1
