"""Reading the columns of a corpus, and refusing what would become a wrong number with the row and the column named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hf_coverage.inference.fingerprint import TOKENIZER_COLUMN, vocabulary_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "check_fingerprints",
    "check_tokenizer",
    "check_values",
    "read_column",
    "read_logprobs",
    "read_pairs",
    "read_prompts",
    "require_columns",
    "require_dataset",
    "template_kwargs",
]

# A density can exceed 1 by rounding only: a sum of float32 log-softmax terms of a near-certain response does so.
_POSITIVE_ROUNDING = 1e-6

_KINDS = "text, a list of chat messages, or a list of token ids"


def require_dataset(corpus: Any) -> None:
    """Refuse what is not a `datasets.Dataset` with rows, with the way to make it one."""
    if isinstance(corpus, IterableDataset | IterableDatasetDict):
        raise TypeError(
            "`corpus` must be a `datasets.Dataset`, got a streaming one, whose rows cannot be counted; "
            "keep the rows you want with `Dataset.from_list(list(corpus.take(1000)))`."
        )
    if isinstance(corpus, DatasetDict):
        raise TypeError(f"`corpus` must be one split of the `DatasetDict`: choose one of {list(corpus)}.")
    if not isinstance(corpus, Dataset):
        raise TypeError(
            f"`corpus` must be a `datasets.Dataset`, got {type(corpus).__name__}; make one with `Dataset.from_list`."
        )
    if len(corpus) == 0:
        raise ValueError("`corpus` must have at least one row, got an empty dataset.")


def require_columns(corpus: Dataset, columns: Iterable[str]) -> None:
    """Refuse a corpus that lacks one of these columns."""
    missing = [column for column in columns if column not in corpus.column_names]
    if missing:
        raise ValueError(
            f"`corpus` must have a column `{missing[0]}`, got {corpus.column_names}; "
            f"rename one with `corpus.rename_column(old, '{missing[0]}')`."
        )


def read_column(corpus: Dataset, column: str) -> list[Any]:
    """The values of a column as plain Python objects."""
    # Without its format: a corpus that somebody set to "torch" would give tensors.
    return corpus.with_format(None)[column][:]


def read_prompts(corpus: Dataset) -> tuple[str, list[Any]]:
    """The kind of the prompts ("text", "chat messages", "token ids" or "empty"), and the checked column."""
    require_dataset(corpus)
    require_columns(corpus, ("prompt",))
    prompts = read_column(corpus, "prompt")
    kind = check_values(prompts, "prompt")
    _refuse_tools(corpus, kind)
    return kind, prompts


def read_pairs(corpus: Dataset) -> tuple[str, list[Any], list[Any]]:
    """The kind of a corpus ("text", "chat messages" or "token ids"), and its checked columns."""
    require_dataset(corpus)
    require_columns(corpus, ("prompt", "completion"))
    prompts, completions = read_column(corpus, "prompt"), read_column(corpus, "completion")
    prompt_kind, completion_kind = check_values(prompts, "prompt"), check_values(completions, "completion")
    # A prompt may be an empty list of token ids; a column of nothing else does not tell its kind.
    if completion_kind != prompt_kind and (prompt_kind, completion_kind) != ("empty", "token ids"):
        raise ValueError(
            f"The columns `prompt` and `completion` must be of one kind, got {prompt_kind} and {completion_kind}."
        )
    kind = completion_kind
    _refuse_tools(corpus, kind)
    return kind, prompts, completions


def template_kwargs(corpus: Dataset) -> list[Any] | None:
    """What each row asks its chat template to be given; None where the corpus has no column `chat_template_kwargs`."""
    return read_column(corpus, "chat_template_kwargs") if "chat_template_kwargs" in corpus.column_names else None


def check_values(rows: list[Any], column: str) -> str:
    """The kind of a column: "text", "chat messages", "token ids" or "empty" (lists without entries), all checked."""
    kind = _column_kind(rows, column)
    if kind == "chat messages":
        _check_messages(rows, column)
    elif kind != "text":
        _check_token_ids(rows, column)
    return kind


def check_tokenizer(corpus: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse token ids that are of another tokenizer than the model's, as far as the corpus says whose they are.

    Raises:
        ValueError: If they are, or if rows are of different tokenizers.
    """
    if TOKENIZER_COLUMN in corpus.column_names:
        check_fingerprints(read_column(corpus, TOKENIZER_COLUMN), tokenizer)


