"""Judging responses with a verifier that may raise, hang, crash or answer nonsense."""

from __future__ import annotations

import base64
import inspect
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hf_coverage.decode.verifier_calls import Verdict, judge
from hf_coverage.decode.verifiers import Verifier

__all__ = ["JudgeRows", "check_timeout", "needed_arguments", "open_judge", "runs_in_worker"]

JudgeRows = Callable[[Sequence[dict[str, Any]]], list[Verdict]]
"""Judges responses, each given as its arguments by name."""

_START_SECONDS = 600.0
_LAST_WORDS_SECONDS = 1.0
_PACKAGES = Path(__file__).parents[2]
# A verifier is no process of the job, even if it imports what looks for one.
_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def needed_arguments(verifier: Callable[..., Any], available: Sequence[str], varying: Sequence[str]) -> list[str]:
    """Which of the available arguments a verifier takes: those it names, or all where it takes `**kwargs`.

    Args:
        verifier: The verifier.
        available: `prompts`, `completions`, `completion_ids` and columns of the corpus.
        varying: Columns that differ between rows of one prompt, and so belong to no response to it.

    Raises:
        TypeError: If it cannot be called.
        ValueError: If it needs something that is not there.
    """
    if isinstance(verifier, Verifier):
        required, taken = {"completions", *verifier.columns}, set(available)
    elif callable(verifier):
        parameters = _parameters(verifier)
        required = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = set(available) if everything else {p.name for p in parameters}
    else:
        raise TypeError(
            "`verifier` must be callable as TRL's reward functions are, `verifier(prompts, completions, **columns) -> "
            f"list[float]`, but is {verifier!r}."
        )
    missing = sorted(required - set(available))
    if missing:
        why = "differs between rows of one prompt" if missing[0] in varying else "is no column of the corpus"
        raise ValueError(
            f"`verifier` needs `{missing[0]}`, which {why}; there are {', '.join(available)}. A corpus for Best-of-N "
            "has one row a prompt."
        )
    return [name for name in available if name in taken]


def _parameters(verifier: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(verifier).parameters.values())
    except ValueError as error:  # some functions that are written in C
        raise TypeError(
            f"`verifier` {verifier!r} does not say which arguments it takes; wrap it in a function."
        ) from error
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise TypeError(f"`verifier` {verifier!r} takes `{unnamed[0]}` by position, and is called by names only.")
    return parameters


def runs_in_worker(verifier: Callable[..., Any], timeout: float | None) -> bool:
    """Whether a verifier runs in a process of its own.

    Raises:
        ValueError: If the time limit is not positive.
    """
    check_timeout(timeout)
    return timeout is not None and not (isinstance(verifier, Verifier) and verifier.runs_here)


def check_timeout(timeout: float | None) -> None:
    """Raise ValueError unless `timeout` is seconds that a process can wait, or None."""
    if timeout is not None and not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"`timeout` must be positive seconds, at most {threading.TIMEOUT_MAX:.3g}, or None for no limit, got "
            f"{timeout}."
        )


@contextmanager
def open_judge(verifier: Callable[..., Any], *, timeout: float | None, batch_size: int) -> Iterator[JudgeRows]:
    """A function that judges responses; what it needs is let go of at the end.

    Args:
        verifier: A `Verifier`, or a callable like TRL's reward functions.
        timeout: Seconds that one response may take, after which the worker process is killed; None runs the verifier
            in this process, in batches. Verifiers that say that they run in this process always do.
        batch_size: Responses of one call in this process; in a worker every call is about one response, so that
            none can cost another its reward.

    Raises:
        TypeError: If the verifier cannot be sent to a process.
        RuntimeError: If it cannot be loaded there.
    """
    if not runs_in_worker(verifier, timeout):
        yield lambda rows: _judge_here(verifier, rows, batch_size)
        return
    worker = _Worker(_pickled(verifier), timeout or 0.0)
    try:
        worker.start()  # now, on every process of a job alike, and not when the first response is judged
        yield lambda rows: [worker.judge(row) for row in rows]
    finally:
        worker.stop()


