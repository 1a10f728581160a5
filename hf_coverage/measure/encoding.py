"""From prompts and completions to token ids: text split as lm-evaluation-harness does, chat through its template."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "encode_chat_pairs",
    "encode_chat_prompts",
    "encode_text_pairs",
    "encode_texts",
    "eos_token_id",
    "prefix_token_id",
    "special_prefix",
    "tokenize",
]

logger = logging.getLogger(__name__)

# What a template is called with here, whatever a row says.
_OWN_ARGUMENTS = {"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize"}
# The names under which chat messages hold what was thought before it was said.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def prefix_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """What stands before a response to nothing: BOS, or else EOS."""
    if tokenizer is None:
        raise ValueError("A row of `prompt` has no tokens: give a `tokenizer`, whose BOS token then stands before it.")
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "A row of `prompt` has no tokens, and `tokenizer` has neither a BOS nor an EOS token to begin with."
    )


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that `append_eos=True` puts at the end of a completion."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`append_eos=True` needs a tokenizer with an EOS token; set `tokenizer.eos_token`.")
    return tokenizer.eos_token_id


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text by itself: its BOS token, or nothing."""
    (plain,) = tokenize(["a"], tokenizer, add_special_tokens=False)
    (full,) = tokenize(["a"], tokenizer, add_special_tokens=True)
    length = len(full) - len(plain)
    if full[length:] != plain:
        raise ValueError(
            f"`tokenizer` ends every text with special tokens, prompts too: {tokenizer.decode(full)!r}; load it with "
            "`add_eos_token=False`, and pass `append_eos=True` where the response ends."
        )
    return full[:length]


def encode_text_pairs(
    prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase, *, end: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of text pairs, split where lm-evaluation-harness splits them; an empty list is a prompt of none.

    Where a token spans the split, the completion is encoded by itself: the model is given the prompt's own ids, and
    what follows them has to spell the completion.
    """
    special_prefix(tokenizer)
    heads = [prompt.rstrip() for prompt in prompts]
    head_ids = encode_texts(heads, tokenizer)
    whole_ids = encode_texts([prompt + completion for prompt, completion in zip(prompts, completions)], tokenizer)
    bare = [row for row, prompt in enumerate(prompts) if not prompt]
    bare_ids = iter(tokenize([completions[row] for row in bare], tokenizer, add_special_tokens=False))
    for row in bare:
        head_ids[row], whole_ids[row] = _split_bare(next(bare_ids), tokenizer)
    completion_ids = [whole[len(head) :] for head, whole in zip(head_ids, whole_ids)]
    merged = [row for row, (head, whole) in enumerate(zip(head_ids, whole_ids)) if whole[: len(head)] != head]
    tails = [prompts[row][len(heads[row]) :] + completions[row] for row in merged]
    for row, ids in zip(merged, tokenize(tails, tokenizer, add_special_tokens=False) if merged else ()):
        _require_same_text(row, [*head_ids[row], *ids], whole_ids[row], tokenizer)
        completion_ids[row] = ids
    _report_merges(merged, len(head_ids))
    for row, (ids, completion) in enumerate(zip(completion_ids, completions)):
        if completion and not ids:
            raise ValueError(
                f"Row {row}, column `completion`: no token is left of {completion[:40]!r} after `prompt`: the "
                "tokenizer drops it, so it cannot be scored; give token ids."
            )
    if end is not None:
        for row, ids in enumerate(completion_ids):
            if ids and ids[-1] == end:
                raise ValueError(
                    f"Row {row}, column `completion`: ends with the EOS token already; remove it, or leave out "
                    "`append_eos=True`."
                )
            ids.append(end)
    return head_ids, completion_ids


def _split_bare(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The prompt and the whole for a response to the empty text; a BOS token spelled out in it is the prompt."""
    prefix = prefix_token_id(tokenizer)
    return [prefix], ids if ids[:1] == [prefix] else [prefix, *ids]


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts with the tokenizer's own special tokens, but no second BOS before one that is spelled out."""
    marks = [token_id for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token_id is not None]
    mark = str(tokenizer.decode(marks[0])) if marks else None
    ids: dict[str, list[int]] = {}
    for has_mark in (False, True):
        # Responses to one prompt repeat it: every distinct text is encoded once.
        chosen = [text for text in dict.fromkeys(texts) if bool(mark and text.startswith(mark)) == has_mark]
        ids.update(zip(chosen, tokenize(chosen, tokenizer, add_special_tokens=not has_mark)))
    return [list(ids[text]) for text in texts]


def tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool, chunk: int = 4096
) -> list[list[int]]:
    """Ids of many texts, neither padded nor cut, whatever their length."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), chunk):  # a fast tokenizer keeps offsets and masks of all texts of one call
        ids += tokenizer(
            texts[start : start + chunk],
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    return ids


def _require_same_text(row: int, apart: list[int], together: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a row whose prompt and completion, each encoded by itself, are not the text that they are together."""
    own, text = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (apart, together))
    if own != text:
        raise ValueError(
            f"Row {row}: a token spans the end of `prompt` and the start of `completion`, and encoded apart they are "
            f"another text, {own[-40:]!r} for {text[-40:]!r}, so no tokens after the prompt spell the completion; end "
            "the prompt at a word boundary, or give token ids."
        )


