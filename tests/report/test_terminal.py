import io

from rich.console import Console

from hf_coverage.report.table import Column, Interval, Table, rich_tables

TABLE = Table(
    ["model", Column("Cov_2", "lower")],
    [["a [bold]x[/]", Interval(0.25, 0.1, 0.4)], ["b", 0.5], ["c", None]],
    "Shares [of] rows.",
)


def shown(width=80, **options):
    console = Console(width=width, record=True, file=io.StringIO())
    for part in rich_tables(TABLE, **options):
        console.print(part)
    return console.export_text()


def test_brackets_in_names_and_intervals_are_text_and_not_markup():
    text = shown()
    for part in ("a [bold]x[/]", "0.250 [0.100, 0.400]", "Cov_2 ↓"):
        assert part in text


def test_transposed_it_has_a_column_for_each_row_and_intervals_below_their_values():
    lines = [line for line in shown(transpose=True).splitlines() if "│" in line]
    assert [cell.strip() for cell in lines[0].strip("│").split("│")] == ["Cov_2 ↓", "0.250", "0.500", "–"]
    assert "[0.100, 0.400]" in lines[1]
