"""Batches of prompts and answers to train on: the loss is on the answers alone."""

from typing import Any

import torch

__all__ = ["AnswerCollator", "Row"]

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


class AnswerCollator:
    """Batches in which all answers end together, so that logits are computed for the answers alone."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Pad prompts and answers to one batch."""
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        answers = 1 + max(len(answer) for _, answer in rows)  # the model shifts labels by one
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full((len(rows), answers), -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, length - len(prompt) - len(answer) :] = 1
            labels[row, answers - len(answer) :] = torch.tensor(answer)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
            "logits_to_keep": answers,
        }
