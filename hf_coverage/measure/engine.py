"""The machine under scoring: batches on their way through one model, or a model and its teacher, on all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_coverage.functional.arithmetic_codes import token_parts
from hf_coverage.functional.checks import check_count
from hf_coverage.functional.logprobs import collision_probability, logsumexp, token_kl
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, HeadOutput
from hf_coverage.inference.forward_batches import (
    Batch,
    BatchPasses,
    Step,
    passes_missed,
    predicted_tokens,
    tokens_read,
)
from hf_coverage.inference.output_head import OutputHead
from hf_coverage.inference.processes import map_over_processes, split_over_processes
from hf_coverage.inference.remote import RemoteModel
from hf_coverage.inference.self_check import Reading
from hf_coverage.measure.scores import Scores
from hf_coverage.ttt.scoring import HeadReading, RowScorer, read_batch, require_adaptable, score_heads

__all__ = ["ScoringEngine", "ScoringOptions", "ServedEngine", "refuse_nan", "score_plain"]


@dataclass(frozen=True)
class ScoringOptions:
    """What is computed, and how much memory it may take; part of a score table's identity.

    Args:
        batch_tokens: Token positions computed in one forward pass, padding included; a longer row runs alone.
        logits_memory: Bytes for logits and one float32 copy of them, the teacher's included.
        share_prefixes: Whether responses of one prompt continue from one run of it where the model allows it.
        per_token: Whether the log-probability of each token is kept.
        head_statistics: Whether the output head's norms and inherent variance are measured.
        ttt: What makes a step after each token; None: nothing.
        batch_invariant: Whether each row is read in a pass of its own, so that no bit of its score depends on others.
        intervals: Whether it is found where each response's interval of arithmetic codes begins.

    Raises:
        ValueError: If a size is not positive, or `ttt` is combined with `head_statistics` or `intervals`, or has no
            single step size.
    """

    batch_tokens: int = 4096
    logits_memory: int = 2**27
    share_prefixes: bool = True
    per_token: bool = False
    head_statistics: bool = False
    ttt: TTTConfig | None = None
    batch_invariant: bool = False
    intervals: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "logits_memory"):
            check_count(getattr(self, name), name)
        if self.ttt is not None and self.head_statistics:
            raise ValueError("`head_statistics` are those of a head that stays what it is: leave out it or `ttt`.")
        if self.ttt is not None and self.intervals:
            raise ValueError("`intervals` are those of a model that stays what it is: leave out them or `ttt`.")
        if self.ttt is not None and isinstance(self.ttt.lr, Tensor):
            raise ValueError("`ttt` must have one step size `lr` for all rows, a float.")


class ScoringEngine:
    """Models ready to score.

    Use it inside `inference(model, teacher)`.

    Args:
        model: The causal language model to score.
        teacher: Another one of the same vocabulary, or None.
        options: What to compute.

    Raises:
        ValueError: If a model has no output embeddings, the vocabularies differ, `logits_memory` is too small, or
            the model cannot make steps, or there is a teacher, with `ttt`.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, options: ScoringOptions) -> None:
        self.options = options
        if options.ttt is not None and teacher is not None:
            raise ValueError("`teacher` measures a model that stays what it is: leave out it or `ttt`.")
        self._passes = BatchPasses(
            model, teacher, batch_tokens=options.batch_tokens, logits_memory=options.logits_memory
        )
        self._reading: Reading | None = None
        self._left_padding = False
        self._rows: RowScorer | None = None
        if options.ttt is not None and options.ttt.scope == "head":
            require_adaptable(self._passes)
        elif options.ttt is not None:
            self._rows = RowScorer(model, options.ttt, batch_tokens=options.batch_tokens)

    def check(self, corpus: EncodedCorpus, rows: Sequence[int]) -> None:
        """Refuse rows that do not fit a model, without scoring them.

        Raises:
            ValueError: If a token id is out of range, or a row is longer than a model takes; names the row.
        """
        for forward in self._passes.forwards:
            _check_rows(corpus, rows, forward, self._passes.vocab_size)

    def score(self, corpus: EncodedCorpus, rows: Sequence[int], advance: Callable[[int], Any]) -> Scores:
        """Score some rows: each of them on one process, the result on all.

        Args:
            corpus: Token ids of all rows.
            rows: Which rows to score.
            advance: Called after every round of batches with the number of tokens it took care of.

        Returns:
            Their scores.

        Raises:
            ValueError: If a token id or a row's length does not fit, a model is not causal, or it returns NaN.
        """
        (scores,) = self.score_rules(corpus, rows, [self.options.ttt], advance)
        refuse_nan(scores, rows, self.options.ttt)
        return scores

    def score_rules(
        self,
        corpus: EncodedCorpus,
        rows: Sequence[int],
        rules: Sequence[TTTConfig | None],
        advance: Callable[[int], Any],
    ) -> list[Scores]:
        """Score some rows under several rules from one reading of each; see `score`.

        Args:
            corpus: Token ids of all rows.
            rows: Which rows to score.
            rules: What makes a step after each token: that of `options`, or if that is of the head, any of the head,
                and None for the model as it is.
            advance: Called after every round of batches with the number of tokens it took care of.

        Returns:
            For each rule the scores of the rows, NaN where it has led the model there.

        Raises:
            ValueError: If a token id or a row's length does not fit, or a model is not causal.
        """
        self.check(corpus, rows)
        if self._reading is None:
            self._find_reading(corpus)
        batches = self._plan(corpus, rows)

        def keep_pace(together: Sequence[Batch], own: Batch | None) -> None:
            if self._passes.sharded:
                self._passes.run_along(passes_missed(together, own))
            advance(sum(tokens_read(corpus, row) for batch in together for row in batch.rows))

        score_batch = partial(self._score_batch, corpus, rules=rules)
        split = self._passes.split
        found = map_over_processes(score_batch, batches, after_round=keep_pace, together=split)
        return [
            _assemble([(batch.rows, values) for batch, values in zip(batches, own)], corpus, rows, self.options)
            for own in zip(*found)
        ]

    def _find_reading(self, corpus: EncodedCorpus) -> None:
        """Find out, once, what of the corpus the model may read together."""
        self.check(corpus, range(len(corpus)))  # its longest row is among what is read
        fastest = Reading.ALONE if self.options.batch_invariant else Reading.SHARED
        self._reading = self._passes.check(corpus, fastest)
        if self._rows is not None and self._reading < Reading.EQUAL:
            self._left_padding = self._passes.ignores_left_padding(corpus)

    def _plan(self, corpus: EncodedCorpus, rows: Sequence[int]) -> list[Batch]:
        if self._rows is not None:
            alone = self._reading is Reading.ALONE
            return self._rows.plan(corpus, rows, together=not alone, padding=self._left_padding)
        return self._passes.plan(corpus, rows, share_prefixes=self.options.share_prefixes)

    def _score_batch(
        self, corpus: EncodedCorpus, batch: Batch, rules: Sequence[TTTConfig | None]
    ) -> list[dict[str, NDArray]]:
        """For each rule the per-token values of a batch, row after row in the order of `batch.rows`."""
        if self._rows is not None:
            return [{"token_logprobs": self._rows.score(corpus, batch)}]
        heads = [rule for rule in rules if rule is not None]
        if not heads:
            asked = {"head_statistics": self.options.head_statistics, "intervals": self.options.intervals}
            return [score_plain(self._passes, corpus, batch, **asked)]
        reading = read_batch(self._passes, corpus, batch, on_prompt=any(rule.on_prompt for rule in heads))
        head, memory = require_adaptable(self._passes), self.options.logits_memory
        adapted = iter(score_heads(reading, corpus, batch, head, heads, memory=memory))
        return [
            _plain_values(_response_passes(reading, corpus, batch, head), corpus, batch, self._passes.positions)
            if rule is None
            else {"token_logprobs": next(adapted)}
            for rule in rules
        ]


