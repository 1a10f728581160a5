"""Drawing coverage profiles: which N to show, and which profiles may share a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from hf_coverage.functional.checks import FloatArray
from hf_coverage.plots import plot_profiles

if TYPE_CHECKING:
    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["draw_profiles", "profile_grid"]


def profile_grid(log_ratios: FloatArray) -> FloatArray:
    """N from 1 to where a profile has ended, at least 16 and at most 1,000,000, evenly in log N."""
    finite = log_ratios[np.isfinite(log_ratios)]
    top = float(finite.max()) + 0.25 if finite.size else 0.0
    return np.exp(np.linspace(0.0, min(max(top, math.log(16)), math.log(1e6)), 97))


def draw_profiles(
    profiles: Sequence[CoverageProfile],
    path: str | PathLike[str] | None = None,
    *,
    n: Iterable[float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw profiles in one picture, see `CoverageProfile.plot`."""
    quantities = sorted({profile.quantity for profile in profiles})
    if len(quantities) > 1:
        raise ValueError(f"`others` must show the same quantity as this profile, but there are {quantities}.")
    grids = [profile_grid(profile.log_ratios) for profile in profiles]
    grid = max(grids, key=lambda values: values[-1]).tolist() if n is None else list(n)
    ylabel = quantities[0].replace("Cov_N", "Cov$_N$") + " (lower is better)"
    return plot_profiles([profile.curve(grid) for profile in profiles], path, ylabel=ylabel, title=title)
