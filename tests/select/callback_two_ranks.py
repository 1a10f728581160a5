"""Trainings that `test_callback_processes.py` starts in one process and, through torchrun, in two."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback

from hf_coverage.select.callback import TournamentCallback
from tests.measure.callback_runs import StopAt, coverage_history, make_trainer, reference_corpus, without_times
from tests.select.callback_runs import SetWeights, steps_in

N = (4, 2)
# An odd number of rows, so that two processes have unequal shares.
CORPUS = reference_corpus("samples", rows=23)
BY_TOURNAMENT = {"load_best_model_at_end": True, "metric_for_best_model": "tournament_4", "greater_is_better": False}
KEYS = ("step", "eval_tournament_4", "eval_tournament_2", "eval_tournament_winner_step")


def same_on_all(value):
    """The value of this process, after checking that the others have the same."""
    values = gather_object([value])
    assert all(other == value for other in values), values
    return value


def facts_of(trainer, folder: Path) -> dict:
    """What must not depend on the number of processes."""
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, TournamentCallback)]
    entries = [[entry[key] for key in KEYS] for entry in coverage_history(trainer, KEYS[1])]
    same_on_all(without_times(coverage_history(trainer, KEYS[1])))
    return same_on_all(
        {
            "log": entries,
            "scores": callback.result.scores,
            "wins": callback.result.win_rates,
            "best": [str(trainer.state.best_model_checkpoint).replace(str(folder), "RUN"), trainer.state.best_metric],
            "checkpoints": steps_in(folder),
            "weights": [p.detach().double().sum().item() for p in trainer.model.parameters()],
        }
    )


def run(folder: Path, *callbacks, resume=None, **settings) -> dict:
    callback = TournamentCallback(CORPUS, N, load_winner_at_end=True)
    trainer = make_trainer(folder, callback, SetWeights(), *callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return facts_of(trainer, folder)


def evaluate_scores(folder: Path) -> dict:
    """An evaluation without a training, of weights that are the same everywhere."""
    trainer = make_trainer(folder, TournamentCallback(CORPUS, N))
    metrics = trainer.evaluate()
    return same_on_all({key: metrics[key] for key in KEYS[1:]})


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    facts = {"protected": run(root / "protected", save_total_limit=2)}
    facts["chosen"] = run(root / "chosen", EarlyStoppingCallback(2), **BY_TOURNAMENT, save_total_limit=1)
    facts["evaluated"] = evaluate_scores(root / "protected")
    run(root / "resumed", StopAt(4), save_total_limit=2)
    # With the callback rebuilt from the checkpoint, its corpus and rows from the folder.
    restoring = {"restore_callback_states_from_checkpoint": True}
    facts["resumed"] = run(root / "resumed", save_total_limit=2, resume=True, **restoring)
    state = PartialState()
    if state.is_main_process:
        (root / "facts.json").write_text(json.dumps({"processes": state.num_processes} | facts, indent=1))
    if state.num_processes > 1:
        state.destroy_process_group()
