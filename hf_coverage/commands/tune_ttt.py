"""`hf-coverage tune-ttt`: which steps of test-time training cover best, and whether they cover more than none."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.inputs import check_origin, leave_job, load_model, load_tokenizer_for, read_dataset
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
from hf_coverage.report.provenance import provenance, running_command
from hf_coverage.report.table import Cell, Column, Table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_coverage.functional.step_rule import StepRule
    from hf_coverage.measure.reference import Reference
    from hf_coverage.select.tune_ttt import TTTChoice

__all__ = ["EXAMPLES", "tune_ttt"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage tune-ttt Qwen/Qwen3-0.6B --data corpus --n 16 --lr 1e-5,1e-4,1e-3

hf-coverage tune-ttt ./checkpoint-500 --data corpus --n 16 --lr 0.01,0.1 --radius none,1,10

torchrun --nproc_per_node 2 -m hf_coverage tune-ttt gpt2 --data corpus -n 16
"""

_RULE = "Steps"
_PLAIN = "plain"


def tune_ttt(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[
        str, typer.Option("--data", "--corpus", help="Held-out prompts and responses: folder, file or Hub id.")
    ],
    n: Annotated[float, typer.Option("--n", "-n", help="The N of Cov_N to choose by, a real number above 1.")],
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Step sizes to try, comma-separated.", show_default="1e-5,1e-4,1e-3,1e-2", rich_help_panel=_RULE
        ),
    ] = None,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            help="Balls around the head to try it in, comma-separated; `none` for no ball.",
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
        typer.Option(help="Cut a step to the likeliest tokens, that many; by default exact.", rich_help_panel=_RULE),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps on each token.", rich_help_panel=_RULE)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the two halves.")] = 0,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the scores of every setting, and the JSON.")
    ] = Path("tune_ttt"),
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
    shard_rows: Annotated[int, typer.Option(help="Rows per file of the scores: what an interruption costs.")] = 1024,
    config: ConfigFile = None,
) -> None:
    """Choose the step size of test-time training by coverage, and tell whether it covers more than plain decoding.

    The output head makes a step after every token of a response, and starts anew with the next response. Each setting
    is scored on the data in one pass, as sampling at temperature 1 would draw from it; half of the prompts choose the
    setting with the least Cov_N, and the other half compare it with plain decoding. Scores are kept: run the command
    again to go on after an interruption, with one more `--lr`, or with another N, and only what is new is scored.

    Writes tune_ttt.json, and score folders that `profile`, `compare` and `tournament` take.
    """
    from hf_coverage.functional.step_rule import StepRule
    from hf_coverage.measure.reference import read_reference
    from hf_coverage.select.tune_ttt import check_rules, split_groups

    sizes = _numbers(lr or ["1e-5,1e-4,1e-3,1e-2"], "--lr")
    balls = _numbers(radius or ["none"], "--radius", none=True)
    fixed: dict[str, Any] = {"decay": decay, "lam": lam, "top_k": top_k, "num_steps": steps}
    rules = check_rules([StepRule(size, ball, **fixed) for size, ball in product(sizes, balls)], n)
    rows = read_dataset(data, split)
    origin = check_origin(data, append_eos=append_eos)
    reference = read_reference(rows, group_by)
    if reference.kind == "answer":
        raise ValueError(
            f"{data} has scored answers, whose reasoning would have to be sampled under every setting: give prompts "
            "and whole responses."
        )
    split_groups(reference.groups, seed)  # refuses too few groups before hours of scoring
    chosen: dict[str, Any] = {"revision": revision, "gguf_file": gguf_file}
    scores = score_rules(
        load_model(model, dtype=dtype.value, device=device, **chosen),
        rows,
        rules,
        reference,
        output_dir / "scores",
        facts={"model": model, "corpus": data, "origin": origin},
        tokenizer=load_tokenizer_for(model, tokenizer, chosen),
        append_eos=append_eos,
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
    )
    leave_job(device)
    if is_main_process():
        choice = choose(scores, rules, n, reference, seed)
        show(choice)
        path = output_dir / "tune_ttt.json"
        choice.to_json(path, seed=seed, origin=provenance(model=model, data=data))
        say(f"All numbers are in {path}, the scores in {output_dir / 'scores'}.")


