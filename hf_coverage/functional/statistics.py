"""Means, proportions and their uncertainty when rows may share a prompt.

Several responses to one prompt are not independent draws. Everything here treats a *group* (a prompt) as the unit that
was sampled: variances are linearised ratio-estimator variances over groups, and means of values in [0, 1] get Gaffke's
interval of the groups' means, which needs no variance: a variance that is estimated from few hits is too small, and
smallest where the hits are fewest. Of independent, unweighted hits it is Clopper and Pearson's. Rows of weight 0
are not there: neither they nor their groups count.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from hf_coverage.functional.checks import FloatArray, check_confidence

__all__ = [
    "MeanEstimate",
    "bounded_mean_interval",
    "bounded_mean_p_value",
    "bounded_mean_upper_bound",
    "clustered_mean",
    "group_codes",
    "holm_p_values",
    "mean_interval",
    "proportion_interval",
    "row_weights",
]


_ALIKE = 1e-12
"""A standard error below this share of the mean is the rounding of one that is 0."""

_DISTINCT = 512
"""Most different terms of a sum of exponentials; neighbours among more are taken together."""
_STEP = 0.1

_ENDS: dict[tuple[bytes, int, float], float] = {}
"""Ends of intervals that were found, by what they are of."""
_ENDS_KEPT = 10_000

_VALUES = 16_384
"""Most different values that a betting bound goes through; of more, neighbours are raised to the largest of them."""


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
        groups: `(R,)` one label a row: strings, numbers, lists of token ids or lists of chat messages; a number, array
            or tuple of numpy's is the same label as Python's.

    Returns:
        `(R,)` unsigned 64-bit codes.

    Raises:
        TypeError: If a label is none of these; names the row.

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
    for row, label in enumerate(groups):
        # JSON keeps apart what merely prints alike: 1 and "1", [12] and [1, 2]
        try:
            text = json.dumps(label, sort_keys=True, default=_plain)
        except TypeError as error:
            raise TypeError(
                f"`groups` must hold strings, numbers, lists of token ids or lists of messages, but row {row} is "
                f"{label!r}: {error}."
            ) from error
        if text not in codes:
            codes[text] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        rows.append(codes[text])
    return np.asarray(rows, dtype=np.uint64)


def row_weights(weights: ArrayLike | None, num_rows: int) -> FloatArray:
    """Check the weights of `num_rows` rows; without any, every row weighs one.

    Raises:
        ValueError: If a weight is negative, NaN or infinite, if all are zero, or if their number is not `num_rows`.
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
    rows, weight, inverse, num_groups = _weighing_rows(values, groups, weights)
    total = weight.sum()
    mean = float(weight @ rows / total)
    if num_groups < 2 or not math.isfinite(mean):
        return MeanEstimate(mean, math.nan, num_groups)
    residuals = np.bincount(inverse, weights=weight * (rows - mean), minlength=num_groups)
    variance = num_groups / (num_groups - 1) * float(residuals @ residuals) / total**2
    return MeanEstimate(mean, math.sqrt(variance), num_groups)


