"""Rows as people publish them, read as prompts and responses: question and answer, chats, reasoning traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Read", "read_rows", "split_answers", "with_system_prompt"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks in a row of ShareGPT, as chat templates call it."""


class Read(NamedTuple):
    """Rows with `prompt` and, where there are responses, `completion`; and what their columns were taken for."""

    rows: Dataset
    taken: str | None


def read_rows(
    rows: Dataset,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    answer: str | None = None,
    pairs: bool = True,
) -> Read:
    """Find prompts and responses in the columns of a data set.

    Args:
        rows: The data.
        prompt: Column of prompts; None to find it.
        completion: Column of responses; None to find it.
        answer: Column of the one right answer of a prompt: it is the response, and D(y|x) = 1.
        pairs: Whether responses are needed. Otherwise they are left out where there are none, and `answer` stays what
            it is, for a verifier.

    Raises:
        ValueError: If a column is missing, or a row is not what its columns promise.
    """
    for option, name in (
        ("--prompt-column", prompt),
        ("--completion-column", completion),
        ("--answer-column", answer),
    ):
        if name is not None and name not in rows.column_names:
            raise ValueError(f"`{option}` must be one of the data's columns, {rows.column_names}, but is {name!r}.")
    if completion is not None and answer is not None and pairs:
        raise ValueError("`--answer-column` is the response, and so is `--completion-column`: give one of them.")
    response = answer if pairs and answer is not None else completion
    names = set(rows.column_names)
    taken = None
    lacks_prompt = prompt is None and "prompt" not in names
    lacks_response = pairs and response is None and "completion" not in names
    if prompt is None and (lacks_prompt or lacks_response):
        shape = next((shape for shape in _SHAPES if names >= set(shape.columns)), None)
        if shape is not None:
            rows, taken = shape.read(rows, pairs and response is None), shape.says
    # a column that is named wins over one that was found
    rows = _renamed(_renamed(rows, prompt, "prompt"), response, "completion")
    if pairs:
        _require_pairs(rows)
    if pairs and answer is not None:
        rows = _with(rows, reference_logprob=[0.0] * len(rows))
    return Read(rows, taken)


def split_answers(rows: Dataset, separator: str) -> Dataset:
    """A row for each problem, with the answer that follows the reasoning in its responses, and one such reasoning.

    Args:
        rows: Prompts and responses, of text or chats.
        separator: What ends a reasoning, such as `</think>`.

    Raises:
        ValueError: If a response lacks the separator, or a problem has two answers.
    """
    first: dict[str, int] = {}
    kept: list[int] = []
    reasonings: list[str] = []
    answers: list[str] = []
    plain = rows.with_format(None)
    for row, (prompt, completion) in enumerate(zip(plain["prompt"][:], plain["completion"][:])):
        text = completion if isinstance(completion, str) else completion[-1].get("content")
        reasoning, found, answer = str(text).partition(separator)
        if not found:
            raise ValueError(
                f"Row {row}: the response has no {separator!r}, so it is not known where its answer begins: drop the "
                "row, or name a column of answers with `--answer-column`."
            )
        place = first.setdefault(repr(prompt), len(answers))
        if place == len(answers):
            kept.append(row)
            reasonings.append(reasoning)
            answers.append(answer)
        elif answers[place] != answer:
            raise ValueError(
                f"Row {row}: the same prompt has another answer in row {kept[place]}, and one alone is right: name a "
                "column of answers with `--answer-column`."
            )
    return _with(rows.select(kept).remove_columns("completion"), answer=answers, reasoning=reasonings)


def with_system_prompt(rows: Dataset, text: str) -> Dataset:
    """The rows with prompts that are chats, each beginning with what the system says.

    Raises:
        ValueError: If a prompt is token ids, or a chat that has such a beginning already.
    """
    system, chats = {"role": "system", "content": text}, []
    for row, prompt in enumerate(rows.with_format(None)["prompt"][:]):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not all(isinstance(turn, dict) for turn in chat):
            raise ValueError(f"`--system-prompt` is for text and chats, but the prompt of row {row} is token ids.")
        if chat and chat[0].get("role") == "system":
            raise ValueError(f"`--system-prompt`: the chat of row {row} has a system's turn already: leave it out.")
        chats.append([system, *chat])
    return _with(rows, prompt=chats)


def _require_pairs(rows: Dataset) -> None:
    missing = [name for name in ("prompt", "completion") if name not in rows.column_names]
    if missing and "reference_answer_logprob" in rows.column_names:
        raise ValueError(
            "the corpus has scored answers, whose reasoning is not there: give the prompts and whole responses that "
            "they are of."
        )
    if missing:
        raise ValueError(
            f"the data have no column `{missing[0]}` among {rows.column_names}: name the columns of prompts and "
            "responses with `--prompt-column` and `--completion-column`, or of single right answers with "
            "`--answer-column`."
        )


