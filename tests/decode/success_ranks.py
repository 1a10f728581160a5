"""A training of two processes with a SuccessCallback, and what it gives on each of them."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from hf_coverage.decode.success_callback import SuccessCallback
from tests.measure.callback_runs import coverage_history, make_trainer, without_times

# An odd number of prompts, so that the processes have unequal shares.
PROMPTS = Dataset.from_dict({"prompt": [[2 + row % 10, 2 + row // 2] for row in range(7)]})


def begins_even(completions):
    return [float(completion[0] % 2 == 0) for completion in completions]


def callback(**options):
    asked = {"k": 5, "max_new_tokens": 2, "timeout": None, "batch_size": 4} | options
    return SuccessCallback(PROMPTS, begins_even, **asked)


def trained(folder: Path, *callbacks: SuccessCallback):
    trainer = make_trainer(folder, *callbacks, max_steps=4)
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    plain = trained(folder / "plain")
    watched = trained(folder / "watched", callback(), callback(every_n_steps=1, name="own"))
    weights = watched.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.model.state_dict().items())
    state = PartialState()
    untrained = make_trainer(folder / "untrained", callback()).evaluate()
    found = {
        "untrained": {key: value for key, value in untrained.items() if "@" in key or "signal" in key},
        "history": without_times(coverage_history(watched, "eval_pass@5")),
        "every step": without_times(coverage_history(watched, "eval_own_signal_5")),
        "processes": state.num_processes,
    }
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()
