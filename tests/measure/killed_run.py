"""A scoring run to be killed: started by the test in a process of its own."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.measure.scoring import score_responses

ROWS = 120
SHARD_ROWS = 3


def make_corpus() -> Dataset:
    generator = np.random.default_rng(0)

    def tokens() -> list[int]:
        return generator.integers(0, 11, generator.integers(1, 12)).tolist()

    return Dataset.from_dict(
        {"prompt": [tokens() for _ in range(ROWS)], "completion": [tokens() for _ in range(ROWS)]}
    )


def build(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32, bos_token_id=0, eos_token_id=1)
    )


def run(folder: Path, started=None) -> None:
    torch.set_num_threads(1)
    model, corpus = build(), make_corpus()
    if started is not None:
        started.set()
    score_responses(
        model,
        None,
        corpus,
        per_token=True,
        head_statistics=True,
        output_dir=folder,
        shard_rows=SHARD_ROWS,
        progress=False,
    )
