"""The update (18) itself, its variants, and what is refused."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from hf_coverage import NormalizedGradient, NormalizedSGD, layer_groups

KINDS = {
    "NormalizedSGD": lambda params, lr, lam, **options: NormalizedSGD(params, lr=lr, lam=lam, **options),
    "NormalizedSGD(foreach)": lambda params, lr, lam, **options: NormalizedSGD(
        params, lr=lr, lam=lam, foreach=True, **options
    ),
    "NormalizedGradient": lambda params, lr, lam, **options: NormalizedGradient(
        SGD(params, lr=lr), lam=lam, **options
    ),
}


def random_point(seed, sizes=(3, 4, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def gradients_at(parameters):
    """Of a function with a different curvature for each coordinate."""
    return [[(1 + 0.3 * i) * math.tanh(x - 0.7) for i, x in enumerate(values)] for values in parameters]


def descend_by_definition(start, *, lr, lam, steps, radius=None, center="zero", per="model"):
    """Equation (18) on lists of numbers."""
    theta = [values.tolist() for values in start]
    middle = [[x if center == "start" else 0.0 for x in values] for values in theta]
    for _ in range(steps):
        grads = gradients_at(theta)
        norms = [math.hypot(*values) for values in grads]
        if per == "model":
            norms = [math.hypot(*norms)] * len(norms)
        divisors = [
            [lam + (abs(g) if per == "coordinate" else norm) for g in values] for values, norm in zip(grads, norms)
        ]
        theta = [
            [x - lr * g / d for x, g, d in zip(values, grad, divisor)]
            for values, grad, divisor in zip(theta, grads, divisors)
        ]
        if radius is not None:
            away = [[x - c for x, c in zip(values, c_values)] for values, c_values in zip(theta, middle)]
            shrink = min(1.0, radius / math.hypot(*(x for values in away for x in values)))
            theta = [[c + shrink * a for c, a in zip(cs, values)] for cs, values in zip(middle, away)]
    return [x for values in theta for x in values]


def descend(make, start, *, lr, lam, steps, **options):
    parameters = [nn.Parameter(values.clone()) for values in start]
    optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:]}], lr, lam, **options)
    for _ in range(steps):
        for parameter, gradient in zip(parameters, gradients_at([p.tolist() for p in parameters])):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return torch.cat([p.detach() for p in parameters]).tolist(), optimizer


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 10**6),
    lr=st.floats(0.01, 1.0),
    lam=st.floats(0, 5),
    radius=st.none() | st.floats(0.2, 3.0),
    center=st.sampled_from(["zero", "start"]),
    per=st.sampled_from(["model", "tensor", "coordinate"]),
)
@settings(max_examples=30, deadline=None)
def test_updates_equal_equation_18_in_float64(kind, seed, lr, lam, radius, center, per):
    settings = {"radius": radius, "center": "zero" if radius is None else center, "per": per}
    start = random_point(seed)
    found, _ = descend(KINDS[kind], start, lr=lr, lam=lam, steps=5, **settings)
    expected = descend_by_definition(start, lr=lr, lam=lam, steps=5, **settings)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_may_have_norms_and_lambdas_of_their_own(kind):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lam": 5.0}, {"params": [b]}]
    optimizer = KINDS[kind](groups, 1.0, 1.0, per="group")
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer.step()
    assert [-x for x in a.tolist()] == pytest.approx([0.3, 0.4])
    assert [-x for x in b.tolist()] == pytest.approx([12 / 13])
    assert float(optimizer.last_norm) == 13


@given(st.integers(0, 10**6), st.floats(1e-4, 1e4))
@settings(max_examples=25, deadline=None)
def test_without_lambda_the_scale_of_the_loss_does_not_matter(seed, scale):
    results = []
    for factor in (1.0, scale):
        parameter = nn.Parameter(random_point(seed)[0])
        optimizer = NormalizedSGD([parameter], lr=0.1, lam=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (factor * (parameter - 0.3).square().sum()).backward()
            optimizer.step()
        results.append(parameter.tolist())
    assert results[1] == pytest.approx(results[0], rel=1e-9)


def test_momentum_and_decay_are_those_of_torch_on_the_normalised_gradient():
    results = []
    for make in (
        lambda p: NormalizedSGD(p, lr=0.1, lam=0.5, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: NormalizedGradient(SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), lam=0.5),
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    ):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = make([parameter])
        for _ in range(4):
            gradient = parameter.detach() * torch.tensor([3.0, 1.0], dtype=torch.float64)
            parameter.grad = (
                gradient if isinstance(optimizer, NormalizedGradient) else gradient / (0.5 + gradient.norm())
            )
            optimizer.step()
        results.append(parameter.tolist())
    assert results[0] == pytest.approx(results[2], rel=1e-12)
    assert results[1] == pytest.approx(results[2], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_parameters_are_stepped_with_a_float32_norm(kind):
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = KINDS[kind]([parameter], 1.0, 0.0)
    parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert optimizer.last_norm.dtype == torch.float32
    assert float(optimizer.last_norm) == pytest.approx(3 * math.sqrt(1000), rel=1e-6)
    assert parameter.detach().float().tolist() == pytest.approx([-1 / math.sqrt(1000)] * 1000, rel=1e-2)


def test_a_ball_around_the_start_survives_a_checkpoint():
    """The starting point is part of the state, so that a resumed run keeps the ball of the first one."""
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = NormalizedSGD([parameter], lr=1.0, lam=0.0, radius=1.5, center="start")
    parameter.grad = torch.ones(1)
    optimizer.step()
    resumed = nn.Parameter(parameter.detach().clone())
    other = NormalizedSGD([resumed], lr=1.0, lam=0.0, radius=1.5, center="start")
    other.load_state_dict(optimizer.state_dict())
    resumed.grad = torch.ones(1)
    other.step()
    assert resumed.item() == 1.5


def test_layer_groups_hold_each_trainable_parameter_once(tiny_gpt2):
    tiny_gpt2.transformer.wpe.weight.requires_grad_(False)
    groups = layer_groups(tiny_gpt2)
    assert [len(group["params"]) for group in groups] == [1, 12, 12, 2]  # embedding, two blocks, final norm
    parameters = [id(p) for group in groups for p in group["params"]]
    assert sorted(parameters) == sorted(id(p) for p in tiny_gpt2.parameters() if p.requires_grad)


def an_optimizer():
    return SGD([nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, "`lam` must be a finite number, at least 0, but is -1.0"),
        ({"lam": math.nan}, "`lam` must be a finite number, at least 0, but is nan"),
        (
            {"lam": 1.0, "per": "layer"},
            "`per` must be one of 'model', 'group', 'tensor', 'coordinate', but is 'layer'",
        ),
        ({"lam": 1.0, "nonfinite": "zero"}, "`nonfinite` must be one of 'skip', 'raise', but is 'zero'"),
        ({"lam": 1.0, "radius": 0.0}, "`radius` must be positive, or None for no projection, but is 0.0"),
        ({"lam": 1.0, "center": "start"}, '`center="start"` needs a `radius`'),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormalizedGradient(an_optimizer(), **arguments)
    with pytest.raises(ValueError, match=message):
        NormalizedSGD([nn.Parameter(torch.ones(2))], lr=0.1, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [nn.Parameter(torch.ones(2))], "must be a torch.optim.Optimizer, but is list"),
        (lambda: LBFGS([nn.Parameter(torch.ones(2))]), "LBFGS compares gradients of several points"),
        (lambda: NormalizedGradient(an_optimizer(), lam=1.0), "NormalizedGradient already normalises it"),
        (lambda: Accelerator(cpu=True).prepare(an_optimizer()), "already prepared by accelerate.*wrap first"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        NormalizedGradient(make(), lam=1.0)


def test_differentiable_optimizers_are_refused():
    with pytest.raises(ValueError, match="differentiable=True"):
        NormalizedGradient(SGD([nn.Parameter(torch.ones(2))], lr=0.1, differentiable=True), lam=1.0)


def test_deepspeed_is_refused_when_it_is_set_up_before_the_optimizer_and_after(monkeypatch):
    optimizer = NormalizedGradient(an_optimizer(), lam=1.0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed steps with partitions.*Use FSDP2"):
        NormalizedGradient(an_optimizer(), lam=1.0)
    with pytest.raises(ValueError, match=r"DeepSpeed steps with partitions.*Use FSDP2"):
        optimizer.step()


def test_adamw_inside_undoes_most_of_the_normalisation():
    """Why the documentation names plain SGD: what normalising does to Adam's first steps is within its epsilon."""
    results = []
    for wrapped in (True, False):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = AdamW([parameter], lr=0.1, weight_decay=0.0)
        if wrapped:
            optimizer = NormalizedGradient(optimizer, lam=1.0)
        parameter.grad = torch.tensor([30.0, -0.5])
        optimizer.step()
        results.append(parameter.tolist())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
