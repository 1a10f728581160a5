"""Which checkpoint each rule takes, and what the choice is worth on questions that it was not made on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_coverage.functional.bounds import exact_pass_at_n, pass_probabilities
from hf_coverage.functional.checks import FloatArray, metric_key
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.tournament import hold_tournament
from hf_coverage.report.table import Cell, Column, Table
from recipes.tables import interval_of

__all__ = ["Checkpoints", "choice_table", "choose", "chosen_in_halves", "matched_table", "split_table"]

CROSS_ENTROPY = "least cross-entropy"

Halves = dict[str, list[tuple[int, FloatArray]]]
"""For each rule and split of the questions: the index chosen on one half, and its Pass@N on the other."""


@dataclass(frozen=True)
class Checkpoints:
    """The M checkpoints of a run on R questions with one right answer each.

    Attributes:
        steps: `(M,)` their steps.
        logprobs: `(M, R)` log p of the right answers, nats.
        n: the N of Cov_N and of the tournaments.
        pass_at: the N of Pass@N.
    """

    steps: list[int]
    logprobs: FloatArray
    n: tuple[float, ...]
    pass_at: tuple[int, ...]

    def passes(self, n: float) -> FloatArray:
        """`(M, R)` the probability 1 - (1 - p)^N that one of N samples is right."""
        return np.array([pass_probabilities(values, n) for values in self.logprobs])


def choose(checkpoints: Checkpoints, rows: Sequence[int] | slice = slice(None)) -> dict[str, int]:
    """Index of the checkpoint that each rule takes, from some of the questions; cross-entropy breaks ties.

    Args:
        checkpoints: the run.
        rows: the questions that the rules may look at.
    """
    logprobs = checkpoints.logprobs[:, rows]
    entropy = -logprobs.mean(axis=1)
    chosen = {CROSS_ENTROPY: int(entropy.argmin())}
    for n in checkpoints.n:
        uncovered = reached(-logprobs, n).sum(axis=1)
        chosen[f"least Cov_{metric_key(n)}"] = int(np.lexsort((entropy, uncovered))[0])
    for standing in hold_tournament(logprobs, checkpoints.n, replicates=0):
        chosen[f"tournament, N = {metric_key(standing.n)}"] = standing.ranking[0]
    for n in checkpoints.pass_at:
        chosen[f"best Pass@{n}"] = int(np.argmax([exact_pass_at_n(values, n) for values in logprobs]))
    return chosen | {"the last": len(checkpoints.steps) - 1}


def choice_table(checkpoints: Checkpoints) -> Table:
    """What each rule takes from all questions, and its Pass@N less that of cross-entropy's choice, paired."""
    chosen = choose(checkpoints)
    baseline = chosen[CROSS_ENTROPY]
    rows: list[list[Cell]] = []
    for rule, index in chosen.items():
        cells: list[Cell] = [rule, checkpoints.steps[index]]
        for n in checkpoints.pass_at:
            passes = checkpoints.passes(n)
            change = None if index == baseline else interval_of(passes[index] - passes[baseline])
            cells += [passes[index].mean(), change]
        rows.append(cells)
    columns: list[Column | str] = ["chosen by", "step"]
    for n in checkpoints.pass_at:
        columns += [Column(f"Pass@{n}"), "less cross-entropy's" + " " * checkpoints.pass_at.index(n)]
    return Table(
        columns,
        rows,
        "Chosen and judged on the same questions; Student's intervals over questions of the difference to "
        "cross-entropy's choice, which do not count that the choice was made on them.",
    )


def chosen_in_halves(checkpoints: Checkpoints, *, splits: int = 200, seed: int = 0) -> Halves:
    """Choose on one half of the questions and judge on the other, over random halves."""
    rng = np.random.default_rng(seed)
    size = checkpoints.logprobs.shape[1]
    passes = np.array([checkpoints.passes(n) for n in checkpoints.pass_at])
    found: Halves = {}
    for _ in range(splits):
        order = rng.permutation(size)
        mine, others = order[: size // 2], order[size // 2 :]
        for rule, index in choose(checkpoints, mine).items():
            found.setdefault(rule, []).append((index, passes[:, index, others].mean(axis=1)))
    return found


def split_table(checkpoints: Checkpoints, halves: Halves) -> Table:
    """What each rule gets on questions it did not choose by."""
    rows: list[list[Cell]] = []
    for rule, picks in halves.items():
        steps = sorted(checkpoints.steps[index] for index, _ in picks)
        low, middle, high = (steps[int(share * (len(steps) - 1))] for share in (0.1, 0.5, 0.9))
        rows.append([rule, f"{middle} ({low} to {high})", *_mean(picks)])
    columns: list[Column | str] = ["chosen by", "step: median (10 % to 90 %)"]
    columns += [Column(f"Pass@{n}", "higher") for n in checkpoints.pass_at]
    return Table(columns, rows, f"All rules, {_protocol(halves)}.")


def matched_table(checkpoints: Checkpoints, halves: Halves) -> Table:
    """What each kind of rule gets when its N is the number of samples, or the nearest there is."""
    rows: list[list[Cell]] = []
    for place, n in enumerate(checkpoints.pass_at):
        level = metric_key(min(checkpoints.n, key=lambda value: abs(value - n)))
        rules = [CROSS_ENTROPY, f"least Cov_{level}", f"tournament, N = {level}", f"best Pass@{n}", "the last"]
        rows.append([f"Pass@{n}", *(_mean(halves[rule])[place] for rule in rules)])
    return Table(
        ["", CROSS_ENTROPY, "least Cov_N", "tournament at N", "best Pass@N itself", "the last checkpoint"],
        rows,
        f"N as many as samples, and 2 for Pass@1, {_protocol(halves)}.",
    )


def _mean(picks: list[tuple[int, FloatArray]]) -> list[float]:
    return np.mean([values for _, values in picks], axis=0).tolist()


def _protocol(halves: Halves) -> str:
    return (
        f"chosen on one half of the questions and judged on the other: means over {len(halves[CROSS_ENTROPY])} halves"
    )
