"""Two processes on one folder: the second is told who holds it, touches nothing, and may go on once it is free."""

import inspect
import socket
import time
from pathlib import Path

import pytest

from hf_coverage.cli import app
from hf_coverage.inference.folder_lock import LOCK_FILES, folder_lock
from tests.commands.shell import error_line, invoke
from tests.processes import Job

SCORE = ["score", "student", "corpus", "-o", "out"]


@pytest.fixture
def holder(work):
    """A process that runs `score` into `out`, and has come to load its model."""
    job = Job(Path(__file__).with_name("holder.py"), *SCORE)
    while not Path("here").exists():
        assert job.poll() is None, job.wait().stderr
        time.sleep(0.01)
    yield job
    job.kill()


COMMANDS = {
    "sample": "sample prompts.jsonl --teacher teacher",
    "score": "score other corpus",
    "profile": "profile scores/student",
    "compare": "compare scores/student scores/other",
    "report": "report scores/student",
    "tournament": "tournament scores/student scores/other",
    "best-of-n": "best-of-n student prompts.jsonl",
    "choose": "choose student other --data corpus",
    "suggest": "suggest student --data corpus --n 4 --steps 10",
    "tune-ttt": "tune-ttt student --data corpus --n 4",
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_is_told_who_holds_its_folder_until_that_is_killed(holder, work):
    assert COMMANDS.keys() == {command.name or command.callback.__name__.replace("_", "-") for command in commands()}
    before = contents(work / "out")
    for command in COMMANDS.values():
        line = error_line(f"{command} -o ./out")
        holding = f"process {holder.processes[0].pid} on {socket.gethostname()}, since 2"
        assert f"{work / 'out'} is being written to by {holding}" in line
        assert "score student corpus -o out`: wait until that is done, or choose another folder." in line
    assert contents(work / "out") == before
    # the lock of a killed process is none, though its files are there
    holder.kill()
    assert {path.name for path in (work / "out").iterdir()} == {*LOCK_FILES}
    for command in (f"{COMMANDS['sample']} --k 1 --max-new-tokens 4", COMMANDS["profile"]):
        invoke(f"{command} -o out")
        assert not {path.name for path in (work / "out").iterdir()} & {*LOCK_FILES}


def commands():
    return app.registered_commands


def test_every_command_has_a_folder_to_hold():
    for command in commands():
        assert "output_dir" in inspect.signature(command.callback).parameters


def test_the_folder_of_judged_samples_is_held_beside_that_of_the_results(work):
    (work / "right.jsonl").write_text('{"prompt": "the cat", "answer": "sat"}\n')
    invoke("best-of-n student right.jsonl --k 2 --max-new-tokens 2 -o samples")
    with folder_lock("samples", "something else"):
        assert "for `something else`" in error_line("best-of-n samples right.jsonl -o results")
        assert "for `something else`" in error_line("best-of-n samples right.jsonl")
        assert not Path("results").exists()
    invoke("best-of-n samples right.jsonl -o results")


def test_a_folder_is_made_for_the_block_and_goes_if_nothing_is_left_in_it(tmp_path):
    with folder_lock(tmp_path / "a" / "b", "a test"):
        assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {*LOCK_FILES}
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path / "a" / "b", "a test"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_file_is_no_folder(work):
    Path("file").touch()
    assert "file must be a folder to write to, but is a file" in error_line("profile scores/student -o file")


def test_what_may_not_be_written_to_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with folder_lock(tmp_path, "a test"):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with folder_lock(tmp_path / "new", "a test"):
        assert "has no locks" in caplog.text
    assert not (tmp_path / "new").exists()
