"""Fingerprints change with what changes scores, and with nothing else."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_coverage.inference.fingerprint import config_fingerprint, tokenizer_fingerprint, weight_fingerprint
from tests.inference.peft_models import adapted, llama

PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def build(**arguments):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=1, **arguments)
    )


def test_equal_weights_have_equal_fingerprints_however_they_are_held():
    expected = weight_fingerprint(build())
    model = build().train()
    assert weight_fingerprint(model) == expected
    assert weight_fingerprint(nn.DataParallel(model)) == expected
    assert weight_fingerprint(torch.compile(model, backend="eager")) == expected
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data.t().contiguous().t()  # strides only
    assert weight_fingerprint(model) == expected


def test_one_bit_one_name_or_one_dtype_changes_the_fingerprint():
    expected = weight_fingerprint(build())
    model = build()
    model.transformer.wpe.weight.data[-1, -1] = torch.nextafter(
        model.transformer.wpe.weight[-1, -1], torch.tensor(9.0)
    )
    assert weight_fingerprint(model) != expected
    assert weight_fingerprint(build().to(torch.bfloat16)) != expected
    assert weight_fingerprint(nn.ModuleDict({"a": nn.Linear(2, 2)})) != weight_fingerprint(
        nn.ModuleDict({"b": nn.Linear(2, 2)})
    )


# Deprecated, but models quantised this way are about.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantised_weights_count():
    def quantised(seed):
        torch.manual_seed(seed)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))

    assert weight_fingerprint(quantised(0)) == weight_fingerprint(quantised(0))
    assert weight_fingerprint(quantised(0)) != weight_fingerprint(quantised(1))


def test_a_configuration_counts_where_it_changes_the_numbers():
    expected = config_fingerprint(build())
    assert config_fingerprint(build(use_cache=False, pad_token_id=1)) == expected
    assert config_fingerprint(build(scale_attn_by_inverse_layer_idx=True)) != expected
    assert config_fingerprint(build(layer_norm_epsilon=1e-6)) != expected


def test_tokenizers():
    def tokenizer(words=("a", "b"), **arguments):
        vocabulary = {word: index for index, word in enumerate(words)}
        model = WordLevel(vocabulary, unk_token=words[0])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **arguments)

    expected = tokenizer_fingerprint(tokenizer())
    used = tokenizer()
    used("a b", truncation=True, max_length=1)  # which leaves its settings in the tokenizer
    assert tokenizer_fingerprint(used) == expected
    assert tokenizer_fingerprint(tokenizer(words=("b", "a"))) != expected
    assert tokenizer_fingerprint(tokenizer(eos_token="b")) != expected
    assert tokenizer_fingerprint(tokenizer(chat_template="{{ messages }}")) != expected


@PEFTS_OWN
@pytest.mark.parametrize("method", ["LORA", "PREFIX_TUNING"])
def test_which_adapters_are_at_work_is_part_of_the_configuration(method):
    model = adapted(llama(), method, None)
    expected, weights = config_fingerprint(model), weight_fingerprint(model)
    assert config_fingerprint(adapted(llama(), method, None)) == expected
    with model.disable_adapter():
        assert config_fingerprint(model) != expected
        assert weight_fingerprint(model) == weights
    assert config_fingerprint(model) == expected


@PEFTS_OWN
def test_settings_of_an_adapter_are_part_of_the_configuration_and_where_it_came_from_is_not(tmp_path):
    model = adapted(llama(), "LORA", None)
    expected = config_fingerprint(model)
    assert config_fingerprint(adapted(llama(), "LORA", None, lora_alpha=16)) != expected
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    both = config_fingerprint(model)
    model.set_adapter("other")
    assert len({expected, both, config_fingerprint(model)}) == 3
    adapted(llama(), "LORA", None).save_pretrained(tmp_path)
    assert config_fingerprint(PeftModel.from_pretrained(llama(), tmp_path)) == expected
    assert config_fingerprint(model.unload()) == config_fingerprint(llama())
