"""Pre-train and fine-tune a small GPT-2 on graph search, with its coverage reported beside the loss.

    accelerate launch -m recipes.pretrain --config recipes/graph_search/small.yaml

The configuration has a section for each dataclass below and one for the `TrainingArguments` of each phase. Any value
can be given on the command line too, as `--section.name value`; those of `RunArguments` need no section:

    accelerate launch -m recipes.pretrain --config ... --seed 1 --output_dir runs/x --finetune.max_steps 600

A run that was stopped goes on from its last checkpoint when the same command is given again.

The Trainer does the work. This library adds the reference corpus with its exact log D(y|x) (`task.corpus`), the
callback that measures the model against it at every evaluation (`CoverageCallback`), and what can be read from the
profiles that it leaves behind (`report_checkpoints`).

References:
    arXiv 2510.15020, Appendix C and Figure 1.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_coverage import CoverageCallback
from hf_coverage.inference.loading import load_whole
from hf_coverage.measure.corpus import encode_corpus, reference_kind
from hf_coverage.tasks.graph_search import GraphSearch, GraphSearchDataset, collate_rows
from recipes.checkpoint_report import report_checkpoints
from recipes.profiles import step_of, write_profile
from recipes.settings import Settings, parse_section, read_settings, refuse_other_settings


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of checkpoints, profiles and the report."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the training data."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads a process; `accelerate launch` allows one if it is not told."}
    )


@dataclass
class TaskArguments:
    num_layers: int = 8
    nodes_per_layer: int = 4
    num_names: int = 100
    num_wide_layers: int = 2
    prompt_format: Literal["paper", "aligned"] = "paper"
    pretrain_weights: list[float] = field(default_factory=lambda: [1 / 3, 1 / 3, 1 / 3])
    finetune_weights: list[float] = field(default_factory=lambda: [0.9, 0.1, 0.0])
    pretrain_rows: int = field(default=512_000, metadata={"help": "Distinct prompts of the pre-training."})


@dataclass
class ModelArguments:
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 384
    dropout: float = 0.0


@dataclass
class MeasureArguments:
    rows: int = field(default=4000, metadata={"help": "Rows of the reference corpus."})
    corpus_seed: int = field(default=0, metadata={"help": "Seed of the corpus; runs to compare share it."})
    n: list[float] = field(default_factory=lambda: [2.0, 3.0, 4.0, 4.6, 5.7], metadata={"help": "The N of Cov_N."})
    pass_at: list[int] = field(default_factory=lambda: [4, 8, 12], metadata={"help": "The N of Pass@N."})


class KeepProfiles(TrainerCallback):
    """Write the profile of every evaluation into a file of its own, where a resumed run finds it again."""

    def __init__(self, coverage: CoverageCallback, folder: Path) -> None:
        self.coverage, self.folder = coverage, folder

    def on_evaluate(self, args, state, control, **kwargs):
        """Write the profile that the evaluation has just left behind."""
        if state.is_world_process_zero:
            write_profile(self.coverage.profile, self.folder, state.global_step)


def main() -> None:
    settings = read_settings(sys.argv[1:], list(SECTIONS), description=__doc__)
    run, task_args, model_args, measure, pretrain_args, finetune_args = parse_settings(settings)
    output = Path(run.output_dir)
    with pretrain_args.main_process_first():
        refuse_other_settings(output, settings | {"run": {"seed": run.seed}})
    if run.threads:
        torch.set_num_threads(run.threads)
    logging.disable_progress_bar()  # of writing and reading checkpoints; the training's own bar stays

    task = new_task(task_args)
    corpus = task.corpus(measure.rows, task_args.finetune_weights, seed=(measure.corpus_seed, 0))
    if reference_kind(corpus) != "single_answer":
        raise ValueError("`finetune_weights` must mix classes 1 and 2 only: Pass@N needs one right answer a prompt.")

    pretrained = pretrain(task, task_args, model_args, pretrain_args, seed=run.seed)
    coverage = CoverageCallback(corpus, n=measure.n)
    trainer = Trainer(
        model=load_whole(GPT2LMHeadModel, pretrained),
        args=finetune_args,
        data_collator=collate_rows,
        train_dataset=GraphSearchDataset(  # fresh data: every row is seen once, in order
            task, task_args.finetune_weights, rows_seen(finetune_args), seed=(run.seed, 1), cached_blocks=2
        ),
        eval_dataset=GraphSearchDataset(task, task_args.finetune_weights, 512, seed=(measure.corpus_seed, 2)),
        processing_class=task.tokenizer(),
        callbacks=[coverage, KeepProfiles(coverage, output / "profiles")],
    )
    train(trainer)

    if trainer.is_world_process_zero():
        report_checkpoints(
            output,
            n=measure.n,
            pass_at=measure.pass_at,
            settings=settings,
            name="GPT-2 fine-tuned on graph search",
            corpus=f"graph search, classes mixed as {task_args.finetune_weights}",
            corpus_fingerprint=encode_corpus(corpus, task.tokenizer()).fingerprint,
        )


def parse_settings(settings: Settings) -> list[Any]:
    """Turn each section into its dataclass; both phases live in the run's folder and share its seed."""
    run = parse_section(RunArguments, settings["run"])
    # half precision where the machine has it
    shared = {"seed": run.seed, "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}
    parsed = [run]
    for name in ("task", "model", "measure"):
        parsed.append(parse_section(SECTIONS[name], settings[name]))
    for name in ("pretrain", "finetune"):
        folder = {"output_dir": str(Path(run.output_dir) / name)}
        parsed.append(parse_section(TrainingArguments, shared | settings[name] | folder))
    return parsed


def new_task(args: TaskArguments) -> GraphSearch:
    """Build the task with the classes of Figure 1."""
    return GraphSearch.figure_1(
        num_layers=args.num_layers,
        nodes_per_layer=args.nodes_per_layer,
        num_names=args.num_names,
        num_wide_layers=args.num_wide_layers,
        prompt_format=args.prompt_format,
    )


def new_model(task: GraphSearch, args: ModelArguments) -> GPT2LMHeadModel:
    """Build a GPT-2 for the task's vocabulary and length."""
    tokenizer = task.tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=task.max_tokens,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own in one kernel, a fifth of the step's time less
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        bos_token_id=None,  # a path ends at its target, no token says so
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def pretrain(
    task: GraphSearch, task_args: TaskArguments, model_args: ModelArguments, args: TrainingArguments, *, seed: int
) -> Path:
    """Train a new model on all classes, and return its last checkpoint."""
    torch.manual_seed(seed)
    trainer = Trainer(
        model=new_model(task, model_args),
        args=args,
        data_collator=collate_rows,
        train_dataset=GraphSearchDataset(task, task_args.pretrain_weights, task_args.pretrain_rows, seed=(seed, 0)),
        processing_class=task.tokenizer(),
    )
    return train(trainer)


def rows_seen(args: TrainingArguments) -> int:
    """Count the rows that a phase reads."""
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def train(trainer: Trainer) -> Path:
    """Train to the end of the phase, from its last checkpoint if there is one, and return the one at the end."""
    folder = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None or step_of(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.accelerator.wait_for_everyone()
    end = last_checkpoint(folder)
    if end is None:
        raise ValueError(f"{folder} holds no checkpoint: the phase needs `save_strategy` steps and `save_steps`.")
    return end


def last_checkpoint(folder: Path) -> Path | None:
    """Find the last whole checkpoint; one cut short lacks `trainer_state.json`, which is written last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return checkpoint
    return None


SECTIONS = {
    "run": RunArguments,
    "task": TaskArguments,
    "model": ModelArguments,
    "measure": MeasureArguments,
    "pretrain": TrainingArguments,
    "finetune": TrainingArguments,
}


if __name__ == "__main__":
    main()
