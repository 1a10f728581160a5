"""`hf-coverage tournament` on checkpoints that fit in a test."""

import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_coverage import tournament
from hf_coverage.cli import app
from hf_coverage.commands import checkpoint_scores as command
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.tasks.graph_search import GraphSearch
from tests import processes
from tests.processes import Job

OPTIONS = "--data corpus.jsonl --n 2 --bootstrap 50 --shard-rows 4 --device cpu --tokenizer none"


def invoke(arguments, code=0):
    result = CliRunner().invoke(app, ["tournament", *shlex.split(arguments)])
    assert result.exit_code == code, result.output
    return result.output


def save_checkpoint(folder, seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32, bos_token_id=0, eos_token_id=1,
        initializer_range=0.6,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with three checkpoints, and a corpus of token ids."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / "run" / f"checkpoint-{step}", step)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 11, 3).tolist() for _ in range(6) for _ in range(3)]
    Dataset.from_dict({"prompt": prompts, "completion": [rng.integers(2, 11, 4).tolist() for _ in prompts]}).to_json(
        tmp_path / "corpus.jsonl"
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # a corpus of token ids needs no tokenizer
    monkeypatch.setattr("hf_coverage.commands.score.load_tokenizer", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoints(run):
    return " ".join(str(path.relative_to(run)) for path in sorted((run / "run").glob("checkpoint-*")))


def outcome(folder):
    """All that a tournament wrote but the picture, scores as bytes."""
    shards = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("scores/*/scores-*")}
    return json.loads((folder / "tournament.json").read_text()), shards


def test_the_command_decides_as_the_library_and_leaves_the_winner(run):
    output = invoke(f"{checkpoints(run)} {OPTIONS} --sweep 4,8 --link run/best")
    folders = {f"checkpoint-{step}": run / "tournament/scores" / f"run__checkpoint-{step}" for step in (10, 20, 30)}
    groups = [str(row["prompt"]) for row in map(json.loads, (run / "corpus.jsonl").read_text().splitlines())]
    expected = tournament(folders, 2, groups=groups, bootstrap=50, sweep=[4, 8])
    facts, _ = outcome(run / "tournament")
    assert facts["scores"] == expected.scores
    assert facts["num_prompts"] == len(set(groups))
    assert facts["sentence"] == expected.sentence in output
    assert expected.guarantee() in output
    best = json.loads((run / "tournament" / "best_checkpoint.json").read_text())
    assert best["best_model_checkpoint"] == f"run/{expected.winner}"
    assert (run / "run" / "best").resolve().name == expected.winner
    assert (run / "tournament" / "tournament.png").read_bytes().startswith(b"\x89PNG")
    line = re.findall(rf"│ {expected.winner} .*", output)[0]
    assert "tournament" in line
    assert "Cov_" not in output.replace("Cov_2.828", "").replace("Cov_1.414", "")  # D has no density here


def test_a_further_checkpoint_costs_one_scoring_pass(run, monkeypatch):
    invoke(f"{checkpoints(run)} {OPTIONS}")
    scored = []
    original = command.score_into
    monkeypatch.setattr(
        command, "score_into", lambda folder, *rest, **kw: (scored.append(folder), original(folder, *rest, **kw))
    )
    invoke(f"{checkpoints(run)} {OPTIONS} --bootstrap 0")
    assert scored == []
    save_checkpoint(run / "run" / "checkpoint-40", 40)
    invoke(f"{checkpoints(run)} {OPTIONS}")
    assert [folder.name for folder in scored] == ["run__checkpoint-40"]
    # scores alone are enough, and those of another run can join
    save_checkpoint(run / "other" / "checkpoint-40", 41)
    output = invoke(f"tournament/scores/run__checkpoint-10 other/checkpoint-40 {OPTIONS}")
    assert "run__checkpoint-10" in output
    assert [folder.name for folder in scored[1:]] == ["other__checkpoint-40"]
    assert json.loads((run / "tournament/best_checkpoint.json").read_text())["scores"].keys() == {
        "run/checkpoint-10",
        "other/checkpoint-40",
    }


def test_a_checkpoint_that_was_overwritten_is_not_taken_for_the_old_one(run):
    invoke(f"{checkpoints(run)} {OPTIONS}")
    save_checkpoint(run / "run" / "checkpoint-20", 99)
    assert "holds the scores of something else (model.weights" in invoke(f"{checkpoints(run)} {OPTIONS}", code=1)


def test_another_corpus_is_not_mixed_in(run):
    invoke(f"{checkpoints(run)} {OPTIONS}")
    lines = (run / "corpus.jsonl").read_text().splitlines()
    (run / "small.jsonl").write_text("\n".join(lines[:6]) + "\n")
    small = OPTIONS.replace("corpus.jsonl", "small.jsonl")
    assert "holds the scores of something else" in invoke(f"{checkpoints(run)} {small}", code=1)
    invoke(f"run/checkpoint-10 {small} --output-dir small")
    output = invoke("tournament/scores/run__checkpoint-20 small/scores/run__checkpoint-10", code=1)
    assert "were scored on different rows (18 and 6)" in " ".join(output.split())


def test_an_interrupted_command_goes_on_and_ends_the_same(run, monkeypatch):
    invoke(f"{checkpoints(run)} {OPTIONS} --output-dir whole")
    write, written = ScoreTable.write, []

    def write_seven(table, index, scores):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(index)
        write(table, index, scores)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreTable, "write", write_seven)
        invoke(f"{checkpoints(run)} {OPTIONS} --output-dir parts", code=130)
    assert len(list((run / "parts").glob("scores/*/scores-*"))) == 7
    assert not (run / "parts" / "best_checkpoint.json").exists()
    invoke(f"{checkpoints(run)} {OPTIONS} --output-dir parts")
    assert outcome(run / "parts") == outcome(run / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run/checkpoint-10 run/checkpoint-20", "is no score folder: give the corpus to score it on, `--data`"),
        ("run/checkpoint-10 run/checkpoint-10 --data corpus.jsonl", "is given twice"),
        (f"run/checkpoint-10 {OPTIONS} --n 0.5", "`n` must be a finite number >= 1"),
    ],
)
def test_a_failure_is_one_line(run, arguments, message):
    assert message in " ".join(invoke(arguments, code=1).split())


