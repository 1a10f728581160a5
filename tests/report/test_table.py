import math

import pytest

from hf_coverage.report.table import Column, Interval, Table, format_cell, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (12345, "12,345"),
        (0.0, "0"),
        (0.1134, "0.113"),
        (1.0, "1"),
        (1.34, "1.340"),
        (96.523, "96.52"),
        (98765.4, "98,765"),
        (2.5e7, "2.5e+07"),
        (0.00004, "4e-05"),
        (6.2e-17, "6.2e-17"),
        (-0.25, "-0.250"),
        (-math.inf, "-∞"),
    ],
)
def test_numbers_are_short_and_never_lose_their_size(value, text):
    assert format_number(value) == text


def test_cells_of_every_kind():
    cells = ["a", None, 7, 0.5, Interval(0.5, 0.25, math.nan)]
    assert [format_cell(cell) for cell in cells] == ["a", "–", "7", "0.500", "0.500 [0.250, –]"]


def test_the_best_of_a_column_is_the_lowest_or_highest_and_never_a_tie():
    columns = ["name", Column("Cov_2", "lower"), Column("Pass@8", "higher"), Column("tied", "lower"), "unranked"]
    table = Table(
        columns, [["a", Interval(0.2, 0, 1), 0.9, 1.0, 1], ["b", 0.1, 0.8, 1.0, 2], ["c", None, 0.7, 2.0, 3]]
    )
    assert [table.best(column) for column in range(5)] == [None, 1, 0, None, None]


def test_a_single_row_has_no_best():
    assert Table([Column("Cov_2", "lower")], [[0.1]]).best(0) is None


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="`rows` must have 2 cells each, one a column, but row 1 has 1"):
        Table(["a", "b"], [[1, 2], [1]])


def test_markdown_cannot_be_broken_by_names():
    lines = Table(["model | x"], [["a|b\n<img src=x>"]]).to_markdown().splitlines()
    assert lines == ["| model \\| x |", "| --- |", "| a\\|b &lt;img src=x&gt; |"]
