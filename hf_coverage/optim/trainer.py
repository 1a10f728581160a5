"""The Trainer with the theory's gradient: an optimizer that normalises, no clipping, a mean over sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from hf_coverage.optim.normalized import NormalizedGradient

__all__ = ["SequenceLossMixin", "normalized_optimizer"]

IGNORED = -100


def normalized_optimizer(
    args: TrainingArguments, lam: float, **options: Any
) -> tuple[type[NormalizedGradient], dict[str, Any]]:
    """Wrap the optimizer that `args.optim` names, with its learning rate, for `Trainer(optimizer_cls_and_kwargs=...)`.

    Args:
        args: `optim="sgd"` is the method's; `max_grad_norm` must be 0.
        lam: As for `NormalizedGradient`.
        **options: `per`, `radius`, `center`, `nonfinite` of `NormalizedGradient`, and `params` for other parameter
            groups than the Trainer's two (with and without weight decay).

    Returns:
        `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: If the Trainer would clip, or if it steps a layer at a time or without an optimizer class.

    Example:
        >>> args = TrainingArguments("runs", optim="sgd", learning_rate=0.1, max_grad_norm=0.0, use_cpu=True)
        >>> optimizer_cls, kwargs = normalized_optimizer(args, lam=1.0)
        >>> optimizer_cls([torch.nn.Parameter(torch.ones(2))], **kwargs).param_groups[0]["lr"]
        0.1
    """
    if args.max_grad_norm:
        raise ValueError(
            f"`max_grad_norm` is {args.max_grad_norm}: the Trainer would clip the gradient before it is normalised, "
            "which changes its norm. Set TrainingArguments(max_grad_norm=0.0)."
        )
    optimizer_cls, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ValueError(
            f"`optim` must name an optimizer that steps all parameters at once, but {args.optim} does not: "
            'take "sgd", or wrap your optimizer with NormalizedGradient.'
        )
    return _BuiltInside, {"optimizer_cls": optimizer_cls, "optimizer_kwargs": optimizer_kwargs, "lam": lam, **options}


class _BuiltInside(NormalizedGradient):
    """NormalizedGradient that builds its inner optimizer from the Trainer's parameter groups."""

    def __init__(
        self,
        params: Any,
        *,
        optimizer_cls: type[Optimizer],
        optimizer_kwargs: dict[str, Any],
        lam: float,
        **options: Any,
    ) -> None:
        super().__init__(optimizer_cls(params, **optimizer_kwargs), lam, **options)


class SequenceLossMixin:
    """Sum a Trainer's loss over tokens and average it over sequences: `-1/K sum_i sum_h log p(y_ih | x_i, y_i<h)`.

    The Trainer's own loss is a mean over tokens. Here K counts the sequences of one optimizer step, over all its
    accumulation steps and all processes; a row of a batch is a sequence, and rows without a label do not count. K
    replaces the `num_items_in_batch` that the Trainer hands to the model or to `compute_loss_func`, so that either
    divides by K. Reported losses are then those of sequences too.

    Without it the gradient is the method's divided by T/K, the Trainer's count of a sequence's labels. Where T/K is
    the same in every step (windows of text), dividing `lam` by it gives the same updates.

    Example:
        >>> class SequenceTrainer(SequenceLossMixin, Trainer):
        ...     '''Any Trainer, TRL's among them.'''

    References:
        arXiv 2510.15020, Equations (14), (17).
    """

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Labels that hold one item for each sequence: the Trainer's own count, gathering included, counts these.
        marks = [_sequence_marks(batch) for batch in batch_samples if "labels" in batch]
        rows = [{"labels": m, "shift_labels": m} for m in marks]
        count = super()._get_num_items_in_batch(rows, device)  # type: ignore[misc]  # the Trainer's, beside the mixin
        if count is None and batch_samples:
            raise ValueError(
                "a mean over sequences needs `labels` in every batch, and a model whose forward takes "
                "`num_items_in_batch` or a `compute_loss_func`: otherwise the model averages over tokens itself."
            )
        return count


def _sequence_marks(batch: dict[str, Tensor]) -> Tensor:
    """`(B, 2)`: one item to predict in each row that has any, at its second position, which no shift removes."""
    targets = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
    marks = torch.where((targets != IGNORED).any(dim=-1, keepdim=True), 0, IGNORED)
    return torch.nn.functional.pad(marks, (1, 0), value=IGNORED)
