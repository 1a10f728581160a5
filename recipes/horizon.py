"""KL grows with the length of the response, coverage does not: graph search at several horizons and seeds.

    python -m recipes.horizon --config recipes/graph_search/horizon_small.yaml

The configuration has a section for each dataclass below, one for the model and those of the `TrainingArguments`. Any
value can be given on the command line too, as `--section.name value`, and those of `RunArguments` without a section.

With a section `warm`, a first phase trains on the classes as `warm_weights` mixes them: the forks, which D shows in
6 % of its prompts, are learned sooner. What the model is to converge to under D is the same.

Each (horizon, seed) has a folder `h-<H>/seed-<seed>` of its own. When the same command is given again, those that are
done are only read, and the one that was stopped goes on from its last checkpoint.

References:
    arXiv 2510.15020, Appendix C and Figure 2.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_coverage import CoverageCallback, CoverageProfile
from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.inference.loading import load_whole
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Interval, Table
from hf_coverage.tasks.graph_search import GraphSearch, GraphSearchDataset, collate_rows
from recipes.pretrain import KeepProfiles, ModelArguments, new_model, rows_seen, train
from recipes.profiles import read_profiles
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.tables import show, write_tables


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of the runs, the table and the figure."})
    horizons: list[int] = field(default_factory=lambda: [8, 16, 24], metadata={"help": "H, the layers of a graph."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of weights and training data."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})


@dataclass
class TaskArguments:
    nodes_per_layer: int = 4
    num_names: int = 100
    prompt_format: Literal["paper", "aligned"] = "paper"
    weights: list[float] = field(default_factory=lambda: [0.94, 0.05, 0.01])
    warm_weights: list[float] = field(
        default_factory=lambda: [1 / 3, 1 / 3, 1 / 3], metadata={"help": "Of the first phase, if there is a `warm`."}
    )
    train_rows: int | None = field(default=None, metadata={"help": "Distinct prompts; no prompt twice if not given."})


@dataclass
class MeasureArguments:
    rows: int = field(default=4000, metadata={"help": "Rows of the reference corpus of each horizon."})
    n: list[float] = field(default_factory=lambda: [16.0], metadata={"help": "The N of Cov_N; the first is drawn."})


@dataclass(frozen=True)
class Measured:
    """What came out at one horizon: arrays over S seeds and K evaluations, and `coin_profile`."""

    horizon: int
    steps: list[int]
    kl: FloatArray
    coverage: dict[float, FloatArray]
    coin: CoverageProfile


SECTIONS = {
    "run": RunArguments,
    "task": TaskArguments,
    "model": ModelArguments,
    "measure": MeasureArguments,
    "warm": TrainingArguments,
    "train": TrainingArguments,
}


def main() -> None:
    settings = read_settings(sys.argv[1:], list(SECTIONS), description=__doc__)
    run, task_args, measure = (parse_section(SECTIONS[name], settings[name]) for name in ("run", "task", "measure"))
    output = Path(run.output_dir)
    refuse_other_settings(output, settings | {"run": {}})
    if run.threads:
        torch.set_num_threads(run.threads)
    logging.disable_progress_bar()  # of writing and reading checkpoints; the training's own bar stays
    results = []
    for horizon in run.horizons:
        task = GraphSearch.figure_2(
            horizon,
            nodes_per_layer=task_args.nodes_per_layer,
            num_names=task_args.num_names,
            prompt_format=task_args.prompt_format,
        )
        folders = [output / f"h-{horizon}" / f"seed-{seed}" for seed in run.seeds]
        for seed, folder in zip(run.seeds, folders):
            train_one(task, folder, seed, task_args, measure, settings)
        results.append(read_horizon(task, folders, task_args, measure))
    report(output, results, measure)


def train_one(
    task: GraphSearch, folder: Path, seed: int, task_args: TaskArguments, measure: MeasureArguments, settings: Any
) -> None:
    """Train on one horizon and seed, with a profile at every evaluation; at once where it is done already."""
    shared = {"seed": seed, "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}
    warm_args, args = (
        parse_section(TrainingArguments, shared | settings[name] | {"output_dir": str(folder / name)})
        for name in ("warm", "train")
    )
    if (folder / "profiles" / f"step-{args.max_steps}.json").exists():
        return
    torch.manual_seed(seed)
    model = new_model(task, parse_section(ModelArguments, settings["model"]))
    if settings["warm"]:
        rows = GraphSearchDataset(task, task_args.warm_weights, rows_seen(warm_args), seed=(seed, 1))
        warm = Trainer(model, warm_args, data_collator=collate_rows, train_dataset=rows)
        model = load_whole(GPT2LMHeadModel, train(warm))
    coverage = CoverageCallback(task.corpus(measure.rows, task_args.weights, seed=0), n=measure.n)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate_rows,
        train_dataset=GraphSearchDataset(
            task, task_args.weights, task_args.train_rows or rows_seen(args), seed=(seed, 0)
        ),
        eval_dataset=GraphSearchDataset(task, task_args.weights, 512, seed=(0, 2)),
        processing_class=task.tokenizer(),
        callbacks=[coverage, KeepProfiles(coverage, folder / "profiles")],
    )
    train(trainer)


def read_horizon(
    task: GraphSearch, folders: list[Path], task_args: TaskArguments, measure: MeasureArguments
) -> Measured:
    """Read the profiles of all seeds."""
    found = [read_profiles(folder / "profiles") for folder in folders]
    profiles = [list(of_seed.values()) for of_seed in found]
    return Measured(
        task.num_layers,
        list(found[0]),
        np.array([[profile.kl for profile in of_seed] for of_seed in profiles]),
        {n: np.array([[profile.cov(n) for profile in of_seed] for of_seed in profiles]) for n in measure.n},
        coin_profile(task, task_args.weights, measure.rows),
    )


def coin_profile(task: GraphSearch, weights: list[float], num_rows: int) -> CoverageProfile:
    """The profile of a model that knows the paths and tosses a coin at each fork, on the corpus of the horizon."""
    rows = task.sample(num_rows, weights, seed=0)
    logprobs = rows.graphs.num_wide_layers * np.log(0.5)
    return CoverageProfile.from_logprobs(logprobs, task.log_density(rows.graphs, rows.paths, weights))


def report(output: Path, results: list[Measured], measure: MeasureArguments) -> None:
    """Write `table.md` and `figure_2.png`, and print the table."""
    table = horizon_table(results, measure.n)
    write_tables(output / "table.md", [table])
    draw(results, measure.n[0], output / "figure_2.png")
    show([table], [f"Written: {output / 'table.md'} and {output / 'figure_2.png'}"])


def horizon_table(results: list[Measured], levels: list[float]) -> Table:
    """KL and Cov_N at the end, the ratios to the least horizon, and what a coin would give."""
    rows: list[list[Cell]] = []
    for result in results:
        curves = [(result.kl, results[0].kl, result.coin.kl)]
        curves += [(result.coverage[n], results[0].coverage[n], result.coin.cov(n)) for n in levels]
        row: list[Cell] = [result.horizon]
        for curve, least, coin in curves:
            base = np.median(least[:, -1])
            row += [_median(curve[:, -1]), float(np.median(curve[:, -1]) / base) if base else None, coin]
        rows.append(row)
    titles = ["KL", *(f"Cov_{metric_key(n)}" for n in levels)]
    columns = ["H", *(part for title in titles for part in (title, f"ratio of {title}", f"{title} of a coin"))]
    count = len(results[0].kl)
    caption = f"At the end of the training: median of {count} seeds, in brackets the least and the largest. "
    return Table(
        columns,
        rows,
        caption + "Ratios are to the least H. A coin: a model that is right but at forks, where it tosses one.",
    )


def draw(results: list[Measured], n: float, path: Path) -> None:
    """KL and Cov_N over the training steps, and at the end, at every N, as ratios to the least horizon."""
    figure, (left, middle, right) = new_axes(3, width=4.0, height=3.8)
    cov_n = f"Cov$_{{{metric_key(n)}}}$"
    for result, color in zip(results, COLORS):
        for ax, curves in ((left, result.kl), (middle, result.coverage[n])):
            ax.plot(result.steps, np.median(curves, axis=0), color=color, linewidth=1.8, label=f"H = {result.horizon}")
            ax.fill_between(result.steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.18, linewidth=0)
    horizons = [result.horizon for result in results]
    ends = {"KL": [result.kl[:, -1] for result in results]}
    for level in results[0].coverage:
        ends[f"Cov$_{{{metric_key(level)}}}$"] = [result.coverage[level][:, -1] for result in results]
    for (label, values), color in zip(ends.items(), COLORS):
        base = np.median(values[0])
        if base:
            ratios = np.array(values) / base
            right.plot(horizons, np.median(ratios, axis=1), "o-", color=color, linewidth=1.8, label=label)
            right.fill_between(horizons, ratios.min(axis=1), ratios.max(axis=1), color=color, alpha=0.18, linewidth=0)
    left.set_ylabel("KL in nats (lower is better)")
    middle.set_ylabel(f"{cov_n} (lower is better)")
    right.set_ylabel(f"at the end, relative to H = {horizons[0]}")
    right.set_xticks(horizons)
    right.set_xlabel("horizon H")
    for ax in (left, middle):
        ax.set_xlabel("training step")
    for ax in (left, middle, right):
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    figure.suptitle(f"Median and range of {len(results[0].kl)} seeds")
    save_figure(figure, path)


def _median(values: FloatArray) -> Interval:
    return Interval(float(np.median(values)), float(values.min()), float(values.max()))


if __name__ == "__main__":
    main()