@pytest.fixture
def text_run(run):
    """The same run with a tokenizer beside each checkpoint, so that other processes can score it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(11)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for folder in (run / "run").iterdir():
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1").save_pretrained(folder)
    return run


def command_line(run, folder):
    options = OPTIONS.replace("--tokenizer none", "").replace("--shard-rows 4", "--shard-rows 1")
    return f"-m hf_coverage tournament {checkpoints(run)} {options} --output-dir {folder}".split()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_the_same(text_run):
    processes.run(*command_line(text_run, "whole"))
    shards, kills = [], 0
    for enough in (3, 25, 45):
        job = Job(*command_line(text_run, "parts"))
        while job.poll() is None and len(shards) < enough:
            time.sleep(0.002)
            shards = list((text_run / "parts").glob("scores/*/scores-*"))
        if job.poll() is None:
            job.kill()
            kills += 1
    assert kills
    processes.run(*command_line(text_run, "parts"))
    assert outcome(text_run / "parts") == outcome(text_run / "whole")


@pytest.mark.slow
def test_two_processes_decide_as_one(text_run):
    for folder, ranks in (("one", None), ("two", 2), ("two", 2)):
        printed = processes.run(*command_line(text_run, folder), ranks=ranks, COLUMNS="200")
        assert printed.count("wins the tournament") == 1
    one, two = outcome(text_run / "one"), outcome(text_run / "two")
    assert one == two


@pytest.fixture
def twenty_checkpoints(tmp_path, monkeypatch):
    """Twenty checkpoints of the graph-search recipe's model, wandering from one another, and the recipe's corpus."""
    task = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")
    tokenizer = task.tokenizer()
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": len(tokenizer), "n_positions": 46}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.1)
    model = GPT2LMHeadModel(config)
    for step in range(15, 301, 15):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        tokenizer.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    task.corpus(240, (0.9, 0.1, 0.0), seed=0).save_to_disk(str(tmp_path / "corpus"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tournament_of_twenty(folder, ranks):
    options = f"--data corpus -n 2 --sweep 1.5,4 --bootstrap 100 --shard-rows 20 --device cpu --output-dir {folder}"
    return Job(*f"-m hf_coverage tournament {checkpoints(Path.cwd())} {options}".split(), ranks=ranks)


def content(folder):
    """Every file that a tournament wrote, as bytes, but for the command that was given."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if path.name != "reference.json"}
    facts = {name: json.loads(files[name].read_text()) | {"command": ""} for name in files.keys() - found.keys()}
    return found | facts


def run_killed(folder, rng, kills, ranks=None):
    """Kill the command, all of its processes, at random moments of its scoring; then let it end."""
    stops = sorted(rng.choice(20 * 12 - 10, size=kills, replace=False))
    for stop in stops:
        job = tournament_of_twenty(folder, ranks)
        while job.poll() is None and len(list(folder.glob("scores/*/scores-*"))) <= stop:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        assert job.poll() is None, job.wait().stderr[-6000:]
        job.kill()
        assert not (folder / "best_checkpoint.json").exists()
    done = tournament_of_twenty(folder, ranks).wait(600)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.slow
def test_twenty_checkpoints_killed_again_and_again_in_one_process_and_in_two(twenty_checkpoints):
    rng = np.random.default_rng(0)
    run_killed(Path("whole"), rng, 0)
    expected = content(Path("whole"))
    assert sum("scores-" in name for name in expected) == 20 * 12
    assert len(set(json.loads(expected["tournament.json"])["scores"].values())) > 10
    run_killed(Path("killed"), rng, 4)
    assert content(Path("killed")) == expected
    run_killed(Path("killed_two"), rng, 2, ranks=2)
    assert content(Path("killed_two")) == expected
