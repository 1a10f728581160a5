"""`hf-coverage choose` on checkpoints that fit in a test."""

import json
import re
import shlex
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_coverage import evaluate_best_of_n
from hf_coverage.cli import app
from hf_coverage.commands import score
from hf_coverage.commands.follow import RunFolder
from hf_coverage.commands.score_folder import read_measured
from hf_coverage.measure.engine import ScoringEngine
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.select.choose import choose
from tests.commands.own_verdicts import even
from tests.processes import Job
from tests.processes import run as run_job

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
    page = (run / "choice" / "report.html").read_text()
    assert re.sub(r"miss_(\w+)", r"miss<sub>\1</sub>", expected.sentence.split(" (")[0]) in page
    assert "budget" not in page  # none was asked for
    assert "turn" not in facts  # nothing is followed


def test_scores_are_used_again_and_a_plain_corpus_has_its_own_rule(run):
    options = OPTIONS.replace("corpus.jsonl", "plain.jsonl")
    invoke(f"run/checkpoint-10 run/checkpoint-20 {options}")
    facts = json.loads((run / "choice" / "choice.json").read_text())
    assert facts["rule"] == "soft tournament"
    again = invoke("choice/scores/run__checkpoint-10 choice/scores/run__checkpoint-20 --output-dir again")
    assert "Scoring" not in again
    losses = json.loads((run / "again" / "choice.json").read_text())["losses"]
    assert list(losses.values()) == list(facts["losses"].values())


JUDGED = "--verifier tests.commands.own_verdicts:even --k 8 --max-new-tokens 2 --batch-size 8"


@pytest.fixture
def judged(run, monkeypatch):
    """The same, and verifiers that are called in this process."""
    monkeypatch.setattr("hf_coverage.decode.verifier_runner.runs_in_worker", lambda *_: False)
    monkeypatch.setattr("hf_coverage.decode.sample_verdicts.runs_in_worker", lambda *_: False)
    return run


def test_from_checkpoints_to_a_decision_by_verdicts(judged, monkeypatch):
    command = f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} {JUDGED} --samples 4,1 --link best"
    output = " ".join(invoke(command).split())
    results = {}
    for step in (10, 20):
        model = GPT2LMHeadModel.from_pretrained(f"run/checkpoint-{step}")
        corpus = Dataset.from_json("corpus.jsonl")
        results[f"checkpoint-{step}"] = evaluate_best_of_n(
            model.eval(), None, corpus, even, k=8, max_new_tokens=2, batch_size=8, timeout=None, progress=False
        )
    expected = choose(results, (4, 1))
    facts = json.loads(Path("choice/choice.json").read_text())
    assert (facts["losses"], facts["rule"]) == (expected.losses, "pass")
    assert facts["pick"]["within"] == pytest.approx(expected.within)
    assert expected.sentence in output
    best = json.loads(Path("choice/best_checkpoint.json").read_text())
    assert (best["metric"], Path("best").resolve().name) == ("fail_4", expected.winner)
    page = Path("choice/report.html").read_text()
    assert "a verifier accepts at least one of N samples" in page
    assert "Cov_N" not in page
    assert "budget" not in page
    assert "<td>even</td>" in page  # the verifier, among what it takes to run it again
    # what was sampled is not sampled again, whatever it is chosen for and whoever judges it
    monkeypatch.setattr("hf_coverage.commands.score.load_model", None)
    invoke(command)
    assert json.loads(Path("choice/choice.json").read_text()) == facts
    for_rl = command.replace("--samples 4,1", "--for rl --group-size 4,2")
    output = " ".join(invoke(for_rl).split())
    facts = json.loads(Path("choice/choice.json").read_text())
    expected = choose(results, (4, 2), purpose="rl")
    assert (facts["losses"], facts["rule"]) == (expected.losses, "signal")
    assert "to start RL from, with groups of 4" in Path("choice/report.html").read_text()
    assert "1 - signal_4" in output
    invoke(command.replace(":even", ":second"))
    other = json.loads(Path("choice/choice.json").read_text())["losses"]
    folders = " ".join(f"choice/samples/run__checkpoint-{step}" for step in (10, 20))
    options = OPTIONS.replace("choice", "again")
    invoke(f"{folders} {options} {JUDGED.replace(':even', ':second')} --samples 4")
    assert list(json.loads(Path("again/choice.json").read_text())["losses"].values()) == list(other.values())
    assert not Path("again/best_checkpoint.json").exists()


