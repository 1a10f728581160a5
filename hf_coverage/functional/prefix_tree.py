"""A tree of prefixes small enough to go through: what responses are made of, and laws over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import FloatArray

__all__ = ["Prefix", "PrefixTree", "check_values", "leaf_law", "leaf_target", "total_variation"]

Prefix = tuple[int, ...]
"""The tokens of a response so far."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A tree of prefixes that is small enough to go through; parents stand before their children.

    Attributes:
        prefixes: S prefixes, the root `()` first.
        parents: `(S,)` index of each one's parent; -1 for the root.
        logprobs: `(S,)` log p(last token | parent), nats; 0 for the root.
        values: `(S,)` V.
    """

    prefixes: tuple[Prefix, ...]
    parents: NDArray[np.int64]
    logprobs: FloatArray
    values: FloatArray

    @classmethod
    def grow(
        cls, children: Callable[[Prefix], Sequence[tuple[int, float]]], value: Callable[[Prefix], float]
    ) -> "PrefixTree":
        """Go through all prefixes from the root.

        Args:
            children: The next tokens of a prefix with their log-probabilities (nats); none at a leaf.
            value: V.

        Raises:
            ValueError: If a value is negative or not finite.

        Example:
            >>> bits = [(0, np.log(0.5)), (1, np.log(0.5))]
            >>> tree = PrefixTree.grow(lambda y: bits if len(y) < 2 else [], lambda y: 1.0 + sum(y))
            >>> leaf_target(tree).round(3).tolist()
            [0.0, 0.0, 0.0, 0.125, 0.25, 0.25, 0.375]
        """
        prefixes: list[Prefix] = [()]
        parents, logprobs = [-1], [0.0]
        for index, prefix in enumerate(prefixes):  # grows while it is gone through
            for token, logprob in children(prefix):
                prefixes.append((*prefix, token))
                parents.append(index)
                logprobs.append(logprob)
        values = check_values([value(prefix) for prefix in prefixes], "value")
        return cls(tuple(prefixes), np.array(parents), np.array(logprobs), values)

    def __len__(self) -> int:
        return len(self.prefixes)

    @property
    def is_leaf(self) -> NDArray[np.bool_]:
        """`(S,)` which prefixes have no children."""
        leaf = np.ones(len(self), dtype=bool)
        leaf[self.parents[1:]] = False
        return leaf

    @property
    def path_logprobs(self) -> FloatArray:
        """`(S,)` log p(y) of whole prefixes, nats."""
        total = self.logprobs.copy()
        for node in range(1, len(self)):
            total[node] += total[self.parents[node]]
        return total

    @property
    def reachable(self) -> NDArray[np.bool_]:
        """`(S,)` where a walk from the root can come to: a value of 0 cuts off all that follows it."""
        open_ = (self.values > 0) & (self.logprobs > -np.inf)
        open_[0] = True
        for node in range(1, len(self)):
            open_[node] &= open_[self.parents[node]]
        return open_


def leaf_target(tree: PrefixTree) -> FloatArray:
    """`(S,)` the law p(y) V(y), normalised over the leaves.

    Raises:
        ValueError: If no leaf has a value above 0.
    """
    weights = np.where(tree.is_leaf, np.exp(tree.path_logprobs) * tree.values, 0.0)
    return leaf_law(weights, "no leaf has a value above 0")


def total_variation(first: ArrayLike, second: ArrayLike) -> float:
    """Half the sum of absolute differences of two laws `(S,)`.

    Example:
        >>> total_variation([0.5, 0.5, 0.0], [0.25, 0.5, 0.25])
        0.25
    """
    return float(np.abs(np.subtract(first, second)).sum() / 2)


def leaf_law(weights: FloatArray, problem: str) -> FloatArray:
    """Normalise weights of leaves `(S,)`; ValueError saying `problem` where there is nothing to normalise."""
    if not weights.sum() > 0:
        raise ValueError(f"There is no law of leaves: {problem}.")
    return weights / weights.sum()


def check_values(values: ArrayLike, name: str) -> FloatArray:
    """Return values of prefixes as float64; ValueError unless all are finite and at least 0."""
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~((array >= 0) & (array < np.inf)))
    if bad.size:
        raise ValueError(f"`{name}` must be finite and at least 0, but number {bad[0]} is {array.flat[bad[0]]}.")
    return array
