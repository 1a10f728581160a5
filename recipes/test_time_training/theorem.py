"""Theorem 6.1 on linear models: token-level SGD that goes on while it decodes, against every proper estimator.

    python -m recipes.test_time_training.theorem --config recipes/test_time_training/theorem.yaml

A proper estimator gives a parameter of the model class and stays there. On prompts that the data did not show it has
to guess, and no guess covers a truth and its opposite; what goes on learning while it decodes does not have to guess.
Writes `theorem.md` and `theorem.png`; what was stopped goes on where it was.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from hf_coverage.functional.checks import TIE_TOLERANCE, FloatArray, metric_key
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Table
from hf_coverage.tasks.linear_instances import LinearInstance, small_step_instance
from recipes.normalized_sgd.learners import Data, ResponseLaw
from recipes.normalized_sgd.theory_findings import slope
from recipes.normalized_sgd.tokenwise import follow
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.tables import show, write_tables

TTT = "token-level SGD + test-time training"
FROZEN = "token-level SGD, frozen"
LIKELIHOOD = "maximum likelihood"
FLOOR = "no proper estimator is below"
BOUND = "bound of Theorem 6.1, without its constant"


@dataclass
class TheoremArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    num_prompts: int = field(default=12, metadata={"help": "Of probability 1/2, 1/4, ..., a coordinate each."})
    information: float = field(default=11.0, metadata={"help": "What a response tells of its coordinate, nats."})
    n: list[float] = field(default_factory=lambda: [4, 16, 64], metadata={"help": "The N of Cov_N."})
    headline_n: float = field(default=64, metadata={"help": "The one that the tables are about."})
    horizon: int = field(default=64, metadata={"help": "H where T changes."})
    steps: list[int] = field(default_factory=lambda: [125, 250, 500, 1000], metadata={"help": "T, sequences."})
    horizons: list[int] = field(default_factory=lambda: [16, 64], metadata={"help": "H, at the middle T."})
    multiples: list[float] = field(default_factory=lambda: [1, 4], metadata={"help": "Of the theorem's step size."})
    seeds: int = 16
    samples: int = field(default=200, metadata={"help": "Responses to a prompt that p^TTT is judged on."})


def main() -> None:
    settings = read_settings(sys.argv[1:], ["theorem"], description=__doc__)
    args, console = parse_section(TheoremArguments, settings["theorem"]), Console()
    output, kept = Path(args.output_dir), asdict(args)
    del kept["output_dir"]
    refuse_other_settings(output, {"theorem": kept})
    middle = args.steps[len(args.steps) // 2]
    parts = {"steps": partial(compare, args, args.horizon, args.steps)}
    parts |= {f"horizon-{horizon}": partial(compare, args, horizon, [middle]) for horizon in args.horizons}
    results = {}
    for name, experiment in parts.items():
        start = time.process_time()
        results[name] = remember(output / "parts", (name,), experiment)
        console.print(f"{name} ({time.process_time() - start:.0f} s of processor time)", markup=False)
    report(output, args, results, middle)


def rare_instance(horizon: int, *, num_prompts: int, information: float) -> LinearInstance:
    """Prompts of probability 1/2, 1/4, ..., a coordinate each, of which a response tells so many nats.

    `phi(k, a) = b a e_k` for the tokens a = -1, 0, 1; theta* = [1, ..., 1] / sqrt(K), start 0. The scale b falls like
    1 / sqrt(H), so that the inherent variance does not depend on H.
    """
    logit = 0.5 * small_step_instance(horizon, rare_probability=0.5, n=math.e, margin=information).features[3, 2, 0]
    scale, chances = logit * np.sqrt(num_prompts), 0.5 ** np.arange(1, num_prompts + 1)
    chances[-1] *= 2
    features = np.zeros((3 + num_prompts, 3, num_prompts))
    for k in range(num_prompts):
        features[3 + k, :, k] = scale * np.array([-1.0, 0.0, 1.0])
    truth = np.full(num_prompts, 1 / np.sqrt(num_prompts))
    return LinearInstance(features, np.concatenate([np.zeros(3), chances]), truth, np.zeros(num_prompts), horizon)


def compare(args: TheoremArguments, horizon: int, steps: list[int]) -> dict[str, Any]:
    """Cov_N `(T, N, seeds)` of each estimator, and what needs no seeds `(T, N)`, after each number of sequences.

    Step sizes are multiples of the theorem's for each T, `min(1 / (2 B^2), (s2 T)^(-1/2))`, the same ones in training
    and in decoding.
    """
    instance = rare_instance(horizon, num_prompts=args.num_prompts, information=args.information)
    variance, log_n = instance.inherent_variance, np.log(args.n)
    rates = np.array([min(1 / (2 * instance.feature_norm**2), (variance * t) ** -0.5) for t in steps])
    data, law = Data(instance, range(args.seeds), max(steps)), ResponseLaw(instance)
    likelihood = [[law.coverage(maximum_likelihood(data, t), value) for value in log_n] for t in steps]
    found: dict[str, Any] = {LIKELIHOOD: likelihood}
    for multiple in args.multiples:
        thetas = train(data, multiple * rates, steps, seed=horizon)
        frozen, adapted = found[named(FROZEN, multiple)], found[named(TTT, multiple)] = [], []
        for theta, rate in zip(thetas, multiple * rates):
            ratios = adapted_ratios(instance, theta, rate, samples=args.samples, seed=horizon)
            frozen.append([law.coverage(theta, value) for value in log_n])
            adapted.append([covered(instance, ratios, value) for value in log_n])
    bound = [[(np.sqrt(variance / t) + instance.feature_norm**2 / t) / value for value in log_n] for t in steps]
    floor = [[proper_floor(instance, t, value) for value in log_n] for t in steps]
    return {name: np.array(values).tolist() for name, values in (found | {BOUND: bound, FLOOR: floor}).items()} | {
        "rates": rates.tolist(),
        "inherent_variance": variance,
        "feature_norm": instance.feature_norm,
    }


def named(method: str, multiple: float) -> str:
    """A method at a multiple of the theorem's step size."""
    return method if multiple == 1 else f"{method}, {multiple:g} times the step size"


