"""What counts as a log-probability, a log ratio and an N, and how N is written in a metric's name."""

import math
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ROUNDING",
    "TIE_TOLERANCE",
    "FloatArray",
    "IntArray",
    "ReferenceKind",
    "check_confidence",
    "check_count",
    "check_log_ratios",
    "check_logprobs",
    "check_n",
    "check_regret",
    "coverage_key",
    "metric_key",
    "miss_key",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ReferenceKind = Literal["density", "single_answer", "samples", "answer"]
"""What is known of the reference D: its density, that it has one right answer, samples only, or answer densities."""

TIE_TOLERANCE = 2e-6
"""A log ratio this close below log N (nats) counts as reached: rounding must not decide a tie. It is what the rounding
of two log-probabilities down to -32 nats comes to in float32, which models compute and tables hold."""

ROUNDING = 1e-6
"""A log-probability this far above 0 (nats) is float32 rounding of probability one; more is an error."""


def check_logprobs(values: ArrayLike, *, name: str = "logprobs", allow_minus_infinity: bool = True) -> FloatArray:
    """Return log-probabilities as float64 after checking that they can be log-probabilities.

    Args:
        values: `(R,)` nats.
        name: The argument's name, for the error.
        allow_minus_infinity: Whether probability zero is legal, as it is for a model but not for the reference.

    Returns:
        `(R,)` float64.

    Raises:
        ValueError: On an empty or not one-dimensional input, NaN, a value above 0, or a forbidden -inf; names the row.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must be a non-empty 1-d sequence of log-probabilities, but has shape {array.shape}."
        )
    legal = array <= ROUNDING if allow_minus_infinity else (array <= ROUNDING) & (array > -math.inf)
    if not legal.all():
        row = int(np.flatnonzero(~legal)[0])
        bounds = "<= 0" if allow_minus_infinity else "<= 0 and finite"
        raise ValueError(
            f"`{name}` must hold natural-log probabilities of whole responses ({bounds}), "
            f"but row {row} is {array[row]}. Check that it is a log-probability, in nats, and a sum over tokens."
        )
    return array


def check_log_ratios(values: ArrayLike) -> FloatArray:
    """Return log ratios as float64; NaN and -inf raise ValueError naming the row, +inf (p(y) = 0) is legal."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`log_ratios` must be a non-empty 1-d sequence, but has shape {array.shape}.")
    bad = np.flatnonzero(np.isnan(array) | (array == -math.inf))
    if bad.size:
        raise ValueError(
            f"`log_ratios` must be numbers or +inf, but row {bad[0]} is {array[bad[0]]}: the reference gives a "
            "response it produced itself a probability above 0."
        )
    return array


def check_n(n: float) -> float:
    """Return `n` as a float; ValueError unless it is a finite number >= 1."""
    if not 1 <= n < math.inf:
        raise ValueError(f"`n` must be a finite number >= 1 (the N of Cov_N and Best-of-N), but is {n}.")
    return float(n)


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless `confidence` lies strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1, for example 0.95, but is {confidence}.")


def check_regret(regret: float) -> None:
    """Raise ValueError unless `regret` lies strictly between 0 and 1."""
    if not 0 < regret < 1:
        raise ValueError(f"`regret` must lie strictly between 0 and 1 (rewards are in [0, 1]), but is {regret}.")


def check_count(value: object, name: str, *, least: int = 1) -> None:
    """Raise ValueError unless a value is a whole number and at least `least`.

    Example:
        >>> check_count(float("nan"), "k")
        Traceback (most recent call last):
        ValueError: `k` must be a whole number, at least 1, got nan.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, at least {least}, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def metric_key(n: float) -> str:
    """N as metric names write it: `2`, `5.7`.

    Example:
        >>> metric_key(16), metric_key(5.7)
        ('16', '5.7')
    """
    return f"{check_n(n):.12g}"


def coverage_key(n: float, *, upper_bound: bool = False) -> str:
    """Name of the metric Cov_N, or of its upper bound where the reference has no density to read.

    Example:
        >>> coverage_key(16), coverage_key(16, upper_bound=True)
        ('cov_16', 'cov_upper_16')
    """
    return ("cov_upper_" if upper_bound else "cov_") + metric_key(n)


def miss_key(n: float, *, upper_bound: bool = False) -> str:
    """Name of the metric miss_N, or of its upper bound where the reference has no density to read.

    Example:
        >>> miss_key(16), miss_key(16, upper_bound=True)
        ('miss_16', 'miss_upper_16')
    """
    return ("miss_upper_" if upper_bound else "miss_") + metric_key(n)
