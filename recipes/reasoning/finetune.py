r"""Fine-tune a language model on a task of `reasoning_gym`, its coverage of held-out questions beside the loss.

    python -m recipes.reasoning.finetune --config recipes/reasoning/chain_sum.yaml

Any value of the configuration can be given on the command line too, as `--section.name value`; those of `run` need no
section. A run that was stopped goes on from its last checkpoint when the same command is given again.

Prompts are plain text, `<question>\nAnswer:`, and a response is a space, the answer and the end-of-sequence token;
training and scoring tokenise them by the same function. The profile of the model as it came and that of every
checkpoint end up in `<output_dir>/profiles`, from where `recipes.reasoning.compare` takes them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_coverage import CoverageCallback, CoverageProfile
from hf_coverage.functional.checks import FloatArray
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.scoring import score_encoded
from recipes.profiles import write_profile
from recipes.reasoning.collator import AnswerCollator
from recipes.reasoning.model import add_adapter, load_base
from recipes.reasoning.task import Entry, draw_entries, entry_corpus
from recipes.reasoning.top_layers import LayersBelow, TopCollator, answer_logprobs
from recipes.settings import Settings, parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2, load_tokenizer


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "Folder of everything written."})
    seed: int = field(default=0, metadata={"help": "Seed of the adapter, the order of the rows and the samples."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; None leaves it to torch."})


@dataclass
class ModelArguments:
    name: str = field(default=SMOLLM2, metadata={"help": f"{SMOLLM2} comes with a package; else a folder or Hub id."})
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    layers: int | None = field(default=None, metadata={"help": "Adapt the last so many layers alone; None: all."})


@dataclass
class DataArguments:
    train_rows: int = field(default=512, metadata={"help": "Different questions to train on."})
    rows: int = field(default=256, metadata={"help": "Held-out questions."})
    train_seed: int = field(default=1_000_000, metadata={"help": "Seed of the questions to train on."})
    seed: int = field(default=2_000_000, metadata={"help": "Seed of the held-out questions."})


@dataclass
class MeasureArguments:
    n: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0, 16.0], metadata={"help": "The N of Cov_N."})
    pass_at: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32], metadata={"help": "The N of Pass@N."})
    samples: int = field(default=32, metadata={"help": "Responses drawn to each prompt."})
    sample_prompts: int = field(default=64, metadata={"help": "Held-out questions that responses are drawn to."})
    sample_steps: list[int] = field(default_factory=list, metadata={"help": "Draw from these steps; none: from all."})
    max_new_tokens: int = field(default=8, metadata={"help": "Most tokens of a drawn response."})
    batch_size: int = field(default=256, metadata={"help": "Responses drawn at once."})


SECTIONS = {
    "run": RunArguments,
    "model": ModelArguments,
    "data": DataArguments,
    "measure": MeasureArguments,
    "finetune": TrainingArguments,
}


class Recipe(NamedTuple):
    """A configuration, each section parsed; `task` is what `reasoning_gym.create_dataset` takes."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    measure: MeasureArguments
    finetune: TrainingArguments
    task: dict[str, Any]
    settings: Settings

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir)

    def train_entries(self) -> list[Entry]:
        """Draw the questions to train on: none of the held-out ones."""
        held_out = self.held_out_entries()
        return draw_entries(self.task, self.data.train_rows, seed=self.data.train_seed, besides=held_out)

    def held_out_entries(self) -> list[Entry]:
        """Draw the held-out questions."""
        return draw_entries(self.task, self.data.rows, seed=self.data.seed)


class KeepProfiles(TrainerCallback):
    """Write the profile of every checkpoint into a file of its own, where a resumed run finds it again."""

    def __init__(self, coverage: CoverageCallback, folder: Path) -> None:
        self.coverage, self.folder = coverage, folder

    def on_save(self, args, state, control, **kwargs):
        """Write the profile that the logging of this step has just left behind."""
        step, profile = state.global_step, self.coverage.profile
        if state.is_world_process_zero and profile is None:
            raise ValueError(f"There is no profile of step {step}: `save_steps` must be a whole number of steps.")
        if state.is_world_process_zero:
            write_profile(profile, self.folder, step)


