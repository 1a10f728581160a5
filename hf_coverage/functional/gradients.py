"""Gradients as the theory uses them: normalised by a norm over all of them, by their signs, parameters kept in a ball.

Everything works in place, as clipping does, and never reads a value back to the host. A DTensor counts as the whole
tensor in a norm, and is changed shard by shard; plain tensors and DTensors of several meshes may be mixed. A norm is
right wherever it can be written down: no square of a number is formed that its dtype cannot hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

__all__ = [
    "global_norm",
    "local_tensor",
    "normalize_",
    "normalize_coordinates_",
    "project_",
    "stable_norm",
    "tensor_norms",
]


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Take the Euclidean norm of each tensor, accumulated in float32 at least, and without overflow or underflow.

    Args:
        tensors: Dense tensors of any shapes, dtypes and devices.

    Returns:
        `(len(tensors),)` on the first tensor's device; float64 if one of them is, otherwise float32.

    Raises:
        ValueError: If a DTensor still waits for a reduction, so that no shard knows its own values.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor([5., 2.])
    """
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for rows in _alike(tensors):
        found = [stable_norm(local_tensor(tensors[row])) for row in rows]
        first = tensors[rows[0]]
        if isinstance(first, DTensor):
            found = _over_shards(torch.stack(found), first).unbind()
        for row, norm in zip(rows, found):
            norms[row] = norm.to(tensors[0].device, non_blocking=True)
    return torch.stack(norms) if norms else torch.zeros(0)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Take one Euclidean norm over all tensors: `||g|| = sqrt(sum_i ||g_i||^2)`.

    Args:
        tensors: Dense tensors of any shapes, dtypes and devices.

    Returns:
        Scalar tensor on the first tensor's device; 0 for no tensors.

    Raises:
        ValueError: As for `tensor_norms`.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    return stable_norm(tensor_norms(tensors))


@torch.no_grad()
def stable_norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Take a Euclidean norm without overflow or underflow of the squares, accumulated in float32 at least.

    Args:
        tensor: Dense, of any shape and floating dtype.
        dim: What to take it over; None: everything.

    Returns:
        float64 if the tensor is, otherwise float32; 0 for no numbers.

    Example:
        >>> stable_norm(torch.tensor([3e30, 4e30])), stable_norm(torch.tensor([3e-30, 4e-30]))
        (tensor(5.0000e+30), tensor(5.0000e-30))
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if not tensor.numel() or tensor.dtype == torch.float16:  # float32 holds the squares of half precision
        return torch.linalg.vector_norm(tensor, dim=dim, dtype=dtype)
    largest = torch.linalg.vector_norm(tensor, torch.inf, dim=dim, keepdim=dim is not None, dtype=dtype)
    # A power of two changes no digit: a norm whose squares were in range keeps its bits.
    power = largest / (2 * torch.frexp(largest).mantissa)
    power = torch.where(power.isfinite() & (power > 0), power, 1.0)
    norm = torch.linalg.vector_norm(tensor / power.to(tensor.dtype), dim=dim, dtype=dtype)
    return norm * (power if dim is None else power.squeeze(dim))


@torch.no_grad()
def normalize_(gradients: Sequence[Tensor], lam: float, *, norm: Tensor | None = None) -> Tensor:
    """Divide gradients in place by their norm: `g <- g / (lam + ||g||)`, and 0 stays 0.

    Args:
        gradients: Dense tensors of any shapes, dtypes and devices.
        lam: The lambda of the method, at least 0, in units of the norm.
        norm: `()`, to divide all by a norm taken over more tensors than these, or `(len(gradients),)`, to divide each
            by its own. None takes the norm over all of them.

    Returns:
        The norm before, `norm` if it was given.

    Raises:
        ValueError: As for `tensor_norms`.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> normalize_([gradient], lam=5.0), gradient
        (tensor(5.), tensor([0.3000, 0.4000]))

    References:
        arXiv 2510.15020, Equations (17), (18).
    """
    if norm is None:
        norm = global_norm(gradients)
    divisor = norm + lam
    divisor = divisor.masked_fill(divisor == 0, 1.0)
    for rows in _alike(gradients):
        members = [local_tensor(gradients[row]) for row in rows]
        here = divisor.to(members[0].device, non_blocking=True)
        if here.ndim:
            torch._foreach_div_(members, [here[row] for row in rows])
        else:
            torch._foreach_div_(members, here)
    return norm


@torch.no_grad()
def normalize_coordinates_(gradients: Sequence[Tensor], lam: float) -> None:
    """Divide each coordinate in place by its own size: `g_i <- g_i / (lam + |g_i|)`, the sign of g_i at `lam = 0`.

    Args:
        gradients: Dense tensors of any shapes, dtypes and devices.
        lam: At least 0, in units of a coordinate.

    Example:
        >>> gradient = torch.tensor([-0.1, 0.0, 20.0])
        >>> normalize_coordinates_([gradient], lam=0.0)
        >>> gradient
        tensor([-1.,  0.,  1.])

    References:
        arXiv 2510.15020, Equation (20).
    """
    for rows in _alike(gradients):
        members = [local_tensor(gradients[row]) for row in rows]
        if lam == 0:
            torch._foreach_sign_(members)
        else:
            divisors = torch._foreach_abs(members)
            torch._foreach_add_(divisors, lam)
            torch._foreach_div_(members, divisors)


@torch.no_grad()
def project_(parameters: Sequence[Tensor], radius: float, *, center: Sequence[Tensor] | None = None) -> None:
    """Move parameters in place to the nearest point of a ball: `c + (theta - c) min(1, R / ||theta - c||)`.

    Parameters inside the ball keep their bits.

    Args:
        parameters: Dense tensors of any shapes, dtypes and devices, together one point.
        radius: R, positive.
        center: c, tensors like `parameters`; None is zero.

    Raises:
        ValueError: As for `tensor_norms`.

    Example:
        >>> point = torch.tensor([3.0, 4.0])
        >>> project_([point], radius=1.0)
        >>> point
        tensor([0.6000, 0.8000])

    References:
        arXiv 2510.15020, Proj_Theta in Equation (18).
    """
    away = parameters if center is None else [theta - c for theta, c in zip(parameters, center)]
    norm = global_norm(away)
    keep = torch.clamp(radius / norm, max=1.0)
    for rows in _alike(parameters):
        members = [local_tensor(parameters[row]) for row in rows]
        here = keep.to(members[0].device, non_blocking=True)
        if center is None:
            torch._foreach_mul_(members, here)
        else:
            beyond = [local_tensor(away[row]) for row in rows]
            torch._foreach_mul_(beyond, 1 - here)
            torch._foreach_sub_(members, beyond)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory: all of it, unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _over_shards(norms: Tensor, example: DTensor) -> Tensor:
    """Norms of shards to norms of whole tensors, which all lie on the mesh as `example` does."""
    if any(placement.is_partial() for placement in example.placements):
        raise ValueError(
            f"gradients and parameters must be sharded or replicated, but a DTensor has placements "
            f"{example.placements}. Reduce it first: `tensor.redistribute(placements=...)`."
        )
    placements = [Partial() if placement.is_shard() else Replicate() for placement in example.placements]
    squares = DTensor.from_local(norms.double().square(), example.device_mesh, placements, run_check=False)
    return squares.full_tensor().sqrt().to(norms.dtype)


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Rows of tensors that one foreach call can take: of one mesh and placement, device and dtype."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, tensor in enumerate(tensors):
        mesh = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups[mesh, tensor.device, tensor.dtype].append(row)
    yield from groups.values()
