"""Distillation in the real Trainer against one sequence and one token at a time."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from hf_coverage.functional import distillation
from hf_coverage.optim.distillation import DistillationMixin
from tests.measure.small_tokenizers import gpt2_like
from tests.optim import distillation_ranks
from tests.optim.distillation_runs import collate, distillation_trainer, loss_by_definition, tiny_model, tiny_teacher
from tests.optim.optimizers import weights
from tests.optim.trainer_runs import VOCABULARY, SequenceTrainer, make_trainer, token_rows
from tests.processes import run

ONE_STEP = {
    "max_steps": 1,
    "lr_scheduler_type": "constant",
    "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0}),
}
INFINITE = math.inf


def gradient_by_definition(model, loss):
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("n", [INFINITE, 8.0, 1.5])
def test_a_step_is_that_of_the_definition_in_float64(tmp_path, n, soft_targets, side):
    """Prompts of two tokens, two accumulation steps; rows of two tokens have no label and do not count."""
    rows, student, teacher = token_rows(8), tiny_model().double(), tiny_teacher().double()
    trainer = distillation_trainer(
        tmp_path,
        n=n,
        soft_targets=soft_targets,
        model=student,
        teacher=teacher,
        train_dataset=rows,
        data_collator=partial(collate, side=side, prompt=2),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **ONE_STEP,
    )
    trainer.train()
    start = tiny_model().double()
    learned = [ids for ids in rows["ids"] if len(ids) > 2]
    assert len(learned) < 8
    loss = loss_by_definition(start, teacher, learned, n=n, prompt=2, soft_targets=soft_targets)
    expected = weights(start) - gradient_by_definition(start, loss)
    torch.testing.assert_close(weights(trainer.model), expected, rtol=1e-9, atol=1e-9)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_the_divergences_are_logged(tmp_path):
    rows, student, teacher = token_rows(8), tiny_model(), tiny_teacher()
    trainer = distillation_trainer(tmp_path, n=8.0, teacher=teacher, train_dataset=rows, **ONE_STEP)
    trainer.train()
    per_row = [loss_by_definition(student, teacher, [ids], n=1e300, soft_targets=True).item() for ids in rows["ids"]]
    tokens = sum(len(ids) - 1 for ids in rows["ids"])
    stopped = [min(math.log(8), kl) for kl in per_row]
    logs = trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(np.mean(per_row), rel=1e-4)
    assert logs["kl_per_token"] == pytest.approx(sum(per_row) / tokens, rel=1e-4)
    assert logs["stopped_kl"] == pytest.approx(np.mean(stopped), rel=1e-4)
    assert 0.1 < logs["stopped_tokens"] < 0.9
    assert max(per_row) > math.log(8) > min(per_row)


def test_logs_are_means_over_the_steps_since_the_last(tmp_path):
    every = distillation_trainer(tmp_path, n=8.0, per_device_train_batch_size=8)
    every.train()
    once = distillation_trainer(tmp_path, n=8.0, per_device_train_batch_size=8, logging_steps=4)
    once.train()
    parts = [row for row in every.state.log_history if "loss" in row]
    (whole,) = [row for row in once.state.log_history if "loss" in row]
    assert len(parts) == 4
    for name in ("kl", "stopped_kl"):
        assert whole[name] == pytest.approx(np.mean([row[name] for row in parts]), rel=1e-9)


def test_with_soft_targets_the_loss_is_the_stopped_divergence(tmp_path):
    trainer = distillation_trainer(tmp_path, n=8.0, soft_targets=True)
    trainer.train()
    for row in trainer.state.log_history[:4]:
        assert row["loss"] == pytest.approx(row["stopped_kl"], rel=1e-5)


def test_without_a_stop_and_without_a_teachers_say_it_is_maximum_likelihood(tmp_path):
    """Plain distillation on sampled tokens is the Trainer's own loss with a mean over sequences."""
    plain = distillation_trainer(tmp_path, n=INFINITE, data_collator=partial(collate, prompt=1))
    plain.train()
    builtin = make_trainer(tmp_path, trainer_cls=SequenceTrainer)
    builtin.train()
    torch.testing.assert_close(weights(plain.model), weights(builtin.model), rtol=0, atol=1e-6)
    assert plain.state.log_history[0]["stopped_tokens"] == 0.0


def test_an_evaluation_reports_the_divergences_and_keeps_the_models_logits(tmp_path):
    rows, teacher, seen = token_rows(6), tiny_teacher(), []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer = distillation_trainer(tmp_path, n=8.0, teacher=teacher, soft_targets=True)
    trainer.compute_metrics = metrics
    found = trainer.evaluate(rows)
    expected = loss_by_definition(tiny_model(), teacher, rows["ids"], n=8.0, soft_targets=True).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_stopped_kl"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_kl"] > found["eval_stopped_kl"] > found["eval_kl_per_token"] > 0
    assert seen == [(6, max(map(len, rows["ids"])), VOCABULARY)]
    assert trainer.predict(rows).metrics["test_stopped_kl"] == found["eval_stopped_kl"]


