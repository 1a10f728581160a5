"""`hf-coverage choose`: which checkpoint to take for the samples that will be drawn, and how sure that is."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hf_coverage.commands.checkpoint_scores import CheckpointScores, kept_scores
from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.follow import RunFolder, step_of
from hf_coverage.commands.inputs import decided_by_main_process, leave_job
from hf_coverage.commands.options import BatchTokens, CorpusOptions, Stratified, output_folder, parse_n
from hf_coverage.commands.score_folder import Measured, on_same_rows, read_measured, require_intervals
from hf_coverage.commands.tournament import checkpoint_of, write_winner
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

hf-coverage choose RUN/checkpoint-* --data answers.jsonl --samples 8 --stratified

hf-coverage choose RUN/checkpoint-* --data corpus --adaptive --tolerance 0.005

hf-coverage choose RUN --follow --data corpus --until 5000

torchrun --nproc_per_node 2 -m hf_coverage choose RUN/checkpoint-* --data corpus
"""

_FOLLOW = "Following a run"


def choose(
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders or Hub ids; score folders as well. With --follow, the folder of one run.",
            metavar="CHECKPOINTS",
        ),
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
    stratified: Stratified = False,
    tolerance: Annotated[float, typer.Option(help="A loss that does not matter, such as 0.01.")] = 0.0,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive",
            help="Score on 64, 128, 256, ... prompts, and drop on the way what is shown not to be the best. Needs "
            "`reference_logprob`.",
        ),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Wait for new checkpoints of a run, score each once, and choose anew after each; Ctrl-C ends it.",
            rich_help_panel=_FOLLOW,
        ),
    ] = False,
    until: Annotated[
        int | None,
        typer.Option(help="End when a checkpoint of this step, or a later one, is scored.", rich_help_panel=_FOLLOW),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            help="Seconds between two looks; a checkpoint that is the same at two is taken to be written.",
            rich_help_panel=_FOLLOW,
        ),
    ] = 10.0,
    output_dir: Annotated[Path, output_folder("Folder for scores, the picture, the page and the JSON.")] = Path(
        "choice"
    ),
    link: Annotated[Path | None, typer.Option(help="Symbolic link to make to the winner's folder.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the draws behind the confidences, and of the order of the prompts.")
    ] = 0,
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
    and how many more rows would decide. With --stratified it is the exact 1 - Pass@N of stratified samples of the one
    right answer, beside that of independent ones, for which another checkpoint may be best.

    Each checkpoint is scored once, one model at a time, and its scores are kept: run the command again to go on after
    an interruption, or with one more checkpoint. With --adaptive those that are behind are scored on few prompts only;
    what was scored is as good for every other command, and without --adaptive the rest of it is scored as well.

    With --follow it waits for the checkpoints of a run that is going on, and says when coverage turns: when miss_N
    gets worse while cross-entropy improves. Scores of checkpoints that the run deletes stay.

    Writes best_checkpoint.json, choice.json, choice.png and report.html.
    """
    from hf_coverage.select.checkpoints import distinct_names
    from hf_coverage.select.choose import check_samples

    levels = parse_n(samples or ["16"], "--samples")
    check_samples(levels)
    if not 0 <= tolerance < 1:
        raise typer.BadParameter(f"`--tolerance` must be a loss in [0, 1), but is {tolerance}.")
    if follow and (adaptive or len(candidates) > 1 or data is None):
        raise typer.BadParameter("`--follow` takes the folder of one run, needs `--data`, and is not `--adaptive`.")
    if until is not None and not follow:
        raise typer.BadParameter("`--until` says when `--follow` is to end: give both or none.")
    if stratified and (adaptive or follow):
        raise typer.BadParameter("`--stratified` is for whole score tables: leave out `--adaptive` and `--follow`.")
    sources = [candidate.rstrip("/") for candidate in candidates]
    scoring: dict[str, Any] = {"batch_tokens": batch_tokens, "shard_rows": shard_rows}
    scoring |= {"intervals": True} if stratified else {}
    settings = _Settings(levels, tolerance, seed, output_dir, link)
    opened = partial(CheckpointScores, scores=output_dir / "scores", data=data, reading=reading, loading=loading)
    opened = partial(opened, **scoring)
    if follow:
        _follow(Path(sources[0]), opened, settings, until, interval, loading.device)
        return
    names = distinct_names(sources)
    scores = opened(sources, names)
    choice = _decide_adaptively(scores, names, settings) if adaptive else None
    folders = scores.folders if adaptive else scores.score_all()
    leave_job()
    if not is_main_process():
        return
    read = [read_measured(str(folder), announce=not adaptive) for folder in folders]
    measured = dict(zip(names, read if adaptive else on_same_rows(read)))
    independent = None
    if stratified:
        require_intervals(list(measured.values()))
        independent = _decide(measured, settings)
    choice = choice or _decide(measured, settings, stratified=stratified)
    tables = _tables(choice, independent)
    for table in tables:
        print_table(table)
    say(choice.sentence)
    every = {name: checkpoint_of(folder, measured[name].facts) for name, folder in zip(names, folders)}
    places = {name: place for name, place in every.items() if place}
    _write(settings, choice, measured, places, tables)


class _Settings(NamedTuple):
    samples: tuple[float, ...]
    tolerance: float
    seed: int
    output_dir: Path
    link: Path | None


def _follow(
    run: Path,
    opened: Callable[[list[str], list[str]], CheckpointScores],
    settings: _Settings,
    until: int | None,
    interval: float,
    device: str | None,
) -> None:
    """Score the checkpoints of a run as they come, and choose anew after each."""
    watched = RunFolder(run)
    done = decided_by_main_process(partial(kept_scores, settings.output_dir / "scores", run), device)
    turned = None
    say(f"Following {run}: each checkpoint is scored when its files have stopped changing. Ctrl-C ends it.")
    try:
        new = list(done)
        while True:
            if new:
                turned = _choose_so_far(run, done, settings, turned)
            if until is not None and any((step_of(name) or 0) >= until for name in done):
                break
            new = []
            for path in decided_by_main_process(partial(watched.settled, list(done)), device):
                folder = _scored(path, opened)
                if folder is None:
                    watched.refuse(path)
                    continue
                done[path.name] = folder
                new.append(path.name)
                break
            if not new:
                time.sleep(interval)
    except KeyboardInterrupt:
        say(f"Stopped following {run} after {len(done)} checkpoints. Run the same command again to go on.")
        raise typer.Exit(130) from None
    leave_job()


def _scored(path: Path, opened: Callable[[list[str], list[str]], CheckpointScores]) -> Path | None:
    """The score folder of a checkpoint; None for one that cannot be loaded: it is half-written, or gone."""
    scores = opened([str(path)], [path.name])
    try:
        scores.load(0)
    except (OSError, ValueError) as error:
        if path.is_dir():
            say(f"{path.name} cannot be loaded yet, and is waited for until its files change: {error}")
        return None
    return scores.score_all()[0]


def _choose_so_far(run: Path, done: dict[str, Path], settings: _Settings, turned: int | None) -> int | None:
    """Choose among what is scored, write the choice, and say what is new; the step at which coverage has turned."""
    if not is_main_process():
        return None
    names = sorted(done, key=lambda name: (step_of(name) or 0, name))
    measured = dict(zip(names, on_same_rows([read_measured(str(done[name])) for name in names])))
    choice = _decide(measured, settings)
    turn = _turn(measured, settings.samples[0], run)
    say(f"{len(names)} checkpoints, the last {names[-1]}. {choice.sentence}")
    if turn is not None and turn[0] != turned:
        say(turn[1])
    there = {name: str(run / name) for name in names if (run / name).is_dir()}
    _write(settings, choice, measured, there, _tables(choice), *([turn[1]] if turn else []))
    return None if turn is None else turn[0]


def _turn(measured: dict[str, Measured], n: float, run: Path) -> tuple[int, str] | None:
    """The step at which coverage was seen to have turned, and the sentence on it; None if it was not."""
    from hf_coverage.functional.coverage_watch import WatchState, update_watch
    from hf_coverage.measure.callback import worsening_message

    state, names = WatchState(), {step_of(name) or 0: name for name in measured}
    for step, name in names.items():
        profile = measured[name].profile
        state, worsening = update_watch(
            state,
            step=step,
            log_ratios=profile.log_ratios,
            cross_entropy=profile.cross_entropy,
            n=n,
            groups=profile.groups,
        )
        if worsening is not None:
            folder = run / names[worsening.best.step]
            where = str(folder) if folder.is_dir() else "which the run has deleted"
            return step, worsening_message(where, step, profile, n, worsening)
    return None


def _decide(measured: dict[str, Measured], settings: _Settings, *, stratified: bool = False) -> "Choice":
    from hf_coverage.select.choose import choose as decide

    reference = next(iter(measured.values())).reference
    logprobs: dict[str, Any] = {name: one.profile.logprobs for name, one in measured.items()}
    lows: dict[str, Any] = {name: one.profile.interval_lows for name, one in measured.items()}
    return decide(
        logprobs,
        settings.samples,
        reference_logprobs=reference.logprob,
        groups=reference.groups,
        interval_lows=lows if stratified else None,
        tolerance=settings.tolerance,
        seed=settings.seed,
    )


def _decide_adaptively(scores: CheckpointScores, names: list[str], settings: _Settings) -> "Choice":
    from hf_coverage.select.choose import choose as decide

    reference = scores.reference
    if reference.logprob is None:
        raise ValueError(
            "`--adaptive` needs a corpus with `reference_logprob` (0 for the one right answer): without it "
            "checkpoints are measured by each other, and dropping one would change what the others lose. Leave it out."
        )
    return decide(
        {name: partial(scores.logprobs, place) for place, name in enumerate(names)},
        settings.samples,
        reference_logprobs=reference.logprob,
        groups=reference.groups,
        tolerance=settings.tolerance,
        adaptive=True,
        seed=settings.seed,
    )


def _tables(choice: "Choice", independent: "Choice | None" = None) -> list[Table]:
    return [_table(choice, independent), *([_picks_table(choice)] if choice.others else [])]


def _table(choice: "Choice", independent: "Choice | None") -> Table:
    """The candidates' losses; of stratified samples beside those of independent ones."""
    columns: list[Column | str] = ["checkpoint", Column(choice.loss_name, "lower")]
    columns += [] if independent is None else [Column("of independent ones", "lower")]
    columns += [Column("cross-entropy (nats)", "lower"), *(["rows"] if choice.dropped else []), "note"]
    rows: list[list[Cell]] = []
    for name in choice.ranking:
        loss: Cell = Interval(choice.losses[name], *choice.intervals[name])
        entropy = None if choice.cross_entropies is None else choice.cross_entropies[name]
        scored: list[Cell] = [choice.scored_rows[name]] if choice.dropped else []
        beside: list[Cell] = []
        if independent is not None:
            beside = [Interval(independent.losses[name], *independent.intervals[name])]
        rows.append([name, loss, *beside, entropy, *scored, _note(choice, name, independent)])
    caption = "Best first, with 95 % intervals of each loss by itself; differences are surer."
    if choice.dropped:
        caption += (
            " What was dropped on the way was scored on few rows; its loss is the pick's and the mean difference from "
            "it on these, rather too much."
        )
    return Table(columns, rows, caption)


