"""What the offset tournament needs besides the data: responses that each checkpoint writes, scored under all."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_coverage.commands.console import is_main_process, say
from hf_coverage.commands.inputs import decided_by_main_process, load_model, read_responses
from hf_coverage.commands.made_of import SINCE, checkpoint_facts, folder_names, made_otherwise, write_made_of
from hf_coverage.commands.options import CorpusOptions
from hf_coverage.commands.score_folder import is_score_folder
from hf_coverage.inference.adapters import KeptBase
from hf_coverage.inference.loading import ModelOptions, is_served, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Generations", "offset_arguments"]

_KEPT = "made_of.json"
"""Beside generations, and beside their scores: what they were made of."""


@dataclass(frozen=True)
class Generations:
    """How checkpoints write responses to prompts of the data.

    Attributes:
        number: Of responses, each to another row of the data, drawn at random; None for one to every row.
        max_new_tokens: Of a response; None for those of the longest response in the data.
        batch_size: Responses written at once.
        seed: Of the draws.
        stratified: Whether responses to equal prompts are spread over what a checkpoint may say.
    """

    number: int | None
    max_new_tokens: int | None
    batch_size: int
    seed: int
    stratified: bool = False

    def facts(self) -> dict[str, Any]:
        """What decides the responses; what was written before there was a choice was independent."""
        return {name: value for name, value in asdict(self).items() if value or name != "stratified"}


def offset_arguments(
    sources: Sequence[str],
    names: Sequence[str],
    folder: Path,
    data: str | None,
    generations: Generations,
    reading: CorpusOptions,
    loading: ModelOptions,
    **scoring: Any,
) -> dict[str, Any]:
    """Let each checkpoint write responses, and score them under all; every process of a job calls it.

    One model is loaded at a time. What is written and scored is kept in `folder`, and what is there is used again.

    Args:
        sources: Checkpoint folders or Hub ids, all of one tokenizer.
        names: What to call them.
        folder: Where responses and scores go.
        data: The corpus whose prompts are continued.
        generations: How they are continued.
        reading: How the corpus is read.
        loading: How models are loaded.
        scoring: How responses are scored, see `score_responses`.

    Returns:
        `on_policy` and `on_policy_groups` of `hf_coverage.tournament`; nothing on other processes than the main one.
    """
    from datasets import load_from_disk

    from hf_coverage.measure.score_table import ScoreTable

    scored = next((source for source in sources if is_score_folder(source)), None)
    if scored is not None or data is None:
        what = "`--data` is not given" if scored is None else f"{scored} is a score folder"
        raise ValueError(f"`--on-policy` continues prompts of the data with every candidate's model, but {what}.")
    tokenizer = _common_tokenizer(sources, loading)
    prompts, length = _prompts(data, tokenizer, generations, reading)
    keys = folder_names(sources)
    models = [_model_facts(source, folder / key / _KEPT, loading) for source, key in zip(sources, keys)]
    kept = KeptBase()
    asked = generations.facts() | {"max_new_tokens": length}
    asked["prompts"] = blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest()
    for source, key, model in zip(sources, keys, models):
        _generate(source, folder / key, model | asked, prompts, tokenizer, loading, scoring["shard_rows"], kept)
    for source, key, model in zip(sources, keys, models):
        others = [folder / other for other in keys if other != key]
        _score(source, others, key, model | asked, tokenizer, loading, kept, **scoring)
    if not is_main_process():
        return {}
    written = {name: load_from_disk(folder / key) for name, key in zip(names, keys)}
    # A candidate's own density is the one that its responses were drawn from.
    logprobs = {
        b: {
            a: np.asarray(written[b]["reference_logprob"][:])
            if a == b
            else ScoreTable.open(folder / keys[names.index(b)] / "scores" / key).logprob
            for a, key in zip(names, keys)
        }
        for b in names
    }
    return {"on_policy": logprobs, "on_policy_groups": {b: rows["prompt"][:] for b, rows in written.items()}}


def _common_tokenizer(sources: Sequence[str], loading: ModelOptions) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of all candidates: one's token ids have to be the other's."""
    from hf_coverage.inference.fingerprint import tokenizer_fingerprint

    if loading.tokenizer is not None:
        return load_tokenizer(sources[0], loading)
    first, *others = [load_tokenizer(source, loading) for source in sources]
    for source, other in zip(sources[1:], others):
        if tokenizer_fingerprint(other) != tokenizer_fingerprint(first):
            raise ValueError(
                f"`--on-policy` scores each candidate's tokens under all others, but {source} and {sources[0]} have "
                "different tokenizers; if their token ids are the same, give one with `--tokenizer`."
            )
    return first


