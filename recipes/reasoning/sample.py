"""Pass@N of a run's checkpoints, measured by sampling and the task's own verifier.

    python -m recipes.reasoning.sample --config recipes/reasoning/chain_sum.yaml

Draws responses at temperature 1 from the checkpoints that `recipes.reasoning.finetune` has left, and lets
`reasoning_gym` judge them. What was drawn is kept in `<output_dir>/samples`: a run that was stopped goes on there.
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from hf_coverage.decode.best_of_n import evaluate_best_of_n
from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.decode.verifiers import ReasoningGym
from hf_coverage.report.table import Cell, Column, Interval, Table
from recipes.profiles import step_of
from recipes.reasoning.choices import Checkpoints
from recipes.reasoning.finetune import Recipe, read_recipe, use_threads
from recipes.reasoning.model import load_base, load_checkpoint
from recipes.reasoning.task import entry_corpus
from recipes.smollm2 import load_tokenizer

__all__ = ["read_samples", "sampled_table"]


def main() -> None:
    recipe, console = read_recipe(sys.argv[1:], __doc__), Console()
    use_threads(recipe)
    measure, folder = recipe.measure, recipe.output / "samples"
    corpus = entry_corpus(recipe.held_out_entries()[: measure.sample_prompts])
    base, tokenizer = load_base(recipe.model.name).eval(), load_tokenizer(recipe.model.name)
    for step, checkpoint in sampled_checkpoints(recipe).items():
        model = base if checkpoint is None else load_checkpoint(base, checkpoint)
        result = evaluate_best_of_n(
            model,
            tokenizer,
            corpus,
            ReasoningGym(recipe.task["name"]),
            k=measure.samples,
            max_new_tokens=measure.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,  # what the scored answers end with
            batch_size=measure.batch_size,
            seed=recipe.run.seed,
            output_dir=folder / f"step-{step}",
            shard_rows=measure.batch_size,
        )
        result.to_json(folder / f"step-{step}.json")
        console.print(f"step {step}: {result.sentence}", highlight=False, markup=False)


def sampled_checkpoints(recipe: Recipe) -> dict[int, Path | None]:
    """Find the checkpoints to draw from, by step; step 0 is the model as it came."""
    found = {step_of(path): path for path in recipe.output.glob("finetune/checkpoint-*")}
    if not found:
        raise ValueError(f"{recipe.output} holds no checkpoints: run `recipes.reasoning.finetune` first.")
    there = [0, *sorted(found)]
    steps = recipe.measure.sample_steps or there
    missing = sorted(set(steps) - set(there))
    if missing:
        raise ValueError(f"`sample_steps` must be among {there}, the steps of {recipe.output}, got {missing}.")
    return {step: found.get(step) for step in steps}


def read_samples(recipe: Recipe) -> dict[int, BestOfNResult]:
    """Read what has been drawn, by step; nothing where nothing has."""
    files = {step_of(file): file for file in recipe.output.glob("samples/step-*.json")}
    return {step: BestOfNResult.from_json(files[step]) for step in sorted(files)}


def sampled_table(samples: dict[int, BestOfNResult], checkpoints: Checkpoints) -> Table:
    """Set measured Pass@N beside the exact one of the same questions."""
    levels = [n for n in checkpoints.pass_at if all(n <= result.k for result in samples.values())]
    exact = {n: checkpoints.passes(n) for n in levels}
    rows: list[list[Cell]] = []
    for step, result in samples.items():
        index = checkpoints.steps.index(step)
        cells: list[Cell] = [step]
        for n in levels:
            measured = Interval(result.pass_at(n), *result.interval(n))
            cells += [measured, float(exact[n][index, result.rows].mean())]
        rows.append([*cells, int(np.sum(result.failed))])
    first = next(iter(samples.values()))
    columns = [Column("step")]
    for n in levels:
        columns += [Column(f"Pass@{n}, sampled", "higher"), Column(f"exact@{n}")]
    return Table(
        [*columns, Column("not judged")],
        rows,
        f"Pass@N by {first.k} samples at temperature 1 to each of {first.num_prompts} questions, judged by the task's "
        "own verifier, with 95 % intervals over questions; beside it the exact value of the same questions.",
    )


if __name__ == "__main__":
    main()
