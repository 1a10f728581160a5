"""How much stratified sampling gains over independent sampling, at equal numbers of tokens and of verifier calls.

    python -m recipes.stratified.compare --config recipes/stratified/small.yaml

Takes checkpoints of `recipes.pretrain` and of `recipes.choice.finetune`, scores right answers with their intervals for
exact Pass@N, draws samples beside it, and sets other ways to spend eight verifier calls beside both. What was measured
is kept: a run that was stopped goes on where it was. Writes `tables.md` and `passes.png` into `<output_dir>`.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging

from hf_coverage import evaluate_best_of_n
from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.functional.checks import FloatArray
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2
from recipes.stratified.exact import INDEPENDENT, LATTICE, STRATIFIED, exact_passes, refuse_below
from recipes.stratified.graphs import ONE, Paths, checkpoints_of, load_graph_model
from recipes.stratified.questions import Questions
from recipes.stratified.rivals import Outcome, Rivals
from recipes.tables import interval_of, show, write_tables

SAMPLINGS = (INDEPENDENT, STRATIFIED)


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of the tables, the figure and what is kept."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class ExactArguments:
    n: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "The N of exact Pass@N."})


@dataclass
class GraphArguments:
    config: str = field(metadata={"help": "Configuration of a run of recipes.pretrain."})
    run: str = field(metadata={"help": "Its folder."})
    rows: int = field(default=1000, metadata={"help": "Prompts of its corpus that are scored."})
    shown: list[int] = field(default_factory=lambda: [0], metadata={"help": "Steps in the tables; 0: before it."})
    step: int = field(default=0, metadata={"help": "The step that samples are drawn from."})
    sampled_rows: int = field(default=400, metadata={"help": "Prompts that samples are drawn to."})
    samples: int = field(default=16, metadata={"help": "Samples of a prompt, judged through the library."})


@dataclass
class RivalArguments:
    size: int = field(default=8, metadata={"help": "Verifier calls."})
    temperatures: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Of sampling."})
    repeats: int = field(default=4, metadata={"help": "How often each random way is gone."})
    pool: int = field(default=32, metadata={"help": "Samples that RepExp chooses from."})
    draws: int = field(default=64, metadata={"help": "Most samples that different ones are looked for in."})


@dataclass
class QuestionArguments:
    config: str = field(metadata={"help": "Configuration of runs of recipes.choice.finetune."})
    runs: str = field(metadata={"help": "Their folder."})
    tasks: list[str] = field(metadata={"help": "The tasks whose checkpoints are scored."})
    sampled_task: str = field(metadata={"help": "The task that samples are drawn to."})
    sampled_step: int = field(metadata={"help": "From this step."})
    steps: list[int] = field(default_factory=lambda: [0], metadata={"help": "Steps that are scored; 0: as it came."})
    model: str = field(default=SMOLLM2, metadata={"help": "What was fine-tuned: a folder or Hub id."})
    seed: int = field(default=0, metadata={"help": "Seed of the runs that are taken."})
    questions: int = field(default=100, metadata={"help": "Held-out questions of a task."})
    samples: int = field(default=8, metadata={"help": "Samples of a question."})
    max_new_tokens: int = field(default=6, metadata={"help": "Most tokens of a sample."})


SECTIONS = {
    "run": RunArguments,
    "exact": ExactArguments,
    "graphs": GraphArguments,
    "rivals": RivalArguments,
    "questions": QuestionArguments,
}


class Settings(NamedTuple):
    """The sections of the configuration."""

    run: RunArguments
    exact: ExactArguments
    graphs: GraphArguments
    rivals: RivalArguments
    questions: QuestionArguments


class Scored(NamedTuple):
    """Right responses of prompts under one checkpoint.

    Attributes:
        lows: Where their intervals begin `(R, K)`.
        logprobs: Log-probabilities, nats `(R, K)`.
    """

    lows: FloatArray
    logprobs: FloatArray


class Study:
    """What is measured, each piece of it once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.output = Path(settings.run.output_dir)
        asked = settings.questions
        self._questions = Questions(asked.config, asked.runs, asked.model, asked.seed, asked.questions)

    @cached_property
    def paths(self) -> Paths:
        """The graphs' prompts and paths."""
        return Paths.draw(Path(self.settings.graphs.config), self.settings.graphs.rows)

    def graph_scores(self) -> dict[int, Scored]:
        """All valid paths under each checkpoint of the graphs' run."""
        return {step: self._scored(["paths", step], partial(self._score_paths, step)) for step in self._checkpoints}

    def question_scores(self) -> dict[tuple[str, int], Scored]:
        """The right answers under checkpoints of each task."""
        asked = self.settings.questions
        return {
            (task, step): self._scored(["answers", task, step], partial(self._questions.scores, task, step))
            for task in asked.tasks
            for step in asked.steps
        }

    def graph_samples(self) -> dict[str, BestOfNResult]:
        """Samples to the graphs' prompts, by sampling."""

        def rewards_of(sampling: str) -> dict[str, list[list[float]]]:
            corpus = Dataset.from_dict(
                {"prompt": self.paths.prompts[: len(self._answers)], "completion": self._answers.tolist()}
            )
            options = {"k": self.settings.graphs.samples, "max_new_tokens": self._answers.shape[1]}
            options |= {"batch_size": 512, "seed": self.settings.run.seed, "timeout": None, "progress": False}
            model = load_graph_model(self._checkpoints[self.settings.graphs.step])
            return {"rewards": evaluate_best_of_n(model, None, corpus, sampling=sampling, **options).rewards.tolist()}

        return self._samples("graphs", rewards_of)

    def question_samples(self) -> dict[str, BestOfNResult]:
        """Samples to the questions of one task, by sampling."""
        asked = self.settings.questions

        def rewards_of(sampling: str) -> dict[str, list[list[float]]]:
            options = {"k": asked.samples, "max_new_tokens": asked.max_new_tokens, "seed": self.settings.run.seed}
            folder = self.output / "samples" / sampling
            return self._questions.sampled(
                asked.sampled_task, asked.sampled_step, folder, sampling=sampling, batch_size=64, **options
            )

        return self._samples("questions", rewards_of)

    def rivals(self) -> dict[str, Outcome]:
        """What each way to spend the verifier calls comes to, on the graphs."""
        asked, step = self.settings.rivals, self.settings.graphs.step
        prompts, seed = self.paths.prompts[: len(self._answers)], self.settings.run.seed
        sizes = {"size": asked.size, "repeats": asked.repeats, "pool": asked.pool, "draws": asked.draws}
        rivals = Rivals(load_graph_model(self._checkpoints[step]), prompts, self._answers, seed=seed, **sizes)
        ways = rivals.ways(asked.temperatures)
        return {name: Outcome(*self._piece(["rivals", name], partial(_as_list, way))) for name, way in ways}

    @property
    def _checkpoints(self) -> dict[int, Path]:
        return checkpoints_of(Path(self.settings.graphs.run))

    @property
    def _answers(self) -> Any:
        """The right paths of the prompts that samples are drawn to `(P, T)`."""
        return self.paths.paths[self.paths.right[ONE]][: self.settings.graphs.sampled_rows]

    def _score_paths(self, step: int) -> dict[str, list[list[float]]]:
        return self.paths.scores(load_graph_model(self._checkpoints[step]))

    def _scored(self, key: Sequence[str | float], experiment: Callable[[], Any]) -> Scored:
        found = self._piece(key, experiment)
        return Scored(np.array(found["interval_low"]), np.array(found["logprob"]))

    def _samples(self, name: str, rewards_of: Callable[[str], Any]) -> dict[str, BestOfNResult]:
        found = {kind: self._piece(["samples", name, kind], partial(rewards_of, kind)) for kind in SAMPLINGS}
        return {
            INDEPENDENT: BestOfNResult.from_rewards(found[INDEPENDENT]["rewards"]),
            STRATIFIED: BestOfNResult.from_rewards(found[STRATIFIED]["rewards"], sampling="stratified"),
        }

    def _piece(self, key: Sequence[str | float], experiment: Callable[[], Any]) -> Any:
        return remember(self.output / "pieces", key, experiment)


