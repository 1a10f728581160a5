"""Does test-time training cover more? SmolLM2-135M on text of four kinds, and against references of known density.

    python -m recipes.test_time_training.compare --config recipes/test_time_training/small.yaml

Cross-entropy and coverage of the model as it is and of the model that makes a step after each token, over step sizes;
over the kinds of text, the length of the context, the temperature of the reference and steps that are too large.
Writes `report.md`, `findings.json` and the figures. Any value of the configuration can be given on the command line,
as `--text.documents 8`. What was stopped goes on with the text that was stopped when the same command is given again.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.builders import sample_corpus
from hf_coverage.measure.scoring import score_responses
from recipes.compression_audit.compress import compression
from recipes.reasoning.model import SMOLLM2, load_base, load_tokenizer
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.test_time_training.findings import Known, Results, Scoped, report
from recipes.test_time_training.following import PLAIN, Followed, follow_corpus, rule_label
from recipes.test_time_training.texts import KINDS, windows_of

ITSELF = "itself"
"""The student that is the reference's own model."""


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    model: str = field(default=SMOLLM2, metadata={"help": f"{SMOLLM2} comes with a package; else a folder or Hub id."})
    lr: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3], metadata={"help": "Step sizes to try."})
    top_k: int | None = field(default=256, metadata={"help": "Cut steps to the likeliest tokens; None: exact."})
    seed: int = field(default=0, metadata={"help": "Of the windows and of what is sampled."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class TextArguments:
    documents: int = field(default=32, metadata={"help": "Of each kind; one half chooses the step size."})
    prompt_tokens: int = 256
    response_tokens: int = 128


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
    prompt_tokens: int = 192
    response_tokens: int = 128
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0], metadata={"help": "D: the model at these."})
    students: list[str] = field(
        default_factory=lambda: [ITSELF, "int4-rtn-64", "context-64"],
        metadata={"help": "Adapted at temperature 1; at the others it is the model itself."},
    )


@dataclass
class ScopeArguments:
    documents: int = field(default=4, metadata={"help": "Of each kind, the first of section `text`."})
    kinds: list[str] = field(default_factory=lambda: ["code"])
    prompt_tokens: int = field(default=64, metadata={"help": "The last ones of the prompt."})
    response_tokens: int = field(default=32, metadata={"help": "The first ones of the response."})
    lora_lr: list[float] = field(default_factory=list)
    all_lr: list[float] = field(default_factory=list)
    head_lr: list[float] = field(default_factory=list)
    caches: list[str] = field(default_factory=lambda: ["stale"], metadata={"help": "Of scopes `lora` and `all`."})


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
        kept = {name: asdict(getattr(self, name)) for name in SECTIONS}
        for name in ("output_dir", "threads"):
            del kept["run"][name]
        refuse_other_settings(self.output, kept)
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        self.model: PreTrainedModel = load_base(self.run.model).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.run.model)

    def rules(self) -> dict[str, TTTConfig]:
        """All step sizes, on the response alone and on the prompt too."""
        tried = [
            TTTConfig(lr, on_prompt=on_prompt, top_k=self.run.top_k)
            for on_prompt, lr in product((False, True), self.run.lr)
        ]
        return {rule_label(rule): rule for rule in tried}

    def windows(self, kind: str, prompt_tokens: int, response_tokens: int, documents: int) -> Dataset:
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
    results = Results(recipe.rules(), {}, {}, {}, {}, [])
    parts = {
        "text": ((results.texts, kind, found) for kind, found in over_texts(recipe)),
        "long": ((results.long, kind, found) for kind, found in over_long_texts(recipe)),
        "safety": ((results.safety, kind, found) for kind, found in over_unsafe_steps(recipe)),
        "known": ((results.known, name, found) for name, found in over_references(recipe)),
    }
    for part, steps in parts.items():
        start = time.monotonic()
        for place, name, found in steps:
            place[name] = found
            console.print(f"{part}, {name} ({time.monotonic() - start:.0f} s)", markup=False, highlight=False)
            start = time.monotonic()
    results.scoped.extend(over_scopes(recipe, console))
    report(recipe.output, results, console)


def over_texts(recipe: Recipe) -> Iterator[tuple[str, Followed]]:
    """Real text, whose density nobody knows."""
    shape = recipe.text.prompt_tokens, recipe.text.response_tokens, recipe.text.documents
    for kind in KINDS:
        corpus = recipe.windows(kind, *shape)
        yield kind, follow_corpus(recipe.model, corpus, recipe.rules(), recipe.output / "text" / kind)


