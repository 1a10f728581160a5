"""Tables of a recipe's results: cells of them, in its report and in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.statistics import clustered_mean, mean_interval
from hf_coverage.inference.files import write_atomically
from hf_coverage.report.table import Interval, Table, legend, rich_tables

__all__ = ["interval_of", "show", "write_tables"]

WIDTH = 200
"""Columns of a pipe, which has none of its own."""


def interval_of(values: FloatArray, *, groups: FloatArray | None = None) -> Interval:
    """A mean with Student's interval, over values or over groups of them that are not independent.

    Its 95 % are nominal, and true of values that are nearly normal: see `mean_interval`.
    """
    estimate = clustered_mean(values, groups=groups)
    return Interval(estimate.mean, *mean_interval(estimate))


def write_tables(path: Path, tables: Sequence[Table], remarks: Sequence[str] = ()) -> None:
    """Write tables as Markdown, each below its caption, and what fits no table as a list after them."""
    parts = [f"{table.caption}\n\n{table.to_markdown()}" for table in tables]
    listed = "\n\n" + "\n".join(f"- {remark}" for remark in remarks) if remarks else ""
    write_atomically(path, "\n\n".join(parts) + listed + "\n")


def show(tables: Sequence[Table], lines: Sequence[str] = ()) -> None:
    """Print tables, and lines after them."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for table in tables:
        for part in rich_tables(table, width=console.width):
            console.print(part)
        console.print(Text(" ".join(text for text in (table.caption, legend(table)) if text), style="italic"))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
