"""A run of `recipes.pretrain` over several seeds, and in each the tournament's checkpoint against cross-entropy's.

    python -m recipes.seeds --config recipes/graph_search/small.yaml --output_dir runs/seeds --seeds 0 1 2 3 4

Each seed is a run of `recipes.pretrain`, into `<output_dir>/seed-<seed>`, and a `hf-coverage tournament` over its
checkpoints, the one before the fine-tuning included. All other arguments go to `recipes.pretrain`. What was stopped
goes on where it was when the same command is given again, and what is there already is only read.

Checkpoints are chosen on one corpus, by cross-entropy as by the tournament; KL, Cov_N and Pass@N of what was chosen
are measured on another one. The rule for the tournament's N is fixed before anything is run: N is the number of
samples that will be drawn, N = 8 for Pass@8. What every other N would have chosen is shown beside it.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.predictiveness import RankCorrelations
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table
from hf_coverage.select.predictiveness import predictiveness
from recipes.checkpoint_report import pass_at_n
from recipes.pretrain import SECTIONS, MeasureArguments, TaskArguments, last_checkpoint, new_task
from recipes.profiles import read_profiles, step_of
from recipes.remember import remember_corpus
from recipes.settings import Settings, parse_section, read_settings, refuse_other_settings
from recipes.tables import interval_of, show, write_tables

LEVELS = (2, 3, 4, 5.7, 8, 12, 16)
"""The N at which tournaments are held, whatever is drawn."""
CROSS_ENTROPY, SAMPLES, SUGGESTED = "cross-entropy", "tournament, N = samples", "tournament, suggested N"


@dataclass(frozen=True)
class SeedRun:
    """What came out of one seed: curves over the K checkpoints, and the tournament's `tournament.json`."""

    seed: int
    steps: list[int]
    kl: FloatArray
    coverage: dict[float, FloatArray]
    passes: dict[int, FloatArray]
    correlations: RankCorrelations
    tournament: dict[str, Any]

    def choice(self, rule: str, samples: int) -> int:
        """Index of the checkpoint that a rule chooses when `samples` will be drawn."""
        result = self.tournament
        if rule == CROSS_ENTROPY:
            winner = result["cross_entropy_choice"]
        else:
            winners = {point["n"]: point["winner"] for point in result["sweep"]} | {result["n"]: result["winner"]}
            n = {SAMPLES: samples, SUGGESTED: result["suggested_n"] or result["n"]}.get(rule)
            winner = winners[float(rule.rpartition(" ")[2]) if n is None else n]
        return int(result["names"].index(winner))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--selection_rows", type=int, default=4000, help="Rows of the corpus to choose on.")
    args, rest = parser.parse_known_args()
    settings = read_settings(rest, list(SECTIONS), description=__doc__)
    refuse_other_settings(args.output_dir, settings | {"run": {"selection_rows": args.selection_rows}})
    measure = parse_section(MeasureArguments, settings["measure"])
    selection = selection_corpus(args.output_dir / "selection", settings, args.selection_rows)
    runs = []
    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        if not any(folder.glob("results_*.json")):  # written last
            call("recipes.pretrain", *rest, "--seed", seed, "--output_dir", folder)
        result = hold_tournament(folder, selection, {*LEVELS, *measure.pass_at})
        runs.append(read_run(folder, seed, measure, result))
    report(args.output_dir, runs)


def call(module: str, *words: object) -> None:
    """Run a module, and fail where it fails."""
    subprocess.run([sys.executable, "-m", module, *map(str, words)], check=True)


def selection_corpus(folder: Path, settings: Settings, rows: int) -> Path:
    """Write the corpus to choose on: of the same distribution as the one to measure on, and of another seed."""
    task_args = parse_section(TaskArguments, settings["task"])
    corpus_seed = parse_section(MeasureArguments, settings["measure"]).corpus_seed
    task, weights = new_task(task_args), task_args.finetune_weights
    remember_corpus(folder, lambda: task.corpus(rows, weights, seed=(corpus_seed, 3)))
    return folder


def hold_tournament(folder: Path, selection: Path, levels: set[float]) -> dict[str, Any]:
    """`hf-coverage tournament` over a run's checkpoints, at its default N and at `levels`; what it wrote."""
    checkpoints = sorted((folder / "finetune").glob("checkpoint-*"), key=step_of)
    sweep = ",".join(map(repr, sorted(levels)))
    options = ("--data", selection, "--sweep", sweep, "--output-dir", folder / "tournament")
    call("hf_coverage", "tournament", last_checkpoint(folder / "pretrain"), *checkpoints, *options)
    result: dict[str, Any] = json.loads((folder / "tournament" / "tournament.json").read_text(encoding="utf-8"))
    suggested = result["suggested_n"]
    if suggested is None or suggested in levels:
        return result
    return hold_tournament(folder, selection, levels | {suggested})  # who wins there? all scores are kept


