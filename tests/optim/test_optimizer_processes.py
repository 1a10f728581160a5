"""Two gloo ranks, with DDP and FSDP2, give the numbers of one process."""

import numpy as np
import pytest
import torch

from tests.optim import optimizer_ranks
from tests.optim.optimizers import FACTORIES, NO_DTENSOR, build_model, train, weights
from tests.optim.trainer_runs import make_trainer
from tests.processes import run


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("job")
    run(optimizer_ranks.__file__, folder, ranks=2)
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(2)]


def test_ranks_agree_with_each_other(job):
    first, second = job
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("setup", ["ddp", "fsdp2", "resumed"])
@pytest.mark.parametrize("name", FACTORIES)
def test_ranks_agree_with_one_process(job, setup, name):
    if setup != "ddp" and name in NO_DTENSOR:
        pytest.skip("torch's fused SGD knows no DTensor")
    model = build_model()
    optimizer = FACTORIES[name](optimizer_ranks.groups(model))
    train(model, optimizer, optimizer_ranks.STEPS)
    np.testing.assert_allclose(job[0][f"{setup} {name}"], weights(model), rtol=0, atol=1e-6)
    if setup != "resumed":
        np.testing.assert_allclose(job[0][f"{setup} norm {name}"], optimizer.last_norm, rtol=1e-5)


def test_the_trainer_on_two_ranks_agrees_with_one_process(job, tmp_path):
    """Sequences of unequal lengths, two to a rank and accumulation step, against eight at once."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8)
    trainer.train()
    torch.testing.assert_close(torch.tensor(job[0]["trainer"]), weights(trainer.model), rtol=0, atol=1e-6)


def test_fsdp1_is_refused(job):
    assert "FSDP1 leaves each process with shards" in str(job[0]["fsdp1"])
    assert "`fsdp_version: 2`" in str(job[0]["fsdp1"])
