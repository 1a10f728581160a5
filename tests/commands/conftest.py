"""Tiny models as folders, a corpus sampled from one of them, and the scores of the others on it."""

import functools

import pytest
import torch
import typer.testing
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.main import get_command

from hf_coverage import BestOfNResult, Choice, CoverageProfile, TournamentResult
from hf_coverage.plots import save_figure
from tests.commands.shell import PROMPTS, invoke

WORDS = ["<s>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", ".", "red", "blue"]


@pytest.fixture(scope="session", autouse=True)
def commands_made_once():
    """The command line's own commands, which the runner would make from their signatures in every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(get_command))
        yield


@pytest.fixture(scope="module", autouse=True)
def rough_figures(figures_not_arranged):
    """What a figure shows is looked at in the tests of plots."""


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """A teacher, two students and their tokenizer, as folders."""
    folder = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    config = {"vocab_size": len(WORDS), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2}
    for seed, name in enumerate(["teacher", "student", "other"]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0, initializer_range=0.3))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def measured_folder(models_folder, tmp_path_factory):
    """Prompts, the corpus sampled for them, and the scores of both students: what most commands begin with."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name in ("teacher", "student", "other"):
            (folder / name).symlink_to(models_folder / name)
        Dataset.from_dict({"prompt": PROMPTS}).to_json(folder / "prompts.jsonl")
        (folder / "text.txt").write_text("the cat sat on the mat .\na dog ran on the red mat and sat .\n" * 4)
        invoke("sample prompts.jsonl --teacher teacher --k 6 --max-new-tokens 5 --seed 3 --output-dir corpus")
        for name in ("student", "other"):
            invoke(f"score {name} corpus --output-dir scores/{name} --shard-rows 8")
    return folder


@pytest.fixture
def work(measured_folder, tmp_path, monkeypatch):
    """An empty working folder from which the measured things can be reached."""
    for path in measured_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are written as ever, but show nothing: for what happens around them, many times over."""

    def plot(_, path=None, **options):
        return save_figure(Figure(figsize=(0.1, 0.1)), path)

    for result in (BestOfNResult, Choice, CoverageProfile, TournamentResult):
        monkeypatch.setattr(result, "plot", plot)
