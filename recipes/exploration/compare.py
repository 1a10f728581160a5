"""Pass@k of k responses chosen by representation-based exploration, against random ones of the same samples.

    python -m recipes.exploration.compare --config recipes/reasoning/chain_sum.yaml

Takes the responses that `recipes.reasoning.sample` has drawn and judged with the same configuration, represents them
by the hidden states of the checkpoint that they are from, and writes tables and a figure into
`<output_dir>/exploration`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.decode.exploration import response_features
from hf_coverage.functional.checks import FloatArray
from hf_coverage.measure.corpus import encode_prompts
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Table
from recipes.exploration.strategies import (
    DISTINCT,
    LIKELIEST,
    RANDOM,
    REP_EXP,
    Samples,
    distinct_in_order,
    distinct_in_random_subsets,
    likeliest_first,
    passes_of,
    rep_exp_orders,
)
from recipes.reasoning.finetune import Recipe, read_recipe, use_threads
from recipes.reasoning.model import load_base, load_checkpoint
from recipes.reasoning.sample import sampled_checkpoints
from recipes.reasoning.task import entry_corpus
from recipes.smollm2 import load_tokenizer
from recipes.tables import interval_of, show, write_tables

LAMBDA = 1.0
OTHER_LAMBDAS = (0.01, 100.0)
FIRST = 8
CENTERED = "RepExp, centred"


def main() -> None:
    recipe = read_recipe(sys.argv[1:], __doc__)
    use_threads(recipe)
    folder = recipe.output / "exploration"
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(recipe.model.name).eval(), load_tokenizer(recipe.model.name)
    entries = recipe.held_out_entries()[: recipe.measure.sample_prompts]
    prompts = encode_prompts(entry_corpus(entries)["prompt"], tokenizer)
    tables: list[Table] = []
    curves: dict[str, dict[str, FloatArray]] = {}
    for step, checkpoint in sampled_checkpoints(recipe).items():
        model = base if checkpoint is None else load_checkpoint(base, checkpoint)
        samples = read_samples(recipe, step, prompts, model)
        orders = {LIKELIEST: likeliest_first(samples), REP_EXP: rep_exp_orders(samples, lam=LAMBDA)}
        orders[CENTERED] = rep_exp_orders(samples, lam=LAMBDA, center=True)
        orders |= {f"{REP_EXP}, lambda {lam:g}": rep_exp_orders(samples, lam=lam) for lam in OTHER_LAMBDAS}
        passes = passes_of(samples, orders)
        name = "the model as it came" if checkpoint is None else f"after {step} steps"
        levels = recipe.measure.pass_at
        tables += [
            pass_table(passes, levels, name),
            rival_table(passes, levels, name),
            chosen_table(samples, orders, levels, name),
        ]
        curves[name] = {key: values for key, values in passes.items() if "lambda" not in key}
    write_tables(folder / "tables.md", tables)
    draw(folder / "pass_at_k.png", curves, recipe.measure.pass_at)
    show(tables, [f"Written: {folder}"])


def read_samples(recipe: Recipe, step: int, prompts: list[list[int]], model: PreTrainedModel) -> Samples:
    """Read what was drawn from a checkpoint and how it was judged, and represent it.

    Raises:
        ValueError: where the samples are not there, or of other questions.
    """
    folder = recipe.output / "samples"
    rows = [
        json.loads(line)
        for file in sorted((folder / f"step-{step}").glob("samples-*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    result = BestOfNResult.from_json(folder / f"step-{step}.json") if rows else None
    if result is None or len(rows) != result.rewards.size or len(prompts) != result.num_prompts:
        raise ValueError(f"{folder} lacks samples of step {step} for all questions: run `recipes.reasoning.sample`.")
    rows.sort(key=lambda row: (row["prompt"], row["sample"]))
    shape = result.rewards.shape
    corpus = Dataset.from_dict(
        {"prompt": [prompts[row["prompt"]] for row in rows], "completion": [row["ids"] for row in rows]}
    )
    features = response_features(model, None, corpus)
    labels = np.empty(shape, dtype=np.int64)
    for question in range(shape[0]):
        own = [tuple(row["ids"]) for row in rows[question * shape[1] : (question + 1) * shape[1]]]
        codes = {ids: code for code, ids in enumerate(dict.fromkeys(own))}
        labels[question] = [codes[ids] for ids in own]
    return Samples(
        solved=result.rewards >= result.threshold,
        logprobs=np.array([row["logprob"] for row in rows]).reshape(shape),
        labels=labels,
        features=features.reshape(*shape, -1),
    )


def pass_table(passes: dict[str, FloatArray], levels: list[int], name: str) -> Table:
    """Pass@k of each strategy, and its difference to random subsets, paired by question."""
    shown = [k for k in levels if k < passes[RANDOM].shape[1]]
    columns = [Column("chosen by")]
    for k in shown:
        columns += [Column(f"Pass@{k}", "higher"), Column("less random's")]
    rows: list[list[Cell]] = []
    for strategy, values in passes.items():
        cells: list[Cell] = [strategy]
        for k in shown:
            change = interval_of(values[:, k - 1] - passes[RANDOM][:, k - 1])
            cells += [float(values[:, k - 1].mean()), None if strategy == RANDOM else change]
        rows.append(cells)
    questions, size = passes[RANDOM].shape
    return Table(
        columns,
        rows,
        f"{name[0].upper()}{name[1:]}: Pass@k of k chosen from {size} samples to each of {questions} questions, "
        "expectations over random subsets exact; Student's intervals over questions of the paired difference. All of "
        f"the samples together solve {passes[RANDOM][:, -1].mean():.3f}. Lambda is {LAMBDA:g} unless said otherwise.",
    )


def rival_table(passes: dict[str, FloatArray], levels: list[int], name: str) -> Table:
    """What RepExp's Pass@k is above that of what costs nothing, paired by question."""
    shown = [k for k in levels if k < passes[RANDOM].shape[1]]
    rows: list[list[Cell]] = []
    for rival in (RANDOM, DISTINCT, LIKELIEST):
        rows.append([rival, *(interval_of(passes[REP_EXP][:, k - 1] - passes[rival][:, k - 1]) for k in shown)])
    return Table(
        [Column("less that of"), *(Column(f"Pass@{k}") for k in shown)],
        rows,
        f"{name[0].upper()}{name[1:]}: Pass@k of RepExp less that of what needs no hidden states; Student's intervals "
        "over questions of the paired difference.",
    )


