"""Two models on the same rows: differences of coverage and KL, with the uncertainty that pairing takes away."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hf_coverage.functional.checks import FloatArray, check_confidence, check_log_ratios
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.statistics import clustered_mean, group_codes, mean_interval, row_weights

__all__ = ["PairedDifference", "paired_coverage_difference", "paired_kl_difference"]


class PairedDifference(NamedTuple):
    """A quantity of a minus the same of b on the same rows, with its interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


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
    row for each direction of disagreement, as heavy as the rows that share a prompt are alike, is added before the
    clustered mean is taken, so that no disagreement at all still leaves uncertainty. The p-value is the two-sided one
    of the same statistic.

    Args:
        log_ratios_a: `(R,)` nats, of model a.
        log_ratios_b: `(R,)` nats, of model b, row by row the same responses.
        n: A real number >= 1.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Returns:
        The plain difference of the two coverages, the interval and the p-value. A single group tells nothing of
        others: (-1, 1) and NaN.

    Raises:
        ValueError: If the two describe different numbers of rows.

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
    weight = row_weights(weights, change.size)
    codes = np.arange(change.size, dtype=np.uint64) if groups is None else group_codes(groups)
    if codes.shape != change.shape:
        raise ValueError(f"`groups` must have one label a row, {change.size} in all, but has {codes.size}.")
    difference = float(weight @ change / weight.sum())
    counts = weight > 0  # a row without weight is none
    change, codes, weight = change[counts], codes[counts], weight[counts]
    labels, inverse = np.unique(codes, return_inverse=True)
    if labels.size < 2:
        return PairedDifference(difference, -1.0, 1.0, math.nan)
    pseudo = weight.mean() * _design_effect(change, codes, weight)
    error = clustered_mean(
        np.append(change, [1.0, -1.0]),
        groups=np.append(inverse, [labels.size, labels.size + 1]).astype(np.uint64),
        weights=np.append(weight, [pseudo, pseudo]),
    )
    freedom = error.num_groups - 1
    margin = error.standard_error * stats.t.ppf((1 + confidence) / 2, freedom)
    p_value = 2 * stats.t.sf(abs(error.mean) / error.standard_error, freedom)
    return PairedDifference(difference, max(-1.0, error.mean - margin), min(1.0, error.mean + margin), float(p_value))


def paired_kl_difference(
    log_ratios_a: ArrayLike,
    log_ratios_b: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """KL of a minus KL of b on the same rows, `E[log p_b - log p_a]`; positive means a is further from the reference.

    A paired Student-t interval and test over groups. The reference cancels: it is the difference of cross-entropies,
    too.

    Args:
        log_ratios_a: `(R,)` nats, of model a.
        log_ratios_b: `(R,)` nats, of model b, row by row the same responses.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Returns:
        The difference, the interval and the p-value. The difference is infinite where one KL is and NaN where both
        are; interval and p-value are then NaN, as they are with a single group, and where all groups differ by the
        same amount, which says nothing of how much others may differ. Where none differs the p-value is 1.

    Raises:
        ValueError: If the two describe different numbers of rows.

    Example:
        >>> result = paired_kl_difference([0.5, 1.0, 3.0, 0.5], [0.0, 1.0, 2.0, 0.0])
        >>> round(result.difference, 3), round(result.p_value, 3)
        (0.5, 0.092)
    """
    check_confidence(confidence)
    a, b = check_log_ratios(log_ratios_a), check_log_ratios(log_ratios_b)
    if a.shape != b.shape:
        raise ValueError(
            f"`log_ratios_a` and `log_ratios_b` must describe the same rows, but have {a.size} and {b.size}."
        )
    with np.errstate(invalid="ignore"):  # infinity minus infinity: rows that neither model can produce
        estimate = clustered_mean(a - b, groups=groups, weights=weights)
    low, high = mean_interval(estimate, confidence)
    mean, error = estimate.mean, estimate.standard_error
    if math.isnan(low):  # no difference anywhere is no evidence of one
        return PairedDifference(mean, low, high, 1.0 if mean == error == 0 else math.nan)
    p_value = 2 * float(stats.t.sf(abs(mean) / error, estimate.num_groups - 1))
    return PairedDifference(mean, float(low), float(high), p_value)


def _design_effect(values: FloatArray, codes: NDArray[np.uint64], weight: FloatArray) -> float:
    """How many rows of one group are worth one independent row: from 1 up to the mean size of a group."""
    mean_size = values.size / np.unique(codes).size
    independent = clustered_mean(values, weights=weight).standard_error
    if not independent > 0:
        return mean_size
    clustered = clustered_mean(values, groups=codes, weights=weight).standard_error
    return float(np.clip((clustered / independent) ** 2, 1.0, mean_size))
