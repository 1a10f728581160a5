"""Has coverage worsened while cross-entropy improved? A sequential paired test over the evaluations of one run.

Every evaluation scores the same rows, so two evaluations are compared row by row, not as two noisy points. The best
one so far is remembered by the rows it reaches log N on, one bit each: enough for the test, and small enough to live
in `trainer_state.json`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.coverage_profile import coverage, reached
from hf_coverage.functional.paired import PairedDifference, paired_coverage_difference

__all__ = ["BestEvaluation", "WatchState", "Worsening", "update_watch"]


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation with the lowest Cov_N so far; of equals, the one with the lowest cross-entropy.

    Args:
        step: The training step.
        coverage: Cov_N.
        cross_entropy: Mean of -log p, nats a response.
        reached: One bit a row, `r >= log N`, packed and written in hexadecimal.
    """

    step: int
    coverage: float
    cross_entropy: float
    reached: str


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
        """Undo `dataclasses.asdict`."""
        best = state["best"]
        return cls(state["evaluations"], None if best is None else BestEvaluation(**best), state["warned"])


class Worsening(NamedTuple):
    """Coverage significantly above its best while cross-entropy is below what it was then.

    Args:
        best: The evaluation with the best coverage.
        coverage: Cov_N now.
        cross_entropy: Cross-entropy now, nats a response.
        test: Cov_N now minus Cov_N then on the same rows.
    """

    best: BestEvaluation
    coverage: float
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

    A worsening is reported once: when cross-entropy is lower than at the evaluation with the best Cov_N, Cov_N is
    higher, and the paired test has `p < alpha / (m (m + 1))` after m earlier evaluations. These levels sum to alpha,
    however long the run, so that looking at every evaluation does not turn noise into an alarm.

    Args:
        state: What the watch remembers; `WatchState()` at first.
        step: The training step.
        log_ratios: `(R,)` log D - log p, nats.
        cross_entropy: Mean of -log p over the same rows, nats a response.
        n: The N of Cov_N.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        alpha: Chance of a false alarm that the whole run may have.

    Returns:
        The new state, and the worsening if it is to be reported now.

    Raises:
        ValueError: If the number of rows changed.

    Example:
        >>> falling_then_rising = [np.where(np.arange(200) < covered, 3.0, 0.0) for covered in (60, 20, 70)]
        >>> state = WatchState()
        >>> for step, ratios in enumerate(falling_then_rising):
        ...     state, worsening = update_watch(state, step=step, log_ratios=ratios, cross_entropy=9.0 - step, n=8)
        >>> worsening.best.step, worsening.best.coverage, worsening.coverage
        (1, 0.1, 0.35)
    """
    ratios = np.asarray(log_ratios, dtype=np.float64)
    bits = np.packbits(reached(ratios, n)).tobytes().hex()
    now = BestEvaluation(int(step), coverage(ratios, n), float(cross_entropy), bits)
    best, seen = state.best, state.evaluations
    if best is None or (now.coverage, now.cross_entropy) < (best.coverage, best.cross_entropy):
        return replace(state, evaluations=seen + 1, best=now), None
    then = _hits(best.reached)
    # whole bytes hide a few rows more or fewer, of which the share of hits knows
    if len(best.reached) != len(now.reached) or then.sum() / ratios.size != best.coverage:
        raise ValueError(f"`log_ratios` must describe the same rows at every evaluation, but now has {ratios.size}.")
    state = replace(state, evaluations=seen + 1)
    # Cov_N is at least the best here, so a difference that is significant at all is a worsening.
    if state.warned or not now.cross_entropy < best.cross_entropy:
        return state, None
    before = np.where(then[: ratios.size], math.inf, math.log(n) - 1.0)
    test = paired_coverage_difference(ratios, before, n, groups=groups)
    if not test.p_value < alpha / (seen * (seen + 1)):
        return state, None
    return replace(state, warned=True), Worsening(best, now.coverage, cross_entropy, test)


def _hits(packed: str) -> np.ndarray:
    """The rows whose bit is set, and zeros up to a whole byte."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)).astype(bool)
