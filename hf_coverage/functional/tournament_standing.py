"""How the candidates of a tournament stand: from challenges to scores, a ranking, ties and win rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hf_coverage.functional.checks import FloatArray

__all__ = ["Rates", "Standing", "Tally", "TieBreak", "stand"]

TieBreak = Literal["mean challenge", "cross-entropy", "order"]


@dataclass(frozen=True, eq=False)
class Standing:
    """How M candidates stand in a tournament at one N.

    Attributes:
        n: The N of the challenges.
        rates: `(M, M)` C[a, b], how often a challenges b; NaN in the columns of candidates that did not defend.
        offsets: `(M, M)` 2 g O[a, b], what is taken off; zeros in a simple tournament.
        scores: `(M,)` worst challenge of each, lower is better; NaN for candidates that did not defend.
        mean_challenges: `(M,)` mean challenge C of each, over the other candidates; no offset is taken off.
        cross_entropies: `(M,)` E[-log p], nats a response.
        ranking: Defenders, best first.
        tied: Those whose score is the least, in the order of `ranking`.
        decided_by: What broke the tie; None where there was none.
        win_rates: `(M,)` how often each wins when prompts are drawn anew; None without a bootstrap, or with one
            prompt, which drawn anew is the same again.
        num_groups: Prompts.
    """

    n: float
    rates: FloatArray
    offsets: FloatArray
    scores: FloatArray
    mean_challenges: FloatArray
    cross_entropies: FloatArray
    ranking: tuple[int, ...]
    tied: tuple[int, ...]
    decided_by: TieBreak | None
    win_rates: FloatArray | None
    num_groups: int


class Rates(NamedTuple):
    """The challenges to one candidate: `(M,)`, and `(M, B)` in each bootstrap sample."""

    value: FloatArray
    drawn: FloatArray | None


class Tally:
    """Scores of one N, filled in defender by defender."""

    def __init__(self, num_candidates: int, replicates: int) -> None:
        self.rates = np.full((num_candidates, num_candidates), np.nan)
        self.offsets = np.zeros((num_candidates, num_candidates))
        self.scores, self.means = np.full((2, num_candidates), np.nan)
        self.drawn_scores, self.drawn_means = np.full((2, num_candidates, replicates), np.nan)

    def add(self, b: int, rates: Rates, offset: Rates | None) -> None:
        """Enter the challenges to candidate b."""
        self.rates[:, b] = rates.value
        if offset is not None:
            self.offsets[:, b] = offset.value
        challenges = self.rates[:, b] - self.offsets[:, b]
        others = max(1, len(challenges) - 1)
        # Ties are broken by the challenges themselves: less the offset, their mean says something else.
        self.scores[b], self.means[b] = challenges.max(), rates.value.sum() / others
        if rates.drawn is not None:
            drawn = rates.drawn if offset is None or offset.drawn is None else rates.drawn - offset.drawn
            self.drawn_scores[b], self.drawn_means[b] = drawn.max(0), rates.drawn.sum(0) / others


def _keys(scores: FloatArray, means: FloatArray, entropies: FloatArray) -> tuple[FloatArray, ...]:
    """What ranks candidates, the first first; rounded, so that rounding decides nothing."""
    return np.round(scores, 12), np.round(means, 12), np.round(entropies, 9)


def stand(
    n: float,
    tally: Tally,
    entropies: FloatArray,
    drawn_entropies: FloatArray | None,
    defenders: list[int],
    num_groups: int,
) -> Standing:
    """Rank the defenders by their scores, then by their mean challenges, then by cross-entropy, then as given.

    Args:
        n: The N of the challenges.
        tally: Scores of the defenders.
        entropies: `(M,)` E[-log p], nats.
        drawn_entropies: `(M, B)` the same in each bootstrap sample; None without a bootstrap.
        defenders: The candidates that were scored.
        num_groups: Prompts.

    Returns:
        How they stand.
    """
    keys = np.array(_keys(tally.scores, tally.means, entropies))[:, defenders]
    order = np.lexsort((np.array(defenders), *keys[::-1]))
    alike = [int((keys[: depth + 1, order] == keys[: depth + 1, order[:1]]).all(0).sum()) for depth in range(3)]
    breaks: tuple[TieBreak | None, ...] = (None, "mean challenge", "cross-entropy")
    ranking = tuple(defenders[place] for place in order)
    wins = None
    if drawn_entropies is not None and tally.drawn_scores.size:
        wins = np.zeros(len(entropies))
        drawn = _keys(tally.drawn_scores[defenders], tally.drawn_means[defenders], drawn_entropies[defenders])
        wins[defenders] = _win_rates(drawn)
    return Standing(
        n=n,
        rates=tally.rates,
        offsets=tally.offsets,
        scores=tally.scores,
        mean_challenges=tally.means,
        cross_entropies=entropies,
        ranking=ranking,
        tied=ranking[: alike[0]],
        decided_by=next((rule for rule, number in zip(breaks, alike) if number == 1), "order"),
        win_rates=wins,
        num_groups=num_groups,
    )


def _win_rates(keys: Sequence[FloatArray]) -> FloatArray:
    """Share of the columns that each row wins, by the first key, then the next; full ties share the win."""
    leading = np.ones(keys[0].shape, bool)
    for key in keys:
        leading &= key == np.where(leading, key, np.inf).min(0)
    return (leading / leading.sum(0)).mean(1)
