"""The miss profile: what Best-of-N can lose, whatever the reward, as a smooth function of log-probabilities.

With `u = p(y|x) / D(y|x) = exp(-r)` and references `y ~ D`,

    miss_N = E_D[(1 - min(1, u))^N]

is the chance that N samples miss a response of the reference, taken as if nothing else would do. Where the paper's
Cov_N counts the responses with `u <= 1/N`, miss_N weighs each by how surely N samples miss it: no handful of rows at
an edge decides. Lower is better; it lies in [0, 1] and falls as N grows.

**Theorem M (no condition on p, D or N).** For every reward in [0, 1] and every comparator D, Best-of-N with N samples
of p loses at most miss_N of the expected reward of a response of D.

*Proof.* Take a reward that is 1 on a set A and 0 elsewhere, and one prompt. Best-of-N finds A with probability
`1 - (1 - p(A))^N` and D with probability D(A), so the loss is `D(A) - 1 + (1 - p(A))^N`. The function
`psi(u) = max(0, 1 - u)^N` is convex and falls, and `p(A) >= E_D[1_A u]`. Hence, by Jensen's inequality,

    (1 - p(A))^N <= psi(E_D[1_A u]) <= E_D[psi(1_A u)] = E_D[1_A psi(u)] + 1 - D(A),

and the loss is at most `E_D[1_A psi(u)] <= miss_N`. A reward in [0, 1] is an average of such sets (`r = int_0^1
1[r >= t] dt`; Best-of-N takes a response of the largest reward, which is in `{r >= t}` if any of the N is), and the
mean over prompts of the losses is at most that of the bounds. With one right answer, D(y|x) = 1, both sides are
`(1 - p(y|x))^N`: miss_N is `1 - Pass@N`.

miss_N is a mean of the coverage profile, too: `miss_N = E[Cov_M]` with `1/M ~ Beta(1, N)`, since
`(1 - u)^N = P[1/M >= u]`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.bounds import best_of_n_budget
from hf_coverage.functional.checks import FloatArray, check_log_ratios, check_n
from hf_coverage.functional.statistics import (
    bounded_mean_interval,
    bounded_mean_upper_bound,
    group_codes,
    row_weights,
)

__all__ = [
    "SampleBudget",
    "coverage_bound_from_miss",
    "miss",
    "miss_bound_from_coverage",
    "miss_interval",
    "miss_upper_bound",
    "miss_values",
    "sample_budget",
]

_LARGEST_LOG_N = 700.0


class SampleBudget(NamedTuple):
    """How many samples Best-of-N needs so as to lose at most `regret`, rewards being in [0, 1].

    Attributes:
        regret: The loss of expected reward that was allowed.
        n: Least whole number N whose estimated miss_N is at most `regret`: enough for every reward by Theorem M, if
            the estimate is right; infinite where more than `regret` of the responses are out of reach.
        guaranteed_n: The same for the upper confidence bound on miss_N, which holds in finite samples: that many
            samples are enough with probability `confidence`; infinite where the rows are too few to say so.
        paper_n: What Proposition D.6 of arXiv 2510.15020 asks for, by the estimated coverage profile.
        necessary_n: With fewer than this (and at least 2) some 0/1 reward makes the loss larger, Proposition D.7.
        confidence: That of `guaranteed_n`.
    """

    regret: float
    n: float
    guaranteed_n: float
    paper_n: float
    necessary_n: float
    confidence: float


def miss_values(log_ratios: ArrayLike, n: float) -> FloatArray:
    """Each row's `(1 - min(1, exp(-r)))^N`: 0 where r <= 0, 1 where r = +inf.

    Args:
        log_ratios: `(R,)` log D - log p, nats.
        n: A real number >= 1.

    Returns:
        `(R,)` in [0, 1].

    Raises:
        ValueError: On NaN or -inf ratios, or an N below 1.

    Example:
        >>> miss_values([0.0, math.log(2), math.inf], 3).round(9).tolist()
        [0.0, 0.125, 1.0]
    """
    return np.exp(check_n(n) * _log_absence(check_log_ratios(log_ratios)))


@overload
def miss(log_ratios: ArrayLike, n: float, *, weights: ArrayLike | None = None) -> float: ...
@overload
def miss(log_ratios: ArrayLike, n: Iterable[float], *, weights: ArrayLike | None = None) -> FloatArray: ...
def miss(log_ratios: ArrayLike, n: float | Iterable[float], *, weights: ArrayLike | None = None) -> float | FloatArray:
    """The miss profile `miss_N = mean_i (1 - min(1, exp(-r_i)))^N` at one N or many; lower is better.

    Args:
        log_ratios: `(R,)` log D - log p, nats; with upper bounds on the ratios it is an upper bound on miss_N.
        n: One N or `(K,)` of them, real numbers >= 1.
        weights: `(R,)` non-negative row weights.

    Returns:
        A float, or `(K,)` for many N.

    Raises:
        ValueError: On NaN or -inf ratios, or an N below 1.

    Example:
        >>> miss([0.0, math.log(2), math.inf, math.inf], [1, 2]).tolist()
        [0.625, 0.5625]

    References:
        Theorem M of this module.
    """
    ratios = check_log_ratios(log_ratios)
    levels = [check_n(value) for value in n] if isinstance(n, Iterable) else [check_n(n)]
    weight = row_weights(weights, ratios.size)
    absence = _log_absence(ratios)
    values = np.array([_mean_at(absence, weight, level) for level in levels])
    return values if isinstance(n, Iterable) else float(values[0])


def miss_interval(
    log_ratios: ArrayLike,
    n: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of miss_N, prompts taken as what was sampled: see `bounded_mean_interval`.

    Args:
        log_ratios: `(R,)` nats.
        n: A real number >= 1.
        groups: `(R,)` the prompt of each row, or any label of it; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Returns:
        Lower and upper end, within [0, 1]. Both rise with every log ratio, and fall as N grows.

    Example:
        >>> low, high = miss_interval([0.0] * 95 + [5.0] * 5, n=8)
        >>> round(low, 3), round(high, 3)
        (0.016, 0.108)
    """
    return bounded_mean_interval(miss_values(log_ratios, n), groups=groups, weights=weights, confidence=confidence)


