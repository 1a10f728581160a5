"""`hf-coverage choose`: which checkpoint to take for the samples that will be drawn, and how sure that is."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hf_coverage.commands.best_of_n import require_judged
from hf_coverage.commands.checkpoint_samples import CheckpointSamples, JudgingOptions, holds_samples, known_samples
from hf_coverage.commands.checkpoint_scores import CheckpointScores, kept_scores
from hf_coverage.commands.console import is_main_process, print_table, say
from hf_coverage.commands.follow import RunFolder, step_of
from hf_coverage.commands.inputs import answer_column, decided_by_main_process, leave_job, read_responses
from hf_coverage.commands.options import (
    BatchTokens,
    CorpusOptions,
    Revisions,
    Stratified,
    output_folder,
    parse_n,
    refuse_at_server,
)
from hf_coverage.commands.score_folder import Measured, on_same_rows, read_measured, require_intervals
from hf_coverage.commands.suites import candidate_sources
from hf_coverage.commands.tournament import checkpoint_of, say_next_with_winner, write_winner
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.loading import ServedOptions
from hf_coverage.report.provenance import provenance
from hf_coverage.report.table import Cell, Column, Interval, Table

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_coverage.decode.best_of_n_result import BestOfNResult
    from hf_coverage.functional.checks import ReferenceKind
    from hf_coverage.measure.profile import CoverageProfile
    from hf_coverage.select.choose import Choice

__all__ = ["EXAMPLES", "choose"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage choose RUN/checkpoint-* --data corpus --samples 16 --output-dir choice --link RUN/best

hf-coverage choose scores/step-1000 scores/step-2000 --samples 1,8,64

hf-coverage choose RUN/checkpoint-* --data answers.jsonl --samples 8 --stratified

hf-coverage choose RUN/checkpoint-* --data problems.jsonl --verifier math-verify --k 32 --samples 8

Where to start RL with groups of 8 from:

hf-coverage choose RUN/checkpoint-* --data problems.jsonl --verifier math-verify --for rl --group-size 8

hf-coverage choose RUN/checkpoint-* --data corpus --adaptive --tolerance 0.005

hf-coverage choose EleutherAI/pythia-160m --revisions 'step*000' --data corpus

hf-coverage choose RUN --follow --data corpus --until 5000

torchrun --nproc_per_node 2 -m hf_coverage choose RUN/checkpoint-* --data corpus
"""

_FOLLOW = "Following a run"
_OF_GROUPS = "8"
_CAPTION = "Losses over the number of samples, the picks marked. Lower is better."


class Purpose(str, Enum):
    """What samples are drawn for."""

    best_of_n = "best-of-n"
    rl = "rl"


