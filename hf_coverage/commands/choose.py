"""`hf-coverage choose`: which checkpoint to take for the samples that will be drawn, and how sure that is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.inputs import leave_job
from hf_coverage.commands.options import BatchTokens, CorpusOptions, output_folder, parse_n
from hf_coverage.commands.score_folder import Measured, check_same_rows, read_measured
from hf_coverage.commands.tournament import checkpoint_of, score_checkpoints, write_winner
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.loading import ModelOptions
from hf_coverage.report.table import Cell, Column, Interval, Table

if TYPE_CHECKING:
    from hf_coverage.select.choose import Choice

__all__ = ["EXAMPLES", "choose"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage choose RUN/checkpoint-* --data corpus --samples 16 --output-dir choice --link RUN/best

hf-coverage choose scores/step-1000 scores/step-2000 --samples 1,8,64

torchrun --nproc_per_node 2 -m hf_coverage choose RUN/checkpoint-* --data corpus
"""


def choose(
    candidates: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or Hub ids; score folders as well.", metavar="CHECKPOINTS"),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", "--corpus", help="Held-out prompts and responses: folder, file or Hub id."),
    ] = None,
    samples: Annotated[
        list[str] | None,
        typer.Option(
            help="Samples that will be drawn for each prompt; several, comma-separated, for a pick each: the first "
            "decides.",
            show_default="16",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="A loss that does not matter, such as 0.01.")] = 0.0,
    output_dir: Annotated[Path, output_folder("Folder for scores, the picture, the page and the JSON.")] = Path(
        "choice"
    ),
    link: Annotated[Path | None, typer.Option(help="Symbolic link to make to the winner's folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws behind the confidences.")] = 0,
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
    batch_tokens: BatchTokens = 4096,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file of the scores: what an interruption costs.")
    ] = 1024,
) -> None:
    """Choose the checkpoint that loses least of Best-of-N with the samples that will be drawn.

    What loses is read off the data: where it has the column `reference_logprob` (0 for the one right answer) it is
    miss_N, which bounds the loss for every reward; else the score of a soft tournament, in which checkpoints are
    measured by each other. Lower is better. Says how far the pick may be from the best, which others chance explains,
    and how many more rows would decide.

    Each checkpoint is scored once, one model at a time, and its scores are kept: run the command again to go on after
    an interruption, or with one more checkpoint. Writes best_checkpoint.json, choice.json, choice.png and report.html.
    """
    from hf_coverage.select.checkpoints import distinct_names
    from hf_coverage.select.choose import check_samples

    levels = parse_n(samples or ["16"], "--samples")
    check_samples(levels)
    if not 0 <= tolerance < 1:
        raise typer.BadParameter(f"`--tolerance` must be a loss in [0, 1), but is {tolerance}.")
    sources = [candidate.rstrip("/") for candidate in candidates]
    names = distinct_names(sources)
    scoring = {"batch_tokens": batch_tokens, "shard_rows": shard_rows}
    folders = score_checkpoints(sources, names, output_dir / "scores", data, reading, loading, **scoring)
    leave_job()
    if not is_main_process():
        return
    measured = {name: read_measured(str(folder)) for name, folder in zip(names, folders)}
    check_same_rows(list(measured.values()))
    choice = _decide(measured, levels, tolerance, seed)
    tables = [_table(choice), *([_picks_table(choice)] if choice.others else [])]
    for table in tables:
        print_table(table)
    say(choice.sentence)
    places = {name: checkpoint_of(folder, measured[name].facts) for name, folder in zip(names, folders)}
    _write(output_dir, choice, measured, tables, {name: place for name, place in places.items() if place}, link)


def _decide(measured: dict[str, Measured], samples: tuple[float, ...], tolerance: float, seed: int) -> "Choice":
    from hf_coverage.select.choose import choose as decide

    reference = next(iter(measured.values())).reference
    logprobs: dict[str, Any] = {name: one.profile.logprobs for name, one in measured.items()}
    return decide(
        logprobs,
        samples,
        reference_logprobs=reference.logprob,
        groups=reference.groups,
        tolerance=tolerance,
        seed=seed,
    )


def _table(choice: "Choice") -> Table:
    columns: list[Column | str] = ["checkpoint", Column(choice.loss_name, "lower")]
    columns += [Column("cross-entropy (nats)", "lower"), "note"]
    rows: list[list[Cell]] = []
    for name in choice.ranking:
        loss: Cell = Interval(choice.losses[name], *choice.intervals[name])
        entropy = None if choice.cross_entropies is None else choice.cross_entropies[name]
        rows.append([name, loss, entropy, _note(choice, name)])
    return Table(columns, rows, "Best first, with 95 % intervals of each loss by itself; differences are surer.")


def _note(choice: "Choice", name: str) -> str:
    notes = ["the pick"] if name == choice.winner else []
    notes += ["not told from the best"] if name in choice.ties and name != choice.winner else []
    notes += ["least cross-entropy"] if name == choice.cross_entropy_choice else []
    return ", ".join(notes)


def _picks_table(choice: "Choice") -> Table:
    rows: list[list[Cell]] = [
        [metric_key(pick.samples), pick.winner, pick.loss, pick.within, len(pick.left), pick.probability_best]
        for pick in (choice.pick, *choice.others)
    ]
    columns: list[Column | str] = ["samples", "pick", "loss", "within", "left", "probability"]
    caption = (
        "The pick for each number of samples: its loss, how far from the best it is at most (95 % confidence), how "
        "many candidates are not told from the best, and the probability that the pick is the best."
    )
    return Table(columns, rows, caption)


def _write(
    folder: Path,
    choice: "Choice",
    measured: dict[str, Measured],
    tables: list[Table],
    checkpoints: dict[str, str],
    link: Path | None,
) -> None:
    from hf_coverage.commands.report import origin
    from hf_coverage.report.html import Picture, write_html_report

    folder.mkdir(parents=True, exist_ok=True)
    choice.to_json(folder / "choice.json")
    figure = choice.plot(folder / "choice.png")
    page = write_html_report(
        folder / "report.html",
        title=f"Which of {len(choice.names)} checkpoints for {metric_key(choice.samples)} samples",
        summary=[choice.sentence],
        tables=tables,
        figures=[Picture(figure, "Losses over the number of samples, the picks marked. Lower is better.")],
        kinds=list(dict.fromkeys(one.profile.kind for one in measured.values())),
        provenance=origin(list(measured.values())),
    )
    say(f"Numbers in {folder / 'choice.json'}, picture in {folder / 'choice.png'}, page in {page}.")
    write_winner(folder, choice, checkpoints, link)
