"""Forward passes of any causal language model that call the output head at chosen positions only.

A hook before the head hands it the hidden states of those positions and nothing else, so a tensor of
(batch, length, vocabulary) never exists, and whatever the model does after its head (bias, scaling, soft-capping)
stays the model's own work.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_coverage.measure.batching import IntArray

__all__ = ["HeadForward", "HeadOutput", "inference", "is_sharded", "select_lines", "unwrap"]

# Caches that hold one line of keys and values per sequence, so that a line can be given to several responses.
# Recurrent states, quantised and offloaded caches are not among them.
_REPEATABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class HeadOutput:
    """What one forward pass gives.

    Args:
        logits: Logits `(M, V)` at the chosen positions, as the model returns them.
        hidden: Inputs of the head `(M, d)` there.
        cache: The key-value cache, where one was asked for and the model has one.
    """

    logits: Tensor
    hidden: Tensor
    cache: Cache | None


class HeadForward:
    """A causal language model whose output head only sees chosen positions; use it inside `inference`.

    Args:
        model: Any causal language model with output embeddings; may be wrapped by DDP or FSDP, or compiled.

    Raises:
        ValueError: If the model has no output embeddings to select positions for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"`model` must be a causal language model with output embeddings, got {type(self.model).__name__}; "
                "load it with `AutoModelForCausalLM.from_pretrained`."
            )
        self.head = head
        self.sharded = is_sharded(self.model)
        self.device = _device(self.model, self.sharded)
        self._takes_use_cache = "use_cache" in inspect.signature(self.model.forward).parameters

    def __call__(
        self, ids: IntArray, positions: IntArray, *, cache: Cache | None = None, keep_cache: bool = False
    ) -> HeadOutput:
        """Run the model.

        Args:
            ids: Token ids `(S, T)`, right-padded; no mask: no token sees what is right of it.
            positions: Positions `(M,)` of the flattened `ids` that the head is applied to.
            cache: What came before `ids`; it grows in place.
            keep_cache: Whether to return a cache.

        Returns:
            Logits, hidden states and cache.

        Raises:
            RuntimeError: If the model does not call its head exactly once, on one hidden state per input token.
        """
        arguments: dict[str, Any] = {}
        if self._takes_use_cache:
            arguments["use_cache"] = keep_cache or cache is not None
        if cache is not None:
            arguments["past_key_values"] = cache
        chosen = torch.from_numpy(positions).to(self.device)
        with _select_before(self.head, chosen, ids.shape) as seen:
            outputs = self.model(input_ids=torch.from_numpy(ids).to(self.device), **arguments)
        if len(seen) != 1 or outputs.logits.shape[:-1] != (1, len(positions)):
            raise RuntimeError(
                f"Expected {type(self.model).__name__} to call its output head {type(self.head).__name__} once and to "
                f"return its logits for the {len(positions)} chosen positions, got {len(seen)} calls and logits of "
                f"shape {tuple(outputs.logits.shape)}; this architecture cannot be scored."
            )
        return HeadOutput(outputs.logits[0], seen[0], outputs.get("past_key_values"))

    def probe(self) -> tuple[Tensor, bool]:
        """Read one token: the logits `(1, V)` it gives, and whether the cache it leaves can be shared by responses."""
        first = torch.zeros((1, 1), dtype=torch.int64).numpy()
        output = self(first, first[0], keep_cache=True)
        return output.logits, _is_repeatable(output.cache)


def select_lines(cache: Cache, lines: IntArray) -> Cache:
    """Make a cache of the given lines of another one, which stays as it is; a line may be taken several times."""
    selected = copy.copy(cache)
    # The layers replace their tensors and never write into them, so shallow copies are independent of each other.
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(torch.from_numpy(lines))
    return selected


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode without gradients, and give every module its own mode back.

    `no_grad` and not `inference_mode`: buffers and FSDP shards made under the latter cannot be trained on.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parts of the model live on other processes, which then have to run it at the same time."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DDP, DataParallel and `torch.compile`, but not FSDP, whose wrapper gathers the weights.

    DDP sends its buffers around in every forward pass, which needs the same number of passes on all processes; scoring
    does not have that.
    """
    if isinstance(model, FullyShardedDataParallel):
        return model
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def _select_before(head: nn.Module, positions: Tensor, shape: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Let `head` see the hidden states at `positions` only, and collect them."""
    seen: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = args
        if hidden.shape[:-1] != shape:
            raise RuntimeError(
                f"Expected the output head {type(module).__name__} to get one hidden state per input token, "
                f"{tuple(shape)}, got {tuple(hidden.shape)}; this architecture cannot be scored."
            )
        seen.append(hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)])
        return (seen[-1].unsqueeze(0),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


def _is_repeatable(cache: Any) -> bool:
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) > 0
        and all(type(layer) in _REPEATABLE_LAYERS for layer in cache.layers)
    )


def _device(model: nn.Module, sharded: bool) -> torch.device:
    # Offloaded shards rest on the CPU while the computation runs on the process's own device.
    return PartialState().device if sharded else next(model.parameters()).device