def check_fingerprints(values: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """The same for a column `tokenizer_fingerprint`, None in rows of which nothing is known."""
    known = {value: row for row, value in reversed(list(enumerate(values))) if value is not None}
    remedy = (
        "make the corpus again with this model's tokenizer, or, if the ids do mean the same, drop the column with "
        f"`corpus.remove_columns('{TOKENIZER_COLUMN}')`."
    )
    if tokenizer is None and len(known) > 1:
        first, second = sorted(known.values())[:2]
        raise ValueError(f"Rows {first} and {second} hold token ids of different tokenizers: {remedy}")
    for value, row in known.items():
        size, dash, _ = str(value).partition("-")
        if not (dash and size.isdecimal()):
            raise ValueError(
                f"Row {row}, column `{TOKENIZER_COLUMN}`: expected a `vocabulary_fingerprint`, got {value!r}; "
                "drop or rename the column."
            )
        if tokenizer is not None and vocabulary_fingerprint(tokenizer, int(size)) != value:
            raise ValueError(
                f"Row {row}: the token ids were made with another tokenizer ({value}) than the given `tokenizer` "
                f"({vocabulary_fingerprint(tokenizer)}), to which they are another text: {remedy}"
            )


def _refuse_tools(corpus: Dataset, kind: str) -> None:
    if kind == "chat messages" and "tools" in corpus.column_names:
        raise ValueError("A column `tools` is not rendered; apply the chat template yourself and give token ids.")


def _value_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if not value:
        return "empty"
    if isinstance(value[0], dict):
        return "chat messages"
    return "token ids" if _is_int(value[0]) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _column_kind(rows: list[Any], column: str) -> str:
    kind = "empty"
    for row, value in enumerate(rows):
        found = _value_kind(value)
        if found is None:
            shown = type(value).__name__ if not isinstance(value, list) else f"list of {type(value[0]).__name__}"
            problem = "got a missing value; drop the row" if value is None else f"got {shown}"
            raise TypeError(f"Row {row}, column `{column}`: expected {_KINDS}, {problem}.")
        if "empty" not in (kind, found) and found != kind:
            raise ValueError(f"Row {row}, column `{column}`: expected {kind} as in the rows before, got {found}.")
        kind = found if kind == "empty" else kind
    return kind


def _check_messages(rows: list[list[dict[str, Any]]], column: str) -> None:
    for row, messages in enumerate(rows):
        if not messages:
            raise ValueError(f"Row {row}, column `{column}`: expected at least one chat message, got none.")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise TypeError(
                    f"Row {row}, column `{column}`: expected messages such as "
                    f"{{'role': 'user', 'content': '...'}}, got {message!r}."
                )


def _check_token_ids(rows: list[list[int]], column: str) -> None:
    for row, ids in enumerate(rows):
        where = f"Row {row}, column `{column}`:"
        if not ids and column != "prompt":
            raise ValueError(f"{where} expected at least one token id, got none; drop the row.")
        if set(map(type, ids)) - {int}:
            wrong = next(value for value in ids if not _is_int(value))
            raise TypeError(f"{where} expected integer token ids, got {wrong!r} among them.")
        if ids and min(ids) < 0:
            raise ValueError(f"{where} expected token ids >= 0, got {min(ids)}.")


def read_logprobs(corpus: Dataset, column: str) -> np.ndarray | None:
    """A column of log D as (rows,) float64 in nats, checked; None where the corpus has no such column."""
    require_dataset(corpus)
    if column not in corpus.column_names:
        return None
    values = read_column(corpus, column)
    for row, value in enumerate(values):
        where = f"Row {row}, column `{column}`:"
        if not isinstance(value, float) and not _is_int(value):
            raise TypeError(f"{where} expected log D in nats, got {value!r}; drop the row, or the whole column.")
        if not math.isfinite(value):
            raise ValueError(f"{where} expected a finite log D, got {value}; what was sampled from D has D > 0.")
        if value > _POSITIVE_ROUNDING:
            raise ValueError(
                f"{where} expected log D <= 0 (nats), got {value}; is it a probability, or a negated one?"
            )
    return np.asarray(values, dtype=np.float64)
