"""Why rules differ: what orders checkpoints, where KL comes from, what is guessed, and what can be told apart."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np

from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.predictiveness import RankCorrelations, rank_correlations
from hf_coverage.functional.statistics import clustered_mean
from hf_coverage.report.table import Cell, Column, Interval, Table
from recipes.reasoning.choices import Checkpoints

__all__ = ["area_table", "concern_table", "correlation_table", "guess_table", "resolution_table"]

EDGES = [1, 2, 8, 32, 128, 1024]
"""Where the ranges of N begin that KL is split into; the last one has no end."""


def area_table(checkpoints: Checkpoints) -> Table:
    """Split KL by the N that it comes from: `KL = E[r] = integral of Cov_N d log N`, r = -log p."""
    areas = _areas(checkpoints.logprobs)
    rows: list[list[Cell]] = []
    for index, step in enumerate(checkpoints.steps):
        parts = [float(values[index].mean()) for values in areas.values()]
        lost = int((checkpoints.logprobs[index] < -np.log(EDGES[-1])).sum())
        rows.append([step, float(-checkpoints.logprobs[index].mean()), *parts, lost])
    return Table(
        [
            Column("step"),
            Column("KL", "lower"),
            *(Column(name, "lower") for name in areas),
            Column(f"questions over {EDGES[-1]}"),
        ],
        rows,
        "KL is the area under the coverage profile over log N. The nats that each range of N contributes: Pass@N "
        "depends on what is near its own N.",
    )


def concern_table(checkpoints: Checkpoints) -> Table:
    """Which part of KL orders the trained checkpoints by which Pass@N."""
    passes = {f"Pass@{n}": checkpoints.passes(n)[1:] for n in checkpoints.pass_at}
    return correlation_table(rank_correlations(_areas(checkpoints.logprobs[1:]), passes), "nats of KL from")


def correlation_table(found: RankCorrelations, heading: str) -> Table:
    """The rank correlation of each measure with each Pass@N."""
    rows: list[list[Cell]] = [
        [guide, *(Interval(*map(float, cells)) for cells in zip(found.values[k], found.low[k], found.high[k]))]
        for k, guide in enumerate(found.guides)
        if guide != "KL"  # of one right answer: the same as cross-entropy
    ]
    return Table(
        [heading, *(Column(outcome, "lower") for outcome in found.outcomes)],
        rows,
        f"Rank correlation over the {found.guide_values.shape[1]} checkpoints of the training: -1 is a perfect guide, "
        f"a positive one misleads; in brackets the range of a bootstrap over {found.num_prompts} questions.",
    )


def guess_table(checkpoints: Checkpoints, answers: Sequence[str]) -> Table:
    """How much of log p the answer explains alone, whatever the question: all of it where the model only guesses."""
    _, place = np.unique(answers, return_inverse=True)
    counts = np.bincount(place)
    rows: list[list[Cell]] = []
    for step, logprobs in zip(checkpoints.steps, checkpoints.logprobs):
        within = logprobs - (np.bincount(place, logprobs) / counts)[place]
        unexplained = (within**2).sum() / (logprobs.size - counts.size) / logprobs.var(ddof=1)
        rows.append([step, float(1 - unexplained), float(np.exp(logprobs).mean())])
    shares = counts / counts.sum()
    return Table(
        ["step", "share of the variance of log p between answers", "Pass@1"],
        rows,
        f"Does the model read the question? Always the commonest of the {counts.size} answers would be right on "
        f"{shares.max():.3f} of the questions, answers drawn at their own frequencies on {(shares**2).sum():.3f}.",
    )


def resolution_table(checkpoints: Checkpoints) -> Table:
    """How surely a measure tells two checkpoints apart, over all pairs of trained ones."""
    rows: list[list[Cell]] = []
    for name, table in _measures(checkpoints):
        z = []
        for a, b in combinations(table[1:], 2):  # the first is the model as it came
            difference = clustered_mean(a - b)
            z.append(abs(difference.mean) / difference.standard_error if difference.standard_error else 0.0)
        rows.append([name, float(np.median(z)), float(np.mean(np.array(z) > 1.96))])
    return Table(
        ["measure", "median difference, in standard errors", "pairs told apart at 5 %"],
        rows,
        f"All pairs of the {len(checkpoints.steps) - 1} trained checkpoints, paired over the "
        f"{checkpoints.logprobs.shape[1]} questions.",
    )


def _areas(logprobs: FloatArray) -> dict[str, FloatArray]:
    """By range of N, `(M, R)` the nats of every r = -log p that lie in it."""
    names = [f"N = {low} to {high}" for low, high in pairwise(EDGES)] + [f"N over {EDGES[-1]}"]
    starts, ends = np.log(EDGES), np.log([*EDGES[1:], np.inf])
    return {name: np.clip(-logprobs - low, 0, high - low) for name, low, high in zip(names, starts, ends)}


def _measures(checkpoints: Checkpoints) -> Iterator[tuple[str, FloatArray]]:
    yield "cross-entropy", -checkpoints.logprobs
    for n in checkpoints.n:
        yield f"Cov_{metric_key(n)}", reached(-checkpoints.logprobs, n).astype(float)
    for n in checkpoints.pass_at:
        yield f"Pass@{n}", checkpoints.passes(n)
