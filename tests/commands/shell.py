"""Commands run in this process, and what the library gives without them."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_coverage import CoverageProfile, score_responses
from hf_coverage.cli import app

PROMPTS = ["the cat", "a dog", "red mat", "blue cat sat", "the red dog"]


def invoke(command, code=0):
    """What a command prints, after checking its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/bin/hf-coverage", *shlex.split(command)])
        result = CliRunner().invoke(app, sys.argv[1:])
    assert result.exit_code == code, result.output
    return result.output


def error_line(command, code=1):
    """The one line that a failing command prints, after what progress bars left."""
    *before, last = re.split(r"[\r\n]+", invoke(command, code).strip())
    assert last.startswith("Error: ")
    assert not [line for line in before if "Error" in line or "Traceback" in line]
    return last


def results_in(folder):
    (path,) = Path(folder).glob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder, name):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "teacher")
    return GPT2LMHeadModel.from_pretrained(folder / name).eval(), tokenizer


def library_profile(folder, name):
    """The profile that the library gives without the command line."""
    corpus = load_from_disk(folder / "corpus")
    scores = score_responses(*load(folder, name), corpus, progress=False)
    return CoverageProfile.from_logprobs(
        scores["logprob"], corpus["reference_logprob"], groups=corpus["prompt"], name=name
    )
