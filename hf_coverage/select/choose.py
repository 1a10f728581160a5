"""One door to a decision: which checkpoint to take for the samples that will be drawn, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.checks import FloatArray, check_n, metric_key
from hf_coverage.functional.choice import Decision, decide
from hf_coverage.functional.coverage_profile import log_ratios
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.paired import PairedDifference, paired_loss_difference
from hf_coverage.functional.statistics import bounded_mean_interval, group_codes
from hf_coverage.functional.tournament_soft import envelope_losses
from hf_coverage.inference.files import strict_json
from hf_coverage.plots import ProfileCurve, plot_choice
from hf_coverage.select.tournament import Candidate, by_name, read_candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Choice", "Pick", "check_samples", "choose"]

Rule = Literal["miss", "pass", "soft tournament"]

_MOST_SAMPLES = 10**15

_LOSS = {"miss": "miss_{}", "pass": "1 - Pass@{}", "soft tournament": "score at N = {}"}
_METRIC = {"miss": "miss", "pass": "fail", "soft tournament": "soft_tournament"}
_MEANING = {
    "miss": "no reward makes Best-of-{} lose more of its expectation under the reference",
    "pass": "the chance that {} samples hold no accepted response",
    "soft tournament": (
        "how surely {} samples miss what some other candidate would write; the density of the corpus is not known, so "
        "that all of this is said by that score, which finds what is good at more samples than that"
    ),
}


class Pick(NamedTuple):
    """What is picked for a number of samples.

    Attributes:
        samples: The number of samples.
        winner: The candidate with the least loss.
        loss: Its loss.
        left: The candidates that are not told from the best, by their loss; the winner is the first.
        within: With 95 % confidence the winner's loss is at most this far above that of the best.
        probability_best: The probability that the winner is the best; None with too few prompts to say.
        rows_needed: About how many more rows would leave one candidate, or bring `within` down to the tolerance.
    """

    samples: float
    winner: str
    loss: float
    left: tuple[str, ...]
    within: float
    probability_best: float | None
    rows_needed: float


@dataclass(frozen=True, eq=False)
class Choice:
    """Which candidate to take for the samples that will be drawn; lower losses are better.

    Attributes:
        names: The M candidates, in the order given.
        rule: What loses: `"miss"` where log D is known, `"pass"` where verdicts are, `"soft tournament"` else.
        samples: The number of samples that will be drawn.
        losses: Mean loss of each candidate.
        intervals: 95 % interval of each loss.
        pick: What is picked for `samples`.
        others: What would be picked for other numbers of samples.
        probability_within: The probability that the winner is at most `tolerance` behind the best; None with too few
            prompts.
        tolerance: The loss that does not matter.
        cross_entropies: E[-log p] of each candidate, nats a response; None where verdicts are all there is.
        cross_entropy_cost: Loss of the candidate that cross-entropy would take, minus the winner's; None as before.
        num_rows: R.
        num_prompts: Distinct prompts.
    """

    names: tuple[str, ...]
    rule: Rule
    samples: float
    losses: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    pick: Pick
    others: tuple[Pick, ...]
    probability_within: float | None
    tolerance: float
    cross_entropies: dict[str, float] | None
    cross_entropy_cost: PairedDifference | None
    num_rows: int
    num_prompts: int
    _curves: tuple[ProfileCurve, ...] = field(repr=False)

    @property
    def winner(self) -> str:
        """The candidate with the least loss. Whether that is more than chance is said by `is_decided`."""
        return self.pick.winner

    @property
    def left(self) -> tuple[str, ...]:
        """The candidates that are not told from the best; with 95 % confidence the best is among them."""
        return self.pick.left

    @property
    def is_decided(self) -> bool:
        """Whether more than chance speaks for the winner, or it is within the tolerance of the best."""
        return len(self.left) == 1 or self.within <= self.tolerance

    @property
    def within(self) -> float:
        """With 95 % confidence the winner's loss is at most this far above that of the best."""
        return self.pick.within

    @property
    def probability_best(self) -> float | None:
        """The probability that the winner is the best of the candidates; None with too few prompts to say."""
        return self.pick.probability_best

    @property
    def rows_needed(self) -> float:
        """About how many more rows would leave one candidate, or bring `within` down to the tolerance."""
        return self.pick.rows_needed

    @property
    def ranking(self) -> tuple[str, ...]:
        """Candidates by their loss, best first."""
        return tuple(sorted(self.names, key=self.losses.__getitem__))

    @property
    def cross_entropy_choice(self) -> str | None:
        """The candidate that validation loss would take; None where it is not known."""
        losses = self.cross_entropies
        return None if losses is None else min(self.names, key=losses.__getitem__)

    @property
    def scores(self) -> dict[str, float]:
        """`losses`, under the name that a tournament has for them."""
        return self.losses

    @property
    def ties(self) -> tuple[str, ...]:
        """The candidates that are not told from the best, where there are several; else empty."""
        return self.left if len(self.left) > 1 else ()

    @property
    def metric_name(self) -> str:
        """What the losses are called among metrics: `miss_16`, `fail_16` or `soft_tournament_16`."""
        return f"{_METRIC[self.rule]}_{metric_key(self.samples)}"

    @property
    def loss_name(self) -> str:
        """What a loss is called: `miss_16`, `1 - Pass@16` or `score at N = 16`."""
        return _LOSS[self.rule].format(metric_key(self.samples))

    @property
    def sentence(self) -> str:
        """What was decided, how sure it is, and what cross-entropy would take, in plain words."""
        return " ".join([self._decision(), *self._certainty(), *self._against_cross_entropy()])

    def plot(self, path: str | PathLike[str] | None = None, *, title: str | None = None) -> Figure:
        """Draw the candidates' losses over the number of samples, the picks marked.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            title: Title above the axes.
        """
        picks = [(pick.samples, pick.winner) for pick in (self.pick, *self.others)]
        label = {"miss": "miss$_N$", "pass": "1 - Pass@$N$", "soft tournament": "score at $N$"}[self.rule]
        return plot_choice(self._curves, picks, path, ylabel=f"{label} (lower is better)", title=title)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """All but the curves as strict JSON text, unknown and infinite numbers as null; also written to `path`."""
        facts = {"winner": self.winner, "is_decided": self.is_decided, "sentence": self.sentence}
        facts |= {name: value for name, value in vars(self).items() if not name.startswith("_")}
        facts |= {"pick": self.pick._asdict(), "others": [pick._asdict() for pick in self.others]}
        facts["cross_entropy_choice"] = self.cross_entropy_choice
        if self.cross_entropy_cost is not None:
            facts["cross_entropy_cost"] = self.cross_entropy_cost._asdict()
        return strict_json(facts, path)

    def _decision(self) -> str:
        of = f"of {len(self.names)} candidates on {self.num_rows:,} responses to {self.num_prompts:,} prompts"
        loss = f"{self.loss_name} = {self.losses[self.winner]:.3g}"
        meaning = _MEANING[self.rule].format(metric_key(self.samples))
        if len(self.left) == 1:
            return f"{self.winner} loses least {of}: {loss} ({meaning})."
        if self.is_decided:
            return f"{self.winner} is as good as the best {of}: {loss} ({meaning})."
        return (
            f"No winner: chance explains what {len(self.left)} {of} differ by: {_listed(self.left)}. "
            f"{self.winner} has the least loss, {loss} ({meaning})."
        )

    def _certainty(self) -> list[str]:
        if len(self.names) == 1:
            return []
        parts = [f"With 95 % confidence its loss is within {self.within:.2g} of the best's."]
        if self.probability_best is not None:
            parts.append(f"The probability that it is the best is {_share(self.probability_best)}.")
        if not self.is_decided:
            parts.append(
                "More rows like these would not tell equals apart."
                if not np.isfinite(self.rows_needed)
                else f"To decide would take about {_rounded(self.rows_needed)} rows more."
            )
        return parts

    def _against_cross_entropy(self) -> list[str]:
        choice, cost = self.cross_entropy_choice, self.cross_entropy_cost
        if choice is None or cost is None:
            return []
        if choice == self.winner:
            return ["Cross-entropy would take it too."]
        return [
            f"Cross-entropy would take {choice}, whose loss is {cost.difference:.2g} more (95 % interval "
            f"{cost.low:.2g} to {cost.high:.2g})."
        ]


