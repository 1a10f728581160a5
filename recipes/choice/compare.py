"""Rules that choose a checkpoint, against each other, on runs that were trained before.

    python -m recipes.choice.compare --config recipes/choice/compare.yaml

Reads the profiles that `recipes.pretrain` and `recipes.reasoning.finetune` have left, and the responses of an offset
tournament where `hf-coverage tournament --on-policy` has left them in a run's `offset`; no model is run. What was
judged of a run is kept and read again. Writes `tables.md`, `losses.png` and `results.json` into `<output_dir>`.
"""

import glob
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import load_from_disk

from hf_coverage import ScoreTable
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.tournament import OnPolicy
from hf_coverage.inference.files import strict_json
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Interval, Table
from recipes.choice.rules import CONFIDENT, RULES, SAMPLES, UNKNOWN, Run, judge, pooled, stated, take_splits
from recipes.profiles import read_profiles, step_of
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.tables import show, write_tables


@dataclass
class CompareArguments:
    output_dir: str = field(metadata={"help": "Folder of the tables, the figure and what is kept."})
    rows: list[int] = field(default_factory=lambda: [100, 250, 1000, 2000], metadata={"help": "Rows to choose on."})
    splits: int = field(default=100, metadata={"help": "Random splits of each run's rows."})
    stated_splits: int = field(default=25, metadata={"help": "Of them, those whose confidences are judged."})
    shown: int = field(default=250, metadata={"help": "Rows to choose on in the table over all runs."})
    seed: int = field(default=0, metadata={"help": "Seed of the splits."})


class Piece(NamedTuple):
    """What was judged of one run, choosing on so many rows."""

    size: int
    judged: dict[str, Any]
    stated: dict[str, dict[str, list[list[float]]]]


Pieces = dict[str, list[Piece]]
"""By experiment, what was judged of its runs."""


def main() -> None:
    settings = read_settings(sys.argv[1:], ["run", "runs"], description=__doc__)
    args = parse_section(CompareArguments, settings["run"])
    output = Path(args.output_dir)
    refuse_other_settings(output, {"splits": {"all": args.splits, "stated": args.stated_splits, "seed": args.seed}})
    pieces: Pieces = {}
    for experiment, pattern in settings["runs"].items():
        runs = {folder: read_run(folder) for folder in sorted(map(Path, glob.glob(pattern)))}
        if len({run.steps for run in runs.values()}) > 1:
            steps = {str(folder): run.steps for folder, run in runs.items()}
            raise ValueError(
                f"The runs of {experiment} must have the same steps, but have {steps}: finish them first."
            )
        for folder, run in runs.items():
            pieces.setdefault(experiment, []).extend(judge_run([experiment, folder.name], run, args))
    if not pieces:
        raise ValueError(f"None of the runs {list(settings['runs'].values())} is there: train one first.")
    tables = [
        overall_table(pieces, args.shown),
        experiment_table(pieces, args.shown),
        *(size_table(name, found) for name, found in pieces.items() if len({piece.size for piece in found}) > 2),
        stated_table(pieces),
    ]
    write_tables(output / "tables.md", tables)
    strict_json(summary(pieces), output / "results.json")
    draw(pieces, args.shown, output / "losses.png")
    show(tables, [f"Written: {output / 'tables.md'}, {output / 'losses.png'} and {output / 'results.json'}"])


def judge_run(names: Sequence[str], run: Run, args: CompareArguments) -> list[Piece]:
    """Choose and judge on the splits of one run, for each number of rows that leaves half of them to judge on."""
    mark = hashlib.blake2b(run.logprobs.tobytes(), digest_size=6)
    for generations in run.on_policy or []:
        mark.update(np.array(generations.logprobs).tobytes())
    found = []
    for size in args.rows:
        if 2 * size > run.logprobs.shape[1]:
            continue
        splits = take_splits(run.logprobs.shape[1], size, args.splits, seed=args.seed)

        def experiment_of(splits=splits):
            return [judge(run, splits), stated(run, splits[: args.stated_splits])]

        key = [*names, mark.hexdigest(), size]
        found.append(Piece(size, *remember(Path(args.output_dir) / "pieces", key, experiment_of)))
    return found