def _question(rows: Dataset, pairs: bool) -> Dataset:
    rows = _renamed(rows, "question", "prompt")
    return _with(rows, completion=_on_new_lines(rows["answer"][:])) if pairs else rows


def _instruction(rows: Dataset, pairs: bool) -> Dataset:
    further = rows["input"][:] if "input" in rows.column_names else [None] * len(rows)
    prompts = [f"{task}\n\n{more}" if more else task for task, more in zip(rows["instruction"][:], further)]
    rows = _with(rows, prompt=prompts)
    return _with(rows, completion=_on_new_lines(rows["output"][:])) if pairs else rows


def _messages(rows: Dataset, pairs: bool) -> Dataset:
    return _split_turns(rows, rows["messages"][:], pairs)


def _sharegpt(rows: Dataset, pairs: bool) -> Dataset:
    return _split_turns(rows, [_turns(row, turns) for row, turns in enumerate(rows["conversations"][:])], pairs)


def _turns(row: int, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    unknown = next((turn["from"] for turn in turns if turn["from"] not in _ROLES), None)
    if unknown is not None:
        raise ValueError(f"Row {row}, column `conversations`: `from` must be one of {list(_ROLES)}, got {unknown!r}.")
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _split_turns(rows: Dataset, chats: list[list[dict[str, Any]]], pairs: bool) -> Dataset:
    """Prompt and completion of chats: the last turn of the assistant, and what was said before it."""
    prompts, completions = [], []
    for row, chat in enumerate(chats):
        own = [place for place, turn in enumerate(chat) if turn["role"] == "assistant"]
        # a chat that somebody else ended is a prompt as a whole, where no response is wanted
        end = own[-1] if own and (pairs or own[-1] == len(chat) - 1) else len(chat)
        if pairs and end == len(chat):
            raise ValueError(f"Row {row}: nobody of the role `assistant` says anything, so there is no response.")
        if end == 0:
            raise ValueError(f"Row {row}: the chat begins with its last turn of the assistant, so there is no prompt.")
        prompts.append(chat[:end])
        completions.append(chat[end : end + 1])
    return _with(rows, prompt=prompts, completion=completions) if pairs else _with(rows, prompt=prompts)


def _traces(rows: Dataset, pairs: bool) -> Dataset:
    """A row for each response to a problem; where it is known which are correct, for these alone."""
    rows = _renamed(rows, "problem", "prompt")
    if not pairs:
        return rows
    verdicts = _verdicts(rows)
    places, completions = [], []
    for row, texts in enumerate(rows["generations"][:]):
        right = verdicts[row] if verdicts is not None else [True] * len(texts)
        if len(right) != len(texts):
            raise ValueError(f"Row {row}: {len(texts)} `generations`, but {len(right)} verdicts on them.")
        chosen = [text for text, is_right in zip(texts, right) if is_right]
        places += [row] * len(chosen)
        completions += chosen
    if not completions:
        raise ValueError("none of the `generations` is correct, so there are no responses.")
    return _with(rows.select(places).remove_columns("generations"), completion=_on_new_lines(completions))


def _on_new_lines(texts: list[str]) -> list[str]:
    """Responses that follow text, which nobody has said how to part them from."""
    return [f"\n{text}" for text in texts]


def _verdicts(rows: Dataset) -> list[list[bool]] | None:
    name = next((name for name in ("correctness", "correctness_math_verify") if name in rows.column_names), None)
    return None if name is None else rows[name][:]


class _Shape(NamedTuple):
    columns: tuple[str, ...]
    says: str
    read: Callable[[Dataset, bool], Dataset]


_SHAPES = (
    _Shape(("question", "answer"), "`question` for the prompt, `answer` on a new line for the response", _question),
    _Shape(
        ("instruction", "output"),
        "`instruction`, and `input` after an empty line, for the prompt, `output` on a new line for the response",
        _instruction,
    ),
    _Shape(("messages",), "the last turn of the assistant in `messages` for the response", _messages),
    _Shape(
        ("conversations",), "`conversations` for chats, the last turn of the assistant for the response", _sharegpt
    ),
    _Shape(
        ("problem", "generations"),
        "`problem` for the prompt, each of `generations` on a new line for a response, those alone that are correct "
        "where a column `correctness` says so",
        _traces,
    ),
)


def _renamed(rows: Dataset, column: str | None, name: str) -> Dataset:
    if column is None or column == name:
        return rows
    return _with(rows, **{name: rows.with_format(None)[column][:]})


def _with(rows: Dataset, **columns: Any) -> Dataset:
    """The rows with some columns in the place of those of these names."""
    from datasets import Dataset, concatenate_datasets

    rest = rows.with_format(None).remove_columns([name for name in columns if name in rows.column_names])
    new = Dataset.from_dict(columns)
    return concatenate_datasets([rest, new], axis=1) if rest.column_names else new
