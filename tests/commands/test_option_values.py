"""Whatever stands behind an option: what cannot be meant is refused in a sentence, before a model is loaded."""

import shlex
from enum import Enum
from typing import Literal, get_origin

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hf_coverage.cli import app
from tests.commands.shell import invoke

COMMANDS = get_command(app).commands

# Of every command, words that bring it to the loading of its first model.
TO_A_MODEL = {
    "sample": "sample prompts.jsonl --teacher teacher",
    "score": "score student corpus",
    "profile": "profile student --corpus corpus",
    "compare": "compare student other --corpus corpus",
    "report": "report student --corpus corpus",
    "choose": "choose student other --data corpus",
    "tournament": "tournament student other --data corpus",
    "best-of-n": "best-of-n student prompts.jsonl --answer-column prompt",
    "suggest": "suggest student --data corpus --n 4 --steps 10",
    "tune-ttt": "tune-ttt student --data corpus --n 4",
}
ALSO = {
    "texts": "sample text.txt --from texts --teacher teacher --prompt-tokens 3 --response-tokens 2",
    "pairs": "sample pairs.jsonl --from pairs --teacher teacher",
    "on-policy": "tournament student other --data corpus --on-policy",
    "judged": "choose student other --data prompts.jsonl --verifier exact-match --answer-column prompt",
    "lora": "tune-ttt student --data corpus --n 4 --scope lora --lr 0.1",
}
NAMES = [
    "missing",
    "./missing",
    "empty",
    "empty.jsonl",
    "broken.jsonl",
    "README",
    "..",
    "a" * 300,
]
VALUES = ["nan", "inf", "-inf", "0", "-1", "1e300", "1000000000000", "1" + "0" * 400, "many", ""]

# What can be meant, of all these, and so goes on to the model.
MEANT = {
    "seed": ["0", "1000000000000", "1" + "0" * 400],
    "choose threshold": [],  # of nothing, without a verifier
    "judged threshold": ["0", "-1", "1e300", "1000000000000"],
    "judged samples": [],  # more than are judged
    "shuffle_seed": ["0", "1000000000000", "1" + "0" * 400],
    "threshold": ["0", "-1", "1e300", "1000000000000"],
    "best-of-n n": [],
    "n": ["1e300", "1000000000000"],
    "sweep": ["1e300", "1000000000000"],
    "samples": ["1000000000000"],
    "tolerance": ["0"],
    "bootstrap": ["0"],
    "gradient_norms": ["0"],
    "gamma": ["1e300", "1000000000000"],
    "radius": ["1000000000000"],
    "lr": ["1e300", "1000000000000"],  # the steps diverge, which is a result
    "tune-ttt radius": ["1e300", "1000000000000"],
    "decay": ["0"],
    "interval": ["0"],
    "stop": VALUES[:-1],  # any text
    "predict": ["1000000000000"],
    "lam": ["0", "1e300", "1000000000000"],
}
# What of this goes on to the end: numbers far from any that is used.
TO_THE_END = [
    "profile scores/student --n 1e300",
    "compare scores/student scores/other --n 1e300",
    "choose scores/student scores/other --samples 1000000000000 --seed 1" + "0" * 400,
    "tournament scores/student scores/other --n 1e300 --bootstrap 2 --sweep 1e300 --seed 1" + "0" * 400,
    "tournament student other --data corpus --on-policy --gamma 1e300",
    "suggest student --data corpus --n 1e300 --steps 1000000000 --radius 1e-30 --eps 1e-30",
    "suggest student --data corpus --n 4 --steps 10 --radius 1e30 --batch-size 1000000000",
    "tune-ttt student --data corpus --n 1e300 --lr 1e300 --lam 1e300",
]


class Loading(BaseException):
    """A command has come to load a model."""


@pytest.fixture
def here(work, monkeypatch):
    """A folder with all that the commands read, and no model that loads."""

    def load(*_, **__):
        raise Loading

    (work / "empty").mkdir()
    (work / "empty.jsonl").touch()
    (work / "broken.jsonl").write_text('{"prompt": "the"\n[')
    (work / "README").write_text("no data")
    (work / "pairs.jsonl").write_text('{"prompt": "the", "completion": "cat"}\n')
    monkeypatch.setattr("hf_coverage.inference.loading.load_whole", load)
    monkeypatch.setattr("sys.argv", ["hf-coverage"])
    return work


