"""`hf-coverage profile`: Cov_N, KL, cross-entropy and Best-of-N budget of one model or several."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say, say_next
from hf_coverage.commands.inputs import leave_job
from hf_coverage.commands.options import (
    CorpusName,
    CorpusOptions,
    Levels,
    Regret,
    Sources,
    Stratified,
    output_folder,
    parse_n,
)
from hf_coverage.commands.score import score_into
from hf_coverage.commands.score_folder import Measured, is_score_folder, read_measured, require_intervals
from hf_coverage.functional.checks import check_regret
from hf_coverage.inference.adapters import KeptBase
from hf_coverage.inference.loading import ModelOptions, model_name
from hf_coverage.report.provenance import running_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["EXAMPLES", "collect", "draw", "plot", "profile", "result_config"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage profile scores/base scores/tuned --n 2,4,8,16 --output-dir profiles

hf-coverage profile gpt2 --corpus corpus --output-dir profiles

Numbers to read elsewhere are in results_DATE.json, in the shape of lm-evaluation-harness.
"""


def profile(
    sources: Sources,
    output_dir: Annotated[Path, output_folder("Folder for the plot and the JSON.")] = Path("coverage"),
    n: Levels = None,
    regret: Regret = 0.1,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write every row's log ratio as JSON.")
    ] = False,
    corpus: CorpusName = None,
    stratified: Stratified = False,
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
) -> None:
    """Show the coverage profile of models: which share of good responses is out of the reach of N samples.

    Lower Cov_N is better. Prints a table with 95 % intervals, and writes profile.png and the results as JSON. Of
    models scored with --stratified also the exact Pass@N of independent and of stratified samples.
    """
    from hf_coverage.report.results import coverage_results, write_results, write_samples
    from hf_coverage.report.summary import pass_table, profile_table, summarize_profiles

    check_regret(regret)
    measured = collect(sources, output_dir, corpus, reading, loading, intervals=stratified)
    levels = parse_n(n)
    profiles = [one.profile for one in measured]
    if not is_main_process():
        return
    results = coverage_results(profiles, levels, config=result_config(measured, levels))
    print_table(profile_table(profiles, levels, regret=regret), transpose=True)
    passes = pass_table(profiles, levels)
    if passes is not None:
        print_table(passes)
    say(*summarize_profiles(profiles, levels, regret=regret))
    path = write_results(output_dir, results)
    say(f"Plot in {plot(profiles, output_dir, levels)}, numbers in {path}.")
    if log_samples:
        say(*(f"Rows in {write_samples(path, one)}." for one in profiles))
    say_next("hf-coverage", "report", *(one.facts["scores"] for one in measured))


def collect(
    sources: Sequence[str],
    output_dir: Path,
    corpus: str | None,
    reading: CorpusOptions,
    loading: ModelOptions,
    *,
    intervals: bool = False,
) -> list[Measured]:
    """Profiles of score folders, and of models that are scored first, into `output_dir/scores`.

    Args:
        sources: Score folders or scored data sets; models, where `corpus` is given.
        output_dir: Where models' scores go.
        corpus: The corpus to score models on.
        reading: How it is read.
        loading: How models are loaded.
        intervals: Whether the intervals of responses are needed, for Pass@N of stratified samples.
    """
    measured, kept = [], KeptBase()
    for source in sources:
        if corpus is None or is_score_folder(source):
            measured.append(read_measured(source, reading.group_by))
            continue
        name = model_name(source, loading)
        folder = output_dir / "scores" / name.replace("/", "__")
        how: dict[str, Any] = {"reading": reading, "loading": loading, "kept": kept, "intervals": intervals}
        score_into(folder, source, corpus, name=name, **how)
        measured.append(read_measured(str(folder)))
    if intervals:
        require_intervals(measured)
    leave_job()
    return measured


def draw(profiles: "Sequence[CoverageProfile]", n: Sequence[float] = ()) -> "list[Figure]":
    """Draw profiles into as few pictures as can be read, the N that are reported marked: one for a run's steps."""
    from hf_coverage.plots import COLORS
    from hf_coverage.plots.names import step_labels

    names = [profile.name for profile in profiles]
    size = len(profiles) if step_labels(names) else len(COLORS)
    parts = [profiles[start : start + size] for start in range(0, len(profiles), size)]
    return [part[0].plot(others=part[1:], marks=n, among=names) for part in parts]


def plot(profiles: "Sequence[CoverageProfile]", output_dir: Path, n: Sequence[float] = ()) -> str:
    """Draw profiles into `profile.png`, and `profile-2.png`, ..., where there are many; the files' names."""
    from hf_coverage.plots import save_figure

    paths = []
    for number, figure in enumerate(draw(profiles, n), start=1):
        paths.append(output_dir / (f"profile-{number}.png" if number > 1 else "profile.png"))
        save_figure(figure, paths[-1])
    return ", ".join(map(str, paths))


def result_config(measured: Sequence[Measured], n: Sequence[float]) -> dict[str, Any]:
    """What was measured, for the results' `config`."""
    return {"command": running_command(), "n": list(n), "models": {one.profile.name: one.facts for one in measured}}
