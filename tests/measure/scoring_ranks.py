"""Run by torchrun on two ranks: scores every way a job can be set up, for the test to compare with one process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.fingerprint import weight_fingerprint
from hf_coverage.measure.scoring import score_encoded, score_responses, score_rules

ROW_COUNTS = (1, 2, 5, 14)


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def make_corpus(rows: int) -> EncodedCorpus:
    """Prompts that repeat; some responses longer than the memory of `score` holds, so that passes differ in number."""
    generator = np.random.default_rng(rows)

    def tokens(length: int) -> list[int]:
        return generator.integers(0, 11, length).tolist()

    pool = [tokens(length) for length in (9, 9, 20)]
    return EncodedCorpus(
        [pool[generator.integers(3)] for _ in range(rows)], [tokens(1 + 5 * (row % 4)) for row in range(rows)]
    )


RULES = {
    "head": TTTConfig(0.3, on_prompt=True),
    "lora": TTTConfig(0.3, scope="lora", rank=2, cache="stale", on_prompt=True),
    "all": TTTConfig(0.03, scope="all"),
}


def score(model: torch.nn.Module, rows: int, ttt: TTTConfig | None = None) -> np.ndarray:
    return score_encoded(model, make_corpus(rows), batch_tokens=60, logits_memory=7 * 11 * 8, ttt=ttt).logprob


def score_to(model: torch.nn.Module, folder: Path) -> np.ndarray:
    encoded = make_corpus(14)
    corpus = Dataset.from_dict({"prompt": encoded.prompts, "completion": encoded.completions})
    return np.array(score_responses(model, None, corpus, output_dir=folder, shard_rows=4)["logprob"][:])


def score_several_to(model: torch.nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """Under heads, one of which diverges, and one with adapters; `lr 0.1` goes on."""
    encoded = make_corpus(14)
    corpus = Dataset.from_dict({"prompt": encoded.prompts, "completion": encoded.completions})
    rules = {"lr 0.1": TTTConfig(0.1), "head": RULES["head"], "diverging": TTTConfig(3e38, num_steps=3)}
    rules["lora"] = RULES["lora"]
    options = {"output_dir": folder, "shard_rows": 4, "progress": False}
    scores = score_rules(model, None, corpus, {"lr 0.1": rules["lr 0.1"]}, **options)
    scores |= score_rules(model, None, corpus, rules, **options)
    return {f"several {name}": scored.logprob for name, scored in scores.items()}


def error_of(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    model = build()
    results = {f"plain {rows}": score(model, rows) for rows in ROW_COUNTS}
    results["table"] = score_to(model, folder / "table")
    results["table again"] = score_to(model, folder / "table")
    results |= score_several_to(model, folder / "several")
    results["fingerprint"] = np.array(weight_fingerprint(model))
    damaged = folder / "table" / "scores-00001.safetensors"
    if accelerator.is_main_process:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    results["error"] = np.array(error_of(score_to, model, folder / "table"))
    results |= {name: score(model, 5, rule) for name, rule in RULES.items()}
    results["ddp"] = score(DistributedDataParallel(build()), 5)

    sharded = build()
    for block in sharded.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    wrapped = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)
    for name, other in (("fsdp2", sharded), ("fsdp1", wrapped)):
        results |= {f"{name} {rows}": score(other, rows) for rows in ROW_COUNTS}
        results |= {
            f"{name} {scope} error": np.array(error_of(score, other, 5, rule)) for scope, rule in RULES.items()
        }
        results[f"{name} fingerprint"] = np.array(weight_fingerprint(other))
    np.savez(folder / f"rank{accelerator.process_index}.npz", **results)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
