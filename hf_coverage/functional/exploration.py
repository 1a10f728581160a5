"""What is new in a response, by its features: the elliptical bonus, and the greedy choice of k responses by it.

With `S = lambda I + sum_j f_j f_j^T` over the responses seen, `f^T S^-1 f` is large where f points away from all of
them. Neither S nor its inverse is ever formed: features may have more dimensions than there are responses.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import FloatArray

__all__ = ["elliptical_bonus", "elliptical_selection", "sparse_projection"]

_TIED = 1e-9
"""Relative difference of two bonuses that rounding may make."""


def elliptical_bonus(features: ArrayLike, seen: ArrayLike | None = None, *, lam: float = 1.0) -> FloatArray:
    """How new each response is beside those seen: `f_i^T (lambda I + sum_j f_j f_j^T)^-1 f_i`.

    Among the responses seen themselves the bonus lies in [0, 1]: it is 1 for a response with a direction to itself and
    1/m for one of m alike, where lambda is small beside their squared norms, and the bonuses add up to the effective
    number of different responses.

    Args:
        features: `(R, d)` finite, one response a row.
        seen: `(M, d)` the responses j that S sums over; None: `features` themselves.
        lam: lambda > 0, in the units of a squared feature norm.

    Returns:
        `(R,)` non-negative; at most 1 without `seen`, at most `||f_i||^2 / lambda` with it.

    Raises:
        ValueError: If lambda is not positive, a shape is another one, or a number is not finite; names the row.

    Example:
        >>> elliptical_bonus([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]]).round(3).tolist()
        [0.474, 0.474, 0.5]
        >>> elliptical_bonus([[3.0, 0.0], [0.0, 1.0]], seen=[[3.0, 0.0]]).round(3).tolist()
        [0.9, 1.0]

    References:
        arXiv 2510.11686, Section 3.
    """
    penalty = _positive(lam)
    rows = _features(features, "features")
    others = rows if seen is None else _features(seen, "seen", rows.shape[1])
    _, singular, directions = np.linalg.svd(others, full_matrices=False)
    along = rows @ directions.T
    # The part outside of what was seen by its own vector: as a difference of squared norms it would cancel.
    outside = np.square(rows - along @ directions).sum(axis=1) if seen is not None else 0.0
    return np.square(along) @ (1 / (singular**2 + penalty)) + outside / penalty


def elliptical_selection(features: ArrayLike, k: int | None = None, *, lam: float = 1.0) -> NDArray[np.int64]:
    """Choose k of M responses that differ most: greedily the largest bonus beside those already chosen.

    The first has the largest norm, since S begins at lambda I. A smaller k gives the beginning of the same list. Ties,
    which are bonuses equal to a relative 1e-9, go to the earlier row.

    Args:
        features: `(M, d)` finite, one response a row.
        k: How many to choose, at most M; None: all, as an order.
        lam: lambda > 0, in the units of a squared feature norm.

    Returns:
        `(k,)` rows in the order of their choice.

    Raises:
        ValueError: If k is not between 1 and M, or as for `elliptical_bonus`.

    Example:
        >>> elliptical_selection([[3.0, 0.0], [2.9, 0.1], [0.0, 1.0]], k=2).tolist()
        [0, 2]

    References:
        arXiv 2510.11686, Section 3.
    """
    penalty = _positive(lam)
    rows = _features(features, "features")
    count = len(rows) if k is None else k
    if not 1 <= count <= len(rows):
        raise ValueError(f"`k` must be between 1 and the number of responses, {len(rows)}, but is {k}.")
    # S^-1 = T^T T with T = I / sqrt(lambda) in the beginning, and here are the T f. Where g = T f is chosen, the
    # rank-one update of S^-1 is T <- (I + g g^T)^(-1/2) T: a bonus is always a squared norm, and cannot cancel.
    whitened = rows / math.sqrt(penalty)
    chosen: list[int] = []
    free = np.ones(len(rows), dtype=bool)
    for _ in range(count):
        bonus = np.where(free, np.square(whitened).sum(axis=1), -1.0)
        best = int(np.flatnonzero(bonus >= bonus.max() * (1 - _TIED))[0])
        chosen.append(best)
        free[best] = False
        whitened -= np.outer(whitened @ whitened[best], _shrinkage(bonus[best]) * whitened[best])
    return np.array(chosen, dtype=np.int64)


def sparse_projection(size: int, dim: int, *, seed: int = 0) -> FloatArray:
    """A sparse random matrix R whose projection `f R` keeps squared norms and angles on average.

    An entry is `+-(q dim)^(-1/2)` with probability q/2 each and 0 otherwise, q = size^(-1/2).

    Args:
        size: Dimensions of the features.
        dim: Dimensions to project to.
        seed: Of its random numbers; the same matrix on every machine.

    Returns:
        `(size, dim)`.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> matrix = sparse_projection(400, 100)
        >>> round(float((matrix != 0).mean()), 2), round(float(np.square(matrix).sum(axis=1).mean()), 2)
        (0.05, 1.0)

    References:
        Li, Hastie and Church (2006), "Very sparse random projections"; arXiv 2510.11686, Section 3.
    """
    if size < 1 or dim < 1:
        raise ValueError(f"`size` and `dim` must be at least 1, got {size} and {dim}.")
    density = size**-0.5
    uniform = np.random.default_rng(seed).random((size, dim))
    signs = (uniform < density / 2).astype(np.float64) - (uniform >= 1 - density / 2)
    return signs / math.sqrt(density * dim)


def _shrinkage(bonus: float) -> float:
    """The alpha of `(I + g g^T)^(-1/2) = I - alpha g g^T` for `||g||^2 = bonus`."""
    root = math.sqrt(1 + bonus)
    return 1 / (root * (1 + root))


def _positive(lam: float) -> float:
    if not 0 < lam < math.inf:
        raise ValueError(f"`lam` must be a finite number above 0, the lambda of lambda I, but is {lam}.")
    return float(lam)


def _features(values: ArrayLike, name: str, size: int | None = None) -> FloatArray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or size not in (None, table.shape[1]):
        wanted = "d" if size is None else size
        raise ValueError(f"`{name}` must have shape (responses, {wanted}), none of them 0, but has {table.shape}.")
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if bad.size:
        raise ValueError(f"`{name}` must be finite, but row {bad[0]} is not: a model gave NaN or an infinite number.")
    return table