def read_run(folder: Path) -> Run:
    """Read the profiles of a run's checkpoints, and the responses of its offset tournament where there are any."""
    profiles = read_profiles(folder / "profiles")
    if len(profiles) < 2:
        raise ValueError(
            f"{folder} has profiles of {len(profiles)} checkpoints, but a choice takes 2: train it first."
        )
    logprobs = np.array([profile.logprobs for profile in profiles.values()])
    place = folder / "offset" / "on_policy"
    return Run(tuple(profiles), logprobs, read_on_policy(place, list(profiles)) if place.exists() else None)


def read_on_policy(folder: Path, steps: Sequence[int]) -> list[OnPolicy]:
    """Read each checkpoint's responses under all of them, the one before the fine-tuning as step 0.

    Args:
        folder: `on_policy` of an offset tournament's output folder.
        steps: The checkpoints, in the order of the run.
    """
    names = {0 if file.name.startswith("pretrain") else step_of(file): file.name for file in folder.glob("*__*")}
    if sorted(names) != sorted(steps):
        raise ValueError(f"{folder} holds responses of the steps {sorted(names)}, but the run has {sorted(steps)}.")
    found = []
    for b in steps:
        own = load_from_disk(folder / names[b])
        logprobs = [
            np.array(own["reference_logprob"][:])
            if a == b
            else ScoreTable.open(folder / names[b] / "scores" / names[a]).logprob
            for a in steps
        ]
        found.append(OnPolicy(logprobs))
    return found


def overall_table(pieces: Pieces, size: int) -> Table:
    """The loss of each rule, mean over the experiments, and the largest of an experiment."""
    columns = ["chosen by", *(part for n in SAMPLES for part in (f"Pass@{n}", "worst" + " " * SAMPLES.index(n)))]
    rows: list[list[Cell]] = []
    for rule in RULES:
        means = [losses.mean(axis=0) for _, losses in _by_experiment(pieces, size, rule)]
        if len(means) < len(pieces):
            continue  # not held everywhere
        table = np.array(means)
        rows.append(
            [rule, *(part for k in range(len(SAMPLES)) for part in _floats(table[:, k].mean(), table[:, k].max()))]
        )
    return Table(
        columns,
        rows,
        f"Pass@N lost against the best checkpoint in hindsight, choosing on {size} rows and judging on others: "
        f"mean over {len(pieces)} experiments, and the worst of them.",
    )


def experiment_table(pieces: Pieces, size: int) -> Table:
    """What each rule chose in each experiment, and its loss."""
    rows: list[list[Cell]] = []
    for experiment, found in pieces.items():
        for rule in RULES:
            of_rule = [piece.judged for piece in found if piece.size == size and rule in piece.judged["losses"]]
            if not of_rule:
                continue
            steps = np.median(pooled([judged["steps"] for judged in of_rule], rule), axis=0)
            losses = pooled([judged["losses"] for judged in of_rule], rule).mean(axis=0)
            rows.append([experiment, rule, " / ".join(f"{step:g}" for step in steps), *_floats(*losses)])
        judged = [piece.judged for piece in found if piece.size == size]
        if judged:
            steps = np.median(pooled(judged, "best_steps"), axis=0)
            passes = pooled(judged, "best").mean(axis=0)
            best = "(Pass@N of the best in hindsight)"
            rows.append([experiment, best, " / ".join(f"{step:g}" for step in steps), *_floats(*passes)])
    levels = " / ".join(map(str, SAMPLES))
    return Table(
        ["experiment", "chosen by", f"median step for N = {levels}", *(f"Pass@{n}" for n in SAMPLES)],
        rows,
        f"Pass@N lost against the best checkpoint in hindsight, choosing on {size} rows: mean over seeds and splits.",
    )


def size_table(experiment: str, found: Sequence[Piece]) -> Table:
    """The loss of each rule by the number of rows to choose on; the ends are the seeds'."""
    rows: list[list[Cell]] = []
    for rule in RULES:
        for size in sorted({piece.size for piece in found}):
            seeds = [
                piece.judged["losses"] for piece in found if piece.size == size and rule in piece.judged["losses"]
            ]
            if seeds:
                means = np.array([np.mean(losses[rule], axis=0) for losses in seeds])
                rows.append([rule, size, *(Interval(*_floats(row.mean(), row.min(), row.max())) for row in means.T)])
    return Table(
        ["chosen by", "rows", *(f"Pass@{n}" for n in SAMPLES)],
        rows,
        f"{experiment}: Pass@N lost against the best in hindsight, by the rows chosen on, with the range of seeds.",
    )


