"""Trainings whose tournament is known beforehand: every step has its own weights, or its own scores."""

import numpy as np
import torch
from transformers import TrainerCallback

from hf_coverage.measure.scores import Scores
from tests.measure.callback_runs import make_trainer

ROWS = 40


class SetWeights(TrainerCallback):
    """Makes the weights a function of the step alone, whatever the optimizer and the number of processes; 4 wins."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        generator = torch.Generator().manual_seed(60 + state.global_step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def giving_up(*rows):
    """Log-probabilities of an evaluation: -1, but -9 on the rows that it has given up."""
    logprob = np.full(ROWS, -1.0)
    for span in rows:
        logprob[span] = -9.0
    return logprob


def crafted_scores(by_step, trainer_of):
    """A stand-in for `score_encoded` that gives the log-probabilities set down for the step of the training."""

    def score(model, encoded, **options):
        logprob = by_step[trainer_of().state.global_step]
        return Scores(logprob=np.array(logprob), num_tokens=np.ones(len(encoded), dtype=np.int64))

    return score


def train(monkeypatch, by_step, folder, *callbacks, resume=None, **settings):
    """Train for eight steps, the corpus' scores being what `by_step` says."""
    trainers = []
    monkeypatch.setattr(
        "hf_coverage.measure.corpus_callback.score_encoded", crafted_scores(by_step, lambda: trainers[-1])
    )
    trainers.append(make_trainer(folder, *callbacks, **settings))
    trainers[-1].train(resume_from_checkpoint=resume)
    return trainers[-1]


def steps_in(folder, prefix="checkpoint"):
    """Steps of which a folder has a checkpoint, or a row."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob(f"{prefix}-*"))


def rows_in(folder):
    """Every file of every row, as bytes."""
    files = sorted(path for path in (folder / "tournament").glob("step-*/*") if path.is_file())
    skipped = ("reference.json", "metadata.json")  # they name the folder of the run
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in skipped}
