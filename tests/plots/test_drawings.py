"""Every drawing, on few and many models, on nothing and on everything, misleads nobody and fits into its figure."""

from functools import cache

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from hf_coverage import plots
from hf_coverage.plots import BestOfNCurve, ProfileCurve
from hf_coverage.plots.figure import model_styles, monotone_band

LEVELS = (2, 4, 8, 16)
LONG = "organisation/a-run-with-a-name-that-says-all-of-its-settings-lr-0.0001-warmup-100-batch-64-number-{:04d}-x"


GRID = np.exp(np.linspace(0, np.log(64), 33))


def drawn(count, rows=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0.5 + place / count, 1.5, rows) for place in range(count)]


# what each case has of each model: its name, and log ratios
CASES = {
    "one model": {"model": drawn(1)[0]},
    "eight equal models": {f"model {letter}": drawn(1)[0] for letter in "abcdefgh"},
    "zero hits": {"early": np.full(40, -1.0), "late": np.full(40, -2.0)},
    "all hits": {"early": np.full(40, np.inf), "late": np.full(40, np.inf)},
    "one row": {"early": np.array([1.0]), "late": np.array([2.0])},
    "names of 100 characters": {LONG.format(place): ratios for place, ratios in enumerate(drawn(5))},
    "names that are no formulas": {"a $x$ $": drawn(1)[0], "_hidden": drawn(1, seed=1)[0], "two\nlines": drawn(1)[0]},
    "200 checkpoints": {f"runs/first/checkpoint-{50 * k}": ratios for k, ratios in enumerate(drawn(200, rows=20))},
}


def falling(case):
    for name, ratios in case.items():
        values = (ratios[:, None] >= np.log(GRID)).mean(axis=0)
        spread = np.sqrt(values * (1 - values) / ratios.size)
        # as wide where nothing was seen as exact intervals are
        high = np.where(values == 0, 3 / ratios.size, values + spread)
        low = np.where(values == 1, 1 - 3 / ratios.size, values - spread)
        yield ProfileCurve(name, GRID, values, np.clip(low, 0, 1), np.clip(high, 0, 1))


def of_profiles(case):
    curves = list(falling(case))
    panels = {"Cov$_N$ (lower is better)": curves, "miss$_N$ (lower is better)": curves}
    return plots.plot_profiles(panels, marks=LEVELS, title=LONG)


def of_bounds(case):
    return plots.plot_profiles({"upper bound on Cov$_N$ (lower is better)": list(falling(case))}, bounds=True)


def of_choice(case):
    curves = list(falling(case))
    picks = [(2.0**place, curve.name) for place, curve in zip(np.linspace(0, 4, len(curves)), curves)]
    return plots.plot_choice(curves, picks, title=LONG)


def rising(case):
    for name, ratios in case.items():
        grid = np.arange(1, 17)
        probabilities = np.exp(-np.maximum(ratios, 0.0))
        passes = np.mean(1 - (1 - probabilities[:, None]) ** grid, axis=0)
        spread = 1 / np.sqrt(ratios.size)
        yield BestOfNCurve(name, grid, passes, np.maximum(passes - spread, 0), np.minimum(passes + spread, 1))


def of_best_of_n(case):
    curves = list(rising(case))[:8]
    value = np.asarray(curves[0].value)
    return plots.plot_best_of_n(curves, lines=[(LONG, value)], bounds=[("ruled out", value / 2)], title=LONG)


def of_success(case):
    sampled = next(rising(case))
    beyond = BestOfNCurve("beyond", [16, 64, 256], [0.5, 0.6, 0.7], [0.2, 0.2, 0.2], [0.6, 0.9, 1.0])
    return plots.plot_success([sampled, beyond], title=LONG)


def of_training(case):
    values = [[(ratios >= np.log(n)).mean() for n in LEVELS] for ratios in case.values()]
    curves = [(f"Cov$_{{{n}}}$", column) for n, column in zip(LEVELS, np.transpose(values))]
    return plots.plot_training_curves(
        50 * np.arange(len(values)), np.linspace(1.5, 1, len(values)), curves, title=LONG
    )


def of_predictiveness(case):
    values = np.array([(ratios >= np.log(8)).mean() for ratios in case.values()])
    outcomes = [("Pass@8", 1 - values), (next(iter(case)).replace("$", ""), 1 - values**2)]
    coverage, notes = [("Cov$_8$", values)] * 2, [f"rank correlation with {LONG}\n+0.5"] * 2
    return plots.plot_predictiveness(outcomes, np.linspace(1.5, 1, len(values)), coverage, notes=notes, title=LONG)


def of_challenges(case):
    names, rows = list(case), next(iter(case.values()))
    rates = np.random.default_rng(0).random((len(names), len(names))) * min(1.0, np.mean(rows > 0) + 0.0)
    rates[np.isnan(rates)] = 0.0
    np.fill_diagonal(rates, 0.0)
    return plots.plot_challenges(names, rates, winner=names[-1], title=LONG)