class ServedEngine:
    """A server's model ready to score: what `ScoringEngine` is for one in memory.

    Args:
        model: The server's model.
        teacher: None; a server has no distributions to compare.
        options: What to compute; how it is batched is the server's business.

    Raises:
        ValueError: If what is asked for needs the model itself.
    """

    def __init__(self, model: RemoteModel, teacher: nn.Module | None, options: ScoringOptions) -> None:
        asked = {"ttt": options.ttt, "teacher": teacher, "head_statistics": options.head_statistics}
        asked |= {"intervals": options.intervals, "batch_invariant": options.batch_invariant}
        wanted = [name for name, value in asked.items() if value]
        if wanted:
            raise ValueError(
                f"`{wanted[0]}` needs the model itself, and {model.name} is a server's, which gives log-probabilities "
                "of tokens: leave it out, or load the model."
            )
        self.model = model
        self.options = options

    def score(self, corpus: EncodedCorpus, rows: Sequence[int], advance: Callable[[int], Any]) -> Scores:
        """Score some rows, many at once; see `ScoringEngine.score`.

        Raises:
            ConnectionError: If the server does not answer.
            ValueError: If a row does not fit, or the server's answer is not whole.
        """
        _check_length(corpus, rows, self.model)
        size = PartialState().num_processes

        def score(own: Sequence[int]) -> list[NDArray]:
            if not own:
                return []
            prompts, completions = [corpus.prompts[row] for row in own], [corpus.completions[row] for row in own]
            return self.model.token_logprobs(
                prompts, completions, lambda place: advance(size * tokens_read(corpus, own[place]))
            )

        values = split_over_processes(score, rows)
        lines = {"token_logprobs": np.concatenate(values)}
        return _assemble([(tuple(rows), lines)], corpus, rows, self.options)

    def score_rules(
        self,
        corpus: EncodedCorpus,
        rows: Sequence[int],
        rules: Sequence[TTTConfig | None],
        advance: Callable[[int], Any],
    ) -> list[Scores]:
        """Score some rows under the model as it is, which is the one rule of a server's model."""
        return [self.score(corpus, rows, advance) for _ in rules]


