"""Logits, or hidden states, and labels to per-token and sequence log-probabilities.

Every reduction over the vocabulary runs in float32 on a few rows at a time: a vocabulary row is tens of thousands of
numbers, so a full float32 log-softmax would cost more memory than the logits themselves, and each of its passes
would go to main memory where a few rows stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "collision_probability",
    "linear_head_logprobs",
    "log_softmax",
    "logsumexp",
    "sequence_logprobs",
    "token_kl",
    "token_logprobs",
]

# Elements of a float32 work space. On a CPU it has to stay in cache (measured: 8 to 32 rows of 49,152 are equally
# fast, all 256 at once ten times slower); on an accelerator it only has to be long enough to hide the launch.
_CPU_CHUNK = 2**20
_ACCELERATOR_CHUNK = 2**26


def logsumexp(logits: Tensor) -> Tensor:
    """Normalise over the vocabulary: `log sum_v exp(logits_v)`, computed in float32.

    Args:
        logits: Unnormalised log-probabilities `(..., V)` of any floating dtype; `-inf` is legal.

    Returns:
        float32 tensor `(...)`.

    Raises:
        TypeError: If `logits` is not floating point.

    Example:
        >>> logsumexp(torch.tensor([[0.0, 0.0], [float("-inf"), 3.0]]))
        tensor([0.6931, 3.0000])
    """
    rows = _vocabulary_rows(logits, "logits")
    result = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for chunk in _chunks(rows):
        result[chunk] = torch.logsumexp(rows[chunk].float(), dim=-1)
    return result.reshape(logits.shape[:-1])


def log_softmax(logits: Tensor) -> Tensor:
    """Normalise over the vocabulary without a bias: `logits - log sum_v exp(logits_v)`.

    Not `torch.log_softmax`: on a CPU its sum over a large vocabulary of peaked logits is off by up to 3e-5, mostly to
    one side, which the tokens of a response add up; `torch.logsumexp` sums pairwise.

    Args:
        logits: Unnormalised log-probabilities `(..., V)` of any floating dtype; `-inf` is legal.

    Returns:
        Log-probabilities `(..., V)`, of at least float32.

    Example:
        >>> log_softmax(torch.tensor([0.0, 0.0, float("-inf")]))
        tensor([-0.6931, -0.6931,    -inf])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Read off the log-probability of each label: `logits_label - log sum_v exp(logits_v)`.

    Args:
        logits: Logits `(..., V)` that already stand at the position predicting their label (no shift is made here).
        labels: Token ids `(...)`, int64.

    Returns:
        float32 tensor `(...)` in nats.

    Raises:
        TypeError: If `logits` is not floating point or `labels` is not int64.
        ValueError: If the shapes do not fit or a label lies outside `[0, V)`.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])).exp()
        tensor([0.5000, 0.7311])
    """
    _check_labels(labels, logits.shape[:-1], logits.shape[-1])
    normaliser = logsumexp(logits)
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen.float() - normaliser


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum a response: `log p(y|x) = sum_h log p(y_h | x, y_<h)` in float64.

    Args:
        token_logprobs: Per-token log-probabilities `(..., H)` in nats.
        mask: Boolean `(..., H)`, true at the response's tokens; the values elsewhere are not read. None takes all.

    Returns:
        float64 tensor `(...)` in nats.

    Raises:
        TypeError: If `mask` is not boolean.
        ValueError: If `mask` has another shape than `token_logprobs`.

    Example:
        >>> values = torch.tensor([[-1.0, -2.0, float("nan")]])
        >>> sequence_logprobs(values, torch.tensor([[True, True, False]]))
        tensor([-3.], dtype=torch.float64)
    """
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be boolean, got {mask.dtype}; write `mask.bool()`.")
        if mask.shape != token_logprobs.shape:
            raise ValueError(
                f"`mask` must have the shape of `token_logprobs`, {tuple(token_logprobs.shape)}, "
                f"got {tuple(mask.shape)}."
            )
        token_logprobs = token_logprobs.masked_fill(~mask, 0.0)
    return token_logprobs.double().sum(dim=-1)


