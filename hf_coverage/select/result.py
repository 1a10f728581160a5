"""What a tournament decided, how sure it is of it, and how it says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.tournament_guarantee import offset_guarantee, simple_guarantee, soft_guarantee
from hf_coverage.functional.tournament_standing import TieBreak
from hf_coverage.inference.files import read_json, strict_json
from hf_coverage.plots.names import plain_text
from hf_coverage.plots.tournament import plot_challenges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Edge", "SweepPoint", "TournamentResult"]

Edge = Literal["hard", "soft"]

_FORMAT = 1
_DERIVED = ("format", "winner", "sentence", "guarantee", "cross_entropy_choice")
_RULES = {
    "mean challenge": "the mean challenge over all candidates",
    "cross-entropy": "cross-entropy, their mean challenges being equal too",
    "order": "the order in which they were given, since no rule tells them apart",
}


class SweepPoint(NamedTuple):
    """The tournament at another N: its winner, who was tied with it, and all scores."""

    n: float
    winner: str
    ties: tuple[str, ...]
    scores: dict[str, float]


@dataclass(frozen=True, eq=False)
class TournamentResult:
    """The outcome of a tournament; lower scores are better.

    Attributes:
        names: The M candidates, in the order given.
        n: The N of the challenges.
        edge: `"hard"`, the paper's, or `"soft"`: see `functional.tournament_soft`.
        rates: `(M, M)` C[a, b], how often a challenges b; S[a, b] in a soft tournament.
        offsets: `(M, M)` 2 g O[a, b]; zeros in a simple tournament.
        gamma: g of an offset tournament; None in a simple one.
        scores: Worst challenge of each candidate; in a soft tournament the challenge by all others together.
        mean_challenges: Mean challenge of each candidate, without an offset, the first tie-break.
        cross_entropies: E[-log p] of each candidate, nats a response, the second tie-break.
        ranking: Candidates, best first; those that racing dropped come last.
        ties: The candidates with the least score, where there are several; else empty.
        decided_by: What broke the tie; None where there was none.
        win_rates: Share of the bootstrap's samples of these prompts in which each candidate wins, which is more than
            its chance to win on others; empty without a bootstrap, or with one prompt.
        num_rows: R.
        num_prompts: Distinct prompts.
        sweep: The tournament at other N.
        suggested_n: Where N is so large that several scores are 0, the largest N tried at which the least score is one
            candidate's alone; None otherwise, or where there is none.
        dropped: Rows on which each candidate that racing dropped was challenged; its score is an estimate from them.
        race_confidence: The confidence of the race; None without one.
    """

    names: tuple[str, ...]
    n: float
    rates: FloatArray = field(repr=False)
    offsets: FloatArray = field(repr=False)
    gamma: float | None
    scores: dict[str, float]
    mean_challenges: dict[str, float] = field(repr=False)
    cross_entropies: dict[str, float] = field(repr=False)
    ranking: tuple[str, ...]
    ties: tuple[str, ...]
    decided_by: TieBreak | None
    win_rates: dict[str, float]
    num_rows: int
    num_prompts: int
    sweep: tuple[SweepPoint, ...] = ()
    suggested_n: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    race_confidence: float | None = None
    edge: Edge = "hard"

    @property
    def winner(self) -> str:
        """The candidate that the tournament picks."""
        return self.ranking[0]

    @property
    def metric_name(self) -> str:
        """What the scores are called among metrics: `tournament_16`."""
        return f"tournament_{metric_key(self.n)}"

    @property
    def matrix(self) -> FloatArray:
        """`(M, M)` challenges that scores are the column maxima of: C[a, b], minus 2 g O[a, b] with an offset."""
        return self.rates - self.offsets

    @property
    def cross_entropy_choice(self) -> str:
        """The candidate that validation loss would pick, the first of several equal ones."""
        return min(self.names, key=self.cross_entropies.__getitem__)

    @property
    def sentence(self) -> str:
        """What was decided and how sure it is, in plain words."""
        parts = [self._decision()]
        if self.ties:
            others = [name for name in self.ties if name != self.winner]
            parts.append(f"Tied with it: {_listed(others)}; decided by {_RULES[self.decided_by or 'order']}.")
        if self._has_zero_tie():
            remedy = (
                f"n={metric_key(self.suggested_n)} separates them"
                if self.suggested_n
                else "no smaller N that was tried does"
            )
            parts.append(
                f"N = {metric_key(self.n)} is so large that {sum(v == 0 for v in self.scores.values())} of "
                f"{len(self.names)} scores are 0 and tell nothing apart: {remedy}."
            )
        if self.winner in self.win_rates:
            parts.append(
                f"It wins in {_percent(self.win_rates[self.winner])} of bootstrap samples of these prompts, which is "
                "more than its chance to win on others."
            )
        if self.dropped:
            parts.append(
                f"Racing dropped {len(self.dropped)} of {len(self.names)} candidates before all rows were compared; "
                f"none of them has the least score, with probability {_percent(self.race_confidence or 0.0)} or more."
            )
        return " ".join([*parts, self._against_cross_entropy()])

    def guarantee(self, *, a: float = 0.5, delta: float = 0.05) -> str:
        """What Theorem 6.3 (6.4 with an offset, ours of a soft one) promises of the winner, with the numbers in it.

        Args:
            a: Trades what is promised against its slack, in [0, 1]; for the simple tournament.
            delta: Probability that the promise fails.
        """
        size = len(self.names), self.num_prompts
        if self.edge == "soft":
            return soft_guarantee(self.n, *size, a=a, delta=delta)
        if self.gamma is not None:
            return offset_guarantee(self.n, *size, gamma=self.gamma, delta=delta)
        return simple_guarantee(self.n, *size, a=a, delta=delta)

    def plot(self, path: str | PathLike[str] | None = None, *, title: str | None = None) -> Figure:
        """Draw the challenges as a heat map, the winner's column and what decides each column framed.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            title: Title above the axes; by default N and the winner.
        """
        heading = title or f"Tournament at N = {metric_key(self.n)}: {plain_text(self.winner)} wins"
        decides = self.edge == "hard"
        return plot_challenges(self.names, self.matrix, path, winner=self.winner, decides=decides, title=heading)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Everything as strict JSON text, unknown and infinite numbers as null; also written to `path` where given."""
        facts: dict[str, Any] = {"format": _FORMAT, "winner": self.winner, "sentence": self.sentence}
        facts |= {"guarantee": self.guarantee(), "cross_entropy_choice": self.cross_entropy_choice}
        return strict_json(facts | vars(self) | {"sweep": [point._asdict() for point in self.sweep]}, path)

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> TournamentResult:
        """Read what `to_json` gave: its text, or the path it wrote.

        Raises:
            ValueError: If the text is not the result of a tournament, of a known format, that agrees with itself.
        """
        try:
            return cls(**_read_fields(read_json(source, version=_FORMAT)))._checked()
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"`source` is not a tournament written by `to_json`: {error!r}.") from error

    def _checked(self) -> TournamentResult:
        """Itself, unless its parts do not fit together."""
        size = len(self.names)
        if self.rates.shape != (size, size) or self.offsets.shape != (size, size):
            raise ValueError(f"`rates` and `offsets` must have shape {(size, size)}, one row for each of `names`")
        by_name: dict[str, Any] = {"scores": self.scores, "mean_challenges": self.mean_challenges}
        by_name |= {"cross_entropies": self.cross_entropies, "ranking": self.ranking}
        by_name |= {f"sweep[{k}].scores": point.scores for k, point in enumerate(self.sweep)}
        for what, named in by_name.items():
            if sorted(named) != sorted(self.names):
                raise ValueError(f"`{what}` must have an entry for each of {list(self.names)}, but has {list(named)}")
        for what, some in (("ties", self.ties), ("win_rates", self.win_rates), ("dropped", self.dropped)):
            if not set(some) <= set(self.names):
                raise ValueError(f"`{what}` must be of {list(self.names)}, but has {list(some)}")
        for what, holds in self._facts():
            if not holds:
                raise ValueError(f"`{what}` is {getattr(self, what)!r}, which does not agree with the rest")
        return self

    def _facts(self) -> Iterator[tuple[str, bool]]:
        """What must hold of each field if a tournament made it."""
        names, raced = self.names, self.race_confidence is not None
        yield "names", bool(names) and len(set(names)) == len(names) and all(isinstance(name, str) for name in names)
        yield "n", _is_number(self.n) and 1 <= self.n < np.inf
        yield "rates", bool(((self.rates >= 0) & (self.rates <= 1)).all())
        yield "gamma", self.gamma is None or (_is_number(self.gamma) and 0 < self.gamma < np.inf)
        limit = 0.0 if self.gamma is None else 2 * self.gamma
        yield "offsets", bool(((self.offsets >= 0) & (self.offsets <= limit)).all())
        yield "edge", self.edge in get_args(Edge)
        worst = dict(zip(names, self.matrix.max(0)))
        # all others together challenge more than any of them
        yield (
            "scores",
            all(worst[name] - 1e-9 <= self.scores[name] <= 1 for name in names)
            if self.edge == "soft"
            else _agree(self.scores, worst),
        )
        others = max(1, len(names) - 1)
        # the mean challenge was once taken after the offset
        means = [dict(zip(names, table.sum(0) / others)) for table in (self.rates, self.matrix)]
        yield "mean_challenges", any(_agree(self.mean_challenges, mean) for mean in means)
        yield "cross_entropies", all(_is_number(loss) and loss >= 0 for loss in self.cross_entropies.values())
        left = [name for name in self.ranking if name not in self.dropped]
        levels = [round(self.scores[name], 12) for name in left]
        yield "ranking", bool(left) and levels == sorted(levels) and list(self.ranking[: len(left)]) == left
        level = [name for name in left if round(self.scores[name], 12) == levels[0]]
        yield "ties", list(self.ties) == (level if len(level) > 1 else [])
        yield "decided_by", self.decided_by in _RULES if self.ties else self.decided_by is None
        yield "win_rates", all(_is_number(share) and 0 <= share <= 1 for share in self.win_rates.values())
        yield "win_rates", set(self.win_rates) in (set(), set(left))
        sizes = self.num_prompts, self.num_rows, *self.dropped.values()
        yield "num_rows", all(type(size) is int and 1 <= size <= self.num_rows for size in sizes)
        yield "num_prompts", 1 <= self.num_prompts <= self.num_rows
        yield "dropped", raced or not self.dropped
        confidence = self.race_confidence
        yield "race_confidence", confidence is None or (_is_number(confidence) and 0 < confidence < 1)
        yield (
            "suggested_n",
            self.suggested_n is None or (_is_number(self.suggested_n) and 1 < self.suggested_n < self.n),
        )
        yield "sweep", all(_is_consistent(point) for point in self.sweep)

    def _has_zero_tie(self) -> bool:
        return bool(self.ties) and self.scores[self.winner] == 0

    def _decision(self) -> str:
        size = f"{self.num_rows:,} responses to {self.num_prompts:,} prompts"
        if len(self.names) == 1:
            return f"{self.winner} wins, being the only candidate ({size})."
        if self.edge == "soft":
            return self._soft_decision(size)
        less = "" if self.gamma is None else ", less the offset"
        level, (best, second) = metric_key(self.n), [_percent(self.scores[name]) for name in self.ranking[:2]]
        return (
            f"{self.winner} wins the tournament of {len(self.names)} candidates at N = {level} ({size}): its worst "
            f"challenger gives {best} of the responses at least {level} times its probability{less}. Lower is better; "
            f"the runner-up, {self.ranking[1]}, has {second}."
        )

    def _soft_decision(self, size: str) -> str:
        level, (best, second) = metric_key(self.n), [format(self.scores[name], ".3g") for name in self.ranking[:2]]
        return (
            f"{self.winner} wins the soft tournament of {len(self.names)} candidates at N = {level} ({size}) with a "
            f"score of {best}: about the chance that {level} of its samples miss what the others would write. Lower "
            f"is better; the runner-up, {self.ranking[1]}, has {second}. It finds what is good at more samples than "
            f"{level}."
        )

    def _against_cross_entropy(self) -> str:
        choice = self.cross_entropy_choice
        if choice == self.winner:
            return "Cross-entropy chooses it too."
        return (
            f"Cross-entropy would choose {choice} ({self.cross_entropies[choice]:.4g} nats a response against "
            f"{self.cross_entropies[self.winner]:.4g}), whose score is {_percent(self.scores[choice])}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _agree(found: dict[str, float], expected: dict[str, float]) -> bool:
    return all(_is_number(found[name]) and abs(found[name] - value) <= 1e-9 for name, value in expected.items())


def _is_consistent(point: SweepPoint) -> bool:
    """Whether a sweep's winner and ties are those of its scores."""
    if not (_is_number(point.n) and 1 <= point.n < np.inf and all(map(_is_number, point.scores.values()))):
        return False
    least = round(min(point.scores.values()), 12)
    level = {name for name, score in point.scores.items() if round(score, 12) == least}
    return point.winner in level and set(point.ties) == (level if len(level) > 1 else set())


def _percent(share: float) -> str:
    """A share for reading: two significant digits below 10 %, and never 0 or 100 unless it is."""
    if 0.999 < share < 1:
        return "more than 99.9 %"
    return f"{100 * share:.3g} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _read_fields(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result from what JSON keeps of them."""
    known = {item.name for item in fields(TournamentResult)}
    facts = {"edge": "hard"} | facts  # which was not said while there was no other
    odd = sorted(set(facts) ^ (known | set(_DERIVED)))
    if odd:
        raise ValueError(f"it lacks, or has besides, {', '.join(map(repr, odd))}")
    losses = facts["cross_entropies"]
    if losses[facts["cross_entropy_choice"]] not in (None, min(filter(_is_number, losses.values()), default=None)):
        raise ValueError(f"its cross_entropy_choice {facts['cross_entropy_choice']!r} has not the least cross-entropy")
    if facts["winner"] != facts["ranking"][0]:
        raise ValueError(f"its winner {facts['winner']!r} is not the first of its ranking, {facts['ranking'][0]!r}")
    for name in ("names", "ranking", "ties", "sweep"):
        if not isinstance(facts[name], list):
            raise TypeError(f"its {name} are {facts[name]!r}, which is no list")
    read = {name: facts[name] for name in known}
    read |= {name: tuple(facts[name]) for name in ("names", "ranking", "ties")}
    # null is an unknown challenge (to a candidate that was dropped) and an infinite cross-entropy
    read |= {name: np.array(facts[name], dtype=np.float64) for name in ("rates", "offsets")}
    read["cross_entropies"] = {
        name: np.inf if value is None else value for name, value in facts["cross_entropies"].items()
    }
    read["sweep"] = tuple(SweepPoint(**point | {"ties": tuple(point["ties"])}) for point in facts["sweep"])
    return read
