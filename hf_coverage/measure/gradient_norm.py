"""The norm of the gradient that sequence-level training steps along, over minibatches of a corpus."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_coverage.functional.gradients import global_norm
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.inference.forward_batches import Limits, build_step, plan_batches
from hf_coverage.inference.processes import map_over_processes
from hf_coverage.inference.self_check import Reading

__all__ = ["gradient_norms"]


def gradient_norms(
    model: nn.Module,
    encoded: EncodedCorpus,
    *,
    batch_size: int,
    num_batches: int = 8,
    seed: int = 0,
    batch_tokens: int = 1024,
) -> NDArray[np.float64]:
    """Measure `||g||` of some minibatches: `g = 1/K sum_i sum_h grad log p(y_ih | x_i, y_i<h)`.

    One Euclidean norm over all trainable parameters, as `NormalizedSGD` takes it: what lambda is to be compared with.
    Dropout is off. A job of several processes shares the minibatches. The model comes back as it was, its gradients
    too; this one takes as much memory as the parameters, in float32 at least.

    Args:
        model: Causal language model, whole on each process.
        encoded: Token ids.
        batch_size: K, sequences in a minibatch, drawn without replacement.
        num_batches: How many minibatches.
        seed: Of the draws.
        batch_tokens: Token positions in one backward pass, padding included; a longer row runs alone.

    Returns:
        The norms `(num_batches,)`, on every process.

    Raises:
        ValueError: If a number is below 1, `batch_size` exceeds the rows, nothing can be trained, or the model's
            parameters are spread over processes.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> encoded = EncodedCorpus(prompts=[[1, 2], [3]], completions=[[3, 4, 5], [6, 7]])
        >>> gradient_norms(model, encoded, batch_size=2, num_batches=1).round(1)
        array([4.9])

    References:
        arXiv 2510.15020, Equations (14), (17).
    """
    for name, value in (("batch_size", batch_size), ("num_batches", num_batches), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    if batch_size > len(encoded):
        raise ValueError(
            f"`batch_size` must be at most the {len(encoded)} rows of the corpus, but is {batch_size}: give more "
            "rows, or a smaller minibatch."
        )
    forward = HeadForward(model)
    if forward.sharded:
        raise ValueError("`model` must be whole on each process, but it is sharded: load it without FSDP.")
    parameters = [parameter for parameter in forward.model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`model` has no trainable parameters; set `requires_grad_(True)` on those to train.")
    rng = np.random.default_rng(seed)
    minibatches = [rng.choice(len(encoded), batch_size, replace=False).tolist() for _ in range(num_batches)]

    def norm(rows: list[int]) -> float:
        return float(global_norm(_gradient(forward, parameters, encoded, rows, batch_tokens)))

    with inference(forward.model), torch.enable_grad():
        return np.array(map_over_processes(norm, minibatches))


def _gradient(
    forward: HeadForward, parameters: list[Tensor], encoded: EncodedCorpus, rows: Sequence[int], batch_tokens: int
) -> list[Tensor]:
    """Gradient of the mean log-probability of some sequences."""
    gradient = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    # Without a bound on positions no row is cut: its segments would need one another's gradients.
    limits = Limits(batch_tokens, sys.maxsize)
    for batch in plan_batches(encoded, rows, limits, reading=Reading.PADDED):
        first = np.cumsum([0, *(len(encoded.completions[row]) for row in batch.rows[:-1])])
        step = build_step(encoded, batch.rows, first, 0, batch.cuts[0], context=0)
        logits = forward(step.ids, step.positions).take_logits(slice(None))
        pick, labels = (torch.from_numpy(part).to(logits.device) for part in (step.pick, step.labels))
        logprob = token_logprobs(logits[pick], labels).sum() / len(rows)
        parts = torch.autograd.grad(logprob, parameters, allow_unused=True)
        for total, part in zip(gradient, parts):
            if part is not None:
                total += part
    return gradient