def _note(choice: "Choice", name: str, independent: "Choice | None") -> str:
    notes = ["the pick"] if name == choice.winner else []
    notes += ["not told from the best"] if name in choice.ties and name != choice.winner else []
    notes += ["best with independent samples"] if independent is not None and name == independent.winner else []
    notes += ["dropped"] if name in choice.dropped else []
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
    settings: _Settings,
    choice: "Choice",
    measured: dict[str, Measured],
    checkpoints: dict[str, str],
    tables: list[Table],
    *remarks: str,
) -> None:
    from hf_coverage.commands.report import origin
    from hf_coverage.report.html import write_html_report

    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    choice.to_json(folder / "choice.json")
    choice.plot(folder / "choice.png")
    page = write_html_report(
        folder / "report.html",
        title=f"Which of {len(choice.names)} checkpoints for {metric_key(choice.samples)} samples",
        summary=[choice.sentence, *remarks],
        tables=tables,
        profiles=[one.profile for one in measured.values()],
        choice=choice,
        kinds=list(dict.fromkeys(one.profile.kind for one in measured.values())),
        provenance=origin(list(measured.values())),
    )
    say(f"Numbers in {folder / 'choice.json'}, picture in {folder / 'choice.png'}, page in {page}.")
    write_winner(folder, choice, checkpoints, settings.link)