def _judge_here(verifier: Callable[..., Any], rows: Sequence[dict[str, Any]], batch_size: int) -> list[Verdict]:
    verdicts = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        verdicts += judge(verifier, {name: [row[name] for row in batch] for name in batch[0]}, len(batch))
    return verdicts


def _pickled(verifier: Callable[..., Any]) -> str:
    import dill

    try:
        # By value where it is of `__main__`, such as a notebook or a script, which the worker does not run.
        return base64.b64encode(dill.dumps(verifier, recurse=True)).decode()
    except Exception as error:  # pickling raises whatever the object's own methods raise
        raise TypeError(
            f"`verifier` cannot be sent to a worker process ({type(error).__name__}: {error}). Define it at the top "
            "of a module and load what it holds where it is used, or give `timeout=None` to run it in this process, "
            "where nothing stops it if it hangs."
        ) from error


class _Worker:
    """A verifier in a process of its own, which is killed and started again where it hangs.

    Nothing here waits for longer than it says, whatever the verifier leaves behind: two threads write to the process
    and read from it, and a third sees it end.
    """

    def __init__(self, verifier: str, timeout: float) -> None:
        self._verifier = verifier
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def judge(self, row: dict[str, Any]) -> Verdict:
        """Judge one response."""
        request = pickle.dumps({name: [value] for name, value in row.items()})
        if self._process is None:
            self.start()
        try:
            reply = self._ask(request, self._timeout)
        except queue.Empty:
            self.stop()
            return Verdict(None, "timed out", f"no reward within {self._timeout:g} seconds")
        if reply is None:
            code = self.stop()
            return Verdict(None, "ended its process", f"exit code {code}")
        return Verdict(**json.loads(reply))

    def start(self) -> None:
        """Start the process and load the verifier in it."""
        environment = {name: value for name, value in os.environ.items() if name not in _JOB}
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_coverage.decode.verifier_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=_PACKAGES,  # where the package is found, and nothing of the user's hides a standard module
            start_new_session=True,  # so that what it starts is killed with it
        )
        self._process, self._requests, self._replies = process, queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=_send, args=(process, self._requests), daemon=True).start()
        reader = threading.Thread(target=_receive, args=(process, self._replies), daemon=True)
        reader.start()
        threading.Thread(target=_see_it_end, args=(process, reader, self._replies), daemon=True).start()
        place = {"folder": os.getcwd(), "path": [path or os.getcwd() for path in sys.path]}
        try:
            reply = self._ask(json.dumps(place | {"verifier": self._verifier}).encode(), _START_SECONDS)
            problem = "its process ended" if reply is None else json.loads(reply).get("failed")
        except queue.Empty:
            problem = f"it took more than {_START_SECONDS:g} seconds"
        if problem is not None:
            self.stop()
            raise RuntimeError(
                f"`verifier` cannot be loaded in a worker process: {problem}. Define it in a module that can be "
                "imported, or give `timeout=None` to run it in this process."
            )

    def _ask(self, request: bytes, seconds: float) -> bytes | None:
        """The worker's reply; None where its process has ended."""
        self._requests.put(base64.b64encode(request) + b"\n")
        return self._replies.get(timeout=seconds)

    def stop(self) -> int | None:
        """Kill the process with all that it started; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._requests.put(None)
        if process.poll() is None:
            _end_group(process)
        return process.wait()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and what it started that did not leave its group."""
    if os.name == "posix":
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _see_it_end(
    process: subprocess.Popen[bytes], reader: threading.Thread, replies: queue.SimpleQueue[bytes | None]
) -> None:
    """Say when a process has ended, after its last reply, and end what it started."""
    process.wait()
    _end_group(process)
    reader.join(_LAST_WORDS_SECONDS)  # what left the group may hold the pipe open for as long as it lives
    replies.put(None)


def _send(process: subprocess.Popen[bytes], requests: queue.SimpleQueue[bytes | None]) -> None:
    with suppress(BrokenPipeError), process.stdin or nullcontext() as stream:  # it has ended, and is seen to have
        while stream is not None and (request := requests.get()) is not None:
            stream.write(request)
            stream.flush()


def _receive(process: subprocess.Popen[bytes], replies: queue.SimpleQueue[bytes | None]) -> None:
    with process.stdout or nullcontext() as stream:
        for line in stream or ():
            replies.put(line)