def outcome(words):
    """Exit code and output; no code for what comes to a model."""
    try:
        result = CliRunner().invoke(app, words)
    except Loading:
        return None, ""
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def decided(command):
    """The options of a command that hold numbers, or one of some words, and all that take several values."""
    for option in command.params:
        kind = option.type_descriptor.annotation
        choice = (isinstance(kind, type) and issubclass(kind, Enum)) or get_origin(kind) is Literal
        if option.param_type_name == "option" and (kind in (int, float) or choice or option.multiple):
            yield option


@pytest.mark.parametrize("case", [*TO_A_MODEL, *ALSO])
def test_no_option_takes_what_cannot_be_meant(here, case):
    words = [*shlex.split((TO_A_MODEL | ALSO)[case]), "-o", "new"]
    assert outcome(words) == (None, "")
    for option in decided(COMMANDS[words[0]]):
        flag = option.opts[0]
        for value in VALUES:
            code, said = outcome([*words, flag, value])
            names = (f"{case} {option.name}", f"{words[0]} {option.name}", option.name)
            if value in next((MEANT[name] for name in names if name in MEANT), []):
                assert code is None, (flag, value, said)
            else:
                assert code in (1, 2), (flag, value)
                assert "Error" in said
                assert flag in said or f"`{option.name}`" in said, (flag, value, said)
                assert "fault of hf-coverage" not in said
            assert not (here / "new").exists(), (flag, value)


@pytest.mark.parametrize("case", TO_A_MODEL)
def test_any_name_is_refused_in_a_sentence_or_goes_on(here, case):
    words = [*shlex.split(TO_A_MODEL[case]), "-o", "new"]
    options = COMMANDS[words[0]].params
    there = {path.name for path in here.iterdir()}
    asked = {option.name for option in decided(COMMANDS[words[0]])}
    for option in options:
        if option.param_type_name == "option" and option.is_flag is False and option.name not in asked:
            for name in NAMES:
                code, said = outcome([*words, option.opts[0], name])
                assert code in (None, 1, 2), (option.name, name)
                assert code is None or "Error" in said
                assert "fault of hf-coverage" not in said, (option.name, name, said)
                assert {path.name for path in here.iterdir()} - {"datasets"} == there, (option.name, name)


def test_every_command_is_asked():
    assert TO_A_MODEL.keys() == COMMANDS.keys()
    # every option that has a number in its type
    for command in COMMANDS.values():
        asked = {option.name for option in decided(command)}
        kinds = {option.name: option.type_descriptor.annotation for option in command.params}
        assert asked >= {name for name, kind in kinds.items() if kind in (int, float)}


@pytest.mark.parametrize("command", TO_A_MODEL)
def test_nothing_may_be_empty(here, command):
    words = [*shlex.split(TO_A_MODEL[command]), "-o", "new"]
    for option in COMMANDS[command].params:
        if option.param_type_name == "option" and option.is_flag is False:
            for empty in ([option.opts[0], ""], [f"{option.opts[0]}="]):
                code, said = outcome([*words, *empty])
                assert code == 2, empty
                assert f"`{option.opts[0]}` is given nothing: leave it out, or give it a value." in said
    code, said = outcome([words[0], "", *words[2:]])
    assert code == 2
    assert "an argument is empty: leave it out, or give it a value." in said


def test_a_configuration_file_has_no_more_to_say(here):
    (here / "run.yaml").write_text("temperature: .nan\n")
    assert outcome(shlex.split("sample prompts.jsonl --teacher teacher -o new --config run.yaml"))[0] == 2
    (here / "run.yaml").write_text("split: ''\n")
    code, said = outcome(shlex.split("sample prompts.jsonl --teacher teacher -o new --config run.yaml"))
    assert code == 2
    assert "run.yaml has nothing for `split`: leave the line out, or give it a value." in said


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", TO_THE_END)
def test_what_is_meant_ends_well(work, command):
    invoke(f"{command} -o new")
