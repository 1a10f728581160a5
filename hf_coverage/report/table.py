"""Tables of results, written once and shown in a terminal, on a page or in a model card."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from hf_coverage.plots.names import tell_apart

__all__ = [
    "Cell",
    "Column",
    "Interval",
    "Table",
    "escape_markdown",
    "format_cell",
    "format_number",
    "legend",
    "rich_tables",
]

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


def rich_tables(table: Table, *, width: int | None = None, transpose: bool = False) -> list[RichTable]:
    """A table for `rich`: numbers flush right, the best of a ranked column in bold green; in parts where it is wide.

    No word and no number is broken. What is wider than `width` first has its intervals below their values and its long
    names shortened in the middle, then its text on several lines; if that is not enough, its columns are shown some at
    a time, each part with the first column again.

    Args:
        table: What to show, without its caption.
        width: Characters in a line; None for as many as it takes.
        transpose: Show columns as rows, for few rows of many columns; the first column gives the titles.

    Example:
        >>> from rich.console import Console
        >>> table = Table(["model", "Cov_16"], [["a", 0.25], ["b", 0.5]])
        >>> for part in rich_tables(table, transpose=True):
        ...     Console(width=30).print(part)
        ┏━━━━━━━━┳━━━━━━━┳━━━━━━━┓
        ┃ model  ┃     a ┃     b ┃
        ┡━━━━━━━━╇━━━━━━━╇━━━━━━━┩
        │ Cov_16 │ 0.250 │ 0.500 │
        └────────┴───────┴───────┘
    """
    grid = _Grid.of(table, transpose, stacked=transpose and len(table.rows) > 2)
    limit = math.inf if width is None else width
    if sum(grid.widest(column) + 3 for column in range(len(grid.heads))) + 1 <= limit:
        return [grid.part(range(len(grid.heads)), limit)]
    grid = _Grid.of(table, transpose, stacked=True).shortened(max(12, int(limit) // 4))
    parts: list[list[int]] = [[0]]
    for column in range(1, len(grid.heads)):
        if len(parts[-1]) > 1 and grid.least([*parts[-1], column]) > limit:
            parts.append([0])
        parts[-1].append(column)
    return [grid.part(part, limit) for part in parts]


def legend(table: Table) -> str:
    """What the symbols that a table uses mean; empty where it uses none.

    Example:
        >>> legend(Table(["model", Column("Cov_16", "lower")], [["a", None]]))
        '↓ lower is better; – not known.'
    """
    texts = [title(column) for column in table.headers] + [format_cell(cell) for row in table.rows for cell in row]
    meanings = {"↓": "lower is better", "↑": "higher is better", "–": "not known", "∞": "no number is enough"}
    used = [f"{sign} {meaning}" for sign, meaning in meanings.items() if any(sign in text.split() for text in texts)]
    return f"{'; '.join(used)}." if used else ""


class _Grid(NamedTuple):
    """Heads and lines of cells as they are shown, and which columns are flush right."""

    heads: list[str]
    lines: list[list["_Shown"]]
    flush_right: list[bool]

    @classmethod
    def of(cls, table: Table, transpose: bool, *, stacked: bool) -> "_Grid":
        columns = [
            [_styled(cells[column], row == table.best(column), stacked) for row, cells in enumerate(table.rows)]
            for column in range(len(table.columns))
        ]
        titles = [title(column) for column in table.headers]
        if transpose:
            lines = [[_Shown(head), *column] for head, column in zip(titles[1:], columns[1:])]
            heads = [titles[0], *(cell.text for cell in columns[0])]
            return cls(heads, lines, [False, *(True for _ in table.rows)])
        flush = [table.is_numeric(index) for index in range(len(titles))]
        return cls(titles, [list(line) for line in zip(*columns)], flush)

    def cells(self, column: int) -> list["_Shown"]:
        return [_Shown(self.heads[column]), *(line[column] for line in self.lines)]

    def widest(self, column: int) -> int:
        return max(cell_len(line) for cell in self.cells(column) for line in cell.text.split("\n"))

    def narrowest(self, column: int) -> int:
        return max(cell_len(part) for cell in self.cells(column) for part in cell.parts)

    def least(self, columns: Sequence[int]) -> int:
        """The width of some columns with every word on a line of its own."""
        return sum(self.narrowest(column) + 3 for column in columns) + 1

    def shortened(self, most: int) -> "_Grid":
        """The same with long words shortened in the middle, so that those of a column still differ."""
        heads, columns = _shortened(self.heads, most), []
        for column in range(len(heads)):
            cells = [line[column] for line in self.lines]
            texts = _shortened([cell.text for cell in cells], most)
            columns.append([cell._replace(text=text) for cell, text in zip(cells, texts)])
        return self._replace(heads=heads, lines=[list(line) for line in zip(*columns)])

    def part(self, columns: Sequence[int], limit: float) -> RichTable:
        """Some columns as a table, in widths that break no word."""
        widths = {column: self.narrowest(column) for column in columns}
        spare = limit - self.least(columns)
        for column in sorted(columns, key=self.widest):
            more = min(spare, self.widest(column) - widths[column])
            if more > 0:
                widths[column] += int(more)
                spare -= more
        shown = RichTable()
        for column in columns:
            shown.add_column(
                Text(self.heads[column]), justify="right" if self.flush_right[column] else "left", width=widths[column]
            )
        for line in self.lines:
            shown.add_row(*(Text(line[column].text, line[column].style) for column in columns))
        return shown


def _shortened(texts: Sequence[str], most: int) -> list[str]:
    long = [text for text in texts if any(cell_len(word) > most for word in text.split())]
    short = dict(zip(long, tell_apart(long, most)))
    return [short.get(text, text) for text in texts]


class _Shown(NamedTuple):
    text: str
    style: str = ""
    is_interval: bool = False

    @property
    def parts(self) -> list[str]:
        """What stays on one line: words, and an interval with both its ends."""
        return self.text.split("\n") if self.is_interval else self.text.split() or [""]


def _styled(cell: Cell, best: bool, stacked: bool) -> _Shown:
    text = format_cell(cell)
    if stacked and isinstance(cell, Interval):
        text = text.replace(" ", "\n", 1)
    return _Shown(text, "bold green" if best else "", isinstance(cell, Interval))
