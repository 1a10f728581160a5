"""What coverage profiles say, as tables and in plain sentences."""

import math
from collections.abc import Sequence

from hf_coverage.functional.checks import metric_key
from hf_coverage.functional.paired import PairedDifference, paired_coverage_difference
from hf_coverage.functional.statistics import MeanEstimate, mean_interval
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.report.table import Cell, Column, Interval, Table, format_number

__all__ = ["comparison_table", "paired_differences", "profile_table", "summarize_profiles"]


def profile_table(profiles: Sequence[CoverageProfile], n: Sequence[float], *, regret: float = 0.1) -> Table:
    """Coverage, KL, cross-entropy and Best-of-N budget of models, one row each, with 95 % intervals.

    Args:
        profiles: All on references of which the same is known.
        n: The N to show.
        regret: The loss of expected reward, in (0, 1), that the Best-of-N budget allows.

    Raises:
        ValueError: If `profiles` is empty or mixes Cov_N with its upper bound.
    """
    quantity = shared_quantity(profiles)
    columns: list[Column | str] = ["model", "rows", "prompts"]
    columns += [Column(profiles[0].label(value), "lower") for value in n]
    bound = profiles[0].is_upper_bound
    columns += [] if bound else [Column("KL", "lower")]
    columns += [Column("cross-entropy", "lower"), Column("Best-of-N budget", "lower")]
    rows: list[list[Cell]] = []
    for profile in profiles:
        cells: list[Cell] = [profile.name, profile.num_rows, profile.num_groups]
        cells += [coverage_cell(profile, value) for value in n]
        cells += [] if bound else [_mean_cell(profile.kl, profile.kl_standard_error, profile.num_groups)]
        cells.append(_cross_entropy_cell(profile))
        rows.append([*cells, _whole(profile.best_of_n_budget(regret).n)])
    units = "Cross-entropy is" if bound else "KL and cross-entropy are"
    caption = (
        f"{_capital(quantity)}, lower is better, with 95 % confidence intervals. {units} in nats a response; the "
        f"Best-of-N budget allows a regret of {regret:g}."
    )
    return Table(columns, rows, caption)


def paired_differences(
    baseline: CoverageProfile, other: CoverageProfile, n: Sequence[float], *, confidence: float = 0.95
) -> list[PairedDifference]:
    """Cov_N of `other` minus Cov_N of `baseline` on the same rows, at each N; positive: `other` covers less.

    Raises:
        ValueError: If the two profiles show different quantities or have different rows.
    """
    shared_quantity([baseline, other])
    return [
        paired_coverage_difference(
            other.log_ratios,
            baseline.log_ratios,
            value,
            groups=baseline.groups,
            weights=baseline.weights,
            confidence=confidence,
        )
        for value in n
    ]


def comparison_table(baseline: CoverageProfile, others: Sequence[CoverageProfile], n: Sequence[float]) -> Table:
    """Paired differences of models to a baseline on the same rows, one row for each model and N.

    Args:
        baseline: What the others are compared with.
        others: Profiles of the same rows, in the same order.
        n: The N to show.
    """
    shared_quantity([baseline, *others])
    rows: list[list[Cell]] = []
    for other in others:
        for value, difference in zip(n, paired_differences(baseline, other, n)):
            rows.append(
                [
                    other.name,
                    baseline.label(value),
                    other.level(value),
                    baseline.level(value),
                    Interval(difference.difference, difference.low, difference.high),
                    difference.p_value,
                    verdict(difference),
                ]
            )
    columns: list[Column | str] = ["model", "quantity", "value", baseline.name, "difference", "p-value", "verdict"]
    caption = (
        f"Paired differences to {baseline.name} on the same rows, with 95 % confidence intervals: "
        "below zero the model covers more than the baseline."
    )
    return Table(columns, rows, caption)