def main() -> None:
    given = read_settings(sys.argv[1:], list(SECTIONS), description=__doc__)
    settings = Settings(*(parse_section(kind, given[name]) for name, kind in SECTIONS.items()))
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    logging.disable_progress_bar()
    study = Study(settings)
    refuse_other_settings(study.output, decisive(settings))
    graphs, answers, levels = study.graph_scores(), study.question_scores(), settings.exact.n
    shown = settings.graphs.shown
    exact = {step: passes_of(scored, levels, study.paths.right[ONE]) for step, scored in graphs.items()}
    tables = [
        graph_table(exact, shown),
        sampled_table(
            study.graph_samples(), graphs[settings.graphs.step], study.paths.right[ONE], f"step {settings.graphs.step}"
        ),
        question_table(answers, levels),
        sampled_table(
            study.question_samples(),
            answers.get((settings.questions.sampled_task, settings.questions.sampled_step)),
            None,
            f"{settings.questions.sampled_task}, step {settings.questions.sampled_step}, the task's own verifier",
        ),
        rival_table(study.rivals(), settings, graphs[settings.graphs.step], study.paths),
        verifier_table({step: graphs[step] for step in shown}, levels, study.paths),
    ]
    write_tables(study.output / "tables.md", tables)
    draw(exact, study.output / "passes.png")
    show(tables, [f"Written: {study.output / 'tables.md'} and {study.output / 'passes.png'}"])


