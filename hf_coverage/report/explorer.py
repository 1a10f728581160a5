"""Profiles that a reader asks at every N: what a page's slider, charts and table of models show.

The charts are Bokeh's. Its JavaScript is 1.3 MB and is all that a page carries; Plotly's is 4.8 MB, and the part of it
that draws lines is not in its package. Neither lets a keyboard into a chart, so whatever a chart shows is in the table
as well, and slider, table and boxes are the browser's own. Bokeh needs `style-src 'unsafe-inline'` for the styles that
it makes as it draws. Callbacks written in Python as text would need `'unsafe-eval'`: `report.js` takes their place,
and a page allows the scripts with its hashes alone.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.plots import COLORS, ProfileCurve, new_axes, plot_profiles
from hf_coverage.plots.figure import model_styles
from hf_coverage.report.summary import mean_cell, shared_quantity
from hf_coverage.report.table import Cell, Interval, Table, format_cell
from hf_coverage.select.choose import Choice

if TYPE_CHECKING:
    from bokeh.plotting import figure as BokehFigure
    from matplotlib.figure import Figure

__all__ = ["Explorer", "Quantity", "Script", "explore", "scripts"]

_STEP = re.compile(r"(?:checkpoint|step)[-_ ]?(\d+)$")
_GREY = "#7a828a"  # seen on light and on dark pages


class Line(NamedTuple):
    """How a model is drawn on a page: a colour, and the lengths of dashes and gaps; none of a line without."""

    color: str
    dashes: str


class Script(NamedTuple):
    """A script of a page, and the hash by which its policy allows it."""

    text: str

    @property
    def hash(self) -> str:
        """As Content-Security-Policy writes it."""
        return f"'sha256-{base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode('ascii')}'"


class Quantity(NamedTuple):
    """What is shown of every model at every N, lower being better.

    Attributes:
        key: Its name in files, such as `miss`.
        label: Its name for readers, with the letter N in the place of its number, such as `miss_N`.
        curves: One a model, at the N of the slider.
        n: `(K,)` N at which lines are drawn.
        lines: `(M, K)` the models' values there.
    """

    key: str
    label: str
    curves: Sequence[ProfileCurve]
    n: FloatArray
    lines: FloatArray

    def interval(self, model: int, place: int) -> Interval | float:
        """A model's value at the place of an N, with its interval where one is known."""
        curve = self.curves[model]
        value, low, high = (float(np.asarray(part)[place]) for part in (curve.value, curve.low, curve.high))
        return Interval(value, low, high) if low < value or value < high else value


