"""Jobs of several processes never run at once, however many workers share the tests, and take a port that is free."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TRIES = """\
import time
import pytest

@pytest.mark.jobs
@pytest.mark.parametrize("name", ["one", "another"])
def test_a_job(name):
    with open("log", "a") as log:
        print("begins", file=log, flush=True)
        time.sleep(1)
        print("ends", file=log, flush=True)
"""


def test_a_file_that_starts_jobs_marks_them_and_names_no_port():
    texts = {file.name: file.read_text() for file in HERE.rglob("test_*.py")}
    jobs = {name: text for name, text in texts.items() if "torch.distributed.run" in text}
    assert len(jobs) > 10
    for name, text in jobs.items():
        assert "pytest.mark.jobs" in text, name
        assert "--standalone" in text, name
        assert "master_port" not in text or name == Path(__file__).name


def test_workers_wait_for_each_other_s_jobs(tmp_path):
    (tmp_path / "test_tries.py").write_text(TRIES)
    (tmp_path / "jobs_in_turn.py").write_text((HERE / "jobs_in_turn.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = jobs\n")
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "jobs_in_turn", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "log").read_text().split() == ["begins", "ends"] * 2