def decisive(settings: Settings) -> dict[str, Any]:
    """What the kept pieces depend on besides their names."""
    sections = {name: asdict(section) for name, section in settings._asdict().items()}
    free = {
        "run": ("output_dir", "threads"),
        "exact": ("n",),
        "graphs": ("shown",),
        "rivals": ("temperatures",),
        "questions": ("tasks", "steps"),
    }
    return {
        name: {key: value for key, value in section.items() if key not in free[name]}
        for name, section in sections.items()
    }


def passes_of(scored: Scored, levels: Iterable[int], right: Any = None) -> dict[int, dict[str, FloatArray]]:
    """By N and way of drawing, `(R,)` exact Pass@N; never less of stratified samples than of independent ones."""
    passes = {n: exact_passes(*scored, n, right) for n in levels}
    for n, found in passes.items():
        refuse_below(found, f"at N = {n}")
    return passes


def graph_table(exact: dict[int, dict[int, dict[str, FloatArray]]], shown: Sequence[int]) -> Table:
    """Exact Pass@N of the one right path, at some steps and at the best of all."""
    rows: list[list[Cell]] = []
    for step in shown:
        rows += [[step, n, *_gain(found)] for n, found in exact[step].items()]
    for n in exact[shown[0]]:
        best = {kind: max(exact, key=lambda step: exact[step][n][kind].mean()) for kind in SAMPLINGS}
        independent, stratified = (exact[best[kind]][n][kind] for kind in SAMPLINGS)
        steps = " / ".join(str(best[kind]) for kind in SAMPLINGS)
        rows.append([f"the best: {steps}", n, *_gain({INDEPENDENT: independent, STRATIFIED: stratified})])
    return _gain_table(
        ["step"], rows, f"Graph search, {_prompts(exact[shown[0]])} prompts, one right path: exact Pass@N"
    )


def question_table(answers: dict[tuple[str, int], Scored], levels: Sequence[int]) -> Table:
    """Exact Pass@N of the right answers to questions."""
    rows: list[list[Cell]] = []
    for (task, step), scored in answers.items():
        rows += [[task, step, n, *_gain(found)] for n, found in passes_of(scored, levels).items()]
    count = len(next(iter(answers.values())).lows) if answers else 0
    return _gain_table(
        ["task", "step"], rows, f"Reasoning tasks, {count} questions each, the answer as written: exact Pass@N"
    )


def sampled_table(samples: dict[str, BestOfNResult], scored: Scored | None, right: Any, name: str) -> Table:
    """Pass@N of samples, beside the exact one of the same prompts where it is known."""
    rows: list[list[Cell]] = []
    for kind, result in samples.items():
        for n in result.levels():
            known = None
            if scored is not None:
                rows_of = None if right is None else right[: result.num_prompts]
                first = Scored(*(part[: result.num_prompts] for part in scored))
                known = float(passes_of(first, [n], rows_of)[n][kind].mean())
            rows.append([kind, n, Interval(result.pass_at(n), *result.interval(n)), known])
    first_result = samples[INDEPENDENT]
    return Table(
        ["sampling", "N", Column("sampled", "higher"), "exact"],
        rows,
        f"{name}: Pass@N from {first_result.k} samples to each of {first_result.num_prompts} prompts, with 95 % "
        "intervals over prompts, and the exact value for the same prompts.",
    )


