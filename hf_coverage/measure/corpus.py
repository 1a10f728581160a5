"""Reference corpora: their schema, the checks that keep a bad row from becoming a number, and their token ids.

A reference corpus is a `datasets.Dataset` with TRL's columns `prompt` and `completion`, both text, both chat messages
or both lists of token ids, and, where it is known, `reference_logprob = log D(y|x)` of the whole response in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.corpus_columns import (
    check_fingerprints,
    check_tokenizer,
    check_values,
    read_logprobs,
    read_pairs,
    require_dataset,
    template_kwargs,
)
from hf_coverage.measure.encoding import (
    encode_chat_pairs,
    encode_chat_prompts,
    encode_text_pairs,
    encode_texts,
    eos_token_id,
    prefix_token_id,
    special_prefix,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_coverage.functional.checks import ReferenceKind

__all__ = ["encode_corpus", "encode_prompts", "reference_kind", "validate_corpus"]


def validate_corpus(corpus: Dataset) -> None:
    """Refuse a corpus that would give a wrong number, naming the row and the column.

    Args:
        corpus: Dataset with `prompt` and `completion` (both text, both lists of chat messages, or both lists of token
            ids) and optionally `reference_logprob` (nats, finite, at most 0; up to 1e-6 above 0 passes as rounding).

    Raises:
        TypeError: If `corpus` is not a `datasets.Dataset`, or a value has the wrong type.
        ValueError: If the corpus is empty, lacks a column, mixes kinds, or a value is missing or out of range.

    Example:
        >>> validate_corpus(Dataset.from_dict({"prompt": ["1+1="], "completion": ["2"], "reference_logprob": [0.5]}))
        Traceback (most recent call last):
            ...
        ValueError: Row 0, column `reference_logprob`: expected log D <= 0 (nats), got 0.5; ...
    """
    read_pairs(corpus)
    read_logprobs(corpus, "reference_logprob")


def reference_kind(corpus: Dataset) -> ReferenceKind:
    """Tell what a corpus knows of its own distribution D, and with it what may be reported.

    - `"samples"`: responses only, D(y|x) is unknown: Cov_N has an upper bound, no estimate (Remark 2.2).
    - `"single_answer"`: every `reference_logprob` is exactly 0, D(y|x) = 1.
    - `"density"`: `reference_logprob` holds log D(y|x): Cov_N itself.
    - `"answer"`: answers scored with their reasoning averaged out (column `answer_logprob`, Section 7.1).

    Args:
        corpus: A reference corpus, or the result of scoring one; its `reference_logprob` is checked.

    Returns:
        The kind of reference.

    Raises:
        TypeError: If `corpus` is not a `datasets.Dataset`.
        ValueError: If a `reference_logprob` is missing, not finite or positive.

    Example:
        >>> pairs = {"prompt": ["1+1=", "1+2="], "completion": ["2", "3"]}
        >>> reference_kind(Dataset.from_dict(pairs))
        'samples'
        >>> reference_kind(Dataset.from_dict(pairs | {"reference_logprob": [0.0, 0.0]}))
        'single_answer'

    References:
        arXiv 2510.15020, Section 2 (Remark 2.2) and Section 7.1.
    """
    require_dataset(corpus)
    if "answer_logprob" in corpus.column_names:
        return "answer"
    reference = read_logprobs(corpus, "reference_logprob")
    if reference is None:
        return "samples"
    return "density" if reference.any() else "single_answer"


def encode_corpus(
    corpus: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    append_eos: bool = False,
    vocab_size: int | None = None,
) -> EncodedCorpus:
    """Turn a corpus into the token ids that every model is judged on.

    - Text is tokenised as a pair: the prompt's trailing whitespace moves to the completion, prompt and completion are
      encoded as one string, and the ids are split at the length of the prompt's own ids. These are the ids that
      lm-evaluation-harness scores. Where a token spans the split, they would not spell the completion, which is then
      encoded by itself. A prompt without tokens becomes the BOS token, or else the EOS token.
    - Chat messages pass through the chat template, which also ends the completion. The prompt is rendered with its
      generation prompt and its ids must be a prefix of the ids of the whole conversation, and what follows must hold
      all that the completion says. A column `chat_template_kwargs` has the template's arguments for each row.
    - Token ids pass as they are. A column `tokenizer_fingerprint`, which corpora made by this library have, says whose
      they are: it is compared with the tokenizer.

    Args:
        corpus: A reference corpus, see `validate_corpus`.
        tokenizer: The tokenizer of the model; may be None for token ids if no prompt is empty.
        append_eos: End every completion with the EOS token. Only for text, and it must be the same for the reference
            and for every model: log D(y|x) and log p(y|x) have to speak of the same event.
        vocab_size: One more than the largest token id that the model takes; None: not checked here. (The length of the
            tokenizer is no such limit: embeddings are often padded, and a padding row can be sampled.)

    Returns:
        The ids of prompts and completions, in the order of the rows.

    Raises:
        TypeError: If `corpus` is not a `datasets.Dataset`, or a value has the wrong type.
        ValueError: If the corpus is not valid, a completion has no tokens, a token id is out of range, `append_eos`
            meets chat messages or token ids, token ids are of another tokenizer, the tokenizer cannot encode this
            corpus, or its chat template leaves out a part of a completion.

    Example:
        >>> corpus = Dataset.from_dict({"prompt": [[3, 4], [3]], "completion": [[5, 0], [6, 7, 0]]})
        >>> encode_corpus(corpus, tokenizer=None, vocab_size=8).completions
        [[5, 0], [6, 7, 0]]
    """
    kind, prompts, completions = read_pairs(corpus)
    read_logprobs(corpus, "reference_logprob")
    if append_eos and kind != "text":
        ends = "the chat template ends them" if kind == "chat messages" else "they are final"
        raise ValueError(f"`append_eos=True` is for text only, got {kind}: {ends}.")
    if kind == "token ids":
        check_tokenizer(corpus, tokenizer)
        prompt_ids, completion_ids = prompts, completions
        if vocab_size is not None:
            _require_range(prompt_ids, "prompt", vocab_size)
            _require_range(completion_ids, "completion", vocab_size)
    elif tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for a corpus of {kind}, got None.")
    elif kind == "chat messages":
        prompt_ids, completion_ids = encode_chat_pairs(prompts, completions, tokenizer, template_kwargs(corpus))
    else:
        end = eos_token_id(tokenizer) if append_eos else None
        prompt_ids, completion_ids = encode_text_pairs(prompts, completions, tokenizer, end=end)
    _require_tokens(completion_ids)
    return EncodedCorpus(_with_prefix(prompt_ids, tokenizer), completion_ids)


def encode_prompts(
    prompts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat_template_kwargs: Sequence[dict[str, Any] | None] | None = None,
    tokenizer_fingerprint: Sequence[str | None] = (),
) -> list[list[int]]:
    """Turn prompts alone into the token ids that a model continues.

    Args:
        prompts: Text, which is kept to its last space, or lists of chat messages, or lists of token ids.
        tokenizer: The tokenizer of the model; may be None for token ids if no prompt is empty.
        chat_template_kwargs: For chat messages, what the template is given for each prompt.
        tokenizer_fingerprint: For token ids, whose they are, as the column of that name in a corpus says.

    Returns:
        One list of token ids per prompt, never empty; BOS, or else EOS, stands for a prompt without tokens.

    Raises:
        TypeError: If `prompts` is one string, or a prompt has the wrong type.
        ValueError: If there are no prompts, their kinds are mixed, or the tokenizer cannot encode them.

    Example:
        >>> encode_prompts([[3, 4], [3]], tokenizer=None)
        [[3, 4], [3]]
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` must be a list of prompts, got one string; pass `[prompt]`.")
    rows = list(prompts)
    if not rows:
        raise ValueError("`prompts` must have at least one prompt, got none.")
    kind = check_values(rows, "prompt")
    if kind in ("token ids", "empty"):
        check_fingerprints(tokenizer_fingerprint, tokenizer)
        return _with_prefix(rows, tokenizer)
    if tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for prompts of {kind}, got None.")
    if kind == "chat messages":
        return encode_chat_prompts(rows, tokenizer, chat_template_kwargs)
    special_prefix(tokenizer)
    return _with_prefix(encode_texts(rows, tokenizer), tokenizer)


def _with_prefix(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """No prompt may be empty: there would be nothing to predict the first token from."""
    if all(prompts):
        return prompts
    prefix = prefix_token_id(tokenizer)
    return [ids or [prefix] for ids in prompts]


def _require_range(rows: list[list[int]], column: str, vocab_size: int) -> None:
    for row, ids in enumerate(rows):
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"Row {row}, column `{column}`: token id {max(ids)} is outside the model's vocabulary of {vocab_size} "
                "tokens; was the corpus made with another tokenizer?"
            )


def _require_tokens(completions: list[list[int]]) -> None:
    empty = next((row for row, ids in enumerate(completions) if not ids), None)
    if empty is not None:
        raise ValueError(
            f"Row {empty}, column `completion`: expected at least one token after the prompt, got none; drop the row, "
            "or pass `append_eos=True` if ending here is the response."
        )
