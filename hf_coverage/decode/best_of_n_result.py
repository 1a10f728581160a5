"""What Best-of-N achieves with a model: rewards of k responses to each prompt, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_coverage.decode.success import Estimate, SuccessProfile
from hf_coverage.functional.best_of_n import best_of_blocks, best_of_n_reward, pass_at_n
from hf_coverage.functional.bounds import exact_pass_at_n
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.group_rewards import equal_reward_probability
from hf_coverage.functional.miss_profile import miss_upper_bound
from hf_coverage.functional.statistics import MeanEstimate, bounded_mean_interval, clustered_mean, mean_interval
from hf_coverage.inference.files import refuse_constant, write_atomically
from hf_coverage.plots.over_n import BestOfNCurve, plot_best_of_n

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["BestOfNResult", "Estimate", "Prediction"]

_FORMAT = 1


class Prediction(NamedTuple):
    """What a coverage profile says that Best-of-N achieves, for each N.

    Attributes:
        n: The N, 1 to k; of stratified samples the powers of 2, and k.
        guaranteed: `(k,)` least expected reward, whatever the reward in [0, 1], with 95 % confidence at each N: the
            reference's less the upper confidence bound on miss_N.
        exact: `(k,)` exact Pass@N where every prompt has one right answer; None otherwise.
    """

    n: NDArray[np.int64]
    guaranteed: FloatArray
    exact: FloatArray | None


@dataclass(frozen=True, eq=False)
class BestOfNResult:
    """Rewards of k sampled responses to each of P prompts; higher is better.

    Of independent samples all subsets of N count. Stratified ones count in aligned blocks of N, for N a power of 2 or
    k, as they were drawn to be used; any other N is refused.

    Attributes:
        name: The model's name.
        verifier: The verifier's name.
        rewards: `(P, k)` rewards; a response that could not be judged has 0, or the least reward that was given if
            that is negative: it is unsolved, and never chosen for having failed.
        failed: `(P, k)` which responses could not be judged.
        rows: `(P,)` the first row of each prompt in the corpus.
        prompts: `(P,)` code of each prompt, as `CoverageProfile.groups` has it.
        errors: How many responses could not be judged, by what went wrong.
        examples: One response for each of these errors: its row, sample, text, and the error's message.
        threshold: Least reward that solves a prompt; None where rewards do not say that.
        settings: How the responses were sampled, with `sampling` "stratified" where they were. `judged` names samples
            and verifier by all that decides the rewards, and is None where not all of it can be told.
        accepted_mass: `(P,)` summed probability of the different accepted responses, under what was sampled from; None
            where it is not known.

    Example:
        >>> result = BestOfNResult.from_rewards([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> round(result.pass_at(1), 3), result.pass_at(3), round(result.best_of(2).value, 3)
        (0.5, 1.0, 0.833)
    """

    name: str
    verifier: str
    rewards: FloatArray = field(repr=False)
    failed: NDArray[np.bool_] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    prompts: NDArray[np.uint64] = field(repr=False)
    errors: dict[str, int]
    examples: dict[str, dict[str, Any]] = field(repr=False)
    threshold: float | None
    settings: dict[str, Any] = field(repr=False)
    accepted_mass: FloatArray | None = field(default=None, repr=False)

    @classmethod
    def from_rewards(
        cls,
        rewards: Any,
        *,
        threshold: float | None = 1.0,
        name: str = "model",
        verifier: str = "rewards",
        sampling: Literal["independent", "stratified"] = "independent",
    ) -> BestOfNResult:
        """A result from rewards `(P, k)` alone, for instance those of another program.

        With `sampling="stratified"` they are of nested samples, in the order of their numbers, as
        `stratified_generate` gives them where k is a power of 2.

        Raises:
            ValueError: If a reward is NaN or infinite.
        """
        if sampling not in ("independent", "stratified"):
            raise ValueError(f'`sampling` must be "independent" or "stratified", got {sampling!r}.')
        table = np.array(rewards, dtype=np.float64)
        best_of_n_reward(table)  # refuses what is no table of rewards
        rows, codes = np.arange(len(table)), np.arange(len(table), dtype=np.uint64)
        settings = {} if sampling == "independent" else {"sampling": sampling}
        return cls(name, verifier, table, np.zeros(table.shape, bool), rows, codes, {}, {}, threshold, settings)

    @property
    def num_prompts(self) -> int:
        """Number P of distinct prompts, the unit that intervals resample."""
        return self.rewards.shape[0]

    @property
    def k(self) -> int:
        """Responses to each prompt: the largest N there is."""
        return self.rewards.shape[1]

    @property
    def is_stratified(self) -> bool:
        """Whether the samples of a prompt belong together, so that they count in aligned blocks."""
        return self.settings.get("sampling") == "stratified"

    def pass_at(self, n: int) -> float:
        """Pass@N: the share of prompts that N responses solve, unbiased.

        Raises:
            ValueError: If n is not between 1 and k, for stratified samples neither a power of 2 nor k, or there is no
                `threshold`.
        """
        return self._pass_estimate(n).mean

    def interval(self, n: int, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of Pass@N, over prompts."""
        return bounded_mean_interval(self.passes(n), confidence=confidence)

    def best_of(self, n: int, confidence: float = 0.95) -> Estimate:
        """Expected reward of the best of N responses, unbiased, with its interval over prompts.

        If no reward lies outside [0, 1] they are taken for bounded so; otherwise the interval is Student's, whose
        level is nominal.
        """
        rewards = self._best(n)
        estimate = clustered_mean(rewards)
        if self.rewards.min() >= 0 and self.rewards.max() <= 1:
            return Estimate(estimate.mean, *bounded_mean_interval(rewards, confidence=confidence))
        return Estimate(estimate.mean, *mean_interval(estimate, confidence))

    def metrics(self, n: Iterable[int] | None = None) -> dict[str, float]:
        """Flat metrics under the names of lm-evaluation-harness, each with its `_stderr`.

        Args:
            n: The N to report; None: the powers of 2 up to k, and k.

        Returns:
            `pass@<n>` where there is a threshold, `best_of_<n>`, and `failed`, the share that could not be judged.
        """
        estimates = {}
        for value in self.levels() if n is None else n:
            if self.threshold is not None:
                estimates[f"pass@{value}"] = self._pass_estimate(value)
            estimates[f"best_of_{value}"] = clustered_mean(self._best(value))
        flat = {}
        for key, estimate in estimates.items():
            flat[key], flat[f"{key}_stderr"] = estimate.mean, estimate.standard_error
        return flat | {"failed": float(self.failed.mean())}

    def levels(self) -> list[int]:
        """The powers of 2 up to k, and k."""
        return sorted({2**power for power in range(self.k.bit_length())} | {self.k})

    @property
    def success(self) -> SuccessProfile:
        """Accepted counts of each prompt: Pass@N beyond k, and the signal that groups of samples give RL.

        Raises:
            ValueError: If there is no `threshold`, or the samples are stratified, so that counts are not binomial.
        """
        if self.is_stratified:
            raise ValueError(
                "Stratified samples of a prompt depend on each other: a success profile is of independent ones."
            )
        return SuccessProfile.from_counts(
            self._solved.sum(axis=1),
            self.k,
            prompts=self.prompts.tolist(),
            accepted_mass=self.accepted_mass,
            name=self.name,
        )

    def passes(self, n: int) -> FloatArray:
        """Pass@N of each prompt `(P,)`, unbiased; raises as `pass_at`."""
        return best_of_blocks(self._solved, n) if self.is_stratified else self._every_pass[:, self._column(n)]

    def mixed(self, group_size: int) -> FloatArray:
        """Unbiased probability for each prompt that the rewards of a group differ, so that GRPO learns from it.

        Args:
            group_size: Samples of a prompt that are compared with each other, 1 to k.

        Returns:
            `(P,)`.

        Raises:
            ValueError: If the group is larger than k, or the samples are stratified.
        """
        if self.is_stratified:
            raise ValueError("Stratified samples of a prompt depend on each other: a signal is of independent ones.")
        return 1 - equal_reward_probability(self.rewards, group_size)

    def predict(self, profile: CoverageProfile, *, comparator_reward: float = 1.0) -> Prediction:
        """What a profile of the same model on the same prompts says of Best-of-N.

        The guarantee is `comparator_reward` less `miss_upper_bound`, by Theorem M for every reward in [0, 1], for
        stratified samples too, which achieve no less than independent ones.

        Args:
            profile: Coverage of the reference by the distribution that was sampled from: at temperature 1 the model.
            comparator_reward: Mean reward of the reference's own responses; 1 where they are right.

        Raises:
            ValueError: If the profile is of other prompts, or the responses were sampled from another distribution
                than the model itself.
        """
        changed = {key: self.settings[key] for key in ("temperature", "top_k", "top_p") if key in self.settings}
        if changed and changed != {"temperature": 1.0, "top_k": None, "top_p": None}:
            raise ValueError(f"`profile` is of the model itself, and responses were sampled with {changed}.")
        if profile.groups is not None and set(profile.groups.tolist()) != set(self.prompts.tolist()):
            raise ValueError(
                f"`profile` must be of the same prompts, but has {profile.num_groups} prompts and this result "
                f"{self.num_prompts}, not all the same; score the corpus that responses were sampled for."
            )
        n = np.array(self.levels() if self.is_stratified else range(1, self.k + 1))
        rows: dict[str, Any] = {"groups": profile.groups, "weights": profile.weights}
        bounds = [miss_upper_bound(profile.log_ratios, value, **rows) for value in n.tolist()]
        exact = None
        if profile.kind == "single_answer" and profile.logprobs is not None and not self.is_stratified:
            logprobs = profile.logprobs
            exact = np.array([exact_pass_at_n(logprobs, value, weights=profile.weights) for value in n.tolist()])
        return Prediction(n, np.maximum(comparator_reward - np.array(bounds), 0.0), exact)

    @property
    def sentence(self) -> str:
        """What came out, in plain words."""
        size = f"{self.num_prompts:,} prompts"
        drawn = f"{self.k} stratified ones" if self.is_stratified else f"{self.k}"
        if self.threshold is None:
            parts = [
                f"{self.name} gets a mean reward of {_interval(self.best_of(1), '.4g')} on {size} with one response "
                f"and {_interval(self.best_of(self.k), '.4g')} with the best of {drawn} by {self.verifier}."
            ]
        else:
            one, all_ = (Estimate(self.pass_at(n), *self.interval(n)) for n in (1, self.k))
            parts = [
                f"{self.name} solves {_interval(one, '.1%')} of {size} with one response and {_interval(all_, '.1%')} "
                f"with {drawn}, by {self.verifier}."
            ]
        if self.errors:
            kinds = ", ".join(f"{count:,} {name}" for name, count in self.errors.items())
            parts.append(
                f"{self.failed.sum():,} of {self.failed.size:,} responses could not be judged ({kinds}); they count "
                "as unsolved."
            )
        return " ".join(parts)

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        *,
        profile: CoverageProfile | None = None,
        comparator_reward: float = 1.0,
        title: str | None = None,
    ) -> Figure:
        """Draw Pass@N (the reward of Best-of-N without a threshold) with its 95 % band, and a profile's prediction.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            profile: See `predict`.
            comparator_reward: See `predict`.
            title: Title above the axes.
        """
        n = self.levels() if self.is_stratified else list(range(1, self.k + 1))
        solved = self.threshold is not None
        points = [Estimate(self.pass_at(i), *self.interval(i)) if solved else self.best_of(i) for i in n]
        value, low, high = np.array(points).T
        curve = BestOfNCurve(f"{self.name}, sampled", np.array(n), value, low, high)
        lines: list[tuple[str, Any]] = []
        bounds: list[tuple[str, Any]] = []
        if profile is not None:
            predicted = self.predict(profile, comparator_reward=comparator_reward)
            bounds = [("ruled out by coverage, 95 %", predicted.guaranteed)]
            lines = [] if predicted.exact is None else [("exact, from log-probabilities", predicted.exact)]
        ylabel = "Pass@$N$ (higher is better)" if solved else "reward of Best-of-$N$ (higher is better)"
        return plot_best_of_n([curve], path, lines=lines, bounds=bounds, ylabel=ylabel, title=title)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The result as JSON text, every number exact; also written to `path` where given."""
        facts = {"format": _FORMAT} | {one.name: getattr(self, one.name) for one in fields(self)}
        text = json.dumps(facts | {"sentence": self.sentence}, default=lambda array: array.tolist(), allow_nan=False)
        if path is not None:
            write_atomically(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> BestOfNResult:
        """Read what `to_json` gave: its text, or the path it wrote.

        Raises:
            ValueError: If the text is not a result of a known format.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        try:
            facts = json.loads(text, parse_constant=refuse_constant)
            if facts["format"] != _FORMAT or facts["format"] is True:
                raise ValueError(f"format {facts['format']} is not {_FORMAT}")
            values = {"accepted_mass": facts.get("accepted_mass")}  # not known before it was kept
            values |= {one.name: facts[one.name] for one in fields(cls) if one.name not in values}
            types = {"rewards": np.float64, "failed": np.bool_, "rows": np.int64, "prompts": np.uint64}
            types |= {} if values["accepted_mass"] is None else {"accepted_mass": np.float64}
            result = cls(**values | {name: np.asarray(values[name], dtype=kind) for name, kind in types.items()})
            for what, holds in result._facts(values):
                if not holds:
                    raise ValueError(f"its {what} do not agree with the rest")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"`source` is not a result written by `to_json`: {error!r}.") from error
        return result

    def _facts(self, read: dict[str, Any]) -> Iterator[tuple[str, bool]]:
        """What must hold of each field, of which JSON had `read`."""
        best_of_n_reward(self.rewards)  # refuses what is no table of rewards
        size = self.num_prompts
        yield (
            "failed",
            self.failed.shape == self.rewards.shape and all(type(one) is bool for one in chain(*read["failed"])),
        )
        for what, column in (("rows", self.rows), ("prompts", self.prompts)):
            yield what, column.shape == (size,) and all(type(one) is int for one in read[what])
            yield what, np.unique(column).size == size
        yield "rows", bool((self.rows >= 0).all())
        yield "errors", sum(self.errors.values()) == self.failed.sum() and all(n > 0 for n in self.errors.values())
        yield (
            "examples",
            set(self.examples) <= set(self.errors) and all(isinstance(one, dict) for one in self.examples.values()),
        )
        yield (
            "threshold",
            self.threshold is None or (type(self.threshold) in (int, float) and math.isfinite(self.threshold)),
        )
        if self.accepted_mass is not None:
            yield "accepted_mass", all(type(one) in (int, float) for one in read["accepted_mass"])
            yield "accepted_mass", self.accepted_mass.shape == (size,) and self.threshold is not None
            yield "accepted_mass", bool(((self.accepted_mass >= 0) & (self.accepted_mass <= 1 + 1e-6)).all())
        yield "names", isinstance(self.name, str) and isinstance(self.verifier, str)
        yield "settings", isinstance(self.settings, dict) and self.settings.get("sampling") in (None, "stratified")

    def _best(self, n: int) -> FloatArray:
        """Reward of the best of N for each prompt `(P,)`."""
        return best_of_blocks(self.rewards, n) if self.is_stratified else self._every_best[:, self._column(n)]

    @property
    def _solved(self) -> NDArray[np.bool_]:
        if self.threshold is None:
            raise ValueError("Pass@N needs a `threshold`, the least reward that solves a prompt; see `best_of`.")
        return self.rewards >= self.threshold

    @cached_property
    def _every_pass(self) -> FloatArray:
        return pass_at_n(self._solved)

    @cached_property
    def _every_best(self) -> FloatArray:
        return best_of_n_reward(self.rewards)

    def _pass_estimate(self, n: int) -> MeanEstimate:
        return clustered_mean(self.passes(n))

    def _column(self, n: int) -> int:
        if n != int(n) or not 1 <= n <= self.k:
            raise ValueError(f"`n` must be a whole number from 1 to k = {self.k}, the responses there are, got {n}.")
        return int(n) - 1


def _interval(estimate: Estimate, form: str) -> str:
    value, low, high = (format(part, form) for part in estimate)
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"
