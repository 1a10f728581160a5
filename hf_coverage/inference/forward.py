"""Forward passes of any causal language model that call the output head at chosen positions only.

A hook before the head hands it the hidden states of those positions and nothing else, so a tensor of
(batch, length, vocabulary) never exists, and whatever the model does after its head (scaling, soft-capping) stays the
model's own work. Where the model does nothing after its head, the head can be called again for further positions of
the same pass.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_coverage.functional.checks import IntArray
from hf_coverage.inference.output_head import OutputHead, find_head, plant_logits
from hf_coverage.inference.prefix_cache import CACHE, cache_argument, is_repeatable

__all__ = [
    "HeadForward",
    "HeadOutput",
    "Probe",
    "inference",
    "input_device",
    "is_out_of_memory",
    "is_sharded",
    "is_split",
    "refuse_zero3",
    "select_before",
    "unwrap",
]

logger = logging.getLogger(__name__)

_ONE = np.zeros((1, 1), dtype=np.int64)
"""The shortest input: one token, at position 0."""


class HeadOutput:
    """What one forward pass gives.

    Args:
        hidden: Inputs of the head `(M, d)` at the chosen positions.
        cache: The key-value cache, where one was asked for and the model has one.
        logits: Logits `(m, V)` of the first m positions, as the model returns them; None: of none of them.
        head: What gives the logits of the others.
    """

    def __init__(self, hidden: Tensor, cache: Cache | None, logits: Tensor | None, head: OutputHead) -> None:
        self.hidden = hidden
        self.cache = cache
        self._first = logits
        self._head = head

    def take_logits(self, chunk: slice) -> Tensor:
        """Logits of a chunk of the positions, each only once and the first ones first: they are not kept."""
        if self._first is not None:
            logits, self._first = self._first, None
            return logits
        return self._head.module(self.hidden[chunk].unsqueeze(0))[0]

    def feature_norm(self, chunk: slice) -> Tensor:
        """Norms of what the head's parameters multiply at a chunk of the positions: h, and the 1 of a bias."""
        norm = self.hidden[chunk].float().norm(dim=-1)
        return norm if self._head.bias is None else torch.hypot(norm, torch.ones_like(norm))


@dataclass(frozen=True)
class Probe:
    """What one token tells about a model.

    Args:
        logits: Logits of a pass `(1, V)`, for their shape and dtype; their values mean nothing.
        repeatable: Whether the cache it left can be continued by several responses.
        plain_head: Whether the model returns what its head gives, in its dtype or a wider one, so that the head may
            be called alone.
        untouched: Whether it returns the very tensor: then it stays so, whatever parameters beside the head become.
    """

    logits: Tensor
    repeatable: bool
    plain_head: bool
    untouched: bool


