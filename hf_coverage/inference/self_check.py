"""Is a model what scoring takes it for? It is asked, on its own rows, at the cost of a few forward passes.

Scoring believes three things of a model: that what it says of a token depends on no later token, that it does not
depend on what else is in the pass (other rows, padding, the length of the longest), and that going on from a cache
equals reading it all again. No class name tells. Rotary embeddings switch their frequencies with the longest row of a
pass, quantisation takes its scale from a batch, adapters replace the cache that they are given, and a masked language
model loaded as a causal one returns numbers that look like scores.

So one row is read alone and then in company, and log p of its tokens is compared within what rounding explains. What
fails only when shared, padded or batched is done without; what sees later tokens is refused.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_coverage.functional.checks import IntArray
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, is_out_of_memory
from hf_coverage.inference.prefix_cache import continue_lines, is_repeatable

__all__ = ["Reading", "Readout", "agree", "find_reading", "ignores_left_padding", "rounding"]

logger = logging.getLogger(__name__)

# Positions of the row that are compared: more make small faults visible, and cost logits.
_POSITIONS = 64
# Tokens of that row at least, where the longest has more: faults in less may not show.
_LEAST = 16


class Reading(IntEnum):
    """How rows may be read together, from the fastest way to the one that takes least for granted."""

    SHARED = 0
    """Responses of one prompt go on from its cache."""
    PADDED = 1
    """Rows side by side, each from its first token, the shorter ones padded."""
    EQUAL = 2
    """Rows of one length side by side."""
    ALONE = 3
    """Each row in a pass of its own."""


_WORDS = {
    Reading.PADDED: "each from its first token, no prompt shared",
    Reading.EQUAL: "side by side only where they are equally long",
    Reading.ALONE: "one by one",
}


class Readout(NamedTuple):
    """What a model said of some tokens.

    Attributes:
        logprobs: Log p of each token `(P,)`, nats, float64, on the CPU.
        epsilon: Relative rounding of the numbers that it computes with.
    """

    logprobs: Tensor
    epsilon: float


def agree(first: Readout, second: Readout) -> bool:
    """Tell whether two readings of the same tokens differ by rounding alone.

    In float32 no token may differ by more than `2 sqrt(epsilon)`, 7e-4 nats. In half precision (0.18 nats in bfloat16,
    .06 in float16) a router that is close to a tie sends a token to another expert now and then: three quarters of the
    tokens have to agree, and the row as a whole, whose rounding errors add up as their root.

    Args:
        first: One reading.
        second: Another one of the same tokens.

    Returns:
        Whether rounding explains the difference.
    """
    epsilon = max(first.epsilon, second.epsilon)
    tolerance = 2 * math.sqrt(epsilon)
    gaps = _gaps(first, second)
    if epsilon < 1e-5:
        return bool(gaps.abs().max() <= tolerance)
    return bool(
        gaps.abs().quantile(0.75) <= tolerance and gaps.sum().abs() <= tolerance * math.sqrt(max(1, gaps.numel()))
    )


def _gaps(first: Readout, second: Readout) -> Tensor:
    """Differences, nats; 0 where both exclude a token or give NaN, infinite where one does."""
    before, after = first.logprobs, second.logprobs
    gaps = (before - after).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    return gaps.masked_fill((before == after) | (before.isnan() & after.isnan()), 0.0)


def find_reading(
    forwards: Sequence[HeadForward],
    corpus: EncodedCorpus,
    *,
    vocab_size: int,
    fastest: Reading,
    most_positions: int = _POSITIONS,
) -> Reading:
    """Find the fastest way of reading rows that gives each the log-probabilities that it has alone.

    The start of the longest row is read alone, and with the rest of that row to its right and the shortest one beside
    it; where prompts may be shared, two lines go on from the cache of one that recurs, as its responses will. Further
    passes are made only to tell what failed. All processes of a job have to call it, and get the same answer. Use it
    inside `inference`.

    Args:
        forwards: The models that will read the rows.
        corpus: Token ids of all rows.
        vocab_size: V.
        fastest: The fastest way that is wanted; `Reading.SHARED` only where all caches can be repeated.
        most_positions: Positions whose logits may exist at the same time.

    Returns:
        The way, `fastest` or a slower one.

    Raises:
        ValueError: If what a model says of a token changes with the tokens after it.
    """
    found, refusal = fastest, None
    try:
        for forward in forwards:
            check = _Check(forward, corpus, vocab_size, min(most_positions, _POSITIONS))
            found = max(found, check.reading(share=fastest is Reading.SHARED))
    except ValueError as error:  # raised below, on every process: the others would wait for ever
        refusal = error
    if PartialState().num_processes > 1:
        answers = gather_object([(found, refusal)])
        found = max(reading for reading, _ in answers)
        refusal = next((error for _, error in answers if error is not None), None)
    if refusal is not None:
        raise refusal
    if found is not fastest:
        logger.debug("Rows are read %s: read otherwise, this model gives them other numbers.", _WORDS[found])
    return found


def ignores_left_padding(forward: HeadForward, corpus: EncodedCorpus, *, vocab_size: int, most_positions: int) -> bool:
    """Tell whether padding that is masked on the left of a row changes nothing of what a model says of it.

    Args:
        forward: The model.
        corpus: Token ids of all rows.
        vocab_size: V.
        most_positions: Positions whose logits may exist at the same time.

    Returns:
        Whether prompts of unequal length may stand side by side as `generate` lays them out.
    """
    return _Check(forward, corpus, vocab_size, min(most_positions, _POSITIONS)).ignores_left_padding()


class _Check:
    """A row, what stands beside it, and what a model says of it."""

    def __init__(self, forward: HeadForward, corpus: EncodedCorpus, vocab_size: int, most: int) -> None:
        self._forward = forward
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(corpus.prompts, corpus.completions)]
        rows = sorted(range(len(corpus)), key=lengths.__getitem__)
        short, long = ([*corpus.prompts[row], *corpus.completions[row]] for row in (rows[0], rows[-1]))
        self._longest, self._mate = long[:-1], short[:-1]
        # The row is as long as the shortest one, so that whatever a length switches is switched by its company.
        size = min(max(len(self._mate), _LEAST), max(1, len(self._longest) - 1))
        self._row = self._longest[:size]
        self._other_future = [(token + 1) % vocab_size for token in self._longest[size:]]
        self._most = most
        self._positions = self._spread(size)
        self._labels = torch.tensor([long[place + 1] for place in self._positions])
        # Adapters may be switched on by tokens of the prompt: only a prompt that will be shared shows what that does.
        times = Counter(map(tuple, corpus.prompts))

        def worth(row: int) -> tuple[bool, bool, int]:
            return len(corpus.completions[row]) > 1, times[tuple(corpus.prompts[row])] > 1, lengths[row]

        shared = max(rows, key=worth)
        self._prompt, self._response = corpus.prompts[shared], corpus.completions[shared][: _POSITIONS + 1]

    def reading(self, *, share: bool) -> Reading:
        """The fastest way of reading that changes nothing."""
        alone = self._read([self._row])
        if agree(alone, self._read([self._longest, self._mate])):
            return Reading.SHARED if share and self._continues() else Reading.PADDED
        self._require_causal()
        equal = self._read([self._row, self._longest[::-1][: len(self._row)]])
        return Reading.EQUAL if agree(alone, equal) else Reading.ALONE

    def _require_causal(self) -> None:
        """Refuse a model to which later tokens make a difference, in passes of one length and one row."""
        first, second = self._read([self._longest]), self._read([self._row + self._other_future])
        if agree(first, second):
            return
        gaps = _gaps(first, second).abs()
        place = self._positions[int(gaps.argmax())]
        raise ValueError(
            f"`model` {type(self._forward.model).__name__} is not causal: log p of a token changes with the tokens "
            f"after it, by {gaps.max():.2g} nats at position {place}, so what its passes give is not log p(y|x). "
            "Load it as a decoder: a BERT-type model needs `is_decoder=True` in its "
            "configuration, others `is_causal=True`; masked language models and encoder-decoders have no log p(y|x). "
            "If it is quantised with scales that a whole pass decides, take one whose scales are those of each token."
        )

    def _continues(self) -> bool:
        """Whether two lines that go on from one cache say what the row alone says."""
        start, count = len(self._prompt), len(self._response) - 1
        if not count:
            return True
        places = self._spread(count)
        labels = torch.tensor([self._response[place + 1] for place in places])
        whole = self._forward(np.array([[*self._prompt, *self._response[:-1]]]), places + start)
        alone = self._readout(whole.take_logits(slice(None)), labels)
        try:
            begun = self._forward(np.array([self._prompt]), np.array([start - 1]), keep_cache=True)
            if not is_repeatable(begun.cache):
                return False
            cache = continue_lines(begun.cache, np.zeros(2, dtype=np.int64), last=True)
            output = self._forward(np.array([self._response[:-1]] * 2), places + count, cache=cache)
        except Exception as error:  # a model that cannot go on from a cache is read without
            if is_out_of_memory(error):
                raise
            logger.debug("The model cannot go on from a cache: %s: %s", type(error).__name__, error)
            return False
        return agree(alone, self._readout(output.take_logits(slice(None)), labels))

    def _spread(self, size: int) -> IntArray:
        """Positions of `size` that are compared."""
        return np.unique(np.linspace(0, size - 1, min(size, self._most)).round().astype(np.int64))

    def ignores_left_padding(self) -> bool:
        """Whether the row says the same behind padding that a mask takes out."""
        padding = max(1, len(self._longest) - len(self._row))
        mask = torch.ones(1, padding + len(self._row), dtype=torch.int64)
        mask[:, :padding] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        known = inspect.signature(self._forward.model.forward).parameters
        ids = np.array([[0] * padding + self._row])
        output = self._forward(
            ids, self._positions + padding, inputs={name: value for name, value in inputs.items() if name in known}
        )
        padded = self._readout(output.take_logits(slice(None)), self._labels)
        return "attention_mask" in known and agree(self._read([self._row]), padded)

    def _read(self, lines: list[list[int]]) -> Readout:
        """What the model says of the first line's tokens; the other lines stand beside it."""
        ids = np.zeros((len(lines), max(map(len, lines))), dtype=np.int64)
        for index, line in enumerate(lines):
            ids[index, : len(line)] = line
        return self._readout(self._forward(ids, self._positions).take_logits(slice(None)), self._labels)

    def _readout(self, logits: Tensor, labels: Tensor) -> Readout:
        values = token_logprobs(logits, labels.to(logits.device)).double().cpu()
        return Readout(values, rounding(self._forward.model, logits))


def rounding(model: nn.Module, logits: Tensor) -> float:
    """Find the relative rounding of what a model computes with, from its parameters and from what it returned.

    Args:
        model: The model.
        logits: Some of its logits, of any shape; autocast may have made their dtype finer than they are.

    Returns:
        The epsilon of the coarsest dtype that shows.
    """
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    # Of finer logits, too, log p is taken in float32.
    shown = [torch.finfo(kind).eps for kind in {*kinds, logits.dtype, torch.float32}]
    for kind in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(kind).to(logits.dtype), logits):
            shown.append(torch.finfo(kind).eps)
    if logits.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        shown.append(2.0**-10)  # TF32
    return max(shown)
