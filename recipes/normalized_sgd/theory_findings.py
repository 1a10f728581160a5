"""Tables and figures of what the theory's instances show."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table
from recipes.tables import show, write_tables

TTT = "token-level SGD + test-time training"
FROZEN = "token-level SGD, frozen"
FLOOR = 1e-12
"""What stands in for a Cov_N of exactly 0 in logarithms and quotients: the part of D's law that is left out."""
STYLES = {
    "SGD": (COLORS[1], "o-"),
    "normalised SGD": (COLORS[0], "s-"),
    "normalised SGD, lambda = log N": (COLORS[5], "s--"),
    "SGD, clipped": (COLORS[4], "v-"),
    "sign SGD": (COLORS[3], "x-"),
    FROZEN: (COLORS[2], "d--"),
    TTT: (COLORS[2], "d-"),
}


def report(output: Path, args: Any, results: dict[str, Any]) -> None:
    """Write `table.md` and the figures."""
    curves = horizon_curves(args, results)
    tables = [horizon_table(args, curves), slope_table(args, results, curves), constants_table(args, results)]
    lines = remarks(args, results, curves)
    write_tables(output / "table.md", tables, lines)
    draw_hard(args, results, curves, output / "hard_instance.png")
    draw_scaling(args, results, output / "scaling.png")
    draw_likelihood(args, results, output / "likelihood.png")
    show(tables, [*lines, f"Written: {output / 'table.md'} and three figures beside it"])


def best_rate(values: Any) -> tuple[int, FloatArray]:
    """The step size that is best on the even seeds, and Cov_N on the odd ones with it, from `(rates, seeds)`."""
    table = np.asarray(values)
    rate = int(table[:, ::2].mean(-1).argmin())
    return rate, table[rate, 1::2]


def horizon_curves(args: Any, results: dict[str, Any]) -> dict[str, tuple[list[int], FloatArray, FloatArray]]:
    """For each method its H, Cov_N `(H, seeds)` at its best step size, and these step sizes."""
    curves = {}
    for name in [name for name in results[f"horizon-{args.horizons[0]}"] if name in STYLES]:
        found = [best_rate(results[f"horizon-{h}"][name]["last"]) for h in args.horizons]
        curves[name] = (args.horizons, np.array([v for _, v in found]), args.rates[[r for r, _ in found]])
    for name, key in ((FROZEN, "frozen"), (TTT, "adapted")):
        found = [best_rate(results[f"tokens-{h}"][key]) for h in args.token_horizons]
        rates = np.array(args.token_rates)[[r for r, _ in found]]
        curves[name] = (args.token_horizons, np.array([v for _, v in found]), rates)
    return curves


def interval(samples: FloatArray, value: float) -> Interval:
    """The value with the 2.5 % and 97.5 % quantiles of its bootstrap."""
    return Interval(value, *np.quantile(samples, [0.025, 0.975]))


def resampled(values: FloatArray, rounds: int = 2000) -> FloatArray:
    """Means over seeds drawn with replacement, `(rounds, X)`, from `(X, S)`; the seeds of every x apart."""
    rng = np.random.default_rng(0)
    picks = rng.integers(values.shape[1], size=(rounds, *values.shape))
    return np.take_along_axis(values[None], picks, axis=2).mean(-1)


def slope(x: Any, values: FloatArray) -> Interval:
    """Slope of log mean Cov_N over log x, with a bootstrap interval over seeds."""
    design = np.log(np.asarray(x, dtype=np.float64))
    design = (design - design.mean()) / ((design - design.mean()) ** 2).sum()
    rounds, mean = np.maximum(resampled(values), FLOOR), np.maximum(values.mean(-1), FLOOR)
    return interval(np.log(rounds) @ design, float(np.log(mean) @ design))


def ratio(above: FloatArray, below: FloatArray) -> Interval:
    """Quotient of two means over seeds, with a bootstrap interval."""
    rounds = np.maximum(resampled(np.stack([above, below])), FLOOR)
    return interval(rounds[:, 0] / rounds[:, 1], float(above.mean() / max(below.mean(), FLOOR)))


def horizon_table(args: Any, curves: dict[str, Any]) -> Table:
    """Cov_N of each method at its best step size, over H."""
    rows: list[list[Cell]] = []
    for name, (horizons, values, rates) in curves.items():
        cells: dict[int, Cell] = {h: f"{v.mean():.5f}" for h, v in zip(horizons, values)}
        rows.append([name, *(cells.get(h) for h in args.horizons), slope(horizons, values), f"{rates[-1]:.2g}"])
    columns = ["method", *(f"H = {h}" for h in args.horizons), "slope in H", "step size at the largest H"]
    caption = (
        f"Cov_{metric_key(args.n)} after {args.steps} sequences of the hard instance, each method at its best step "
        "size for each H; lower is better. Slopes of log Cov_N over log H, with bootstrap ranges over seeds."
    )
    return Table(columns, rows, caption)


