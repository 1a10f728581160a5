"""Drawings over N, the number of samples: coverage profiles, losses of candidates, and what Best-of-N achieves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.plots.figure import (
    COLORS,
    LABELLED,
    Style,
    add_legend,
    add_title,
    axis_label,
    draw_interval,
    draw_line,
    model_labels,
    model_styles,
    monotone_band,
    new_axes,
    save_figure,
)
from hf_coverage.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BestOfNCurve", "ProfileCurve", "plot_best_of_n", "plot_choice", "plot_profiles", "plot_success"]

_HATCHES = ("///", "\\\\\\", "|||")
_SAMPLES = "N (samples that Best-of-N may draw)"


class ProfileCurve(NamedTuple):
    """One model's profile: Cov_N, or miss_N, and its interval on a grid of N, all `(K,)`."""

    name: str
    n: ArrayLike
    value: ArrayLike
    low: ArrayLike
    high: ArrayLike


class BestOfNCurve(NamedTuple):
    """What Best-of-N was observed to achieve: a value and its interval for each N, all `(K,)`."""

    name: str
    n: ArrayLike
    value: ArrayLike
    low: ArrayLike
    high: ArrayLike


def plot_profiles(
    panels: Mapping[str, Sequence[ProfileCurve]],
    path: str | PathLike[str] | None = None,
    *,
    bounds: bool = False,
    marks: Sequence[float] = (),
    among: Sequence[str] = (),
    title: str | None = None,
) -> Figure:
    """Draw coverage profiles over N on logarithmic axes, each with its confidence band, in one panel or several.

    A model looks the same in all panels, which share their axes. Equal curves are seen by their marks. Where no
    response is missed, or every one, a tick ends where the one-sided interval does. More than 14 models are shaded in
    their order, without intervals.

    Args:
        panels: By what the vertical axis shows, one curve for each model.
        path: File to write, its format given by the suffix; None only returns the figure.
        bounds: Whether the curves are upper bounds, below which the quantity lies: that region is hatched, and where
            there are too many of them the curves' marks point down to it.
        marks: The N that are reported, marked by dotted lines.
        among: All models that a report shows: each then looks the same in all of its figures.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: With no curve, or not as many in all panels.

    Example:
        >>> curve = ProfileCurve("model", [1, 2, 4], [0.9, 0.5, 0.1], [0.8, 0.4, 0.05], [1.0, 0.6, 0.2])
        >>> plot_profiles({"Cov$_N$ (lower is better)": [curve]}).axes[0].get_xscale()
        'log'
    """
    sizes = sorted({len(curves) for curves in panels.values()})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(f"`panels` must hold at least one profile each, the same number in all, but hold {sizes}.")
    figure, axes = new_axes(len(panels), width=5.2 if len(panels) > 1 else 6.4)
    names = [curve.name for curve in next(iter(panels.values()))]
    legend_title, labels = model_labels(names)
    styles = model_styles(names, among)
    if bounds and len(names) > len(_HATCHES):  # as many regions are not told apart
        styles = [style._replace(marker="v") for style in styles]
    shaded, one_sided = len(names) > LABELLED, False
    for ax, (ylabel, curves) in zip(axes, panels.items()):
        for place, (curve, style, label) in enumerate(zip(curves, styles, labels)):
            if shaded:
                ax.plot(curve.n, curve.value, color=style.color, linewidth=0.9)
                continue
            draw_line(ax, curve.n, curve.value, style, label, place, len(names))
            if bounds and len(names) <= len(_HATCHES):
                _hatch(ax, curve.n, 0.0, curve.value, style.color, _HATCHES[place])
            at = {"color": style.color, "falling": True, "place": place, "count": len(names)}
            one_sided |= draw_interval(ax, *curve[1:], **at)
        _over_n(ax, _SAMPLES, axis_label(ylabel, 4.2))
        _mark(ax, marks)
    top = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(0, top)
    if shaded:
        _shade_bar(figure, axes, labels, legend_title)
    else:
        add_legend(figure, axes[0], title=legend_title, notes=_notes(marks, one_sided, bounds))
    add_title(figure, title)
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
        curves: One for each candidate; those that are picked are in the colours of their place, the others in grey.
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
    names = [curve.name for curve in curves]
    unknown = [name for _, name in picks if name not in names]
    if unknown:
        raise ValueError(f"`picks` must be among the curves {names}, but {unknown[0]!r} is not.")
    picked = list(dict.fromkeys(name for _, name in picks))
    word, labels = model_labels(names)
    styles = model_styles(names)
    figure, (ax,) = new_axes()
    for curve in curves:
        if curve.name not in picked:
            ax.plot(curve.n, curve.value, color="#bbbbbb", linewidth=0.9, zorder=1)
    one_sided = False
    for place, name in enumerate(picked):
        index = names.index(name)
        curve, style = curves[index], styles[index]
        label = labels[index] if place < LABELLED else ""
        one = style._replace(marker="")
        draw_line(ax, curve.n, curve.value, one, label, place, len(picked))
        at: dict[str, Any] = {"color": style.color, "falling": True, "place": place, "count": len(picked)}
        if len(picked) <= LABELLED:
            one_sided |= draw_interval(ax, *curve[1:], **at)
        where = [n for n, pick in picks if pick == name]
        values = np.interp(np.log(where), np.log(curve.n), np.asarray(curve.value, dtype=float))
        ax.plot(where, values, "o", color=style.color, markersize=6, zorder=4)
    _over_n(ax, "samples that will be drawn", axis_label(ylabel, 4.2))
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    others = "picked (others in grey)" if len(curves) > len(picked) else None
    heading = " ".join(text for text in (word, others) if text) or None
    notes = _notes((), one_sided, False)
    if len(picked) > LABELLED:
        notes.append(_note(f"and {len(picked) - LABELLED} more", linestyle=""))
    add_legend(figure, ax, title=heading, notes=notes)
    add_title(figure, title)
    return save_figure(figure, path)


