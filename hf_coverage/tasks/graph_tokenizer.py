"""Graphs as prompts: two formats, one token per node and per separator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_coverage.tasks.layered_graphs import LayeredGraphs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PromptFormat", "encode_prompts", "graph_tokenizer", "vocabulary"]

PromptFormat = Literal["paper", "aligned"]

_SPECIALS = ("|", "/", "=", ".", "<pad>", "<unk>")


def vocabulary(num_names: int) -> dict[str, int]:
    """Number the tokens: the name of a node is its own id, separators and specials follow."""
    tokens = [*map(str, range(num_names)), *_SPECIALS]
    return {token: i for i, token in enumerate(tokens)}


def graph_tokenizer(num_names: int) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer of the task; words are separated by single spaces.

    Args:
        num_names: Nodes are named 0 ... `num_names` - 1.

    Example:
        >>> tokenizer = graph_tokenizer(24)
        >>> tokenizer("3 17 | 17 5 / 3 5 =")["input_ids"]
        [3, 17, 24, 17, 5, 25, 3, 5, 26]
        >>> tokenizer.decode([3, 17, 5])
        '3 17 5'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary(num_names), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def encode_prompts(
    graphs: LayeredGraphs, prompt_format: PromptFormat, *, num_names: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Write graphs as token ids.

    Args:
        graphs: B graphs.
        prompt_format: `"paper"`: the edges `u v | u v | ...` in random order, then `/ s t =`.
            `"aligned"`: the edges without separators in the order of the layers, every step between two layers in as
            many slots as a wide layer needs (`.` fills what is left over), closed by `|`; then `/ s t =`. Every
            prompt of the task then has the same length and an edge's place tells its layer.
        num_names: Nodes are named 0 ... `num_names` - 1.
        rng: Shuffles the edges of the paper's format.

    Returns:
        B arrays of token ids.
    """
    tokens = vocabulary(num_names)
    edges, present, block_ends = _edges(graphs, blank=tokens["."])
    slash, bar, equals = (np.full((len(graphs), 1), tokens[token]) for token in "/|=")
    tail = np.concatenate([slash, graphs.source[:, None], graphs.target[:, None], equals], axis=1)
    if prompt_format == "aligned":
        blocks = [block.reshape(len(graphs), -1) for block in np.split(edges, block_ends, axis=1)]
        separated = [part for block in blocks for part in (bar, block)][1:]
        return list(np.concatenate([*separated, tail], axis=1))
    order = np.where(present, rng.random(present.shape), np.inf).argsort(-1)
    shuffled = np.take_along_axis(edges, order[..., None], axis=1)
    bars = np.broadcast_to(bar[:, None], (*order.shape, 1))
    body = np.concatenate([shuffled, bars], axis=-1).reshape(len(graphs), -1)
    ends = 3 * present.sum(-1) - 1  # the last edge has no bar behind it
    return [np.concatenate([row[:end], close]) for row, end, close in zip(body, ends, tail)]


def _edges(graphs: LayeredGraphs, *, blank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All edge slots `(B, E, 2)` by layer, which of them hold an edge `(B, E)`, and where the next layer's begin."""
    num_rows, num_layers, width = graphs.layers.shape
    ways = max(2, graphs.passable.sum(-1).max(initial=0))
    # the passable nodes of each layer first, in the order in which they stand
    order = (~graphs.passable).argsort(-1, kind="stable")[..., :ways]
    heads = np.take_along_axis(graphs.layers, order, axis=-1)
    open_ = np.take_along_axis(graphs.passable, order, axis=-1)
    after = np.concatenate([graphs.layers[:, 1:], np.full((num_rows, 1, width), -1)], axis=1)
    after[:, -1, 0] = graphs.target
    starts = np.broadcast_to(heads[..., None], (num_rows, num_layers, ways, width))
    ends = np.broadcast_to(after[:, :, None], starts.shape)
    present = open_[..., None] & (ends >= 0)
    inner = np.stack([starts, ends], axis=-1)
    keep = np.ones((num_layers, ways, width), dtype=bool)
    keep[-1, :, 1:] = False  # the last layer leads to one node, the target
    first = np.stack([np.broadcast_to(graphs.source[:, None], (num_rows, width)), graphs.layers[:, 0]], axis=-1)
    edges = np.concatenate([first, inner[:, keep]], axis=1)
    present = np.concatenate([np.ones((num_rows, width), dtype=bool), present[:, keep]], axis=1)
    block_ends = width + ways * width * np.arange(num_layers)
    return np.where(present[..., None], edges, blank), present, block_ends
