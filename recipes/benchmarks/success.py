"""How true Pass@N beyond the samples is: the range that counts allow, and four models, on laws that are known.

    python -m recipes.benchmarks.success --output-dir runs/success

Prompts draw their success probabilities from four laws; 16 or 64 samples of each are counted, and Pass@N at 4, 16 and
64 times as many is predicted. The truth is the law's own Pass@N. Within the samples, intervals of Pass@k with few
prompts are counted too.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from huggingface_hub.utils import tqdm

from hf_coverage.decode.success import SuccessProfile
from hf_coverage.functional.checks import FloatArray
from hf_coverage.report.table import Table
from recipes.benchmarks.machine import write_facts
from recipes.tables import show, write_tables

LAWS: dict[str, Callable[[np.random.Generator, int], FloatArray]] = {
    "Beta(.05, 1)": lambda rng, size: rng.beta(0.05, 1, size),
    "half 0, half .1": lambda rng, size: np.where(rng.random(size) < 0.5, 0.0, 0.1),
    "U^5, U uniform": lambda rng, size: rng.random(size) ** 5,
    "log-normal(-5, 2)": lambda rng, size: np.minimum(np.exp(rng.normal(-5, 2, size)), 1.0),
}
MODELS = ("beta-binomial", "scaled beta-binomial", "power law", "any law")
FACTORS = (4, 16, 64)


def pass_at(p: FloatArray, n: int) -> float:
    """Mean of `1 - (1-p)^n`."""
    return float(-np.expm1(n * np.log1p(-np.minimum(p, 1 - 1e-16))).mean())


def beyond(law: str, k: int, prompts: int, draws: int, slow_draws: int, seed: int) -> list[list[object]]:
    """A row for each N: how often the range holds the truth, its median width, and each model's median error."""
    draw = LAWS[law]
    rng = np.random.default_rng(seed)
    p = draw(rng, 2_000_000)
    truth = {factor: pass_at(p, factor * k) for factor in FACTORS}
    held = {factor: [] for factor in FACTORS}
    widths = {factor: [] for factor in FACTORS}
    errors = {(factor, model): [] for factor in FACTORS for model in MODELS}
    for number in tqdm(range(draws), desc=f"{law}, k = {k}"):
        success = SuccessProfile.from_counts(rng.binomial(k, draw(rng, prompts)), k)
        for factor in FACTORS:
            _, low, high = success.predict(factor * k)
            held[factor].append(low <= truth[factor] <= high)
            widths[factor].append(high - low)
            for model in MODELS if number < slow_draws else ():
                errors[factor, model].append(abs(success.predict(factor * k, model=model).value - truth[factor]))
    return [
        [law, k, factor * k, truth[factor], float(np.mean(held[factor])), float(np.median(widths[factor]))]
        + [float(np.median(errors[factor, model])) for model in MODELS]
        for factor in FACTORS
    ]


def within(law: str, k: int, prompts: int, draws: int, seed: int) -> list[object]:
    """How often the interval of Pass@k holds the truth."""
    rng = np.random.default_rng(seed)
    truth = pass_at(LAWS[law](rng, 2_000_000), k)
    held = []
    for _ in range(draws):
        success = SuccessProfile.from_counts(rng.binomial(k, LAWS[law](rng, prompts)), k)
        low, high = success.interval(k)
        held.append(low <= truth <= high)
    return [law, k, prompts, truth, float(np.mean(held))]


def main(
    output_dir: Annotated[Path, typer.Option()],
    draws: int = 300,
    slow_draws: int = 50,
    prompts: int = 200,
    seed: int = 0,
) -> None:
    """Simulate, print both tables and write them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    rows = [row for law in LAWS for k in (16, 64) for row in beyond(law, k, prompts, draws, slow_draws, seed)]
    few = [within(law, 16, size, 4 * draws, seed + 1) for law in LAWS for size in (20, 50)]
    names = [f"error: {model}" for model in MODELS]
    tables = [
        Table(
            ["law", "k", "N", "truth", "range holds", "width", *names],
            rows,
            f"Pass@N beyond k samples of {prompts} prompts, {draws} draws: share of ranges with the truth, median "
            f"width, and median errors ({slow_draws} draws).",
        ),
        Table(["law", "k", "prompts", "truth", "interval holds"], few, "95 % intervals of Pass@16."),
    ]
    write_tables(output_dir / "tables.md", tables)
    write_facts(output_dir / "success.json", {"rows": rows, "few": few, "cpu_seconds": time.process_time() - start})
    show(tables)


if __name__ == "__main__":
    typer.run(main)