def read_run(folder: Path, seed: int, measure: MeasureArguments, result: dict[str, Any]) -> SeedRun:
    """Read what a seed has left behind."""
    found = read_profiles(folder / "profiles")
    steps, profiles = list(found), list(found.values())
    candidates = [0, *(int(name.rpartition("-")[2]) for name in result["names"][1:])]
    if steps != candidates:
        raise ValueError(f"{folder} measured the steps {steps} but kept the checkpoints {candidates}: keep the same.")
    return SeedRun(
        seed,
        steps,
        np.array([profile.kl for profile in profiles]),
        {n: np.array([profile.cov(n) for profile in profiles]) for n in measure.n},
        {n: np.array([pass_at_n(profile, n) for profile in profiles]) for n in measure.pass_at},
        predictiveness(profiles, measure.pass_at, measure.n, bootstrap=0).correlations,
        result,
    )


def report(output: Path, runs: list[SeedRun]) -> None:
    """Write `table.md`, `seeds.png` and `choice.png`, and print the tables."""
    rules = [SAMPLES, CROSS_ENTROPY, *(f"tournament, N = {metric_key(n)}" for n in LEVELS), SUGGESTED]
    tables = [curve_table(runs), guide_table(runs), choice_table(runs, rules), gain_table(runs, rules)]
    write_tables(output / "table.md", tables)
    draw_curves(runs, output / "seeds.png")
    draw_choices(runs, rules, output / "choice.png")
    show(tables, [f"Written: {output / 'table.md'}, {output / 'seeds.png'} and {output / 'choice.png'}"])


def curve_table(runs: list[SeedRun]) -> Table:
    """How each seed's curves go: start, best (its step), end."""
    n = max(runs[0].coverage)
    columns = ["seed", "KL", "falls at", f"Cov_{metric_key(n)}", *(f"Pass@{samples}" for samples in runs[0].passes)]
    rows: list[list[Cell]] = []
    for run in runs:
        falls = int((np.diff(run.kl) < 0).sum())
        curves = [_course(run, run.coverage[n], -1), *(_course(run, curve, 1) for curve in run.passes.values())]
        rows.append([run.seed, _course(run, run.kl, -1), f"{falls} of {len(run.steps) - 1}", *curves])
    return Table(columns, rows, "Before the fine-tuning, at the best checkpoint (its step) and at the end.")


def guide_table(runs: list[SeedRun]) -> Table:
    """Rank correlation of each measure with Pass@N over a seed's checkpoints."""
    first = runs[0].correlations
    values = np.array([run.correlations.values for run in runs])
    rows: list[list[Cell]] = []
    for k, guide in enumerate(first.guides):
        of_guide = values[:, k].T  # one row a Pass@N; NaN where the guide is the same at all checkpoints
        ranges = (Interval(*map(float, (found.mean(), found.min(), found.max()))) for found in of_guide)
        rows.append([guide, *(None if np.isnan(cell.value) else cell for cell in ranges)])
    caption = (
        f"Rank correlation over a seed's checkpoints, -1 is a perfect guide: mean of {len(runs)} seeds and range."
    )
    return Table(["measure", *first.outcomes], rows, caption)


def choice_table(runs: list[SeedRun], rules: list[str]) -> Table:
    """Pass@N of what each rule chooses, and of the best checkpoint in hindsight."""
    rows: list[list[Cell]] = [
        [rule, _steps(runs, rule), *(_mean(_chosen(runs, rule, n)) for n in runs[0].passes)] for rule in rules
    ]
    best = [_mean(np.array([run.passes[n].max() for run in runs])) for n in runs[0].passes]
    rows.append(["best in hindsight", "", *best])
    columns = ["chosen by", "step", *(f"Pass@{n}" for n in runs[0].passes)]
    return Table(columns, rows, f"What each rule chooses: mean of {len(runs)} seeds, Student's interval over seeds.")