DRAWINGS = {
    "plot_best_of_n": of_best_of_n,
    "plot_challenges": of_challenges,
    "plot_choice": of_choice,
    "plot_predictiveness": of_predictiveness,
    "plot_profiles": of_profiles,
    "plot_profiles of bounds": of_bounds,
    "plot_success": of_success,
    "plot_training_curves": of_training,
}


@cache
def figure_of(name, case):
    return DRAWINGS[name](CASES[case])


UNBANDED = ("plot_challenges", "plot_predictiveness", "plot_training_curves")


def test_every_drawing_is_looked_at():
    assert {name.split()[0] for name in DRAWINGS} == {name for name in plots.__all__ if name.startswith("plot_")}


def texts_outside(figure):
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    # ticks beyond an axis's range have labels that are never drawn
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    drawn = {id(tick) for axis in axes for tick in axis._update_ticks()}
    ticks = [tick for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) if id(tick) not in drawn]
    undrawn = {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if id(text) in undrawn or not text.get_visible() or not text.get_text().strip():
            continue
        box = text.get_window_extent()
        if not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1):
            yield text.get_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_lies_outside_the_figure(name, case):
    assert not list(texts_outside(figure_of(name, case)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in DRAWINGS if name not in UNBANDED])
def test_bands_are_monotone_and_no_slab_lies_on_an_axis(name, case):
    falls = name.startswith(("plot_profiles", "plot_choice"))
    for ax in figure_of(name, case).axes:
        for band in ax.findobj(FillBetweenPolyCollection):
            for path in [] if band.get_hatch() else band.get_paths():
                by_x = {}
                for x, y in path.vertices:
                    by_x.setdefault(x, []).append(y)
                ends = np.array([(min(by_x[x]), max(by_x[x])) for x in sorted(by_x)])
                steps = np.diff(ends, axis=0)
                assert (steps <= 1e-12).all() if falls else (steps >= -1e-12).all()
    if case in ("zero hits", "all hits"):
        ax = figure_of(name, case).axes[0]
        filled = [band for band in ax.findobj(FillBetweenPolyCollection) if band.get_paths() and not band.get_hatch()]
        assert not filled or name == "plot_success"


def test_a_band_that_was_not_monotone_is_widened():
    low, high = monotone_band([0.5, 0.6, 0.1, 0.2], [0.9, 0.7, 0.8, 0.1], falling=True)
    assert low.tolist() == [0.5, 0.5, 0.1, 0.1]
    assert high.tolist() == [0.9, 0.8, 0.8, 0.1]
    low, high = monotone_band([0.3, 0.1], [0.4, 0.2], falling=False)
    assert (low.tolist(), high.tolist()) == ([0.1, 0.1], [0.4, 0.4])


@pytest.mark.parametrize("count", [2, 8, 14, 200])
def test_models_differ_and_look_the_same_in_every_figure(count):
    names = [f"model {k}" for k in range(count)]
    styles = model_styles(names)
    assert len(set(styles)) == count
    assert model_styles(names[::2], among=names) == styles[::2]
    assert model_styles(["another"], among=names) == model_styles(["another"])


def test_equal_curves_are_each_seen():
    lines = figure_of("plot_profiles", "eight equal models").axes[0].lines[:8]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 8
    assert len({tuple(np.arange(len(GRID))[slice(line.get_markevery()[0], None, 5)]) for line in lines}) >= 4


def test_reported_levels_are_marked_and_steps_are_named_by_their_number():
    steps = {f"runs/first/checkpoint-{step}": drawn(1)[0] for step in (500, 1000)}
    figure = of_profiles(steps)
    (legend,) = [figure.axes[0].get_legend()]
    assert legend.get_title().get_text() == "checkpoint"
    assert [text.get_text() for text in legend.get_texts()][:3] == ["500", "1000", "N = 2, 4, 8, 16"]
    for ax in figure.axes:
        assert [line.get_xdata()[0] for line in ax.lines[2:]] == list(LEVELS)


def test_the_field_that_decides_is_framed_and_numbers_stand_where_they_fit():
    rates = np.array([[0.0, 0.5, 0.1], [0.2, 0.0, 0.1], [0.3, 0.4, 0.0]])
    figure = plots.plot_challenges(["a", "b", "c"], rates)
    ax = figure.axes[0]
    centres = [patch.get_center() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert sorted((round(x), round(y)) for x, y in centres) == [(0, 2), (1, 0), (2, 0), (2, 1)]
    assert [text.get_text() for text in ax.texts] == ["0", ".50", ".10", ".20", "0", ".10", ".30", ".40", "0"]
    soft = plots.plot_challenges(["a", "b", "c"], rates, decides=False).axes[0]
    assert not soft.patches
    assert "all find together" in soft.get_xlabel().replace("\n", " ")
    assert not figure_of("plot_challenges", "200 checkpoints").axes[0].texts


@pytest.mark.parametrize("name", ["plot_profiles", "plot_choice", "plot_best_of_n", "plot_success"])
def test_shares_begin_at_zero(name):
    assert {ax.get_ylim()[0] for ax in figure_of(name, "one model").axes} == {0.0}