def _report_merges(merged: list[int], rows: int) -> None:
    if merged:
        logger.warning(
            "In %d of %d rows (the first is row %d) a token would span the end of `prompt` and the start of "
            "`completion`: there the completion is encoded by itself, so that what is scored is the text. "
            "lm-evaluation-harness scores other tokens, which do not spell it. End prompts at a word boundary, or "
            "give token ids.",
            len(merged),
            rows,
            merged[0],
        )


def encode_chat_prompts(
    prompts: list[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Sequence[dict[str, Any] | None] | None = None,
) -> list[list[int]]:
    """Token ids of conversations that the model is to continue, each rendered with arguments of its own."""
    if not tokenizer.chat_template:
        raise ValueError(
            "`tokenizer` has no chat template, and the corpus holds chat messages; set `tokenizer.chat_template`, or "
            "give text or token ids."
        )
    prompts = [_without_missing_keys(messages) for messages in prompts]
    arguments = _template_arguments(template_kwargs, len(prompts))
    _report_dates(prompts, arguments, tokenizer)
    return _rendered(prompts, arguments, tokenizer, add_generation_prompt=True, return_dict=False)


def encode_chat_pairs(
    prompts: list[list[dict[str, Any]]],
    completions: list[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Sequence[dict[str, Any] | None] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of chat pairs: the prompt with its generation prompt, the completion as the template ends it."""
    prompt_ids = encode_chat_prompts(prompts, tokenizer, template_kwargs)
    arguments = _template_arguments(template_kwargs, len(prompts))
    heads, tails = ([_without_missing_keys(messages) for messages in rows] for rows in (prompts, completions))
    wholes = [head + tail for head, tail in zip(heads, tails)]
    whole_ids = _rendered(wholes, arguments, tokenizer, return_dict=False)
    for row, (head, whole) in enumerate(zip(prompt_ids, whole_ids)):
        if whole[: len(head)] != head:
            raise ValueError(
                f"Row {row}: the chat template renders `prompt` with its generation prompt to ids that do not begin "
                f"those of `prompt` + `completion`: {tokenizer.decode(head)!r} against {tokenizer.decode(whole)!r}; "
                "use a template that keeps the prompt as it is, or give token ids."
            )
    head_texts = _rendered(heads, arguments, tokenizer, add_generation_prompt=True, tokenize=False)
    whole_texts = _rendered(wholes, arguments, tokenizer, tokenize=False)
    for row, (head, whole, tail) in enumerate(zip(head_texts, whole_texts, tails)):
        rest = whole.removeprefix(head)
        lost = _lost(tail, rest)
        if lost is not None:
            raise ValueError(
                f"Row {row}, column `completion`: the chat template leaves out {lost!r}, so another response than "
                f"this one would be scored: {rest!r}; use a template that writes the whole turn, or give token ids."
            )
    return prompt_ids, [whole[len(head) :] for head, whole in zip(prompt_ids, whole_ids)]


def _rendered(
    conversations: list[list[dict[str, Any]]],
    arguments: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> list[Any]:
    """What the template makes of conversations, those of equal arguments in one call."""
    alike: dict[str, list[int]] = {}
    for row, own in enumerate(arguments):
        alike.setdefault(json.dumps(own, sort_keys=True, default=repr), []).append(row)
    rendered: list[Any] = [None] * len(conversations)
    for rows in alike.values():
        own = arguments[rows[0]]
        found: Any = tokenizer.apply_chat_template([conversations[row] for row in rows], **options, **own)
        for row, value in zip(rows, found, strict=True):
            rendered[row] = value
    return rendered


def _template_arguments(given: Sequence[dict[str, Any] | None] | None, rows: int) -> list[dict[str, Any]]:
    """The template's arguments for each row, as they were before Arrow gave every row the keys of all."""
    if given is None:
        return [{}] * rows
    arguments: list[dict[str, Any]] = []
    for row, own in enumerate(given):
        if own is not None and not isinstance(own, dict):
            raise TypeError(
                f"Row {row}, column `chat_template_kwargs`: expected a dict of the template's arguments, got {own!r}."
            )
        found = _without_none(own or {})
        taken = sorted(_OWN_ARGUMENTS & found.keys())
        if taken:
            raise ValueError(
                f"Row {row}, column `chat_template_kwargs`: `{taken[0]}` is decided by what is scored; leave it out."
            )
        arguments.append(found)
    return arguments


def _without_missing_keys(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Arrow fills every key of every message; templates test whether a key is there.
    return [
        {key: _without_none(value) for key, value in message.items() if value is not None or key == "content"}
        for message in messages
    ]


def _without_none(value: Any) -> Any:
    """A value without the keys that Arrow filled with None, at every depth: tool calls and parts of content too."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _lost(messages: list[dict[str, Any]], rendered: str) -> str | None:
    """The first part of some messages that their rendering does not hold, whatever it did to whitespace."""
    rest = _squeezed(rendered)
    for message in messages:
        end = 0
        for part in _parts(message):
            # Some templates write values as JSON.
            forms = [_squeezed(part), _squeezed(json.dumps(part, ensure_ascii=False)[1:-1])]
            places = [(rest.find(form), len(form)) for form in forms]
            found = [place + length for place, length in places if place >= 0]
            if not found:
                return part
            end = max(end, min(found))
        rest = rest[end:]  # one turn does not stand for the next that says the same
    return None


def _parts(message: dict[str, Any]) -> Iterator[str]:
    """The texts of a turn that are part of what was said: reasoning, content, names of the tools that it calls."""
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    yield from (message[key] for key in _REASONING if isinstance(message.get(key), str))
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name") if isinstance(call, dict) else None
        if isinstance(name, str):
            yield name


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _report_dates(
    conversations: list[list[dict[str, Any]]], arguments: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Say so if a template prints the day: the same corpus has other ids, and other scores, tomorrow."""
    if "strftime_now" not in str(tokenizer.chat_template):  # the one way for a template to know
        return
    for conversation, own in zip(conversations, arguments):
        template = tokenizer.get_chat_template(own.get("chat_template"))
        # A macro of that name goes before the environment's function; there is no other way to another day.
        days = (f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}{template}" for day in (1, 2))
        one, other = (
            tokenizer.apply_chat_template(conversation, tokenize=False, **(own | {"chat_template": day}))
            for day in days
        )
        if one != other:
            _warn_of_dates(str(tokenizer.chat_template))
            return


@cache
def _warn_of_dates(template: str) -> None:
    """Once for each template."""
    logger.warning(
        "The chat template prints today's date: the same corpus has other token ids, and other scores, on another "
        "day. Fix the date in a column `chat_template_kwargs` (for example {'date_string': '26 Jul 2024'}, whatever "
        "the template calls it), or keep the token ids."
    )
