"""The random walk of value-guided backtracking (VGB) on a tree of prefixes: its transitions, and what it samples.

A prefix y has a parent, children y v with log-probabilities log p(v | y), and a value V(y) >= 0 that a process
verifier gives it. The walk may go back, so errors of V at inner prefixes do not change where among the leaves it ends
up: in proportion to p(y) V(y). Sampling forward by p V, which is what guidance does, multiplies the errors up.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import splu

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.prefix_tree import PrefixTree, check_values, leaf_law

__all__ = [
    "Judged",
    "guided_law",
    "guided_probabilities",
    "metropolis_acceptance",
    "output_law",
    "stationary_law",
    "transition_matrix",
    "visit_law",
    "walk_probabilities",
]

Judged = Literal["all", "one"]
"""Which children a move judges: all of them, as VGB does, or one that is drawn from p (Metropolis)."""


def walk_probabilities(
    child_logprobs: ArrayLike, child_values: ArrayLike, value: float, *, has_parent: bool = True, laziness: float = 0.5
) -> FloatArray:
    """Where the walk goes from a prefix y.

    It stays with probability `laziness`; else it goes to the parent with weight V(y) or to the child v with weight
    p(v | y) V(y v), normalised. Where all weights are 0 it stays.

    Args:
        child_logprobs: `(A,)` log p(v | y), nats; empty at a leaf.
        child_values: `(A,)` V(y v).
        value: V(y); not used at the root.
        has_parent: Whether y is not the root.
        laziness: Probability of staying.

    Returns:
        `(2 + A,)` probabilities of staying, of the parent, and of each child.

    Raises:
        ValueError: If a value is negative or not finite, the shapes differ, or `laziness` is not in [0, 1).

    Example:
        >>> walk_probabilities(np.log([0.5, 0.5]), [1.0, 2.0], 1.5).round(3).tolist()
        [0.5, 0.25, 0.083, 0.167]

    References:
        arXiv 2510.03149, Algorithm 1.
    """
    weights = _child_weights(child_logprobs, child_values)
    back = check_values([value], "value")[0] if has_parent else 0.0
    _check_laziness(laziness)
    largest = max(back, float(np.max(weights, initial=0.0)))
    if largest == 0:
        return np.concatenate([[1.0, 0.0], np.zeros_like(weights)])
    moves = np.concatenate([[back], weights]) / largest  # values may be near the smallest float there is
    return np.concatenate([[laziness], (1 - laziness) * moves / moves.sum()])


def guided_probabilities(child_logprobs: ArrayLike, child_values: ArrayLike) -> FloatArray:
    """Action-level guidance, which never goes back: the child v with probability proportional to p(v | y) V(y v).

    Args:
        child_logprobs: `(A,)` log p(v | y), nats.
        child_values: `(A,)` V(y v).

    Returns:
        `(A,)` probabilities; all 0 where every child has the value 0: a dead end.

    Example:
        >>> guided_probabilities(np.log([0.5, 0.5]), [1.0, 3.0]).tolist()
        [0.25, 0.75]
    """
    weights = _child_weights(child_logprobs, child_values)
    largest = float(np.max(weights, initial=0.0))
    return weights if largest == 0 else weights / largest / (weights / largest).sum()


def metropolis_acceptance(value: float, proposed: float) -> float:
    """Probability min(1, V(proposed) / V(here)) of a move that judges one child only.

    With equal chances it proposes the parent, or a child drawn from p; the walk's stationary law is then p(y) V(y) at
    all prefixes. A child may be a block of many tokens, and none of the others has to be judged.

    Args:
        value: V of where the walk is.
        proposed: V of the parent or child that is proposed.

    Raises:
        ValueError: If a value is negative or not finite.

    Example:
        >>> metropolis_acceptance(0.5, 0.25), metropolis_acceptance(0.5, 0.75)
        (0.5, 1.0)
    """
    here, there = check_values([value, proposed], "value")
    return 1.0 if there >= here else float(there / here)


def transition_matrix(tree: PrefixTree, *, judged: Judged = "all", laziness: float = 0.5) -> csr_matrix:
    """`(S, S)` probabilities of one step of the walk, row to column.

    Args:
        tree: The prefixes.
        judged: "all" is VGB, "one" its Metropolis relative (see `metropolis_acceptance`).
        laziness: Probability of staying.

    References:
        arXiv 2510.03149, Algorithm 1.
    """
    _check_laziness(laziness)
    child, parent = np.arange(1, len(tree)), tree.parents[1:]
    chance, values = np.exp(tree.logprobs[1:]), tree.values
    if judged == "all":
        total = _move_weights(tree)
        safe = np.where(total > 0, total, 1.0)
        down, up = chance * values[child] / safe[parent], values[child] / safe[child]
    else:
        _require_root_value(tree)
        with np.errstate(divide="ignore", invalid="ignore"):
            down = chance * np.nan_to_num(np.minimum(1.0, values[child] / values[parent]), nan=0.0) / 2
            up = np.nan_to_num(np.minimum(1.0, values[parent] / values[child]), nan=0.0) / 2
    rows, columns = np.concatenate([parent, child]), np.concatenate([child, parent])
    moves = csr_matrix(((1 - laziness) * np.concatenate([down, up]), (rows, columns)), shape=(len(tree), len(tree)))
    return (moves + _diagonal(1.0 - np.asarray(moves.sum(axis=1)).ravel())).tocsr()


def stationary_law(tree: PrefixTree, *, judged: Judged = "all") -> FloatArray:
    """`(S,)` what the walk from the root tends to.

    Proportional to p(y) times the sum of the weights at y for VGB, to p(y) V(y) for its relative; so to p(y) V(y)
    at leaves for both, whatever the values of inner prefixes are, as long as none that matters is 0.

    Args:
        tree: The prefixes.
        judged: See `transition_matrix`.
    """
    if judged == "one":
        _require_root_value(tree)
    weights = _move_weights(tree) if judged == "all" else tree.values
    law = np.where(tree.reachable, np.exp(tree.path_logprobs) * weights, 0.0)
    return np.eye(1, len(tree))[0] if law.sum() == 0 else law / law.sum()


def output_law(
    tree: PrefixTree,
    steps: int,
    *,
    otherwise: Literal["restart", "continue"] = "restart",
    judged: Judged = "all",
    laziness: float = 0.5,
) -> FloatArray:
    """`(S,)` the law of the leaf that comes out after `steps` steps from the root.

    Args:
        tree: The prefixes.
        steps: T.
        otherwise: What happens to a walk that is at no leaf then: "restart" begins anew at the root, and "continue"
            goes on to the next leaf, which does not tend to p V where inner values are wrong: leaves that the
            walk stays away from for long are more often the next one.
        judged: See `transition_matrix`.
        laziness: Probability of staying.

    Raises:
        ValueError: If `steps` is negative, or no leaf is reached.

    Example:
        >>> bits = [(0, np.log(0.5)), (1, np.log(0.5))]
        >>> tree = PrefixTree.grow(lambda y: bits if len(y) < 2 else [], lambda y: 2.0 if y == (1,) else 1.0)
        >>> output_law(tree, 100)[3:].round(3).tolist(), guided_law(tree)[3:].round(3).tolist()
        ([0.25, 0.25, 0.25, 0.25], [0.167, 0.167, 0.333, 0.333])
    """
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}.")
    step = transition_matrix(tree, judged=judged, laziness=laziness)
    backward = step.T.tocsr()
    law = np.eye(1, len(tree))[0]
    for _ in range(steps):
        law = backward @ law
    at_leaf = np.where(tree.is_leaf, law, 0.0)
    if otherwise == "continue":
        at_leaf += _NextLeaf(tree, step).entered(law)
    return leaf_law(at_leaf, f"no leaf is reached in {steps} steps")


def visit_law(tree: PrefixTree, visits: int, *, judged: Judged = "all") -> FloatArray:
    """`(S,)` the law of the leaf that the walk from the root is at for the `visits`-th time.

    It tends to p V, as the walk's own law does, and no restarts are needed: of a stationary walk, the part at leaves
    is stationary. Only moves count; where one child is judged at a time, a refused one leaves the walk where it is
    once more.

    Args:
        tree: The prefixes.
        visits: K; the first leaf that the walk comes to is at 1.
        judged: See `transition_matrix`.

    Raises:
        ValueError: If `visits` is not positive, or no leaf can be reached.

    Example:
        >>> bits = [(0, np.log(0.5)), (1, np.log(0.5))]
        >>> tree = PrefixTree.grow(lambda y: bits if len(y) < 2 else [], lambda y: 2.0 if y == (1,) else 1.0)
        >>> [visit_law(tree, visits)[3:].round(3).tolist() for visits in (1, 2, 4)]
        [[0.214, 0.214, 0.286, 0.286], [0.235, 0.235, 0.265, 0.265], [0.247, 0.247, 0.253, 0.253]]
    """
    if visits < 1:
        raise ValueError(f"`visits` must be at least 1, got {visits}.")
    step = transition_matrix(tree, judged=judged, laziness=0.0)
    next_leaf, stays = _NextLeaf(tree, step), step.diagonal()
    law = next_leaf.entered(np.eye(1, len(tree))[0])
    for _ in range(visits - 1):
        back = np.zeros(len(tree))
        np.add.at(back, tree.parents, law * (1 - stays))  # the root is no leaf, so nothing goes to its parent, -1
        law = law * stays + next_leaf.entered(back)
    return leaf_law(law, "none can be reached")


def guided_law(tree: PrefixTree) -> FloatArray:
    """`(S,)` the law of the leaf that action-level guidance ends at; dead ends begin anew.

    Raises:
        ValueError: If no leaf is reached.
    """
    weights = np.exp(tree.logprobs) * tree.values
    total = np.bincount(tree.parents[1:], weights=weights[1:], minlength=len(tree))
    chance = np.ones(len(tree))
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        chance[node] = chance[parent] * weights[node] / total[parent] if total[parent] > 0 else 0.0
    return leaf_law(np.where(tree.is_leaf, chance, 0.0), "guidance ends in dead ends only")


class _NextLeaf:
    """Where a walk that is at inner prefixes comes to the next leaf."""

    def __init__(self, tree: PrefixTree, step: csr_matrix) -> None:
        leaf, open_ = tree.is_leaf, tree.reachable
        self._leaf, self._backward = leaf, step.T.tocsr()
        # A walk that no leaf is open to goes on for ever.
        self._inner = np.flatnonzero(~leaf & open_) if (leaf & open_).any() else np.array([], dtype=np.int64)
        self._solver = splu((identity(len(self._inner)) - step[self._inner][:, self._inner]).T.tocsc())

    def entered(self, law: FloatArray) -> FloatArray:
        """`(S,)` chances of the leaves, from `(S,)` chances of inner prefixes; those of leaves are left out."""
        visits = np.zeros(len(law))  # expected, of each inner prefix before the next leaf
        visits[self._inner] = self._solver.solve(law[self._inner])
        return np.where(self._leaf, self._backward @ visits, 0.0)


def _move_weights(tree: PrefixTree) -> FloatArray:
    """`(S,)` the sum of the weights of a prefix's parent and children."""
    weights = np.exp(tree.logprobs) * tree.values
    back = np.concatenate([[0.0], tree.values[1:]])
    return back + np.bincount(tree.parents[1:], weights=weights[1:], minlength=len(tree))


def _diagonal(values: FloatArray) -> csr_matrix:
    places = np.arange(len(values))
    return csr_matrix((values, (places, places)))


def _child_weights(child_logprobs: ArrayLike, child_values: ArrayLike) -> FloatArray:
    logprobs, values = np.asarray(child_logprobs, dtype=np.float64), check_values(child_values, "child_values")
    if logprobs.shape != values.shape or logprobs.ndim != 1:
        raise ValueError(
            "`child_logprobs` and `child_values` must be 1-d and of one length, but have shapes "
            f"{logprobs.shape} and {values.shape}."
        )
    return np.exp(logprobs) * values


def _check_laziness(laziness: float) -> None:
    if not 0 <= laziness < 1:
        raise ValueError(f"`laziness` must be in [0, 1), got {laziness}.")


def _require_root_value(tree: PrefixTree) -> None:
    if tree.values[0] == 0:
        raise ValueError(
            "The root must have a value above 0 where one child is judged at a time: the walk would never come back "
            "to it. Any positive number will do."
        )