def test_checkpoints_join_later_and_one_that_was_changed_is_refused(judged, monkeypatch):
    loaded, load = [], score.load_model
    monkeypatch.setattr(score, "load_model", lambda name, *rest: loaded.append(name) or load(name, *rest))
    invoke(f"run/checkpoint-10 {OPTIONS} {JUDGED} --samples 4")
    invoke(f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} {JUDGED} --samples 4")
    assert loaded == ["run/checkpoint-10", "run/checkpoint-20"]
    checkpoint("run/checkpoint-10", 30)
    output = invoke(f"run/checkpoint-10 {OPTIONS} {JUDGED} --samples 4", code=1)
    assert "choice/samples/run__checkpoint-10 holds samples of something else (weights was" in output


def test_stratified_samples_are_judged_in_blocks(judged):
    command = f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} {JUDGED} --samples 4"
    invoke(f"{command} --stratified")
    facts = json.loads(Path("choice/choice.json").read_text())
    assert facts["rule"] == "stratified pass"
    assert "stratified samples count in whole blocks" in invoke(f"{command} --samples 3 --stratified", code=2)


def test_groups_of_prompts_are_what_is_resampled(judged):
    rows = Dataset.from_json("corpus.jsonl")
    rows.add_column("family", [row // 4 for row in range(len(rows))]).to_json("families.jsonl")
    options = OPTIONS.replace("corpus", "families")
    output = invoke(f"run/checkpoint-10 run/checkpoint-20 {options} {JUDGED} --samples 4 --group-by family")
    assert "of 2 candidates on 3 prompts" in " ".join(output.split())
    wrong = invoke(f"run/checkpoint-10 {options} {JUDGED} --samples 4 --group-by none", code=1)
    assert "`--group-by` must be a column of the data" in wrong


def test_a_verifier_that_fails_chooses_nothing(judged):
    output = invoke(
        f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} {JUDGED.replace('even', 'broken')} --samples 4", code=1
    )
    assert "judged none of 96 responses" in " ".join(output.split())
    assert not Path("choice/choice.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--for rl", "`--for rl` chooses by rewards of samples: give a `--verifier`"),
        ("--group-size 4", "`--group-size` is of RL: give `--for rl`"),
        (f"{JUDGED} --for rl --samples 4", "`--samples` are of Best-of-N: with `--for rl` give `--group-size`"),
        (f"{JUDGED} --for rl --group-size 1", "`--group-size` must be at least 2"),
        (
            f"{JUDGED} --for rl --group-size 9",
            "whole numbers up to `--k` 8, the samples that are judged, but there is 9",
        ),
        (f"{JUDGED} --samples 16", "whole numbers up to `--k` 8, the samples that are judged, but there is 16"),
        (f"{JUDGED} --samples 2.5", "but there is 2.5"),
        (f"{JUDGED} --for rl --stratified", "`--for rl` is of independent samples: leave out `--stratified`"),
        (f"{JUDGED} --samples 4 --adaptive", "`--adaptive` is of scores: with `--verifier` every checkpoint"),
        ("--verifier reward-model:none --samples 4", "Pass@N needs a `--threshold`"),
        (f"{JUDGED} --samples 4 --append-eos", "`--append-eos` is of responses that are scored"),
    ],
)
def test_what_goes_with_a_verifier_and_what_does_not(judged, options, message):
    output = invoke(f"run/checkpoint-10 {OPTIONS} {options}", code=2)
    assert message in " ".join(output.replace("│", " ").split())


def test_options_of_samples_need_a_verifier(judged):
    output = " ".join(invoke(f"run/checkpoint-10 {OPTIONS} --k 8", code=1).split())
    assert "`--k` is of samples that are judged: give a `--verifier` too" in output
    without = f"run/checkpoint-10 --output-dir choice {JUDGED} --samples 4"
    assert "`--verifier` needs `--data`" in " ".join(invoke(without, code=2).replace("│", " ").split())


