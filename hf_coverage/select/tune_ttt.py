"""Which steps of test-time training cover best, and whether they cover more than none: chosen on half of the prompts,
judged on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import check_count, metric_key
from hf_coverage.functional.coverage_profile import smallest_n
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference, paired_miss_difference
from hf_coverage.functional.statistics import group_codes
from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.select.ttt_choice import ChosenBy, TTTChoice
from hf_coverage.select.ttt_settings import check_rules, rule_name

__all__ = ["split_groups", "tune_ttt"]


def tune_ttt(
    plain: ArrayLike,
    adapted: Mapping[StepRule, ArrayLike],
    n: float = 16,
    *,
    reference_logprobs: ArrayLike | None = None,
    groups: Iterable[Any] | None = None,
    by: ChosenBy | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> TTTChoice:
    """Choose the steps of test-time training by miss_N or Cov_N on half of the prompts, and judge them on the others.

    The rule with the least miss_N is chosen where log D is known, else the one with the least upper bound on Cov_N; of
    several, the one with the least cross-entropy, and then the first. Its paired difference to plain decoding is taken
    on prompts that had no part in the choice, or the luckiest of many rules would pass for a good one.

    Args:
        plain: `(R,)` log p(y|x) of the model as it is, nats.
        adapted: `(R,)` log p_TTT(y|x) of the same rows for each rule, of `score_rules` or `score_responses(...,
            ttt=rule)`, nats. Rules are `TTTConfig`s, or `StepRule`s for the head; `ttt_grid` makes many. A rule that
            has NaN or -inf for a row where `plain` is finite has diverged: it is named, and not chosen.
        n: The N of miss_N or Cov_N, a real number > 1.
        reference_logprobs: `(R,)` log D(y|x), nats; 0 where one response is right; None where it is not known.
        groups: `(R,)` the prompt of each row, if prompts repeat; a prompt's rows stay in one half.
        by: `"miss"` or `"coverage"`, what chooses and is compared; None: miss_N where log D is known, Cov_N where it
            is not.
        confidence: Level of the intervals.
        seed: Of the halves.

    Returns:
        The choice; plain decoding if all rules diverged.

    Raises:
        ValueError: If there are fewer than four prompts, a rule is none that `ttt_generate` can follow, rows do not
            match, or N is so small that every response is in Cov_N whatever the rule.

    Example:
        >>> plain = np.tile([-1.0, -4.0, -4.0, -9.0], 10)
        >>> adapted = {StepRule(0.1): plain + 0.5, StepRule(1.0): np.tile([-1.0, -1.0, -1.0, -9.0], 10)}
        >>> choice = tune_ttt(plain, adapted, n=16)
        >>> choice.rule.lr, choice.helps
        (1.0, True)

    References:
        arXiv 2510.15020, Equations (1), (22) and (23), Remark 2.2.
    """
    if not isinstance(adapted, Mapping):
        raise TypeError(f"`adapted` must map each `StepRule` to its log-probabilities, got {type(adapted).__name__}.")
    rules = check_rules(list(adapted), n)
    diverged = tuple(rule for rule, values in adapted.items() if _has_diverged(values, plain))
    followed = {rule: values for rule, values in adapted.items() if rule not in diverged}
    profiles = _profiles(plain, followed, reference_logprobs, groups)
    by = by or ("coverage" if profiles[0].is_upper_bound else "miss")
    if by not in get_args(ChosenBy):
        raise ValueError(f"`by` must be one of {', '.join(get_args(ChosenBy))}, but is {by!r}.")
    if followed and by == "coverage" and all(profile.level(n) == 1 for profile in profiles):
        raise ValueError(_too_small(profiles[0], n))
    codes = profiles[0].groups
    first = split_groups(np.arange(profiles[0].num_rows, dtype=np.uint64) if codes is None else codes, seed)
    searched = tuple(_rows(profile, first) for profile in profiles)
    before = _rows(profiles[0], ~first)
    choice = TTTChoice(n, None, rules, None, searched, before, None, None, None, confidence, diverged, by)
    if not followed:
        return choice
    levels = [choice.level(profile) for profile in searched]
    losses = [profile.cross_entropy for profile in searched]
    best = min(range(1, len(profiles)), key=lambda k: (levels[k], losses[k]))
    rivals = [losses[k] for k in range(1, len(profiles)) if levels[k] == levels[best]]
    decided_by: Literal["miss", "coverage", "cross-entropy", "order"] = by
    if len(rivals) > 1:
        decided_by = "cross-entropy" if rivals.count(losses[best]) == 1 else "order"
    after = _rows(profiles[best], ~first)
    pair = after.log_ratios, before.log_ratios
    compare = paired_miss_difference if by == "miss" else paired_coverage_difference
    return replace(
        choice,
        rule=list(followed)[best - 1],
        decided_by=decided_by,
        adapted=after,
        difference=compare(*pair, n, groups=before.groups, confidence=confidence),
        cross_entropy_difference=paired_kl_difference(*pair, groups=before.groups, confidence=confidence),
    )


def split_groups(groups: Iterable[Any], seed: int = 0) -> NDArray[np.bool_]:
    """Draw half of the groups, rounded down, for choosing.

    The draw depends on the labels and not on the order of the rows.

    Args:
        groups: `(R,)` the prompt of each row.
        seed: Of the draw.

    Returns:
        `(R,)` which rows belong to the drawn groups.

    Raises:
        ValueError: If there are fewer than four groups, two for each half, or `seed` is below 0.

    Example:
        >>> split_groups(["a", "a", "b", "c", "d", "d"]).tolist()
        [False, False, True, False, True, True]
    """
    check_count(seed, "seed", least=0)
    labels, inverse = np.unique(group_codes(groups), return_inverse=True)
    if labels.size < 4:
        raise ValueError(
            f"`groups` must have at least 4 prompts (or documents), 2 to choose on and 2 to judge on, but has "
            f"{labels.size}: take a corpus with more of them."
        )
    drawn = np.zeros(labels.size, dtype=np.bool_)
    drawn[np.random.default_rng(seed).permutation(labels.size)[: labels.size // 2]] = True
    return drawn[inverse]


def _has_diverged(values: ArrayLike, plain: ArrayLike) -> bool:
    """Whether a rule lost a response that plain decoding has."""
    after, before = np.asarray(values, dtype=np.float64), np.asarray(plain, dtype=np.float64)
    lost = np.isnan(after) | np.isneginf(after)
    return lost.shape == before.shape and bool((lost & np.isfinite(before)).any())


def _profiles(
    plain: ArrayLike,
    adapted: Mapping[StepRule, ArrayLike],
    reference: ArrayLike | None,
    groups: Iterable[Any] | None,
) -> list[CoverageProfile]:
    """Profiles of plain decoding and of each rule, of the same rows."""
    codes = None if groups is None else group_codes(groups)
    sources = {"plain": plain} | {rule_name(rule): values for rule, values in adapted.items()}
    profiles: list[CoverageProfile] = []
    for name, values in sources.items():
        try:
            profile = CoverageProfile.from_logprobs(values, reference, groups=codes, name=name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if profiles and profile.num_rows != profiles[0].num_rows:
            raise ValueError(
                f"`adapted` must be of the same rows as `plain`, {profiles[0].num_rows:,} of them, but {name} has "
                f"{profile.num_rows:,}."
            )
        profiles.append(profile)
    return profiles


def _rows(profile: CoverageProfile, chosen: NDArray[np.bool_]) -> CoverageProfile:
    """The profile of some of the rows."""
    arrays = {name: getattr(profile, name) for name in ("log_ratios", "logprobs", "groups")}
    parts: dict[str, Any] = {name: None if array is None else array[chosen] for name, array in arrays.items()}
    return replace(profile, **parts)


def _too_small(profile: CoverageProfile, n: float) -> str:
    half = smallest_n(profile.log_ratios, 0.5)
    remedy = f"; N = {half:.3g} would have half of them in it" if math.isfinite(half) else ""
    return (
        f"`n` = {metric_key(n)} is too small to choose by: every response is in the {profile.quantity}, with and "
        f"without test-time training. Give a larger one{remedy}, or a corpus of shorter responses."
    )
