"""Configuration files, exit codes and error lines."""

import shlex

import pytest
from typer.testing import CliRunner

from hf_coverage.cli import app
from tests.commands.shell import error_line, invoke, results_in


def test_the_configuration_file_gives_defaults_and_the_command_line_wins(work):
    (work / "run.yaml").write_text("sources: [scores/student, scores/other]\nn: [3, 5.7]\noutput-dir: from_file\n")
    invoke("profile --config run.yaml")
    assert list(results_in("from_file")["intervals"]["other"]) == [
        f"{kind}_{n},none" for kind in ("cov", "miss") for n in ("3", "5.7")
    ]
    invoke("profile scores/student --config run.yaml --n 7 --output-dir from_line")
    found = results_in("from_line")
    assert list(found["results"]) == ["student"]
    assert list(found["intervals"]["student"]) == ["cov_7,none", "miss_7,none"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("levels: 3", "unknown key `levels`"),
        ("- n", "must hold `option: value` lines"),
        ("n: [", "cannot be read"),
    ],
)
def test_a_wrong_configuration_file_is_a_usage_error(work, content, message):
    (work / "run.yaml").write_text(content)
    output = invoke("profile scores/student --config run.yaml", code=2)
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        "profile",
        "profile scores/student --n 0.5",
        "profile scores/student --n many",
        "compare scores/student",
        "sample prompts.jsonl --output-dir new",
        "sample text.txt --from texts --output-dir new",
        "score student corpus --output-dir new --dtype int8",
        "unknown",
    ],
)
def test_a_wrong_command_line_exits_with_2(work, command):
    assert "Usage" in invoke(command, code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score student missing.jsonl --output-dir new", "there is no file missing.jsonl"),
        ("sample prompts.jsonl --teacher teacher --output-dir corpus", "`output_dir` corpus is not empty"),
        ("sample prompts.jsonl --teacher teacher --column x --output-dir new", "`column` must be one of"),
        ("sample prompts.jsonl --teacher teacher --temperature 0 --output-dir new", "`temperature` must be positive"),
        ("profile prompts.jsonl", "there is no column `logprob`"),
        ("profile scores/student --regret 2", "`regret` must lie strictly between 0 and 1"),
        ("report scores/student scores/student", "two are called 'student'"),
        ("score student corpus --group-by x --output-dir new", "`group_by` must be a column of the corpus"),
        ("score student README --output-dir new", "must be .jsonl, .json, .parquet, .csv or .txt"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(work, command, message):
    (work / "README").write_text("no data")
    assert message in error_line(command)
    assert not (work / "new").exists()


def test_debug_shows_the_error_itself(work):
    result = CliRunner().invoke(app, shlex.split("--debug score student missing.jsonl --output-dir new"))
    assert isinstance(result.exception, FileNotFoundError)