class KeepTopProfiles(TrainerCallback):
    """Write the profile of every checkpoint, from the hidden states that the layers below gave once."""

    def __init__(self, encoded: EncodedCorpus, corpus: Dataset, collate: AnswerCollator, folder: Path) -> None:
        self.encoded, self.corpus, self.collate, self.folder = encoded, corpus, collate, folder

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Score the held-out questions, before the checkpoint is there: none is ever without a profile."""
        if control.should_save or state.global_step % state.save_steps == 0:
            logprobs = answer_logprobs(model, self.encoded, self.collate)
            write_profile(profile_of(logprobs, self.corpus), self.folder, state.global_step)


class Prepared(NamedTuple):
    """What trainings of one task share, whatever their seeds."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: EncodedCorpus
    held_out: Dataset
    encoded: EncodedCorpus
    collate: AnswerCollator


def main() -> None:
    recipe = read_recipe(sys.argv[1:], __doc__)
    refuse_other_settings(recipe.output, kept_settings(recipe))
    fine_tune(recipe, prepare(recipe))


def prepare(recipe: Recipe) -> Prepared:
    """Load the model, draw the questions, and read them in the layers that are not trained."""
    use_threads(recipe)
    base, tokenizer = load_base(recipe.model.name), load_tokenizer(recipe.model.name)
    held_out = entry_corpus(recipe.held_out_entries())
    train = encode_corpus(entry_corpus(recipe.train_entries()), tokenizer, append_eos=True)
    encoded = encode_corpus(held_out, tokenizer, append_eos=True)
    collate = AnswerCollator(tokenizer.pad_token_id)
    if recipe.model.layers is not None:
        below = LayersBelow(base, recipe.model.layers)
        below.read([*zip(train.prompts, train.completions), *zip(encoded.prompts, encoded.completions)])
        collate = TopCollator(tokenizer.pad_token_id, below)
    return Prepared(base, tokenizer, train, held_out, encoded, collate)


def fine_tune(recipe: Recipe, prepared: Prepared) -> None:
    """Train an adapter to the end of the run, and leave the model without it."""
    base, tokenizer, train, held_out, encoded, collate = prepared
    model = add_adapter(
        base,
        rank=recipe.model.rank,
        alpha=recipe.model.alpha,
        dropout=recipe.model.dropout,
        seed=recipe.run.seed,
        layers=recipe.model.layers,
    )
    profiles = recipe.output / "profiles"
    if not profiles.exists():
        first = (
            score_encoded(model, encoded, progress=True).logprob
            if recipe.model.layers is None
            else answer_logprobs(model, encoded, collate)
        )
        write_profile(profile_of(first, held_out), profiles, step=0)

    trainer = Trainer(
        model=model,
        args=recipe.finetune,
        data_collator=collate,
        train_dataset=list(zip(train.prompts, train.completions)),
        processing_class=tokenizer,
        callbacks=keeping(recipe, encoded, held_out, collate, profiles),
    )
    folder = Path(recipe.finetune.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    model.unload()


def keeping(
    recipe: Recipe, encoded: EncodedCorpus, corpus: Dataset, collate: AnswerCollator, folder: Path
) -> list[TrainerCallback]:
    """What measures each checkpoint and keeps its profile."""
    if recipe.model.layers is not None:
        return [KeepTopProfiles(encoded, corpus, collate, folder)]
    every = int(recipe.finetune.save_steps)
    coverage = CoverageCallback(corpus, n=recipe.measure.n, append_eos=True, every_n_steps=every)
    return [coverage, KeepProfiles(coverage, folder)]


def read_recipe(arguments: list[str], description: str | None) -> Recipe:
    """Read the configuration and the command line; the training lives in the run's folder and shares its seed."""
    settings = read_settings(arguments, [*SECTIONS, "task"], description=description)
    parsed = {name: parse_section(SECTIONS[name], settings[name]) for name in SECTIONS if name != "finetune"}
    folder = str(Path(parsed["run"].output_dir) / "finetune")
    own = {"seed": parsed["run"].seed, "output_dir": folder, "remove_unused_columns": False}
    parsed["finetune"] = parse_section(TrainingArguments, settings["finetune"] | own)
    return Recipe(**parsed, task=settings["task"], settings=settings)


def kept_settings(recipe: Recipe) -> Settings:
    """What a training depends on; what is measured of it may change."""
    kept = {name: dict(section) for name, section in recipe.settings.items() if name not in ("run", "measure")}
    return kept | {"run": {"seed": recipe.run.seed}}


def use_threads(recipe: Recipe) -> None:
    """Set the number of CPU threads where one is given."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)


def profile_of(logprobs: FloatArray, corpus: Dataset) -> CoverageProfile:
    """The profile of one right answer a question."""
    return CoverageProfile.from_logprobs(logprobs, np.zeros(len(logprobs)), groups=corpus["prompt"][:])


if __name__ == "__main__":
    main()