def chosen_table(samples: Samples, orders: dict[str, NDArray[np.int64]], levels: list[int], name: str) -> Table:
    """What the strategies choose: how many different responses, and how probable ones."""
    size = samples.solved.shape[1]
    shown = [k for k in levels if k > 1]
    first = min(FIRST, size)
    counts = {RANDOM: distinct_in_random_subsets(samples)}
    counts |= {strategy: distinct_in_order(samples, order) for strategy, order in orders.items()}
    logprobs = {RANDOM: float(samples.logprobs.mean())}
    for strategy, order in orders.items():
        logprobs[strategy] = float(np.take_along_axis(samples.logprobs, order[:, :first], axis=1).mean())
    rows: list[list[Cell]] = [
        [strategy, *(float(values[:, k - 1].mean()) for k in shown), logprobs[strategy]]
        for strategy, values in counts.items()
    ]
    norm = np.mean([np.square(features).sum(axis=1).mean() for features in samples.features])
    return Table(
        [Column("chosen by"), *(Column(f"different of {k}") for k in shown), Column(f"log p of the first {first}")],
        rows,
        f"{name[0].upper()}{name[1:]}: how many of the k chosen responses are different ones, and the mean "
        f"log-probability of the first {first}, nats; means over questions. Of {size} samples "
        f"{counts[RANDOM][:, -1].mean():.1f} differ. The mean squared norm of a feature is {norm:,.0f}.",
    )


def draw(path: Path, curves: dict[str, dict[str, FloatArray]], levels: list[int]) -> None:
    """Draw Pass@k of the strategies over k, the samples' models side by side."""
    figure, axes = new_axes(len(curves), width=4.6)
    for ax, (name, passes) in zip(axes, curves.items()):
        for (strategy, values), color in zip(passes.items(), ["#777777", *COLORS[1:4], COLORS[0]]):
            style = "--" if strategy == RANDOM else "-"
            means = values.mean(axis=0)[np.array(levels) - 1]
            ax.plot(levels, means, style, marker="o", markersize=4, color=color, label=strategy)
        ax.set_xscale("log", base=2)
        ax.set_xticks(levels, [str(k) for k in levels])
        ax.set_title(name)
        ax.set_xlabel("k of the samples")
    axes[0].set_ylabel("Pass@k (higher is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
