"""The gradient step of an output head on a single token, in closed form, for every row of a batch on its own.

The gradient of `log p(y)` with respect to a head `W h + b` is the outer product of `e = 1_y - p` and h. After t steps

    W_t = s W + sum_j a_j e_j h_j^T,        W_t h = s W h + sum_j a_j <h_j, h> e_j,

with s and the a_j numbers, so that no row needs a copy of W. A projection onto a ball only rescales them. A bias is
one more input of the head that is always 1. Training with one update a token and test-time training are both this.

References:
    arXiv 2510.15020, Equations (21) to (23).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Center", "FastWeights", "adapt_head", "apply_fast_weights", "fast_logits", "fast_step", "new_fast_weights"]

Center = Literal["zero", "start"]
"""What a ball of parameters lies around: zero, or where the parameters started."""


class FastWeights(NamedTuple):
    """What B heads have become after t steps each, in buffers with room for T.

    Args:
        scale: s `(B,)`.
        hidden: Inputs h_j `(B, T, d)`.
        errors: Errors e_j `(B, T, V)`.
        steps: Numbers a_j `(B, T)`.
        squared_norm: `||W_t - c||_F^2` `(B,)`, c the ball's centre, with the bias as a column of W.
        length: t.
        has_bias: Whether the head has a bias.
        center: What the ball lies around.
    """

    scale: Tensor
    hidden: Tensor
    errors: Tensor
    steps: Tensor
    squared_norm: Tensor
    length: int
    has_bias: bool
    center: Center


def new_fast_weights(
    weight: Tensor, bias: Tensor | None = None, *, rows: int, capacity: int, center: Center = "zero"
) -> FastWeights:
    """Reserve room for the steps of a head that has not made any.

    Args:
        weight: W `(V, d)`.
        bias: b `(V,)`.
        rows: B.
        capacity: T, the most steps of a row.
        center: What the ball lies around, if there will be one.

    Returns:
        The state before the first step, in float32 at least.

    Raises:
        ValueError: If `center` is neither `"zero"` nor `"start"`.
    """
    if center not in ("zero", "start"):
        raise ValueError(f'`center` must be "zero" or "start", got {center!r}.')
    dtype = torch.promote_types(weight.dtype, torch.float32)
    squared = weight.new_zeros(rows, dtype=dtype)
    if center == "zero":
        squared += weight.to(dtype).square().sum()
        if bias is not None:
            squared += bias.to(dtype).square().sum()
    return FastWeights(
        scale=torch.ones_like(squared),
        hidden=weight.new_zeros(rows, capacity, weight.shape[1], dtype=dtype),
        errors=weight.new_zeros(rows, capacity, weight.shape[0], dtype=dtype),
        steps=squared.new_zeros(rows, capacity),
        squared_norm=squared,
        length=0,
        has_bias=bias is not None,
        center=center,
    )


@torch.no_grad()
def fast_logits(state: FastWeights, hidden: Tensor, logits: Tensor) -> Tensor:
    """Turn the logits of the head that nobody changed into those of the changed ones: `W_t h + b_t` from `W h + b`.

    Args:
        state: The B heads.
        hidden: Inputs h `(B, d)`.
        logits: `W h + b` `(B, V)`.

    Returns:
        `(B, V)`, in the dtype of `state`.
    """
    past = slice(0, state.length)
    inner = torch.einsum("btd,bd->bt", state.hidden[:, past], hidden.to(state.hidden.dtype)) + state.has_bias
    logits = state.scale[:, None] * logits.to(state.errors.dtype)
    return torch.baddbmm(logits.unsqueeze(1), (state.steps[:, past] * inner).unsqueeze(1), state.errors[:, past])[:, 0]


@torch.no_grad()
def fast_step(
    state: FastWeights,
    hidden: Tensor,
    logits: Tensor,
    tokens: Tensor,
    *,
    lr: float | Tensor,
    radius: float | None = None,
    start_logits: Tensor | None = None,
    active: Tensor | None = None,
) -> FastWeights:
    """Take each head one gradient step on a token: `W <- Proj(W + lr (1_y - p) h^T)`.

    Args:
        state: The B heads; its buffers are written to.
        hidden: Inputs h `(B, d)`.
        logits: Their logits now `(B, V)`, from `fast_logits`; p is the softmax of them.
        tokens: y `(B,)`, int64.
        lr: Step size, or `(B,)` of them.
        radius: R of the ball `||W - c||_F <= R`; None: no ball.
        start_logits: `W h + b` `(B, V)`, which a ball around the start needs.
        active: Rows `(B,)` that make the step; None: all.

    Returns:
        The state with one step more.

    Raises:
        ValueError: If the room is used up, or `start_logits` is missing.
    """
    if state.length == state.steps.shape[1]:
        raise ValueError(f"`state` has room for {state.length} steps and has made them all; reserve more.")
    error = -torch.softmax(logits, dim=-1)
    error.scatter_add_(1, tokens.unsqueeze(1), torch.ones_like(error[:, :1]))
    step = torch.as_tensor(lr, dtype=error.dtype, device=error.device).expand(len(error))
    if active is not None:
        step = step * active
    state.hidden[:, state.length] = hidden
    state.errors[:, state.length] = error
    state.steps[:, state.length] = step
    if radius is None:
        return state._replace(length=state.length + 1)
    moved = logits  # of what lies inside the ball, the head or its change
    if state.center == "start":
        if start_logits is None:
            raise ValueError('`start_logits` must be given for a ball around the start (`center="start"`).')
        moved = logits - start_logits
    gradient = error.square().sum(-1) * (state.hidden[:, state.length].square().sum(-1) + state.has_bias)
    squared = state.squared_norm + 2 * step * (error * moved).sum(-1) + step.square() * gradient
    return _shrink(state._replace(length=state.length + 1, squared_norm=squared), radius, active)


@torch.no_grad()
def adapt_head(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lr: float | Tensor,
    radius: float | None = None,
    center: Center = "zero",
    mask: Tensor | None = None,
) -> tuple[FastWeights, Tensor]:
    """Follow given tokens with one gradient step after each: `log p_{W_1}(y_1), log p_{W_2}(y_2), ...`.

    Args:
        hidden: Inputs of the head `(B, T, d)`, the t-th predicting the t-th token.
        tokens: y `(B, T)`, int64.
        weight: W `(V, d)`.
        bias: b `(V,)`.
        lr: Step size, or `(B,)` of them.
        radius: R of the ball that the head is kept in; None: no ball.
        center: What the ball lies around.
        mask: Boolean `(B, T)`, true at the tokens that count; the others change nothing and get 0. None: all.

    Returns:
        The heads after all steps, and each token's log-probability before its own step `(B, T)`, nats.

    Example:
        >>> hidden, weight = torch.ones(1, 2, 3), torch.zeros(4, 3)
        >>> state, logprobs = adapt_head(hidden, torch.tensor([[1, 1]]), weight, lr=0.5)
        >>> logprobs.exp()
        tensor([[0.2500, 0.5990]])

    References:
        arXiv 2510.15020, Equation (21) for training, (22) and (23) for test-time training.
    """
    state = new_fast_weights(weight, bias, rows=len(hidden), capacity=hidden.shape[1], center=center)
    exact = state.errors.dtype
    start = torch.nn.functional.linear(hidden.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    logprobs = state.steps.new_zeros(tokens.shape)
    for t in range(tokens.shape[1]):
        active = None if mask is None else mask[:, t]
        chosen = tokens[:, t] if active is None else tokens[:, t].where(active, 0)
        logits = fast_logits(state, hidden[:, t], start[:, t])
        found = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1))[:, 0]
        logprobs[:, t] = found if active is None else found.where(active, 0.0)
        state = fast_step(
            state, hidden[:, t], logits, chosen, lr=lr, radius=radius, start_logits=start[:, t], active=active
        )
    return state, logprobs


@torch.no_grad()
def apply_fast_weights(state: FastWeights, weight: Tensor, bias: Tensor | None = None, *, row: int = 0) -> None:
    """Write what a row's head has become into its parameters: `W <- s W + sum_j a_j e_j h_j^T`.

    Args:
        state: The heads.
        weight: W `(V, d)`, changed in place.
        bias: b `(V,)`, changed in place.
        row: Which of the B heads.
    """
    weighted = state.steps[row, : state.length, None] * state.errors[row, : state.length]
    changed = weighted.T @ state.hidden[row, : state.length]
    weight.copy_(state.scale[row] * weight.to(changed.dtype) + changed)
    if bias is not None:
        bias.copy_(state.scale[row] * bias.to(changed.dtype) + weighted.sum(0))


def _shrink(state: FastWeights, radius: float, active: Tensor | None) -> FastWeights:
    """Pull every head that made a step and lies outside of its ball back onto it."""
    factor = (radius / state.squared_norm.clamp_min(torch.finfo(state.steps.dtype).tiny).sqrt()).clamp_max(1.0)
    if active is not None:
        factor = factor.where(active, 1.0)
    # A ball around the start shrinks the change alone.
    state.steps[:, : state.length] *= factor[:, None]
    scale = state.scale * factor if state.center == "zero" else state.scale
    return state._replace(scale=scale, squared_norm=state.squared_norm * factor.square())
