"""Racing: dropping hopeless candidates of a tournament before all rows are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_coverage.functional.checks import FloatArray, check_confidence, check_count
from hf_coverage.functional.tournament_challenges import count_challenges, row_layout

__all__ = ["Race", "race"]


class Race(NamedTuple):
    """Who is left of M candidates after a race.

    Attributes:
        survivors: Candidates that may have the least score, ascending.
        rows: `(M,)` how many rows each was challenged on before it was dropped, or all.
        rates: `(M, M)` C[a, b] on those rows.
        confidence: Probability that no candidate with the least score was dropped.
    """

    survivors: tuple[int, ...]
    rows: np.ndarray
    rates: FloatArray
    confidence: float


def race(logprobs: Sequence[FloatArray], n: float, *, confidence: float = 0.99, seed: int = 0) -> Race:
    """Find the candidates that can still win the simple tournament, each on as few rows as that takes.

    Rows are compared in random order, in rounds that end after 1024, 2048, 4096, ... rows. After each round the score
    of every candidate in the race, `score(b) = max_a C[a, b]`, lies between two bounds, and b is dropped when its
    lower bound is above another one's upper bound. A dropped candidate still challenges the others, so their scores
    are those of the full tournament. The bounds are Chernoff's for all pairs and rounds at once, with C_t the rate on
    the first t rows, `t kl(C_t, C) <= log(2 M^2 rounds / (1 - confidence))`; drawing rows without replacement only
    makes them safer (Hoeffding, 1963). Whether rows share prompts does not matter: the chance is in their order alone.

    Args:
        logprobs: M arrays `(R,)`, log p of each candidate, nats.
        n: A real number >= 1.
        confidence: Probability, over the order of the rows, that whoever has the least score on all rows is among the
            survivors.
        seed: Of the order.

    Returns:
        The survivors; those of several have been challenged on all rows.

    Example:
        >>> rows = np.zeros(20_000)
        >>> result = race([rows - 1.0, rows - 2.0, rows - 9.0], n=16)
        >>> result.survivors, result.rows.tolist()
        ((0, 1), [20000, 20000, 1024])
    """
    check_confidence(confidence)
    check_count(seed, "seed", least=0)
    num_candidates = len(logprobs)
    layout = row_layout(logprobs[0].size, seed=seed, shuffle=True, max_blocks=1)
    ends = _rounds(layout.widths.size)
    allowance = math.log(2 * num_candidates**2 * len(ends) / (1 - confidence))
    counts, rows = np.zeros((num_candidates, num_candidates), np.int64), np.zeros(num_candidates, np.int64)
    racing = np.arange(num_candidates)
    for start, end in zip([0, *ends], ends):
        for part in count_challenges(logprobs, [n], layout, defenders=racing.tolist(), layers=range(start, end)):
            counts[:, part.defenders] += part.counts[0].sum(-1).T
        read = int(layout.widths[:end].sum())
        rows[racing] = read
        if read == layout.order.size:
            break
        worst = counts[:, racing].max(0) / read
        low, high = (_kl_bound(worst, allowance / read, upper=upper) for upper in (False, True))
        racing = racing[low <= high.min()]
        if racing.size == 1:
            break
    return Race(tuple(racing.tolist()), rows, counts / rows, confidence)


def _rounds(num_layers: int) -> list[int]:
    """Ends of the rounds, in layers, each round as long as all before it."""
    doubling = [2**k for k in range(num_layers.bit_length()) if 2**k < num_layers]
    return [*doubling, num_layers]


def _kl_bound(mean: FloatArray, allowance: float, *, upper: bool) -> FloatArray:
    """The q farthest above (or below) `mean` with `kl(mean, q) <= allowance`, by bisection."""
    inside, outside = mean, np.full_like(mean, float(upper))
    for _ in range(60):
        middle = (inside + outside) / 2
        within = _kl(mean, middle) <= allowance
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return outside


def _kl(p: FloatArray, q: FloatArray) -> FloatArray:
    """Divergence of two coins."""
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(p > 0, p * np.log(p / q), 0.0)
        tails = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
    return heads + tails
