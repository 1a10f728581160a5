"""What the tests of verifiers share."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from tests.measure.small_tokenizers import with_chat


@pytest.fixture
def reward_model():
    """A tiny reward model and its tokenizer, which has a chat template."""
    torch.manual_seed(0)
    tokenizer = with_chat()
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=64, num_labels=1, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).eval(), tokenizer
