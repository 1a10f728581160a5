"""What do errors of a process verifier do to decoding, and does backtracking help, as responses get longer?

    python -m recipes.backtracking.compare --config recipes/backtracking/small.yaml

First exactly, from the transition matrices of the walk on trees of prefixes; then by the library's decoder on a real
`transformers` model, all methods with the same budget of model and verifier calls. Writes `report.md` and two figures.
Any value of the configuration can be given on the command line, as `--responses 200`. What was stopped goes on where
it was when the same command is given again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.sparse import identity
from scipy.sparse.linalg import spsolve
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.decode.backtracking import GuidedResponses, ValueGuidedDecoder
from hf_coverage.decode.prefix_walkers import CallBudget
from hf_coverage.functional.prefix_tree import Prefix, PrefixTree, leaf_target, total_variation
from hf_coverage.functional.random_walk import guided_law, output_law, stationary_law, transition_matrix, visit_law
from recipes.backtracking.findings import report
from recipes.backtracking.verifiers import SETTINGS, Setting
from recipes.remember import remember
from recipes.settings import parse_section, read_settings, refuse_other_settings

MOST_STEPS = 50_000
NOISE_DRAWS = 200


@dataclass
class CompareArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    abc_horizons: list[int] = field(default_factory=lambda: [2, 4, 6], metadata={"help": "H."})
    abc_error: float = field(default=2.0, metadata={"help": "Factor after every a."})
    parity_horizons: list[int] = field(default_factory=lambda: [3, 6], metadata={"help": "H, multiples of 3."})
    parity_steps: list[int] = field(default_factory=lambda: [9], metadata={"help": "More H, for expected moves only."})
    parity_error: float = field(default=1, metadata={"help": "Tokens that the verifier is late by."})
    dyck_horizons: list[int] = field(default_factory=lambda: [4, 6], metadata={"help": "H, even."})
    dyck_error: float = field(default=0.7, metadata={"help": "Standard deviation of log V / V*."})
    budget: int = field(default=8, metadata={"help": "Calls of a response, in those of guidance; also N."})
    responses: int = field(default=1000, metadata={"help": "Responses of every method at every H."})
    mixing: float = field(default=4, metadata={"help": "Steps T of a walk, in H^2."})


def main() -> None:
    settings = read_settings(sys.argv[1:], ["compare"], description=__doc__)
    args = parse_section(CompareArguments, settings["compare"])
    output, console = Path(args.output_dir), Console()
    kept = asdict(args)
    del kept["output_dir"]
    refuse_other_settings(output, {"compare": kept})
    results: dict[str, dict[int, Any]] = {}
    for setting in SETTINGS:
        name = setting.name.lower()
        for horizon in kept[f"{name}_horizons"]:
            start = time.monotonic()
            experiment = partial(compare, args, setting, horizon, kept[f"{name}_error"])
            found = remember(output / "parts", (name, horizon), experiment)
            results.setdefault(setting.name, {})[horizon] = found
            console.print(f"{setting.name}, H = {horizon} ({time.monotonic() - start:.0f} s)", markup=False)
    (parity,) = [setting for setting in SETTINGS if setting.name == "parity"]
    moves = {horizon: one["steps"] for horizon, one in results["parity"].items()}
    for horizon in args.parity_steps:
        experiment = partial(long_steps, parity, horizon, args.parity_error)
        moves[horizon] = remember(output / "parts", ("parity steps", horizon), experiment)
    report(output, kept, results, moves)


def compare(args: CompareArguments, setting: Setting, horizon: int, error: float) -> dict[str, Any]:
    """Exact errors of the laws, and what each method gives under the budget."""
    tree = setting.tree(horizon, error)
    steps = int(args.mixing * horizon**2)
    return {
        "prefixes": len(tree),
        "exact": exact_errors(tree, horizon, steps),
        "steps": steps_to_a_good_response(tree),
        "budget": under_budget(args, setting, tree, horizon, error),
        "noise": sampling_noise(setting, tree, args.responses),
    }


def exact_errors(tree: PrefixTree, horizon: int, steps: int) -> dict[str, float]:
    """Total variation between the law of the response and p V, and how often the walk is at a leaf in the end."""
    target = leaf_target(tree)
    laws = {
        "guidance": guided_law(tree),
        "first leaf": visit_law(tree, 1),
        "H visits": visit_law(tree, horizon),
        "T steps": output_law(tree, steps),
        "T steps, then the next leaf": output_law(tree, steps, otherwise="continue"),
    }
    stationary = stationary_law(tree)
    at_leaf = stationary[tree.is_leaf].sum()
    laws["stationary"] = np.where(tree.is_leaf, stationary, 0.0) / at_leaf
    return {name: total_variation(law, target) for name, law in laws.items()} | {"at a leaf": float(at_leaf)}


def steps_to_a_good_response(tree: PrefixTree) -> dict[str, float]:
    """Expected moves until the first good response: of the walk, and of guidance, which begins anew at dead ends."""
    inner = np.flatnonzero(~tree.is_leaf & tree.reachable)
    among = transition_matrix(tree, laziness=0.0)[inner][:, inner]
    walked = spsolve((identity(len(inner)) - among).tocsc(), np.ones(len(inner)))[0]
    weights = np.exp(tree.logprobs) * tree.values
    total = np.bincount(tree.parents[1:], weights=weights[1:], minlength=len(tree))
    chance = np.ones(len(tree))  # that an attempt comes here
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        chance[node] = chance[parent] * weights[node] / total[parent] if total[parent] > 0 else 0.0
    return {"VGB": float(walked), "guidance": float(chance[1:].sum() / chance[tree.is_leaf & (tree.values > 0)].sum())}


def long_steps(setting: Setting, horizon: int, error: float) -> dict[str, float]:
    """The same for a tree that nothing else is asked of."""
    return steps_to_a_good_response(setting.tree(horizon, error))


def under_budget(
    args: CompareArguments, setting: Setting, tree: PrefixTree, horizon: int, error: float
) -> dict[str, dict[str, float]]:
    """What the methods give for the same calls."""
    value = setting.verifier(horizon, error)

    def verifier(completion_ids: list[list[int]]) -> list[float]:
        return [value(tuple(ids)) for ids in completion_ids]

    budget = CallBudget(args.budget * horizon, args.budget * horizon * setting.tokens, MOST_STEPS)
    decoder = ValueGuidedDecoder(
        uniform_model(setting.tokens, horizon),
        None,
        [0],
        verifier,
        max_new_tokens=horizon,
        eos_token_id=[],
        batch_size=1024,
        cache_size=1_000_000,
        progress=False,
    )
    steps, number = int(args.mixing * horizon**2), args.responses
    best = partial(decoder.block_best_of_n, number, candidates=args.budget, budget=budget)
    walk = partial(decoder.backtrack, number, budget=budget)
    methods: dict[str, Callable[[], GuidedResponses]] = {
        "VGB, H visits": partial(walk, visits=horizon),
        "VGB, first leaf": partial(walk, visits=1),
        "VGB, T steps": partial(walk, steps=steps),
        "VGB, blocks of 3 tokens": partial(walk, visits=horizon, block_size=3),
        "guidance": partial(decoder.guide, number, budget=budget),
        "rejection sampling": partial(decoder.reject, number, budget=budget),
        "block Best-of-N, 1 token": partial(best, block_size=1),
        "block Best-of-N, 3 tokens": partial(best, block_size=3),
        "Best-of-N": partial(best, block_size=horizon),
    }
    wanted = feature_law(setting, tree)
    return {name: judged(method(), setting, wanted) for name, method in methods.items()}


def uniform_model(tokens: int, horizon: int) -> GPT2LMHeadModel:
    """A causal language model that finds all tokens equally likely."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}  # of no meaning here, but within the vocabulary
    config = GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=tokens, n_positions=horizon + 1, **ends)
    model = GPT2LMHeadModel(config).eval()
    model.get_output_embeddings().weight.data.zero_()
    return model


