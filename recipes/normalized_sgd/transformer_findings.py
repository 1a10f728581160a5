"""Tables and the figure of six ways to train a transformer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import LogFormatterMathtext

from hf_coverage import CoverageProfile
from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.paired import paired_coverage_difference
from hf_coverage.functional.statistics import bounded_mean_interval
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table
from recipes.tables import interval_of, show, write_tables

START = "before"
BASELINE = "normalised SGD"


class Run(NamedTuple):
    """A learning rate and log p(y|x) `(S, R)` of the held-out rows, nats, for each seed."""

    rate: float | None
    logprobs: FloatArray


class Half(NamedTuple):
    """Half of the held-out rows, for all seeds: which they are, and the group of each."""

    rows: FloatArray
    groups: FloatArray

    def of(self, run: Run) -> CoverageProfile:
        """The profile against the reference that gives the right response probability 1."""
        logprobs = run.logprobs[:, self.rows].ravel()
        return CoverageProfile.from_logprobs(logprobs, np.zeros_like(logprobs), groups=self.groups_of(run))

    def groups_of(self, run: Run) -> FloatArray:
        """The groups of `run.logprobs[:, self.rows].ravel()`: a row is the same one in all seeds."""
        return np.tile(self.groups, len(run.logprobs))


def report(output: Path, measure: Any, job: Any, runs: dict[str, list[Run]]) -> None:
    """Write `table.md` and `transformer.png`."""
    _, index = np.unique(job.groups, return_inverse=True)
    halves = [Half(np.flatnonzero(index % 2 == side), job.groups[index % 2 == side]) for side in (0, 1)]
    key = f"Cov_{metric_key(measure.choose_n)}"
    criteria: dict[str, Callable[[CoverageProfile], tuple[float, ...]]] = {
        key: lambda profile: (profile.cov(measure.choose_n), profile.kl),  # which breaks ties
        "cross-entropy": lambda profile: (profile.kl,),
    }
    tables = []
    for name, criterion in criteria.items():
        chosen = {method: min(tried, key=lambda run: criterion(halves[0].of(run))) for method, tried in runs.items()}
        tables.append(results_table(measure, halves[1], runs, chosen, chosen_by=name))
        if name == key:
            draw(measure, halves[1], runs, chosen, output / "transformer.png")
    write_tables(output / "table.md", tables)
    show(tables, [f"Written: {output / 'table.md'} and {output / 'transformer.png'}"])


def results_table(
    measure: Any, half: Half, runs: dict[str, list[Run]], chosen: dict[str, Run], *, chosen_by: str
) -> Table:
    """Every method at its best learning rate, on the half that did not choose it."""
    key = metric_key(measure.choose_n)
    columns = ["method", "learning rate", Column("cross-entropy", "lower")]
    columns += [Column(f"Cov_{metric_key(n)}", "lower") for n in measure.n]
    columns += [Column(f"Pass@{n}", "higher") for n in measure.pass_at]
    rows: list[list[Cell]] = []
    for name, run in chosen.items():
        profile, groups = half.of(run), half.groups_of(run)
        row: list[Cell] = [name, label_of(run, runs[name]), interval_of(profile.log_ratios, groups=groups)]
        row += [Interval(profile.cov(n), *profile.interval(n)) for n in measure.n]
        for n in measure.pass_at:
            passed = pass_probabilities(-profile.log_ratios, n)
            row.append(Interval(float(passed.mean()), *bounded_mean_interval(passed, groups=groups)))
        if BASELINE in chosen:
            row.append(difference(half, run, chosen[BASELINE], measure.choose_n) if name != BASELINE else None)
        rows.append(row)
    if BASELINE in chosen:
        columns.append(f"Cov_{key} less that of {BASELINE}")
    caption = (
        f"Learning rates chosen by {chosen_by} on the other half of the held-out rows; cross-entropy in nats a "
        "response, with Student's intervals; 95 % intervals of the rest. An arrow at a learning rate: the least or "
        "the largest one tried."
    )
    return Table(columns, rows, caption)


def label_of(run: Run, tried: list[Run]) -> str:
    """The learning rate, and whether a better one may lie outside of those tried."""
    if run.rate is None:
        return "–"
    rates = [other.rate for other in tried if other.rate is not None]
    edge = {min(rates): " ↓", max(rates): " ↑"}.get(run.rate, "") if len(rates) > 1 else ""
    return f"{run.rate:g}{edge}"


def difference(half: Half, run: Run, baseline: Run, n: float) -> Interval:
    """Cov_N less the baseline's on the same rows."""
    one, other = half.of(run), half.of(baseline)
    found = paired_coverage_difference(one.log_ratios, other.log_ratios, n, groups=half.groups_of(run))
    return Interval(found.difference, found.low, found.high)


def draw(measure: Any, half: Half, runs: dict[str, list[Run]], chosen: dict[str, Run], path: Path) -> None:
    """Cov_N against cross-entropy, a point for each learning rate, and the profiles at the best ones."""
    figure, (left, right) = new_axes(2, width=5.6, height=4.4)
    grid = np.geomspace(1, 4 * max([*measure.n, *measure.pass_at]), 60)
    for (name, tried), color in zip(runs.items(), (COLORS[6], *COLORS[:6])):
        profiles = [half.of(run) for run in tried]
        shown = [profile for profile in profiles if profile.kl < 1.25 * half.of(runs[START][0]).kl]
        losses = [profile.kl for profile in shown]
        left.plot(
            losses, [profile.cov(measure.choose_n) for profile in shown], "o-", color=color, label=name, alpha=0.8
        )
        curve = half.of(chosen[name]).curve(grid)
        right.plot(curve.n, curve.value, ":" if name == START else "-", color=color, label=name)
        right.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    left.set_xlabel("cross-entropy in nats a response (lower is better)")
    left.set_ylabel(f"Cov$_{{{metric_key(measure.choose_n)}}}$ (lower is better)")
    left.set_title("each learning rate that did not diverge", fontsize=10)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(LogFormatterMathtext(base=2))
    right.set_xlabel("N")
    right.set_ylabel("Cov$_N$ (lower is better)")
    right.set_title(f"at the learning rates chosen by Cov$_{{{metric_key(measure.choose_n)}}}$", fontsize=10)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