def plot_best_of_n(
    curves: Sequence[BestOfNCurve],
    path: str | PathLike[str] | None = None,
    *,
    lines: Sequence[tuple[str, ArrayLike]] = (),
    bounds: Sequence[tuple[str, ArrayLike]] = (),
    ylabel: str = "Pass@$N$ (higher is better)",
    title: str | None = None,
) -> Figure:
    """Draw what Best-of-N achieves over N on a logarithmic axis: curves in bands, predictions dashed, bounds hatched.

    Args:
        curves: Observed, at least one.
        path: File to write, its format given by the suffix; None only returns the figure.
        lines: Label and `(K,)` values of predictions, on the N of the first curve.
        bounds: Label and `(K,)` values of lower bounds, on the same N: the region below, which they rule out, is
            hatched, and no line is drawn that could be taken for a prediction.
        ylabel: What the vertical axis shows.
        title: Title above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: With no curve, or more of all three than there are distinguishable colours.

    Example:
        >>> curve = BestOfNCurve("model", [1, 2, 4], [0.2, 0.3, 0.5], [0.1, 0.2, 0.4], [0.3, 0.4, 0.6])
        >>> figure = plot_best_of_n([curve], lines=[("predicted", [0.2, 0.3, 0.4])], bounds=[("least", [0, 0.1, 0.3])])
        >>> [line.get_linestyle() for line in figure.axes[0].lines]
        ['-', '--']
    """
    if not curves or len(curves) + len(lines) + len(bounds) > LABELLED:
        raise ValueError(
            f"`curves`, `lines` and `bounds` must be 1 to {LABELLED} together, at least one of them a curve, but are "
            f"{len(curves)}, {len(lines)} and {len(bounds)}."
        )
    figure, (ax,) = new_axes()
    word, labels = model_labels([curve.name for curve in curves])
    styles = model_styles([*(curve.name for curve in curves), *(name for name, _ in (*lines, *bounds))])
    one_sided = False
    for place, (curve, style, label) in enumerate(zip(curves, styles, labels)):
        draw_line(ax, curve.n, curve.value, style, label, place, len(curves))
        at: dict[str, Any] = {"color": style.color, "falling": False, "place": place, "count": len(curves)}
        one_sided |= draw_interval(ax, *curve[1:], **at)
    for (label, values), style in zip(lines, styles[len(curves) :]):
        ax.plot(curves[0].n, values, color=style.color, linewidth=1.4, linestyle="--", label=shorten(label, 40))
    bottom = min(0.0, ax.get_ylim()[0]) if any(np.min(curve.value) < 0 for curve in curves) else 0.0
    for (label, values), style in zip(bounds, styles[len(curves) + len(lines) :]):
        _hatch(ax, curves[0].n, bottom, values, style.color, "///", shorten(label, 40))
    _over_n(ax, _SAMPLES, axis_label(ylabel, 4.2))
    ax.set_ylim(bottom=bottom)
    add_legend(figure, ax, title=word, notes=_notes((), one_sided, False))
    add_title(figure, title)
    return save_figure(figure, path)


