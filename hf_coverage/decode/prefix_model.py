"""What a causal language model says after prefixes of a response, and what a process verifier says of them.

Both remember what they were asked most recently, so a decoder that comes back to a prefix pays for it once.
"""

from __future__ import annotations

import copy
import inspect
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.decode.verifier_runner import needed_arguments
from hf_coverage.functional.checks import IntArray
from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.prefix_tree import Prefix
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.inference.prefix_cache import is_repeatable
from hf_coverage.inference.sampler import Sampling
from hf_coverage.inference.self_check import Readout, agree, rounding

__all__ = ["NextTokens", "PrefixModel", "PrefixReader", "PrefixVerifier", "Recent"]

Answer = TypeVar("Answer")


class NextTokens(NamedTuple):
    """The tokens that may follow a prefix.

    Attributes:
        tokens: `(A,)` those of probability above 0.
        logprobs: `(A,)` log p(v | x, y), nats, float32.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]


class Recent(OrderedDict[Prefix, Answer]):
    """A dictionary of the `size` entries that were used last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def recall(self, prefix: Prefix) -> Answer | None:
        """The entry of a prefix; None where there is none."""
        if prefix in self:
            self.move_to_end(prefix)
            return self[prefix]
        return None

    def keep(self, prefix: Prefix, answer: Answer) -> None:
        """Add an entry."""
        self[prefix] = answer
        while len(self) > self._size:
            self.popitem(last=False)


class _Asked(ABC, Generic[Answer]):
    """Answers to prefixes, computed in batches and kept for a while.

    Attributes:
        computed: How many prefixes were computed so far.
    """

    def __init__(self, batch_size: int, cache_size: int) -> None:
        self.batch_size, self.computed = batch_size, 0
        self._recent: Recent[Answer] = Recent(cache_size)

    def answers(self, prefixes: Iterable[Prefix]) -> dict[Prefix, Answer]:
        """Answers to prefixes by prefix; what is not known is computed together."""
        found: dict[Prefix, Answer] = {}
        unknown: dict[Prefix, None] = {}
        for prefix in prefixes:
            answer = self._recent.recall(prefix)
            if answer is None:
                unknown[prefix] = None
            else:
                found[prefix] = answer
        ordered = sorted(unknown, key=len)  # of like length, so that little is padded
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            for prefix, answer in zip(batch, self._compute(batch)):
                found[prefix] = answer
                self._recent.keep(prefix, answer)
            self.computed += len(batch)
        return found

    @abstractmethod
    def _compute(self, prefixes: list[Prefix]) -> list[Answer]: ...


class PrefixModel(_Asked[NextTokens]):
    """Next-token distributions of a model after prefixes of a response to one prompt.

    Args:
        model: Any causal language model.
        prompt: Token ids, never empty.
        sampling: What is done to the logits.
        batch_size: Prefixes of one forward pass.
        cache_size: Prefixes whose distributions are kept, four bytes a token of the vocabulary each, and beside them
            the keys and values of their last tokens.
    """

    def __init__(
        self, model: nn.Module, prompt: Sequence[int], sampling: Sampling, *, batch_size: int, cache_size: int
    ) -> None:
        super().__init__(batch_size, cache_size)
        self._reader = PrefixReader(model, prompt, size=cache_size)
        self._processors = sampling.processors()

    def _compute(self, prefixes: list[Prefix]) -> list[NextTokens]:
        scores = self._reader.logits(prefixes).float()
        for processor in self._processors:
            scores = processor(torch.empty(0), scores)
        logprobs = log_softmax(scores).cpu().numpy()
        everything = np.arange(logprobs.shape[1])
        possible = [everything if (row > -np.inf).all() else np.flatnonzero(row > -np.inf) for row in logprobs]
        return [NextTokens(tokens, row[tokens]) for tokens, row in zip(possible, logprobs)]


class PrefixVerifier(_Asked[float]):
    """Values V >= 0 of prefixes, by a verifier that is called as TRL's reward functions are.

    It gets what it names of `prompts`, `completions`, `completion_ids`, `finished` (whether the prefix is a whole
    response) and the prompt's columns, one entry a prefix each, and runs in this process.

    Args:
        verifier: The callable.
        table: The prompt and its columns.
        tokenizer: Turns prefixes into text; None where the prompt is token ids.
        is_whole: Whether a prefix is a whole response.
        batch_size: Prefixes of one call.
        cache_size: Prefixes whose values are kept.
    """

    def __init__(
        self,
        verifier: Callable[..., Any],
        table: PromptTable,
        tokenizer: PreTrainedTokenizerBase | None,
        is_whole: Callable[[Prefix], bool],
        *,
        batch_size: int,
        cache_size: int,
    ) -> None:
        super().__init__(batch_size, cache_size)
        self._verifier, self._table, self._tokenizer, self._is_whole = verifier, table, tokenizer, is_whole
        self._names = needed_arguments(verifier, [*table.available, "finished"], table.varying)
        self._needs_text = table.kind != "token ids"

    def _compute(self, prefixes: list[Prefix]) -> list[float]:
        arguments = self._arguments(prefixes)
        try:
            returned = self._verifier(**arguments)
        except Exception as error:  # whatever it is, it says nothing of which prefixes it was about
            raise RuntimeError(
                f"`verifier` raised {type(error).__name__} on {len(prefixes)} prefixes, the first of them "
                f"{list(prefixes[0])}: {error}. It must give every prefix a value, those that lead nowhere 0."
            ) from error
        values = returned.tolist() if isinstance(returned, (np.ndarray, torch.Tensor)) else returned
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"`verifier` must return a list of numbers, one a prefix, but returned {values!r}.")
        if len(values) != len(prefixes):
            raise ValueError(f"`verifier` must return one value a prefix, but gave {len(values)} for {len(prefixes)}.")
        return [_checked(value, prefix) for value, prefix in zip(values, prefixes)]

    def _arguments(self, prefixes: list[Prefix]) -> dict[str, list[Any]]:
        texts: list[str | None] = [None] * len(prefixes)
        if self._needs_text and self._tokenizer is not None:
            texts = self._tokenizer.batch_decode([list(prefix) for prefix in prefixes], skip_special_tokens=True)
        names = [name for name in self._names if name != "finished"]
        samples = [{"prompt": 0, "ids": list(prefix), "text": text} for prefix, text in zip(prefixes, texts)]
        rows = [self._table.arguments(sample, names) for sample in samples]
        arguments = {name: [row[name] for row in rows] for name in names}
        if "finished" in self._names:
            arguments["finished"] = [self._is_whole(prefix) for prefix in prefixes]
        return arguments


