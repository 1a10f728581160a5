"""Batches of layered graphs as arrays: sampling them, walking them, checking and listing their paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = ["LayeredGraphs", "is_valid_path", "sample_graphs", "valid_paths"]


@dataclass(frozen=True)
class LayeredGraphs:
    """A batch of B layered graphs: a source, L layers of W nodes, a target; names are distinct within a graph.

    The source leads to every node of layer 1, a passable node to every node of the next layer, a passable node of
    layer L to the target. The other nodes are dead ends.

    Args:
        source: `(B,)` names of the sources.
        layers: `(B, L, W)` names of the nodes.
        passable: `(B, L, W)` booleans: which nodes have a way out.
        target: `(B,)` names of the targets.
    """

    source: np.ndarray
    layers: np.ndarray
    passable: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice | np.ndarray) -> LayeredGraphs:
        return LayeredGraphs(self.source[rows], self.layers[rows], self.passable[rows], self.target[rows])

    @property
    def num_wide_layers(self) -> np.ndarray:
        """`(B,)` number of layers with more than one passable node."""
        return (self.passable.sum(-1) > 1).sum(-1)

    @property
    def signal(self) -> np.ndarray:
        """`(B,)` parity of the sum of the names in the layers of even index: the source (layer 0), 2, 4, ...

        For even L these are exactly half of the node positions. A reader of the prompt can compute the bit; a network
        sees a parity of many numbers, the textbook case of what gradient descent does not find.
        """
        total = self.source + self.layers[:, 1::2].sum(axis=(1, 2))
        if self.layers.shape[1] % 2 == 1:
            total = total + self.target  # layer L + 1
        return total % 2

    def walk(self, parity: np.ndarray) -> np.ndarray:
        """Walk from source to target, taking the passable node of the wanted parity where there is a choice.

        Args:
            parity: `(B, L)` wanted parities; read in wide layers only.

        Returns:
            `(B, L + 2)` names of the nodes of each path.
        """
        wide = self.passable.sum(-1, keepdims=True) > 1
        taken = self.passable & (~wide | (self.layers % 2 == parity[..., None]))
        steps = np.take_along_axis(self.layers, taken.argmax(-1)[..., None], axis=-1)[..., 0]
        return np.concatenate([self.source[:, None], steps, self.target[:, None]], axis=1)


def sample_graphs(
    num_wide_layers: np.ndarray,
    signal: np.ndarray,
    *,
    num_layers: int,
    nodes_per_layer: int,
    num_names: int,
    rng: np.random.Generator,
) -> LayeredGraphs:
    """Draw graphs with given numbers of wide layers and given signals, uniformly over all such graphs.

    A wide layer has two passable nodes, one with an even and one with an odd name; every other layer has one.

    Args:
        num_wide_layers: `(B,)` how many layers, at random places, are wide.
        signal: `(B,)` bits that [`LayeredGraphs.signal`] has to come out as.
        num_layers: L.
        nodes_per_layer: W.
        num_names: Names are distinct integers below this number.
        rng: Source of randomness.

    Raises:
        ValueError: When no graph has the wanted signal.
    """
    size = (len(num_wide_layers), num_layers, nodes_per_layer)
    wide = rng.random(size[:2]).argsort(-1).argsort(-1) < num_wide_layers[:, None]
    rank = rng.random(size).argsort(-1).argsort(-1)  # the nodes of rank 0 and, in wide layers, 1 are passable
    graphs = _named(wide, rank, num_names, rng)
    for _ in range(200):
        wrong = np.flatnonzero(graphs.signal != signal)
        if not len(wrong):
            return graphs
        again = _named(wide[wrong], rank[wrong], num_names, rng)
        graphs.source[wrong], graphs.layers[wrong], graphs.target[wrong] = again.source, again.layers, again.target
    raise ValueError(
        f"`num_names`={num_names} leaves graphs of {num_layers} x {nodes_per_layer} nodes with a fixed signal: "
        "no graph of one of the classes exists. Use more names."
    )


def _named(wide: np.ndarray, rank: np.ndarray, num_names: int, rng: np.random.Generator) -> LayeredGraphs:
    """Give the nodes names, uniformly among those with one even and one odd passable node in each wide layer."""
    num_rows, (num_layers, width) = len(wide), rank.shape[1:]
    role = np.full((num_rows, num_layers * width + 2), 2)  # 0: an even name, 1: an odd name, 2: any name
    in_layers = np.where(wide[..., None] & (rank < 2), rank, 2)
    role[:, 1:-1] = in_layers.reshape(num_rows, -1)
    names = np.empty_like(role)
    for count in np.unique(wide.sum(-1)):
        rows = wide.sum(-1) == count
        keys = rng.random((rows.sum(), num_names))
        for parity in (0, 1):
            chosen = 2 * keys[:, parity::2].argsort(-1)[:, :count] + parity
            names[rows[:, None] & (role == parity)] = chosen.ravel()
            np.put_along_axis(keys, chosen, np.inf, axis=-1)
        rest = keys.argsort(-1)[:, : role.shape[1] - 2 * count]
        names[rows[:, None] & (role == 2)] = rest.ravel()
    layers = names[:, 1:-1].reshape(rank.shape).copy()
    passable = rank <= wide[..., None]
    return LayeredGraphs(names[:, 0].copy(), layers, passable, names[:, -1].copy())


def is_valid_path(graphs: LayeredGraphs, paths: np.ndarray) -> np.ndarray:
    """Check whether each path leads from source to target through passable nodes.

    Args:
        graphs: B graphs.
        paths: `(B, L + 2)` integers; anything that is no node's name makes the path invalid.

    Returns:
        `(B,)` booleans.

    Raises:
        ValueError: When `paths` has another shape.
    """
    paths = np.asarray(paths)
    if paths.shape != (expected := (len(graphs), graphs.layers.shape[1] + 2)):
        raise ValueError(f"`paths` must have shape {expected} (one path a graph), got {paths.shape}.")
    inside = (graphs.passable & (graphs.layers == paths[:, 1:-1, None])).any(-1).all(-1)
    return (paths[:, 0] == graphs.source) & inside & (paths[:, -1] == graphs.target)


def valid_paths(graphs: LayeredGraphs) -> Sequence[np.ndarray]:
    """List every valid path of each graph: arrays `(num_paths, L + 2)` in the order of the names in the layers."""
    found = []
    for source, layers, passable, target in zip(graphs.source, graphs.layers, graphs.passable, graphs.target):
        ways_out = [nodes[open_] for nodes, open_ in zip(layers, passable)]
        found.append(np.array([[source, *steps, target] for steps in product(*ways_out)]))
    return found
