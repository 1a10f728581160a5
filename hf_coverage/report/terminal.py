"""Tables for a terminal."""

from rich.table import Table as RichTable
from rich.text import Text

from hf_coverage.report.table import Cell, Interval, Table, format_cell, title

__all__ = ["rich_table"]


def rich_table(table: Table, *, transpose: bool = False) -> RichTable:
    """A table for `rich`: numbers flush right, the best of a ranked column in bold green, the caption below.

    Args:
        table: what to show.
        transpose: show columns as rows, for few rows of many columns; the first column gives the titles.

    Example:
        >>> from rich.console import Console
        >>> table = Table(["model", "Cov_16"], [["a", 0.25], ["b", 0.5]])
        >>> Console(width=30).print(rich_table(table, transpose=True))
        ┏━━━━━━━━┳━━━━━━━┳━━━━━━━┓
        ┃ model  ┃     a ┃     b ┃
        ┡━━━━━━━━╇━━━━━━━╇━━━━━━━┩
        │ Cov_16 │ 0.250 │ 0.500 │
        └────────┴───────┴───────┘
    """
    stacked = transpose and len(table.rows) > 2  # an interval below its value makes room for more models
    columns = [
        [_styled(cells[column], row == table.best(column), stacked) for row, cells in enumerate(table.rows)]
        for column in range(len(table.columns))
    ]
    titles = [Text(title(column)) for column in table.headers]
    if transpose:
        heads, flush = [titles[0], *columns[0]], ["left", *["right"] * len(table.rows)]
        lines = [[head, *column] for head, column in zip(titles[1:], columns[1:])]
    else:
        heads, flush = titles, ["right" if table.is_numeric(index) else "left" for index in range(len(titles))]
        lines = [list(line) for line in zip(*columns)]
    shown = RichTable(caption=Text(table.caption) if table.caption else None, caption_justify="left")
    for head, side in zip(heads, flush):
        shown.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
    for line in lines:
        shown.add_row(*line)
    return shown


def _styled(cell: Cell, best: bool, stacked: bool) -> Text:
    text = format_cell(cell)
    if stacked and isinstance(cell, Interval):
        text = text.replace(" ", "\n", 1)
    return Text(text, style="bold green" if best else "")
