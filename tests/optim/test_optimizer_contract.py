"""What every optimizer of the package has to survive: all that training code does to a `torch.optim.Optimizer`.

A new optimizer joins by a line in `optimizers.FACTORIES`; two processes are in `test_optimizer_processes.py`.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.optimizers import (
    FACTORIES,
    NO_SPARSE,
    READS_THE_HOST,
    batch,
    build_model,
    loss_of,
    train,
    trained,
    weights,
)

pytestmark = pytest.mark.parametrize("name", FACTORIES)

SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        milestones=[2],
    ),
}


@pytest.fixture
def problem(name):
    model = build_model()
    return model, FACTORIES[name](model.parameters())


def reload(state_dict):
    """As a checkpoint on disk gives it back."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(model, optimizer):
    return weights(model), copy.deepcopy(optimizer.state_dict())


def assert_unchanged(before, model, optimizer):
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)


def test_is_an_optimizer_and_moves_the_parameters(name, problem):
    model, optimizer = problem
    before = weights(model)
    train(model, optimizer, range(1))
    assert isinstance(optimizer, Optimizer)
    assert (weights(model) != before).all()
    assert type(optimizer).__name__ in repr(optimizer)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_lr_schedulers(name, problem, scheduler):
    """The rate that a scheduler sets is the one that steps: as when it is set by hand."""
    model, optimizer = problem
    schedule = SCHEDULERS[scheduler](optimizer)
    by_hand = build_model()
    other = FACTORIES[name](by_hand.parameters())
    rates = set()
    for step in range(6):
        rates.add(optimizer.param_groups[0]["lr"])
        other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        train(model, optimizer, range(step, step + 1))
        train(by_hand, other, range(step, step + 1))
        schedule.step()
    assert len(rates) == 6
    assert torch.equal(weights(model), weights(by_hand))


def test_accelerator_prepare(name, problem):
    """Prepared with its model and a scheduler, which then move the inner optimizer's rate."""
    model, optimizer = problem
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    assert isinstance(optimizer, AcceleratedOptimizer)
    by_hand = build_model()
    other = FACTORIES[name](by_hand.parameters())
    for step in range(3):
        loss = loss_of(model, step)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        train(by_hand, other, range(step, step + 1))
        other.param_groups[0]["lr"] /= 2
    assert torch.equal(weights(model), weights(by_hand))


def test_accelerated_optimizer_reloads_the_state(name, problem):
    """accelerate loads an optimizer's own state dict back into it, which replaces the parameter groups."""
    model, optimizer = problem
    train(model, optimizer, range(2))
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.load_state_dict(reload(prepared.state_dict()))
    assert optimizer.param_groups is prepared.param_groups
    train(model, prepared, range(2, 4))
    assert torch.equal(weights(model), trained(FACTORIES[name], range(4)))
    prepared.param_groups[0]["lr"] = 0.0
    before = weights(model)
    loss_of(model, 4).backward()
    optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=1e-6)  # a projection may round once more


def test_grad_scaler_unscales_before_the_norm(name, problem):
    """Also with fused optimizers inside, which would otherwise be handed the scaled gradients."""
    model, optimizer = problem
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weights(model), trained(FACTORIES[name], range(3)))


def test_grad_scaler_skips_an_overflow_and_lowers_its_scale(name, problem):
    model, optimizer = problem
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Accelerator(cpu=True)  # the state that prepared optimizers share
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    scaler.scale(loss_of(model, 0)).backward()
    model[0].weight.grad[0, 0] = torch.inf
    before = snapshot(model, optimizer)
    prepared.step()
    assert prepared.step_was_skipped
    assert scaler.get_scale() == 512.0
    assert_unchanged(before, model, optimizer)


def test_state_dict_round_trip_continues_bitwise(name, problem):
    model, optimizer = problem
    train(model, optimizer, range(3))
    resumed = build_model()
    resumed.load_state_dict(model.state_dict())
    other = FACTORIES[name](resumed.parameters())
    other.load_state_dict(reload(optimizer.state_dict()))
    train(resumed, other, range(3, 6))
    assert torch.equal(weights(resumed), trained(FACTORIES[name], range(6)))


def test_distributed_checkpoint_round_trip(name, problem):
    """torch's distributed checkpoints, FSDP2's among them, step once with zero gradients to make the state."""
    model, optimizer = problem
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = build_model()
    resumed.load_state_dict(model.state_dict())
    other = FACTORIES[name](resumed.parameters())
    set_optimizer_state_dict(resumed, other, saved)
    assert torch.equal(weights(resumed), weights(model))
    train(resumed, other, range(3, 6))
    assert torch.equal(weights(resumed), trained(FACTORIES[name], range(6)))


def test_loads_the_checkpoint_of_a_plain_optimizer(name, problem):
    """Without what the package adds: it keeps its own settings."""
    model, optimizer = problem
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    added = set(state_dict["param_groups"][0]) - set(
        torch.optim.SGD(model.parameters()).state_dict()["param_groups"][0]
    )
    for group in state_dict["param_groups"]:
        group.pop("lam")
    for state in state_dict["state"].values():
        state.pop("start", None)
    plain = type(optimizer.optimizer)(model.parameters(), lr=0.3)
    plain.load_state_dict(optimizer.state_dict())
    assert "lam" in added
    assert plain.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    expected = optimizer.param_groups[0]["lam"]
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lam"] == expected
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickling(name, problem, copied):
    """With the model, as its parameters: the copy goes on as the original would, also when a scheduler is attached."""
    model, optimizer = problem
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, range(2))
    model, optimizer = copied((model, optimizer))
    train(model, optimizer, range(2, 4))
    assert torch.equal(weights(model), trained(FACTORIES[name], range(4)))


