"""Every way to load a model: it gives that model's numbers, says so beside them, or is refused in a sentence."""

import json
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_coverage import sample_corpus, score_responses
from hf_coverage.inference.loading import ModelOptions, load_model, load_tokenizer, loading_facts
from tests.processes import ROOT, run

# peft asks by the old name, its new one not being in all versions of transformers that it supports.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CORPUS = Dataset.from_dict({"prompt": [[1, 2, 3], [1, 2, 3], [4]], "completion": [[5, 6], [7], [6, 5, 4]]})
# Of every option another value than its default, in the words of a command line.
OTHER = {
    "tokenizer": "words",
    "revision": "step10",
    "gguf_file": "q4.gguf",
    "dtype": "bfloat16",
    "device": "cpu",
    "trust_remote_code": True,
    "device_map": "auto",
    "tp": True,
    "attn_implementation": "eager",
    "quantization": "torchao-int8-weight-only",
    "adapter": "adapter",
    "subfolder": "weights",
    "model_kwargs": '{"low_cpu_mem_usage": true}',
}
PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
PARTS |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, the same one folder deeper, and an adapter for it that has no tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, bos_token_id=0, eos_token_id=0, **sizes))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(12)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0")
    for place in (folder / "model", folder / "deep" / "weights"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    return folder


def scores(folder, name="model", **options):
    model = load_model(str(folder / name), ModelOptions(**options))
    return score_responses(model, None, CORPUS, progress=False)["logprob"][:]


def metadata(model, place):
    score_responses(model, None, CORPUS, output_dir=place, progress=False)
    return json.loads((place / "metadata.json").read_text())


def test_every_option_but_the_tokenizer_is_in_the_key():
    assert OTHER.keys() == {one.name for one in fields(ModelOptions)}
    keys = {name: ModelOptions(**{name: value}).key() for name, value in OTHER.items()}
    assert keys.pop("tokenizer") == ModelOptions().key()
    assert all(key != ModelOptions().key() and name in key for name, key in keys.items())
    assert len({json.dumps(key) for key in keys.values()}) == len(keys)


def test_what_json_says_is_in_the_key_and_not_how_it_is_written():
    one, same, other = (ModelOptions(model_kwargs=text).key() for text in ('{"a": 1}', '{"a":1}', '{"a": 2}'))
    assert one == same != other


def test_score_tables_of_models_loaded_as_ever_say_nothing_new(folder, tmp_path):
    model = load_model(str(folder / "model"), ModelOptions(dtype="float32", device="cpu"))
    own = AutoModelForCausalLM.from_pretrained(folder / "model")
    one, other = metadata(model, tmp_path / "one"), metadata(own.eval(), tmp_path / "other")
    assert one == other
    assert list(one["model"]) == ["name", "revision", "weights", "config", "dtype", "device"]


@pytest.mark.parametrize("name", ["trust_remote_code", "device_map", "attn_implementation", "adapter", "model_kwargs"])
def test_an_option_is_in_the_score_table_and_its_key(folder, tmp_path, name):
    value = str(folder / "adapter") if name == "adapter" else OTHER[name]
    metadata(load_model(str(folder / "model"), ModelOptions()), tmp_path)
    model = load_model(str(folder / "model"), ModelOptions(**{name: value}))
    assert metadata(model, tmp_path / "new")["model"]["loading"] == {
        name: {"low_cpu_mem_usage": True} if name == "model_kwargs" else value
    }
    with pytest.raises(ValueError, match=r"holds the scores of something else \(.*model\.loading"):
        score_responses(model, None, CORPUS, output_dir=tmp_path, progress=False)
    plain, draw = load_model(str(folder / "model"), ModelOptions()), {"k": 1, "max_new_tokens": 1, "progress": False}
    sample_corpus(plain, None, [[1]], output_dir=tmp_path / "samples", **draw)
    with pytest.raises(ValueError, match="loading"):
        sample_corpus(model, None, [[1]], output_dir=tmp_path / "samples", **draw)


def test_another_attention_is_known_whoever_loads_the_model(folder):
    load = AutoModelForCausalLM.from_pretrained
    assert loading_facts(load(folder / "model")) == {}
    assert loading_facts(load(folder / "model", attn_implementation="sdpa")) == {}
    assert loading_facts(load(folder / "model", attn_implementation="eager")) == {"attn_implementation": "eager"}
    assert scores(folder, attn_implementation="eager") == pytest.approx(scores(folder), abs=1e-5)


@pytest.mark.parametrize("places", ["auto", "cpu", json.dumps(PARTS), '{"": "disk"}'])
def test_a_model_spread_over_memory_and_disk_says_the_same(folder, tmp_path, places):
    assert scores(folder, device_map=places) == scores(folder)
    drawn = [
        sample_corpus(
            load_model(str(folder / "model"), ModelOptions(device_map=where)), None, [[1, 2, 3]], k=4,
            max_new_tokens=3, progress=False,
        )[:]
        for where in (places, None)
    ]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(own)
    (own / "modeling_own.py").write_text(OWN)
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own-llama"}
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (own / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    with pytest.raises(ValueError, match=r"comes with it, which may do all that you may.*`--trust-remote-code`"):
        load_model(str(own), ModelOptions())
    assert scores(tmp_path, "own", trust_remote_code=True) == scores(folder)
    before = loading_facts(load_model(str(own), ModelOptions(trust_remote_code=True)))
    (own / "modeling_own.py").write_text(OWN + "    further = 1\n")
    after = loading_facts(load_model(str(own), ModelOptions(trust_remote_code=True)))
    assert before.keys() == after.keys() == {"trust_remote_code", "code"}
    assert before["code"] != after["code"]


def test_an_adapter_is_put_on_a_model_or_named_in_its_place(folder):
    adapted = scores(folder, "adapter")
    assert adapted != pytest.approx(scores(folder), abs=1e-3)
    assert scores(folder, adapter=str(folder / "adapter")) == adapted
    assert len(load_tokenizer(str(folder / "adapter"), ModelOptions())) == 12  # its base's
    with pytest.raises(ValueError, match=r"`adapter` .* is for a model, but .* is an adapter itself: give its base"):
        scores(folder, "adapter", adapter=str(folder / "adapter"))
    with pytest.raises(ValueError, match=r"`adapter` .*model is no adapter of PEFT: it has no adapter_config\.json"):
        scores(folder, adapter=str(folder / "model"))


def test_a_model_may_be_one_folder_deeper(folder):
    options = ModelOptions(subfolder="weights")
    assert scores(folder, "deep", subfolder="weights") == scores(folder)
    assert len(load_tokenizer(str(folder / "deep"), options)) == 12


def test_what_else_is_given_reaches_the_model(folder, tmp_path):
    plain = load_model(str(folder / "model"), ModelOptions())
    other = load_model(str(folder / "model"), ModelOptions(model_kwargs='{"rms_norm_eps": 0.5}'))
    assert metadata(plain, tmp_path / "a")["model"]["config"] != metadata(other, tmp_path / "b")["model"]["config"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_kwargs": "[1]"}, "`model_kwargs` must be a JSON object, such as"),
        ({"model_kwargs": "{"}, "`model_kwargs` must be a JSON object, but is '{'"),
        ({"model_kwargs": '{"revision": "v2"}'}, "has `revision`, which is an option of its own"),
        ({"model_kwargs": '{"quantization_config": {}}', "quantization": "bnb-4bit"}, "leave it or `quantization`"),
        ({"device_map": "{1}"}, "`device_map` must be a JSON object"),
        ({"device_map": "auto", "tp": True}, "`tp` gives every process a part of each layer: leave `device_map` out"),
        ({"quantization": "int4"}, "`quantization` must be `bnb-4bit`, `bnb-8bit` or one of torchao's"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "fast"}, "Or it does not take `attn_implementation`: leave that out"),
        ({"device_map": "everywhere"}, "Or it does not take `device_map`: leave that out"),
        ({"model_kwargs": '{"no_such": 1}'}, "Or it does not take `no_such`: leave that out"),
        ({"tp": True}, "`tp` splits a model over processes, and there is one: start the command with `torchrun"),
    ],
)
def test_options_that_a_model_does_not_take_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(folder / "model"), ModelOptions(**options))


