"""The main job's graphs: all valid paths of each, which of them a verifier takes, and their scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel, PreTrainedModel

from hf_coverage import score_responses
from hf_coverage.functional.checks import IntArray
from hf_coverage.inference.loading import load_whole
from hf_coverage.tasks.layered_graphs import valid_paths
from recipes.pretrain import SECTIONS, MeasureArguments, TaskArguments, last_checkpoint, new_task
from recipes.profiles import step_of
from recipes.settings import parse_section, read_settings

__all__ = ["ANY", "EVEN_LAST", "EVEN_SUM", "ONE", "Paths", "checkpoints_of", "load_graph_model"]

ONE = "the path of the prompt's class"
ANY = "any valid path"
EVEN_SUM = "a valid path, its numbers sum to an even one"
EVEN_LAST = "a valid path, even where it last had a choice"


@dataclass(frozen=True)
class Paths:
    """Prompts, and all valid paths of each.

    Attributes:
        prompts: Token ids of R prompts.
        paths: `(R, K, T)` token ids.
        right: By verifier, `(R, K)` which of the paths it takes.
    """

    prompts: list[list[int]]
    paths: IntArray
    right: dict[str, NDArray[np.bool_]]

    @classmethod
    def draw(cls, config: Path, rows: int) -> "Paths":
        """The first rows of the corpus that a run of `recipes.pretrain` with this configuration is measured on."""
        settings = read_settings(["--config", str(config)], list(SECTIONS), description=None)
        task_args = parse_section(TaskArguments, settings["task"])
        measure = parse_section(MeasureArguments, settings["measure"])
        drawn = new_task(task_args).sample(measure.rows, task_args.finetune_weights, seed=(measure.corpus_seed, 0))
        if rows > measure.rows:
            raise ValueError(f"`rows` must be at most the {measure.rows} of {config}, but is {rows}.")
        graphs = drawn.graphs[:rows]
        paths = np.array(valid_paths(graphs))
        wide = graphs.passable.sum(axis=-1) > 1
        last = 1 + wide.shape[1] - 1 - wide[:, ::-1].argmax(axis=1)  # the source is before the layers
        right = {
            ONE: (paths == drawn.paths[:rows, None]).all(axis=-1),
            ANY: np.ones(paths.shape[:2], dtype=bool),
            EVEN_SUM: paths.sum(axis=-1) % 2 == 0,
            EVEN_LAST: np.take_along_axis(paths, last[:, None, None], axis=-1)[..., 0] % 2 == 0,
        }
        return cls([prompt.tolist() for prompt in drawn.prompts[:rows]], paths, right)

    def scores(self, model: PreTrainedModel) -> dict[str, list[list[float]]]:
        """The paths' log-probabilities and where their intervals begin, `(R, K)` each."""
        rows, size = self.paths.shape[:2]
        prompts = [prompt for prompt in self.prompts for _ in range(size)]
        corpus = Dataset.from_dict({"prompt": prompts, "completion": self.paths.reshape(rows * size, -1)})
        scored = score_responses(model, None, corpus, intervals=True, progress=False)
        return {name: np.array(scored[name][:]).reshape(rows, size).tolist() for name in ("logprob", "interval_low")}


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The checkpoints of a run of `recipes.pretrain` by their step, the one before the fine-tuning as step 0."""
    pretrained = last_checkpoint(run / "pretrain")
    found = {step_of(folder): folder for folder in (run / "finetune").glob("checkpoint-*")}
    if pretrained is None or not found:
        raise ValueError(f"{run} holds no checkpoints of both phases: run `recipes.pretrain` first.")
    return {0: pretrained} | {step: found[step] for step in sorted(found)}


def load_graph_model(checkpoint: Path) -> PreTrainedModel:
    """Load a checkpoint, in eval mode."""
    model: PreTrainedModel = load_whole(GPT2LMHeadModel, checkpoint)
    return model.eval()
