"""What all drawings share: axes, the colours and marks of models, intervals that do not mislead, and the file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.inference.files import write_atomically
from hf_coverage.plots.names import plain_text, step_labels, tell_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "LABELLED",
    "Style",
    "add_legend",
    "add_title",
    "axis_label",
    "draw_interval",
    "draw_line",
    "model_labels",
    "model_styles",
    "monotone_band",
    "new_axes",
    "save_figure",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The Okabe-Ito palette, which colour-blind readers can tell apart."""

LABELLED = 14
"""As many models have colours, lines and marks of their own; more are shaded in their order."""

_LINES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1.5, 1)))
_MARKERS = "os^DvP*X"


class Style(NamedTuple):
    """How a model is drawn, the same in all figures of a report."""

    color: Any
    line: Any = "-"
    marker: str = ""


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


def model_styles(names: Sequence[str], among: Sequence[str] = ()) -> list[Style]:
    """The style of each model by its place among all that a report shows; by default these.

    Example:
        >>> model_styles(["b"], among=["a", "b"])[0].color
        '#D55E00'
    """
    every = list(among) if set(names) <= set(among) else list(names)
    places = list(range(len(names))) if every == list(names) else [every.index(name) for name in names]
    if len(every) <= LABELLED:
        return [Style(COLORS[i % len(COLORS)], _LINES[i % 4], _MARKERS[i % len(_MARKERS)]) for i in places]
    shades = _shades()
    return [Style(shades(place / (len(every) - 1))) for place in places]


def model_labels(names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The title of a legend and the models' labels in it: their steps where they differ in nothing else."""
    steps = step_labels(names)
    if steps is not None:
        return plain_text(steps[0]), steps[1]
    return None, [plain_text(name) for name in tell_apart(names)]


def draw_line(ax: Axes, n: ArrayLike, values: ArrayLike, style: Style, label: str, place: int, count: int) -> None:
    """Draw one of `count` lines so that each is seen where all are equal: thinner ones above, marks beside each other.

    Args:
        ax: Where to.
        n: `(K,)` horizontal positions.
        values: `(K,)`.
        style: The model's.
        label: Its name in the legend.
        place: Which of the lines it is, from 0.
        count: How many there are.
    """
    size = np.size(n)
    every = max(1, size // 6)
    first = min(every * (place + 1) // (count + 1), size - 1)
    share = place / max(1, count - 1)
    ax.plot(
        n,
        values,
        color=style.color,
        linestyle=style.line,
        linewidth=1.8 if count == 1 else 3.0 - 1.8 * share,
        marker=style.marker if count > 1 or size == 1 else "",
        markevery=(first, every),
        markersize=8 - 4 * share,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
        zorder=3,
    )


def monotone_band(
    low: ArrayLike, high: ArrayLike, *, falling: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An interval at each of K points made monotone, as what it is of is: wider where it was not, nowhere narrower.

    Each point's interval holds with its own confidence, which widening only raises.

    Args:
        low: `(K,)` lower ends.
        high: `(K,)` upper ends.
        falling: Whether the quantity falls along the points, or rises.

    Example:
        >>> low, high = monotone_band([0.2, 0.1, 0.15], [0.4, 0.3, 0.35], falling=True)
        >>> low.tolist(), high.tolist()
        ([0.2, 0.1, 0.1], [0.4, 0.35, 0.35])
    """
    one, other = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    if falling:
        return np.minimum.accumulate(one), np.maximum.accumulate(other[::-1])[::-1]
    return np.minimum.accumulate(one[::-1])[::-1], np.maximum.accumulate(other)


def draw_interval(
    ax: Axes,
    n: ArrayLike,
    value: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    color: Any,
    falling: bool,
    place: int = 0,
    count: int = 1,
) -> bool:
    """Draw the interval of one of `count` curves: a band, and a tick where the value itself is an end of it.

    Where nothing was seen, or everything, the interval is one-sided, and says how few the rows are: as a band it would
    fill the picture.

    Args:
        ax: Where to.
        n: `(K,)` numbers of samples, above 0.
        value: `(K,)`.
        low: `(K,)` lower ends.
        high: `(K,)` upper ends.
        color: Of the curve.
        falling: Whether the curve falls, or rises.
        place: Which of the curves it is, from 0: ticks stand beside each other.
        count: How many there are.

    Returns:
        Whether there is such a tick.
    """
    x, y = np.asarray(n, dtype=float), np.asarray(value, dtype=float)
    bottom, top = monotone_band(low, high, falling=falling)
    one_sided = ((y <= bottom) & (top > y)) | ((y >= top) & (bottom < y))
    alpha = 0.18 if count <= 3 else 0.5 / count  # so that many, one above the other, hide nothing
    ax.fill_between(x, bottom, top, where=~one_sided, color=color, alpha=alpha, linewidth=0)
    for start, end in _runs(one_sided):
        share = (place + 1) / (count + 1)
        at = start + round(share * (end - 1 - start))
        where = x[start] ** (1 - share) * x[end - 1] ** share
        ax.vlines(where, bottom[at], top[at], color=color, linewidth=1.4, zorder=2, clip_on=False)
        tip = top[at] if top[at] > y[at] else bottom[at]
        ax.scatter(where, tip, marker="_", s=70, color=color, linewidth=1.8, zorder=2, clip_on=False)
    return bool(one_sided.any())


def add_legend(figure: Figure, ax: Axes, *, title: str | None = None, notes: Sequence[Any] = ()) -> None:
    """A legend of the labelled lines of `ax`, and of `notes`: inside where it is small, else beside a wider figure."""
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles, *notes], [*labels, *(note.get_label() for note in notes)]
    longest = max(map(len, labels), default=0)
    if len(labels) <= 4 and longest <= 28:
        ax.legend(handles, labels, frameon=False, title=title, fontsize=9)
        return
    figure.set_figwidth(figure.get_figwidth() + 0.7 + 0.08 * longest)
    figure.legend(handles, labels, frameon=False, title=title, fontsize=9, loc="outside right center")


def add_title(figure: Figure, title: str | None) -> None:
    """A title above everything, in as many lines as it takes."""
    if title:
        figure.suptitle(fill(title, int(11 * figure.get_figwidth())), fontsize=11)


def axis_label(text: str, inches: float) -> str:
    """An axis's label in as many lines as it takes."""
    return fill(text, max(16, int(12 * inches)))


def _shades() -> Any:
    from matplotlib import colormaps

    return lambda share: colormaps["viridis"](0.92 * share)  # its light end is not seen on white


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
