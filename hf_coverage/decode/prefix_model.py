"""What a causal language model says after prefixes of a response, and what a process verifier says of them.

Both remember what they were asked most recently, so a decoder that comes back to a prefix pays for it once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_coverage.decode.judge import needed_arguments
from hf_coverage.decode.prefix_reader import PrefixReader
from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.functional.prefix_tree import Prefix
from hf_coverage.measure.generation import Sampling

__all__ = ["NextTokens", "PrefixModel", "PrefixVerifier", "Recent"]

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
        computed: how many prefixes were computed so far.
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
        model: any causal language model.
        prompt: token ids, never empty.
        sampling: what is done to the logits.
        batch_size: prefixes of one forward pass.
        cache_size: prefixes whose distributions are kept, four bytes a token of the vocabulary each, and beside them
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
        logprobs = scores.log_softmax(dim=-1).cpu().numpy()
        everything = np.arange(logprobs.shape[1])
        possible = [everything if (row > -np.inf).all() else np.flatnonzero(row > -np.inf) for row in logprobs]
        return [NextTokens(tokens, row[tokens]) for tokens, row in zip(possible, logprobs)]


class PrefixVerifier(_Asked[float]):
    """Values V >= 0 of prefixes, by a verifier that is called as TRL's reward functions are.

    It gets what it names of `prompts`, `completions`, `completion_ids`, `finished` (whether the prefix is a whole
    response) and the prompt's columns, one entry a prefix each, and runs in this process.

    Args:
        verifier: the callable.
        table: the prompt and its columns.
        tokenizer: turns prefixes into text; None where the prompt is token ids.
        is_whole: whether a prefix is a whole response.
        batch_size: prefixes of one call.
        cache_size: prefixes whose values are kept.
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