def stated_table(pieces: Pieces) -> Table:
    """How often what `choose` said was so, over all numbers of samples."""
    rows: list[list[Cell]] = []
    for experiment, found in pieces.items():
        for rule in CONFIDENT:
            for size in sorted({piece.size for piece in found}):
                columns = confidences([piece for piece in found if piece.size == size], rule)
                by_pass = [columns[name] for name in ("pass_within_holds", "pass_left_holds", "pass_is_best")]
                rows.append(
                    [
                        experiment,
                        rule,
                        size,
                        *(columns[name] for name in ("within", "within_holds", "left", "left_holds", "decided")),
                        *(columns[name] for name in ("probability", "is_best")),
                        *(by_pass if rule == UNKNOWN else [None] * 3),
                    ]
                )
    return Table(
        [
            "experiment", "chosen by", "rows", "within", "is so", "share left", "holds the best", "decided",
            "probability of the best", "is the best", "of Pass@N: within", "of Pass@N: left", "of Pass@N: is the best",
        ],
        rows,
        f"What `choose` states and how often it is so on other rows, mean over N = {', '.join(map(str, SAMPLES))}, "
        "seeds and splits. `within` and the set that is left claim .95. A soft tournament speaks of its own score; "
        "the last columns read it as if it spoke of Pass@N.",
    )  # fmt: skip


def confidences(found: Sequence[Piece], rule: str) -> dict[str, float]:
    """Means over splits, seeds and numbers of samples of what was stated and of what is so."""
    of_rule = [piece.stated[rule] for piece in found]
    return {name: float(pooled(of_rule, name).mean()) for name in of_rule[0]}


def summary(pieces: Pieces) -> dict[str, Any]:
    """The tables' numbers: by experiment and rows to choose on."""
    facts: dict[str, Any] = {}
    for experiment, found in pieces.items():
        for size in sorted({piece.size for piece in found}):
            here = [piece for piece in found if piece.size == size]
            rules = [rule for rule in RULES if all(rule in piece.judged["losses"] for piece in here)]
            facts.setdefault(experiment, {})[size] = {
                "runs": len(here),
                "loss": {
                    rule: _by_samples(pooled([piece.judged["losses"] for piece in here], rule).mean(axis=0))
                    for rule in rules
                },
                "median_step": {
                    rule: _by_samples(np.median(pooled([piece.judged["steps"] for piece in here], rule), axis=0))
                    for rule in rules
                },
                "best_pass": _by_samples(pooled([piece.judged for piece in here], "best").mean(axis=0)),
                "stated": {rule: confidences(here, rule) for rule in CONFIDENT},
            }
    return facts


def draw(pieces: Pieces, size: int, path: Path) -> None:
    """The loss of each rule in each experiment, a panel for each number of samples."""
    figure, axes = new_axes(len(SAMPLES), width=3.2, height=4.2)
    places = {experiment: place for place, experiment in enumerate(pieces)}
    for index, (rule, color) in enumerate(zip(RULES, COLORS)):
        found = _by_experiment(pieces, size, rule)
        if not found:
            continue
        for k, ax in enumerate(axes):
            values = [losses[:, k].mean() for _, losses in found]
            where = [places[name] + 0.08 * (index - 3) for name, _ in found]  # equal losses side by side
            ax.plot(where, values, "o", color=color, markersize=5, alpha=0.8, label=rule)
    for n, ax in zip(SAMPLES, axes):
        ax.set_yscale("symlog", linthresh=0.001)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xticks(range(len(pieces)), list(pieces), rotation=90)
        ax.set_title(f"N = {n}", fontsize=10)
    axes[0].set_ylabel("Pass@N lost (lower is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(RULES), frameon=False, fontsize=9)
    figure.suptitle(f"Against the best checkpoint in hindsight, choosing on {size} rows and judging on others")
    save_figure(figure, path)


def _by_experiment(pieces: Pieces, size: int, rule: str) -> list[tuple[str, FloatArray]]:
    """By experiment that holds the rule, `(S, K)` its losses over seeds and splits."""
    found = []
    for experiment, of_experiment in pieces.items():
        losses = [piece.judged["losses"] for piece in of_experiment if piece.size == size]
        if losses and all(rule in of_run for of_run in losses):
            found.append((experiment, pooled(losses, rule)))
    return found


def _by_samples(values: Iterable[float]) -> Mapping[str, float]:
    return {str(n): float(value) for n, value in zip(SAMPLES, values)}


def _floats(*values: float) -> list[float]:
    return [round(float(value), 4) for value in values]


if __name__ == "__main__":
    main()
