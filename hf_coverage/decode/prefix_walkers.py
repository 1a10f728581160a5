"""Decoders as walks over prefixes, each written as if it ran alone, run together in batches under a budget of calls.

A method is a generator. It yields what it wants to know (`Look`, `Judge`, `Expand`) and is sent the answer; the driver
asks the model and the verifier for all walkers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub.utils import tqdm

from hf_coverage.decode.prefix_model import NextTokens, PrefixModel, PrefixVerifier
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.prefix_tree import Prefix

__all__ = ["CallBudget", "Expand", "Judge", "Look", "Method", "Node", "OutOfBudget", "Walker", "run_walkers"]


@dataclass(frozen=True)
class CallBudget:
    """What one response may cost; None is without limit.

    A prefix that a response's decoding comes back to is paid for once, and what other responses asked for is not free:
    the costs of a response do not depend on how many others are decoded beside it.

    Args:
        model_calls: Prefixes whose next-token distribution is asked for.
        verifier_calls: Prefixes whose value is asked for.
        steps: Steps of a walk, or choices of a method that only goes forward; a bound on time where calls are free.

    Raises:
        ValueError: If a number is not positive.
    """

    model_calls: int | None = None
    verifier_calls: int | None = None
    steps: int = 100_000

    def __post_init__(self) -> None:
        for name in ("model_calls", "verifier_calls", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


class Look(NamedTuple):
    """Asks for the `NextTokens` of prefixes: a model call each."""

    prefixes: tuple[Prefix, ...]


class Judge(NamedTuple):
    """Asks for the values of prefixes: a verifier call each."""

    prefixes: tuple[Prefix, ...]


class Expand(NamedTuple):
    """Asks for the `Node` of a prefix: one model call, and a verifier call for each child."""

    prefix: Prefix


class Node(NamedTuple):
    """A prefix whose children are all judged.

    Attributes:
        next: The tokens that may follow.
        values: `(A,)` the values of the children.
    """

    next: NextTokens
    values: FloatArray


class OutOfBudget(Exception):
    """A walker cannot pay for what it wants."""


@dataclass
class Walker:
    """Where one response's decoding stands, and what it has cost.

    Attributes:
        rng: Its own random numbers.
        budget: What it may cost.
        prefix: The tokens so far.
        lengths: Tokens of each move that led there.
        logprobs: Log p of each of these moves, nats.
        values: The value at the root (NaN where it was not asked for) and after each of these moves.
        whole: The last whole response it was at, with its log-probability and value; None if there was none.
        steps: Steps made.
        starts: How often it began at the root.
        exhausted: Whether the budget ended it.
        looked: Prefixes that the model was asked for.
        judged: Prefixes that the verifier was asked for.
    """

    rng: np.random.Generator
    budget: CallBudget
    prefix: Prefix = ()
    lengths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=lambda: [np.nan])
    whole: tuple[Prefix, float, float] | None = None
    steps: int = 0
    starts: int = 0
    exhausted: bool = False
    looked: set[Prefix] = field(default_factory=set)
    judged: set[Prefix] = field(default_factory=set)

    def start(self, value: float = np.nan) -> None:
        """Begin at the root."""
        self.prefix, self.lengths, self.logprobs, self.values = (), [], [], [value]
        self.starts += 1

    def forward(self, prefix: Prefix, logprob: float, value: float) -> None:
        """Go to a prefix that continues this one."""
        self.lengths.append(len(prefix) - len(self.prefix))
        self.prefix = prefix
        self.logprobs.append(logprob)
        self.values.append(value)

    def back(self) -> None:
        """Take the last move back."""
        self.prefix = self.prefix[: -self.lengths.pop()]
        self.logprobs.pop()
        self.values.pop()

    def keep(self) -> None:
        """Note that this prefix is a whole response."""
        self.whole = self.prefix, float(np.sum(self.logprobs)), self.values[-1]

    def spend(self, steps: int) -> None:
        """Count steps; OutOfBudget where there are too many."""
        self.steps = min(self.steps + steps, self.budget.steps + 1)
        if self.steps > self.budget.steps:
            self.steps = self.budget.steps
            raise OutOfBudget

    def may_look(self, prefixes: Sequence[Prefix]) -> bool:
        """Count model calls; False, with none of them counted, where the budget does not allow them."""
        return _pay(self.looked, prefixes, self.budget.model_calls)

    def may_judge(self, prefixes: Sequence[Prefix]) -> bool:
        """Count verifier calls; False, with none of them counted, where the budget does not allow them."""
        return _pay(self.judged, prefixes, self.budget.verifier_calls)


Method = Callable[[Walker], Generator[Look | Judge | Expand, Any, None]]
"""One way to decode: runs until the walker stands at its response."""


def run_walkers(
    method: Method, walkers: Sequence[Walker], model: PrefixModel, verifier: PrefixVerifier, *, progress: bool
) -> None:
    """Run a method for all walkers, and ask model and verifier for what they want in batches.

    Args:
        method: How to decode.
        walkers: They end at their responses, or where the budget ended.
        model: Answers `Look`.
        verifier: Answers `Judge`, and with the model `Expand`.
        progress: Whether to show a progress bar.
    """
    waiting = [_Waiting(walker, method(walker)) for walker in walkers]
    with tqdm(total=len(walkers), desc="Decoding", unit="response", disable=not progress) as bar:
        for one in waiting:
            one.go_on(None)
        while waiting:
            going = [one for one in waiting if one.request is not None]
            bar.update(len(waiting) - len(going))
            _serve(going, model, verifier)
            waiting = going


def _serve(waiting: list[_Waiting], model: PrefixModel, verifier: PrefixVerifier) -> None:
    """Pay for and answer one request of each walker."""
    payers = [one for one in waiting if one.pay_model()]
    nexts = model.answers(chain.from_iterable(one.looked for one in payers))
    payers = [one for one in payers if one.pay_verifier(nexts)]
    values = verifier.answers(chain.from_iterable(one.judged for one in payers))
    for one in payers:
        answers, judged = [nexts[prefix] for prefix in one.looked], [values[prefix] for prefix in one.judged]
        if isinstance(one.request, Expand):
            one.go_on(Node(answers[0], np.array(judged)))
        else:
            one.go_on(judged if isinstance(one.request, Judge) else answers)


def _pay(paid: set[Prefix], prefixes: Sequence[Prefix], limit: int | None) -> bool:
    new = {prefix for prefix in prefixes if prefix not in paid}
    if limit is not None and len(paid) + len(new) > limit:
        return False
    paid.update(new)
    return True


class _Waiting:
    """A walker with its method, the request that it waits for (None at its end), and the prefixes to ask for it."""

    def __init__(self, walker: Walker, method: Generator[Look | Judge | Expand, Any, None]) -> None:
        self.walker, self._method = walker, method
        self.request: Look | Judge | Expand | None = None
        self.looked: Sequence[Prefix] = ()
        self.judged: Sequence[Prefix] = ()

    def go_on(self, answer: Any) -> None:
        """Hand over an answer and go on to the next request."""
        try:
            self.request = self._method.send(answer)
        except StopIteration:
            self.request = None
        except OutOfBudget:
            self._stop()

    def pay_model(self) -> bool:
        """Pay for the model's part of the request; whether the budget allows it."""
        self.looked = ()
        if isinstance(self.request, Look):
            self.looked = self.request.prefixes
        elif isinstance(self.request, Expand):
            self.looked = (self.request.prefix,)
        if self.walker.may_look(self.looked):
            return True
        self._stop()
        return False

    def pay_verifier(self, nexts: dict[Prefix, NextTokens]) -> bool:
        """Pay for the verifier's part of the request; whether the budget allows it."""
        self.judged = ()
        if isinstance(self.request, Judge):
            self.judged = self.request.prefixes
        elif isinstance(self.request, Expand):
            prefix = self.request.prefix
            self.judged = [(*prefix, token) for token in nexts[prefix].tokens.tolist()]
        if self.walker.may_judge(self.judged):
            return True
        self._stop()
        return False

    def _stop(self) -> None:
        self._method.close()
        self.walker.exhausted, self.request = True, None
