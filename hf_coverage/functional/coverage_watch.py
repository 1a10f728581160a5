"""Has coverage worsened while cross-entropy improved? A sequential paired test over the evaluations of one run.

Every evaluation scores the same rows, so two evaluations are compared row by row, not as two noisy points. What is
compared is miss_N, which moves before Cov_N does. The best evaluation so far is remembered by what it misses of each
row, four bytes each: enough for the test, and small enough to live in `trainer_state.json`.
"""

import base64
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.paired import PairedDifference, paired_loss_difference
from hf_coverage.functional.statistics import bounded_mean_p_value, group_codes

__all__ = ["BestEvaluation", "WatchState", "Worsening", "prompts_to_warn", "update_watch"]


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation with the lowest miss_N so far; of equals, the one with the lowest cross-entropy.

    Args:
        step: The training step.
        miss: miss_N.
        cross_entropy: Mean of -log p, nats a response.
        missed: What it misses of each row, as float32 in base 64.
    """

    step: int
    miss: float
    cross_entropy: float
    missed: str


@dataclass(frozen=True)
class WatchState:
    """What the watch remembers between evaluations; `asdict` and `from_dict` take it through JSON.

    Args:
        evaluations: How many evaluations it has seen.
        best: The best of them.
        warned: Whether a worsening was reported; it is reported once.
    """

    evaluations: int = 0
    best: BestEvaluation | None = None
    warned: bool = False

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "WatchState":
        """Undo `dataclasses.asdict`; a best evaluation that was kept by Cov_N, as it once was, is forgotten."""
        best = state["best"]
        known = best is not None and "missed" in best
        return cls(state["evaluations"], BestEvaluation(**best) if known else None, state["warned"])


class Worsening(NamedTuple):
    """Coverage significantly above its best while cross-entropy is below what it was then.

    Args:
        best: The evaluation with the best coverage.
        miss: miss_N now.
        cross_entropy: Cross-entropy now, nats a response.
        test: miss_N now minus miss_N then on the same rows.
    """

    best: BestEvaluation
    miss: float
    cross_entropy: float
    test: PairedDifference


def update_watch(
    state: WatchState,
    *,
    step: int,
    log_ratios: ArrayLike,
    cross_entropy: float,
    n: float,
    groups: Iterable[Any] | None = None,
    alpha: float = 0.05,
) -> tuple[WatchState, Worsening | None]:
    """Show the watch one more evaluation of the same rows.

    A worsening is reported once: when cross-entropy is lower than at the evaluation with the best miss_N, miss_N is
    higher, and the two-sided paired test has `p < 2 alpha / (m^2 (m + 1))` after m earlier evaluations. The best of m
    was selected by the same rows, so that its level is shared by m one-sided tests; over the evaluations the levels
    sum to alpha, however long the run. `prompts_to_warn` says how many prompts that takes.

    Args:
        state: What the watch remembers; `WatchState()` at first.
        step: The training step.
        log_ratios: `(R,)` log D - log p, nats.
        cross_entropy: Mean of -log p over the same rows, nats a response.
        n: The N of miss_N.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        alpha: Chance of a false alarm that the whole run may have.

    Returns:
        The new state, and the worsening if it is to be reported now.

    Raises:
        ValueError: If the number of rows changed.

    Example:
        >>> falling_then_rising = [np.where(np.arange(200) < lost, float("inf"), 0.0) for lost in (60, 20, 70)]
        >>> state = WatchState()
        >>> for step, ratios in enumerate(falling_then_rising):
        ...     state, worsening = update_watch(state, step=step, log_ratios=ratios, cross_entropy=9.0 - step, n=8)
        >>> worsening.best.step, worsening.best.miss, worsening.miss
        (1, 0.1, 0.35)
    """
    missed = miss_values(log_ratios, n)
    now = BestEvaluation(int(step), float(missed.mean()), float(cross_entropy), _packed(missed))
    best, seen = state.best, state.evaluations
    if best is None or (now.miss, now.cross_entropy) < (best.miss, best.cross_entropy):
        return replace(state, evaluations=seen + 1, best=now), None
    then = _unpacked(best.missed)
    if then.size != missed.size:
        raise ValueError(f"`log_ratios` must describe the same rows at every evaluation, but now has {missed.size}.")
    state = replace(state, evaluations=seen + 1)
    # miss_N is at least the best here, so a difference that is significant at all is a worsening.
    if state.warned or not now.cross_entropy < best.cross_entropy:
        return state, None
    codes = None if groups is None else group_codes(groups)
    if not bounded_mean_p_value((missed - then + 1) / 2, 0.5, groups=codes) < _level(seen, alpha):
        return state, None
    test = paired_loss_difference(missed, then, groups=codes)
    return replace(state, warned=True), Worsening(best, now.miss, cross_entropy, test)


def prompts_to_warn(worsening: float = 0.05, *, evaluations: int = 10, alpha: float = 0.05, power: float = 0.8) -> int:
    """Least number of prompts with which the watch has that power against a share of the responses being given up.

    The most favourable case is counted: they are lost outright, and no other row changes. Then `p = 2^(1-k)` of k rows
    that were lost, and k is binomial. Where other rows change it takes more.

    Args:
        worsening: The share of the responses that is lost, in (0, 1).
        evaluations: How many were seen before.
        alpha: As in `update_watch`.
        power: The chance that the watch is to have of reporting it.

    Example:
        >>> prompts_to_warn(), prompts_to_warn(0.2)
        (361, 89)
    """
    lost = math.floor(2 - math.log2(_level(evaluations, alpha)))

    def enough(prompts: int) -> bool:
        return bool(stats.binom.sf(lost - 1, prompts, worsening) >= power)

    most = lost
    while not enough(most):
        most *= 2
    return bisect_left(range(most), True, lo=lost, key=enough)


def _level(seen: int, alpha: float) -> float:
    return 2 * alpha / (seen**2 * (seen + 1))


def _packed(missed: FloatArray) -> str:
    return base64.b64encode(missed.astype("<f4").tobytes()).decode()


def _unpacked(missed: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(missed), dtype="<f4").astype(np.float64)
