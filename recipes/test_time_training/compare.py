"""Does test-time training cover more? SmolLM2-135M on text of four kinds, and against references of known density.

    python -m recipes.test_time_training.compare --config recipes/test_time_training/small.yaml

Cross-entropy and coverage of the model as it is and of the model that makes a step after each token, over step sizes;
over the kinds of text, the length of the context, the temperature of the reference and steps that are too large.
Writes `report.md`, `findings.json` and the figures. Any value of the configuration can be given on the command line,
as `--text.documents 8`. What was stopped goes on with the text that was stopped when the same command is given again.
"""

import copy
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage.functional.ttt_config import TTTCache, TTTConfig, TTTScope
from hf_coverage.measure.builders import sample_corpus
from hf_coverage.measure.scoring import PLAIN, score_responses, score_rules
from recipes.compression_audit.compress import compression
from recipes.reasoning.model import load_base
from recipes.remember import remember_corpus
from recipes.settings import Settings, parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2, load_tokenizer
from recipes.test_time_training.findings import report
from recipes.test_time_training.measured import Followed, Known, Results, Scoped, rule_label
from recipes.test_time_training.short_context import ShortContext
from recipes.test_time_training.texts import KINDS, windows_of

ITSELF = "itself"
"""The student that is the reference's own model."""

TASTE = "taste"
"""The reference that is the model with a bias; the others are its temperatures."""

PARTS = ("text", "long", "safety", "known", "scopes")


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    model: str = field(default=SMOLLM2, metadata={"help": f"{SMOLLM2} comes with a package; else a folder or Hub id."})
    top_k: int | None = field(default=256, metadata={"help": "Cut steps to the likeliest tokens; None: exact."})
    seed: int = field(default=0, metadata={"help": "Of the windows and of what is sampled."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is run and reported."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class TextArguments:
    documents: int = field(default=32, metadata={"help": "Of each kind; one half chooses the step size."})
    prompt_tokens: int = 256
    response_tokens: int = 128
    lr: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3], metadata={"help": "Step sizes to try."})


@dataclass
class LongArguments:
    documents: int = field(default=6, metadata={"help": "Of each kind."})
    prompt_tokens: int = 64
    response_tokens: int = 960
    lr: list[float] = field(default_factory=lambda: [1e-4])


@dataclass
class SafetyArguments:
    documents: int = field(default=8, metadata={"help": "Of each kind, the first of section `text`."})
    lr: list[float] = field(default_factory=lambda: [1e-3], metadata={"help": "Step sizes that are too large."})
    radius: list[float] = field(default_factory=lambda: [0.3])
    decay: list[float] = field(default_factory=lambda: [0.1])
    normalised_lr: list[float] = field(default_factory=lambda: [0.01], metadata={"help": "With lambda 0."})


@dataclass
class KnownArguments:
    prompts: int = field(default=16, metadata={"help": "Of each kind but the mixed one."})
    lr: list[float] = field(default_factory=lambda: [1e-4], metadata={"help": "Step sizes to try."})
    prompt_tokens: int = 192
    response_tokens: int = 128
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0], metadata={"help": "D: the model at these."})
    students: list[str] = field(
        default_factory=lambda: [ITSELF, "int4-rtn-64", "context-64"],
        metadata={"help": "What covers D at temperature 1; the others are covered by the model itself."},
    )
    taste_share: float = field(default=0.1, metadata={"help": "Part of the vocabulary that another D prefers."})
    taste: float = field(default=2.0, metadata={"help": "By so many nats."})


@dataclass
class ScopeArguments:
    documents: int = field(default=4, metadata={"help": "Of each kind, the first of section `text`."})
    kinds: list[str] = field(default_factory=lambda: ["code"])
    prompt_tokens: int = field(default=64, metadata={"help": "The last ones of the prompt."})
    response_tokens: int = field(default=32, metadata={"help": "The first ones of the response."})
    rules: list[str] = field(
        default_factory=lambda: ["head 0.0001"], metadata={"help": "Scope, step size and, but for the head, cache."}
    )


SECTIONS = {
    "run": RunArguments,
    "text": TextArguments,
    "long": LongArguments,
    "safety": SafetyArguments,
    "known": KnownArguments,
    "scopes": ScopeArguments,
}


