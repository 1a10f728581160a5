"""Normalised SGD in the real Trainer, with the theory's loss."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_coverage import NormalizedGradient, NormalizedSGD, SequenceLossMixin, layer_groups, normalized_optimizer
from tests.measure.small_tokenizers import gpt2_like
from tests.optim.optimizers import weights
from tests.optim.trainer_runs import collate, make_trainer, tiny_model, token_rows


class KeepTheOptimizer(TrainerCallback):
    """The inner side of what the Trainer prepared, and its norms."""

    def __init__(self):
        self.norms = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer = optimizer.optimizer
        self.norms.append(self.optimizer.last_norm)


def sequence_loss_by_definition(model, rows):
    """A mean over sequences of sums over tokens, one sequence at a time."""
    losses = []
    for ids in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    return torch.stack(losses).mean()


def test_one_step_is_equation_18_with_a_mean_over_sequences(tmp_path):
    keep = KeepTheOptimizer()
    rows = token_rows(8)
    trainer = make_trainer(
        tmp_path,
        train_dataset=rows,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        callbacks=[keep],
        lr_scheduler_type="constant",
    )
    trainer.train()
    model = tiny_model()
    loss = sequence_loss_by_definition(model, rows["ids"])
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = weights(model) - 0.3 * gradient / (1.0 + gradient.norm())
    torch.testing.assert_close(weights(trainer.model), expected, rtol=0, atol=1e-6)
    assert float(keep.norms[0]) == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_four_accumulation_steps_equal_one_big_batch(tmp_path):
    """Sequences of 2 to 12 tokens: a mean of means over tokens would not be equal."""
    parted = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parted.train()
    whole = make_trainer(tmp_path, per_device_train_batch_size=8)
    whole.train()
    torch.testing.assert_close(weights(parted.model), weights(whole.model), rtol=0, atol=1e-6)
    assert (weights(whole.model) != weights(tiny_model())).any()


def test_the_last_and_smaller_batch_of_an_epoch_counts_its_own_sequences(tmp_path):
    settings = {"train_dataset": token_rows(11), "max_steps": -1, "num_train_epochs": 1}
    parted = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    parted.train()
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    whole.train()
    assert parted.state.global_step == 2
    torch.testing.assert_close(weights(parted.model), weights(whole.model), rtol=0, atol=1e-6)


def test_a_loss_function_gets_the_number_of_sequences(tmp_path):
    counts = []

    def loss_of(outputs, labels, num_items_in_batch):
        counts.append(int(num_items_in_batch))
        summed = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return summed / num_items_in_batch

    own = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, compute_loss_func=loss_of
    )
    own.train()
    builtin = make_trainer(tmp_path, per_device_train_batch_size=8)
    builtin.train()
    assert counts == [8] * 16
    torch.testing.assert_close(weights(own.model), weights(builtin.model), rtol=0, atol=1e-6)


def test_rows_without_a_label_do_not_count(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = collate(list(token_rows(4)))
    batch["labels"][1] = -100
    assert int(trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))) == 6


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="a mean over sequences needs `labels` in every batch"):
        trainer._get_num_items_in_batch([{"input_ids": torch.ones(1, 2)}], torch.device("cpu"))


def test_with_equal_lengths_the_token_mean_is_the_same_at_a_smaller_lambda(tmp_path):
    """What to set without the mixin: lam divided by a sequence's labels (all 10, as the Trainer counts GPT-2's)."""
    rows = token_rows(32).map(lambda row: {"ids": (row["ids"] * 6)[:10]})
    settings = {"train_dataset": rows, "per_device_train_batch_size": 8}
    by_sequence = make_trainer(tmp_path, **settings)
    by_token = make_trainer(
        tmp_path,
        trainer_cls=Trainer,
        optimizer_cls_and_kwargs=(NormalizedSGD, {"lr": 0.3, "lam": 1.0 / 10}),
        **settings,
    )
    by_sequence.train()
    by_token.train()
    torch.testing.assert_close(weights(by_token.model), weights(by_sequence.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["NormalizedSGD", "ball", "wrapper"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, optimizer):
    """With dropout, momentum or AdamW's state, a schedule, and a ball around where the first run started."""
    kinds = {
        "NormalizedSGD": lambda args: (NormalizedSGD, {"lr": 0.3, "lam": 1.0, "momentum": 0.9}),
        "ball": lambda args: (NormalizedSGD, {"lr": 0.3, "lam": 1.0, "radius": 0.2, "center": "start"}),
        "wrapper": lambda args: normalized_optimizer(args, lam=1.0),
    }
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8}

    def run(folder, **train_settings):
        args = TrainingArguments(str(folder), max_grad_norm=0.0, use_cpu=True, learning_rate=1e-2)
        trainer = make_trainer(
            folder, model=tiny_model(dropout=0.1), optimizer_cls_and_kwargs=kinds[optimizer](args), **settings
        )
        trainer.train(**train_settings)
        return weights(trainer.model)

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed, whole)


def test_trl_trains_with_it(tmp_path):
    class SequenceSFTTrainer(SequenceLossMixin, SFTTrainer):
        pass

    results = []
    for batch_size, accumulation in ((2, 2), (4, 1)):
        args = SFTConfig(
            str(tmp_path),
            max_steps=2,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            activation_checkpointing=False,
        )
        rows = token_rows(8).map(lambda row: {"input_ids": row["ids"]}, remove_columns="ids")
        trainer = SequenceSFTTrainer(
            tiny_model(),
            args,
            train_dataset=rows,
            data_collator=lambda rows: collate([{"ids": row["input_ids"]} for row in rows]),
            processing_class=gpt2_like(),
            optimizer_cls_and_kwargs=(NormalizedSGD, {"lr": 0.3, "lam": 1.0}),
        )
        trainer.train()
        results.append(weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_the_optimizer_that_the_arguments_name_is_wrapped_with_their_rate(tmp_path):
    keep = KeepTheOptimizer()
    args = TrainingArguments(str(tmp_path), optim="sgd", learning_rate=0.25, max_grad_norm=0.0, use_cpu=True)
    model = tiny_model()
    cls_and_kwargs = normalized_optimizer(args, lam=2.0, per="group", params=layer_groups(model))
    make_trainer(
        tmp_path, model=model, optimizer_cls_and_kwargs=cls_and_kwargs, callbacks=[keep], lr_scheduler_type="constant"
    ).train()
    assert isinstance(keep.optimizer, NormalizedGradient)
    assert type(keep.optimizer.optimizer) is torch.optim.SGD
    assert [group["lr"] for group in keep.optimizer.param_groups] == [0.25] * 5
    assert keep.optimizer.param_groups[0]["lam"] == 2.0
    assert all(math.isfinite(norm) for norm in keep.norms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`max_grad_norm` is 1.0.*TrainingArguments\(max_grad_norm=0.0\)"),
        ({"max_grad_norm": 0.0, "optim": "dummy"}, "`optim` must name an optimizer that steps all parameters at once"),
    ],
)
def test_what_would_undo_the_normalisation_is_refused(tmp_path, monkeypatch, settings, message):
    if settings.get("optim") == "dummy":
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args: (lambda: None, {}))
        settings = {"max_grad_norm": 0.0}
    with pytest.raises(ValueError, match=message):
        normalized_optimizer(TrainingArguments(str(tmp_path), use_cpu=True, **settings), lam=1.0)
