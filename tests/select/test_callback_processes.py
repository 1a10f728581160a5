"""TournamentCallback in a job of two gloo processes: as in one, to the byte."""

import json
from pathlib import Path

from tests.processes import run
from tests.select.callback_runs import rows_in

SCRIPT = Path(__file__).with_name("callback_two_ranks.py")
RUNS = ("protected", "chosen", "resumed")


def start(folder, ranks):
    run(SCRIPT, folder, ranks=ranks)
    return json.loads((folder / "facts.json").read_text()), {run: rows_in(folder / run) for run in RUNS}


def test_two_ranks_do_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, rows = start(tmp_path / "one", None)
    two, rows_of_two = start(tmp_path / "two", 2)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one == two
    assert rows == rows_of_two
    assert one["resumed"] == one["protected"]
    assert rows["resumed"] == rows["protected"]
    assert one["protected"]["checkpoints"] == [4, 8]
    assert one["chosen"]["checkpoints"] == [4]
