"""What coverage implies for KL and for Best-of-N, and what implies coverage: the bounds of arXiv 2510.15020.

Every function is one inequality with its sides named; none of them estimates anything. `Cov_N(T||p)` is the share of
responses `y ~ T` with `T(y)/p(y) >= N`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.checks import (
    TIE_TOLERANCE,
    FloatArray,
    check_log_ratios,
    check_logprobs,
    check_n,
    check_regret,
)
from hf_coverage.functional.coverage_profile import coverage, smallest_n
from hf_coverage.functional.statistics import row_weights

__all__ = [
    "BestOfNBudget",
    "best_of_n_budget",
    "best_of_n_regret_bound",
    "best_of_n_regret_floor",
    "chain_rule_bound",
    "coverage_bound_from_hellinger",
    "coverage_bound_from_kl",
    "coverage_bound_from_stopped_kl",
    "exact_pass_at_n",
    "kl_bound_from_coverage",
    "largest_coverage_rate",
    "least_regret_bound",
    "pass_probabilities",
    "squared_hellinger",
]


class BestOfNBudget(NamedTuple):
    """How many samples Best-of-N needs for a wanted regret.

    Attributes:
        n: With this many samples the regret is at most `regret` whatever the reward in [0, 1]; infinite if no number
            of samples is enough.
        m: The M whose Cov_M the guarantee rests on.
        coverage: Cov_M at that M.
        regret: The regret asked for.
        necessary_n: With fewer samples than this (and at least 2) some 0/1 reward makes the regret larger than asked.
    """

    n: float
    m: float
    coverage: float
    regret: float
    necessary_n: float


def coverage_bound_from_kl(kl: float, n: float) -> float:
    """Upper bound on Cov_N from the sequence-level KL: `Cov_N <= KL / (log N - 1 + 1/N)`, and never above 1.

    Args:
        kl: `D_KL(D || p)`, nats.
        n: A real number >= 1; at N = 1 the bound says nothing and is 1.

    Raises:
        ValueError: If `kl` is negative or NaN.

    Example:
        >>> round(coverage_bound_from_kl(0.5, 16), 4)
        0.2725

    References:
        arXiv 2510.15020, Proposition D.1.
    """
    kl = _at_least_zero(kl, "kl")
    slope = math.log(check_n(n)) - 1 + 1 / n
    return min(1.0, kl / slope) if slope > 0 else 1.0


def squared_hellinger(log_ratios: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Squared Hellinger distance `1/2 sum (sqrt D - sqrt p)^2 = 1 - E_D[exp(-r/2)]`, estimated from log ratios.

    Args:
        log_ratios: `(R,)` log D - log p, nats, of responses drawn from D.
        weights: `(R,)` non-negative row weights.

    Example:
        >>> squared_hellinger([0.0, float("inf")])
        0.5
    """
    ratios = check_log_ratios(log_ratios)
    return float(1 - np.average(np.exp(-ratios / 2), weights=row_weights(weights, ratios.size)))


def coverage_bound_from_hellinger(hellinger: float, n: float) -> float:
    """Upper bound on Cov_N from the squared Hellinger distance: `2 N / (sqrt N - 1)^2 D_H^2`, and never above 1.

    Args:
        hellinger: `D_H^2 = 1/2 sum (sqrt D - sqrt p)^2` in [0, 1].
        n: A real number >= 1; at N = 1 the bound says nothing and is 1.

    Raises:
        ValueError: If `hellinger` is negative or NaN.

    Example:
        >>> round(coverage_bound_from_hellinger(0.05, 16), 4)
        0.1778

    References:
        arXiv 2510.15020, Proposition D.4.
    """
    hellinger = _at_least_zero(hellinger, "hellinger")
    root = math.sqrt(check_n(n))
    return min(1.0, 2 * n / (root - 1) ** 2 * hellinger) if root > 1 else 1.0


def coverage_bound_from_stopped_kl(stopped_kl: float, n: float) -> float:
    """Upper bound on Cov_N from the stopped KL at the same N: `2 / (log N - 1) D_seq,N`, and never above 1.

    Args:
        stopped_kl: `E_D[min(log N, sum_h KL_h)]`, nats, as `functional.stopped_kl` gives it.
        n: A real number above e.

    Raises:
        ValueError: If `n <= e`, where the bound does not hold, or `stopped_kl` is negative or NaN.

    Example:
        >>> round(coverage_bound_from_stopped_kl(0.2, 16), 4)
        0.2257

    References:
        arXiv 2510.15020, Proposition D.10.
    """
    stopped_kl = _at_least_zero(stopped_kl, "stopped_kl")
    if not math.e < n < math.inf:
        raise ValueError(f"`n` must be above e = 2.718... for the stopped-KL bound, but is {n}.")
    return min(1.0, 2 / (math.log(n) - 1) * stopped_kl)