def _assemble(
    parts: list[tuple[tuple[int, ...], dict[str, NDArray]]],
    corpus: EncodedCorpus,
    rows: Sequence[int],
    options: ScoringOptions,
) -> Scores:
    """Put the rows of all batches into their order, and sum up each row."""
    tokens: dict[str, list[Any]] = {name: [None] * len(rows) for name in parts[0][1]}
    places = {row: place for place, row in enumerate(rows)}
    for batch_rows, values in parts:
        ends = list(accumulate(len(corpus.completions[row]) for row in batch_rows))
        for name, column in values.items():
            for row, line in zip(batch_rows, np.split(column, ends[:-1])):
                tokens[name][places[row]] = line
    statistics = "hidden_norm" in tokens
    return Scores(
        logprob=_reduce(np.sum, tokens["token_logprobs"]),
        num_tokens=np.array([len(corpus.completions[row]) for row in rows], dtype=np.int64),
        token_logprobs=tokens["token_logprobs"] if options.per_token else None,
        token_kl=tokens.get("token_kl"),
        hidden_norm=_reduce(np.max, tokens["hidden_norm"]) if statistics else None,
        inherent_variance=_reduce(np.sum, tokens["inherent_variance"]) if statistics else None,
        sampled_variance=_reduce(np.sum, tokens["sampled_variance"]) if statistics else None,
        interval_low=_interval_low(tokens["below"], tokens["token_logprobs"]) if "below" in tokens else None,
    )


def _interval_low(below: list[NDArray], logprobs: list[NDArray]) -> NDArray[np.float64]:
    """`sum_h below_h prod_{i<h} p_i` of each row."""
    before = [np.exp(np.append(0.0, np.cumsum(line[:-1], dtype=np.float64))) for line in logprobs]
    return np.array([parts @ shares for parts, shares in zip(below, before)])


def refuse_nan(scores: Scores, rows: Sequence[int], ttt: TTTConfig | None) -> None:
    """Refuse scores of rows with NaN among them, and say what may have led there.

    Raises:
        ValueError: If there is one; names the row.
    """
    bad = np.isnan(scores.logprob)
    if bad.any():
        why = "its weights are damaged, or its logits overflow in this dtype; load it in float32 or bfloat16"
        if ttt is not None:
            why = f"its steps with lr {ttt.lr} led it there; take a smaller one, or a ball (`radius`) for `ttt`"
        raise ValueError(f"`model` gave NaN for row {rows[int(bad.argmax())]}: {why}.")


def _reduce(function: Callable[..., Any], lines: list[NDArray]) -> NDArray[np.float64]:
    return np.array([function(line.astype(np.float64)) for line in lines], dtype=np.float64)


