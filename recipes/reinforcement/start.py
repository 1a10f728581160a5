"""Which checkpoint of the main job should reinforcement learning start from, and what says so beforehand?

    python -m recipes.reinforcement.start --config recipes/reinforcement/small.yaml

Takes a run of `recipes.pretrain`, reinforces its checkpoints on three tasks, and sets p(right) afterwards, which is
exact, beside what was measured before. All checkpoints of a task and seed are one piece; what was computed is kept,
and a run that was stopped goes on where it was. Writes `start.md`, `start.json`, `starts.png` and `guides.png` into
`<output_dir>`.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.predictiveness import RankCorrelations, rank_correlations
from hf_coverage.inference.files import strict_json
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Interval, Table
from recipes.reinforcement.graphs import MIXTURE, TASKS, Lab, StartArguments, read_lab
from recipes.tables import show, write_tables

MINE, OTHER = "of the task", "of the mixture"
KL, SIGNAL = "KL", "no signal"
LAST, FIRST, RANDOM = "the last", "the first", "one at random"
MARKS = {(KL, OTHER): "o", (KL, MINE): "s", (SIGNAL, MINE): "^"}
"""Rules in the figure of choices."""


class Found(NamedTuple):
    """What was found on one task, from M checkpoints.

    Attributes:
        guides: By name and by whose prompts, `(M, R)` what is measured before; lower is better.
        outcomes: By steps of reinforcement learning, `(S, M, E)` p(right) of S seeds on E held-out prompts.
    """

    guides: dict[tuple[str, str], FloatArray]
    outcomes: dict[int, FloatArray]

    def after(self, step: int) -> FloatArray:
        """`(M,)` p(right) after so many steps, mean over seeds and prompts."""
        return self.outcomes[step].mean(axis=(0, 2))

    def choice(self, guide: tuple[str, str]) -> int:
        """The checkpoint that a guide chooses: the earlier one where two are alike."""
        return int(self.guides[guide].mean(axis=1).argmin())


def main() -> None:
    settings, lab = read_lab(sys.argv[1:], __doc__)
    asked, group = settings.start, settings.learning.group_size
    tasks = {task: find(lab, task, asked, group) for task in TASKS}
    tables = [
        outcome_table(tasks, asked.steps),
        guide_table(tasks),
        choice_table(tasks, asked.steps),
        before_table(tasks, asked.steps),
    ]
    write_tables(lab.output / "start.md", tables)
    strict_json(summary(tasks, asked.steps), lab.output / "start.json")
    draw_starts(tasks, asked.steps, lab.output / "starts.png")
    draw_guides(tasks, lab.output / "guides.png")
    names = ("start.md", "start.json", "starts.png", "guides.png")
    show(tables, [f"Written: {', '.join(str(lab.output / name) for name in names)}"])


def find(lab: Lab, task: str, asked: StartArguments, group_size: int) -> Found:
    """Measure the checkpoints before, and run reinforcement learning from them."""
    guides = measures(lab.before(task, asked.steps, asked.rows), group_size, MINE)
    if task != MIXTURE:
        guides |= measures(lab.before(MIXTURE, asked.steps, asked.rows), group_size, OTHER)
    runs = [lab.run(task, "grpo", asked.steps, [seed], asked.measure_after) for seed in asked.seeds]
    return Found(guides, {step: np.exp(np.concatenate([run[step] for run in runs])) for step in runs[0]})


def measures(logprobs: FloatArray, n: int, whose: str) -> dict[tuple[str, str], FloatArray]:
    """What can be measured of right answers with `(M, R)` log-probabilities, lower is better; D(right) is 1."""
    return {
        (KL, whose): -logprobs,
        ("miss_1", whose): -np.expm1(logprobs),
        (f"Cov_{n}", whose): np.array([reached(-row, n) for row in logprobs], dtype=np.float64),
        (f"miss_{n}", whose): np.array([miss_values(-row, n) for row in logprobs]),
        (SIGNAL, whose): no_signal(logprobs, n),
    }


def no_signal(logprobs: FloatArray, group_size: int) -> FloatArray:
    """Probability that a group of samples is all right or all wrong: nothing is learnt from it."""
    return np.exp(group_size * logprobs) + (-np.expm1(logprobs)) ** group_size


def correlations(found: Found, whose: str) -> RankCorrelations:
    """Rank correlations of the guides on one kind of prompts with p(right) after each number of steps."""
    guides = {name: table for (name, of), table in found.guides.items() if of == whose}
    outcomes = {str(step): table.mean(axis=0) for step, table in found.outcomes.items() if step}
    prompts = np.arange(next(iter(outcomes.values())).shape[1])
    return rank_correlations(guides, outcomes, outcome_groups=prompts)


def outcome_table(tasks: Mapping[str, Found], steps: list[int]) -> Table:
    """p(right) before and after, from each checkpoint."""
    after = list(next(iter(tasks.values())).outcomes)
    rows: list[list[Cell]] = []
    for task, found in tasks.items():
        for index, start in enumerate(steps):
            cells: list[Cell] = [_range(found.outcomes[step][:, index].mean(axis=-1)) for step in after[1:]]
            rows.append([task, start, float(found.after(0)[index]), *cells])
    seeds = len(next(iter(tasks.values())).outcomes[0])
    return Table(
        ["task", "from step", "before", *(f"after {step}" for step in after[1:])],
        rows,
        f"p(right) before and after so many steps of reinforcement learning, mean and range of {seeds} seeds.",
    )


def guide_table(tasks: Mapping[str, Found]) -> Table:
    """Rank correlation of each guide with what comes out."""
    rows: list[list[Cell]] = []
    outcomes: tuple[str, ...] = ()
    for task, found in tasks.items():
        for whose in dict.fromkeys(of for _, of in found.guides):
            of_task = correlations(found, whose)
            outcomes = of_task.outcomes
            ranges = np.stack([of_task.values, of_task.low, of_task.high], axis=-1)
            for guide, cells in zip(of_task.guides, ranges):
                named = [None if np.isnan(cell[0]) else Interval(*map(float, cell)) for cell in cells]
                rows.append([task, guide, whose, *named])
    count = len(next(iter(tasks.values())).after(0))
    return Table(
        ["task", "measured before", "on prompts", *(f"after {step}" for step in outcomes)],
        rows,
        f"Rank correlation over {count} checkpoints with p(right) after so many steps, mean over seeds: -1 is a "
        "perfect guide, above 0 misleads. In brackets the range of a bootstrap over prompts, which is no confidence "
        "interval.",
    )


def choice_table(tasks: Mapping[str, Found], steps: list[int]) -> Table:
    """What each rule would have started from, and what it lost."""
    rows: list[list[Cell]] = []
    after = [step for step in next(iter(tasks.values())).outcomes if step]
    for task, found in tasks.items():
        picks = {f"{name} {whose}": found.choice((name, whose)) for name, whose in found.guides}
        for rule, pick in (picks | {FIRST: 0, LAST: len(steps) - 1}).items():
            rows.append([task, rule, str(steps[pick]), *(_lost(found.after(step))[pick] for step in after)])
        rows.append([task, RANDOM, None, *(float(np.mean(_lost(found.after(step)))) for step in after)])
        best = " / ".join(str(steps[int(found.after(step).argmax())]) for step in after)
        rows.append([task, "(p(right) from the best)", best, *(float(found.after(step).max()) for step in after)])
    return Table(
        ["task", "chosen by the least", "step", *(f"lost after {step}" for step in after)],
        rows,
        "What each rule would have started from, and p(right) lost after so many steps against the best start in "
        "hindsight for that many.",
    )


def before_table(tasks: Mapping[str, Found], steps: list[int]) -> Table:
    """What is measured before, on each task's own prompts."""
    names = [name for name, whose in next(iter(tasks.values())).guides if whose == MINE]
    rows: list[list[Cell]] = [
        [task, start, *(float(found.guides[name, MINE][index].mean()) for name in names)]
        for task, found in tasks.items()
        for index, start in enumerate(steps)
    ]
    return Table(["task", "step", *names], rows, "What is measured before, on prompts of the task; lower is better.")