class HeadForward:
    """A causal language model whose output head only sees chosen positions; use it inside `inference`.

    Args:
        model: Any causal language model with output embeddings; may be wrapped by DDP or FSDP, or compiled.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3.
        ValueError: If the model has no output embeddings to select positions for.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_zero3()
        self.model = unwrap(model)
        self.head = find_head(self.model)
        self.sharded = is_sharded(self.model)
        self.split = is_split(self.model)
        self.device = input_device(self.model)
        self._takes_use_cache = "use_cache" in inspect.signature(self.model.forward).parameters

    def __call__(
        self,
        ids: IntArray,
        positions: IntArray,
        *,
        first: int | None = None,
        cache: Cache | None = None,
        keep_cache: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> HeadOutput:
        """Run the model.

        Args:
            ids: Token ids `(S, T)`, right-padded, which needs no mask: no token sees what is right of it.
            positions: Positions `(M,)` of the flattened `ids` that logits are wanted at.
            first: How many of them get their logits in this pass; None: all.
            cache: What came before `ids`; it grows in place.
            keep_cache: Whether to return a cache.
            inputs: What else the model is to get, such as a mask of what the cache holds.

        Returns:
            Logits, hidden states and cache.

        Raises:
            RuntimeError: If the model does not call its head exactly once, on one hidden state per input token.
        """
        arguments: dict[str, Any] = {}
        if self._takes_use_cache:
            arguments["use_cache"] = keep_cache or cache is not None
        if cache is not None:
            arguments[cache_argument(self.model.forward)] = cache
        arguments |= {name: value.to(self.device) for name, value in (inputs or {}).items()}
        chosen = torch.from_numpy(positions).to(self.device)
        with select_before(self.head.module, chosen, first, ids.shape) as seen:
            outputs = self.model(input_ids=torch.from_numpy(ids).to(self.device), **arguments)
        expected = len(positions[:first])
        if len(seen) != 1 or outputs.logits.shape[:-1] != (1, expected):
            raise RuntimeError(
                f"Expected {type(self.model).__name__} to call its output head {type(self.head.module).__name__} once "
                f"and to return its logits for the {expected} chosen positions, got {len(seen)} calls and logits of "
                f"shape {tuple(outputs.logits.shape)}; this architecture cannot be scored. If an adapter makes a pass "
                "of its own before each, as X-LoRA does, load the base model with one of its adapters instead."
            )
        return HeadOutput(seen[0], outputs.get(CACHE), outputs.logits[0], self.head)

    def probe(self) -> Probe:
        """Read one token, to see what the model returns.

        Raises:
            ValueError: If the model wants to be told more than token ids.
        """
        try:
            return self._probe(keep_cache=True)
        except Exception as error:  # a model that cannot keep what it has read is read without
            if is_out_of_memory(error):
                raise
            logger.debug("The model keeps no cache: %s: %s", type(error).__name__, error)
        try:
            return self._probe(keep_cache=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`model` {type(self.model).__name__} cannot read a token by itself: {str(error).rstrip('.')}. Here a "
                "model is given token ids and nothing else: give it a `forward` that fills in what it wants beside "
                "them (`functools.partial`), or merge the adapter that wants it (`merge_and_unload`)."
            ) from error

    def _probe(self, *, keep_cache: bool) -> Probe:
        if self.sharded:  # its head has its weights only while the whole model runs
            output = self(_ONE, _ONE[0], keep_cache=keep_cache)
            logits, plain, untouched = output.take_logits(slice(None)), False, False
        else:
            with plant_logits(self.head.module) as planted:
                output = self(_ONE, _ONE[0], keep_cache=keep_cache)
            logits = output.take_logits(slice(None))
            plain, untouched = planted.came_through(logits.unsqueeze(0)), planted.untouched(logits)
        return Probe(logits, is_repeatable(output.cache), plain, untouched)

    def run_along(self) -> None:
        """Take part in a pass of other processes: those of a sharded model need all of them."""
        self(_ONE, _ONE[0])


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode, without gradients and with named outputs, and give all their settings back.

    `no_grad` and not `inference_mode`: buffers and FSDP shards made under the latter cannot be trained on.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    configs = {id(config): config for module, _ in modes if (config := getattr(module, "config", None)) is not None}
    unnamed = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    try:
        for config in unnamed:  # its own modules rely on names when they call each other
            config.return_dict = True
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in unnamed:
            config.return_dict = False


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parts of the model live on other processes, which then have to run it at the same time."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def is_split(model: nn.Module) -> bool:
    """Tell whether the processes of a job run one model together, each a part of every layer (tensor parallelism).

    All of them have to make the same passes on the same tokens.

    Raises:
        RuntimeError: If only some of the processes do, so that there are several such models.
    """
    size = getattr(unwrap(model), "tp_size", None) or 1
    if size not in (1, PartialState().num_processes):
        raise RuntimeError(
            f"A model must be split over all processes of a job, but it is over {size} of "
            f"{PartialState().num_processes}: start {size} of them, or load it without tensor parallelism."
        )
    return size > 1


def refuse_zero3() -> None:
    """Refuse models whose parameters DeepSpeed ZeRO-3 holds in parts, of which no process ever sees a whole one.

    Asked as transformers' own `generate` asks: while such a configuration is alive, `from_pretrained` shards as well.
    """
    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "A model under DeepSpeed ZeRO-3 can neither be scored nor sampled from: its parameters are split over the "
            "processes. Save it (`trainer.save_model`) and score the checkpoint in a process without DeepSpeed, "
            "for example with `hf-coverage score`; or shard by ZeRO-2 or FSDP instead."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DDP, DataParallel and `torch.compile`, but not FSDP, whose wrapper gathers the weights.

    DDP sends its buffers around in every forward pass, which needs the same number of passes on all processes; scoring
    does not have that.
    """
    if isinstance(model, FullyShardedDataParallel) or not isinstance(model, nn.Module):  # none: a server's model
        return model
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def select_before(
    head: nn.Module, positions: Tensor, first: int | None, shape: tuple[int, ...]
) -> Iterator[list[Tensor]]:
    """Collect the hidden states at `positions`, and let `head` see no others, and of them only the `first`.

    Args:
        head: Output head of a model that runs inside this context, on token ids of `shape`.
        positions: Positions `(M,)` of the flattened tokens.
        first: How many of them the head is to see; None: all.
        shape: `(S, T)`.

    Yields:
        A list that gets the hidden states `(M, d)` of each call of the head.
    """
    seen: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = args
        hidden = hidden[..., -shape[-1] :, :]  # some adapters put tokens of their own before the prompt
        if hidden.shape[:-1] != shape:
            raise RuntimeError(
                f"Expected the output head {type(module).__name__} to get one hidden state per input token, "
                f"{tuple(shape)}, got {tuple(hidden.shape)}; this architecture cannot be scored."
            )
        seen.append(hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)])
        return (seen[-1][:first].unsqueeze(0),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory does not suffice, a device's or the machine's.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("out of range"))
        (True, False)
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)


def input_device(model: nn.Module) -> torch.device:
    """Find where a model takes its inputs, wherever its parameters rest between two passes."""
    if is_sharded(model):  # offloaded shards rest on the CPU while the process's own device computes
        return PartialState().device
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    # Parameters that accelerate offloads are on the meta device until their module runs.
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), PartialState().device))
