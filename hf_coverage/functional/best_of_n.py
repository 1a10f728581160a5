"""What Best-of-N gets out of k sampled responses, without bias: all N up to k at once where they are independent.

All N of k independent responses are equally likely to be the ones that Best-of-N drew, so that estimates are means
over all `C(k, N)` subsets, computed without going through them. Stratified responses are not: those that stand
together in a block belong together.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import FloatArray

__all__ = ["best_of_blocks", "best_of_n_reward", "pass_at_n"]


def pass_at_n(solved: ArrayLike, *, k: int | None = None) -> FloatArray:
    """Unbiased Pass@N of each prompt for all N: `1 - C(k - c, N) / C(k, N)` with c of k responses right.

    The quotient is the product `prod_{i<N} (k - c - i) / (k - i)` of numbers in [0, 1]: nothing overflows or cancels.

    Args:
        solved: `(P, k)` booleans, or `(P,)` numbers c of right responses.
        k: Responses to each prompt; needed with numbers, and only there.

    Returns:
        `(P, k)`; column N - 1 holds Pass@N.

    Raises:
        TypeError: If `solved` holds neither booleans nor integers.
        ValueError: If its shape is another one, or a number is not between 0 and k; names the row.

    Example:
        >>> pass_at_n([[True, False, False], [True, True, False]]).round(3).tolist()
        [[0.333, 0.667, 1.0], [0.667, 1.0, 1.0]]
        >>> pass_at_n([0, 1], k=2).mean(axis=0).tolist()
        [0.25, 0.5]

    References:
        arXiv 2107.03374, Section 2.1.
    """
    counts, size = _counts(np.asarray(solved), k)
    steps = np.arange(size)
    return 1.0 - np.cumprod(np.maximum(size - counts[:, None] - steps, 0) / (size - steps), axis=1)


def best_of_n_reward(rewards: ArrayLike, *, proxy: ArrayLike | None = None) -> FloatArray:
    """Unbiased reward of Best-of-N for each prompt and all N: the mean over all subsets of N of the k responses.

    With responses in ascending order of reward, the j-th is the best of a subset with probability
    `C(j - 1, N - 1) / C(k, N)`.

    Args:
        rewards: `(P, k)` finite rewards, what a response is worth.
        proxy: `(P, k)` finite scores that the choice is made by, for instance a reward model's where `rewards` are a
            verifier's; ties are broken at random. None: by the rewards themselves.

    Returns:
        `(P, k)`; column N - 1 holds the expected reward of the response that is chosen from N.

    Raises:
        ValueError: If a reward is NaN or infinite, or the shapes differ; names row and column.

    Example:
        >>> best_of_n_reward([[0.0, 1.0, 5.0]]).round(3).tolist()
        [[2.0, 3.667, 5.0]]
        >>> best_of_n_reward([[0.0, 1.0, 5.0]], proxy=[[3.0, 2.0, 1.0]]).round(3).tolist()
        [[2.0, 0.333, 0.0]]
    """
    table = _finite_table(rewards, "rewards")
    if proxy is None:
        ordered = np.sort(table, axis=1)
    else:
        scores = _finite_table(proxy, "proxy")
        if scores.shape != table.shape:
            raise ValueError(f"`proxy` must have the shape of `rewards`, {table.shape}, but has {scores.shape}.")
        order = np.argsort(scores, axis=1, kind="stable")
        ordered = _mean_within_ties(
            np.take_along_axis(table, order, axis=1), np.take_along_axis(scores, order, axis=1)
        )
    return ordered @ _subset_best_probabilities(table.shape[1]).T


def best_of_blocks(rewards: ArrayLike, n: int) -> FloatArray:
    """Unbiased reward of the best of N stratified responses to each prompt: the mean over aligned blocks of N.

        mean_b max(rewards[b N], ..., rewards[b N + N - 1])

    Every aligned block of 2^m nested codes is stratified like the first one. Blocks that are not whole do not count.

    Args:
        rewards: `(P, k)` finite rewards of nested responses, in the order of their numbers; for Pass@N, which of them
            are right.
        n: N, a power of two up to k, or k itself.

    Returns:
        `(P,)`.

    Raises:
        ValueError: If a reward is NaN or infinite, or `n` is another number.

    Example:
        >>> best_of_blocks([[0.0, 1.0, 5.0, 2.0, 3.0]], n=2).tolist()
        [3.0]
    """
    table = _finite_table(rewards, "rewards")
    k = table.shape[1]
    if n != int(n) or not 1 <= n <= k or (n != k and int(n) & (int(n) - 1)):
        raise ValueError(
            f"`n` must be a power of two up to k = {k}, or k itself, as stratified responses count in aligned blocks, "
            f"got {n}; the means over all subsets are for independent ones."
        )
    size = int(n)
    return table[:, : k // size * size].reshape(len(table), -1, size).max(axis=2).mean(axis=1)


def _counts(solved: NDArray[Any], k: int | None) -> tuple[NDArray[np.int64], int]:
    if solved.dtype == bool and solved.ndim == 2 and k is None and solved.size:
        return solved.sum(axis=1), solved.shape[1]
    if solved.dtype == bool or k is None:
        raise ValueError(
            "`solved` must be a (prompts, k) table of booleans, or (prompts,) numbers with `k` beside them, but has "
            f"shape {solved.shape} and `k` is {k}."
        )
    if not np.issubdtype(solved.dtype, np.integer):
        raise TypeError(f"`solved` must hold booleans or integers, but holds {solved.dtype}; compare rewards first.")
    if solved.ndim != 1 or not solved.size or k < 1:
        raise ValueError(
            f"`solved` must be a non-empty 1-d sequence of numbers with `k` at least 1, but has shape {solved.shape} "
            f"and `k` is {k}."
        )
    bad = np.flatnonzero((solved < 0) | (solved > k))
    if bad.size:
        raise ValueError(f"`solved` must be between 0 and `k` = {k}, but row {bad[0]} is {solved[bad[0]]}.")
    return solved.astype(np.int64), k


def _finite_table(values: ArrayLike, name: str) -> FloatArray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"`{name}` must have shape (prompts, k), none of them 0, but has shape {table.shape}.")
    bad = np.argwhere(~np.isfinite(table))
    if bad.size:
        row, column = bad[0]
        raise ValueError(
            f"`{name}` must be finite, but row {row}, column {column} is {table[row, column]}: give a response that "
            "could not be judged the reward that it is to count with."
        )
    return table


def _subset_best_probabilities(k: int) -> FloatArray:
    """`(k, k)`: the probability that the j-th smallest of k is the largest of a random subset of N; row N - 1."""
    ranks, sizes = np.arange(1, k + 1), np.arange(1, k)
    # C(j - 1, N - 1) / C(k, N) = N / k * prod_{0 < i < N} (j - i) / (k - i)
    factors = np.maximum(ranks - sizes[:, None], 0) / (k - sizes[:, None])
    return ranks[:, None] / k * np.cumprod(np.vstack([np.ones(k), factors]), axis=0)


def _mean_within_ties(values: FloatArray, scores: FloatArray) -> FloatArray:
    """Rows of `values` with the entries whose ascending `scores` are equal replaced by their mean."""
    starts = np.ones(scores.shape, dtype=bool)
    starts[:, 1:] = scores[:, 1:] != scores[:, :-1]
    block = np.cumsum(starts.ravel()) - 1
    means = np.bincount(block, weights=values.ravel()) / np.bincount(block)
    return means[block].reshape(values.shape)