@pytest.mark.parametrize(("name", "library"), [("bnb-4bit", "bitsandbytes"), ("torchao-int8-weight-only", "torchao")])
def test_a_library_that_is_not_there_is_named_with_the_way_to_get_it(folder, monkeypatch, name, library):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=rf"`quantization` {name} needs {library}: pip install '.*\[quantization\]'"):
        load_model(str(folder / "model"), ModelOptions(quantization=name))


@pytest.mark.filterwarnings("ignore")  # of libraries about themselves
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bnb-4bit", "bitsandbytes"),
        ("bnb-8bit", "bitsandbytes"),
        ("torchao-int8-weight-only", "torchao"),
        ("torchao-int8-dynamic-activation-int8-weight", "torchao"),
        ("torchao-float8-weight-only", "torchao"),
    ],
)
def test_a_quantised_model_is_close_to_the_model_and_known_by_its_weights(folder, tmp_path, name, library):
    pytest.importorskip(library)
    one, again = (load_model(str(folder / "model"), ModelOptions(quantization=name, device="cpu")) for _ in range(2))
    here = metadata(one, tmp_path)
    assert here == metadata(again, tmp_path / "again")
    assert here["model"]["loading"] == {"quantization": name}
    plain = load_model(str(folder / "model"), ModelOptions())
    assert here["model"]["weights"] != metadata(plain, tmp_path / "plain")["model"]["weights"]
    found = score_responses(one, None, CORPUS, progress=False)["logprob"][:]
    assert found != scores(folder)
    assert found == pytest.approx(scores(folder), abs=0.2)


@pytest.mark.filterwarnings("ignore")
def test_a_quantisation_that_changes_nothing_is_refused(folder):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="left all weights as they were"):  # its groups are of 128
        load_model(str(folder / "model"), ModelOptions(quantization="torchao-int4-weight-only"))
    with pytest.raises(ValueError, match=r"would be `torchao\.quantization\.NoneSuchConfig`, which there is none of"):
        load_model(str(folder / "model"), ModelOptions(quantization="torchao-none-such"))


def test_a_model_split_over_processes_says_the_same(folder):
    printed = run(ROOT / "tests" / "inference" / "split_ranks.py", folder / "model", ranks=2)
    one, other = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert one == other
    assert one["facts"] == {"tp": True}
    assert one["logprob"] == pytest.approx(scores(folder), abs=1e-5)
    whole = load_model(str(folder / "model"), ModelOptions())
    drawn = sample_corpus(whole, None, [[1, 2, 3], [4]], k=2, max_new_tokens=3, batch_size=2, progress=False)
    assert one["completion"] == drawn["completion"][:]
    assert one["reference"] == pytest.approx(drawn["reference_logprob"][:], abs=1e-5)
