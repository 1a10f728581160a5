"""Logarithms of probabilities that are known as means over samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.checks import FloatArray

__all__ = ["log_mean_exp"]


def log_mean_exp(log_values: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Logarithm of a mean of S samples, and its standard error.

        log p = log( 1/S sum_s exp l_s ),    se(log p) = se(p) / p        (delta method)

    exp(log p) is an unbiased estimate of p. log p itself is too low by about se^2 / 2 in expectation, so a coverage
    made of it errs on the side of too much missing mass.

    Args:
        log_values: `(..., S)` logarithms of the samples, nats; -inf where a sample is 0. S >= 2.

    Returns:
        `(...)` logarithms of the means, and `(...)` their standard errors in nats. Where all samples are 0 they are
        -inf and inf: nothing is known of the relative size of something never seen.

    Raises:
        ValueError: If S < 2, or a value is NaN or +inf.

    Example:
        >>> log_mean, error = log_mean_exp(np.log([[0.25, 0.75], [0.5, 0.5]]))
        >>> np.exp(log_mean), error
        (array([0.5, 0.5]), array([0.5, 0. ]))
    """
    values = np.asarray(log_values, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] < 2:
        raise ValueError(f"`log_values` must hold at least 2 samples in its last axis, got shape {values.shape}.")
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("`log_values` must be finite or -inf, got NaN or +inf.")
    top = values.max(axis=-1)
    shift = np.where(np.isneginf(top), 0.0, top)
    scaled = np.exp(values - shift[..., None])
    mean = scaled.mean(axis=-1)
    standard_error = scaled.std(axis=-1, ddof=1) / np.sqrt(values.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(mean) + shift, np.where(mean > 0, standard_error / mean, np.inf)
