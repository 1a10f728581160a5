"""What coverage profiles say, as tables and in plain sentences."""

import math
from collections.abc import Callable, Sequence

from hf_coverage.functional.checks import metric_key
from hf_coverage.functional.paired import PairedDifference, paired_coverage_difference, paired_miss_difference
from hf_coverage.functional.statistics import MeanEstimate, holm_p_values, mean_interval
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.report.table import Cell, Column, Interval, Table, format_cell, format_number

__all__ = [
    "comparison_table",
    "paired_differences",
    "paired_miss_differences",
    "pass_table",
    "profile_table",
    "summarize_many",
    "summarize_profiles",
]


_LAST_COLUMNS = ("cross-entropy (nats)", "Best-of-N budget (samples)", "guaranteed budget (samples)")
_UNCLEAR = "no clear difference"


def profile_table(profiles: Sequence[CoverageProfile], n: Sequence[float], *, regret: float = 0.1) -> Table:
    """Cov_N, miss_N, KL, cross-entropy and Best-of-N budgets of models, one row each, with their intervals.

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
    columns += [Column(profiles[0].miss_label(value), "lower") for value in n]
    bound = profiles[0].is_upper_bound
    columns += [] if bound else [Column("KL (nats)", "lower")]
    columns += [Column(name, "lower") for name in _LAST_COLUMNS]
    rows: list[list[Cell]] = []
    for profile in profiles:
        cells: list[Cell] = [profile.name, profile.num_rows, profile.num_groups]
        cells += [coverage_cell(profile, value) for value in n]
        cells += [miss_cell(profile, value) for value in n]
        cells += [] if bound else [mean_cell(profile.kl, profile.kl_standard_error, profile.num_groups)]
        cells.append(_cross_entropy_cell(profile))
        budget = profile.best_of_n_budget(regret)
        rows.append([*cells, _whole(budget.n), _whole(budget.guaranteed_n)])
    units = "Cross-entropy is" if bound else "KL and cross-entropy are"
    caption = (
        f"{_capital(quantity)} and {quantity.replace('Cov_N', 'miss_N')}, lower is better, with 95 % confidence "
        f"intervals. {units} in nats a response, with Student's interval, which a mean without a bound can be outside "
        f"of more often; the Best-of-N budget is the samples with which miss_N is at most "
        f"{regret:g}, the guaranteed budget those with which it is so with 95 % confidence."
    )
    return Table(columns, rows, caption)


def pass_table(profiles: Sequence[CoverageProfile], n: Sequence[float]) -> Table | None:
    """Exact Pass@N of independent and of stratified samples side by side, one row for each model and N.

    Args:
        profiles: One a model.
        n: The N to show; those that are no whole number are left out.

    Returns:
        The table; None where the intervals of single right answers are not known of all models.
    """
    if any(profile.kind != "single_answer" or profile.interval_lows is None for profile in profiles):
        return None
    rows: list[list[Cell]] = []
    for profile in profiles:
        for value in (value for value in n if value == int(value)):
            cells = [
                Interval(profile.pass_at(value, kind), *profile.pass_interval(value, kind))
                for kind in ("independent", "stratified")
            ]
            rows.append([profile.name, metric_key(value), *cells, cells[1].value - cells[0].value])
    columns: list[Column | str] = ["model", "N", Column("Pass@N, independent", "higher")]
    columns += [Column("Pass@N, stratified", "higher"), "gain"]
    caption = (
        "Exact Pass@N of N independent samples, and of N stratified ones (`stratified_generate`), with 95 % intervals "
        "over prompts; the gain is that of the samples' places alone, and never negative."
    )
    return Table(columns, rows, caption) if rows else None


def paired_differences(
    baseline: CoverageProfile, other: CoverageProfile, n: Sequence[float], *, confidence: float = 0.95
) -> list[PairedDifference]:
    """Cov_N of `other` minus Cov_N of `baseline` on the same rows, at each N; positive: `other` covers less.

    Raises:
        ValueError: If the two profiles show different quantities or have different rows.
    """
    return _differences(paired_coverage_difference, baseline, other, n, confidence)


def paired_miss_differences(
    baseline: CoverageProfile, other: CoverageProfile, n: Sequence[float], *, confidence: float = 0.95
) -> list[PairedDifference]:
    """miss_N of `other` minus miss_N of `baseline` on the same rows, at each N; positive: `other` covers less.

    Raises:
        ValueError: If the two profiles show different quantities or have different rows.
    """
    return _differences(paired_miss_difference, baseline, other, n, confidence)


def comparison_table(
    baseline: CoverageProfile, others: Sequence[CoverageProfile], n: Sequence[float], *, corrected: bool = False
) -> Table:
    """Paired differences of models to a baseline on the same rows, two rows for each model and N: Cov_N and miss_N.

    Args:
        baseline: What the others are compared with.
        others: Profiles of the same rows, in the same order.
        n: The N to show.
        corrected: Whether p-values are also corrected for how many there are, and verdicts are by these.
    """
    shared_quantity([baseline, *others])
    rows: list[list[Cell]] = []
    found: list[PairedDifference] = []
    for other in others:
        for value, *differences in zip(
            n, paired_differences(baseline, other, n), paired_miss_differences(baseline, other, n)
        ):
            found += differences
            rows.append([other.name, baseline.label(value), other.level(value), baseline.level(value)])
            rows.append([other.name, baseline.miss_label(value), other.miss_level(value), baseline.miss_level(value)])
    columns: list[Column | str] = ["model", "quantity", "value", baseline.name, "difference", "p-value"]
    if corrected:
        tests = f"p-values are two-sided; the corrected ones are Holm's, for the {len(rows)} in this table"
        every = holm_p_values([difference.p_value for difference in found]).tolist()
        ends: list[list[Cell]] = [[p, verdict(one) if p < 0.05 else _UNCLEAR] for one, p in zip(found, every)]
        columns.append("corrected")
    else:
        tests = f"p-values are of single comparisons, not corrected for there being {len(rows)}" if rows[1:] else ""
        ends = [[verdict(difference)] for difference in found]
    caption = (
        f"Paired differences to {baseline.name} on the same rows, with 95 % confidence intervals: "
        f"below zero the model covers more than the baseline{'; ' + tests if tests else ''}."
    )
    cells = [[*row, *_difference_cells(difference), *end] for row, difference, end in zip(rows, found, ends)]
    return Table([*columns, "verdict"], cells, caption)


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
        "10.0 % of the reference's responses (95 % interval 0.3 % to 44.5 %) are at least 16 times less likely ..."
        >>> second.split(": ")[1]
        'Best-of-N with 1 sample loses at most 0.2 of expected reward against the reference, whatever the reward ...'
    """
    shared_quantity(profiles)
    at = max(n)
    ordered = sorted(profiles, key=lambda profile: profile.level(at))
    sentences = [_coverage_sentence(profiles[0], at)] if len(profiles) == 1 else [_ranking_sentence(ordered, at)]
    if baseline:
        sentences += [_difference_sentence(profiles[0], other, at) for other in profiles[1:]]
    return sentences + [_budget_sentence(profile, regret) for profile in profiles]


