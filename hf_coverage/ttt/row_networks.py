"""One network with other parameters in every row of a batch: low-rank adapters, or all of its parameters.

The model is not changed: adapters act through hooks that are there during a pass alone, and all parameters take the
place of the model's own for one pass, through `torch.func.functional_call`.

References:
    arXiv 2510.15020, Equation (22).
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from hf_coverage.functional.ttt_config import LORA_RANK, TTTConfig
from hf_coverage.inference.forward import inference, is_sharded, refuse_zero3, unwrap
from hf_coverage.inference.output_head import find_head, is_quantized
from hf_coverage.inference.prefix_cache import cache_argument

__all__ = ["RowAdapters", "RowNetwork", "RowWeights", "row_network", "row_passes"]

_SEED = 0
"""What the adapters' first factors are drawn from: the same for every row, on every device and process."""

_TURN = threading.RLock()
"""Held by the thread that makes passes."""

_PROBE = (3, 5)
"""Rows and tokens that show whether layers keep the rows of a batch apart."""


class RowNetwork(ABC):
    """A causal language model that gets parameters, or parameters beside its own, anew for every row and pass.

    Args:
        model: The model, not wrapped.
        start: theta_0, which every row begins with; tensors of the shapes of one row.
    """

    def __init__(self, model: nn.Module, start: list[Tensor]) -> None:
        self.model, self.start = model, start
        self.device: torch.device = next(model.parameters()).device
        self.accepted = frozenset(inspect.signature(model.forward).parameters)

    @property
    @abstractmethod
    def shares_passes(self) -> bool:
        """Whether rows of different parameters can go through one pass together."""

    @abstractmethod
    def _run(self, parameters: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
        """What the model returns."""

    def new_parameters(self, num_rows: int) -> list[Tensor]:
        """theta_0 for some rows: leaves of autograd `(B, ...)`, in float32 at least."""
        exact = [torch.promote_types(origin.dtype, torch.float32) for origin in self.start]
        return [
            origin.to(dtype).expand(num_rows, *origin.shape).clone().requires_grad_(True)
            for origin, dtype in zip(self.start, exact)
        ]

    def logits(
        self, parameters: Sequence[Tensor], ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Read tokens; inside `row_passes`.

        Args:
            parameters: theta of the rows, `(b, ...)` each; b is 1 unless rows share passes.
            ids: The tokens `(b, T)`.
            mask: Boolean `(b, L)`, false where there is no token but padding, for what the cache has seen and for
                `ids`; None: there is no padding.
            cache: What came before, and gets what is read; None: nothing.

        Returns:
            Logits after the last token `(b, V)`, in float32 at least.
        """
        optional: dict[str, Any] = {"use_cache": cache is not None, "logits_to_keep": 1}
        if cache is not None:
            optional[cache_argument(self.model.forward)] = cache
        if mask is not None:
            optional["attention_mask"] = mask.long()
            # The positions that generate makes of a mask.
            optional["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        inputs = {name: value for name, value in optional.items() if name in self.accepted}
        logits = self._run(parameters, {"input_ids": ids, "return_dict": True} | inputs).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class RowAdapters(RowNetwork):
    """A model with adapters `x -> x A^T B^T` of each row's own beside its linear layers, but not beside its head.

    A is uniform on +-1/sqrt(inputs), B is zero: what PEFT's `LoraConfig(target_modules="all-linear")` starts from,
    with its scaling at 1. Experts that a model keeps in one tensor are no linear layers, and stay what they are.
    Parameters are A and B, layer after layer.

    Args:
        model: The model, not wrapped.
        rank: Rows of A.

    Raises:
        ValueError: If the model has no linear layers but the head.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        head = find_head(model).module
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
        }
        if not self._layers:
            raise ValueError(
                f'`scope="lora"` needs linear layers to put adapters beside, but {type(model).__name__} has none but '
                'its head; take "head" or "all".'
            )
        draw, start = torch.Generator().manual_seed(_SEED), []
        for layer in self._layers.values():
            inputs, outputs = _sizes(layer)
            bound, device = inputs**-0.5, layer.weight.device
            dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            start.append(torch.empty(rank, inputs).uniform_(-bound, bound, generator=draw).to(device, dtype))
            start.append(torch.zeros(outputs, rank, device=device, dtype=dtype))
        super().__init__(model, start)

    @cached_property
    def shares_passes(self) -> bool:
        """Whether every layer gets `(rows, tokens, ...)`, as a short pass shows.

        Layers that get the tokens of all rows in one list, as those of experts do, say nothing of whose they are.
        """
        shapes: list[torch.Size] = []
        handles = [
            layer.register_forward_pre_hook(lambda layer, args: shapes.append(args[0].shape))
            for layer in self._layers.values()
        ]
        ids = torch.zeros(_PROBE, dtype=torch.int64, device=self.device)
        with torch.no_grad(), _taken_off(handles):
            self.model(input_ids=ids)
        return "attention_mask" in self.accepted and all(shape[:2] == _PROBE for shape in shapes)

    def _run(self, parameters: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
        hooks = [_AdapterHook(name, *pair) for name, *pair in zip(self._layers, parameters[::2], parameters[1::2])]
        handles = [layer.register_forward_hook(hook) for layer, hook in zip(self._layers.values(), hooks)]
        with _taken_off(handles):
            outputs = self.model(**inputs)
        if not any(hook.ran for hook in hooks):
            raise RuntimeError(
                f"No adapter's hook ran in a pass of {type(self.model).__name__}: it does not call its layers as "
                'modules. Take `scope="head"` or `"all"`.'
            )
        return outputs


class RowWeights(RowNetwork):
    """A model with all parameters of each row's own. Rows go through it one by one; tied parameters stay tied.

    During a pass the model itself has them, so that no other thread may use it meanwhile.

    Args:
        model: The model, not wrapped.

    Raises:
        ValueError: If a parameter is quantised.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            if is_quantized(parameter):
                raise ValueError(
                    f'`scope="all"` needs parameters that steps can be made with, got {name}, a '
                    f"{type(parameter).__name__} of {parameter.dtype}; load the model without quantisation, or take "
                    '`scope="lora"`.'
                )
        self._names = list(named)
        super().__init__(model, [parameter.detach() for parameter in named.values()])

    @property
    def shares_passes(self) -> bool:
        """No."""
        return False

    def _run(self, parameters: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
        own = {
            name: theta.squeeze(0).to(origin.dtype) for name, theta, origin in zip(self._names, parameters, self.start)
        }
        return functional_call(self.model, own, (), inputs)


def row_network(model: nn.Module, config: TTTConfig) -> RowNetwork:
    """Make a model ready for parameters of each row's own.

    Args:
        model: Causal language model; may be wrapped by DDP or compiled.
        config: What is trained: `"lora"` or `"all"`.

    Returns:
        The network.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3.
        ValueError: If nothing of the kind works with this model.
    """
    refuse_zero3()
    model = unwrap(model)
    asked = f'`scope="{config.scope}"`'
    if is_sharded(model):
        raise ValueError(f'{asked} needs whole parameters, but the model is sharded; take `scope="head"`.')
    if model.config.is_encoder_decoder:
        raise ValueError(f'{asked} works for decoders alone, got {type(model).__name__}; take `scope="head"`.')
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{asked} needs parameters that are there, but {name} is offloaded; load the model whole."
            )
        if parameter.is_inference():
            raise ValueError(
                f"{asked} needs gradients, but {name} was made under `torch.inference_mode`; load the model outside."
            )
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{asked} does not train beside other adapters, but {name} is a {type(module).__name__}; merge it "
                "first (`merge_and_unload`)."
            )
    with _TURN:  # or the parameters may be those that another thread's pass has put there
        return RowWeights(model) if config.scope == "all" else RowAdapters(model, config.rank or LORA_RANK)


@contextmanager
def row_passes(model: nn.Module) -> Iterator[None]:
    """Run passes with gradients and without dropout, whatever is on outside; modules get their modes back.

    Compiled parts run as they were written: they may have been compiled without the hooks, and would be compiled anew
    for every length. Threads take turns: how compiled parts run is one setting of the whole process.
    """
    with (
        _TURN,
        inference(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


class _AdapterHook:
    """Adds what the adapters of the rows make of a layer's inputs to its outputs."""

    def __init__(self, name: str, down: Tensor, up: Tensor) -> None:
        self._name, self._down, self._up = name, down, up
        self._thread = threading.get_ident()
        self.ran = False

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if threading.get_ident() != self._thread:
            return output  # somebody else's pass through the same model
        self.ran = True
        inputs, rows = args[0], len(self._down)
        if rows > 1 and inputs.shape[0] != rows:
            raise RuntimeError(
                f"Layer {self._name} got inputs of shape {tuple(inputs.shape)}, expected the {rows} rows of the batch "
                "first; adapt one row at a time."
            )
        # A hook of accelerate's may have moved the inputs inside of the layer.
        lines = inputs.to(output.device, self._down.dtype).reshape(rows, -1, inputs.shape[-1])
        change = lines @ self._down.to(output.device).mT @ self._up.to(output.device).mT
        return (output + change.view(output.shape)).to(output.dtype)


@contextmanager
def _taken_off(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
