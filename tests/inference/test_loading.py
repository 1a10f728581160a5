"""Models and tokenizers by one description of how they are loaded."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_coverage.inference.loading import (
    ModelOptions,
    load_model,
    load_tokenizer,
    load_whole,
    model_name,
    require_there,
)


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
        "hf_coverage.inference.loading.load_whole", lambda _, name, **how: (asked.update({name: how}), network)[1]
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **how: asked.update({name: how}))
    options = ModelOptions(tokenizer="words", revision="v2", gguf_file="q4.gguf", device="cpu")
    load_model("model", options)
    load_model("teacher", options.for_another_model())
    load_tokenizer("model", options)
    files = {"revision": "v2", "gguf_file": "q4.gguf"}
    plain = {"dtype": "auto", "trust_remote_code": False, "adapter": None}
    assert asked["model"] == plain | files
    assert asked["teacher"] == plain | {"revision": None, "gguf_file": None}
    assert asked["words"] == {"trust_remote_code": False}
    load_tokenizer("model", ModelOptions(revision="v2", gguf_file="q4.gguf"))
    assert asked["model"] == {"trust_remote_code": False} | files


def test_models_are_called_after_their_hub_id_their_folder_or_their_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert model_name("org/model", ModelOptions()) == "org/model"
    assert model_name("model/../model/", ModelOptions()) == "model"
    assert model_name("model", ModelOptions(gguf_file="files/q4.gguf")) == "q4"


def tiny(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=1, n_embd=4, vocab_size=3, n_positions=8))
    size = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=3, tie_word_embeddings=kind == "tied llama", **size))


def load(folder):
    return load_model(str(folder), ModelOptions(device="cpu"))


def edit(path, change):
    facts = json.loads(path.read_text())
    facts.update(change)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied llama"])
def test_a_checkpoint_without_any_one_of_its_weights_is_refused_by_name(tmp_path, kind):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    assert load(tmp_path).state_dict().keys() == model.state_dict().keys()
    for lost, weight in whole.items():
        rest = {name: value for name, value in whole.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="is not whole") as error:
            load(tmp_path)
        assert lost in str(error.value)
        save_file(rest | {lost: torch.cat([weight, weight])}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="weights of another shape for") as error:
            load(tmp_path)
        assert lost in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"no weights for model\.layers\.2\..* and 5 more"),
        ({"num_hidden_layers": 1}, r"no place for, model\.layers\.1\..* and 5 more"),
        ({"attention_bias": True}, r"no weights for model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"vocab_size": 4}, r"another shape for lm_head\.weight \(3, 4\), not \(4, 4\)"),
    ],
)
def test_a_configuration_of_another_network_is_refused(tmp_path, change, message):
    tiny("llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_what_a_checkpoint_holds_beyond_its_model_is_no_fault_but_a_bias_is(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    further = {"v_head.weight": torch.zeros(1, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(whole | further, tmp_path / "model.safetensors", {"format": "pt"})
    load(tmp_path)
    further = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(4)}
    save_file(whole | further, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for, model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(tmp_path)


# peft asks by the old name, its new one not being in all versions of transformers that it supports.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_as_whole_as_its_own_weights_and_its_base(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny("llama").save_pretrained(base)
    adapted = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    ids = torch.tensor([[0, 1, 2]])
    expected = adapted.eval()(ids).logits
    torch.testing.assert_close(load(folder)(ids).logits, expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)
    for path in (folder / "adapter_model.safetensors", base / "model.safetensors"):
        whole = load_file(path)
        lost = next(iter(whole))
        save_file({name: value for name, value in whole.items() if name != lost}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"checkpoint {path.parent} is not whole"):
            load(folder)
        save_file(whole, path, {"format": "pt"})


def test_the_class_may_be_chosen(folder):
    assert type(load_whole(GPT2LMHeadModel, str(folder / "model"))) is GPT2LMHeadModel


@pytest.mark.parametrize(
    "name", ["here/missing", "./there", "weights.gguf", "here/missing.safetensors", "a/b/c", "a/b.jsonl"]
)
def test_what_is_a_path_is_said_to_be_missing_before_the_hub_is_asked(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {name}"):
        require_there(name)
    for ours in ("here/there", "./here", "org/model", "gpt2", "org/Model2.5-0.5B"):
        require_there(ours)
