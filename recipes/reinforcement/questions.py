"""TRL's GRPOTrainer from the checkpoints of fine-tunings on reasoning tasks: what comes of each, and what said so.

    python -m recipes.reinforcement.questions --config recipes/reinforcement/reasoning.yaml --questions.tasks gcd

Takes runs of `recipes.choice.finetune`, whose adapters on the last layers are trained further; rewards are the task's
own verdicts. Pass@N before and after is exact, of the answer as the corpus writes it, and takes no samples. A
checkpoint of a task is one piece: what was computed is kept, and a run that was stopped goes on with the next one.
Writes `questions.md` and `questions.json` of the pieces that were asked for into `<output_dir>`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from hf_coverage.decode.verifiers import ReasoningGym
from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.predictiveness import rank_correlations
from hf_coverage.inference.files import strict_json
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.report.table import Cell, Interval, Table
from recipes.choice.finetune import TASKS, recipe_of
from recipes.profiles import read_profiles, step_of
from recipes.reasoning.finetune import Recipe
from recipes.reasoning.model import load_base
from recipes.reasoning.task import entry_corpus
from recipes.reinforcement.start import MINE, measures
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2, load_tokenizer
from recipes.tables import interval_of, show, write_tables

PASSES = (1, 32)


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of the tables and of what is kept."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class QuestionArguments:
    config: str = field(metadata={"help": "Configuration of runs of recipes.choice.finetune."})
    runs: str = field(metadata={"help": "Their folder."})
    tasks: list[str] = field(metadata={"help": "Their tasks."})
    steps: list[int] = field(metadata={"help": "Steps of the fine-tuning to begin from."})
    model: str = field(default=SMOLLM2, metadata={"help": "What was fine-tuned: a folder or Hub id."})
    seed: int = field(default=0, metadata={"help": "Seed of the runs that are taken, and of the learning."})
    held_out: int = field(default=128, metadata={"help": "Held-out questions that are scored before and after."})


@dataclass
class GRPOArguments:
    max_steps: int = field(default=40, metadata={"help": "Steps from each checkpoint."})
    prompts: int = field(default=2, metadata={"help": "Questions of a step."})
    num_generations: int = field(default=8, metadata={"help": "Samples of a question."})
    max_completion_length: int = field(default=4, metadata={"help": "Most tokens of a sample."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of AdamW, constant."})


SECTIONS = {"run": RunArguments, "questions": QuestionArguments, "grpo": GRPOArguments}


class Settings(NamedTuple):
    """The sections of the configuration."""

    run: RunArguments
    questions: QuestionArguments
    grpo: GRPOArguments


class Outcome(NamedTuple):
    """What came of one checkpoint.

    Attributes:
        before: `(E,)` log p(right answer), nats, of held-out questions.
        after: The same after the learning.
        silent: By step of the learning, the share of groups whose rewards were all alike, as TRL logs it.
    """

    before: FloatArray
    after: FloatArray
    silent: FloatArray


class Study:
    """Learning from each checkpoint, once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.output = Path(settings.run.output_dir)

    def outcome(self, task: str, step: int) -> Outcome:
        """Train from one checkpoint of a task, where that was not done before."""
        kept = remember(self.output / "pieces", [task, step], lambda: self._learn(task, step))
        return Outcome(*(np.array(kept[name]) for name in Outcome._fields))

    def profiles(self, task: str) -> FloatArray:
        """`(M, R)` log p(right answer), nats, before the learning, on the questions that are not scored after it."""
        asked = self.settings.questions
        found = read_profiles(self._recipe(task).output / "profiles")
        missing = sorted(set(asked.steps) - found.keys())
        if missing:
            raise ValueError(f"{self._recipe(task).output} has no profiles of the steps {missing}: finish it first.")
        return np.array([found[step].logprobs[asked.held_out :] for step in asked.steps])

    @cached_property
    def _base(self) -> PreTrainedModel:
        return load_base(self.settings.questions.model)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.questions.model)

    def _recipe(self, task: str) -> Recipe:
        asked = self.settings.questions
        more = ["--config", asked.config, "--model.name", asked.model]
        return recipe_of(task, asked.seed, Path(asked.runs), more)

    def _learn(self, task: str, step: int) -> dict[str, list[float]]:
        asked, recipe = self.settings.questions, self._recipe(task)
        folders = {step_of(folder): folder for folder in recipe.output.glob("finetune/checkpoint-*")}
        if step not in folders:
            raise ValueError(
                f"{recipe.output} holds the steps {sorted(folders)}, but not {step}: run `recipes.choice.finetune`."
            )
        model = PeftModel.from_pretrained(self._base, folders[step], is_trainable=True)
        held_out = entry_corpus(recipe.held_out_entries()[: asked.held_out])
        encoded = encode_corpus(held_out, self._tokenizer, append_eos=True)
        before = score_encoded(model, encoded).logprob
        trainer = self._trainer(model, entry_corpus(recipe.train_entries()), verdicts(task))
        trainer.train()
        silent = [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log]
        after = score_encoded(model, encoded).logprob
        model.unload()
        return {"before": before.tolist(), "after": after.tolist(), "silent": silent}

    def _trainer(self, model: PeftModel, corpus: Dataset, reward: Any) -> GRPOTrainer:
        asked = self.settings.grpo
        options = GRPOConfig(
            output_dir=str(self.output / "trainer"),
            max_steps=asked.max_steps,
            per_device_train_batch_size=asked.prompts * asked.num_generations,
            num_generations=asked.num_generations,
            max_completion_length=asked.max_completion_length,
            learning_rate=asked.learning_rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=self.settings.questions.seed,
        )
        rows = corpus.remove_columns(["completion"])
        return GRPOTrainer(model, reward, args=options, train_dataset=rows, processing_class=self._tokenizer)


