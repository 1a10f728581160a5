"""Small real Trainer runs with a teacher, on sequences of unequal lengths with prompts, padded on either side."""

import copy
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_coverage.optim.distillation import DistillationMixin
from tests.optim.trainer_runs import PAD, VOCABULARY, make_trainer, tiny_model


def tiny_teacher(vocab_size: int = VOCABULARY) -> GPT2LMHeadModel:
    """A random model of another width with dropout, sure enough of itself to diverge from the student."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=1, n_embd=24, n_head=2, vocab_size=vocab_size, n_positions=16, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    return model


def collate(rows: list[dict[str, list[int]]], side: str = "right", prompt: int = 1) -> dict[str, torch.Tensor]:
    """The first `prompt` tokens of a row are not learned."""
    length = max(len(row["ids"]) for row in rows)
    batch = {name: torch.full((len(rows), length), PAD) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids = torch.tensor(row["ids"])
        place = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        batch["input_ids"][i, place], batch["attention_mask"][i, place] = ids, 1
        batch["labels"][i, place] = torch.where(torch.arange(len(ids)) < prompt, -100, ids)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return batch


def distillation_trainer(output_dir: Any, *, n: float, teacher: Any = None, base: Any = Trainer, **settings: Any):
    """As `make_trainer`; `soft_targets`, `teacher_tokenizer`, `data_collator` and so on may be given."""
    names = ("soft_targets", "teacher_tokenizer", "processing_class", "data_collator", "eval_dataset")
    extra = {"data_collator": collate} | {key: settings.pop(key) for key in names if key in settings}

    class DistillationTrainer(DistillationMixin, base):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**(kwargs | extra), teacher=tiny_teacher() if teacher is None else teacher, n=n)

    return make_trainer(output_dir, trainer_cls=DistillationTrainer, **settings)


def loss_by_definition(student, teacher, rows, *, n, prompt=1, soft_targets=False):
    """A mean over sequences of weighted sums over tokens, one sequence and one token at a time."""
    teacher = copy.deepcopy(teacher).eval()
    budget = torch.tensor(n, dtype=torch.float64).log()
    losses = []
    for ids in rows:
        ids = torch.tensor([ids])
        log_p = student(input_ids=ids).logits[0].double().log_softmax(-1)
        log_q = teacher(input_ids=ids).logits[0].double().log_softmax(-1).detach()
        loss, spent = 0.0, 0.0
        for h in range(max(1, prompt), ids.shape[1]):
            kl = (log_q[h - 1].exp() * (log_q[h - 1] - log_p[h - 1])).sum()
            weight = ((budget - spent) / kl.detach()).clamp(0, 1)
            loss = loss + weight * (kl if soft_targets else -log_p[h - 1, ids[0, h]])
            spent = spent + kl.detach()
        losses.append(loss)
    return torch.stack(losses).mean()


__all__ = ["collate", "distillation_trainer", "loss_by_definition", "tiny_model", "tiny_teacher"]
