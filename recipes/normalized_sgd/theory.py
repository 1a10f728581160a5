"""What the theory of coverage says about SGD, on the linear models that it is about.

    python -m recipes.normalized_sgd.theory --config recipes/normalized_sgd/theory.yaml

Plain SGD, its normalised, clipped and sign relatives and token-level SGD on an instance that is hard for every step
size, over H, T and N; maximum likelihood over H; and the part of the inherent variance. Writes `table.md` and three
figures. Any value of the configuration can be given on the command line, as `--steps 500`. What was stopped goes on
where it was when the same command is given again.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hf_coverage.functional.checks import FloatArray
from hf_coverage.tasks.linear_instances import hard_instance, large_step_instance, small_step_instance
from recipes.normalized_sgd.learners import RULES, Data, ResponseLaw, train_sequences
from recipes.normalized_sgd.likelihood import bits_coverage, likelihood_scaling
from recipes.normalized_sgd.theory_findings import report
from recipes.normalized_sgd.tokenwise import adapted_coverage, train_tokens
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings

MARKS = 16
"""Iterates, evenly spaced, that an average over iterates is taken over."""
SMALL = ("SGD", "normalised SGD")
"""What is followed over T and N."""


@dataclass
class TheoryArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    n: float = field(default=16, metadata={"help": "The N of Cov_N."})
    feature_norm: float = field(default=64, metadata={"help": "B."})
    steps: int = field(default=2000, metadata={"help": "T: sequences to learn from."})
    horizons: list[int] = field(default_factory=lambda: [16, 64, 256, 1024, 4096])
    largest_rate: float = field(default=2.0, metadata={"help": "Step sizes are this one, halved again and again."})
    num_rates: int = field(default=26, metadata={"help": "How many step sizes."})
    seeds: int = field(default=16, metadata={"help": "Even seeds choose the step size, odd ones are reported."})
    token_horizons: list[int] = field(default_factory=lambda: [16, 64, 256, 1024])
    token_rates: list[float] = field(default_factory=lambda: [2.0**-10, 2.0**-8])
    token_seeds: int = field(default=8)
    token_samples: int = field(default=200, metadata={"help": "Responses to a prompt that p^TTT is judged on."})
    scaling_horizon: int = field(default=1024, metadata={"help": "H where T and N change."})
    scaling_steps: list[int] = field(default_factory=lambda: [500, 1000, 2000])
    scaling_n: list[float] = field(default_factory=lambda: [4, 16, 64])
    likelihood_rows: int = field(default=1000)
    likelihood_prompts: int = field(default=14)
    likelihood_horizons: list[int] = field(default_factory=lambda: [16, 64, 256])
    likelihood_seeds: int = field(default=200)
    bits: list[int] = field(default_factory=lambda: [16, 64, 256])
    bits_rows: int = field(default=2000)

    @property
    def rates(self) -> FloatArray:
        """The step sizes, ascending."""
        return self.largest_rate * 0.5 ** np.arange(self.num_rates)[::-1]


def main() -> None:
    settings = read_settings(sys.argv[1:], ["theory"], description=__doc__)
    args = parse_section(TheoryArguments, settings["theory"])
    output, console = Path(args.output_dir), Console()
    kept = asdict(args)
    del kept["output_dir"]
    refuse_other_settings(output, {"theory": kept})
    parts = experiments(args)
    results = {}
    for index, (name, experiment) in enumerate(parts.items()):
        start = time.monotonic()
        results[name] = remember(output / "parts", (name,), experiment)
        console.print(f"[{index + 1}/{len(parts)}] {name} ({time.monotonic() - start:.0f} s)", markup=False)
    report(output, args, results)


def experiments(args: TheoryArguments) -> dict[str, Callable[[], Any]]:
    """All experiments by name, in the order they are run in."""
    if not set(args.token_horizons) <= set(args.horizons):
        raise ValueError(f"`token_horizons` must be among `horizons`, {args.horizons}, got {args.token_horizons}.")
    parts: dict[str, Callable[[], Any]] = {}
    for horizon in args.horizons:
        parts[f"horizon-{horizon}"] = partial(over_rates, args, horizon)
    parts["steps"] = partial(over_steps, args)
    for n in args.scaling_n:
        parts[f"n-{n:g}"] = partial(over_rates, args, args.scaling_horizon, n=n, rules=SMALL)
    parts["two-instances"] = partial(two_instances, args, max(args.horizons))
    for horizon in args.likelihood_horizons:
        parts[f"likelihood-{horizon}"] = partial(
            likelihood_scaling,
            horizon,
            num_prompts=args.likelihood_prompts,
            num_rows=args.likelihood_rows,
            num_seeds=args.likelihood_seeds,
            log_n=np.log(args.n),
        )
    for bits in args.bits:
        parts[f"bits-{bits}"] = partial(over_probabilities, args, bits)
    for horizon in args.token_horizons:
        parts[f"tokens-{horizon}"] = partial(over_token_rates, args, horizon)
    return parts


def over_rates(
    args: TheoryArguments, horizon: int, *, n: float | None = None, rules: tuple[str, ...] = tuple(RULES)
) -> dict[str, Any]:
    """Cov_N `(rates, seeds)` of the last iterate and on average over iterates, for each rule."""
    n = args.n if n is None else n
    instance = hard_instance(horizon, feature_norm=args.feature_norm, n=n)
    law, data = ResponseLaw(instance), Data(instance, range(args.seeds), args.steps)
    marks = [args.steps * (mark + 1) // MARKS for mark in range(MARKS)]
    result: dict[str, Any] = {"inherent_variance": instance.inherent_variance}
    for name in rules:
        thetas = train_sequences(data, RULES[name], args.rates, log_n=np.log(n), marks=marks)
        values = law.coverage(thetas.reshape(-1, thetas.shape[-1]), np.log(n)).reshape(thetas.shape[:-1])
        result[name] = {"last": values[-1].tolist(), "average": values.mean(0).tolist()}
    return result


def over_steps(args: TheoryArguments) -> dict[str, Any]:
    """Cov_N `(T, rates, seeds)` after some numbers of steps."""
    instance = hard_instance(args.scaling_horizon, feature_norm=args.feature_norm, n=args.n)
    law, data = ResponseLaw(instance), Data(instance, range(args.seeds), max(args.scaling_steps))
    result = {}
    for name in SMALL:
        thetas = train_sequences(data, RULES[name], args.rates, log_n=np.log(args.n), marks=args.scaling_steps)
        flat = thetas.reshape(-1, thetas.shape[-1])
        result[name] = law.coverage(flat, np.log(args.n)).reshape(thetas.shape[:-1]).tolist()
    return result


def two_instances(args: TheoryArguments, horizon: int) -> dict[str, Any]:
    """The two instances as the paper has them, each made against a step size of plain SGD: Cov_N `(rates,)`.

    `large`: the instance made for this very step size, where there is one; `averaged`: there, of the mean of the
    iterates; `small`: the one with the rare prompt; `rule on ...`: another rule with its own step sizes, the worst
    over all instances made against plain SGD.
    """
    log_n, caught = np.log(args.n), args.rates[args.rates * horizon * args.feature_norm > 4]
    small = small_step_instance(horizon, rare_probability=1 / 8, n=args.n)
    data, small_law = Data(small, range(args.seeds), args.steps), ResponseLaw(small)
    result: dict[str, Any] = {"caught": caught.tolist(), "small": {}, "large": {}, "averaged": []}
    for name in SMALL:
        (thetas,) = train_sequences(data, RULES[name], args.rates, log_n=log_n, marks=[args.steps])
        flat = thetas.reshape(-1, thetas.shape[-1])
        result["small"][name] = small_law.coverage(flat, log_n).reshape(thetas.shape[:-1]).mean(-1).tolist()
    worst = np.zeros(len(args.rates))
    own = []
    for rate in caught:
        large = large_step_instance(horizon, feature_norm=args.feature_norm, step_size=rate)
        law, few = ResponseLaw(large), Data(large, [0], min(args.steps, 400))
        steps = few.prompts.shape[1]
        thetas = train_sequences(few, RULES["SGD"], np.array([rate]), log_n=log_n, marks=range(1, steps + 1))[:, 0, 0]
        own.append(law.coverage(thetas[-2:], log_n).mean())
        result["averaged"].append(law.coverage(thetas.mean(0, keepdims=True), log_n)[0])
        (others,) = train_sequences(few, RULES["normalised SGD"], args.rates, log_n=log_n, marks=[steps])
        worst = np.maximum(worst, law.coverage(others[:, 0], log_n))
    result["large"] = {"SGD": own, "normalised SGD": worst.tolist()}
    return result


def over_probabilities(args: TheoryArguments, bits: int) -> dict[str, Any]:
    """Cov_N `(probabilities, seeds)` where there are so many bits to learn."""
    probabilities = 0.5 ** np.arange(1, 13)
    values = bits_coverage(
        bits,
        probabilities=probabilities,
        num_rows=args.bits_rows,
        num_seeds=args.seeds,
        samples=2000,
        log_n=np.log(args.n),
        feature_norm=4 * np.sqrt(np.log(args.n)),
    )
    return {"probabilities": probabilities.tolist(), "coverage": values.tolist()}


def over_token_rates(args: TheoryArguments, horizon: int) -> dict[str, Any]:
    """Cov_N `(rates, seeds)` of token-level SGD as it stands, and going on while it decodes."""
    instance = hard_instance(horizon, feature_norm=args.feature_norm, n=args.n)
    rates, log_n = np.array(args.token_rates), np.log(args.n)
    thetas = train_tokens(Data(instance, range(args.token_seeds), args.steps), rates, seed=horizon)
    flat, shape = thetas.reshape(-1, thetas.shape[-1]), thetas.shape[:-1]
    judge = partial(adapted_coverage, instance, samples=args.token_samples, log_n=log_n, seed=horizon)
    return {
        "frozen": ResponseLaw(instance).coverage(flat, log_n).reshape(shape).tolist(),
        "adapted": judge(flat, np.repeat(rates, shape[1])).reshape(shape).tolist(),
        "adapted start": judge(np.tile(instance.start, (len(rates), 1)), rates).tolist(),
    }


if __name__ == "__main__":
    main()