def largest_coverage_rate(log_ratios: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """The constant `C = sup_N Cov_N log N` of the converse bound; infinite if some response has probability 0.

    Args:
        log_ratios: `(R,)` nats.
        weights: `(R,)` non-negative row weights.

    Example:
        >>> largest_coverage_rate([0.0, 1.0, 1.5, 4.0])
        1.0
    """
    ratios = check_log_ratios(log_ratios)
    order = np.argsort(-ratios)
    weight = row_weights(weights, ratios.size)[order]
    # Cov_N is constant between ratios, so the supremum is reached where log N equals one of them
    tail = np.cumsum(weight) / weight.sum()
    counts = weight > 0  # before the product: 0 * inf is neither
    return float(np.max(tail[counts] * np.maximum(ratios[order][counts], 0.0)))


def kl_bound_from_coverage(rate: float, log_max_ratio: float) -> float:
    """Upper bound on KL from coverage: `KL <= C (1 + log(log W / C))`.

    Args:
        rate: `C = sup_N Cov_N log N`, nats; at most `log_max_ratio`.
        log_max_ratio: `log W = sup log D/p`, nats.

    Raises:
        ValueError: If not `0 <= rate <= log_max_ratio`.

    Example:
        >>> round(kl_bound_from_coverage(0.5, 4.0), 4)
        1.5397

    References:
        arXiv 2510.15020, Proposition D.3.
    """
    if not 0 <= rate <= log_max_ratio * (1 + 1e-9):
        raise ValueError(
            f"`rate` = sup Cov_N log N must lie in [0, log_max_ratio], but is {rate} with `log_max_ratio` = "
            f"{log_max_ratio}."
        )
    return rate * (1 + math.log(max(1.0, log_max_ratio / rate))) if rate > 0 else 0.0


def chain_rule_bound(coverage_of_reference: float, coverage_of_comparator: float, m2: float) -> float:
    """Upper bound on `Cov_{M1}(T||p)` for a comparator T: `M2 Cov_{M1/M2}(D||p) + Cov_{M2}(T||D)`, never above 1.

    Args:
        coverage_of_reference: `Cov_{M1/M2}(D||p)`, of the model against the reference.
        coverage_of_comparator: `Cov_{M2}(T||D)`, of the reference against the comparator.
        m2: The M2 of both, >= 1.

    Example:
        >>> round(chain_rule_bound(0.01, 0.05, m2=4), 4)
        0.09

    References:
        arXiv 2510.15020, Proposition D.5.
    """
    return min(1.0, check_n(m2) * coverage_of_reference + coverage_of_comparator)


def best_of_n_regret_bound(coverage_at_m: float, m: float, n: float) -> float:
    """What Best-of-N with `n` samples loses at most to the comparator: `Cov_M + exp(-N / (2 M))`, never above 1.

    Args:
        coverage_at_m: `Cov_M(T||p)`; above 1/2 nothing is guaranteed and the bound is 1.
        m: A real number >= 1.
        n: Number of samples.

    Example:
        >>> round(best_of_n_regret_bound(0.05, m=4, n=32), 4)
        0.0683

    References:
        arXiv 2510.15020, Proposition D.6.
    """
    if coverage_at_m > _HALF:
        return 1.0
    return min(1.0, coverage_at_m + math.exp(-check_n(n) / (2 * check_n(m))))


def best_of_n_regret_floor(log_ratios: ArrayLike, n: float, *, weights: ArrayLike | None = None) -> float:
    """What Best-of-N with `n` samples must lose for some 0/1 reward: `Cov_{2N} / 2`.

    Args:
        log_ratios: `(R,)` log T - log p, nats.
        n: Number of samples, >= 2.
        weights: `(R,)` non-negative row weights.

    Raises:
        ValueError: If `n < 2`.

    Example:
        >>> best_of_n_regret_floor([0.0, 0.0, 0.0, 5.0], n=16)
        0.125

    References:
        arXiv 2510.15020, Proposition D.7.
    """
    if not n >= 2:
        raise ValueError(f"`n` must be at least 2 for the lower bound, but is {n}.")
    return coverage(log_ratios, 2 * n, weights=weights) / 2


def best_of_n_budget(log_ratios: ArrayLike, regret: float, *, weights: ArrayLike | None = None) -> BestOfNBudget:
    """Least number of samples for which Best-of-N provably loses at most `regret` to the reference.

    `N = min_M 2 M log(1 / (regret - Cov_M))` over all M with `Cov_M <= 1/2` and `Cov_M < regret`: a larger M leaves
    fewer responses uncovered and costs more samples to find the rest.

    Args:
        log_ratios: `(R,)` nats; with upper bounds on the ratios the guarantee still holds.
        regret: The loss of expected reward that is acceptable, in (0, 1), rewards being in [0, 1].
        weights: `(R,)` non-negative row weights.

    Returns:
        The budget, with the number of samples that no reward-agnostic use of Best-of-N can undercut beside it.

    Raises:
        ValueError: If `regret` is outside (0, 1).

    Example:
        >>> budget = best_of_n_budget([0.0] * 99 + [6.0], regret=0.1)
        >>> math.ceil(budget.n), round(budget.m, 3), budget.coverage
        (5, 1.0, 0.01)

    References:
        arXiv 2510.15020, Propositions D.6 and D.7.
    """
    check_regret(regret)
    ratios = check_log_ratios(log_ratios)
    necessary = max(1.0, smallest_n(ratios, min(1.0, 2 * regret), weights=weights) / 2)
    # Cov_M only falls just above a ratio, so no other M can be the best one
    log_m = np.unique(np.maximum(ratios[ratios < _LOG_MAX] + 2 * TIE_TOLERANCE, 0.0))
    if not log_m.size:
        return BestOfNBudget(math.inf, math.inf, 1.0, regret, necessary)
    ms = np.exp(log_m)
    values = coverage(ratios, ms, weights=weights)
    usable = (values <= _HALF) & (values < regret)
    if not usable.any():
        return BestOfNBudget(math.inf, math.inf, float(values[-1]), regret, necessary)
    samples = 2 * ms[usable] * np.log(1 / (regret - values[usable]))
    best = int(np.argmin(samples))
    n = max(1.0, float(samples[best]))
    return BestOfNBudget(n, float(ms[usable][best]), float(values[usable][best]), regret, necessary)


def exact_pass_at_n(logprobs: ArrayLike, n: float, *, weights: ArrayLike | None = None) -> float:
    """Pass@N when each prompt has one right response: `E[1 - (1 - p(y|x))^N]`, exact and without sampling.

    Args:
        logprobs: `(R,)` log-probability of the right response, nats.
        n: Number of samples.
        weights: `(R,)` non-negative row weights.

    Example:
        >>> exact_pass_at_n([math.log(0.5), float("-inf")], n=2)
        0.375

    References:
        arXiv 2510.15020, Section 2.
    """
    passes = pass_probabilities(logprobs, n)
    return float(np.average(passes, weights=row_weights(weights, passes.size)))


def pass_probabilities(logprobs: ArrayLike, n: float) -> FloatArray:
    """Probability `1 - (1 - p(y|x))^N` of each right response `(R,)` to be among N samples, log p in nats.

    Example:
        >>> pass_probabilities([math.log(0.5), float("-inf")], n=2)
        array([0.75, 0.  ])
    """
    model = np.minimum(check_logprobs(logprobs), 0.0)
    with np.errstate(divide="ignore"):  # p = 1 gives log(0) = -inf, and so a pass, as it should
        misses = check_n(n) * np.log1p(-np.exp(model))
    return -np.expm1(misses)


_LOG_MAX = math.log(np.finfo(np.float64).max) - 1
_HALF = 0.5 + 1e-12
"""The largest Cov_M that D.6 speaks of: half of the rows, also where their weights sum up to more."""


def _at_least_zero(value: float, name: str) -> float:
    """`value`, with the rounding of a sum that is exactly 0 taken off."""
    if not value >= -TIE_TOLERANCE:
        raise ValueError(f"`{name}` must be >= 0, but is {value}.")
    return max(0.0, value)


def least_regret_bound(log_ratios: ArrayLike, n: float, *, weights: ArrayLike | None = None) -> float:
    """What Best-of-N with `n` samples loses at most to the comparator: `min_M Cov_M + exp(-N / (2 M))`, at most 1.

    The smallest of `best_of_n_regret_bound` over all M; rewards are in [0, 1].

    Args:
        log_ratios: `(R,)` log T - log p, nats, T the comparator; with upper bounds on the ratios it still holds.
        n: Number of samples.
        weights: `(R,)` non-negative row weights.

    Example:
        >>> round(least_regret_bound([0.0] * 99 + [6.0], n=8), 4)
        0.0283

    References:
        arXiv 2510.15020, Proposition D.6.
    """
    ratios = check_log_ratios(log_ratios)
    samples = check_n(n)
    # Cov_M only falls just above a ratio, so no other M can be the best one; the largest ones would overflow.
    ms = np.exp(np.unique(np.maximum(ratios[ratios < 700.0] + 2 * TIE_TOLERANCE, 0.0)))
    values = coverage(ratios, ms, weights=weights)
    usable = values <= _HALF
    bounds = values[usable] + np.exp(-samples / (2 * ms[usable]))
    return float(np.min(bounds, initial=1.0))