def test_flags_out_of_range_are_named(run):
    assert "`--samples" in invoke(f"run/checkpoint-10 {OPTIONS} --samples 0", code=2)
    assert "`--tolerance`" in invoke(f"run/checkpoint-10 {OPTIONS} --tolerance 2", code=2)
    assert "`--follow` takes the folder of one run" in invoke(f"run {OPTIONS} --follow --adaptive", code=2)
    assert "`--until` says when `--follow`" in invoke(f"run {OPTIONS} --until 3", code=2)
    for other in ("--adaptive", "--follow"):
        assert "`--stratified` is for whole score tables" in invoke(f"run {OPTIONS} --stratified {other}", code=2)


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


def checkpoint(folder, seed, spread=0.02):
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=1,
        n_embd=8,
        n_head=1,
        vocab_size=11,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=spread,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture
def many(run):
    """The run with a checkpoint that has lost most responses, and 150 prompts, some of them twice."""
    checkpoint("run/checkpoint-30", 30, spread=2.0)
    rng = np.random.default_rng(1)
    rows = {"prompt": rng.integers(2, 11, (150, 3)).tolist(), "completion": rng.integers(2, 11, (150, 2)).tolist()}
    rows = {name: [*column, *column[:20]] for name, column in rows.items()}
    rows["completion"][150:] = rng.integers(2, 11, (20, 2)).tolist()
    Dataset.from_dict(rows | {"reference_logprob": [-4.0] * 170}).to_json(run / "corpus.jsonl")
    return run


ADAPTIVE = f"run/checkpoint-10 run/checkpoint-20 run/checkpoint-30 {OPTIONS} --adaptive --samples 8 --shard-rows 32"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "report.html"  # which names the time
    }


def rows_scored(monkeypatch):
    """How many rows each pass over some rows scores, from now on."""
    scored, score = [], ScoringEngine.score_rules

    def counting(self, corpus, rows, rules, advance):
        scored.append(len(rows))
        return score(self, corpus, rows, rules, advance)

    monkeypatch.setattr(ScoringEngine, "score_rules", counting)
    return scored


def test_adaptively_what_is_behind_is_scored_on_few_rows_and_the_rest_of_it_later(many, monkeypatch):
    scored = rows_scored(monkeypatch)
    output = invoke(ADAPTIVE)
    facts = json.loads(Path("choice/choice.json").read_text())
    assert facts["scored_rows"]["checkpoint-30"] < 100
    assert facts["scored_rows"][facts["winner"]] == 170
    assert sum(scored) == facts["row_scorings"] < facts["full_row_scorings"] == 510
    assert "row scorings of the full table" in " ".join(output.split())
    assert "dropped" in output
    assert "dropped" in Path("choice/report.html").read_text()
    # again: nothing is scored, or loaded
    before, done = contents("choice"), len(scored)
    monkeypatch.setattr("hf_coverage.commands.score.load_model", None)
    invoke(ADAPTIVE)
    assert (contents("choice"), len(scored)) == (before, done)
    # what was scored is of use to the other commands, and the scores are enough for the same choice
    partly = "choice/scores/run__checkpoint-30"
    rows = facts["scored_rows"]["checkpoint-30"]
    assert f"{partly} has scores of {rows} of 170 rows" in " ".join(invoke_command(f"profile {partly} -o p").split())
    for command in ("compare", "tournament --bootstrap 0", "choose"):
        said = invoke_command(f"{command} choice/scores/run__checkpoint-10 {partly} -o c")
        assert f"Compared on the {rows} rows that all of them were scored on." in " ".join(said.split())
    folders = " ".join(f"choice/scores/run__checkpoint-{step}" for step in (10, 20, 30))
    invoke(f"{folders} --adaptive --samples 8 -o again")
    again = json.loads(Path("again/choice.json").read_text())
    assert list(again["losses"].values()) == list(facts["losses"].values())
    assert "are needed" in invoke(f"{folders} --adaptive --samples 8 --seed 1 -o other", code=1)
    # without it the others are completed, and no row is scored twice
    monkeypatch.undo()
    monkeypatch.chdir(many)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", many / "cache")
    monkeypatch.setattr("hf_coverage.commands.score.load_tokenizer", lambda *_: None)
    scored = rows_scored(monkeypatch)
    invoke(ADAPTIVE.replace("--adaptive ", ""))
    assert sum(scored) == 510 - facts["row_scorings"]
    whole = [ScoreTable.open(folder).logprob for folder in folders.split()]
    assert [values.size for values in whole] == [170] * 3
    assert not list(Path("choice").rglob("rows-*"))
    assert json.loads(Path("choice/choice.json").read_text())["winner"] == facts["winner"]
    # and adaptively again, there is nothing left to score
    invoke(ADAPTIVE)
    assert json.loads(Path("choice/choice.json").read_text())["losses"] == pytest.approx(facts["losses"], abs=1e-4)


