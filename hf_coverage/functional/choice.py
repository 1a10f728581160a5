"""Which of several candidates has the least loss, and how sure that is, in statements that were simulated.

`l[m, i]` in [0, 1] is what candidate m loses on row i, the same rows for all: its miss, 1 - Pass@N, or its score
against an envelope. The pick is always the candidate with the least mean loss. What may be said of it comes from the
paired differences, in which the difficulty of the rows cancels, with the prompt as what was sampled:

* `within`: the pick is at most this far from the best. Multiple comparisons with the best, with a pseudo prompt in
  each direction for what was too rare to be seen.
* `left`: the candidates that cannot be told from the best: with the confidence stated, the best is among them.
* `probability_best`: differences are shrunk towards equality as James and Stein do, before the law of the means is
  asked how often the pick is the best. A bootstrap, which shrinks nothing, says .2 to .3 too much.

None of these is a guarantee for any number of rows: they rest on the central limit theorem, and on the simulations of
the tests.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.checks import FloatArray, check_confidence, check_count
from hf_coverage.functional.statistics import group_codes

__all__ = ["Decision", "check_losses", "decide"]

_DRAWS = 10_000
_ALIKE = 1e-12
"""Differences below this are rounding."""


class Decision(NamedTuple):
    """What the losses of M candidates on the same rows say.

    Attributes:
        pick: The candidate with the least mean loss, the first of several.
        losses: `(M,)` mean losses.
        within: With the confidence stated, the pick's loss is at most this far above the least of all candidates; 0
            where no other comes near, 1 with a single prompt.
        left: The candidates that are not told from the best, by their loss: the best is among them with the confidence
            stated.
        probability_best: The probability that the pick is the best; None with no more prompts than candidates.
        probability_within: The probability that the pick is at most `tolerance` behind the best; None as before.
        rows_needed: About how many more rows, like these, would leave one candidate, or bring `within` down to
            `tolerance`; 0 where it is so already, infinite where candidates are equal.
        tolerance: The loss that does not matter.
        confidence: Of `within` and `left`.
    """

    pick: int
    losses: FloatArray
    within: float
    left: tuple[int, ...]
    probability_best: float | None
    probability_within: float | None
    rows_needed: float
    tolerance: float
    confidence: float

    @property
    def is_decided(self) -> bool:
        """Whether a single candidate is left, or the pick is within the tolerance."""
        return len(self.left) == 1 or self.within <= self.tolerance


def check_losses(losses: Sequence[ArrayLike] | FloatArray) -> FloatArray:
    """Losses as a table `(M, R)` of float64, after checking that they lie in [0, 1].

    Raises:
        ValueError: If there is no candidate, they have different numbers of rows, or a value lies outside [0, 1];
            names candidate and row.
    """
    rows = [np.asarray(values, dtype=np.float64) for values in losses]
    if not rows or any(values.ndim != 1 or not values.size for values in rows):
        raise ValueError("`losses` must hold one non-empty row of losses for each of at least one candidate.")
    odd = next((m for m, values in enumerate(rows) if values.size != rows[0].size), None)
    if odd is not None:
        raise ValueError(
            f"`losses` must be of the same rows for all candidates, but candidate 0 has {rows[0].size} and candidate "
            f"{odd} has {rows[odd].size}."
        )
    table = np.stack(rows)
    bad = np.argwhere(~((table >= -_ALIKE) & (table <= 1 + _ALIKE)))
    if bad.size:
        m, row = bad[0]
        raise ValueError(f"`losses` must lie in [0, 1], but row {row} of candidate {m} is {table[m, row]}.")
    return np.clip(table, 0.0, 1.0)


def decide(
    losses: Sequence[ArrayLike] | FloatArray,
    *,
    groups: Iterable[Any] | None = None,
    tolerance: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Decision:
    """Pick the candidate with the least mean loss, and say how far that may be from the best and how surely.

    Args:
        losses: `(M, R)` in [0, 1], the losses of M candidates on the same R rows.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.
        tolerance: A loss that does not matter, in [0, 1).
        confidence: Of `within` and of the set that is left.
        seed: Of the normal draws that quantiles and probabilities are taken from.

    Raises:
        ValueError: If losses are none, or an argument is out of range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> hard = rng.random(400) < 0.3
        >>> decision = decide([hard, hard & (rng.random(400) < 0.5), hard & (rng.random(400) < 0.4)])
        >>> decision.pick, decision.left, round(decision.within, 3), round(decision.probability_best, 2)
        (2, (2, 1), 0.021, 0.79)

    References:
        Hsu (1981), "Simultaneous confidence intervals for all distances from the best"; Efron and Morris (1973),
        "Stein's estimation rule and its competitors".
    """
    check_confidence(confidence)
    check_count(seed, "seed", least=0)
    if not 0 <= tolerance < 1:
        raise ValueError(f"`tolerance` must be a loss in [0, 1), but is {tolerance}.")
    table = check_losses(losses)
    num_rows = table.shape[1]
    means = table.mean(axis=1)
    pick = int(np.argmin(means))
    if len(table) == 1:
        return Decision(pick, means, 0.0, (0,), 1.0, 1.0, 0.0, tolerance, confidence)
    units = _prompts(table, means, groups)
    size = units.shape[1]
    if size < 2:
        left = tuple(np.argsort(means, kind="stable").tolist())
        return Decision(pick, means, 1.0, left, None, None, math.inf, tolerance, confidence)
    covariance = np.cov(units) / size
    noise = _normal_draws(covariance, np.random.default_rng(seed))
    errors = _paired_errors(covariance)
    quantiles = _quantiles(noise, errors, confidence)
    errors = _allowing_for_the_unseen(errors, units)
    behind = means - means[pick]
    others = np.arange(len(means)) != pick
    within = max(0.0, float((quantiles * errors[pick] - behind)[others].max()))
    left = _not_told_from_the_best(means, errors, quantiles)
    likely = size > len(means)
    return Decision(
        pick,
        means,
        min(1.0, within),
        left,
        _probability_best(means, covariance, noise, size, pick) if likely else None,
        _probability_within(means, noise, pick, tolerance) if likely else None,
        _rows_needed(quantiles[others] * errors[pick][others], behind[others], tolerance, num_rows, len(left)),
        tolerance,
        confidence,
    )


def _prompts(table: FloatArray, means: FloatArray, groups: Iterable[Any] | None) -> FloatArray:
    """`(M, G)` one number a prompt whose mean is the mean loss and whose variance is that of a ratio of sums."""
    if groups is None:
        return table
    codes = group_codes(groups)
    if codes.shape != table.shape[1:]:
        raise ValueError(f"`groups` must have one label a row, {table.shape[1]} in all, but has {codes.size}.")
    labels, inverse = np.unique(codes, return_inverse=True)
    excess = [np.bincount(inverse, row - mean, labels.size) for row, mean in zip(table, means)]
    return means[:, None] + np.array(excess) * (labels.size / table.shape[1])


def _normal_draws(covariance: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draws of N(0, V) `(draws, M)`; V may be singular, as it is where candidates are equal."""
    values, vectors = np.linalg.eigh(covariance)
    values[values < _ALIKE * values.max()] = 0.0  # else equal candidates would differ by the root of rounding
    return rng.standard_normal((_DRAWS, len(values))) @ (vectors * np.sqrt(values)).T


