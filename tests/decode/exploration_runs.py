"""Corpora, models and trainers that the tests of exploration share."""

import copy

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tests.measure.small_tokenizers import CHAT_TEMPLATE, gpt2_like


def make_corpus(rows=24, vocabulary=11):
    """Prompts of several lengths that repeat, responses of 1 to 9 tokens, some rows equal to others."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocabulary, length).tolist() for length in (2, 9, 9, 20)]
    pairs = [
        (prompts[generator.integers(4)], generator.integers(0, vocabulary, generator.integers(1, 10)).tolist())
        for _ in range(rows)
    ]
    pairs += pairs[:3]
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


@torch.no_grad()
def features_by_definition(model, prompt, response, *, padding=0, side="left"):
    """Mean over the response's tokens of the last hidden state, from one masked forward pass of one row."""
    ids = torch.tensor([prompt + response])
    pad = torch.zeros((1, padding), dtype=torch.long)
    parts, masks = [pad, ids], [pad, torch.ones_like(ids)]
    if side == "right":
        parts, masks = parts[::-1], masks[::-1]
    mask = torch.cat(masks, dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(torch.cat(parts, dim=1), attention_mask=mask, position_ids=positions, output_hidden_states=True)
    end = ids.shape[1] + (padding if side == "left" else 0)
    return output.hidden_states[-1][0, end - len(response) : end].double().mean(dim=0).numpy()


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config |= {"vocab_size": 11, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**config | {"pad_token_id": 1, "num_key_value_heads": 1} | changes)).eval()


def grpo_trainer(folder, model, rewards, prompts, **arguments):
    """A GRPO step of 8 completions in groups of 4."""
    options = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6}
    options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 3}
    options |= {"learning_rate": 0.1, "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False}
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(folder), **options | arguments),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=grpo_tokenizer(),
    )


def grpo_tokenizer():
    tokenizer = copy.deepcopy(gpt2_like())
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = "</s>", "left", CHAT_TEMPLATE
    return tokenizer


class Record:
    """A reward function that keeps what it was given; its reward is 0."""

    def __init__(self):
        self.given, self.__name__ = {}, "record"

    def __call__(self, **given):
        self.given = given
        return [0.0] * len(given["prompts"])