def over_long_texts(recipe: Recipe) -> Iterator[tuple[str, Followed]]:
    """The same with longer responses, to see what becomes of the steps as they add up."""
    rules = [TTTConfig(lr, top_k=recipe.run.top_k) for lr in recipe.long.lr]
    shape = recipe.long.prompt_tokens, recipe.long.response_tokens, recipe.long.documents
    for kind in KINDS:
        named = {rule_label(rule): rule for rule in rules}
        yield kind, follow_corpus(recipe.model, recipe.windows(kind, *shape), named, recipe.output / "long" / kind)


def over_unsafe_steps(recipe: Recipe) -> Iterator[tuple[str, Followed]]:
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
        yield kind, follow_corpus(recipe.model, corpus, named, recipe.output / "safety" / kind)


def over_references(recipe: Recipe) -> Iterator[tuple[str, Known]]:
    """References of known density: the model's own samples, covered by what it has become, or at a temperature."""
    calibration = torch.tensor(recipe.windows("code", 32, 64, 16)["prompt"][:])
    for temperature in recipe.known.temperatures:
        corpus = sampled(recipe, temperature)
        for student in recipe.known.students if temperature == 1 else [ITSELF]:
            model, context = recipe.model, None
            if student.startswith("context-"):
                context = int(student.removeprefix("context-"))
            elif student != ITSELF:
                model = compression(student, calibration=calibration)(recipe.model)
            name = f"{student}, D at {temperature:g}"
            found = follow_corpus(model, corpus, recipe.rules(), recipe.output / "known" / name, context=context)
            yield name, Known(np.array(corpus["reference_logprob"][:]), found)


def sampled(recipe: Recipe, temperature: float) -> Dataset:
    """Responses of the model at a temperature to the beginnings of windows, or those that are there."""
    args, folder = recipe.known, recipe.output / "corpora" / f"{temperature:g}"
    if not folder.exists():
        windows = [recipe.windows(kind, args.prompt_tokens, args.response_tokens, args.prompts) for kind in KINDS[:-1]]
        corpus = sample_corpus(
            recipe.model,
            None,
            concatenate_datasets(windows)["prompt"][:],
            k=1,
            max_new_tokens=args.response_tokens,
            temperature=temperature,
            eos_token_id=[],  # all of them equally long
            seed=recipe.run.seed,
        )
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        corpus.save_to_disk(unfinished)
        unfinished.rename(folder)
    return load_from_disk(folder)


def over_scopes(recipe: Recipe, console: Console) -> Iterator[Scoped]:
    """Few and short texts, followed by the head, by adapters and by all parameters."""
    args, shape = recipe.scopes, (recipe.text.prompt_tokens, recipe.text.response_tokens, recipe.text.documents)
    rules: list[TTTConfig | None] = [None]
    rules += [TTTConfig(lr, on_prompt=True) for lr in args.head_lr]
    for cache in args.caches:
        rules += [TTTConfig(lr, scope="lora", on_prompt=True, cache=cache) for lr in args.lora_lr]
        rules += [TTTConfig(lr, scope="all", on_prompt=True, cache=cache) for lr in args.all_lr]
    for kind in args.kinds:
        corpus = recipe.windows(kind, *shape)
        corpus = corpus.select(range(min(args.documents, len(corpus)))).map(lambda row: shortened(row, args))
        for rule in rules:
            name = PLAIN if rule is None else f"{rule.scope} {rule.lr:g} {rule.cache}"
            start, folder = time.monotonic(), recipe.output / "scopes" / kind / name
            table = score_responses(recipe.model, None, corpus, ttt=rule, output_dir=folder, shard_rows=1)
            console.print(f"scopes, {kind}, {name} ({time.monotonic() - start:.0f} s)", markup=False, highlight=False)
            yield Scoped(kind, rule, np.array(table["logprob"][:]), args.response_tokens)


def shortened(row: dict[str, list[int]], args: ScopeArguments) -> dict[str, list[int]]:
    return {
        "prompt": row["prompt"][-args.prompt_tokens :],
        "completion": row["completion"][: args.response_tokens],
    }


if __name__ == "__main__":
    main()