class Recipe:
    """The settings, the model and where results are kept."""

    def __init__(self, arguments: list[str]) -> None:
        settings = read_settings(arguments, list(SECTIONS), description=__doc__)
        self.run, self.text, self.long, self.safety, self.known, self.scopes = (
            parse_section(kind, settings[name]) for name, kind in SECTIONS.items()
        )
        self.output = Path(self.run.output_dir)
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        self.model: PreTrainedModel = load_base(self.run.model).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.run.model)

    def rules(self, rates: list[float]) -> dict[str, TTTConfig]:
        """Step sizes on the response alone, and on the prompt too."""
        tried = [
            TTTConfig(lr, on_prompt=on_prompt, top_k=self.run.top_k) for on_prompt, lr in product((False, True), rates)
        ]
        return {rule_label(rule): rule for rule in tried}

    def folder(self, part: str) -> Path:
        """Where the results of a part are kept, once it is clear that they are of these settings."""
        kept: Settings = {"text": asdict(self.text)} | {part: asdict(getattr(self, part))}
        kept["run"] = {name: getattr(self.run, name) for name in ("model", "top_k", "seed")}
        refuse_other_settings(self.output / part, kept)
        return self.output / part

    def windows(self, kind: str, prompt_tokens: int, response_tokens: int, documents: int) -> Dataset:
        """Windows of a kind, the same ones each time."""
        return windows_of(
            kind,
            self.tokenizer,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            documents=documents,
            seed=self.run.seed,
        )


def main() -> None:
    recipe, console = Recipe(sys.argv[1:]), Console()
    results = Results(recipe.rules(sorted({*recipe.text.lr, *recipe.known.lr})), {}, {}, {}, {}, {})
    parts = {
        "text": (over_texts, results.texts),
        "long": (over_long_texts, results.long),
        "safety": (over_unsafe_steps, results.safety),
        "known": (over_references, results.known),
        "scopes": (over_scopes, results.scoped),
    }
    unknown = sorted(set(recipe.run.parts) - set(parts))
    if unknown:
        raise ValueError(f"`parts` must be among {', '.join(parts)}, got {unknown[0]!r}.")
    for part in recipe.run.parts:
        experiment, found = parts[part]
        start = time.process_time()
        for name, values in experiment(recipe, recipe.folder(part)):
            found[name] = values
            console.print(
                f"{part}, {name} ({time.process_time() - start:.0f} s of processor time)",
                markup=False,
                highlight=False,
            )
            start = time.process_time()
    report(recipe.output, results)


def follow_corpus(model: nn.Module, corpus: Dataset, rules: Mapping[str, TTTConfig], folder: Path) -> Followed:
    """Score all responses of a corpus, which must be equally long, under all rules; what `folder` has is read."""
    scores = score_rules(model, None, corpus, rules, per_token=True, output_dir=folder, shard_rows=1)
    return {name: np.array(scored.token_logprobs) for name, scored in scores.items()}


def over_texts(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Followed]]:
    """Real text, whose density nobody knows."""
    shape = recipe.text.prompt_tokens, recipe.text.response_tokens, recipe.text.documents
    for kind in KINDS:
        corpus = recipe.windows(kind, *shape)
        yield kind, follow_corpus(recipe.model, corpus, recipe.rules(recipe.text.lr), folder / kind)


def over_long_texts(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Followed]]:
    """The same with longer responses, to see what becomes of the steps as they add up."""
    rules = [TTTConfig(lr, top_k=recipe.run.top_k) for lr in recipe.long.lr]
    shape = recipe.long.prompt_tokens, recipe.long.response_tokens, recipe.long.documents
    for kind in KINDS:
        named = {rule_label(rule): rule for rule in rules}
        yield kind, follow_corpus(recipe.model, recipe.windows(kind, *shape), named, folder / kind)