def summarize_profiles(
    profiles: Sequence[CoverageProfile], n: Sequence[float], *, regret: float = 0.1, baseline: bool = False
) -> list[str]:
    """What the numbers say in plain sentences: coverage at the largest N, the comparison, the samples needed.

    Args:
        profiles: One a model.
        n: The N that are reported; the sentences speak of the largest.
        regret: The loss of expected reward, in (0, 1), that the Best-of-N budget allows.
        baseline: Whether the first profile is compared with the others, all of the same rows.

    Example:
        >>> profile = CoverageProfile.from_logprobs([-1.0] * 9 + [-9.0], [-1.0] * 10, name="small")
        >>> first, second = summarize_profiles([profile], [2, 16], regret=0.2)
        >>> first
        "10.0 % of the reference's responses (95 % interval 1.8 % to 40.4 %) are at least 16 times less likely ..."
        >>> second.split(": ")[1]
        'Best-of-N with 5 samples is guaranteed to lose at most 0.2 of expected reward against the reference, ...'
    """
    shared_quantity(profiles)
    at = max(n)
    ordered = sorted(profiles, key=lambda profile: profile.level(at))
    sentences = [_coverage_sentence(profiles[0], at)] if len(profiles) == 1 else [_ranking_sentence(ordered, at)]
    if baseline:
        sentences += [_difference_sentence(profiles[0], other, at) for other in profiles[1:]]
    return sentences + [_budget_sentence(profile, regret) for profile in profiles]


def shared_quantity(profiles: Sequence[CoverageProfile]) -> str:
    """What all the profiles show, in words; ValueError where they do not show the same."""
    if not profiles:
        raise ValueError("`profiles` must hold at least one coverage profile.")
    quantities = sorted({profile.quantity for profile in profiles})
    if len(quantities) > 1:
        raise ValueError(f"`profiles` must all show the same quantity, but there are {', '.join(quantities)}.")
    return quantities[0]


def coverage_cell(profile: CoverageProfile, n: float) -> Interval:
    """Cov_N (its upper bound on a plain corpus) with its 95 % interval."""
    return Interval(profile.level(n), *profile.interval(n))


def verdict(difference: PairedDifference) -> str:
    """A paired difference in one word or two."""
    if difference.low > 0:
        return "worse"
    return "better" if difference.high < 0 else "no clear difference"


def _mean_cell(mean: float, standard_error: float, num_groups: int) -> Interval:
    return Interval(mean, *mean_interval(MeanEstimate(mean, standard_error, num_groups)))


def _cross_entropy_cell(profile: CoverageProfile) -> Interval | None:
    if profile.logprobs is None:
        return None
    return _mean_cell(profile.cross_entropy, profile.cross_entropy_standard_error, profile.num_groups)


def _coverage_sentence(profile: CoverageProfile, n: float) -> str:
    value, low, high = coverage_cell(profile, n)
    share = f"{_percent(value)} of the reference's responses (95 % interval {_percent(low)} to {_percent(high)})"
    if profile.is_upper_bound:
        return (
            f"At most {share} are at least {metric_key(n)} times less likely under {profile.name} than under the "
            f"reference: the {profile.label(n)} is {format_number(value)}. Lower is better."
        )
    return (
        f"{share} are at least {metric_key(n)} times less likely under {profile.name} than under the reference: "
        f"{profile.label(n)} = {format_number(value)}. Lower is better."
    )


def _ranking_sentence(ordered: Sequence[CoverageProfile], n: float) -> str:
    ranking = ", ".join(f"{profile.name} ({format_number(profile.level(n))})" for profile in ordered)
    return f"{_capital(ordered[0].label(n))} from best to worst: {ranking}. Lower is better."


def _difference_sentence(baseline: CoverageProfile, other: CoverageProfile, n: float) -> str:
    (difference,) = paired_differences(baseline, other, [n])
    words = {"worse": "covers less than", "better": "covers more than"}
    relation = words.get(verdict(difference), "does not clearly differ in coverage from")
    ends = f"95 % interval {format_number(difference.low)} to {format_number(difference.high)}"
    return (
        f"At N = {metric_key(n)}, {other.name} {relation} {baseline.name} on the same rows: the difference is "
        f"{format_number(difference.difference)} ({ends})."
    )


def _budget_sentence(profile: CoverageProfile, regret: float) -> str:
    budget = profile.best_of_n_budget(regret)
    loss = f"lose at most {regret:g} of expected reward against the reference"
    if math.isinf(budget.n):
        return f"{profile.name}: no number of samples is guaranteed to make Best-of-N {loss}."
    necessary = math.ceil(budget.necessary_n)
    floor = f"; fewer than {necessary:,} cannot guarantee it" if necessary >= 2 else ""
    return (
        f"{profile.name}: Best-of-N with {format_number(_whole(budget.n))} samples is guaranteed to {loss}, whatever "
        f"the reward in [0, 1]{floor}."
    )


def _whole(n: float) -> float:
    """Samples as a whole number, where it is one that can be written out."""
    return math.ceil(n) if n < 1e9 else n


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
