"""The direct coverage loss in the real Trainer."""

import math

import pytest
import torch
from transformers import Trainer

from hf_coverage.optim.objectives import CoverageLoss, log_linear_n
from tests.optim.optimizers import weights
from tests.optim.trainer_runs import SequenceTrainer, collate, make_trainer, tiny_model, token_rows


def loss_by_definition(model, rows, n):
    """A mean over sequences of -log(1 - (1 - p)^n), p a product over tokens."""
    losses = []
    for ids in rows:
        ids = torch.tensor([ids])
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        p = logprobs.gather(-1, ids[0, 1:, None]).exp().prod()
        losses.append(-torch.log(1 - (1 - p) ** n))
    return torch.stack(losses).mean()


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("n", [1, 3.5, 64])
def test_loss_and_gradient_are_the_definition(n):
    """Two tokens under a random model have p about 1/12, which 64 samples find; four have not."""
    rows = [row[:4] for row in token_rows(6)["ids"]]
    model = tiny_model().eval()
    loss_by_definition(model, rows, n).backward()
    expected, _ = gradient_of(model), model.zero_grad()
    batch = collate([{"ids": row} for row in rows])
    loss = CoverageLoss(n)(model(batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"])
    loss.backward()
    torch.testing.assert_close(gradient_of(model), expected, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(loss_by_definition(model, rows, n).item(), rel=1e-6)


def test_at_one_sample_training_is_that_of_cross_entropy(tmp_path):
    loss = CoverageLoss(1)
    ours = make_trainer(tmp_path, per_device_train_batch_size=8, compute_loss_func=loss)
    builtin = make_trainer(tmp_path, per_device_train_batch_size=8)
    ours.train(), builtin.train()
    torch.testing.assert_close(weights(ours.model), weights(builtin.model), rtol=0, atol=1e-6)
    assert [row["loss"] for row in ours.state.log_history[:4]] == pytest.approx(
        [row["loss"] for row in builtin.state.log_history[:4]], rel=1e-5
    )


def test_four_accumulation_steps_equal_one_big_batch(tmp_path):
    settings = {"compute_loss_func": CoverageLoss(500)}
    parted = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    parted.train()
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    whole.train()
    torch.testing.assert_close(weights(parted.model), weights(whole.model), rtol=0, atol=1e-6)


def test_prompts_padding_and_rows_without_labels_do_not_count():
    labels = torch.tensor([[-100, -100, 4, 5], [-100, 6, 7, -100], [-100] * 4])
    logits = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = CoverageLoss(4)({"logits": logits}, labels)
    logprobs = logits.log_softmax(-1)
    sums = torch.stack([logprobs[0, 1, 4] + logprobs[0, 2, 5], logprobs[1, 0, 6] + logprobs[1, 1, 7]])
    expected = -torch.log(1 - (1 - sums.exp()) ** 4).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(CoverageLoss(4)({"logits": logits}, labels, torch.tensor(8)), expected / 4)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])
    assert not found[0, [0, 3]].any()
    assert not found[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_half_precision_are_summed_in_float32(dtype):
    logits = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(1))
    loss = CoverageLoss(8)({"logits": logits}, labels)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(CoverageLoss(8)({"logits": logits.double()}, labels).item(), rel=1e-5)


class Recorded(CoverageLoss):
    """Keeps the N of each call."""

    def __init__(self, n):
        super().__init__(n)
        self.seen = []

    def __call__(self, *args, **kwargs):
        self.seen.append(self.n)
        return super().__call__(*args, **kwargs)


def test_a_schedule_follows_the_steps_not_the_batches(tmp_path):
    loss = Recorded(log_linear_n(1, 16))
    make_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        compute_loss_func=loss,
        callbacks=[loss],
    ).train()
    assert loss.seen == pytest.approx([1, 1, 2, 2, 4, 4, 8, 8])


def test_a_resumed_run_goes_on_with_its_n_bitwise(tmp_path):
    def run(**train_settings):
        loss = Recorded(log_linear_n(16, 1))
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=8,
            compute_loss_func=loss,
            callbacks=[loss],
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(**train_settings)
        return weights(trainer.model), loss.seen

    whole, all_seen = run()
    resumed, seen = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed, whole)
    assert seen == all_seen[2:] == pytest.approx([4, 2])


def test_an_evaluation_takes_the_n_of_the_moment(tmp_path):
    loss = Recorded(log_linear_n(1, 16))
    trainer = make_trainer(tmp_path, compute_loss_func=loss, callbacks=[loss], eval_strategy="no")
    trainer.train()
    loss.seen.clear()
    rows = token_rows(8)
    found = trainer.evaluate(rows)["eval_loss"]
    assert set(loss.seen) == {8.0}
    assert found == pytest.approx(loss_by_definition(trainer.model, rows["ids"], 8.0).item(), rel=1e-4)


def test_a_schedule_that_nobody_moves_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, compute_loss_func=CoverageLoss(log_linear_n(1, 16)))
    with pytest.raises(ValueError, match="in `callbacks` as well as in `compute_loss_func`"):
        trainer.train()


def test_a_model_that_keeps_its_logits_is_refused():
    with pytest.raises(ValueError, match=r"returned no logits.*`use_liger_kernel=True` lets a model take"):
        CoverageLoss(n=4)({"logits": None, "loss": torch.tensor(1.0)}, torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "the coverage loss needs `labels` in every batch"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\(B, T\) of the logits, \(2, 4\), got \(2, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        CoverageLoss(2)({"logits": torch.zeros(2, 4, 12)}, labels)


@pytest.mark.parametrize("make", [CoverageLoss, lambda n: log_linear_n(n, 2), lambda n: log_linear_n(2, n)])
@pytest.mark.parametrize("n", [0.5, math.inf])
def test_an_n_below_one_is_refused(make, n):
    with pytest.raises(ValueError, match="`n` must be a finite number >= 1"):
        make(n)


@pytest.mark.parametrize("mixin", [True, False])
def test_the_reported_loss_is_that_of_sequences_with_the_mixin_and_of_tokens_without(tmp_path, mixin):
    """As documented. The Trainer counts each row's first token for GPT-2, although nothing predicts it."""
    rows = token_rows(8)
    trainer = make_trainer(
        tmp_path,
        trainer_cls=SequenceTrainer if mixin else Trainer,
        train_dataset=rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        compute_loss_func=CoverageLoss(16),
        max_steps=1,
    )
    trainer.train()
    expected = loss_by_definition(tiny_model(), rows["ids"], 16).item()
    if not mixin:
        expected *= 8 / sum(map(len, rows["ids"]))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
