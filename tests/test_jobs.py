"""Jobs of processes that are forked, not started anew: as `python` and torchrun would run them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Job, run


def script(folder: Path, text: str) -> Path:
    file = folder / "script.py"
    file.write_text(text)
    return file


def test_a_process_is_what_an_interpreter_makes_of_its_command_line(tmp_path, monkeypatch):
    file = script(tmp_path, "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), os.environ['ONE'])")
    monkeypatch.chdir(tmp_path)
    expected = f"__main__ ['a', '1'] {tmp_path} two\n"
    assert run(file, "a", 1, ONE="two") == expected
    assert run("-m", "script", "a", 1, ONE="two") == expected
    monkeypatch.setenv("ONE", "two")
    done = subprocess.run([sys.executable, str(file), "a", "1"], capture_output=True, text=True)
    assert done.stdout == expected


def test_what_is_heavy_is_there_and_nothing_of_the_tests_that_ran():
    names = run("-m", "tests.loaded_modules").split()
    assert {"torch", "hf_coverage.cli", "hf_coverage.select.callback", "recipes.pretrain"} <= set(names)
    assert not [name for name in names if name.startswith("tests.") and name != "tests.processes"]


def test_how_it_ends_is_seen(tmp_path):
    done = Job(script(tmp_path, "import sys; print('said'); sys.exit('no more')")).wait()
    assert (done.returncode, done.stdout, done.stderr) == (1, "said\n", "no more\n")
    done = Job(script(tmp_path, "raise ValueError('why')")).wait()
    assert done.returncode == 1
    assert "script.py" in done.stderr
    assert done.stderr.endswith("ValueError: why\n")
    with pytest.raises(AssertionError, match="why"):
        run(tmp_path / "script.py")
    done = Job(script(tmp_path, "import os; os.kill(os.getpid(), 9)")).wait()
    assert done.returncode == -signal.SIGKILL


def test_ranks_are_one_gloo_group(tmp_path):
    file = script(
        tmp_path,
        "import json, os, numpy as np\n"
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather_object\n"
        "state = PartialState(cpu=True)\n"
        "facts = gather_object([[state.process_index, os.getpid(), float(np.random.random())]])\n"
        "if state.is_main_process:\n"
        "    print(json.dumps([state.backend, facts]))\n"
        "state.destroy_process_group()\n",
    )
    backend, facts = json.loads(run(file, ranks=2))
    indices, processes, numbers = zip(*facts)
    assert backend == "gloo"
    assert indices == (0, 1)
    assert len(set(processes)) == len(set(numbers)) == 2


def test_a_rank_that_fails_ends_the_one_that_waits_for_it(tmp_path):
    file = script(
        tmp_path,
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('why')\ntime.sleep(1000)\n",
    )
    job = Job(file, ranks=2)
    done = job.wait(60)
    assert done.returncode == 1
    assert "ValueError: why" in done.stderr
    assert [process.exitcode for process in job.processes] == [-signal.SIGKILL, 1]


def test_ranks_that_wait_for_ever_are_ended(tmp_path):
    job = Job(script(tmp_path, "import time; print('here', flush=True); time.sleep(1000)"), ranks=2)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(0.5)
    assert [process.exitcode for process in job.processes] == [-signal.SIGKILL] * 2
