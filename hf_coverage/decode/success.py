"""How likely prompts are to be solved, from accepted counts: Pass@N beyond the samples, and the signal that RL gets.

A verifier that accepts c of k samples of a prompt says how much probability the model gives to what is right, whatever
the words: coverage in the verifier's eyes. Up to k, Pass@N is estimated without bias. Beyond k it is not identified,
since a prompt without success may be hopeless or merely rare; what is given there is the range that the counts allow,
and a value of a model within it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.binomial_mixture import (
    BetaLaw,
    check_counts,
    fit_beta_law,
    fit_power_law,
    fit_success_law,
    success_range,
)
from hf_coverage.functional.checks import FloatArray, IntArray, check_confidence
from hf_coverage.functional.group_rewards import group_signal
from hf_coverage.functional.statistics import bounded_mean_interval, group_codes
from hf_coverage.inference.files import refuse_constant, write_atomically
from hf_coverage.plots.names import plain_text
from hf_coverage.plots.over_n import BestOfNCurve, plot_success

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Estimate", "MoreSamples", "Posterior", "Signal", "SuccessModel", "SuccessProfile"]

SuccessModel = Literal["beta-binomial", "scaled beta-binomial", "power law", "any law"]
"""What gives a value beyond the samples; `any law` is the likeliest law of any shape."""

_FORMAT = 1
_BATCH = 16
_FARTHEST_GROUP = 4096
_NOT_UNBIASED = "Outcomes decided how often prompts were sampled, so nothing is unbiased: see `{}`."


class Estimate(NamedTuple):
    """A value with the two ends of its interval, or of the range that the data do not reject."""

    value: float
    low: float
    high: float


class Signal(NamedTuple):
    """Shares of prompts by what a group of their samples is.

    Attributes:
        group_size: Samples g of a prompt that are compared with each other.
        all_wrong: Share of prompts whose group has no accepted sample, with its 95 % interval, or the range that the
            counts do not reject where g is beyond the samples.
        mixed: The same for groups with both: those that a group-relative method such as GRPO learns from.
        all_right: The same for groups with accepted samples only.
    """

    group_size: int
    all_wrong: Estimate
    mixed: Estimate
    all_right: Estimate


class Posterior(NamedTuple):
    """What the counts say of each prompt's own success probability, `(P,)` each.

    Attributes:
        mean: Under the likeliest law of all prompts.
        low: Lower end of Jeffreys' interval from the prompt's own counts alone.
        high: Its upper end.
    """

    mean: FloatArray
    low: FloatArray
    high: FloatArray


class MoreSamples(NamedTuple):
    """Where further samples tell most about Pass@N beyond what there is.

    Attributes:
        prompts: `(M,)` which prompts: some of those without success, drawn at random.
        at_most: Samples in all, old and new, at which a prompt is left.
        batch: Samples to draw at once: a prompt is also left after the first batch with a success.
    """

    prompts: IntArray
    at_most: int
    batch: int


@dataclass(frozen=True, eq=False)
class SuccessProfile:
    """Accepted samples of each of P prompts.

    Attributes:
        correct: `(P,)` how many samples were accepted.
        samples: `(P,)` how many there were; they may differ.
        prompts: `(P,)` labels, integers or text, all different; a merge adds counts of the same label.
        accepted_mass: `(P,)` the summed probability of the different accepted responses, a lower bound on the success
            probability that sees below one in `samples`; NaN where it is not known.
        adaptive: Whether outcomes decided how often a prompt was sampled. Then only what goes by the likelihood
            holds: `predict`, `cov` and `posterior`.
        name: The model's name.

    Example:
        >>> success = SuccessProfile.from_counts([0, 0, 3, 16], 16)
        >>> round(success.pass_at(1), 3), round(success.pass_at(8), 3), round(success.signal(8).mixed.value, 3)
        (0.297, 0.475, 0.225)
        >>> low, high = success.predict(1024)[1:]
        >>> low < success.pass_at(16) < high
        True
    """

    correct: IntArray = field(repr=False)
    samples: IntArray = field(repr=False)
    prompts: Sequence[int | str] = field(repr=False)
    accepted_mass: FloatArray = field(repr=False)
    adaptive: bool = False
    name: str = "model"

    @classmethod
    def from_counts(
        cls,
        correct: ArrayLike,
        samples: ArrayLike,
        *,
        prompts: Sequence[int | str] | None = None,
        accepted_mass: ArrayLike | None = None,
        adaptive: bool = False,
        name: str = "model",
    ) -> SuccessProfile:
        """A profile from how many samples of each prompt were accepted.

        Args:
            correct: `(P,)` accepted samples.
            samples: `(P,)` samples, or one number for all prompts.
            prompts: `(P,)` labels, integers or text; rows of one label are added. None: every row is a prompt.
            accepted_mass: `(P,)` lower bounds on success probabilities; see `accepted_mass` of this class.
            adaptive: Whether outcomes decided how often a prompt was sampled.
            name: The model's name.

        Raises:
            ValueError: If a count is no whole number from 0 to its number of samples, the lengths differ, or a mass
                lies outside [0, 1]; names the row.
        """
        counts, sizes = check_counts(correct, samples)
        labels: list[int | str] = list(range(counts.size)) if prompts is None else list(prompts)
        if len(labels) != counts.size:
            raise ValueError(f"`prompts` must have a label for each of {counts.size} rows, but has {len(labels)}.")
        bad = [row for row, label in enumerate(labels) if type(label) not in (int, str)]
        if bad:
            raise ValueError(f"`prompts` must hold integers or text, but row {bad[0]} is {labels[bad[0]]!r}.")
        mass = np.full(counts.size, np.nan) if accepted_mass is None else np.asarray(accepted_mass, dtype=np.float64)
        if mass.shape != counts.shape:
            raise ValueError(f"`accepted_mass` must have shape {counts.shape}, but has {mass.shape}.")
        wrong = np.flatnonzero((mass < 0) | (mass > 1 + 1e-6))
        if wrong.size:
            raise ValueError(f"`accepted_mass` must lie in [0, 1], but row {wrong[0]} is {mass[wrong[0]]}.")
        place = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        owner = np.array([place[label] for label in labels])
        total = np.zeros((2, len(place)), dtype=np.int64)
        np.add.at(total[0], owner, counts)
        np.add.at(total[1], owner, sizes)
        known = np.full(len(place), np.nan)
        for row in np.flatnonzero(~np.isnan(mass)):
            known[owner[row]] = np.fmax(known[owner[row]], min(mass[row], 1.0))
        return cls(total[0], total[1], list(place), known, adaptive, name)

    @property
    def num_prompts(self) -> int:
        """Number P of prompts, the unit that intervals resample."""
        return self.correct.size

    @property
    def is_stratified(self) -> bool:
        """Whether the samples of a prompt belong together: never, where their counts are all that is known."""
        return False

    @property
    def k(self) -> int:
        """Samples that every prompt has: the largest N that is estimated without bias."""
        return int(self.samples.min())

    def pass_at(self, n: int) -> float:
        """Pass@N: the share of prompts that N samples solve, unbiased; beyond `k` see `predict`.

        Raises:
            ValueError: If n is not between 1 and `k`, or outcomes decided how often a prompt was sampled.
        """
        return float(self.passes(n).mean())

    def miss(self, n: int) -> float:
        """miss_N, the share of prompts that N samples do not solve: `1 - pass_at(n)`."""
        return 1 - self.pass_at(n)

    def interval(self, n: int, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of Pass@N over prompts, for n up to `k`."""
        return bounded_mean_interval(self.passes(n), confidence=confidence)

    def predict(self, n: int, *, model: SuccessModel = "beta-binomial") -> Estimate:
        """Pass@N for any N: the range that the counts do not reject, and a model's value, cut to it.

        Up to `k` the value is the unbiased estimate where there is one. Beyond it, `low` and `high` hold for every
        law of success probabilities; the value is a guess that is right for laws of the model's shape.

        Args:
            n: Samples that Best-of-N may draw, at least 1.
            model: What gives the value beyond `k`.

        Raises:
            ValueError: If n is below 1 or no whole number, or the model is not known or cannot be fitted.
        """
        size = _at_least_one("n", n)
        low, high = self._range(lambda p: -np.expm1(size * np.log1p(-np.minimum(p, 1 - 1e-16))), size)
        value = self.pass_at(size) if size <= self.k and not self.adaptive else self._modelled(size, model)
        return Estimate(min(max(value, low), high), low, high)

    def cov(self, n: int) -> Estimate:
        """Cov_N in the verifier's eyes: the share of prompts whose success probability is at most 1/N.

        The value is that of the likeliest law, `low` and `high` are the range that the counts do not reject.

        Raises:
            ValueError: If n is below 1 or no whole number.
        """
        size = _at_least_one("n", n)

        def reached(p: FloatArray) -> FloatArray:
            return np.asarray(p <= 1 / size, dtype=np.float64)

        value = fit_success_law(self.correct, self.samples, n=size).mean(reached)
        low, high = self._range(reached, size)
        return Estimate(min(max(value, low), high), low, high)

    def cover_at(self, tau: float) -> Estimate:
        """Cover@tau of arXiv 2510.08325: the share of prompts whose success probability is at least tau, in (0, 1].

        `1 - cov(N)` at `tau = 1/N`, but for prompts at 1/N itself.
        """
        if not 0 < tau <= 1:
            raise ValueError(f"`tau` must be in (0, 1], got {tau}.")

        def covered(p: FloatArray) -> FloatArray:
            return np.asarray(p >= tau, dtype=np.float64)

        value = fit_success_law(self.correct, self.samples, n=1 / tau).mean(covered)
        low, high = self._range(covered, 1 / tau)
        return Estimate(min(max(value, low), high), low, high)

    def passes(self, n: int) -> FloatArray:
        """Pass@N of each prompt `(P,)`, unbiased; raises as `pass_at`."""
        if self.adaptive:
            raise ValueError(_NOT_UNBIASED.format("predict"))
        if n != int(n) or not 1 <= n <= self.k:
            raise ValueError(
                f"`n` must be a whole number from 1 to k = {self.k}, the samples that every prompt has, got {n}; "
                "beyond it see `predict`."
            )
        return 1 - group_signal(self.correct, self.samples, int(n)).all_wrong

    def mixed(self, group_size: int) -> FloatArray:
        """Unbiased probability for each prompt `(P,)` that a group of samples is mixed: what `signal` is the mean of.

        Raises:
            ValueError: If the group is larger than `k`, or outcomes decided how often a prompt was sampled.
        """
        if self.adaptive:
            raise ValueError(_NOT_UNBIASED.format("signal"))
        return group_signal(self.correct, self.samples, group_size).mixed

    def signal(self, group_size: int) -> Signal:
        """Shares of prompts whose group of samples is all wrong, mixed, or all right.

        Up to `k` they are unbiased, with 95 % intervals over prompts. Beyond, values are those of the likeliest law,
        within the ranges that the counts do not reject.

        Args:
            group_size: Samples g of a prompt that are compared with each other, at least 1.

        Raises:
            ValueError: If the size is below 1 or no whole number.
        """
        size = _at_least_one("group_size", group_size)
        if size <= self.k and not self.adaptive:
            parts = group_signal(self.correct, self.samples, size)
            return Signal(size, *(Estimate(float(part.mean()), *bounded_mean_interval(part)) for part in parts))
        law = fit_success_law(self.correct, self.samples, n=size)
        kinds = [lambda p: (1 - p) ** size, lambda p: 1 - (1 - p) ** size - p**size, lambda p: p**size]
        estimates = []
        for kind in kinds:
            low, high = self._range(lambda p, kind=kind: np.clip(kind(p), 0.0, 1.0), size)
            estimates.append(Estimate(min(max(law.mean(kind), low), high), low, high))
        return Signal(size, *estimates)

    def group_size_for(self, mixed: float = 0.5) -> int | None:
        """The least group size at which that share of prompts gives a signal, by the values of `signal`.

        Args:
            mixed: The wanted share of mixed groups, in (0, 1).

        Returns:
            The size; None where 4,096 samples are not enough.

        Raises:
            ValueError: If the share is not in (0, 1).
        """
        if not 0 < mixed < 1:
            raise ValueError(f"`mixed` must be in (0, 1), got {mixed}.")
        unbiased = 1 if self.adaptive else self.k
        for size in range(2, unbiased + 1):
            if group_signal(self.correct, self.samples, size).mixed.mean() >= mixed:
                return size
        law = fit_success_law(self.correct, self.samples, n=_FARTHEST_GROUP)

        def share(size: int) -> float:
            return law.mean(lambda p: 1 - (1 - p) ** size - p**size)

        if share(_FARTHEST_GROUP) < mixed:
            return None
        low, high = max(unbiased, 1), _FARTHEST_GROUP
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if share(middle) >= mixed else (middle, high)
        return high

    def posterior(self, confidence: float = 0.95) -> Posterior:
        """Each prompt's own success probability: its mean by empirical Bayes, and Jeffreys' interval."""
        check_confidence(confidence)
        law = fit_success_law(self.correct, self.samples, n=int(self.samples.max()))
        c, k = self.correct[:, None], self.samples[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(c > 0, c * np.log(law.points), 0) + np.where(k > c, (k - c) * np.log1p(-law.points), 0)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True)) * law.masses
        mean = weights @ law.points / weights.sum(axis=1)
        rest = self.samples - self.correct
        low = stats.beta.ppf((1 - confidence) / 2, self.correct + 0.5, rest + 0.5)
        high = stats.beta.ppf((1 + confidence) / 2, self.correct + 0.5, rest + 0.5)
        return Posterior(mean, np.where(self.correct == 0, 0.0, low), np.where(rest == 0, 1.0, high))

    def mass_bound(self, n: int) -> float:
        """A lower bound on Pass@N from the probabilities of accepted responses; nothing is known where mass is NaN."""
        size = _at_least_one("n", n)
        mass = np.nan_to_num(self.accepted_mass, nan=0.0)
        return float(1 - np.mean((1 - np.minimum(mass, 1.0)) ** size))

    def more_samples(self, n: int, budget: int, *, seed: int = 0) -> MoreSamples:
        """Which prompts to sample more of so that the range of Pass@N at a wanted N becomes narrower.

        `max(10, 2 budget / n)` prompts without success, at random, each in batches of 16 up to its first success or
        n samples. Merge what comes out with `adaptive=True`.

        Args:
            n: The wanted N, beyond `k`.
            budget: Samples that may be drawn in all.
            seed: Of the choice.

        Raises:
            ValueError: If n is not beyond `k`, or no prompt is without success.
        """
        size = _at_least_one("n", n)
        if size <= self.k:
            raise ValueError(f"`n` = {n} is not beyond the k = {self.k} samples that every prompt has: see `pass_at`.")
        idle = np.flatnonzero(self.correct == 0)
        if not idle.size:
            raise ValueError("Every prompt has an accepted sample: further ones change little.")
        wanted = min(max(10, math.ceil(2 * _at_least_one("budget", budget) / size)), idle.size)
        chosen = np.sort(np.random.default_rng(seed).choice(idle, wanted, replace=False))
        return MoreSamples(chosen, size, _BATCH)

    def merge(self, other: SuccessProfile, *, adaptive: bool = False) -> SuccessProfile:
        """Counts of both: those of one label are added, so they must be of different samples.

        Args:
            other: Samples of the same model.
            adaptive: Whether outcomes of the one decided what the other sampled.
        """
        return SuccessProfile.from_counts(
            np.concatenate([self.correct, other.correct]),
            np.concatenate([self.samples, other.samples]),
            prompts=[*self.prompts, *other.prompts],
            accepted_mass=np.concatenate([self.accepted_mass, other.accepted_mass]),
            adaptive=self.adaptive or other.adaptive or adaptive,
            name=self.name,
        )

    def by_group(self, groups: Iterable[Any]) -> dict[Any, SuccessProfile]:
        """The profile of each group of prompts, for instance of each difficulty.

        Args:
            groups: `(P,)` labels.

        Raises:
            ValueError: If there is not one label for each prompt.
        """
        labels = list(groups)
        if len(labels) != self.num_prompts:
            raise ValueError(f"`groups` must have {self.num_prompts} labels, one a prompt, but has {len(labels)}.")
        codes = group_codes(labels)
        found = {}
        for code in dict.fromkeys(codes.tolist()):
            rows = np.flatnonzero(codes == code).tolist()
            found[labels[rows[0]]] = SuccessProfile.from_counts(
                self.correct[rows],
                self.samples[rows],
                prompts=[self.prompts[row] for row in rows],
                accepted_mass=self.accepted_mass[rows],
                adaptive=self.adaptive,
                name=self.name,
            )
        return found

    @property
    def sentence(self) -> str:
        """What came out, in plain words."""
        sizes = f"{self.k}" if self.samples.max() == self.k else f"{self.k} to {self.samples.max()}"
        solved = f"{np.mean(self.correct > 0):.1%} of {self.num_prompts:,} prompts with {sizes} samples each"
        farther = 4 * int(self.samples.max())
        value, low, high = self.predict(farther)
        return (
            f"{self.name} solves {solved}; with {farther} it would be {low:.1%} to {high:.1%}, which is all that the "
            f"counts say, and {value:.1%} if success probabilities follow a Beta law."
        )

    def plot(self, path: str | PathLike[str] | None = None, *, farthest: int | None = None) -> Figure:
        """Draw Pass@N with its 95 % band up to `k`, and beyond it the range that the counts allow.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            farthest: Largest N; None: 64 times `k`.
        """
        last = 64 * self.k if farthest is None else _at_least_one("farthest", farthest)
        curves = []
        if not self.adaptive:
            inside = range(1, min(self.k, last) + 1)
            points = np.array([[self.pass_at(n), *self.interval(n)] for n in inside])
            curves.append(BestOfNCurve("sampled", np.array(inside), *points.T))
        first = 1 if self.adaptive else self.k
        if last > first:
            n = np.unique(np.geomspace(first, last, 25).round().astype(int))
            points = np.array([self.predict(int(value)) for value in n])
            curves.append(BestOfNCurve("a Beta law, and what the counts allow", n, *points.T))
        return plot_success(curves, path, title=plain_text(self.name))

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The profile as JSON text; also written to `path` where given."""
        facts = {
            "format": _FORMAT,
            "name": self.name,
            "correct": self.correct.tolist(),
            "samples": self.samples.tolist(),
            "prompts": list(self.prompts),
            "accepted_mass": [None if math.isnan(mass) else mass for mass in self.accepted_mass.tolist()],
            "adaptive": self.adaptive,
        }
        text = json.dumps(facts, allow_nan=False)
        if path is not None:
            write_atomically(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> SuccessProfile:
        """Read what `to_json` gave: its text, or the path it wrote.

        Raises:
            ValueError: If the text is not a profile of a known format.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        try:
            facts = json.loads(text, parse_constant=refuse_constant)
            if facts["format"] != _FORMAT or facts["format"] is True:
                raise ValueError(f"format {facts['format']} is not {_FORMAT}")
            for key in ("correct", "samples"):
                if not all(type(one) is int for one in facts[key]):
                    raise ValueError(f"its {key} are not all whole numbers")
            if len(set(facts["prompts"])) != len(facts["prompts"]):
                raise ValueError("a prompt stands twice")
            if type(facts["adaptive"]) is not bool or not isinstance(facts["name"], str):
                raise ValueError("its `adaptive` or name is not what it should be")
            mass = [math.nan if one is None else one for one in facts["accepted_mass"]]
            return cls.from_counts(
                facts["correct"],
                facts["samples"],
                prompts=facts["prompts"],
                accepted_mass=mass,
                adaptive=facts["adaptive"],
                name=facts["name"],
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"`source` is not a profile written by `to_json`: {error!r}.") from error

    @cached_property
    def _beta_law(self) -> BetaLaw:
        return fit_beta_law(self.correct, self.samples)

    @cached_property
    def _scaled_law(self) -> BetaLaw:
        return fit_beta_law(self.correct, self.samples, scaled=True)

    def _range(self, values: Any, n: float) -> tuple[float, float]:
        return success_range(self.correct, self.samples, values, n=n)

    def _modelled(self, n: int, model: SuccessModel) -> float:
        if model == "any law":
            law = fit_success_law(self.correct, self.samples, n=n)
            return law.mean(lambda p: -np.expm1(n * np.log1p(-np.minimum(p, 1 - 1e-16))))
        if model == "power law":
            if self.adaptive or self.samples.max() != self.k:
                raise ValueError("A power law is fitted to Pass@1 to Pass@k, which need k samples of every prompt.")
            return fit_power_law(pass_at_n(self.correct, k=self.k).mean(axis=0)).pass_at(n)
        if model in ("beta-binomial", "scaled beta-binomial"):
            return (self._beta_law if model == "beta-binomial" else self._scaled_law).pass_at(n)
        known = "'beta-binomial', 'scaled beta-binomial', 'power law' or 'any law'"
        raise ValueError(f"`model` must be {known}, got {model!r}.")


def _at_least_one(name: str, value: float) -> int:
    if not (1 <= value < 2**53) or value != int(value):
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value}.")
    return int(value)