def slope_table(args: Any, results: dict[str, Any], curves: dict[str, Any]) -> Table:
    """How Cov_N scales with H, T and log N, beside what the theorems say."""
    rows: list[list[Cell]] = []
    for name, bound in (("SGD", "1, -1, -1"), ("normalised SGD", "0, -1 to -1/2, -1 to -1/2")):
        found = [best_rate(table)[1] for table in results["steps"][name]]
        over_n = [best_rate(results[f"n-{n:g}"][name]["last"])[1] for n in args.scaling_n]
        rows.append(
            [
                name,
                slope(*curves[name][:2]),
                slope(args.scaling_steps, np.array(found)),
                slope(np.log(args.scaling_n), np.array(over_n)),
                bound,
            ]
        )
    rows.append([TTT, slope(*curves[TTT][:2]), None, None, "0, -1 to -1/2, -1"])
    likelihood = [results[f"likelihood-{h}"] for h in args.likelihood_horizons]
    for key, label, bound in (("coverage", "maximum likelihood: Cov_N", "0"), ("kl", "maximum likelihood: KL", "1")):
        values = np.array([result[key] for result in likelihood])
        rows.append([label, slope(args.likelihood_horizons, values), None, None, bound])
    worst = np.array([worst_probability(results[f"bits-{bits}"]) for bits in args.bits])
    rows.append(["best estimator, H bits to learn", slope(args.bits, worst), None, None, "1"])
    columns = ["what", Column("in H"), Column("in T"), Column("in log N"), "theory (H, T, log N)"]
    return Table(columns, rows, "Slopes of log Cov_N (or log KL), with bootstrap ranges over seeds.")


def constants_table(args: Any, results: dict[str, Any]) -> Table:
    """What the step sizes of the theorems give, beside the best ones."""
    horizon = args.token_horizons[-1]
    part = results[f"horizon-{horizon}"]
    variance, log_n, b = part["inherent_variance"], np.log(args.n), args.feature_norm
    normal = min(1 / (128 * b), (log_n / (variance * args.steps)) ** 0.25)
    token = min(1 / (2 * b**2), (variance * args.steps) ** -0.5)
    rows: list[list[Cell]] = []
    for name, theory, rates, values in (
        ("normalised SGD", normal, args.rates, part["normalised SGD"]["last"]),
        (TTT, token, np.array(args.token_rates), results[f"tokens-{horizon}"]["adapted"]),
    ):
        rate, best = best_rate(values)
        near = int(np.abs(np.log(rates / theory)).argmin())
        there = np.asarray(values)[near, 1::2].mean()
        rows.append([name, f"{theory:.2g}", f"{there:.5f}", f"{rates[rate]:.2g}", f"{best.mean():.5f}"])
    caption = (
        f"Step sizes of Theorems 5.1 and 6.1 at H = {horizon}, T = {args.steps} (B = {b:g}, inherent variance "
        f"{variance:.0f}), with Cov_N at the nearest step size tried, and the best one."
    )
    return Table(["method", "step size of the theorem", "Cov_N", "best step size", "Cov_N there"], rows, caption)


def worst_probability(result: dict[str, Any]) -> FloatArray:
    """Cov_N `(S,)` at the probability of + that is worst on average."""
    values = np.array(result["coverage"])
    return values[values.mean(-1).argmax()]


def remarks(args: Any, results: dict[str, Any], curves: dict[str, Any]) -> list[str]:
    """Figures that fit no table."""
    largest, name = max(args.horizons), f"Cov_{metric_key(args.n)}"
    quotient = ratio(curves["SGD"][1][-1], curves["normalised SGD"][1][-1])
    two = results["two-instances"]
    small, caught = np.array(two["small"]["SGD"]), args.rates[np.isin(args.rates, two["caught"])]
    worst = small.copy()
    worst[np.isin(args.rates, caught)] = np.maximum(worst[np.isin(args.rates, caught)], two["large"]["SGD"])
    both = np.maximum(two["small"]["normalised SGD"], two["large"]["normalised SGD"])
    average = np.array(results[f"horizon-{largest}"]["SGD"]["average"])
    normal = np.array(results[f"horizon-{largest}"]["normalised SGD"]["average"])
    start = results[f"tokens-{args.token_horizons[-1]}"]["adapted start"]
    return [
        f"SGD against normalised SGD at H = {largest}: {name} is {quotient.value:.0f} times as large "
        f"(bootstrap over seeds: {quotient.low:.0f} to {quotient.high:.0f}).",
        f"On average over the iterates, at the best step size: SGD {average.mean(-1).min():.4f}, normalised SGD "
        f"{normal.mean(-1).min():.4f}.",
        f"The two instances apart, H = {largest}, rare prompt of probability 1/8: the worse of the two is at least "
        f"{worst.min():.4f} for every step size of SGD, and at most {both.min():.4f} for normalised SGD at "
        f"{args.rates[both.argmin()]:.2g}.",
        f"On the large-step instances {name} of SGD is at least {min(two['large']['SGD']):.4f}, of the mean of its "
        f"iterates at most {max(two['averaged']):.4f}.",
        f"Test-time training without any training, H = {args.token_horizons[-1]}: at best {min(start):.4f}.",
        f"Bits to learn: {name} of the best estimator, at the worst probability of the prompt, is "
        + ", ".join(f"{worst_probability(results[f'bits-{k}']).mean():.4f} ({k})" for k in args.bits)
        + "; with as few bits at every H it does not depend on H.",
    ]


