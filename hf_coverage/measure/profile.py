"""The coverage profile of one model on one reference corpus, and the miss profile beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import (
    ROUNDING,
    FloatArray,
    ReferenceKind,
    check_log_ratios,
    check_logprobs,
    coverage_key,
    metric_key,
    miss_key,
)
from hf_coverage.functional.coverage_profile import coverage, coverage_interval, log_ratios, reached, smallest_n
from hf_coverage.functional.miss_profile import SampleBudget, miss, miss_interval, miss_values, sample_budget
from hf_coverage.functional.statistics import (
    MeanEstimate,
    bounded_mean_interval,
    clustered_mean,
    group_codes,
    row_weights,
)
from hf_coverage.inference.files import read_json, write_atomically
from hf_coverage.plots.over_n import ProfileCurve, plot_profiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CoverageProfile"]

_QUANTITY = {
    "density": "Cov_N",
    "single_answer": "Cov_N",
    "samples": "upper bound on Cov_N",
    "answer": "answer-level Cov_N",
}

_FORMAT = 1
_ARRAYS = {"log_ratios": np.float64, "logprobs": np.float64, "groups": np.uint64, "weights": np.float64}
_FIELDS = (*_ARRAYS, "kind", "name")


@dataclass(frozen=True, eq=False)
class CoverageProfile:
    """Cov_N and miss_N of a model against a reference, for every N at once, with their uncertainty.

    Cov_N is the share of good responses that are at least N times less likely under the model than under the
    reference, and miss_N the chance that N samples miss a good response: no reward makes Best-of-N lose more (see
    `functional.miss_profile`). Both are better when they are lower.

    Make one with `from_logprobs` or `from_log_ratios`. The profile knows what is known of its reference: on a plain
    corpus, whose density cannot be read, only upper bounds on Cov_N and miss_N exist, and they are available under
    `cov_upper` and `miss_upper` alone. Answer-level log-probabilities are means over sampled reasoning, which makes
    miss_N too high rather than too low.

    Attributes:
        log_ratios: `(R,)` log D(y|x) - log p(y|x), nats; on a plain corpus its upper bound -log p(y|x).
        logprobs: `(R,)` log p(y|x), nats, where known.
        groups: `(R,)` code of each row's prompt; None takes the rows as independent.
        weights: `(R,)` row weights; None weighs rows alike.
        kind: What is known of the reference: `"density"`, `"single_answer"`, `"samples"` or `"answer"`.
        name: The model's name in tables and plots.
        interval_lows: `(R,)` where the responses' intervals of arithmetic codes begin, where known.

    Example:
        >>> profile = CoverageProfile.from_logprobs([-1.0, -2.0, -9.0, -1.0], [-1.0, -1.0, -1.0, -1.0])
        >>> profile.cov(2), profile.cov([2, 16]).tolist(), profile.kl
        (0.5, [0.5, 0.25], 2.25)
        >>> round(profile.miss(2), 3), round(profile.miss(16), 3)
        (0.35, 0.249)
        >>> profile.key(2), profile.label(2), profile.level(2)
        ('cov_2', 'Cov_2', 0.5)
        >>> bound = CoverageProfile.from_logprobs([-1.0, -2.0, -9.0, -1.0])
        >>> bound.key(2), bound.label(2), bound.level(2)
        ('cov_upper_2', 'upper bound on Cov_2', 1.0)

    References:
        arXiv 2510.15020, Eq. (1) and (4), Remark 2.2.
    """

    log_ratios: FloatArray = field(repr=False)
    logprobs: FloatArray | None = field(repr=False)
    groups: NDArray[np.uint64] | None = field(repr=False)
    weights: FloatArray | None = field(repr=False)
    kind: ReferenceKind
    name: str
    interval_lows: FloatArray | None = field(default=None, repr=False)

    @classmethod
    def from_logprobs(
        cls,
        logprobs: ArrayLike,
        reference_logprobs: ArrayLike | None = None,
        *,
        groups: Iterable[Any] | None = None,
        weights: ArrayLike | None = None,
        kind: ReferenceKind | None = None,
        name: str = "model",
        interval_lows: ArrayLike | None = None,
    ) -> CoverageProfile:
        """Profile from sequence log-probabilities.

        Args:
            logprobs: `(R,)` log p(y|x) under the model, nats; -inf is legal.
            reference_logprobs: `(R,)` log D(y|x), nats; 0 where y is the single right answer; None for a plain
                corpus, which gives an upper bound.
            groups: `(R,)` the prompt of each row, if prompts repeat: strings, messages, token ids or codes.
            weights: `(R,)` non-negative row weights.
            kind: What is known of the reference; None reads it off the reference log-probabilities. Give `"answer"`
                for answer-level log-probabilities.
            name: The model's name in tables and plots.
            interval_lows: `(R,)` what `score_responses(..., intervals=True)` adds, for Pass@N of stratified samples.

        Raises:
            ValueError: On NaN, positive or unequally many values; names the row.
        """
        model = check_logprobs(logprobs)
        if reference_logprobs is None:
            if kind not in (None, "samples"):
                raise ValueError(f"`kind` {kind!r} needs `reference_logprobs`; without them only a bound is known.")
            return cls._checked(-model, model, groups, weights, "samples", name, interval_lows)
        ratios = log_ratios(reference_logprobs, model)
        if kind is None:
            kind = "density" if np.any(np.asarray(reference_logprobs)) else "single_answer"
        if kind == "samples":
            raise ValueError("`kind` 'samples' means that log D is unknown: leave `reference_logprobs` out.")
        return cls._checked(ratios, model, groups, weights, kind, name, interval_lows)

    @classmethod
    def from_log_ratios(
        cls,
        log_ratios: ArrayLike,
        *,
        groups: Iterable[Any] | None = None,
        weights: ArrayLike | None = None,
        name: str = "model",
    ) -> CoverageProfile:
        """Profile from log ratios log D(y|x) - log p(y|x), nats; +inf where the model gives probability 0."""
        return cls._checked(check_log_ratios(log_ratios), None, groups, weights, "density", name)

    @classmethod
    def _checked(
        cls,
        ratios: FloatArray,
        model: FloatArray | None,
        groups: Iterable[Any] | None,
        weights: ArrayLike | None,
        kind: ReferenceKind,
        name: str,
        lows: ArrayLike | None = None,
    ) -> CoverageProfile:
        if kind not in get_args(ReferenceKind):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(ReferenceKind))}, but is {kind!r}.")
        _check_logprobs_of(ratios, model, kind)
        codes = None if groups is None else group_codes(groups)
        if codes is not None and codes.shape != ratios.shape:
            raise ValueError(f"`groups` must have one label a row, {ratios.size} in all, but has {codes.size}.")
        weight = None if weights is None else row_weights(weights, ratios.size)
        if lows is not None and model is None:
            raise ValueError("`interval_lows` needs `logprobs`, how long the intervals are.")
        begins = None
        if lows is not None and model is not None:
            from hf_coverage.functional.arithmetic_codes import (
                check_intervals,
            )  # imports torch, which little else needs

            begins = check_intervals(lows, model)
        return cls(ratios, model, codes, weight, kind, str(name), begins)

    @property
    def num_rows(self) -> int:
        """Number of reference pairs."""
        return self.log_ratios.size

    @property
    def num_groups(self) -> int:
        """Distinct prompts of rows that have a weight, the unit of intervals; where none were given, those rows."""
        codes = np.arange(self.num_rows) if self.groups is None else self.groups
        return np.unique(codes if self.weights is None else codes[self.weights > 0]).size

    @property
    def is_upper_bound(self) -> bool:
        """Whether only an upper bound on Cov_N is known, because the reference has no density to read."""
        return self.kind == "samples"

    @property
    def quantity(self) -> str:
        """What `interval` and `plot` show, in words: Cov_N, an upper bound on it, or answer-level Cov_N."""
        return _QUANTITY[self.kind]

    def key(self, n: float) -> str:
        """Name of `level(n)` among metrics: `cov_<n>`, or `cov_upper_<n>` on a plain corpus."""
        return coverage_key(n, upper_bound=self.is_upper_bound)

    def label(self, n: float) -> str:
        """Name of `level(n)` in sentences and tables: `quantity` with its N, such as `upper bound on Cov_16`."""
        return self.quantity.replace("Cov_N", f"Cov_{metric_key(n)}")

    @overload
    def level(self, n: float) -> float: ...
    @overload
    def level(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def level(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """Cov_N, or its upper bound on a plain corpus: the `quantity` that this profile knows; lower is better."""
        return coverage(self.log_ratios, n, weights=self.weights)

    @overload
    def cov(self, n: float) -> float: ...
    @overload
    def cov(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def cov(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """Cov_N at one N or many; lower is better.

        Raises:
            ValueError: On a plain corpus, where Cov_N cannot be estimated: use `cov_upper`.
        """
        self._require_density("cov", "`cov_upper(n)` gives the upper bound that the corpus allows")
        return self.level(n)

    @overload
    def cov_upper(self, n: float) -> float: ...
    @overload
    def cov_upper(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def cov_upper(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """Upper bound `mean_i 1[-log p(y_i|x_i) >= log N]` on Cov_N, which needs no density of the reference.

        Raises:
            ValueError: If the profile was made from log ratios, without the model's log-probabilities.
        """
        return coverage(-self._known_logprobs("cov_upper"), n, weights=self.weights)

    def miss_key(self, n: float) -> str:
        """Name of `miss_level(n)` among metrics: `miss_<n>`, or `miss_upper_<n>` on a plain corpus."""
        return miss_key(n, upper_bound=self.is_upper_bound)

    def miss_label(self, n: float) -> str:
        """Name of `miss_level(n)` in sentences and tables, such as `upper bound on miss_16`."""
        return self.label(n).replace("Cov_", "miss_")

    @overload
    def miss_level(self, n: float) -> float: ...
    @overload
    def miss_level(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def miss_level(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """miss_N, or its upper bound on a plain corpus: what this profile knows; lower is better."""
        return miss(self.log_ratios, n, weights=self.weights)

    @overload
    def miss(self, n: float) -> float: ...
    @overload
    def miss(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def miss(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """miss_N at one N or many: no reward makes Best-of-N with N samples lose more than it; lower is better.

        Raises:
            ValueError: On a plain corpus, where miss_N cannot be estimated: use `miss_upper`.
        """
        self._require_density("miss", "`miss_upper(n)` gives the upper bound that the corpus allows")
        return self.miss_level(n)

    @overload
    def miss_upper(self, n: float) -> float: ...
    @overload
    def miss_upper(self, n: Sequence[float] | FloatArray) -> FloatArray: ...
    def miss_upper(self, n: float | Sequence[float] | FloatArray) -> float | FloatArray:
        """Upper bound `mean_i (1 - p(y_i|x_i))^N` on miss_N, which needs no density of the reference.

        Raises:
            ValueError: If the profile was made from log ratios, without the model's log-probabilities.
        """
        return miss(-self._known_logprobs("miss_upper"), n, weights=self.weights)

    def miss_interval(self, n: float, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of miss_N (of its upper bound on a plain corpus), the prompt being what was sampled."""
        return miss_interval(self.log_ratios, n, groups=self.groups, weights=self.weights, confidence=confidence)

    def interval(self, n: float, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of Cov_N (of its upper bound on a plain corpus), resampling prompts, not rows."""
        return coverage_interval(self.log_ratios, n, groups=self.groups, weights=self.weights, confidence=confidence)

    @property
    def kl(self) -> float:
        """Sequence-level `KL(D || p)`, nats; infinite if some reference response has probability 0.

        Raises:
            ValueError: On a plain corpus, where it is not known.
        """
        return self._kl.mean

    @property
    def kl_standard_error(self) -> float:
        """Standard error of `kl`, over prompts."""
        return self._kl.standard_error

    @property
    def _kl(self) -> MeanEstimate:
        self._require_density("kl", "`cross_entropy` is its upper bound")
        return clustered_mean(self.log_ratios, groups=self.groups, weights=self.weights)

    @property
    def cross_entropy(self) -> float:
        """Sequence-level cross-entropy `E[-log p(y|x)]`, nats a response."""
        return self._cross_entropy.mean

    @property
    def cross_entropy_standard_error(self) -> float:
        """Standard error of `cross_entropy`, over prompts."""
        return self._cross_entropy.standard_error

    @property
    def _cross_entropy(self) -> MeanEstimate:
        return clustered_mean(-self._known_logprobs("cross_entropy"), groups=self.groups, weights=self.weights)

    def n_for(self, eps: float) -> float:
        """Least N with Cov_N <= eps; infinite where there is none. On a plain corpus an N that is large enough."""
        return smallest_n(self.log_ratios, eps, weights=self.weights)

    def best_of_n_budget(self, regret: float, confidence: float = 0.95) -> SampleBudget:
        """How many samples Best-of-N needs so as to lose at most `regret` to the reference, whatever the reward.

        `.n` is the estimate, by Theorem M; `.guaranteed_n` holds with the `confidence` given, in finite samples;
        `.paper_n` and `.necessary_n` are the paper's. On a plain corpus the numbers are still enough, though fewer may
        be, and `necessary_n` says nothing and is 1.
        """
        budget = sample_budget(
            self.log_ratios, regret, groups=self.groups, weights=self.weights, confidence=confidence
        )
        return budget._replace(necessary_n=1.0) if self.is_upper_bound else budget

    def pass_at(self, n: float, sampling: Literal["independent", "stratified"] = "independent") -> float:
        """Exact Pass@N, where each prompt has one right answer: of N independent samples, or of N stratified ones.

        Stratified samples are never worse; how much better they are is told by the intervals of the answers.

        Raises:
            ValueError: If prompts have other references than one right answer, or, of stratified samples, N is no
                whole number or `interval_lows` is not known.
        """
        return clustered_mean(self._passes(n, sampling), groups=self.groups, weights=self.weights).mean

    def pass_interval(
        self, n: float, sampling: Literal["independent", "stratified"] = "independent", confidence: float = 0.95
    ) -> tuple[float, float]:
        """Confidence interval of `pass_at`, the prompt being what was sampled."""
        values = self._passes(n, sampling)
        return bounded_mean_interval(values, groups=self.groups, weights=self.weights, confidence=confidence)

    def _passes(self, n: float, sampling: str) -> FloatArray:
        if self.kind != "single_answer":
            raise ValueError(
                f"`pass_at` is exact where each prompt has one right answer, and the reference here is {self.kind!r}: "
                "sample with `evaluate_best_of_n`."
            )
        logprobs = self._known_logprobs("pass_at")
        if sampling == "independent":
            return pass_probabilities(logprobs, n)
        if sampling != "stratified":
            raise ValueError(f'`sampling` must be "independent" or "stratified", got {sampling!r}.')
        from hf_coverage.functional.arithmetic_codes import stratified_pass_probabilities  # imports torch

        if self.interval_lows is None:
            raise ValueError(
                "`pass_at` of stratified samples needs `interval_lows`: score with `intervals=True`, `--stratified`."
            )
        return stratified_pass_probabilities(self.interval_lows, logprobs, n)

    def metrics(self, n: Iterable[float] = (2, 4, 8, 16)) -> dict[str, float]:
        """The profile as flat metrics with standard errors: Cov_N, miss_N, KL and cross-entropy.

        Args:
            n: The N to report.

        Returns:
            `cov_<n>` and `miss_<n>` for each n (`cov_upper_<n>` and `miss_upper_<n>` on a plain corpus), `kl` where
            the reference has a density, `sequence_cross_entropy` where log p is known, each also with `_stderr`.
        """
        levels = list(n)
        rows = {self.key(value): reached(self.log_ratios, value) for value in levels}
        rows |= {self.miss_key(value): miss_values(self.log_ratios, value) for value in levels}
        estimates = {
            key: clustered_mean(values, groups=self.groups, weights=self.weights) for key, values in rows.items()
        }
        if not self.is_upper_bound:
            estimates["kl"] = self._kl
        if self.logprobs is not None:
            estimates["sequence_cross_entropy"] = self._cross_entropy
        flat = {}
        for key, estimate in estimates.items():
            flat[key], flat[f"{key}_stderr"] = estimate.mean, estimate.standard_error
        return flat

    def merge(self, other: CoverageProfile) -> CoverageProfile:
        """The profile of both parts' rows together, exact and in any order, under this one's name; `+` does the same.

        Raises:
            ValueError: If the parts know different things of their reference or only one of them has groups.
        """
        for what, mine, theirs in (
            ("`kind`", self.kind, other.kind),
            ("whether log p is known", self.logprobs is None, other.logprobs is None),
            ("whether rows have `groups`", self.groups is None, other.groups is None),
            ("whether `interval_lows` are known", self.interval_lows is None, other.interval_lows is None),
        ):
            if mine != theirs:
                raise ValueError(f"profiles to merge must agree on {what}, but have {mine!r} and {theirs!r}.")
        unweighted = self.weights is None and other.weights is None
        weights = [row_weights(part.weights, part.num_rows) for part in (self, other)]
        return CoverageProfile(
            np.concatenate([self.log_ratios, other.log_ratios]),
            _concatenate(self.logprobs, other.logprobs),
            _concatenate(self.groups, other.groups),
            None if unweighted else np.concatenate(weights),
            self.kind,
            self.name,
            _concatenate(self.interval_lows, other.interval_lows),
        )

    __add__ = merge

    def curve(self, n: Iterable[float] | None = None, confidence: float = 0.95) -> ProfileCurve:
        """Cov_N (or its upper bound) with its interval on a grid of N; by default up to where the profile ends."""
        grid = np.asarray(_grid(self.log_ratios) if n is None else list(n), dtype=np.float64)
        # rows that reach one N reach all below it: as many hits are the same hits, and have the same interval
        _, first, place = np.unique(coverage(self.log_ratios, grid), return_index=True, return_inverse=True)
        intervals = [self.interval(grid[index], confidence) for index in first]
        return _curve(self.name, grid, self.level(grid), [intervals[k] for k in place])

    def miss_curve(self, n: Iterable[float] | None = None, confidence: float = 0.95) -> ProfileCurve:
        """miss_N (or its upper bound) with its interval on a grid of N; by default a third of that of `curve`."""
        grid = np.asarray(_grid(self.log_ratios)[::3] if n is None else list(n), dtype=np.float64)
        intervals = [self.miss_interval(value, confidence) for value in grid]
        return _curve(self.name, grid, self.miss_level(grid), intervals)

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        *,
        others: Sequence[CoverageProfile] = (),
        n: Iterable[float] | None = None,
        marks: Sequence[float] = (),
        among: Sequence[str] = (),
        title: str | None = None,
    ) -> Figure:
        """Draw Cov_N and miss_N side by side on logarithmic N axes, with 95 % intervals, for several models at once.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            others: Further profiles; each is labelled by its name.
            n: Grid of N; by default from 1 to where all profiles have ended, at most 1,000,000.
            marks: The N that are reported, marked by dotted lines.
            among: Names of all models that a report shows: each then looks the same in all of its figures.
            title: Title above the axes.

        Raises:
            ValueError: If the profiles do not all show the same quantity.
        """
        profiles = (self, *others)
        quantities = sorted({profile.quantity for profile in profiles})
        if len(quantities) > 1:
            raise ValueError(f"`others` must show the same quantity as this profile, but there are {quantities}.")
        grids = [_grid(profile.log_ratios) for profile in profiles]
        grid = max(grids, key=lambda values: values[-1]).tolist() if n is None else list(n)
        smooth = grid[::3] if n is None else grid  # a curve without steps needs fewer points
        if n is None:  # what is read off where the marks are is what is reported
            grid, smooth = (sorted({*points, *map(float, marks)}) for points in (grid, smooth))
        names = [f"{quantities[0].replace('Cov_N', symbol)} (lower is better)" for symbol in ("Cov$_N$", "miss$_N$")]
        curves = [[profile.curve(grid) for profile in profiles], [profile.miss_curve(smooth) for profile in profiles]]
        options: dict[str, Any] = {"bounds": self.is_upper_bound, "marks": marks, "among": among}
        return plot_profiles(dict(zip(names, curves)), path, **options, title=title)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The profile as JSON text, every number exact, infinities as text; also written to `path` where given."""
        facts = {"format": _FORMAT} | {name: getattr(self, name) for name in _FIELDS}
        facts |= {} if self.interval_lows is None else {"interval_lows": self.interval_lows}
        text = json.dumps(facts, default=_encode)
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> CoverageProfile:
        """Read what `to_json` gave: its text, or the path it wrote.

        Raises:
            ValueError: If the text is not a coverage profile of a known format.
        """
        try:
            facts = read_json(source, version=_FORMAT)
            if not all(type(code) is int for code in facts["groups"] or ()):
                raise TypeError("its groups are not all whole numbers")
            if not isinstance(facts["name"], str):
                raise TypeError(f"its name is {facts['name']!r}, which is no text")
            arrays: dict[str, Any] = {
                name: None if facts[name] is None else np.asarray(facts[name], dtype=kind)
                for name, kind in _ARRAYS.items()
            }
            return cls._checked(
                check_log_ratios(arrays["log_ratios"]),
                arrays["logprobs"],
                arrays["groups"],
                arrays["weights"],
                facts["kind"],
                facts["name"],
                facts.get("interval_lows"),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"`source` is not a coverage profile written by `to_json`: {error!r}.") from error

    def _require_density(self, what: str, instead: str) -> None:
        if self.is_upper_bound:
            raise ValueError(
                f"`{what}` needs log D(y|x), and this profile's corpus has samples of D only; {instead}. "
                "Give `reference_logprobs` where D is a known sampler or a teacher, or 0 where one answer is right."
            )

    def _known_logprobs(self, what: str) -> FloatArray:
        if self.logprobs is None:
            raise ValueError(f"`{what}` needs the model's log-probabilities: make the profile with `from_logprobs`.")
        return self.logprobs


def _grid(log_ratios: FloatArray) -> FloatArray:
    """N from 1 to where a profile has ended, at least 16 and at most 1,000,000, evenly in log N."""
    finite = log_ratios[np.isfinite(log_ratios)]
    top = float(finite.max()) + 0.25 if finite.size else 0.0
    return np.exp(np.linspace(0.0, min(max(top, math.log(16)), math.log(1e6)), 97))


def _curve(name: str, n: FloatArray, values: FloatArray, intervals: list[tuple[float, float]]) -> ProfileCurve:
    low, high = np.asarray(intervals).T
    return ProfileCurve(name, n, values, low, high)


def _concatenate(first: NDArray[Any] | None, second: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _encode(array: NDArray[Any]) -> list[Any]:
    """What JSON has no number for as "inf" and "-inf", which numpy reads back."""
    return [str(value) if value in (math.inf, -math.inf) else value for value in array.tolist()]


def _check_logprobs_of(ratios: FloatArray, model: FloatArray | None, kind: ReferenceKind) -> None:
    """Refuse log ratios that are not those of these log-probabilities and a reference of this kind."""
    if model is None:
        if kind != "density":
            raise ValueError(f"`kind` {kind!r} needs `logprobs`: log ratios alone are of a reference with a density.")
        return
    if check_logprobs(model).shape != ratios.shape:
        raise ValueError(
            f"`log_ratios` and `logprobs` must describe the same rows, but have {ratios.size} and {model.size}."
        )
    with np.errstate(invalid="ignore"):  # of a row that neither can produce
        reference = np.where(np.isinf(ratios) & np.isinf(model), 0.0, ratios + model)
    least = -ROUNDING if kind in ("samples", "single_answer") else -np.inf
    bad = np.flatnonzero(~((reference > -np.inf) & (reference >= least) & (reference <= ROUNDING)))
    if bad.size:
        raise ValueError(
            f"`log_ratios` must be log D - log p with log D {'0' if least > -1 else 'at most 0'} where `kind` is "
            f"{kind!r}, but row {bad[0]} has {ratios[bad[0]]} with log p {model[bad[0]]}."
        )