def invoke_command(arguments):
    result = CliRunner().invoke(app, shlex.split(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_adaptively_a_run_that_failed_anywhere_goes_on_and_ends_with_the_same_bytes(many, monkeypatch):
    invoke(ADAPTIVE)
    shutil.move("choice", "whole")
    calls, write = [], ScoreTable.write_rows

    def failing(self, *arguments):
        calls.append(self)
        if len(calls) in (2, 6):
            raise OSError("power cut")
        write(self, *arguments)

    monkeypatch.setattr(ScoreTable, "write_rows", failing)
    for code in (1, 1, 0):
        invoke(ADAPTIVE, code=code)
    assert contents("choice") == contents("whole")


def test_adaptively_a_plain_corpus_is_refused(run):
    message = invoke(f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} --adaptive".replace("corpus.", "plain."), code=1)
    assert "`--adaptive` needs a corpus with `reference_logprob`" in " ".join(message.split())


SCRIPT = """
import sys
from hf_coverage.commands import score
from hf_coverage.cli import app

score.load_tokenizer = lambda *_: None
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_adaptively_on_two_ranks_and_killed(many):
    Path("script.py").write_text(SCRIPT)
    command = ["script.py", "choose", *shlex.split(ADAPTIVE)]
    run_job(*command)
    shutil.move("choice", "whole")
    job = Job(*command, ranks=2)
    while not list(Path("choice").rglob("rows-*")):
        assert job.poll() is None, job.wait()
        time.sleep(0.01)
    job.kill()
    run_job(*command, ranks=2)
    assert contents("choice") == contents("whole")


FOLLOW = "run {} --follow --interval 0.05 --samples 8"


def test_followed_checkpoints_are_scored_once_as_they_come_and_may_go(run, monkeypatch):
    scored, failures = rows_scored(monkeypatch), []
    shutil.move("run", "made")
    checkpoint("made/checkpoint-30", 30)

    def train():
        try:
            for step in (10, 20, 30):
                folder = Path("run") / f"checkpoint-{step}"
                folder.mkdir(parents=True)
                shutil.copy(f"made/checkpoint-{step}/config.json", folder)
                time.sleep(0.4)  # nothing to load yet
                weights = Path(f"made/checkpoint-{step}/model.safetensors").read_bytes()
                (folder / "model.safetensors").write_bytes(weights[:2000])
                time.sleep(0.4)  # half of it
                (folder / "model.safetensors").write_bytes(weights)
                record = Path(f"choice/scores/run__checkpoint-{step}/checkpoint.json")
                while not record.exists():
                    time.sleep(0.01)
                if step == 20:
                    shutil.rmtree("run/checkpoint-10")
        except Exception as error:
            failures.append(error)

    writer = threading.Thread(target=train, daemon=True)
    writer.start()
    output = " ".join(invoke(f"{FOLLOW.format(OPTIONS)} --until 30").split())
    writer.join()
    assert not failures
    assert scored == [12, 12, 12]
    assert "checkpoint-10 cannot be loaded yet" in output
    assert output.count("checkpoints, the last") == 3
    facts = json.loads(Path("choice/choice.json").read_text())
    assert facts["names"] == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert facts["turn"] is None
    best = json.loads(Path("choice/best_checkpoint.json").read_text())
    assert not best["best_model_checkpoint"].endswith("checkpoint-10")
    # again: what is there, gone or not, is scored, and it ends at once
    invoke(f"{FOLLOW.format(OPTIONS)} --until 30")
    assert scored == [12, 12, 12]
    assert json.loads(Path("choice/choice.json").read_text()) == facts


def test_following_ends_with_ctrl_c(run, monkeypatch):
    looks = []

    def look(self, known):
        looks.append(list(known))
        if len(looks) == 4:
            raise KeyboardInterrupt
        return [
            path for path in (run / "run" / "checkpoint-10", run / "run" / "checkpoint-20") if path.name not in known
        ]

    monkeypatch.setattr(RunFolder, "settled", look)
    output = " ".join(invoke(FOLLOW.format(OPTIONS), code=130).split())
    assert "Stopped following run after 2 checkpoints. Run the same command again to go on." in output
    assert json.loads(Path("choice/choice.json").read_text())["names"] == ["checkpoint-10", "checkpoint-20"]


def test_a_followed_run_may_be_judged(judged, monkeypatch):
    monkeypatch.setattr(
        RunFolder,
        "settled",
        lambda self, known: [path for path in sorted(Path("run").iterdir()) if path.name not in known],
    )
    command = f"{FOLLOW.format(OPTIONS)} --until 20 {JUDGED}"
    output = " ".join(invoke(command).split())
    facts = json.loads(Path("choice/choice.json").read_text())
    assert "2 checkpoints, the last checkpoint-20." in output
    assert facts["names"] == ["checkpoint-10", "checkpoint-20"]
    # the same as without following; what is there is not sampled again, though its checkpoint is gone
    invoke(f"run/checkpoint-10 run/checkpoint-20 {OPTIONS.replace('dir choice', 'dir whole')} {JUDGED} --samples 8")
    assert json.loads(Path("whole/choice.json").read_text()) == facts
    shutil.rmtree("run/checkpoint-10")
    monkeypatch.setattr("hf_coverage.commands.score.load_model", None)
    invoke(command)
    assert json.loads(Path("choice/choice.json").read_text()) == facts
    other = invoke(command.replace("--k 8", "--k 16"), code=1)
    assert "holds samples that were drawn otherwise (k changed)" in " ".join(other.split())


def test_it_is_said_once_when_coverage_turns(run, monkeypatch):
    shutil.rmtree("run")
    rng = np.random.default_rng(0)
    rows = {"prompt": rng.integers(2, 11, (500, 3)).tolist(), "completion": rng.integers(2, 11, (500, 2)).tolist()}
    Dataset.from_dict(rows | {"reference_logprob": [-4.0] * 500}).to_json(run / "corpus.jsonl")
    for step in (1, 2, 3, 4):
        checkpoint(f"run/checkpoint-{step}", step)
    # what most responses get improves to the end, and from step 3 on a few are lost
    common, lost, score = (-4.6, -4.5, -4.0, -3.9), (20, 0, 30, 31), ScoringEngine.score_rules
    steps = iter([np.where(np.arange(500) < rows, -9.0, value) for value, rows in zip(common, lost)])

    def known(self, corpus, rows, rules, advance):
        (scores,) = score(self, corpus, rows, rules, advance)
        scores.logprob[:] = next(steps)[np.asarray(rows)]
        return [scores]

    monkeypatch.setattr(ScoringEngine, "score_rules", known)
    output = " ".join(invoke(f"{FOLLOW.format(OPTIONS)} --until 4").split())
    assert output.count("Coverage is getting worse while cross-entropy improves. From step 2 to step 3") == 1
    assert "Coverage is getting worse" in Path("choice/report.html").read_text()
    turn = json.loads(Path("choice/choice.json").read_text())["turn"]
    assert turn["step"] == 3
    assert turn["sentence"] in output


@pytest.mark.slow
def test_verdicts_of_two_ranks_are_those_of_one(run):
    Path("script.py").write_text(SCRIPT)
    asked = "--verifier tests.commands.own_verdicts:even --k 4 --samples 2 --max-new-tokens 2 --batch-size 4"
    words = ["script.py", "choose", *shlex.split(f"run/checkpoint-10 run/checkpoint-20 {OPTIONS} {asked}")]
    run_job(*words, ranks=2)
    shutil.move("choice", "two")
    run_job(*words)
    for name in ("choice.json", *(f"samples/run__checkpoint-{step}/samples-00000.jsonl" for step in (10, 20))):
        assert Path("two", name).read_bytes() == Path("choice", name).read_bytes()