@dataclass(frozen=True)
class Explorer:
    """Models at every N, as charts, as a table, and as pictures for readers without JavaScript.

    Attributes:
        names: The models.
        n: `(K,)` N that the slider stops at.
        start: The place among them that it begins at.
        quantities: What is shown; models are ordered by the first.
        cross_entropies: E[-log p] of each model in nats a response, with its interval; None where it is not known.
        rows: The rows that each model was scored on.
        prompts: The distinct prompts among them.
        choice: What was chosen among them.
    """

    names: Sequence[str]
    n: FloatArray
    start: int
    quantities: Sequence[Quantity]
    cross_entropies: Sequence[Interval | None]
    rows: Sequence[int]
    prompts: Sequence[int]
    choice: Choice | None = None

    @cached_property
    def steps(self) -> list[int] | None:
        """The training step of each model, where they are checkpoints of one run by their names."""
        found = [_STEP.search(name) for name in self.names]
        steps = [int(match[1]) for match in found if match is not None]
        before = {name[: match.start(1)] for name, match in zip(self.names, found) if match is not None}
        return steps if len(set(steps)) == len(self.names) > 1 and len(before) == 1 else None

    @property
    def labels(self) -> list[str]:
        """The names without what they all begin with."""
        return short_names(self.names)

    @property
    def styles(self) -> list[Line]:
        """How each model is drawn, as it is in pictures."""
        from matplotlib.colors import to_hex

        return [
            Line(
                to_hex(style.color),
                "" if style.line == "-" else " ".join(str(round(3 * part)) for part in style.line[1]),
            )
            for style in model_styles(self.names)
        ]

    @property
    def n_text(self) -> list[str]:
        """Each N as it is written in a metric's name."""
        return [metric_key(value) for value in self.n]

    @property
    def entropies(self) -> list[Interval] | None:
        """The cross-entropies, where they are known of all models."""
        known = [entropy for entropy in self.cross_entropies if entropy is not None]
        return known if len(known) == len(self.names) else None

    def order(self, place: int) -> list[int]:
        """The models by the first quantity at the place of an N, best first."""
        values = [np.asarray(curve.value)[place] for curve in self.quantities[0].curves]
        return sorted(range(len(self.names)), key=values.__getitem__)

    @property
    def sentence(self) -> str:
        """Which model has the least of the first quantity at the N that the slider begins at."""
        best, quantity = self.order(self.start)[0], self.quantities[0]
        label, cell = (
            quantity.label.replace("_N", f"_{metric_key(self.n[self.start])}"),
            quantity.interval(best, self.start),
        )
        of = f", of {len(self.names)}" if len(self.names) > 1 else ""
        return f"{self.labels[best]} has the least {label}: {format_cell(cell)}{of}."

    def table(self) -> Table:
        """Which models have the least of the first quantity, by ranges of N."""
        values = np.array([curve.value for curve in self.quantities[0].curves])
        rows: list[list[Cell]] = []
        for least, run in groupby(
            range(self.n.size), lambda place: np.flatnonzero(values[:, place] == values[:, place].min()).tolist()
        ):
            places = list(run)
            ends = [
                (self.n_text[place], format_cell(float(values[least[0], place]))) for place in (places[0], places[-1])
            ]
            more = f" and {len(least) - 1} more" if len(least) > 1 else ""
            rows.append([*map(_span, *ends), f"{self.labels[least[0]]}{more}"])
        label = self.quantities[0].label
        caption = f"Which model has the least {label} for each number of samples, by the estimates alone."
        return Table(["N", label, "model"], rows, caption)

    def data(self) -> dict[str, Any]:
        """Everything that `report.js` shows, and the charts that it shows it in."""
        styles = self.styles
        return {
            "names": self.names,
            "labels": self.labels,
            "colors": [style.color for style in styles],
            "dashes": [style.dashes or "solid" for style in styles],
            "steps": self.steps,
            "n": self.n,
            "n_text": self.n_text,
            "start": self.start,
            "rows": self.rows,
            "prompts": self.prompts,
            "quantities": [self._quantity(quantity) for quantity in self.quantities],
            "cross_entropy": None if self.entropies is None else _parts(self.entropies),
            "charts": self._charts(),
        }

    @property
    def chart_labels(self) -> list[str]:
        """What each chart shows, for readers who cannot see it."""
        found = [f"{one.label} over N" for one in self.quantities]
        if self.steps is not None:
            found.append(f"{self.quantities[0].label} over training steps")
            found += [] if self.entropies is None else ["cross-entropy over training steps"]
        return [f"{label}, lower is better; the numbers are in the table" for label in found]

    def pictures(self) -> "list[tuple[Figure, str]]":
        """Drawings of the same, with their captions."""
        panels = {f"{_mathematical(one.label)} (lower is better)": one.curves for one in self.quantities}
        found = [(plot_profiles(panels), "Profiles over N, lower is better, with 95 % intervals.")]
        if self.steps is not None:
            found.append((self._draw_run(self.steps), "Checkpoints over the steps of training, with 95 % intervals."))
        if self.choice is not None:
            found.append((self.choice.plot(), "Losses over the number of samples, the picks marked. Lower is better."))
        return found

    def _quantity(self, quantity: Quantity) -> dict[str, Any]:
        models = [
            _parts([quantity.interval(model, place) for place in range(self.n.size)])
            for model in range(len(self.names))
        ]
        lines = {"key": quantity.key, "label": quantity.label, "x": quantity.n, "y": np.round(quantity.lines, 5)}
        return lines | {part: [of[part] for of in models] for part in models[0]}

    def _charts(self) -> list[Any]:
        from bokeh.embed import json_item

        charts = [self._profile_chart(quantity) for quantity in self.quantities]
        if self.steps is not None:
            charts += [_run_chart(self.quantities[0].label, self.steps, start=0)]
            charts += [] if self.entropies is None else [_run_chart("cross-entropy (nats)", self.steps)]
        return [json_item(chart, f"chart-{place}") for place, chart in enumerate(charts)]

    def _profile_chart(self, quantity: Quantity) -> "BokehFigure":
        from bokeh.models import HoverTool, Span

        top = max(float(np.max(curve.high)) for curve in quantity.curves)
        chart = _chart(f"{quantity.label} (lower is better)", "N (samples that Best-of-N may draw)", "log")
        chart.x_range.update(start=self.n[0] / 1.15, end=self.n[-1] * 1.15)
        chart.y_range.update(start=0, end=1.04 * top or 1)
        chart.xaxis.ticker = self.n[:: -(-self.n.size // 12)].tolist()
        chart.xaxis.major_label_overrides = {value: metric_key(value) for value in self.n}
        chart.patches("x", "y", source=_source("bands", "x y color"), color="color", fill_alpha=0.15, line_alpha=0)
        chart.multi_line(
            "x",
            "y",
            source=_source("lines", "x y color dash width"),
            color="color",
            line_dash="dash",
            line_width="width",
        )
        points = chart.scatter("x", "y", source=_source("points", "x y color name n text rows"), color="color", size=5)
        shown = [("model", "@name"), ("N", "@n"), (quantity.label, "@text"), ("rows", "@rows")]
        chart.add_tools(HoverTool(renderers=[points], tooltips=shown, limit=4))
        if self.choice is not None and quantity is self.quantities[0]:
            _add_picks(chart, self.choice)
        chart.add_layout(
            Span(name="at", dimension="height", location=self.n[self.start], line_color=_GREY, line_width=2)
        )
        return chart

    def _draw_run(self, steps: Sequence[int]) -> "Figure":
        quantity, n = self.quantities[0], metric_key(self.n[self.start])
        cells = [quantity.interval(model, self.start) for model in range(len(steps))]
        panels: list[tuple[str, Sequence[Interval | float]]] = [
            (_mathematical(quantity.label.replace("_N", f"_{n}")), cells)
        ]
        panels += [] if self.entropies is None else [("cross-entropy (nats)", self.entropies)]
        figure, axes = new_axes(len(panels), width=5.2)
        order = np.argsort(steps)
        for ax, (label, shown) in zip(axes, panels):
            parts = _parts(shown)
            value, low, high = (np.array(parts[part], dtype=float)[order] for part in ("value", "low", "high"))
            ax.errorbar(np.sort(steps), value, yerr=[value - low, high - value], marker="o", markersize=4, capsize=2)
            ax.set_xlabel("training step")
            ax.set_ylabel(f"{label} (lower is better)")
        axes[0].set_ylim(bottom=0)
        return figure


def explore(profiles: Sequence[CoverageProfile], *, n: float = 16, choice: Choice | None = None) -> Explorer:
    """What a page shows of models at every N.

    The slider stops at the powers of 2 up to where all profiles have ended, and at the N that are named.

    Args:
        profiles: One a model.
        n: The N that the slider begins at.
        choice: What was chosen among them. Where its losses are not the models' miss_N on all rows, they are what is
            shown.

    Example:
        >>> found = explore([CoverageProfile.from_logprobs([-1.0, -9.0], [-1.0, -1.0], name="tiny")])
        >>> found.n.tolist()[found.start], found.sentence
        (16.0, 'tiny has the least miss_16: 0.497 [0.013, 0.985].')
    """
    shared_quantity(profiles)
    levels = [n] if choice is None else [choice.samples, *(pick.samples for pick in choice.others)]
    if choice is None or (choice.rule == "miss" and not choice.dropped):
        positions = _positions(profiles, levels)
        quantities = _of_profiles(profiles, positions)
    else:
        positions, quantities = _of_choice(choice)
    return Explorer(
        names=[profile.name for profile in profiles],
        n=positions,
        start=int(np.argmin(np.abs(positions - levels[0]))),
        quantities=quantities,
        cross_entropies=[
            None
            if profile.logprobs is None
            else mean_cell(profile.cross_entropy, profile.cross_entropy_standard_error, profile.num_groups)
            for profile in profiles
        ],
        rows=[profile.num_rows for profile in profiles],
        prompts=[profile.num_groups for profile in profiles],
        choice=choice,
    )


def scripts() -> list[Script]:
    """What a page that can be explored runs: Bokeh's core, and what moves it."""
    from bokeh.resources import Resources

    glue = resources.files(__package__).joinpath("templates/report.js").read_text(encoding="utf-8")
    return [Script(text) for text in (*Resources(mode="inline", components=["bokeh"], log_level="error").js_raw, glue)]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that all begin with, the last word left.

    Example:
        >>> short_names(["org/run/checkpoint-500", "org/run/checkpoint-1000"])
        ['checkpoint-500', 'checkpoint-1000']
    """
    parts = [name.split("/") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _positions(profiles: Sequence[CoverageProfile], levels: Iterable[float]) -> FloatArray:
    tops = [profile.log_ratios[np.isfinite(profile.log_ratios)].max(initial=0.0) for profile in profiles]
    last = int(np.clip(np.ceil(max(tops) / np.log(2)), 6, 20))
    return np.unique([*np.exp2(np.arange(last + 1)), *levels])


def _of_profiles(profiles: Sequence[CoverageProfile], positions: FloatArray) -> list[Quantity]:
    fine = np.unique([*np.exp2(np.arange(0, np.log2(positions[-1]) + 0.1, 0.125)), *positions])
    first = profiles[0]
    label, bound = first.quantity, first.is_upper_bound
    return [
        Quantity(
            "miss_upper" if bound else "miss",
            label.replace("Cov_N", "miss_N"),
            [profile.miss_curve(positions) for profile in profiles],
            fine,
            np.array([profile.miss_level(fine) for profile in profiles]),
        ),
        Quantity(
            "cov_upper" if bound else "cov",
            label,
            [profile.curve(positions) for profile in profiles],
            fine,
            np.array([profile.level(fine) for profile in profiles]),
        ),
    ]


def _of_choice(choice: Choice) -> tuple[FloatArray, list[Quantity]]:
    grid = np.asarray(choice.curves[0].n, dtype=float)
    label = re.sub(rf"(?<=[_@ ]){re.escape(metric_key(choice.samples))}(?= |$)", "N", choice.loss_name)
    label, key = label.replace(" at N = N", "_N"), choice.metric_name.removesuffix(f"_{metric_key(choice.samples)}")
    return grid, [Quantity(key, label, choice.curves, grid, np.array([curve.value for curve in choice.curves]))]


def _add_picks(chart: "BokehFigure", choice: Choice) -> None:
    """A mark at what is picked for each number of samples that was asked for."""
    from bokeh.models import ColumnDataSource, HoverTool

    picks = (choice.pick, *choice.others)
    columns: dict[str, list[Any]] = {
        "x": [pick.samples for pick in picks],
        "y": [pick.loss for pick in picks],
        "name": [pick.winner for pick in picks],
        "within": [format_cell(pick.within) for pick in picks],
        "others": [len(pick.left) - 1 for pick in picks],
    }
    marks = chart.scatter(
        "x",
        "y",
        source=ColumnDataSource(columns),
        marker="diamond",
        size=15,
        fill_alpha=0,
        line_color=_GREY,
        line_width=3,
    )
    shown = [("picked for", "@x samples"), ("model", "@name"), ("within", "@within of the best (95 %)")]
    shown += [("not told from it", "@others")]
    chart.add_tools(HoverTool(renderers=[marks], tooltips=shown, attachment="below"))


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _parts(cells: Sequence[Interval | float]) -> dict[str, Any]:
    """Cells as text, values, and the ends of their intervals, None where there is no interval."""
    return {
        "text": [format_cell(cell) for cell in cells],
        "value": [cell.value if isinstance(cell, Interval) else cell for cell in cells],
        "low": [cell.low if isinstance(cell, Interval) else None for cell in cells],
        "high": [cell.high if isinstance(cell, Interval) else None for cell in cells],
    }


def _chart(ylabel: str, xlabel: str, scale: str = "linear") -> "BokehFigure":
    from bokeh.models import NoOverlap, Range1d
    from bokeh.plotting import figure

    chart = figure(
        height=340,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_axis_type=scale,
        x_range=Range1d(1, 2),
        y_range=Range1d(0, 1),
        x_axis_label=xlabel,
        y_axis_label=ylabel,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    for axis in chart.axis:
        axis.update(axis_line_color=_GREY, major_tick_line_color=_GREY, minor_tick_line_color=None)
        axis.update(axis_label_text_color=_GREY, major_label_text_color=_GREY, axis_label_text_font_style="normal")
        axis.update(
            axis_label_text_font_size="13px", major_label_text_font_size="12px", major_label_policy=NoOverlap()
        )
    for grid in chart.grid:
        grid.update(grid_line_color=_GREY, grid_line_alpha=0.25)
    return chart


def _run_chart(label: str, steps: Sequence[int], **ends: float) -> "BokehFigure":
    from bokeh.models import DataRange1d, HoverTool

    chart = _chart(f"{label} (lower is better)", "training step")
    margin = (max(steps) - min(steps)) / 25
    chart.x_range.update(start=min(steps) - margin, end=max(steps) + margin)
    chart.y_range = DataRange1d(**ends)
    chart.segment(
        "x", "low", "x", "high", source=(source := _source("run", "x y low high name text rows")), color=_GREY
    )
    chart.line("x", "y", source=source, color=COLORS[0], line_width=2)
    points = chart.scatter("x", "y", source=source, color=COLORS[0], size=7)
    shown = [("model", "@name"), ("step", "@x"), (label, "@text"), ("rows", "@rows")]
    chart.add_tools(HoverTool(renderers=[points], tooltips=shown, limit=4))
    return chart


def _source(name: str, columns: str) -> Any:
    """An empty table that `report.js` fills."""
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({column: [] for column in columns.split()}, name=name)


def _mathematical(label: str) -> str:
    return re.sub(r"_(\w+(?:\.\d+)?)", r"$_{\1}$", label)
