"""What the students' runs say: tables and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from datasets import Dataset
from matplotlib.ticker import MaxNLocator

from hf_coverage import CoverageProfile
from hf_coverage.functional.checks import metric_key
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table

__all__ = ["Run", "difference_table", "draw_runs", "run_table", "tuning_table"]


@dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        arm: How it was trained.
        rate: With which step size.
        seed: With which order of the sequences.
        logs: What the Trainer logged at each step.
        validation: What it measured in the end.
        logprobs: log p of the test sequences.
    """

    arm: str
    rate: float
    seed: int
    logs: list[dict[str, float]]
    validation: dict[str, float]
    logprobs: list[float]

    @property
    def name(self) -> str:
        """As tables and the legend have it."""
        return f"{self.arm}, seed {self.seed}" if self.logs else self.arm

    def profile(self, test: Dataset) -> CoverageProfile:
        """Against the teacher's density; windows of one document are not independent."""
        return CoverageProfile.from_logprobs(
            self.logprobs, test["reference_logprob"][:], groups=test["document"][:], kind="density", name=self.name
        )


def run_table(runs: Sequence[Run], test: Dataset, report_n: Sequence[float], n: float) -> Table:
    """One row a student: coverage and KL of the teacher, with intervals over documents."""
    columns = ["student", "step size", *(Column(f"Cov_{metric_key(value)}", "lower") for value in report_n)]
    rows: list[list[Cell]] = []
    for run in runs:
        profile = run.profile(test)
        cells = [Interval(profile.cov(value), *profile.interval(value)) for value in report_n]
        kl = f"{profile.kl:.2f} ± {profile.kl_standard_error:.2f}"
        rows.append([run.name, f"{run.rate:g}" if run.logs else None, *cells, kl])
    caption = (
        f"Coverage of {len(test)} test sequences of the teacher's with 95 % intervals over documents; "
        f"KL(teacher || student) of a sequence in nats, with its standard error. Stopped: at log {metric_key(n)}."
    )
    return Table([*columns, "KL"], rows, caption)


def difference_table(runs: Sequence[Run], test: Dataset, report_n: Sequence[float]) -> Table:
    """Stopped minus plain on the same sequences, for each seed."""
    rows: list[list[Cell]] = []
    for seed in sorted({run.seed for run in runs if run.logs}):
        stopped, plain = (
            next(run for run in runs if run.arm == arm and run.seed == seed).profile(test)
            for arm in ("stopped", "plain")
        )
        ratios = (stopped.log_ratios, plain.log_ratios)
        found = [paired_coverage_difference(*ratios, value, groups=plain.groups) for value in report_n]
        found.append(paired_kl_difference(*ratios, groups=plain.groups))
        rows.append([seed, *(Interval(each.difference, each.low, each.high) for each in found)])
    columns = ["seed", *(f"Cov_{metric_key(value)}" for value in report_n), "KL"]
    return Table(
        columns, rows, "Stopped minus plain, paired by sequence, with 95 % intervals; below 0, stopping helps."
    )


def tuning_table(runs: Sequence[Run]) -> Table:
    """What the validation sequences say of each step size."""
    columns = ["student", "step size", "stopped KL", Column("KL", "lower"), "KL a token"]
    rows: list[list[Cell]] = [
        [
            run.arm,
            f"{run.rate:g}" if run.logs else None,
            *(run.validation[f"eval_{name}"] for name in ("stopped_kl", "kl", "kl_per_token")),
        ]
        for run in runs
    ]
    return Table(columns, rows, "On the validation sequences; the step size of least KL is taken, for each arm.")


def draw_runs(runs: Sequence[Run], test: Dataset, path: str | PathLike[str], *, n: float) -> None:
    """Draw the profiles, and the training's divergence and share of stopped tokens."""
    figure, (left, middle, right) = new_axes(3, width=4.6)
    arms = list(dict.fromkeys(run.arm for run in runs))
    grid = np.exp(np.linspace(0, 14, 113))
    for run in runs:
        color, style = COLORS[arms.index(run.arm)], "-" if run.seed == runs[0].seed else "--"
        profile = run.profile(test)
        left.plot(grid, profile.cov(grid.tolist()), color=color, linestyle=style, label=run.name)
        steps = [row["step"] for row in run.logs]
        middle.plot(steps, [row["kl_per_token"] for row in run.logs], color=color, linestyle=style)
        right.plot(steps, [row["stopped_tokens"] for row in run.logs], color=color, linestyle=style)
    left.axvline(n, color="0.6", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="$N$", ylabel="Cov$_N$ (lower is better)", ylim=(0, 1.02))
    left.legend(frameon=False)
    middle.set(xlabel="step", ylabel="KL from the teacher, nats a token", ylim=(0, None))
    right.set(xlabel="step", ylabel="share of the tokens that is stopped", ylim=(-0.02, 1))
    for ax in (middle, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path)
