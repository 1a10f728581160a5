"""CoverageCallback in a job of two gloo processes."""

from pathlib import Path

from tests.processes import run


def test_two_ranks(tmp_path):
    run(Path(__file__).with_name("callback_two_ranks.py"), tmp_path, ranks=2)
    assert (tmp_path / "done").is_file()
