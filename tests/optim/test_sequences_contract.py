"""A sequence's gradient is its own, however it lies in a batch: every trainer, padded, packed and flattened."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, kl_div
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_coverage import NormalizedSGD
from hf_coverage.functional.objectives import distillation_weights
from hf_coverage.optim.distillation import DistillationMixin
from hf_coverage.optim.objectives import CoverageLoss
from hf_coverage.optim.packing import packed_sequences
from hf_coverage.optim.trainer import SequenceLossMixin
from tests.measure.small_tokenizers import gpt2_like
from tests.optim.distillation_runs import tiny_teacher
from tests.optim.optimizers import weights
from tests.optim.trainer_runs import VOCABULARY, tiny_model

N = 8.0
PROMPT = 1
LENGTHS = [5, 2, 7, 1, 4, 6, 3, 3]


def rows():
    """Eight sequences with prompts of one token, one of them with nothing to predict."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]


def padded(side):
    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        filled = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}
        columns = {name: [] for name in filled}
        for row in batch:
            size = len(row["input_ids"])
            full = {**row, "attention_mask": [1] * size, "position_ids": list(range(size))}
            for name, value in filled.items():
                gap = [value] * (width - size)
                columns[name].append(gap + full[name] if side == "left" else full[name] + gap)
        return {name: torch.tensor(column) for name, column in columns.items()}

    return collate


def flattened(**settings):
    return lambda batch: DataCollatorWithFlattening(return_tensors="pt", **settings)(copy.deepcopy(batch))


def packed(batch):
    """Two rows of several sequences each; the labels at their beginnings are there, as a careless packing has them."""
    halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    joined = [
        {
            "input_ids": [token for row in half for token in row["input_ids"]],
            "labels": [label for row in half for label in (row["input_ids"][0], *row["labels"][1:])],
            "position_ids": [place for row in half for place in range(len(row["input_ids"]))],
        }
        for half in halves
        if half
    ]
    width = max(len(row["input_ids"]) for row in joined)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in joined])
        for name, value in fill.items()
    }


def of_trl(batch):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return collator(copy.deepcopy(batch))


COLLATORS = {
    "padded on the right": padded("right"),
    "padded on the left": padded("left"),
    "flattened": flattened(),
    "flattened with all that says so": flattened(return_seq_idx=True, return_flash_attn_kwargs=True),
    "packed, two rows": packed,
    "TRL, padding-free": of_trl,
}


def token_sums(model, loss_of_tokens):
    """What each sequence with a label has, alone in a batch."""
    sums = []
    for row in rows():
        if len(row["input_ids"]) > PROMPT:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids).logits[0, PROMPT - 1 : -1]
            sums.append(loss_of_tokens(logits, ids[0, PROMPT:], ids))
    return torch.stack(sums)


def cross_entropies(logits, targets, ids):
    return cross_entropy(logits, targets, reduction="sum")


def smoothed(logits, targets, ids):
    return cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)


def coverage(logits, targets, ids):
    return -torch.log(1 - (1 - torch.exp(-cross_entropies(logits, targets, ids))) ** N)


def distilled(soft):
    def loss_of_tokens(logits, targets, ids):
        with torch.no_grad():
            teacher = tiny_teacher().double().eval()(input_ids=ids).logits[0, PROMPT - 1 : -1].log_softmax(-1)
        each = kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
        weight = distillation_weights(each.detach(), torch.ones_like(each, dtype=torch.bool), N)
        return (weight * (each if soft else cross_entropy(logits, targets, reduction="none"))).sum()

    return loss_of_tokens


def own_loss(outputs, labels, num_items_in_batch):
    shifted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(*shifted, reduction="sum") / num_items_in_batch


class SequenceTrainer(SequenceLossMixin, Trainer):
    pass


class DistillationTrainer(DistillationMixin, Trainer):
    pass


class SequenceSFTTrainer(SequenceLossMixin, SFTTrainer):
    pass


class DistillationSFTTrainer(DistillationMixin, SFTTrainer):
    pass


