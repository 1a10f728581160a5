"""The Trainer with a teacher: distillation that stops where a sequence has diverged by log N."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage.functional.checks import check_n
from hf_coverage.functional.distillation import TokenRows, distillation_losses
from hf_coverage.functional.objectives import distillation_weights
from hf_coverage.inference.forward import HeadForward, inference, is_sharded, select_before, unwrap
from hf_coverage.inference.output_head import find_head
from hf_coverage.optim.packing import IGNORED, packed_sequences
from hf_coverage.optim.trainer import SequenceLossMixin

__all__ = ["DistillationMixin"]


class DistillationMixin(SequenceLossMixin):
    """Distil a teacher into a Trainer's model, each sequence up to a divergence of log N.

        loss = -1/K sum_i sum_h w_ih log p(y_ih | x_i, y_i<h),      sum_h w_ih e_ih = min(log N, sum_h e_ih)

    e is the KL from the teacher's to the model's next-token distribution. The weights w are constants: a sequence past
    log N goes on pulling at its first tokens, where the gradient of `min(log N, .)` itself would be 0. The loss is a
    mean over sequences of a sum over tokens: K counts the sequences with a label of one optimizer step, over all its
    accumulation steps and processes, in packed rows too, as `SequenceLossMixin` does. The method takes y from the
    teacher: train on sequences that it has sampled.

    The teacher runs beside the model, without gradients, in evaluation mode and under the same autocast. Where a model
    ends in a linear layer, logits are made for a few tokens at a time and never kept; a model that scales or soft-caps
    them afterwards, that is compiled, or sharded by FSDP, gives all its logits once, as does any model in an
    evaluation. Labels are as everywhere in `transformers`: not shifted, -100 where nothing is learned.

    Logged with each loss, and by evaluations with their prefix: `kl_per_token`, the mean of e over tokens; `kl` and
    `stopped_kl`, the means over sequences of `sum_h e_h` and of `min(log N, sum_h e_h)`, which bounds Cov_N; and
    `stopped_tokens`, the share of the tokens' weight that is 0. They stay on the device until the Trainer logs.

    Args:
        *args: The Trainer's.
        teacher: Causal language model over the same vocabulary; moved to the Trainer's device, otherwise unchanged.
        n: The N of Cov_N, at least 1; `math.inf` never stops: plain distillation.
        soft_targets: Train on `w_h e_h`, the teacher's whole distribution, where the method has the sampled token:
            the same gradient on average over y from the teacher, with less noise, for one more pass through the
            teacher's head.
        teacher_tokenizer: The teacher's tokenizer, to be compared with the Trainer's `processing_class`.
        **kwargs: The Trainer's.

    Raises:
        ValueError: If `n` is below 1, if the vocabularies differ in size or in what a token id means, or if the
            Trainer was given another loss, label smoothing, or several GPUs in one process.

    Example:
        >>> from transformers import Trainer
        >>> class DistillationTrainer(DistillationMixin, Trainer):
        ...     '''DistillationTrainer(student, args, teacher=teacher, n=64, train_dataset=sampled_from_the_teacher)'''

    References:
        arXiv 2510.15020, Equations (24)-(26), Lemma I.4 and Theorem 6.2.
    """

    loss_is_scaled_for_ga = True

    # The Trainer's, beside the mixin.
    model: Any
    args: Any
    accelerator: Accelerator
    processing_class: Any
    place_model_on_device: bool
    get_tp_size: Any

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        n: float,
        soft_targets: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.n = n if n == math.inf else check_n(n)
        self.soft_targets = soft_targets
        _check_vocabularies(self.model, teacher)
        if teacher_tokenizer is not None:
            _check_tokenizers(self.processing_class, teacher_tokenizer)
        _check_trainer(self)
        if self.place_model_on_device:
            teacher.to(self.args.device)
        self.teacher = teacher
        self.model_accepts_loss_kwargs = True  # what the Trainer asks before it counts K; the model is not given it
        # Of the bare model: the Trainer is going to wrap it so that what it returns is no longer what its head gave.
        self._in_chunks = not self.args.torch_compile and _ends_in_a_linear_layer(self.model)
        self._teacher_in_chunks = _ends_in_a_linear_layer(teacher)
        self._tally = _Tally(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Take the loss of one batch, as the Trainer asks for it."""
        sequences = packed_sequences(inputs)
        inputs = dict(inputs) if sequences is None else sequences.labelled(inputs)
        targets = _targets(inputs)
        mask = targets != IGNORED
        with self.accelerator.autocast():
            with inference(self.teacher):
                _, teacher = _token_rows(self.teacher, inputs, mask, in_chunks=self._teacher_in_chunks)
            in_chunks = self._in_chunks and not return_outputs
            outputs, student = _token_rows(model, inputs, mask, in_chunks=in_chunks)
            losses, divergences = distillation_losses(student, teacher, targets[mask], soft_targets=self.soft_targets)
        if sequences is not None:
            mask = sequences.unpack(mask, False)
        token_kl = divergences.new_zeros(mask.shape).masked_scatter_(mask, divergences)
        weights = distillation_weights(token_kl, mask, self.n)
        self._tally.add(token_kl, mask, weights, self.n)
        loss = (weights[mask] * losses).sum()
        if num_items_in_batch is None:
            loss = loss / mask.any(-1).sum().clamp_min(1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # DDP takes the mean over processes of what is already divided by all of their sequences.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the divergences since the last log to a training's logs."""
        if "loss" in logs:
            logs |= self._tally.means(self.accelerator)
            self._tally = _Tally(self.args.device)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the Trainer's, beside the mixin

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, and add the divergences to the metrics."""
        training, self._tally = self._tally, _Tally(self.args.device)
        try:
            output = super().evaluation_loop(  # type: ignore[misc]  # the Trainer's, beside the mixin
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._tally.means(self.accelerator)
        finally:
            self._tally = training
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output


class _Tally:
    """Sums of divergences, on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, token_kl: Tensor, mask: Tensor, weights: Tensor, n: float) -> None:
        kl = token_kl.double().sum(-1)
        stopped = kl.clamp_max(math.log(n))
        parts = [mask.sum(), mask.any(-1).sum(), kl.sum(), stopped.sum(), weights.double().sum()]
        self.sums += torch.stack([part.double() for part in parts])

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all processes, which have to ask together."""
        tokens, sequences, kl, stopped, weight = accelerator.reduce(self.sums, "sum").tolist()
        if not tokens:
            return {}
        return {
            "kl_per_token": kl / tokens,
            "kl": kl / sequences,
            "stopped_kl": stopped / sequences,
            "stopped_tokens": 1 - weight / tokens,
        }


def _targets(inputs: dict[str, Any]) -> Tensor:
    """`(B, T)`, what each position is to predict; taken out of the inputs, so that the model takes no loss itself."""
    if "logits_to_keep" in inputs:
        raise ValueError("distillation needs the logits of every token: leave `logits_to_keep` out of the batches.")
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is None and shifted is None:
        raise ValueError("distillation needs `labels` in every batch: token ids, -100 where nothing is learned.")
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted is None else shifted


def _token_rows(model: nn.Module, inputs: dict[str, Any], mask: Tensor, *, in_chunks: bool) -> tuple[Any, TokenRows]:
    """Run a model, and give its distributions at the tokens of the mask: by its head, or as logits."""
    if not in_chunks or is_sharded(unwrap(model)):  # a sharded head has its weights only while the model runs
        outputs = model(**inputs, use_cache=False)
        # from the end: some adapters put tokens of their own before the prompt
        return outputs, TokenRows(outputs.logits[:, -mask.shape[1] :][mask])
    head = find_head(unwrap(model))
    positions = torch.nonzero(mask.flatten())[:, 0]
    with select_before(head.module, positions, 1, tuple(mask.shape)) as seen:
        outputs = model(**inputs, use_cache=False)
    if len(seen) != 1:
        raise RuntimeError(
            f"Expected {type(unwrap(model)).__name__} to call its output head {type(head.module).__name__} once, got "
            f"{len(seen)} calls; this model cannot be distilled."
        )
    return outputs, TokenRows(seen[0], head.weight, head.bias)


def _ends_in_a_linear_layer(model: nn.Module) -> bool:
    """Whether logits are a linear layer of hidden states and nothing else, and so can be made a few at a time."""
    forward = HeadForward(model)
    if not forward.head.linear:
        return False
    with inference(model):
        return forward.probe().untouched  # training must not make them something else


def _check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher` must have the model's vocabulary, but {type(teacher).__name__} has {sizes[1]} tokens and "
            f"{type(student).__name__} {sizes[0]}. Where the tokenizer is the same and only the padding of the "
            "embedding differs, `resize_token_embeddings` makes them equal."
        )


def _check_tokenizers(tokenizer: Any, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "`teacher_tokenizer` is compared with the Trainer's `processing_class`, which must be the model's "
            f"tokenizer, got {type(tokenizer).__name__}."
        )
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise ValueError(
            "`teacher_tokenizer` must give tokens the ids that the model's tokenizer does, but "
            f"{token!r} is {theirs.get(token)} for the teacher and {ours.get(token)} for the model. Distil from a "
            "teacher of the same family."
        )


def _check_trainer(trainer: Any) -> None:
    if trainer.args.use_liger_kernel:
        raise ValueError(
            "`use_liger_kernel=True` replaces the model's forward by one that takes the loss itself and returns no "
            "logits, where distillation needs the model's distributions: leave it out."
        )
    if trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor:
        raise ValueError(
            "`compute_loss_func` and `label_smoothing_factor` would do nothing: the loss is the distillation's. "
            "Leave them out."
        )
    if getattr(trainer.model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "`output_router_logits` asks for the loss that balances a mixture of experts, which would do nothing: the "
            "loss is the distillation's. Set it to False in the model's configuration."
        )