def choose(
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders, Hub ids, ID@REVISION; score folders too, or with --verifier folders of samples. "
            "With --follow, the folder of one run.",
            metavar="CHECKPOINTS",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", "--corpus", help="Held-out prompts and responses: folder, file or Hub id."),
    ] = None,
    revisions: Revisions = None,
    samples: Annotated[
        list[str] | None,
        typer.Option(
            help="Samples that will be drawn for each prompt; several, comma-separated, for a pick each: the first "
            "decides.",
            show_default="16",
        ),
    ] = None,
    purpose: Annotated[
        Purpose,
        typer.Option(
            "--for",
            help="What samples are drawn for: `rl` chooses by the signal that groups of them give, and needs a "
            "--verifier.",
        ),
    ] = Purpose.best_of_n,
    group_size: Annotated[
        list[str] | None,
        typer.Option(
            help="Samples of a prompt that RL compares, with --for rl; several, comma-separated, for a pick each.",
            show_default=_OF_GROUPS,
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
        int,
        typer.Option(min=0, help="Seed of the draws behind the confidences, of the order of the prompts, of samples."),
    ] = 0,
    *,
    judging: JudgingOptions,
    reading: CorpusOptions,
    loading: ServedOptions,
    batch_tokens: BatchTokens = 4096,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file of the scores, or of samples: what an interruption costs.")
    ] = 1024,
) -> None:
    """Choose the checkpoint that loses least of Best-of-N with the samples that will be drawn.

    What loses is read off the data: where it has the column `reference_logprob` (0 for the one right answer) it is
    miss_N, which bounds the loss for every reward; else the score of a soft tournament, in which checkpoints are
    measured by each other. Lower is better. Says how far the pick may be from the best, which others chance explains,
    and how many more rows would decide. With --stratified it is the exact 1 - Pass@N of stratified samples of the one
    right answer, beside that of independent ones, for which another checkpoint may be best.

    With --verifier each checkpoint writes k responses to every prompt, and what loses is 1 - Pass@N without bias, N up
    to k; with --for rl it is the share of prompts whose group of samples gets one reward for all, from which RL that
    compares the rewards of a group learns nothing. That says whether RL begins to learn, and not where it ends. With
    --stratified the samples are stratified ones.

    Each checkpoint is scored once, one model at a time, and its scores are kept: run the command again to go on after
    an interruption, or with one more checkpoint. With --adaptive those that are behind are scored on few prompts only;
    what was scored is as good for every other command, and without --adaptive the rest of it is scored as well.

    With --follow it waits for the checkpoints of a run that is going on, and says when coverage turns: when miss_N
    gets worse while cross-entropy improves. Scores of checkpoints that the run deletes stay.

    Writes best_checkpoint.json, choice.json, choice.png and report.html.
    """
    from hf_coverage.select.checkpoints import distinct_names
    from hf_coverage.select.choose import check_samples

    refuse_at_server(loading, stratified=stratified, follow=follow, revisions=revisions is not None)
    levels = _levels(samples, group_size, purpose, judging)
    check_samples(levels)
    judging.check()
    if not 0 <= tolerance < 1:
        raise typer.BadParameter(f"`--tolerance` must be a loss in [0, 1), but is {tolerance}.")
    if follow and (adaptive or len(candidates) > 1 or data is None or revisions is not None):
        raise typer.BadParameter("`--follow` takes the folder of one run, needs `--data`, and is not `--adaptive`.")
    if until is not None and not follow:
        raise typer.BadParameter("`--until` says when `--follow` is to end: give both or none.")
    if stratified and judging.verifier is None and (adaptive or follow):
        raise typer.BadParameter("`--stratified` is for whole score tables: leave out `--adaptive` and `--follow`.")
    sources = candidate_sources(candidates, revisions, loading.device)
    settings = _Settings(levels, tolerance, seed, output_dir, link)
    if judging.verifier is not None:
        _check_judged(levels, judging.k, data, stratified, adaptive, reading)
        if stratified and purpose is Purpose.rl:
            raise typer.BadParameter("`--for rl` is of independent samples: leave out `--stratified`.")
        if judging.solving is None and purpose is Purpose.best_of_n:
            raise typer.BadParameter("Pass@N needs a `--threshold`: the least reward that solves a prompt.")
        rows = read_responses(str(data), reading, pairs=False)
        group_by = reading.group_by or ("document" if "document" in rows.column_names else "prompt")
        if group_by not in rows.column_names:
            raise ValueError(f"`--group-by` must be a column of the data, {rows.column_names}, but is {group_by!r}.")
        drawing: dict[str, Any] = {"seed": seed, "sampling": "stratified" if stratified else "independent"}
        answers = answer_column(rows, judging.verifier, reading)
        drawn = partial(CheckpointSamples, samples=output_dir / "samples", rows=rows, answers=answers, options=judging)
        drawn = partial(drawn, loading=loading, shard_rows=shard_rows, **drawing)
        report = partial(_report_judged, rows=rows, group_by=group_by, purpose=purpose, settings=settings)
        if follow:
            run = Path(sources[0])
            known = partial(known_samples, output_dir / "samples", run, judging.sampling() | drawing)
            anew = partial(_choose_judged_so_far, run, drawn, report)
            _follow(run, known, partial(_sampled, opened=drawn), anew, until, interval, loading.device)
            return
        names = distinct_names(sources)
        results = drawn(sources, names).judge_all()
        leave_job()
        if is_main_process():
            report(results, {name: source for name, source in zip(names, sources) if not holds_samples(source)})
        return
    scoring: dict[str, Any] = {"batch_tokens": batch_tokens, "shard_rows": shard_rows}
    scoring |= {"intervals": True} if stratified else {}
    opened = partial(CheckpointScores, scores=output_dir / "scores", data=data, reading=reading, loading=loading)
    opened = partial(opened, **scoring)
    if follow:
        run = Path(sources[0])
        known, anew = partial(kept_scores, output_dir / "scores", run), partial(_choose_so_far, run, settings)
        _follow(run, known, partial(_scored, opened=opened), anew, until, interval, loading.device)
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
    _write(settings, choice, places, tables, **_origin(measured))
    say_next_with_winner(choice.ranking, places)


class _Settings(NamedTuple):
    samples: tuple[float, ...]
    tolerance: float
    seed: int
    output_dir: Path
    link: Path | None