def train(data: Data, rates: FloatArray, steps: list[int], *, seed: int) -> list[FloatArray]:
    """Token-level SGD (21) `(S, d)` with the i-th step size on the first so many sequences, for all i at once."""
    rng = np.random.default_rng(seed)
    thetas = [np.tile(data.instance.start, (len(data.prompts), 1)) for _ in steps]
    for step in range(max(steps)):
        counts = data.counts[:, step].astype(np.int64)
        tokens = rng.permuted(np.array([np.repeat(np.arange(counts.shape[1]), row) for row in counts]), axis=1)
        on = [index for index, last in enumerate(steps) if step < last]
        together, _ = follow(
            data.instance,
            np.concatenate([thetas[index] for index in on]),
            np.tile(data.prompts[:, step], len(on)),
            np.tile(tokens, (len(on), 1)),
            np.repeat(rates[on], len(tokens)),
        )
        for index, theta in zip(on, np.split(together, len(on))):
            thetas[index] = theta
    return thetas


def adapted_ratios(
    instance: LinearInstance, theta: FloatArray, rate: float, *, samples: int, seed: int
) -> NDArray[np.float64]:
    """`log D - log p^TTT` `(X, S, samples)` of responses to every prompt, for each of S trained models, nats."""
    rng, found = np.random.default_rng(seed), []
    every = len(theta)
    for prompt in instance.prompts:
        prompts = np.full(samples, prompt)
        tokens = instance.sample(prompts, rng)
        _, logprobs = follow(
            instance,
            np.repeat(theta, samples, axis=0),
            np.tile(prompts, every),
            np.tile(tokens, (every, 1)),
            np.full(every * samples, rate),
        )
        found.append(instance.logprobs(prompts, tokens) - logprobs.reshape(every, samples))
    return np.array(found)


def covered(instance: LinearInstance, ratios: NDArray[np.float64], log_n: float) -> FloatArray:
    """Cov_N `(S,)` from the ratios of responses to every prompt."""
    return instance.prompt_probabilities[instance.prompts] @ (ratios >= log_n - TIE_TOLERANCE).mean(-1)


def maximum_likelihood(data: Data, steps: int) -> FloatArray:
    """The maximum-likelihood estimates `(S, d)` from the first sequences; 0 where a prompt was not seen."""
    instance = data.instance
    scale = instance.features[3, 2, 0]
    logits = np.linspace(-scale, scale, 20_001)
    means = 2 * np.sinh(logits) / (1 + 2 * np.cosh(logits))
    estimates = np.zeros((len(data.prompts), len(instance.theta)))
    for k, prompt in enumerate(instance.prompts):
        counts = (data.counts[:, :steps] * (data.prompts[:, :steps] == prompt)[..., None]).sum(1)
        seen = counts.sum(-1) > 0
        mean = (counts[seen, 2] - counts[seen, 0]) / counts[seen].sum(-1)
        estimates[seen, k] = np.interp(mean, means, logits) / scale
    return estimates


