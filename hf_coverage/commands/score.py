"""`hf-coverage score`: log p(y|x) of a model on a corpus, kept as a resumable score folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, say
from hf_coverage.commands.inputs import check_origin, load_model, load_tokenizer_for, model_name, read_dataset
from hf_coverage.commands.options import (
    AppendEos,
    BatchTokens,
    ConfigFile,
    Device,
    Dtype,
    DtypeName,
    GgufFile,
    Revision,
    Split,
    TokenizerName,
)
from hf_coverage.report.provenance import running_command

__all__ = ["EXAMPLES", "score", "score_into"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage score Qwen/Qwen3-0.6B corpus --output-dir scores/qwen3

hf-coverage score ./checkpoint-500 corpus.jsonl --output-dir scores/checkpoint-500 --append-eos

torchrun --nproc_per_node 2 -m hf_coverage score gpt2 corpus --output-dir scores/gpt2
"""


def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    corpus: Annotated[str, typer.Argument(help="Reference corpus: folder of `save_to_disk`, file, or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Score folder to write, or to go on with.")],
    name: Annotated[str | None, typer.Option(help="What the model is called in tables.")] = None,
    split: Split = None,
    tokenizer: TokenizerName = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = DtypeName.auto,
    device: Device = None,
    append_eos: AppendEos = False,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column whose equal values make rows dependent; by default `document`, or else `prompt`."),
    ] = None,
    batch_tokens: BatchTokens = 4096,
    share_prefixes: Annotated[bool, typer.Option(help="Run the prompt of several responses once.")] = True,
    shard_rows: Annotated[
        int, typer.Option(help="Rows per file of the score folder: what an interruption costs.")
    ] = 1024,
    per_token: Annotated[bool, typer.Option("--per-token", help="Keep every token's log-probability.")] = False,
    config: ConfigFile = None,
) -> None:
    """Score a corpus: the log-probability that a model gives to each response.

    The score folder can be profiled and compared without the model or the corpus. Run the same command again to go on
    after an interruption: what was scored is kept, and the result is the same to the byte.
    """
    score_into(
        output_dir,
        model,
        corpus,
        name=name or model_name(model, gguf_file),
        loading={"dtype": dtype.value, "device": device, "revision": revision, "gguf_file": gguf_file},
        tokenizer=tokenizer,
        split=split,
        group_by=group_by,
        append_eos=append_eos,
        batch_tokens=batch_tokens,
        share_prefixes=share_prefixes,
        shard_rows=shard_rows,
        per_token=per_token,
    )
    say(f"Next: hf-coverage profile {output_dir}")


def score_into(
    folder: Path,
    model: str,
    corpus: str,
    *,
    name: str,
    loading: dict[str, Any],
    tokenizer: str | None = None,
    split: str | None = None,
    group_by: str | None = None,
    append_eos: bool = False,
    **options: Any,
) -> None:
    """Score a model on a corpus into a score folder; every process of a job calls it."""
    from accelerate import PartialState

    from hf_coverage.measure.reference import read_reference, write_reference
    from hf_coverage.measure.scoring import score_responses

    rows = read_dataset(corpus, split)
    origin = check_origin(corpus, append_eos=append_eos)
    reference = read_reference(rows, group_by)
    scored = score_responses(
        load_model(model, **loading),
        load_tokenizer_for(model, tokenizer, loading),
        rows,
        append_eos=append_eos,
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
