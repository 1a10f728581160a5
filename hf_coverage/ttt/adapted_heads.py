"""Log-probabilities of responses under a head that makes a step after each of their tokens, from one forward pass.

The steps change the head alone, so the hidden states of a response are those of the model as it is.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_coverage.functional.checks import IntArray
from hf_coverage.functional.head_training import POSITIONS, branch_fast_weights, follow_tokens, squared_head_norm
from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward_batches import Batch, BatchPasses, predicted_tokens
from hf_coverage.inference.output_head import OutputHead

__all__ = ["adapted_logprobs", "require_adaptable", "score_heads"]

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


def score_heads(
    passes: BatchPasses, corpus: EncodedCorpus, batch: Batch, config: TTTConfig, *, memory: int
) -> NDArray[np.float32]:
    """Score the responses of a batch, row after row, under heads that follow them.

    Args:
        passes: The model.
        corpus: Token ids of all rows.
        batch: The rows.
        config: How the head makes a step, and whether on the prompts as well.
        memory: Bytes for what the steps keep; a longer line takes what it takes, alone.

    Returns:
        `log p_TTT(y_h | x, y_<h)` of all tokens, nats.
    """
    lines = [predicted_tokens(corpus, row, on_prompt=config.on_prompt) for row in batch.rows]
    starts = list(accumulate(map(len, lines), initial=0))
    followed = np.empty((2, starts[-1]), dtype=np.int64)
    followed[1] = list(chain.from_iterable(lines))
    inputs: list[Tensor] = []
    # The head is called when all its inputs are there, and a pass needs at least one position.
    passed = passes.run(corpus, batch, dict(zip(batch.rows, starts)), first=1, on_prompt=config.on_prompt)
    for step, (output,) in passed:
        followed[0, step.slots] = step.pick + sum(map(len, inputs))
        inputs.append(output.hidden)
    logprobs = adapted_logprobs(
        torch.cat(inputs),
        [followed[:, start:stop] for start, stop in pairwise(starts)],
        [tuple(corpus.prompts[row]) for row in batch.rows],
        [len(corpus.completions[row]) for row in batch.rows],
        require_adaptable(passes),
        rule=config,
        memory=memory,
    )
    return np.concatenate(logprobs)


def adapted_logprobs(
    hidden: Tensor,
    lines: Sequence[IntArray],
    prompts: Sequence[Hashable],
    lengths: Sequence[int],
    head: OutputHead,
    *,
    rule: StepRule,
    memory: int,
) -> list[NDArray[np.float32]]:
    """Score responses, each with a head of its own that follows it; the steps on a prompt are made once.

    Args:
        hidden: Inputs of the head at all positions that predict a token `(M, d)`.
        lines: For each response the tokens that its head follows, it and what comes before it: the place of each one's
            input, and the token `(2, T)`.
        prompts: What tells prompts apart; where they are equal, lines begin alike.
        lengths: How many tokens of each line are the response.
        head: The head.
        rule: How it makes a step.
        memory: Bytes for what the steps keep; a longer line takes what it takes, alone.

    Returns:
        `log p_TTT(y_h | x, y_<h)` of each response's tokens, nats.
    """
    around_zero = rule.radius is not None and rule.center == "zero"
    follow = partial(
        follow_tokens,
        head=head.module,
        rule=rule,
        has_bias=head.bias is not None,
        squared_norm=squared_head_norm(head.weight, head.bias) if around_zero else None,
    )
    found: dict[int, NDArray[np.float32]] = {}
    for batch in _batches(_branchings(lines, prompts, lengths), len(head.weight), rule, memory):
        state = None
        if any(stem.shape[1] for stem, _ in batch):
            inputs, tokens, mask = _gather(hidden, [stem for stem, _ in batch])
            state, _ = follow(inputs, tokens, mask=mask, room=max(_longest(branches) for _, branches in batch))
        for turn in zip_longest(*(branches.items() for _, branches in batch)):
            rows, branches = zip(*filter(None, turn))  # those that have no more come last
            inputs, tokens, mask = _gather(hidden, branches)
            begun = None if state is None else branch_fast_weights(state, len(rows))
            _, logprobs = follow(inputs, tokens, mask=mask, state=begun)
            found |= {row: values[: lengths[row]] for row, values in zip(rows, logprobs.float().cpu().numpy())}
    return [found[row] for row in range(len(lines))]


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


def _batches(branchings: list[_Branching], vocabulary: int, rule: StepRule, memory: int) -> Iterator[list[_Branching]]:
    """Put those of like length together, as many as there is memory for; the ones with most branches come first."""
    kept = vocabulary if rule.top_k is None else min(vocabulary, 3 * (rule.top_k + 1))  # with an int64 beside each
    order = sorted(branchings, key=lambda branching: (branching[0].shape[1], _longest(branching[1])))
    while order:
        batch: list[_Branching] = []
        before = after = 0
        while order:
            stem, branches = order[-1]
            before, after = max(before, stem.shape[1]), max(after, _longest(branches))
            row = 4 * (kept * (before + after) * rule.num_steps + vocabulary * min(max(before, after), POSITIONS))
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