def summary(tasks: Mapping[str, Found], steps: list[int]) -> dict[str, Any]:
    """The tables' numbers."""
    facts: dict[str, Any] = {"steps": steps, "tasks": {}}
    for task, found in tasks.items():
        facts["tasks"][task] = {
            "before": {f"{name} {whose}": _short(table.mean(axis=1)) for (name, whose), table in found.guides.items()},
            "p_right": {step: [_short(run) for run in table.mean(axis=-1)] for step, table in found.outcomes.items()},
        }
    return facts


def draw_starts(tasks: Mapping[str, Found], steps: list[int], path: Any) -> None:
    """p(right) over the step that learning started from, a panel for each task, with what three rules would choose."""
    figure, axes = new_axes(len(tasks), width=4.0, height=4.4)
    for ax, (task, found) in zip(axes, tasks.items()):
        for (step, table), color in zip(found.outcomes.items(), (COLORS[6], *COLORS)):
            by_seed = table.mean(axis=-1)
            ax.plot(steps, by_seed.mean(axis=0), color=color, linewidth=1.8, label=f"{step} steps of RL")
            ax.fill_between(steps, by_seed.min(axis=0), by_seed.max(axis=0), color=color, alpha=0.2, linewidth=0)
        last = found.after(max(found.outcomes))
        for rule, mark in MARKS.items():
            if rule in found.guides:
                pick, alike = found.choice(rule), rule[1] == OTHER or task == MIXTURE
                name = f"most signal {rule[1]}" if rule[0] == SIGNAL else f"least KL {OTHER if alike else MINE}"
                ax.plot(steps[pick], last[pick], mark, color="none", markeredgecolor="black", markersize=9, label=name)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("checkpoint of the fine-tuning that RL starts from")
        ax.set_ylim(0, 1)
    axes[0].set_ylabel("p(right), exact (higher is better)")
    shown = dict(zip(*reversed(axes[-1].get_legend_handles_labels())))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    seeds = len(next(iter(tasks.values())).outcomes[0])
    figure.suptitle(f"Where should RL start? p(right) after it: mean and range of {seeds} seeds")
    save_figure(figure, path)


