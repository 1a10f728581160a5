"""Choosing while scoring: candidates that are shown to be behind are dropped, and the others go on with more prompts.

`l[m, t]` in [0, 1] is what candidate m loses on the t-th prompt, and mu_m its expectation; the prompts come in random
order and are independent draws. Let m be the best, `mu_m <= mu_j` for all j. Whoever bets against that chooses before
each prompt, from what was seen on those before it, an opponent j_t and a stake `lambda_t` in [0, 1), and holds

    W_t(m) = prod_{s <= t} (1 + lambda_s (l[m, s] - l[j_s, s])),

for each unit he began with. `E[W_t | past] = W_{t-1} (1 + lambda_t (mu_m - mu_{j_t})) <= W_{t-1}`: W(m) is a
non-negative supermartingale, and by Ville's inequality it ever reaches `1 / a` with probability at most a. So the best
is dropped with probability at most a if whoever lets W reach `1 / a` is: whatever the law of the losses, however often
one looks and whenever one stops. It is said of the best alone, whose W is one process: the number of candidates asks
for no correction, and it does not matter which of the others were dropped before, whether the opponent is the leader,
or that both depend on the data. For a candidate that is behind, W grows if the opponent is chosen well; here it is the
one against which it is expected to grow most.

*How far the pick may be behind.* For a pair (p, m) the same holds of `prod (1 + lambda (l[m] - l[p] + eps))` if
`mu_p - mu_m >= eps`. The pick depends on the data, but what has to be true is only its distance from the best: with
`1 / a` replaced by `(M - 1) / a` no p of M that is so far behind the best passes for closer, with probability 1 - a.

Prompts with several rows count by their rows: l is then the sum of a prompt's losses, divided by the largest number of
rows that any prompt has, which is taken to be known beforehand.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import FloatArray, check_confidence
from hf_coverage.functional.choice import Decision, decide

__all__ = [
    "Evidence",
    "LossRace",
    "comparable_means",
    "gather_evidence",
    "prompt_order",
    "race_by_loss",
    "shown_within",
]

_FIRST_LOOK = 64
"""Prompts before the first look; each later one is after twice as many."""

_PRIOR = 0.25
"""Added to the squares that a stake is divided by: stakes are small at first."""
_MOST = 0.99
"""The largest part of what may be lost that is staked."""


@dataclass(frozen=True)
class Evidence:
    """What is held against each of M candidates being the best.

    Args:
        wealth: `(M,)` log W of each, now.
        highest: `(M,)` the largest that it has been.
        sums: `(M, M)` sum of l[m] - l[j] over the prompts that both were scored on.
        squares: `(M, M)` sum of their squares.
    """

    wealth: FloatArray
    highest: FloatArray
    sums: FloatArray
    squares: FloatArray

    @classmethod
    def none(cls, num_candidates: int) -> "Evidence":
        """Before anything was seen."""
        zeros, pairs = np.zeros(num_candidates), np.zeros((num_candidates, num_candidates))
        return cls(zeros, zeros, pairs, pairs)

    def against(self, confidence: float) -> NDArray[np.bool_]:
        """`(M,)` who is shown not to be the best; the best is among them with probability `1 - confidence` at most."""
        check_confidence(confidence)
        return self.highest >= -math.log1p(-confidence)


def gather_evidence(evidence: Evidence, candidates: Sequence[int], losses: FloatArray) -> Evidence:
    """Bet on some more prompts, on which some of the candidates were scored.

    With s and q the sums of the differences and of their squares over the prompts before, the stake against an
    opponent is `lambda = clip(s / (q + 1/4), 0, .99)`, which maximises log W to second order, and the opponent is the
    one with the largest `lambda s - lambda^2 q / 2`.

    Args:
        evidence: What was held before.
        candidates: The m of them that were scored, ascending: all of them were scored on what was seen before.
        losses: `(m, T)` in [0, 1], their losses on the prompts in order.

    Returns:
        What is held now; that against the other candidates is as it was.

    Example:
        >>> losses = np.tile([[0.2], [0.9]], 40)
        >>> evidence = gather_evidence(Evidence.none(2), (0, 1), losses)
        >>> evidence.against(0.95)
        array([False,  True])

    References:
        Ville (1939); Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", arXiv
        2010.09686, for bets on bounded means.
    """
    own = np.asarray(candidates)
    wealth, highest = evidence.wealth.copy(), evidence.highest.copy()
    sums, squares = evidence.sums.copy(), evidence.squares.copy()
    for place, m in enumerate(own):
        rivals = np.delete(np.arange(own.size), place)
        if not rivals.size:
            continue
        ahead = losses[place] - losses[rivals]
        before = sums[m, own[rivals], None] + _before(ahead)
        spread = squares[m, own[rivals], None] + _before(ahead**2)
        stakes = np.clip(before / (spread + _PRIOR), 0, _MOST)
        chosen = (stakes * before - stakes**2 * spread / 2).argmax(axis=0), np.arange(losses.shape[1])
        money = wealth[m] + np.cumsum(np.log1p(stakes[chosen] * ahead[chosen]))
        wealth[m], highest[m] = money[-1], max(highest[m], money.max())
        sums[m, own[rivals]] += ahead.sum(axis=1)
        squares[m, own[rivals]] += (ahead**2).sum(axis=1)
    return Evidence(wealth, highest, sums, squares)


def shown_within(
    pick: FloatArray, other: FloatArray, margin: float, confidence: float, *, weights: FloatArray | float = 1.0
) -> bool:
    """Whether the pick's expected loss is shown to be less than `margin` above another one's.

    Args:
        pick: `(T,)` losses of the pick on the prompts in order, in [0, 1].
        other: `(T,)` losses of the other.
        margin: A loss in [0, 1).
        confidence: If it is not true it is shown with probability `1 - confidence` at most, whenever one looks.
        weights: `(T,)` in [0, 1], where the losses on a prompt are in [0, its weight].

    Example:
        >>> same = np.full(500, 0.3)
        >>> shown_within(same, same, 0.01, 0.95), shown_within(same, same, 0.001, 0.95)
        (True, False)
    """
    check_confidence(confidence)
    gained = other - pick + margin * weights
    stakes = np.clip(_before(gained) / (_before(gained**2) + _PRIOR), 0, _MOST / (1 - margin))
    return bool(np.cumsum(np.log1p(stakes * gained)).max(initial=0.0) >= -math.log1p(-confidence))


class LossRace(NamedTuple):
    """How M candidates were scored, and what that decides for each of K numbers of samples.

    Attributes:
        decisions: K decisions, whose confidence allows for dropping and stopping; losses are comparable, see
            `comparable_means`. No probabilities are stated where candidates were dropped down to one, or scoring
            stopped early.
        rows: `(M,)` on how many rows, in the order of the prompts, each was scored.
    """

    decisions: tuple[Decision, ...]
    rows: NDArray[np.int64]


def prompt_order(codes: NDArray[np.uint64], seed: int = 0) -> NDArray[np.intp]:
    """Rows in a random order of their prompts: a function of the seed and of the prompts, wherever they stand.

    Another corpus that holds the same prompts has them in the same order, and what was scored of one is of use to the
    other.

    Args:
        codes: `(R,)` code of each row's prompt, see `group_codes`.
        seed: Any whole number.

    Returns:
        `(R,)` the rows; those of a prompt follow each other, as they did.

    Example:
        >>> prompt_order(np.array([7, 8, 7], dtype=np.uint64)).tolist()
        [0, 2, 1]
    """
    labels, inverse = np.unique(codes, return_inverse=True)
    hashed = [hashlib.blake2b(f"{seed} {label}".encode(), digest_size=8).digest() for label in labels.tolist()]
    places = np.empty(labels.size, np.intp)
    places[sorted(range(labels.size), key=hashed.__getitem__)] = np.arange(labels.size)
    return np.argsort(places[inverse], kind="stable")


def comparable_means(losses: Sequence[FloatArray], base: int) -> FloatArray:
    """Means of candidates that were scored on more or fewer of the same rows, as if on as many as one of them.

    Mean of the base, plus the mean difference from it on the rows that both were scored on. The mean of a candidate
    that was scored on as many is its own.

    Args:
        losses: Of each candidate its values on the first rows.
        base: One that was scored on at least as many rows as any other.

    Returns:
        `(M,)`. A mean that is not finite stays as it is.

    Example:
        >>> comparable_means([np.array([0.0, 0.0, 0.3]), np.array([0.2, 0.2])], base=0).round(3).tolist()
        [0.1, 0.3]
    """
    whole = losses[base]
    means = np.array([values.mean() for values in losses])
    with np.errstate(invalid="ignore"):  # infinite less infinite
        ease = np.array([0.0 if v.size == whole.size else whole.mean() - whole[: v.size].mean() for v in losses])
    return np.where(np.isfinite(means) & np.isfinite(ease), means + ease, means)


def race_by_loss(
    score: Callable[[int, int, int], FloatArray],
    num_candidates: int,
    prompt_rows: NDArray[np.int64],
    *,
    tolerance: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> LossRace:
    """Score candidates on 64, 128, 256, ... prompts, dropping those that are shown not to be the best.

    A candidate is scored as long as it may be the best for any of K numbers of samples. It ends when one is left, when
    the one with the least loss is shown to be within the tolerance of all others that are left, or with the prompts.
    Of the probability `1 - confidence` half is spent on dropping the best; the rest on what is said of those that are
    left at the end of the prompts, see `decide`, and where there is a tolerance half of that on stopping too early.

    Args:
        score: Called with a candidate, and the rows from where to where it is to be scored on; gives their `(K, rows)`
            losses in [0, 1]. Candidates are scored one after the other, and the last one of a round begins the next.
        num_candidates: M.
        prompt_rows: `(P,)` how many rows each prompt has, the prompts in random order.
        tolerance: A loss that does not matter, in [0, 1).
        confidence: Of `within` and of the set that is left.
        seed: Of the normal draws of `decide`.

    Returns:
        The decisions, and how many rows they took.

    Example:
        >>> losses = np.repeat([[0.1], [0.2], [0.8]], 1000, axis=1)
        >>> race = race_by_loss(lambda m, start, stop: losses[[m], start:stop], 3, np.ones(1000, int))
        >>> race.decisions[0].left, race.rows.tolist()
        ((0,), [64, 64, 64])
    """
    check_confidence(confidence)
    if not 0 <= tolerance < 1:
        raise ValueError(f"`tolerance` must be a loss in [0, 1), but is {tolerance}.")
    ends, looks = np.append(0, np.cumsum(prompt_rows)), _looks(prompt_rows.size)
    parts: list[list[FloatArray]] = [[] for _ in range(num_candidates)]
    contests: list[_Contest] = []
    scored = np.arange(num_candidates)
    for turn, (start, stop) in enumerate(zip([0, *looks], looks)):
        for m in scored[:: -1 if turn % 2 else 1].tolist():
            parts[m].append(score(m, int(ends[start]), int(ends[stop])))
        latest = np.stack([parts[m][-1] for m in scored], axis=1)
        contests = contests or [_Contest(num_candidates, prompt_rows, tolerance, confidence) for _ in latest]
        for contest, losses in zip(contests, latest):
            contest.go_on(scored, losses, slice(start, stop))
        if all(contest.is_over for contest in contests):
            break
        scored = np.unique(np.concatenate([contest.left for contest in contests]))
    tables = [np.concatenate(part, axis=1) for part in parts]
    decisions = [contest.decide([table[k] for table in tables], seed) for k, contest in enumerate(contests)]
    return LossRace(tuple(decisions), np.array([table.shape[1] for table in tables]))


class _Contest:
    """Who may still be the best with one number of samples, and whether the one in front is close to all of them."""

    def __init__(
        self, num_candidates: int, prompt_rows: NDArray[np.int64], tolerance: float, confidence: float
    ) -> None:
        self.left, self.is_close = np.arange(num_candidates), False
        self._prompt_rows, self._tolerance, self._confidence = prompt_rows, tolerance, confidence
        self._dropping = (1 - confidence) / 2
        self._stopping = self._dropping / 2 if tolerance else 0.0
        self._evidence = Evidence.none(num_candidates)
        self._seen = [np.empty(0)] * num_candidates

    @property
    def is_over(self) -> bool:
        return self.left.size == 1 or self.is_close

    def go_on(self, scored: NDArray[np.intp], losses: FloatArray, prompts: slice) -> None:
        """Take in the losses `(m, rows)` on some prompts more."""
        sizes = self._prompt_rows[prompts]
        units = np.add.reduceat(losses, np.cumsum(sizes) - sizes, axis=1) / self._prompt_rows.max()
        self._evidence = gather_evidence(self._evidence, scored.tolist(), units)
        for m, own in zip(scored, units):
            self._seen[m] = np.append(self._seen[m], own)
        behind = self._evidence.against(1 - self._dropping)[self.left]
        if behind.all():  # as the law allows once in many runs: somebody has to stay
            behind = self._evidence.highest[self.left] > self._evidence.highest[self.left].min()
        self.left = self.left[~behind]
        self.is_close = self._stopping > 0 and self._in_front_is_close()

    def _in_front_is_close(self) -> bool:
        first = min(self.left, key=lambda m: self._seen[m].sum())
        weights = self._prompt_rows[: self._seen[first].size] / self._prompt_rows.max()
        sure = 1 - self._stopping / max(1, len(self._seen) - 1)
        return all(
            shown_within(self._seen[first], self._seen[m], self._tolerance, sure, weights=weights)
            for m in self.left
            if m != first
        )

    def decide(self, losses: Sequence[FloatArray], seed: int) -> Decision:
        """What is decided, from the losses of all candidates on the rows that each was scored on."""
        table = np.stack([losses[m] for m in self.left.tolist()])
        groups = np.repeat(np.arange(self._prompt_rows.size, dtype=np.uint64), self._prompt_rows)[: table.shape[1]]
        final = 1 - (self._dropping - self._stopping)
        last = decide(table, groups=groups, tolerance=self._tolerance, confidence=final, seed=seed)
        pick = int(self.left[last.pick])
        stopped = table.shape[1] < self._prompt_rows.sum()
        said = last._replace(
            pick=pick,
            losses=np.clip(comparable_means(losses, pick), 0.0, 1.0),
            left=tuple(int(self.left[m]) for m in last.left),
            confidence=self._confidence,
        )
        if self.is_close:
            said = said._replace(within=min(last.within, self._tolerance), rows_needed=0.0)
        if stopped and self.is_close:
            means = table.mean(axis=1)
            said = said._replace(
                within=self._tolerance, left=tuple(self.left[np.argsort(means, kind="stable")].tolist())
            )
        if len(losses) > 1 and (stopped or self.left.size == 1):
            said = said._replace(probability_best=None, probability_within=None)
        return said


def _looks(num_prompts: int) -> list[int]:
    doubling = range(max(0, (num_prompts - 1) // _FIRST_LOOK).bit_length())
    return [*(_FIRST_LOOK * 2**k for k in doubling), num_prompts]


def _before(values: FloatArray) -> FloatArray:
    """Sums along the last axis of what lies before each place, in which what lies there has no part by rounding."""
    sums = np.zeros_like(values)
    np.cumsum(values[..., :-1], axis=-1, out=sums[..., 1:])
    return sums
