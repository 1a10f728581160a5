"""A model named by a branch of the Hub: when the branch moves, what was scored before is another model's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parents[2]
COMMITS = "a" * 40, "b" * 40


@pytest.fixture
def home(tmp_path):
    """A cache as the Hub's library leaves it, with two commits of one repository."""
    repository = tmp_path / "hub" / "models--somebody--something"
    for seed, commit in enumerate(COMMITS):
        torch.manual_seed(seed)
        sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 11, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
        model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    corpus = Dataset.from_dict(
        {"prompt": [[2, 3], [4]], "completion": [[5, 6], [7]], "reference_logprob": [-3.0, -2.0]}
    )
    corpus.to_parquet(tmp_path / "corpus.parquet")
    return tmp_path


def point(home, branch, commit):
    (home / "hub" / "models--somebody--something" / "refs" / branch).write_text(commit)


def score(home, folder, *options):
    command = [sys.executable, "-m", "hf_coverage", "score", "somebody/something", home / "corpus.parquet", *options]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [*map(str, command), "-o", str(home / folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_scores_of_a_branch_that_has_moved_are_not_taken_for_those_of_now(home):
    for branch, options in (("main", ()), ("tried", ("--revision", "tried"))):
        point(home, branch, COMMITS[0])
        for _ in range(2):  # the second run finds all of it
            run = score(home, branch, *options)
            assert run.returncode == 0, run.stderr
        metadata = (home / branch / "metadata.json").read_text()
        point(home, branch, COMMITS[1])
        run = score(home, branch, *options)
        assert run.returncode == 1, run.stdout
        assert "holds the scores of something else (model.weights" in run.stderr + run.stdout
        assert (home / branch / "metadata.json").read_text() == metadata
