"""Means, proportions and their uncertainty when rows may share a prompt.

Several responses to one prompt are not independent draws. Everything here treats a *group* (a prompt) as the unit that
was sampled: variances are linearised ratio-estimator variances over groups, and proportions get Wilson's interval with
the effective number of rows that this variance implies (the interval survey statistics recommends for clustered
samples). With independent, unweighted rows it is Wilson's interval exactly.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hf_coverage.functional.checks import FloatArray, check_confidence

__all__ = [
    "MeanEstimate",
    "bounded_mean_interval",
    "clustered_mean",
    "group_codes",
    "mean_interval",
    "proportion_interval",
    "row_weights",
]


class MeanEstimate(NamedTuple):
    """A mean, its standard error, and the number of groups that both rest on."""

    mean: float
    standard_error: float
    num_groups: int


def group_codes(groups: Iterable[Any]) -> NDArray[np.uint64]:
    """Turn group labels into 64-bit codes that are equal exactly when the labels are.

    The codes depend on the labels alone, so parts of a corpus that were coded apart can be merged. Two different
    labels share a code with probability 2^-64.

    Args:
        groups: `(R,)` one label a row: strings, numbers, lists of token ids or lists of chat messages.

    Returns:
        `(R,)` unsigned 64-bit codes.

    Example:
        >>> codes = group_codes(["a", "b", "a"])
        >>> bool(codes[0] == codes[2]), bool(codes[0] == codes[1])
        (True, False)
    """
    if isinstance(groups, np.ndarray):
        if groups.dtype == np.uint64:
            return groups
        groups = groups.tolist()
    codes: dict[str, int] = {}
    rows = []
    for label in groups:
        # JSON keeps apart what merely prints alike: 1 and "1", [12] and [1, 2]
        text = json.dumps(label, sort_keys=True)
        if text not in codes:
            codes[text] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        rows.append(codes[text])
    return np.asarray(rows, dtype=np.uint64)


def row_weights(weights: ArrayLike | None, num_rows: int) -> FloatArray:
    """Check the weights of `num_rows` rows; without any, every row weighs one.

    Raises:
        ValueError: if a weight is negative, NaN or infinite, if all are zero, or if their number is not `num_rows`.
    """
    if weights is None:
        return np.ones(num_rows)
    checked = np.asarray(weights, dtype=np.float64)
    if checked.shape != (num_rows,):
        raise ValueError(f"`weights` must have one entry a row, shape ({num_rows},), but has shape {checked.shape}.")
    bad = np.flatnonzero(~(np.isfinite(checked) & (checked >= 0)))
    if bad.size:
        raise ValueError(f"`weights` must be finite and >= 0, but row {bad[0]} has {checked[bad[0]]}.")
    if not checked.any():
        raise ValueError("`weights` are all 0: give at least one row a positive weight.")
    return checked


def clustered_mean(
    values: ArrayLike, *, groups: Iterable[Any] | None = None, weights: ArrayLike | None = None
) -> MeanEstimate:
    """Weighted mean of rows with a standard error that allows for rows sharing a group.

    `mean = sum w v / sum w`, `se^2 = G/(G-1) sum_g (sum_{i in g} w_i (v_i - mean))^2 / (sum w)^2`.

    Args:
        values: `(R,)` one value a row; infinite values make the mean infinite and its standard error NaN.
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.

    Returns:
        Mean, standard error (NaN with a single group) and number of groups.

    Example:
        >>> clustered_mean([1.0, 2.0, 3.0, 6.0]).mean
        3.0
    """
    rows = np.asarray(values, dtype=np.float64)
    weight = row_weights(weights, rows.size)
    total = weight.sum()
    inverse, num_groups = _group_index(groups, rows.size)
    with np.errstate(invalid="ignore"):
        mean = float((weight * rows)[weight > 0].sum() / total)
    if num_groups < 2 or not math.isfinite(mean):
        return MeanEstimate(mean, math.nan, num_groups)
    residuals = np.bincount(inverse, weights=weight * (rows - mean), minlength=num_groups)
    variance = num_groups / (num_groups - 1) * float(residuals @ residuals) / total**2
    return MeanEstimate(mean, math.sqrt(variance), num_groups)


def mean_interval(estimate: MeanEstimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Student-t interval of a mean, with `num_groups - 1` degrees of freedom; NaN where there is none."""
    check_confidence(confidence)
    if estimate.num_groups < 2 or math.isnan(estimate.standard_error):
        return math.nan, math.nan
    margin = estimate.standard_error * stats.t.ppf((1 + confidence) / 2, estimate.num_groups - 1)
    return estimate.mean - margin, estimate.mean + margin