def linear_head_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Score labels under a linear output head without ever holding all logits: `log softmax(W h + b)_label`.

    Args:
        hidden: Inputs of the head `(..., d)`.
        weight: Head's matrix `(V, d)`.
        labels: Token ids `(...)`, int64.
        bias: Head's bias `(V,)`, if it has one.

    Returns:
        float32 tensor `(...)` in nats; differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError: If `labels` is not int64.
        ValueError: If the shapes do not fit or a label lies outside `[0, V)`.

    Example:
        >>> hidden, weight = torch.ones(2, 3), torch.eye(3)
        >>> linear_head_logprobs(hidden, weight, torch.tensor([0, 2])).exp()
        tensor([0.3333, 0.3333])
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"`hidden` {tuple(hidden.shape)} and `weight` {tuple(weight.shape)} must agree in their last dimension."
        )
    _check_labels(labels, hidden.shape[:-1], weight.shape[0])
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = [
        token_logprobs(torch.nn.functional.linear(flat[chunk], weight, bias), targets[chunk])
        for chunk in _row_slices(len(flat), weight.shape[0], hidden.device)
    ]
    return torch.cat(parts).reshape(labels.shape) if parts else torch.zeros(labels.shape, dtype=torch.float32)


def token_kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """Compare next-token distributions: `KL(q || p) = sum_v q_v (log q_v - log p_v)`, q the teacher's.

    Args:
        teacher_logits: Logits of q `(..., V)`.
        logits: Logits of p `(..., V)`.

    Returns:
        float32 tensor `(...)` in nats, at least 0; `inf` where p excludes a token that q allows.

    Raises:
        TypeError: If either is not floating point.
        ValueError: If the shapes differ.

    Example:
        >>> token_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([0.1201])

    References:
        arXiv 2510.15020, Equation (50): the stopped KL sums these along a response.
    """
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"`teacher_logits` and `logits` must have one shape, got {tuple(teacher_logits.shape)} and "
            f"{tuple(logits.shape)}; a teacher needs the vocabulary of the model."
        )
    teacher_rows, rows = _vocabulary_rows(teacher_logits, "teacher_logits"), _vocabulary_rows(logits, "logits")
    result = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for chunk in _chunks(rows, copies=4):
        log_q, log_p = log_softmax(teacher_rows[chunk]), log_softmax(rows[chunk])
        q = log_q.exp()
        # 0 log 0 = 0, and a token without teacher mass costs nothing however little mass the model gives it.
        terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
        result[chunk] = terms.sum(dim=-1)
    # A KL of nearly equal distributions is a sum of cancelling terms: rounding alone takes it below zero.
    return result.clamp_min_(0.0).reshape(logits.shape[:-1])


def collision_probability(logits: Tensor) -> Tensor:
    """Find how concentrated a next-token distribution is: `sum_v q_v^2`, 1 for a certain token, 1/V for uniform.

    Args:
        logits: Logits of q `(..., V)`.

    Returns:
        float32 tensor `(...)` in (0, 1].

    Raises:
        TypeError: If `logits` is not floating point.

    Example:
        >>> collision_probability(torch.zeros(2, 4))
        tensor([0.2500, 0.2500])

    References:
        arXiv 2510.15020, Equation (8), in the expectation form for an output head.
    """
    rows = _vocabulary_rows(logits, "logits")
    result = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for chunk in _chunks(rows, copies=2):
        result[chunk] = log_softmax(rows[chunk]).mul_(2).exp_().sum(dim=-1)
    return result.clamp_max_(1.0).reshape(logits.shape[:-1])


def _vocabulary_rows(logits: Tensor, name: str) -> Tensor:
    if not logits.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {logits.dtype}.")
    return logits.reshape(-1, logits.shape[-1])


def _check_labels(labels: Tensor, shape: torch.Size, vocab_size: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"`labels` must be int64 token ids, got {labels.dtype}; write `labels.long()`.")
    if labels.shape != shape:
        raise ValueError(f"`labels` must have shape {tuple(shape)}, one per position, got {tuple(labels.shape)}.")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"`labels` must lie in [0, {vocab_size}), got {int(labels.min())} to {int(labels.max())}; "
            "leave ignored positions out before the call."
        )


def _chunks(rows: Tensor, copies: int = 1) -> Iterator[slice]:
    """Yield slices of `rows` whose `copies` float32 work spaces fit together."""
    return _row_slices(len(rows), copies * rows.shape[-1], rows.device)


def _row_slices(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    budget = _CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK
    step = max(1, budget // max(1, width))
    return (slice(start, start + step) for start in range(0, num_rows, step))