def gain_table(runs: list[SeedRun], rules: list[str]) -> Table:
    """How much more each rule's checkpoint passes than cross-entropy's, and in how many seeds."""
    rows: list[list[Cell]] = []
    for rule in rules:
        if rule == CROSS_ENTROPY:
            continue
        row: list[Cell] = [rule]
        for n in runs[0].passes:
            gain = _chosen(runs, rule, n) - _chosen(runs, CROSS_ENTROPY, n)
            row += [_mean(gain), f"{int((gain > 0).sum())} of {len(runs)}"]
        rows.append(row)
    columns = ["chosen by", *(part for n in runs[0].passes for part in (Column(f"Pass@{n}"), "better in"))]
    return Table(
        columns, rows, "Against cross-entropy's checkpoint, seed by seed: mean difference, Student's interval."
    )


def draw_curves(runs: list[SeedRun], path: Path) -> None:
    """KL, Cov_N and Pass@N over the steps: median and range of the seeds."""
    figure, (left, middle, right) = new_axes(3, width=4.0, height=3.8)
    _band(left, runs, [run.kl for run in runs], COLORS[0], "KL")
    for (n, _), color in zip(runs[0].coverage.items(), COLORS[1:]):
        _band(middle, runs, [run.coverage[n] for run in runs], color, f"Cov$_{{{metric_key(n)}}}$")
    for n, color in zip(runs[0].passes, COLORS):
        _band(right, runs, [run.passes[n] for run in runs], color, f"Pass@{n}")
    left.set_ylim(bottom=0)
    left.set_ylabel("KL in nats (lower is better)")
    middle.set_ylabel("Cov$_N$ (lower is better)")
    middle.set_yscale("log")
    middle.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    middle.legend(frameon=False, fontsize=8)
    right.set_ylabel("Pass@N (higher is better)")
    right.legend(frameon=False)
    for ax in (left, middle, right):
        ax.set_xlabel("fine-tuning step")
    figure.suptitle(f"Median and range of {len(runs)} seeds; dots mark the best step of the median")
    save_figure(figure, path)


def draw_choices(runs: list[SeedRun], rules: list[str], path: Path) -> None:
    """Pass@N of what each rule chooses, a panel for each N: the seeds as dots, their mean as a bar."""
    figure, axes = new_axes(len(runs[0].passes), width=4.0, height=4.2)
    for ax, n in zip(axes, runs[0].passes):
        for place, rule in enumerate(rules):
            values = _chosen(runs, rule, n)
            color = COLORS[1] if rule == CROSS_ENTROPY else COLORS[2] if rule == SAMPLES else COLORS[0]
            ax.plot(np.full(len(runs), place), values, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
            ax.plot([place - 0.35, place + 0.35], [values.mean()] * 2, color=color, linewidth=2)
        ax.axhline(_chosen(runs, CROSS_ENTROPY, n).mean(), color=COLORS[1], linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(rules)), [rule.removeprefix("tournament, ") for rule in rules], rotation=90)
        ax.set_ylabel(f"Pass@{n} (higher is better)")
    figure.suptitle(
        f"The checkpoint of cross-entropy and of tournaments at several N: {len(runs)} seeds and their mean"
    )
    save_figure(figure, path)


def _chosen(runs: list[SeedRun], rule: str, samples: int) -> FloatArray:
    """`(S,)` Pass@`samples` of what a rule chooses in each seed."""
    return np.array([run.passes[samples][run.choice(rule, samples)] for run in runs])


def _steps(runs: list[SeedRun], rule: str) -> str:
    """The steps that a rule chooses over the seeds, for each number of samples where it depends on it."""
    texts = []
    for samples in runs[0].passes:
        steps = [run.steps[run.choice(rule, samples)] for run in runs]
        texts.append(f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}")
    return texts[0] if rule != SAMPLES else "; ".join(texts)


def _mean(values: FloatArray) -> Interval | float:
    """Mean over seeds with its interval; without one where there is one seed."""
    if len(values) == 1:
        return float(values[0])
    return interval_of(values)


def _course(run: SeedRun, curve: FloatArray, sign: int) -> str:
    best = int((sign * curve).argmax())
    return f"{curve[0]:.3f}, {curve[best]:.3f} ({run.steps[best]}), {curve[-1]:.3f}"


def _band(ax: Axes, runs: list[SeedRun], curves: list[FloatArray], color: str, label: str) -> None:
    steps, middle = runs[0].steps, np.median(curves, axis=0)
    ax.plot(steps, middle, color=color, linewidth=1.8, label=label)
    ax.fill_between(steps, np.min(curves, axis=0), np.max(curves, axis=0), color=color, alpha=0.18, linewidth=0)
    best = int(middle.argmax() if label.startswith("Pass") else middle.argmin())
    ax.plot(steps[best], middle[best], "o", color=color, markersize=7, markeredgecolor="white")


if __name__ == "__main__":
    main()
