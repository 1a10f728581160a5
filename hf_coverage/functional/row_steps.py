"""Gradient steps of parameters that every row of a batch has for itself.

What a network has become for B sequences are tensors with a leading dimension of B. The parameters of one row, all
its tensors together, are one point: norms and balls are taken row by row, and over all tensors.

References:
    arXiv 2510.15020, Equation (22), and (18) for normalised steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_coverage.functional.gradients import stable_norm
from hf_coverage.functional.ttt_config import StepRule

__all__ = ["row_norms", "step_rows_"]


@torch.no_grad()
def row_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Take one Euclidean norm of each row, over all tensors.

    Args:
        tensors: Dense tensors `(B, ...)`, on any devices; taken one after the other.

    Returns:
        `(B,)`, on the first one's device.

    Example:
        >>> row_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[[4.0]], [[1.0]]])])
        tensor([5., 1.])
    """
    norms = [stable_norm(tensor.reshape(len(tensor), -1), dim=1) for tensor in tensors]
    return stable_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), dim=0)


@torch.no_grad()
def step_rows_(
    rows: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    rule: StepRule,
    start: Sequence[Tensor],
    active: Tensor | None = None,
) -> None:
    """Take every row one step up its gradient, in place.

        theta <- Proj( theta_0 + (1 - decay) (theta - theta_0) + a g ),     a = lr or lr / (lam + ||g||)

    Rows that make no step keep their bits, whatever their gradients are.

    Args:
        rows: theta, tensors `(B, ...)`.
        gradients: g, tensors like `rows`.
        rule: How a step is made, but for the number of steps and what is cut, which are not this function's.
        start: theta_0, tensors of the shapes of one row, in any floating dtype.
        active: Rows `(B,)` that make the step; None: all.

    Raises:
        ValueError: If the rule has a ball around zero.

    Example:
        >>> theta, start = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2)
        >>> gradient = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> step_rows_([theta], [gradient], rule=StepRule(lr=1.0, radius=5.0), start=[start])
        >>> theta
        tensor([[3., 4.],
                [0., 1.]])

    References:
        arXiv 2510.15020, Equation (22), and (18) for normalised steps.
    """
    if rule.radius is not None and rule.center != "start":
        raise ValueError(f'`rule` must have its ball around the start, `center="start"`, got {rule.center!r}.')
    first = rows[0]
    active = first.new_ones(len(first), dtype=torch.bool) if active is None else active.to(first.device)
    steps = torch.as_tensor(rule.lr, dtype=first.dtype, device=first.device).expand(len(first))
    if rule.lam is not None:
        norms = row_norms(gradients)
        steps = (steps / (rule.lam + norms)).where(norms > 0, 0.0)
    for theta, gradient, origin in zip(rows, gradients, start):
        moved = theta if not rule.decay else torch.lerp(theta, origin.to(theta), rule.decay)
        moved = torch.addcmul(moved, _beside(steps, theta), gradient)
        theta.copy_(moved.where(_beside(active, theta), theta))
    if rule.radius is not None:
        _project_(rows, start, rule.radius, active)


def _project_(rows: Sequence[Tensor], start: Sequence[Tensor], radius: float, active: Tensor) -> None:
    """Pull every row that made a step and lies outside of its ball back onto it."""
    norms = row_norms(theta - origin.to(theta) for theta, origin in zip(rows, start))
    outside = active & (norms > radius)
    factors = (radius / norms).where(outside, 1.0)
    for theta, origin in zip(rows, start):
        origin = origin.to(theta)
        pulled = origin + _beside(factors, theta) * (theta - origin)
        theta.copy_(pulled.where(_beside(outside, theta), theta))


def _beside(values: Tensor, theta: Tensor) -> Tensor:
    """One value per row `(B,)`, shaped and placed to meet `theta` `(B, ...)`."""
    return values.to(theta.device).view(-1, *[1] * (theta.ndim - 1))
