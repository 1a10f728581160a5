"""Log-probabilities of responses under a head that makes a step after each of their tokens, from one forward pass.

The steps change the head alone, so the hidden states of a response are those of the model as it is.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from hf_coverage.functional.head_training import POSITIONS, follow_tokens, squared_head_norm
from hf_coverage.functional.step_rule import StepRule

__all__ = ["adaptable", "adapted_logprobs"]


def adaptable(head: nn.Module, *, plain: bool) -> nn.Linear:
    """Refuse heads whose steps have no closed form.

    Args:
        head: The output head.
        plain: Whether the model returns what it gives, and it may be called alone.

    Returns:
        The same head.

    Raises:
        ValueError: If the head is not linear, or not plain.
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"`ttt` needs a linear output head, got {type(head).__name__}; if that is an adapter's layer, merge it "
            "first (`merge_and_unload`)."
        )
    if not plain:
        raise ValueError(
            "`ttt` needs logits as the head gives them, but the model changes them afterwards (scaling or "
            "soft-capping) or spreads its head over processes; leave it out."
        )
    return head


def adapted_logprobs(
    hidden: Tensor, tokens: Tensor, lengths: Sequence[int], head: nn.Linear, *, rule: StepRule, memory: int
) -> Tensor:
    """Score responses, each with a head of its own that follows it.

    Args:
        hidden: Inputs of the head at all positions that predict a token, response after response `(M, d)`.
        tokens: These tokens `(M,)`, int64.
        lengths: How many of them each response has.
        head: The head.
        rule: How it makes a step.
        memory: Bytes for what the steps keep; a longer response takes what it takes, alone.

    Returns:
        `log p_TTT(y_h | x, y_<h)` of each token `(M,)`, nats.
    """
    vocabulary = head.out_features
    kept = vocabulary if rule.top_k is None else min(vocabulary, 3 * (rule.top_k + 1))  # with an int64 beside each
    logprobs = hidden.new_empty(len(tokens), dtype=torch.promote_types(hidden.dtype, torch.float32))
    around_zero = rule.radius is not None and rule.center == "zero"
    norm = squared_head_norm(head.weight, head.bias) if around_zero else None
    ends = list(accumulate(lengths))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])  # responses of like length share a batch
    while order:
        longest = lengths[order[-1]]
        size = max(1, memory // (4 * (kept * longest * rule.num_steps + vocabulary * min(longest, POSITIONS))))
        rows, order = order[-size:], order[:-size]
        own = torch.tensor([[lengths[row]] for row in rows], device=hidden.device)
        steps = torch.arange(longest, device=hidden.device)
        mask = steps < own
        places = torch.tensor([[ends[row]] for row in rows], device=hidden.device) - own + steps.minimum(own - 1)
        _, found = follow_tokens(
            hidden[places],
            tokens[places],
            head,
            rule=rule,
            has_bias=head.bias is not None,
            squared_norm=norm,
            mask=mask,
        )
        logprobs[places[mask]] = found[mask]
    return logprobs