TRAINERS = {
    "SequenceLossMixin": (SequenceTrainer, {}, cross_entropies),
    "SequenceLossMixin, label smoothing": (SequenceTrainer, {"label_smoothing_factor": 0.2}, smoothed),
    "SequenceLossMixin, a loss function": (SequenceTrainer, {"compute_loss_func": own_loss}, cross_entropies),
    "SequenceLossMixin, CoverageLoss": (SequenceTrainer, {"compute_loss_func": CoverageLoss(N)}, coverage),
    "SequenceLossMixin, TRL": (SequenceSFTTrainer, {}, cross_entropies),
    "SequenceLossMixin, TRL, CoverageLoss": (SequenceSFTTrainer, {"compute_loss_func": CoverageLoss(N)}, coverage),
    "DistillationMixin": (DistillationTrainer, {"teacher": True, "n": N}, distilled(False)),
    "DistillationMixin, soft": (DistillationTrainer, {"teacher": True, "n": N, "soft_targets": True}, distilled(True)),
    "DistillationMixin, TRL": (DistillationSFTTrainer, {"teacher": True, "n": N}, distilled(False)),
}


def make(folder, kind, collator=None, model=None, **changed):
    trainer_cls, settings, _ = TRAINERS[kind]
    settings = settings | changed
    names = ("compute_loss_func", "n", "soft_targets", "optimizer_cls_and_kwargs", "callbacks")
    extra = {name: settings.pop(name) for name in names if name in settings}
    if settings.pop("teacher", False):
        extra["teacher"] = tiny_teacher().double()
    arguments = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    } | settings
    is_trl = issubclass(trainer_cls, SFTTrainer)
    if is_trl:
        arguments |= {
            "bf16": False,
            "activation_checkpointing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        extra["processing_class"] = gpt2_like()
    return trainer_cls(
        model=tiny_model().double() if model is None else model,
        args=(SFTConfig if is_trl else TrainingArguments)(str(folder), **arguments),
        data_collator=collator or padded("right"),
        train_dataset=Dataset.from_list(rows()),
        **({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})} | extra),
    )


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")  # TRL's word on its next version
@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_is_the_mean_over_sequences_however_they_are_laid_out(tmp_path, kind, collator):
    trainer = make(tmp_path, kind, COLLATORS[collator])
    trainer.train()
    start = tiny_model().double()
    loss = token_sums(start, TRAINERS[kind][2]).mean()
    loss.backward()
    expected = weights(start) - torch.cat([p.grad.flatten() for p in start.parameters()])
    torch.testing.assert_close(weights(trainer.model), expected, rtol=1e-6, atol=1e-7)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("collator", ["padded on the right", "flattened", "packed, two rows"])
