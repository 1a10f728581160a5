"""Training data of the graph-search task: rows drawn on demand, the same row for the same index for ever."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_coverage.tasks.graph_search import GraphSearch

if TYPE_CHECKING:
    import torch

__all__ = ["GraphSearchDataset", "collate_rows"]

_Row = dict[str, np.ndarray]

# numpy takes the seeds (0,), (0, 0) and (0, 0, 0) for one: without a last word of its own the first block would share
# rows with a corpus
_TRAINING = 0x7472


class GraphSearchDataset:
    """A map-style dataset of token ids and labels, drawn block by block when first read.

    Row i depends on (task, weights, seed, block_rows, i) only, so a resumed run and every process of a distributed
    one see the rows an uninterrupted single process would. They are other rows than a corpus of the same seed holds.
    Only response tokens carry labels.

    Args:
        task: The task.
        weights: Probability of each class.
        num_rows: Number of rows.
        seed: Seed of the rows.
        block_rows: Rows drawn at a time.
        cached_blocks: Blocks kept in memory; `None` keeps all. Two are enough for reading in order.

    Example:
        >>> task = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")
        >>> row = GraphSearchDataset(task, (1.0, 0.0, 0.0), num_rows=10_000_000, seed=0)[5_000_000]
        >>> row["input_ids"].shape, int((row["labels"] != -100).sum())
        ((46,), 6)
    """

    def __init__(
        self,
        task: GraphSearch,
        weights: Sequence[float],
        num_rows: int,
        *,
        seed: int | Sequence[int],
        block_rows: int = 4096,
        cached_blocks: int | None = None,
    ) -> None:
        self._task, self._weights, self._num_rows = task, tuple(weights), num_rows
        self._seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self._block_rows, self._cached_blocks = block_rows, cached_blocks
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> _Row:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of a dataset of {self._num_rows} rows")
        block, place = divmod(int(index), self._block_rows)
        tokens, prompt_sizes, sizes = self._block(block)
        ids = tokens[place, : sizes[place]]
        labels = ids.copy()
        labels[: prompt_sizes[place]] = -100
        return {"input_ids": ids, "labels": labels}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a block's rows, how many of them are the prompt's, and how many there are."""
        if block not in self._blocks:
            rows = self._task.sample(self._block_rows, self._weights, seed=(*self._seed, block, _TRAINING))
            prompt_sizes = np.array(list(map(len, rows.prompts)))
            # int16 holds every id and keeps the paper's 512,000 prompts within 150 MB
            tokens = np.zeros((self._block_rows, self._task.max_tokens), dtype=np.int16)
            for line, prompt, path in zip(tokens, rows.prompts, rows.paths):
                line[: len(prompt)] = prompt
                line[len(prompt) : len(prompt) + len(path)] = path
            self._blocks[block] = tokens, prompt_sizes, prompt_sizes + rows.paths.shape[1]
            if self._cached_blocks is not None and len(self._blocks) > self._cached_blocks:
                self._blocks.popitem(last=False)
        return self._blocks[block]


def collate_rows(rows: Sequence[_Row], *, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Stack rows into a batch of tensors, padded on the right to the longest.

    Args:
        rows: Rows of a [`GraphSearchDataset`].
        pad_token_id: Fills `input_ids`; the padding carries no labels, so any id will do.

    Returns:
        `input_ids`, `labels` and `attention_mask`, each `(B, T)` int64.
    """
    import torch

    fill = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0}
    length = max(len(row["input_ids"]) for row in rows)
    batch = {key: np.full((len(rows), length), value) for key, value in fill.items()}
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][i, :size], batch["labels"][i, :size] = row["input_ids"], row["labels"]
        batch["attention_mask"][i, :size] = 1
    return {key: torch.from_numpy(value) for key, value in batch.items()}
