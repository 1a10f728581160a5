"""What the profiles of a run's checkpoints say: a table, the paper's Figure 1, results as JSON, a page and a card."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_coverage import CoverageProfile
from hf_coverage.functional.bounds import exact_pass_at_n
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.files import write_atomically
from hf_coverage.plots import plot_training_curves
from hf_coverage.report.card import write_model_card
from hf_coverage.report.html import Picture, write_html_report
from hf_coverage.report.provenance import provenance
from hf_coverage.report.results import coverage_results, write_results
from hf_coverage.report.table import Cell, Column, Interval, Table
from hf_coverage.select.predictiveness import PredictivenessResult, predictiveness
from recipes.profiles import read_profiles
from recipes.tables import show

__all__ = ["pass_at_n", "report_checkpoints"]


def report_checkpoints(
    output: Path,
    *,
    n: Sequence[float],
    pass_at: Sequence[int],
    settings: Mapping[str, Any],
    name: str,
    corpus: str,
    corpus_fingerprint: str,
) -> None:
    """Report on `output/profiles/step-<step>.json`, the profiles on a corpus with one right answer a prompt.

    Args:
        output: The run's folder; everything is written there, the last checkpoint's model card into `card/`.
        n: The N of Cov_N.
        pass_at: The N of Pass@N.
        settings: What was run, kept in the results.
        name: What was run, in words.
        corpus: The reference corpus, in words.
        corpus_fingerprint: Hash of the corpus's token ids.
    """
    found = read_profiles(output / "profiles")
    steps, profiles = list(found), list(found.values())
    kl = [profile.kl for profile in profiles]
    coverage = {value: [profile.cov(value) for profile in profiles] for value in n}
    passes = {value: [pass_at_n(profile, value) for profile in profiles] for value in pass_at}

    table = _table(steps, profiles, n, passes)
    predictive = predictiveness(profiles, pass_at, n)
    guides = _guides(predictive)
    text = "\n\n".join(shown.to_markdown() for shown in (table, guides))
    write_atomically(output / "table.md", f"{text}\n")
    summary = _findings(steps, kl, coverage, passes)
    command = shlex.join(["accelerate", "launch", "-m", "recipes.pretrain", *sys.argv[1:]])
    origin = provenance(command, seed=settings["run"].get("seed", 0))
    page = write_html_report(
        output / "report.html",
        title=name,
        summary=summary,
        tables=[table, guides],
        figures=_pictures(output, steps, profiles, coverage, predictive),
        kinds=[profile.kind for profile in profiles],
        provenance=origin | dict(settings),
    )
    card = write_model_card(
        output / "card",
        replace(profiles[-1], name=f"{name}, step {steps[-1]}"),
        corpus=corpus,
        provenance=origin,
        n=n,
        others=_notable(profiles, coverage)[:-1],
        description="\n\n".join(summary),
        tables=[table, guides],
        corpus_fingerprint=corpus_fingerprint,
        metadata={"license": "apache-2.0"},
    )
    results = coverage_results(profiles, n, config=settings)
    for index, profile in enumerate(profiles):
        results["results"][profile.name] |= {f"pass@{value},none": passes[value][index] for value in pass_at}
        results["higher_is_better"][profile.name] |= {f"pass@{value}": True for value in pass_at}
    show([table, guides], [*summary, f"Written: {page}, {card} and {write_results(output, results)}"])


def pass_at_n(profile: CoverageProfile, n: int) -> float:
    """Pass@N where one response is right: `E[1 - (1 - p(y|x))^N]`, exact.

    Raises:
        ValueError: when the reference has more than one right answer to a prompt.
    """
    if profile.kind != "single_answer":
        raise ValueError(f"Pass@N is exact for one right answer a prompt only; this reference is {profile.kind!r}.")
    return exact_pass_at_n(-profile.log_ratios, n)  # D(y|x) = 1, so the log ratio is -log p


def _table(
    steps: Sequence[int],
    profiles: Sequence[CoverageProfile],
    n: Sequence[float],
    passes: Mapping[int, Sequence[float]],
) -> Table:
    columns = [Column("step"), Column("cross entropy", "lower"), Column("KL", "lower")]
    columns += [Column(f"Cov_{metric_key(value)}", "lower") for value in n]
    columns += [Column(f"Pass@{value}", "higher") for value in passes]
    rows: list[list[Cell]] = [
        [
            step,
            profile.cross_entropy,
            profile.kl,
            *(Interval(profile.cov(value), *profile.interval(value)) for value in n),
            *(values[index] for values in passes.values()),
        ]
        for index, (step, profile) in enumerate(zip(steps, profiles))
    ]
    return Table(
        columns, rows, caption="Checkpoints; cross entropy and KL in nats a response; 95 % intervals of Cov_N."
    )


def _guides(predictive: PredictivenessResult) -> Table:
    """How well each measure orders the checkpoints by their Pass@N."""
    found = predictive.correlations
    rows: list[list[Cell]] = []
    for name, *numbers in zip(found.guides, found.values, found.low, found.high):
        # a measure that is the same everywhere has no order to correlate
        rows.append([name, *(None if np.isnan(cell[0]) else Interval(*map(float, cell)) for cell in zip(*numbers))])
    caption = (
        "Rank correlation over the checkpoints: -1 is a perfect guide, a positive one misleads. "
        "In brackets, the range of a bootstrap over prompts, no confidence interval."
    )
    return Table(["measure", *(Column(outcome, "lower") for outcome in found.outcomes)], rows, caption=caption)


def _findings(
    steps: Sequence[int],
    kl: Sequence[float],
    coverage: Mapping[float, Sequence[float]],
    passes: Mapping[int, Sequence[float]],
) -> list[str]:
    """Plain sentences: how the measures went, which checkpoint each would choose, and what that costs."""
    n = max(coverage)
    by_kl, by_coverage = int(np.argmin(kl)), int(np.argmin(coverage[n]))
    cov_n = f"Cov_{metric_key(n)}"
    lines = [
        f"KL goes from {kl[0]:.3f} to {kl[-1]:.3f} and is least, {kl[by_kl]:.3f}, at step {steps[by_kl]}; "
        f"{cov_n} goes from {coverage[n][0]:.3f} to {coverage[n][-1]:.3f} and is least, {min(coverage[n]):.3f}, "
        f"at step {steps[by_coverage]}."
    ]
    for name, values in passes.items():
        best = int(np.argmax(values))
        lines.append(
            f"Pass@{name} is {values[by_kl]:.3f} at the checkpoint with the least KL, {values[by_coverage]:.3f} at "
            f"the one with the least {cov_n}, {values[best]:.3f} at the best one (step {steps[best]})."
        )
    return lines


def _pictures(
    output: Path,
    steps: Sequence[int],
    profiles: Sequence[CoverageProfile],
    coverage: Mapping[float, Sequence[float]],
    predictive: PredictivenessResult,
) -> list[Picture]:
    """Figure 1, left and right, and the profiles of three checkpoints."""
    kl = [profile.kl for profile in profiles]
    labelled = [(f"Cov$_{{{metric_key(n)}}}$", values) for n, values in coverage.items()]
    left = plot_training_curves(steps, kl, labelled, output / "figure_1_left.png")
    right = predictive.plot(output / "figure_1_right.png")
    first, *others = _notable(profiles, coverage)
    least = f"the one with the least Cov_{metric_key(max(coverage))}"
    return [
        Picture(left, "KL and Cov_N over the training steps. Dots mark the best checkpoint of each curve."),
        Picture(right, "Pass@N of the checkpoints against Cov_N and KL. Hollow marks are the first checkpoint."),
        Picture(first.plot(others=others), f"Coverage profiles of the first checkpoint, the last one, and {least}."),
    ]


def _notable(profiles: Sequence[CoverageProfile], coverage: Mapping[float, Sequence[float]]) -> list[CoverageProfile]:
    """The first profile, the one with the least coverage at the largest N, and the last."""
    least = int(np.argmin(coverage[max(coverage)]))
    return [profiles[index] for index in sorted({0, least, len(profiles) - 1})]
