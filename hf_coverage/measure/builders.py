"""Making reference corpora: from plain texts, from a teacher's samples or its scores, from single right answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from huggingface_hub.utils import tqdm

from hf_coverage.functional.checks import check_count
from hf_coverage.inference.fingerprint import TOKENIZER_COLUMN, vocabulary_fingerprint
from hf_coverage.inference.kept_samples import code_books, kept_samples, sampling_facts
from hf_coverage.inference.processes import on_main_process, writing_to
from hf_coverage.inference.remote import require_its_tokenizer, sampler_of
from hf_coverage.inference.sampler import Sample, Sampling, end_token_ids
from hf_coverage.inference.shards import JsonShards
from hf_coverage.measure.corpus import encode_prompts, validate_corpus
from hf_coverage.measure.corpus_columns import read_pairs
from hf_coverage.measure.encoding import eos_token_id, special_prefix, tokenize
from hf_coverage.measure.scoring import score_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.inference.remote import RemoteModel, RemoteSampler
    from hf_coverage.inference.sampler import Sampler

__all__ = ["sample_corpus", "single_answer_corpus", "teacher_scored_corpus", "windows_corpus"]


def windows_corpus(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int,
    response_tokens: int,
    stride: int | None = None,
    append_eos: bool = False,
    cross_documents: bool = False,
    max_windows: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Cut plain texts into windows of prompt and response: pre-training data has no prompts of its own.

    D(y|x) of such data is unknown, so a model's coverage of them is bounded and not estimated (Remark 2.2).

    Args:
        texts: Documents, for instance the column `text` of a dataset.
        tokenizer: The tokenizer of the models to be judged. What it puts before every text by itself, a BOS token,
            begins the prompt of every window and is not counted in `prompt_tokens`.
        prompt_tokens: Tokens p of each prompt.
        response_tokens: Tokens r of each response.
        stride: Tokens between the starts of two windows; None: `response_tokens`, so that no token is judged twice.
        append_eos: End every document with the EOS token, as packed pre-training data do.
        cross_documents: Join all documents before they are cut; otherwise no window spans two of them, and a document
            of fewer than p + r tokens gives none.
        max_windows: Keep that many windows, chosen at random without replacement; None: all.
        seed: Seed of that choice.

    Returns:
        Dataset with `prompt` and `completion` (token ids), `tokenizer_fingerprint`, by which they are known to be this
        tokenizer's, and `document`, the index of the document where the window begins; windows of one document are not
        independent, so take intervals with `groups=corpus["document"]`.

    Raises:
        TypeError: If `texts` is one string or holds something else than strings.
        ValueError: If a number is out of its range, or no document is long enough for a window.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, unk_token="<s>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>")
        >>> corpus = windows_corpus(["a b c d", "d c b"], tokenizer, prompt_tokens=1, response_tokens=2, stride=1)
        >>> corpus["prompt"][:], corpus["completion"][:], corpus["document"][:]
        ([[1], [2], [4]], [[2, 3], [3, 4], [3, 2]], [0, 0, 1])

    References:
        arXiv 2510.15020, Section 2 (Remark 2.2).
    """
    stride = response_tokens if stride is None else stride
    sizes = {"prompt_tokens": prompt_tokens, "response_tokens": response_tokens, "stride": stride}
    for name, count in (sizes | ({} if max_windows is None else {"max_windows": max_windows})).items():
        check_count(count, name)
    check_count(seed, "seed", least=0)
    documents = _tokenize_documents(texts, tokenizer, append_eos)
    bounds = np.array(list(accumulate(map(len, documents), initial=0)))
    spans = [(0, bounds[-1])] if cross_documents else list(pairwise(bounds))
    size = prompt_tokens + response_tokens
    starts = np.concatenate([np.arange(low, high - size + 1, stride) for low, high in spans])
    if len(starts) == 0:
        longest = max(high - low for low, high in spans)
        raise ValueError(
            f"No window of `prompt_tokens` + `response_tokens` = {size} tokens fits: the "
            f"longest text has {longest}; take shorter windows, or `cross_documents=True`."
        )
    if max_windows is not None and max_windows < len(starts):
        starts = np.sort(np.random.default_rng(seed).choice(starts, max_windows, replace=False))
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=bounds[-1])
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)[starts]
    head = np.tile(np.array(special_prefix(tokenizer), dtype=np.int64), (len(starts), 1))
    return _ids_dataset(
        np.hstack([head, windows[:, :prompt_tokens]]).tolist(),
        windows[:, prompt_tokens:].tolist(),
        tokenizer,
        document=np.searchsorted(bounds, starts, side="right") - 1,
    )


