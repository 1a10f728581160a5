"""What each rule would have chosen of a run's checkpoints, and what sampling from the choice achieves.

    python -m recipes.reasoning.compare --config recipes/reasoning/chain_sum.yaml

Reads the profiles that `recipes.reasoning.finetune` has left, and what `recipes.reasoning.sample` has drawn, if it
has, and writes tables, figures, a page and a model card into `<output_dir>/comparison`. No model is run: it takes
seconds.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_coverage import CoverageProfile, tournament
from hf_coverage.functional.checks import metric_key
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.report.card import write_model_card
from hf_coverage.report.html import Picture, write_html_report
from hf_coverage.report.provenance import provenance
from hf_coverage.report.results import coverage_results, write_results
from hf_coverage.report.table import Cell, Column, Interval, Table
from hf_coverage.select.predictiveness import predictiveness
from recipes.profiles import read_profiles
from recipes.reasoning.choices import (
    CROSS_ENTROPY,
    Checkpoints,
    choice_table,
    choose,
    chosen_in_halves,
    matched_table,
    split_table,
)
from recipes.reasoning.figures import draw
from recipes.reasoning.finetune import Recipe, read_recipe
from recipes.reasoning.model import SMOLLM2_HUB_ID
from recipes.reasoning.reasons import area_table, concern_table, correlation_table, guess_table, resolution_table
from recipes.reasoning.sample import read_samples, sampled_table
from recipes.reasoning.task import entry_corpus
from recipes.smollm2 import SMOLLM2, load_tokenizer
from recipes.tables import show, write_tables


def main() -> None:
    recipe = read_recipe(sys.argv[1:], __doc__)
    profiles = enough_profiles(recipe.output / "profiles")
    checkpoints = checkpoints_of(profiles, recipe)
    folder = recipe.output / "comparison"
    folder.mkdir(exist_ok=True)

    found = predictiveness(profiles[1:], recipe.measure.pass_at, recipe.measure.n).correlations
    halves = chosen_in_halves(checkpoints)
    tables = [
        matched_table(checkpoints, halves),
        split_table(checkpoints, halves),
        checkpoint_table(profiles, checkpoints),
        choice_table(checkpoints),
        correlation_table(found, "measure"),
        area_table(checkpoints),
        concern_table(checkpoints),
        guess_table(checkpoints, [entry["answer"] for entry in recipe.held_out_entries()]),
        resolution_table(checkpoints),
    ]
    samples = read_samples(recipe)
    if samples:
        tables.append(sampled_table(samples, checkpoints))
    write_tables(folder / "tables.md", tables)
    summary = [*findings(checkpoints), tournament_sentence(profiles, checkpoints)]
    figures = draw(folder, profiles, checkpoints, found)
    write(recipe, folder, profiles, checkpoints, tables, summary, figures)
    show(tables, [*summary, f"Written: {folder}"])


def enough_profiles(folder: Path) -> list[CoverageProfile]:
    """Read the profiles of a run, in the order of their steps."""
    profiles = list(read_profiles(folder).values())
    if len(profiles) < 4:
        raise ValueError(
            f"{folder} holds {len(profiles)} profiles, and a comparison takes 4: run the fine-tuning first."
        )
    return profiles


def checkpoints_of(profiles: list[CoverageProfile], recipe: Recipe) -> Checkpoints:
    """Arrange the profiles as a table; the first one is the model as it came."""
    return Checkpoints(
        steps=[int(profile.name.removeprefix("step ")) for profile in profiles],
        logprobs=np.array([profile.logprobs for profile in profiles]),
        n=tuple(recipe.measure.n),
        pass_at=tuple(recipe.measure.pass_at),
    )


def checkpoint_table(profiles: list[CoverageProfile], checkpoints: Checkpoints) -> Table:
    """Give the measures of every checkpoint."""
    columns = [Column("step"), Column("cross-entropy = KL", "lower")]
    columns += [Column(f"Cov_{metric_key(n)}", "lower") for n in checkpoints.n]
    columns += [Column(f"Pass@{n}", "higher") for n in checkpoints.pass_at]
    passes = [checkpoints.passes(n).mean(axis=1) for n in checkpoints.pass_at]
    rows: list[list[Cell]] = []
    for index, profile in enumerate(profiles):
        covered = [Interval(profile.cov(n), *profile.interval(n)) for n in checkpoints.n]
        rows.append([checkpoints.steps[index], profile.kl, *covered, *(float(values[index]) for values in passes)])
    return Table(
        columns,
        rows,
        f"Checkpoints on {profiles[0].num_rows} held-out questions with one right answer each; cross-entropy in nats "
        "an answer, 95 % intervals over questions, exact Pass@N. Step 0 is the model as it came.",
    )


def about(recipe: Recipe) -> str:
    """Say what the model of the card is."""
    return (
        f"{recipe.model.name} with an adapter of rank {recipe.model.rank} on all linear layers, trained on the "
        f"answers to {recipe.data.train_rows} questions of `reasoning_gym`'s {recipe.task['name']}, "
        f"{recipe.finetune.num_train_epochs:g} times each (`recipes/reasoning`); of its checkpoints the one with the "
        f"highest Pass@{max(recipe.measure.pass_at)}. The weights are not distributed: the recipe makes them."
    )


def findings(checkpoints: Checkpoints) -> list[str]:
    """Say what cross-entropy's choice costs for each N, and which rules do better."""
    chosen = choose(checkpoints)
    lines = []
    for n in checkpoints.pass_at:
        passes = checkpoints.passes(n).mean(axis=1)
        best = int(passes.argmax())
        rules = [name for name, index in chosen.items() if passes[index] > passes[chosen[CROSS_ENTROPY]] + 1e-12]
        better = "; ".join(name for name in rules if not name.startswith("best")) or "no rule"
        lines.append(
            f"Pass@{n} is {passes[chosen[CROSS_ENTROPY]]:.3f} at the checkpoint with the least cross-entropy (step "
            f"{checkpoints.steps[chosen[CROSS_ENTROPY]]}) and {passes[best]:.3f} at the best one (step "
            f"{checkpoints.steps[best]}). Better than cross-entropy here: {better}."
        )
    return lines


