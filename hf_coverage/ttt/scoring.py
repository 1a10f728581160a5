"""Scores of p^TTT: log-probabilities of responses under models that make a step after each of their tokens.

Steps of the head alone leave the hidden states what they are, so one forward pass serves all of them. Steps of
adapters or of all parameters change what reads the tokens, so that a response is read token by token, as it is when it
is decoded.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, count, pairwise, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_coverage.functional.checks import IntArray
from hf_coverage.functional.fast_weights import FastWeights
from hf_coverage.functional.head_training import POSITIONS, branch_fast_weights, follow_tokens, squared_head_norm
from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward_batches import Batch, BatchPasses, Step, predicted_tokens
from hf_coverage.inference.output_head import OutputHead
from hf_coverage.ttt.row_models import RowModels
from hf_coverage.ttt.row_networks import row_network

__all__ = ["HeadReading", "RowScorer", "adapted_logprobs", "read_batch", "require_adaptable", "score_heads"]

_Branching = tuple[IntArray, dict[int, IntArray]]
"""What lines begin with, and how each of some rows goes on from there, longest first."""


def require_adaptable(passes: BatchPasses) -> OutputHead:
    """Refuse models whose heads make no steps in closed form, and return the head of one that does.

    Raises:
        ValueError: If the head is not linear, or the model changes what it gives.
    """
    head = passes.forwards[0].head
    if not head.linear:
        raise ValueError(
            f"`ttt` needs a linear output head, got {head.description}; if that is an adapter's layer, merge it "
            "first (`merge_and_unload`)."
        )
    if not passes.plain_head:
        raise ValueError(
            "`ttt` needs logits as the head gives them, but the model changes them afterwards (scaling or "
            'soft-capping) or spreads its head over processes; leave it out, or take `scope="lora"` or "all", which '
            "follow the network's own gradient."
        )
    return head


class HeadReading(NamedTuple):
    """What the head of a model got while a batch was read: all that its steps depend on.

    Args:
        on_prompt: Whether at the positions that predict a token of the prompt as well.
        passes: Each forward pass, and the head's inputs `(M, d)` at its positions.
    """

    on_prompt: bool
    passes: list[tuple[Step, Tensor]]


def read_batch(passes: BatchPasses, corpus: EncodedCorpus, batch: Batch, *, on_prompt: bool) -> HeadReading:
    """Read a batch once.

    Args:
        passes: The model.
        corpus: Token ids of all rows.
        batch: The rows.
        on_prompt: Whether a head will make steps on the prompts as well.

    Returns:
        What its head got.
    """
    lengths = [len(predicted_tokens(corpus, row, on_prompt=on_prompt)) for row in batch.rows]
    slots = dict(zip(batch.rows, accumulate(lengths, initial=0)))
    # The head is called when all its inputs are there, and a pass needs at least one position.
    passed = passes.run(corpus, batch, slots, first=1, on_prompt=on_prompt)
    return HeadReading(on_prompt, [(step, output.hidden) for step, (output,) in passed])


def score_heads(
    reading: HeadReading,
    corpus: EncodedCorpus,
    batch: Batch,
    head: OutputHead,
    rules: Sequence[TTTConfig],
    *,
    memory: int,
) -> list[NDArray[np.float32]]:
    """Score the responses of a batch, row after row, under heads that follow them.

    Args:
        reading: What `read_batch` gave for it, with the prompts where a rule is to follow them.
        corpus: Token ids of all rows.
        batch: The rows.
        head: The head.
        rules: How it makes a step, and whether on the prompts as well.
        memory: Bytes for what the steps keep, and as many for the logits that several rules share; a longer line takes
            what it takes, alone.

    Returns:
        For each rule `log p_TTT(y_h | x, y_<h)` of all tokens, nats.
    """
    lines = [predicted_tokens(corpus, row, on_prompt=reading.on_prompt) for row in batch.rows]
    starts = list(accumulate(map(len, lines), initial=0))
    followed = np.empty((2, starts[-1]), dtype=np.int64)
    followed[1] = list(chain.from_iterable(lines))
    before = 0
    for step, hidden in reading.passes:
        followed[0, step.slots] = step.pick + before
        before += len(hidden)
    hidden = torch.cat([hidden for _, hidden in reading.passes])
    lengths = [len(corpus.completions[row]) for row in batch.rows]
    whole = [followed[:, start:stop] for start, stop in pairwise(starts)]
    responses = [line[:, -length:] for line, length in zip(whole, lengths)]
    alike: dict[tuple[bool, int], list[int]] = {}
    for index, rule in enumerate(rules):
        alike.setdefault((rule.on_prompt, _kept(rule, len(head.weight))), []).append(index)
    found: dict[int, NDArray[np.float32]] = {}
    for (on_prompt, _), indices in alike.items():
        logprobs = adapted_logprobs(
            hidden,
            whole if on_prompt else responses,
            [tuple(corpus.prompts[row]) for row in batch.rows],
            lengths,
            head,
            rules=[rules[index] for index in indices],
            memory=memory,
        )
        found |= dict(zip(indices, map(np.concatenate, logprobs)))
    return [found[index] for index in range(len(rules))]


def adapted_logprobs(
    hidden: Tensor,
    lines: Sequence[IntArray],
    prompts: Sequence[Hashable],
    lengths: Sequence[int],
    head: OutputHead,
    *,
    rules: Sequence[StepRule],
    memory: int,
) -> list[list[NDArray[np.float32]]]:
    """Score responses, each with a head of its own that follows it; the steps on a prompt are made once.

    A rule's numbers are the same bits whatever the rules beside it: these only save it the product with the head.

    Args:
        hidden: Inputs of the head at all positions that predict a token `(M, d)`.
        lines: For each response the tokens that its head follows, it and what comes before it: the place of each one's
            input, and the token `(2, T)`.
        prompts: What tells prompts apart; where they are equal, lines begin alike.
        lengths: How many tokens of each line are the response.
        head: The head.
        rules: How it makes a step; rules that keep equally much of one.
        memory: Bytes for what the steps keep, and as many for the logits that several rules share; a longer line takes
            what it takes, alone.

    Returns:
        For each rule `log p_TTT(y_h | x, y_<h)` of each response's tokens, nats.
    """
    around_zero = any(rule.radius is not None and rule.center == "zero" for rule in rules)
    squared_norm = squared_head_norm(head.weight, head.bias) if around_zero else None
    follow = partial(follow_tokens, has_bias=head.bias is not None, squared_norm=squared_norm)
    found: list[dict[int, NDArray[np.float32]]] = [{} for _ in rules]
    kept = _kept(rules[0], len(head.weight))
    for batch in _batches(_branchings(lines, prompts, lengths), len(head.weight), kept, memory):
        shared = _SharedLogits(head.module, memory if len(rules) > 1 else 0)
        for rule, own in zip(rules, found):
            for row, logprobs in _follow_batch(hidden, batch, partial(follow, head=shared.begin(), rule=rule)):
                own[row] = logprobs[: lengths[row]]
    return [[own[row] for row in range(len(lines))] for own in found]


class _SharedLogits:
    """What a head that nobody changed gives for the lines of a batch, which rule after rule asks for in one order.

    Args:
        head: The head.
        memory: Bytes that may be kept; what is beyond is computed for each rule.
    """

    def __init__(self, head: nn.Module, memory: int) -> None:
        self._head, self._left = head, memory
        self._blocks: dict[int, Tensor] = {}

    def begin(self) -> Callable[[Tensor], Tensor]:
        """The head, for one rule."""
        numbers = count()

        def logits(hidden: Tensor) -> Tensor:
            number = next(numbers)
            block = self._blocks.get(number)
            if block is None:
                block = self._head(hidden)
                if block.nbytes <= self._left:
                    self._left -= block.nbytes
                    self._blocks[number] = block
            return block

        return logits


def _follow_batch(
    hidden: Tensor, batch: list[_Branching], follow: Callable[..., tuple[FastWeights, Tensor]]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows of a batch, and log-probabilities of each one's response, padded."""
    state = None
    if any(stem.shape[1] for stem, _ in batch):
        inputs, tokens, mask = _gather(hidden, [stem for stem, _ in batch])
        state, _ = follow(inputs, tokens, mask=mask, room=max(_longest(branches) for _, branches in batch))
    for turn in zip_longest(*(branches.items() for _, branches in batch)):
        rows, branches = zip(*filter(None, turn))  # those that have no more come last
        inputs, tokens, mask = _gather(hidden, branches)
        begun = None if state is None else branch_fast_weights(state, len(rows))
        _, logprobs = follow(inputs, tokens, mask=mask, state=begun)
        yield from zip(rows, logprobs.float().cpu().numpy())


