"""Evaluating Best-of-N: sample k responses to each prompt, judge them, and say what every N up to k achieves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from accelerate import PartialState
from huggingface_hub.utils import tqdm

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.decode.sample_verdicts import Judging
from hf_coverage.inference.fingerprint import digest
from hf_coverage.inference.forward import unwrap
from hf_coverage.inference.kept_samples import SAMPLE, Rows, damaged, kept_samples, sampling_facts, shard_sizes
from hf_coverage.inference.processes import on_main_process, writing_to
from hf_coverage.inference.remote import require_its_tokenizer, sampler_of
from hf_coverage.inference.sampler import Sampling, end_token_ids
from hf_coverage.inference.shards import JsonShards, read_metadata

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.inference.remote import RemoteModel

__all__ = ["check_threshold", "evaluate_best_of_n", "judge_best_of_n"]


def evaluate_best_of_n(
    model: PreTrainedModel | RemoteModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    verifier: Callable[..., Any] | None = None,
    *,
    k: int,
    max_new_tokens: int,
    sampling: Literal["independent", "stratified"] = "independent",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    threshold: float | None = 1.0,
    timeout: float | None = 10.0,
    output_dir: str | PathLike[str] | None = None,
    shard_rows: int = 256,
    name: str | None = None,
    progress: bool = True,
) -> BestOfNResult:
    """Sample k responses to each distinct prompt of a corpus, judge them, and estimate Best-of-N for every N <= k.

    Responses are drawn by the model's own `generate`. They are those of `sample_corpus` with the same seed and batch
    size, and depend on nothing else: not on the number of processes, and not on `shard_rows`. Call it on every process
    of a job (`torchrun`, `accelerate launch`): each samples and judges its part, all get the same result.

    Stratified samples of a prompt share nested codes: each is a sample of the model, and for every verifier and every
    reward they achieve at least what independent ones do. Their Pass@N is the mean over aligned blocks of N, for N a
    power of two or k. With an `output_dir`, a larger k keeps those that are there and adds to them.

    A verifier that raises, hangs, crashes or answers nonsense costs the response that it was called for, which counts
    as unsolved, with a named count in `errors`; never the run.

    Args:
        model: Any causal language model, or a `RemoteModel`.
        tokenizer: Its tokenizer; may be None where prompts are token ids.
        corpus: Dataset with `prompt` (text, chat messages or token ids) and the columns that the verifier reads. A
            column that differs between rows of one prompt is not given to the verifier.
        verifier: A callable like TRL's reward functions, `verifier(prompts, completions, **columns) -> list[float]`,
            or one of `hf_coverage.decode.verifiers`; None: exact match with the column `answer`, or else `completion`.
        k: Responses to each prompt.
        max_new_tokens: Most tokens of a response.
        sampling: Whether the responses to a prompt are drawn independently, or stratified, see `stratified_generate`.
        temperature: What logits are divided by; 1 is the model itself.
        top_k: Keep the k likeliest tokens of every step; None: all.
        top_p: Keep the likeliest tokens that together reach this mass; None: all.
        stop: Texts that end a response and are no part of what is judged.
        eos_token_id: The tokens that end a response; None: those of the model's generation config, or else the
            tokenizer's.
        batch_size: Responses drawn at once, and judged at once by a verifier that runs in this process.
        seed: What all random numbers follow from; the global generators are not touched.
        threshold: Least reward that solves a prompt; None where rewards do not say that, as a reward model's.
        timeout: Seconds for one response, after which the process that the verifier runs in is killed; None runs it
            in this process, where nothing stops it.
        output_dir: Folder that keeps samples and judgements: an interrupted evaluation goes on there, and another
            verifier judges the same samples.
        shard_rows: Responses sampled between two writes: what an interruption costs.
        name: The model's name in the result; None: its folder's, or its Hub id.
        progress: Whether to show a progress bar on the main process.

    Returns:
        The rewards and what follows from them.

    Raises:
        TypeError: If a value has the wrong type, or the verifier cannot be sent to its process.
        ValueError: If a number is out of its range, the verifier needs a column that is not there, or `output_dir`
            holds samples of something else.

    Example:
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=4, n_positions=32))
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2], [3]], "completion": [[1], [2]]})
        >>> result = evaluate_best_of_n(model, None, corpus, k=8, max_new_tokens=1, eos_token_id=0, progress=False)
        >>> result.pass_at(8), 0 < result.pass_at(1) < 1
        (1.0, True)

    References:
        arXiv 2510.15020, Section 2; arXiv 2107.03374, Section 2.1, for the unbiased estimate from independent samples;
        `functional.arithmetic_codes` for stratified ones.
    """
    if sampling not in ("independent", "stratified"):
        raise ValueError(f'`sampling` must be "independent" or "stratified", got {sampling!r}.')
    check_threshold(threshold)
    require_its_tokenizer(model, tokenizer)
    table = PromptTable.from_corpus(corpus)
    judging = Judging.prepare(verifier, table, timeout, batch_size)
    law = Sampling(max_new_tokens, temperature, top_k, top_p, end_token_ids(eos_token_id, model, tokenizer))
    sampler = sampler_of(model, law, batch_size=batch_size, seed=seed, stratified=sampling == "stratified")
    prompts = table.encode(tokenizer)
    facts = sampling_facts(sampler, prompts, tokenizer, k=k, shard_rows=shard_rows, folder=output_dir, stop=stop)
    facts |= {"corpus": digest(table.codes.tolist())}
    facts |= {"about": {"model": name or _name(model)}}
    facts |= {"rounds": [k]} if sampler.stratified else {}
    with writing_to(output_dir):
        shards = None
        if output_dir is not None:
            facts, shards = on_main_process(partial(_open, output_dir, facts))
        size = facts["rows_per_shard"]
        rounds = _rounds(facts)
        samples = kept_samples(sampler, prompts, tokenizer, shards, rounds=rounds, rows_per_shard=size, stop=stop)
        return _collect(samples, table, facts, judging, output_dir, threshold=threshold, progress=progress)


def judge_best_of_n(
    output_dir: str | PathLike[str],
    corpus: Dataset,
    verifier: Callable[..., Any] | None = None,
    *,
    threshold: float | None = 1.0,
    timeout: float | None = 10.0,
    batch_size: int = 16,
    progress: bool = True,
) -> BestOfNResult:
    """Judge the samples that `evaluate_best_of_n` kept, with another verifier and without the model.

    Args:
        output_dir: The folder of samples.
        corpus: The corpus that they were sampled for.
        verifier: See `evaluate_best_of_n`.
        threshold: See `evaluate_best_of_n`.
        timeout: See `evaluate_best_of_n`.
        batch_size: Responses judged at once by a verifier that runs in this process.
        progress: Whether to show a progress bar on the main process.

    Raises:
        FileNotFoundError: If there are no samples.
        ValueError: If they are not complete, or of another corpus.
    """
    check_threshold(threshold)
    types = {
        "k": int,
        "rows_per_shard": int,
        "batch_size": int,
        "seed": int,
        "corpus": str,
        "sampling": dict,
        "about": dict,
    }
    facts = on_main_process(partial(read_metadata, output_dir, **types))
    table = PromptTable.from_corpus(corpus)
    if facts["corpus"] != digest(table.codes.tolist()):
        raise ValueError(f"{output_dir} holds samples for other prompts than those of `corpus`.")
    judging = Judging.prepare(verifier, table, timeout, batch_size)
    with writing_to(output_dir):
        shards = on_main_process(partial(JsonShards, output_dir, "samples", facts))
        samples = _kept(shards, facts, table)
        return _collect(samples, table, facts, judging, output_dir, threshold=threshold, progress=progress)


def check_threshold(threshold: float | None) -> None:
    """Raise ValueError unless `threshold` is a finite reward, or None."""
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold` must be finite, or None where no reward solves a prompt, got {threshold}.")


def _collect(
    shards: Iterable[Rows],
    table: PromptTable,
    facts: dict[str, Any],
    judging: Judging,
    output_dir: str | PathLike[str] | None,
    *,
    threshold: float | None,
    progress: bool,
) -> BestOfNResult:
    """The result of samples and their verdicts, shard by shard."""
    decisive = {name: value for name, value in facts.items() if name != "about"}
    rounds = _rounds(facts)
    # What is judged stays so when more samples come to it.
    begun = decisive | {"k": rounds[0], "rounds": rounds[:1]} if "rounds" in facts else decisive
    of_samples = digest({name: value for name, value in decisive.items() if name != "rows_per_shard"})
    rewards = np.full((len(table), facts["k"]), np.nan)
    failed = np.zeros(rewards.shape, dtype=bool)
    failures: dict[tuple[int, int], tuple[str, dict[str, Any]]] = {}
    accepted: list[dict[tuple[int, ...], float]] = [{} for _ in range(len(table))]
    hidden = not (progress and PartialState().is_main_process)
    with tqdm(total=rewards.size, desc="Best-of-N", unit="response", disable=hidden) as bar:
        for samples, verdicts in judging.verdicts(shards, table, digest(begun), output_dir):
            for sample, verdict in zip(samples, verdicts):
                place = sample["prompt"], sample["sample"]
                if verdict.reward is None:
                    failed[place] = True
                    shown = {"row": int(table.rows[place[0]]), "sample": place[1], "message": verdict.message}
                    failures[place] = verdict.error, shown | {"response": table.completion(sample)}
                else:
                    rewards[place] = verdict.reward
                    if threshold is not None and verdict.reward >= threshold:
                        accepted[place[0]][tuple(sample["ids"])] = math.exp(sample["logprob"])
            bar.update(len(samples))
    errors, examples = _counted(failures)
    # rounding of float32 log-probabilities may leave a sum above 1
    mass = None if threshold is None else np.array([min(math.fsum(found.values()), 1.0) for found in accepted])
    rewards[failed] = min(0.0, float(np.min(rewards[~failed], initial=0.0)))
    return BestOfNResult(
        name=facts["about"]["model"],
        verifier=judging.name,
        rewards=rewards,
        failed=failed,
        rows=table.rows,
        prompts=table.codes,
        errors=errors,
        examples=examples,
        threshold=threshold,
        settings=facts["sampling"]
        | {name: facts[name] for name in ("k", "seed", "batch_size")}
        | ({"sampling": "stratified"} if facts.get("stratified") else {})
        | {"judged": None if judging.fingerprint is None else f"{of_samples} {judging.fingerprint}"},
        accepted_mass=mass,
    )


def _kept(shards: JsonShards, facts: dict[str, Any], table: PromptTable) -> Iterator[Rows]:
    """Shards of samples that must be there."""
    seen: set[tuple[int, int]] = set()
    for index, size in enumerate(shard_sizes(len(table), _rounds(facts), facts["rows_per_shard"])):
        rows = on_main_process(partial(shards.read, index, SAMPLE))
        if rows is None:
            raise ValueError(
                f"{shards.folder} lacks samples (the first missing file is {shards.name}-{index:05d}.jsonl): run "
                "`evaluate_best_of_n` with the same settings to finish them."
            )
        places = {(row["prompt"], row["sample"]) for row in rows}
        whole = len(rows) == len(places) == size
        if not whole or places & seen or not all(_is_place(place, table, facts["k"]) for place in places):
            raise ValueError(damaged(shards, index))
        seen |= places
        yield rows


def _open(folder: str | PathLike[str], facts: dict[str, Any]) -> tuple[dict[str, Any], JsonShards]:
    """The samples of a folder, and what they are of: stratified ones go on from those that there are fewer of."""
    before = None
    held = read_metadata(folder) if "rounds" in facts and (Path(folder) / "metadata.json").is_file() else {}
    if held.get("stratified"):
        rounds = _rounds(held)
        if rounds[-1] < facts["k"]:
            before = facts | {"k": rounds[-1], "rounds": rounds}
            rounds = [*rounds, facts["k"]]
        facts = facts | {"rounds": rounds}
    return facts, JsonShards(folder, "samples", facts, before=before)


def _rounds(facts: dict[str, Any]) -> list[int]:
    """How many samples of each prompt there are after each round in which they are drawn."""
    rounds = facts.get("rounds", [facts.get("k")])
    whole = isinstance(rounds, list) and rounds and all(type(end) is int for end in rounds)
    if not whole or any(end <= first for first, end in pairwise((0, *rounds))):
        raise ValueError(
            f"`rounds` of kept samples must be ascending numbers, but are {rounds!r}; restore their metadata.json, or "
            "remove the folder."
        )
    return rounds


def _is_place(place: tuple[Any, Any], table: PromptTable, k: int) -> bool:
    return all(type(part) is int and 0 <= part < size for part, size in zip(place, (len(table), k)))


def _name(model: PreTrainedModel | RemoteModel) -> str:
    source = str(unwrap(model).config._name_or_path) or "model"
    return Path(source).name if Path(source).is_dir() else source


def _counted(
    failures: dict[tuple[int, int], tuple[str, dict[str, Any]]],
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """How often each error occurred, most often first, and its first example in the order of prompts."""
    counts: dict[str, int] = {}
    examples: dict[str, dict[str, Any]] = {}
    for place in sorted(failures):
        error, shown = failures[place]
        counts[error] = counts.get(error, 0) + 1
        examples.setdefault(error, shown)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), examples
