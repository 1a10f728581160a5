"""What is trained for coverage instead of cross-entropy: weights of a distillation, and the direct coverage loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_coverage.functional.checks import ROUNDING, TIE_TOLERANCE, check_n

__all__ = ["coverage_loss", "coverage_loss_factor", "distillation_weights"]

# Below this probability p, and below this product N p, the first term of a series has all of float64's digits.
_SMALL = 1e-8


@torch.no_grad()
def distillation_weights(token_kl: Tensor, mask: Tensor, n: float) -> Tensor:
    """Weight the tokens of each response until its divergence from the teacher has summed up to A = log N.

        w_h = min(1, max(0, (A - sum_{j<h} e_j) / e_h)),    so that  sum_h w_h e_h = min(A, sum_h e_h)

    The weights are constants: no gradient goes through them.

    Args:
        token_kl: `(..., H)` next-token divergences `e_h = KL(D(.|x, y_<h) || p(.|x, y_<h))`, nats, in the order of
            the response; `inf` is legal, and takes up what is left of A at weight 0. Below 0 by more than rounding is
            no divergence, and makes its weight NaN.
        mask: Boolean `(..., H)`, true at the response's tokens; the values elsewhere are not read.
        n: The N of Cov_N, at least 1. `math.inf` stops nowhere: plain distillation.

    Returns:
        `(..., H)` in [0, 1], of `token_kl`'s dtype; 0 outside the mask.

    Raises:
        TypeError: If `mask` is not boolean.
        ValueError: If the shapes differ, or `n` is below 1.

    Example:
        >>> token_kl = torch.tensor([[0.5, 1.0, 1.0, 0.0]])
        >>> distillation_weights(token_kl, torch.tensor([[True, True, True, True]]), n=math.e)
        tensor([[1.0000, 0.5000, 0.0000, 0.0000]])

    References:
        arXiv 2510.15020, Equations (24)-(26) and Lemma I.4.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be boolean, got {mask.dtype}; write `mask.bool()`.")
    if mask.shape != token_kl.shape:
        raise ValueError(
            f"`mask` must have the shape of `token_kl`, {tuple(token_kl.shape)}, got {tuple(mask.shape)}."
        )
    if n == math.inf:
        return mask.to(token_kl.dtype)
    budget = math.log(check_n(n))
    spent = _divergence(token_kl).masked_fill(~mask, 0.0)
    before = torch.nn.functional.pad(spent.cumsum(-1)[..., :-1], (1, 0))
    # An empty divergence has no ratio: it counts as long as the sum before it does. Nor has one after an infinite one.
    share = ((budget - before) / spent).clamp(0.0, 1.0)
    share = torch.where(spent == 0, 1.0, share).masked_fill(before > budget + TIE_TOLERANCE, 0.0)
    return share.masked_fill(~mask, 0.0).to(token_kl.dtype)


def coverage_loss(logprobs: Tensor, n: float) -> Tensor:
    """Miss a response with all of N samples: `l_N = -log(1 - (1 - p)^N)`, from log p.

    Cross-entropy at N = 1. Its gradient is cross-entropy's times `coverage_loss_factor`, so that a response which N
    samples find anyway no longer pulls.

    Args:
        logprobs: `(...)` log p(y|x) of whole responses, nats, at most 0, not of tokens: p of a product is what counts.
            Give them in float64 (`sequence_logprobs` does): where p is near 1, its digits are those of 1 - p.
        n: The N of the samples, a finite number >= 1.

    Returns:
        `(...)` nats, of `logprobs`' dtype; computed in float64. Can be differentiated once.

    Raises:
        ValueError: If `n` is below 1 or infinite.

    Example:
        >>> logprobs = torch.tensor([-1000.0, -0.5])
        >>> coverage_loss(logprobs, n=1), coverage_loss(logprobs, n=16)
        (tensor([1.0000e+03, 5.0000e-01]), tensor([9.9723e+02, 3.3005e-07]))

    References:
        arXiv 2502.07154.
    """
    return _CoverageLoss.apply(logprobs, check_n(n))


