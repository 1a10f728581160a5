"""Two models on the same rows: differences of coverage and KL, with the uncertainty that pairing takes away."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hf_coverage.functional.checks import FloatArray, check_confidence, check_log_ratios
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.statistics import (
    bounded_mean_interval,
    bounded_mean_p_value,
    clustered_mean,
    group_codes,
    mean_interval,
    row_weights,
)

__all__ = [
    "PairedDifference",
    "paired_coverage_difference",
    "paired_kl_difference",
    "paired_loss_difference",
    "paired_miss_difference",
    "rows_to_tell_apart",
]


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

    The interval is `bounded_mean_interval`'s for values from -1 to 1, and the p-value its: a prompt for each direction
    of disagreement is added, so that no disagreement at all still leaves uncertainty.

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
    """
    hits_a, hits_b = (reached(check_log_ratios(ratios), n) for ratios in (log_ratios_a, log_ratios_b))
    _check_same_rows(hits_a, hits_b)
    change = hits_a.astype(np.float64) - hits_b
    return _difference_of_shares(change, groups, weights, confidence)


def paired_miss_difference(
    log_ratios_a: ArrayLike,
    log_ratios_b: ArrayLike,
    n: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """miss_N of a minus miss_N of b on the same rows; positive means a covers less.

    Interval and test are those of `paired_coverage_difference`: the prompt that is added for each direction stands for
    what differs wholly and is too rare to have been seen.

    Args:
        log_ratios_a: `(R,)` nats, of model a.
        log_ratios_b: `(R,)` nats, of model b, row by row the same responses.
        n: A real number >= 1.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Returns:
        The plain difference, the interval and the p-value. A single group tells nothing of others: (-1, 1) and NaN.

    Raises:
        ValueError: If the two describe different numbers of rows.

    Example:
        >>> paired_miss_difference([math.log(2), math.inf], [0.0, math.inf], n=1).difference
        0.25
    """
    a, b = miss_values(log_ratios_a, n), miss_values(log_ratios_b, n)
    _check_same_rows(a, b)
    return _difference_of_shares(a - b, groups, weights, confidence)


def paired_loss_difference(
    losses_a: ArrayLike,
    losses_b: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """Mean loss of a minus mean loss of b on the same rows, losses being in [0, 1]; see `paired_miss_difference`.

    Args:
        losses_a: `(R,)` of model a.
        losses_b: `(R,)` of model b.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Two-sided level.

    Raises:
        ValueError: If the two describe different numbers of rows.

    Example:
        >>> paired_loss_difference([1.0, 0.0], [0.5, 0.0]).difference
        0.25
    """
    a, b = np.asarray(losses_a, dtype=np.float64), np.asarray(losses_b, dtype=np.float64)
    _check_same_rows(a, b, "losses")
    return _difference_of_shares(a - b, groups, weights, confidence)


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
    too. Level and p-value are nominal, since differences have no bound: see `mean_interval`.

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
    _check_same_rows(a, b)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: rows that neither model can produce
        estimate = clustered_mean(a - b, groups=groups, weights=weights)
    low, high = mean_interval(estimate, confidence)
    mean, error = estimate.mean, estimate.standard_error
    if math.isnan(low):  # no difference anywhere is no evidence of one
        return PairedDifference(mean, low, high, 1.0 if mean == error == 0 else math.nan)
    p_value = 2 * float(stats.t.sf(abs(mean) / error, estimate.num_groups - 1))
    return PairedDifference(mean, float(low), float(high), p_value)


def rows_to_tell_apart(
    values_a: ArrayLike,
    values_b: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
) -> float:
    """About how many rows like these a paired test needs so as to see that two means differ: `((z_1 + z_2) s / d)^2`.

    d is the mean of the differences and s their standard deviation, clustered: rows here come with as many prompts
    as in the sample. An estimate for planning, and a poor one where the rows at hand do not tell the two apart.

    Args:
        values_a: `(R,)` a quantity of model a in each row, for example `miss_values(log_ratios, 16)`.
        values_b: `(R,)` the same of model b.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        weights: `(R,)` non-negative row weights.
        confidence: Of the two-sided test.
        power: The chance that the test is to have.

    Returns:
        Rows; infinite where the means are equal.

    Raises:
        ValueError: If the two describe different numbers of rows, or there is a single group.

    Example:
        >>> round(rows_to_tell_apart([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]))
        10
    """
    check_confidence(confidence)
    check_confidence(power)
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    _check_same_rows(a, b, "values")
    estimate = clustered_mean(a - b, groups=groups, weights=weights)
    if estimate.num_groups < 2:
        raise ValueError("`values_a` and `values_b` must be of at least two prompts: one says nothing of others.")
    if estimate.mean == 0:
        return math.inf
    quantiles = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    return a.size * float(quantiles * estimate.standard_error / estimate.mean) ** 2


def _check_same_rows(a: NDArray[Any], b: NDArray[Any], name: str = "log_ratios") -> None:
    if a.shape != b.shape:
        raise ValueError(f"`{name}_a` and `{name}_b` must describe the same rows, but have {a.size} and {b.size}.")


def _difference_of_shares(
    change: FloatArray,
    groups: Iterable[Any] | None,
    weights: ArrayLike | None,
    confidence: float,
) -> PairedDifference:
    """The mean of changes from -1 to 1, with the interval and the test of a bounded mean."""
    check_confidence(confidence)
    weight = row_weights(weights, change.size)
    codes = None if groups is None else group_codes(groups)
    difference = float(weight @ change / weight.sum())
    rows: dict[str, Any] = {"groups": codes, "weights": weights}
    low, high = bounded_mean_interval((change + 1) / 2, **rows, confidence=confidence)
    p_value = bounded_mean_p_value((change + 1) / 2, 0.5, **rows)
    return PairedDifference(difference, 2 * low - 1, 2 * high - 1, p_value)
