"""`hf-coverage tournament`: which of several checkpoints covers best."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hf_coverage.commands.checkpoint_scores import CheckpointScores
from hf_coverage.commands.console import is_main_process, print_table, say, say_next
from hf_coverage.commands.inputs import leave_job
from hf_coverage.commands.on_policy import Generations, offset_arguments
from hf_coverage.commands.options import (
    BatchTokens,
    CorpusOptions,
    Revisions,
    output_folder,
    parse_n,
    refuse_at_server,
)
from hf_coverage.commands.score_folder import on_same_rows, read_measured
from hf_coverage.commands.suites import candidate_sources
from hf_coverage.functional.checks import check_n, metric_key
from hf_coverage.inference.loading import ServedOptions
from hf_coverage.report.table import Cell, Column, Table

if TYPE_CHECKING:
    from hf_coverage.select.choose import Choice
    from hf_coverage.select.result import TournamentResult

__all__ = ["EXAMPLES", "checkpoint_of", "tournament", "write_winner"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage tournament RUN/checkpoint-* --data corpus --n 16 --output-dir tournament --link RUN/best

hf-coverage tournament scores/step-1000 scores/step-2000 --n 8 --sweep 2,4,16

hf-coverage tournament RUN_1/tournament/step-* RUN_2/tournament/step-*

hf-coverage tournament RUN/checkpoint-* --data corpus --n 16 --on-policy --generations 2000

torchrun --nproc_per_node 2 -m hf_coverage tournament RUN/checkpoint-* --data corpus -n 16
"""

_OFFSET = "Offset tournament"


class _Contender(NamedTuple):
    """A candidate's log p `(R,)`, the groups of all rows, and, where they can be known, its Cov_N and its model."""

    logprobs: Any
    groups: Any
    coverage: float | None
    checkpoint: str | None


def tournament(
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders, Hub ids, ID@REVISION; score folders, and what TournamentCallback kept.",
            metavar="CHECKPOINTS",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", "--corpus", help="Held-out prompts and responses: folder, file or Hub id."),
    ] = None,
    revisions: Revisions = None,
    n: Annotated[
        float, typer.Option("--n", "-n", help="N of the challenges, a real number; the larger, the rarer they are.")
    ] = 16,
    soft: Annotated[
        bool, typer.Option("--soft", help="Challenge without an edge: no ties, and better picks in our experiments.")
    ] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(help="More N to report, comma-separated, in the same pass.")
    ] = None,
    output_dir: Annotated[Path, output_folder("Folder for scores, the heat map and the JSON.")] = Path("tournament"),
    link: Annotated[Path | None, typer.Option(help="Symbolic link to make to the winner's folder.")] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How often to draw the prompts anew for win rates.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    race: Annotated[
        float | None,
        typer.Option(help="Drop hopeless candidates early, with this confidence, such as 0.99; for hundreds of them."),
    ] = None,
    on_policy: Annotated[
        bool,
        typer.Option(
            "--on-policy",
            help="Hold the offset tournament: each checkpoint writes responses as well, scored under all.",
            rich_help_panel=_OFFSET,
        ),
    ] = False,
    gamma: Annotated[
        float, typer.Option(help="Weight g of the offset; the theorem asks for N >= 8 g^2.", rich_help_panel=_OFFSET)
    ] = 1.0,
    generations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Responses of each checkpoint, to rows drawn at random; by default one to every row.",
            rich_help_panel=_OFFSET,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of them; by default those of the data's longest response.",
            rich_help_panel=_OFFSET,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses written at once.", rich_help_panel=_OFFSET)] = 16,
    stratified: Annotated[
        bool,
        typer.Option(
            "--stratified",
            help="Spread the responses to a prompt that comes several times over what the checkpoint may say.",
            rich_help_panel=_OFFSET,
        ),
    ] = False,
    *,
    reading: CorpusOptions,
    loading: ServedOptions,
    batch_tokens: BatchTokens = 4096,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file of the scores: what an interruption costs.")
    ] = 1024,
) -> None:
    """Choose the checkpoint with the best coverage, by a tournament that needs no density of the data.

    Each checkpoint is scored once, one model at a time, and its scores are kept: run the command again to go on after
    an interruption, or with one more checkpoint, and only what is new is scored. In the tournament, a checkpoint's
    score is the largest share of responses that another one makes at least N times as likely; lower is better.
    With --on-policy, 2 g times the share that this other one has among the checkpoint's own responses is taken off,
    which helps against another one that stakes all on few responses, and is no better in general.

    Writes best_checkpoint.json, tournament.json and tournament.png.
    """
    from hf_coverage.select.checkpoints import distinct_names

    refuse_at_server(loading, stratified=stratified)
    if soft and (on_policy or race is not None):
        raise typer.BadParameter("`--soft` has neither an offset nor a race: leave `--on-policy` and `--race` out.")
    if on_policy and race is not None:
        raise typer.BadParameter("`--race` is for the simple tournament: leave it or `--on-policy` out.")
    if stratified and not on_policy:
        raise typer.BadParameter("`--stratified` is of what `--on-policy` lets be written: give both, or neither.")
    if not gamma > 0:
        raise typer.BadParameter(f"`--gamma` must be positive, but is {gamma}.")
    check_n(n)
    if race is not None and not 0 < race < 1:
        raise typer.BadParameter(f"`--race` must lie strictly between 0 and 1, for example 0.99, but is {race}.")
    more = parse_n(sweep, "--sweep") if sweep else ()
    sources = candidate_sources(candidates, revisions, loading.device)
    names = distinct_names(sources)
    scoring = {"batch_tokens": batch_tokens, "shard_rows": shard_rows}
    offset: dict[str, Any] = {"edge": "soft"} if soft else {}
    if on_policy:
        asked = Generations(generations, max_new_tokens, batch_size, seed, stratified)
        folder = output_dir / "on_policy"
        offset = offset_arguments(sources, names, folder, data, asked, reading, loading, **scoring)
        offset["gamma"] = gamma
    folders = CheckpointScores(sources, names, output_dir / "scores", data, reading, loading, **scoring).score_all()
    leave_job()
    if not is_main_process():
        return
    measured = _read(dict(zip(names, folders)), n)
    result = _hold(measured, n, more, bootstrap=bootstrap, seed=seed, race_confidence=race, **offset)
    print_table(_table(result, measured))
    if result.sweep:
        print_table(_sweep_table(result))
    say(result.sentence, result.guarantee())
    places = {name: one.checkpoint for name, one in measured.items() if one.checkpoint}
    _write(output_dir, result, places, link)
    say_next_with_winner(result.ranking, places)