def sample_corpus(
    teacher: PreTrainedModel | RemoteModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Any],
    *,
    chat_template_kwargs: Sequence[dict[str, Any] | None] | None = None,
    k: int,
    max_new_tokens: int,
    stratified: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    output_dir: str | PathLike[str] | None = None,
    shard_rows: int = 256,
    progress: bool = True,
) -> Dataset:
    """Sample k responses per prompt from a teacher, each with its density under the very distribution it came from.

    D is the teacher at `temperature`, truncated by `top_k` and then `top_p` and renormalised, and nothing else: the
    teacher's own generation defaults (repetition penalty, suppressed tokens, least lengths ...) are left out. The
    token ids are kept, so nothing is tokenised again, and the end-of-sequence token is part of a response where it was
    sampled. A response that was cut at `max_new_tokens` stands for the event that a response begins with its tokens.

    Truncation gives D a narrower support than the model's, so coverage of it says nothing on the responses cut away.
    In half precision the density is that of decoding token by token; scoring the same teacher on whole responses
    differs from it by rounding.

    Stratified responses of a prompt, equal prompts together, share nested codes. Each is a sample of D with the same
    `reference_logprob`, so that Cov_N, miss_N and every other mean over rows stay unbiased, with less variance. They
    are not independent given the prompt: take intervals over prompts, `groups=corpus["prompt"]`.

    Args:
        teacher: Any causal language model, or a `RemoteModel`; all processes of a job have to call, and each samples
            its part.
        tokenizer: Its tokenizer; may be None if prompts are token ids.
        prompts: Text, lists of chat messages, or lists of token ids.
        chat_template_kwargs: For chat messages, what the chat template is given for each prompt.
        k: Responses per prompt.
        max_new_tokens: Most tokens of a response.
        stratified: Whether the responses to a prompt are spread over D, see `stratified_generate`.
        temperature: What logits are divided by; 1 is the teacher itself.
        top_k: Keep the k likeliest tokens of every step; None: all.
        top_p: Keep the likeliest tokens that together reach this mass; None: all.
        eos_token_id: The tokens that end a response; None: those of the teacher's generation config, or else the
            tokenizer's.
        seed: What all random numbers follow from; with one `batch_size` the corpus is the same on any number of
            processes, up to rounding. The global generators are not touched.
        batch_size: Responses drawn at once.
        output_dir: Folder that keeps what was sampled: an interrupted run goes on there, and gives the same corpus.
        shard_rows: Responses sampled between two writes: what an interruption costs.
        progress: Whether to show a progress bar on the main process.

    Returns:
        Dataset with `prompt` and `completion` (token ids), `reference_logprob` (nats), `finished` (whether the
        response ends with an end-of-sequence token) and, with a tokenizer, `tokenizer_fingerprint`, by which the ids
        are known to be its own, and `prompt_text` and `completion_text` to read; k rows per prompt, in the order of
        the prompts, on every process.

    Raises:
        TypeError: If a prompt has the wrong type.
        ValueError: If a number is out of its range, a prompt cannot be encoded or leaves no room for the response, or
            `output_dir` holds samples of something else.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> corpus = sample_corpus(
        ...     teacher, None, [[1, 2]], k=2, max_new_tokens=3, eos_token_id=0, top_k=1, progress=False
        ... )
        >>> corpus["completion"][0] == corpus["completion"][1], corpus["reference_logprob"][:]
        (True, [0.0, 0.0])

    References:
        arXiv 2510.15020, eq. (4).
    """
    check_count(k, "k")
    check_count(shard_rows, "shard_rows")
    require_its_tokenizer(teacher, tokenizer)
    ids = encode_prompts(prompts, tokenizer, chat_template_kwargs=chat_template_kwargs)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, end_token_ids(eos_token_id, teacher, tokenizer))
    sampler = sampler_of(teacher, sampling, batch_size=batch_size, seed=seed, stratified=stratified)
    if output_dir is None:
        places = [(book, first + number) for book, first in code_books(ids, k) for number in range(k)]
        samples = sampler.draw([prompt for prompt in ids for _ in range(k)], places=places, progress=progress)
    else:
        samples = _kept(sampler, ids, tokenizer, output_dir, k=k, shard_rows=shard_rows, progress=progress)
    corpus = _ids_dataset(
        [prompt for prompt in ids for _ in range(k)],
        [sample.ids for sample in samples],
        tokenizer,
        reference_logprob=[sample.logprob for sample in samples],
        finished=[sample.finished for sample in samples],
    )
    if tokenizer is None:
        return corpus
    texts = [prompt if isinstance(prompt, str) else str(tokenizer.decode(row)) for prompt, row in zip(prompts, ids)]
    responses = tokenizer.batch_decode([sample.ids for sample in samples], skip_special_tokens=True)
    corpus = _with_column(corpus, "prompt_text", [text for text in texts for _ in range(k)])
    return _with_column(corpus, "completion_text", responses)


