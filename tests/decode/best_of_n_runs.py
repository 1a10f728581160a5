"""Evaluations in processes of their own: one to be killed, and two that do one together."""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.decode.best_of_n import evaluate_best_of_n
from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.inference import files, shards
from hf_coverage.inference.files import write_atomically
from tests.decode.bad_verifiers import share_of_even

K = 4


def build(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def make_corpus() -> Dataset:
    prompts = [[*[2, 3, 4][: 1 + row % 3], row] for row in range(9)]
    return Dataset.from_dict({"prompt": prompts, "level": list(range(9))})


def evaluate(folder: Path | str | None, **options) -> BestOfNResult:
    settings = {"k": K, "max_new_tokens": 5, "batch_size": 4, "shard_rows": 12, "seed": 3, "progress": False}
    return evaluate_best_of_n(
        build(), None, make_corpus(), share_of_even, output_dir=folder, name="tiny", **settings | options
    )


def die_at_write(folder: Path, number: int, **options) -> None:
    """Evaluate until that many files have been written, and be killed in the middle of the next one."""
    torch.set_num_threads(1)
    written = []

    def write(path: Path, content: bytes | str) -> None:
        if len(written) == number:
            whole = content.encode() if isinstance(content, str) else content
            path.with_name(f".{path.name}.part").write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write_atomically(path, content)

    shards.write_atomically = files.write_atomically = write
    evaluate(folder, **options)


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    for sampling, name in (("independent", ""), ("stratified", "-stratified")):
        result = evaluate(folder / f"shards{name}", sampling=sampling)
        result.to_json(folder / f"rank{accelerator.process_index}{name}.json")
    accelerator.end_training()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        die_at_write(Path(sys.argv[1]), int(sys.argv[2]), sampling=sys.argv[3], k=int(sys.argv[4]))
    elif len(sys.argv) > 2:
        die_at_write(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