def draw_guides(tasks: Mapping[str, Found], path: Any) -> None:
    """Rank correlation of each guide with what comes out, over the steps of reinforcement learning."""
    figure, axes = new_axes(len(tasks), width=4.0, height=4.0)
    for ax, (task, found) in zip(axes, tasks.items()):
        for whose, line in ((MINE, "-"), (OTHER, ":")):
            if all(of != whose for _, of in found.guides):
                continue
            of_task = correlations(found, whose)
            after = [int(step) for step in of_task.outcomes]
            for guide, values, color in zip(of_task.guides, of_task.values, COLORS):
                ax.plot(after, values, line, marker="o", markersize=4, color=color, label=f"{guide} {whose}")
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(after, list(map(str, after)))
        ax.set_ylim(-1.08, 1.08)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("steps of RL")
    axes[0].set_ylabel("rank correlation (-1: a perfect guide)")
    shown = dict(zip(*reversed(axes[-1].get_legend_handles_labels())))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("What, measured before RL, orders the checkpoints as p(right) after it does?")
    save_figure(figure, path)


def _lost(values: FloatArray) -> list[float]:
    return [round(float(value), 4) for value in values.max() - values]


def _range(values: FloatArray) -> Interval:
    return Interval(float(values.mean()), float(values.min()), float(values.max()))


def _short(values: FloatArray) -> list[float]:
    return [round(float(value), 5) for value in values]


if __name__ == "__main__":
    main()
