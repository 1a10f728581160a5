"""A command that fails late: one sentence, what was finished is kept, and a retry gives what it should."""

import functools
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.commands.shell import error_line, invoke
from tests.commands.test_full_disk import COMMANDS, kept

ON_POLICY = "tournament student other --data corpus --on-policy --bootstrap 0 --batch-size 2"
INTERRUPTED = "Interrupted. Run the same command again to go on: what was finished is kept."

# What is raised, and what is said then.
OF_A_PASS = {
    RuntimeError("the model's own words"): "the model's own words",
    torch.OutOfMemoryError("CUDA out of memory."): "CUDA out of memory. Lower `--batch-tokens` or",
    MemoryError(): "out of memory (MemoryError). Lower `--batch-tokens` or `--batch-size`",
    KeyboardInterrupt(): INTERRUPTED,
}
OF_A_WRITE = {
    PermissionError(13, "Permission denied", "out/file"): "'out/file'. Change the permissions, or choose",
    OSError(30, "Read-only file system"): "file system. Choose another place, and run the same command again",
    MemoryError(): "out of memory",
    KeyboardInterrupt(): INTERRUPTED,
}


@contextmanager
def failing(kind, number, error):
    """Let passes of the model, or waits for the disk, raise from one on; yields those that there were."""
    done = []
    place, name = {"pass": (GPT2LMHeadModel, "forward"), "write": (os, "fsync")}[kind]
    plain = getattr(place, name)

    @functools.wraps(plain)  # a model is asked what its `forward` takes
    def counted(*arguments, **options):
        done.append(kind)
        if len(done) > number:
            raise error
        return plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, counted)
        yield done


def said(command, error):
    """What a command says that fails of an error."""
    if not isinstance(error, KeyboardInterrupt):
        return error_line(command)
    return re.split(r"[\r\n]+", invoke(command, code=130).strip())[-1]


def shards(folder):
    """The content of what a command keeps so as not to do it again."""
    paths = [path for pattern in ("*-0*.safetensors", "*-0*.jsonl") for path in Path(folder).rglob(pattern)]
    # of generations that are finished, the shards are gone
    return {path: path.read_bytes() for path in paths if "on_policy" not in path.parts}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", [*COMMANDS, pytest.param("on-policy", marks=pytest.mark.slow)])
def test_a_command_that_fails_again_and_again_keeps_what_it_has_and_ends_well(work, name):
    (work / "right.jsonl").write_text('{"prompt": "the cat", "answer": "sat"}\n{"prompt": "a dog", "answer": "ran"}\n')
    command = (COMMANDS | {"on-policy": ON_POLICY})[name]
    with failing("pass", 10**6, None) as passes, failing("write", 10**6, None) as writes:
        invoke(f"{command} -o whole")
    shift = list(COMMANDS).index(name) if name in COMMANDS else 0
    for kind, steps, errors in (("pass", passes, OF_A_PASS), ("write", writes, OF_A_WRITE)):
        folder, before = f"out-{kind}", {}
        # At the first one, so that nothing is begun; late; and twice at the first one of what was left to do.
        for index, number in enumerate((0, 2 * len(steps) // 3, 0, 0) if steps else ()):
            error = list(errors)[(index + shift) % len(errors)]
            with failing(kind, number, error):
                assert errors[error] in said(f"{command} -o {folder}", error)
            there = list(Path(folder).rglob("*"))
            assert not [path for path in there if path.suffix == ".part" or "lock" in path.name]
            assert not [path for path in there if path.is_dir() and not any(path.iterdir())]
            assert there or not Path(folder).exists()
            assert index or not there
            now = shards(folder)
            assert before.items() <= now.items()
            before = now
        if steps:
            invoke(f"{command} -o {folder}")
            assert kept(folder) == kept("whole")


def test_generations_go_on_within_a_candidate(work):
    command = f"{ON_POLICY} --shard-rows 4 --max-new-tokens 2 -o out"
    with failing("write", 8, KeyboardInterrupt()):
        said(command, KeyboardInterrupt())
    (first,) = Path("out/on_policy").glob(".*.unfinished/samples-00000.jsonl")
    written = first.stat().st_ino
    with failing("write", 4, KeyboardInterrupt()):
        said(command, KeyboardInterrupt())
    assert first.stat().st_ino == written
    invoke(command)
    assert not list(Path("out/on_policy").glob(".*"))
    invoke(command.replace("-o out", "-o whole"))
    assert kept("out") == kept("whole")


def test_a_folder_that_vanishes_is_missed(work):
    command, fsync, gone = "score student corpus --shard-rows 8 -o out", os.fsync, []

    def vanish(handle):
        fsync(handle)
        if Path("out/scores-00001.safetensors").exists() and not gone:
            gone.append(shutil.rmtree("out"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", vanish)
        assert "scores-00000.safetensors was removed while the others were written" in error_line(command)
    invoke(command)
    invoke("profile out -o profile")


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(work, monkeypatch):
    Path("out").mkdir()
    access = os.access

    def refused(path, mode):
        return (mode != os.W_OK or Path(path).name != "out") and access(path, mode)

    monkeypatch.setattr(os, "access", refused)
    monkeypatch.setattr("hf_coverage.inference.loading.load_whole", None)
    assert "out may not be written to: choose another `--output-dir`" in error_line("score student corpus -o out")
    assert not list(Path("out").iterdir())