def feature_law(setting: Setting, tree: PrefixTree) -> dict[int, float]:
    """The law of the feature of good responses, in proportion to p V."""
    law: dict[int, float] = {}
    for prefix, chance in zip(tree.prefixes, leaf_target(tree)):
        if chance > 0:
            law[setting.feature(prefix)] = law.get(setting.feature(prefix), 0.0) + float(chance)
    return law


def judged(found: GuidedResponses, setting: Setting, wanted: dict[int, float]) -> dict[str, float]:
    """Success, distance of the feature's law (what is no success is a value of its own), diversity and cost."""
    good = found.finished & (found.values > 0)
    responses = [tuple(response) for response, kept in zip(found.responses, good) if kept]
    return {
        "success": float(good.mean()),
        "distance": feature_distance(setting, responses, wanted, len(good)),
        "distinct": len(set(responses)) / len(good),
        "exhausted": float(found.exhausted.mean()),
        "model_calls": float(found.model_calls.mean()),
        "verifier_calls": float(found.verifier_calls.mean()),
    }


def feature_distance(setting: Setting, responses: list[Prefix], wanted: dict[int, float], total: int) -> float:
    """Total variation between what is wanted and the feature's law among `total` responses, some of them good."""
    values, counts = np.unique([setting.feature(response) for response in responses], return_counts=True)
    shares = dict(zip(values.tolist(), (counts / total).tolist()))
    keys = sorted(wanted.keys() | shares.keys())
    failed = 1 - len(responses) / total
    return total_variation([*(shares.get(key, 0.0) for key in keys), failed], [*map(wanted.get, keys), 0.0])


def sampling_noise(setting: Setting, tree: PrefixTree, number: int) -> float:
    """The mean distance that so many responses have that are drawn from p V itself."""
    chances = np.array(list(feature_law(setting, tree).values()))
    counts = np.random.default_rng(0).multinomial(number, chances / chances.sum(), size=NOISE_DRAWS)
    return float(np.mean([total_variation(row / number, chances) for row in counts]))


if __name__ == "__main__":
    main()
