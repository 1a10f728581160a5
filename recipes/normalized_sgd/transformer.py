"""Does normalising the gradient help a real transformer? Six ways to train one, at equal steps and equal tuning.

    python -m recipes.normalized_sgd.transformer --config recipes/normalized_sgd/transformer_graph.yaml
    python -m recipes.normalized_sgd.transformer --config recipes/normalized_sgd/transformer_text.yaml

Every method has the same number of learning rates (section `rates`), seeds, steps and rows. The learning rate is
chosen on one half of the held-out rows, and the other half is reported. Writes `table.md` and `transformer.png`. What
was stopped goes on with the run that was stopped when the same command is given again.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_coverage import NormalizedSGD, SequenceLossMixin
from hf_coverage.optim.objectives import CoverageLoss
from hf_coverage.optim.trainer import normalized_optimizer
from recipes.normalized_sgd.transformer_findings import START, Run, report
from recipes.normalized_sgd.transformer_jobs import Job, TextArguments, graph_job, score, text_job
from recipes.pretrain import ModelArguments, TaskArguments
from recipes.remember import remember
from recipes.settings import Settings, parse_section, read_settings, refuse_other_settings


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    job: Literal["graph", "text"] = "graph"
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the training data."})
    rows: int = field(default=2000, metadata={"help": "Held-out rows; one half chooses, the other is reported."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class MeasureArguments:
    n: list[float] = field(default_factory=lambda: [2.0, 4.0, 5.7], metadata={"help": "The N of Cov_N."})
    pass_at: list[int] = field(default_factory=lambda: [4, 8, 12], metadata={"help": "The N of Pass@N."})
    choose_n: float = field(default=5.7, metadata={"help": "The N whose Cov_N chooses the learning rate; one of `n`."})
    train_n: float = field(default=12, metadata={"help": "The N of the coverage loss and of lambda."})


class SequenceTrainer(SequenceLossMixin, Trainer):
    """The gradient of the theory, for all methods: a sum over tokens, a mean over sequences."""


Method = Callable[[TrainingArguments, float], dict[str, Any]]
"""From the arguments, which it may change, and N to what else the Trainer is given."""


def clipped(args: TrainingArguments, n: float) -> dict[str, Any]:
    """SGD with the Trainer's own clipping."""
    args.max_grad_norm = 1.0
    return {}


def sign(args: TrainingArguments, n: float) -> dict[str, Any]:
    """Equation (20)."""
    return {"optimizer_cls_and_kwargs": normalized_optimizer(args, lam=0.0, per="coordinate")}


def normalized(args: TrainingArguments, n: float) -> dict[str, Any]:
    """Equation (18), with the lambda that Theorem 5.1 has for a step size: nothing more to tune."""
    lam = np.log(n) / (16 * args.learning_rate)
    return {"optimizer_cls_and_kwargs": (NormalizedSGD, {"lr": args.learning_rate, "lam": lam})}


def adamw(args: TrainingArguments, n: float) -> dict[str, Any]:
    """The Trainer's own, clipping included."""
    args.optim, args.max_grad_norm = "adamw_torch", 1.0
    return {}


def adamw_coverage(args: TrainingArguments, n: float) -> dict[str, Any]:
    """The same with the direct coverage loss."""
    return adamw(args, n) | {"compute_loss_func": CoverageLoss(n)}


METHODS: dict[str, Method] = {
    "SGD": lambda args, n: {},
    "SGD, clipped": clipped,
    "sign SGD": sign,
    "normalised SGD": normalized,
    "AdamW": adamw,
    "AdamW, coverage loss": adamw_coverage,
}
SECTIONS = {
    "run": RunArguments,
    "measure": MeasureArguments,
    "train": TrainingArguments,
    "task": TaskArguments,
    "model": ModelArguments,
    "pretrain": TrainingArguments,
    "text": TextArguments,
}


def main() -> None:
    settings = read_settings(sys.argv[1:], [*SECTIONS, "rates"], description=__doc__)
    run = parse_section(RunArguments, settings["run"])
    measure = parse_section(MeasureArguments, settings["measure"])
    output, rates = Path(run.output_dir), checked_rates(settings["rates"])
    # each learning rate and seed has a file of its own, so that more of them can be added
    own = {"measure": {"train_n": measure.train_n}, "run": {"job": run.job, "rows": run.rows}, "rates": {}}
    refuse_other_settings(output, settings | own)
    if run.threads:
        torch.set_num_threads(run.threads)
    logging.disable_progress_bar()
    job, console = new_job(run, settings), Console()
    start = remember(output / "runs", ("start",), lambda: score(job, job.new_model()).tolist())
    runs = {START: [Run(None, np.array([start] * len(run.seeds)))]}
    for name, tried in rates.items():
        runs[name] = []
        for rate in tried:
            began, logprobs = time.monotonic(), []
            for seed in run.seeds:
                args = train_arguments(output, settings["train"], rate=rate, seed=seed)
                experiment = partial(train_one, job, args, name, measure.train_n)
                logprobs.append(remember(output / "runs", (name, rate, seed), experiment))
            runs[name].append(Run(rate, np.array(logprobs)))
            seconds, loss = time.monotonic() - began, -np.mean(logprobs)
            console.print(f"{name}, {rate:g}: cross-entropy {loss:.3f} ({seconds:.0f} s)", markup=False)
    report(output, measure, job, runs)


def checked_rates(rates: dict[str, Any]) -> dict[str, list[float]]:
    """The learning rates of each method: as many for each."""
    unknown = sorted(rates.keys() - METHODS.keys())
    if unknown:
        raise ValueError(f"`rates` must name methods out of {', '.join(METHODS)}, got {unknown[0]!r}.")
    if len({len(tried) for tried in rates.values()}) != 1:
        counts = ", ".join(f"{name} {len(tried)}" for name, tried in rates.items())
        raise ValueError(f"`rates` must hold as many learning rates for each method, got {counts}.")
    return {name: [float(rate) for rate in tried] for name, tried in rates.items()}


def new_job(run: RunArguments, settings: Settings) -> Job:
    """Make what is to be trained, and on what."""
    if run.job == "text":
        return text_job(Path(run.output_dir), parse_section(TextArguments, settings["text"]), rows=run.rows)
    folder = {"output_dir": str(Path(run.output_dir) / "pretrain")}
    return graph_job(
        parse_section(TaskArguments, settings["task"]),
        parse_section(ModelArguments, settings["model"]),
        parse_section(TrainingArguments, settings["pretrain"] | folder),
        rows=run.rows,
    )


def train_arguments(output: Path, section: dict[str, Any], *, rate: float, seed: int) -> TrainingArguments:
    """The arguments of one run of plain SGD; a run is short, and starts anew if it was stopped."""
    own = {
        "output_dir": str(output / "unused"),
        "learning_rate": rate,
        "seed": seed,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return parse_section(TrainingArguments, section | own)


def train_one(job: Job, args: TrainingArguments, name: str, n: float) -> list[float]:
    """Train from the common start, and return log p(y|x) of the held-out rows, nats."""
    model = job.new_model()
    extra = METHODS[name](args, n)
    trainer = SequenceTrainer(
        model=model, args=args, train_dataset=job.train_rows(args), data_collator=job.collate, **extra
    )
    trainer.train()
    logprobs: list[float] = score(job, model).tolist()
    return logprobs


if __name__ == "__main__":
    main()