def summarize_many(
    profiles: Sequence[CoverageProfile], n: float, *, regret: float = 0.1, comparison: Table | None = None
) -> list[str]:
    """What many profiles say, in three sentences at most: the first and the last, how many differ, samples needed.

    Args:
        profiles: More than one.
        n: The N that the sentences speak of.
        regret: The loss of expected reward, in (0, 1), that the Best-of-N budget allows.
        comparison: What `comparison_table` gave of them.

    Example:
        >>> profiles = [CoverageProfile.from_logprobs([-p], [-1.0], name=f"m{p}") for p in (1, 2, 9)]
        >>> print(summarize_many(profiles, 4)[0])
        Of 3 models m1 has the least miss_4, 0 [0, 1], and m9 the most, 0.999 [0, 1]. Lower is better.
    """
    shared_quantity(profiles)
    ordered = sorted(profiles, key=lambda profile: profile.miss_level(n))
    ends = [f"{format_cell(miss_cell(profile, n))}" for profile in (ordered[0], ordered[-1])]
    sentences = [
        f"Of {len(profiles)} models {ordered[0].name} has the least {ordered[0].miss_label(n)}, {ends[0]}, and "
        f"{ordered[-1].name} the most, {ends[1]}. Lower is better."
    ]
    if comparison is not None:
        found = [cells[-1] for cells in comparison.rows if cells[1] == profiles[0].miss_label(n)]
        sentences.append(
            f"On the same rows {found.count('better')} of {len(found)} have a lower {profiles[0].miss_label(n)} than "
            f"{profiles[0].name} and {found.count('worse')} a higher one, by p-values that are corrected for their "
            f"number; of {found.count(_UNCLEAR)} chance explains the difference."
        )
    return [*sentences, _budget_sentence(ordered[0], regret)]


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


def miss_cell(profile: CoverageProfile, n: float) -> Interval:
    """miss_N (its upper bound on a plain corpus) with its 95 % interval."""
    return Interval(profile.miss_level(n), *profile.miss_interval(n))


def mean_cell(mean: float, standard_error: float, num_groups: int) -> Interval:
    """A mean with Student's 95 % interval."""
    return Interval(mean, *mean_interval(MeanEstimate(mean, standard_error, num_groups)))


def verdict(difference: PairedDifference) -> str:
    """A paired difference in one word or two."""
    if difference.low > 0:
        return "worse"
    return "better" if difference.high < 0 else _UNCLEAR


def _differences(
    difference: Callable[..., PairedDifference],
    baseline: CoverageProfile,
    other: CoverageProfile,
    n: Sequence[float],
    confidence: float,
) -> list[PairedDifference]:
    shared_quantity([baseline, other])
    rows = {"groups": baseline.groups, "weights": baseline.weights}
    return [difference(other.log_ratios, baseline.log_ratios, value, **rows, confidence=confidence) for value in n]


def _difference_cells(difference: PairedDifference) -> list[Cell]:
    return [Interval(difference.difference, difference.low, difference.high), difference.p_value]


def _cross_entropy_cell(profile: CoverageProfile) -> Interval | None:
    if profile.logprobs is None:
        return None
    return mean_cell(profile.cross_entropy, profile.cross_entropy_standard_error, profile.num_groups)


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
    loss = f"loses at most {regret:g} of expected reward against the reference, whatever the reward in [0, 1]"
    if math.isinf(budget.n):
        return (
            f"{profile.name}: no number of samples is sure to be enough so that Best-of-N {loss}: too many responses "
            "are out of reach."
        )
    necessary = math.ceil(budget.necessary_n)
    floor = f"; fewer than {necessary:,} are not enough for every reward" if necessary >= 2 else ""
    sure = (
        f"these {profile.num_groups:,} prompts are too few to say it with 95 % confidence of any number"
        if math.isinf(budget.guaranteed_n)
        else f"with {format_number(_whole(budget.guaranteed_n))} it is guaranteed with 95 % confidence"
    )
    samples = f"{format_number(_whole(budget.n))} {'sample' if budget.n == 1 else 'samples'}"
    return f"{profile.name}: Best-of-N with {samples} {loss}, by the estimate; {sure}{floor}."


def _whole(n: float) -> float:
    """Samples as a whole number, where it is one that can be written out."""
    return math.ceil(n) if n < 1e9 else n


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