def mean_interval(estimate: MeanEstimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Student-t interval of a mean, with `num_groups - 1` degrees of freedom.

    Its level is nominal. Values without a bound, as log ratios are, may have a mean that hangs on rows too rare to be
    seen, and no interval of theirs can hold it as often as it says; at 95 % this one held the mean of 12 or more
    independent groups .94 of the time where values are normal, .89 where they are exponential, .84 where log-normal,
    and as rarely as .5 where a group in twenty or fewer decides. So nothing here prints a percentage beside it. For
    values in [0, 1] there is `bounded_mean_interval`.

    NaN where there is none: with a single group, an infinite mean, or groups that are all alike, which say nothing of
    how much others may differ.
    """
    check_confidence(confidence)
    if estimate.num_groups < 2 or not estimate.standard_error > _ALIKE * abs(estimate.mean):
        return math.nan, math.nan
    margin = estimate.standard_error * stats.t.ppf((1 + confidence) / 2, estimate.num_groups - 1)
    return estimate.mean - margin, estimate.mean + margin


def bounded_mean_interval(
    values: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Two-sided interval within [0, 1] for a mean of values in [0, 1]: Gaffke's, over the means x_g of groups.

        upper end: the (1 + confidence)/2 quantile of (sum_g w_g E_g x_g + w E) / (sum_g w_g E_g + w E)

    with independent exponential E, w_g the weights of the groups and `w = sum w_g^2 / sum w_g` that of a group as rows
    meet it: one group more, in which all values are 1. The lower end is that of 1 - x. Both ends rise with every
    value. Of 0s and 1s, one a group, it is Clopper and Pearson's interval. A single group tells nothing: (0, 1).

    Args:
        values: `(R,)` in [0, 1].
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.
        confidence: Two-sided confidence level in (0, 1).

    Raises:
        ValueError: If a value lies outside [0, 1]; names the row.

    Example:
        >>> low, high = bounded_mean_interval([1.0] * 20)
        >>> round(low, 3), high
        (0.832, 1.0)

    References:
        Gaffke (2005), "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
        variable"; Learned-Miller and Thomas (2019), arXiv 1905.06208.
    """
    check_confidence(confidence)
    means, of_group = _group_means(values, groups, weights)
    if means.size < 2:
        return 0.0, 1.0
    beyond = (1 - confidence) / 2
    return 1 - _gaffke_end(1 - means, of_group, beyond), _gaffke_end(means, of_group, beyond)


def bounded_mean_p_value(
    values: ArrayLike,
    mean: float,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
) -> float:
    """Two-sided p-value of a mean of values in [0, 1], below 0.05 where their 95 % interval leaves it out.

    Args:
        values: `(R,)` in [0, 1].
        mean: The mean that is tested, in (0, 1).
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.

    Returns:
        In [0, 1]; NaN with a single group.

    Raises:
        ValueError: If a value lies outside [0, 1]; names the row.

    Example:
        >>> round(bounded_mean_p_value([1.0] * 5, 0.5), 4)
        0.0625
    """
    means, of_group = _group_means(values, groups, weights)
    if means.size < 2:
        return math.nan
    least = min(_share_above(means, of_group, mean), _share_above(1 - means, of_group, 1 - mean))
    return min(1.0, 2 * least)


def bounded_mean_upper_bound(
    values: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> float:
    """Upper confidence bound for a mean of values in [0, 1] that holds in finite samples: a betting bound.

    Whoever bets against the mean being as high as m, a share c of what he has on every group, holds

        K_c(m) = prod_g (1 + c v_g (m - x_g) / (1 - m)),      v_g = w_g / max w, x_g the mean of a group,

    for each unit he began with. If m is the mean his expectation is 1, and so is that of an average over several c:
    by Markov's inequality it reaches 1 / (1 - confidence) with probability at most `1 - confidence`. The bound is
    the m from which on it does. Half of the money bets `c_0 = 1 - a/m` with `KL(a || m) = log(1 / (1 - confidence)) /
    G`, what is best on 0s and 1s (alone it would be Chernoff's bound, or better), a quarter twice as much, and so on:
    better where values vary less. `c_0` falls in m and `c_0 m / (1 - m)` rises, so that every factor rises with m.

    The bound does not depend on the order of the rows, rises with every value, and needs of groups only that they are
    independent and alike.

    Args:
        values: `(R,)` in [0, 1].
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.
        confidence: One-sided confidence level in (0, 1).

    Raises:
        ValueError: If a value lies outside [0, 1]; names the row.

    Example:
        >>> round(bounded_mean_upper_bound([0.0] * 95 + [1.0] * 5), 3), bounded_mean_upper_bound([1.0, 1.0])
        (0.132, 1.0)

    References:
        Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", arXiv 2010.09686.
    """
    check_confidence(confidence)
    means, of_group = _group_means(values, groups, weights)
    shares = of_group / of_group.max()
    target = -math.log1p(-confidence)
    rate = target * float(shares @ shares) / float(shares.sum()) ** 2
    if shares.min() == 1:
        means, times = _rounded_up(means)
        shares = np.ones(means.size)
    else:
        times = np.ones(means.size)

    def excess(mean: float) -> float:
        stakes, money = _stakes(mean, rate)
        with np.errstate(divide="ignore"):  # all was bet on a value of 1 not to come
            won = np.log1p(stakes[:, None] * (shares * (mean - means) / (1 - mean))) @ times
        return float(np.logaddexp.reduce(won + np.log(money))) - target

    least, most = float(times @ (shares * means) / (times @ shares)), 1 - 1e-9
    if least >= most or excess(most) <= 0:
        return 1.0
    return float(optimize.brentq(excess, max(least, 1e-12), most, xtol=1e-12, rtol=1e-9))


def holm_p_values(p_values: ArrayLike) -> FloatArray:
    """P-values corrected for there being several: Holm's, by which the chance of any false finding is at most alpha.

        p~_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)),      p_(1) <= ... <= p_(m)

    Args:
        p_values: `(M,)` in [0, 1]; NaN, of what cannot be tested, stays NaN and is not counted.

    Returns:
        `(M,)`, none below what it was; what is below alpha is found at that level, however the tests depend.

    Raises:
        ValueError: If one lies outside [0, 1].

    Example:
        >>> holm_p_values([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]

    References:
        Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    values = np.asarray(p_values, dtype=np.float64)
    if np.any((values < 0) | (values > 1)):
        raise ValueError(f"`p_values` must lie in [0, 1], but are {values.min()} to {values.max()}.")
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN comes last
    corrected = np.full(values.shape, np.nan)
    factors = np.arange(order.size, 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return corrected


def proportion_interval(
    hits: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval for a proportion: Clopper and Pearson's, or Gaffke's where rows share groups or have weights.

    Both rise with every hit, and neither is too narrow where hits are rare. A single group tells nothing: (0, 1).

    Args:
        hits: `(R,)` booleans.
        groups: `(R,)` group labels; None takes every row as its own group.
        weights: `(R,)` non-negative row weights; None weighs rows alike.
        confidence: Two-sided confidence level in (0, 1).

    Returns:
        Lower and upper end, within [0, 1].

    Example:
        >>> low, high = proportion_interval([True] * 5 + [False] * 95)
        >>> round(low, 4), round(high, 4)
        (0.0164, 0.1128)

    References:
        Clopper and Pearson (1934).
    """
    check_confidence(confidence)
    rows = np.asarray(hits, dtype=bool)
    if groups is not None or weights is not None:
        return bounded_mean_interval(rows, groups=groups, weights=weights, confidence=confidence)
    if rows.size == 1:
        return 0.0, 1.0
    interval = stats.binomtest(int(rows.sum()), rows.size).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def _group_index(groups: Iterable[Any] | None, num_rows: int) -> tuple[NDArray[np.intp], int]:
    if groups is None:
        return np.arange(num_rows), num_rows
    codes = group_codes(groups)
    if codes.shape != (num_rows,):
        raise ValueError(f"`groups` must have one label a row, {num_rows} in all, but has {codes.size}.")
    labels, inverse = np.unique(codes, return_inverse=True)
    return inverse, labels.size


def _plain(label: Any) -> Any:
    """A number or an array of numpy's, or of torch's, as Python has it."""
    if hasattr(label, "tolist"):
        return label.tolist()
    raise TypeError(f"a {type(label).__name__} is no label")


def _weighing_rows(
    values: ArrayLike, groups: Iterable[Any] | None, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray, NDArray[np.intp], int]:
    """The rows with a positive weight: values, weights, the number of each one's group, and how many groups."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or not rows.size:
        raise ValueError(f"`values` must be a non-empty 1-d sequence, one value a row, but has shape {rows.shape}.")
    weight = row_weights(weights, rows.size)
    inverse, num_groups = _group_index(groups, rows.size)
    counts = weight > 0
    if counts.all():
        return rows, weight, inverse, num_groups
    labels, inverse = np.unique(inverse[counts], return_inverse=True)
    return rows[counts], weight[counts], inverse, labels.size


def _group_means(
    values: ArrayLike, groups: Iterable[Any] | None, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray]:
    """The mean of values in [0, 1] in each group, and what each group weighs."""
    bad = np.flatnonzero(~((np.asarray(values) >= 0) & (np.asarray(values) <= 1 + 1e-12)))
    if bad.size:
        raise ValueError(f"`values` must lie in [0, 1], but row {bad[0]} is {np.asarray(values)[bad[0]]}.")
    rows, weight, inverse, num_groups = _weighing_rows(values, groups, weights)
    of_group = np.bincount(inverse, weights=weight, minlength=num_groups).astype(np.float64)
    means = np.bincount(inverse, weights=weight * rows, minlength=num_groups) / of_group
    return np.clip(means, 0.0, 1.0), of_group


def _stakes(mean: float, rate: float) -> tuple[FloatArray, FloatArray]:
    """What to bet against a mean so high, and with which share of the money: see `bounded_mean_upper_bound`."""
    seen = 0.0
    if -math.log1p(-mean) > rate:
        seen = float(
            optimize.brentq(lambda a: float(special.rel_entr([a, 1 - a], [mean, 1 - mean]).sum()) - rate, 0, mean)
        )
    first = max(1 - seen / mean, 1e-12)
    doublings = np.arange(1 + math.ceil(-math.log2(first)))
    money = np.asarray(0.5 ** (doublings + 1.0), dtype=np.float64)
    money[-1] *= 2
    return np.minimum(first * 2.0**doublings, 1.0), money


def _rounded_up(means: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Different values and how often each stands; of very many, neighbours are raised to the largest of them."""
    values, times = np.unique(means, return_counts=True)
    if values.size <= _VALUES:
        return np.asarray(values, dtype=np.float64), times.astype(np.float64)
    last = np.linspace(0, values.size - 1, _VALUES).astype(np.intp)
    return np.asarray(values[last], dtype=np.float64), np.diff(np.cumsum(times)[last], prepend=0).astype(np.float64)


def _gaffke_end(means: FloatArray, weight: FloatArray, beyond: float) -> float:
    """The upper end, found once: a table, a file and a picture ask for the same one."""
    key = hashlib.blake2b(means.tobytes() + weight.tobytes(), digest_size=16).digest(), means.size, beyond
    if key not in _ENDS:
        if len(_ENDS) >= _ENDS_KEPT:
            _ENDS.clear()
        _ENDS[key] = _find_gaffke_end(means, weight, beyond)
    return _ENDS[key]


def _find_gaffke_end(means: FloatArray, weight: FloatArray, beyond: float) -> float:
    """The upper end, which the random mean of `bounded_mean_interval` lies above with probability `beyond`."""
    if means.min() == 1:
        return 1.0

    def excess(end: float) -> float:  # in logarithms, in which it is nearly straight
        return math.log(max(_share_above(means, weight, end), 1e-300) / beyond)

    low = float(means.min())
    centre = float(weight @ means / weight.sum())
    size = float(weight.sum()) ** 2 / float(weight @ weight)
    high = min(1.0, centre + 4 * math.sqrt(centre * (1 - centre) / size) + 8 / size)
    if excess(high) > 0:
        low, high = high, 1.0
    elif centre > low and excess(centre) > 0:
        low = centre
    return float(optimize.brentq(excess, low, high, xtol=1e-12, rtol=1e-10))


def _share_above(means: FloatArray, weight: FloatArray, end: float) -> float:
    """The probability that the random mean of `bounded_mean_interval` lies above an end."""
    # Weights that differ make the groups worth fewer: with their mean for the group that was not seen, intervals of
    # nominally 95 % held .91.
    extra = float(weight @ weight) / float(weight.sum())
    return _exponential_sum_is_positive(np.append(weight * (means - end), extra * (1 - end)))


def _exponential_sum_is_positive(terms: FloatArray) -> float:
    """P(sum_i a_i E_i > 0) for independent exponential E, through the saddlepoint of their generating function."""
    if terms.min() >= 0:
        return float(terms.max() > 0)
    if terms.max() <= 1e-14 * float(np.abs(terms).sum()):
        return 0.0
    sizes, times = np.unique(terms / terms.max(), return_counts=True)
    if sizes.size > _DISTINCT:
        # neighbours in order as well as in size: weights may differ a thousandfold
        steps = np.linspace(sizes[0], sizes[-1], _DISTINCT // 2)
        first = np.arange(0, sizes.size, -(-2 * sizes.size // _DISTINCT))
        first = np.union1d(first, np.searchsorted(sizes, steps))
        sums, times = np.add.reduceat(sizes * times, first), np.add.reduceat(times, first)
        sizes = sums / times

    def slope(s: float) -> float:
        return float(times @ (sizes / (1 - sizes * s))) - 1 / s

    total = float(times @ np.abs(sizes))  # beyond these ends a pole of the slope outweighs all the rest
    saddle = float(optimize.brentq(slope, 1 / (2 * total + 2), 1 - 1 / (2 * total + 4), xtol=1e-300, rtol=1e-3))
    width = 1 / math.sqrt(float(times @ (sizes / (1 - sizes * saddle)) ** 2) + 1 / saddle**2)
    # The line through the saddle does not oscillate, and falls at least as the third power: the trapezium rule in
    # asinh has errors below 1e-9, ten points at a time.
    area = peak = 0.0
    for start in count(step=10):
        place = _STEP * np.arange(start, start + 10)
        line = saddle + 1j * width * np.sinh(place)
        heights = np.exp(-(times @ np.log1p(-sizes[:, None] * line))) / line * np.cosh(place) * width
        peak = peak or float(heights.real[0])  # it falls from the saddle on
        area += float(heights.real.sum()) - (0 if start else peak / 2)
        if abs(heights[-1]) <= 1e-13 * peak:
            break
    return _STEP * area / math.pi