def test_an_evaluation_leaves_the_trainings_tally_alone(tmp_path):
    settings = {"per_device_train_batch_size": 8, "logging_steps": 4}
    alone = distillation_trainer(tmp_path, n=8.0, **settings)
    alone.train()
    beside = distillation_trainer(
        tmp_path,
        n=8.0,
        eval_dataset=token_rows(4),
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        **settings,
    )
    beside.train()
    logs = [[row for row in run.state.log_history if "loss" in row] for run in (alone, beside)]
    assert logs[0][0]["kl"] == logs[1][0]["kl"]
    assert sum("eval_stopped_kl" in row for row in beside.state.log_history) == 5


class Watch(TorchDispatchMode):
    """Which tensors are made, and whether one is read on the host."""

    def __init__(self):
        super().__init__()
        self.shapes, self.names = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        self.shapes += [
            part.shape for part in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(part)
        ]
        return made


def largest_over_the_vocabulary(trainer, batch, vocab_size):
    """The most tokens whose distribution is held in one tensor during a step, forward and backward."""
    with Watch() as watch:
        trainer.compute_loss(trainer.model, batch).backward()
    with Watch() as models:
        for model in (trainer.model, trainer.teacher):
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    read = "aten::_local_scalar_dense"  # the models ask whether the mask is all ones
    assert watch.names.count(read) == models.names.count(read)
    heads = [model.get_output_embeddings().weight.t().shape for model in (trainer.model, trainer.teacher)]
    return max(shape[:-1].numel() for shape in watch.shapes if shape[-1:] == (vocab_size,) and shape not in heads)


@pytest.mark.parametrize("soft_targets", [False, True])
def test_a_step_never_holds_all_logits_nor_reads_a_value_on_the_host(tmp_path, monkeypatch, soft_targets):
    vocab_size, tokens_at_once = 101, 5
    monkeypatch.setattr(distillation, "_CPU_CHUNK", tokens_at_once * vocab_size)
    trainer = distillation_trainer(
        tmp_path,
        n=INFINITE,
        model=tiny_model(),
        soft_targets=soft_targets,
    )
    trainer.model.resize_token_embeddings(vocab_size, mean_resizing=False)
    trainer.teacher.resize_token_embeddings(vocab_size, mean_resizing=False)
    batch = collate(list(token_rows(16)))
    tokens = int((batch["labels"] != -100).sum())
    assert tokens > 10 * tokens_at_once
    assert largest_over_the_vocabulary(trainer, batch, vocab_size) == tokens_at_once
    trainer._in_chunks = False
    assert largest_over_the_vocabulary(trainer, batch, vocab_size) >= tokens


