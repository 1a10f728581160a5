"""`hf-coverage score`: log p(y|x) of a model on a corpus, kept as a resumable score folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, say, say_next
from hf_coverage.commands.inputs import load_model, read_corpus
from hf_coverage.commands.options import BatchTokens, CorpusOptions, Stratified, output_folder, refuse_at_server
from hf_coverage.commands.score_folder import check_name
from hf_coverage.inference.loading import ModelOptions, ServedOptions, load_tokenizer, model_name
from hf_coverage.report.provenance import running_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.inference.adapters import KeptBase

__all__ = ["EXAMPLES", "load", "score", "score_into"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage score Qwen/Qwen3-0.6B corpus --output-dir scores/qwen3

hf-coverage score ./checkpoint-500 corpus.jsonl --output-dir scores/checkpoint-500 --append-eos

torchrun --nproc_per_node 2 -m hf_coverage score gpt2 corpus --output-dir scores/gpt2

hf-coverage score NAME corpus --base-url http://127.0.0.1:8000/v1 --tokenizer Qwen/Qwen3-0.6B --output-dir scores/NAME

The answers of reasoning traces, the model's own reasoning averaged out:

hf-coverage score Qwen/Qwen3-0.6B traces.jsonl --reasonings 16 --max-reasoning-tokens 1024 --output-dir answers
"""

_ANSWERS = "Answers after a reasoning"


def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    corpus: Annotated[str, typer.Argument(help="Reference corpus: folder of `save_to_disk`, file, or Hub id.")],
    output_dir: Annotated[Path, output_folder("Score folder to write, or to go on with.")],
    name: Annotated[str | None, typer.Option(help="What the model is called in tables.")] = None,
    *,
    reading: CorpusOptions,
    loading: ServedOptions,
    batch_tokens: BatchTokens = 4096,
    share_prefixes: Annotated[bool, typer.Option(help="Run the prompt of several responses once.")] = True,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file of the score folder: what an interruption costs.")
    ] = 1024,
    per_token: Annotated[bool, typer.Option("--per-token", help="Keep every token's log-probability.")] = False,
    stratified: Stratified = False,
    reasonings: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Score the answers alone: that many reasonings of the model's own are sampled before each.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    max_reasoning_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a reasoning.", rich_help_panel=_ANSWERS)
    ] = 1024,
    separator: Annotated[
        str, typer.Option(help="What stands between reasoning and answer.", rich_help_panel=_ANSWERS)
    ] = "</think>",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the reasonings.", rich_help_panel=_ANSWERS)] = 0,
) -> None:
    """Score a corpus: the log-probability that a model gives to each response.

    The score folder can be profiled and compared without the model or the corpus. Run the same command again to go on
    after an interruption: what was scored is kept, and the result is the same to the byte.

    With --reasonings it is the log-probability of the answer that follows a reasoning in each response (or of
    --answer-column), whatever the reasoning: the model writes its own. A problem is one row then, and what is written
    is a data set that `profile` and `compare` take.
    """
    refuse_at_server(loading, stratified=stratified)
    if reasonings is not None:
        if per_token or stratified:
            raise typer.BadParameter("`--reasonings` scores answers: leave `--per-token` and `--stratified` out.")
        sampling = {"samples": reasonings, "max_reasoning_tokens": max_reasoning_tokens, "seed": seed}
        _score_answers(output_dir, model, corpus, reading, loading, separator=separator, **sampling)
        return
    score_into(
        output_dir,
        model,
        corpus,
        name=check_name(model_name(model, loading) if name is None else name),
        reading=reading,
        loading=loading,
        batch_tokens=batch_tokens,
        share_prefixes=share_prefixes,
        shard_rows=shard_rows,
        per_token=per_token,
        intervals=stratified,
    )
    say_next("hf-coverage", "profile", output_dir)


def _score_answers(
    folder: Path, model: str, corpus: str, reading: CorpusOptions, loading: ModelOptions, **options: Any
) -> None:
    """Score the answers of a corpus into a data set; every process of a job calls it."""
    from hf_coverage.commands.corpus_shapes import split_answers
    from hf_coverage.inference.files import written_whole
    from hf_coverage.inference.folder_lock import LOCK_FILES
    from hf_coverage.measure.answers import score_answers

    if folder.exists() and any(path.name not in LOCK_FILES for path in folder.iterdir()):
        raise FileExistsError(f"`output_dir` {folder} is not empty: choose another folder, or remove this one.")
    rows, _ = read_corpus(corpus, reading)
    if reading.answer_column is None:
        rows = split_answers(rows, options["separator"])
    else:
        rows = rows.remove_columns("answer") if "answer" in rows.column_names else rows
        rows = rows.remove_columns("reference_logprob").rename_column("completion", "answer")
    progress = is_main_process()
    scored = score_answers(*load(model, loading), rows, append_eos=reading.append_eos, progress=progress, **options)
    if is_main_process():
        with written_whole(folder) as part:
            scored.save_to_disk(part)
    reached = sum(scored["answer_reached"][:]) / len(scored)
    say(
        f"{len(scored):,} answers in {folder}; {reached:.0%} of the reasonings came to one.",
        f"Next: hf-coverage profile {folder}",
    )


def load(
    model: str, loading: ModelOptions, kept: "KeptBase | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model and its tokenizer; an adapter on its base, if that is kept from the model before."""
    loaded = load_model(model, loading) if kept is None else kept.load(model, loading, load_model)
    return loaded, load_tokenizer(model, loading)


def score_into(
    folder: Path,
    model: str,
    corpus: str,
    *,
    name: str,
    reading: CorpusOptions,
    loading: ModelOptions,
    loaded: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
    kept: "KeptBase | None" = None,
    **options: Any,
) -> None:
    """Score a model on a corpus into a score folder; every process of a job calls it.

    Args:
        folder: The score folder.
        model: The model's folder or Hub id.
        corpus: The corpus's folder, file or Hub id.
        name: What to call the model.
        reading: How the corpus is read.
        loading: How the model is loaded.
        loaded: The model and its tokenizer, where they have been loaded already.
        kept: What loads them otherwise, where other models were loaded before.
        options: See `score_responses`.
    """
    from accelerate import PartialState

    from hf_coverage.measure.reference import read_reference, write_reference
    from hf_coverage.measure.scoring import score_responses

    rows, origin = read_corpus(corpus, reading)
    reference = read_reference(rows, reading.group_by)
    scored = score_responses(
        *(loaded or load(model, loading, kept)),
        rows,
        append_eos=reading.append_eos,
        output_dir=folder,
        progress=is_main_process(),
        **options,
    )
    if is_main_process():
        facts = {"name": name, "model": model, "corpus": corpus, "origin": origin, "command": running_command()}
        write_reference(folder, reference, facts)
    PartialState().wait_for_everyone()  # the others may read the folder next
    tokens, total = sum(scored["num_tokens"][:]), -sum(scored["logprob"][:])
    say(
        f"{name}: {len(scored):,} responses, {tokens:,} tokens, cross-entropy {total / len(scored):.4g} nats a "
        f"response, {total / tokens:.4g} a token. Scores in {folder}."
    )
