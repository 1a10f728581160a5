"""`hf-coverage compare`: paired differences between models on the same rows."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say, say_next
from hf_coverage.commands.options import CorpusName, CorpusOptions, Levels, Sources, output_folder, parse_n
from hf_coverage.commands.profile import collect, plot, result_config
from hf_coverage.commands.score_folder import Measured, on_same_rows
from hf_coverage.inference.loading import ModelOptions

__all__ = ["EXAMPLES", "compare"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage compare scores/base scores/tuned scores/pruned --n 4,16

hf-coverage compare gpt2 distilgpt2 --corpus corpus --output-dir comparison
"""


def compare(
    sources: Sources,
    output_dir: Annotated[Path, output_folder("Folder for the plot and the JSON.")] = Path("coverage"),
    n: Levels = None,
    corpus: CorpusName = None,
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
) -> None:
    """Compare models with the first one on the same rows: does coverage differ by more than chance?

    A difference below zero is better than the first model. The paired test sees differences that two overlapping
    intervals hide.
    """
    from hf_coverage.report.results import coverage_results, write_results
    from hf_coverage.report.summary import comparison_table, summarize_profiles

    if len(sources) < 2:
        raise typer.BadParameter("needs at least two models: the first is what the others are compared with.")
    measured = on_same_rows(collect(sources, output_dir, corpus, reading, loading))
    levels = parse_n(n)
    baseline, *others = profiles = [one.profile for one in measured]
    if not is_main_process():
        return
    results = coverage_results(profiles, levels, config=result_config(measured, levels))
    print_table(comparison_table(baseline, others, levels))
    sentences = summarize_profiles(profiles, levels, baseline=True)
    say(*sentences[: len(profiles)])
    path = write_results(output_dir, results | {"comparisons": comparisons(measured, levels)})
    say(f"Plot in {plot(profiles, output_dir, levels)}, numbers in {path}.")
    say_next("hf-coverage", "report", *(one.facts["scores"] for one in measured))


def comparisons(measured: list[Measured], n: tuple[float, ...]) -> dict[str, Any]:
    """Paired differences to the first model under the names of the results."""
    from hf_coverage.report.summary import paired_differences

    baseline = measured[0].profile
    return {
        other.profile.name: {"baseline": baseline.name}
        | {
            f"{baseline.key(level)},none": difference._asdict()
            for level, difference in zip(n, paired_differences(baseline, other.profile, n))
        }
        for other in measured[1:]
    }
