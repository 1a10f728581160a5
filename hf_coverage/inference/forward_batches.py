"""From token ids to forward passes: rows into batches, batches into passes of one model, or a model and its teacher.

The token axis of a batch is cut into segments. A plain batch has one. Responses of one prompt have two: the prompt,
run once, and the responses that continue from its cache. A response with more positions than the logits' memory
holds has as many segments as it needs. Nothing here knows of a model or of the number of processes: the plan, and so
every floating-point operation, is a function of the rows and the limits alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

import numpy as np
from torch import nn

from hf_coverage.functional.checks import IntArray
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, HeadOutput
from hf_coverage.inference.prefix_cache import continue_lines
from hf_coverage.inference.self_check import Reading, find_reading, ignores_left_padding

__all__ = [
    "Batch",
    "BatchPasses",
    "Limits",
    "Step",
    "build_step",
    "passes_missed",
    "plan_batches",
    "predicted_tokens",
    "tokens_read",
]

# A shared prefix costs a second, smaller forward pass; below a tenth of the tokens that is not worth it.
_LEAST_SAVING = 0.1
# Prompts of unequal length share a pass by cutting all of them to the shortest; their tails then run once a response.
_MOST_TAIL = 1 / 16
# Cached positions need no activations, only keys and values: more of them fit than of positions that are computed.
_CACHED_PER_COMPUTED = 4
# Padding that a batch accepts rather than starting another one.
_MOST_PADDING = 0.2
# Below this many tokens a forward pass is too small to keep a processor busy, whatever the padding.
_LEAST_TOKENS = 128


@dataclass(frozen=True)
class Limits:
    """How much one forward pass may hold.

    Args:
        tokens: Token positions computed, padding included. A longer row runs alone.
        positions: Positions whose logits exist at the same time.
    """

    tokens: int
    positions: int


@dataclass(frozen=True)
class Batch:
    """Rows scored together.

    Args:
        rows: Rows of the corpus; the first segment runs once per distinct line of tokens among them.
        cuts: Ends of the segments on the token axis of `prompt + completion[:-1]`, ascending.
        waves: The rows that go on after the first segment, split into passes; empty with one segment.
    """

    rows: tuple[int, ...]
    cuts: tuple[int, ...]
    waves: tuple[tuple[int, ...], ...] = ()

    @property
    def num_forwards(self) -> int:
        """How many forward passes the batch takes."""
        return 1 + len(self.waves) * (len(self.cuts) - 1)


@dataclass(frozen=True)
class Step:
    """One forward pass: what goes in, and which response tokens its positions predict.

    Args:
        ids: Token ids `(S, T)`, right-padded with 0. Causality makes that padding invisible to every real token.
        sequences: For each of the step's rows its line of `ids`.
        positions: Positions `(M,)` of the flattened `ids` that predict something, ascending.
        pick: For each of the N response tokens predicted here, its place in `positions`.
        labels: The response tokens `(N,)`.
        slots: Their places `(N,)` among all response tokens of the batch.
    """

    ids: IntArray
    sequences: IntArray
    positions: IntArray
    pick: IntArray
    labels: IntArray
    slots: IntArray


def plan_batches(
    corpus: EncodedCorpus, rows: Iterable[int], limits: Limits, *, reading: Reading = Reading.SHARED
) -> list[Batch]:
    """Arrange rows into batches: each row once, similar lengths together, equal prompts run once.

    Args:
        corpus: Token ids of all rows.
        rows: The rows to score.
        limits: What one forward pass may hold.
        reading: What may be read together.

    Returns:
        Batches, longest first within each kind. A function of its arguments alone.

    Example:
        >>> corpus = EncodedCorpus([[5] * 9, [5] * 9, [6]], [[1, 2], [3, 4], [7, 8]])
        >>> plan_batches(corpus, range(3), Limits(tokens=64, positions=64))
        [Batch(rows=(0, 1), cuts=(9, 10), waves=((0, 1),)), Batch(rows=(2,), cuts=(2,), waves=())]
    """
    short: list[int] = []
    long: list[int] = []
    for row in rows:
        (short if len(corpus.completions[row]) <= limits.positions else long).append(row)
    shared, single = _group_by_prompt(corpus, short) if reading is Reading.SHARED else ([], short)
    return [
        *_shared_batches(corpus, shared, limits),
        *_plain_batches(corpus, single, limits, reading),
        *(_segmented_batch(corpus, row, limits) for row in sorted(long, key=lambda row: -tokens_read(corpus, row))),
    ]


def build_step(
    corpus: EncodedCorpus,
    rows: Sequence[int],
    slots: IntArray,
    start: int,
    stop: int,
    *,
    context: int,
    whole: bool = False,
    on_prompt: bool = False,
) -> Step:
    """Lay out the forward pass that scores the response tokens predicted at positions `start` to `stop` of each row.

    Equal lines are run once, which is how the responses of one prompt come to share it.

    Args:
        corpus: Token ids of all rows.
        rows: Rows of this pass.
        slots: For each of these rows, the place of its first response token among those of the batch.
        start: First predicting position on the axis of `prompt + completion[:-1]`.
        stop: One past the last.
        context: Where the input begins: `start` where the cache holds what comes before, else 0.
        whole: Whether the input goes on to the end of each row, whose length a model may depend on, and not to `stop`.
        on_prompt: Whether what is predicted begins with the second token of each prompt, see `predicted_tokens`.

    Returns:
        The pass, with numpy arrays.
    """
    lines = [
        tuple((*corpus.prompts[row], *corpus.completions[row][:-1])[context : None if whole else stop]) for row in rows
    ]
    sequences = np.arange(len(rows))
    if context == 0:  # later, equal tokens may follow different prompts
        distinct = {line: index for index, line in enumerate(dict.fromkeys(lines))}
        sequences, lines = np.array([distinct[line] for line in lines]), list(distinct)
    ids = _pad(lines)
    predicted = [predicted_tokens(corpus, row, on_prompt=on_prompt) for row in rows]
    befores = [tokens_read(corpus, row) - len(line) for row, line in zip(rows, predicted)]
    spans = [_span(len(line), start - before, stop - before) for line, before in zip(predicted, befores)]
    counts = np.array([last - first for first, last in spans])
    tokens = np.concatenate([np.arange(first, last) for first, last in spans])
    offsets = sequences * ids.shape[1] + np.array(befores) - context
    positions, pick = np.unique(np.repeat(offsets, counts) + tokens, return_inverse=True)
    labels = chain.from_iterable(line[first:last] for line, (first, last) in zip(predicted, spans))
    return Step(
        ids=ids,
        sequences=sequences,
        positions=positions,
        pick=pick,
        labels=np.fromiter(labels, dtype=np.int64, count=int(counts.sum())),
        slots=np.repeat(slots, counts) + tokens,
    )


def tokens_read(corpus: EncodedCorpus, row: int) -> int:
    """Count what a model reads to score a row: the last response token is only predicted.

    Args:
        corpus: Token ids of all rows.
        row: Which row.

    Returns:
        Tokens of `prompt + completion[:-1]`.
    """
    return len(corpus.prompts[row]) + len(corpus.completions[row]) - 1


def passes_missed(together: Sequence[Batch], own: Batch | None) -> int:
    """Count the passes of a sharded model that other processes make after this one's last, and cannot make alone.

    Args:
        together: The batches that all processes run at the same time.
        own: This process's; None where it has none.

    Returns:
        How many passes it has to take part in, see `run_along`.
    """
    return max(batch.num_forwards for batch in together) - (0 if own is None else own.num_forwards)


def predicted_tokens(corpus: EncodedCorpus, row: int, *, on_prompt: bool) -> list[int]:
    """What a row's positions predict: its response, or all of it but its first token.

    Args:
        corpus: Token ids of all rows.
        row: Which row.
        on_prompt: Whether the prompt counts; nothing predicts its first token.

    Returns:
        The tokens; the last one is predicted at the last position that is read.
    """
    completion = corpus.completions[row]
    return [*corpus.prompts[row][1:], *completion] if on_prompt else completion


def _span(length: int, start: int, stop: int) -> tuple[int, int]:
    """What `start` to `stop` has of 0 to `length`."""
    first = min(max(0, start), length)
    return first, min(max(first, stop), length)


def _group_by_prompt(corpus: EncodedCorpus, rows: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Groups of rows worth one shared prompt, and the rows left over."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(corpus.prompts[row]), []).append(row)
    shared, single = [], []
    for prompt, members in groups.items():
        plain = sum(tokens_read(corpus, row) for row in members)
        saved = (len(members) - 1) * len(prompt)
        if saved > _LEAST_SAVING * plain:
            shared.append(members)
        else:
            single.extend(members)
    return shared, sorted(single)


def _shared_batches(corpus: EncodedCorpus, groups: list[list[int]], limits: Limits) -> list[Batch]:
    batches: list[Batch] = []
    members: list[list[int]] = []
    for group in sorted(groups, key=lambda group: (-len(corpus.prompts[group[0]]), group[0])):
        if members and not _prompts_fit(corpus, [*members, group], limits):
            batches.append(_shared_batch(corpus, members, limits))
            members = []
        members.append(group)
    return [*batches, _shared_batch(corpus, members, limits)] if members else batches


def _prompts_fit(corpus: EncodedCorpus, groups: list[list[int]], limits: Limits) -> bool:
    """Whether prompts, cut to the last and shortest, run in one pass without making their tails too expensive."""
    prefix = len(corpus.prompts[groups[-1][0]])
    tails = sum(len(group) * (len(corpus.prompts[group[0]]) - prefix) for group in groups)
    suffixes = sum(tokens_read(corpus, row) - prefix for group in groups for row in group)
    return (
        len(groups) <= limits.positions
        and len(groups) * prefix + suffixes <= limits.tokens
        and tails <= _MOST_TAIL * (len(groups) * prefix + suffixes)
    )


def _shared_batch(corpus: EncodedCorpus, groups: list[list[int]], limits: Limits) -> Batch:
    prefix = len(corpus.prompts[groups[-1][0]])
    rows = sorted(chain.from_iterable(groups), key=lambda row: (-tokens_read(corpus, row), row))
    onward = [row for row in rows if tokens_read(corpus, row) > prefix]
    if not onward:  # one-token responses: the last position of the prompt predicts them all
        return Batch(tuple(rows), cuts=(prefix,))
    cuts = (prefix, tokens_read(corpus, rows[0]))
    return Batch(tuple(rows), cuts, waves=tuple(_fill(corpus, onward, limits, cached=prefix)))


def _plain_batches(corpus: EncodedCorpus, rows: list[int], limits: Limits, reading: Reading) -> list[Batch]:
    rows = sorted(rows, key=lambda row: (-tokens_read(corpus, row), row))
    together: Iterable[list[int]] = [rows]
    if reading is Reading.EQUAL:
        together = [list(group) for _, group in groupby(rows, key=lambda row: tokens_read(corpus, row))]
    elif reading is Reading.ALONE:
        together = [[row] for row in rows]
    runs = chain.from_iterable(_fill(corpus, group, limits, cached=0) for group in together)
    return [Batch(run, cuts=(tokens_read(corpus, run[0]),)) for run in runs]


def _segmented_batch(corpus: EncodedCorpus, row: int, limits: Limits) -> Batch:
    first = len(corpus.prompts[row]) - 1
    length = tokens_read(corpus, row)
    cuts = (*range(first + limits.positions, length, limits.positions), length)
    return Batch((row,), cuts, waves=((row,),))


def _fill(corpus: EncodedCorpus, rows: list[int], limits: Limits, *, cached: int) -> list[tuple[int, ...]]:
    """Split rows, longest first, into runs that fit in one pass beside `cached` positions each."""
    runs: list[tuple[int, ...]] = []
    run: list[int] = []
    width = filled = positions = 0
    for row in rows:
        tokens, responses = tokens_read(corpus, row) - cached, len(corpus.completions[row])
        area = (len(run) + 1) * width
        if run and (
            area > limits.tokens
            or (len(run) + 1) * (cached + width) > _CACHED_PER_COMPUTED * limits.tokens
            or positions + responses > limits.positions
            or (filled >= _LEAST_TOKENS and area - filled - tokens > _MOST_PADDING * area)
        ):
            runs.append(tuple(run))
            run, filled, positions = [], 0, 0
        if not run:
            width = tokens
        run.append(row)
        filled += tokens
        positions += responses
    return [*runs, tuple(run)] if run else runs


def _pad(lines: list[tuple[int, ...]]) -> IntArray:
    ids = np.zeros((len(lines), max(map(len, lines))), dtype=np.int64)
    for index, line in enumerate(lines):
        ids[index, : len(line)] = line
    return ids


class BatchPasses:
    """Models ready to run: their limits are known, and whether responses can share a cache.

    Use it inside `inference(model, teacher)`.

    Args:
        model: A causal language model.
        teacher: Another one of the same vocabulary, or None.
        batch_tokens: Token positions computed in one forward pass.
        logits_memory: Bytes for logits and one float32 copy of them, of both.

    Attributes:
        forwards: The model, and the teacher.
        vocab_size: V.
        positions: Positions whose logits may exist at the same time.
        plain_head: Whether the models return what their heads give, so that these may be called alone.
        sharded: Whether all processes have to make the same number of passes.
        split: Whether they have to make the same passes.

    Raises:
        ValueError: If a model has no output embeddings, the vocabularies differ, or `logits_memory` is too small.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, *, batch_tokens: int, logits_memory: int) -> None:
        self.forwards = [HeadForward(model)] if teacher is None else [HeadForward(model), HeadForward(teacher)]
        probes = [forward.probe() for forward in self.forwards]
        self.vocab_size = probes[0].logits.shape[-1]
        if probes[-1].logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"`teacher` must have the vocabulary of `model`, {self.vocab_size} tokens, "
                f"got {probes[-1].logits.shape[-1]}; KL compares their distributions token by token."
            )
        # Next to the logits there is at most one float32 copy: models upcast, soft-cap or scale what the head returns.
        position_bytes = sum(self.vocab_size * (probe.logits.element_size() + 4) for probe in probes)
        if logits_memory < position_bytes:
            raise ValueError(
                f"`logits_memory` must hold the logits of one position, {position_bytes} bytes for this vocabulary, "
                f"got {logits_memory}."
            )
        self.positions = logits_memory // position_bytes
        self.plain_head = all(probe.plain_head for probe in probes)
        self.sharded = any(forward.sharded for forward in self.forwards)
        self.split = any(forward.split for forward in self.forwards)
        # A head that can be called alone takes the positions of one pass in chunks; otherwise the pass is bounded.
        self._limits = Limits(batch_tokens, sys.maxsize if self.plain_head else self.positions)
        self._repeatable = all(probe.repeatable for probe in probes)
        self._reading = Reading.ALONE

    def check(self, corpus: EncodedCorpus, fastest: Reading = Reading.SHARED) -> Reading:
        """Find out how rows may be read, see `find_reading`; to be called before `plan`, on every process.

        Args:
            corpus: Token ids of all rows.
            fastest: The fastest way that is wanted.

        Returns:
            The way.

        Raises:
            ValueError: If a model is not causal.
        """
        self._reading = find_reading(
            self.forwards,
            corpus,
            vocab_size=self.vocab_size,
            fastest=fastest if self._repeatable else max(fastest, Reading.PADDED),
            most_positions=self.positions,
        )
        return self._reading

    def ignores_left_padding(self, corpus: EncodedCorpus) -> bool:
        """Tell whether the model may be given padding on the left, see `self_check.ignores_left_padding`."""
        return ignores_left_padding(
            self.forwards[0], corpus, vocab_size=self.vocab_size, most_positions=self.positions
        )

    def plan(self, corpus: EncodedCorpus, rows: Sequence[int], *, share_prefixes: bool) -> list[Batch]:
        """Arrange rows into batches, see `plan_batches`."""
        reading = self._reading if share_prefixes else max(self._reading, Reading.PADDED)
        return plan_batches(corpus, rows, self._limits, reading=reading)

    def run(
        self, corpus: EncodedCorpus, batch: Batch, slots: dict[int, int], *, first: int, on_prompt: bool = False
    ) -> Iterator[tuple[Step, list[HeadOutput]]]:
        """Run a batch: the first segment once, then every wave's way on from it.

        Args:
            corpus: Token ids of all rows.
            batch: Rows of `plan`.
            slots: For each row, the place of its first predicted token among those of the batch.
            first: Positions that get their logits in the pass itself, at least 1; see `HeadOutput.take_logits`.
            on_prompt: Whether what is predicted begins with the second token of each prompt.

        Yields:
            Each pass, and what each model gave.
        """

        def step_of(rows: Sequence[int], start: int, stop: int, context: int) -> Step:
            own = np.array([slots[row] for row in rows])
            return build_step(corpus, rows, own, start, stop, context=context, whole=whole, on_prompt=on_prompt)

        whole = self._reading >= Reading.EQUAL
        begin = step_of(batch.rows, 0, batch.cuts[0], 0)
        keep = self._reading is Reading.SHARED and len(batch.cuts) > 1
        outputs = [forward(begin.ids, begin.positions, first=first, keep_cache=keep) for forward in self.forwards]
        roots = [output.cache for output in outputs]
        yield begin, outputs
        line_of = dict(zip(batch.rows, begin.sequences))
        for wave in batch.waves:
            lines = np.array([line_of[row] for row in wave])
            last = len(batch.cuts) == 2
            caches = [continue_lines(root, lines, last=last) if keep and root is not None else None for root in roots]
            for start, stop in pairwise(batch.cuts):
                step = step_of(wave, start, stop, start if keep else 0)
                outputs = [
                    forward(step.ids, step.positions, first=first, cache=cache)
                    for forward, cache in zip(self.forwards, caches)
                ]
                yield step, outputs

    def run_along(self, num_forwards: int) -> None:
        """Take part in as many passes of other processes: those of a sharded model need all of them."""
        for _ in range(num_forwards):
            for forward in self.forwards:  # in turn, as in `run`
                forward.run_along()