def plot_success(
    curves: Sequence[BestOfNCurve], path: str | PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw Pass@N as it was sampled, with its band, and what is said beyond it: dashed, in the range that is allowed.

    Args:
        curves: What was sampled, and what lies beyond it; the last may be alone. The last one's ends are bounds, and
            what they allow is hatched.
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
    _, labels = model_labels([curve.name for curve in curves])
    one_sided = False
    for color, curve, label in zip(COLORS, curves, labels):
        if curve is curves[-1] and len(curves) > 1:
            ax.plot(curve.n, curve.value, color=color, linewidth=1.8, linestyle="--", label=label)
            low, high = monotone_band(curve.low, curve.high, falling=False)
            _hatch(ax, curve.n, low, high, color, "///")
            continue
        draw_line(ax, curve.n, curve.value, Style(color, "-", "o"), label, 0, 1)
        one_sided |= draw_interval(ax, *curve[1:], color=color, falling=False)
    _over_n(ax, _SAMPLES, "Pass@$N$ (higher is better)")
    ax.set_ylim(0, 1)
    add_legend(figure, ax, notes=_notes((), one_sided, False))
    add_title(figure, title)
    return save_figure(figure, path)


def _over_n(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.margins(x=0)


def _mark(ax: Axes, marks: Sequence[float]) -> None:
    for n in marks:
        ax.axvline(n, color="#999999", linestyle=":", linewidth=1.0, zorder=1)


def _hatch(ax: Axes, n: ArrayLike, low: ArrayLike, high: ArrayLike, color: Any, hatch: str, label: str = "") -> None:
    """Hatch a region that a bound leaves, or rules out."""
    region = ax.fill_between(np.asarray(n, dtype=float), low, high, facecolor="none", edgecolor=color, linewidth=0)
    region.set(hatch=hatch, alpha=0.45, label=label, zorder=1)


def _notes(marks: Sequence[float], one_sided: bool, bounds: bool) -> list[Any]:
    """What stands in a legend besides the models."""
    notes = []
    if marks:
        shown = ", ".join(f"{n:g}" for n in marks) if len(marks) <= 6 else "reported"
        notes.append(_note(f"N = {shown}", color="#999999", linestyle=":"))
    if one_sided:
        notes.append(_note("one-sided interval", color="#777777", linestyle="", marker="_"))
    if bounds:
        notes.append(_note("upper bounds: what is below is possible", linestyle=""))
    return notes


def _note(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _shade_bar(figure: Figure, axes: Sequence[Axes], labels: Sequence[str], word: str | None) -> None:
    """A scale that says in which order models are shaded, beside them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = [style.color for style in model_styles(labels)]
    scale = ScalarMappable(Normalize(0, len(labels) - 1), LinearSegmentedColormap.from_list("models", shades))
    figure.set_figwidth(figure.get_figwidth() + 1.0 + 0.08 * max(map(len, labels)))
    bar = figure.colorbar(scale, ax=list(axes), pad=0.02)
    ticks = np.unique(np.linspace(0, len(labels) - 1, 6).round().astype(int))
    bar.set_ticks(ticks.tolist(), labels=[labels[tick] for tick in ticks], fontsize=9)
    bar.set_label(f"{word or 'models in their order'} (without intervals)")