def main() -> None:
    given = read_settings(sys.argv[1:], list(SECTIONS), description=__doc__)
    settings = Settings(*(parse_section(kind, given[name]) for name, kind in SECTIONS.items()))
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    study, asked = Study(settings), settings.questions
    kept = {name: value for name, value in asdict(asked).items() if name not in ("tasks", "steps")}
    refuse_other_settings(study.output, {"questions": kept, "grpo": asdict(settings.grpo)})
    found = {task: {step: study.outcome(task, step) for step in asked.steps} for task in asked.tasks}
    tables = [outcome_table(found)]
    if len(asked.steps) > 2:
        tables.append(guide_table(found, study, settings.grpo.num_generations))
    write_tables(study.output / "questions.md", tables)
    strict_json(summary(found), study.output / "questions.json")
    show(tables, [f"Written: {study.output / 'questions.md'} and {study.output / 'questions.json'}"])


def verdicts(task: str) -> Any:
    """A task's own verdicts as rewards: 1 for a right response, 0 for all else."""
    options = TASKS.get(task, {})
    judge = ReasoningGym(task, **options)

    def is_right(completions: Sequence[str], answer: Sequence[str], metadata: Sequence[str], **_: Any) -> list[float]:
        scores = judge(completions, answer=answer, metadata=metadata)
        return [float(score >= 1) for score in scores]

    return is_right


def outcome_table(found: Mapping[str, Mapping[int, Outcome]]) -> Table:
    """Pass@N before and after from each checkpoint."""
    rows: list[list[Cell]] = []
    for task, of_task in found.items():
        for step, outcome in of_task.items():
            row: list[Cell] = [task, step]
            for n in PASSES:
                before, after = pass_probabilities(outcome.before, n), pass_probabilities(outcome.after, n)
                row += [float(before.mean()), float(after.mean()), interval_of(after - before)]
            rows.append([*row, float(outcome.silent.mean())])
    columns = [part for n in PASSES for part in (f"Pass@{n} before", f"Pass@{n} after", f"gain of Pass@{n}")]
    return Table(
        ["task", "from step", *columns, "silent groups"],
        rows,
        "Exact Pass@N of the answer as written on held-out questions, before and after the learning, with Student's "
        "interval of the gain over questions; and the mean share of groups without a signal that TRL logged.",
    )


def guide_table(found: Mapping[str, Mapping[int, Outcome]], study: Study, group_size: int) -> Table:
    """Rank correlation of what is measured before with what comes out."""
    rows: list[list[Cell]] = []
    for task, of_task in found.items():
        guides = {name: table for (name, _), table in measures(study.profiles(task), group_size, MINE).items()}
        after = np.array([outcome.after for outcome in of_task.values()])
        outcomes = {f"Pass@{n}": np.array([pass_probabilities(row, n) for row in after]) for n in PASSES}
        of = rank_correlations(guides, outcomes, outcome_groups=range(after.shape[1]))
        ranges = np.stack([of.values, of.low, of.high], axis=-1)
        for guide, cells in zip(of.guides, ranges):
            rows.append([task, guide, *(None if np.isnan(cell[0]) else Interval(*map(float, cell)) for cell in cells)])
    return Table(
        ["task", "measured before", *(f"Pass@{n} after" for n in PASSES)],
        rows,
        "Rank correlation over the checkpoints with what comes out on other questions: -1 is a perfect guide, above 0 "
        "misleads. In brackets the range of a bootstrap over questions, which is no confidence interval.",
    )


def summary(found: Mapping[str, Mapping[int, Outcome]]) -> dict[str, Any]:
    """The table's numbers."""
    return {
        task: {
            step: {
                when: {f"Pass@{n}": float(pass_probabilities(logprobs, n).mean()) for n in PASSES}
                for when, logprobs in (("before", outcome.before), ("after", outcome.after))
            }
            | {"silent": outcome.silent.tolist()}
            for step, outcome in of_task.items()
        }
        for task, of_task in found.items()
    }


if __name__ == "__main__":
    main()
