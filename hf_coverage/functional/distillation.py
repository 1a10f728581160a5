"""Losses of a student's next-token distributions beside a teacher's, without ever holding all logits of either.

Logits are made from hidden states for a few tokens at a time, used, and made again for the gradient: what a token
costs in memory is two hidden states, not two rows over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_coverage.functional.logprobs import log_softmax

__all__ = ["TokenRows", "distillation_losses"]

# Elements of a work space over the vocabulary. On a CPU few enough for its caches, but enough rows for the head's
# matrix to be worth the reading; on an accelerator only enough to hide the launches.
_CPU_CHUNK = 2**21
_ACCELERATOR_CHUNK = 2**26


class TokenRows(NamedTuple):
    """A model's next-token distributions for M tokens: hidden states and the head that they go through, or logits.

    Args:
        values: Hidden states `(M, d)`; or logits `(M, V)`, where there is no `weight`.
        weight: Matrix of the head `(V, d)`.
        bias: Bias of the head `(V,)`, if it has one.
    """

    values: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.values.shape[-1] if self.weight is None else self.weight.shape[0]

    def log_softmax(self, rows: slice | Tensor) -> Tensor:
        """Log-probabilities `(m, V)` of some tokens, of at least float32."""
        values = self.values[rows]
        logits = values if self.weight is None else linear(values, self.weight, self.bias)
        return log_softmax(logits)


def distillation_losses(
    student: TokenRows, teacher: TokenRows, labels: Tensor, *, soft_targets: bool = False
) -> tuple[Tensor, Tensor]:
    """Take, for each token, the loss to train on and the divergence from the teacher that it is weighted by.

        loss_h = -log p(y_h)    or, with soft targets,  e_h;       e_h = KL(D(.|x, y_<h) || p(.|x, y_<h))

    Where y_h is drawn from the teacher, both losses have the same expected gradient, that of e_h.

    Args:
        student: p. Under autocast its rows and head are cast as a linear layer would cast them.
        teacher: D, no part of the graph.
        labels: y `(M,)`, int64.
        soft_targets: Whether the loss is e_h, whose gradient has all the teacher's probabilities in it.

    Returns:
        Losses `(M,)`, which can be differentiated once, in what `student` consists of; and e `(M,)`, which cannot. In
        nats, of at least float32. Tokens whose loss has no gradient cost nothing in the backward pass.

    Raises:
        ValueError: If the two vocabularies differ in size, or the number of tokens does.

    Example:
        >>> student = TokenRows(torch.zeros(1, 2), weight=torch.zeros(3, 2))
        >>> teacher = TokenRows(torch.tensor([[0.5, 0.25, 0.25]]).log())
        >>> distillation_losses(student, teacher, torch.tensor([0]))
        (tensor([1.0986]), tensor([0.0589]))

    References:
        arXiv 2510.15020, Equations (24)-(26).
    """
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"`student` and `teacher` must share a vocabulary, but have {student.vocab_size} and "
            f"{teacher.vocab_size} tokens."
        )
    if not len(student.values) == len(teacher.values) == len(labels):
        raise ValueError(
            f"`student`, `teacher` and `labels` must be of the same tokens, but are of {len(student.values)}, "
            f"{len(teacher.values)} and {len(labels)}."
        )
    losses, divergences = _Losses.apply(*_autocast(student), _autocast(teacher), labels, soft_targets)
    return losses, divergences


class _Losses(torch.autograd.Function):
    """Reads the logits twice: all of them forward, and backward those of the tokens that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: TokenRows,
        labels: Tensor,
        soft_targets: bool,
    ) -> tuple[Tensor, Tensor]:
        student = TokenRows(values, weight, bias)
        losses = values.new_empty(len(values), dtype=torch.promote_types(values.dtype, torch.float32))
        divergences = torch.empty_like(losses)
        for rows in _chunks(len(values), student.vocab_size, values.device):
            log_p, log_q = student.log_softmax(rows), teacher.log_softmax(rows)
            losses[rows] = -log_p.gather(-1, labels[rows, None])[:, 0]
            q = log_q.exp()
            # 0 log 0 = 0, and a token that the teacher excludes costs nothing, also where the student excludes it.
            gap = torch.where(q > 0, log_q.sub_(log_p), 0.0)
            divergences[rows] = q.mul_(gap).sum(-1).clamp_min_(0.0)
        ctx.save_for_backward(values, weight, bias, labels)
        ctx.teacher, ctx.width = teacher if soft_targets else None, student.vocab_size
        ctx.mark_non_differentiable(divergences)
        return (divergences.clone() if soft_targets else losses), divergences

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, bias, labels = ctx.saved_tensors
        student = TokenRows(values, weight, bias)
        grad_values = torch.zeros_like(values)
        # A sum over chunks in half precision would lose the later ones.
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if ctx.needs_input_grad[2] else None
        pulling = torch.nonzero(grad)[:, 0]
        for chunk in _chunks(len(pulling), ctx.width, values.device):
            rows = pulling[chunk]
            error = student.log_softmax(rows).exp_()
            if ctx.teacher is None:
                error[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1.0
            else:
                error -= ctx.teacher.log_softmax(rows).exp_()
            error *= grad[rows, None]
            if grad_bias is not None:
                grad_bias += error.sum(0)
            error = error.to(values.dtype)
            grad_values[rows] = error if weight is None else error @ weight
            if grad_weight is not None:
                _add_product(grad_weight, error.t(), values[rows])
        return grad_values, _as(grad_weight, weight), _as(grad_bias, bias), None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _as(grad: Tensor | None, like: Any) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)


def _autocast(rows: TokenRows) -> TokenRows:
    """Cast once, as part of the graph, what autocast would cast anew for each chunk."""
    device = rows.values.device.type
    if rows.weight is None or not torch.is_autocast_enabled(device):
        return rows
    dtype = torch.get_autocast_dtype(device)
    return TokenRows(*(None if part is None else part.to(dtype) for part in rows))


def _chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (_CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK) // width)
    return (slice(start, start + step) for start in range(0, num_rows, step))
