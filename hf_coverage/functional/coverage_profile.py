"""From log-probabilities to the coverage profile: log ratios, Cov_N, its interval and its quantile.

`r_i = log D(y_i|x_i) - log p(y_i|x_i)` for references `y_i ~ D(.|x_i)`; `Cov_N = P[r >= log N]`; `KL = E[r]`.
Everything is in nats and float64. Lower coverage is better: Cov_N is the share of good responses that are so unlikely
under the model that about N samples will not find them.
"""

import math
from collections.abc import Iterable
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.checks import (
    ROUNDING,
    TIE_TOLERANCE,
    FloatArray,
    check_log_ratios,
    check_logprobs,
    check_n,
)
from hf_coverage.functional.statistics import proportion_interval, row_weights

__all__ = [
    "coverage",
    "coverage_interval",
    "log_ratios",
    "reached",
    "smallest_n",
    "stopped_kl",
]


def log_ratios(reference_logprobs: ArrayLike, logprobs: ArrayLike) -> FloatArray:
    """Log ratio of every reference pair, `r_i = log D(y_i|x_i) - log p(y_i|x_i)`.

    Args:
        reference_logprobs: `(R,)` log D, nats, finite.
        logprobs: `(R,)` log p of the model, nats; -inf is legal and gives +inf.

    Returns:
        `(R,)` float64, nats.

    Raises:
        ValueError: On unequal lengths or values that cannot be log-probabilities; names the row.

    Example:
        >>> log_ratios([-1.0, -2.0], [-1.5, -2.0]).tolist()
        [0.5, 0.0]
    """
    reference = check_logprobs(reference_logprobs, name="reference_logprobs", allow_minus_infinity=False)
    model = check_logprobs(logprobs)
    if reference.shape != model.shape:
        raise ValueError(
            f"`reference_logprobs` and `logprobs` must describe the same rows, but have {reference.size} and "
            f"{model.size} entries."
        )
    return reference - model


def reached(ratios: FloatArray, n: float) -> np.ndarray:
    """Which log ratios reach log N: `r >= log N`, a tie within `TIE_TOLERANCE` counted as reached."""
    return ratios >= math.log(check_n(n)) - TIE_TOLERANCE


@overload
def coverage(log_ratios: ArrayLike, n: float, *, weights: ArrayLike | None = None) -> float: ...
@overload
def coverage(log_ratios: ArrayLike, n: Iterable[float], *, weights: ArrayLike | None = None) -> FloatArray: ...
def coverage(
    log_ratios: ArrayLike, n: float | Iterable[float], *, weights: ArrayLike | None = None
) -> float | FloatArray:
    """Coverage profile `Cov_N = mean_i 1[r_i >= log N]` at one N or many; lower is better.

    Args:
        log_ratios: `(R,)` log D - log p, nats.
        n: One N or `(K,)` of them, real numbers >= 1.
        weights: `(R,)` non-negative row weights.

    Returns:
        A float, or `(K,)` for many N.

    Raises:
        ValueError: On NaN or -inf ratios, or an N below 1.

    Example:
        >>> coverage([0.0, 1.0, 2.0, 3.0], [1, 2, 16]).tolist()
        [1.0, 0.75, 0.25]

    References:
        arXiv 2510.15020, Eq. (1) and (4).
    """
    ratios = check_log_ratios(log_ratios)
    ns = [check_n(value) for value in n] if isinstance(n, Iterable) else [check_n(n)]
    order = np.argsort(ratios)
    first = np.searchsorted(ratios[order], np.log(ns) - TIE_TOLERANCE, side="left")
    if weights is None:
        values = (ratios.size - first) / ratios.size
    else:
        # tail[i] = weight of the rows from the i-th smallest on, so that it is exactly 0 past the last row
        tail = np.append(np.cumsum(row_weights(weights, ratios.size)[order][::-1])[::-1], 0.0)
        values = tail[first] / tail[0]
    return values if isinstance(n, Iterable) else float(values[0])


def coverage_interval(
    log_ratios: ArrayLike,
    n: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of Cov_N, prompts taken as what was sampled.

    Args:
        log_ratios: `(R,)` nats.
        n: A real number >= 1.
        groups: `(R,)` the prompt of each row, or any label of it; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Returns:
        Lower and upper end, which rise with every hit and fall as N grows. See `proportion_interval` for the method.

    Example:
        >>> low, high = coverage_interval([0.0] * 95 + [5.0] * 5, n=8)
        >>> round(low, 4), round(high, 4)
        (0.0164, 0.1128)
    """
    hits = reached(check_log_ratios(log_ratios), n)
    return proportion_interval(hits, groups=groups, weights=weights, confidence=confidence)


def smallest_n(log_ratios: ArrayLike, eps: float, *, weights: ArrayLike | None = None) -> float:
    """Least N >= 1 with `Cov_N <= eps`: the upper eps-quantile of D/p.

    Args:
        log_ratios: `(R,)` nats.
        eps: The share of reference responses that may stay uncovered, in [0, 1].
        weights: `(R,)` non-negative row weights.

    Returns:
        N; infinite where more than eps of the responses have probability 0, or N exceeds the largest float.

    Raises:
        ValueError: If eps is outside [0, 1].

    Example:
        >>> round(smallest_n([0.0, 1.0, 2.0, 3.0], eps=0.25), 3)
        7.389
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"`eps` must be a share in [0, 1], but is {eps}.")
    ratios = check_log_ratios(log_ratios)
    weight = row_weights(weights, ratios.size)
    order = np.argsort(-ratios)
    share = np.cumsum(weight[order]) / weight.sum()
    within = share <= eps + 1e-12
    if within.all():
        return 1.0
    # Cov_N jumps at exp(r) of the first row that no longer fits, so N has to lie just above that ratio
    threshold = max(0.0, float(ratios[order][np.argmin(within)]) + 2 * TIE_TOLERANCE)
    return math.exp(threshold) if threshold < math.log(np.finfo(np.float64).max) else math.inf


def stopped_kl(token_kl: Iterable[ArrayLike], n: float, *, weights: ArrayLike | None = None) -> float:
    """Stopped KL, `E_D[min(log N, sum_h KL(D(.|x, y_<h) || p(.|x, y_<h)))]`, nats.

    Args:
        token_kl: One `(H_i,)` array of next-token divergences for each row.
        n: A real number >= 1.
        weights: `(R,)` non-negative row weights.

    Returns:
        The mean over rows of the sum cut at log N. `Cov_N <= 2 / (log N - 1)` times it for N > e.

    Raises:
        ValueError: On a negative or NaN divergence; names the row.

    Example:
        >>> round(stopped_kl([[0.1, 0.2], [5.0, 5.0]], n=8), 4)
        1.1897

    References:
        arXiv 2510.15020, Eq. (50) and Lemma D.10.
    """
    sums = np.asarray([math.fsum(np.asarray(row, dtype=np.float64)) for row in token_kl])
    bad = np.flatnonzero(~(sums >= -ROUNDING))
    if bad.size:
        raise ValueError(f"`token_kl` must hold divergences >= 0, but row {bad[0]} sums to {sums[bad[0]]}.")
    weight = row_weights(weights, sums.size)
    return float(weight @ np.minimum(math.log(check_n(n)), sums) / weight.sum())