def _branchings(lines: Sequence[IntArray], prompts: Sequence[Hashable], lengths: Sequence[int]) -> list[_Branching]:
    """Gather the lines of each prompt."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lines)), key=lambda row: -lengths[row]):
        # With nothing before the responses there is nothing to share, and they may as well be followed side by side.
        groups.setdefault(prompts[row] if lines[row].shape[1] > lengths[row] else row, []).append(row)
    found = []
    for rows in groups.values():
        stem = lines[rows[0]][:, : -lengths[rows[0]]]
        found.append((stem, {row: lines[row][:, stem.shape[1] :] for row in rows}))
    return found


def _kept(rule: StepRule, vocabulary: int) -> int:
    """Floats that the steps on a token keep: errors, where they are cut with an int64 beside each."""
    return rule.num_steps * (vocabulary if rule.top_k is None else min(vocabulary, 3 * (rule.top_k + 1)))


def _batches(branchings: list[_Branching], vocabulary: int, kept: int, memory: int) -> Iterator[list[_Branching]]:
    """Put those of like length together, as many as there is memory for; the ones with most branches come first."""
    order = sorted(branchings, key=lambda branching: (branching[0].shape[1], _longest(branching[1])))
    while order:
        batch: list[_Branching] = []
        before = after = 0
        while order:
            stem, branches = order[-1]
            before, after = max(before, stem.shape[1]), max(after, _longest(branches))
            row = 4 * (kept * (before + after) + vocabulary * min(max(before, after), POSITIONS))
            if batch and (len(batch) + 1) * row > memory:
                break
            batch.append(order.pop())
        yield sorted(batch, key=lambda branching: -len(branching[1]))


def _longest(branches: dict[int, IntArray]) -> int:
    return next(iter(branches.values())).shape[1]


def _gather(hidden: Tensor, lines: Sequence[IntArray]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `(B, T, d)`, tokens `(B, T)` and which of them count `(B, T)` of lines of unequal length."""
    padded = np.zeros((2, len(lines), max(line.shape[1] for line in lines)), dtype=np.int64)
    for row, line in enumerate(lines):
        padded[:, row, : line.shape[1]] = line
    lengths = np.array([[line.shape[1]] for line in lines])
    mask = torch.from_numpy(np.arange(padded.shape[2]) < lengths).to(hidden.device)
    places, tokens = torch.from_numpy(padded).to(hidden.device)
    return hidden[places], tokens, mask


