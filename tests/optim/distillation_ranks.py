"""Run by torchrun on two ranks: the Trainer with a teacher and with the coverage loss, against one process."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_coverage.optim.objectives import CoverageLoss
from tests.optim.distillation_runs import collate, distillation_trainer
from tests.optim.optimizers import weights
from tests.optim.trainer_runs import make_trainer, token_rows

RUNS = ("sampled", "soft", "coverage loss")


def run(name: str, folder: Path, **settings):
    """One run of a name, on one process or as one of two."""
    if name == "coverage loss":
        return make_trainer(folder, compute_loss_func=CoverageLoss(500), **settings)
    return distillation_trainer(folder, n=8.0, soft_targets=name == "soft", **settings)


def train_sharded(folder: Path, rank: int, world: int) -> torch.Tensor:
    """Steps without the Trainer's loop, which knows FSDP on accelerators only; student and teacher are sharded."""
    trainer = distillation_trainer(folder, n=8.0)
    if world > 1:
        for model in (trainer.model, trainer.teacher):
            for block in model.transformer.h:
                fully_shard(block)
            fully_shard(model)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    rows = list(token_rows())
    for step in range(3):
        mine = rows[8 * step : 8 * step + 8][rank::world]
        trainer.compute_loss(trainer.model, collate(mine), num_items_in_batch=8).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = list(trainer.model.parameters())
    assert all(isinstance(p, DTensor) == (world > 1) for p in parameters)
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in full])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results, logs = {}, {}
    for name in RUNS:
        trainer = run(name, folder / name, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert trainer.args.world_size == 2
        trainer.train()
        results[name] = weights(trainer.model)
        logs[name] = trainer.state.log_history[0]
        if name == "sampled":
            logs["evaluation"] = trainer.evaluate(token_rows(8))
    rank = trainer.args.process_index
    results["fsdp"] = train_sharded(folder / "fsdp", rank, 2)
    np.savez(folder / f"rank{rank}.npz", **{name: value.numpy() for name, value in results.items()})
    (folder / f"rank{rank}.json").write_text(json.dumps(logs))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
