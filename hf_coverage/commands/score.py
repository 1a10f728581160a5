"""`hf-coverage score`: log p(y|x) of a model on a corpus, kept as a resumable score folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, say, say_next
from hf_coverage.commands.inputs import load_model, read_corpus
from hf_coverage.commands.options import BatchTokens, CorpusOptions, Stratified, output_folder
from hf_coverage.commands.score_folder import check_name
from hf_coverage.inference.loading import ModelOptions, load_tokenizer, model_name
from hf_coverage.report.provenance import running_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EXAMPLES", "load", "score", "score_into"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage score Qwen/Qwen3-0.6B corpus --output-dir scores/qwen3

hf-coverage score ./checkpoint-500 corpus.jsonl --output-dir scores/checkpoint-500 --append-eos

torchrun --nproc_per_node 2 -m hf_coverage score gpt2 corpus --output-dir scores/gpt2
"""


def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    corpus: Annotated[str, typer.Argument(help="Reference corpus: folder of `save_to_disk`, file, or Hub id.")],
    output_dir: Annotated[Path, output_folder("Score folder to write, or to go on with.")],
    name: Annotated[str | None, typer.Option(help="What the model is called in tables.")] = None,
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
    batch_tokens: BatchTokens = 4096,
    share_prefixes: Annotated[bool, typer.Option(help="Run the prompt of several responses once.")] = True,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file of the score folder: what an interruption costs.")
    ] = 1024,
    per_token: Annotated[bool, typer.Option("--per-token", help="Keep every token's log-probability.")] = False,
    stratified: Stratified = False,
) -> None:
    """Score a corpus: the log-probability that a model gives to each response.

    The score folder can be profiled and compared without the model or the corpus. Run the same command again to go on
    after an interruption: what was scored is kept, and the result is the same to the byte.
    """
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


def load(model: str, loading: ModelOptions) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model and its tokenizer."""
    return load_model(model, loading), load_tokenizer(model, loading)


def score_into(
    folder: Path,
    model: str,
    corpus: str,
    *,
    name: str,
    reading: CorpusOptions,
    loading: ModelOptions,
    loaded: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
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
        options: See `score_responses`.
    """
    from accelerate import PartialState

    from hf_coverage.measure.reference import read_reference, write_reference
    from hf_coverage.measure.scoring import score_responses

    rows, origin = read_corpus(corpus, reading)
    reference = read_reference(rows, reading.group_by)
    scored = score_responses(
        *(loaded or load(model, loading)),
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
