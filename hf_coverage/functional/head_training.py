"""An output head that makes one step after each token of given sequences.

References:
    arXiv 2510.15020, Equation (21) for training, (22) and (23) for test-time training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_coverage.functional.fast_weights import Cut, FastWeights, fast_logits, fast_step, new_fast_weights
from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.ttt_config import StepRule

__all__ = [
    "POSITIONS",
    "adapt_head",
    "apply_fast_weights",
    "branch_fast_weights",
    "follow_tokens",
    "squared_head_norm",
]

POSITIONS = 32
"""Positions whose logits are computed at once: enough for a good matrix product, little beside the errors."""


@torch.no_grad()
def follow_tokens(
    hidden: Tensor,
    tokens: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    rule: StepRule,
    has_bias: bool = False,
    squared_norm: Tensor | None = None,
    mask: Tensor | None = None,
    state: FastWeights | None = None,
    room: int = 0,
) -> tuple[FastWeights, Tensor]:
    """Follow given tokens with one step of the head after each: `log p_{W_1}(y_1), log p_{W_2}(y_2), ...`.

    Args:
        hidden: Inputs of the head `(B, T, d)`, the t-th predicting the t-th token.
        tokens: y `(B, T)`, int64.
        head: Gives `W h + b` `(B, m, V)` for inputs `(B, m, d)`.
        rule: How the head makes a step.
        has_bias: Whether the head has a bias.
        squared_norm: `||W||_F^2` with the bias as a column of W; needed for a ball around zero.
        mask: Boolean `(B, T)`, true at the tokens that count; the others change nothing and get 0. None: all.
        state: Heads to go on from, with room for these tokens; its buffers are written to. None: `head` itself.
        room: Tokens to leave room for after these, where there is no `state`.

    Returns:
        The heads after all steps, and each token's log-probability before its own step `(B, T)`, nats.

    References:
        arXiv 2510.15020, Equation (21) for training, (22) and (23) for test-time training.
    """
    length = tokens.shape[1]
    start = head(hidden[:, :POSITIONS])
    if state is None:
        state = new_fast_weights(
            hidden[:, 0],
            start[:, 0],
            rule=rule,
            capacity=(length + room) * rule.num_steps,
            has_bias=has_bias,
            squared_norm=squared_norm,
        )
    logprobs = state.steps.new_zeros(tokens.shape)
    for t in range(length):
        if t and t % POSITIONS == 0:
            start = head(hidden[:, t : t + POSITIONS])
        active = None if mask is None else mask[:, t]
        chosen = tokens[:, t] if active is None else tokens[:, t].where(active, 0)
        plain = start[:, t % POSITIONS]
        logits = fast_logits(state, hidden[:, t], plain)
        found = log_softmax(logits).gather(-1, chosen.unsqueeze(-1))[:, 0]
        logprobs[:, t] = found if active is None else found.where(active, 0.0)
        state = fast_step(state, hidden[:, t], plain, chosen, logits=logits, active=active)
    return state, logprobs


def branch_fast_weights(state: FastWeights, rows: int) -> FastWeights:
    """Let the first of B heads go on, more than once, from where they are.

    Args:
        state: The heads, which stay what they are.
        rows: How many of them go on.

    Returns:
        These heads. They share the buffers of `state` and write to those after its last step, so that one branch has
        to end before the next begins.
    """
    cut = None if state.cut is None else Cut(*(part[:rows] for part in state.cut))
    return state._replace(
        scale=state.scale[:rows],
        hidden=state.hidden[:rows],
        errors=state.errors[:rows],
        cut=cut,
        steps=state.steps[:rows].clone(),  # decay and projection rescale past ones in place
        squared_norm=state.squared_norm[:rows],
    )


@torch.no_grad()
def adapt_head(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rule: StepRule,
    mask: Tensor | None = None,
) -> tuple[FastWeights, Tensor]:
    """Follow given tokens, as `follow_tokens` does, with a head that is given by its parameters.

    Args:
        hidden: Inputs of the head `(B, T, d)`, the t-th predicting the t-th token.
        tokens: y `(B, T)`, int64.
        weight: W `(V, d)`; it and `hidden` count in float32 at least.
        bias: b `(V,)`.
        rule: How the head makes a step.
        mask: Boolean `(B, T)`, true at the tokens that count; None: all.

    Returns:
        The heads after all steps, and each token's log-probability before its own step `(B, T)`, nats.

    Example:
        >>> hidden, weight = torch.ones(1, 2, 3), torch.zeros(4, 3)
        >>> state, logprobs = adapt_head(hidden, torch.tensor([[1, 1]]), weight, rule=StepRule(lr=0.5))
        >>> logprobs.exp()
        tensor([[0.2500, 0.5990]])

    References:
        arXiv 2510.15020, Equation (21).
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(exact), None if bias is None else bias.to(exact)
    return follow_tokens(
        hidden.to(exact),
        tokens,
        partial(linear, weight=weight, bias=bias),
        rule=rule,
        has_bias=bias is not None,
        squared_norm=squared_head_norm(weight, bias),
        mask=mask,
    )


@torch.no_grad()
def squared_head_norm(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`||W||_F^2 + ||b||^2`, in float32 at least."""
    parameters = [weight] if bias is None else [weight, bias]
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.stack([parameter.to(exact).square().sum() for parameter in parameters]).sum()


@torch.no_grad()
def apply_fast_weights(state: FastWeights, weight: Tensor, bias: Tensor | None = None, *, row: int = 0) -> None:
    """Write what a row's head has become into its parameters: `W <- s W + sum_j a_j e_j h_j^T`.

    Args:
        state: The heads.
        weight: W `(V, d)`, changed in place.
        bias: b `(V,)`, changed in place.
        row: Which of the B heads.
    """
    past = slice(0, state.length)
    errors = state.errors[row, past]
    if state.cut is not None:
        errors = errors.new_zeros(state.length, len(weight)).scatter_add_(1, state.cut.tokens[row, past], errors)
    weighted = state.steps[row, past, None] * errors
    changed = weighted.T @ state.hidden[row, past]
    weight.copy_(state.scale[row] * weight.to(changed.dtype) + changed)
    if bias is not None:
        bias.copy_(state.scale[row] * bias.to(changed.dtype) + weighted.sum(0))
