"""Gradient normalisation (18) around any torch optimizer.

It wraps the optimizer and is no step pre-hook, because torch drops hooks when it pickles or copies an optimizer, and
runs them before a closure has made the gradients. The wrapper holds no parameter groups and no state of its own: what
replaces them in the inner optimizer (reloading, `accelerator.prepare`, FSDP2) it cannot miss.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from transformers import Trainer

from hf_coverage.functional.gradients import (
    normalize_,
    normalize_coordinates_,
    project_,
    stable_norm,
    tensor_norms,
)
from hf_coverage.measure.evaluation_callback import callers

__all__ = ["NormalizedGradient"]

Per = Literal["model", "group", "tensor", "coordinate"]
Center = Literal["zero", "start"]
Nonfinite = Literal["skip", "raise"]

START = "start"
"""The key of a parameter's state that holds its starting point."""


class NormalizedGradient(Optimizer):
    """Divide the gradient by its norm before an optimizer steps: `g / (lam + ||g||)`.

    `theta <- Proj(theta + eta g / (lam + ||g||))` with plain SGD inside, one norm over all parameter groups. Plain
    SGD is the faithful inner optimizer; AdamW divides by its own scale afterwards, which undoes most of the
    normalisation. Turn clipping off (`max_grad_norm=0` in the Trainer): it would come first and change the norm. Of a
    Trainer that clips the first step warns; what a loop of your own does it cannot see.

    After a step the parameters' `.grad` holds the normalised gradient, as after clipping. The step waits for the
    device only to read whether the gradient is finite, and not even there if the inner optimizer is one of torch's
    `fused` ones, from its second step on.

    Args:
        optimizer: Any torch optimizer but LBFGS, over parameters of any devices; FSDP2's and tensor parallelism's
            DTensors among them. Wrap first, then call `accelerator.prepare`.
        lam: The lambda of the method, at least 0, in units of the norm. Each group holds its own, `group["lam"]`,
            which schedules may change and checkpoints keep.
        per: What one norm is taken over: the whole `"model"`; each parameter `"group"` (`layer_groups` makes one of
            each layer); each `"tensor"`; or each `"coordinate"`, which at `lam=0` is the sign (20).
        radius: Keep the parameters within this distance of `center`: Proj of (18). None does not project.
        center: `"zero"`, or `"start"`: where the parameters were before their first step. It is part of the state.
        nonfinite: What a gradient with an infinite or undefined norm does: `"skip"` the step, which then changes
            neither parameters nor state, or `"raise"`.

    Attributes:
        last_norm: Norm over all groups of the last step's gradient, before normalisation; a scalar tensor on the
            gradient's device, None before the first step.
        num_nonfinite: How many steps of this process had a gradient that was not finite; a scalar tensor.
        optimizer: The inner optimizer.

    Raises:
        TypeError: If `optimizer` cannot be wrapped.
        ValueError: If an argument is not one of those above, or DeepSpeed is in use.

    Example:
        >>> theta = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = NormalizedGradient(torch.optim.SGD([theta], lr=1.0), lam=5.0)
        >>> theta.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> theta, optimizer.last_norm
        (Parameter containing: tensor([-0.3000, -0.4000], requires_grad=True), tensor(5.))

    References:
        arXiv 2510.15020, Equations (17), (18), (20) and Theorem 5.1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lam: float,
        *,
        per: Per = "model",
        radius: float | None = None,
        center: Center = "zero",
        nonfinite: Nonfinite = "skip",
    ) -> None:
        _check_inner(optimizer)
        _check_choice("per", per, ("model", "group", "tensor", "coordinate"))
        _check_choice("center", center, ("zero", "start"))
        _check_choice("nonfinite", nonfinite, ("skip", "raise"))
        if radius is not None and not radius > 0:
            raise ValueError(f"`radius` must be positive, or None for no projection, but is {radius}.")
        if center == "start" and radius is None:
            raise ValueError('`center="start"` needs a `radius`: the largest distance from the starting point.')
        self.optimizer = optimizer
        self.per, self.radius, self.center, self.nonfinite = per, radius, center, nonfinite
        self.last_norm: Tensor | None = None
        self.num_nonfinite = torch.zeros((), dtype=torch.int64)
        self._inner_has_stepped = self._looked_for_clipping = False
        # The base class's constructor would start groups and state anew. This builds the rest: hooks and profiling.
        super().__setstate__({})
        self.defaults["lam"] = lam
        self._complete_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state, with the starting points."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults, with `lam`."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Normalise the gradient, let the inner optimizer step, project.

        Args:
            closure: Computes the gradients anew and returns the loss; it is called once.

        Returns:
            What `closure` returned.

        Raises:
            FloatingPointError: With `nonfinite="raise"`, if the norm is infinite or undefined. Nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        _check_parameters(members)
        self._warn_of_clipping()
        gradients = [[_gradient_values(p) for p in parameters] for parameters in members]
        norms = tensor_norms(list(chain.from_iterable(gradients)))
        nonfinite = self._record(stable_norm(norms))
        # What GradScaler asks too: such an optimizer's kernel reads `found_inf` on the device. But its first step
        # allocates state, which a kernel that is skipped leaves undefined.
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        on_device = fused and self._inner_has_stepped and self.nonfinite == "skip"
        if not on_device and self._refuses(nonfinite):
            return loss
        self._normalize(gradients, norms)
        starts = self._new_starts(chain.from_iterable(members))
        self._step_inner(nonfinite.float() if on_device else None)
        for p, start in starts:  # not before the step: an empty state is how optimizers know their first one
            self.state[p][START] = start
        self._project()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does it."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; without a `lam` of its own it takes the default."""
        self.optimizer.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, which the inner optimizer alone can load too."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the inner optimizer alone, which keeps the present `lam`."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.optimizer.load_state_dict(state_dict)
        self._complete_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("optimizer", "per", "radius", "center", "nonfinite", "last_norm", "num_nonfinite")
        return {name: self.__dict__[name] for name in kept} | {
            "_inner_has_stepped": False,
            "_looked_for_clipping": False,
        }

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault("lam", self.defaults["lam"])
            if group.get("differentiable"):
                raise ValueError("a parameter group has differentiable=True, but gradients are normalised in place.")
            if not 0 <= group["lam"] < math.inf:
                raise ValueError(f"`lam` must be a finite number, at least 0, but is {group['lam']}.")

    @torch.compiler.disable  # what compiled code writes to an optimizer's attributes is lost
    def _record(self, norm: Tensor) -> Tensor:
        nonfinite = ~norm.isfinite()
        self.last_norm, self.num_nonfinite = norm, self.num_nonfinite + nonfinite
        return nonfinite

    @torch.compiler.disable
    def _warn_of_clipping(self) -> None:
        """Say once that a Trainer clips: it has the arguments, and an optimizer is not given them."""
        if self._looked_for_clipping:
            return
        self._looked_for_clipping = True
        trainer = next(callers(Trainer), None)
        if trainer is not None and trainer.args.max_grad_norm:
            warnings.warn(
                f"`max_grad_norm` is {trainer.args.max_grad_norm}: the Trainer clips the gradient before it is "
                "normalised, which changes its norm. Set TrainingArguments(max_grad_norm=0.0).",
                stacklevel=2,
            )

    def _refuses(self, nonfinite: Tensor) -> bool:
        if not nonfinite:
            return False
        if self.nonfinite == "raise":
            raise FloatingPointError(
                f"the gradient's norm is {self.last_norm}, so the step is refused, and parameters and gradients are "
                'as they were. Look for the batch\'s loss, lower `lr`, or go on with `nonfinite="skip"`.'
            )
        return True

    def _normalize(self, gradients: list[list[Tensor]], norms: Tensor) -> None:
        rows = norms.split([len(members) for members in gradients])
        for group, members, own in zip(self.param_groups, gradients, rows):
            if self.per == "coordinate":
                normalize_coordinates_(members, group["lam"])
            else:
                norm = {"model": self.last_norm, "group": stable_norm(own), "tensor": own}[self.per]
                normalize_(members, group["lam"], norm=norm)

    def _step_inner(self, found_inf: Tensor | None) -> None:
        if found_inf is None:
            self.optimizer.step()
        else:
            self.optimizer.found_inf = found_inf
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.found_inf
        self._inner_has_stepped = True

    def _new_starts(self, parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if self.center == "zero":
            return []
        return [(p, p.clone()) for p in parameters if START not in self.state.get(p, {})]

    def _project(self) -> None:
        if self.radius is None:
            return
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self.center == "zero":
            project_(parameters, self.radius)
        else:
            moved = [p for p in parameters if START in self.state.get(p, {})]
            project_(moved, self.radius, center=[self.state[p][START] for p in moved])


def _gradient_values(parameter: Tensor) -> Tensor:
    """What a gradient's norm is taken of, sharing its memory: a sparse one must name each row once first."""
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()


def _check_inner(optimizer: Any) -> None:
    if isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            "`optimizer` is already prepared by accelerate, which decides when it steps: wrap first, "
            "`accelerator.prepare(NormalizedGradient(optimizer, lam=...))`."
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, but is {type(optimizer).__name__}.")
    if isinstance(optimizer, LBFGS | NormalizedGradient):
        raise TypeError(
            f"`optimizer` must take one gradient as it is, but {type(optimizer).__name__} "
            f"{'compares gradients of several points' if isinstance(optimizer, LBFGS) else 'already normalises it'}."
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError("`optimizer` has differentiable=True, but gradients are normalised in place.")
    _check_deepspeed()


def _check_deepspeed() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "DeepSpeed steps with partitions of the gradient, whose norms are not the gradient's. Use FSDP2 "
            "(`fsdp_version: 2` in accelerate's configuration) to shard with a normalised gradient."
        )


def _check_parameters(members: list[list[Tensor]]) -> None:
    _check_deepspeed()
    if any(getattr(p, "_fsdp_flattened", False) for p in chain.from_iterable(members)):  # FSDP1's own mark
        raise ValueError(
            "FSDP1 leaves each process with shards of the gradient that do not say so, whose norm is not the "
            "gradient's. Use FSDP2: `fsdp_version: 2` in accelerate's configuration, or torch's `fully_shard`."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but is {value!r}.")
