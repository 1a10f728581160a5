"""Time and memory of test-time training while sampling, beside plain sampling and beside autograd on a copied head.

    python -m recipes.benchmarks.ttt --output-dir runs/ttt
    python -m recipes.benchmarks.ttt --scopes --tokens 32 --rounds 1 --output-dir runs/ttt_scopes

Runs on SmolLM2-135M in float32 through `generate`, everything in one process, the contenders taking turns.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from hf_coverage.report.table import Table
from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.processor import TTTLogitsProcessor
from recipes.benchmarks.machine import peak_memory, processors, settle_memory, write_facts
from recipes.smollm2 import load_model
from recipes.tables import show

LR = 1e-4
TOP_K = 128
BATCHES = (1, 8)
NAIVE = "autograd, prefix read again"


@dataclass(frozen=True)
class Row:
    """One contender.

    Args:
        contender: Who.
        batch: Sequences at once.
        seconds: Median wall time.
        cpu_seconds: Median processor time of all threads: what a busy machine changes least.
        ratio: Median over the rounds of its wall time over that of plain sampling of the same batch.
        cpu_ratio: The same of processor times.
        extra_bytes: Peak resident memory of a run above what was resident before.
    """

    contender: str
    batch: int
    seconds: float
    cpu_seconds: float
    ratio: float
    cpu_ratio: float
    extra_bytes: int


class AutogradHead(LogitsProcessor):
    """What one would write first: a copy of the head, changed by its gradient after every token; one sequence."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = copy.deepcopy(model.lm_head).requires_grad_(True)
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.handle = model.lm_head.register_forward_pre_hook(self.note)

    def note(self, head: torch.nn.Module, args: tuple[Tensor]) -> None:
        """Keep the head's last input."""
        self.hidden = args[0][:, -1]

    @torch.enable_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Step on the last token, and return the logits of the head as it then is."""
        if self.logits is not None:
            logprob = self.logits.log_softmax(-1)[0, input_ids[0, -1]]
            (gradient,) = torch.autograd.grad(logprob, [self.head.weight])
            with torch.no_grad():
                self.head.weight.add_(gradient, alpha=LR)
        self.logits = self.head(self.hidden)
        return self.logits.detach()


def contenders(model: PreTrainedModel, batch: int, *, scopes: bool) -> dict[str, Callable[[int], None]]:
    """What makes so many tokens, by name; the first is what the others are measured by.

    Args:
        model: The model.
        batch: Sequences at once.
        scopes: Whether to compare what can be trained, and not ways to train the head.
    """
    prompt = torch.randint(100, 49_000, (batch, 32), generator=torch.Generator().manual_seed(0))

    def generate(tokens: int, **settings: object) -> None:
        torch.manual_seed(0)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        model.generate(prompt, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, **sampling, **settings)

    def processor(tokens: int, **settings: object) -> None:
        with TTTLogitsProcessor(model, LR, **settings) as ttt:
            generate(tokens, logits_processor=[ttt])

    def autograd(tokens: int, **settings: object) -> None:
        ttt = AutogradHead(model)
        try:
            generate(tokens, logits_processor=[ttt], **settings)
        finally:
            ttt.handle.remove()

    runs: dict[str, Callable[[int], None]] = {"plain sampling": generate}
    if scopes:
        for scope, cache in product(("lora", "all"), ("stale", "exact")):
            settings = {"ttt_lr": LR, "ttt_scope": scope, "ttt_cache": cache}
            runs[f"{scope}, {cache} cache"] = partial(generate, custom_generate=ttt_generate, **settings)
        return runs
    runs |= {
        "TTTLogitsProcessor": processor,
        f"TTTLogitsProcessor, top_k={TOP_K}": lambda tokens: processor(tokens, top_k=TOP_K),
        "TTTLogitsProcessor, radius=1": lambda tokens: processor(tokens, radius=1.0),
        "ttt_generate": lambda tokens: generate(tokens, custom_generate=ttt_generate, ttt_lr=LR),
    }
    if batch == 1:
        runs["autograd, cache kept"] = autograd
        runs[NAIVE] = lambda tokens: autograd(tokens, use_cache=False)
    return runs


def measure(runs: dict[str, Callable[[int], None]], batch: int, tokens: int, rounds: int) -> list[Row]:
    """Run every contender once a round, in an order that turns around; the slowest one in the first round only."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    memory = dict.fromkeys(runs, 0)
    for run in runs.values():
        run(4)  # warms up
    for round_ in range(rounds):
        for name in list(runs)[:: 1 if round_ % 2 else -1]:
            if name == NAIVE and round_ > 0:
                continue
            before = settle_memory()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name](tokens)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            memory[name] = max(memory[name], peak_memory() - before)
    first = next(iter(times.values()))
    rows = []
    for name, own in times.items():
        ratios = [[a / b for a, b in zip(mine, plain)] for mine, plain in zip(own, first)]
        medians = [statistics.median(column) for table in (own, ratios) for column in zip(*table)]
        rows.append(Row(name, batch, *medians, memory[name]))
    return rows


def main(
    output_dir: Annotated[Path, typer.Option(help="Where ttt.json goes.")] = Path("runs/ttt"),
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed runs of every contender.")] = 3,
    tokens: Annotated[int, typer.Option(help="New tokens of every sequence.")] = 256,
    scopes: Annotated[
        bool, typer.Option("--scopes", help="Adapters and all parameters, instead of the head.")
    ] = False,
) -> None:
    """Compare sampling with and without test-time training."""
    torch.set_num_threads(threads)
    model = load_model()
    rows = []
    for batch in BATCHES:
        rows += measure(contenders(model, batch, scopes=scopes), batch, tokens, rounds)
    cells = [
        [row.contender, row.batch, row.seconds, row.cpu_seconds, row.ratio, row.cpu_ratio, row.extra_bytes / 1e6]
        for row in rows
    ]
    show([Table(["contender", "batch", "s", "CPU s", "ratio", "CPU ratio", "extra MB"], cells)])
    report = {"rows": [asdict(row) for row in rows], "tokens": tokens, "rounds": rounds, "threads": threads}
    report |= {"torch": torch.__version__, "transformers": transformers.__version__}
    write_facts(output_dir / "ttt.json", report | {"machine": processors()})


if __name__ == "__main__":
    typer.run(main)
