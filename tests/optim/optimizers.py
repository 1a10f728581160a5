"""All optimizers of the package, and the small problem that their tests share."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from hf_coverage import NormalizedGradient, NormalizedSGD

FACTORIES: dict[str, Callable[..., Optimizer]] = {
    "NormalizedGradient(SGD)": lambda params: NormalizedGradient(SGD(params, lr=0.1), lam=1.0),
    "NormalizedGradient(SGD, foreach, momentum)": lambda params: NormalizedGradient(
        SGD(params, lr=0.1, momentum=0.9, foreach=True), lam=0.5
    ),
    "NormalizedGradient(SGD, fused, momentum)": lambda params: NormalizedGradient(
        SGD(params, lr=0.1, momentum=0.9, fused=True), lam=0.5
    ),
    "NormalizedGradient(AdamW, fused)": lambda params: NormalizedGradient(AdamW(params, lr=0.1, fused=True), lam=1.0),
    "NormalizedSGD": lambda params: NormalizedSGD(params, lr=0.1, lam=1.0),
    "NormalizedSGD(momentum, ball)": lambda params: NormalizedSGD(
        params, lr=0.1, lam=1.0, momentum=0.9, radius=0.2, center="start"
    ),
    "NormalizedSGD(foreach, ball around zero)": lambda params: NormalizedSGD(
        params, lr=0.1, lam=1.0, foreach=True, radius=1.0
    ),
    "NormalizedSGD(per group)": lambda params: NormalizedSGD(params, lr=0.1, lam=1.0, per="group"),
    "NormalizedSGD(per tensor)": lambda params: NormalizedSGD(params, lr=0.1, lam=0.0, per="tensor"),
    "NormalizedSGD(sign)": lambda params: NormalizedSGD(params, lr=0.01, lam=0.0, per="coordinate"),
}

NO_SPARSE = {"NormalizedGradient(SGD, fused, momentum)", "NormalizedGradient(AdamW, fused)"}
"""torch's fused implementations refuse sparse gradients."""

NO_DTENSOR = {"NormalizedGradient(SGD, fused, momentum)"}
"""torch's fused SGD does not know them; NormalizedSGD hands its kernel the shards."""

READS_THE_HOST = {
    "NormalizedGradient(SGD)",
    "NormalizedGradient(SGD, foreach, momentum)",
    "NormalizedSGD(foreach, ball around zero)",
}
"""Inner optimizers that can only skip a step on the host, which has to read whether the gradient is finite."""


def build_model() -> nn.Sequential:
    """Two layers with weights that differ in size, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(step: int, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return model(batch(step)).square().sum(1).mean()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(factory: Callable[..., Optimizer], steps: range) -> torch.Tensor:
    model = build_model()
    train(model, factory(model.parameters()), steps)
    return weights(model)