def miss_upper_bound(
    log_ratios: ArrayLike,
    n: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> float:
    """Upper confidence bound on miss_N that holds in finite samples, whatever the law of the rows.

    Args:
        log_ratios: `(R,)` nats, of independent prompts.
        n: A real number >= 1.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: One-sided level.

    Returns:
        A bound that lies below miss_N in at most a share `1 - confidence` of all corpora; see
        `bounded_mean_upper_bound`. It falls as N grows.

    Example:
        >>> round(miss_upper_bound([0.0] * 500, n=8), 4)
        0.006
    """
    return bounded_mean_upper_bound(miss_values(log_ratios, n), groups=groups, weights=weights, confidence=confidence)


def miss_bound_from_coverage(coverage: float, m: float, n: float) -> float:
    """Upper bound on miss_N from Cov_M at any M: `Cov_M + (1 - Cov_M) (1 - 1/M)^N`.

    Example:
        >>> round(miss_bound_from_coverage(0.1, m=2, n=3), 4)
        0.2125
    """
    return coverage + (1 - coverage) * (1 - 1 / check_n(m)) ** check_n(n)


def coverage_bound_from_miss(miss: float, n: float) -> float:
    """Upper bound on Cov_{N+1} from miss_N: `e miss_N`, and never above 1; better `(1 - 1/(N+1))^-N miss_N`.

    Example:
        >>> round(coverage_bound_from_miss(0.1, n=1), 3), round(coverage_bound_from_miss(0.1, n=1e9), 3)
        (0.2, 0.272)
    """
    return min(1.0, miss * math.exp(check_n(n) * math.log1p(1 / n)))


def sample_budget(
    log_ratios: ArrayLike,
    regret: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> SampleBudget:
    """How many samples Best-of-N needs so as to lose at most `regret` of the reference's expected reward.

    The bound on miss_N falls as N grows, so the least N that satisfies it is wrong with probability at most
    `1 - confidence` although N is chosen by the same rows.

    Args:
        log_ratios: `(R,)` nats; with upper bounds on the ratios the numbers are still enough, but `necessary_n` says
            nothing.
        regret: The loss of expected reward that is acceptable, in (0, 1), rewards being in [0, 1].
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: One-sided level of `guaranteed_n`.

    Raises:
        ValueError: If `regret` is outside (0, 1).

    Example:
        >>> budget = sample_budget([2.0] * 495 + [40.0] * 5, regret=0.05)
        >>> budget.n, budget.guaranteed_n, math.ceil(budget.paper_n), math.ceil(budget.necessary_n)
        (23.0, 27.0, 48, 4)

    References:
        Theorem M of this module; arXiv 2510.15020, Propositions D.6 and D.7.
    """
    paper = best_of_n_budget(log_ratios, regret, weights=weights)
    ratios = check_log_ratios(log_ratios)
    weight, absence = row_weights(weights, ratios.size), _log_absence(ratios)
    codes = None if groups is None else group_codes(groups)
    n = _least_n(lambda level: _mean_at(absence, weight, level) <= regret, above=1.0)
    guaranteed = _least_n(
        lambda level: (
            bounded_mean_upper_bound(np.exp(level * absence), groups=codes, weights=weights, confidence=confidence)
            <= regret
        ),
        above=n,
    )
    return SampleBudget(regret, n, guaranteed, paper.n, paper.necessary_n, confidence)


def _log_absence(ratios: FloatArray) -> FloatArray:
    """`log(1 - min(1, exp(-r)))`, so that N times it is the logarithm of a row's miss."""
    above = np.maximum(ratios, 0.0)
    with np.errstate(divide="ignore"):  # log 0 where r <= 0: one sample is enough
        return np.where(above < math.log(2), np.log(-np.expm1(-above)), np.log1p(-np.exp(-above)))


def _mean_at(absence: FloatArray, weight: FloatArray, level: float) -> float:
    return float(weight @ np.exp(level * absence) / weight.sum())


def _least_n(is_enough: Callable[[float], bool], *, above: float) -> float:
    """Least whole number from `above` on that is enough, where every larger one is too; beyond 1e12 to rounding."""
    if math.isinf(above) or is_enough(above):
        return above
    low, high = above, 2 * above
    while not is_enough(high):
        low, high = high, high**2
        if math.log(high) > _LARGEST_LOG_N / 2:
            return math.inf
    while high - low > max(1.0, 1e-12 * high):
        between = math.sqrt(low) * math.sqrt(high) if high > 2 * low else (low + high) / 2
        middle = min(max(float(math.floor(between)), low + 1), high - 1)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
