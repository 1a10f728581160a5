"""`hf-coverage best-of-n`: what k samples of a model achieve, judged by a verifier."""

import json
import re
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.inputs import check_number_of_responses, leave_job, read_dataset
from hf_coverage.commands.options import BatchSize, Seed, Split, TopK, TopP, output_folder, parse_n
from hf_coverage.commands.score_folder import read_measured
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.loading import ModelOptions, load_model, load_tokenizer, model_name
from hf_coverage.report.provenance import running_command
from hf_coverage.report.table import Cell, Column, Interval, Table

if TYPE_CHECKING:
    from hf_coverage.decode.best_of_n_result import BestOfNResult, Prediction
    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["EXAMPLES", "best_of_n", "written_folders"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage best-of-n MODEL problems.jsonl --verifier math-verify --k 64 --max-new-tokens 512 -o best_of_n

hf-coverage best-of-n MODEL corpus --k 16 --profile scores/MODEL

The samples kept in best_of_n, judged by a function of yours, without the model:

hf-coverage best-of-n best_of_n problems.jsonl --verifier rewards.py:my_reward
"""


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
    temperature: Annotated[float, typer.Option(help="Temperature; 1 is the model itself.")] = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least reward that solves a prompt; by default 1, and none for a reward model."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one response, after which its verifier is killed.")] = 10,
    answer_column: Annotated[
        str | None,
        typer.Option(help="Column of right answers; by default `answer`, or else `completion`."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Score folder of the same model and prompts: show beside it what coverage predicts."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many rows of the data, from its start.")] = None,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Responses between two writes: what an interruption costs.")
    ] = 256,
    split: Split = None,
    *,
    loading: ModelOptions,
) -> None:
    """Measure what Best-of-N achieves: sample k responses to each prompt, judge them, report every N up to k.

    Pass@N is the share of prompts that at least one of N responses solves; higher is better. Both it and the reward of
    the best of N are unbiased, with 95 % intervals over prompts. Run the command again to go on after an interruption.

    A verifier runs in a process of its own, which is killed where it hangs, and which is no sandbox: it may do what
    you may. Where it executes code that a model wrote, run the command in a container without network (`docker run
    --network none`), or let the verifier send the code to a service for it, such as E2B. `unshare -rn` takes away the
    network alone.

    Writes best_of_n-VERIFIER.json, best_of_n-VERIFIER.png and the results as JSON; another verifier of the same name
    gets -2 behind it. If no response could be judged, nothing of these is written and the exit code is 1.
    """
    from hf_coverage.decode.verifier_runner import check_timeout
    from hf_coverage.decode.verifiers import named_verifier
    from hf_coverage.inference.sampler import Sampling

    check_timeout(timeout)
    Sampling(max_new_tokens, temperature, top_k, top_p)  # what cannot be is said before a model is loaded
    *_, folder = written_folders(model, output_dir)
    rows = read_dataset(data, split, limit=limit)
    column = answer_column or ("answer" if "answer" in rows.column_names else "completion")
    chosen = named_verifier(verifier, column=column, device=loading.device)
    if threshold is None and not verifier.startswith("reward-model:"):
        threshold = 1.0
    judging = {"threshold": threshold, "timeout": timeout, "batch_size": batch_size}
    measured = None if profile is None else read_measured(profile).profile
    if _holds_samples(model):
        result = _judge(model, rows, chosen, judging)
    else:
        if n is not None:
            _levels(n, k)  # before anything is sampled
        check_number_of_responses(len(rows), k, max_new_tokens)
        sampling: dict[str, Any] = {
            "k": k,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
        }
        sampling |= {"top_p": top_p, "seed": seed, "shard_rows": shard_rows, "output_dir": folder}
        words, weights = load_tokenizer(model, loading), load_model(model, loading)
        result = _evaluate(weights, words, rows, chosen, judging | sampling | {"name": model_name(model, loading)})
    leave_job()
    if is_main_process():
        _report(result, result.levels() if n is None else _levels(n, result.k), measured, folder)


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


def _levels(n: list[str], k: int) -> list[int]:
    levels = parse_n(n)
    if any(level != int(level) or level > k for level in levels):
        raise ValueError(f"`n` must be whole numbers from 1 to k = {k}, but are {', '.join(map(metric_key, levels))}.")
    return [int(level) for level in levels]


def _report(result: "BestOfNResult", levels: list[int], profile: "CoverageProfile | None", folder: Path) -> None:
    from hf_coverage.report.results import write_results

    _require_judged(result)
    folder.mkdir(parents=True, exist_ok=True)
    prediction = None if profile is None else result.predict(profile)
    print_table(_table(result, levels, prediction))
    say(result.sentence, *_examples(result))
    name = _name(result, folder)
    result.to_json(folder / f"{name}.json")
    result.plot(folder / f"{name}.png", profile=profile)
    metrics = {f"{key},none": value for key, value in result.metrics(levels).items()}
    facts = {"command": running_command(), "verifier": result.verifier, "threshold": result.threshold}
    content: dict[str, Any] = {"results": {result.name: {"alias": result.name} | metrics}, "errors": result.errors}
    content |= {"config": facts | result.settings, "n-samples": {result.name: {"original": result.num_prompts}}}
    path = write_results(folder, content)
    say(f"Plot in {folder / name}.png, all rewards in {folder / name}.json, metrics in {path}.")


def _require_judged(result: "BestOfNResult") -> None:
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
        cells += [] if exact is None else [float(exact[level - 1])]
        cells += [] if prediction is None else [float(prediction.guaranteed[level - 1])]
        rows.append(cells)
    return Table(columns, rows, f"{result.name}, {result.num_prompts:,} prompts, judged by {result.verifier}.")


def _examples(result: "BestOfNResult") -> list[str]:
    return [
        f"The first that {name}: row {shown['row']}, sample {shown['sample']}"
        + (f" ({shown['message']})." if shown["message"] else ".")
        for name, shown in result.examples.items()
    ]
