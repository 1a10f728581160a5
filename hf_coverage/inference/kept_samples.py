"""Samples drawn shard by shard, each kept in a folder and not drawn again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from hf_coverage.functional.checks import check_count
from hf_coverage.inference.fingerprint import digest, tokenizer_fingerprint
from hf_coverage.inference.loading import loading_facts
from hf_coverage.inference.processes import on_main_process
from hf_coverage.inference.shards import JsonShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_coverage.inference.remote import RemoteSampler
    from hf_coverage.inference.sampler import Sample, Sampler, Stop

__all__ = ["SAMPLE", "Rows", "code_books", "damaged", "kept_samples", "sampling_facts", "shard_sizes"]

Rows = list[dict[str, Any]]
SAMPLE = ("prompt", "sample", "ids", "logprob", "finished")
"""What a sample has, as it is kept."""


def sampling_facts(
    sampler: Sampler | RemoteSampler,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    k: int,
    shard_rows: int,
    folder: str | PathLike[str] | None = None,
    stop: Sequence[str] = (),
) -> dict[str, Any]:
    """What decides k samples of each prompt, and how they are kept: the metadata of their shards.

    Args:
        sampler: Draws them.
        prompts: Token ids.
        tokenizer: Makes text of them; None for none.
        k: Samples of each prompt.
        shard_rows: Samples of a shard; made a number of whole batches.
        folder: Where the shards are or will be.
        stop: Texts that end a sample.

    Raises:
        ValueError: If `k` or `shard_rows` is below 1.
    """
    check_count(k, "k")
    check_count(shard_rows, "shard_rows")
    model = sampler.model_facts(folder)
    facts = {
        "k": k,
        "batch_size": sampler.batch_size,
        "seed": sampler.seed,
        "sampling": asdict(sampler.sampling),
        "rows_per_shard": max(1, shard_rows // sampler.batch_size) * sampler.batch_size,
        "prompts": digest(prompts),
        **model,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }
    loading = {} if "served" in model else loading_facts(sampler.model)
    facts |= {"loading": loading} if loading else {}
    facts |= {"stop": list(stop)} if stop else {}
    return facts | {"stratified": True} if sampler.stratified else facts


def kept_samples(
    sampler: Sampler | RemoteSampler,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    shards: JsonShards | None,
    *,
    rounds: Sequence[int],
    rows_per_shard: int,
    books: Sequence[tuple[int, int]] | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Rows]:
    """Draw k samples of each prompt, those alone whose shards are not there; every process of a job calls it.

    They are those that one call of `Sampler.draw` gives, whichever shards were there.

    Args:
        sampler: Draws them.
        prompts: Token ids.
        tokenizer: Makes the entry `text`; None for none.
        shards: Where they are kept; None: nowhere.
        rounds: How many samples of each prompt there are after each round in which they are drawn; the last is k.
        rows_per_shard: Samples of a shard, a number of whole batches.
        books: Where the codes of each prompt's samples are, see `code_books`; None: each prompt has its own.
        stop: Texts that end a sample, and are no part of its `text`; they need a tokenizer.

    Yields:
        The samples of a shard, each with the numbers of its prompt and of itself; shortest prompts first in a round.

    Raises:
        ValueError: If a shard is damaged.
    """
    every_round = [_places(prompts, first, end) for first, end in pairwise((0, *rounds))]
    batches = [-(-len(places) // sampler.batch_size) for places in every_round]
    whole = list(
        zip(accumulate(batches, initial=0), every_round)
    )  # a round begins with a batch and a shard of its own
    parts = [
        (first + start // sampler.batch_size, places[start : start + rows_per_shard])
        for first, places in whole
        for start in range(0, len(places), rows_per_shard)
    ]

    def asked(first_batch: int, places: list[tuple[int, int]]) -> dict[str, Any]:
        owners = [(prompt, 0) if books is None else books[prompt] for prompt, _ in places]
        codes = [(book, begin + number) for (book, begin), (_, number) in zip(owners, places)]
        return {"prompts": [prompts[prompt] for prompt, _ in places], "places": codes, "first_batch": first_batch}

    known: dict[int, list[Sample]] | None = None
    ends = stops_at(stop, tokenizer)
    for index, (first_batch, places) in enumerate(parts):
        kept = None if shards is None else on_main_process(partial(shards.read, index, SAMPLE))
        if kept is not None:
            if [(row["prompt"], row["sample"]) for row in kept] != places:
                raise ValueError(damaged(shards, index))
            yield kept
            continue
        if known is None:
            known = {
                number: batch for part in whole for number, batch in sampler.settle(**asked(*part), stop=ends).items()
            }
        samples = sampler.draw(**asked(first_batch, places), known=known, stop=ends)
        rows = [
            {"prompt": prompt, "sample": number} | asdict(sample) for (prompt, number), sample in zip(places, samples)
        ]
        if tokenizer is not None:
            texts = tokenizer.batch_decode([sample.ids for sample in samples], skip_special_tokens=True)
            rows = [row | {"text": before(text, stop)} for row, text in zip(rows, texts)]
        if shards is not None:
            on_main_process(partial(shards.write, index, rows))
        yield rows


def stops_at(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> Stop | None:
    """What tells from the tokens of a response that it holds one of some texts; None where there are none.

    Raises:
        ValueError: If there is no tokenizer, or a text is empty.
    """
    if not stop:
        return None
    if tokenizer is None or "" in stop:
        raise ValueError("`stop` must be texts of one character or more, and needs a tokenizer.")
    # A token is a byte at the least: what a text needs at the most, and as much for one that is cut in two.
    tail = 2 * max(len(text.encode()) for text in stop) + 8

    def reached(ids: list[int]) -> bool:
        text = str(tokenizer.decode(ids[-tail:], skip_special_tokens=True))
        return any(one in text for one in stop)

    return reached


def before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some texts in it.

    Example:
        >>> before("42 Q: what", ["Q:", "A:"])
        '42 '
    """
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


def shard_sizes(num_prompts: int, rounds: Sequence[int], rows_per_shard: int) -> list[int]:
    """How many samples each shard holds.

    Example:
        >>> shard_sizes(3, rounds=[2, 3], rows_per_shard=4)
        [4, 2, 3]
    """
    totals = [num_prompts * (end - first) for first, end in pairwise((0, *rounds))]
    return [min(rows_per_shard, total - start) for total in totals for start in range(0, total, rows_per_shard)]


def code_books(prompts: list[list[int]], k: int) -> list[tuple[int, int]]:
    """Let prompts that are equal share one set of codes: which prompt's it is, and where the own k of them begin.

    Example:
        >>> code_books([[1, 2], [3], [1, 2]], k=8)
        [(0, 0), (1, 0), (0, 8)]
    """
    first: dict[tuple[int, ...], int] = {}
    seen: Counter[int] = Counter()
    books = []
    for row, prompt in enumerate(prompts):
        book = first.setdefault(tuple(prompt), row)
        books.append((book, k * seen[book]))
        seen[book] += 1
    return books


def damaged(shards: JsonShards | None, index: int) -> str:
    """Say of a shard that it holds other samples than those that belong there."""
    where = "" if shards is None else f"{shards.folder / shards.name}-{index:05d}.jsonl"
    return (
        f"{where} is damaged: its samples are not those that belong there; remove it and run the same command again."
    )


def _places(prompts: list[list[int]], first: int, end: int) -> list[tuple[int, int]]:
    """Prompt and number of each sample of a round in the order that `Sampler.draw` takes them: by length."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [(prompt, number) for prompt in order for number in range(first, end)]