def _check_rows(corpus: EncodedCorpus, rows: Sequence[int], forward: HeadForward, vocab_size: int) -> None:
    # Recurrent and ALiBi models have no such number, or -1.
    longest = getattr(forward.model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        prompt, completion = corpus.prompts[row], corpus.completions[row]
        largest = max(max(prompt), max(completion))
        if largest >= vocab_size or min(min(prompt), min(completion)) < 0:
            raise ValueError(
                f"Row {row} has token id {largest}, expected ids in [0, {vocab_size}); "
                "encode the corpus with the tokenizer of this model."
            )
        if longest is not None and tokens_read(corpus, row) > longest > 0:
            raise ValueError(
                f"Row {row} has {len(prompt)} prompt and {len(completion)} response tokens, but the model takes "
                f"{longest} (`max_position_embeddings`); shorten the row or leave it out. Nothing is truncated "
                "here, because log p(y|x) of a cut prompt is another number."
            )


def _check_length(corpus: EncodedCorpus, rows: Sequence[int], model: RemoteModel) -> None:
    longest = model.config.max_position_embeddings
    for row in rows:
        if longest is not None and tokens_read(corpus, row) + 2 > longest:
            raise ValueError(
                f"Row {row} has {len(corpus.prompts[row])} prompt and {len(corpus.completions[row])} response tokens, "
                f"and the server's model takes {longest} (`max_model_len`), one of which it writes itself; shorten "
                "the row, leave it out, or serve the model with a larger `--max-model-len`."
            )


def score_plain(
    passes: BatchPasses, corpus: EncodedCorpus, batch: Batch, *, head_statistics: bool, intervals: bool = False
) -> dict[str, NDArray]:
    """Compute the values of a batch's response tokens, row after row in the order of `batch.rows`.

    Args:
        passes: The models.
        corpus: Token ids of all rows.
        batch: The rows.
        head_statistics: Whether the output head's norms and inherent variance are measured.
        intervals: Whether it is found how much probability tokens of lower ids have, `below`.

    Returns:
        One value per token, by column.
    """
    lengths = [len(corpus.completions[row]) for row in batch.rows]
    slots = dict(zip(batch.rows, accumulate(lengths, initial=0)))
    passed = passes.run(corpus, batch, slots, first=passes.positions)
    return _plain_values(passed, corpus, batch, passes.positions, head_statistics=head_statistics, intervals=intervals)


def _response_passes(
    reading: HeadReading, corpus: EncodedCorpus, batch: Batch, head: OutputHead
) -> Iterator[tuple[Step, list[HeadOutput]]]:
    """The passes of a reading as they would be had it been of the responses alone: to the bit the same numbers."""
    lines = [predicted_tokens(corpus, row, on_prompt=reading.on_prompt) for row in batch.rows]
    befores = [len(line) - len(corpus.completions[row]) for row, line in zip(batch.rows, lines)]
    inside = np.concatenate([np.arange(len(line)) >= before for line, before in zip(lines, befores)])
    places = np.cumsum(inside) - 1
    for step, hidden in reading.passes:
        chosen = inside[step.slots]
        kept, pick = np.unique(step.pick[chosen], return_inverse=True)
        own = replace(
            step,
            positions=step.positions[kept],
            pick=pick,
            labels=step.labels[chosen],
            slots=places[step.slots[chosen]],
        )
        yield own, [HeadOutput(hidden[torch.from_numpy(kept).to(hidden.device)], None, None, head)]


def _plain_values(
    passed: Iterable[tuple[Step, list[HeadOutput]]],
    corpus: EncodedCorpus,
    batch: Batch,
    positions: int,
    *,
    head_statistics: bool = False,
    intervals: bool = False,
) -> dict[str, NDArray]:
    """Values of a batch's response tokens from its passes, with the logits of so many positions at once."""
    total = sum(len(corpus.completions[row]) for row in batch.rows)
    values: dict[str, NDArray] = {}
    for step, outputs in passed:
        for start in range(0, len(step.positions), positions):
            chunk = slice(start, start + positions)
            inside = (step.pick >= chunk.start) & (step.pick < chunk.stop)
            pick, labels = step.pick[inside] - chunk.start, step.labels[inside]
            for name, tensor in _token_values(outputs, chunk, pick, labels, head_statistics, intervals).items():
                precision = np.float64 if name == "below" else np.float32  # where an interval begins is not rounded
                place = values.setdefault(name, np.empty(total, dtype=precision))
                place[step.slots[inside]] = tensor.cpu().numpy()
    return values


def _token_values(
    outputs: list[HeadOutput], chunk: slice, pick: NDArray, labels: NDArray, head_statistics: bool, intervals: bool
) -> dict[str, Tensor]:
    """Values of the response tokens that a chunk of one pass's positions predicts, by column."""
    logits = outputs[0].take_logits(chunk)
    rows, tokens = torch.from_numpy(pick).to(logits.device), torch.from_numpy(labels).to(logits.device)
    chosen = logits[rows, tokens]
    values = {"token_logprobs": chosen.float() - logsumexp(logits)[rows]}
    if intervals:
        # Three copies of what it reads are made: a quarter of the positions at a time.
        size = max(1, len(logits) // 4)
        parts = zip(rows.split(size), tokens.split(size))
        values["below"] = torch.cat([token_parts(logits[some], those).below for some, those in parts])
    reference = logits  # q of the inherent variance: the teacher's, or else the model's own
    if len(outputs) > 1:
        reference = outputs[1].take_logits(chunk).to(logits.device)
        values["token_kl"] = token_kl(reference, logits)[rows]
    if head_statistics:
        norm = outputs[0].feature_norm(chunk).to(logits.device)[rows]
        collision = collision_probability(reference)[rows]
        sampled = values["token_logprobs"]
        if reference is not logits:
            sampled = reference[rows, tokens].float() - logsumexp(reference)[rows]
        values["hidden_norm"] = norm
        values["inherent_variance"] = norm.square() * (1 - collision)
        values["sampled_variance"] = norm.square() * (1 - 2 * sampled.exp() + collision).clamp_min(0.0)
    return values
