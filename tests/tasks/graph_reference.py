"""Graphs read back from their prompts, and in one order."""

from collections.abc import Iterable

import numpy as np

from hf_coverage.tasks.graph_tokenizer import vocabulary
from hf_coverage.tasks.layered_graphs import LayeredGraphs


def canonical(graphs: LayeredGraphs) -> LayeredGraphs:
    """The nodes of each layer by name: what a layer's order means nothing for, two equal graphs share."""
    order = graphs.layers.argsort(-1)
    layers, passable = (np.take_along_axis(part, order, axis=-1) for part in (graphs.layers, graphs.passable))
    return LayeredGraphs(graphs.source, layers, passable, graphs.target)


def parse_prompts(prompts: Iterable[np.ndarray], *, num_names: int) -> LayeredGraphs:
    """Graphs from the ids of their prompts, in either format; the nodes of a layer come sorted by name."""
    tokens = vocabulary(num_names)
    parsed = [_parse(np.asarray(prompt).tolist(), tokens) for prompt in prompts]
    return LayeredGraphs(*(np.array(part) for part in zip(*parsed, strict=True)))


def _parse(ids: list[int], tokens: dict[str, int]) -> tuple[int, list[list[int]], list[list[bool]], int]:
    slash = ids.index(tokens["/"])
    source, target, equals = ids[slash + 1 :]
    if equals != tokens["="]:
        raise ValueError("it does not end with `=`")
    ends = [i for i in ids[:slash] if i not in (tokens["|"], tokens["."])]
    successors: dict[int, list[int]] = {}
    for u, v in zip(ends[::2], ends[1::2], strict=True):
        successors.setdefault(u, []).append(v)
    layers, passable = [], []
    layer = sorted(successors[source])
    while layer != [target]:
        layers.append(layer)
        passable.append([node in successors for node in layer])
        layer = sorted({v for node in layer for v in successors.get(node, [])})
        if not layer or len(layers) > len(ends):
            raise ValueError("the target cannot be reached")
    if len({len(layer) for layer in layers}) != 1:
        raise ValueError("its layers differ in size")
    return source, layers, passable, target