def _read(folders: dict[str, Path], n: float) -> dict[str, _Contender]:
    """The candidates' scores, after checking that they are of the same rows."""
    read = on_same_rows([read_measured(str(folder)) for folder in folders.values()])
    return {
        name: _Contender(
            logprobs=one.profile.logprobs,
            groups=one.reference.groups,
            coverage=None if one.profile.is_upper_bound else one.profile.cov(n),
            checkpoint=checkpoint_of(folder, one.facts),
        )
        for (name, folder), one in zip(folders.items(), read)
    }


def checkpoint_of(folder: Path, facts: dict[str, Any]) -> str | None:
    """Where the model of a score folder is; None for a step of a training that was evaluated and not saved."""
    if "checkpoint" not in facts:
        return str(facts.get("model", folder))
    path = Path(os.path.normpath(folder / facts["checkpoint"]))
    return str(path) if path.is_dir() else None


def _hold(measured: dict[str, _Contender], n: float, sweep: tuple[float, ...], **options: Any) -> "TournamentResult":
    from hf_coverage.select.tournament import tournament as hold

    groups = next(iter(measured.values())).groups
    logprobs = {name: one.logprobs for name, one in measured.items()}
    return hold(logprobs, n, groups=groups, sweep=sweep, **options)


def _table(result: "TournamentResult", measured: dict[str, _Contender]) -> Table:
    level, known = metric_key(result.n), all(one.coverage is not None for one in measured.values())
    columns: list[Column | str] = ["checkpoint", Column(f"score at N = {level}", "lower")]
    columns += [Column("mean challenge", "lower"), Column("cross-entropy (nats)", "lower")]
    columns += [Column("bootstrap wins", "higher")] if result.win_rates else []
    columns += [Column(f"Cov_{level}", "lower")] if known else []
    rows: list[list[Cell]] = []
    for name in result.ranking:
        cells: list[Cell] = [name, result.scores[name], result.mean_challenges[name], result.cross_entropies[name]]
        cells += [result.win_rates.get(name)] if result.win_rates else []
        cells += [measured[name].coverage] if known else []
        rows.append([*cells, _chosen_by(result, name)])
    challenge = "challenge by all" if result.edge == "soft" else "worst challenge by another checkpoint"
    return Table([*columns, "chosen by"], rows, f"Best first. Score: {challenge}.")


def _chosen_by(result: "TournamentResult", name: str) -> str:
    chosen = {"tournament": result.winner, "cross-entropy": result.cross_entropy_choice}
    note = ["tied"] if name in result.ties and name != result.winner else []
    return ", ".join([*(rule for rule, choice in chosen.items() if choice == name), *note])


def _sweep_table(result: "TournamentResult") -> Table:
    rows: list[list[Cell]] = [[metric_key(p.n), p.winner, p.scores[p.winner], len(p.ties) or 1] for p in result.sweep]
    return Table(["N", "winner", "score", "tied at it"], rows, "The tournament at other N.")


def _write(folder: Path, result: "TournamentResult", checkpoints: dict[str, str], link: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result.to_json(folder / "tournament.json")
    result.plot(folder / "tournament.png")
    say(f"All numbers are in {folder / 'tournament.json'}, the heat map in {folder / 'tournament.png'}.")
    write_winner(folder, result, checkpoints, link)


def say_next_with_winner(ranking: Sequence[str], checkpoints: dict[str, str]) -> None:
    """Say how to see what the best candidate that has a checkpoint achieves."""
    best = next((checkpoints[name] for name in ranking if name in checkpoints), None)
    if best is not None:
        say_next("hf-coverage", "best-of-n", best, "PROBLEMS", "--verifier", "VERIFIER")


def write_winner(
    folder: Path, result: "TournamentResult | Choice", checkpoints: dict[str, str], link: Path | None
) -> None:
    """Leave the winner, or the best that has a checkpoint, where tools find it, and say so."""
    from hf_coverage.select.checkpoints import link_checkpoint, write_best_checkpoint

    best = next((name for name in result.ranking if name in checkpoints), None)
    if best is None:
        say("No candidate has a checkpoint that is still there: there is no winner to load.")
        return
    path = write_best_checkpoint(folder / "best_checkpoint.json", result, checkpoints)
    if link is not None:
        link_checkpoint(link, checkpoints[best])
    say(f"Winner in {path}." if best == result.winner else f"Best that has a checkpoint, {best}, in {path}.")
