"""Reasoning tasks: scores of the right answers with their intervals, and samples that a verifier judges."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage import score_responses
from hf_coverage.decode.best_of_n import evaluate_best_of_n
from hf_coverage.decode.verifiers import ReasoningGym
from recipes.choice.finetune import recipe_of
from recipes.profiles import step_of
from recipes.reasoning.finetune import Recipe
from recipes.reasoning.model import load_base, load_checkpoint
from recipes.reasoning.task import entry_corpus
from recipes.smollm2 import load_tokenizer

__all__ = ["Questions"]


@dataclass
class Questions:
    """Runs of `recipes.choice.finetune`, and held-out questions of their tasks.

    Attributes:
        config: Configuration of the runs.
        runs: Their folder.
        model: What was fine-tuned.
        seed: Of the runs that are taken.
        count: Questions of a task.
    """

    config: str
    runs: str
    model: str
    seed: int
    count: int

    def __post_init__(self) -> None:
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def scores(self, task: str, step: int) -> dict[str, list[list[float]]]:
        """Log-probabilities of the right answers and where their intervals begin, `(R, 1)` each."""
        model, tokenizer, corpus = self._open(task, step)
        scored = score_responses(model, tokenizer, corpus, append_eos=True, intervals=True, progress=False)
        return {name: [[value] for value in scored[name][:]] for name in ("logprob", "interval_low")}

    def sampled(self, task: str, step: int, folder: Path, **settings: Any) -> Mapping[str, list[list[float]]]:
        """Rewards of samples `(R, k)`, judged by the task's own verifier; the samples are kept in the folder."""
        model, tokenizer, corpus = self._open(task, step)
        result = evaluate_best_of_n(
            model,
            tokenizer,
            corpus,
            ReasoningGym(task),
            eos_token_id=tokenizer.eos_token_id,  # what the scored answers end with
            output_dir=folder,
            timeout=None,  # the tasks' own verifiers are quick, and do not hang
            progress=False,
            **settings,
        )
        return {"rewards": result.rewards.tolist()}

    def _recipe(self, task: str) -> Recipe:
        more = ["--config", self.config, "--data.rows", str(self.count), "--model.name", self.model]
        return recipe_of(task, self.seed, Path(self.runs), more)

    def _open(self, task: str, step: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]:
        recipe = self._recipe(task)
        found = {step_of(folder): folder for folder in recipe.output.glob("finetune/checkpoint-*")}
        if step and step not in found:
            raise ValueError(
                f"{recipe.output} holds the steps {sorted(found)}, but not {step}: run `recipes.choice.finetune`."
            )
        if self._loaded is None:
            self._loaded = load_base(self.model).eval(), load_tokenizer(self.model)
        base, tokenizer = self._loaded
        corpus = entry_corpus(recipe.held_out_entries())
        return (load_checkpoint(base, found[step]) if step else base), tokenizer, corpus