# A position that a gradient is taken through keeps what all layers made of it; so many plain ones fit in its place.
_GRAPH = 16


class RowScorer:
    """A model that becomes another one along every response; use it inside `inference`.

    Args:
        model: The causal language model.
        config: What makes a step, how, and on which tokens.
        batch_tokens: Token positions that one forward pass without gradients may hold.

    Raises:
        ValueError: If the scope, or the cache that is asked for, does not work with this model.
    """

    def __init__(self, model: nn.Module, config: TTTConfig, *, batch_tokens: int) -> None:
        self._model, self._config = model, config
        self._together = row_network(model, config).shares_passes
        self._positions = batch_tokens if config.cache == "stale" else batch_tokens // _GRAPH

    def plan(
        self, corpus: EncodedCorpus, rows: Sequence[int], *, together: bool = True, padding: bool = True
    ) -> list[Batch]:
        """Arrange rows into batches, longest first; responses of a prompt that is followed go on from it in waves.

        Args:
            corpus: Token ids of all rows.
            rows: The rows to score.
            together: Whether the model may read several prompts in one pass.
            padding: Whether these may be of unequal length.

        Returns:
            The batches.
        """
        groups: dict[Hashable, list[int]] = {}
        for row in sorted(rows, key=lambda row: -len(corpus.completions[row])):
            groups.setdefault(tuple(corpus.prompts[row]) if self._config.on_prompt else row, []).append(row)
        batches: list[list[list[int]]] = []
        widest = 0, 0
        for group in sorted(groups.values(), key=lambda group: (-len(corpus.prompts[group[0]]), group[0])):
            own = len(corpus.prompts[group[0]]), len(corpus.completions[group[0]])
            widest = max(widest[0], own[0]), max(widest[1], own[1])
            apart = not (self._together and together) or (widest[0] != own[0] and not padding)
            if not batches or apart or (len(batches[-1]) + 1) * sum(widest) > self._positions:
                batches.append([])
                widest = own
            batches[-1].append(group)
        return [_batch(together) for together in batches]

    def score(self, corpus: EncodedCorpus, batch: Batch) -> NDArray[np.float32]:
        """Score the responses of a batch of `plan`.

        Args:
            corpus: Token ids of all rows.
            batch: The rows.

        Returns:
            `log p_TTT(y_h | x, y_<h)` of all tokens, row after row, nats.
        """
        prompts = [corpus.prompts[row] for row in batch.waves[0]]
        ids, mask = np.zeros((2, len(prompts), max(map(len, prompts))), dtype=np.int64)
        for index, prompt in enumerate(prompts):
            ids[index, -len(prompt) :], mask[index, -len(prompt) :] = prompt, 1
        begun = RowModels(self._model, torch.from_numpy(ids), config=self._config, mask=torch.from_numpy(mask).bool())
        found: list[NDArray[np.float32]] = []
        for index, wave in enumerate(batch.waves):
            last = index == len(batch.waves) - 1 and len(wave) == len(prompts)
            models = begun if last else begun.select(torch.arange(len(wave)))
            found += _follow(models, [corpus.completions[row] for row in wave])
        return np.concatenate(found)


def _batch(groups: list[list[int]]) -> Batch:
    """Rows of some groups; wave after wave has one of each group, as long as there are."""
    groups = sorted(groups, key=lambda group: -len(group))
    waves = tuple(tuple(row for row in wave if row is not None) for wave in zip_longest(*groups))
    return Batch(tuple(chain.from_iterable(waves)), cuts=(), waves=waves)


def _follow(models: RowModels, responses: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Log-probabilities of the tokens of each model's response."""
    lengths = torch.tensor([len(response) for response in responses])
    tokens = torch.zeros(len(responses), int(lengths.max()), dtype=torch.int64)
    for index, response in enumerate(responses):
        tokens[index, : len(response)] = torch.tensor(response)
    columns = []
    for place, chosen in enumerate(tokens.T):
        logits = models.logits()
        columns.append(log_softmax(logits).gather(-1, chosen.to(logits.device)[:, None])[:, 0].float().cpu())
        going_on = lengths > place + 1
        if going_on.any():
            models.step(chosen, active=going_on)
    found = torch.stack(columns, dim=1).numpy()
    return [line[:length] for line, length in zip(found, lengths.tolist())]
