"""A training to be killed: started by the test in a process of its own, it goes on from its last whole checkpoint."""

import json
import sys
from pathlib import Path

import torch

from hf_coverage.select.callback import TournamentCallback
from tests.measure.callback_runs import make_trainer, reference_corpus
from tests.select.callback_runs import SetWeights, steps_in

STEPS = 30


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that a kill did not cut short; the Trainer writes its state last."""
    for step in reversed(steps_in(folder)):
        checkpoint = folder / f"checkpoint-{step}"
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(checkpoint)
    return None


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    callback = TournamentCallback(reference_corpus("samples", rows=40), (4, 2), load_winner_at_end=True)
    settings = {"max_steps": STEPS, "eval_steps": 1, "save_steps": 2, "save_total_limit": 3}
    trainer = make_trainer(root, callback, SetWeights(), **settings)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(root))
    trainer.save_model(str(root / "final"))
