"""What it costs to ask a model, before it scores, whether it is what scoring takes it for.

    python -m recipes.benchmarks.self_check

Runs on SmolLM2-135M in float32, in one process: scoring with its check, and the check once more by itself, in turn.
"""

from __future__ import annotations

import statistics
import time

import typer

from hf_coverage.inference.forward import inference
from hf_coverage.inference.forward_batches import BatchPasses
from hf_coverage.measure.engine import ScoringOptions
from hf_coverage.measure.scoring import score_encoded
from recipes.benchmarks.scoring import make_corpus
from recipes.smollm2 import load_model


def main(pairs: int = 1000, prompt_tokens: int = 16, response_tokens: int = 16, rounds: int = 3) -> None:
    """Print the seconds that scoring takes with the check, less those of the check, and its share."""
    model, options = load_model(), ScoringOptions()
    corpus = make_corpus(pairs // 4, 4, prompt_tokens, response_tokens, seed=0)
    whole, asked = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        score_encoded(model, corpus)
        whole.append(time.perf_counter() - start)
        with inference(model):
            passes = BatchPasses(model, None, batch_tokens=options.batch_tokens, logits_memory=options.logits_memory)
            start = time.perf_counter()
            passes.check(corpus)
            asked.append(time.perf_counter() - start)
    total, check = statistics.median(whole), statistics.median(asked)
    print("| pairs | with the check, s | that less the check, s | share |\n|---:|---:|---:|---:|")
    print(f"| {pairs} | {total:.2f} | {total - check:.2f} | {check / total:.1%} |")


if __name__ == "__main__":
    typer.run(main)