def soft_capped():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("capped", ["student", "teacher"])
def test_a_model_that_changes_its_heads_logits_is_taken_at_its_word(tmp_path, capped):
    student, teacher = (soft_capped(), tiny_teacher()) if capped == "student" else (tiny_model(), soft_capped())
    trainer = distillation_trainer(
        tmp_path, n=8.0, model=student, teacher=teacher, train_dataset=token_rows(8), **ONE_STEP
    )
    start = copy.deepcopy(student)
    trainer.train()
    loss = loss_by_definition(start, teacher, token_rows(8)["ids"], n=8.0)
    expected = weights(start) - gradient_by_definition(start, loss)
    torch.testing.assert_close(weights(trainer.model), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_is_the_teachers_too(tmp_path):
    teacher, dtypes = tiny_teacher(), []
    teacher.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    half = distillation_trainer(tmp_path, n=8.0, teacher=teacher, bf16=True)
    dtypes.clear()  # of the look at its head
    half.train()
    full = distillation_trainer(tmp_path, n=8.0)
    full.train()
    assert set(dtypes) == {torch.bfloat16}
    assert half._in_chunks
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    for ours, exact in zip(half.state.log_history[:4], full.state.log_history[:4]):
        assert ours["kl"] == pytest.approx(exact["kl"], rel=0.05)
        assert ours["kl"] != exact["kl"]


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    def run(**train_settings):
        trainer = distillation_trainer(
            tmp_path,
            n=8.0,
            model=tiny_model(dropout=0.1),
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(**train_settings)
        return weights(trainer.model), trainer.state.log_history[-2]

    whole, logs = run()
    resumed, its_logs = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed, whole)
    assert its_logs["stopped_kl"] == logs["stopped_kl"]
    assert not list(tmp_path.glob("checkpoint-2/*teacher*"))


def test_the_teacher_is_as_it_was(tmp_path):
    teacher = tiny_teacher().train()
    before = copy.deepcopy(teacher.state_dict())
    distillation_trainer(tmp_path, n=8.0, teacher=teacher).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_trl_trains_with_it(tmp_path):
    class DistillationSFTTrainer(DistillationMixin, SFTTrainer):
        pass

    args = SFTConfig(
        str(tmp_path),
        max_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        activation_checkpointing=False,
    )
    teacher, rows = tiny_teacher(), token_rows(8)
    trainer = DistillationSFTTrainer(
        tiny_model(),
        args,
        train_dataset=rows.map(lambda row: {"input_ids": row["ids"]}, remove_columns="ids"),
        data_collator=lambda rows: collate([{"ids": row["input_ids"]} for row in rows]),
        processing_class=gpt2_like(),
        optimizer_cls_and_kwargs=ONE_STEP["optimizer_cls_and_kwargs"],
        teacher=teacher,
        n=8.0,
    )
    trainer.train()
    start = tiny_model()
    loss = loss_by_definition(start, teacher, rows["ids"], n=8.0)
    expected = weights(start) - gradient_by_definition(start, loss)
    torch.testing.assert_close(weights(trainer.model), expected, rtol=0, atol=1e-5)
    assert trainer.state.log_history[0]["stopped_kl"] > 0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each of two ranks ended with, and what it logged."""
    folder = tmp_path_factory.mktemp("job")
    run(distillation_ranks.__file__, folder, ranks=2)
    ranks = [folder / f"rank{rank}" for rank in range(2)]
    return [(dict(np.load(f"{path}.npz")), json.loads(Path(f"{path}.json").read_text())) for path in ranks]


@pytest.mark.parametrize("name", distillation_ranks.RUNS)
def test_two_ranks_agree_with_one_process(job, tmp_path, name):
    """Two sequences to a rank and accumulation step, against eight at once."""
    trainer = distillation_ranks.run(name, tmp_path, per_device_train_batch_size=8)
    trainer.train()
    for results, _ in job:
        torch.testing.assert_close(torch.tensor(results[name]), weights(trainer.model), rtol=0, atol=1e-6)
    logs, expected = job[0][1][name], trainer.state.log_history[0]
    assert logs == job[1][1][name]
    for key in {"loss", "kl", "kl_per_token", "stopped_kl", "stopped_tokens"} & expected.keys():
        assert logs[key] == pytest.approx(expected[key], rel=1e-4), key
    if name == "sampled":
        evaluation = trainer.evaluate(token_rows(8))
        for key in ("eval_loss", "eval_kl", "eval_stopped_kl"):
            assert job[0][1]["evaluation"][key] == pytest.approx(evaluation[key], rel=1e-4), key


def test_sharded_models_agree_with_whole_ones(job, tmp_path):
    expected = distillation_ranks.train_sharded(tmp_path, 0, 1)
    for results, _ in job:
        torch.testing.assert_close(torch.tensor(results["fsdp"]), expected, rtol=0, atol=1e-6)


def test_vocabularies_that_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has 13 tokens and GPT2LMHeadModel 12.*resize_token_embedd"):
        distillation_trainer(tmp_path, n=8.0, teacher=tiny_teacher(VOCABULARY + 1))


def test_tokenizers_that_differ_are_refused(tmp_path):
    tokenizer, other = gpt2_like(), copy.deepcopy(gpt2_like())
    settings = {"processing_class": tokenizer, "n": 8.0}
    assert distillation_trainer(tmp_path, teacher_tokenizer=other, **settings)
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=f"'<think>' is {len(other) - 1} for the teacher and None for the model"):
        distillation_trainer(tmp_path, teacher_tokenizer=other, **settings)
    with pytest.raises(ValueError, match="`processing_class`, which must be the model's tokenizer, got NoneType"):
        distillation_trainer(tmp_path, teacher_tokenizer=other, n=8.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0.9}, "`n` must be a finite number >= 1"),
        (
            {"n": 8.0, "compute_loss_func": lambda *args: None},
            "`compute_loss_func` and `label_smoothing_factor` would",
        ),
        ({"n": 8.0, "label_smoothing_factor": 0.1}, "`compute_loss_func` and `label_smoothing_factor` would"),
        ({"n": 8.0, "use_liger_kernel": True}, "`use_liger_kernel=True` replaces the model's forward"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distillation_trainer(tmp_path, **settings)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = distillation_trainer(tmp_path, n=8.0).args
    args._n_gpu = 2

    class TwoDevices(DistillationMixin, Trainer):
        pass

    with pytest.raises(ValueError, match="one device for each process, got 2 GPUs"):
        TwoDevices(tiny_model(), args, teacher=tiny_teacher(), n=8.0)


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = distillation_trainer(tmp_path, n=8.0)
    with pytest.raises(ValueError, match="distillation needs `labels` in every batch"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 2, dtype=torch.int64)})
