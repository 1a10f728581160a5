"""Small real Trainer runs with normalised SGD and the theory's loss, on sequences of unequal lengths."""

from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_coverage import NormalizedSGD, SequenceLossMixin

VOCABULARY = 12
PAD = 0


class SequenceTrainer(SequenceLossMixin, Trainer):
    """The Trainer with a mean over sequences."""


def tiny_model(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


def token_rows(count: int = 32) -> Dataset:
    """Rows of 2 to 12 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"ids": [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]}
    )


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
    }


def make_trainer(
    output_dir: Any, *, trainer_cls: type[Trainer] = SequenceTrainer, model: Any = None, **settings: Any
) -> Trainer:
    """Eight sequences a step in all, however they are parted; `settings` go to TrainingArguments but for a few."""
    names = ("optimizer_cls_and_kwargs", "compute_loss_func", "callbacks", "train_dataset")
    extra = {key: settings.pop(key) for key in names if key in settings}
    defaults = {
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    optimizer = (NormalizedSGD, {"lr": 0.3, "lam": 1.0})
    return trainer_cls(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(output_dir), **(defaults | settings)),
        data_collator=collate,
        **({"train_dataset": token_rows(), "optimizer_cls_and_kwargs": optimizer} | extra),
    )