def _levels(
    samples: list[str] | None, group_size: list[str] | None, purpose: Purpose, judging: JudgingOptions
) -> tuple[float, ...]:
    """The numbers of samples to choose for."""
    if purpose is not Purpose.rl:
        if group_size is not None:
            raise typer.BadParameter("`--group-size` is of RL: give `--for rl` too, or `--samples` instead.")
        return parse_n(samples or ["16"], "--samples")
    if samples is not None:
        raise typer.BadParameter("`--samples` are of Best-of-N: with `--for rl` give `--group-size`.")
    if judging.verifier is None:
        raise typer.BadParameter("`--for rl` chooses by rewards of samples: give a `--verifier` too.")
    levels = parse_n(group_size or [_OF_GROUPS], "--group-size")
    if min(levels) < 2:
        raise typer.BadParameter("`--group-size` must be at least 2: RL compares the samples of a group.")
    return levels


def _check_judged(
    levels: Sequence[float], k: int, data: str | None, stratified: bool, adaptive: bool, reading: CorpusOptions
) -> None:
    """Refuse, before anything is sampled, what `--verifier` cannot be asked."""
    if data is None:
        raise typer.BadParameter("`--verifier` needs `--data`: the prompts, and what the verifier reads.")
    if adaptive:
        raise typer.BadParameter(
            "`--adaptive` is of scores: with `--verifier` every checkpoint answers every prompt. Leave out either."
        )
    if reading.append_eos:
        raise typer.BadParameter("`--append-eos` is of responses that are scored: leave it out with `--verifier`.")
    beyond = [level for level in levels if level != int(level) or level > k]
    if beyond:
        raise typer.BadParameter(
            f"`--samples` and `--group-size` must be whole numbers up to `--k` {k}, the samples that are judged, but "
            f"there is {metric_key(beyond[0])}: draw more, or choose for fewer."
        )
    if stratified and any(level != k and int(level) & (int(level) - 1) for level in levels):
        raise typer.BadParameter("`--samples` must be powers of 2 or `--k`: stratified samples count in whole blocks.")


def _report_judged(
    results: "Mapping[str, BestOfNResult]",
    checkpoints: dict[str, str],
    rows: "Dataset",
    group_by: str,
    purpose: Purpose,
    settings: _Settings,
) -> None:
    """Choose by what a verifier says of samples, and write the choice."""
    from hf_coverage.select.choose import choose as decide

    for result in results.values():
        require_judged(result)
    places = next(iter(results.values())).rows.tolist()
    choice = decide(
        results,
        settings.samples,
        purpose=purpose.value,
        groups=rows.select(places)[group_by][:],
        tolerance=settings.tolerance,
        seed=settings.seed,
    )
    tables = _tables(choice)
    for table in tables:
        print_table(table)
    failures = [result.sentence for result in results.values() if result.errors]
    say(choice.sentence, *failures)
    _write(settings, choice, checkpoints, tables, *failures, provenance=_drawn_from(results))


def _drawn_from(results: "Mapping[str, BestOfNResult]") -> dict[str, object]:
    """Where the verdicts come from, one line a fact."""
    first = next(iter(results.values()))
    facts = {name: value for name, value in first.settings.items() if name != "judged" and value not in (None, [], ())}
    return provenance(verifier=first.verifier, threshold=first.threshold, **facts)


def _follow(
    run: Path,
    known: Callable[[], dict[str, Path]],
    take: Callable[[Path], Path | None],
    choose_anew: Callable[[dict[str, Path], int | None], int | None],
    until: int | None,
    interval: float,
    device: str | None,
) -> None:
    """Score the checkpoints of a run as they come, and choose anew after each."""
    watched = RunFolder(run)
    done = decided_by_main_process(known, device)
    turned = None
    say(f"Following {run}: each checkpoint is scored when its files have stopped changing. Ctrl-C ends it.")
    try:
        new = list(done)
        while True:
            if new:
                turned = choose_anew(done, turned)
            if until is not None and any((step_of(name) or 0) >= until for name in done):
                break
            new = []
            for path in decided_by_main_process(partial(watched.settled, list(done)), device):
                folder = take(path)
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
    return scores.score_all()[0] if _loads(scores, path) else None


def _sampled(path: Path, opened: Callable[[list[str], list[str]], CheckpointSamples]) -> Path | None:
    """As `_scored`, the folder of its samples."""
    samples = opened([str(path)], [path.name])
    if not _loads(samples, path):
        return None
    samples.judge_all()
    return samples.folders[0]


