"""TournamentCallback in a job of two gloo processes: as in one, to the byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.select.callback_runs import rows_in

SCRIPT = Path(__file__).with_name("callback_two_ranks.py")
RUNS = ("protected", "chosen", "resumed")


def start(folder, *launcher):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    # A process that waits for the other one for ever is what this test is about, hence the time limit.
    job = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert job.returncode == 0, job.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text()), {run: rows_in(folder / run) for run in RUNS}


@pytest.mark.jobs
def test_two_ranks_do_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, rows = start(tmp_path / "one")
    two, rows_of_two = start(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one == two
    assert rows == rows_of_two
    assert one["resumed"] == one["protected"]
    assert rows["resumed"] == rows["protected"]
    assert one["protected"]["checkpoints"] == [4, 8]
    assert one["chosen"]["checkpoints"] == [4]
