"""Answer-level log-probabilities: a model's reasoning is averaged out by sampling it (Section 7.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_coverage.functional.monte_carlo import log_mean_exp
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.remote import require_its_tokenizer, sampler_of
from hf_coverage.inference.sampler import Sampling, end_token_ids, require_room
from hf_coverage.measure.corpus import encode_prompts
from hf_coverage.measure.corpus_columns import (
    check_tokenizer,
    check_values,
    read_column,
    read_logprobs,
    read_prompts,
    require_columns,
    require_dataset,
    template_kwargs,
)
from hf_coverage.measure.encoding import eos_token_id, tokenize
from hf_coverage.measure.scoring import score_encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.inference.remote import RemoteModel

__all__ = ["score_answers"]


def score_answers(
    model: PreTrainedModel | RemoteModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    *,
    separator: str | Sequence[int] | None,
    samples: int,
    max_reasoning_tokens: int,
    append_eos: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Dataset:
    """Score answers with the model's own reasoning averaged out.

        p(ans|x) = E_{cot ~ p(.|x)} p(ans | x, cot),    estimated by the mean over `samples` reasonings

    Each reasoning is sampled from the model itself, at temperature 1, until the separator; then the answer is scored
    after it, teacher-forced. A reasoning that ends, or reaches its token limit, without the separator gives no answer
    and counts as 0. The mean is an unbiased estimate of p(ans|x); its logarithm is too low by about half its squared
    standard error, so take as many samples as keep `answer_logprob_stderr` well below log N.

    The separator is found in the text, at its first occurrence. Whitespace at its end is asked of the answer, as
    lm-evaluation-harness does; and where the last sampled token reaches beyond it, the answer has to begin with what
    that token holds, and only its rest is scored.

    Args:
        model: Any causal language model, or a `RemoteModel`, which writes each reasoning to its end or limit; all
            processes of a job have to call, and each samples its part.
        tokenizer: Its tokenizer; may be None where prompts, answers and separator are token ids.
        corpus: Dataset with `prompt` (text, chat messages or token ids) and `answer` (text or token ids); optionally
            `reference_answer_logprob`, log D(ans|x) in nats; without it the answer is the single right one, log D = 0.
            A column `reasoning` is what the reference wrote: it is kept and not used.
        separator: What stands between reasoning and answer, such as `"####"` or `"</think>"`: text where answers are
            text, token ids where they are token ids. None: the reasoning has exactly `max_reasoning_tokens` tokens.
        samples: Reasonings per row, at least 2.
        max_reasoning_tokens: Most tokens of a reasoning, the separator included.
        append_eos: Ask that the answer ends with the EOS token, so that "12" is not the beginning of "123"; needs the
            tokenizer.
        seed: What all random numbers follow from; the global generators are not touched.
        batch_size: Reasonings sampled at once.
        batch_tokens: Token positions computed in one forward pass when answers are scored.
        progress: Whether to show progress bars on the main process.

    Returns:
        The corpus with `reference_answer_logprob`, `answer_logprob` (nats; -inf where no reasoning gave the answer),
        `answer_logprob_stderr` (nats, delta method) and `answer_reached` (the part of the reasonings that reached the
        separator), on every process. `CoverageProfile.from_logprobs(scored["answer_logprob"],
        scored["reference_answer_logprob"], kind="answer")` is their profile.

    Raises:
        TypeError: If a value has the wrong type, or answers and separator are not of one kind.
        ValueError: If a number is out of its range, a column is missing, or a row does not fit into the model.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2]], "answer": [[3]]})
        >>> scored = score_answers(
        ...     model, None, corpus, separator=None, samples=4, max_reasoning_tokens=2, progress=False
        ... )
        >>> round(scored["answer_logprob"][0], 1), scored["answer_reached"][0]
        (-2.4, 1.0)

    References:
        arXiv 2510.15020, Section 7.1.
    """
    if samples < 2:
        raise ValueError(f"`samples` must be at least 2, or there is no standard error, got {samples}.")
    if max_reasoning_tokens < 1:
        raise ValueError(f"`max_reasoning_tokens` must be at least 1, got {max_reasoning_tokens}.")
    require_its_tokenizer(model, tokenizer)
    prompts, answers, reference = _read_answers(corpus, tokenizer)
    end = [eos_token_id(_require_tokenizer(tokenizer, "`append_eos=True`"))] if append_eos else []
    sampling = Sampling(max_reasoning_tokens, eos_token_ids=end_token_ids(None, model, tokenizer))
    separation = _separation(separator, isinstance(answers[0], str), sampling, tokenizer)
    longest = [len(separation.rest(answer, "") or []) + len(end) for answer in answers]
    require_room(model, prompts, [max_reasoning_tokens + length for length in longest])

    rows = [row for row in range(len(answers)) for _ in range(samples)]
    sampler = sampler_of(model, sampling, batch_size=batch_size, seed=seed)
    reasonings = sampler.draw([prompts[row] for row in rows], stop=separation.reached, progress=progress)
    overflows = [separation.overflow(reasoning.ids) for reasoning in reasonings]
    rests = [None if over is None else separation.rest(answers[row], over) for row, over in zip(rows, overflows)]
    contexts = [prompts[row] + reasoning.ids for row, reasoning in zip(rows, reasonings)]
    completions = [None if rest is None else rest + end for rest in rests]
    logprobs = _score_some(model, contexts, completions, batch_tokens, progress).reshape(-1, samples)
    log_mean, standard_error = log_mean_exp(logprobs)
    reached = np.array([over is not None for over in overflows]).reshape(-1, samples).mean(axis=1)
    columns = {"answer_logprob": log_mean, "answer_logprob_stderr": standard_error, "answer_reached": reached}
    if "reference_answer_logprob" not in corpus.column_names:
        columns = {"reference_answer_logprob": reference, **columns}
    return concatenate_datasets([corpus.with_format(None), Dataset.from_dict(columns)], axis=1)


class _Separation(ABC):
    """Where a reasoning ends, and which tokens then make the answer."""

    @abstractmethod
    def overflow(self, response: list[int]) -> str | None:
        """What the last token holds beyond the separator; None where the separator is not reached."""

    @abstractmethod
    def rest(self, answer: Any, overflow: str) -> list[int] | None:
        """Tokens that complete the answer; None where the overflow is not how it begins."""

    def reached(self, response: list[int]) -> bool:
        """Tell whether the reasoning ends here."""
        return self.overflow(response) is not None


class _TextSeparation(_Separation):
    def __init__(self, separator: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._mark = separator.rstrip() or separator
        self._space = separator[len(self._mark) :]
        self._tokenizer = tokenizer
        self._rests: dict[tuple[str, str], list[int] | None] = {}

    def overflow(self, response: list[int]) -> str | None:
        _, found, tail = str(self._tokenizer.decode(response)).partition(self._mark)
        return tail if found else None

    def rest(self, answer: str, overflow: str) -> list[int] | None:
        target = self._space + answer
        if not target.startswith(overflow):
            return None
        if (answer, overflow) not in self._rests:  # most samples of a row end alike
            head, whole, alone = tokenize(
                [self._mark + overflow, self._mark + target, target[len(overflow) :]],
                self._tokenizer,
                add_special_tokens=False,
            )
            # A token across the border cannot follow the separator that was sampled.
            self._rests[answer, overflow] = whole[len(head) :] if whole[: len(head)] == head else alone
        return self._rests[answer, overflow]


class _TokenSeparation(_Separation):
    def __init__(self, separator: list[int]) -> None:
        self._separator = separator

    def overflow(self, response: list[int]) -> str | None:
        return "" if response[-len(self._separator) :] == self._separator else None

    def rest(self, answer: list[int], overflow: str) -> list[int]:
        return answer


class _FixedLength(_Separation):
    def __init__(self, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._sampling = sampling
        self._tokenizer = tokenizer

    def overflow(self, response: list[int]) -> str | None:
        whole = len(response) == self._sampling.max_new_tokens
        return "" if whole and response[-1] not in self._sampling.eos_token_ids else None

    def rest(self, answer: Any, overflow: str) -> list[int]:
        if not isinstance(answer, str):
            return answer
        return tokenize([answer], _require_tokenizer(self._tokenizer, "text"), add_special_tokens=False)[0]


def _separation(
    separator: str | Sequence[int] | None,
    is_text: bool,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None,
) -> _Separation:
    if separator is None:
        return _FixedLength(sampling, tokenizer)
    if len(separator) == 0:
        raise ValueError("`separator` must not be empty; pass None for a reasoning of fixed length.")
    if isinstance(separator, str) != is_text:
        kind = "text" if is_text else "token ids"
        raise TypeError(f"`separator` must be {kind} as the column `answer` is, got {separator!r}.")
    if isinstance(separator, str):
        return _TextSeparation(separator, _require_tokenizer(tokenizer, "text"))
    return _TokenSeparation(list(separator))


def _read_answers(
    corpus: Dataset, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[list[int]], list[Any], np.ndarray]:
    """Ids of the prompts, answers as they are, and log D(ans|x) in nats, all checked."""
    require_dataset(corpus)
    require_columns(corpus, ("prompt", "answer"))
    answers = read_column(corpus, "answer")
    kind = check_values(answers, "answer")
    if kind not in ("text", "token ids"):
        raise TypeError(f"Row 0, column `answer`: expected text or token ids, got {kind}.")
    empty = next((row for row, answer in enumerate(answers) if not answer), None)
    if empty is not None:
        raise ValueError(f"Row {empty}, column `answer`: expected an answer, got an empty one; drop the row.")
    reference = read_logprobs(corpus, "reference_answer_logprob")
    prompt_kind, rows = read_prompts(corpus)
    if "token ids" in (kind, prompt_kind):
        check_tokenizer(corpus, tokenizer)
    prompts = encode_prompts(rows, tokenizer, chat_template_kwargs=template_kwargs(corpus))
    return prompts, answers, np.zeros(len(answers)) if reference is None else reference


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, purpose: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for {purpose}, got None.")
    return tokenizer


def _score_some(
    model: PreTrainedModel | RemoteModel,
    contexts: list[list[int]],
    completions: list[list[int] | None],
    batch_tokens: int,
    progress: bool,
) -> np.ndarray:
    """Log p(completion | context), nats: -inf for None, and 0 for what needs no token more."""
    logprobs = np.array([-np.inf if completion is None else 0.0 for completion in completions])
    rows = [row for row, completion in enumerate(completions) if completion]
    if rows:
        encoded = EncodedCorpus([contexts[row] for row in rows], [completions[row] or [] for row in rows])
        logprobs[rows] = score_encoded(model, encoded, batch_tokens=batch_tokens, progress=progress).logprob
    return logprobs
