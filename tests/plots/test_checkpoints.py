"""The drawings of a training run show the numbers they were given."""

import numpy as np
import pytest

from hf_coverage.plots import COLORS, plot_predictiveness, plot_training_curves

STEPS = [0, 10, 20, 30]
KL = [1.4, 1.0, 0.8, 0.7]
COVERAGE = [("Cov$_4$", [0.3, 0.1, 0.2, 0.25]), ("Cov$_8$", [0.2, 0.05, 0.1, 0.15])]
PASSES = [("Pass@8", [0.8, 0.9, 0.85, 0.83]), ("Pass@12", [0.85, 0.95, 0.9, 0.88])]


def test_curves_and_their_best_checkpoints(tmp_path):
    figure = plot_training_curves(STEPS, KL, COVERAGE, tmp_path / "curves.png", title="A run")
    left, right = figure.axes
    line, best = left.lines
    assert np.array_equal(line.get_xydata(), np.column_stack([STEPS, KL]))
    assert best.get_xydata().tolist() == [[30, 0.7]]
    for (label, values), line, best in zip(COVERAGE, right.lines[::2], right.lines[1::2]):
        assert line.get_label() == label
        assert np.array_equal(line.get_xydata(), np.column_stack([STEPS, values]))
        assert best.get_xydata().tolist() == [[10, min(values)]]
    assert right.get_yscale() == "linear"
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0
    assert "lower is better" in left.get_ylabel()
    assert "lower is better" in right.get_ylabel()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [0, len(COLORS)])
def test_as_many_curves_as_colours(count):
    with pytest.raises(ValueError, match="`coverage` must hold 1 to 6 curves"):
        plot_training_curves(STEPS, KL, COVERAGE[:1] * count)


def test_predictiveness_sets_both_predictors_against_pass_at_n(tmp_path):
    figure = plot_predictiveness(PASSES, KL, COVERAGE, tmp_path / "right.png")
    panels, uppers = figure.axes[:2], figure.axes[2:]
    for panel, upper, (pass_label, passes), (cov_label, coverage) in zip(panels, uppers, PASSES, COVERAGE):
        assert np.array_equal(panel.lines[0].get_xydata(), np.column_stack([coverage, passes]))
        assert np.array_equal(upper.lines[0].get_xydata(), np.column_stack([KL, passes]))
        assert panel.lines[1].get_markerfacecolor() == "white"
        assert panel.get_xlabel() == f"{cov_label} (lower is better)"
        assert panel.get_ylabel() == f"{pass_label} (higher is better)"
        assert upper.get_xlabel() == "KL in nats (lower is better)"
    assert (tmp_path / "right.png").read_bytes().startswith(b"\x89PNG")


def test_notes_stand_above_the_panels_and_the_upper_axis_says_what_it_shows():
    figure = plot_predictiveness(PASSES, KL, COVERAGE, kl_label="cross-entropy in nats", notes=["one", "two"])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["one", "two"]
    assert figure.axes[2].get_xlabel() == "cross-entropy in nats (lower is better)"
    with pytest.raises(ValueError, match="`notes` must have one text for each of 2 panels, but has 1"):
        plot_predictiveness(PASSES, KL, COVERAGE, notes=["one"])


@pytest.mark.parametrize(("passes", "coverage"), [([], []), (PASSES, COVERAGE[:1])])
def test_predictiveness_wants_pairs(passes, coverage):
    with pytest.raises(ValueError, match="`passes` and `coverage` must go in pairs"):
        plot_predictiveness(passes, KL, coverage)
