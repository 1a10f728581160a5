"""Fine-tuning of the last layers alone, a few times cheaper: what lies below never changes and is read once a row.

The layers below give each row its hidden states, which are kept; the model then runs from there, on `inputs_embeds`.
Its modules keep their names, so that a checkpoint's adapter fits the whole model as it came.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_coverage.functional.checks import FloatArray
from hf_coverage.inference.encoded_rows import EncodedCorpus
from recipes.reasoning.collator import AnswerCollator, Row

__all__ = ["LayersBelow", "TopCollator", "answer_logprobs"]

BATCH = 16
"""Rows at once."""


class LayersBelow:
    """The layers of a model below its last few, taken out of it, and the hidden states that they gave.

    Args:
        model: One whose layers are at `model.model.layers`, as Llama's are. Those below then pass on what they get.
        layers: How many of its last layers stay in it.
    """

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        body = model.model
        below = len(body.layers) - layers
        if not 0 < below < len(body.layers):
            raise ValueError(f"`layers` must be from 1 to {len(body.layers) - 1}, but is {layers}.")
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = below
        with torch.device("meta"):  # its modules are the model's own
            self._body = type(body)(config)
        self._body.embed_tokens, self._body.rotary_emb = body.embed_tokens, body.rotary_emb
        self._body.layers, self._body.norm = nn.ModuleList(body.layers[:below]), nn.Identity()
        self._body.requires_grad_(False).eval()
        for index in range(below):
            body.layers[index] = _Passed()
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> None:
        """Compute the hidden states of rows in batches of about one length; those that are known stay."""
        new = sorted({(*prompt, *answer) for prompt, answer in rows} - self._known.keys(), key=len)
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            ids = torch.zeros(len(part), len(part[-1]), dtype=torch.long)
            for row, tokens in zip(ids, part):
                row[: len(tokens)] = torch.tensor(tokens)  # no token sees the padding right of it
            hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
            self._known |= {tokens: row[: len(tokens)].clone() for tokens, row in zip(part, hidden)}

    def hidden(self, row: Row) -> Tensor:
        """Hidden states of a row, `(T, d)`."""
        prompt, answer = row
        key = (*prompt, *answer)
        if key not in self._known:
            self.read([row])
        return self._known[key]


class TopCollator(AnswerCollator):
    """Batches that begin above the layers below."""

    def __init__(self, pad_token_id: int, below: LayersBelow) -> None:
        super().__init__(pad_token_id)
        self._below = below

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Pad prompts and answers to one batch of hidden states."""
        batch = super().__call__(rows)
        hidden = [self._below.hidden(row) for row in rows]
        states = torch.zeros(*batch.pop("input_ids").shape, hidden[0].shape[1])
        for padded, values in zip(states, hidden):
            padded[len(padded) - len(values) :] = values
        return batch | {"inputs_embeds": states}


@torch.no_grad()
def answer_logprobs(model: nn.Module, encoded: EncodedCorpus, collate: AnswerCollator) -> FloatArray:
    """Log p of each row's answer, `(R,)` nats, from the batches that a model is trained on."""
    was_training = model.training
    model.eval()
    rows, found = list(zip(encoded.prompts, encoded.completions)), np.empty(len(encoded))
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    for start in range(0, len(rows), BATCH):
        part = order[start : start + BATCH]
        batch = collate([rows[index] for index in part])
        labels = batch.pop("labels")[:, 1:]
        logprobs = model(**batch).logits[:, :-1].double().log_softmax(dim=-1)
        chosen = logprobs.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        found[part] = chosen.where(labels >= 0, 0.0).sum(dim=1).numpy()
    model.train(was_training)
    return found


class _Passed(nn.Module):
    """What stands in for a layer whose work has been done."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states
