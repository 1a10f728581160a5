"""Commands with `--base-url`: a server's models in the place of folders, with the same numbers."""

import json

import numpy as np
import pytest
from datasets import load_from_disk

from hf_coverage.measure.score_table import ScoreTable
from tests.commands.shell import PROMPTS, error_line, invoke, load
from tests.inference.fake_server import FakeServer, serving

OPTIONS = "--tokenizer teacher --base-url"
COMMANDS = {
    "sample": "sample prompts.jsonl --teacher served -o new",
    "score": "score served corpus -o new",
    "choose": "choose served corpus --data corpus -o new",
    "tournament": "tournament served corpus --data corpus -o new",
    "best-of-n": "best-of-n served corpus -o new",
}


@pytest.fixture
def server(work, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    model, tokenizer = load(work, "teacher")
    found = FakeServer(model, tokenizer, name="served")
    found.others["student"] = load(work, "student")[0]
    return found


@pytest.fixture
def url(server):
    with serving(server) as address:
        yield address


def test_a_corpus_from_a_server_is_scored_by_it_as_by_the_model_in_memory(work, server, url):
    sampled = "sample prompts.jsonl --teacher served --k 4 --max-new-tokens 5 -o new --check-with teacher"
    invoke(f"{sampled} {OPTIONS} {url}")
    rows = load_from_disk("new")
    assert len(rows) == 20
    assert json.loads((work / "new" / "origin.json").read_text())["teacher"] == "served"
    invoke(f"score served new -o there {OPTIONS} {url}")
    invoke("score teacher new -o here")
    there, here = (ScoreTable.open(folder).logprob for folder in ("there", "here"))
    np.testing.assert_allclose(there, here, atol=1e-4)
    np.testing.assert_allclose(there, rows["reference_logprob"][:], atol=1e-4)
    assert ScoreTable.open("there").metadata["model"]["served"]["id"] == "served"
    server.others["served"] = server.others["student"]
    said = error_line(f"score served new -o there {OPTIONS} {url}")
    assert "scores of something else (model.served.probes" in said


ON_POLICY = "tournament --data corpus --n 4 --on-policy --generations 5"


@pytest.mark.parametrize("words", ["choose --data corpus --samples 4", "choose --data corpus --adaptive", ON_POLICY])
def test_checkpoints_at_a_server_are_chosen_among_as_those_in_folders(work, server, url, words):
    invoke(f"{words} served student {OPTIONS} {url} -o there")
    invoke(f"{words} teacher student -o here")
    name = "tournament.json" if words == ON_POLICY else "choice.json"
    there, here = (json.loads((work / folder / name).read_text()) for folder in ("there", "here"))
    assert there["winner"].replace("served", "teacher") == here["winner"]
    entropies = {one.replace("served", "teacher"): value for one, value in there["cross_entropies"].items()}
    assert entropies == pytest.approx(here["cross_entropies"], abs=1e-4)


def test_what_a_server_wrote_is_used_again_while_it_has_the_same_models(work, server, url):
    command = f"{ON_POLICY} served student {OPTIONS} {url} -o there"
    assert "responses of its own" in invoke(command)
    assert "responses of its own" not in invoke(command)
    server.others["student"] = server.model
    assert "was made otherwise (served changed)" in error_line(command)


def test_best_of_n_of_a_server(work, server, url):
    rows = [{"prompt": prompt, "answer": "."} for prompt in PROMPTS]
    (work / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"best-of-n served answers.jsonl --k 4 --max-new-tokens 3 {OPTIONS} {url}"
    assert "served, 5 prompts" in invoke(f"{command} --temperature 1 -o best")
    assert json.loads((work / "best" / "metadata.json").read_text())["served"]["id"] == "served"
    assert "--logprobs-mode processed_logprobs" in error_line(f"{command} --temperature .7 -o other")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("sample", "--stratified"),
        ("score", "--stratified"),
        ("choose", "--stratified"),
        ("choose", "--follow"),
        ("tournament", "--stratified"),
        ("best-of-n", "--sampling stratified"),
    ],
)
def test_what_needs_the_model_itself_is_refused_by_flag(work, command, option):
    said = invoke(f"{COMMANDS[command]} {option} {OPTIONS} http://127.0.0.1:9/v1", code=2)
    assert f"`{option}` needs the model itself, and with `--base-url` it is a server's" in " ".join(said.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_loading_are_refused_by_flag(work, command):
    words, url = COMMANDS[command], "--base-url http://127.0.0.1:9/v1"
    assert "`--base-url` needs the `--tokenizer`" in error_line(f"{words} {url}")
    said = error_line(f"{words} {url} --tokenizer teacher --dtype bfloat16")
    assert "`--dtype` says how a model is loaded, which its server has done" in said
    assert "give its `--base-url`" in error_line(f"{words} --check-with teacher")
    assert not (work / "new" / "metadata.json").exists()


@pytest.mark.parametrize("command", ["profile", "compare", "report", "suggest", "tune-ttt"])
def test_other_commands_have_no_such_option(command):
    assert "No such option" in invoke(f"{command} x --base-url http://127.0.0.1:9/v1", code=2)


def test_a_server_that_is_not_there_is_said(work, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    said = error_line(f"{COMMANDS['score']} {OPTIONS} http://127.0.0.1:9/v1")
    assert "http://127.0.0.1:9/v1 does not answer" in said
    assert "after 9 tries" in said
