"""Which steps of test-time training cover best, and whether they cover more than none: chosen on half of the prompts,
judged on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_coverage.functional.checks import check_n, metric_key
from hf_coverage.functional.coverage import coverage, smallest_n
from hf_coverage.functional.paired import PairedDifference, paired_coverage_difference, paired_kl_difference
from hf_coverage.functional.statistics import group_codes
from hf_coverage.functional.step_rule import StepRule
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.measure.strict_json import strict_json

__all__ = ["TTTChoice", "check_rules", "generation_settings", "rule_name", "split_groups", "tune_ttt"]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TTTChoice:
    """The steps of test-time training that were chosen, and what they are worth on prompts that did not choose them.

    Attributes:
        n: the N of Cov_N.
        rule: the chosen steps.
        rules: all that were tried, in the order given.
        decided_by: what chose among them: Cov_N, or where the least Cov_N was several's, cross-entropy, or the order.
        searched: profiles on the choosing half: plain decoding, then each of `rules`.
        plain: plain decoding on the other half.
        adapted: the chosen steps on the other half.
        difference: Cov_N (its upper bound on a plain corpus) of `adapted` minus that of `plain`; below 0 is better.
        cross_entropy_difference: the same of cross-entropy, nats a response.
        confidence: level of both intervals.
    """

    n: float
    rule: StepRule
    rules: tuple[StepRule, ...] = field(repr=False)
    decided_by: Literal["coverage", "cross-entropy", "order"]
    searched: tuple[CoverageProfile, ...] = field(repr=False)
    plain: CoverageProfile = field(repr=False)
    adapted: CoverageProfile = field(repr=False)
    difference: PairedDifference
    cross_entropy_difference: PairedDifference = field(repr=False)
    confidence: float = field(repr=False)

    @property
    def helps(self) -> bool:
        """Whether the chosen steps cover more than plain decoding by more than chance."""
        return bool(self.difference.high < 0)

    @property
    def sentence(self) -> str:
        """What was chosen and whether it helps, in plain words."""
        quantity = self.plain.quantity.replace("Cov_N", f"Cov_{metric_key(self.n)}")
        before, *_ = at = [_value(profile, self.n) for profile in self.searched]
        chosen = at[1 + self.rules.index(self.rule)]
        parts = [self._verdict(quantity)]
        parts.append(
            f"Chosen among {len(self.rules)} on the other {self.searched[0].num_groups:,} prompts, where its "
            f"{quantity} is {chosen:.4g} against {before:.4g}{'' if chosen < before else ': no gain there either'}."
        )
        if self.decided_by != "coverage":
            parts.append(f"Several had the least {quantity}; the choice between them is by {self.decided_by}.")
        rates = sorted({float(rule.lr) for rule in self.rules})
        if len(rates) > 1 and self.rule.lr in (rates[0], rates[-1]):
            edge = "smallest" if self.rule.lr == rates[0] else "largest"
            parts.append(f"Its lr is the {edge} that was tried: one beyond it may be better.")
        if self.plain.is_upper_bound:
            parts.append("The corpus does not tell D(y|x), so that only bounds were compared, and not Cov_N itself.")
        return " ".join(parts)

    def to_json(self, path: str | PathLike[str] | None = None, **more: Any) -> str:
        """Everything as strict JSON text, unknown and infinite numbers as null; also written to `path` where given.

        Args:
            path: file to write.
            more: further entries, such as where the scores came from.
        """
        key = ("cov_upper_" if self.plain.is_upper_bound else "cov_") + metric_key(self.n)
        names = ["plain", *map(rule_name, self.rules)]
        facts = {
            "format": _FORMAT,
            "n": self.n,
            "quantity": self.plain.quantity,
            "chosen": rule_name(self.rule),
            "generation_settings": generation_settings(self.rule),
            "helps": self.helps,
            "sentence": self.sentence,
            "decided_by": self.decided_by,
            "difference": self.difference._asdict(),
            "cross_entropy_difference": self.cross_entropy_difference._asdict(),
            "confidence": self.confidence,
            "choosing_half": {
                "num_rows": self.searched[0].num_rows,
                "num_prompts": self.searched[0].num_groups,
                "results": {name: profile.metrics([self.n]) for name, profile in zip(names, self.searched)},
            },
            "other_half": {
                "num_rows": self.plain.num_rows,
                "num_prompts": self.plain.num_groups,
                "results": {
                    name: profile.metrics([self.n]) | {f"{key}_interval": profile.interval(self.n, self.confidence)}
                    for name, profile in (("plain", self.plain), (rule_name(self.rule), self.adapted))
                },
            },
        }
        return strict_json(facts | more, path)

    def _verdict(self, quantity: str) -> str:
        found = self.difference
        words = "does not clearly change coverage: the interval includes 0, so that it is not shown to help"
        if self.helps:
            words = "covers more than plain decoding"
        elif found.low > 0:
            words = "covers less than plain decoding, so that it does not help"
        return (
            f"Test-time training with {rule_name(self.rule)} {words}. On {self.plain.num_groups:,} prompts that did "
            f"not choose it, the {quantity} is {_value(self.adapted, self.n):.4g} against "
            f"{_value(self.plain, self.n):.4g}, a difference of {found.difference:.4g} ({100 * self.confidence:g} % "
            f"interval {found.low:.4g} to {found.high:.4g}). Lower is better."
        )


def tune_ttt(
    plain: ArrayLike,
    adapted: Mapping[StepRule, ArrayLike],
    n: float = 16,
    *,
    reference_logprobs: ArrayLike | None = None,
    groups: Iterable[Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> TTTChoice:
    """Choose the steps of test-time training by Cov_N on half of the prompts, and judge them on the other half.

    The rule with the least Cov_N is chosen; of several, the one with the least cross-entropy, and then the first. Its
    paired difference to plain decoding is taken on prompts that had no part in the choice, or the luckiest of many
    rules would pass for a good one.

    Args:
        plain: `(R,)` log p(y|x) of the model as it is, nats.
        adapted: `(R,)` log p_TTT(y|x) of the same rows for each rule, `score_responses(..., ttt=rule)`, nats.
        n: the N of Cov_N, a real number > 1.
        reference_logprobs: `(R,)` log D(y|x), nats; 0 where one response is right; None where it is not known: then
            the upper bound on Cov_N chooses.
        groups: `(R,)` the prompt of each row, if prompts repeat; a prompt's rows stay in one half.
        confidence: level of the intervals.
        seed: of the halves.

    Returns:
        The choice.

    Raises:
        ValueError: if there are fewer than four prompts, a rule is none that `ttt_generate` can follow, rows do not
            match, or N is so small that every response is in Cov_N whatever the rule.

    Example:
        >>> plain = np.tile([-1.0, -4.0, -4.0, -9.0], 10)
        >>> adapted = {StepRule(0.1): plain + 0.5, StepRule(1.0): np.tile([-1.0, -1.0, -1.0, -9.0], 10)}
        >>> choice = tune_ttt(plain, adapted, n=16)
        >>> choice.rule.lr, choice.helps, generation_settings(choice.rule)
        (1.0, True, {'ttt_lr': 1.0})

    References:
        arXiv 2510.15020, Equations (1), (22) and (23), Remark 2.2.
    """
    if not isinstance(adapted, Mapping):
        raise TypeError(f"`adapted` must map each `StepRule` to its log-probabilities, got {type(adapted).__name__}.")
    rules = check_rules(list(adapted), n)
    profiles = _profiles(plain, adapted, reference_logprobs, groups)
    if all(_value(profile, n) == 1 for profile in profiles):
        raise ValueError(_too_small(profiles[0], n))
    codes = profiles[0].groups
    first = split_groups(np.arange(profiles[0].num_rows, dtype=np.uint64) if codes is None else codes, seed)
    searched = tuple(_rows(profile, first) for profile in profiles)
    levels = [_value(profile, n) for profile in searched]
    losses = [profile.cross_entropy for profile in searched]
    best = min(range(1, len(profiles)), key=lambda k: (levels[k], losses[k]))
    rivals = [losses[k] for k in range(1, len(profiles)) if levels[k] == levels[best]]
    decided_by: Literal["coverage", "cross-entropy", "order"] = "coverage"
    if len(rivals) > 1:
        decided_by = "cross-entropy" if rivals.count(losses[best]) == 1 else "order"
    before, after = (_rows(profile, ~first) for profile in (profiles[0], profiles[best]))
    pair = after.log_ratios, before.log_ratios
    return TTTChoice(
        n=n,
        rule=rules[best - 1],
        rules=rules,
        decided_by=decided_by,
        searched=searched,
        plain=before,
        adapted=after,
        difference=paired_coverage_difference(*pair, n, groups=before.groups, confidence=confidence),
        cross_entropy_difference=paired_kl_difference(*pair, groups=before.groups, confidence=confidence),
        confidence=confidence,
    )


def check_rules(rules: Sequence[StepRule], n: float) -> tuple[StepRule, ...]:
    """Refuse rules that `ttt_generate` cannot follow, and an N that cannot choose between them, before any scoring.

    Args:
        rules: the rules to choose from.
        n: the N of Cov_N.

    Returns:
        The rules.

    Raises:
        ValueError: if there are none, one is twice there, has an `lr` that is 0 or one for each row, or a ball around
            zero, or `n` is not above 1.
    """
    if not check_n(n) > 1:
        raise ValueError(f"`n` must be above 1, for a bound on Cov_1 is 1 whatever the rule, but is {n}.")
    if not rules:
        raise ValueError("`adapted` must have at least one `StepRule` to choose.")
    for rule in rules:
        if not isinstance(rule, StepRule):
            raise TypeError(f"`adapted` must have `StepRule`s for keys, got {type(rule).__name__}.")
        if not isinstance(rule.lr, (int, float)):
            raise ValueError("`lr` must be one number for all rows, to be chosen for decoding.")
        if not rule.lr > 0:
            raise ValueError("`lr` must be above 0: with 0 it is plain decoding, which is compared with anyway.")
        if rule.radius is not None and rule.center != "start":
            raise ValueError('`center` must be "start": `ttt_generate` knows no other ball.')
    if len(set(rules)) < len(rules):
        twice = next(rule for index, rule in enumerate(rules) if rule in rules[:index])
        raise ValueError(f"`adapted` must have each rule once, but {rule_name(twice)} is there twice.")
    return tuple(rules)


def split_groups(groups: Iterable[Any], seed: int = 0) -> NDArray[np.bool_]:
    """Draw half of the groups, rounded down, for choosing.

    The draw depends on the labels and not on the order of the rows.

    Args:
        groups: `(R,)` the prompt of each row.
        seed: of the draw.

    Returns:
        `(R,)` which rows belong to the drawn groups.

    Raises:
        ValueError: if there are fewer than four groups, two for each half.

    Example:
        >>> split_groups(["a", "a", "b", "c", "d", "d"]).tolist()
        [False, False, True, False, True, True]
    """
    labels, inverse = np.unique(group_codes(groups), return_inverse=True)
    if labels.size < 4:
        raise ValueError(
            f"`groups` must have at least 4 prompts (or documents), 2 to choose on and 2 to judge on, but has "
            f"{labels.size}: take a corpus with more of them."
        )
    drawn = np.zeros(labels.size, dtype=np.bool_)
    drawn[np.random.default_rng(seed).permutation(labels.size)[: labels.size // 2]] = True
    return drawn[inverse]


def generation_settings(rule: StepRule) -> dict[str, float]:
    """A rule as `generate(custom_generate=ttt_generate, ...)` and `GenerationConfig` take it, defaults left out.

    Example:
        >>> generation_settings(StepRule(0.1, radius=2.0))
        {'ttt_lr': 0.1, 'ttt_radius': 2.0}
    """
    settings: dict[str, float] = {"ttt_lr": float(rule.lr)}
    settings |= {} if rule.radius is None else {"ttt_radius": float(rule.radius)}
    settings |= {} if rule.decay == 0 else {"ttt_decay": float(rule.decay)}
    settings |= {} if rule.lam is None else {"ttt_lam": float(rule.lam)}
    settings |= {} if rule.top_k is None else {"ttt_top_k": rule.top_k}
    return settings | ({} if rule.num_steps == 1 else {"ttt_steps": rule.num_steps})


def rule_name(rule: StepRule) -> str:
    """A rule in words, another one for every rule.

    Example:
        >>> rule_name(StepRule(0.1, radius=2.0))
        'lr 0.1, radius 2.0'
    """
    settings = generation_settings(rule)
    return ", ".join(f"{name.removeprefix('ttt_')} {value!r}" for name, value in settings.items())


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


def _value(profile: CoverageProfile, n: float) -> float:
    """Cov_N, or its upper bound on a plain corpus."""
    return coverage(profile.log_ratios, n, weights=profile.weights)


def _too_small(profile: CoverageProfile, n: float) -> str:
    half = smallest_n(profile.log_ratios, 0.5)
    remedy = f"; N = {half:.3g} would have half of them in it" if math.isfinite(half) else ""
    return (
        f"`n` = {metric_key(n)} is too small to choose by: every response is in the {profile.quantity}, with and "
        f"without test-time training. Give a larger one{remedy}, or a corpus of shorter responses."
    )
