"""Python commands in processes of their own, forked from one that has imported already what they need."""

import functools
import multiprocessing
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
# To import these takes seconds, and to fork a process that has them hundredths of one.
HEAVY = ["hf_coverage.cli", "hf_coverage.decode.best_of_n", "hf_coverage.select.callback", "matplotlib.pyplot"]
HEAVY += ["hf_coverage.report.html", "hf_coverage.optim.trainer", "recipes.pretrain", "scipy.stats"]
HEAVY += ["torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.gpt2.modeling_gpt2"]


class Job:
    """`python WORDS` in one process or, as torchrun starts them, in several that are the ranks of a job."""

    def __init__(self, *words: object, ranks: int | None = None, **environment: str) -> None:
        self.words = [str(word) for word in words]
        variables, places = os.environ | environment, [{}]
        if ranks is not None:
            # The store is here, as it is in torchrun's own process: no rank has to find a port.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            places = [_place(rank, ranks, self._store.port) for rank in range(ranks)]
        self._printed = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._printed)
        context = server()
        self.processes = [
            context.Process(target=_python, args=(self.words, variables | place, Path.cwd(), self._printed))
            for place in places
        ]
        for process in self.processes:
            process.start()

    def poll(self) -> int | None:
        """The exit code: minus the signal of a process that was killed, 0 where all have ended well, None before.

        When one has failed the others are ended, which might wait for it for ever.
        """
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
            return failed[0]
        return None if None in codes else 0

    def kill(self) -> None:
        """End all processes by SIGKILL."""
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """How it ended and what it printed; a job that takes longer is killed.

        Raises:
            subprocess.TimeoutExpired: If it was.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.words, timeout, *self._texts())
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.exitcode is None], timeout=1)
        return subprocess.CompletedProcess(self.words, code, *self._texts())

    def _texts(self) -> list[str]:
        return [(self._printed / name).read_text() for name in ("stdout", "stderr")]


def run(*words: object, ranks: int | None = None, timeout: float = 240, **environment: str) -> str:
    """What `python WORDS` prints to its standard output, after checking that it ends well."""
    done = Job(*words, ranks=ranks, **environment).wait(timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def run_by_torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """Two ranks that end well, as users start them: torchrun, and interpreters that have imported nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """What makes processes, with all that is heavy imported; it lives as long as this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *HEAVY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # Python 3.11 gives it none of this process's path
        forkserver.ensure_running()
    return context


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    words = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
    return words | {name: str(number) for name, number in numbers.items()}


def _python(words: list[str], variables: dict[str, str], folder: Path, printed: Path) -> None:
    """What the interpreter does with its command line, in a process that has run nothing yet."""
    for handle, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), handle)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    # No process is another's twin: their generators begin anywhere, as they do in a new interpreter.
    random.seed()
    np.random.seed()  # noqa: NPY002 (it is the global one that they would share)
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [str(folder)]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")
