"""Ways to decode under a process verifier, each as it runs for one response: see `prefix_walkers`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_coverage.decode.prefix_model import Recent
from hf_coverage.decode.prefix_walkers import Expand, Judge, Look, Node, Walker
from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.prefix_tree import Prefix
from hf_coverage.functional.random_walk import guided_probabilities, metropolis_acceptance, walk_probabilities

__all__ = ["Backtracking", "BlockBestOfN", "Guidance", "Rejection", "Responses"]

Steps = Generator[Look | Judge | Expand, Any, None]
Drawn = tuple[Prefix, float]
"""A prefix that continues another one, with the log-probability of what was added."""


@dataclass(frozen=True)
class Responses:
    """Where responses end.

    Args:
        max_new_tokens: Most tokens H.
        eos_token_ids: Tokens that end a response, as its last one.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]

    def is_whole(self, prefix: Prefix) -> bool:
        """Whether a prefix is a whole response: a leaf."""
        return len(prefix) >= self.max_new_tokens or (prefix[-1:] != () and prefix[-1] in self.eos_token_ids)

    def least_moves(self, block_size: int) -> int:
        """Moves of a block each to the shortest whole response."""
        return 1 if self.eos_token_ids else -(-self.max_new_tokens // block_size)

    def draw(
        self, prefix: Prefix, length: int, rng: np.random.Generator, *, number: int = 1
    ) -> Generator[Look | Judge | Expand, Any, list[Drawn]]:
        """Continue a prefix by the model alone some times, each by `length` tokens or to the end of the response."""
        drawn, end = [(prefix, 0.0)] * number, len(prefix) + length
        while growing := [row for row, (one, _) in enumerate(drawn) if len(one) < end and not self.is_whole(one)]:
            answers = yield Look(tuple(drawn[row][0] for row in growing))
            for row, (tokens, logprobs) in zip(growing, answers):
                one, logprob = drawn[row]
                choice = _choose(np.cumsum(np.exp(logprobs, dtype=np.float64)), rng)
                drawn[row] = (*one, int(tokens[choice])), logprob + float(logprobs[choice])
        return drawn


class Backtracking:
    """The walk of VGB, or its Metropolis relative on blocks of tokens.

    Args:
        responses: Where they end.
        steps: T, after which the walk ends if it is at a leaf; None: it ends by `visits`.
        visits: It ends when it is at a leaf for the K-th time.
        restart: Whether a walk that is at no leaf after `steps` begins anew; else it goes on to the next one.
        block_size: Tokens of a move, one drawn block judged; None: one token, all children judged.
        laziness: Probability of staying.
        cache_size: Prefixes whose moves are kept.
    """

    def __init__(
        self,
        responses: Responses,
        *,
        steps: int | None,
        visits: int,
        restart: bool,
        block_size: int | None,
        laziness: float,
        cache_size: int,
    ) -> None:
        self._responses, self._steps, self._visits, self._restart = responses, steps, visits, restart
        self._block_size, self._laziness = block_size, laziness
        self._moves: Recent[tuple[FloatArray, Node]] = Recent(cache_size)

    def __call__(self, walker: Walker) -> Steps:
        """Walk until the response is there."""
        move, root = self._move_among_all, np.nan
        if self._block_size is not None:
            move = self._move_by_one
            (root,) = yield Judge(((),))
            _require_way(root > 0, "the empty response, which it must be able to go back to,")
        is_whole = self._responses.is_whole
        while True:
            walker.start(root)
            left = self._steps or 0
            while left > 0:
                made = int(walker.rng.geometric(1 - self._laziness))  # it stays a while, and then moves
                walker.spend(min(made, left))
                if made <= left:
                    yield from move(walker)
                left -= made
            if is_whole(walker.prefix):
                return
            if self._steps is None or not self._restart:
                break
        visits = 0
        while visits < self._visits:
            walker.spend(int(walker.rng.geometric(1 - self._laziness)))
            yield from move(walker)
            visits += is_whole(walker.prefix)

    def _move_among_all(self, walker: Walker) -> Steps:
        if self._responses.is_whole(walker.prefix):
            walker.back()
            return
        known = self._moves.recall(walker.prefix)
        if known is None or walker.prefix not in walker.looked:
            node = yield Expand(walker.prefix)
            known = self._moves.recall(walker.prefix) or (self._chances(node, walker), node)
            self._moves.keep(walker.prefix, known)
        cumulative, node = known
        choice = _choose(cumulative, walker.rng) - 1
        if choice < 0:
            walker.back()
        else:
            _forward(walker, node, choice, self._responses)

    def _chances(self, node: Node, walker: Walker) -> FloatArray:
        inner = walker.prefix != ()
        chances = walk_probabilities(node.next.logprobs, node.values, walker.values[-1], has_parent=inner, laziness=0)
        _require_way(chances[0] == 0, "every first token")
        return np.cumsum(chances[1:])

    def _move_by_one(self, walker: Walker) -> Steps:
        here = walker.values[-1]
        if walker.rng.random() < 0.5:
            if walker.lengths and walker.rng.random() < metropolis_acceptance(here, walker.values[-2]):
                walker.back()
        elif not self._responses.is_whole(walker.prefix):
            drawn = yield from self._responses.draw(walker.prefix, self._block_size or 1, walker.rng)
            ((prefix, logprob),) = drawn
            (value,) = yield Judge((prefix,))
            if walker.rng.random() < metropolis_acceptance(here, value):
                walker.forward(prefix, logprob, value)
                _keep_whole(walker, self._responses)


@dataclass(frozen=True)
class Rejection:
    """Whole responses drawn from the model until one is accepted, with probability V / bound.

    Args:
        responses: Where they end.
        bound: What no value exceeds.
    """

    responses: Responses
    bound: float

    def __call__(self, walker: Walker) -> Steps:
        """Draw until one is accepted."""
        while True:
            walker.start()
            walker.spend(1)
            drawn = yield from self.responses.draw((), self.responses.max_new_tokens, walker.rng)
            ((prefix, logprob),) = drawn
            (value,) = yield Judge((prefix,))
            if value > self.bound:
                raise ValueError(
                    f"`bound` must be at least the largest value of a response, but {list(prefix)} has {value} and "
                    f"`bound` is {self.bound}: rejection sampling would be biased."
                )
            if walker.rng.random() * self.bound < value:
                walker.forward(prefix, logprob, value)
                return


@dataclass(frozen=True)
class Guidance:
    """Action-level guidance: each token with probability proportional to p V, and no way back.

    Args:
        responses: Where they end.
        moves: What is known of prefixes.
    """

    responses: Responses
    moves: Recent[tuple[FloatArray, Node]]

    def __call__(self, walker: Walker) -> Steps:
        """Go forward; where every child has the value 0, begin anew."""
        walker.start()
        while not self.responses.is_whole(walker.prefix):
            walker.spend(1)
            known = self.moves.recall(walker.prefix)
            if known is None or walker.prefix not in walker.looked:
                node = yield Expand(walker.prefix)
                known = np.cumsum(guided_probabilities(node.next.logprobs, node.values)), node
                self.moves.keep(walker.prefix, known)
            cumulative, node = known
            if cumulative[-1] > 0:
                _forward(walker, node, _choose(cumulative, walker.rng), self.responses)
            else:
                _require_way(walker.prefix != (), "every first token")
                walker.start()


@dataclass(frozen=True)
class BlockBestOfN:
    """Blocks, of which each is chosen among some drawn from the model: the best one, or one in proportion to V.

    Args:
        responses: Where they end.
        candidates: Blocks drawn for each that is chosen.
        block_size: Tokens of a block.
        greedy: Whether the best one is taken.
    """

    responses: Responses
    candidates: int
    block_size: int
    greedy: bool

    def __call__(self, walker: Walker) -> Steps:
        """Go forward; where every candidate has the value 0, begin anew."""
        walker.start()
        while not self.responses.is_whole(walker.prefix):
            walker.spend(1)
            drawn = yield from self.responses.draw(walker.prefix, self.block_size, walker.rng, number=self.candidates)
            values = np.array((yield Judge(tuple(prefix for prefix, _ in drawn))))
            weights = values / values.max() if values.max() > 0 else values
            if not weights.any():
                walker.start()
                continue
            choice = _choose(np.cumsum(weights == 1 if self.greedy else weights), walker.rng)
            walker.forward(*drawn[choice], float(values[choice]))


def _forward(walker: Walker, node: Node, choice: int, responses: Responses) -> None:
    tokens, logprobs = node.next
    walker.forward((*walker.prefix, int(tokens[choice])), float(logprobs[choice]), float(node.values[choice]))
    _keep_whole(walker, responses)


def _keep_whole(walker: Walker, responses: Responses) -> None:
    if responses.is_whole(walker.prefix):
        walker.keep()


def _choose(cumulative: FloatArray, rng: np.random.Generator) -> int:
    """An index with probability proportional to the steps of `cumulative`; never one of step 0."""
    total = cumulative[-1]
    choice = bisect_right(cumulative, rng.random() * total)
    # The product may round up to the total, behind which there is nothing.
    return choice if choice < len(cumulative) else bisect_left(cumulative, total)


def _require_way(there_is: bool, what: str) -> None:
    if not there_is:
        raise ValueError(
            f"`verifier` gives {what} the value 0, so no response can be reached from the prompt. Prefixes that may "
            "still become good need a value above 0; a verifier that only knows whole responses can give 1 to all "
            "others, which `finished` tells it."
        )