def proper_floor(instance: LinearInstance, steps: int, log_n: float) -> float:
    """What Cov_N of every proper estimator is at least, on average over the signs of the truth's coordinates.

    A prompt that no sequence shows tells nothing of its sign, and an estimate that covers one sign does not cover the
    other. Seen prompts count as covered. What is equivariant, such as SGD from 0, has the same Cov_N at all signs.
    """
    one = LinearInstance(
        instance.features[:4, :, :1], np.eye(4)[3], instance.theta[:1], instance.start[:1], instance.horizon
    )
    guesses = np.linspace(0, 1, 401)[:, None]
    law = ResponseLaw(one)
    best = 0.5 * (law.coverage(guesses, log_n) + law.coverage(-guesses, log_n)).min()
    chances = instance.prompt_probabilities[instance.prompts]
    return float(best * (chances * (1 - chances) ** steps).sum())


def report(output: Path, args: TheoremArguments, results: dict[str, Any], middle: int) -> None:
    """Write `theorem.md` and the figure."""
    tables = [steps_table(args, results["steps"]), horizon_table(args, results, middle)]
    write_tables(output / "theorem.md", tables)
    draw(args, results["steps"], output / "theorem.png")
    show(tables, [f"Written: {output / 'theorem.md'} and theorem.png beside it"])


def names_of(args: TheoremArguments) -> list[str]:
    """What is compared, in the order of the tables."""
    return [BOUND, FLOOR, LIKELIHOOD, *(named(method, times) for method in (FROZEN, TTT) for times in args.multiples)]


def steps_table(args: TheoremArguments, found: dict[str, Any]) -> Table:
    """Cov_N over T, with the slopes over T and over log N."""
    at = args.n.index(args.headline_n)
    rows: list[list[Cell]] = []
    for name in names_of(args):
        values = np.array(found[name])
        over_t, over_n = values[:, at], values[len(values) // 2]
        if values.ndim == 2:  # no seeds
            over_t, over_n = over_t[:, None], over_n[:, None]
        cells: list[Cell] = [f"{value:.2g}" for value in over_t.mean(-1)]
        slopes: list[Cell] = [
            slope(x, y) if (y.mean(-1) > 0).all() else None
            for x, y in ((args.steps, over_t), (np.log(args.n), over_n))
        ]
        rows.append([name, *cells, *slopes])
    rates = ["step size of the theorem", *(f"{rate:.2g}" for rate in found["rates"]), None, None]
    columns = ["", *(f"T = {t}" for t in args.steps), Column("slope in T"), Column("slope in log N")]
    return Table(
        columns,
        [rates, *rows],
        f"Cov_{metric_key(args.headline_n)} after T sequences of H = {args.horizon} tokens; lower is better. Inherent "
        f"variance {found['inherent_variance']:.0f}, B = {found['feature_norm']:.2g}. Slopes of its logarithm over "
        f"log T, and over log log N from N = {metric_key(args.n[0])} to {metric_key(args.n[-1])} at T = "
        f"{args.steps[len(args.steps) // 2]}, with bootstrap ranges over {args.seeds} seeds.",
    )


def horizon_table(args: TheoremArguments, results: dict[str, Any], middle: int) -> Table:
    """Cov_N over H."""
    at = args.n.index(args.headline_n)
    rows: list[list[Cell]] = []
    for name in names_of(args):
        values = [np.array(results[f"horizon-{horizon}"][name])[0, at] for horizon in args.horizons]
        rows.append([name, *(f"{np.mean(value):.2g}" for value in values)])
    return Table(
        ["", *(f"H = {horizon}" for horizon in args.horizons)],
        rows,
        f"Cov_{metric_key(args.headline_n)} after {middle} sequences over their length, the information in a response "
        "kept as it is; lower is better.",
    )


def draw(args: TheoremArguments, found: dict[str, Any], path: Path) -> None:
    """Cov_N over T and over N."""
    figure, axes = new_axes(2, width=5.4, height=4.2)
    at, middle = args.n.index(args.headline_n), len(args.steps) // 2
    styles = {BOUND: ("#999999", ":"), FLOOR: (COLORS[6], "--"), LIKELIHOOD: (COLORS[0], "s-")}
    styles |= {FROZEN: (COLORS[1], "v-"), TTT: (COLORS[2], "o-")}
    styles |= {named(TTT, times): (color, "o--") for times, color in zip(args.multiples[1:], (COLORS[3], COLORS[4]))}
    for name, (color, style) in styles.items():
        values = np.array(found[name])
        mean = values if values.ndim == 2 else values.mean(-1)
        axes[0].plot(args.steps, mean[:, at], style, color=color, label=name, markersize=5)
        axes[1].plot(args.n, mean[middle], style, color=color, markersize=5)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(bottom=1e-5)  # below it, and 0
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_xlabel("T (training sequences)")
    axes[0].set_ylabel(f"Cov$_{{{metric_key(args.headline_n)}}}$ (lower is better)")
    axes[1].set_xlabel("N")
    axes[1].set_ylabel(f"Cov$_N$ at T = {args.steps[middle]} (lower is better)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
