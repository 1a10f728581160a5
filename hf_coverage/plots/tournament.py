"""The drawing of a tournament: who challenges whom how often."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.plots.figure import COLORS, add_title, axis_label, model_labels, new_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_challenges"]

_NUMBERED = 16
"""Fields of that many candidates are large enough for numbers."""


def plot_challenges(
    names: Sequence[str],
    challenges: ArrayLike,
    path: str | PathLike[str] | None = None,
    *,
    winner: str | None = None,
    decides: bool = True,
    title: str | None = None,
) -> Figure:
    """Draw the challenges of a tournament as a heat map: a column for each defender.

    Where columns decide by their largest field, as the score of a tournament with an edge, it is framed. Fields have
    their numbers where these fit.

    Args:
        names: The M candidates.
        challenges: `(M, M)` how often a candidate (row) challenges another one (column); NaN is left white.
        path: File to write, its format given by the suffix; None only returns the figure.
        winner: The candidate whose column is framed.
        decides: Whether the largest field of a column is its score; in a soft tournament all of its fields are.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: If there is not one row and one column for each name.

    Example:
        >>> figure = plot_challenges(["a", "b"], [[0.0, 0.2], [0.1, 0.0]], winner="a")
        >>> figure.axes[0].get_xlabel()
        'challenged (score: the framed field)'

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
    known = matrix[np.isfinite(matrix)]
    least, most = min(0.0, known.min(initial=0.0)), known.max(initial=0.0) or 1.0
    image = ax.imshow(matrix, cmap="Blues", vmin=least, vmax=most, interpolation="nearest")
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of responses")
    word, labels = model_labels(names)
    every = -(-len(names) // 40)  # more labels than that cover each other
    places, size = range(0, len(names), every), 9 if len(names) <= 24 else 6
    ax.set_xticks(places, labels[::every], rotation=90, fontsize=size)
    ax.set_yticks(places, labels[::every], fontsize=size)
    score = "the framed field" if decides else "what all find together"
    ax.set_xlabel(axis_label(f"challenged {word or ''}".strip() + f" (score: {score})", side))
    ax.set_ylabel(f"challenging {word}" if word else "challenger")
    if len(names) <= _NUMBERED:
        _write_numbers(ax, matrix, middle=(least + most) / 2)
    if decides:
        _frame_largest(ax, matrix)
    if winner is not None:
        left, bottom = names.index(winner) - 0.5, -0.5
        ax.add_patch(Rectangle((left, bottom), 1, len(names), fill=False, edgecolor=COLORS[1], linewidth=2))
    add_title(figure, title)
    return save_figure(figure, path)


def _write_numbers(ax: Axes, matrix: NDArray[np.float64], middle: float) -> None:
    for row, column in np.argwhere(np.isfinite(matrix)):
        value = matrix[row, column]
        text = "0" if value == 0 else f"{value:.2f}".replace("0.", ".", 1)
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if value > middle else "black")


def _frame_largest(ax: Axes, matrix: NDArray[np.float64]) -> None:
    """Frame the fields that decide: none where nothing in the column is above 0."""
    from matplotlib.patches import Rectangle

    filled = np.where(np.isfinite(matrix), matrix, -np.inf)
    width = 0.9 if len(matrix) <= 40 else 1.0
    for row, column in np.argwhere((filled == filled.max(axis=0)) & (filled > 0)):
        corner = column - width / 2, row - width / 2
        ax.add_patch(Rectangle(corner, width, width, fill=False, edgecolor=COLORS[6], linewidth=1.2))
