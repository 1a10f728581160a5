"""Models and tokenizers by one description of how they are loaded."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_coverage.inference.loading import ModelOptions, load_model, load_tokenizer, model_name


@pytest.fixture
def folder(tmp_path):
    """A model in bfloat16 with a tokenizer of two words, and another tokenizer of three."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=3, n_positions=8))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for name, words in (("model", "ab"), ("other", "abc")):
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_weights_are_loaded_in_the_format_asked_for_and_in_evaluation_mode(folder, dtype, expected):
    model = load_model(str(folder / "model"), ModelOptions(dtype=dtype, device="cpu"))
    assert not model.training
    assert {(weight.dtype, weight.device.type) for weight in model.parameters()} == {(expected, "cpu")}


def test_the_tokenizer_is_the_model_s_unless_another_is_named(folder):
    name, other = str(folder / "model"), str(folder / "other")
    assert len(load_tokenizer(name, ModelOptions())) == 2
    assert len(load_tokenizer(name, ModelOptions(tokenizer=other))) == 3


def test_the_model_s_files_are_those_asked_for_and_another_tokenizer_s_and_model_s_its_own(monkeypatch):
    asked = {}
    network = torch.nn.Linear(1, 1)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **how: (asked.update({name: how}), network)[1]
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **how: asked.update({name: how}))
    options = ModelOptions(tokenizer="words", revision="v2", gguf_file="q4.gguf", device="cpu")
    load_model("model", options)
    load_model("teacher", options.for_another_model())
    load_tokenizer("model", options)
    files = {"revision": "v2", "gguf_file": "q4.gguf"}
    assert asked["model"] == {"dtype": "auto"} | files
    assert asked["teacher"] == {"dtype": "auto", "revision": None, "gguf_file": None}
    assert asked["words"] == {}
    load_tokenizer("model", ModelOptions(revision="v2", gguf_file="q4.gguf"))
    assert asked["model"] == files


def test_models_are_called_after_their_hub_id_their_folder_or_their_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert model_name("org/model", ModelOptions()) == "org/model"
    assert model_name("model/../model/", ModelOptions()) == "model"
    assert model_name("model", ModelOptions(gguf_file="files/q4.gguf")) == "q4"