def _checked(value: Any, prefix: Prefix) -> float:
    number = value.item() if isinstance(value, (np.generic, torch.Tensor)) else value
    if not isinstance(number, (bool, int, float)):
        raise TypeError(f"`verifier` must return numbers, but gave {number!r} to the prefix {list(prefix)}.")
    if not 0 <= number < np.inf:
        raise ValueError(
            f"`verifier` must return finite values of at least 0, but gave {number} to the prefix {list(prefix)}; "
            "turn log-odds or rewards below 0 into values first, for example by exp(reward / beta)."
        )
    return float(number)


_Added = tuple[Cache, list[Prefix], int]
"""A cache with the keys and values that a pass has added, its prefixes, and how many tokens of each it has read."""


logger = logging.getLogger(__name__)

# Batches whose shortest and longest prefix are read once more, alone.
_PROOFS = 3


class PrefixReader:
    """A causal language model that reads of a prefix the last token, and of the others those it has forgotten.

    Prefixes of several lengths run together, padded on the left as `generate` pads. Where an architecture's cache does
    not hold keys and values by token (recurrent states), prompt and prefix are read as a whole each time; so they are
    where the first answers show that the model says something else of what it reads alone, and if that changes them
    still, one by one.

    Args:
        model: Any causal language model.
        prompt: Token ids, never empty; they are read once, and kept.
        size: Tokens of responses whose keys and values are kept: those used last.
    """

    def __init__(self, model: nn.Module, prompt: Sequence[int], *, size: int) -> None:
        self._forward = HeadForward(model)
        self._prompt = list(prompt)
        self._kept: _KeptTokens | None = None
        self._together, self._unproved = True, _PROOFS
        # Wrappers, such as an adapter's, do not say what the model in them takes.
        inner = next((part for part in self._forward.model.modules() if isinstance(part, PreTrainedModel)), None)
        self._takes_positions = inner is not None and "position_ids" in inspect.signature(inner.forward).parameters
        one = np.zeros((1, 1), dtype=np.int64)
        with inference(self._forward.model):
            cache = self._forward(one, one[0], keep_cache=True).cache
            # Prefix tuning brings a cache of its own, and what replaces a given one leaves that empty.
            if inner is not None and cache is not None and is_repeatable(cache) and cache.get_seq_length() == 1:
                kept = _KeptTokens(cache, len(self._prompt), size)
                _, added = self._read([()], [[]], kept)
                if all(layer.keys is not None for layer, pool in zip(added[0].layers, kept.pools) if pool is not None):
                    kept.keep(*added)
                    self._kept = kept

    def logits(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits `(B, V)` after the prefixes, as the model returns them."""
        with inference(self._forward.model):
            found = self._read_all(prefixes)
            if self._unproved and any(prefixes):
                self._unproved -= 1
                chosen = {min(prefixes, key=len), max(prefixes, key=len)}
                alone = {prefix: self._read_whole([prefix])[0] for prefix in chosen}
                while (self._kept is not None or self._together) and not all(
                    self._agrees(found[prefixes.index(prefix)], logits) for prefix, logits in alone.items()
                ):
                    self._together, self._kept = self._kept is not None, None
                    logger.debug("Prefixes are read %s.", "whole" if self._together else "one by one")
                    found = self._read_all(prefixes)
        return found

    def _read_all(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits `(B, V)` after the prefixes, read in the fastest way that is still taken to be right."""
        if self._kept is None:
            lines = [prefixes] if self._together else [[prefix] for prefix in prefixes]
            return torch.cat([self._read_whole(together) for together in lines])
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

    def _agrees(self, found: Tensor, alone: Tensor) -> bool:
        """Whether two readings of a prefix give its likeliest next tokens the same probabilities."""
        likeliest = alone.topk(min(32, len(alone))).indices
        epsilon = rounding(self._forward.model, alone)
        first, second = (log_softmax(logits)[likeliest].double().cpu() for logits in (found, alone))
        return agree(Readout(first, epsilon), Readout(second, epsilon))

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
        template: A repeatable cache of the model.
        prompt_length: Tokens of the prompt.
        size: Most tokens of responses.
    """

    def __init__(self, template: Cache, prompt_length: int, size: int) -> None:
        self._template, self._prompt_length, self._size = template, prompt_length, size
        self._slots: OrderedDict[Prefix, int] = OrderedDict()
        self.pools = [_Pool(layer) if layer.is_initialized else None for layer in template.layers]

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
            for layer, pool in zip(self._template.layers, self.pools)
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
            for layer, pool in zip(cache.layers, self.pools):
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
