"""Drawings of a training run's checkpoints: measures over its steps, and one measure against another."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.plots.figure import (
    COLORS,
    Style,
    add_legend,
    add_title,
    axis_label,
    draw_line,
    model_styles,
    new_axes,
    save_figure,
)
from hf_coverage.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_predictiveness", "plot_training_curves"]

_BEST: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "zorder": 4}


def plot_training_curves(
    steps: ArrayLike,
    kl: ArrayLike,
    coverage: Sequence[tuple[str, ArrayLike]],
    path: str | PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw KL and coverage over the steps of a training run, the best checkpoint of each curve marked.

    Both axes begin at 0.

    Args:
        steps: `(K,)` training steps.
        kl: `(K,)` sequence-level KL, nats.
        coverage: Label and `(K,)` values of each coverage curve, at most six.
        path: File to write, its format given by the suffix; None only returns the figure.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: With no coverage curve, or more than there are distinguishable colours.

    Example:
        >>> figure = plot_training_curves([0, 10, 20], [1.2, 0.9, 0.8], [("Cov$_4$", [0.3, 0.1, 0.2])])
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['KL in nats (lower is better)', 'Cov$_N$ (lower is better)']

    References:
        arXiv 2510.15020, Figure 1 (left).
    """
    if not 1 <= len(coverage) < len(COLORS):
        raise ValueError(f"`coverage` must hold 1 to {len(COLORS) - 1} curves, but holds {len(coverage)}.")
    figure, axes = new_axes(2, width=5.2)
    labels = ("KL in nats (lower is better)", "Cov$_N$ (lower is better)")
    curves = ([("KL", kl)], coverage)
    colors, dashes = iter(COLORS), [style.line for style in model_styles([name for name, _ in coverage])]
    for ax, label, lines in zip(axes, labels, curves):
        for place, (name, values) in enumerate(lines):
            array, style = np.asarray(values, dtype=float), Style(next(colors), dashes[place])
            draw_line(ax, steps, array, style, shorten(name, 28), place, len(lines))
            best = int(array.argmin())
            ax.plot(np.asarray(steps)[best], array[best], "o", color=style.color, **_BEST)
        ax.set_xlabel("training step")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[1].plot([], [], "o", color="#777777", label="best checkpoint", **_BEST)
    add_legend(figure, axes[1])
    add_title(figure, title)
    return save_figure(figure, path)


def plot_predictiveness(
    passes: Sequence[tuple[str, ArrayLike]],
    kl: ArrayLike,
    coverage: Sequence[tuple[str, ArrayLike]],
    path: str | PathLike[str] | None = None,
    *,
    kl_label: str = "KL in nats",
    notes: Sequence[str] = (),
    title: str | None = None,
) -> Figure:
    """Draw Pass@N of checkpoints against their coverage (lower axis) and their KL (upper axis), a panel for each N.

    Checkpoints are joined in the order they come in, the first one drawn hollow: a good predictor gives a curve that
    only falls, one that misleads turns back on itself. It is the order that is shown: axes begin where the values do.

    Args:
        passes: Label and `(K,)` values of Pass@N, one a panel.
        kl: `(K,)` sequence-level KL, nats.
        coverage: Label and `(K,)` values of the coverage to set against each panel's Pass@N.
        path: File to write, its format given by the suffix; None only returns the figure.
        kl_label: What the upper axes show.
        notes: A text above each panel, such as the rank correlations in it; none by default.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no panel, or not one coverage for each, or notes for some of them only.

    Example:
        >>> figure = plot_predictiveness(
        ...     [("Pass@8", [0.8, 0.9, 0.85])], [1.2, 0.9, 0.8], [("Cov$_4$", [0.3, 0.1, 0.2])]
        ... )
        >>> [ax.get_xlabel() for ax in figure.axes]
        ['Cov$_4$ (lower is better)', 'KL in nats (lower is better)']

    References:
        arXiv 2510.15020, Figure 1 (right).
    """
    if not passes or len(passes) != len(coverage):
        raise ValueError(
            f"`passes` and `coverage` must go in pairs, but have {len(passes)} and {len(coverage)} entries."
        )
    if len(notes) not in (0, len(passes)):
        raise ValueError(f"`notes` must have one text for each of {len(passes)} panels, but has {len(notes)}.")
    figure, axes = new_axes(len(passes), width=3.8)
    kl_label = shorten(kl_label, 28)
    for ax, (pass_label, pass_values), (cov_label, cov_values) in zip(axes, passes, coverage):
        upper = ax.twiny()
        upper.spines["right"].set_visible(False)
        predictors = ((ax, cov_label, cov_values, "o", COLORS[0]), (upper, kl_label, kl, "^", COLORS[1]))
        for side, label, values, marker, color in predictors:
            side.plot(values, pass_values, marker=marker, color=color, markersize=5, linewidth=0.8, alpha=0.8)
            first = np.asarray(values)[0], np.asarray(pass_values)[0]
            side.plot(*first, marker=marker, color=color, markersize=7, markerfacecolor="white")
            side.set_xlabel(axis_label(f"{shorten(label, 60)} (lower is better)", 3.6), color=color)
            side.tick_params(axis="x", colors=color)
            side.locator_params(axis="x", nbins=5)
        ax.set_ylabel(axis_label(f"{shorten(pass_label, 60)} (higher is better)", 2.9))
    for ax, note in zip(axes, notes):
        ax.set_title("\n".join(axis_label(line, 3.4) for line in note.split("\n")), fontsize=9)
    add_title(figure, title)
    return save_figure(figure, path)
