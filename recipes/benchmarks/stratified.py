"""Time and memory of stratified sampling, beside plain sampling.

    python -m recipes.benchmarks.stratified --output-dir runs/stratified_cost

Runs through `generate` in float32, everything in one process, the contenders taking turns: SmolLM2-135M, with a
vocabulary of 49,152, and a model of the shape of Gemma 3 270M with random weights, with one of 262,144.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from hf_coverage.decode.stratified import stratified_generate
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import processors, write_facts
from recipes.benchmarks.ttt import measure
from recipes.smollm2 import SMOLLM2, load_model
from recipes.tables import show

SAMPLES = 8


def gemma() -> PreTrainedModel:
    """The shape of Gemma 3 270M, with random weights: what a step costs does not depend on them."""
    torch.manual_seed(0)
    shape = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262_144, **shape)).eval()


def contenders(model: PreTrainedModel, prompts: int) -> dict[str, Callable[[int], None]]:
    """What makes so many tokens of `SAMPLES` responses to each prompt; the first is what others are measured by."""
    ids = torch.randint(100, 49_000, (prompts, 32), generator=torch.Generator().manual_seed(0))
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling |= {"num_return_sequences": SAMPLES, "eos_token_id": None, "pad_token_id": 0}

    def generate(tokens: int, **settings: object) -> None:
        torch.manual_seed(0)
        model.generate(ids, max_new_tokens=tokens, **sampling, **settings)

    def stratified(tokens: int, **settings: object) -> None:
        generate(tokens, custom_generate=stratified_generate, **settings)

    return {
        "plain sampling": generate,
        "stratified_generate": stratified,
        "with token_logprobs": lambda tokens: stratified(tokens, return_dict_in_generate=True),
    }


def main(
    output_dir: Annotated[Path, typer.Option(help="Where stratified.json goes.")] = Path("runs/stratified_cost"),
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs of every contender.")] = 3,
    tokens: Annotated[int, typer.Option(help="New tokens of every sequence.")] = 32,
) -> None:
    """Compare plain with stratified sampling."""
    torch.set_num_threads(threads)
    rows = []
    for name, load in ((SMOLLM2, load_model), ("shape of Gemma 3 270M", gemma)):
        model = load()
        for prompts in (1, 8):
            measured = measure(contenders(model, prompts), prompts * SAMPLES, tokens, rounds)
            rows += [asdict(row) | {"model": name} for row in measured]
    names = ("model", "batch", "contender", "seconds", "cpu_seconds", "ratio", "cpu_ratio")
    cells = [[*(row[name] for name in names), row["extra_bytes"] / 1e6] for row in rows]
    show([Table(["model", "batch", "contender", "s", "CPU s", "ratio", "CPU ratio", "extra MB"], cells)])
    report = {"rows": rows, "tokens": tokens, "rounds": rounds, "threads": threads, "machine": processors()}
    report |= {"torch": torch.__version__, "transformers": transformers.__version__}
    write_facts(output_dir / "stratified.json", report)


if __name__ == "__main__":
    typer.run(main)
