"""What the theory promises of a tournament's pick, with the tournament's own numbers in it."""

import math
import sys

from hf_coverage.functional.checks import check_n

__all__ = ["offset_guarantee", "simple_guarantee", "soft_guarantee"]


def simple_guarantee(n: float, num_candidates: int, num_prompts: int, *, a: float = 0.5, delta: float = 0.05) -> str:
    """Theorem 6.3 for a tournament that was held, its numbers filled in.

    For every a in [0, 1], with probability 1 - delta,
    `Cov_{N^(1+a)}(pick) <~ min_m Cov_{N^a}(p_m) + N^-(1-a) + log(M/delta) / n`. The sign <~ hides constants that the
    theorem does not state, so its right side is an order of magnitude. With unlimited data they are small:
    `Cov_{N^(1+a)}(pick) <= 2 min_m Cov_{N^a}(p_m) + N^-(1-a)`, since a challenge to the best candidate p needs
    `D/p >= N^a` or, with `p(p_a/p >= N) <= 1/N`, a response of D-probability at most `N^a / N`.

    Args:
        n: The N of the tournament.
        num_candidates: M.
        num_prompts: n, the number of independent pairs.
        a: Trades what is promised against the slack `N^-(1-a)`, in [0, 1].
        delta: Probability that the promise fails.

    Raises:
        ValueError: If `a` or `delta` is out of range.

    Example:
        >>> print(simple_guarantee(16, num_candidates=20, num_prompts=1000))
        Theorem 6.3 with a = 0.5: with probability 95 %, and up to constants that it does not state, Cov_64 of the
        pick is at most the least Cov_4 of the 20 candidates + 0.25 (N^-(1-a)) + 0.00599 (log(M/delta)/n).

    References:
        arXiv 2510.15020, Theorem 6.3.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"`a` must lie in [0, 1], but is {a}.")
    return (
        f"Theorem 6.3 with a = {a:g}: with probability {_percent(delta)}, and up to constants that it does not state, "
        f"Cov_{_power(n, 1 + a):.4g} of the pick is at most the least Cov_{n**a:.4g} of the {num_candidates} "
        f"candidates + {n ** (a - 1):.3g} (N^-(1-a)) + {_sampling(num_candidates, num_prompts, delta):.3g} "
        "(log(M/delta)/n)."
    )


def offset_guarantee(n: float, num_candidates: int, num_prompts: int, *, gamma: float, delta: float = 0.05) -> str:
    """Theorem 6.4 for an offset tournament that was held, its numbers filled in.

    It asks for `g >= 1` and `N >= 8 g^2`. The offset is for a challenger that puts its probability on few responses.
    It does not improve on the simple tournament in general: with three responses to a prompt there are examples in
    which the simple one picks right and the offset one does not.

    Args:
        n: The N of the tournament.
        num_candidates: M.
        num_prompts: n, the number of independent pairs.
        gamma: g, the weight of the offset.
        delta: Probability that the promise fails.

    Raises:
        ValueError: If `delta` is out of range.

    Example:
        >>> print(offset_guarantee(16, num_candidates=20, num_prompts=1000, gamma=1.0))
        Theorem 6.4 asks for g >= 1 and N >= 8 g^2: g = 1 and N = 16 meet it. With probability 95 %, and up to
        constants that it does not state, sampling costs 0.00599 (log(M/delta)/n). More than the simple tournament is
        not promised: the offset helps where a challenger wastes its probability on what the pick itself writes.

    References:
        arXiv 2510.15020, Theorem 6.4.
    """
    meets = gamma >= 1 and check_n(n) >= 8 * gamma * gamma
    asked = f"Theorem 6.4 asks for g >= 1 and N >= 8 g^2: g = {gamma:g} and N = {n:g} "
    sampling = _sampling(num_candidates, num_prompts, delta)
    if not meets:
        return asked + "do not, so it promises nothing here."
    return (
        f"{asked}meet it. With probability {_percent(delta)}, and up to constants that it does not state, sampling "
        f"costs {sampling:.3g} (log(M/delta)/n). More than the simple tournament is not promised: the offset helps "
        "where a challenger wastes its probability on what the pick itself writes."
    )


def soft_guarantee(n: float, num_candidates: int, num_prompts: int, *, a: float = 0.5, delta: float = 0.05) -> str:
    """What `tournament_soft` proves of a soft tournament that was held, its numbers filled in.

    Args:
        n: The N of the tournament.
        num_candidates: M.
        num_prompts: n, the number of independent pairs.
        a: Trades what is promised against the slack `M N^-(1-a) / e`, in [0, 1].
        delta: Probability that the promise fails.

    Raises:
        ValueError: If `a` or `delta` is out of range.

    Example:
        >>> print(soft_guarantee(16, num_candidates=20, num_prompts=1000))
        With probability 95 %, miss_64 of the pick is at most twice the least Cov_4 of the 20 candidates + 1.84
        (M N^-(1-a) / e) + 0.116 (of sampling), with a = 0.5.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"`a` must lie in [0, 1], but is {a}.")
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must lie strictly between 0 and 1, but is {delta}.")
    sampling = 2 * math.sqrt(math.log(2 * num_candidates / delta) / (2 * num_prompts))
    slack = num_candidates * check_n(n) ** (a - 1) / math.e
    return (
        f"With probability {_percent(delta)}, miss_{_power(n, 1 + a):.4g} of the pick is at most twice the least "
        f"Cov_{n**a:.4g} of the {num_candidates} candidates + {slack:.3g} (M N^-(1-a) / e) + {sampling:.3g} (of "
        f"sampling), with a = {a:g}."
    )


def _power(n: float, exponent: float) -> float:
    """`N^exponent`, infinite where floats end."""
    return n**exponent if exponent * math.log(check_n(n)) < math.log(sys.float_info.max) else math.inf


def _percent(delta: float) -> str:
    return f"{100 * (1 - delta):.4g} %"


def _sampling(num_candidates: int, num_prompts: int, delta: float) -> float:
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must lie strictly between 0 and 1, but is {delta}.")
    return math.log(num_candidates / delta) / num_prompts
