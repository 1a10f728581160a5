"""What a group of samples of one prompt tells a policy gradient: whether there is a signal, and Pass@k as a reward.

GRPO and its kin compare the rewards within a group of g samples of one prompt: where all are equal, nothing is learnt.
With c of k samples accepted, a group drawn from them without replacement is all wrong, all right, or mixed with
probabilities that are unbiased for those of a fresh group, for every g up to k.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from hf_coverage.functional.best_of_n import best_of_n_reward
from hf_coverage.functional.binomial_mixture import check_counts
from hf_coverage.functional.checks import FloatArray

__all__ = ["GroupSignal", "equal_reward_probability", "group_signal", "pass_at_k_rewards"]


class GroupSignal(NamedTuple):
    """Probabilities of what a group of samples of each prompt is, `(P,)` each: they sum to 1.

    Attributes:
        all_wrong: No sample is accepted.
        mixed: Some are and some are not: what a group-relative method can learn from.
        all_right: All samples are accepted.
    """

    all_wrong: FloatArray
    mixed: FloatArray
    all_right: FloatArray


def group_signal(correct: ArrayLike, samples: ArrayLike, group_size: int) -> GroupSignal:
    """Unbiased probabilities that a group is all wrong, mixed, or all right.

        all wrong C(k - c, g) / C(k, g),    all right C(c, g) / C(k, g),    mixed: the rest

    Args:
        correct: `(P,)` accepted samples c of each prompt.
        samples: `(P,)` samples k of each prompt, or one number for all.
        group_size: Samples g in a group.

    Raises:
        ValueError: If a prompt has fewer samples than a group, or counts are no counts; names the row.

    Example:
        >>> [part.round(3).tolist() for part in group_signal([0, 2, 4], 4, 2)]
        [[1.0, 0.167, 0.0], [0.0, 0.667, 0.0], [0.0, 0.167, 1.0]]
    """
    counts, sizes = check_counts(correct, samples)
    size = _group_size(group_size, int(sizes.min()))
    steps = np.arange(size)
    left = sizes[:, None] - steps
    wrong = np.prod(np.maximum((sizes - counts)[:, None] - steps, 0) / left, axis=1)
    right = np.prod(np.maximum(counts[:, None] - steps, 0) / left, axis=1)
    return GroupSignal(wrong, np.clip(1 - wrong - right, 0.0, 1.0), right)


def equal_reward_probability(rewards: ArrayLike, group_size: int) -> FloatArray:
    """Unbiased probability for each prompt that all rewards of a group are equal, whatever the rewards.

    Args:
        rewards: `(P, k)` finite rewards.
        group_size: Samples g in a group, 1 to k.

    Returns:
        `(P,)`.

    Raises:
        ValueError: If a reward is NaN or infinite, or the group is larger than k.

    Example:
        >>> equal_reward_probability([[0.0, 0.0, 0.5], [1.0, 1.0, 1.0]], 2).round(3).tolist()
        [0.333, 1.0]
    """
    table = np.asarray(rewards, dtype=np.float64)
    best_of_n_reward(table)  # refuses what is no table of rewards
    k = table.shape[1]
    size = _group_size(group_size, k)
    total = special.gammaln(k + 1) - special.gammaln(k - size + 1)
    shares = []
    for row in table:
        _, times = np.unique(row, return_counts=True)
        times = times[times >= size]
        shares.append(np.exp(special.gammaln(times + 1) - special.gammaln(times - size + 1) - total).sum())
    return np.minimum(np.array(shares, dtype=np.float64), 1.0)


def pass_at_k_rewards(rewards: ArrayLike, k: int, *, baseline: bool = True) -> FloatArray:
    """Rewards whose policy gradient is that of the best of k: Pass@k, where rewards are 0 and 1.

    With n samples of a prompt, sample i gets

        k E[max_{j in I} g_j - max_{j in I, j != i} g_j],     I a random k of the n samples, i among them,

    so that the mean over samples of (this times the gradient of their log-probability) is an unbiased gradient of the
    expected best reward of k. The second term does not depend on sample i, changes no expectation and takes most of
    the variance; for k = 1 it is 0 and the rewards stay as they are. A trainer that subtracts the mean of a group and
    divides by its standard deviation scales this gradient by prompt; switch that off where it is to be exact.

    Args:
        rewards: `(P, n)` finite rewards of the samples of each prompt.
        k: Samples that the best is taken of, 1 to n.
        baseline: Whether to subtract the second term.

    Returns:
        `(P, n)`.

    Raises:
        ValueError: If a reward is NaN or infinite, or k is not between 1 and n.

    Example:
        >>> pass_at_k_rewards([[1.0, 0.0, 0.0]], 2).tolist()
        [[2.0, 0.0, 0.0]]
        >>> pass_at_k_rewards([[1.0, 1.0, 0.0]], 2).tolist()
        [[1.0, 1.0, 0.0]]

    References:
        arXiv 2505.15201, Sections 3 and 4 (Pass@k policy optimisation).
    """
    table = np.asarray(rewards, dtype=np.float64)
    best_of_n_reward(table)  # refuses what is no table of rewards
    n = table.shape[1]
    if k != int(k) or not 1 <= k <= n:
        raise ValueError(f"`k` must be a whole number from 1 to the {n} samples of a prompt, got {k}.")
    if k == 1:
        return table.copy()
    order = np.sort(table, axis=1)
    ranks = np.argsort(np.argsort(table, axis=1, kind="stable"), axis=1)
    # the best of k - 1 of the n - 1 others is their j-th smallest with probability C(j - 1, k - 2) / C(n - 1, k - 1)
    others = np.arange(1, n)
    shares = np.exp(_log_choose(others - 1, k - 2) - _log_choose(np.array(n - 1), k - 1))
    found = np.empty_like(table)
    for place in range(n):
        rest = np.take_along_axis(order, others[None] - (others[None] <= ranks[:, [place]]), axis=1)
        gain = np.maximum(table[:, [place]], rest)
        found[:, place] = k * ((gain - rest if baseline else gain) @ shares)
    return found


def _log_choose(n: ArrayLike, k: int) -> FloatArray:
    values = np.asarray(n, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        logs = special.gammaln(values + 1) - special.gammaln(k + 1) - special.gammaln(np.maximum(values - k, 0) + 1)
    return np.where(values >= k, logs, -np.inf)


def _group_size(size: int, samples: int) -> int:
    if size != int(size) or not 1 <= size <= samples:
        raise ValueError(
            f"`group_size` must be a whole number from 1 to the {samples} samples that every prompt has, got {size}."
        )
    return int(size)
