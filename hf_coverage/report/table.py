"""Tables of results, written once and shown in a terminal, on a page or in a model card."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.table import Table as RichTable
from rich.text import Text

__all__ = ["Cell", "Column", "Interval", "Table", "escape_markdown", "format_cell", "format_number", "rich_table"]

# Brackets alone and underscores inside words are text, as they stand in intervals and in `Cov_16`.
_MARKUP = re.compile(r"([\\`*~|]|(?<=\])[\[(]|(?<!\w)_|_(?!\w))")


class Interval(NamedTuple):
    """A number with the two ends of its confidence interval."""

    value: float
    low: float
    high: float


Cell = str | int | float | Interval | None
"""What a table can hold; None is shown as a dash."""


class Column(NamedTuple):
    """The title of a column, and which of its values is the best one, where one is."""

    title: str
    better: Literal["lower", "higher"] | None = None


@dataclass(frozen=True)
class Table:
    """Rows under titled columns.

    Attributes:
        columns: One `Column` each, or only its title.
        rows: One cell for each column.
        caption: A sentence that says what is shown.

    Raises:
        ValueError: If a row has another number of cells than there are columns.

    Example:
        >>> table = Table(["model", Column("Cov_16", "lower")], [["a", Interval(0.25, 0.2, 0.3)], ["b", 0.125]])
        >>> table.best(1)
        1
        >>> print(table.to_markdown())
        | model | Cov_16 ↓ |
        | --- | ---: |
        | a | 0.250 [0.200, 0.300] |
        | b | **0.125** |
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row, cells in enumerate(self.rows):
            if len(cells) != len(self.columns):
                raise ValueError(
                    f"`rows` must have {len(self.columns)} cells each, one a column, but row {row} has {len(cells)}."
                )

    @property
    def headers(self) -> list[Column]:
        """The columns, a bare title as a column whose values are not ranked."""
        return [column if isinstance(column, Column) else Column(column) for column in self.columns]

    def best(self, column: int) -> int | None:
        """The row with the best value of a column; None where the column is not ranked or has no single best."""
        better = self.headers[column].better
        values = {row: _number(cells[column]) for row, cells in enumerate(self.rows)}
        known = {row: value for row, value in values.items() if not math.isnan(value)}
        if better is None or len(known) < 2:
            return None
        best = min(known.values()) if better == "lower" else max(known.values())
        rows = [row for row, value in known.items() if value == best]
        return rows[0] if len(rows) == 1 else None

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are set flush right."""
        return all(not isinstance(cells[column], str) for cells in self.rows)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, the best of a ranked column in bold, ranked titles with an arrow."""
        titles = [escape_markdown(title(column)) for column in self.headers]
        rules = ["---:" if self.is_numeric(index) else "---" for index in range(len(self.columns))]
        best = [self.best(index) for index in range(len(self.columns))]
        lines = [titles, rules]
        for row, cells in enumerate(self.rows):
            texts = [escape_markdown(format_cell(cell)) for cell in cells]
            lines.append([f"**{text}**" if row == best[index] else text for index, text in enumerate(texts)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(column: Column) -> str:
    """A column's title with an arrow towards its better values."""
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    return column.title + arrows[column.better]


def format_number(value: float) -> str:
    """A number as tables show it: three decimals below ten, fewer above, no exponent below a million.

    Example:
        >>> [format_number(value) for value in (0, 0.04678, 5.7, 1234.5, 3e-5, float("inf"), float("nan"))]
        ['0', '0.047', '5.700', '1,234', '3e-05', '∞', '–']
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if size >= 1e6 or size < 5e-4:
        return f"{value:.3g}"
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


def format_cell(cell: Cell) -> str:
    """A cell as text: numbers through `format_number`, an interval in brackets after its value, None as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Interval):
        value, low, high = (format_number(part) for part in cell)
        return f"{value} [{low}, {high}]"
    return format_number(cell)


def escape_markdown(text: str) -> str:
    r"""Text as one line of Markdown that can become neither markup nor a new cell.

    Example:
        >>> print(escape_markdown("[x](url) **b** 0.2 [0.1, 0.3] Cov_16"))
        [x]\(url) \*\*b\*\* 0.2 [0.1, 0.3] Cov_16
    """
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _number(cell: Cell) -> float:
    value = cell.value if isinstance(cell, Interval) else cell
    return math.nan if value is None or isinstance(value, str) else float(value)


def rich_table(table: Table, *, transpose: bool = False) -> RichTable:
    """A table for `rich`: numbers flush right, the best of a ranked column in bold green, the caption below.

    Args:
        table: What to show.
        transpose: Show columns as rows, for few rows of many columns; the first column gives the titles.

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
