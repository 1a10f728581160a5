"""Run by torchrun on two ranks: samples every way a job can be set up, for the test to compare with one process."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.measure.answers import score_answers
from hf_coverage.measure.builders import sample_corpus, teacher_scored_corpus


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def sample(model: torch.nn.Module, num_prompts: int) -> dict[str, list[Any]]:
    """Batches of 3: for 1 prompt one process has nothing to do, for 5 the processes have unequally much."""
    prompts = [[2, 3, 4, 5][: 1 + row % 4] for row in range(num_prompts)]
    return sample_corpus(model, None, prompts, k=3, max_new_tokens=7, top_k=8, batch_size=3, seed=2)[:]


def answer(model: torch.nn.Module) -> dict[str, list[Any]]:
    corpus = Dataset.from_dict({"prompt": [[2], [3, 4], [5]], "answer": [[4], [5, 6], [7]]})
    return score_answers(model, None, corpus, separator=[4], samples=5, max_reasoning_tokens=6, batch_size=4)[:]


def results_of(model: torch.nn.Module) -> dict[str, dict[str, list[Any]]]:
    corpus = Dataset.from_dict({"prompt": [[2], [3, 4], [5]], "completion": [[4], [5, 6], [7]]})
    return {
        "one": sample(model, 1),
        "five": sample(model, 5),
        "answers": answer(model),
        "teacher": teacher_scored_corpus(corpus, model, None)[:],
    }


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    sharded = build()
    for block in sharded.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    results: dict[str, Any] = {
        "plain": results_of(build()),
        "ddp": results_of(DistributedDataParallel(build())),
        "fsdp2": results_of(sharded),
    }
    wrapped = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        sample(wrapped, 1)
    except TypeError as error:
        results["fsdp1"] = str(error)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
