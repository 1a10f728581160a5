"""Choosing among models that nobody has a density for: tournaments, in which candidates are measured by each other.

`L[m, i] = log p_m(y_i|x_i)` on held-out pairs `(x_i, y_i) ~ D`. Candidate a challenges b with
`C[a, b] = mean_i 1[L[a, i] - L[b, i] >= log N]`: the share of responses to which b gives less than an N-th of the
probability that a gives them. The score of b is its worst challenge, lower is better, and the least score is picked.
Nobody challenges himself: for N > 1 the diagonal of C is 0 by its definition, and for N = 1, where the definition
would give every candidate the score 1, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import FloatArray, check_count, check_logprobs, check_n
from hf_coverage.functional.tournament_challenges import RowLayout, count_challenges, row_layout
from hf_coverage.functional.tournament_racing import race
from hf_coverage.functional.tournament_standing import Rates, Standing, Tally, stand

__all__ = [
    "OnPolicy",
    "challenge_rates",
    "hold_tournament",
    "separating_n",
]

_BLOCKS = 1024
"""Units that a bootstrap resamples, at most."""


class OnPolicy(NamedTuple):
    """What the offset tournament needs beyond the data: generations of a candidate, scored under all of them.

    Attributes:
        logprobs: `(M, S)` log p of every candidate, in the tournament's order, for S responses drawn from this one,
            its own under the very density that they were drawn from.
        groups: `(S,)` the prompt of each response; None if no prompt repeats.
    """

    logprobs: Sequence[ArrayLike]
    groups: Iterable[Any] | None = None


def challenge_rates(logprobs: Iterable[ArrayLike], n: float) -> FloatArray:
    """How often candidates challenge each other, `C[a, b] = mean_i 1[L[a, i] - L[b, i] >= log N]`.

    Args:
        logprobs: `(M, R)` log p of each candidate, nats. A finite value against -inf is a challenge, -inf against -inf
            is none.
        n: A real number >= 1.

    Returns:
        `(M, M)`, the challenger first; the diagonal is 0.

    Example:
        >>> challenge_rates([[-1.0, -1.0, -9.0], [-1.0, -4.0, -2.0]], n=8)
        array([[0.        , 0.33333333],
               [0.33333333, 0.        ]])

    References:
        arXiv 2510.15020, Eq. (28).
    """
    return hold_tournament(logprobs, n, replicates=0)[0].rates


def hold_tournament(
    logprobs: Iterable[ArrayLike],
    n: float | Sequence[float],
    *,
    on_policy: Sequence[OnPolicy] | None = None,
    gamma: float = 1.0,
    groups: Iterable[Any] | None = None,
    replicates: int = 1000,
    seed: int = 0,
    defenders: Sequence[int] | None = None,
) -> list[Standing]:
    """Hold the tournament of M candidates on the same R rows, at one N or, in the same pass, at many.

    `score(b) = max_a { C[a, b] - 2 g O[a, b] }`. The offset `O[a, b] = mean P_{y ~ p_b}[p_a(y|x) / p_b(y|x) >= N]` is
    how often a would challenge b if the responses were b's own; without `on_policy` it is taken as 0, the simple
    tournament. Equal scores are ranked by the mean challenge, then by cross-entropy, then in the order given.

    Win rates are a bootstrap over prompts, or over at most 1024 random blocks of them, by the same rules; candidates
    that no rule tells apart share a win. Beyond the table it all needs less than 1 GB.

    Args:
        logprobs: `(M, R)` log p of each candidate, nats; M arrays need not lie in one.
        n: One or K real numbers >= 1.
        on_policy: M sets of generations, one of each candidate, for the offset tournament.
        gamma: g, the weight of the offset.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        replicates: Bootstrap samples; 0 for none. A single prompt has none either.
        seed: Of the bootstrap.
        defenders: Candidates to score, the others only challenge; None scores all.

    Returns:
        K standings.

    Raises:
        ValueError: On unequal numbers of rows, values that are no log-probabilities, or sizes that do not fit.

    Example:
        >>> (standing,) = hold_tournament([[-1.0, -1.0, -9.0], [-1.0, -4.0, -2.0]], n=8)
        >>> standing.scores.round(2), standing.tied, standing.decided_by, standing.ranking
        (array([0.33, 0.33]), (1, 0), 'cross-entropy', (1, 0))

    References:
        arXiv 2510.15020, Eq. (28), (29), (32) and (101).
    """
    levels = [check_n(value) for value in (n if isinstance(n, Iterable) else [n])]
    table = _checked(logprobs, "logprobs")
    if on_policy is not None and len(on_policy) != len(table):
        raise ValueError(
            f"`on_policy` must hold generations of each of the {len(table)} candidates, but holds {len(on_policy)}."
        )
    check_count(replicates, "replicates", least=0)
    check_count(seed, "seed", least=0)
    if not 0 < gamma < math.inf:
        raise ValueError(
            f"`gamma` must be finite and > 0, but is {gamma}; without `on_policy` there is no offset to weigh."
        )
    rng = np.random.default_rng(seed)
    layout = row_layout(table[0].size, groups=groups, seed=seed, max_blocks=_BLOCKS if replicates else 1)
    if layout.num_groups < 2:
        replicates = 0  # one prompt drawn anew is the same one: it would win every time
    draws = _draw(layout, replicates, rng)
    chosen = range(len(table)) if defenders is None else defenders
    tallies = [Tally(len(table), replicates) for _ in levels]
    for part in count_challenges(table, levels, layout, defenders=chosen):
        for place, b in enumerate(part.defenders):
            offsets = (
                None if on_policy is None else _offset(on_policy[b], b, levels, gamma, len(table), replicates, seed)
            )
            for k, tally in enumerate(tallies):
                rates = _rates(part.counts[k, place], layout, draws)
                tally.add(b, rates, None if offsets is None else offsets[k])
    entropy = np.array([-np.minimum(values, 0.0).mean() for values in table])
    drawn_entropy = _drawn_cross_entropies(table, layout, draws) if replicates else None
    return [
        stand(level, tally, entropy, drawn_entropy, list(chosen), layout.num_groups)
        for level, tally in zip(levels, tallies)
    ]


def separating_n(
    logprobs: Iterable[ArrayLike],
    n: float,
    *,
    race_confidence: float | None = None,
    seed: int = 0,
    **offset: Any,
) -> float | None:
    """Largest of `n / sqrt(2)`, `n / 2`, ... above 1, to three digits, where the least score is one candidate's alone.

    As N grows all challenges cease and all scores become 0: the tournament then says only that no candidate is worse
    than the others by a factor of N anywhere.

    Args:
        logprobs: As in `hold_tournament`.
        n: The N at which scores are tied.
        race_confidence: Hold a race at each N first, such that all of them together keep whoever has the least score
            with this probability; None compares all on all rows.
        seed: Of the races.
        **offset: `on_policy` and `gamma` of an offset tournament, which cannot be raced.

    Returns:
        N; None where candidates are tied at all of them.

    Example:
        >>> separating_n([[-1.0, -1.0, -3.0], [-1.0, -3.0, -2.5]], n=16)
        5.66
    """
    table = _checked(logprobs, "logprobs")
    halving = (n / math.sqrt(2) ** step for step in range(1, math.ceil(2 * math.log2(n)) + 1))
    levels = [level for level in (float(f"{level:.3g}") for level in halving) if 1 < level < n]
    for level in levels:
        # A race at n says nothing here: who was hopeless there may win at a smaller N.
        each = None if race_confidence is None else 1 - (1 - race_confidence) / len(levels)
        left = None if each is None else race(table, level, confidence=each, seed=seed).survivors
        if len(hold_tournament(table, level, replicates=0, defenders=left, **offset)[0].tied) == 1:
            return level
    return None


def _checked(logprobs: Iterable[ArrayLike], name: str) -> list[FloatArray]:
    table = [check_logprobs(values, name=f"{name}[{m}]") for m, values in enumerate(logprobs)]
    if not table:
        raise ValueError(f"`{name}` must hold at least one candidate, but is empty.")
    sizes = [values.size for values in table]
    odd = next((m for m, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        raise ValueError(
            f"`{name}` must be of the same rows for all candidates, but candidate 0 has {sizes[0]} and candidate "
            f"{odd} has {sizes[odd]}."
        )
    return table


def _draw(layout: RowLayout, replicates: int, rng: np.random.Generator) -> FloatArray:
    """How often each block is drawn, `(B, G)`."""
    blocks = layout.num_blocks
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates).astype(np.float64)


def _drawn_rows(layout: RowLayout, draws: FloatArray) -> FloatArray:
    return draws @ np.bincount(layout.block_of_row, minlength=layout.num_blocks)


def _rates(counts: NDArray[np.int32], layout: RowLayout, draws: FloatArray) -> Rates:
    value = counts.sum(axis=1) / layout.order.size
    if not len(draws):
        return Rates(value, None)
    return Rates(value, counts @ draws.T[layout.block] / _drawn_rows(layout, draws))


def _offset(
    generations: OnPolicy, b: int, levels: list[float], gamma: float, num_candidates: int, replicates: int, seed: int
) -> list[Rates]:
    """2 g O[., b] at each N: the challenges that b would face on its own responses."""
    table = _checked(generations.logprobs, f"on_policy[{b}]")
    if len(table) != num_candidates:
        raise ValueError(
            f"`on_policy[{b}]` must be scored under all {num_candidates} candidates, but has {len(table)}."
        )
    if not np.isfinite(table[b]).all():
        row = int(np.argmin(np.isfinite(table[b])))
        raise ValueError(
            f"`on_policy[{b}]` row {row} has probability 0 under candidate {b}, which is said to have drawn it."
        )
    key = (seed, b)
    layout = row_layout(table[0].size, groups=generations.groups, seed=key, max_blocks=_BLOCKS if replicates else 1)
    draws = _draw(layout, replicates, np.random.default_rng(key))
    (part,) = count_challenges(table, levels, layout, defenders=[b])
    found = [_rates(part.counts[k, 0], layout, draws) for k in range(len(levels))]
    return [Rates(2 * gamma * value, None if drawn is None else 2 * gamma * drawn) for value, drawn in found]


def _drawn_cross_entropies(table: list[FloatArray], layout: RowLayout, draws: FloatArray) -> FloatArray:
    """Cross-entropy in each bootstrap sample, `(M, B)`."""
    rows, found = _drawn_rows(layout, draws), []
    for values in table:
        finite = np.isfinite(values)
        sums = np.bincount(layout.block_of_row, np.where(finite, -values, 0.0), layout.num_blocks)
        excluded = np.bincount(layout.block_of_row, ~finite, layout.num_blocks)
        found.append(np.where(draws @ excluded > 0, np.inf, draws @ sums / rows))
    return np.array(found)
