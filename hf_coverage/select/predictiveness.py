"""Which measure would have chosen the right checkpoints of a run: the paper's Figure 1 (right) for one's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import check_n, metric_key
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.predictiveness import RankCorrelations, rank_correlations
from hf_coverage.inference.files import strict_json
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.plots.checkpoints import plot_predictiveness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PredictivenessResult", "predictiveness"]


@dataclass(frozen=True, eq=False)
class PredictivenessResult:
    """How well cross-entropy, KL, Cov_N and miss_N order checkpoints by what sampling from them achieves.

    Attributes:
        names: The M checkpoints.
        correlations: Rank correlation of each guide with each outcome: -1 is a perfect guide, a positive one misleads.
        coverage: The guides that are Cov_N, or a bound on it, by their N.
    """

    names: tuple[str, ...]
    correlations: RankCorrelations = field(repr=False)
    coverage: dict[float, str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For each guide and outcome `guide`, `outcome`, `rank_correlation`, `low`, `high`; NaN where unknown."""
        found = self.correlations
        return [
            {
                "guide": guide,
                "outcome": outcome,
                "rank_correlation": float(found.values[k, j]),
                "low": float(found.low[k, j]),
                "high": float(found.high[k, j]),
            }
            for k, guide in enumerate(found.guides)
            for j, outcome in enumerate(found.outcomes)
        ]

    @property
    def sentence(self) -> str:
        """What was found and what it is worth, in plain words."""
        found = self.correlations
        parts = [f"Rank correlations over {len(self.names)} checkpoints, -1 for a perfect guide, above 0 misleading."]
        for outcome in found.outcomes:
            with_outcome = [f"{guide} {self._value(guide, outcome)}" for guide in found.guides]
            parts.append(f"With {outcome}: {', '.join(with_outcome)}.")
        if found.constant:
            parts.append(f"The same at all checkpoints, which is no order: {', '.join(found.constant)}.")
        if not np.isnan(found.low).all():
            parts.append(
                f"In brackets, the range of a bootstrap over the {found.num_prompts:,} prompts, for these checkpoints "
                "and not for another run. It is no confidence interval: noise draws rank correlations towards 0, and "
                "where checkpoints are alike the truth lies often outside."
            )
        return " ".join(parts)

    def plot(self, path: str | PathLike[str] | None = None, *, title: str | None = None) -> Figure:
        """Draw each outcome against Cov_N and KL (or cross-entropy), with both rank correlations above the panel.

        An outcome whose name ends in its N, as that of Pass@8 does, is drawn against the Cov_N nearest to half of it,
        as in the paper; any other one against the largest N.

        Args:
            path: File to write, its format given by the suffix; None only returns the figure.
            title: Title above the axes.
        """
        found = self.correlations
        values = dict(zip(found.guides, found.guide_values))
        divergence = "KL" if "KL" in values else "cross-entropy"
        guides = [self.coverage[_half(outcome, self.coverage)] for outcome in found.outcomes]
        notes = [
            f"rank correlation with {outcome}\n"
            + "\n".join(f"{_typeset(guide)}: {self._value(guide, outcome)}" for guide in (own, divergence))
            for outcome, own in zip(found.outcomes, guides)
        ]
        return plot_predictiveness(
            list(zip(found.outcomes, found.outcome_values)),
            values[divergence],
            [(_typeset(guide), values[guide]) for guide in guides],
            path,
            kl_label=f"{divergence} in nats",
            notes=notes,
            title=title,
        )

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Everything as strict JSON text, unknown and infinite numbers as null; also written to `path` where given."""
        found = self.correlations
        facts = {
            "sentence": self.sentence,
            "checkpoints": self.names,
            "guides": dict(zip(found.guides, found.guide_values)),
            "outcomes": dict(zip(found.outcomes, found.outcome_values)),
            "rank_correlations": self.rows,
            "confidence": found.confidence,
            "num_prompts": found.num_prompts,
        }
        return strict_json(facts, path)

    def _value(self, guide: str, outcome: str) -> str:
        found = self.correlations
        place = found.guides.index(guide), found.outcomes.index(outcome)
        value, low, high = (float(part[place]) for part in (found.values, found.low, found.high))
        if np.isnan(value):
            return "none (no order)"
        return f"{value:+.2f}" if np.isnan(low) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def predictiveness(
    profiles: Sequence[CoverageProfile],
    outcomes: Mapping[str, ArrayLike] | Sequence[float],
    n: Sequence[float] = (2, 4, 8, 16),
    *,
    outcome_groups: Iterable[Any] | None = None,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
) -> PredictivenessResult:
    """Tell how well cross-entropy, KL, Cov_N and miss_N order a run's checkpoints by their Pass@N.

    Spearman's rank correlation over the checkpoints: -1 is a perfect guide (the lower the measure, the more is
    achieved), a positive one misleads. On the same rows cross-entropy and KL differ by a constant, and so are equally
    good guides. The ranges are a bootstrap's over prompts, for these checkpoints and not for new
    runs; see `functional.rank_correlations` for how often they hold the truth.

    Args:
        profiles: One for each of M >= 3 checkpoints, on the same corpus. On a plain corpus the guides are
            cross-entropy and the upper bounds on Cov_N and miss_N. Where Pass@N is taken from the same single
            answers, miss_N is 1 - Pass@N, and a perfect guide to it.
        outcomes: By name, `(M, S)` what each checkpoint achieves on S prompts, such as unbiased estimates of Pass@N;
            or, where one answer to each prompt is right, the N of Pass@N, which then is exact.
        n: The N of Cov_N and miss_N.
        outcome_groups: `(S,)` the prompt of each column of the outcomes, labelled as the profiles' groups were; None
            if the columns are the corpus's rows.
        confidence: Nominal level of the ranges.
        bootstrap: How often prompts are drawn anew for them; 0 for none.
        seed: Of the bootstrap.

    Returns:
        The correlations, as a table, a figure and a sentence.

    Raises:
        ValueError: If the profiles are not of one corpus, or exact Pass@N is asked for where more than one answer to a
            prompt may be right.

    Example:
        >>> logprobs = np.log([[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.5, 0.06], [0.95, 0.95, 0.95, 0.01]])
        >>> profiles = [CoverageProfile.from_logprobs(row, np.zeros(4)) for row in logprobs]
        >>> print(predictiveness(profiles, [64], n=[32], bootstrap=0).sentence)
        Rank correlations over 3 checkpoints, -1 for a perfect guide, above 0 misleading.
        With Pass@64: cross-entropy +1.00, KL +1.00, Cov_32 -0.87, miss_32 -1.00.

    References:
        arXiv 2510.15020, Figure 1 (right).
    """
    levels = [check_n(value) for value in n]
    if not levels:
        raise ValueError("`n` must hold at least one N for Cov_N, but is empty.")
    _check_one_corpus(profiles)
    first = profiles[0]
    names = {value: first.label(value) for value in levels}
    ratios = np.array([profile.log_ratios for profile in profiles])
    guides: dict[str, NDArray[Any]] = {}
    if first.logprobs is not None:
        guides["cross-entropy"] = -np.array([profile.logprobs for profile in profiles], dtype=np.float64)
    if not first.is_upper_bound:
        guides["KL"] = ratios
    guides |= {names[value]: reached(ratios, value) for value in levels}
    guides |= {first.miss_label(value): np.array([miss_values(row, value) for row in ratios]) for value in levels}
    found = rank_correlations(
        guides,
        outcomes if isinstance(outcomes, Mapping) else _exact_passes(profiles, outcomes),
        groups=first.groups,
        outcome_groups=outcome_groups,
        weights=first.weights,
        confidence=confidence,
        replicates=bootstrap,
        seed=seed,
    )
    return PredictivenessResult(tuple(profile.name for profile in profiles), found, names)


def _check_one_corpus(profiles: Sequence[CoverageProfile]) -> None:
    if not profiles:
        raise ValueError("`profiles` must hold one profile for each checkpoint, but is empty.")
    for place, profile in enumerate(profiles):
        for what in ("kind", "num_rows", "groups", "weights"):
            mine, expected = getattr(profile, what), getattr(profiles[0], what)
            if not np.array_equal(mine, expected):
                raise ValueError(
                    f"`profiles` must all be of the same rows, but `{what}` of profile {place} ({profile.name!r}) is "
                    f"not that of profile 0 ({profiles[0].name!r}): measure all checkpoints on one corpus."
                )
        if (profile.logprobs is None) != (profiles[0].logprobs is None):
            raise ValueError(
                "`profiles` must all be made by `from_logprobs` or all by `from_log_ratios`, but profile "
                f"{place} ({profile.name!r}) is made otherwise than profile 0 ({profiles[0].name!r})."
            )


def _exact_passes(profiles: Sequence[CoverageProfile], n: Sequence[float]) -> dict[str, NDArray[Any]]:
    """Pass@N on every row of a corpus whose answers have D(y|x) = 1, so that the log ratio is -log p."""
    if profiles[0].kind != "single_answer":
        raise ValueError(
            "`outcomes` can be the N of Pass@N only where one answer to each prompt is right, but the reference is of "
            f"kind {profiles[0].kind!r}: give what was measured, by name, with a row for each checkpoint."
        )
    return {
        f"Pass@{metric_key(value)}": np.array([pass_probabilities(-profile.log_ratios, value) for profile in profiles])
        for value in n
    }


def _half(outcome: str, levels: Iterable[float]) -> float:
    """The N whose coverage belongs to an outcome: half of the N that its name ends in, or else the largest."""
    number = re.search(r"(?<![\d.])\d+(\.\d+)?$", outcome)
    half = float("inf") if number is None else float(number[0]) / 2
    return min(levels, key=lambda level: (abs(level - half), -level))


def _typeset(guide: str) -> str:
    return re.sub(r"Cov_(\S+)", r"Cov$_{\1}$", guide)
