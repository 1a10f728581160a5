"""A model named by a branch of the Hub: when the branch moves, what was scored before is another model's."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from tests.processes import Job

SCRIPT = Path(__file__).with_name("other_cache.py")
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
    words = ["score", "somebody/something", home / "corpus.parquet", *options, "-o", home / folder]
    return Job(SCRIPT, *words, HF_HOME=str(home), COLUMNS="400").wait()


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
