"""Scores of models as they are."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_coverage.functional.logprobs import collision_probability, logsumexp, token_kl
from hf_coverage.measure.batching import Batch
from hf_coverage.measure.corpus import EncodedCorpus
from hf_coverage.measure.forward import HeadOutput
from hf_coverage.measure.passes import BatchPasses

__all__ = ["score_plain"]


def score_plain(
    passes: BatchPasses, corpus: EncodedCorpus, batch: Batch, *, head_statistics: bool
) -> dict[str, NDArray]:
    """Compute the values of a batch's response tokens, row after row in the order of `batch.rows`.

    Args:
        passes: The models.
        corpus: Token ids of all rows.
        batch: The rows.
        head_statistics: Whether the output head's norms and inherent variance are measured.

    Returns:
        One value per token, by column.
    """
    lengths = [len(corpus.completions[row]) for row in batch.rows]
    slots = dict(zip(batch.rows, accumulate(lengths, initial=0)))
    values: dict[str, NDArray] = {}
    for step, outputs in passes.run(corpus, batch, slots, first=passes.positions):
        for start in range(0, len(step.positions), passes.positions):
            chunk = slice(start, start + passes.positions)
            inside = (step.pick >= chunk.start) & (step.pick < chunk.stop)
            pick, labels = step.pick[inside] - chunk.start, step.labels[inside]
            for name, column in _token_values(outputs, chunk, pick, labels, head_statistics).items():
                place = values.setdefault(name, np.empty(sum(lengths), dtype=np.float32))
                place[step.slots[inside]] = column.cpu().numpy()
    return values


def _token_values(
    outputs: list[HeadOutput], chunk: slice, pick: NDArray, labels: NDArray, head_statistics: bool
) -> dict[str, Tensor]:
    """Values of the response tokens that a chunk of one pass's positions predicts, by column."""
    logits = outputs[0].take_logits(chunk)
    rows, tokens = torch.from_numpy(pick).to(logits.device), torch.from_numpy(labels).to(logits.device)
    chosen = logits[rows, tokens]
    values = {"token_logprobs": chosen.float() - logsumexp(logits)[rows]}
    reference = logits  # q of the inherent variance: the teacher's, or else the model's own
    if len(outputs) > 1:
        reference = outputs[1].take_logits(chunk).to(logits.device)
        values["token_kl"] = token_kl(reference, logits)[rows]
    if head_statistics:
        norm = outputs[0].feature_norm(chunk).to(logits.device)[rows]
        collision = collision_probability(reference)[rows]
        sampled = values["token_logprobs"]
        if reference is not logits:
            sampled = reference[rows, tokens].float() - logsumexp(reference)[rows]
        values["hidden_norm"] = norm
        values["inherent_variance"] = norm.square() * (1 - collision)
        values["sampled_variance"] = norm.square() * (1 - 2 * sampled.exp() + collision).clamp_min(0.0)
    return values
