"""What an audit says: its tables, its picture and its sentences, from profiles alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from os import PathLike
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy import stats

from hf_coverage import CoverageProfile
from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.miss_profile import SampleBudget
from hf_coverage.functional.paired import PairedDifference, paired_coverage_difference, paired_kl_difference
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table, format_number

__all__ = [
    "Audit",
    "Disagreement",
    "audit_table",
    "disagreements",
    "draw_audit",
    "explain",
    "normal_coverage",
    "order_table",
]


@dataclass(frozen=True)
class Audit:
    """Models against their original, the original first.

    Attributes:
        profiles: on the original's own responses, with its density.
        texts: on a real text, whose density nobody knows; the same models in the same order.
        response_tokens: tokens of all responses.
        text_tokens: tokens judged in the text.
        n: the N to report.
        headline_n: the N by which models are ordered.
        regret: the loss of reward that the Best-of-N budget allows.
    """

    profiles: list[CoverageProfile]
    texts: list[CoverageProfile]
    response_tokens: int
    text_tokens: int
    n: tuple[float, ...]
    headline_n: float
    regret: float

    @property
    def headline(self) -> str:
        """The name of the coverage by which models are ordered."""
        return f"Cov_{metric_key(self.headline_n)}"

    def response_perplexities(self) -> list[float]:
        """Perplexity of each model a token of the original's responses."""
        return [perplexity(profile, self.response_tokens) for profile in self.profiles]

    def text_perplexities(self) -> list[float]:
        """Perplexity of each model a token of the text."""
        return [perplexity(profile, self.text_tokens) for profile in self.texts]


class Disagreement(NamedTuple):
    """Two models of which the text's perplexity prefers one and coverage the other; differences are a minus b."""

    a: str
    b: str
    text: PairedDifference
    coverage: PairedDifference


def perplexity(profile: CoverageProfile, num_tokens: int) -> float:
    """`exp` of the mean negative log-probability a token."""
    return math.exp(profile.cross_entropy * profile.num_rows / num_tokens)


def audit_table(audit: Audit) -> Table:
    """One row a model: coverage, KL, both perplexities and the samples that Best-of-N needs."""
    columns: list[Column | str] = ["model", *(Column(f"Cov_{metric_key(n)}", "lower") for n in audit.n)]
    columns += [
        f"{audit.headline} by KL alone",
        "KL (nats)",
        "perplexity, own responses",
        "perplexity, real text",
        "enough samples",
        "necessary samples",
    ]
    rows: list[list[Cell]] = []
    for profile, own, text in zip(audit.profiles, audit.response_perplexities(), audit.text_perplexities()):
        budget = profile.best_of_n_budget(audit.regret)
        rows.append(
            [
                profile.name,
                *(Interval(profile.cov(n), *profile.interval(n)) for n in audit.n),
                round(float(normal_coverage(profile.kl, audit.headline_n)), 3) if 0 < profile.kl < math.inf else None,
                f"{profile.kl:.3f} ± {profile.kl_standard_error:.3f}",
                own,
                text,
                samples(budget.paper_n),
                samples(budget.necessary_n),
            ]
        )
    return Table(
        columns,
        rows,
        "Coverage with 95 % intervals over prompts; what KL alone would make of it, were the damage many small "
        "independent losses; sequence-level KL with its standard error; perplexity a token; "
        f"with 'enough samples' Best-of-N provably loses at most {format_number(audit.regret)} of expected reward to "
        "the original; with fewer than the necessary ones there is a reward on which it loses more.",
    )


def normal_coverage(kl: float, n: float | FloatArray) -> FloatArray:
    """Cov_N that KL alone would make, `Phi((KL - log N) / sqrt(2 KL))`, were the damage many small independent losses.

    A log ratio that is a sum of such losses is nearly normal, and since `E_D[exp(-r)] = 1` its variance is then twice
    its mean: the whole profile follows from KL. Where the real one lies elsewhere, the damage is not of that kind.

    Args:
        kl: `D_KL(D || p)`, nats, positive and finite.
        n: one N or many.
    """
    return stats.norm.cdf((kl - np.log(n)) / math.sqrt(2 * kl))


def disagreements(audit: Audit) -> Iterator[Disagreement]:
    """Pairs that coverage at the headline N and the text's perplexity order differently, with both paired tests."""
    models = list(zip(audit.profiles, audit.texts))[1:]
    for (a, text_a), (b, text_b) in combinations(models, 2):
        coverage = paired_coverage_difference(a.log_ratios, b.log_ratios, audit.headline_n, groups=a.groups)
        text = paired_kl_difference(text_a.log_ratios, text_b.log_ratios, groups=text_a.groups)
        if coverage.difference * text.difference < 0:
            yield Disagreement(a.name, b.name, text, coverage)


def order_table(audit: Audit) -> Table:
    """Each model beside the next better one by coverage, tested on the same responses."""
    ordered = sorted(audit.profiles, key=lambda profile: (profile.cov(audit.headline_n), profile.kl))
    rows: list[list[Cell]] = []
    for better, worse in pairwise(ordered):
        coverage = paired_coverage_difference(
            worse.log_ratios, better.log_ratios, audit.headline_n, groups=better.groups
        )
        kl = paired_kl_difference(worse.log_ratios, better.log_ratios, groups=better.groups)
        rows.append(
            [
                worse.name,
                better.name,
                Interval(*coverage[:3]),
                coverage.p_value,
                Interval(*kl[:3]),
                kl.p_value,
            ]
        )
    return Table(
        ["model", "minus the next better one", audit.headline, "p-value", "KL (nats)", "p-value "],
        rows,
        f"Neighbours in the order by {audit.headline}, paired differences on the same responses with 95 % intervals.",
    )


