"""`hf-coverage choose` on checkpoints that fit in a test."""

import json
import shlex

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_coverage.cli import app
from hf_coverage.commands.score_folder import read_measured
from hf_coverage.select.choose import choose

OPTIONS = "--data corpus.jsonl --device cpu --tokenizer none --output-dir choice"


def invoke(arguments, code=0):
    result = CliRunner().invoke(app, ["choose", *shlex.split(arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with two checkpoints, and a corpus of token ids with and without a density."""
    for step in (10, 20):
        torch.manual_seed(step)
        config = GPT2Config(
            n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32, bos_token_id=0, eos_token_id=1
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    rng = np.random.default_rng(0)
    rows = {"prompt": rng.integers(2, 11, (12, 3)).tolist(), "completion": rng.integers(2, 11, (12, 2)).tolist()}
    Dataset.from_dict(rows | {"reference_logprob": [-4.0] * 12}).to_json(tmp_path / "corpus.jsonl")
    Dataset.from_dict(rows).to_json(tmp_path / "plain.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # a corpus of token ids needs no tokenizer
    monkeypatch.setattr("hf_coverage.commands.score.load_tokenizer", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_checkpoints_to_a_decision(run):
    output = invoke(f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} --samples 8,1 --link best")
    folders = {f"checkpoint-{step}": run / "choice" / "scores" / f"run__checkpoint-{step}" for step in (10, 20)}
    measured = {name: read_measured(str(folder)) for name, folder in folders.items()}
    first = measured["checkpoint-10"].reference
    expected = choose(
        {name: one.profile.logprobs for name, one in measured.items()},
        (8, 1),
        reference_logprobs=first.logprob,
        groups=first.groups,
    )
    facts = json.loads((run / "choice" / "choice.json").read_text())
    assert facts["losses"] == expected.losses
    assert facts["rule"] == "miss"
    best = json.loads((run / "choice" / "best_checkpoint.json").read_text())
    assert best["best_model_checkpoint"].endswith(expected.winner)
    assert best["metric"] == "miss_8"
    assert (run / "best").resolve().name == expected.winner
    assert {"choice.png", "report.html"} <= {path.name for path in (run / "choice").iterdir()}
    assert expected.sentence in " ".join(output.split())
    assert "miss_8" in output
    assert expected.sentence.split(" (")[0] in (run / "choice" / "report.html").read_text()


def test_scores_are_used_again_and_a_plain_corpus_has_its_own_rule(run):
    options = OPTIONS.replace("corpus.jsonl", "plain.jsonl")
    invoke(f"run/checkpoint-10 run/checkpoint-20 {options}")
    facts = json.loads((run / "choice" / "choice.json").read_text())
    assert facts["rule"] == "soft tournament"
    again = invoke("choice/scores/run__checkpoint-10 choice/scores/run__checkpoint-20 --output-dir again")
    assert "Scoring" not in again
    losses = json.loads((run / "again" / "choice.json").read_text())["losses"]
    assert list(losses.values()) == list(facts["losses"].values())


def test_flags_out_of_range_are_named(run):
    assert "`--samples" in invoke(f"run/checkpoint-10 {OPTIONS} --samples 0", code=2)
    assert "`--tolerance`" in invoke(f"run/checkpoint-10 {OPTIONS} --tolerance 2", code=2)


def test_stratified_samples_have_a_choice_of_their_own(run):
    rows = Dataset.from_json("plain.jsonl")
    Dataset.from_dict(rows[:] | {"reference_logprob": [0.0] * len(rows)}).to_json("answers.jsonl")
    options = OPTIONS.replace("corpus.jsonl", "answers.jsonl")
    output = invoke(f"run/checkpoint-10 run/checkpoint-20 {options} --samples 8,2 --stratified")
    folders = {f"checkpoint-{step}": run / "choice" / "scores" / f"run__checkpoint-{step}" for step in (10, 20)}
    profiles = {name: read_measured(str(folder)).profile for name, folder in folders.items()}
    facts = json.loads((run / "choice" / "choice.json").read_text())
    assert facts["rule"] == "stratified pass"
    for name, profile in profiles.items():
        assert facts["losses"][name] == pytest.approx(1 - profile.pass_at(8, "stratified"))
    assert json.loads((run / "choice" / "best_checkpoint.json").read_text())["metric"] == "stratified_fail_8"
    for text in ("1 - Pass@8 of stratified samples", "of independent ones", "best with independent samples"):
        assert text in output
    assert "of independent ones" in (run / "choice" / "report.html").read_text()
    folder = "choice/scores/run__checkpoint-10"
    again = CliRunner().invoke(app, ["profile", folder, "--output-dir", "profiles", "--n", "2,8"])
    assert "Pass@N, stratified" in again.output
    page = CliRunner().invoke(app, ["report", folder, "--output-dir", "pages", "--n", "2,8"])
    assert page.exit_code == 0
    assert "Pass@N, stratified" in (run / "pages" / "report.html").read_text()


def test_what_stratified_cannot_be_of_is_refused(run):
    assert "needs prompts with one right answer" in invoke(f"run/checkpoint-10 {OPTIONS} --stratified", code=1)
    rows = Dataset.from_json("plain.jsonl")
    Dataset.from_dict(rows[:] | {"reference_logprob": [0.0] * len(rows)}).to_json("answers.jsonl")
    options = OPTIONS.replace("corpus.jsonl", "answers.jsonl").replace("choice", "plain")
    invoke(f"run/checkpoint-10 {options}")
    output = invoke("plain/scores/run__checkpoint-10 --stratified --output-dir again", code=1)
    assert "was scored without: score it into a new folder" in " ".join(output.split())
