"""Drawings of arrays. Knows no models, and no files but the one it writes.

Figures are matplotlib `Figure` objects made without pyplot, so nothing is shown and no global state is touched.
matplotlib itself is imported by the first drawing. Colours are the Okabe-Ito palette, which colour-blind readers can
tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.inference.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "BestOfNCurve",
    "ProfileCurve",
    "new_axes",
    "plot_best_of_n",
    "plot_challenges",
    "plot_choice",
    "plot_predictiveness",
    "plot_profiles",
    "plot_success",
    "plot_training_curves",
    "save_figure",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class ProfileCurve(NamedTuple):
    """One model's profile: Cov_N, or miss_N, and its interval on a grid of N, all `(K,)`."""

    name: str
    n: ArrayLike
    value: ArrayLike
    low: ArrayLike
    high: ArrayLike


def new_axes(columns: int = 1, *, width: float = 6.4, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A white figure with `columns` axes side by side, a light grid and no box around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=120, layout="constrained", facecolor="white")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write the figure where a path is given, in the format of its suffix, and return it."""
    if path is not None:
        target, content = Path(path), io.BytesIO()
        kind = target.suffix.lstrip(".") or figure.canvas.get_default_filetype()
        figure.savefig(content, format=kind, metadata={"Software": None} if kind.lower() == "png" else None)
        write_atomically(target if target.suffix else target.with_suffix(f".{kind}"), content.getvalue())
    return figure


def plot_profiles(
    panels: Mapping[str, Sequence[ProfileCurve]],
    path: str | PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw coverage profiles over N on logarithmic axes, each with its confidence band, in one panel or several.

    Args:
        panels: By what the vertical axis shows, one curve for each model, at most seven; a bound must say that it is
            one. A model has the same colour in all panels, which share their axes.
        path: File to write, its format given by the suffix; None only returns the figure.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: With no curve, or more than there are distinguishable colours.

    Example:
        >>> curve = ProfileCurve("model", [1, 2, 4], [0.9, 0.5, 0.1], [0.8, 0.4, 0.05], [1.0, 0.6, 0.2])
        >>> plot_profiles({"Cov$_N$ (lower is better)": [curve]}).axes[0].get_xscale()
        'log'
    """
    sizes = sorted({len(curves) for curves in panels.values()})
    if len(sizes) != 1 or not 1 <= sizes[0] <= len(COLORS):
        raise ValueError(
            f"`panels` must hold 1 to {len(COLORS)} profiles each, the same in all, but hold {sizes}: draw several "
            "pictures."
        )
    figure, axes = new_axes(len(panels), width=5.2 if len(panels) > 1 else 6.4)
    for ax, (ylabel, curves) in zip(axes, panels.items()):
        for curve, color in zip(curves, COLORS):
            ax.plot(curve.n, curve.value, color=color, linewidth=1.8, label=curve.name)
            ax.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel("N (samples that Best-of-N may draw)")
        ax.set_ylabel(ylabel)
        ax.margins(x=0)
    top = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(0, top)
    axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def plot_training_curves(
    steps: ArrayLike,
    kl: ArrayLike,
    coverage: Sequence[tuple[str, ArrayLike]],
    path: str | PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw KL and coverage over the steps of a training run, the best checkpoint of each curve marked.

    Coverage is on a logarithmic axis, unless some value is 0: what matters happens where it is small.

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
    from matplotlib.ticker import LogLocator, NullFormatter

    if not 1 <= len(coverage) < len(COLORS):
        raise ValueError(f"`coverage` must hold 1 to {len(COLORS) - 1} curves, but holds {len(coverage)}.")
    figure, axes = new_axes(2, width=5.2)
    labels = ("KL in nats (lower is better)", "Cov$_N$ (lower is better)")
    curves = ([("KL", kl)], coverage)
    colors = iter(COLORS)
    for ax, label, lines in zip(axes, labels, curves):
        for name, values in lines:
            array, color = np.asarray(values, dtype=float), next(colors)
            ax.plot(steps, array, color=color, linewidth=1.8, label=name)
            best = int(array.argmin())
            ax.plot(np.asarray(steps)[best], array[best], "o", color=color, markersize=7, markeredgecolor="white")
        ax.set_xlabel("training step")
        ax.set_ylabel(label)
    axes[0].set_ylim(bottom=0)
    if all(np.min(values) > 0 for _, values in coverage):
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].plot([], [], "o", color="#777777", markeredgecolor="white", label="best checkpoint")
    axes[1].legend(frameon=False)
    if title:
        figure.suptitle(title)
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
    only falls, one that misleads turns back on itself.

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
    for ax, (pass_label, pass_values), (cov_label, cov_values) in zip(axes, passes, coverage):
        upper = ax.twiny()
        upper.spines["right"].set_visible(False)
        predictors = ((ax, cov_label, cov_values, "o", COLORS[0]), (upper, kl_label, kl, "^", COLORS[1]))
        for side, label, values, marker, color in predictors:
            side.plot(values, pass_values, marker=marker, color=color, markersize=5, linewidth=0.8, alpha=0.8)
            first = np.asarray(values)[0], np.asarray(pass_values)[0]
            side.plot(*first, marker=marker, color=color, markersize=7, markerfacecolor="white")
            side.set_xlabel(f"{label} (lower is better)", color=color)
            side.tick_params(axis="x", colors=color)
        ax.set_ylabel(f"{pass_label} (higher is better)")
    for ax, note in zip(axes, notes):
        ax.set_title(note, fontsize=9)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def plot_challenges(
    names: Sequence[str],
    challenges: ArrayLike,
    path: str | PathLike[str] | None = None,
    *,
    winner: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the challenges of a tournament as a heat map: a column for each defender, its darkest field its score.

    Args:
        names: The M candidates.
        challenges: `(M, M)` how often a candidate (row) challenges another one (column); NaN is left white.
        path: File to write, its format given by the suffix; None only returns the figure.
        winner: The candidate whose column is framed.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: If there is not one row and one column for each name.

    Example:
        >>> figure = plot_challenges(["a", "b"], [[0.0, 0.2], [0.1, 0.0]], winner="a")
        >>> figure.axes[0].get_xlabel()
        'challenged (score: the darkest field of its column)'

    References:
        arXiv 2510.15020, Eq. (28) and (29).
    """
    from matplotlib.patches import Rectangle

    matrix = np.asarray(challenges, dtype=float)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"`challenges` must have shape {(len(names), len(names))}, but has {matrix.shape}.")
    side = min(14.0, 3.2 + 0.34 * len(names))
    figure, (ax,) = new_axes(width=side + 1.0, height=side)
    ax.grid(visible=False)
    image = ax.imshow(matrix, cmap="Blues", vmin=min(0.0, float(np.nanmin(matrix))), interpolation="nearest")
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of responses")
    places, size = range(len(names)), 9 if len(names) <= 24 else 6
    ax.set_xticks(places, names, rotation=90, fontsize=size)
    ax.set_yticks(places, names, fontsize=size)
    ax.set_xlabel("challenged (score: the darkest field of its column)")
    ax.set_ylabel("challenger")
    if winner is not None:
        left, bottom = names.index(winner) - 0.5, -0.5
        ax.add_patch(Rectangle((left, bottom), 1, len(names), fill=False, edgecolor=COLORS[1], linewidth=2))
    if title:
        ax.set_title(title)
    return save_figure(figure, path)


def plot_choice(
    curves: Sequence[ProfileCurve],
    picks: Sequence[tuple[float, str]],
    path: str | PathLike[str] | None = None,
    *,
    ylabel: str = "miss$_N$ (lower is better)",
    title: str | None = None,
) -> Figure:
    """Draw the losses of candidates over the number of samples, and which of them is picked at some numbers.

    Args:
        curves: One for each candidate; those that are picked are in colour, at most seven, the others in grey.
        picks: A number of samples and the name of the candidate that is picked for it.
        path: File to write, its format given by the suffix; None only returns the figure.
        ylabel: What the vertical axis shows.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: If a pick is not one of the curves.

    Example:
        >>> one, two = (ProfileCurve(name, [1, 8], values, values, values) for name, values in
        ...     [("early", [0.5, 0.1]), ("late", [0.4, 0.3])])
        >>> figure = plot_choice([one, two], [(1, "late"), (8, "early")])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['late', 'early']
    """
    by_name = {curve.name: curve for curve in curves}
    unknown = [name for _, name in picks if name not in by_name]
    if unknown:
        raise ValueError(f"`picks` must be among the curves {list(by_name)}, but {unknown[0]!r} is not.")
    picked = list(dict.fromkeys(name for _, name in picks))
    figure, (ax,) = new_axes()
    for curve in curves:
        if curve.name not in picked[: len(COLORS)]:
            ax.plot(curve.n, curve.value, color="#bbbbbb", linewidth=0.9, zorder=1)
    for name, color in zip(picked, COLORS):
        curve = by_name[name]
        ax.plot(curve.n, curve.value, color=color, linewidth=1.8, label=name, zorder=3)
        ax.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        at = [n for n, pick in picks if pick == name]
        ax.plot(
            at,
            np.interp(np.log(at), np.log(curve.n), np.asarray(curve.value, dtype=float)),
            "o",
            color=color,
            markersize=6,
            zorder=4,
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("samples that will be drawn")
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.legend(frameon=False, title="picked (others in grey)" if len(curves) > len(picked) else None)
    if title:
        ax.set_title(title)
    return save_figure(figure, path)


class BestOfNCurve(NamedTuple):
    """What Best-of-N was observed to achieve: a value and its interval for each N, all `(K,)`."""

    name: str
    n: ArrayLike
    value: ArrayLike
    low: ArrayLike
    high: ArrayLike


def plot_best_of_n(
    curves: Sequence[BestOfNCurve],
    path: str | PathLike[str] | None = None,
    *,
    lines: Sequence[tuple[str, ArrayLike]] = (),
    ylabel: str = "Pass@$N$ (higher is better)",
    title: str | None = None,
) -> Figure:
    """Draw what Best-of-N achieves over N on a logarithmic axis, each curve with its band, and predictions dashed.

    Args:
        curves: Observed, at least one.
        path: File to write, its format given by the suffix; None only returns the figure.
        lines: Label and `(K,)` values of predictions, on the N of the first curve.
        ylabel: What the vertical axis shows.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: With no curve, or more curves and lines than there are distinguishable colours.

    Example:
        >>> curve = BestOfNCurve("model", [1, 2, 4], [0.2, 0.3, 0.5], [0.1, 0.2, 0.4], [0.3, 0.4, 0.6])
        >>> figure = plot_best_of_n([curve], lines=[("guaranteed", [0.0, 0.1, 0.3])])
        >>> [line.get_linestyle() for line in figure.axes[0].lines]
        ['-', '--']
    """
    if not curves or len(curves) + len(lines) > len(COLORS):
        raise ValueError(
            f"`curves` and `lines` must be 1 to {len(COLORS)} together, at least one of them a curve, but are "
            f"{len(curves)} and {len(lines)}."
        )
    figure, (ax,) = new_axes()
    colors = iter(COLORS)
    for curve in curves:
        color = next(colors)
        ax.plot(curve.n, curve.value, color=color, linewidth=1.8, label=curve.name)
        ax.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    for label, values in lines:
        ax.plot(curves[0].n, values, color=next(colors), linewidth=1.4, linestyle="--", label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("N (samples that Best-of-N may draw)")
    ax.set_ylabel(ylabel)
    ax.margins(x=0)
    ax.legend(frameon=False)
    if title:
        ax.set_title(title)
    return save_figure(figure, path)


def plot_success(
    curves: Sequence[BestOfNCurve], path: str | PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw Pass@N as it was sampled, and dashed what is said beyond the samples, each with its band.

    Args:
        curves: What was sampled, and what lies beyond it; the last may be alone.
        path: File to write, its format given by the suffix; None only returns the figure.
        title: Title above the axes.

    Returns:
        The figure.

    Example:
        >>> sampled = BestOfNCurve("sampled", [1, 2], [0.2, 0.3], [0.1, 0.2], [0.3, 0.4])
        >>> beyond = BestOfNCurve("beyond", [2, 64], [0.3, 0.6], [0.2, 0.2], [0.4, 1.0])
        >>> [line.get_linestyle() for line in plot_success([sampled, beyond]).axes[0].lines]
        ['-', '--']
    """
    figure, (ax,) = new_axes()
    for color, curve in zip(COLORS, curves):
        beyond = curve is curves[-1] and len(curves) > 1
        ax.plot(curve.n, curve.value, color=color, linewidth=1.8, linestyle="--" if beyond else "-", label=curve.name)
        ax.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("N (samples that Best-of-N may draw)")
    ax.set_ylabel("Pass@$N$ (higher is better)")
    ax.set_ylim(0, 1)
    ax.margins(x=0)
    ax.legend(frameon=False, loc="upper left")
    if title:
        ax.set_title(title)
    return save_figure(figure, path)