@torch.no_grad()
def coverage_loss_factor(logprobs: Tensor, n: float) -> Tensor:
    """What the coverage loss makes of cross-entropy's gradient: `F = N p (1-p)^(N-1) / (1 - (1-p)^N)`, in [0, 1].

    Args:
        logprobs: As for `coverage_loss`.
        n: As for `coverage_loss`.

    Returns:
        `(...)` of `logprobs`' dtype: 1 for all where N = 1, and near 1 for a response with p far below 1/N.

    Raises:
        ValueError: As for `coverage_loss`.

    Example:
        >>> coverage_loss_factor(torch.tensor([-1000.0, -2.0, 0.0]), n=16)
        tensor([1.0000, 0.2709, 0.0000])

    References:
        arXiv 2502.07154.
    """
    n = check_n(n)
    logp = _log_probability(logprobs)
    if n == 1:
        return torch.ones_like(logprobs)
    p, minus_log_q, log_rate = _miss_rate(logp, n)
    rate = log_rate.exp().clamp_max(1e3)  # exp(-1000) is 0 already, and inf * 0 is not
    # N p / (1-p) in units of the rate, times rate / (exp(rate) - 1): no difference of large numbers for small p.
    scale = torch.where(p < _SMALL, 1 + p / 2, p / ((1 - p) * minus_log_q))
    kept = torch.where(rate < _SMALL, 1 - rate / 2, rate / torch.expm1(rate))
    unlikely = scale * kept
    likely = (math.log(n) + logp - (n - 1) * minus_log_q - _log_hit(log_rate)).exp()
    return torch.where(p < 0.5, unlikely, likely).clamp(0.0, 1.0).to(logprobs.dtype)


class _CoverageLoss(torch.autograd.Function):
    """The derivative comes from its own formula: that of the loss's steps is 0 * inf at either end."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, n: float) -> Tensor:
        ctx.save_for_backward(logprobs)
        ctx.n = n
        logp = _log_probability(logprobs)
        loss = -logp if n == 1 else -_log_hit(_miss_rate(logp, n)[2])
        return loss.to(logprobs.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logprobs,) = ctx.saved_tensors
        return -grad * coverage_loss_factor(logprobs, ctx.n), None


def _divergence(token_kl: Tensor) -> Tensor:
    """Float64, and the rounding below 0 taken off; more than rounding becomes NaN, and so is seen."""
    spent = token_kl.double()
    return torch.where(spent < -ROUNDING, math.nan, spent.clamp_min(0.0))


def _log_probability(logprobs: Tensor) -> Tensor:
    """Float64, and the rounding of float32 above 0 taken off; more than rounding becomes NaN, and so is seen."""
    logp = logprobs.double()
    return torch.where(logp > ROUNDING, math.nan, logp.clamp_max(0.0))


def _miss_rate(logp: Tensor, n: float) -> tuple[Tensor, Tensor, Tensor]:
    """`p`, `-log(1-p)`, and log of the rate `-N log(1-p)`, with which all of N samples miss: (1-p)^N = exp(-rate)."""
    p = logp.exp()
    minus_log_q = torch.where(p < 0.5, -torch.log1p(-p), -torch.log(-torch.expm1(logp)))
    # p underflows below -745, but -log(1-p) = p (1 + p/2 + ...) does not in logarithms.
    log_minus_log_q = torch.where(p < _SMALL, logp + p / 2, torch.log(minus_log_q))
    return p, minus_log_q, math.log(n) + log_minus_log_q


def _log_hit(log_rate: Tensor) -> Tensor:
    """`log(1 - exp(-rate))`: some sample hits."""
    rate = log_rate.exp()
    seldom = torch.where(rate < _SMALL, log_rate - rate / 2, torch.log(-torch.expm1(-rate)))
    return torch.where(rate < math.log(2), seldom, torch.log1p(-torch.exp(-rate)))