def tournament_sentence(profiles: list[CoverageProfile], checkpoints: Checkpoints) -> str:
    """Let the tournament at the largest N speak for itself."""
    tables = {profile.name: profile.logprobs for profile in profiles if profile.logprobs is not None}
    return tournament(tables, max(checkpoints.n), groups=profiles[0].groups).sentence


def write(
    recipe: Recipe,
    folder: Path,
    profiles: list[CoverageProfile],
    checkpoints: Checkpoints,
    tables: list[Table],
    summary: list[str],
    figures: list[Picture],
) -> None:
    """Write the page, the results and the card of the checkpoint with the best Pass@N at the largest N."""
    name = f"{recipe.model.name} fine-tuned on {recipe.task['name']}"
    encoded = encode_corpus(
        entry_corpus(recipe.held_out_entries()), load_tokenizer(recipe.model.name), append_eos=True
    )
    arguments = " ".join(sys.argv[1:])
    steps = [f"python -m recipes.reasoning.{step} {arguments}" for step in ("finetune", "sample", "compare")]
    origin = provenance(" && \\\n".join(steps), seed=recipe.run.seed)
    write_html_report(
        folder / "report.html",
        title=name,
        summary=summary,
        tables=tables,
        figures=figures,
        kinds=["single_answer"],
        provenance=origin | dict(recipe.settings),
    )
    index = choose(checkpoints)[f"best Pass@{max(checkpoints.pass_at)}"]
    write_model_card(
        folder / "card",
        replace(profiles[index], name=f"{recipe.model.name}, {recipe.task['name']} step {checkpoints.steps[index]}"),
        corpus=f"reasoning_gym {recipe.task['name']}",
        provenance=origin,
        n=checkpoints.n,
        others=[profiles[0], profiles[-1]],
        description="\n\n".join([about(recipe), *summary]),
        tables=tables[:3],
        corpus_fingerprint=encoded.fingerprint,
        metadata={"license": "apache-2.0", "base_model": SMOLLM2_HUB_ID, "library_name": "peft"}
        if recipe.model.name == SMOLLM2
        else None,
    )
    results = coverage_results(profiles, checkpoints.n, config=recipe.settings)
    for n in checkpoints.pass_at:
        for profile, value in zip(profiles, checkpoints.passes(n).mean(axis=1)):
            results["results"][profile.name][f"pass@{n},none"] = float(value)
            results["higher_is_better"][profile.name][f"pass@{n}"] = True
    write_results(folder, results)


if __name__ == "__main__":
    main()
