"""Small real Trainer runs that the tests of the callbacks share, with the slow way to compute what they report."""

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

VOCABULARY = 12
PROMPTS = [[2, 3], [2, 4, 5], [6], [7, 8]]


def tiny_model(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """A random GPT-2 with dropout, so that an extra draw from the generator would change its training."""
    torch.manual_seed(seed)
    dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
        **dropouts,
    )
    return GPT2LMHeadModel(config)


def token_rows(count: int, length: int = 8, seed: int = 0) -> Dataset:
    """Random training rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (count, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def reference_corpus(kind: str = "density", rows: int = 24) -> Dataset:
    """Token id pairs with repeated prompts; `kind` as `reference_kind` names it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + row % 3 for row in range(rows)]
    columns: dict[str, Any] = {
        "prompt": [PROMPTS[row % len(PROMPTS)] for row in range(rows)],
        "completion": [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths],
    }
    if kind != "samples":
        log_density = -2.2 if kind == "density" else 0.0
        columns["reference_logprob"] = [log_density * n for n in lengths]
    return Dataset.from_dict(columns)


def make_trainer(output_dir: Any, *callbacks: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    """A Trainer that takes 8 steps, evaluating and saving every second one unless `settings` say otherwise."""
    extra = {key: settings.pop(key) for key in ("eval_dataset", "processing_class") if key in settings}
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 3e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(output_dir), **(defaults | settings)),
        train_dataset=token_rows(16),
        callbacks=list(callbacks),
        **({"eval_dataset": token_rows(8, seed=5)} | extra),
    )


class StopAt(TrainerCallback):
    """Ends a run early, as a time limit would: after the step was evaluated and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def coverage_history(trainer: Trainer, key: str = "eval_kl") -> list[dict[str, Any]]:
    """The entries of the log history that hold a metric."""
    return [entry for entry in trainer.state.log_history if key in entry]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without what differs between equal runs."""
    timed = ("_runtime", "_per_second", "_preparation_time")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history]


def metrics_by_definition(model: torch.nn.Module, corpus: Dataset, n: tuple[float, ...]) -> dict[str, float]:
    """Cov_N, KL and cross-entropy by one full forward pass for each row, in float64."""
    was_training = model.training
    model.eval()
    ratios, losses = [], []
    for row in corpus:
        ids = row["prompt"] + row["completion"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        loss = -sum(float(logprobs[i - 1, ids[i]]) for i in range(len(row["prompt"]), len(ids)))
        losses.append(loss)
        ratios.append(loss + row.get("reference_logprob", 0.0))
    model.train(was_training)
    metrics = {f"cov_{value:g}": sum(r >= math.log(value) for r in ratios) / len(ratios) for value in n}
    return metrics | {"kl": sum(ratios) / len(ratios), "sequence_cross_entropy": sum(losses) / len(losses)}
