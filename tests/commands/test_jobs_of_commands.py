"""A command on two processes: it leaves the job in success and in failure, and holds its folder once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_coverage
from hf_coverage.inference.folder_lock import folder_lock

ROOT = Path(hf_coverage.__file__).parents[1]
LAUNCHER = f"-m torch.distributed.run --standalone --nproc_per_node 2 {ROOT / 'tests' / 'commands' / 'left_job.py'}"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("score student corpus --device cpu -o out", 0, "Scores in out"),
        ("score student corpus --device cpu -o held", 1, "for `another purpose`: wait until that is done"),
    ],
)
def test_every_process_leaves_the_job(work, command, code, message):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with folder_lock("held", "another purpose"):
        done = subprocess.run(
            [sys.executable, *LAUNCHER.split(), *command.split()], capture_output=True, text=True, env=environment
        )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert message in output
    # one that failed first may end the other
    assert output.count("LEFT") == 2 or (code == 1 and "LEFT" in output)
    assert "STAYED" not in output
    for trace in ("terminate called", "destroy_process_group", "SIGABRT", "Signal 6"):
        assert trace not in output
    assert not Path("held").exists()