def test_closures_are_called_once_and_make_the_gradients(name, problem):
    model, optimizer = problem
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(loss_of(model, len(losses)))
        losses[-1].backward()
        return losses[-1]

    returned = [optimizer.step(closure) for _ in range(3)]
    assert returned == losses
    assert torch.equal(weights(model), trained(FACTORIES[name], range(3)))


def test_sparse_gradients_equal_dense_ones(name):
    rows = torch.tensor([1, 3, 3])
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Embedding(5, 2, sparse=sparse), nn.Linear(2, 1)])
        optimizer = FACTORIES[name](model.parameters())
        model[1](model[0](rows)).square().sum().backward()
        if sparse and name in NO_SPARSE:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            return
        optimizer.step()
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_missing_gradients_count_as_nothing(name, problem):
    """A parameter without a gradient stays where it is, unless a ball around zero moves it, and may get one later."""
    model, optimizer = problem
    bystander = build_model()
    optimizer.add_param_group({"params": list(bystander.parameters())})
    optimizer.step()
    before = weights(bystander)
    train(model, optimizer, range(2))
    if optimizer.radius is None or optimizer.center == "start":
        assert torch.equal(weights(bystander), before)
    if optimizer.radius is None:
        assert torch.equal(weights(model), trained(FACTORIES[name], range(2)))
    if "SGD, fused" not in name:  # torch's own cannot start a momentum late
        train(bystander, optimizer, range(2))
        assert (weights(bystander) != before).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_that_are_not_finite_are_skipped_and_counted(name, problem, bad, steps):
    """Neither parameters nor state change, at the first step or later, and training goes on as if it had not been."""
    model, optimizer = problem
    train(model, optimizer, range(steps))
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    model[0].weight.grad[0, 0] = bad
    optimizer.step()
    assert_unchanged(before, model, optimizer)
    assert optimizer.num_nonfinite == 1
    assert not optimizer.last_norm.isfinite()
    train(model, optimizer, range(steps, steps + 2))
    assert optimizer.num_nonfinite == 1
    assert torch.equal(weights(model), trained(FACTORIES[name], range(steps + 2)))


def test_gradients_that_are_not_finite_are_refused_and_counted(name, problem):
    model, optimizer = problem
    optimizer.nonfinite = "raise"
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan, so the step is refused"):
        optimizer.step()
    assert_unchanged(before, model, optimizer)
    assert optimizer.num_nonfinite == 1


def test_add_param_group(name):
    """Groups added one by one are those given at once, with one norm over all of them."""
    results = []
    for at_once in (True, False):
        model = build_model()
        groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
        optimizer = FACTORIES[name](groups if at_once else groups[:1])
        if not at_once:
            optimizer.add_param_group(groups[1])
        train(model, optimizer, range(3))
        results.append(weights(model))
    assert torch.equal(*results)
    if "per group" not in name:
        torch.testing.assert_close(results[0], trained(FACTORIES[name], range(3)))


def test_step_hooks_see_the_gradient_before_the_parameters_after(name, problem):
    model, optimizer = problem
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    loss_of(model, 0).backward()
    gradient = model[0].weight.grad.clone()
    stepped = []
    handle = register_optimizer_step_post_hook(lambda stepping, *_: stepped.append(stepping))
    optimizer.step()
    handle.remove()
    assert len(seen) == 2
    assert torch.equal(seen[0], gradient)
    assert torch.equal(seen[1], weights(model))
    assert stepped.count(optimizer) == 1


def test_state_dict_hooks(name, problem):
    _, optimizer = problem
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "mine"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    state_dict = optimizer.state_dict()
    assert state_dict["mine"] == 1
    optimizer.load_state_dict(state_dict)
    assert calls == ["before saving", "loaded"]


# torch's own import of its compiler, which happens inside the first compilation.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compile(name):
    """Compiled steps give the numbers of plain ones, skipped steps and last norm included."""
    torch._dynamo.reset()
    model = build_model()[0]  # one layer: what is compiled grows with the number of parameters
    plain = copy.deepcopy(model)
    optimizer, other = (FACTORIES[name](each.parameters()) for each in (model, plain))
    step_compiled = torch.compile(optimizer.step, backend="aot_eager")
    for step in range(4):
        for each, its_optimizer in ((model, optimizer), (plain, other)):
            its_optimizer.zero_grad()
            loss_of(each, step).backward()
            if step == 2:
                each.weight.grad[0, 0] = torch.nan
        step_compiled()
        other.step()
        torch.testing.assert_close(optimizer.last_norm, other.last_norm, equal_nan=True)
    assert optimizer.num_nonfinite == other.num_nonfinite == 1
    torch.testing.assert_close(weights(model), weights(plain))


def test_stochastic_weight_averaging_and_ema(name, problem):
    model, optimizer = problem
    averaged = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    visited = []
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
        averaged.update_parameters(model)
        ema.update_parameters(model)
        visited.append(weights(model))
    torch.testing.assert_close(weights(averaged), torch.stack(visited).mean(0))
    torch.testing.assert_close(weights(ema), 0.9 * (0.9 * visited[0] + 0.1 * visited[1]) + 0.1 * visited[2])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


def test_the_step_reads_nothing_back(name, problem):
    """From the second step on, and but for whether the gradient is finite where only the host can skip a step."""
    model, optimizer = problem
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    with HostReads() as reads:
        optimizer.step()
    assert reads.count == (name in READS_THE_HOST)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_does_not_wait_for_a_gpu(name):
    model = build_model().cuda()
    optimizer = FACTORIES[name](model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step).cuda()).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that the debug mode is a prototype
            torch.cuda.set_sync_debug_mode("error" if step and name not in READS_THE_HOST else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.last_norm.is_cuda
