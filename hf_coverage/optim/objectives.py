"""The direct coverage loss in the Trainer, with an N that is fixed or follows the training's progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_coverage.functional.checks import check_n
from hf_coverage.functional.logprobs import sequence_logprobs
from hf_coverage.functional.objectives import coverage_loss
from hf_coverage.optim.packing import IGNORED, packed_sequences

__all__ = ["CoverageLoss", "log_linear_n"]


class CoverageLoss(TrainerCallback):
    """Train to be right with one of N samples: `-1/K sum_i log(1 - (1 - p(y_i|x_i))^N)`, a `compute_loss_func`.

    Cross-entropy at N = 1; above it, a sequence that N samples find anyway no longer pulls. The probability is that of
    a whole sequence, so the loss is a mean over sequences of what is a sum over tokens inside, not a mean over tokens:
    it is larger than the Trainer's own by about the length of a sequence, and a learning rate means something else. K
    is what the Trainer hands over as `num_items_in_batch`; let `SequenceLossMixin` make it the number of sequences,
    over all accumulation steps and processes. Without the mixin K is the number of tokens, which changes the scale of
    the loss, and with lengths that differ the weight of a step.

    Each row of a batch is one sequence, its labels not shifted and -100 where nothing is learned (prompts, padding).
    The Trainer does not tell a loss function of rows into which several are packed: with `SequenceLossMixin` each
    sequence counts; in a training loop of your own give the `position_ids`; a Trainer without the mixin is refused.

    Args:
        n: N, a finite number >= 1; or a function from the training's progress in [0, 1] to it, such as
            `log_linear_n(1, 64)`. The object then has to be among the Trainer's `callbacks` too, which tell it the
            progress, a resumed run's as well. An evaluation takes the N that the training has reached.

    Raises:
        ValueError: If `n` is below 1; when called, if there are no labels or logits, if they do not fit, or if N
            follows a progress that is not known.

    Example:
        >>> from transformers import Trainer
        >>> from hf_coverage import SequenceLossMixin
        >>> class CoverageTrainer(SequenceLossMixin, Trainer):
        ...     '''Trainer(model, args, compute_loss_func=loss, callbacks=[loss], ...) with loss = CoverageLoss(...)'''
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 3]])
        >>> CoverageLoss(n=8)({"logits": logits}, labels)
        tensor(0.9081)

    References:
        arXiv 2502.07154.
    """

    def __init__(self, n: float | Callable[[float], float]) -> None:
        self._schedule = n if callable(n) else None
        self.n: float | None = None if callable(n) else check_n(n)

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Take the loss of one batch.

        Args:
            outputs: What the model returned, with `logits` `(B, T, V)`.
            labels: Token ids `(B, T)`.
            num_items_in_batch: K; None takes the sequences of this batch that have a label.
            position_ids: `(B, T)` of the tokens, where rows hold several sequences, at whose beginnings they start
                again. Models keep those apart without an attention mask and with `use_cache=False` only.

        Returns:
            Scalar of at least float32.
        """
        if self.n is None:
            raise ValueError(
                "`n` follows the training's progress, which nobody tells this loss: give the object to the Trainer "
                "in `callbacks` as well as in `compute_loss_func`; to evaluate alone, give a fixed `n`."
            )
        if labels is None:
            raise ValueError(
                "the coverage loss needs `labels` in every batch: token ids, -100 where nothing is learned."
            )
        logits = outputs["logits"]
        if logits is None:
            raise ValueError(
                "the model returned no logits, of which the coverage loss is made: `use_liger_kernel=True` lets a "
                "model take its own loss without them; leave it out."
            )
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"`labels` must have the shape (B, T) of the logits, {tuple(logits.shape[:-1])}, got "
                f"{tuple(labels.shape)}; the model must return logits for every token."
            )
        if outputs.get("aux_loss") is not None:
            raise ValueError(
                "the model returns an `aux_loss`, which balances a mixture of experts and would do nothing beside "
                "this loss: set `output_router_logits` to False in its configuration."
            )
        sequences = None if position_ids is None else packed_sequences({"position_ids": position_ids})
        if position_ids is None:
            _refuse_packed_rows(sys._getframe(1).f_locals.get("inputs"))
        if sequences is not None:
            logits, labels = sequences.unpack(logits, 0.0), sequences.unpack(labels, IGNORED)
        logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:].to(logits.device)
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        losses = coverage_loss(sequence_logprobs(-nll.view(targets.shape)), self.n)
        count = (targets != IGNORED).any(-1).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return (losses.sum() / count).to(logits.dtype)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the schedule."""
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the schedule."""
        if self._schedule is not None:
            self.n = check_n(self._schedule(state.global_step / max(1, state.max_steps)))


def _refuse_packed_rows(inputs: Any) -> None:
    """Refuse the caller's batch, which the Trainer does not hand to a loss function, if its rows hold several."""
    if isinstance(inputs, Mapping) and packed_sequences(inputs) is not None:
        raise ValueError(
            "rows hold several sequences, for their `position_ids` start again, which a loss function cannot see: "
            "take `SequenceLossMixin` for the Trainer, or give the loss the `position_ids` in a loop of your own."
        )


def log_linear_n(first: float, last: float) -> Callable[[float], float]:
    """Let N go from one number to another at an even rate of log N: `N(s) = first^(1-s) last^s`.

    Args:
        first: N at the beginning, a finite number >= 1. 1 begins with cross-entropy, which pulls at every sequence.
        last: N at the end, likewise.

    Returns:
        A function from the progress s in [0, 1] to N.

    Raises:
        ValueError: If one of them is below 1.

    Example:
        >>> [round(log_linear_n(1, 64)(progress), 6) for progress in (0.0, 0.5, 1.0)]
        [1.0, 8.0, 64.0]
    """
    first, last = check_n(first), check_n(last)
    lowest, highest = sorted((first, last))
    # rounding must not take it beyond its ends: just below 1 there is no N
    return lambda progress: min(highest, max(lowest, first * (last / first) ** progress))
