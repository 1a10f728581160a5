"""Drawings of arrays. Knows no models, and no files but the one it writes.

Figures are matplotlib `Figure` objects made without pyplot, so nothing is shown and no global state is touched.
Colours are the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

__all__ = ["COLORS", "ProfileCurve", "new_axes", "plot_profiles", "save_figure"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class ProfileCurve(NamedTuple):
    """One model's coverage profile: Cov_N and its interval on a grid of N, all `(K,)`."""

    name: str
    n: ArrayLike
    coverage: ArrayLike
    low: ArrayLike
    high: ArrayLike


def new_axes(columns: int = 1, *, width: float = 6.4, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A white figure with `columns` axes side by side, a light grid and no box around them."""
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
        figure.savefig(path, metadata={"Software": None} if str(path).lower().endswith(".png") else None)
    return figure


def plot_profiles(
    curves: Sequence[ProfileCurve],
    path: str | PathLike[str] | None = None,
    *,
    ylabel: str = "Cov$_N$ (lower is better)",
    title: str | None = None,
) -> Figure:
    """Draw coverage profiles over N on a logarithmic axis, each with its confidence band.

    Args:
        curves: one for each model, at most seven.
        path: file to write, its format given by the suffix; None only returns the figure.
        ylabel: what the vertical axis shows; a bound must say that it is one.
        title: title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: with no curve, or more than there are distinguishable colours.

    Example:
        >>> curve = ProfileCurve("model", [1, 2, 4], [0.9, 0.5, 0.1], [0.8, 0.4, 0.05], [1.0, 0.6, 0.2])
        >>> plot_profiles([curve]).axes[0].get_xscale()
        'log'
    """
    if not 1 <= len(curves) <= len(COLORS):
        raise ValueError(
            f"`curves` must hold 1 to {len(COLORS)} profiles, but holds {len(curves)}: draw several pictures."
        )
    figure, (ax,) = new_axes()
    for curve, color in zip(curves, COLORS):
        # steps, since the empirical profile is a step function that jumps just after each ratio
        ax.plot(curve.n, curve.coverage, color=color, linewidth=1.8, label=curve.name)
        ax.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("N (samples that Best-of-N may draw)")
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    ax.legend(frameon=False)
    if title:
        ax.set_title(title)
    return save_figure(figure, path)
