"""A disk that is full at any write: one sentence, nothing that looks begun, and a retry that gives what it should."""

import os
from pathlib import Path

import pytest

from tests.commands.shell import error_line, invoke

COMMANDS = {
    "sample": "sample prompts.jsonl --teacher teacher --k 2 --max-new-tokens 2 --batch-size 4 --shard-rows 8",
    "texts": "sample text.txt --from texts --tokenizer teacher --prompt-tokens 3 --response-tokens 2",
    "score": "score student corpus --shard-rows 16",
    "profile": "profile student --corpus corpus",
    "compare": "compare scores/student scores/other",
    "report": "report scores/student --card",
    "choose": "choose scores/student scores/other",
    "choose-judged": "choose student other --data right.jsonl --verifier exact-match --k 4 --samples 2 "
    "--max-new-tokens 2 --shard-rows 4 --batch-size 2",
    "tournament": "tournament scores/student scores/other --bootstrap 0",
    "best-of-n": "best-of-n student right.jsonl --k 4 --max-new-tokens 2 --shard-rows 4 --batch-size 2",
    "suggest": "suggest student --data corpus --n 4 --steps 10",
    "tune-ttt": "tune-ttt student --data corpus --n 4 --lr 0.1",
}


def kept(folder):
    """What a command leaves, but for what names a time or itself."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)).split("_2")[0]: path.read_bytes()
        for path in files
        if path.suffix in (".safetensors", ".arrow", ".jsonl") or path.name == "metadata.json"
    } | {str(path.relative_to(folder)).split("_2")[0]: b"" for path in files if path.suffix in (".json", ".html")}


def fill_disk(patch, number):
    """Let the disk be full from a write on: whichever is the first to wait until the disk has what was written."""
    written = []

    def fsync(handle):
        written.append(handle)
        if len(written) > number:
            raise OSError(28, "No space left on device")

    patch.setattr(os, "fsync", fsync)
    return written


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_retry_after_any_write_that_failed(work, monkeypatch, name):
    (work / "right.jsonl").write_text('{"prompt": "the cat", "answer": "sat"}\n{"prompt": "a dog", "answer": "ran"}\n')
    with monkeypatch.context() as patch:
        written = fill_disk(patch, 10**6)
        invoke(f"{COMMANDS[name]} -o whole")
    assert written
    # the first and the last writes, and some between
    for number in sorted({0, 1, 2, len(written) // 2, len(written) - 1} & set(range(len(written)))):
        folder = f"out-{number}"
        with monkeypatch.context() as patch:
            fill_disk(patch, number)
            assert "No space left on device" in error_line(f"{COMMANDS[name]} -o {folder}")
        left = [path for path in Path(folder).rglob("*") if path.is_file()] if Path(folder).exists() else []
        assert not [path for path in left if path.name.endswith(".part") or "lock" in path.name]
        assert number or not Path(folder).exists()
        invoke(f"{COMMANDS[name]} -o {folder}")
        assert kept(folder) == kept("whole")
