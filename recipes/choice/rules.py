"""What each rule chooses from some rows, what that is worth on the others, and whether what is said of it is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hf_coverage.functional.bounds import pass_probabilities
from hf_coverage.functional.checks import FloatArray, IntArray
from hf_coverage.functional.choice import decide
from hf_coverage.functional.coverage_profile import reached
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.tournament import OnPolicy, hold_tournament
from hf_coverage.functional.tournament_soft import envelope_losses

__all__ = [
    "CONFIDENT",
    "KNOWN",
    "RULES",
    "SAMPLES",
    "UNKNOWN",
    "Run",
    "Split",
    "judge",
    "pooled",
    "stated",
    "take_splits",
]

SAMPLES = (1, 4, 8, 12, 16, 32)
"""The numbers of samples that are chosen for."""

KNOWN, UNKNOWN = "choose, log D known", "choose, log D unknown"
HARD, OFFSET, LEAST_COVERAGE = "hard tournament", "offset tournament", "least Cov_N"
CROSS_ENTROPY, LAST = "cross-entropy", "the last"
RULES = (KNOWN, UNKNOWN, HARD, OFFSET, LEAST_COVERAGE, CROSS_ENTROPY, LAST)
CONFIDENT = (KNOWN, UNKNOWN)

_ALIKE = 1e-12
_LEAST_EDGE = 2.0
"""Cov_N and hard challenges at N = 1 count every row."""


@dataclass(frozen=True)
class Run:
    """The M checkpoints of a run on R prompts with one right answer each.

    Attributes:
        steps: `(M,)` their steps, in order.
        logprobs: `(M, R)` log p of the right answers, nats; log D is 0.
        on_policy: Responses of each checkpoint for the offset tournament; None leaves that one out.
        samples: The K numbers of samples.
    """

    steps: tuple[int, ...]
    logprobs: FloatArray
    on_policy: Sequence[OnPolicy] | None = field(default=None, repr=False)
    samples: tuple[int, ...] = SAMPLES

    @cached_property
    def passes(self) -> FloatArray:
        """`(K, M, R)` the probability that one of N samples is right."""
        return np.array([[pass_probabilities(row, n) for row in self.logprobs] for n in self.samples])

    @cached_property
    def losses(self) -> dict[str, FloatArray]:
        """By kind of `choose`, `(K, M, R)` what it means over rows; an envelope is of each row alone."""
        return {
            KNOWN: np.array([[miss_values(-row, n) for row in self.logprobs] for n in self.samples]),
            UNKNOWN: np.array([envelope_losses(self.logprobs, n) for n in self.samples]),
        }

    @cached_property
    def uncovered(self) -> FloatArray:
        """`(K, M, R)` whether N samples leave a row uncovered."""
        return np.array([reached(-self.logprobs, max(n, _LEAST_EDGE)) for n in self.samples], dtype=np.float64)

    def choose(self, rows: IntArray) -> dict[str, list[int]]:
        """What each rule takes for each number of samples, when it sees these rows."""
        table = self.logprobs[:, rows]
        entropy = -table.mean(axis=1)
        chosen = {
            rule: losses[:, :, rows].mean(axis=2).argmin(axis=1).tolist() for rule, losses in self.losses.items()
        }
        levels = [max(n, _LEAST_EDGE) for n in self.samples]
        chosen[HARD] = [standing.ranking[0] for standing in hold_tournament(table, levels, replicates=0)]
        if self.on_policy is not None:
            offset = hold_tournament(table, levels, on_policy=self.on_policy, replicates=0)
            chosen[OFFSET] = [standing.ranking[0] for standing in offset]
        counts = self.uncovered[:, :, rows].sum(axis=2)
        chosen[LEAST_COVERAGE] = [int(np.lexsort((entropy, count))[0]) for count in counts]
        chosen[CROSS_ENTROPY] = [int(entropy.argmin())] * len(self.samples)
        chosen[LAST] = [len(self.steps) - 1] * len(self.samples)
        return chosen


@dataclass(frozen=True)
class Split:
    """Rows to choose on, and the rows to judge on."""

    mine: IntArray
    others: IntArray


def take_splits(num_rows: int, size: int, splits: int, *, seed: int) -> list[Split]:
    """Random splits of rows: `size` of them to choose on, all others to judge on."""
    if not 0 < size < num_rows:
        raise ValueError(f"`size` must leave some of {num_rows} rows to judge on, but is {size}.")
    rng = np.random.default_rng((seed, size))
    orders = [rng.permutation(num_rows) for _ in range(splits)]
    return [Split(np.sort(order[:size]), np.sort(order[size:])) for order in orders]


def judge(run: Run, splits: Sequence[Split]) -> dict[str, Any]:
    """What each rule chooses and loses, for each split and number of samples.

    `steps` and `losses` of Pass@N by rule, and of the best in hindsight, as `best_steps` and `best`, its Pass@N.
    """
    steps: dict[str, list[list[int]]] = {}
    losses: dict[str, list[list[float]]] = {}
    best_steps, best = [], []
    for split in splits:
        worth = run.passes[:, :, split.others].mean(axis=2)
        best_steps.append([run.steps[pick] for pick in worth.argmax(axis=1)])
        best.append(worth.max(axis=1).tolist())
        for rule, picks in run.choose(split.mine).items():
            behind = [float(row.max() - row[pick]) for row, pick in zip(worth, picks)]
            steps.setdefault(rule, []).append([run.steps[pick] for pick in picks])
            losses.setdefault(rule, []).append(behind)
    return {"steps": steps, "losses": losses, "best_steps": best_steps, "best": best}


def stated(run: Run, splits: Sequence[Split]) -> dict[str, dict[str, list[list[float]]]]:
    """What `choose` says of its picks, and whether that holds on the rows to judge on.

    By kind of `choose`, a number for each split and number of samples: what is stated (`within`, `left` as a share of
    the candidates, `decided`, `probability`) and what is so by the losses that it speaks of (`within_holds`,
    `left_holds`, `is_best`) and by Pass@N (the same with `pass_` before it).
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for rule in CONFIDENT:
        columns: dict[str, list[list[float]]] = {}
        for split in splits:
            rows = [
                _one_statement(losses[:, split.mine], losses[:, split.others], 1 - passes[:, split.others])
                for losses, passes in zip(run.losses[rule], run.passes)
            ]
            for name in rows[0]:
                columns.setdefault(name, []).append([row[name] for row in rows])
        found[rule] = columns
    return found


def _one_statement(mine: FloatArray, others: FloatArray, missed: FloatArray) -> dict[str, float]:
    decision = decide(mine)
    if decision.probability_best is None:
        raise ValueError(f"`rows` must be more than the {len(mine)} candidates, but are {mine.shape[1]}.")
    facts = {
        "within": decision.within,
        "left": len(decision.left) / len(mine),
        "decided": float(decision.is_decided),
        "probability": decision.probability_best,
    }
    for prefix, losses in {"": others, "pass_": missed}.items():
        behind = losses.mean(axis=1) - losses.mean(axis=1).min()
        best = behind <= _ALIKE
        facts[f"{prefix}within_holds"] = float(behind[decision.pick] <= decision.within + _ALIKE)
        facts[f"{prefix}left_holds"] = float(best[list(decision.left)].any())
        facts[f"{prefix}is_best"] = float(best[decision.pick])
    return facts


def pooled(pieces: Sequence[Mapping[str, list[list[float]]]], name: str) -> FloatArray:
    """`(S, K)` one number of `judge` or `stated` over the splits of several runs."""
    return np.concatenate([np.array(piece[name], dtype=np.float64) for piece in pieces])
