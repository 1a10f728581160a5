"""What commands print fits a terminal of 80 columns, breaks no word, and says what to do next."""

import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from hf_coverage.cli import app
from tests.commands.shell import invoke

COMMANDS = {
    "sample": "sample prompts.jsonl --teacher teacher --k 2 --max-new-tokens 4 -o out",
    "score": "score other corpus -o out",
    "profile": "profile scores/student scores/other -o out",
    "compare": "compare scores/student scores/other --n 2,4 -o out",
    "report": "report scores/student -o out",
    "tournament": "tournament scores/student scores/other --sweep 2,4 -o out",
    "best-of-n": "best-of-n student problems.jsonl --verifier exact-match --k 4 --max-new-tokens 4 -o out",
    "choose": "choose scores/student scores/other --samples 2,16 -o out",
    "suggest": "suggest student --data corpus --n 4 --steps 10 -o out",
    "tune-ttt": "tune-ttt student --data corpus --n 4 --lr 0.01 -o out",
}


@pytest.fixture
def problems(work):
    rows = [{"prompt": "the cat", "answer": "sat"}, {"prompt": "a dog", "answer": "ran"}]
    Path("problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_every_command_is_looked_at():
    assert set(COMMANDS) == {command.callback.__name__.replace("_", "-") for command in app.registered_commands}


def words_in(value):
    """All words that a table's JSON or its titles and numbers may show."""
    return set(re.split(r"[\s\[\],]+", str(value)))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_tables_fit_and_no_word_is_broken(problems, undrawn, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", "1000")
    wide = invoke(COMMANDS[command])
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke(COMMANDS[command].replace("-o out", "-o narrow"))
    rows = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    assert max([cell_len(row) for row in rows], default=0) <= width
    whole = words_in(wide.replace("│", " ").replace("┃", " "))
    for row in rows:
        for word in words_in(row.replace("│", " ").replace("┃", " ")):
            assert word in whole or "…" in word, f"{word!r} of {row}"
    assert text.rstrip().splitlines()[-1].startswith(("Next: ", "Decode ", "Leave it out", "All numbers"))


@pytest.mark.parametrize("command", ["score", "profile", "choose"])
def test_quiet_prints_nothing_and_json_one_object(problems, undrawn, command):
    quiet = invoke(f"{COMMANDS[command]} --quiet")
    assert "Next: " not in quiet
    assert "│" not in quiet.replace("█", "")
    output = invoke(f"{COMMANDS[command].replace('-o out', '-o other_out')} --json")
    found = json.loads(output[output.index("{\n") :])
    assert found.keys() == {"text", "tables"}
    assert found["text"][-1].startswith("Next: hf-coverage ")
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
