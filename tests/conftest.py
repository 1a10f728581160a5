"""Models that the tests share: a real one that comes as a package, and a tiny one that can be enumerated."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers share the cores, and a matrix product's rounding depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recipes.smollm2 import load_model, load_tokenizer


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    return load_model(), load_tokenizer()


@pytest.fixture
def tiny_gpt2():
    """A random GPT-2 over 11 tokens, small enough to enumerate all its responses."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return GPT2LMHeadModel(config).eval()
