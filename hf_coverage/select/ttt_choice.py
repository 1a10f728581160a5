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

__all__ = ["TTTChoice"]

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
        quantity = self.plain.label(self.n)
        before, *_ = at = [profile.level(self.n) for profile in self.searched]
        chosen = at[1 + self.rules.index(self.rule)]
        parts = [self._verdict(quantity)]
        loss = self.cross_entropy_difference
        if math.isfinite(loss.difference):
            between = f"{loss.low:.4g} to {loss.high:.4g}"
            parts.append(f"Cross-entropy differs by {loss.difference:.4g} nats a response ({between}).")
        parts.append(
            f"Chosen among {len(self.rules)} on the other {self.searched[0].num_groups:,} prompts, where its "
            f"{quantity} is {chosen:.4g} against {before:.4g}{'' if chosen < before else ': no gain there either'}."
        )
        if self.decided_by != "coverage":
            parts.append(f"Several had the least {quantity}; the choice between them is by {self.decided_by}.")
        scope = TTTConfig.of(self.rule).scope  # step sizes of two scopes are not to be compared
        rates = sorted({float(rule.lr) for rule in self.rules if TTTConfig.of(rule).scope == scope})
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
                    name: profile.metrics([self.n])
                    | {f"{profile.key(self.n)}_interval": profile.interval(self.n, self.confidence)}
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
        after, before = (f"{profile.level(self.n):.4g}" for profile in (self.adapted, self.plain))
        return (
            f"Test-time training with {rule_name(self.rule)} {words}. On {self.plain.num_groups:,} prompts that did "
            f"not choose it, the {quantity} is {after} against {before}, a difference of {found.difference:.4g} "
            f"({100 * self.confidence:g} % interval {found.low:.4g} to {found.high:.4g}). Lower is better."
        )
