"""Three ways for a process verifier to be wrong before the end: by a factor, by a step, and at random.

The base model draws tokens uniformly here, so what is right, V*(y) = P(the response is good | y), can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from hf_coverage.functional.prefix_tree import Prefix, PrefixTree

__all__ = ["SETTINGS", "Setting"]


@dataclass(frozen=True)
class Setting:
    """Responses of H tokens, which of them are good, and a verifier that is right at their end only.

    Args:
        name: what it is called.
        tokens: how many tokens there are.
        right: V*(y) with H.
        wrong: the verifier's value of a prefix that is not whole, with H and the size of its error.
        feature: a number that responses are told apart by, where there are too many of them to count.
        about: the feature in words.
    """

    name: str
    tokens: int
    right: Callable[[Prefix, int], float]
    wrong: Callable[[Prefix, int, float], float]
    feature: Callable[[Prefix], int]
    about: str

    def verifier(self, horizon: int, error: float) -> Callable[[Prefix], float]:
        """V of a prefix."""

        @cache
        def value(prefix: Prefix) -> float:
            if len(prefix) == horizon:
                return self.right(prefix, horizon)
            return self.wrong(prefix, horizon, error)

        return value

    def tree(self, horizon: int, error: float) -> PrefixTree:
        """All prefixes but those that follow one of value 0."""
        value = self.verifier(horizon, error)
        children = list(enumerate([-math.log(self.tokens)] * self.tokens))
        return PrefixTree.grow(lambda y: children if len(y) < horizon and value(y) > 0 else [], value)


def without_c(prefix: Prefix, horizon: int) -> float:
    """Letters a, b, c; a response without c is good."""
    return 0.0 if 2 in prefix else (2 / 3) ** (horizon - len(prefix))


def fond_of_a(prefix: Prefix, horizon: int, error: float) -> float:
    """Too large by a factor wherever the last letter is a."""
    return without_c(prefix, horizon) * (error if prefix[-1:] == (0,) else 1.0)


def in_parity(prefix: Prefix, horizon: int) -> float:
    """Bits; every third must be the parity of the two before it."""
    triples = [prefix[start : start + 3] for start in range(0, len(prefix) - len(prefix) % 3, 3)]
    return 0.5 ** (horizon // 3 - len(triples)) if all(a ^ b == c for a, b, c in triples) else 0.0


def a_step_late(prefix: Prefix, horizon: int, error: float) -> float:
    """V* of `error` tokens ago: a wrong bit is noticed when it is too late to choose another."""
    return in_parity(prefix[: max(0, len(prefix) - int(error))], horizon)


@cache
def ways_to_close(depth: int, left: int) -> int:
    """In how many ways two kinds of brackets go on for `left` tokens and end balanced."""
    if depth < 0 or depth > left:
        return 0
    return 1 if left == 0 else 2 * ways_to_close(depth + 1, left - 1) + ways_to_close(depth - 1, left - 1)


def balanced(prefix: Prefix, horizon: int) -> float:
    """Brackets ( [ ) ] as 0 1 2 3; a balanced response is good."""
    stack: list[int] = []
    for token in prefix:
        if token < 2:
            stack.append(token)
        elif not stack or stack.pop() != token - 2:
            return 0.0
    left = horizon - len(prefix)
    return ways_to_close(len(stack), left) / 4**left


def noisy(prefix: Prefix, horizon: int, error: float) -> float:
    """V* times exp(error z), z standard normal and drawn once for each prefix."""
    return balanced(prefix, horizon) * math.exp(error * np.random.default_rng([horizon, *prefix]).normal())


SETTINGS = (
    Setting("ABC", 3, without_c, fond_of_a, lambda y: y.count(0), "the number of a's"),
    Setting(
        "parity",
        2,
        in_parity,
        a_step_late,
        lambda y: sum(bit for place, bit in enumerate(y) if place % 3 < 2),
        "the number of ones among the free bits",
    ),
    Setting("Dyck", 4, balanced, noisy, lambda y: y[0] * 16 + y[1] * 4 + y[2], "the first three brackets"),
)
