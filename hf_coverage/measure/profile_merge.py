"""Merging coverage profiles: the rows of both, where both know the same things of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.statistics import row_weights

if TYPE_CHECKING:
    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["merged_fields"]


def merged_fields(first: CoverageProfile, second: CoverageProfile) -> tuple[Any, ...]:
    """The fields of the profile of both parts' rows, in the order of `CoverageProfile`; it keeps the first's name.

    Raises:
        ValueError: if the parts know different things of their reference or only one of them has groups.
    """
    for what, mine, theirs in (
        ("`kind`", first.kind, second.kind),
        ("whether log p is known", first.logprobs is None, second.logprobs is None),
        ("whether rows have `groups`", first.groups is None, second.groups is None),
    ):
        if mine != theirs:
            raise ValueError(f"profiles to merge must agree on {what}, but have {mine!r} and {theirs!r}.")
    unweighted = first.weights is None and second.weights is None
    weights = [row_weights(part.weights, part.num_rows) for part in (first, second)]
    return (
        np.concatenate([first.log_ratios, second.log_ratios]),
        _concatenate(first.logprobs, second.logprobs),
        _concatenate(first.groups, second.groups),
        None if unweighted else np.concatenate(weights),
        first.kind,
        first.name,
    )


def _concatenate(first: NDArray[Any] | None, second: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if first is None or second is None else np.concatenate([first, second])
