"""CoverageCallback in a job of two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.jobs
def test_two_ranks(tmp_path):
    script = Path(__file__).with_name("callback_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    # A process that waits for the other one for ever is what this test is about, hence the time limit.
    job = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert job.returncode == 0, job.stderr[-6000:]
    assert (tmp_path / "done").is_file()
