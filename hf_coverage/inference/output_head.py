"""The output head of a causal language model, and what everybody who treats it by hand has to know of it.

Its logits are `W h + b` or something else; its matrix is its own or the input embedding's too; and what the model
returns are its logits or what the model made of them. Each is found out by trying it, where it can be tried.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_coverage.functional.gradients import global_norm

__all__ = ["OutputHead", "Planted", "find_head", "is_quantized", "plant_logits"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What steps can be made in."""

_FAR = 1e4
"""Logits as large as this, which half precision holds, show every scale and cap that a model may have."""


@dataclass(frozen=True)
class OutputHead:
    """An output head; make one with `find_head`.

    Args:
        owner: The model whose output embeddings it is, not wrapped.
        module: The head.
    """

    owner: nn.Module
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W `(V, d)` of a linear head."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias `(V,)` of a linear head; None where there is none."""
        found = getattr(self.module, "bias", None)
        return found if isinstance(found, Tensor) else None

    @property
    def linear(self) -> bool:
        """Whether the head gives `W h + b` of the weight and bias that it shows, and has no other parameters.

        Then steps of the head have a closed form, and its weight and bias are all that there is to train. Adapters
        beside it, quantised weights and whatever else acts on its inputs or outputs say no.
        """
        return self._obstacle is None

    @property
    def description(self) -> str:
        """What the head is, for the error of those who need a linear one: its type, and what is the matter with it."""
        return type(self.module).__name__ + (self._obstacle or "")

    @property
    def norm(self) -> float:
        """Norm of all its parameters: the radius of the smallest ball around zero that holds them."""
        return float(global_norm([parameter.detach() for parameter in self.module.parameters()]))

    @property
    def shared_with(self) -> list[str]:
        """Names of parameters elsewhere in the model that are the head's matrix too; as a rule the input embedding."""
        own = {
            f"{name}.weight"
            for name, module in self.owner.named_modules(remove_duplicate=False)
            if module is self.module
        }
        named = self.owner.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if name not in own and _is_same(parameter, self.weight)]

    @cached_property
    def _obstacle(self) -> str | None:
        """Why the head is not linear, as it follows upon its name; None where it is."""
        weight = getattr(self.module, "weight", None)
        shown = {id(parameter) for parameter in (weight, self.bias) if parameter is not None}
        if not isinstance(weight, Tensor) or {id(parameter) for parameter in self.module.parameters()} != shown:
            return ""
        if is_quantized(weight):
            return f" with quantised weights ({type(weight).__name__} of {weight.dtype})"
        if weight.is_meta or isinstance(weight, DTensor) or weight.ndim != 2:
            # Offloaded, or in parts on several processes: it only runs inside the model, and its class has to do.
            return None if type(self.module).forward is nn.Linear.forward else ""
        return None if _gives_product(self.module, weight, self.bias) else ", whose logits are not W h + b"


def find_head(model: nn.Module) -> OutputHead:
    """Find the output head of a model.

    Args:
        model: Causal language model, or one inside of something that has none of its own, such as PEFT's models.

    Returns:
        The head.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> head = find_head(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)))
        >>> head.linear, head.bias, head.shared_with
        (True, None, ['transformer.wte.weight'])
    """
    for module in model.modules():
        # The class is asked: wrappers pass on whatever they do not have, and are not what `generate` runs.
        if hasattr(type(module), "get_output_embeddings"):
            head = module.get_output_embeddings()
            if head is not None:
                return OutputHead(module, head)
    raise ValueError(
        f"`model` must be a causal language model with output embeddings, got {type(model).__name__}; load it with "
        "`AutoModelForCausalLM.from_pretrained`."
    )


def is_quantized(parameter: Tensor) -> bool:
    """Tell whether a tensor is of a dtype that no steps are made in, or of a class that only says that it is not."""
    return type(parameter) not in (Tensor, nn.Parameter, DTensor) or parameter.dtype not in _DTYPES


class Planted:
    """Logits that a head gave in the place of its own, and what became of them; see `plant_logits`."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._values = self._given = torch.empty(0)
        self._version = 0

    def plant(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Replace the head's logits; a forward hook."""
        if threading.get_ident() != self._thread:
            return logits  # somebody else's pass through the same model
        values = _FAR * torch.arange(1, logits.shape[-1] + 1, dtype=torch.float64).sin()
        self._values = values.to(logits).expand(logits.shape)
        self._given = self._values.clone()
        self._version = self._given._version
        return self._given

    def came_through(self, returned: Tensor) -> bool:
        """Whether a model returned their values, be it in a wider dtype."""
        return torch.equal(returned.double(), self._values.double())

    def untouched(self, returned: Tensor) -> bool:
        """Whether a model returned the very tensor, and nobody wrote into it."""
        return (returned.data_ptr(), returned._version) == (self._given.data_ptr(), self._version)


@contextmanager
def plant_logits(module: nn.Module) -> Iterator[Planted]:
    """Let a head give far-away logits in the place of its own, so that what the model makes of logits shows.

    On those that a head gives itself, a wide cap would show less than half precision rounds off.

    Args:
        module: The head, of a model that runs inside this context.

    Yields:
        The logits.
    """
    planted = Planted()
    handle = module.register_forward_hook(planted.plant)
    try:
        yield planted
    finally:
        handle.remove()


def _gives_product(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a module gives `W h + b`, in training as in evaluation; modes and random numbers stay as they are."""
    # (2, d): those who note what a head gives in a pass, (B, T, d), pass over it.
    hidden = torch.arange(2 * weight.shape[1], dtype=torch.float64).sin().view(2, -1).to(weight)
    modes = [(part, part.training) for part in module.modules()]
    devices = [] if weight.device.type == "cpu" else [weight.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=weight.device.type):
            expected = nn.functional.linear(hidden, weight, bias).double()
            found = [module.train(mode)(hidden).to(expected) for mode in (True, False)]
    finally:
        for part, training in modes:
            part.training = training
    tolerance = max(2 * torch.finfo(weight.dtype).eps, 1e-5) * expected[expected.isfinite()].norm()
    return all(values.shape == expected.shape and _distance(values, expected) <= tolerance for values in found)


def _distance(values: Tensor, expected: Tensor) -> float:
    """Norm of a difference; damaged weights, whose NaN and infinities are others' to refuse, are no difference."""
    same = (values == expected) | (values.isnan() & expected.isnan())
    return float((values - expected).where(~same, 0.0).norm())


def _is_same(parameter: Tensor, weight: Tensor) -> bool:
    """Whether two parameters are one, or two names of the same memory."""
    if parameter is weight:
        return True
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.numel() for tensor in (parameter, weight))
    return plain and parameter.shape == weight.shape and parameter.data_ptr() == weight.data_ptr() != 0
