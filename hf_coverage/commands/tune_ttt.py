"""`hf-coverage tune-ttt`: which steps of test-time training cover best, and whether they cover more than none."""

from collections.abc import Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.inputs import leave_job, load_model, read_corpus
from hf_coverage.commands.options import BatchTokens, CorpusOptions, output_folder
from hf_coverage.inference.loading import ModelOptions, load_tokenizer
from hf_coverage.report.provenance import provenance, running_command
from hf_coverage.report.table import Cell, Column, Table

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedModel

    from hf_coverage.functional.ttt_config import TTTConfig
    from hf_coverage.measure.reference import Reference
    from hf_coverage.select.ttt_choice import ChosenBy, TTTChoice

__all__ = ["EXAMPLES", "score_settings", "tune_ttt"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage tune-ttt Qwen/Qwen3-0.6B --data corpus --n 16

hf-coverage tune-ttt ./checkpoint-500 --data corpus --n 16 --lr 1e-4,1e-3 --radius none,0.1,1

hf-coverage tune-ttt ./checkpoint-500 --data corpus --n 16 --scope head,lora --on-prompt --rank 4

torchrun --nproc_per_node 2 -m hf_coverage tune-ttt gpt2 --data corpus -n 16
"""

_RULE = "Steps"


class ChosenByName(str, Enum):
    """What settings are chosen by."""

    miss = "miss"
    coverage = "coverage"


class CacheName(str, Enum):
    """What becomes of keys and values when the backbone changes."""

    exact = "exact"
    stale = "stale"


def tune_ttt(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[
        str, typer.Option("--data", "--corpus", help="Held-out prompts and responses: folder, file or Hub id.")
    ],
    n: Annotated[float, typer.Option("--n", "-n", help="The N of miss_N or Cov_N to choose by, above 1.")],
    by: Annotated[
        ChosenByName | None,
        typer.Option(help="What chooses and is compared.", show_default="miss where the data's density is known"),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What to train, comma-separated: `head`, `lora` (adapters of all layers but the head) or `all`. The "
            "two latter need a backward pass for every token.",
            show_default="head",
            rich_help_panel=_RULE,
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Step sizes to try, comma-separated.",
            show_default="around what Theorem 6.1 allows, measured",
            rich_help_panel=_RULE,
        ),
    ] = None,
    on_prompt: Annotated[
        bool, typer.Option("--on-prompt", help="Try each with steps on the prompt as well.", rich_help_panel=_RULE)
    ] = False,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            help="Balls around the start to try it in, comma-separated; `none` for no ball.",
            show_default="none",
            rich_help_panel=_RULE,
        ),
    ] = None,
    decay: Annotated[
        float, typer.Option(help="Part of the way back that every step begins with.", rich_help_panel=_RULE)
    ] = 0.0,
    lam: Annotated[
        float | None, typer.Option(help="Lambda of normalised steps; by default plain ones.", rich_help_panel=_RULE)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cut the head's step to that many likeliest tokens; by default exact.", rich_help_panel=_RULE
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=65_536, help="Rank of the adapters.", show_default="8", rich_help_panel=_RULE),
    ] = None,
    cache: Annotated[
        CacheName | None,
        typer.Option(
            help="Keys and values under `lora` and `all`: computed again for every token, or left as they were.",
            show_default="exact",
            rich_help_panel=_RULE,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps on each token.", rich_help_panel=_RULE)] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the two halves.")] = 0,
    output_dir: Annotated[Path, output_folder("Folder for the scores of every setting, and the JSON.")] = Path(
        "tune_ttt"
    ),
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
    batch_tokens: BatchTokens = 4096,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows per file of the scores: what an interruption costs.", show_default="1024; 16 where slow"
        ),
    ] = None,
) -> None:
    """Choose the step size of test-time training by coverage, and tell whether it covers more than plain decoding.

    The output head (or what `--scope` says) makes a step after every token of a response, and starts anew with the
    next one. Each setting is scored on the data as sampling at temperature 1 would draw from it; half of the prompts
    choose the setting with the least miss_N (the least bound on Cov_N where log D is not known, or as `--by` says),
    and the other half compare it with plain decoding. Scores are kept: run the command again to go on after an
    interruption, with one more `--lr` or `--scope`, or with another N, and only what is new is scored.

    Writes tune_ttt.json, and score folders that `profile`, `compare` and `tournament` take.
    """
    from hf_coverage.measure.reference import read_reference
    from hf_coverage.select.ttt_settings import check_rules, ttt_grid
    from hf_coverage.select.tune_ttt import split_groups

    scopes = _words(scope or ["head"])
    grid = partial(
        ttt_grid,
        radii=_numbers(radius or ["none"], "--radius", none=True),
        on_prompt=on_prompt,
        some={"top_k": top_k, "rank": rank, "cache": None if cache is None else cache.value},
        decay=decay,
        lam=lam,
        num_steps=steps,
    )
    sizes = None if lr is None else _numbers(lr, "--lr")
    rules = grid({scope: sizes or [1.0] for scope in scopes})
    check_rules(rules, n)
    rows, origin = read_corpus(data, reading)
    reference = read_reference(rows, reading.group_by)
    if reference.kind == "answer":
        raise ValueError(
            f"{data} has scored answers, whose reasoning would have to be sampled under every setting: give prompts "
            "and whole responses."
        )
    split_groups(reference.groups, seed)  # refuses too few groups before hours of scoring
    judged = load_model(model, loading)
    encoding: dict[str, Any] = {"tokenizer": load_tokenizer(model, loading), "append_eos": reading.append_eos}
    if sizes is None:
        rules = grid(default_sizes(judged, rows, rules, **encoding))
    scores = score_settings(
        judged,
        rows,
        rules,
        reference,
        output_dir / "scores",
        facts={"model": model, "corpus": data, "origin": origin},
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
        **encoding,
    )
    leave_job()
    if is_main_process():
        choice = choose(scores, rules, n, reference, seed, None if by is None else by.value)
        show(choice)
        path = output_dir / "tune_ttt.json"
        choice.to_json(path, seed=seed, origin=provenance(model=model, data=data))
        say(f"All numbers are in {path}, the scores in {output_dir / 'scores'}.")


def default_sizes(
    model: "PreTrainedModel", rows: "Dataset", rules: Sequence["TTTConfig"], *, tokenizer: Any, append_eos: bool
) -> dict[str, list[float]]:
    """Measure which step sizes each scope should try; every process of a job calls it.

    Args:
        model: The model.
        rows: The corpus.
        rules: Some of each scope, whatever their step sizes.
        tokenizer: The model's.
        append_eos: Whether the end-of-sequence token is part of every response.

    Returns:
        Step sizes by scope.
    """
    from hf_coverage.measure.corpus import encode_corpus
    from hf_coverage.select.ttt_settings import STEP_SIZES
    from hf_coverage.select.ttt_step_size import measure_step_size

    encoded = encode_corpus(rows, tokenizer, append_eos=append_eos)
    sizes: dict[str, list[float]] = {}
    for rule in {rule.scope: rule for rule in rules}.values():
        middle = measure_step_size(model, encoded, rule)
        say(f"Step sizes to try for {rule.scope!r} lie around {middle:g}: 1 / (2 B^2) of Theorem 6.1, measured.")
        sizes[rule.scope] = [float(f"{factor * middle:.2g}") for factor in STEP_SIZES]
    return sizes


def choose(
    scores: Sequence["ArrayLike"],
    rules: Sequence["TTTConfig"],
    n: float,
    reference: "Reference",
    seed: int,
    by: "ChosenBy | None" = None,
) -> "TTTChoice":
    """The choice among rules, from what `score_settings` returned for them."""
    from hf_coverage.select.tune_ttt import tune_ttt as choose_rule

    return choose_rule(
        scores[-1],
        dict(zip(rules, scores)),
        n,
        reference_logprobs=reference.logprob,
        groups=reference.groups,
        by=by,
        seed=seed,
    )


def show(choice: "TTTChoice") -> None:
    """Print a choice."""
    from hf_coverage.report.summary import comparison_table
    from hf_coverage.select.ttt_settings import generation_settings

    print_table(_search_table(choice))
    if choice.adapted is not None:
        print_table(comparison_table(choice.plain, [choice.adapted], [choice.n]))
    say(choice.sentence)
    if choice.rule is None:
        say("Decode plainly.")
        return
    settings = ", ".join(f"{name}={value!r}" for name, value in generation_settings(choice.rule).items())
    if choice.helps:
        say(f"Decode with model.generate(**inputs, do_sample=True, custom_generate=ttt_generate, {settings})")
        say(f"or keep it with the model: GenerationConfig({settings})")
    else:
        say(f"Leave it out, and decode plainly; the setting was GenerationConfig({settings})")


def _search_table(choice: "TTTChoice") -> Table:
    from hf_coverage.report.summary import coverage_cell, miss_cell

    cell = miss_cell if choice.by == "miss" else coverage_cell
    columns: list[Column | str] = ["decoding", Column(choice.label, "lower")]
    columns += [Column("cross-entropy (nats)", "lower"), ""]
    rows: list[list[Cell]] = []
    chosen = "plain" if choice.adapted is None else choice.adapted.name
    for name, profile in choice.results.items():
        if profile is None:
            rows.append([name, None, None, "diverged"])
        else:
            mark = "chosen" if name == chosen else ""
            rows.append([name, cell(profile, choice.n), profile.cross_entropy, mark])
    caption = (
        f"On the {choice.searched[0].num_groups:,} prompts that choose, with 95 % confidence intervals: the best of "
        "several looks better here than it is."
    )
    return Table(columns, rows, caption)


def _words(texts: Sequence[str]) -> list[str]:
    """What an option lists, comma-separated, each once."""
    return list(dict.fromkeys(text.strip().lower() for text in ",".join(map(str, texts)).split(",")))


def _numbers(texts: Sequence[str], option: str, *, none: bool = False) -> list[Any]:
    """The numbers of an option, each once, in order; `none` among them is None where it is allowed."""
    found: list[float | None] = []
    for text in _words(texts):
        if none and text == "none":
            found.append(None)
            continue
        try:
            found.append(float(text))
        except ValueError as error:
            allowed = "numbers or `none`" if none else "numbers"
            raise typer.BadParameter(f"{text!r} is none for `{option}`: give {allowed}, comma-separated.") from error
    return list(dict.fromkeys(found))


def score_settings(
    model: "PreTrainedModel",
    rows: "Dataset",
    rules: Sequence["TTTConfig"],
    reference: "Reference",
    folder: Path,
    *,
    facts: dict[str, Any],
    tokenizer: Any,
    append_eos: bool,
    **options: Any,
) -> list[NDArray[np.float64]]:
    """Score plain decoding and each rule into a folder of its own; every process of a job calls it.

    Args:
        model: The model.
        rows: The corpus.
        rules: The rules.
        reference: What the corpus knows of its rows.
        folder: Where the score folders go.
        facts: What is written beside the scores.
        tokenizer: The model's.
        append_eos: Whether the end-of-sequence token is part of every response.
        options: See `score_rules`.

    Returns:
        Log p(y|x) of all rows, for each rule and then for plain decoding.

    Raises:
        ValueError: If no response is long enough for a step to matter.
    """
    from hf_coverage.measure.corpus import encode_corpus
    from hf_coverage.measure.reference import write_reference
    from hf_coverage.measure.scoring import PLAIN, score_rules
    from hf_coverage.select.ttt_settings import rule_name

    if not any(rule.on_prompt for rule in rules):
        encoded = encode_corpus(rows, tokenizer, append_eos=append_eos)
        if max(map(len, encoded.completions)) < 2:
            raise ValueError(
                "every response is one token long, and test-time training changes what comes after it: give longer "
                "responses."
            )
    named = {rule_name(rule): rule for rule in rules}
    folders = {name: name.replace(", ", "_").replace(" ", "-") for name in (PLAIN, *named)}
    # Plain decoding and all that the head does are one reading; each of the others is complete when it is done.
    heads = [name for name, rule in named.items() if rule.scope == "head"]
    readings = ([heads] if heads else []) + [[name] for name in named if name not in heads]
    found: dict[str, NDArray[np.float64]] = {}
    for index, names in enumerate(readings, start=1):
        say(f"{index} of {len(readings)}: {'; '.join(names if index > 1 else [PLAIN, *names])}")
        scores = score_rules(
            model,
            tokenizer,
            rows,
            {folders[name]: named[name] for name in names},
            append_eos=append_eos,
            output_dir=folder,
            progress=is_main_process(),
            **options,
        )
        for name in (PLAIN, *names):
            found[name] = scores[folders[name]].logprob
            if is_main_process():
                write_reference(
                    folder / folders[name], reference, {"name": name, "command": running_command()} | facts
                )
    return [found[name] for name in (*named, PLAIN)]
