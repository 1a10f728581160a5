"""What the commands print: on the main process alone, tables where a person reads them."""

import os
import sys

from rich.console import Console
from rich.table import Table as RichTable

from hf_coverage.report.table import Cell, Interval, Table, format_cell, title

__all__ = ["is_main_process", "print_error", "print_table", "say"]

_WIDE = 200  # columns for output that goes to a file, where nothing limits a line


def is_main_process() -> bool:
    """Whether this process prints and writes; known from the launcher's environment, before torch is loaded."""
    return int(os.environ.get("RANK", "0")) == 0


def say(*texts: str) -> None:
    """Print lines of plain text."""
    if is_main_process():
        for text in texts:
            _console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table, *, transpose: bool = False) -> None:
    """Print a table, its caption below it.

    Args:
        table: what to print.
        transpose: print columns as rows, for tables of few rows and many columns; the first column gives the titles.
    """
    if not is_main_process():
        return
    best = {(row, column) for column in range(len(table.columns)) if (row := table.best(column)) is not None}
    inline = not transpose or len(table.rows) <= 2
    grid = [
        [_styled(cell, (row, column) in best, inline) for column, cell in enumerate(cells)]
        for row, cells in enumerate(table.rows)
    ]
    titles = [title(column) for column in table.headers]
    numeric = [table.is_numeric(column) for column in range(len(titles))]
    if transpose:
        heads = [titles[0], *(format_cell(cells[0]) for cells in table.rows)]
        lines = [[name, *column] for name, column in zip(titles[1:], list(zip(*grid))[1:])]
        numeric = [False] + [True] * len(table.rows)
    else:
        heads, lines = titles, grid
    shown = RichTable(caption=_escape(table.caption), caption_justify="left", header_style="bold")
    for head, right in zip(heads, numeric):
        shown.add_column(_escape(head), justify="right" if right else "left", overflow="fold")
    for line in lines:
        shown.add_row(*([_escape(line[0]), *line[1:]] if transpose else line))
    _console().print(shown)


def print_error(error: BaseException | str) -> None:
    """Print an error on one line of the standard error."""
    text = " ".join(str(error).split()) or type(error).__name__
    where = "" if is_main_process() else f" (process {os.environ['RANK']})"
    console = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE)
    console.print(f"[bold red]Error[/]{where}: {_escape(text)}", highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def _styled(cell: Cell, best: bool, inline: bool) -> str:
    text = _escape(format_cell(cell))
    if isinstance(cell, Interval) and not inline:
        text = text.replace(" ", "\n", 1)
    return f"[bold green]{text}[/]" if best else text


def _escape(text: str) -> str:
    # not rich.markup.escape: that leaves "[0.1, 0.2]" alone, as it should, but also a lone backslash before a bracket
    return text.replace("\\[", "\\\\[").replace("[", "\\[")
