"""A small autoregressive linear model without sampling: its distribution, B and its inherent variance.

All V^H responses to a prompt are listed and computed in float64, whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_coverage.tasks.linear import AutoregressiveLinearForCausalLM

__all__ = ["enumerate_responses", "feature_bound", "inherent_variance", "response_logprobs"]

_MOST_RESPONSES = 2**20
_CHUNK = 2**22
"""Feature values computed at a time."""


@torch.no_grad()
def response_logprobs(model: AutoregressiveLinearForCausalLM, prompt: Sequence[int], responses: Tensor) -> Tensor:
    """Score responses in float64: `log p(y|x) = sum_h <theta, phi_h> - log sum_v exp <theta, phi_h(v)>`.

    Args:
        model: The model.
        prompt: Token ids.
        responses: Token ids `(R, H)`, each with features.

    Returns:
        `(R,)` nats, float64.

    Raises:
        ValueError: If the prompt is empty.
    """
    parts = []
    for rows, features in _features(model, prompt, responses):
        logprobs = _next_logprobs(model, features)
        parts.append(logprobs.gather(-1, responses[rows].unsqueeze(-1)).sum(dim=(1, 2)))
    return torch.cat(parts)


def enumerate_responses(
    model: AutoregressiveLinearForCausalLM, prompt: Sequence[int], horizon: int
) -> tuple[Tensor, Tensor]:
    """List all V^H responses to a prompt with their log-probabilities, in float64.

    Args:
        model: The model.
        prompt: Token ids.
        horizon: H, at least 1.

    Returns:
        Responses `(V^H, H)` in lexical order, and their log-probabilities `(V^H,)`, nats.

    Raises:
        ValueError: If there are more than 2^20 responses, or the prompt is empty.

    Example:
        >>> from hf_coverage.tasks.linear_features import TableFeatures
        >>> model = AutoregressiveLinearForCausalLM.from_features(TableFeatures(torch.eye(3)[None].repeat(4, 1, 1)))
        >>> responses, logprobs = enumerate_responses(model, [3], horizon=2)
        >>> len(responses), round(float(logprobs.exp().sum()), 12)
        (9, 1.0)
    """
    tokens = model.feature_map.num_tokens
    if horizon < 1 or tokens**horizon > _MOST_RESPONSES:
        raise ValueError(
            f"`horizon` must be at least 1 and give at most {_MOST_RESPONSES} responses of {tokens} tokens each, got "
            f"{horizon}; sample longer ones."
        )
    ids = torch.arange(tokens, device=model.device)
    responses = torch.cartesian_prod(*[ids] * horizon).reshape(-1, horizon)
    return responses, response_logprobs(model, prompt, responses)


@torch.no_grad()
def inherent_variance(model: AutoregressiveLinearForCausalLM, prompt: Sequence[int], horizon: int) -> float:
    """Compute the inherent variance of the model's own distribution for one prompt.

        s2(x) = E_{y ~ p(.|x)} sum_h || phi(x, y_1..h) - E_{v ~ p(.|x, y_<h)} phi(x, y_<h, v) ||^2

    Average it over the prompts for the number that the theorems have; p is D where theta is the truth.

    Args:
        model: The model.
        prompt: Token ids.
        horizon: H, small enough to list all responses.

    Returns:
        s2(x).

    Raises:
        ValueError: As for `enumerate_responses`.

    Example:
        >>> from hf_coverage.tasks.linear_features import TableFeatures
        >>> model = AutoregressiveLinearForCausalLM.from_features(TableFeatures(torch.eye(3)[None].repeat(4, 1, 1)))
        >>> round(inherent_variance(model, [3], horizon=2), 3)
        1.333

    References:
        arXiv 2510.15020, Equation (8).
    """
    responses, logprobs = enumerate_responses(model, prompt, horizon)
    total = 0.0
    for rows, features in _features(model, prompt, responses):
        chances = _next_logprobs(model, features).exp().unsqueeze(-1)
        spread = features - (chances * features).sum(dim=2, keepdim=True)
        variance = (chances * spread.square()).sum(dim=(1, 2, 3))
        total += float(logprobs[rows].exp() @ variance)
    return total


@torch.no_grad()
def feature_bound(model: AutoregressiveLinearForCausalLM, prompt: Sequence[int], horizon: int) -> float:
    """Find B for one prompt: the largest Euclidean norm of the features of any token after any prefix.

    Args:
        model: The model.
        prompt: Token ids.
        horizon: H, small enough to list all responses.

    Returns:
        B; take the largest one over the prompts.

    Raises:
        ValueError: As for `enumerate_responses`.
    """
    responses, _ = enumerate_responses(model, prompt, horizon)
    return max(float(features.norm(dim=-1).max()) for _, features in _features(model, prompt, responses))


def _next_logprobs(model: AutoregressiveLinearForCausalLM, features: Tensor) -> Tensor:
    return (features @ model.theta.double()).log_softmax(-1)


def _features(
    model: AutoregressiveLinearForCausalLM, prompt: Sequence[int], responses: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield float64 features `(R, H, V, d)` of chunks of responses."""
    if len(prompt) == 0:
        raise ValueError("`prompt` must have at least one token: the first response token is predicted from it.")
    start = torch.tensor(list(prompt), device=responses.device)
    size = (len(prompt) + responses.shape[1]) * model.feature_map.num_tokens * model.feature_map.num_features
    step = max(1, _CHUNK // size)
    for first in range(0, len(responses), step):
        rows = slice(first, first + step)
        part = responses[rows]
        ids = torch.cat([start.expand(len(part), -1), part[:, :-1]], dim=1)
        yield rows, model.feature_map(ids)[:, len(prompt) - 1 :].double()
