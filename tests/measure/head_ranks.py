"""Run by torchrun on two ranks: the constants of an output head and gradient norms, to compare with one process."""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.inherent_variance import gradient_norms, measure_inherent_variance


def measure() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11, n_positions=32, bos_token_id=0, eos_token_id=1)
    model, generator = GPT2LMHeadModel(config), np.random.default_rng(0)
    columns = {
        name: [generator.integers(0, 11, generator.integers(1, 9)).tolist() for _ in range(13)]
        for name in ("prompt", "completion")
    }
    corpus = Dataset.from_dict(columns)
    found = measure_inherent_variance(model, None, corpus, batch_tokens=32, progress=False)
    norms = gradient_norms(model, encode_corpus(corpus, None), batch_size=4, num_batches=3)
    return {"constants": np.array([found.feature_norm, *found.sampled, *found.expected]), "norms": norms}


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    np.savez(Path(sys.argv[1]) / f"rank{accelerator.process_index}.npz", **measure())
    accelerator.end_training()
