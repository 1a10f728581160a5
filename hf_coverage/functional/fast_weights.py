"""The gradient step of an output head on a single token, in closed form, for every row of a batch on its own.

The gradient of `log p(y)` with respect to a head `W h + b` is the outer product of `e = 1_y - p` and h. After t steps

    W_t = s W + sum_j a_j e_j h_j^T,        W_t h = s W h + sum_j a_j <h_j, h> e_j,

with s and the a_j numbers, so that no row needs a copy of W. A projection onto a ball and decay towards the start only
rescale them. A bias is one more input of the head that is always 1. Training with one update a token and test-time
training are both this.

References:
    arXiv 2510.15020, Equations (21) to (23).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_coverage.functional.gradients import stable_norm
from hf_coverage.functional.ttt_config import StepRule

__all__ = [
    "Cut",
    "FastWeights",
    "fast_error_bound",
    "fast_logits",
    "fast_step",
    "grow_fast_weights",
    "new_fast_weights",
]


class Cut(NamedTuple):
    """Where the errors are cut.

    Args:
        tokens: Which tokens the entries that are kept are of `(B, T, k + 1)`.
        slips: How much each step may differ from the exact one in any entry of e `(B, T)`.
    """

    tokens: Tensor
    slips: Tensor


class FastWeights(NamedTuple):
    """What B heads have become after t steps each, in buffers with room for T.

    Args:
        rule: How they make a step.
        scale: s `(B,)`.
        hidden: Inputs h_j `(B, T, d)`.
        errors: Errors e_j `(B, T, V)`; where they are cut, the k + 1 entries that are kept `(B, T, k + 1)`.
        cut: Which ones these are; None: nothing is cut.
        steps: Numbers a_j `(B, T)`.
        squared_norm: `||W_t - c||_F^2` `(B,)`, c the ball's centre; kept up to date where there is a ball.
        length: t.
        has_bias: Whether the head has a bias.
    """

    rule: StepRule
    scale: Tensor
    hidden: Tensor
    errors: Tensor
    cut: Cut | None
    steps: Tensor
    squared_norm: Tensor
    length: int
    has_bias: bool

    @property
    def capacity(self) -> int:
        """T, the most steps of a row."""
        return self.steps.shape[1]


def new_fast_weights(
    hidden: Tensor,
    logits: Tensor,
    *,
    rule: StepRule,
    capacity: int,
    has_bias: bool = False,
    squared_norm: Tensor | None = None,
) -> FastWeights:
    """Reserve room for the steps of heads that have not made any.

    Args:
        hidden: Inputs of the heads `(B, d)`, of which only shape, dtype and device count.
        logits: Their outputs `(B, V)`, likewise.
        rule: How they make a step.
        capacity: T, the most steps of a row.
        has_bias: Whether the head has a bias.
        squared_norm: `||W||_F^2` with the bias as a column of W; needed for a ball around zero.

    Returns:
        The state before the first step, in float32 at least.

    Raises:
        ValueError: If there is a ball around zero and no `squared_norm`.
    """
    around_zero = rule.radius is not None and rule.center == "zero"
    if around_zero and squared_norm is None:
        raise ValueError('`squared_norm` of the head must be given for a ball around zero (`center="zero"`).')
    rows, vocabulary = logits.shape
    steps = logits.new_zeros(rows, capacity, dtype=torch.promote_types(logits.dtype, torch.float32))
    kept, cut = vocabulary, None
    if rule.top_k is not None and rule.top_k < vocabulary:
        kept = rule.top_k + 1  # the likeliest tokens, and y
        cut = Cut(steps.new_empty(rows, capacity, kept, dtype=torch.int64), steps.new_zeros(rows, capacity))
    return FastWeights(
        rule=rule,
        scale=steps.new_ones(rows),
        hidden=steps.new_empty(rows, capacity, hidden.shape[-1]),
        errors=steps.new_empty(rows, capacity, kept),
        cut=cut,
        steps=steps,
        squared_norm=steps.new_zeros(rows) + squared_norm if around_zero else steps.new_zeros(rows),
        length=0,
        has_bias=has_bias,
    )


@torch.no_grad()
def grow_fast_weights(state: FastWeights, capacity: int) -> FastWeights:
    """Move the heads to buffers with room for more steps.

    Args:
        state: The heads.
        capacity: The new T.

    Returns:
        The same heads.

    Raises:
        ValueError: If they have made more steps than that.
    """
    if capacity < state.length:
        raise ValueError(f"`capacity` must be at least the {state.length} steps that were made, got {capacity}.")

    def move(buffer: Tensor) -> Tensor:
        larger = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
        larger[:, : state.length] = buffer[:, : state.length]
        return larger

    return state._replace(
        hidden=move(state.hidden),
        errors=move(state.errors),
        cut=None if state.cut is None else Cut(*map(move, state.cut)),
        steps=move(state.steps),
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
    weights = _step_weights(state, hidden)
    logits = state.scale[:, None] * logits.to(state.errors.dtype)
    if state.cut is None:
        return torch.baddbmm(logits.unsqueeze(1), weights.unsqueeze(1), state.errors[:, past])[:, 0]
    changes = weights.unsqueeze(-1) * state.errors[:, past]
    return logits.scatter_add_(1, state.cut.tokens[:, past].flatten(1), changes.flatten(1))


@torch.no_grad()
def fast_error_bound(state: FastWeights, hidden: Tensor) -> Tensor:
    """How far the logits of heads with cut steps can lie from those of exact heads, in any entry, up to rounding.

        E_t = sum_j |a_j <h_j, h_t>| min(1, delta_j + tanh(E_j / 2))

    for heads that saw the same tokens and inputs. delta_j is the most that a cut entry of p_j can have had, and
    tanh(E/2) the most that a probability changes when no logit changes by more than E. Log-probabilities differ by at
    most `2 E_t`.

    Args:
        state: The B heads.
        hidden: Inputs h `(B, d)`.

    Returns:
        E_t `(B,)`, logits; 0 where steps are exact.
    """
    if state.cut is None:
        return torch.zeros_like(state.scale)
    return (_step_weights(state, hidden).abs() * state.cut.slips[:, : state.length]).sum(-1)


@torch.no_grad()
def fast_step(
    state: FastWeights,
    hidden: Tensor,
    start_logits: Tensor,
    tokens: Tensor,
    *,
    logits: Tensor | None = None,
    active: Tensor | None = None,
) -> FastWeights:
    """Take each head `num_steps` steps on a token, as `state.rule` says.

    Args:
        state: The B heads; its buffers are written to.
        hidden: Inputs h `(B, d)`.
        start_logits: `W h + b` `(B, V)`.
        tokens: y `(B,)`, int64.
        logits: What `fast_logits` makes of `start_logits` now `(B, V)`, where that is known; p is the softmax of them.
        active: Rows `(B,)` that make the steps; None: all.

    Returns:
        The heads after the steps.

    Raises:
        ValueError: If there is no room for them.
    """
    if state.length + state.rule.num_steps > state.capacity:
        raise ValueError(
            f"`state` has room for {state.capacity} steps and has made {state.length}; see `grow_fast_weights`."
        )
    for _ in range(state.rule.num_steps):
        now = fast_logits(state, hidden, start_logits) if logits is None else logits
        state, logits = _single_step(state, hidden, start_logits, now, tokens, active), None
    return state


def _single_step(
    state: FastWeights, hidden: Tensor, start_logits: Tensor, logits: Tensor, tokens: Tensor, active: Tensor | None
) -> FastWeights:
    rule, now = state.rule, state.length
    step = torch.as_tensor(rule.lr, dtype=state.steps.dtype, device=state.steps.device).expand(len(tokens))
    if active is not None:
        step = step * active
    if state.cut is not None:
        _write_cut_error(state, state.cut, hidden, logits, tokens)
        _decay(state, active)
        state.hidden[:, now], state.steps[:, now] = hidden, step
        return state._replace(length=now + 1)
    error = -torch.softmax(logits, dim=-1)
    error.scatter_add_(1, tokens.unsqueeze(1), torch.ones_like(error[:, :1]))
    state.hidden[:, now], state.errors[:, now] = hidden, error
    squared_gradient = error.square().sum(-1) * (state.hidden[:, now].square().sum(-1) + state.has_bias)
    if rule.lam is not None:
        feature = stable_norm(state.hidden[:, now], dim=1)
        norm = stable_norm(error, dim=1) * torch.hypot(feature, torch.full_like(feature, float(state.has_bias)))
        step = (step / (rule.lam + norm)).where(norm > 0, 0.0)
    keep = _decay(state, active)
    state.steps[:, now] = step
    state = state._replace(length=now + 1)
    if rule.radius is None:
        return state
    # <W - c, e h^T>: of what lies inside the ball, the head or its change.
    moved = logits if rule.center == "zero" else logits - start_logits
    squared = keep.square() * state.squared_norm + 2 * keep * step * (error * moved).sum(-1)
    return _project(state._replace(squared_norm=squared + step.square() * squared_gradient), rule.radius, active)


def _step_weights(state: FastWeights, hidden: Tensor) -> Tensor:
    """`a_j <h_j, h>` for all past steps `(B, t)`."""
    past = slice(0, state.length)
    inner = torch.einsum("btd,bd->bt", state.hidden[:, past], hidden.to(state.hidden.dtype)) + state.has_bias
    return state.steps[:, past] * inner


def _write_cut_error(state: FastWeights, cut: Cut, hidden: Tensor, logits: Tensor, tokens: Tensor) -> None:
    """Write `1_y - p` at y and at the likeliest tokens into the buffers, and how far it is from the exact error."""
    chosen = tokens.unsqueeze(1)
    total = logits.logsumexp(-1, keepdim=True)
    values, places = logits.topk(cut.tokens.shape[-1] - 1, dim=-1)
    kept = (values - total).exp()
    probability = (logits.gather(1, chosen) - total).exp().masked_fill((places == chosen).any(1, keepdim=True), 0.0)
    # What was cut is neither likelier than anything kept nor than all of it together.
    rest = (1 - kept.sum(-1) - probability[:, 0]).clamp_min(0.0)
    likeliest = torch.minimum(rest, kept[:, -1])
    cut.slips[:, state.length] = (likeliest + torch.tanh(fast_error_bound(state, hidden) / 2)).clamp_max(1.0)
    cut.tokens[:, state.length] = torch.cat([places, chosen], dim=1)
    state.errors[:, state.length] = torch.cat([-kept, 1 - probability], dim=1)


def _decay(state: FastWeights, active: Tensor | None) -> Tensor:
    """Take every head that makes a step part of its way back to the start; returns how much of the way is kept."""
    keep = torch.full_like(state.scale, 1 - state.rule.decay)
    if active is not None:
        keep = keep.where(active, 1.0)
    if state.rule.decay:
        state.steps[:, : state.length] *= keep[:, None]
    return keep


def _project(state: FastWeights, radius: float, active: Tensor | None) -> FastWeights:
    """Pull every head that made a step and lies outside of its ball back onto it."""
    factor = (radius / state.squared_norm.clamp_min(torch.finfo(state.steps.dtype).tiny).sqrt()).clamp_max(1.0)
    if active is not None:
        factor = factor.where(active, 1.0)
    # A ball around the start shrinks the change alone.
    state.steps[:, : state.length] *= factor[:, None]
    scale = state.scale * factor if state.rule.center == "zero" else state.scale
    return state._replace(scale=scale, squared_norm=state.squared_norm * factor.square())
