"""Forward passes of batches through one model, or a model and its teacher."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import nn

from hf_coverage.measure.batching import Batch, Limits, Step, build_step, plan_batches
from hf_coverage.measure.corpus import EncodedCorpus
from hf_coverage.measure.forward import HeadForward, HeadOutput
from hf_coverage.measure.prefix_cache import continue_lines

__all__ = ["BatchPasses"]

_DUMMY = np.zeros((1, 1), dtype=np.int64)


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
        # A head that can be called alone takes the positions of one pass in chunks; otherwise the pass is bounded.
        self._limits = Limits(batch_tokens, sys.maxsize if self.plain_head else self.positions)
        self._cached = all(probe.repeatable for probe in probes)

    def plan(self, corpus: EncodedCorpus, rows: range, *, share_prefixes: bool) -> list[Batch]:
        """Arrange rows into batches, see `plan_batches`."""
        return plan_batches(corpus, rows, self._limits, share_prefixes=share_prefixes and self._cached)

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
            return build_step(corpus, rows, own, start, stop, context=context, on_prompt=on_prompt)

        begin = step_of(batch.rows, 0, batch.cuts[0], 0)
        keep = self._cached and len(batch.cuts) > 1
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
            for forward in self.forwards:
                forward(_DUMMY, _DUMMY[0])
