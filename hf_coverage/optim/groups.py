"""Parameter groups by layer."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

__all__ = ["layer_groups"]


def layer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Part a model's trainable parameters into groups, one for each layer, for `per="group"`.

    A layer is what a parameter's name says up to its first number (`model.layers.3`), or else the module that holds
    the parameter. In the Trainer: `optimizer_cls_and_kwargs=(NormalizedSGD, {"params": layer_groups(model), ...})`.

    Args:
        model: Any module.

    Returns:
        Parameter groups, in the order of the model.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(5, 2), "layers": layers})
        >>> [len(group["params"]) for group in layer_groups(model)]
        [1, 2, 2, 2]
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
            layer = numbered.group() if numbered else name.rpartition(".")[0]
            groups.setdefault(layer, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]