def score_rules(
    model: "PreTrainedModel",
    rows: "Dataset",
    rules: Sequence["StepRule"],
    reference: "Reference",
    folder: Path,
    *,
    facts: dict[str, Any],
    tokenizer: Any,
    **options: Any,
) -> list[list[float]]:
    """Score plain decoding and each rule into a folder of its own; every process of a job calls it.

    Args:
        model: the model.
        rows: the corpus.
        rules: the rules.
        reference: what the corpus knows of its rows.
        folder: where the score folders go.
        facts: what is written beside the scores.
        tokenizer: the model's.
        options: see `score_responses`.

    Returns:
        Log p(y|x) of all rows, for each rule and then for plain decoding.

    Raises:
        ValueError: if no response is long enough for a step to matter.
    """
    from hf_coverage.measure.reference import write_reference
    from hf_coverage.measure.scoring import score_responses
    from hf_coverage.select.tune_ttt import rule_name

    found = []
    # Plain decoding comes last: a model whose head cannot make a step is refused before anything is scored.
    for index, rule in enumerate([*rules, None], start=1):
        name = _PLAIN if rule is None else rule_name(rule)
        own = folder / name.replace(", ", "_").replace(" ", "-")
        say(f"{index} of {len(rules) + 1}: {name}")
        scored = score_responses(
            model, tokenizer, rows, ttt=rule, output_dir=own, progress=is_main_process(), **options
        )
        if is_main_process():
            write_reference(own, reference, {"name": name, "command": running_command()} | facts)
        if max(scored["num_tokens"][:]) < 2:
            raise ValueError(
                "every response is one token long, and test-time training changes what comes after it: give longer "
                "responses."
            )
        found.append(scored["logprob"][:])
    return found


def choose(
    scores: Sequence[Sequence[float]], rules: Sequence["StepRule"], n: float, reference: "Reference", seed: int
) -> "TTTChoice":
    """The choice among rules, from what `score_rules` returned for them."""
    from hf_coverage.select.tune_ttt import tune_ttt as choose_rule

    return choose_rule(
        scores[-1],
        dict(zip(rules, scores)),
        n,
        reference_logprobs=reference.logprob,
        groups=reference.groups,
        seed=seed,
    )


def show(choice: "TTTChoice") -> None:
    """Print a choice."""
    from hf_coverage.report.summary import comparison_table
    from hf_coverage.select.tune_ttt import generation_settings

    print_table(_search_table(choice))
    print_table(comparison_table(choice.plain, [choice.adapted], [choice.n]))
    say(choice.sentence)
    settings = ", ".join(f"{name}={value!r}" for name, value in generation_settings(choice.rule).items())
    if choice.helps:
        say(f"Decode with model.generate(**inputs, do_sample=True, custom_generate=ttt_generate, {settings})")
        say(f"or keep it with the model: GenerationConfig({settings})")
    else:
        say(f"Leave it out, and decode plainly; the setting was GenerationConfig({settings})")


def _search_table(choice: "TTTChoice") -> Table:
    from hf_coverage.functional.checks import metric_key
    from hf_coverage.report.summary import coverage_cell

    quantity = choice.plain.quantity.replace("Cov_N", f"Cov_{metric_key(choice.n)}")
    columns: list[Column | str] = ["decoding", Column(quantity, "lower"), Column("cross-entropy (nats)", "lower"), ""]
    rows: list[list[Cell]] = []
    for profile in choice.searched:
        mark = "chosen" if profile.name == choice.adapted.name else ""
        rows.append([profile.name, coverage_cell(profile, choice.n), profile.cross_entropy, mark])
    caption = (
        f"On the {choice.searched[0].num_groups:,} prompts that choose, with 95 % confidence intervals: the best of "
        "several looks better here than it is."
    )
    return Table(columns, rows, caption)


def _numbers(texts: Sequence[str], option: str, *, none: bool = False) -> list[Any]:
    """The numbers of an option, each once, in order; `none` among them is None where it is allowed."""
    found: list[float | None] = []
    for text in ",".join(map(str, texts)).split(","):
        if none and text.strip().lower() == "none":
            found.append(None)
            continue
        try:
            found.append(float(text))
        except ValueError as error:
            allowed = "numbers or `none`" if none else "numbers"
            raise typer.BadParameter(
                f"{text.strip()!r} is none for `{option}`: give {allowed}, comma-separated."
            ) from error
    return list(dict.fromkeys(found))