def teacher_scored_corpus(
    corpus: Dataset,
    teacher: PreTrainedModel | RemoteModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    append_eos: bool = False,
    batch_tokens: int = 4096,
    output_dir: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """Give existing prompts and completions the density of a teacher that stands for their source.

    Prompts and completions stay as they are. Text is therefore tokenised again when a model is scored: teacher and
    model must share the tokenizer, or else the two log-probabilities belong to two different tokenisations of a
    string, each of which is only a part of the string's probability. Coverage is taken over the corpus's rows, so it
    is Cov_N of the teacher only if the completions are its own samples; otherwise use `sample_corpus`.

    Args:
        corpus: Reference corpus without `reference_logprob`.
        teacher: Causal language model that stands for D, or a `RemoteModel`.
        tokenizer: Its tokenizer; may be None for token ids.
        append_eos: End every completion of text with the EOS token; models must be scored with the same value.
        batch_tokens: Token positions computed in one forward pass.
        output_dir: Folder that keeps the scores: an interrupted run goes on there.
        progress: Whether to show a progress bar on the main process.

    Returns:
        The corpus with `reference_logprob` (nats), and token ids with `tokenizer_fingerprint` if a tokenizer is given,
        on every process.

    Raises:
        TypeError: If the corpus is not valid, see `validate_corpus`.
        ValueError: If it is not valid, has a `reference_logprob`, or the teacher excludes one of its completions.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> pairs = Dataset.from_dict({"prompt": [[1, 2]], "completion": [[3, 4, 5]]})
        >>> corpus = teacher_scored_corpus(pairs, teacher, None, progress=False)
        >>> round(corpus["reference_logprob"][0], 1)
        -7.1
    """
    validate_corpus(corpus)
    if "reference_logprob" in corpus.column_names:
        raise ValueError(
            "`corpus` has a `reference_logprob` already; to replace it, drop it with `corpus.remove_columns`."
        )
    scored = score_responses(
        teacher,
        tokenizer,
        corpus,
        append_eos=append_eos,
        batch_tokens=batch_tokens,
        output_dir=output_dir,
        progress=progress,
    )
    logprobs = np.array(scored["logprob"][:])
    excluded = np.flatnonzero(np.isneginf(logprobs))
    if len(excluded):
        raise ValueError(
            f"Row {excluded[0]}, column `completion`: the teacher gives it probability 0, so it is no sample of the "
            f"teacher; drop the {len(excluded)} such rows."
        )
    corpus = _with_column(corpus, "reference_logprob", logprobs.tolist())
    if tokenizer is None or TOKENIZER_COLUMN in corpus.column_names or read_pairs(corpus)[0] != "token ids":
        return corpus
    return _with_tokenizer(corpus, tokenizer)


def single_answer_corpus(prompts: Sequence[Any], answers: Sequence[Any]) -> Dataset:
    """Make a corpus of prompts with one right answer each: D(y|x) = 1, so Cov_N and Pass@N are exact.

    Args:
        prompts: Text, lists of chat messages, or lists of token ids.
        answers: The right answers, of the same kind; give text its end with `append_eos=True` when it is scored, so
            that "12" does not count as the beginning of "123".

    Returns:
        Dataset with `prompt`, `completion` and `reference_logprob`, which is 0.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If there are not as many answers as prompts, kinds are mixed, or one prompt has two answers.

    Example:
        >>> single_answer_corpus(["1+1=", "1+2="], ["2", "3"])["reference_logprob"][:]
        [0.0, 0.0]

    References:
        arXiv 2510.15020, Section 2 (Remark 2.2).
    """
    if len(prompts) != len(answers):
        raise ValueError(f"`prompts` and `answers` must be as many, got {len(prompts)} and {len(answers)}.")
    columns = {"prompt": list(prompts), "completion": list(answers), "reference_logprob": [0.0] * len(prompts)}
    corpus = Dataset.from_dict(columns)
    validate_corpus(corpus)
    first: dict[str, int] = {}
    for row, prompt in enumerate(columns["prompt"]):
        other = first.setdefault(json.dumps(prompt), row)
        if answers[other] != answers[row]:
            raise ValueError(
                f"Row {row}, column `completion`: the same prompt has another answer in row {other}, and D(y|x) "
                "cannot be 1 for both; drop one, or give `reference_logprob` yourself."
            )
    return corpus


def _kept(
    sampler: Sampler | RemoteSampler,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | PathLike[str],
    *,
    k: int,
    shard_rows: int,
    progress: bool,
) -> list[Sample]:
    """The samples of a folder, drawn where they are not there yet, in the order of the prompts."""
    facts = sampling_facts(sampler, prompts, tokenizer, k=k, shard_rows=shard_rows, folder=folder)
    size, books = facts["rows_per_shard"], code_books(prompts, k)
    hidden = not (progress and PartialState().is_main_process)
    found: dict[tuple[int, int], Sample] = {}
    with writing_to(folder), tqdm(total=len(prompts) * k, desc="Sampling", unit="response", disable=hidden) as bar:
        shards = on_main_process(partial(JsonShards, folder, "samples", facts))
        parts = kept_samples(sampler, prompts, tokenizer, shards, rounds=[k], rows_per_shard=size, books=books)
        for rows in parts:
            for row in rows:
                found[row["prompt"], row["sample"]] = Sample(row["ids"], row["logprob"], row["finished"])
            bar.update(len(rows))
    return [found[place] for place in sorted(found)]


def _tokenize_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> list[list[int]]:
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts, got one string; pass `[text]`.")
    rows = list(texts)
    if not rows:
        raise ValueError("`texts` must have at least one text, got none.")
    wrong = next((row for row, text in enumerate(rows) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"Text {wrong}: expected a string, got {type(rows[wrong]).__name__}.")
    documents = tokenize(rows, tokenizer, add_special_tokens=False)
    end = [eos_token_id(tokenizer)] if append_eos else []
    return [document + end for document in documents]


def _ids_dataset(
    prompts: list[list[int]], completions: list[list[int]], tokenizer: PreTrainedTokenizerBase | None, **columns: Any
) -> Dataset:
    ids = Features({"prompt": List(Value("int64")), "completion": List(Value("int64"))})
    corpus = Dataset.from_dict({"prompt": prompts, "completion": completions}, features=ids)
    for name, values in columns.items():
        corpus = _with_column(corpus, name, values)
    return corpus if tokenizer is None else _with_tokenizer(corpus, tokenizer)


def _with_tokenizer(corpus: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Say in each row whose token ids it holds."""
    return _with_column(corpus, TOKENIZER_COLUMN, [vocabulary_fingerprint(tokenizer)] * len(corpus))


def _with_column(corpus: Dataset, name: str, values: Any) -> Dataset:
    """Add a column at the side, so that no row is copied."""
    return concatenate_datasets([corpus.with_format(None), Dataset.from_dict({name: values})], axis=1)
