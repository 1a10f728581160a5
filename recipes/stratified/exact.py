"""Pass@N of right answers whose intervals of arithmetic codes are known, exactly: of independent and other samples."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import FloatArray

__all__ = ["INDEPENDENT", "LATTICE", "STRATIFIED", "exact_passes", "refuse_below"]

INDEPENDENT = "independent"
STRATIFIED = "stratified"
LATTICE = "lattice"

_ROUNDING = 1e-6
"""What rounding of float32 log-probabilities may make of an end of an interval."""


def exact_passes(
    lows: FloatArray, logprobs: FloatArray, n: int, right: NDArray[np.bool_] | None = None
) -> dict[str, FloatArray]:
    """Probability that N samples hold one of several right responses, for three ways to draw them.

    With a_j what the right responses' intervals have of stratum j: `1 - (1 - sum_j a_j)^N` of independent samples,
    `1 - prod_j (1 - N a_j)` of stratified ones. On a lattice all codes follow from one offset u, uniform on [0, 1/N),
    as `u + i/N`: the samples hold a right one where u lies in the union of what the strata have, laid one on another.

    Args:
        lows: Where the intervals begin, `(R, K)`.
        logprobs: The logarithms of their lengths, nats `(R, K)`.
        n: N.
        right: Which of the K responses to a prompt are right `(R, K)`; None: all.

    Returns:
        By way of drawing, `(R,)`.
    """
    lengths = np.exp(logprobs) if right is None else np.where(right, np.exp(logprobs), 0.0)
    begins = lows * n  # strata of length 1
    strata = np.arange(n)
    starts = np.clip(begins[..., None] - strata, 0.0, 1.0)  # (R, K, N)
    ends = np.clip((begins + n * lengths)[..., None] - strata, 0.0, 1.0)
    mass = np.minimum(lengths.sum(axis=1), 1.0)
    shares = np.minimum((ends - starts).sum(axis=1), 1.0)
    return {
        INDEPENDENT: 1 - (1 - mass) ** n,
        STRATIFIED: 1 - np.prod(1 - shares, axis=1),
        LATTICE: _union(starts.reshape(len(starts), -1), ends.reshape(len(ends), -1)),
    }


def refuse_below(passes: Mapping[str, FloatArray], what: str) -> None:
    """Raise AssertionError where stratified samples pass less than independent ones, for any prompt (Theorem S)."""
    short = passes[INDEPENDENT] - passes[STRATIFIED]
    if not short.max() <= _ROUNDING:  # NaN is refused too
        raise AssertionError(
            f"Stratified samples must pass no less than independent ones, but {what} they pass {short.max():.3g} less "
            f"for prompt {int(short.argmax())}: the intervals or the formula are wrong."
        )


def _union(starts: FloatArray, ends: FloatArray) -> FloatArray:
    """How much intervals `(R, M)` cover together."""
    order = starts.argsort(axis=1)
    starts, ends = np.take_along_axis(starts, order, axis=1), np.take_along_axis(ends, order, axis=1)
    covered = np.maximum.accumulate(ends, axis=1)
    before = np.concatenate([np.zeros_like(covered[:, :1]), covered[:, :-1]], axis=1)
    return np.maximum(ends - np.maximum(starts, before), 0.0).sum(axis=1)