def _paired_errors(covariance: FloatArray) -> FloatArray:
    """`(M, M)` standard errors of the differences of means."""
    variance = np.diag(covariance)
    return np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0.0))


def _allowing_for_the_unseen(errors: FloatArray, units: FloatArray) -> FloatArray:
    """The errors with a pseudo prompt for each direction, as large as the largest difference that was seen."""
    largest = np.array([np.abs(units - row).max(axis=1) for row in units])
    return np.sqrt(errors**2 + 2 * (largest / units.shape[1]) ** 2)


def _quantiles(noise: FloatArray, errors: FloatArray, confidence: float) -> FloatArray:
    """c_m: how far candidate m lies above all others at once by chance, in standard errors, with that confidence."""
    found = np.zeros(len(errors))
    draws = np.ascontiguousarray(noise.T)
    for m, error in enumerate(errors):
        apart = np.flatnonzero(error > _ALIKE)
        if apart.size:
            # one at a time, in vectors that stay in the cache
            highest = functools.reduce(np.maximum, ((draws[m] - draws[other]) / error[other] for other in apart))
            found[m] = np.quantile(highest, confidence)
    return np.maximum(found, 0.0)


def _not_told_from_the_best(means: FloatArray, errors: FloatArray, quantiles: FloatArray) -> tuple[int, ...]:
    above = means[:, None] - means
    with np.errstate(divide="ignore", invalid="ignore"):  # equal candidates have no error, and are not apart
        standardised = np.where(above > _ALIKE, above / errors, 0.0).max(axis=1)
    keep = standardised <= quantiles
    return tuple(m for m in np.argsort(means, kind="stable").tolist() if keep[m] or means[m] == means.min())


def _probability_best(means: FloatArray, covariance: FloatArray, noise: FloatArray, size: int, pick: int) -> float:
    contrast = np.eye(len(means))[1:] - np.eye(len(means))[0]
    difference, spread = contrast @ means, contrast @ covariance @ contrast.T
    rank = int(np.linalg.matrix_rank(spread, hermitian=True))
    signal = float(difference @ np.linalg.pinv(spread, hermitian=True) @ difference) * (size - rank - 1) / size
    kept = max(0.0, 1 - rank / signal) if signal > 0 else 0.0
    drawn = kept * means + math.sqrt(kept) * noise
    least = drawn <= drawn.min(axis=1, keepdims=True) + _ALIKE
    return float((least[:, pick] / least.sum(axis=1)).mean())


def _probability_within(means: FloatArray, noise: FloatArray, pick: int, tolerance: float) -> float:
    drawn = means + noise
    return float((drawn[:, pick] - drawn.min(axis=1) <= tolerance + _ALIKE).mean())


def _rows_needed(margins: FloatArray, behind: FloatArray, tolerance: float, num_rows: int, left: int) -> float:
    """Rows until each other candidate's margin, which falls as their root, is below its distance and the tolerance."""
    if left == 1:
        return 0.0
    room = tolerance + behind
    uncertain = margins > _ALIKE
    if (room[uncertain] <= _ALIKE).any():
        return math.inf
    ratio = float((margins[uncertain] / room[uncertain]).max(initial=0.0))
    return float(max(0, math.ceil(num_rows * (ratio**2 - 1))))