def check_samples(samples: float | Iterable[float]) -> list[float]:
    """Return numbers of samples as floats; ValueError unless there is one, and all can be drawn."""
    levels = [check_n(value) for value in (samples if isinstance(samples, Iterable) else [samples])]
    if not levels:
        raise ValueError("`samples` must be a number of samples, or several, but is empty.")
    if max(levels) > _MOST_SAMPLES:
        raise ValueError(
            f"`samples` must be numbers that can be drawn, at most {_MOST_SAMPLES:g}, got {max(levels):g}."
        )
    return levels


def choose(
    candidates: Mapping[str, Candidate],
    samples: float | Sequence[float] = 16,
    *,
    reference_logprobs: ArrayLike | None = None,
    groups: Iterable[Any] | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Choice:
    """Choose the candidate that loses least of Best-of-N with the samples that will be drawn, and say how surely.

    What loses is read off what is known. With log D of the responses, or one right answer a prompt (log D = 0), it is
    miss_N, which bounds the loss for every reward. With verdicts it is 1 - Pass@N, without bias for N up to k. With
    nothing but responses it is the score of the soft tournament, in which candidates are measured by each other; it is
    never held where log D is known.

    Args:
        candidates: By name, log p(y_i|x_i) of the same R rows `(R,)` in nats, or a `ScoreTable`, or its folder; or
            `(P, k)` booleans, which of k samples to each prompt a verifier accepts.
        samples: N, the samples that will be drawn; with several, the first decides and the others are picked for too.
        reference_logprobs: `(R,)` log D(y|x), nats; 0 where y is the single right answer; None if it is not known.
        groups: `(R,)` the prompt of each row, if prompts repeat.
        tolerance: A loss that does not matter, in [0, 1).
        seed: Of the normal draws behind the confidences.

    Returns:
        The choice.

    Raises:
        ValueError: If candidates are not of the same rows, values are no log-probabilities, N exceeds k, or an
            argument is out of range; names the candidate.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> early = np.full(500, -3.0)
        >>> late = np.where(rng.random(500) < 0.1, -12.0, -1.0)
        >>> choice = choose({"early": early, "late": late}, samples=64, reference_logprobs=np.zeros(500))
        >>> choice.winner, choice.left, choice.cross_entropy_choice, round(choice.losses["late"], 3)
        ('early', ('early',), 'late', 0.094)

    References:
        Theorem M of `functional.miss_profile`; `functional.choice` for the confidences.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError("`candidates` must map at least one name to log-probabilities, a score table or verdicts.")
    levels = check_samples(samples)
    named = by_name(candidates, "candidates")
    losses = _Losses.of_verdicts(named) if _are_verdicts(named) else _Losses.of_logprobs(named, reference_logprobs)
    codes = None if groups is None else group_codes(groups)
    names = tuple(named)
    tables = [losses.at(level) for level in levels]
    decisions = [decide(table, groups=codes, tolerance=tolerance, seed=seed) for table in tables]
    picks = [_pick(level, names, decision) for level, decision in zip(levels, decisions)]
    first, table = decisions[0], tables[0]
    entropies = losses.cross_entropies(names)
    cost = None
    if entropies is not None:
        cheapest = min(range(len(names)), key=lambda m: entropies[names[m]])
        cost = paired_loss_difference(table[cheapest], table[first.pick], groups=codes)
    grid = losses.grid(levels)
    return Choice(
        names=names,
        rule=losses.rule,
        samples=levels[0],
        losses=_named(names, first.losses),
        intervals={name: bounded_mean_interval(row, groups=codes) for name, row in zip(names, table)},
        pick=picks[0],
        others=tuple(picks[1:]),
        probability_within=first.probability_within,
        tolerance=tolerance,
        cross_entropies=entropies,
        cross_entropy_cost=cost,
        num_rows=table.shape[1],
        num_prompts=table.shape[1] if codes is None else int(np.unique(codes).size),
        _curves=_curves(names, losses, grid, {pick.winner for pick in picks}, codes),
    )


class _Losses:
    """What each candidate loses on each row, for any number of samples."""

    def __init__(self, rule: Rule, rows: list[FloatArray], logprobs: list[FloatArray] | None) -> None:
        self.rule: Rule = rule
        self._rows, self._logprobs = rows, logprobs

    @classmethod
    def of_logprobs(cls, named: Mapping[str, Any], reference: ArrayLike | None) -> _Losses:
        logprobs = read_candidates(named)
        if reference is None:
            return cls("soft tournament", logprobs, logprobs)
        return cls("miss", [log_ratios(reference, values) for values in logprobs], logprobs)

    @classmethod
    def of_verdicts(cls, named: Mapping[str, Any]) -> _Losses:
        tables = [np.asarray(values) for values in named.values()]
        shapes = {name: table.shape for name, table in zip(named, tables)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"`candidates` must have verdicts on the same prompts and samples, but have {shapes}.")
        return cls("pass", [1 - pass_at_n(table) for table in tables], None)

    def at(self, samples: float) -> FloatArray:
        """`(M, R)` losses with so many samples."""
        if self.rule == "miss":
            return np.stack([miss_values(ratios, samples) for ratios in self._rows])
        if self.rule == "soft tournament":
            return envelope_losses(self._rows, samples)
        if samples != int(samples) or samples > self._rows[0].shape[1]:
            raise ValueError(
                f"`samples` must be a whole number up to the {self._rows[0].shape[1]} verdicts a prompt, but is "
                f"{samples:g}: beyond them Pass@N is not known."
            )
        return np.stack([table[:, int(samples) - 1] for table in self._rows])

    def grid(self, levels: Sequence[float]) -> FloatArray:
        """Numbers of samples to draw losses over."""
        if self.rule == "pass":
            return np.arange(1.0, self._rows[0].shape[1] + 1)
        return np.unique(np.append(np.exp2(np.linspace(0, max(6.0, np.log2(max(levels)) + 2), 41)), levels))

    def cross_entropies(self, names: Sequence[str]) -> dict[str, float] | None:
        """E[-log p] of each candidate, nats a response; None where it is not known."""
        if self._logprobs is None:
            return None
        return {name: float(-np.minimum(values, 0.0).mean()) for name, values in zip(names, self._logprobs)}


def _are_verdicts(named: Mapping[str, Any]) -> bool:
    kinds = {name: np.ndim(values) == 2 for name, values in named.items() if not isinstance(values, (str, PathLike))}
    tables = [name for name, is_table in kinds.items() if is_table]
    if tables and len(tables) < len(named):
        raise ValueError(
            "`candidates` must all be log-probabilities or all be verdicts, but only "
            f"{', '.join(map(repr, tables))} {'has' if len(tables) == 1 else 'have'} a table of verdicts."
        )
    return bool(tables)


def _pick(samples: float, names: Sequence[str], decision: Decision) -> Pick:
    winner = decision.pick
    left = [names[m] for m in decision.left if m != winner]
    return Pick(
        samples,
        names[winner],
        float(decision.losses[winner]),
        (names[winner], *left),
        decision.within,
        decision.probability_best,
        decision.rows_needed,
    )


def _curves(
    names: Sequence[str], losses: _Losses, grid: FloatArray, picked: set[str], groups: Any
) -> tuple[ProfileCurve, ...]:
    tables = [losses.at(level) for level in grid]
    curves = []
    for m, name in enumerate(names):
        value = np.array([table[m].mean() for table in tables])
        low = high = value
        if name in picked:
            low, high = np.array([bounded_mean_interval(table[m], groups=groups) for table in tables]).T
        curves.append(ProfileCurve(name, grid, value, low, high))
    return tuple(curves)


def _named(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _share(probability: float) -> str:
    return "more than .99" if probability > 0.99 else f"about {probability:.2f}"


def _rounded(rows: float) -> str:
    digits = max(0, len(str(int(rows))) - 2)
    return f"{round(rows, -digits):,.0f}"
