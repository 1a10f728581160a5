"""What was measured of test-time training, as log-probabilities, and the numbers that tables and figures show."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.scoring import PLAIN
from hf_coverage.report.table import Interval
from hf_coverage.select.tune_ttt import TTTChoice, tune_ttt
from recipes.tables import interval_of

__all__ = [
    "BIN",
    "MODES",
    "Choices",
    "Followed",
    "Known",
    "Results",
    "Scoped",
    "all_choices",
    "binned_changes",
    "change_a_token",
    "choose",
    "first_of",
    "log_ratios_of",
    "rule_label",
    "telling_n",
]

Part = TypeVar("Part")

Followed = dict[str, NDArray[np.float32]]
"""For each rule, and `plain`, the log-probability of each response token `(R, H)`, nats."""

Choices = Mapping[tuple[str, str], TTTChoice]
"""By name and mode."""

MODES = {"the response": False, "the prompt too": True}
"""Which tokens steps are made on."""

BIN = 128
"""Tokens that a point of the curve over positions is a mean of."""


@dataclass(frozen=True)
class Known:
    """Responses drawn from a reference whose density is known.

    Attributes:
        reference: `(R,)` log D(y|x), nats.
        followed: what a student makes of them.
    """

    reference: FloatArray
    followed: Followed


@dataclass(frozen=True)
class Scoped:
    """A few short texts under one rule of any scope; None is the model as it is."""

    kind: str
    rule: TTTConfig | None
    logprobs: FloatArray
    num_tokens: int


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Attributes:
        rules: those of `texts` and `known`, by name.
        texts: by kind.
        long: by kind, over positions.
        safety: by kind.
        known: by student and reference.
        scoped: other things than the head.
    """

    rules: Mapping[str, TTTConfig]
    texts: dict[str, Followed]
    long: dict[str, Followed]
    safety: dict[str, Followed]
    known: dict[str, Known]
    scoped: dict[str, Scoped]


def rule_label(rule: TTTConfig) -> str:
    """A name for a rule, in files and tables: another one for every rule that this recipe tries."""
    words = [] if rule.scope == "head" else [rule.scope, f"{rule.cache} cache"]
    words += [f"lr {rule.lr:g}"]
    words += ["prompt too"] if rule.on_prompt else []
    words += [] if rule.radius is None else [f"radius {rule.radius:g}"]
    words += [] if rule.decay == 0 else [f"decay {rule.decay:g}"]
    words += [] if rule.lam is None else [f"normalised, lambda {rule.lam:g}"]
    return ", ".join(words + ([] if rule.top_k is None else [f"top {rule.top_k}"]))


def all_choices(results: Results) -> Iterator[tuple[tuple[str, str], TTTChoice]]:
    """The step size that one half of the texts chooses, judged on the other half, by name and mode."""
    for mode, on_prompt in MODES.items():
        rules = {name: rule for name, rule in results.rules.items() if rule.on_prompt == on_prompt}
        for kind, followed in results.texts.items():
            yield (kind, mode), choose(followed, rules)
        for name, known in results.known.items():
            yield (name, mode), choose(known.followed, rules, known.reference)


def choose(followed: Followed, rules: Mapping[str, TTTConfig], reference: FloatArray | None = None) -> TTTChoice:
    """Choose among the rules that were tried by Cov_N, at an N at which the model as it is misses half of the rows."""
    rules = {name: rule for name, rule in rules.items() if name in followed}
    totals = {name: followed[name].sum(axis=1, dtype=np.float64) for name in (PLAIN, *rules)}
    choice = tune_ttt(
        totals[PLAIN],
        {rule: totals[name] for name, rule in rules.items()},
        n=telling_n(totals[PLAIN], reference),
        reference_logprobs=reference,
        groups=range(len(totals[PLAIN])),
        by="coverage",
    )
    if choice.rule is None:
        raise ValueError(f"{choice.sentence} Give a smaller `lr`.")
    return choice


def telling_n(logprobs: FloatArray, reference: FloatArray | None = None) -> float:
    """The N, e to a whole number and at least 4, at which the model misses about half of the responses."""
    ratios = -logprobs if reference is None else reference - logprobs
    return max(4.0, math.exp(round(float(np.median(ratios)))))


def change_a_token(followed: Followed, name: str, rows: NDArray[np.bool_] | slice = slice(None)) -> Interval:
    """Cross-entropy of a rule less that of the model as it is, nats a token, with Student's interval over texts."""
    return interval_of((followed[PLAIN][rows] - followed[name][rows]).astype(np.float64).mean(axis=1))


def binned_changes(followed: Followed) -> dict[str, list[list[float]]]:
    """Change of cross-entropy by position for each rule: mean, low and high, nats a token, of bins of `BIN` tokens."""
    found = {}
    for name in followed:
        if name == PLAIN:
            continue
        change = (followed[PLAIN] - followed[name]).astype(np.float64)
        bins = [change[:, start : start + BIN].mean(axis=1) for start in range(0, change.shape[1], BIN)]
        found[name] = [list(interval_of(values)) for values in bins]
    return found


def log_ratios_of(known: Known, name: str) -> FloatArray:
    """`log D - log p` of the responses under a rule, nats."""
    return known.reference - known.followed[name].sum(axis=1, dtype=np.float64)


def first_of(parts: Mapping[str, Part]) -> Part:
    """Any of several that have the same rules and sizes."""
    return next(iter(parts.values()))
