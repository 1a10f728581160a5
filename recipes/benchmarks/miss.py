"""miss_N of a million rows at 64 N, and the soft tournament of 64 candidates on 100,000 rows beside the hard one.

    python -m recipes.benchmarks.miss --output-dir runs/miss

Everything runs in one process, the contenders taking turns. Memory is what they need beyond their tables.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.miss_profile import miss
from hf_coverage.functional.tournament import hold_tournament
from hf_coverage.functional.tournament_soft import hold_soft_tournament
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import processors, write_facts
from recipes.benchmarks.tournament import N, make_table, measure
from recipes.tables import show


def main(
    output_dir: Annotated[Path, typer.Option(help="Where miss.json goes.")] = Path("runs/miss"),
    rows: Annotated[int, typer.Option(help="Rows of the miss profile.")] = 1_000_000,
    candidates: Annotated[int, typer.Option(help="Candidates of the tournaments.")] = 64,
    tournament_rows: Annotated[int, typer.Option(help="Rows of the tournaments.")] = 100_000,
    rounds: int = 3,
    seed: int = 0,
) -> None:
    """Time the miss profile beside the coverage profile, and the soft tournament beside the hard one."""
    levels = np.exp2(np.linspace(0, 16, 64)).tolist()
    ratios = np.random.default_rng(seed).normal(1, 3, rows)
    profiles = {"miss_N": lambda: miss(ratios, levels), "Cov_N": lambda: coverage(ratios, levels)}
    timings = measure(f"{rows:,} rows at {len(levels)} N", profiles, rounds)
    table = make_table(candidates, tournament_rows, seed)
    tournaments = {
        "soft tournament": lambda: hold_soft_tournament(table, N),
        "hard tournament": lambda: hold_tournament(table, N, replicates=0),
    }
    timings |= measure(f"{candidates} x {tournament_rows:,}", tournaments, rounds)
    cells = [[one.name, one.seconds, one.cpu_seconds, one.extra_megabytes] for one in timings.values()]
    show([Table(["contender", "s", "CPU s", "MB beyond the table"], cells)])
    facts = {"timings": [asdict(one) for one in timings.values()], "rows": rows, "candidates": candidates}
    facts |= {"tournament_rows": tournament_rows, "rounds": rounds, "machine": processors()}
    write_facts(output_dir / "miss.json", facts | {"numpy": np.__version__, "python": platform.python_version()})


if __name__ == "__main__":
    typer.run(main)
