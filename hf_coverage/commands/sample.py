"""`hf-coverage sample`: a reference corpus from a teacher, or from plain text."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, say, say_next
from hf_coverage.commands.inputs import (
    check_number_of_responses,
    load_model,
    read_chosen,
    read_responses,
    write_origin,
)
from hf_coverage.commands.lm_eval_tasks import TaskOptions, task_rows
from hf_coverage.commands.options import (
    AppendEos,
    BatchSize,
    RowOptions,
    Seed,
    TopK,
    TopP,
    output_folder,
    refuse_at_server,
)
from hf_coverage.inference.folder_lock import LOCK_FILES
from hf_coverage.inference.loading import ServedOptions, is_served, load_tokenizer
from hf_coverage.report.provenance import running_command, versions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["EXAMPLES", "sample"]

EXAMPLES = """\
[bold]Examples[/]

Eight responses a prompt from a teacher, with their densities (Cov_N itself can be measured):

hf-coverage sample prompts.jsonl --teacher Qwen/Qwen3-1.7B --k 8 --stratified --max-new-tokens 64 --output-dir corpus

Windows of plain text (an upper bound on Cov_N can be measured):

hf-coverage sample wiki.txt --from texts --tokenizer gpt2 --prompt-tokens 192 --response-tokens 32 --output-dir corpus

Prompts and completions that a teacher wrote, scored by it:

hf-coverage sample pairs.jsonl --from pairs --teacher Qwen/Qwen3-1.7B --append-eos --output-dir corpus

A task of lm-evaluation-harness, its prompts and right responses:

hf-coverage sample --from lm-eval:gsm8k --num-fewshot 5 --limit 200 --output-dir corpus
"""


_TASK = "Tasks of lm-evaluation-harness"

_UNFINISHED = ".unfinished"
"""In the folder of a corpus: what was sampled or scored of it so far."""


class Source(str, Enum):
    """What the source holds."""

    prompts = "prompts"
    texts = "texts"
    pairs = "pairs"
    lm_eval = "lm-eval"


def sample(
    source: Annotated[
        str | None,
        typer.Argument(help="Prompts, texts or pairs: folder, .jsonl, .parquet, .txt, or Hub id.", show_default=False),
    ] = None,
    *,
    output_dir: Annotated[Path, output_folder("Folder for the corpus; new or empty, or that of an interrupted run.")],
    what: Annotated[
        str,
        typer.Option(
            "--from",
            help="`prompts`: the teacher samples responses. `texts`: cut windows. `pairs`: the teacher scores them. "
            "`lm-eval:TASK`: prompts and right responses of a task, which a teacher scores if there is one.",
        ),
    ] = "prompts",
    teacher: Annotated[str | None, typer.Option(help="Folder or Hub id of the model that is the reference.")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of prompts or texts; by default `prompt`, or else `text`.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Responses for each prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 64,
    stratified: Annotated[
        bool,
        typer.Option(
            "--stratified",
            help="Spread the responses to a prompt over what the teacher may say: each is a sample of it, and Cov_N "
            "is as unbiased, with less variance.",
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Temperature; 1 is the teacher itself.")] = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a window's prompt.")] = 192,
    response_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a window's response.")] = 32,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; by default the response's.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Keep that many windows, chosen at random.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.", rich_help_panel=_TASK)
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Field of a document that is its response.", rich_help_panel=_TASK)
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Write prompts as the tokenizer's chats.", rich_help_panel=_TASK),
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool, typer.Option("--fewshot-as-multiturn", help="Examples are turns of the chat.", rich_help_panel=_TASK)
    ] = False,
    system_prompt: Annotated[str | None, typer.Option(help="What comes first.", rich_help_panel=_TASK)] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder of further tasks.", rich_help_panel=_TASK)] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Responses between two writes: what an interruption costs.")
    ] = 256,
    reading: RowOptions,
    loading: ServedOptions,
    append_eos: AppendEos = False,
) -> None:
    """Make a reference corpus, the rows that models are judged on.

    With a teacher every response comes with log D(y|x), its log-probability under the very distribution that it was
    sampled from, so that Cov_N itself can be measured. Plain text has none, and gives an upper bound only.

    Run the same command again to go on after an interruption: what was sampled or scored is kept, and the corpus is
    the same to the byte.
    """
    from hf_coverage.inference.sampler import Sampling

    Sampling(max_new_tokens, temperature, top_k, top_p)  # what cannot be is said before a model is loaded
    refuse_at_server(loading, stratified=stratified)
    kind, name = _kind(what)
    task = TaskOptions(
        num_fewshot,
        target,
        include_path,
        system_prompt,
        apply_chat_template,
        fewshot_as_multiturn,
        reading.limit,
        seed,
    )
    if teacher is None and is_served(loading):
        raise typer.BadParameter("`--base-url` serves a teacher: say which of its models it is with `--teacher`.")
    _check_choice(kind, teacher, loading.tokenizer, output_dir)
    _check_source(kind, source, task, reading)
    if stratified and kind is not Source.prompts:
        raise typer.BadParameter(
            f"`--stratified` is of sampled responses, and `--from {kind.value}` has none: leave it out."
        )
    rows: Any = _rows(kind, str(source), column, reading)
    if kind is Source.prompts:
        check_number_of_responses(len(rows), k, max_new_tokens)
    words = None if teacher is None and loading.tokenizer is None else load_tokenizer(str(teacher), loading)
    if kind is Source.lm_eval:
        rows = task_rows(name, task, words)

    def load() -> Any:
        return None if teacher is None else load_model(teacher, loading)

    settings: dict[str, Any] = {"seed": seed}
    if kind is Source.prompts:
        settings |= {"k": k, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings |= {"stratified": True} if stratified else {}
    elif kind is Source.texts:
        settings |= {"prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
        settings |= {"stride": stride, "max_windows": max_windows, "append_eos": append_eos}
    else:
        settings = {"append_eos": append_eos}
    unfinished = output_dir / _UNFINISHED
    corpus = _build(kind, rows, column, words, load, settings, {"output_dir": unfinished, "shard_rows": shard_rows})
    if is_main_process():
        asked = {"command": running_command(), "source": source, "from": kind.value, "teacher": teacher}
        # windows and samples are token ids, which contain their end already: nothing is appended when they are scored
        final: dict[str, Any] = {"append_eos": append_eos and kind in (Source.pairs, Source.lm_eval)}
        if kind is Source.lm_eval:
            final |= {"from": what, **{name: value for name, value in task._asdict().items() if value}}
        _write(corpus, output_dir, words, asked | settings | final)
    _report(corpus, output_dir)


def _kind(what: str) -> tuple[Source, str]:
    kind, colon, name = what.partition(":")
    known = [one.value for one in Source]
    if kind not in known or (kind == "lm-eval") != bool(name) or (colon and not name):
        raise typer.BadParameter(f"`--from` must be one of {', '.join(known)}:TASK, but is {what!r}.")
    return Source(kind), name


def _check_source(kind: Source, source: str | None, task: TaskOptions, reading: RowOptions) -> None:
    if (source is None) != (kind is Source.lm_eval):
        raise typer.BadParameter(
            "`--from lm-eval:TASK` has its own data: leave the source out."
            if source is not None
            else f"`--from {kind.value}` needs a source of {kind.value}."
        )
    own = {"num_fewshot", "target", "include_path", "system_prompt", "chat", "multiturn"}
    set_ones = {name for name, value in task._asdict().items() if value is not None and value is not False}
    given = [name for name in TaskOptions._fields if name in own & set_ones]
    if given and kind is not Source.lm_eval:
        flags = {"chat": "apply-chat-template", "multiturn": "fewshot-as-multiturn"}
        flag = flags.get(given[0], given[0].replace("_", "-"))
        raise typer.BadParameter(f"`--{flag}` is for `--from lm-eval:TASK`: leave it out.")
    if kind is Source.lm_eval and RowOptions(limit=reading.limit) != reading:
        raise typer.BadParameter("`--from lm-eval:TASK` knows its rows and columns: give `--limit` and `--target`.")


def _rows(kind: Source, source: str, column: str | None, reading: RowOptions) -> "Dataset | None":
    """The rows of the source, by the columns that are named or usual."""
    if kind is Source.lm_eval:
        return None
    if kind is Source.texts:
        return read_chosen(source, reading, document=True)
    if column is not None and reading.prompt_column is not None:
        raise typer.BadParameter("`--column` and `--prompt-column` are one: give one of them.")
    if kind is Source.prompts and reading.prompt_column is None:
        rows = read_chosen(source, reading)
        if column is not None or ("text" in rows.column_names and "prompt" not in rows.column_names):
            return rows
    return read_responses(source, reading, pairs=kind is Source.pairs)


def _check_choice(kind: Source, teacher: str | None, tokenizer: str | None, output_dir: Path) -> None:
    if kind in (Source.prompts, Source.pairs) and teacher is None:
        raise typer.BadParameter(f"`--from {kind.value}` needs a `--teacher`, the model that is the reference.")
    if kind is Source.texts and teacher is None and tokenizer is None:
        raise typer.BadParameter("windows of text need a `--tokenizer`: that of the models to be judged.")
    there = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if there - {*LOCK_FILES} and _UNFINISHED not in there:
        raise FileExistsError(f"`output_dir` {output_dir} is not empty: choose another folder, or remove this one.")


def _build(
    kind: Source,
    rows: "Dataset",
    column: str | None,
    tokenizer: Any,
    load: Callable[[], Any],
    settings: dict[str, Any],
    keeping: dict[str, Any],
) -> "Dataset":
    from hf_coverage.measure.builders import sample_corpus, teacher_scored_corpus, windows_corpus
    from hf_coverage.measure.corpus_columns import template_kwargs

    progress = is_main_process()
    if kind in (Source.pairs, Source.lm_eval):
        folder, model = keeping["output_dir"], load()
        if model is None:
            _require_nothing_kept(folder)
            return rows
        return teacher_scored_corpus(rows, model, tokenizer, output_dir=folder, progress=progress, **settings)
    values = _column(rows, column)
    if kind is Source.prompts:
        own = template_kwargs(rows)
        settings = settings | keeping
        return sample_corpus(load(), tokenizer, values, chat_template_kwargs=own, progress=progress, **settings)
    corpus = windows_corpus(values, tokenizer, **settings)
    model = load()
    if model is None:
        _require_nothing_kept(keeping["output_dir"])
        return corpus
    return teacher_scored_corpus(corpus, model, tokenizer, output_dir=keeping["output_dir"], progress=progress)


def _require_nothing_kept(folder: Path) -> None:
    if folder.exists() and any(path.name not in LOCK_FILES for path in folder.iterdir()):
        raise FileExistsError(
            f"`output_dir` {folder.parent} holds an unfinished corpus of something else: choose another folder, or "
            "remove this one."
        )


def _column(rows: "Dataset", column: str | None) -> list[Any]:
    name = column or ("prompt" if "prompt" in rows.column_names else "text")
    if name not in rows.column_names:
        raise ValueError(f"`column` must be one of the source's columns, {rows.column_names}, but is {name!r}.")
    return rows.with_format(None)[name][:]


def _write(corpus: "Dataset", folder: Path, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Put a corpus in its place, and take away what was kept of it before."""
    from hf_coverage.inference.files import made_folder, written_whole
    from hf_coverage.inference.fingerprint import vocabulary_fingerprint

    unfinished = folder / _UNFINISHED
    with made_folder(unfinished):  # says of files half in their place whose they are, if the process is killed
        try:
            with written_whole(folder) as part:
                corpus.save_to_disk(part)
                made: dict[str, Any] = {"versions": versions()}
                if tokenizer is not None:
                    made = {"tokenizer_fingerprint": vocabulary_fingerprint(tokenizer)} | made
                write_origin(part, facts | made)
        except BaseException:
            for path in folder.iterdir():  # which held nothing else
                if path.name not in (*LOCK_FILES, _UNFINISHED):
                    path.unlink()
            raise
        # the record last: without it, what is left could pass for something else
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "metadata.json"):
            path.unlink()
        unfinished.rmdir()


def _report(corpus: "Dataset", folder: Path) -> None:
    tokens = sum(map(len, corpus["completion"])) if not isinstance(corpus["completion"][0], str) else None
    say(f"{len(corpus):,} rows{'' if tokens is None else f', {tokens:,} response tokens'}. Corpus in {folder}.")
    if "finished" in corpus.column_names:
        share = sum(corpus["finished"][:]) / len(corpus)
        say(f"{share:.0%} of the responses end with an end-of-sequence token; the others were cut at the limit.")
    if "reference_logprob" in corpus.column_names:
        say(f"Mean log D(y|x): {sum(corpus['reference_logprob'][:]) / len(corpus):.4g} nats.")
    else:
        say("No log D(y|x) is known: models scored on it get an upper bound on Cov_N.")
    say_next("hf-coverage", "score", "MODEL", folder, "--output-dir", "scores/MODEL")