def disagreement_table(audit: Audit) -> Table:
    """Pairs that perplexity on the text and coverage order differently."""
    rows: list[list[Cell]] = [
        [
            pair.a,
            pair.b,
            Interval(*pair.text[:3]),
            pair.text.p_value,
            Interval(*pair.coverage[:3]),
            pair.coverage.p_value,
        ]
        for pair in disagreements(audit)
    ]
    return Table(
        ["a", "b", "text, nats a window", "p-value", audit.headline, "p-value "],
        rows,
        f"Pairs of compressions that the text's perplexity and {audit.headline} order differently: paired differences "
        "a minus b with 95 % intervals, below zero a is the better one." + ("" if rows else " There is none."),
    )


def explain(audit: Audit) -> list[str]:
    """Say in plain sentences what came out."""
    compressed = audit.profiles[1:]
    ordered = sorted(compressed, key=lambda profile: profile.cov(audit.headline_n))
    ranking = ", ".join(f"{profile.name} {format_number(profile.cov(audit.headline_n))}" for profile in ordered)
    sentences = [
        f"{audit.headline}, the share of the original's responses that became at least {metric_key(audit.headline_n)} "
        f"times less likely, from best to worst: {ranking}. Lower is better."
    ]
    sentences.append(_orders(audit))
    least = samples(audit.profiles[0].best_of_n_budget(audit.regret).paper_n)
    for profile in ordered:
        budget = profile.best_of_n_budget(audit.regret)
        worst = np.sort(profile.log_ratios)[-max(1, profile.num_rows // 10) :].mean()
        sentences.append(
            f"{profile.name}: for Best-of-N to lose at most {format_number(audit.regret)} of expected reward to the "
            f"original {_enough(budget)} (the original itself: {least}). A response lost {profile.kl:.2f} nats on "
            f"average, the worst tenth {worst:.1f}."
        )
    return sentences


def _enough(budget: SampleBudget) -> str:
    if math.isinf(budget.paper_n):
        return "no number of samples is enough"
    return f"{samples(budget.paper_n)} samples are enough and {samples(budget.necessary_n)} necessary"


def _orders(audit: Audit) -> str:
    pairs = list(disagreements(audit))
    total = math.comb(len(audit.profiles) - 1, 2)
    by_coverage, by_text = (sum(getattr(pair, name).p_value < 0.05 for pair in pairs) for name in ("coverage", "text"))
    start = (
        f"Perplexity on the real text orders {total - len(pairs)} of {total} pairs of compressions as "
        f"{audit.headline} does"
    )
    if not pairs:
        return f"{start}: all of them."
    named = "; ".join(f"{pair.a} and {pair.b}" for pair in pairs)
    return (
        f"{start}, the others not: {named}. At 5 % the paired tests tell {by_coverage} of these {len(pairs)} apart by "
        f"coverage and {by_text} by the text."
    )


def samples(n: float) -> str:
    """A number of samples as a reader wants it: whole, or none at all."""
    if math.isinf(n):
        return "no number of samples"
    return f"{math.ceil(n):,}" if n < 1e6 else f"{n:.1e}"


def draw_audit(audit: Audit, path: str | PathLike[str] | None = None) -> Figure:
    """Draw the profiles, and coverage at the headline N against the text's perplexity."""
    figure, (left, right) = new_axes(2, width=5.4, height=4.6)
    grid = np.exp(np.linspace(0, math.log(1024), 97))
    originally, *perplexities = audit.text_perplexities()
    lines = []
    for profile, color, at in zip(audit.profiles[1:], COLORS, perplexities):
        curve = profile.curve(grid)
        lines += left.plot(curve.n, curve.value, color=color, linewidth=1.8, label=profile.name)
        left.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.13, linewidth=0)
        if 0 < profile.kl < math.inf:
            left.plot(grid, normal_coverage(profile.kl, grid), color=color, linewidth=1, linestyle=":")
        value, (low, high) = profile.cov(audit.headline_n), profile.interval(audit.headline_n)
        right.errorbar(at, value, [[max(0, value - low)], [high - value]], color=color, marker="o", capsize=3)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlabel("N (samples that Best-of-N may draw)")
    left.set_ylabel("Cov$_N$ (lower is better)")
    left.set_title("What is lost of the original's responses")
    right.axvline(originally, color="#888888", linestyle="--", linewidth=1.2)
    right.annotate(" original", (originally, 1.0), color="#666666", va="top")
    right.set_xscale("log")
    right.xaxis.set_major_locator(MaxNLocator(6))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("perplexity a token on a real text")
    right.set_ylabel(f"Cov$_{{{metric_key(audit.headline_n)}}}$ (lower is better)")
    right.set_title("Beside perplexity")
    for ax in (left, right):
        ax.set_ylim(-0.015, 1.02)
    left.margins(x=0)
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return save_figure(figure, path)
