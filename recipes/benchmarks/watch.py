"""How soon the watch of `CoverageCallback` warns, and how often for nothing, beside the one on Cov_N that it replaced.

    python -m recipes.benchmarks.watch --output-dir runs/watch

Simulated runs of 40 evaluations of the same rows, cross-entropy falling all the while. Log ratios of a run are normal
over rows, and those of one evaluation move by noise that stays and noise that does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import stats

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.coverage_watch import WatchState, update_watch
from hf_coverage.functional.statistics import clustered_mean
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import write_facts
from recipes.tables import show

EVALUATIONS = 40
TURN = 4
"""The evaluation after which a class is given up."""
ROWS = (256, 1000, 4000)
CLASSES = {"nothing wrong": 0.0, "0.05 given up": 0.05, "0.1 given up": 0.1}


@dataclass(frozen=True)
class Row:
    """What one kind of run came to.

    Args:
        rows: Rows of the corpus, each of a prompt of its own.
        run: What becomes of the model.
        watch: Which watch.
        warned: Share of runs that were warned of.
        later: Median evaluations from the turn to the warning, in runs that were warned of.
    """

    rows: int
    run: str
    watch: str
    warned: float
    later: float | None


class FormerWatch:
    """Cov_N now against the best Cov_N, by Bonett and Price's paired test at levels alpha / (m (m + 1))."""

    def __init__(self, n: float, alpha: float = 0.05) -> None:
        self.n, self.alpha, self.seen = n, alpha, 0
        self.best: FloatArray | None = None

    def warns(self, ratios: FloatArray) -> bool:
        """Show it one more evaluation."""
        now = reached(ratios, self.n).astype(float)
        best, seen = self.best, self.seen
        self.seen += 1
        if best is None or now.mean() <= best.mean():
            self.best = now
            return False
        error = clustered_mean(np.append(now - best, [1.0, -1.0]))
        p_value = 2 * stats.t.sf(abs(error.mean) / error.standard_error, error.num_groups - 1)
        return bool(p_value < self.alpha / (seen * (seen + 1)))


class Watch:
    """Today's, as the callback shows it one evaluation after the other."""

    def __init__(self, n: float) -> None:
        self.n, self.state = n, WatchState()

    def warns(self, ratios: FloatArray) -> bool:
        """Show it one more evaluation."""
        step = self.state.evaluations
        self.state, worsening = update_watch(
            self.state, step=step, log_ratios=ratios, cross_entropy=100.0 - step, n=self.n
        )
        return worsening is not None


def evaluations(rows: int, given_up: float, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Log ratios of one evaluation after the other: the given-up rows lose half a nat each time after the turn."""
    start = rng.normal(1, 1.5, rows)
    rare = rng.random(rows) < given_up
    for step in range(EVALUATIONS):
        moved = 0.0 if not given_up else np.where(rare, 0.5 * max(0, step - TURN), -0.01 * step)
        yield start + moved + 0.5 * rng.normal(size=rows)


def warned_at(rows: int, given_up: float, n: float, rng: np.random.Generator) -> list[int | None]:
    """The evaluation at which each watch warns of one run."""
    watches = [Watch(n), FormerWatch(n)]
    found: list[int | None] = [None, None]
    for step, ratios in enumerate(evaluations(rows, given_up, rng)):
        for k, watch in enumerate(watches):
            if found[k] is None and watch.warns(ratios):
                found[k] = step
        if None not in found:
            break
    return found


def measure(rows: int, run: str, runs: int, n: float, rng: np.random.Generator) -> list[Row]:
    """Both watches over many runs of a kind."""
    found = [warned_at(rows, CLASSES[run], n, rng) for _ in range(runs)]
    result = []
    for name, steps in zip(("miss_N (today's)", "Cov_N (former)"), zip(*found)):
        warned = [step - TURN for step in steps if step is not None]
        later = float(np.median(warned)) if warned and CLASSES[run] else None
        result.append(Row(rows, run, name, len(warned) / runs, later))
    return result


def main(
    output_dir: Annotated[Path, typer.Option(help="Where watch.json goes.")] = Path("runs/watch"),
    runs: Annotated[int, typer.Option(help="Runs of each kind.")] = 200,
    n: Annotated[float, typer.Option(help="The N that is watched.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the runs.")] = 0,
) -> None:
    """Compare the watch on miss_N with the former one on Cov_N."""
    rng = np.random.default_rng(seed)
    rows = [row for run in CLASSES for size in ROWS for row in measure(size, run, runs, n, rng)]
    cells = [[row.run, row.rows, row.watch, row.warned, row.later] for row in rows]
    error = math.sqrt(0.05 * 0.95 / runs)
    caption = f"{runs} runs of {EVALUATIONS} evaluations each; the standard error of a share of 0.05 is {error:.3f}."
    show([Table(["run", "rows", "watch", "warned of", "evaluations after the turn"], cells, caption)])
    write_facts(output_dir / "watch.json", {"rows": [asdict(row) for row in rows], "runs": runs, "n": n, "seed": seed})


if __name__ == "__main__":
    typer.run(main)
