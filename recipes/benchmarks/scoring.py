"""Scoring speed and memory beside lm-evaluation-harness, and beside the bare model calls that scoring needs.

    python -m recipes.benchmarks.scoring --output-dir runs/scoring

Runs on SmolLM2-135M in float32, everything in one process, the contenders taking turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import lm_eval
import numpy as np
import torch
import transformers
import typer
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, PreTrainedModel

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import peak_memory, processors, settle_memory, write_facts
from recipes.smollm2 import load_model, load_tokenizer
from recipes.tables import show


@dataclass(frozen=True)
class Row:
    """One contender on one corpus.

    Args:
        corpus: Which corpus.
        contender: Who.
        seconds: Median wall time of its runs.
        cpu_seconds: Median processor time of all its threads: what a busy machine changes least.
        ratio: Its wall time over this library's.
        cpu_ratio: Its processor time over this library's.
        extra_bytes: Peak resident memory of a run above what was resident before.
    """

    corpus: str
    contender: str
    seconds: float
    cpu_seconds: float
    ratio: float
    cpu_ratio: float
    extra_bytes: int


def make_corpus(prompts: int, responses: int, prompt_tokens: int, response_tokens: int, seed: int) -> EncodedCorpus:
    """Random ids: what a token says has no influence on what it costs."""
    generator = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return generator.integers(100, 49_000, length).tolist()

    drawn = [tokens(prompt_tokens) for _ in range(prompts)]
    return EncodedCorpus(
        [prompt for prompt in drawn for _ in range(responses)],
        [tokens(response_tokens) for _ in range(prompts * responses)],
    )


def harness(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, batch_size: int) -> Callable:
    contender = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def score(corpus: EncodedCorpus) -> np.ndarray:
        requests = [(("", ""), *pair) for pair in zip(corpus.prompts, corpus.completions)]
        return np.array([logprob for logprob, _ in contender._loglikelihood_tokens(requests, disable_tqdm=True)])

    return score


def library(model: PreTrainedModel) -> Callable:
    return lambda corpus: score_encoded(model, corpus).logprob


def bare_calls(model: PreTrainedModel, responses: int, prompts_at_once: int) -> Callable:
    """The backbone once per distinct token and the head on response positions, for corpora of one shape."""

    @torch.no_grad()
    def call(corpus: EncodedCorpus) -> np.ndarray:
        prompts = torch.tensor(corpus.prompts[::responses])
        completions = torch.tensor(corpus.completions)
        for start in range(0, len(prompts), prompts_at_once):
            outputs = model.model(prompts[start : start + prompts_at_once], use_cache=True, **{CACHE: DynamicCache()})
            model.lm_head(outputs.last_hidden_state[:, -1:])
            outputs[CACHE].batch_repeat_interleave(responses)
            own = completions[start * responses : (start + prompts_at_once) * responses, :-1]
            hidden = model.model(own, **{CACHE: outputs[CACHE]}).last_hidden_state
            model.lm_head(hidden)
        return np.zeros(len(corpus))

    return call


def measure(title: str, contenders: dict[str, Callable], corpus: EncodedCorpus, rounds: int) -> list[Row]:
    """Run every contender once a round, in an order that turns around; the first is this library."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    memory = {}
    for round_ in range(rounds + 1):
        for name in list(contenders)[:: 1 if round_ % 2 else -1]:
            if round_ == 0:  # warms up, and is not timed
                memory[name] = extra_memory(contenders[name], corpus)
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name](corpus)
            runs[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {name: [statistics.median(column) for column in zip(*pairs)] for name, pairs in runs.items()}
    own_wall, own_cpu = next(iter(medians.values()))
    return [
        Row(title, name, wall, cpu, wall / own_wall, cpu / own_cpu, memory[name])
        for name, (wall, cpu) in medians.items()
    ]


def best_batch_size(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The batch size at which lm-evaluation-harness is fastest on sequences of this length."""
    corpus = make_corpus(16, 1, 192, 32, seed=1)
    seconds = {}
    for size in (1, 2, 4, 8, 16):
        score = harness(model, tokenizer, size)
        start = time.process_time()
        score(corpus)
        seconds[size] = time.process_time() - start
    return min(seconds, key=lambda size: seconds[size])


def extra_memory(contender: Callable, corpus: EncodedCorpus) -> int:
    """Peak resident bytes of a run above what was resident before it."""
    before = settle_memory()
    contender(corpus)
    return peak_memory() - before


def table_of(rows: list[Row]) -> Table:
    """One row a contender and corpus."""
    cells = [
        [row.corpus, row.contender, row.seconds, row.cpu_seconds, row.ratio, row.cpu_ratio, row.extra_bytes / 1e6]
        for row in rows
    ]
    return Table(
        ["corpus", "contender", "seconds", "CPU seconds", "ratio", "CPU ratio", "extra MB"],
        cells,
        "A ratio is a contender's time over this library's, each a median: above 1, this library is faster.",
    )


def main(
    output_dir: Annotated[Path, typer.Option(help="Where scoring.json goes.")] = Path("runs/scoring"),
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed runs of every contender.")] = 3,
    prompts: Annotated[int, typer.Option(help="Prompts with 8 responses; four times as many with one.")] = 4,
    pairs: Annotated[int, typer.Option(help="Pairs to compare with the bare model calls.")] = 1000,
    batch_size: Annotated[int | None, typer.Option(help="lm-eval's; the default tries 1 to 16.")] = None,
) -> None:
    """Compare scoring with lm-evaluation-harness, and with the bare model calls it needs."""
    torch.set_num_threads(threads)
    model, tokenizer = load_model(), load_tokenizer()
    size = batch_size or best_batch_size(model, tokenizer)
    versus = {"hf_coverage": library(model), f"lm-eval, batches of {size}": harness(model, tokenizer, size)}
    if size != 1:
        versus["lm-eval, batches of 1"] = harness(model, tokenizer, 1)
    bare = {"hf_coverage": library(model), "bare model calls": bare_calls(model, responses=4, prompts_at_once=16)}
    rows = [
        *measure("8 x 32 tokens on 192", versus, make_corpus(prompts, 8, 192, 32, seed=0), rounds),
        *measure("1 x 32 tokens on 192", versus, make_corpus(4 * prompts, 1, 192, 32, seed=0), rounds),
        *measure(f"{pairs} pairs, 4 x 8 tokens on 32", bare, make_corpus(pairs // 4, 4, 32, 8, seed=0), rounds),
    ]
    show([table_of(rows)])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "lm_eval": lm_eval.__version__}
    report = {"rows": [asdict(row) for row in rows], "threads": threads, "rounds": rounds, "versions": versions}
    write_facts(output_dir / "scoring.json", report | {"machine": processors()})


if __name__ == "__main__":
    typer.run(main)
