"""Drawings of arrays. They know no models, and no files but the one that they write.

Figures are matplotlib `Figure` objects made without pyplot, so nothing is shown and no global state is touched.
matplotlib itself is imported by the first drawing.
"""

from hf_coverage.plots.checkpoints import plot_predictiveness, plot_training_curves
from hf_coverage.plots.figure import COLORS, new_axes, save_figure
from hf_coverage.plots.over_n import (
    BestOfNCurve,
    ProfileCurve,
    plot_best_of_n,
    plot_choice,
    plot_profiles,
    plot_success,
)
from hf_coverage.plots.tournament import plot_challenges

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
