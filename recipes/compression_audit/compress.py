"""Compressions of a Llama-like model: each returns a new model and leaves the one it is given alone.

All act on the linear layers inside the decoder; the embedding and the head, which many small models share, stay as
they are. Quantisation is round-to-nearest without calibration, written out here so that what is measured is exactly
what the name says.
"""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear
from torch.nn.utils import prune
from transformers import PreTrainedModel

__all__ = [
    "DynamicInt8Linear",
    "compression",
    "least_influential_layer",
    "prune_magnitude",
    "quantize_int8_dynamic",
    "quantize_weights",
    "remove_layer",
    "remove_least_layer",
    "round_to_nearest",
    "to_bfloat16",
]


def compression(name: str, *, calibration: Tensor) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Find what a name of a compression stands for.

    Args:
        name: `bfloat16`, `int8-dynamic`, `int<bits>-rtn-<group size>`, `pruned-<percent>`, `without-layer-<index>` or
            `without-least-layer`.
        calibration: `(B, T)` tokens of real text, by which the least influential layer is found.

    Returns:
        A function that makes the compressed model from the original.

    Raises:
        ValueError: if the name stands for nothing.
    """
    match name.split("-"):
        case ["bfloat16"]:
            return to_bfloat16
        case ["int8", "dynamic"]:
            return quantize_int8_dynamic
        case [width, "rtn", group_size] if re.fullmatch("int[2-8]", width) and group_size.isdecimal():
            return partial(quantize_weights, bits=int(width[3:]), group_size=int(group_size))
        case ["pruned", percent] if percent.isdecimal():
            return partial(prune_magnitude, share=int(percent) / 100)
        case ["without", "layer", index] if index.isdecimal():
            return partial(remove_layer, index=int(index))
        case ["without", "least", "layer"]:
            return partial(remove_least_layer, calibration=calibration)
    raise ValueError(
        "`compressions` must be bfloat16, int8-dynamic, int4-rtn-64, pruned-30, without-layer-15, without-least-layer "
        f"or such a name with other numbers, but one is {name!r}."
    )


def to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """All weights and all arithmetic in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


class DynamicInt8Linear(nn.Module):
    """A linear layer in 8-bit integers: weights scaled by output channel, activations by token, as they come.

    `y = s_x s_w (x_q W_q^T)` with `x_q, W_q` in -127..127. The scale of an activation is its own token's, so that
    log p(y|x) does not depend on what else is in the batch.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(dim=1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", torch.round(weight / _not_zero(scale)[:, None]).to(torch.int8))
        self.bias = layer.bias

    def forward(self, activations: Tensor) -> Tensor:
        """Multiply (..., in) activations; returns (..., out)."""
        step = _not_zero(activations.abs().amax(dim=-1, keepdim=True) / 127)
        # Integers held in float32: a product is exact, and a sum too while it is below 2^24.
        products = linear(torch.round(activations / step), self.integers.to(activations.dtype))
        outputs = products * step * self.scale
        return outputs if self.bias is None else outputs + self.bias


def quantize_int8_dynamic(model: PreTrainedModel) -> PreTrainedModel:
    """Weights and activations of the decoder's linear layers in 8 bits, see `DynamicInt8Linear`."""
    return _replace_linear(copy.deepcopy(model), DynamicInt8Linear)


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Round each group of consecutive inputs of an output channel to 2^bits equidistant values.

    Args:
        weight: `(out, in)`.
        bits: bits of a weight.
        group_size: weights that share a scale and a zero point; divides `in`.

    Returns:
        The rounded weight, in the dtype of the given one.

    Raises:
        ValueError: if the groups do not fit.
    """
    if weight.shape[1] % group_size:
        raise ValueError(
            f"`group_size` must divide the {weight.shape[1]} inputs of a layer, but is {group_size}; take a divisor."
        )
    groups = weight.unflatten(1, (-1, group_size))
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)  # zero stays a value of the grid
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    step = _not_zero((high - low) / (2**bits - 1))
    zero = torch.round(-low / step)
    integers = (torch.round(groups / step) + zero).clamp(0, 2**bits - 1)
    return ((integers - zero) * step).flatten(1)


def quantize_weights(model: PreTrainedModel, *, bits: int, group_size: int = 64) -> PreTrainedModel:
    """Weights of the decoder's linear layers rounded by `round_to_nearest`; the arithmetic stays in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in _linear_layers(model):
            layer.weight.copy_(round_to_nearest(layer.weight, bits=bits, group_size=group_size))
    return model


def prune_magnitude(model: PreTrainedModel, *, share: float) -> PreTrainedModel:
    """Set the smallest `share` of the weights of each of the decoder's linear layers to zero."""
    model = copy.deepcopy(model)
    for layer in _linear_layers(model):
        prune.l1_unstructured(layer, "weight", amount=share)
        prune.remove(layer, "weight")
    return model


def remove_layer(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """Take one decoder layer out; its neighbours are joined as they are.

    Args:
        model: with a `ModuleList` of decoder layers at `model.model.layers`, as Llama has.
        index: which one, from 0.

    Raises:
        ValueError: if there is no such layer.
    """
    count = model.config.num_hidden_layers
    if not 0 <= index < count:
        raise ValueError(f"`index` must name one of {count} layers, 0 to {count - 1}, but is {index}.")
    model = copy.deepcopy(model)
    layers = model.model.layers
    del layers[index]
    for position, layer in enumerate(layers):
        layer.self_attn.layer_idx = position  # its place in the key-value cache
    model.config.num_hidden_layers = count - 1
    return model


def remove_least_layer(model: PreTrainedModel, *, calibration: Tensor) -> PreTrainedModel:
    """Remove the `least_influential_layer`, and say which one it is."""
    index = least_influential_layer(model, calibration.to(model.device))
    print(f"The least influential layer is {index} of {model.config.num_hidden_layers}, counted from 0.")
    return remove_layer(model, index)


def least_influential_layer(model: PreTrainedModel, ids: Tensor) -> int:
    """The layer that turns the hidden states least: the largest mean cosine of its input and its output.

    Args:
        model: any decoder that returns hidden states.
        ids: `(B, T)` tokens of real text.

    Returns:
        Its index, from 0.

    References:
        Men et al. (2024), "ShortGPT", arXiv 2403.03853: block influence.
    """
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states
    # The last state has been through the final norm, so the last layer cannot be judged by it.
    cosines = [cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states[:-1])]
    return int(torch.stack(cosines).argmax())


def _linear_layers(model: PreTrainedModel) -> Iterator[nn.Linear]:
    return (module for module in model.model.layers.modules() if isinstance(module, nn.Linear))


def _replace_linear(model: PreTrainedModel, make: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    for block in list(model.model.layers.modules()):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, make(child))
    return model


def _not_zero(scale: Tensor) -> Tensor:
    """A scale to divide by: where all values are zero any will do."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
