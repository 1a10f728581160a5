"""The steps of test-time training that were chosen, and what they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from hf_coverage.functional.paired import PairedDifference
from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference.files import strict_json
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.select.ttt_settings import generation_settings, rule_name

__all__ = ["ChosenBy", "TTTChoice"]

ChosenBy = Literal["miss", "coverage"]
"""What chooses, and is compared: miss_N or Cov_N."""

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TTTChoice:
    """The steps of test-time training that were chosen, and what they are worth on prompts that did not choose them.

    Attributes:
        n: The N of miss_N or Cov_N.
        rule: The chosen steps; None, as all that is said of them, where all diverged: plain decoding is the choice.
        rules: All that were tried, in the order given.
        decided_by: What chose among them: miss_N or Cov_N, or where the least was several's, cross-entropy or the
            order.
        searched: Profiles on the choosing half: plain decoding, then each of `rules` that did not diverge.
        plain: Plain decoding on the other half.
        adapted: The chosen steps on the other half.
        difference: `level` of `adapted` minus that of `plain`; below 0 is better.
        cross_entropy_difference: The same of cross-entropy, nats a response.
        confidence: Level of both intervals, nominal of the latter.
        diverged: Those of `rules` that lead to log-probabilities which are no numbers, in the order given.
        by: Whether miss_N or Cov_N chose and is compared.
    """

    n: float
    rule: StepRule | None
    rules: tuple[StepRule, ...] = field(repr=False)
    decided_by: Literal["miss", "coverage", "cross-entropy", "order"] | None
    searched: tuple[CoverageProfile, ...] = field(repr=False)
    plain: CoverageProfile = field(repr=False)
    adapted: CoverageProfile | None = field(repr=False)
    difference: PairedDifference | None
    cross_entropy_difference: PairedDifference | None = field(repr=False)
    confidence: float = field(repr=False)
    diverged: tuple[StepRule, ...] = ()
    by: ChosenBy = "coverage"

    def level(self, profile: CoverageProfile) -> float:
        """miss_N or Cov_N (an upper bound on a plain corpus) of a profile: what was chosen by."""
        return profile.miss_level(self.n) if self.by == "miss" else profile.level(self.n)

    @property
    def label(self) -> str:
        """What `level` is called, such as `miss_16`."""
        return self.plain.miss_label(self.n) if self.by == "miss" else self.plain.label(self.n)

    @property
    def helps(self) -> bool:
        """Whether the chosen steps cover more than plain decoding by more than chance."""
        return self.difference is not None and bool(self.difference.high < 0)

    @property
    def results(self) -> dict[str, CoverageProfile | None]:
        """Profiles on the choosing half by name, plain decoding first; None where the steps diverged."""
        followed = iter(self.searched)
        names = {"plain": next(followed)}
        return names | {rule_name(rule): None if rule in self.diverged else next(followed) for rule in self.rules}

    @property
    def sentence(self) -> str:
        """What was chosen and whether it helps, in plain words."""
        parts = [*self._verdict(), *self._divergence()]
        if self.plain.is_upper_bound and self.rule is not None:
            itself = "miss_N" if self.by == "miss" else "Cov_N"
            parts.append(f"The corpus does not tell D(y|x), so that only bounds were compared, not {itself} itself.")
        return " ".join(parts)

    def to_json(self, path: str | PathLike[str] | None = None, **more: Any) -> str:
        """Everything as strict JSON text, unknown and infinite numbers as null; also written to `path` where given.

        Args:
            path: File to write.
            more: Further entries, such as where the scores came from.
        """
        chosen = "plain" if self.rule is None else rule_name(self.rule)
        judged = {"plain": self.plain} | ({} if self.adapted is None else {chosen: self.adapted})
        facts = {
            "format": _FORMAT,
            "n": self.n,
            "by": self.by,
            "quantity": self.plain.quantity,
            "chosen": chosen,
            "generation_settings": {} if self.rule is None else generation_settings(self.rule),
            "helps": self.helps,
            "sentence": self.sentence,
            "decided_by": self.decided_by,
            "difference": None if self.difference is None else self.difference._asdict(),
            "cross_entropy_difference": (
                None if self.cross_entropy_difference is None else self.cross_entropy_difference._asdict()
            ),
            "confidence": self.confidence,
            "diverged": [rule_name(rule) for rule in self.diverged],
            "choosing_half": {
                "num_rows": self.searched[0].num_rows,
                "num_prompts": self.searched[0].num_groups,
                "results": {
                    name: None if profile is None else profile.metrics([self.n])
                    for name, profile in self.results.items()
                },
            },
            "other_half": {
                "num_rows": self.plain.num_rows,
                "num_prompts": self.plain.num_groups,
                "results": {
                    name: profile.metrics([self.n])
                    | {f"{profile.key(self.n)}_interval": profile.interval(self.n, self.confidence)}
                    | {f"{profile.miss_key(self.n)}_interval": profile.miss_interval(self.n, self.confidence)}
                    for name, profile in judged.items()
                },
            },
        }
        return strict_json(facts | more, path)

    def _verdict(self) -> list[str]:
        """Sentences on what was chosen."""
        found, loss = self.difference, self.cross_entropy_difference
        if self.rule is None or self.adapted is None or found is None or loss is None:
            return ["Every setting diverged, so that plain decoding is the choice."]
        quantity = self.label
        words = "does not clearly change coverage: the interval includes 0, so that it is not shown to help"
        if self.helps:
            words = "covers more than plain decoding"
        elif found.low > 0:
            words = "covers less than plain decoding, so that it does not help"
        after, before = (f"{self.level(profile):.4g}" for profile in (self.adapted, self.plain))
        parts = [
            f"Test-time training with {rule_name(self.rule)} {words}. On {self.plain.num_groups:,} prompts that did "
            f"not choose it, the {quantity} is {after} against {before}, a difference of {found.difference:.4g} "
            f"({100 * self.confidence:g} % interval {found.low:.4g} to {found.high:.4g}). Lower is better."
        ]
        if math.isfinite(loss.difference):
            between = f"{loss.low:.4g} to {loss.high:.4g}"
            parts.append(f"Cross-entropy differs by {loss.difference:.4g} nats a response (Student's: {between}).")
        return parts + self._search(self.rule, quantity)

    def _search(self, rule: StepRule, quantity: str) -> list[str]:
        """Sentences on how it was chosen."""
        levels = {name: self.level(profile) for name, profile in self.results.items() if profile is not None}
        chosen, before = levels[rule_name(rule)], levels["plain"]
        parts = [
            f"Chosen among {len(levels) - 1} on the other {self.searched[0].num_groups:,} prompts, where its "
            f"{quantity} is {chosen:.4g} against {before:.4g}{'' if chosen < before else ': no gain there either'}."
        ]
        if self.decided_by != self.by:
            parts.append(f"Several had the least {quantity}; the choice between them is by {self.decided_by}.")
        scope = TTTConfig.of(rule).scope  # step sizes of two scopes are not to be compared
        rates = sorted({float(tried.lr) for tried in self.rules if TTTConfig.of(tried).scope == scope})
        if len(rates) > 1 and rule.lr in (rates[0], rates[-1]):
            edge = "smallest" if rule.lr == rates[0] else "largest"
            parts.append(f"Its lr is the {edge} that was tried: one beyond it may be better.")
        return parts

    def _divergence(self) -> list[str]:
        """A sentence on the steps that led nowhere."""
        if not self.diverged:
            return []
        names = "; ".join(map(rule_name, self.diverged))
        return [
            f"Steps that diverged, to log-probabilities that are NaN or infinite where those of plain decoding are "
            f"finite, could not be chosen: {names}. Smaller ones or a ball (`radius`) may not diverge."
        ]