def draw_hard(args: Any, results: dict[str, Any], curves: dict[str, Any], path: Path) -> None:
    """Cov_N over step sizes at three H, and at the best one over H."""
    figure, (left, right) = new_axes(2, width=5.6, height=4.4)
    chosen = [args.horizons[0], args.horizons[len(args.horizons) // 2], args.horizons[-1]]
    for horizon, line in zip(chosen, (":", "--", "-")):
        for name in ("SGD", "normalised SGD"):
            values = np.array(results[f"horizon-{horizon}"][name]["last"]).mean(-1)
            left.plot(args.rates, values, line, color=STYLES[name][0], label=f"{name}, H = {horizon}")
    left.set_xlabel("step size")
    for name, (horizons, values, _) in curves.items():
        color, style = STYLES[name]
        band(right, horizons, values, color, style, name)
    right.set_xlabel("H")
    for ax in (left, right):
        logarithmic(ax, f"Cov$_{{{metric_key(args.n)}}}$ (lower is better)")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.99))
    right.set_ylim(top=3)
    figure.suptitle("An instance that is hard for every step size of SGD: by step size, and at the best one")
    save_figure(figure, path)


def draw_scaling(args: Any, results: dict[str, Any], path: Path) -> None:
    """Cov_N over T and over N."""
    figure, (left, right) = new_axes(2, width=5.2, height=4.0)
    for name in results["steps"]:
        color, style = STYLES[name]
        found = np.array([best_rate(table)[1] for table in results["steps"][name]])
        band(left, args.scaling_steps, found, color, style, name)
        over_n = np.array([best_rate(results[f"n-{n:g}"][name]["last"])[1] for n in args.scaling_n])
        band(right, np.log(args.scaling_n), over_n, color, style, name)
    left.set_xlabel("T, sequences")
    right.set_xlabel("log N, the instance made for this N")
    for ax in (left, right):
        logarithmic(ax, "Cov$_N$ (lower is better)")
        ax.legend(frameon=False, fontsize=8)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(f"At the best step size, H = {args.scaling_horizon}; bands over seeds")
    save_figure(figure, path)


def draw_likelihood(args: Any, results: dict[str, Any], path: Path) -> None:
    """Maximum likelihood over H, and the best estimator over the bits to learn."""
    figure, (left, right) = new_axes(2, width=5.2, height=4.0)
    for key, color, label in (("kl", COLORS[1], "KL, nats"), ("coverage", COLORS[0], "Cov$_N$")):
        values = np.array([results[f"likelihood-{h}"][key] for h in args.likelihood_horizons])
        band(left, args.likelihood_horizons, values, color, "o-", label)
    left.set_title("maximum likelihood, rare prompts", fontsize=10)
    worst = np.array([worst_probability(results[f"bits-{bits}"]) for bits in args.bits])
    band(right, args.bits, worst, COLORS[1], "o-", "a bit at every position")
    few = np.repeat(worst[:1], len(args.bits), axis=0)
    band(right, args.bits, few, COLORS[0], "s-", f"{args.bits[0]} pivotal positions")
    right.set_title("the best estimator, and how many bits there are to learn", fontsize=10)
    logarithmic(left, "lower is better")
    logarithmic(right, f"Cov$_{{{metric_key(args.n)}}}$ (lower is better)")
    for ax in (left, right):
        ax.set_xlabel("H")
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def band(ax: Axes, x: Any, values: FloatArray, color: str, style: str, label: str) -> None:
    """A mean over seeds with its bootstrap band."""
    low, high = np.quantile(resampled(values), [0.025, 0.975], axis=0)
    ax.plot(x, values.mean(-1), style, color=color, label=label, markersize=4)
    ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def logarithmic(ax: Axes, label: str) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylabel(label)
