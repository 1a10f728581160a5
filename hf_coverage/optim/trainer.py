"""The Trainer with the theory's gradient: an optimizer that normalises, no clipping, a mean over sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from hf_coverage.optim.normalized import NormalizedGradient
from hf_coverage.optim.packing import IGNORED, Sequences, packed_sequences

__all__ = ["SequenceLossMixin", "normalized_optimizer"]


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
    accumulation steps and all processes; those without a token to predict do not count. K replaces the
    `num_items_in_batch` that the Trainer hands to the model or to `compute_loss_func`, so that either divides by K.
    Reported losses are then those of sequences too.

    A row of a batch is a sequence, unless it says that it holds several (packed and padding-free batches:
    `position_ids` that start again, `seq_idx`, `cu_seq_lens_q`). Then each of them counts, the first token of each is
    predicted by nothing, and a `compute_loss_func` is given one row for each. Rows of running text that do not say
    where a text ends are one sequence each.

    Without it the gradient is the method's divided by T/K, the Trainer's count of a sequence's labels. Where T/K is
    the same in every step (windows of text), dividing `lam` by it gives the same updates.

    Raises:
        ValueError: If TrainingArguments say what would change the loss or the gradient without a word: clipping before
            a normalised gradient, a `weight_decay` that parameter groups override, `label_smoothing_factor`
            beside a `compute_loss_func`, several GPUs in one process, a mean over processes instead of over all
            sequences, or sequences that are spread over processes.

    Example:
        >>> class SequenceTrainer(SequenceLossMixin, Trainer):
        ...     '''Any Trainer, TRL's among them.'''

    References:
        arXiv 2510.15020, Equations (14), (17).
    """

    # The Trainer's, beside the mixin.
    args: Any
    compute_loss_func: Any
    optimizer_cls_and_kwargs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_arguments(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, and refuse what would be done to its gradient before it is normalised."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]  # the Trainer's, beside the mixin
        _check_optimizer(self, optimizer)
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take the loss of one batch, as the Trainer asks for it; of packed rows, each sequence's own."""
        sequences = packed_sequences(inputs)
        compute_loss = super().compute_loss  # type: ignore[misc]  # the Trainer's, beside the mixin
        if sequences is None:
            return compute_loss(model, inputs, *args, **kwargs)
        given = self.compute_loss_func
        if given is not None:
            self.compute_loss_func = partial(_loss_of_sequences, given, sequences)
        try:
            # beside a cache models take a packed row for one sequence
            return compute_loss(model, sequences.labelled(inputs) | {"use_cache": False}, *args, **kwargs)
        finally:
            self.compute_loss_func = given

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Labels that hold one item for each sequence: the Trainer's own count, gathering included, counts these.
        shifted = getattr(self, "_loss_shifts_labels", True)
        marks = [_sequence_marks(batch, shifted) for batch in batch_samples if "labels" in batch]
        rows = [{"labels": m, "shift_labels": m} for m in marks]
        count = super()._get_num_items_in_batch(rows, device)  # type: ignore[misc]  # the Trainer's, beside the mixin
        if count is None and batch_samples:
            raise ValueError(
                "a mean over sequences needs `labels` in every batch, and a model whose forward takes "
                "`num_items_in_batch` or a `compute_loss_func`: otherwise the model averages over tokens itself."
            )
        return count


def _sequence_marks(batch: dict[str, Any], shifted: bool) -> Tensor:
    """`(rows, S + 1)`: one item to predict for each sequence that has any, after a place that a shift removes."""
    sequences = packed_sequences(batch)
    batch = batch if sequences is None else sequences.labelled(batch)
    learned = batch["shift_labels" if "shift_labels" in batch else "labels"] != IGNORED
    if sequences is not None:
        has_any = sequences.unpack(learned, False).any(-1)[None]
    elif shifted and "shift_labels" not in batch:
        has_any = learned[:, 1:].any(-1, keepdim=True)
    else:
        has_any = learned.any(-1, keepdim=True)
    return torch.nn.functional.pad(torch.where(has_any, 0, IGNORED), (1, 0), value=IGNORED)


def _loss_of_sequences(
    compute_loss_func: Callable[..., Any], sequences: Sequences, outputs: Any, labels: Tensor | None, **kwargs: Any
) -> Any:
    """A loss function's value on packed rows, given as one row for each sequence."""
    unpacked = copy.copy(outputs)
    unpacked["logits"] = sequences.unpack(outputs["logits"], 0.0)
    return compute_loss_func(unpacked, None if labels is None else sequences.unpack(labels, IGNORED), **kwargs)


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    if trainer.compute_loss_func is not None and args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}, which the Trainer leaves to "
            "`compute_loss_func`, and that does not know of it: leave one of them out."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"a mean over sequences runs on one device for each process, got {args.n_gpu} GPUs in this one; launch it "
            "with `torchrun` or `accelerate launch`."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "`average_tokens_across_devices=False` takes a mean over the processes of means over their sequences, "
            "where the loss is a mean over all sequences: leave it out."
        )
    if trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            "a mean over sequences needs whole sequences, but context or sequence parallelism spreads each over "
            "several processes: shard the model instead (FSDP2, tensor parallelism)."
        )


def _check_optimizer(trainer: Any, optimizer: Any) -> None:
    args = trainer.args
    if isinstance(optimizer, NormalizedGradient) and args.max_grad_norm:
        raise ValueError(
            f"`max_grad_norm` is {args.max_grad_norm}: the Trainer would clip the gradient before it is normalised, "
            "which changes its norm. Set TrainingArguments(max_grad_norm=0.0)."
        )
    _, settings = trainer.optimizer_cls_and_kwargs or (None, {})
    given = dict(settings).get("weight_decay")
    found = {group.get("weight_decay", given) for group in optimizer.param_groups}
    if given is not None and given not in found:
        raise ValueError(
            f"`optimizer_cls_and_kwargs` has a weight_decay of {given}, which the Trainer's parameter groups override "
            f"by {max(found)}: give it as TrainingArguments(weight_decay={given}), which leaves biases and norms "
            'out, or with parameter groups of your own, {"params": ...}.'
        )
