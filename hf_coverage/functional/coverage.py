"""From log-probabilities to the coverage profile: log ratios, Cov_N, its quantile and paired comparison.

`r_i = log D(y_i|x_i) - log p(y_i|x_i)` for references `y_i ~ D(.|x_i)`; `Cov_N = P[r >= log N]`; `KL = E[r]`.
Everything is in nats and float64. Lower coverage is better: Cov_N is the share of good responses that are so unlikely
under the model that about N samples will not find them.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .checks import ROUNDING, TIE_TOLERANCE, FloatArray, check_confidence, check_log_ratios, check_logprobs, check_n
from .statistics import clustered_mean, group_codes, proportion_interval, row_weights

__all__ = [
    "PairedDifference",
    "coverage",
    "coverage_interval",
    "log_ratios",
    "paired_coverage_difference",
    "reached",
    "smallest_n",
    "stopped_kl",
]


class PairedDifference(NamedTuple):
    """Coverage of a minus coverage of b on the same rows, with its interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def log_ratios(reference_logprobs: ArrayLike, logprobs: ArrayLike) -> FloatArray:
    """Log ratio of every reference pair, `r_i = log D(y_i|x_i) - log p(y_i|x_i)`.

    Args:
        reference_logprobs: `(R,)` log D, nats, finite.
        logprobs: `(R,)` log p of the model, nats; -inf is legal and gives +inf.

    Returns:
        `(R,)` float64, nats.

    Raises:
        ValueError: on unequal lengths or values that cannot be log-probabilities; names the row.

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
        n: one N or `(K,)` of them, real numbers >= 1.
        weights: `(R,)` non-negative row weights.

    Returns:
        A float, or `(K,)` for many N.

    Raises:
        ValueError: on NaN or -inf ratios, or an N below 1.

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
    """Confidence interval of Cov_N: Wilson's, with the effective number of rows where prompts repeat.

    Args:
        log_ratios: `(R,)` nats.
        n: a real number >= 1.
        groups: `(R,)` the prompt of each row, or any label of it; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: two-sided level.

    Returns:
        Lower and upper end. See `proportion_interval` for the method.

    Example:
        >>> low, high = coverage_interval([0.0] * 95 + [5.0] * 5, n=8)
        >>> round(low, 4), round(high, 4)
        (0.0215, 0.1118)
    """
    hits = reached(check_log_ratios(log_ratios), n)
    return proportion_interval(hits, groups=groups, weights=weights, confidence=confidence)


def paired_coverage_difference(
    log_ratios_a: ArrayLike,
    log_ratios_b: ArrayLike,
    n: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """Cov_N of a minus Cov_N of b on the same rows; positive means a covers less.

    The interval is Bonett and Price's adjusted Wald interval for paired proportions, extended to groups: one pseudo
    group for each direction of disagreement is added before the clustered mean is taken, so that no disagreement at
    all still leaves uncertainty. The p-value is the two-sided one of the same statistic.

    Args:
        log_ratios_a: `(R,)` nats, of model a.
        log_ratios_b: `(R,)` nats, of model b, row by row the same responses.
        n: a real number >= 1.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: two-sided level.

    Returns:
        The plain difference of the two coverages, the interval and the p-value.

    Raises:
        ValueError: if the two describe different numbers of rows.

    Example:
        >>> paired_coverage_difference([0.0, 3.0, 3.0, 0.0], [0.0, 3.0, 0.0, 0.0], n=8).difference
        0.25

    References:
        Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of binomial proportions based on
        paired data".
    """
    check_confidence(confidence)
    hits_a, hits_b = (reached(check_log_ratios(ratios), n) for ratios in (log_ratios_a, log_ratios_b))
    if hits_a.shape != hits_b.shape:
        raise ValueError(
            f"`log_ratios_a` and `log_ratios_b` must describe the same rows, but have {hits_a.size} and {hits_b.size}."
        )
    change = hits_a.astype(np.float64) - hits_b
    codes = np.arange(change.size, dtype=np.uint64) if groups is None else group_codes(groups)
    weight = row_weights(weights, change.size)
    labels, inverse = np.unique(codes, return_inverse=True)
    pseudo = weight.sum() / labels.size
    error = clustered_mean(
        np.append(change, [1.0, -1.0]),
        groups=np.append(inverse, [labels.size, labels.size + 1]).astype(np.uint64),
        weights=np.append(weight, [pseudo, pseudo]),
    )
    freedom = error.num_groups - 1
    margin = error.standard_error * stats.t.ppf((1 + confidence) / 2, freedom)
    p_value = 2 * stats.t.sf(abs(error.mean) / error.standard_error, freedom)
    difference = float(weight @ change / weight.sum())
    return PairedDifference(difference, max(-1.0, error.mean - margin), min(1.0, error.mean + margin), float(p_value))


def smallest_n(log_ratios: ArrayLike, eps: float, *, weights: ArrayLike | None = None) -> float:
    """Least N >= 1 with `Cov_N <= eps`: the upper eps-quantile of D/p.

    Args:
        log_ratios: `(R,)` nats.
        eps: the share of reference responses that may stay uncovered, in [0, 1].
        weights: `(R,)` non-negative row weights.

    Returns:
        N; infinite where more than eps of the responses have probability 0, or N exceeds the largest float.

    Raises:
        ValueError: if eps is outside [0, 1].

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
        token_kl: one `(H_i,)` array of next-token divergences for each row.
        n: a real number >= 1.
        weights: `(R,)` non-negative row weights.

    Returns:
        The mean over rows of the sum cut at log N. `Cov_N <= 2 / (log N - 1)` times it for N > e.

    Raises:
        ValueError: on a negative or NaN divergence; names the row.

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
