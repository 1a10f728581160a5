"""The figures of a comparison."""

from pathlib import Path

import numpy as np

from hf_coverage import CoverageProfile
from hf_coverage.functional.checks import metric_key
from hf_coverage.functional.predictiveness import RankCorrelations
from hf_coverage.plots import COLORS, new_axes, plot_training_curves, save_figure
from hf_coverage.report.html import Picture
from hf_coverage.select.predictiveness import predictiveness
from recipes.reasoning.choices import CROSS_ENTROPY, Checkpoints, choose

__all__ = ["draw"]


def draw(
    folder: Path, profiles: list[CoverageProfile], checkpoints: Checkpoints, found: RankCorrelations
) -> list[Picture]:
    """Draw Pass@N over the steps, what the measures are worth as guides to it, and the profiles of what is chosen."""
    draw_choices(folder / "choices.png", checkpoints)
    draw_correlations(folder / "correlations.png", found, checkpoints)
    steps, kl = checkpoints.steps[1:], [profile.kl for profile in profiles[1:]]
    levels = checkpoints.n[::2][:3]
    curves = [(f"Cov$_{{{metric_key(n)}}}$", [profile.cov(n) for profile in profiles[1:]]) for n in levels]
    plot_training_curves(steps, kl, curves, folder / "curves.png")
    shown = checkpoints.pass_at[::2][:3]  # more panels cannot be read
    predictiveness(profiles[1:], shown, checkpoints.n).plot(folder / "predictiveness.png")
    chosen = choose(checkpoints)
    notable = sorted({0, chosen[CROSS_ENTROPY], chosen[f"best Pass@{max(checkpoints.pass_at)}"], len(profiles) - 1})
    first, *others = [profiles[index] for index in notable]
    first.plot(folder / "profiles.png", others=others)
    return [
        Picture(
            folder / "choices.png",
            "Exact Pass@N over the training steps; the dashed line is the checkpoint with the least cross-entropy, "
            "dots are those with the least Cov_N at the N of their curve (for Pass@1 the least N there is).",
        ),
        Picture(
            folder / "correlations.png",
            "Rank correlation of each measure with Pass@N over the checkpoints, with a bootstrap's range over "
            "questions.",
        ),
        Picture(folder / "curves.png", "KL and Cov_N over the training steps; dots mark the best checkpoint."),
        Picture(folder / "predictiveness.png", "Pass@N of the checkpoints against Cov_N and KL; hollow: the first."),
        Picture(
            folder / "profiles.png",
            "Coverage profiles of the model as it came, of the checkpoints that cross-entropy and the largest Pass@N "
            "take, and of the last one: the share of questions whose right answer has probability 1/N or less.",
        ),
    ]


def draw_choices(path: Path, checkpoints: Checkpoints) -> None:
    """Draw Pass@N over the steps of the training, with the choices of cross-entropy and of Cov_N."""
    figure, (ax,) = new_axes()
    chosen = choose(checkpoints)
    for n, color in zip(checkpoints.pass_at, COLORS):
        passes = checkpoints.passes(n).mean(axis=1)
        ax.plot(checkpoints.steps[1:], passes[1:], color=color, linewidth=1.8, label=f"Pass@{n}")
        level = min(checkpoints.n, key=lambda value: abs(value - n))
        index = chosen[f"least Cov_{metric_key(level)}"]
        ax.plot(checkpoints.steps[index], passes[index], "o", color=color, markersize=7, markeredgecolor="white")
    ax.axvline(checkpoints.steps[chosen[CROSS_ENTROPY]], color="#777777", linestyle="--", linewidth=1.2)
    ax.plot([], [], "--", color="#777777", label="least cross-entropy")
    ax.plot([], [], "o", color="#777777", markeredgecolor="white", label="least Cov$_N$ at the curve's N")
    ax.set_xlabel("training step")
    ax.set_ylabel("Pass@N (higher is better)")
    ax.set_ylim(0, 1)
    figure.legend(loc="outside right center", frameon=False)
    save_figure(figure, path)


def draw_correlations(path: Path, found: RankCorrelations, checkpoints: Checkpoints) -> None:
    """Draw the rank correlation of cross-entropy and of every other Cov_N with each Pass@N."""
    guides = ["cross-entropy", *(f"Cov_{metric_key(n)}" for n in checkpoints.n[::2])]
    figure, (ax,) = new_axes()
    for place, (guide, color) in enumerate(zip(guides, ["#000000", *COLORS])):
        row = found.guides.index(guide)
        spread = np.abs(np.array([found.low[row], found.high[row]]) - found.values[row])
        # side by side, so that no interval hides another
        at = np.arange(len(found.outcomes)) + 0.09 * (place - (len(guides) - 1) / 2)
        label = guide.replace("Cov_", "Cov$_{") + ("}$" if "Cov_" in guide else "")
        ax.errorbar(at, found.values[row], yerr=spread, color=color, marker="o", markersize=5, capsize=2, label=label)
    ax.axhline(0, color="#777777", linewidth=0.8)
    ax.set_xticks(range(len(found.outcomes)), found.outcomes)
    ax.set_ylim(-1.05, 1.05)
    ax.set_ylabel("rank correlation (-1: perfect guide, above 0: misleads)")
    figure.legend(loc="outside right center", frameon=False)
    save_figure(figure, path)
