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
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_coverage import CoverageCallback, CoverageProfile
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.scoring import score_encoded
from recipes.profiles import write_profile
from recipes.reasoning.model import add_adapter, load_base
from recipes.reasoning.task import Entry, draw_entries, entry_corpus
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


class AnswerCollator:
    """Batches in which all answers end together, so that logits are computed for the answers alone."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Pad prompts and answers to one batch."""
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        answers = 1 + max(len(answer) for _, answer in rows)  # the model shifts labels by one
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full((len(rows), answers), -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, length - len(prompt) - len(answer) :] = 1
            labels[row, answers - len(answer) :] = torch.tensor(answer)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
            "logits_to_keep": answers,
        }


def main() -> None:
    recipe = read_recipe(sys.argv[1:], __doc__)
    refuse_other_settings(recipe.output, kept_settings(recipe))
    use_threads(recipe)
    base, tokenizer = load_base(recipe.model.name), load_tokenizer(recipe.model.name)
    held_out = entry_corpus(recipe.held_out_entries())
    train = encode_corpus(entry_corpus(recipe.train_entries()), tokenizer, append_eos=True)

    model = add_adapter(
        base,
        rank=recipe.model.rank,
        alpha=recipe.model.alpha,
        dropout=recipe.model.dropout,
        seed=recipe.run.seed,
    )
    profiles = recipe.output / "profiles"
    if not profiles.exists():
        encoded = encode_corpus(held_out, tokenizer, append_eos=True)
        write_profile(profile_of(model, encoded, held_out), profiles, step=0)

    every = int(recipe.finetune.save_steps)
    coverage = CoverageCallback(held_out, n=recipe.measure.n, append_eos=True, every_n_steps=every)
    trainer = Trainer(
        model=model,
        args=recipe.finetune,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        train_dataset=list(zip(train.prompts, train.completions)),
        processing_class=tokenizer,
        callbacks=[coverage, KeepProfiles(coverage, profiles)],
    )
    folder = Path(recipe.finetune.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)


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


def profile_of(model: torch.nn.Module, encoded: EncodedCorpus, corpus: Dataset) -> CoverageProfile:
    """Score a model on the held-out questions."""
    logprobs = score_encoded(model, encoded, progress=True).logprob
    return CoverageProfile.from_logprobs(logprobs, np.zeros(len(encoded)), groups=corpus["prompt"][:])


if __name__ == "__main__":
    main()
