"""The tasks that models are reinforced on, the checkpoints that this begins from, and runs side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from hf_coverage.functional.checks import FloatArray
from hf_coverage.tasks.graph_search import GraphSearch
from recipes.pretrain import SECTIONS, MeasureArguments, TaskArguments, new_task
from recipes.reinforcement.policy_gradient import Lessons, Objective, Rows, reinforce, right_logprobs
from recipes.reinforcement.stacked import StackedGPT2
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.stratified.graphs import checkpoints_of, load_graph_model

__all__ = ["GIVEN_UP", "HALVES", "MIXTURE", "TASKS", "Lab", "Settings", "read_lab"]

MIXTURE, HALVES, GIVEN_UP = "the mixture", "half and half", "the class given up"
TASKS = (MIXTURE, HALVES, GIVEN_UP)


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of the tables, the figures and what is kept."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class GraphArguments:
    config: str = field(metadata={"help": "Configuration of a run of recipes.pretrain."})
    run: str = field(metadata={"help": "Its folder."})


@dataclass
class LearningArguments:
    prompts: int = field(default=8, metadata={"help": "Prompts of a step."})
    group_size: int = field(default=8, metadata={"help": "Samples of a prompt."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of Adam, constant."})
    held_out: int = field(default=500, metadata={"help": "Prompts to measure on."})


@dataclass
class StartArguments:
    steps: list[int] = field(metadata={"help": "Steps of the fine-tuning to begin from; 0: before it."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of prompts and samples."})
    measure_after: list[int] = field(default_factory=lambda: [20, 40, 80, 160], metadata={"help": "Steps of a run."})
    rows: int = field(default=2000, metadata={"help": "Prompts that the measures before it rest on."})


@dataclass
class CourseArguments:
    steps: list[int] = field(metadata={"help": "Steps of the fine-tuning to begin from; 0: before it."})
    tasks: list[str] = field(metadata={"help": "What is learnt."})
    objectives: list[str] = field(metadata={"help": "What for; see recipes.reinforcement.policy_gradient."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of prompts and samples."})
    measure_after: list[int] = field(default_factory=lambda: [160, 640], metadata={"help": "Steps of a run."})


class Settings(NamedTuple):
    """The sections of the configuration."""

    run: RunArguments
    graphs: GraphArguments
    learning: LearningArguments
    start: StartArguments
    course: CourseArguments


KINDS = {
    "run": RunArguments,
    "graphs": GraphArguments,
    "learning": LearningArguments,
    "start": StartArguments,
    "course": CourseArguments,
}


class Lab:
    """Runs of reinforcement learning, each computed once.

    Args:
        settings: Where the models come from, how they learn, and the folder of what is kept.

    Raises:
        ValueError: If the folder is of other settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.output, self.graphs, self.learning = Path(settings.run.output_dir), settings.graphs, settings.learning
        if settings.run.threads is not None:
            torch.set_num_threads(settings.run.threads)
        logging.disable_progress_bar()
        measured = {"start": settings.start.measure_after, "course": settings.course.measure_after}
        decisive = {"graphs": asdict(self.graphs), "learning": asdict(self.learning), "measure_after": measured}
        refuse_other_settings(self.output, decisive)
        given = read_settings(["--config", self.graphs.config], list(SECTIONS), description=None)
        self._task_args = parse_section(TaskArguments, given["task"])
        self._corpus_seed = parse_section(MeasureArguments, given["measure"]).corpus_seed

    @cached_property
    def task(self) -> GraphSearch:
        """The graph search."""
        return new_task(self._task_args)

    def weights(self, task: str) -> Sequence[float]:
        """What a task mixes the classes as."""
        mixture = self._task_args.finetune_weights
        return {MIXTURE: mixture, HALVES: (0.5, 0.5, 0.0), GIVEN_UP: (0.0, 1.0, 0.0)}[task]

    def begin(self, steps: Sequence[int]) -> StackedGPT2:
        """Load the checkpoints of some steps of the fine-tuning, side by side; 0 is before it."""
        found = checkpoints_of(Path(self.graphs.run))
        missing = sorted(set(steps) - found.keys())
        if missing:
            raise ValueError(
                f"`steps` must be among those kept in {self.graphs.run}, {list(found)}, but has {missing}."
            )
        return StackedGPT2([load_graph_model(found[step]) for step in steps])

    def before(self, task: str, steps: Sequence[int], rows: int) -> FloatArray:
        """`(M, R)` log p(right|x), nats, under M checkpoints, on other prompts than runs are measured on."""

        def experiment() -> Any:
            asked = Rows.draw(self.task, self.weights(task), rows, seed=(self._corpus_seed, 1))
            return right_logprobs(self.begin(steps), asked).round(5).tolist()

        return np.array(remember(self.output / "pieces", ["before", task, rows, "at", *steps], experiment))

    def run(
        self, task: str, objective: str, steps: Sequence[int], seeds: Sequence[int], measure_after: Sequence[int]
    ) -> dict[int, FloatArray]:
        """By step `(S, M, R)` log p(right|x), nats, of S seeds from M checkpoints, with the one before as step 0."""

        def experiment() -> Any:
            weights, asked = self.weights(task), self.learning
            models = self.begin([step for _ in seeds for step in steps])
            each = [seed for seed in seeds for _ in steps]
            lessons = Lessons.draw(self.task, weights, each, steps=max(measure_after), prompts=asked.prompts)
            held_out = Rows.draw(self.task, weights, asked.held_out, seed=(self._corpus_seed, 0))
            options = {"group_size": asked.group_size, "learning_rate": asked.learning_rate}
            found = reinforce(
                models, lessons, held_out, Objective(objective), measure_after=(0, *measure_after), **options
            )
            return {step: logprobs.round(5).tolist() for step, logprobs in found.items()}

        key = ["run", objective, task, "from", *steps, "seeds", *seeds]
        kept = remember(self.output / "pieces", key, experiment)
        return {int(step): np.array(table).reshape(len(seeds), len(steps), -1) for step, table in kept.items()}


def read_lab(arguments: Sequence[str], description: str | None) -> tuple[Settings, Lab]:
    """Read `--config` and what is laid over it, and begin or go on in the folder that it names."""
    given = read_settings(arguments, list(KINDS), description=description)
    settings = Settings(*(parse_section(kind, given[name]) for name, kind in KINDS.items()))
    return settings, Lab(settings)
