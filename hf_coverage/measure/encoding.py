"""From prompts and completions to token ids: text split as lm-evaluation-harness does, chat through its template."""

from __future__ import annotations

import logging
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
    """Token ids of text pairs, split where lm-evaluation-harness splits them; an empty list is a prompt of none."""
    special_prefix(tokenizer)
    heads = [prompt.rstrip() for prompt in prompts]
    head_ids = encode_texts(heads, tokenizer)
    whole_ids = encode_texts([prompt + completion for prompt, completion in zip(prompts, completions)], tokenizer)
    bare = [row for row, prompt in enumerate(prompts) if not prompt]
    bare_ids = iter(tokenize([completions[row] for row in bare], tokenizer, add_special_tokens=False))
    for row in bare:
        head_ids[row], whole_ids[row] = _split_bare(next(bare_ids), tokenizer)
    _report_merges(head_ids, whole_ids)
    completion_ids = [whole[len(head) :] for head, whole in zip(head_ids, whole_ids)]
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


def _report_merges(head_ids: list[list[int]], whole_ids: list[list[int]]) -> None:
    merged = [row for row, (head, whole) in enumerate(zip(head_ids, whole_ids)) if whole[: len(head)] != head]
    if merged:
        logger.warning(
            "In %d of %d rows (the first is row %d) a token spans the end of `prompt` and the start of `completion`: "
            "the tokens that are scored do not spell the text. End prompts at a word boundary, or give token ids.",
            len(merged),
            len(head_ids),
            merged[0],
        )


def encode_chat_prompts(prompts: list[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of conversations that the model is to continue."""
    if not tokenizer.chat_template:
        raise ValueError(
            "`tokenizer` has no chat template, and the corpus holds chat messages; set `tokenizer.chat_template`, or "
            "give text or token ids."
        )
    prompts = [_without_missing_keys(messages) for messages in prompts]
    ids: Any = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    return ids


def encode_chat_pairs(
    prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of chat pairs: the prompt with its generation prompt, the completion as the template ends it."""
    prompt_ids = encode_chat_prompts(prompts, tokenizer)
    wholes = [_without_missing_keys(prompt + completion) for prompt, completion in zip(prompts, completions)]
    whole_ids: Any = tokenizer.apply_chat_template(wholes, return_dict=False)
    for row, (head, whole) in enumerate(zip(prompt_ids, whole_ids)):
        if whole[: len(head)] != head:
            raise ValueError(
                f"Row {row}: the chat template renders `prompt` with its generation prompt to ids that do not begin "
                f"those of `prompt` + `completion`: {tokenizer.decode(head)!r} against {tokenizer.decode(whole)!r}; "
                "use a template that keeps the prompt as it is, or give token ids."
            )
    return prompt_ids, [whole[len(head) :] for head, whole in zip(prompt_ids, whole_ids)]


def _without_missing_keys(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Arrow fills every key of every message; templates test whether a key is there.
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
