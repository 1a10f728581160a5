"""The same number from every architecture, however its rows are batched, shared and cut."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.measure.scoring import score_encoded

VOCABULARY = 37
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Name: configuration class, its arguments, whether responses of one prompt can share its cache.
ARCHITECTURES = {
    "llama": ("LlamaConfig", _SMALL, True),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_layer": 2, "n_embd": 16, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        True,
    ),
    "gpt_neo": (  # local attention by place in the cache
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        True,
    ),
    "opt": (  # positions from the mask
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
        },
        True,
    ),
    "bloom": (  # ALiBi
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        True,
    ),
    "qwen3": ("Qwen3Config", _SMALL, True),
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": 6}, True),
    "gemma2": (  # soft-capped logits
        "Gemma2Config",
        {**_SMALL, "sliding_window": 6, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        True,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_SMALL, "num_hidden_layers": 6, "sliding_window": 6, "query_pre_attn_scalar": 8},
        True,
    ),
    "granite": ("GraniteConfig", {**_SMALL, "logits_scaling": 0.25}, True),
    "cohere": ("CohereConfig", {**_SMALL, "logit_scale": 4.0}, True),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, True),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0},
        False,
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_SMALL, "lru_width": 16, "attention_window_size": 6, "num_hidden_layers": 3},
        False,
    ),
}


def build(name: str) -> PreTrainedModel:
    config_class, arguments, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():  # the usual initialisation gives nearly uniform distributions, which hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def corpus(seed: int = 0) -> EncodedCorpus:
    """Repeated prompts of equal and unequal lengths, one-token and long responses, one prompt alone."""
    generator = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return generator.integers(3, VOCABULARY, length).tolist()

    prompts = [tokens(17)] * 4 + [tokens(17)] * 3 + [tokens(16)] * 3 + [tokens(9)] * 2 + [tokens(1), tokens(23)]
    lengths = [5, 1, 8, 3, 4, 4, 1, 1, 2, 6, 1, 1, 7, 12]
    return EncodedCorpus(prompts, [tokens(length) for length in lengths])


@torch.no_grad()
def oracle(model: PreTrainedModel, encoded: EncodedCorpus) -> np.ndarray:
    """One row at a time, all logits, float64 log-softmax."""
    result = []
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        result.append(logprobs[torch.arange(len(completion)), completion].sum().item())
    return np.array(result)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_of_batching_gives_the_oracles_numbers(name: str) -> None:
    model, encoded = build(name), corpus()
    expected = oracle(model, encoded)
    one_position = VOCABULARY * 8
    for arguments in (
        {},
        {"share_prefixes": False},
        {"batch_tokens": 1},
        {"batch_tokens": 40},
        {"logits_memory": one_position},  # every position in a pass of its own
        {"logits_memory": 5 * one_position},
        {"logits_memory": 5 * one_position, "share_prefixes": False, "batch_tokens": 40},
    ):
        np.testing.assert_allclose(
            score_encoded(model, encoded, **arguments).logprob, expected, atol=1e-4, err_msg=f"{arguments}"
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharing_is_decided_by_the_cache_the_model_returns(name: str) -> None:
    model = build(name)
    with inference(model):
        assert HeadForward(model).probe().repeatable == ARCHITECTURES[name][2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_is_called_alone_only_where_the_model_adds_nothing(name: str) -> None:
    model = build(name)
    with inference(model):
        assert HeadForward(model).probe().plain_head == (
            name not in ("gemma2", "granite", "cohere", "recurrent_gemma")
        )
