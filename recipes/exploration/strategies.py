"""Ways to choose k of a question's M sampled responses, and how many questions each of them solves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.exploration import elliptical_selection

__all__ = [
    "DISTINCT",
    "LIKELIEST",
    "RANDOM",
    "REP_EXP",
    "Samples",
    "distinct_in_order",
    "distinct_in_random_subsets",
    "likeliest_first",
    "passes_of",
    "rep_exp_orders",
]

RANDOM = "random subset"
DISTINCT = "random, distinct"
LIKELIEST = "likeliest, distinct"
REP_EXP = "RepExp"


@dataclass(frozen=True)
class Samples:
    """M responses to each of P questions.

    Attributes:
        solved: `(P, M)` whether a response is right.
        logprobs: `(P, M)` their log-probabilities, nats.
        labels: `(P, M)` a number that is the same for equal responses to a question, counted from 0.
        features: for each question `(M, d)`.
    """

    solved: NDArray[np.bool_]
    logprobs: FloatArray
    labels: NDArray[np.int64]
    features: Sequence[FloatArray]


def rep_exp_orders(samples: Samples, *, lam: float, center: bool = False) -> NDArray[np.int64]:
    """`(P, M)` all responses of each question in the order that the elliptical bonus chooses them."""
    return np.array(
        [
            elliptical_selection(features - (features.mean(axis=0) if center else 0.0), lam=lam)
            for features in samples.features
        ]
    )


def likeliest_first(samples: Samples) -> NDArray[np.int64]:
    """`(P, M)` different responses by their probability, the likeliest first; after them the repetitions."""
    orders = []
    for labels, logprobs in zip(samples.labels, samples.logprobs):
        repeated = np.ones(len(labels), dtype=bool)
        repeated[np.unique(labels, return_index=True)[1]] = False
        orders.append(np.lexsort((-logprobs, repeated)))
    return np.array(orders)


def passes_of(samples: Samples, orders: dict[str, NDArray[np.int64]]) -> dict[str, FloatArray]:
    """For each strategy `(P, M)`: whether k responses solve a question, or how probably where they are random.

    Args:
        samples: the responses.
        orders: `(P, M)` for each strategy that puts them into an order.
    """
    passes = {RANDOM: pass_at_n(samples.solved), DISTINCT: _distinct_passes(samples)}
    for name, order in orders.items():
        found = np.maximum.accumulate(np.take_along_axis(samples.solved, order, axis=1), axis=1)
        passes[name] = found.astype(np.float64)
    return passes


def distinct_in_order(samples: Samples, order: NDArray[np.int64]) -> FloatArray:
    """`(P, M)` how many different responses the first k are."""
    labels = np.take_along_axis(samples.labels, order, axis=1)
    counts = np.zeros(labels.shape)
    for row, line in enumerate(labels):
        counts[row, np.unique(line, return_index=True)[1]] = 1.0
    return np.cumsum(counts, axis=1)


def distinct_in_random_subsets(samples: Samples) -> FloatArray:
    """`(P, M)` how many different responses a random subset of k holds, in expectation."""
    every = range(int(samples.labels.max()) + 1)
    return sum((pass_at_n(samples.labels == label) for label in every), np.zeros(samples.labels.shape))


def _distinct_passes(samples: Samples) -> FloatArray:
    """Pass@k of k different responses at random; of all, where there are no more than k."""
    passes = np.empty(samples.solved.shape)
    for row, (labels, solved) in enumerate(zip(samples.labels, samples.solved)):
        _, first = np.unique(labels, return_index=True)
        passes[row] = float(solved.any())
        passes[row, : len(first)] = pass_at_n(solved[None, first])[0]
    return passes