@pytest.mark.parametrize("kind", ["SequenceLossMixin", "SequenceLossMixin, CoverageLoss", "DistillationMixin, soft"])
def test_an_evaluation_is_the_mean_over_sequences_too(tmp_path, kind, collator):
    trainer = make(tmp_path, kind, COLLATORS[collator], per_device_eval_batch_size=8)
    expected = token_sums(tiny_model().double(), TRAINERS[kind][2]).mean().item()
    assert trainer.evaluate(Dataset.from_list(rows()))["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("collator", ["padded on the right", "flattened", "packed, two rows"])
def test_the_divergences_are_those_of_sequences(tmp_path, collator):
    trainer = make(tmp_path, "DistillationMixin", COLLATORS[collator], logging_steps=1)
    trainer.train()
    sums = token_sums(tiny_model().double(), distilled(True))
    assert (sums < math.log(N)).any()
    assert trainer.state.log_history[0]["stopped_kl"] == pytest.approx(sums.mean().item(), rel=1e-6)


def test_a_loss_of_coverage_in_a_loop_of_ones_own():
    model, batch = tiny_model().double(), packed(rows())
    outputs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    loss = CoverageLoss(N)(outputs, batch["labels"], position_ids=batch["position_ids"])
    torch.testing.assert_close(loss, token_sums(model, coverage).mean())


def test_packed_rows_are_refused_where_a_loss_cannot_see_them(tmp_path):
    class CoverageTrainer(Trainer):
        pass

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    trainer = CoverageTrainer(
        tiny_model(),
        arguments,
        data_collator=flattened(),
        train_dataset=Dataset.from_list(rows()),
        compute_loss_func=CoverageLoss(N),
    )
    with pytest.raises(ValueError, match=r"rows hold several sequences.*`SequenceLossMixin` for the Trainer"):
        trainer.train()


def test_packed_rows_under_an_attention_mask_are_refused(tmp_path):
    def masked(batch):
        batch = packed(batch)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    for kind in ("SequenceLossMixin", "DistillationMixin"):
        with pytest.raises(ValueError, match=r"there is an `attention_mask` too.*leave the mask out"):
            make(tmp_path, kind, masked).train()


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        ({"position_ids": [[0, 1, 2, 0, 1]]}, [[0, 0, 0, 1, 1]]),
        ({"position_ids": [[0, 0, 1], [0, 1, 2]]}, [[0, 1, 1], [2, 2, 2]]),
        ({"position_ids": [[2, 3, 4, 2, 3]]}, [[0, 0, 0, 1, 1]]),
        ({"position_ids": [[3, 4, 5, 0, 1]]}, [[0, 0, 0, 1, 1]]),
        ({"position_ids": [[[0, 1, 1, 0, 1]], [[0, 1, 2, 0, 1]], [[0, 1, 1, 0, 1]]]}, [[0, 0, 0, 1, 1]]),
        ({"seq_idx": [[0, 0, 1, 1, 1]]}, [[0, 0, 1, 1, 1]]),
        ({"input_ids": [[5, 5, 5, 5]], "cu_seq_lens_q": [0, 1, 4]}, [[0, 1, 1, 1]]),
        ({"position_ids": [[0, 1, 2]]}, None),
        ({"position_ids": [[0, 1, 2, 0, 0]], "attention_mask": [[1, 1, 1, 0, 0]]}, None),
        ({"position_ids": [[1, 1, 0, 1, 2]], "attention_mask": [[0, 0, 1, 1, 1]]}, None),
        ({"position_ids": [[0, 1, 2]] * 2, "attention_mask": [[1, 1, 1], [1, 1, 0]]}, None),
        ({"input_ids": [[5, 5]]}, None),
    ],
)
def test_where_sequences_begin(batch, number):
    found = packed_sequences({name: torch.tensor(value) for name, value in batch.items()})
    assert (None if found is None else found.number.tolist()) == number


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "SequenceLossMixin",
            {"max_grad_norm": 1.0, "optimizer_cls_and_kwargs": (NormalizedSGD, {"lr": 0.1, "lam": 1.0})},
            r"`max_grad_norm` is 1.0.*TrainingArguments\(max_grad_norm=0.0\)",
        ),
        (
            "SequenceLossMixin",
            {"optimizer_cls_and_kwargs": (NormalizedSGD, {"lr": 0.1, "lam": 1.0, "weight_decay": 0.1})},
            r"weight_decay of 0.1, which the Trainer's parameter groups override by 0.0",
        ),
        ("SequenceLossMixin, CoverageLoss", {"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1"),
        ("DistillationMixin", {"label_smoothing_factor": 0.1}, "`label_smoothing_factor` would do nothing"),
        ("DistillationMixin", {"compute_loss_func": own_loss}, "`compute_loss_func` and"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, kind, **settings).train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_n_gpu", 2, "one device for each process, got 2 GPUs in this one"),
        ("average_tokens_across_devices", False, "`average_tokens_across_devices=False` takes a mean over"),
    ],
)
@pytest.mark.parametrize("kind", ["SequenceLossMixin", "DistillationMixin"])
def test_settings_of_several_devices_are_refused(tmp_path, monkeypatch, kind, name, value, message):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    monkeypatch.setattr(TrainingArguments, "__post_init__", _then(TrainingArguments.__post_init__, name, value))
    if name == "_n_gpu":
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=message):
        make(tmp_path, kind)


def _then(init, name, value):
    def changed(self):
        init(self)
        if name != "_n_gpu":
            setattr(self, name, value)

    return changed


def test_a_trainer_without_the_mixin_that_clips_is_warned_of_once(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    trainer = Trainer(
        tiny_model(),
        arguments,
        data_collator=padded("right"),
        train_dataset=Dataset.from_list(rows()),
        optimizer_cls_and_kwargs=(NormalizedSGD, {"lr": 0.1, "lam": 1.0}),
    )
    with pytest.warns(UserWarning, match=r"`max_grad_norm` is 1.0: the Trainer clips the gradient before") as warned:
        trainer.train()
    assert len([entry for entry in warned if "max_grad_norm" in str(entry.message)]) == 1


def test_noise_on_embeddings_is_the_trainers_own(tmp_path):
    """NEFTune trains the student on noisy embeddings, and leaves the teacher's alone."""
    quiet, noisy = (make(tmp_path, "DistillationMixin", neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    for trainer in (quiet, noisy):
        trainer.train()
    assert not torch.equal(weights(quiet.model), weights(noisy.model))
    assert torch.equal(weights(noisy.teacher), weights(tiny_teacher().double()))


def test_logits_to_keep_is_refused(tmp_path):
    def collate(batch):
        return {**padded("right")(batch), "logits_to_keep": 1}

    with pytest.raises(ValueError, match="leave `logits_to_keep` out"):
        make(tmp_path, "DistillationMixin", collate).train()
