"""Does reinforcement learning narrow coverage, or widen it? From a base checkpoint and from a fine-tuned one.

    python -m recipes.reinforcement.course --config recipes/reinforcement/small.yaml

Takes a run of `recipes.pretrain` and follows one long run of each objective: rewards as GRPO takes them, rewards whose
gradient is that of Pass@k, and a bonus for responses that differ. With one right path to each prompt Pass@N, miss_N
and Cov_N are exact. An objective on a task, all its starts and seeds together, is one piece; what was computed is
kept, and a run that was stopped goes on where it was. Writes `course.md`, `course.json` and a figure for each task
into `<output_dir>`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.inference.files import strict_json
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Interval, Table
from recipes.reinforcement.graphs import read_lab
from recipes.tables import show, write_tables

PASSES, EDGES = (1, 8, 32), (8, 32)
LINES = ("-", "--", ":", "-.")

Course = dict[int, FloatArray]
"""By step, `(S, M, E)` log p(right|x), nats, of S seeds from M checkpoints on E prompts."""


def main() -> None:
    settings, lab = read_lab(sys.argv[1:], __doc__)
    asked = settings.course
    found = {
        task: {name: lab.run(task, name, asked.steps, asked.seeds, asked.measure_after) for name in asked.objectives}
        for task in asked.tasks
    }
    tables = [course_table(task, of_task, asked.steps) for task, of_task in found.items()]
    write_tables(lab.output / "course.md", tables)
    strict_json(summary(found, asked.steps), lab.output / "course.json")
    figures = [lab.output / f"course_{task.replace(' ', '_')}.png" for task in found]
    for (task, of_task), figure in zip(found.items(), figures):
        draw(task, of_task, asked.steps, figure)
    written = (lab.output / "course.md", lab.output / "course.json", *figures)
    show(tables, [f"Written: {', '.join(map(str, written))}"])


def curves(course: Course) -> dict[str, FloatArray]:
    """By measure, `(T, S, M)`: its mean over prompts at each step."""
    return {
        **{f"Pass@{n}": _means(course, lambda row, n=n: pass_probabilities(row, n)) for n in PASSES},
        **{f"Cov_{n}": _means(course, lambda row, n=n: reached(-row, n)) for n in EDGES},
    }


def course_table(task: str, of_task: Mapping[str, Course], starts: Sequence[int]) -> Table:
    """Where each objective leads, at the beginning, a quarter of the way and the end."""
    rows: list[list[Cell]] = []
    names = [*(f"Pass@{n}" for n in PASSES), *(f"Cov_{n}" for n in EDGES)]
    for index, start in enumerate(starts):
        for objective, course in of_task.items():
            steps, measured = list(course), curves(course)
            shown = sorted({0, min(steps, key=lambda step: abs(step - max(steps) / 4)), max(steps)})
            for step in shown if objective == next(iter(of_task)) else shown[1:]:
                at = steps.index(step)
                cells: list[Cell] = [_range(measured[name][at, :, index]) for name in names]
                rows.append([start, objective if step else "(before)", step, *cells])
    return Table(
        ["from step", "objective", "after", *names],
        rows,
        f"{task}: mean over prompts, with the range of the seeds. One path is right, so miss_N is 1 - Pass@N.",
    )


def summary(found: Mapping[str, Mapping[str, Course]], starts: Sequence[int]) -> dict[str, Any]:
    """All curves: by task, objective, start and measure, a row for each seed and a number for each step."""
    facts: dict[str, Any] = {}
    for task, of_task in found.items():
        for objective, course in of_task.items():
            measured = curves(course)
            facts.setdefault(task, {})[objective] = {"after": list(course)} | {
                f"from step {start}": {
                    name: values[:, :, index].T.round(5).tolist() for name, values in measured.items()
                }
                for index, start in enumerate(starts)
            }
    return facts


def draw(task: str, of_task: Mapping[str, Course], starts: Sequence[int], path: Path) -> None:
    """Pass@N over the steps, a panel for each N: objectives by colour, starts by line."""
    figure, axes = new_axes(len(PASSES), width=4.2, height=4.4)
    for (objective, course), color in zip(of_task.items(), COLORS):
        measured = curves(course)
        for index, (start, line) in enumerate(zip(starts, LINES)):
            for n, ax in zip(PASSES, axes):
                values = measured[f"Pass@{n}"][:, :, index].mean(axis=1)
                ax.plot(list(course), values, line, color=color, label=f"{objective}, from step {start}")
    for n, ax in zip(PASSES, axes):
        ax.set_title(f"Pass@{n}", fontsize=10)
        ax.set_xlabel("steps of RL")
        ax.set_ylim(0, 1.02)
    axes[0].set_ylabel("exact, mean of the seeds (higher is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(of_task), frameon=False, fontsize=8)
    figure.suptitle(f"RL on {task}: does coverage narrow or widen?")
    save_figure(figure, path)


def _means(course: Course, measure: Any) -> FloatArray:
    return np.array([[[measure(row).mean() for row in rows] for rows in table] for table in course.values()])


def _range(values: FloatArray) -> Interval:
    return Interval(float(values.mean()), float(values.min()), float(values.max()))


if __name__ == "__main__":
    main()
