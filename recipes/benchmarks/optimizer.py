"""Time of an optimizer step with a normalised gradient, beside torch's foreach SGD with clipping.

    python -m recipes.benchmarks.optimizer --output-dir runs/optimizer

Runs on SmolLM2-135M's parameters in float32, everything in one process, the contenders taking turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.optim import SGD

from hf_coverage import NormalizedGradient, NormalizedSGD
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import processors, write_facts
from recipes.smollm2 import load_model
from recipes.tables import show

LR = 1e-6


@dataclass(frozen=True)
class Row:
    """One contender.

    Args:
        contender: Who.
        milliseconds: Median wall time of a step.
        cpu_milliseconds: Median processor time of all threads in a step: what a busy machine changes least.
        ratio: Median over the rounds of its wall time over that of torch's SGD with clipping in the same round.
    """

    contender: str
    milliseconds: float
    cpu_milliseconds: float
    ratio: float


def load_parameters(device: str) -> list[nn.Parameter]:
    """SmolLM2-135M's parameters, with random gradients."""
    parameters = list(load_model().to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def clipped_sgd(parameters: list[nn.Parameter]) -> Callable[[], object]:
    optimizer = SGD(parameters, lr=LR, foreach=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step


def contenders(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """The first is what the others are measured by."""
    return {
        "torch: SGD (foreach) + clip_grad_norm_": clipped_sgd(parameters),
        "NormalizedSGD": NormalizedSGD(parameters, lr=LR, lam=1.0).step,
        "NormalizedSGD (foreach)": NormalizedSGD(parameters, lr=LR, lam=1.0, foreach=True).step,
        "NormalizedGradient(SGD (foreach))": NormalizedGradient(SGD(parameters, lr=LR, foreach=True), lam=1.0).step,
        "torch: SGD (foreach), for comparison": SGD(parameters, lr=LR, foreach=True).step,
        "NormalizedSGD in a ball around zero": NormalizedSGD(parameters, lr=LR, lam=1.0, radius=1e6).step,
    }


def measure(steps: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], object]) -> list[Row]:
    """Let every contender step once a round, in an order that turns around; the first two rounds warm up."""
    walls: dict[str, list[float]] = {name: [] for name in steps}
    cpus: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-2, rounds):
        for name in list(steps)[:: 1 if round_ % 2 else -1]:
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            synchronize()
            if round_ >= 0:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    first = next(iter(walls.values()))
    return [
        Row(
            name,
            1e3 * statistics.median(own),
            1e3 * statistics.median(cpus[name]),
            statistics.median(a / b for a, b in zip(own, first)),
        )
        for name, own in walls.items()
    ]


def host_reads(step: Callable[[], object]) -> str:
    """Whether a step waits for the GPU, by torch's own account."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def main(
    output_dir: Annotated[Path, typer.Option(help="Where optimizer.json goes.")] = Path("runs/optimizer"),
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed steps of every contender.")] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare the step time of normalised SGD with torch's SGD and clipping."""
    torch.set_num_threads(threads)
    parameters = load_parameters(device)
    steps = contenders(parameters)
    on_gpu = device.startswith("cuda")
    rows = measure(steps, rounds, torch.cuda.synchronize if on_gpu else lambda: None)
    cells = [[row.contender, row.milliseconds, row.cpu_milliseconds, row.ratio] for row in rows]
    lines = []
    report = {"rows": [asdict(row) for row in rows], "rounds": rounds, "threads": threads, "torch": torch.__version__}
    report["machine"] = torch.cuda.get_device_name() if on_gpu else processors()
    if on_gpu:
        report["host_reads"] = {name: host_reads(step) for name, step in steps.items()}
        lines = [f"{name} waits for the GPU: {why}" for name, why in report["host_reads"].items()]
    show([Table(["contender", "ms", "CPU ms", "ratio"], cells)], lines)
    write_facts(output_dir / "optimizer.json", report)


if __name__ == "__main__":
    typer.run(main)