def bounded_mean_interval(estimate: MeanEstimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval within [0, 1] for a mean of values in [0, 1]; of 0s and 1s, one a group, nearly Wilson's.

    Wilson's interval with as many rows as a proportion of the same mean and standard error has, `mean (1 - mean) /
    se^2`, or the number of groups where all values are 0 or all are 1, which a Student-t interval would call certain.
    A single group tells nothing: (0, 1).

    Example:
        >>> low, high = bounded_mean_interval(clustered_mean([1.0] * 20))
        >>> round(low, 3), high
        (0.82, 1.0)
    """
    check_confidence(confidence)
    if estimate.num_groups < 2:
        return 0.0, 1.0
    mean = min(1.0, max(0.0, estimate.mean))  # a mean of ones may round to more
    error = estimate.standard_error
    effective = mean * (1 - mean) / error**2 if error > 0 else 0.0
    quantile = float(stats.t.ppf((1 + confidence) / 2, estimate.num_groups - 1))
    return _wilson(mean, effective or float(estimate.num_groups), quantile)


def proportion_interval(
    hits: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Wilson's interval for a proportion, with the effective number of rows where rows share groups or have weights.

    The effective number is `p (1 - p) / se^2` with the standard error of `clustered_mean`, never more than the rows
    there are; where no row or every row is a hit, it is the number of groups. A single group tells nothing: (0, 1).

    Args:
        hits: `(R,)` booleans.
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.
        confidence: two-sided confidence level in (0, 1).

    Returns:
        Lower and upper end, within [0, 1].

    Example:
        >>> low, high = proportion_interval([True] * 5 + [False] * 95)
        >>> round(low, 4), round(high, 4)
        (0.0215, 0.1118)

    References:
        Wilson (1927); Franco, Little, Louis and Slud (2019), "Comparative study of confidence intervals for
        proportions in complex sample surveys".
    """
    check_confidence(confidence)
    rows = np.asarray(hits, dtype=bool)
    if groups is None and weights is None:
        interval = stats.binomtest(int(rows.sum()), rows.size).proportion_ci(confidence, method="wilson")
        return float(interval.low), float(interval.high)
    weight = row_weights(weights, rows.size)
    inverse, num_groups = _group_index(groups, rows.size)
    if num_groups < 2:
        return 0.0, 1.0
    # Not through `clustered_mean(groups=groups)`: `groups` may be an iterator, and coding the labels costs most.
    proportion, error, _ = clustered_mean(rows, groups=inverse.astype(np.uint64), weights=weight)
    if error > 0:
        effective = min(proportion * (1 - proportion) / error**2, _kish(weight))
    else:
        effective = _kish(np.bincount(inverse, weights=weight).astype(np.float64))
    return _wilson(proportion, effective, float(stats.t.ppf((1 + confidence) / 2, num_groups - 1)))


def _group_index(groups: Iterable[Any] | None, num_rows: int) -> tuple[NDArray[np.intp], int]:
    if groups is None:
        return np.arange(num_rows), num_rows
    codes = group_codes(groups)
    if codes.shape != (num_rows,):
        raise ValueError(f"`groups` must have one label a row, {num_rows} in all, but has {codes.size}.")
    labels, inverse = np.unique(codes, return_inverse=True)
    return inverse, labels.size


def _kish(weight: FloatArray) -> float:
    """Kish's effective number of equally weighted units."""
    return float(weight.sum() ** 2 / (weight @ weight))


def _wilson(proportion: float, size: float, z: float) -> tuple[float, float]:
    centre = proportion + z * z / (2 * size)
    margin = z * math.sqrt(proportion * (1 - proportion) / size + z * z / (4 * size * size))
    scale = 1 + z * z / size
    # exactly 0 and 1 where nothing or everything was hit: the subtraction would leave its rounding
    low = (centre - margin) / scale if proportion > 0 else 0.0
    high = (centre + margin) / scale if proportion < 1 else 1.0
    return max(0.0, low), min(1.0, high)
