"""A tournament of 64 candidates on 1,000,000 rows, beside the plain double loop of numpy comparisons.

    python -m recipes.benchmarks.tournament --output-dir runs/tournament

Everything runs in one process, the contenders taking turns; the double loop's matrix and ours must be equal.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hf_coverage import tournament
from hf_coverage.functional.checks import TIE_TOLERANCE
from hf_coverage.functional.tournament import hold_tournament
from hf_coverage.functional.tournament_racing import race
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import resident_memory, write_facts
from recipes.tables import show

N = 16


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds, and the most memory beyond what was there before; CPU time counts all threads."""

    name: str
    seconds: float
    cpu_seconds: float
    extra_megabytes: float


def make_table(candidates: int, rows: int, seed: int) -> list[np.ndarray]:
    """Checkpoints that differ by a few nats a response, the later ones better and more alike."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-60, 10, rows)
    spreads = np.linspace(3.0, 1.5, candidates)
    return [np.minimum(base - spread + rng.normal(0, spread, rows), 0.0) for spread in spreads]


def double_loop(table: list[np.ndarray]) -> np.ndarray:
    """What one writes down first."""
    rates, threshold = np.zeros((len(table), len(table))), math.log(N) - TIE_TOLERANCE
    for a, challenger in enumerate(table):
        for b, defender in enumerate(table):
            if a != b:
                rates[a, b] = np.mean(challenger - defender >= threshold)
    return rates


class PeakMemory:
    """The most memory that the process held, beyond what it held on entering."""

    def __enter__(self) -> PeakMemory:
        self.before, self.most, self.done = resident_memory(), 0, threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident_memory() - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()


def measure(name: str, contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time contenders in turns."""
    walls, cpus, peaks = ({key: [] for key in contenders} for _ in range(3))
    for turn in range(rounds):
        for key, run in contenders.items():
            print(f"{name}: {key}, round {turn + 1} of {rounds}", flush=True)
            with PeakMemory() as memory:
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                walls[key].append(time.perf_counter() - wall)
                cpus[key].append(time.process_time() - cpu)
            peaks[key].append(memory.most / 2**20)
    return {
        key: Timing(key, statistics.median(walls[key]), statistics.median(cpus[key]), max(peaks[key]))
        for key in contenders
    }


def write_tables(folder: Path, table: list[np.ndarray]) -> dict[str, Path]:
    """The candidates as score tables, as `hf-coverage score` leaves them."""
    folders = {}
    for index, values in enumerate(table):
        folders[f"step-{index}"] = path = folder / f"step-{index}"
        scores = ScoreTable.begin(path, {"rows": len(values), "shard_rows": 65_536, "corpus": "random"})
        for shard in range(scores.num_shards):
            rows = scores.shard_rows(shard)
            scores.write(shard, Scores(values[rows.start : rows.stop], np.ones(len(rows), np.int64)))
    return folders


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for the JSON.")],
    candidates: int = 64,
    rows: int = 1_000_000,
    many: Annotated[int, typer.Option(help="Candidates of the race.")] = 256,
    many_rows: Annotated[int, typer.Option(help="Rows of the race.")] = 100_000,
    rounds: int = 3,
    seed: int = 0,
) -> None:
    """Compare the tournament with the double loop, and a race with a full tournament."""
    table = make_table(candidates, rows, seed)
    standing = hold_tournament(table, N, replicates=0)[0]
    if not np.array_equal(standing.rates, double_loop(table)):
        raise RuntimeError("the tournament's matrix is not the double loop's.")
    contenders = {
        "double loop": lambda: double_loop(table),
        "tournament": lambda: hold_tournament(table, N, replicates=0),
        "tournament, 1000 bootstrap samples": lambda: hold_tournament(table, N),
        "tournament at 4 N": lambda: hold_tournament(table, [4, 8, 16, 32], replicates=0),
    }
    timings = measure(f"{candidates} x {rows:,}", contenders, rounds)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_tables(Path(folder), table)
        table.clear()
        timings |= measure("from score tables", {"from score tables": lambda: tournament(folders, N)}, 1)
    table = make_table(many, many_rows, seed)
    racers = {
        f"{many} x {many_rows:,}, all rows": lambda: hold_tournament(table, N, replicates=0),
        f"{many} x {many_rows:,}, race": lambda: race(table, N),
    }
    timings |= measure("race", racers, 1)
    winner, left = hold_tournament(table, N, replicates=0)[0].ranking[0], race(table, N)
    raced = f"{len(left.survivors)} candidates left, the winner {'' if winner in left.survivors else 'not '}among them"
    report(output_dir, timings, candidates * rows * 8 / 2**20, raced)


def report(folder: Path, timings: dict[str, Timing], table_megabytes: float, raced: str) -> None:
    base, rows = timings["double loop"], []
    for name, timing in timings.items():
        ours = timing.name.startswith(("tournament", "double"))
        extra = timing.extra_megabytes - (table_megabytes if name == "from score tables" else 0)
        rows.append([name, timing.seconds, timing.cpu_seconds, extra, base.seconds / timing.seconds if ours else None])
    columns = ["", "seconds", "CPU seconds", "beyond the table, MB", "times faster"]
    show([Table(columns, rows, f"Table: {table_megabytes:.0f} MB. Race: {raced}.")])
    facts = {"table_megabytes": table_megabytes, "race": raced, "processors": os.cpu_count(), "numpy": np.__version__}
    facts |= {"machine": platform.machine(), "timings": [asdict(timing) for timing in timings.values()]}
    write_facts(folder / "tournament.json", facts)


if __name__ == "__main__":
    typer.run(main)
