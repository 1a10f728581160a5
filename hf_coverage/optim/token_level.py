"""One update a token: the training that test-time training goes on with while decoding.

    theta <- Proj( theta + eta grad log p_theta(y_h | x, y_<h) )        for h = 1 ... H, sequence after sequence

References:
    arXiv 2510.15020, Equation (21).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_coverage.functional.gradients import project_
from hf_coverage.functional.head_training import adapt_head, apply_fast_weights
from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.inference.forward import HeadForward, inference

__all__ = ["Scope", "token_level_sgd"]

Scope = Literal["all", "head"]
"""What is trained: every trainable parameter, or the output head alone."""

_IGNORED = -100


def token_level_sgd(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    *,
    lr: float,
    radius: float | None = None,
    scope: Scope = "all",
) -> Tensor:
    """Train a causal language model on some sequences with one step of SGD for each of their tokens.

        theta <- Proj( theta + lr grad log p_theta(y_h | x, y_<h) ),    Proj onto ||theta|| <= radius

    The sequences come one after the other, each from where the last one ended; there is no batch to average over, and
    no optimizer state. With `scope="all"` every token costs a forward and a backward pass over its whole prefix: for
    small models. With `scope="head"` the backbone is frozen and read once a sequence, in evaluation mode, and the
    steps of the head are taken in closed form: autograd's numbers, for one forward pass and products of size (H, V).

    Args:
        model: Causal language model on one device; its parameters are changed in place.
        input_ids: Token ids `(B, T)`, padded on the right if at all.
        labels: Token ids `(B, T)`, -100 where nothing is learned: prompts and padding. Not shifted, as everywhere in
            `transformers`: the token at t is predicted from the ones before it.
        lr: Step size eta of a single token. It is not that of a loss that is a mean over tokens.
        radius: R of the ball around zero that the trained parameters are kept in; None: no ball.
        scope: What is trained.

    Returns:
        `(B, T)` log-probability of each token just before its own step, nats, 0 where nothing is learned.

    Raises:
        ValueError: If the shapes differ, a row's first token has a label, nothing can be trained, or, with
            `scope="head"`, the head is not a linear layer of its own whose output the model returns as it is.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 2, 3, 2]])
        >>> labels = torch.tensor([[-100, 2, 3, 2, 3, 2]])
        >>> first, second = (token_level_sgd(model, ids, labels, lr=0.1).sum() for _ in range(2))
        >>> bool(second > first)
        True

    References:
        arXiv 2510.15020, Equation (21) and Theorem 6.1, which takes `eta = min(1/(2 B^2), (s2 T)^(-1/2))`.
    """
    if input_ids.shape != labels.shape or input_ids.ndim != 2:
        raise ValueError(
            f"`input_ids` and `labels` must have one shape (B, T), got {tuple(input_ids.shape)} and "
            f"{tuple(labels.shape)}."
        )
    learned = labels != _IGNORED
    if learned[:, 0].any():
        row = int(learned[:, 0].int().argmax())
        raise ValueError(
            f"`labels` must be -100 at the first token, which nothing predicts, but row {row} has a label there."
        )
    if scope == "all":
        rows = [_train_all(model, *row, lr=lr, radius=radius) for row in zip(input_ids, labels)]
    elif scope == "head":
        forward = _head_of(model)
        rows = [_train_head(forward, *row, lr=lr, radius=radius) for row in zip(input_ids, labels)]
    else:
        raise ValueError(f'`scope` must be "all" or "head", got {scope!r}.')
    return torch.stack(rows)


def _train_all(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, *, lr: float, radius: float | None
) -> Tensor:
    """Train all trainable parameters on one sequence."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`model` has no trainable parameters; set `requires_grad_(True)` on those to train.")
    logprobs = torch.zeros(labels.shape, device=labels.device)
    for place in torch.nonzero(labels != _IGNORED)[:, 0].tolist():
        with torch.enable_grad():
            # The parameters have moved since the last token: nothing of the prefix can be reused.
            logits = model(input_ids=input_ids[None, :place]).logits[0, -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprob = log_softmax(logits)[labels[place]]
            gradients = torch.autograd.grad(logprob, parameters, allow_unused=True)
        logprobs[place] = logprob.detach()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                if gradient is not None:
                    parameter.add_(gradient, alpha=lr)
            if radius is not None:
                project_(parameters, radius)
    return logprobs


def _train_head(forward: HeadForward, input_ids: Tensor, labels: Tensor, *, lr: float, radius: float | None) -> Tensor:
    """Train the output head on one sequence."""
    logprobs = torch.zeros(labels.shape, device=labels.device)
    places = torch.nonzero(labels != _IGNORED)[:, 0]
    if not len(places):
        return logprobs
    end = int(places[-1])  # the last token is predicted, not read
    positions = (places - 1).cpu().numpy().astype(np.int64)
    with inference(forward.model):
        hidden = forward(input_ids[None, :end].cpu().numpy(), positions, first=1).hidden
    weight, bias = forward.head.weight, forward.head.bias
    rule = StepRule(lr, radius, center="zero")
    state, found = adapt_head(hidden[None], labels[places][None], weight, bias, rule=rule)
    apply_fast_weights(state, weight, bias)
    logprobs[places] = found[0].to(logprobs.dtype)
    return logprobs


def _head_of(model: PreTrainedModel) -> HeadForward:
    """The model, once it is certain that its output head can be trained in closed form."""
    forward = HeadForward(model)
    way_out = 'train the whole model, `scope="all"`.'
    if not forward.head.linear:
        raise ValueError(f'`scope="head"` needs a linear output head, got {forward.head.description}; {way_out}')
    shared = forward.head.shared_with
    if shared:
        raise ValueError(
            f'`scope="head"` needs a head of its own, but its weight is also {shared[0]}, whose change would change '
            "the head's input: untie them (`tie_word_embeddings=False` in the configuration, and a copy of the weight "
            f"in the head), or {way_out}"
        )
    with inference(model):
        if not forward.probe().plain_head:
            raise ValueError(
                f'`scope="head"` needs logits as the head gives them, but {type(model).__name__} changes them '
                f"afterwards (scaling or soft-capping) or spreads its head over processes; {way_out}"
            )
    return forward
