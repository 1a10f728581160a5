"""Normalised SGD, equation (18)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.optim.sgd import sgd

from hf_coverage.functional.gradients import local_tensor
from hf_coverage.optim.normalized import NormalizedGradient

__all__ = ["NormalizedSGD"]


class NormalizedSGD(NormalizedGradient):
    """Normalised SGD: `theta <- Proj(theta + eta g / (lam + ||g||))`, and nothing else unless asked for.

    Its step never waits for the device, also where it skips one. Sparse gradients and a given `foreach` are excepted:
    there it reads whether the gradient is finite.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: The step size eta.
        lam: The lambda of the method, at least 0, in units of the gradient's norm. With a loss that is
            a mean over tokens, not the method's sum over tokens and mean over sequences, divide it by the number of
            tokens of a sequence, or take `SequenceLossMixin`.
        momentum: Of the normalised gradient.
        weight_decay: L2 penalty, added to the normalised gradient.
        nesterov: Nesterov's momentum.
        maximize: Go up the gradient instead of down.
        foreach: Use torch's foreach implementation, or, if False, a loop. None lets its fused one run where it can.
        **options: `per`, `radius`, `center`, `nonfinite` of `NormalizedGradient`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> theta = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = NormalizedSGD([theta], lr=1.0, lam=0.0)
        >>> theta.grad = torch.tensor([30.0, 40.0])
        >>> optimizer.step()
        >>> theta.detach()
        tensor([-0.6000, -0.8000])

    References:
        arXiv 2510.15020, Equation (18) and Theorem 5.1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        lam: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Any,
    ) -> None:
        settings = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        super().__init__(_ShardSGD(params, lr, **settings, foreach=foreach), lam, **options)


class _ShardSGD(SGD):
    """torch's SGD on the shards of this process: its fused kernel, which can skip a step, knows no DTensor."""

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        odd = [name for name in ("dampening", "fused") if self.param_groups[-1][name]]
        if odd:
            raise ValueError(
                f"`params` has a group with {odd[0]}={self.param_groups[-1][odd[0]]}, which NormalizedSGD does not "
                "know: take NormalizedGradient(torch.optim.SGD(...), lam=...)."
            )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            shards = [local_tensor(p) for p in members]
            sparse = any(p.grad.is_sparse for p in members)
            fused = group["foreach"] is None and not sparse and _can_be_fused(shards)
            if not fused and self.found_inf is not None and self.found_inf:
                continue
            sgd(
                shards,
                [local_tensor(p.grad) for p in members],
                self._momentum_buffers(members) if group["momentum"] else [None] * len(members),
                has_sparse_grad=sparse,
                foreach=not fused and group["foreach"],
                fused=fused,
                found_inf=self.found_inf if fused else None,
                **{name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "maximize")},
                dampening=0.0,
            )

    def _momentum_buffers(self, members: list[Tensor]) -> list[Tensor]:
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [local_tensor(self.state[p]["momentum_buffer"]) for p in members]


def _can_be_fused(shards: list[Tensor]) -> bool:
    # In torch 2.13 the kernel for CPUs leaves most of a half-precision tensor as it was (pytorch/pytorch#191763).
    if any(shard.device.type == "cpu" and shard.dtype in (torch.float16, torch.bfloat16) for shard in shards):
        return False
    fused, _ = _default_to_fused_or_foreach(shards, differentiable=False, use_fused=True)
    return fused