def _prompts(
    data: str, tokenizer: "PreTrainedTokenizerBase | None", generations: Generations, reading: CorpusOptions
) -> tuple[list[list[int]], int]:
    """Token ids of the prompts to continue, and how many tokens a response may have."""
    from hf_coverage.measure.corpus import encode_corpus

    encoded = encode_corpus(read_responses(data, reading), tokenizer, append_eos=reading.append_eos)
    rows = np.arange(len(encoded))
    if generations.number is not None and generations.number < len(rows):
        rows = np.sort(np.random.default_rng(generations.seed).choice(rows, generations.number, replace=False))
    return [encoded.prompts[row] for row in rows], generations.max_new_tokens or max(map(len, encoded.completions))


def _model_facts(source: str, record: Path, loading: ModelOptions) -> dict[str, Any]:
    """What a candidate is, on which what it wrote depends; of a server's model what the server tells."""
    facts = decided_by_main_process(partial(checkpoint_facts, source, loading), loading.device)
    facts |= {"loading": loading.key()}
    return facts | {"served": load_model(source, loading).facts(record)} if is_served(loading) else facts


def _generate(
    source: str,
    folder: Path,
    made_of: dict[str, Any],
    prompts: list[list[int]],
    tokenizer: "PreTrainedTokenizerBase | None",
    loading: ModelOptions,
    shard_rows: int,
    kept: KeptBase,
) -> None:
    """Write one response to each prompt into a folder, unless they are there; what an interruption left goes on."""
    from accelerate import PartialState

    from hf_coverage.inference.files import made_folder, written_whole
    from hf_coverage.measure.builders import sample_corpus

    if decided_by_main_process(partial(_is_kept, folder, made_of), loading.device):
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    responses = sample_corpus(
        kept.load(source, loading, load_model),
        tokenizer,
        prompts,
        k=1,
        max_new_tokens=made_of["max_new_tokens"],
        batch_size=made_of["batch_size"],
        seed=made_of["seed"],
        stratified=made_of.get("stratified", False),
        output_dir=unfinished,
        shard_rows=shard_rows,
        progress=is_main_process(),
    )
    if is_main_process():
        # what a killed run leaves behind does not pass for generations
        with made_folder(folder.parent), written_whole(folder) as part:
            responses.save_to_disk(part)
            write_made_of(part / _KEPT, made_of)
        shutil.rmtree(unfinished)
    PartialState().wait_for_everyone()
    say(f"{source}: {len(responses):,} responses of its own in {folder}.")


def _score(
    source: str,
    others: Sequence[Path],
    key: str,
    made_of: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase | None",
    loading: ModelOptions,
    kept: KeptBase,
    **scoring: Any,
) -> None:
    """Score the others' responses under a candidate into `other / "scores" / key`, those that are not scored yet."""
    from accelerate import PartialState
    from datasets import load_from_disk

    from hf_coverage.measure.scoring import score_responses

    missing = [
        other
        for other in others
        if not decided_by_main_process(partial(_is_kept, other / "scores" / key, made_of), loading.device)
    ]
    if not missing:
        return
    model = kept.load(source, loading, load_model)
    for other in missing:
        score_responses(
            model,
            tokenizer,
            load_from_disk(other),
            output_dir=other / "scores" / key,
            progress=is_main_process(),
            **scoring,
        )
        if is_main_process():
            write_made_of(other / "scores" / key / _KEPT, made_of)
        PartialState().wait_for_everyone()
    say(f"{source}: scored the responses of {len(missing)} other candidates.")


def _is_kept(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether a folder is finished, and was made of the very same; otherwise the user has to decide."""
    changed = made_otherwise(folder / _KEPT, made_of, since=SINCE)
    if changed:
        raise ValueError(
            f"{folder} was made otherwise ({', '.join(changed)} changed): choose another `--output-dir`, or remove it."
        )
    return changed is not None