def _loads(opened: CheckpointScores | CheckpointSamples, path: Path) -> bool:
    try:
        opened.load(0)
    except (OSError, ValueError) as error:
        if path.is_dir():
            say(f"{path.name} cannot be loaded yet, and is waited for until its files change: {error}")
        return False
    return True


def _choose_judged_so_far(
    run: Path,
    opened: Callable[[list[str], list[str]], CheckpointSamples],
    report: Callable[[Any, dict[str, str]], None],
    done: dict[str, Path],
    turned: int | None,
) -> int | None:
    """As `_choose_so_far`, by verdicts, which say nothing of a turn."""
    names = _by_step(done)
    results = opened([str(done[name]) for name in names], names).judge_all()
    if is_main_process():
        say(f"{len(names)} checkpoints, the last {names[-1]}.")
        report(results, {name: str(run / name) for name in names if (run / name).is_dir()})
    return turned


def _by_step(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (step_of(name) or 0, name))


def _choose_so_far(run: Path, settings: _Settings, done: dict[str, Path], turned: int | None) -> int | None:
    """Choose among what is scored, write the choice, and say what is new; the step at which coverage has turned."""
    if not is_main_process():
        return None
    names = _by_step(done)
    measured = dict(zip(names, on_same_rows([read_measured(str(done[name])) for name in names])))
    choice = _decide(measured, settings)
    turn = _turn(measured, settings.samples[0], run)
    say(f"{len(names)} checkpoints, the last {names[-1]}. {choice.sentence}")
    if turn is not None and turn[0] != turned:
        say(turn[1])
    there = {name: str(run / name) for name in names if (run / name).is_dir()}
    said = {"turn": None if turn is None else {"step": turn[0], "sentence": turn[1]}}
    _write(settings, choice, there, _tables(choice), *([turn[1]] if turn else []), facts=said, **_origin(measured))
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
    columns += [] if choice.cross_entropies is None else [Column("cross-entropy (nats)", "lower")]
    columns += [*(["rows"] if choice.dropped else []), "note"]
    rows: list[list[Cell]] = []
    for name in choice.ranking:
        loss: Cell = Interval(choice.losses[name], *choice.intervals[name])
        entropy: list[Cell] = [] if choice.cross_entropies is None else [choice.cross_entropies[name]]
        scored: list[Cell] = [choice.scored_rows[name]] if choice.dropped else []
        beside: list[Cell] = []
        if independent is not None:
            beside = [Interval(independent.losses[name], *independent.intervals[name])]
        rows.append([name, loss, *beside, *entropy, *scored, _note(choice, name, independent)])
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
    checkpoints: dict[str, str],
    tables: list[Table],
    *remarks: str,
    profiles: "Sequence[CoverageProfile]" = (),
    kinds: "Sequence[ReferenceKind]" = (),
    provenance: Mapping[str, object],
    facts: Mapping[str, object] | None = None,
) -> None:
    from hf_coverage.inference.files import strict_json
    from hf_coverage.report.html import Picture, write_html_report

    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    strict_json(json.loads(choice.to_json()) | dict(facts or {}), folder / "choice.json")
    figure = choice.plot(folder / "choice.png")
    page = write_html_report(
        folder / "report.html",
        title=_title(choice),
        summary=[choice.sentence, *remarks],
        tables=tables,
        figures=[] if profiles else [Picture(figure, _CAPTION)],
        profiles=profiles,
        choice=choice if profiles else None,
        kinds=kinds,
        budget=False,
        provenance=provenance,
    )
    say(f"Numbers in {folder / 'choice.json'}, picture in {folder / 'choice.png'}, page in {page}.")
    write_winner(folder, choice, checkpoints, settings.link)


def _title(choice: "Choice") -> str:
    of = f"Which of {len(choice.names)} checkpoints"
    if choice.rule == "signal":
        return f"{of} to start RL from, with groups of {metric_key(choice.samples)}"
    return f"{of} for {metric_key(choice.samples)} samples"


def _origin(measured: dict[str, Measured]) -> dict[str, Any]:
    """What the page says of scores: the profiles, of what kind the corpus is, and where they came from."""
    from hf_coverage.commands.report import origin

    ones = list(measured.values())
    profiles = [one.profile for one in ones]
    kinds = list(dict.fromkeys(profile.kind for profile in profiles))
    return {"profiles": profiles, "kinds": kinds, "provenance": origin(ones)}
