"""Run by torchrun on two ranks: trains every optimizer with DDP and FSDP2, to be compared with one process."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_coverage import NormalizedSGD
from tests.optim.optimizers import FACTORIES, NO_DTENSOR, batch, build_model
from tests.optim.trainer_runs import make_trainer

STEPS = range(4)


def groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """By layer, since torch's foreach implementations take no DTensors and plain tensors in one group."""
    return [{"params": list(layer.parameters())} for layer in (model[0], model[2])]


def shard(model: nn.Module) -> nn.Module:
    """All but the last layer, so that gradients are DTensors and plain tensors together."""
    return fully_shard(model, ignored_params=set(model[2].parameters()))


def full_weights(model: nn.Module) -> torch.Tensor:
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


def train(model: nn.Module, optimizer: Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)[rank::2]).square().sum(1).mean().backward()
        average_what_is_not_sharded(model)
        optimizer.step()


def average_what_is_not_sharded(model: nn.Module) -> None:
    """Gradients of parameters that FSDP ignores are the user's to reduce."""
    if not isinstance(model, DistributedDataParallel):
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                torch.distributed.all_reduce(parameter.grad, torch.distributed.ReduceOp.AVG)


def prepared_before_sharding(factory: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    """As `accelerator.prepare` does it: the optimizer's parameters are replaced by the sharded ones."""
    model = build_model()
    optimizer = factory(groups(model))
    shard(model)
    for group, sharded in zip(optimizer.param_groups, groups(model)):
        group["params"] = sharded["params"]
    return model, optimizer


def resumed(factory: Callable[..., Optimizer], rank: int) -> torch.Tensor:
    """Two steps, a checkpoint of the shards, two steps in other objects."""
    model = shard(build_model())
    optimizer = factory(groups(model))
    train(model, optimizer, rank, range(2))
    optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer)
    other = shard(build_model())
    other.load_state_dict(model.state_dict())
    its_optimizer = factory(groups(other))
    set_optimizer_state_dict(other, its_optimizer, state)
    train(other, its_optimizer, rank, range(2, 4))
    return full_weights(other)


def error_under_fsdp1() -> str:
    model = FullyShardedDataParallel(build_model(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = NormalizedSGD(model.parameters(), lr=0.1, lam=1.0)
    model(batch(0)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    results = {}
    for name, factory in FACTORIES.items():
        replicated = DistributedDataParallel(build_model())
        optimizer = factory(groups(replicated.module))
        train(replicated, optimizer, rank, STEPS)
        results[f"ddp {name}"], results[f"ddp norm {name}"] = full_weights(replicated), optimizer.last_norm
        if name in NO_DTENSOR:
            continue
        sharded, optimizer = prepared_before_sharding(factory)
        train(sharded, optimizer, rank, STEPS)
        results[f"fsdp2 {name}"], results[f"fsdp2 norm {name}"] = full_weights(sharded), optimizer.last_norm
        results[f"resumed {name}"] = resumed(factory, rank)
    trainer = make_trainer(folder / "trainer", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    results["trainer"] = full_weights(trainer.model)
    results["fsdp1"] = error_under_fsdp1()
    np.savez(folder / f"rank{rank}.npz", **{name: np.asarray(value) for name, value in results.items()})
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
