"""`hf-coverage best-of-n`: what k samples of a model achieve, judged by a verifier."""

import json
import re
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.corpus_shapes import with_system_prompt
from hf_coverage.commands.inputs import answer_column, check_number_of_responses, leave_job, load_model, read_responses
from hf_coverage.commands.options import (
    BatchSize,
    RowOptions,
    Seed,
    TopK,
    TopP,
    output_folder,
    parse_n,
    refuse_at_server,
)
from hf_coverage.commands.score_folder import read_measured
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.loading import ServedOptions, load_tokenizer, model_name
from hf_coverage.report.provenance import running_command
from hf_coverage.report.table import Cell, Column, Interval, Table

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_coverage.decode.best_of_n_result import BestOfNResult, Prediction
    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["EXAMPLES", "best_of_n", "require_judged", "written_folders"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage best-of-n MODEL problems.jsonl --verifier math-verify --k 64 --max-new-tokens 512 -o best_of_n

hf-coverage best-of-n MODEL corpus --k 16 --sampling stratified --profile scores/MODEL

Which prompts can RL with groups of 8 learn from, and what would 1,024 samples solve:

hf-coverage best-of-n MODEL problems.jsonl --k 32 --predict 256,1024 --group-size 8 --write-prompts keep.jsonl

The samples kept in best_of_n, judged by a function of yours, without the model:

hf-coverage best-of-n best_of_n problems.jsonl --verifier rewards.py:my_reward

A model that vLLM serves, on its own machines, compared with a copy here before it is believed:

hf-coverage best-of-n NAME problems.jsonl --base-url http://127.0.0.1:8000/v1 --check-with MODEL --k 64
"""


class HowDrawn(str, Enum):
    """How the samples of a prompt are drawn."""

    independent = "independent"
    stratified = "stratified"


def best_of_n(
    model: Annotated[str, typer.Argument(help="Folder or Hub id; or a folder of samples to be judged.")],
    data: Annotated[str, typer.Argument(help="Prompts, and what the verifier reads: folder, file or Hub id.")],
    verifier: Annotated[
        str,
        typer.Option(
            help="`exact-match`, `math-verify`, `reasoning-gym:TASK`, `reward-model:MODEL`, or your own callable, as "
            "`module:function` or `file.py:function`, called like TRL's reward functions. Its process is no sandbox."
        ),
    ] = "exact-match",
    output_dir: Annotated[
        Path | None,
        output_folder("Folder for samples, judgements, plot and JSON.", show_default="best_of_n"),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Responses for each prompt: the largest N.")] = 16,
    n: Annotated[
        list[str] | None,
        # torchrun takes `--n` for a prefix of its own options and stops; `-n` passes
        typer.Option("--n", "-n", help="N to show, comma-separated; by default the powers of 2 up to k."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 256,
    how: Annotated[
        HowDrawn,
        typer.Option(
            "--sampling",
            help="`stratified`: each is a sample of the model, and together they never find less than independent "
            "ones, whatever the verifier; with a larger k they are kept.",
        ),
    ] = HowDrawn.independent,
    temperature: Annotated[float, typer.Option(help="Temperature; 1 is the model itself.")] = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a response and is no part of it; may be given several times."),
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Ask as a chat that begins with this.")] = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least reward that solves a prompt; by default 1, and none for a reward model."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one response, after which its verifier is killed.")] = 10,
    predict: Annotated[
        list[str] | None,
        typer.Option(help="N beyond k to say Pass@N for, comma-separated: the range that the samples allow."),
    ] = None,
    group_size: Annotated[
        int, typer.Option(min=2, help="Samples of a prompt that GRPO compares: for --write-prompts.")
    ] = 8,
    write_prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL file for the prompts that RL can learn from, a row of the data each."),
    ] = None,
    min_signal: Annotated[
        float, typer.Option(help="Least probability that rewards of a group differ, for --write-prompts.")
    ] = 0.5,
    profile: Annotated[
        str | None,
        typer.Option(help="Score folder of the same model and prompts: show beside it what coverage predicts."),
    ] = None,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Responses between two writes: what an interruption costs.")
    ] = 256,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write every prompt with its samples and rewards as JSON.")
    ] = False,
    *,
    reading: RowOptions,
    loading: ServedOptions,
) -> None:
    """Measure what Best-of-N achieves: sample k responses to each prompt, judge them, report every N up to k.

    Pass@N is the share of prompts that at least one of N responses solves; higher is better. Both it and the reward of
    the best of N are unbiased, with 95 % intervals over prompts. Run the command again to go on after an interruption.
    Stratified samples count in aligned blocks of N, for N a power of 2 or k.

    A second table says what RL would get: the share of prompts whose group of samples is all wrong, mixed, or all
    right. A method that compares the samples of a group, as GRPO does, learns from mixed ones alone. Beyond k, and
    with --predict, ranges are those that the samples do not reject: a prompt without success may be hopeless or rare.

    A verifier runs in a process of its own, which is killed where it hangs, and which is no sandbox: it may do what
    you may. Where it executes code that a model wrote, run the command in a container without network (`docker run
    --network none`), or let the verifier send the code to a service for it, such as E2B. `unshare -rn` takes away the
    network alone.

    Writes best_of_n-VERIFIER.json, its picture, results as lm-evaluation-harness writes them, and entries for a model
    card as YAML; another verifier of the same name gets -2 behind it. If no response could be judged, nothing of these
    is written and the exit code is 1.
    """
    from hf_coverage.decode.verifier_runner import check_timeout
    from hf_coverage.decode.verifiers import named_verifier
    from hf_coverage.inference.sampler import Sampling

    refuse_at_server(loading, **{"sampling stratified": how is HowDrawn.stratified})
    check_timeout(timeout)
    Sampling(max_new_tokens, temperature, top_k, top_p)  # what cannot be is said before a model is loaded
    *_, folder = written_folders(model, output_dir)
    rows = read_responses(data, reading, pairs=False)
    rows = rows if system_prompt is None else with_system_prompt(rows, system_prompt)
    column = answer_column(rows, verifier, reading)
    if threshold is None and not verifier.startswith("reward-model:"):
        threshold = 1.0
    farther = [] if predict is None else _beyond(predict)
    if not 0 < min_signal <= 1:
        raise ValueError(f"`min_signal` must be above 0 and at most 1, got {min_signal}.")
    if write_prompts is not None and (write_prompts.is_dir() or not write_prompts.parent.is_dir()):
        raise ValueError(f"`write_prompts` must be a file in a folder that exists, but is {write_prompts}.")
    if farther and threshold is None:
        raise ValueError("--predict is of Pass@N, which needs a --threshold: the least reward that solves a prompt.")
    wants_independent = bool(farther) or write_prompts is not None
    if not _holds_samples(model):
        _check_groups(how is HowDrawn.stratified, wants_independent, k, group_size if write_prompts else 1)
    chosen = named_verifier(verifier, column=column, device=loading.device)
    judging = {"threshold": threshold, "timeout": timeout, "batch_size": batch_size}
    measured = None if profile is None else read_measured(profile).profile
    if _holds_samples(model):
        result = _judge(model, rows, chosen, judging)
    else:
        if n is not None:
            _levels(n, k, stratified=how is HowDrawn.stratified)  # before anything is sampled
        check_number_of_responses(len(rows), k, max_new_tokens)
        sampling: dict[str, Any] = {
            "k": k,
            "max_new_tokens": max_new_tokens,
            "sampling": how.value,
            "temperature": temperature,
            "top_k": top_k,
        }
        sampling |= {"stop": stop} if stop else {}
        sampling |= {"top_p": top_p, "seed": seed, "shard_rows": shard_rows, "output_dir": folder}
        words, weights = load_tokenizer(model, loading), load_model(model, loading)
        result = _evaluate(weights, words, rows, chosen, judging | sampling | {"name": model_name(model, loading)})
    leave_job()
    if is_main_process():
        _check_groups(result.is_stratified, wants_independent, result.k, group_size if write_prompts else 1)
        levels = result.levels() if n is None else _levels(n, result.k, stratified=result.is_stratified)
        kept = Path(model) if _holds_samples(model) else folder
        logged = (rows, _responses(kept), column) if log_samples else None
        _report(result, levels, measured, folder, farther, data, logged)
        if write_prompts is not None:
            _write_prompts(result, rows, group_size, min_signal, write_prompts)


def written_folders(model: str, output_dir: Path | None, **options: Any) -> list[Path]:
    """The folders that the command writes to: that of the samples that are judged, and last that of the results."""
    if _holds_samples(model):
        return [Path(model), output_dir or Path(model)]
    return [output_dir or Path("best_of_n")]


def _holds_samples(folder: str) -> bool:
    return (Path(folder) / "samples-00000.jsonl").is_file()


def _judge(folder: str, rows: Any, verifier: Any, options: dict[str, Any]) -> "BestOfNResult":
    from hf_coverage.decode.best_of_n import judge_best_of_n

    return judge_best_of_n(folder, rows, verifier, progress=is_main_process(), **options)


def _evaluate(model: Any, tokenizer: Any, rows: Any, verifier: Any, options: dict[str, Any]) -> "BestOfNResult":
    from hf_coverage.decode.best_of_n import evaluate_best_of_n

    return evaluate_best_of_n(model, tokenizer, rows, verifier, progress=is_main_process(), **options)


def _levels(n: list[str], k: int, *, stratified: bool) -> list[int]:
    levels = parse_n(n)
    if any(level != int(level) or level > k for level in levels):
        raise ValueError(f"`n` must be whole numbers from 1 to k = {k}, but are {', '.join(map(metric_key, levels))}.")
    if stratified and any(level != k and int(level) & (int(level) - 1) for level in levels):
        raise ValueError(
            f"`n` must be powers of 2 or k = {k}, as stratified samples count in aligned blocks, but are "
            f"{', '.join(f'{level:g}' for level in levels)}."
        )
    return [int(level) for level in levels]


def _beyond(predict: list[str]) -> list[int]:
    levels = parse_n(predict, "--predict")
    if any(level != int(level) or level >= 2**53 for level in levels):
        asked = ", ".join(f"{level:g}" for level in levels)
        raise ValueError(f"`predict` must be whole numbers that can be drawn, but are {asked}.")
    return [int(level) for level in levels]


def _check_groups(stratified: bool, wants_independent: bool, k: int, group_size: int) -> None:
    if stratified and wants_independent:
        raise ValueError("--predict and --write-prompts need independent samples, and these are stratified.")
    if group_size > max(k, 1):
        raise ValueError(f"`group_size` = {group_size} is more than the k = {k} samples of a prompt.")


def _report(
    result: "BestOfNResult",
    levels: list[int],
    profile: "CoverageProfile | None",
    folder: Path,
    farther: list[int],
    data: str,
    logged: "tuple[Dataset, dict[tuple[int, int], str], str] | None",
) -> None:
    from hf_coverage.report.card import success_eval_results, write_model_index
    from hf_coverage.report.results import success_results, write_results, write_success_samples

    require_judged(result)
    folder.mkdir(parents=True, exist_ok=True)
    prediction = None if profile is None else result.predict(profile)
    print_table(_table(result, levels, prediction))
    groups, beyond = _rl_tables(result, farther)
    for table in (groups, beyond):
        if table is not None:
            print_table(table)
    say(result.sentence, *_examples(result))
    name = _name(result, folder)
    result.to_json(folder / f"{name}.json")
    result.plot(folder / f"{name}.png", profile=profile)
    facts = {"command": running_command(), "verifier": result.verifier, "threshold": result.threshold}
    content = success_results(result, levels, config=facts | result.settings)
    content |= {
        name: _cells(table) for name, table in (("signal", groups), ("predicted", beyond)) if table is not None
    }
    path = write_results(folder, content)
    card = write_model_index(
        folder / f"{name}.model-index.yaml", result.name, success_eval_results(result, levels, data=data)
    )
    if logged is not None:
        say(f"Samples in {write_success_samples(path, result, *logged)}.")
    say(f"Entries for a model card in {card}.")
    say(f"Plot in {folder / name}.png, all rewards in {folder / name}.json, metrics in {path}.")
    say(f"Next: run the same for another model, into another `--output-dir`, and compare what {path.name} has.")


def _responses(folder: Path) -> dict[tuple[int, int], str]:
    """The texts of kept samples, by the number of the prompt and of the sample."""
    found = {}
    for shard in sorted(folder.glob("samples-*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            found[sample["prompt"], sample["sample"]] = sample["text"]
    return found


def require_judged(result: "BestOfNResult") -> None:
    """Refuse a result of which no response could be judged; RuntimeError."""
    if not result.failed.all():
        return
    error, times = next(iter(result.errors.items()))
    message = result.examples[error]["message"]
    raise RuntimeError(
        f"`verifier` {result.verifier} judged none of {result.failed.size:,} responses; most often, {times:,} times, "
        f"it {error}{f' ({message})' if message else ''}. Mend it and run the same command again."
    )


def _name(result: "BestOfNResult", folder: Path) -> str:
    """A name for files of a result that no file of another has: other samples, or another verifier of that name."""
    stem = f"best_of_n-{re.sub(r'[^0-9A-Za-z_-]', '_', result.verifier)}"[:100]
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(name for name in names if _is_free(folder / f"{name}.json", result.settings["judged"]))


def _is_free(path: Path, judged: str | None) -> bool:
    if not path.exists():
        return True
    try:
        return judged is not None and judged == json.loads(path.read_text(encoding="utf-8"))["settings"]["judged"]
    except (ValueError, KeyError, TypeError):  # damaged, or of a time before the name
        return False


def _table(result: "BestOfNResult", levels: list[int], prediction: "Prediction | None") -> Table:
    columns: list[Column | str] = ["N"]
    columns += [] if result.threshold is None else [Column("Pass@N", "higher")]
    columns += [Column("reward of Best-of-N", "higher")]
    exact = None if prediction is None else prediction.exact
    columns += [] if exact is None else ["exact Pass@N"]
    columns += [] if prediction is None else ["guaranteed reward"]
    rows: list[list[Cell]] = []
    for level in levels:
        cells: list[Cell] = [str(level)]
        cells += [] if result.threshold is None else [Interval(result.pass_at(level), *result.interval(level))]
        cells += [Interval(*result.best_of(level))]
        place = None if prediction is None else prediction.n.tolist().index(level)
        cells += [] if exact is None else [float(exact[place])]
        cells += [] if prediction is None else [float(prediction.guaranteed[place])]
        rows.append(cells)
    return Table(columns, rows, f"{result.name}, {result.num_prompts:,} prompts, judged by {result.verifier}.")


def _rl_tables(result: "BestOfNResult", farther: list[int]) -> tuple[Table | None, Table | None]:
    """What groups of samples would tell RL, and Pass@N beyond the samples; None where there is nothing to say."""
    from hf_coverage.functional.statistics import bounded_mean_interval

    if result.is_stratified:
        return None, None
    sizes = [4, 8, 16, 32]
    if result.threshold is None or not set(result.rewards.ravel().tolist()) <= {0.0, 1.0}:
        shares = [(size, result.mixed(size)) for size in sizes if size <= result.k]
        rows: list[list[Cell]] = [
            [str(size), Interval(float(share.mean()), *bounded_mean_interval(share))] for size, share in shares
        ]
        groups = Table(["group", Column("rewards differ", "higher")], rows, "Share of prompts that give RL a signal.")
    else:
        signals = [result.success.signal(size) for size in sizes]
        rows = [
            [str(one.group_size), *(Interval(*part) for part in (one.all_wrong, one.mixed, one.all_right))]
            for one in signals
        ]
        titles: list[Column | str] = ["group", "all wrong", Column("mixed", "higher"), "all right"]
        caption = "Share of prompts by what a group of samples is: RL learns from mixed ones."
        if result.k < sizes[-1]:
            caption += f" Beyond {result.k} samples, the range that they do not reject."
        groups = Table(titles, rows, caption)
    if not farther:
        return groups, None
    estimates = [(n, result.success.predict(n)) for n in farther]
    caption = f"Pass@N beyond {result.k} samples: the range that they do not reject, and a Beta law's value in it."
    rows = [[str(n), low, high, value] for n, (value, low, high) in estimates]
    return groups, Table(["N", "at least", "at most", "Beta law"], rows, caption)


def _cells(table: Table) -> dict[str, Any]:
    """A table for JSON: the rows by their first cell, each cell by the title of its column."""
    titles = [column.title if isinstance(column, Column) else column for column in table.columns]
    return {str(row[0]): dict(zip(titles[1:], row[1:], strict=True)) for row in table.rows}


def _write_prompts(result: "BestOfNResult", rows: Any, group_size: int, min_signal: float, path: Path) -> None:
    from hf_coverage.inference.files import written_whole

    kept = result.rows[result.mixed(group_size) >= min_signal]
    with written_whole(path) as part:
        if len(kept):
            rows.select(sorted(kept.tolist())).to_json(part)
        else:
            part.touch()
    say(
        f"{len(kept):,} of {result.num_prompts:,} prompts in {path}: the rewards of {group_size} samples differ with "
        f"a probability of at least {min_signal:g}."
    )


def _examples(result: "BestOfNResult") -> list[str]:
    return [
        f"The first that {name}: row {shown['row']}, sample {shown['sample']}"
        + (f" ({shown['message']})." if shown["message"] else ".")
        for name, shown in result.examples.items()
    ]
