"""Samples drawn shard by shard, each kept in a folder and not drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_coverage.functional.checks import check_count
from hf_coverage.inference.fingerprint import config_fingerprint, digest, tokenizer_fingerprint, weight_fingerprint
from hf_coverage.inference.processes import on_main_process
from hf_coverage.inference.shards import JsonShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_coverage.inference.sampler import Sample, Sampler

__all__ = ["SAMPLE", "Rows", "damaged", "kept_samples", "sampling_facts"]

Rows = list[dict[str, Any]]
SAMPLE = ("prompt", "sample", "ids", "logprob", "finished")
"""What a sample has, as it is kept."""


def sampling_facts(
    sampler: Sampler, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase | None, *, k: int, shard_rows: int
) -> dict[str, Any]:
    """What decides k samples of each prompt, and how they are kept: the metadata of their shards.

    Args:
        sampler: Draws them.
        prompts: Token ids.
        tokenizer: Makes text of them; None for none.
        k: Samples of each prompt.
        shard_rows: Samples of a shard; made a number of whole batches.

    Raises:
        ValueError: If `k` or `shard_rows` is below 1.
    """
    check_count(k, "k")
    check_count(shard_rows, "shard_rows")
    return {
        "k": k,
        "batch_size": sampler.batch_size,
        "seed": sampler.seed,
        "sampling": asdict(sampler.sampling),
        "rows_per_shard": max(1, shard_rows // sampler.batch_size) * sampler.batch_size,
        "prompts": digest(prompts),
        "weights": weight_fingerprint(sampler.model),
        "config": config_fingerprint(sampler.model),
        "dtype": str(sampler.model.dtype),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def kept_samples(
    sampler: Sampler,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    shards: JsonShards | None,
    *,
    k: int,
    rows_per_shard: int,
) -> Iterator[Rows]:
    """Draw k samples of each prompt, those alone whose shards are not there; every process of a job calls it.

    They are those that one call of `Sampler.draw` gives, whichever shards were there.

    Args:
        sampler: Draws them.
        prompts: Token ids.
        tokenizer: Makes the entry `text`; None for none.
        shards: Where they are kept; None: nowhere.
        k: Samples of each prompt.
        rows_per_shard: Samples of a shard, a number of whole batches.

    Yields:
        The samples of a shard, each with the numbers of its prompt and of itself; shortest prompts first.

    Raises:
        ValueError: If a shard is damaged.
    """
    known: dict[int, list[Sample]] | None = None
    every_place = _places(prompts, k)
    for index, start in enumerate(range(0, len(every_place), rows_per_shard)):
        places = every_place[start : start + rows_per_shard]
        kept = None if shards is None else on_main_process(partial(shards.read, index, SAMPLE))
        if kept is not None:
            if [(row["prompt"], row["sample"]) for row in kept] != places:
                raise ValueError(damaged(shards, index))
            yield kept
            continue
        if known is None:
            known = sampler.settle([prompts[prompt] for prompt, _ in every_place])
        samples = sampler.draw(
            [prompts[prompt] for prompt, _ in places], first_batch=start // sampler.batch_size, known=known
        )
        rows = [
            {"prompt": prompt, "sample": number} | asdict(sample) for (prompt, number), sample in zip(places, samples)
        ]
        if tokenizer is not None:
            texts = tokenizer.batch_decode([sample.ids for sample in samples], skip_special_tokens=True)
            rows = [row | {"text": text} for row, text in zip(rows, texts)]
        if shards is not None:
            on_main_process(partial(shards.write, index, rows))
        yield rows


def damaged(shards: JsonShards | None, index: int) -> str:
    """Say of a shard that it holds other samples than those that belong there."""
    where = "" if shards is None else f"{shards.folder / shards.name}-{index:05d}.jsonl"
    return (
        f"{where} is damaged: its samples are not those that belong there; remove it and run the same command again."
    )


def _places(prompts: list[list[int]], k: int) -> list[tuple[int, int]]:
    """Prompt and number of each sample in the order that `Sampler.draw` takes them: by length."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [(prompt, number) for prompt in order for number in range(k)]
