"""Options that commands share: the same everywhere, from the command line, from a file, and in keys."""

import json
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from hf_coverage.cli import app
from hf_coverage.commands import checkpoint_scores as command
from hf_coverage.commands.options import CorpusOptions, command_line
from hf_coverage.inference.loading import ModelOptions
from hf_coverage.select.checkpoints import checkpoint_signature
from tests.commands.shell import error_line, invoke, results_in

COMMANDS = get_command(app).commands
FLAGS = {"--" + one.name.replace("_", "-"): one for one in fields(ModelOptions)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_models_with_the_same_options(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    options = {flag: option for option in COMMANDS[name].params for flag in option.opts if flag in FLAGS}
    assert list(options) == list(FLAGS)
    for flag, option in options.items():
        assert option.help == FLAGS[flag].metadata["help"]
        assert option.default == FLAGS[flag].default
        assert option.rich_help_panel == "Loading the model"
    shown = " ".join(invoke(f"{name} --help").split())
    assert all(f"{flag} " in shown and one.metadata["help"] in shown for flag, one in FLAGS.items())


def test_what_several_commands_share_has_the_same_help():
    texts = {}
    for name in COMMANDS:
        for option in COMMANDS[name].params:
            if option.name in {"split", "append_eos", "group_by", "batch_tokens", "top_k", "top_p", "config"}:
                texts.setdefault(option.name, set()).add(option.help)
    assert {name for name, found in texts.items() if len(found) > 1} == {"top_k"}  # of `tune-ttt` another idea
    for flag in ("--config", "--quiet", "--json"):
        assert all(any(flag in option.opts for option in command.params) for command in COMMANDS.values()), flag


@dataclass(frozen=True)
class Later(ModelOptions):
    """What loading will look like with one more option."""

    kernels: str | None = None


def run(function, *words):
    tool = typer.Typer()
    tool.command()(command_line(function))
    return CliRunner().invoke(tool, list(words))


def test_a_command_gets_one_object_for_many_options(tmp_path):
    got = []

    def measure(
        model: str,
        k: Annotated[int, typer.Option(help="How many.")] = 2,
        *,
        reading: CorpusOptions,
        loading: ModelOptions,
        last: bool = False,
    ) -> None:
        """Measure."""
        got.append((model, k, reading, loading, last))

    assert run(measure, "gpt2").exit_code == 0
    assert got.pop() == ("gpt2", 2, CorpusOptions(), ModelOptions(), False)
    assert run(measure, "gpt2", "--dtype", "float16", "--append-eos", "--gguf-file", "a.gguf", "--last").exit_code == 0
    assert got.pop() == (
        "gpt2", 2, CorpusOptions(append_eos=True), ModelOptions(dtype="float16", gguf_file="a.gguf"), True,
    )  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text("k: 5\nsplit: test\nappend-eos: true\ndtype: bfloat16\ngguf-file: b.gguf\nrevision: main\n")
    assert run(measure, "gpt2", "--config", str(file), "--revision", "v2").exit_code == 0
    reading, loading = CorpusOptions(split="test", append_eos=True), ModelOptions(None, "v2", "b.gguf", "bfloat16")
    assert got.pop() == ("gpt2", 5, reading, loading, False)
    file.write_text("dtype: int8\n")
    done = run(measure, "gpt2", "--config", str(file))
    assert done.exit_code == 2
    assert "'int8' is not one of" in done.output
    assert not got


def test_a_field_that_is_added_is_an_option_at_once():
    got = []

    def measure(loading: Later) -> None:
        """Measure."""
        got.append(loading)

    assert run(measure, "--kernels", "fast", "--device", "cpu").exit_code == 0
    assert got == [Later(device="cpu", kernels="fast")]


def test_options_of_one_name_are_refused():
    def measure(loading: ModelOptions, other: Later) -> None:
        """Measure."""

    with pytest.raises(ValueError, match="duplicate parameter name"):
        command_line(measure)


def test_an_option_added_later_is_in_keys_only_where_it_is_set():
    assert Later().key() == ModelOptions().key()
    assert Later(kernels="fast").key() == ModelOptions().key() | {"kernels": "fast"}
    assert ModelOptions(tokenizer="gpt2").key() == ModelOptions().key()  # decides what is scored, not what it is


# As the first release wrote them.
LOADING = {"dtype": "auto", "device": "cpu", "revision": None, "gguf_file": None}
OPTIONS = {"split": None, "tokenizer": None, "append_eos": False, "group_by": None, "batch_tokens": 4096}
HOLD = "tournament student other --data corpus --n 2 --bootstrap 0 --shard-rows 8 --device cpu --output-dir out"


def test_scores_kept_before_options_were_added_are_used_again(work, monkeypatch):
    invoke(HOLD)
    scored = []
    original = command.score_into
    monkeypatch.setattr(
        command, "score_into", lambda folder, *rest, **kw: (scored.append(folder.name), original(folder, *rest, **kw))
    )
    for name in ("student", "other"):
        (record,) = work.glob(f"out/scores/*__{name}/checkpoint.json")
        facts = json.loads(record.read_text())
        before = {"corpus": facts["corpus"], "loading": LOADING, "options": OPTIONS | {"shard_rows": 8}}
        before |= {"model": str((work / name).absolute()), "files": checkpoint_signature(name)}
        assert record.read_text() == json.dumps(before, indent=2) + "\n"
    invoke(HOLD)
    assert scored == []
    invoke(f"{HOLD} --revision v2")  # of no effect on a folder, but it could be
    assert len(scored) == 2


def test_responses_kept_before_options_were_added_are_used_again(work):
    invoke(f"{HOLD} --on-policy --generations 4")
    records = list(work.glob("out/on_policy/*/made_of.json"))
    records += work.glob("out/on_policy/*/scores/*/made_of.json")
    assert len(records) == 4
    for record in records:
        facts = json.loads(record.read_text())
        source = record.parent.name.split("__")[-1]
        before = {"model": str((work / source).absolute()), "files": checkpoint_signature(source), "loading": LOADING}
        before |= {"number": 4, "max_new_tokens": 5, "batch_size": 16, "seed": 0, "prompts": facts["prompts"]}
        assert record.read_text() == json.dumps(before, indent=2) + "\n"
    line = error_line(f"{HOLD} --on-policy --generations 4 --dtype float32")
    assert "was made otherwise (loading changed)" in line


def test_profile_groups_rows_as_it_is_told(work):
    invoke("profile student --corpus corpus --group-by completion --n 2 --output-dir grouped")
    invoke("score student corpus --group-by completion --output-dir new")
    invoke("profile new --n 2 --output-dir scored")
    invoke("profile scores/student --n 2 --output-dir usual")
    grouped, scored, usual = (results_in(name)["intervals"] for name in ("grouped", "scored", "usual"))
    assert grouped["student"] == scored["student"] != usual["student"]
    line = error_line("profile scores/student --group-by completion --output-dir out")
    assert "`--group-by` is chosen when a model is scored, and scores/student has scores and groups already" in line
