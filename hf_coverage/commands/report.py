"""`hf-coverage report`: one self-contained page, and model cards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hf_coverage.commands.console import is_main_process, say
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
from hf_coverage.commands.profile import collect, result_config
from hf_coverage.commands.score_folder import Measured
from hf_coverage.functional.checks import check_regret
from hf_coverage.inference.loading import ModelOptions

__all__ = ["EXAMPLES", "origin", "report"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage report scores/base scores/tuned --title "Base and tuned" --output-dir report

hf-coverage report scores/tuned --card --license apache-2.0 --base-model org/base --output-dir report
"""


_FEW = 3  # models that are named one by one, in the title and in sentences


def report(
    sources: Sources,
    output_dir: Annotated[Path, output_folder("Folder for the page, cards and JSON.")] = Path("coverage"),
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write a model card for each model, in `cards/MODEL`.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License for the cards.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model that the cards' models come from.")
    ] = None,
    n: Levels = None,
    regret: Regret = 0.1,
    corpus: CorpusName = None,
    stratified: Stratified = False,
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
) -> None:
    """Write a report: one HTML file that needs nothing else, the results as JSON, and model cards on request.

    Models on the same rows are also compared with the first one.
    """
    from hf_coverage.report.results import coverage_results, write_results

    check_regret(regret)
    measured = collect(sources, output_dir, corpus, reading, loading, intervals=stratified)
    if not is_main_process():
        return
    levels = parse_n(n)
    results = coverage_results([one.profile for one in measured], levels, config=result_config(measured, levels))
    page = _write_page(output_dir / "report.html", measured, levels, regret, title)
    say(f"Report in {page}, numbers in {write_results(output_dir, results)}.")
    if card:
        metadata = {"license": license, "base_model": base_model}
        _write_cards(output_dir / "cards", measured, levels, regret, metadata)
    say(f"Next: open {page} in a browser.")


def _write_page(
    path: Path, measured: Sequence[Measured], n: Sequence[float], regret: float, title: str | None
) -> Path:
    from hf_coverage.report.html import write_html_report
    from hf_coverage.report.summary import (
        comparison_table,
        pass_table,
        profile_table,
        summarize_many,
        summarize_profiles,
    )

    profiles = [one.profile for one in measured]
    paired = _same_rows(measured)
    passes = pass_table(profiles, n)
    tables = [profile_table(profiles, n, regret=regret), *([] if passes is None else [passes])]
    comparison = comparison_table(profiles[0], profiles[1:], n, corrected=True) if paired else None
    tables += [] if comparison is None else [comparison]
    if len(profiles) <= _FEW:
        summary = summarize_profiles(profiles, n, regret=regret, baseline=paired)
    else:
        summary = summarize_many(profiles, max(n), regret=regret, comparison=comparison)
    return write_html_report(
        path,
        title=title or _title([profile.name for profile in profiles]),
        summary=summary,
        tables=tables,
        profiles=profiles,
        n=max(n),
        kinds=[profile.kind for profile in profiles],
        provenance=origin(measured),
    )


def _title(names: Sequence[str]) -> str:
    from hf_coverage.report.explorer import short_names

    shown = short_names(names)
    return f"Coverage of {' and '.join(shown) if len(names) <= _FEW else f'{len(names)} models'}"


def _write_cards(
    folder: Path, measured: Sequence[Measured], n: Sequence[float], regret: float, metadata: dict[str, Any]
) -> None:
    from hf_coverage.report.card import write_model_card

    for one in measured:
        path = write_model_card(
            folder / one.profile.name.replace("/", "__"),
            one.profile,
            corpus=one.facts.get("corpus", one.facts["scores"]),
            corpus_fingerprint=one.facts.get("fingerprint"),
            provenance=origin([one]),
            n=n,
            regret=regret,
            metadata={name: value for name, value in metadata.items() if value is not None},
        )
        say(f"Card in {path}.")


def _same_rows(measured: Sequence[Measured]) -> bool:
    """Whether there are several models, all of one corpus, so that they can be compared row by row."""
    first = measured[0].reference.rows
    return len(measured) > 1 and all(np.array_equal(first, other.reference.rows) for other in measured[1:])


def origin(measured: Sequence[Measured]) -> dict[str, object]:
    """Where each number came from, one line a fact, a fact that all models share only once."""
    from hf_coverage.report.provenance import provenance

    facts: dict[str, str] = {}
    for one in measured:
        origin = one.facts.get("origin", {})
        lines = {
            "scored with": one.facts.get("command"),
            "weights": one.facts.get("weights"),
            "corpus": one.facts.get("corpus"),
            "corpus fingerprint": one.facts.get("fingerprint"),
            "corpus made with": origin.get("command"),
            "corpus seed": origin.get("seed"),
        }
        for name, value in lines.items():
            if value is not None and facts.get(name) != str(value):
                facts[f"{name} ({one.profile.name})" if name in facts else name] = str(value)
    return provenance(**facts)