def rival_table(outcomes: dict[str, Outcome], settings: Settings, scored: Scored, paths: Paths) -> Table:
    """What the verifier calls bring, by how the responses were made."""
    size, rows_of = settings.rivals.size, settings.graphs.sampled_rows
    first = Scored(*(part[:rows_of] for part in scored))
    exact = passes_of(first, [size], paths.right[ONE][:rows_of])[size]
    known = {f"{kind}, temperature 1": exact[kind] for kind in SAMPLINGS} | {LATTICE: exact[LATTICE]}
    baseline = np.array(outcomes[f"{INDEPENDENT}, temperature 1"].passed)
    rows: list[list[Cell]] = []
    for name, outcome in outcomes.items():
        passed = np.array(outcome.passed)
        less = None if name == f"{INDEPENDENT}, temperature 1" else interval_of(passed - baseline)
        exactly = float(known[name].mean()) if name in known else None
        means = float(np.mean(outcome.tokens)), float(np.mean(outcome.checked))
        rows.append([name, float(passed.mean()), less, exactly, *means])
    return Table(
        [
            "how",
            Column(f"Pass@{size}", "higher"),
            "less independent's",
            "exact",
            "tokens generated",
            "different ones checked",
        ],
        rows,
        f"Step {settings.graphs.step}, one right path, at most {size} verifier calls for each of {rows_of} prompts: "
        f"means of {settings.rivals.repeats} repetitions (one of RepExp, of different ones and of beam search), with "
        "Student's intervals over prompts of the paired difference.",
    )


def verifier_table(graphs: dict[int, Scored], levels: Sequence[int], paths: Paths) -> Table:
    """Exact Pass@N where a verifier takes several paths, of lattice codes too."""
    rows: list[list[Cell]] = []
    for verifier, right in paths.right.items():
        for step, scored in graphs.items():
            for n, found in passes_of(scored, levels, right).items():
                below = float((found[LATTICE] < found[INDEPENDENT] - 1e-6).mean())
                rows.append([verifier, step, n, *_gain(found), float(found[LATTICE].mean()), below])
    return _gain_table(
        ["right is", "step"],
        rows,
        "Verifiers that take one or several of the four valid paths: exact Pass@N",
        ["lattice", "prompts where the lattice is below independent"],
    )


def draw(exact: dict[int, dict[int, dict[str, FloatArray]]], path: Path) -> None:
    """Exact Pass@N over the fine-tuning, a panel for each N."""
    steps = list(exact)
    levels = list(exact[steps[0]])
    figure, axes = new_axes(len(levels), width=3.0, height=3.2)
    for n, ax in zip(levels, axes):
        for kind, color in zip(SAMPLINGS, COLORS):
            ax.plot(steps, [exact[step][n][kind].mean() for step in steps], color=color, label=kind)
        ax.set_title(f"Pass@{n}", fontsize=10)
        ax.set_xlabel("fine-tuning step")
    axes[0].set_ylabel("exact (higher is better)")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def _gain(found: dict[str, FloatArray]) -> list[Cell]:
    gain = interval_of(found[STRATIFIED] - found[INDEPENDENT])
    shown = Interval(*(round(end, 6) for end in gain))  # what is less is rounding
    return [float(found[INDEPENDENT].mean()), float(found[STRATIFIED].mean()), shown]


def _gain_table(heads: list[str], rows: list[list[Cell]], about: str, more: Sequence[str] = ()) -> Table:
    caption = f"{about} of N samples, with Student's interval over prompts of the paired gain."
    return Table([*heads, "N", INDEPENDENT, STRATIFIED, "gain", *more], rows, caption)


def _prompts(passes: dict[int, dict[str, FloatArray]]) -> int:
    return len(next(iter(passes.values()))[INDEPENDENT])


def _as_list(way: Callable[[], Outcome]) -> list[list[float]]:
    return list(way())


if __name__ == "__main__":
    main()
