"""Two processes on one folder: the second is told who holds it, touches nothing, and may go on once it is free."""

import inspect
import json
import multiprocessing
import os
import signal
import socket
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from datasets import Dataset
from filelock import FileLock, Timeout

import hf_coverage
from hf_coverage.cli import app
from hf_coverage.decode.best_of_n import evaluate_best_of_n
from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.inference.folder_lock import LOCK_FILES, folder_lock
from hf_coverage.measure.builders import sample_corpus, teacher_scored_corpus
from hf_coverage.measure.inherent_variance import measure_inherent_variance
from hf_coverage.measure.scoring import score_responses, score_rules
from tests.commands.shell import error_line, invoke, load
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


WORDS = {"prompt": ["the cat", "a dog", "red mat", "blue cat"], "completion": [" sat on", " ran", " sat", " on"]}
FUNCTIONS = {
    "score_responses": lambda *model: score_responses(*model, Dataset.from_dict(WORDS), output_dir="out"),
    "score_rules": lambda *model: score_rules(
        *model, Dataset.from_dict(WORDS), {"out": StepRule(0.1)}, output_dir="."
    ),
    "sample_corpus": lambda *model: sample_corpus(*model, ["the"], k=1, max_new_tokens=2, output_dir="out"),
    "teacher_scored_corpus": lambda *model: teacher_scored_corpus(Dataset.from_dict(WORDS), *model, output_dir="out"),
    "measure_inherent_variance": lambda *model: measure_inherent_variance(
        *model, Dataset.from_dict(WORDS), output_dir="out"
    ),
    "evaluate_best_of_n": lambda *model: evaluate_best_of_n(
        *model, Dataset.from_dict(WORDS), k=1, max_new_tokens=2, output_dir="out"
    ),
}


@contextmanager
def held_by_another(folder):
    """A folder as it is while another process holds it: by another file handle, which is as good."""
    Path(folder).mkdir(exist_ok=True)
    owner = {"pid": 1, "host": "elsewhere", "since": "then", "command": "something else"}
    with FileLock(Path(folder, LOCK_FILES[0])):
        Path(folder, LOCK_FILES[1]).write_text(json.dumps(owner))
        yield
    for name in LOCK_FILES:
        Path(folder, name).unlink(missing_ok=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_told_who_holds_its_folder(work, name):
    function, model = FUNCTIONS[name], load(work, "student")
    with held_by_another("out"), pytest.raises(BlockingIOError, match="out is being written to by process 1 on else"):
        function(*model)
    assert not list(Path("out").iterdir())
    with folder_lock("out", "this very process"):
        function(*model)
        assert {path.name for path in Path("out").iterdir()} > {*LOCK_FILES}
    assert not {path.name for path in Path("out").rglob("*")} & {*LOCK_FILES}


def test_functions_with_a_folder_are_all_asked():
    named = {name: getattr(hf_coverage, name) for name in hf_coverage.__all__}
    functions = {name: one for name, one in named.items() if inspect.isfunction(one)}
    writing = {name for name, one in functions.items() if "output_dir" in inspect.signature(one).parameters}
    # the last is the command's that judges samples, which is asked below
    assert writing - {"judge_best_of_n"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_lock_of_a_process_that_was_ended_is_none(tmp_path, number):
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "out",))
    process.start()
    while not (tmp_path / "here").exists():
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match=f"process {process.pid} "), folder_lock(tmp_path / "out"):
        pass
    os.kill(process.pid, number)
    process.join()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*LOCK_FILES}
    with folder_lock(tmp_path / "out"):
        owner = json.loads((tmp_path / "out" / LOCK_FILES[1]).read_text())
        assert owner["pid"] == os.getpid()
    assert not list((tmp_path / "out").iterdir())


def _hold(folder):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with folder_lock(folder, "a test"):
        (folder.parent / "here").touch()
        time.sleep(60)


def test_a_process_may_hold_a_folder_several_times_over(tmp_path):
    first, second = ExitStack(), ExitStack()
    first.enter_context(folder_lock(tmp_path / "out"))
    second.enter_context(folder_lock(tmp_path / "out"))
    first.close()  # whichever ends first
    with pytest.raises(Timeout):
        FileLock(tmp_path / "out" / LOCK_FILES[0]).acquire(timeout=0)
    second.close()
    assert not (tmp_path / "out").exists()


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
    with held_by_another("samples"):
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
