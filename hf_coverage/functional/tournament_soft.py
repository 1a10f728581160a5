"""The soft tournament: candidates measured by each other without an edge, so that nothing ties.

A hard challenge counts the responses to which b gives less than an N-th of another's probability. A soft one weighs
every response by how surely N samples of b miss it, if the challenger's probability is right:

    S[a, b] = mean_i exp(-N p_b(y_i|x_i) / p_a(y_i|x_i)),

an upper bound on miss_N where a has the density of D, since `(1 - u)^N <= exp(-N u)`. The score of b is its challenge
by the *envelope*, which gives each response the largest probability that any candidate gives it. Lower is better.

With `E_N = E_D[exp(-N p/D)]`, so that `miss_N <= E_N` and `Cov_N <= e E_N`, the pick of M candidates on n rows has,
for any a in [0, 1] and with probability 1 - delta,

    E_{N^(1+a)}(pick) <= 2 min_m Cov_{N^a}(p_m) + M N^-(1-a) / e + 2 sqrt(log(2 M / delta) / (2 n)).

*Proof.* Let m be any candidate and e the envelope. Where `p_m >= D / N^a`, `exp(-N^(1+a) p_b / D) <= exp(-N p_b / p_m)
<= exp(-N p_b / p_e)`, so E_{N^(1+a)}(b) is at most b's expected score plus Cov_{N^a}(p_m). There also `exp(-N p_m /
p_e) <= exp(-N^(1-a) D / p_e) <= p_e / (e N^(1-a) D)`, because `exp(-1/t) <= t/e`, and `E_D[p_e / D] <= M`: m's
expected score is at most Cov_{N^a}(p_m) + M N^-(1-a) / e. The pick's score is at most m's on the rows, and Hoeffding's
inequality takes both to their expectations. A challenge by candidates one by one would have no M there; over
experiments the envelope chose a little better.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_coverage.functional.checks import FloatArray, check_logprobs, check_n
from hf_coverage.functional.statistics import group_codes
from hf_coverage.functional.tournament_standing import Standing, Tally, stand

__all__ = ["envelope", "envelope_losses", "hold_soft_tournament", "soft_challenge_rates", "soft_losses"]

_ROWS = 65_536
"""Rows at once, so that what lies between two tables stays small."""


def soft_losses(challenger: ArrayLike, defender: ArrayLike, n: float) -> FloatArray:
    """Each row's soft challenge `exp(-N p_b / p_a)`, as `exp(-exp(log N + log p_b - log p_a))`.

    Args:
        challenger: `(R,)` log p_a, nats.
        defender: `(R,)` log p_b, nats.
        n: A real number >= 1.

    Returns:
        `(R,)` in [0, 1]: 1 where the defender alone has probability 0, 0 where the challenger has.

    Example:
        >>> soft_losses([-1.0, -1.0, -math.inf], [-1.0, -math.inf, -math.inf], n=1).round(4).tolist()
        [0.3679, 1.0, 0.0]
    """
    a = check_logprobs(challenger, name="challenger")
    b = check_logprobs(defender, name="defender")
    with np.errstate(invalid="ignore", over="ignore"):  # -inf less -inf is put right, exp of much is infinite
        losses = np.exp(-np.exp(math.log(check_n(n)) + b - a))
    losses[np.isneginf(a)] = 0.0
    return losses


def envelope(logprobs: Iterable[ArrayLike]) -> FloatArray:
    """The largest log-probability that any of the candidates gives each response, `(R,)` nats."""
    largest: FloatArray | None = None
    for values in logprobs:
        row = np.asarray(values, dtype=np.float64)
        largest = row.copy() if largest is None else np.maximum(largest, row, out=largest)
    if largest is None:
        raise ValueError("`logprobs` must hold at least one candidate, but is empty.")
    return largest


def envelope_losses(logprobs: Iterable[ArrayLike], n: float) -> FloatArray:
    """Each candidate's soft challenge by the envelope, row by row: what the soft tournament's scores are means of.

    Args:
        logprobs: `(M, R)` log p of each candidate, nats.
        n: A real number >= 1.

    Returns:
        `(M, R)` in [0, 1]. At least exp(-N) where anybody has a probability above 0.

    Example:
        >>> envelope_losses([[-1.0, -1.0, -9.0], [-1.0, -4.0, -2.0]], n=8).mean(axis=1).round(3).tolist()
        [0.331, 0.224]
    """
    table = [np.asarray(values, dtype=np.float64) for values in logprobs]
    highest = envelope(table)
    return np.stack([soft_losses(highest, values, n) for values in table])


def soft_challenge_rates(logprobs: Iterable[ArrayLike], n: float) -> FloatArray:
    """How surely candidates miss what each other would write, `S[a, b] = mean_i exp(-N p_b / p_a)`.

    Args:
        logprobs: `(M, R)` log p of each candidate, nats.
        n: A real number >= 1.

    Returns:
        `(M, M)`, the challenger first; the diagonal is 0, as nobody challenges himself.

    Example:
        >>> soft_challenge_rates([[-1.0, -1.0, -9.0], [-1.0, -4.0, -2.0]], n=8).round(3)
        array([[0.   , 0.224],
               [0.331, 0.   ]])
    """
    table = [np.asarray(values, dtype=np.float64) for values in logprobs]
    size = table[0].size
    sums = np.zeros((len(table), len(table)))
    for start in range(0, size, _ROWS):
        part = [values[start : start + _ROWS] for values in table]
        for a, challenger in enumerate(part):
            for b, defender in enumerate(part):
                if a != b:
                    sums[a, b] += soft_losses(challenger, defender, n).sum()
    return sums / size


def hold_soft_tournament(
    logprobs: Sequence[ArrayLike], n: float | Sequence[float], *, groups: Iterable[Any] | None = None
) -> list[Standing]:
    """Hold the soft tournament of M candidates on the same R rows, at one N or many.

    Scores are challenges by the envelope, the matrix those of the candidates one by one. Equal scores, of equal
    candidates, are ranked by the mean challenge, then by cross-entropy, then in the order given.

    Args:
        logprobs: `(M, R)` log p of each candidate, nats.
        n: One or K real numbers >= 1.
        groups: `(R,)` the prompt of each row; None if no prompt repeats.

    Returns:
        K standings, without offsets and win rates.

    Example:
        >>> (standing,) = hold_soft_tournament([[-1.0, -1.0, -9.0], [-1.0, -4.0, -2.0]], n=8)
        >>> standing.scores.round(3), standing.ranking
        (array([0.331, 0.224]), (1, 0))
    """
    table = [check_logprobs(values, name=f"logprobs[{m}]") for m, values in enumerate(logprobs)]
    size = table[0].size
    num_groups = size if groups is None else int(np.unique(group_codes(groups)).size)
    entropies = np.array([-np.minimum(values, 0.0).mean() for values in table])
    highest, standings = envelope(table), []
    for level in n if isinstance(n, Iterable) else [n]:
        tally = Tally(len(table), 0)
        tally.rates = soft_challenge_rates(table, level)
        tally.scores = np.array([soft_losses(highest, values, level).mean() for values in table])
        tally.means = tally.rates.sum(axis=0) / max(1, len(table) - 1)
        standings.append(stand(check_n(level), tally, entropies, None, list(range(len(table))), num_groups))
    return standings
