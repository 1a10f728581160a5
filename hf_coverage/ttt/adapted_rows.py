"""Log-probabilities of responses under models of their own, which make a step after each of their tokens.

The steps change what reads the tokens, so that a response is read token by token, as it is when it is decoded.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward_batches import Batch
from hf_coverage.ttt.row_models import RowModels
from hf_coverage.ttt.row_networks import row_network

__all__ = ["RowScorer"]

# A position that a gradient is taken through keeps what all layers made of it; so many plain ones fit in its place.
_GRAPH = 16


class RowScorer:
    """A model that becomes another one along every response; use it inside `inference`.

    Args:
        model: The causal language model.
        config: What makes a step, how, and on which tokens.
        batch_tokens: Token positions that one forward pass without gradients may hold.

    Raises:
        ValueError: If the scope, or the cache that is asked for, does not work with this model.
    """

    def __init__(self, model: nn.Module, config: TTTConfig, *, batch_tokens: int) -> None:
        self._model, self._config = model, config
        self._together = row_network(model, config).shares_passes
        self._positions = batch_tokens if config.cache == "stale" else batch_tokens // _GRAPH

    def plan(self, corpus: EncodedCorpus, rows: range, *, together: bool = True, padding: bool = True) -> list[Batch]:
        """Arrange rows into batches, longest first; responses of a prompt that is followed go on from it in waves.

        Args:
            corpus: Token ids of all rows.
            rows: The rows to score.
            together: Whether the model may read several prompts in one pass.
            padding: Whether these may be of unequal length.

        Returns:
            The batches.
        """
        groups: dict[Hashable, list[int]] = {}
        for row in sorted(rows, key=lambda row: -len(corpus.completions[row])):
            groups.setdefault(tuple(corpus.prompts[row]) if self._config.on_prompt else row, []).append(row)
        batches: list[list[list[int]]] = []
        widest = 0, 0
        for group in sorted(groups.values(), key=lambda group: (-len(corpus.prompts[group[0]]), group[0])):
            own = len(corpus.prompts[group[0]]), len(corpus.completions[group[0]])
            widest = max(widest[0], own[0]), max(widest[1], own[1])
            apart = not (self._together and together) or (widest[0] != own[0] and not padding)
            if not batches or apart or (len(batches[-1]) + 1) * sum(widest) > self._positions:
                batches.append([])
                widest = own
            batches[-1].append(group)
        return [_batch(together) for together in batches]

    def score(self, corpus: EncodedCorpus, batch: Batch) -> NDArray[np.float32]:
        """Score the responses of a batch of `plan`.

        Args:
            corpus: Token ids of all rows.
            batch: The rows.

        Returns:
            `log p_TTT(y_h | x, y_<h)` of all tokens, row after row, nats.
        """
        prompts = [corpus.prompts[row] for row in batch.waves[0]]
        ids, mask = np.zeros((2, len(prompts), max(map(len, prompts))), dtype=np.int64)
        for index, prompt in enumerate(prompts):
            ids[index, -len(prompt) :], mask[index, -len(prompt) :] = prompt, 1
        begun = RowModels(self._model, torch.from_numpy(ids), config=self._config, mask=torch.from_numpy(mask).bool())
        found: list[NDArray[np.float32]] = []
        for index, wave in enumerate(batch.waves):
            last = index == len(batch.waves) - 1 and len(wave) == len(prompts)
            models = begun if last else begun.select(torch.arange(len(wave)))
            found += _follow(models, [corpus.completions[row] for row in wave])
        return np.concatenate(found)


def _batch(groups: list[list[int]]) -> Batch:
    """Rows of some groups; wave after wave has one of each group, as long as there are."""
    groups = sorted(groups, key=lambda group: -len(group))
    waves = tuple(tuple(row for row in wave if row is not None) for wave in zip_longest(*groups))
    return Batch(tuple(chain.from_iterable(waves)), cuts=(), waves=waves)


def _follow(models: RowModels, responses: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Log-probabilities of the tokens of each model's response."""
    lengths = torch.tensor([len(response) for response in responses])
    tokens = torch.zeros(len(responses), int(lengths.max()), dtype=torch.int64)
    for index, response in enumerate(responses):
        tokens[index, : len(response)] = torch.tensor(response)
    columns = []
    for place, chosen in enumerate(tokens.T):
        logits = models.logits()
        columns.append(log_softmax(logits).gather(-1, chosen.to(logits.device)[:, None])[:, 0].float().cpu())
        going_on = lengths > place + 1
        if going_on.any():
            models.step(chosen, active=going_on)
    found = torch.stack(columns, dim=1).numpy()
    return [line[:length] for line, length in zip(found, lengths.tolist())]
