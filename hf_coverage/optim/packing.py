"""Batches whose rows hold several sequences: packed, or flattened to need no padding.

Such rows say where a sequence begins: by `position_ids` that start again, by `seq_idx`, or by `cu_seq_lens_q`. A
sequence is then what a row is elsewhere, and its first token is predicted by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["IGNORED", "Sequences", "packed_sequences"]

IGNORED = -100


class Sequences(NamedTuple):
    """S sequences in the rows of a batch.

    Attributes:
        number: `(B, T)` the sequence of each token, 0 to S - 1, ascending.
        place: `(B, T)` the place of each token in its sequence.
        shape: S, and the length of the longest.
    """

    number: Tensor
    place: Tensor
    shape: tuple[int, int]

    def unpack(self, values: Tensor, fill: float) -> Tensor:
        """Values of tokens `(B, T, ...)` as rows of one sequence each `(S, L, ...)`, padded on the right."""
        rows = values.new_full((*self.shape, *values.shape[2:]), fill)
        number, place = self.number.to(values.device), self.place.to(values.device)
        return rows.index_put((number, place), values)

    def ignore_first(self, labels: Tensor) -> Tensor:
        """Labels `(B, T)`, not shifted, without those of the first tokens."""
        return labels.masked_fill(self.place.to(labels.device) == 0, IGNORED)

    def ignore_last(self, targets: Tensor) -> Tensor:
        """Shifted labels `(B, T)` without what the last token of a sequence would predict: the next one's first."""
        last = pad(self.place[:, 1:] == 0, (0, 1), value=True)
        return targets.masked_fill(last.to(targets.device), IGNORED)

    def labelled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch whose labels stay within their sequences."""
        ignore = {"labels": self.ignore_first, "shift_labels": self.ignore_last}
        return {name: ignore[name](value) if name in ignore else value for name, value in inputs.items()}


def packed_sequences(inputs: Mapping[str, Any]) -> Sequences | None:
    """Find the sequences of a batch whose rows hold several.

    Args:
        inputs: A batch, as a model takes it.

    Returns:
        The sequences; None where every row is one.

    Raises:
        ValueError: If there is an attention mask over rows of several sequences, which lets each see those before it.

    Example:
        >>> packed_sequences({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}).number
        tensor([[0, 0, 0, 1, 1]])
    """
    first = _first_tokens(inputs)
    if first is None:
        return None
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        first = first & mask.bool()
    if not (first.sum(-1) > 1).any():
        return None
    if mask is not None and mask.ndim == 2:
        raise ValueError(
            "rows hold several sequences, for their `position_ids` start again, but there is an `attention_mask` too, "
            "with which models let each sequence see the ones before it: leave the mask out, as "
            "`DataCollatorWithFlattening` and TRL's `padding_free=True` do, or give every sequence a row."
        )
    number = first.flatten().cumsum(0).view(first.shape) - 1
    column = torch.arange(first.shape[1], device=first.device).expand_as(first)
    place = column - torch.where(first, column, 0).cummax(-1).values
    return Sequences(number, place, (int(number[-1, -1]) + 1, int(place.max()) + 1))


def _first_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """`(B, T)`, where sequences begin, the beginnings of rows among them; None where the batch does not say."""
    positions, numbers, ends = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if positions is not None:
        if positions.ndim == 3:  # one row of positions for each axis of an image, time first
            positions = positions[0]
        # Left of a row's first token, padding has any position; it has no labels either.
        again = (positions[:, 1:] == 0) | (positions[:, 1:] < positions[:, :-1])
    elif numbers is not None:
        again = numbers[:, 1:] != numbers[:, :-1]
    elif ends is not None:
        ids = next(inputs[name] for name in ("input_ids", "inputs_embeds", "labels") if name in inputs)
        again = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
        again.view(-1)[ends[:-1].long().to(ids.device)] = True
        again = again[:, 1:]
    else:
        return None
    return pad(again, (1, 0), value=True)
