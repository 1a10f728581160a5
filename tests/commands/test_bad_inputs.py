"""Whatever a user gives: one sentence and exit code 1 or 2, or the same numbers as ever; never a traceback."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_coverage.cli import app
from tests.commands.shell import error_line, invoke


def outcome(command, monkeypatch):
    """Exit code, output and the last line of a command, after checking that nothing escaped."""
    monkeypatch.setattr(sys, "argv", ["/bin/hf-coverage", *command])
    result = CliRunner().invoke(app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2), result.output
    assert "Traceback" not in result.output
    return result.exit_code, result.output


NAMES = [
    "",
    "missing",
    "./missing",
    "/missing/folder",
    "empty",
    "empty.jsonl",
    "broken.jsonl",
    "README",
    "..",
    "a" * 300,
]
SOURCES = {
    "profile": ["profile", "{}"],
    "compare": ["compare", "{}", "{}"],
    "report": ["report", "{}"],
    "tournament": ["tournament", "{}", "{}"],
    "score": ["score", "student", "{}", "-o", "new"],
    "model": ["score", "{}", "corpus", "-o", "new"],
    "sample": ["sample", "{}", "--teacher", "teacher", "-o", "new"],
    "teacher": ["sample", "prompts.jsonl", "--teacher", "{}", "-o", "new"],
    "best-of-n": ["best-of-n", "student", "{}", "-o", "new"],
    "suggest": ["suggest", "student", "--data", "{}", "--n", "4", "--steps", "10", "-o", "new"],
    "tune-ttt": ["tune-ttt", "student", "--data", "{}", "--n", "4", "-o", "new"],
}


@pytest.fixture
def odd(work):
    """Folders and files that are not what they should be."""
    (work / "empty").mkdir()
    (work / "empty.jsonl").touch()
    (work / "broken.jsonl").write_text('{"prompt": "the"\n[')
    (work / "README").write_text("no data")
    return work


@pytest.mark.parametrize("name", SOURCES)
def test_sources_of_any_name(odd, monkeypatch, name):
    for value in NAMES:
        code, output = outcome([part.format(value) for part in SOURCES[name]], monkeypatch)
        assert code in (1, 2), (value, output)
        assert not (odd / "new").exists(), value


def damages(folder):
    """Each file of a folder in turn cut, emptied, edited in its middle, made other JSON, gone, or another one's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        whole = path.read_bytes()
        contents = {"cut": whole[: len(whole) // 2], "emptied": b"", "list": b"[]", "object": b"{}", "null": b"null"}
        contents["bytes"] = whole[: len(whole) // 2] + b"\xff\x00" + whole[len(whole) // 2 + 2 :]
        contents["swapped"] = files[number - 1].read_bytes()
        if path.suffix == ".json":
            for key in json.loads(whole):
                contents[f"{key} as null"] = json.dumps(json.loads(whole) | {key: None}).encode()
        for what, content in contents.items():
            path.write_bytes(content)
            yield f"{path.relative_to(folder)} {what}"
        path.unlink()
        yield f"{path.relative_to(folder)} gone"
        path.write_bytes(whole)


def table(output):
    """The lines of a command's output that are part of a table."""
    return [line for line in output.splitlines() if any(mark in line for mark in "│┃")]


def survive(folder, command, monkeypatch):
    """Whatever becomes of one file, a command says so in a line or gives the same numbers."""
    _, expected = outcome(command, monkeypatch)
    for what in damages(folder):
        code, output = outcome(command, monkeypatch)
        if code == 0:
            assert table(output) == table(expected), what
        else:
            last = output.strip().splitlines()[-1]
            assert code == 1, (what, output)
            assert last.startswith("Error: "), what
            assert str(folder) in last or "student and other" in last, (what, last)
            assert "fault of hf-coverage" not in last, (what, last)


@pytest.mark.usefixtures("undrawn")
def test_score_folders_with_one_damaged_file(work, monkeypatch):
    shutil.copytree(work / "scores" / "student", work / "copy")
    survive(Path("copy"), ["profile", "copy", "-o", "new"], monkeypatch)


@pytest.mark.usefixtures("undrawn")
def test_tournament_folders_with_one_damaged_file(work, monkeypatch):
    shutil.copytree(work / "scores", work / "copies")
    survive(Path("copies"), ["tournament", "copies/student", "copies/other", "-o", "new"], monkeypatch)


@pytest.mark.usefixtures("undrawn")
def test_best_of_n_folders_with_one_damaged_file(work, monkeypatch):
    (work / "right.jsonl").write_text('{"prompt": "the cat", "answer": "sat"}\n{"prompt": "a dog", "answer": "ran"}\n')
    made = "best-of-n student right.jsonl --k 4 --max-new-tokens 2 --shard-rows 4 --batch-size 2 --output-dir made"
    invoke(made)
    for path in (work / "made").glob("*_*"):
        if path.is_file():
            path.unlink()  # results, which nothing reads
    survive(Path("made"), ["best-of-n", "made", "right.jsonl", "-o", "new"], monkeypatch)


@pytest.mark.usefixtures("undrawn")
def test_corpus_folders_with_one_damaged_file(work, monkeypatch):
    shutil.copytree(work / "corpus", work / "copy")
    for what in damages(Path("copy")):
        code, output = outcome(["profile", "copy", "-o", "new"], monkeypatch)
        assert code == 1, what  # it has no scores, which is said of a whole one
        assert "copy" in output.strip().splitlines()[-1], (what, output)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score student corpus -o new --name ..", "a model's name must be printable"),
        (f"score student corpus -o new --name {'a' * 300}", "(300 bytes): give another `--name`"),
        ("score student corpus -o new --device cuda:99", "`device` 'cuda:99' cannot be used"),
        ("score student corpus -o new --device meta", "`device` must hold numbers"),
        ("score ./missing corpus -o new", "there is no file or folder ./missing"),
        (
            "best-of-n student prompts.jsonl -o new --answer-column prompt --k 1000000000",
            "are up to 1,280,000,000,000 tokens",
        ),
        ("sample prompts.jsonl --teacher teacher -o new --k 1000000000", "are up to 320,000,000,000 tokens"),
    ],
)
def test_what_cannot_be_is_refused_at_once(work, command, message):
    assert message in error_line(command)
    assert not (work / "new").exists()


def test_numbers_beyond_all_bounds_are_a_usage_error(work):
    assert "1000000" in invoke("tournament scores/student scores/other -o new --bootstrap 1000000000", code=2)
    assert "10000" in invoke("suggest student --data corpus --n 4 --steps 9 --gradient-norms 100000 -o new", code=2)


def test_a_model_with_a_file_metadata_json_is_no_score_folder(work):
    shutil.copytree(work / "student", work / "model")
    (work / "model" / "metadata.json").write_text("{}")
    assert "cross-entropy" in invoke("profile model --corpus corpus -o new")


def test_ctrl_c_says_how_to_go_on(work, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_coverage.commands.score.load_model", interrupt)
    assert "Run the same command again to go on" in invoke("score student corpus -o new", code=130)
