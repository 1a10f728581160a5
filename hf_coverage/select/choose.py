"""One door to a decision: which checkpoint to take for the samples that will be drawn, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.adaptive_choice import comparable_means, prompt_order, race_by_loss
from hf_coverage.functional.arithmetic_codes import check_intervals, stratified_pass_probabilities
from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.checks import FloatArray, check_logprobs, check_n, metric_key
from hf_coverage.functional.choice import Decision, decide
from hf_coverage.functional.coverage_profile import log_ratios
from hf_coverage.functional.group_rewards import equal_reward_probability
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.paired import PairedDifference, paired_loss_difference
from hf_coverage.functional.statistics import bounded_mean_interval, group_codes
from hf_coverage.functional.tournament_soft import envelope_losses
from hf_coverage.inference.files import strict_json
from hf_coverage.plots.over_n import ProfileCurve, plot_choice
from hf_coverage.select.tournament import Candidate, by_name, read_candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Choice", "Judged", "Pick", "Purpose", "check_purpose", "check_samples", "choose"]

Purpose = Literal["best-of-n", "rl"]
Rule = Literal["miss", "pass", "stratified pass", "signal", "soft tournament"]
Scorer = Callable[[NDArray[np.intp]], ArrayLike]
"""Gives log p(y_i|x_i) of the rows it is called with."""

_MOST_SAMPLES = 10**15

_LOSS = {
    "miss": "miss_{}",
    "pass": "1 - Pass@{}",
    "stratified pass": "1 - Pass@{} of stratified samples",
    "signal": "1 - signal_{}",
    "soft tournament": "score at N = {}",
}
_METRIC = {
    "miss": "miss",
    "pass": "fail",
    "stratified pass": "stratified_fail",
    "signal": "no_signal",
    "soft tournament": "soft_tournament",
}
_MEANING = {
    "miss": "no reward makes Best-of-{} lose more of its expectation under the reference",
    "pass": "the chance that {} samples hold no accepted response",
    "stratified pass": "the chance that {} stratified samples do not hold the right answer",
    "signal": "the chance that {} samples of a prompt all get the same reward, so that RL learns nothing from them",
    "soft tournament": (
        "how surely {} samples miss what some other candidate would write; the density of the corpus is not known, so "
        "that all of this is said by that score, which finds what is good at more samples than that"
    ),
}


@runtime_checkable
class Judged(Protocol):
    """Judged samples of prompts, such as a `BestOfNResult` or a `SuccessProfile`."""

    @property
    def k(self) -> int:
        """Samples that every prompt has."""

    @property
    def prompts(self) -> Iterable[Any]:
        """A label of each prompt."""

    @property
    def is_stratified(self) -> bool:
        """Whether the samples of a prompt belong together."""

    def passes(self, n: int) -> FloatArray:
        """Pass@N of each prompt, unbiased."""

    def mixed(self, group_size: int) -> FloatArray:
        """Probability for each prompt that the rewards of a group differ, unbiased."""


class Pick(NamedTuple):
    """What is picked for a number of samples.

    Attributes:
        samples: The number of samples.
        winner: The candidate with the least loss.
        loss: Its loss.
        left: The candidates that are not told from the best, by their loss; the winner is the first.
        within: With 95 % confidence the winner's loss is at most this far above that of the best.
        probability_best: The probability that the winner is the best; None with too few prompts to say, and where
            scoring stopped as soon as that was decided: then it is not known beyond the confidence of `left`.
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
        rule: What loses: `"miss"` where log D is known, `"pass"` where verdicts are, `"signal"` where these are for
            RL, `"stratified pass"` where the intervals of right answers are known or the judged samples are
            stratified, `"soft tournament"` else.
        samples: The number of samples that will be drawn; for RL in a group.
        losses: Mean loss of each candidate. Of one that was dropped on the way it is the winner's and the mean
            difference from it on the rows that both were scored on: rather too much, for it was dropped where it
            looked worst.
        intervals: 95 % interval of each loss, by itself.
        pick: What is picked for `samples`.
        others: What would be picked for other numbers of samples.
        probability_within: The probability that the winner is at most `tolerance` behind the best; None as
            `probability_best`.
        tolerance: The loss that does not matter.
        cross_entropies: E[-log p] of each candidate, nats a response; None where verdicts are all there is.
        cross_entropy_cost: Loss of the candidate that cross-entropy would take, minus the winner's; None as before.
            Its 95 % interval is that of these two, as if they had been named before the losses were seen: the winner
            was not, so that with many candidates as good as each other the difference is rather too large.
        num_rows: Rows that the winner was scored on.
        num_prompts: Distinct prompts among them.
        scored_rows: Rows that each candidate was scored on.
        row_scorings: Rows scored over all candidates.
        full_row_scorings: What they would have been with all rows for every candidate.
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
    scored_rows: dict[str, int]
    row_scorings: int
    full_row_scorings: int
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
    def dropped(self) -> tuple[str, ...]:
        """The candidates that were shown to be behind before they were scored on all rows that the winner was."""
        return tuple(name for name, rows in self.scored_rows.items() if rows < self.num_rows)

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
        """What the losses are called among metrics: `miss_16`, `fail_16`, `no_signal_16` and so on."""
        return f"{_METRIC[self.rule]}_{metric_key(self.samples)}"

    @property
    def loss_name(self) -> str:
        """What a loss is called: `miss_16`, `1 - Pass@16` or `score at N = 16`."""
        return _LOSS[self.rule].format(metric_key(self.samples))

    @property
    def curves(self) -> tuple[ProfileCurve, ...]:
        """The candidates' losses over the number of samples; an interval has a curve that is picked, no other."""
        return self._curves

    @property
    def sentence(self) -> str:
        """What was decided, how sure it is, and what cross-entropy would take, in plain words."""
        return " ".join([self._decision(), *self._certainty(), *self._against_cross_entropy(), *self._cost()])

    def plot(self, path: str | PathLike[str] | None = None, *, title: str | None = None) -> Figure:
        """Draw the candidates' losses over the number of samples, the picks marked.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            title: Title above the axes.
        """
        picks = [(pick.samples, pick.winner) for pick in (self.pick, *self.others)]
        label = "miss$_N$" if self.rule == "miss" else _LOSS[self.rule].replace("N = {}", "{}").format("$N$")
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
        rows = "" if self._is_judged else f"{self.num_rows:,} responses to "
        of = f"of {len(self.names)} candidates on {rows}{self.num_prompts:,} prompts"
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
        if self.row_scorings < self.full_row_scorings and len(self.left) == 1:
            parts = ["With 95 % confidence it is the best."]
        if self.probability_best is not None:
            enough = self.is_decided or self.probability_best > 0.95
            but = "" if enough else ": too little to leave the others out, which takes 95 %"
            parts.append(f"The probability that it is the best is {_share(self.probability_best)}{but}.")
        if not self.is_decided:
            parts.append(
                f"More {self._rows} like these would not tell equals apart."
                if not np.isfinite(self.rows_needed)
                else f"To decide would take about {_rounded(self.rows_needed)} {self._rows} more."
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

    def _cost(self) -> list[str]:
        if self.row_scorings == self.full_row_scorings:
            return []
        dropped = f"; {_listed(self.dropped)} {_were(self.dropped)} dropped on the way" if self.dropped else ""
        return [
            f"It took {self.row_scorings:,} of the {self.full_row_scorings:,} row scorings of the full table "
            f"({self.row_scorings / self.full_row_scorings:.0%}){dropped}."
        ]

    @property
    def _is_judged(self) -> bool:
        """Whether every row is a prompt with the verdicts on its samples."""
        return self.cross_entropies is None

    @property
    def _rows(self) -> str:
        return "prompts" if self._is_judged else "rows"


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


def check_purpose(purpose: str, levels: Sequence[float]) -> None:
    """Refuse a purpose that is not known, and groups of RL that could not differ; ValueError."""
    if purpose not in ("best-of-n", "rl"):
        raise ValueError(f'`purpose` must be "best-of-n" or "rl", got {purpose!r}.')
    if purpose == "rl" and min(levels) < 2:
        raise ValueError(f"`samples` must be groups of at least 2 for RL, which compares them, got {min(levels):g}.")


def choose(
    candidates: Mapping[str, Candidate | Judged | Scorer],
    samples: float | Sequence[float] = 16,
    *,
    purpose: Purpose = "best-of-n",
    reference_logprobs: ArrayLike | None = None,
    groups: Iterable[Any] | None = None,
    interval_lows: Mapping[str, ArrayLike] | None = None,
    tolerance: float = 0.0,
    adaptive: bool = False,
    seed: int = 0,
) -> Choice:
    """Choose the candidate that loses least of Best-of-N with the samples that will be drawn, and say how surely.

    What loses is read off what is known. With log D of the responses, or one right answer a prompt (log D = 0), it is
    miss_N, which bounds the loss for every reward. With verdicts it is 1 - Pass@N, without bias for N up to k; with
    `purpose="rl"` the chance that all samples of a group get the same reward, from which GRPO and its kin learn
    nothing. With nothing but responses it is the score of the soft tournament, in which candidates are measured by
    each other; it is never held where log D is known. Verdicts, unless they are said to be of stratified samples, and
    miss_N are of independent ones; with the intervals of single right answers what loses is 1 - Pass@N of stratified
    ones, exact, which may be least for another candidate.

    With `adaptive` the candidates are scored on 64 prompts drawn at random, then on 128, 256, ...; those that an
    anytime-valid test shows not to be the best are dropped, and it ends when one is left, when the first is within the
    tolerance of all that are left, or with the corpus. What is said then has its confidence with all of that.

    Args:
        candidates: By name, log p(y_i|x_i) of the same R rows `(R,)` in nats, or a `ScoreTable`, or its folder; or
            judged samples of the same P prompts: what `evaluate_best_of_n` gives, a `SuccessProfile`, or `(P, k)`
            booleans, which of k samples to each prompt a verifier accepts; for RL any rewards. With `adaptive` also a
            function that is called with row numbers and gives log p of these rows alone: it is called for one
            candidate after the other, in an order that needs no model twice in a row.
        samples: N, the samples that will be drawn; with several, the first decides and the others are picked for too.
            For RL the samples of a group.
        purpose: What the samples are drawn for: to take the best of them, or for RL that compares the rewards of a
            group. The signal at the start says whether RL begins to learn, and not where it ends.
        reference_logprobs: `(R,)` log D(y|x), nats; 0 where y is the single right answer; None if it is not known.
        groups: `(R,)` the prompt of each row, if prompts repeat.
        interval_lows: By name, `(R,)` what `score_responses(..., intervals=True)` adds: choose for stratified samples.
        tolerance: A loss that does not matter, in [0, 1).
        adaptive: Whether to score candidates only as long as they may be the best. Needs log D, or verdicts: in a soft
            tournament candidates are measured by each other, and what one loses changes with who is dropped.
        seed: Of the normal draws behind the confidences, and of the order of the prompts.

    Returns:
        The choice.

    Raises:
        ValueError: If candidates are not of the same rows, values are no log-probabilities, N exceeds k, or an
            argument is out of range or does not fit the others; names the candidate.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> early = np.full(500, -3.0)
        >>> late = np.where(rng.random(500) < 0.1, -12.0, -1.0)
        >>> choice = choose({"early": early, "late": late}, samples=64, reference_logprobs=np.zeros(500))
        >>> choice.winner, choice.left, choice.cross_entropy_choice, round(choice.losses["late"], 3)
        ('early', ('early',), 'late', 0.094)
        >>> verdicts = {name: rng.random((300, 16)) < rng.beta(*law, (300, 1))
        ...     for name, law in {"narrow": (0.3, 0.2), "wide": (1.0, 2.0)}.items()}
        >>> choose(verdicts, samples=1).winner, choose(verdicts, samples=8).winner
        ('narrow', 'wide')
        >>> rl = choose(verdicts, samples=8, purpose="rl")
        >>> rl.winner, rl.loss_name, rl.losses["wide"] < rl.losses["narrow"]
        ('wide', '1 - signal_8', True)

    References:
        Theorem M of `functional.miss_profile`; `functional.choice` for the confidences.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError("`candidates` must map at least one name to log-probabilities, a score table or verdicts.")
    levels = check_samples(samples)
    check_purpose(purpose, levels)
    named = by_name(candidates, "candidates")
    judged = _judged(named)
    if purpose == "rl" and judged is None:
        raise ValueError(
            '`purpose="rl"` is decided by rewards of samples: give what `evaluate_best_of_n` gives, a '
            "`SuccessProfile`, or `(P, k)` rewards of k samples to each prompt as `candidates`."
        )
    codes = None if groups is None else group_codes(groups)
    losses = None if judged is None else _Losses.of_judged(judged, levels, purpose)
    if adaptive:
        if interval_lows is not None:
            raise ValueError("`adaptive` is of independent samples: leave out `interval_lows`, or `adaptive`.")
        return _choose_adaptively(named, levels, losses, reference_logprobs, codes, tolerance, seed)
    if interval_lows is not None:
        losses = _Losses.of_intervals(named, by_name(interval_lows, "interval_lows"), reference_logprobs)
    losses = losses or _Losses.of_logprobs(named, reference_logprobs)
    decisions = [decide(losses.at(level), groups=codes, tolerance=tolerance, seed=seed) for level in levels]
    return _choice(tuple(named), levels, losses, decisions, codes, tolerance)


def _choose_adaptively(
    named: Mapping[str, Any],
    levels: Sequence[float],
    judged: _Losses | None,
    reference: ArrayLike | None,
    codes: NDArray[np.uint64] | None,
    tolerance: float,
    seed: int,
) -> Choice:
    if judged is not None:
        sources: list[Callable[[NDArray[np.intp]], FloatArray]] = [partial(_taken, table) for table in judged.rows]
        size = len(judged.rows[0])
    elif reference is not None:
        sources = _scorers(named, size := np.size(reference))
    else:
        raise ValueError(
            "`adaptive` needs `reference_logprobs`, or verdicts: without them candidates are measured by each other, "
            "and dropping one would change what the others lose. Give them, or leave `adaptive` out."
        )
    codes = np.arange(size, dtype=np.uint64) if codes is None else codes
    if codes.size != size:
        raise ValueError(f"`groups` must have one label a row, {size} in all, but has {codes.size}.")
    order = prompt_order(codes, seed)
    known = np.empty(0) if judged is not None else np.asarray(reference, dtype=np.float64)[order]

    def losses_of(rows: list[FloatArray], start: int = 0) -> _Losses:
        return _Losses.of_first_rows(rows, known[start:]) if judged is None else judged.on(rows)

    seen: list[list[FloatArray]] = [[] for _ in named]

    def score(m: int, start: int, stop: int) -> FloatArray:
        seen[m].append(sources[m](order[start:stop]))
        new = losses_of(seen[m][-1:], start)
        return np.stack([new.at(level)[0] for level in levels])

    first_rows = np.flatnonzero(np.diff(codes[order], prepend=codes[order[:1]] + np.uint64(1)))
    prompt_rows = np.diff(np.append(first_rows, size))
    race = race_by_loss(score, len(named), prompt_rows, tolerance=tolerance, seed=seed)
    losses = losses_of([np.concatenate(parts) for parts in seen])
    return _choice(tuple(named), levels, losses, race.decisions, codes[order], tolerance)


def _scorers(named: Mapping[str, Any], size: int) -> list[Callable[[NDArray[np.intp]], FloatArray]]:
    """What gives each candidate's log-probabilities of some rows."""
    whole = {name: source for name, source in named.items() if not callable(source)}
    read = dict(zip(whole, read_candidates(whole)))
    odd = next((name for name, values in read.items() if values.size != size), None)
    if odd is not None:
        raise ValueError(
            f"`reference_logprobs` must be of the same rows as the candidates, but has {size:,} and {odd!r} "
            f"{read[odd].size:,}."
        )

    def ask(name: str, rows: NDArray[np.intp]) -> FloatArray:
        values = check_logprobs(named[name](rows), name=f"candidates[{name!r}]")
        if values.size != rows.size:
            raise ValueError(f"`candidates[{name!r}]` was asked for {rows.size:,} rows and gave {values.size:,}.")
        return values

    return [partial(_taken, read[name]) if name in read else partial(ask, name) for name in named]


def _taken(values: FloatArray, rows: NDArray[np.intp]) -> FloatArray:
    return values[rows]


def _choice(
    names: tuple[str, ...],
    levels: Sequence[float],
    losses: _Losses,
    decisions: Sequence[Decision],
    codes: NDArray[np.uint64] | None,
    tolerance: float,
) -> Choice:
    """The choice, from losses that may be of the first rows only; `codes` are of all rows."""
    picks = [_pick(level, names, decision) for level, decision in zip(levels, decisions)]
    first, rows = decisions[0], losses.at(levels[0])
    entropies = losses.cross_entropies(first.pick)
    cost = None
    if entropies is not None:
        cheapest = int(np.argmin(entropies))
        size = rows[cheapest].size
        cost = paired_loss_difference(rows[cheapest], rows[first.pick][:size], groups=_first(codes, size))
    num_rows = rows[first.pick].size
    return Choice(
        names=names,
        rule=losses.rule,
        samples=levels[0],
        losses=_named(names, first.losses),
        intervals=_named_intervals(names, rows, first.losses, codes),
        pick=picks[0],
        others=tuple(picks[1:]),
        probability_within=first.probability_within,
        tolerance=tolerance,
        cross_entropies=None if entropies is None else _named(names, entropies),
        cross_entropy_cost=cost,
        num_rows=num_rows,
        num_prompts=num_rows if codes is None else int(np.unique(codes[:num_rows]).size),
        scored_rows={name: own.size for name, own in zip(names, rows)},
        row_scorings=sum(own.size for own in rows),
        full_row_scorings=len(names) * (num_rows if codes is None else codes.size),
        _curves=_curves(names, losses, losses.grid(levels), {pick.winner for pick in picks}, first.pick, codes),
    )


class _Losses:
    """What each candidate loses on each row that it was scored on, for any number of samples."""

    def __init__(
        self, rule: Rule, rows: list[FloatArray], logprobs: list[FloatArray] | None, levels: Sequence[int] = ()
    ) -> None:
        self.rule: Rule = rule
        self.rows, self._logprobs, self._levels = rows, logprobs, levels

    @classmethod
    def of_logprobs(cls, named: Mapping[str, Any], reference: ArrayLike | None) -> _Losses:
        logprobs = read_candidates(named)
        if reference is None:
            return cls("soft tournament", logprobs, logprobs)
        return cls("miss", [log_ratios(reference, values) for values in logprobs], logprobs)

    @classmethod
    def of_judged(cls, judged: Mapping[str, Judged], levels: Sequence[float], purpose: Purpose) -> _Losses:
        """Losses for those numbers of samples that are asked for and some more: a column for each."""
        first, *others = judged.items()
        for name, other in others:
            if list(other.prompts) != list(first[1].prompts) or other.is_stratified != first[1].is_stratified:
                raise ValueError(
                    f"`candidates` must have verdicts on the same prompts in the same order, sampled in one way, but "
                    f"those of {first[0]!r} and {name!r} are not."
                )
        k = min(one.k for one in judged.values())
        bad = next((level for level in levels if level != int(level) or level > k), None)
        if bad is not None:
            raise ValueError(
                f"`samples` must be a whole number up to the {k} verdicts a prompt, but is {bad:g}: beyond them "
                f"{'the signal' if purpose == 'rl' else 'Pass@N'} is not known."
            )
        least = 2 if purpose == "rl" else 1
        sizes = sorted({2**power for power in range(least - 1, k.bit_length())} | {k, *map(int, levels)})
        share = "mixed" if purpose == "rl" else "passes"
        tables = [np.stack([1 - getattr(one, share)(n) for n in sizes], axis=1) for one in judged.values()]
        rule: Rule = "signal" if purpose == "rl" else "stratified pass" if first[1].is_stratified else "pass"
        return cls(rule, tables, None, sizes)

    @classmethod
    def of_intervals(cls, named: Mapping[str, Any], lows: Mapping[str, Any], reference: ArrayLike | None) -> _Losses:
        if _judged(named) is not None or reference is None or np.any(reference):
            raise ValueError(
                "`interval_lows` are of single right answers: give log-probabilities of them as `candidates`, and "
                "`reference_logprobs` of 0."
            )
        if lows.keys() != named.keys():
            raise ValueError(f"`interval_lows` must have the names of the candidates, {[*named]}, but has {[*lows]}.")
        logprobs = read_candidates(named)
        begins = [check_intervals(lows[name], values) for name, values in zip(named, logprobs)]
        return cls("stratified pass", begins, logprobs)

    @classmethod
    def of_first_rows(cls, rows: list[FloatArray], reference: FloatArray) -> _Losses:
        """Of the first rows, of each candidate as many as there are log p of."""
        return cls("miss", [log_ratios(reference[: values.size], values) for values in rows], rows)

    def on(self, rows: list[FloatArray]) -> _Losses:
        """The same of other rows of verdicts."""
        return _Losses(self.rule, rows, None, self._levels)

    def at(self, samples: float) -> list[FloatArray]:
        """Of each candidate the losses with so many samples."""
        if self._levels:
            return [table[:, self._levels.index(int(samples))] for table in self.rows]
        if self.rule == "stratified pass" and self._logprobs is not None:
            if samples != int(samples):
                raise ValueError(f"`samples` must be a whole number of stratified samples, but is {samples:g}.")
            pairs = zip(self.rows, self._logprobs)
            return [1 - stratified_pass_probabilities(*pair, n=int(samples)) for pair in pairs]
        if self.rule == "miss":
            return [miss_values(ratios, samples) for ratios in self.rows]
        return list(envelope_losses(self.rows, samples))

    def grid(self, levels: Sequence[float]) -> FloatArray:
        """Numbers of samples to draw losses over."""
        if self._levels:
            return np.array(self._levels, dtype=np.float64)
        grid = np.unique(np.append(np.exp2(np.linspace(0, max(6.0, np.log2(max(levels)) + 2), 41)), levels))
        return np.unique(grid.round()) if self.rule == "stratified pass" else grid

    def cross_entropies(self, base: int) -> FloatArray | None:
        """E[-log p] of each candidate, nats a response; None where it is not known."""
        if self._logprobs is None:
            return None
        return comparable_means([-np.minimum(values, 0.0) for values in self._logprobs], base)


class _Table:
    """`(P, k)` verdicts or rewards as `Judged` samples of prompts that have no names."""

    is_stratified = False

    def __init__(self, rewards: Any) -> None:
        self.rewards = np.asarray(rewards)
        self.prompts = range(len(self.rewards))
        self.k = self.rewards.shape[1]

    @cached_property
    def _every_pass(self) -> FloatArray:
        return pass_at_n(self.rewards)

    def passes(self, n: int) -> FloatArray:
        return self._every_pass[:, n - 1]

    def mixed(self, group_size: int) -> FloatArray:
        return 1 - equal_reward_probability(self.rewards, group_size)


def _judged(named: Mapping[str, Any]) -> dict[str, Judged] | None:
    """The candidates as judged samples of prompts; None where they are log-probabilities."""
    judged: dict[str, Judged] = {}
    for name, values in named.items():
        if isinstance(values, Judged):
            judged[name] = values
        elif not isinstance(values, (str, PathLike)) and np.ndim(values) == 2:
            judged[name] = _Table(values)
    if judged and len(judged) < len(named):
        raise ValueError(
            "`candidates` must all be log-probabilities or all be verdicts, but only "
            f"{', '.join(map(repr, judged))} {'has' if len(judged) == 1 else 'have'} a table of verdicts."
        )
    return judged or None


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
    names: Sequence[str],
    losses: _Losses,
    grid: FloatArray,
    picked: set[str],
    base: int,
    codes: NDArray[np.uint64] | None,
) -> tuple[ProfileCurve, ...]:
    tables = [losses.at(level) for level in grid]
    values = np.clip([comparable_means(table, base) for table in tables], 0.0, 1.0).T
    curves = []
    for m, (name, value) in enumerate(zip(names, values)):
        low = high = value
        if name in picked:
            own = _first(codes, tables[0][m].size)
            low, high = np.array([bounded_mean_interval(table[m], groups=own) for table in tables]).T
        curves.append(ProfileCurve(name, grid, value, low, high))
    return tuple(curves)


def _named_intervals(
    names: Sequence[str], rows: Sequence[FloatArray], means: FloatArray, codes: NDArray[np.uint64] | None
) -> dict[str, tuple[float, float]]:
    """Each interval is that of the rows that were scored, moved as their mean was."""
    found, longest = {}, max(own.size for own in rows)
    for name, own, mean in zip(names, rows, means):
        low, high = bounded_mean_interval(own, groups=_first(codes, own.size))
        ease = 0.0 if own.size == longest else mean - own.mean()
        found[name] = (max(0.0, low + ease), min(1.0, high + ease))
    return found


def _first(codes: NDArray[np.uint64] | None, size: int) -> NDArray[np.uint64] | None:
    return None if codes is None else codes[:size]


def _named(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _share(probability: float) -> str:
    return "more than .99" if probability > 0.99 else f"about {probability:.2f}"


def _rounded(rows: float) -> str:
    digits = max(0, len(str(int(rows))) - 2)
    return f"{round(rows, -digits):,.0f}"
