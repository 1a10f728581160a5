"""Run by torchrun on two ranks: rewards of groups that lie on both, for the test to compare with one process."""

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.decode.exploration import ExplorationReward, response_features
from tests.decode.exploration_runs import Record, grpo_tokenizer, grpo_trainer, make_corpus, tiny_llama

PROMPTS = [[2, 3], [4], [2, 3], [4], [2, 3], [4], [5, 6, 7], [2, 3]]
RESPONSES = [[5, 1], [5, 1], [5, 1], [6, 7, 1], [8, 1], [5, 1], [3, 3, 3, 1], [9, 9, 1]]
MINE = (slice(0, 3), slice(3, 8))


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def grpo_step(folder: Path) -> dict:
    """A group of four completions, two on each rank."""
    warnings.simplefilter("ignore", FutureWarning)
    model, record = tiny_llama(vocab_size=400), Record()
    rewards = [ExplorationReward(model, grpo_tokenizer()), record]
    trainer = grpo_trainer(folder, model, rewards, ["one two"], per_device_train_batch_size=2)
    trainer.train()
    logged = list(trainer._logs["rewards"]["exploration_reward"])
    return {name: record.given[name] for name in ("prompts", "completion_ids")} | {"logged": logged}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    mine = MINE[accelerator.process_index]
    given = {"prompts": PROMPTS[mine], "completion_ids": RESPONSES[mine]}
    sharded = build()
    for block in sharded.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    results = {
        "whole": ExplorationReward(build(), None)(**given),
        "sharded": ExplorationReward(sharded, None)(**given),
        "features": response_features(build(), None, make_corpus()).tolist(),
    }
    results |= grpo_step(folder / "grpo")
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
