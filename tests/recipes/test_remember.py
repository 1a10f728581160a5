"""What recipes keep in a run's folder is computed once, known by all that decides it, and whole or not there."""

import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage import CoverageProfile
from hf_coverage.report.table import Table
from recipes import remember as remembering
from recipes.profiles import read_profiles, write_profile
from recipes.remember import remember, remember_corpus
from recipes.settings import refuse_other_settings
from recipes.tables import show, write_tables


@pytest.fixture
def run(tmp_path):
    """The folder of a run with its settings."""
    refuse_other_settings(tmp_path / "run", {"steps": 3})
    return tmp_path / "run"


def test_a_result_is_computed_once_and_read_as_it_was(run):
    calls = []

    def experiment():
        calls.append(1)
        return {"values": [0.1, -math.inf], "n": 3}

    for _ in range(3):
        assert remember(run / "parts", ("parity, late", 3), experiment) == {"values": [0.1, -math.inf], "n": 3}
    assert calls == [1]
    assert [file.name for file in (run / "parts").iterdir()] == ["parity-late-3.json"]


@given(st.lists(st.floats(1e-8, 1e8) | st.integers(0, 10**9), min_size=2, max_size=2, unique=True))
def test_other_numbers_are_other_keys(numbers):
    assert len({remembering._named(number) for number in numbers}) == 2


@pytest.mark.parametrize(
    ("key", "name"),
    [(("SGD, clipped", 0.0001, 0), "SGD-clipped-0.0001-0"), (("before training", 0.0, 2), "before-training-0-2")],
)
def test_files_are_named_as_those_of_earlier_runs(run, key, name):
    remember(run / "runs", key, list)
    assert (run / "runs" / f"{name}.json").read_text() == "[]"


def test_an_experiment_that_fails_leaves_nothing(run):
    with pytest.raises(ZeroDivisionError):
        remember(run / "parts", ("a",), lambda: 1 / 0)
    with pytest.raises(TypeError):
        remember(run / "parts", ("a",), lambda: {1, 2})
    with pytest.raises(ZeroDivisionError):
        remember_corpus(run / "corpus", lambda: 1 / 0)
    assert [path.name for path in run.iterdir()] == ["settings.json"]


def test_nothing_is_kept_where_no_settings_are(tmp_path):
    for keep in (lambda: remember(tmp_path / "runs", ("a",), list), lambda: remember_corpus(tmp_path / "a", list)):
        with pytest.raises(ValueError, match="belongs to no run: call `refuse_other_settings`"):
            keep()


def test_a_corpus_is_made_once_whatever_a_killed_run_has_left(run):
    (run / ".D at 0.7.part").mkdir()
    (run / ".D at 0.7.part" / "state.json").write_text("{")
    corpus = Dataset.from_dict({"prompt": ["a", "b"]})
    assert remember_corpus(run / "D at 0.7", lambda: corpus)["prompt"][:] == ["a", "b"]
    assert remember_corpus(run / "D at 0.7", pytest.fail)["prompt"][:] == ["a", "b"]
    assert sorted(path.name for path in run.iterdir()) == ["D at 0.7", "settings.json"]


def test_settings_are_compared_by_value(tmp_path):
    """Order and the way a number is written mean nothing: folders of earlier versions go on."""
    (tmp_path / "settings.json").write_text('{"n": 16, "model": "a", "bf16": true}')
    before = (tmp_path / "settings.json").stat().st_mtime_ns
    refuse_other_settings(tmp_path, {"model": "a", "n": 16.0, "bf16": True})
    assert (tmp_path / "settings.json").stat().st_mtime_ns == before
    for other in ({"n": 17}, {"bf16": False}, {"more": None}):
        with pytest.raises(ValueError, match="holds a run with other settings"):
            refuse_other_settings(tmp_path, {"model": "a", "n": 16, "bf16": True} | other)


def test_profiles_are_read_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        write_profile(CoverageProfile.from_logprobs([-float(step)], [0.0]), tmp_path / "profiles", step)
    found = read_profiles(tmp_path / "profiles")
    assert [(step, profile.name, profile.kl) for step, profile in found.items()] == [
        (step, f"step {step}", step) for step in (9, 10, 100)
    ]
    assert json.loads((tmp_path / "profiles" / "step-9.json").read_text())["name"] == "step 9"


def test_tables_are_written_and_shown_with_what_fits_none(tmp_path, capsys):
    tables = [Table(["a", "b"], [["x", 0.5]], "First."), Table(["column"], [["y"]], "Second.")]
    write_tables(tmp_path / "table.md", tables, ["one", "two"])
    assert (tmp_path / "table.md").read_text() == (
        "First.\n\n| a | b |\n| --- | ---: |\n| x | 0.500 |\n\nSecond.\n\n| column |\n| --- |\n| y |\n\n- one\n- two\n"
    )
    write_tables(tmp_path / "table.md", tables[:1])
    assert (tmp_path / "table.md").read_text() == "First.\n\n| a | b |\n| --- | ---: |\n| x | 0.500 |\n"
    show(tables, [f"Written: {Path('a') / ('long' * 80)} [b]"])
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("First.", "0.500", "Second.", f"Written: a/{'long' * 80} [b]\n"))