def over_unsafe_steps(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Followed]]:
    """Steps that are too large, kept in a ball or drawn back; all of them exact."""
    args, shape = recipe.safety, (recipe.text.prompt_tokens, recipe.text.response_tokens, recipe.text.documents)
    rules = [TTTConfig(lr) for lr in args.lr]
    rules += [TTTConfig(lr, radius=radius) for lr, radius in product(args.lr, args.radius)]
    rules += [TTTConfig(lr, decay=decay) for lr, decay in product(args.lr, args.decay)]
    rules += [TTTConfig(lr, lam=0.0) for lr in args.normalised_lr]
    for kind in KINDS:
        corpus = recipe.windows(kind, *shape)
        corpus = corpus.select(range(min(args.documents, len(corpus))))
        named = {rule_label(rule): rule for rule in rules}
        yield kind, follow_corpus(recipe.model, corpus, named, folder / kind)


def over_references(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Known]]:
    """References of known density: the model's samples, covered by what became of it, or changed and covered by it."""
    calibration = torch.tensor(recipe.windows("code", 32, 64, 16)["prompt"][:])
    args = recipe.known
    pairs = [(f"D at {temperature:g}", ITSELF) for temperature in args.temperatures if temperature != 1]
    pairs += [(TASTE, ITSELF)] if args.taste else []
    pairs += [("D at 1", student) for student in args.students]
    for reference, student in pairs:
        corpus = remember_corpus(folder / "corpora" / reference, partial(sampled, recipe, reference))
        model: nn.Module = recipe.model
        if student.startswith("context-"):
            model = ShortContext(recipe.model, int(student.removeprefix("context-")))
        elif student != ITSELF:
            model = compression(student, calibration=calibration)(recipe.model)
        name = f"{student}, {reference}"
        found = follow_corpus(model, corpus, recipe.rules(args.lr), folder / name)
        yield name, Known(np.array(corpus["reference_logprob"][:]), found)


def sampled(recipe: Recipe, reference: str) -> Dataset:
    """Sample responses of a reference to the beginnings of windows."""
    args = recipe.known
    windows = [recipe.windows(kind, args.prompt_tokens, args.response_tokens, args.prompts) for kind in KINDS[:-1]]
    teacher, temperature = recipe.model, 1.0
    if reference == TASTE:
        teacher = with_taste(recipe.model, share=args.taste_share, strength=args.taste, seed=recipe.run.seed)
    else:
        temperature = float(reference.removeprefix("D at "))
    return sample_corpus(
        teacher,
        None,
        concatenate_datasets(windows)["prompt"][:],
        k=1,
        max_new_tokens=args.response_tokens,
        temperature=temperature,
        eos_token_id=[],  # all of them equally long
        seed=recipe.run.seed,
    )


def with_taste(model: PreTrainedModel, *, share: float, strength: float, seed: int) -> PreTrainedModel:
    """The model with a bias towards a random part of its vocabulary, nats: what steps of the head can learn."""
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    liked = np.random.default_rng(seed).random(head.out_features) < share
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.copy_(strength * torch.from_numpy(liked))
    changed = copy.deepcopy(model)
    changed.set_output_embeddings(biased)
    return changed


def over_scopes(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Scoped]]:
    """Few and short texts, followed by the head, by adapters and by all parameters."""
    args, shape = recipe.scopes, (recipe.text.prompt_tokens, recipe.text.response_tokens, recipe.text.documents)
    rules = [None, *map(scope_rule, args.rules)]
    for kind in args.kinds:
        corpus = recipe.windows(kind, *shape)
        corpus = corpus.select(range(min(args.documents, len(corpus)))).map(lambda row: shortened(row, args))
        for rule in rules:
            name = f"{kind}, {PLAIN if rule is None else rule_label(rule)}"
            table = score_responses(recipe.model, None, corpus, ttt=rule, output_dir=folder / name, shard_rows=1)
            yield name, Scoped(kind, rule, np.array(table["logprob"][:]), args.response_tokens)


def scope_rule(words: str) -> TTTConfig:
    """What `"lora 0.03 stale"` or `"head 0.0001"` stands for, with steps on the prompt too."""
    scope, lr, cache = [*words.split(), "exact"][:3]
    return TTTConfig(float(lr), scope=cast("TTTScope", scope), cache=cast("TTTCache", cache), on_prompt=True)


def shortened(row: dict[str, list[int]], args: ScopeArguments) -> dict[str, list[int]]:
    return {
        "prompt": row["prompt"][-args.prompt_tokens :],
        "completion": row["completion"][: args.response_tokens],
    }


if __name__ == "__main__":
    main()
