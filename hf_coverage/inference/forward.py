"""Forward passes of any causal language model that call the output head at chosen positions only.

A hook before the head hands it the hidden states of those positions and nothing else, so a tensor of
(batch, length, vocabulary) never exists, and whatever the model does after its head (scaling, soft-capping) stays the
model's own work. Where the model does nothing after its head, the head can be called again for further positions of
the same pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_coverage.functional.checks import IntArray
from hf_coverage.inference.prefix_cache import is_repeatable

__all__ = ["HeadForward", "HeadOutput", "Probe", "inference", "is_sharded", "refuse_zero3", "select_before", "unwrap"]


class HeadOutput:
    """What one forward pass gives.

    Args:
        hidden: Inputs of the head `(M, d)` at the chosen positions.
        cache: The key-value cache, where one was asked for and the model has one.
        logits: Logits `(m, V)` of the first m positions, as the model returns them; None: of none of them.
        head: What gives the logits of the others.
    """

    def __init__(self, hidden: Tensor, cache: Cache | None, logits: Tensor | None, head: nn.Module) -> None:
        self.hidden = hidden
        self.cache = cache
        self._first = logits
        self._head = head

    def take_logits(self, chunk: slice) -> Tensor:
        """Logits of a chunk of the positions, each only once and the first ones first: they are not kept."""
        if self._first is not None:
            logits, self._first = self._first, None
            return logits
        return self._head(self.hidden[chunk].unsqueeze(0))[0]

    def feature_norm(self, chunk: slice) -> Tensor:
        """Norms of what the head's parameters multiply at a chunk of the positions: h, and the 1 of a bias."""
        norm = self.hidden[chunk].float().norm(dim=-1)
        if isinstance(self._head, nn.Linear) and self._head.bias is not None:
            return torch.hypot(norm, torch.ones_like(norm))
        return norm


@dataclass(frozen=True)
class Probe:
    """What one token tells about a model.

    Args:
        logits: The logits it gave `(1, V)`.
        repeatable: Whether the cache it left can be continued by several responses.
        plain_head: Whether the model returns what its head gives, untouched, so that the head may be called alone.
    """

    logits: Tensor
    repeatable: bool
    plain_head: bool


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
            arguments["past_key_values"] = cache
        arguments |= {name: value.to(self.device) for name, value in (inputs or {}).items()}
        chosen = torch.from_numpy(positions).to(self.device)
        with select_before(self.head, chosen, first, ids.shape) as seen:
            outputs = self.model(input_ids=torch.from_numpy(ids).to(self.device), **arguments)
        expected = len(positions[:first])
        if len(seen) != 1 or outputs.logits.shape[:-1] != (1, expected):
            raise RuntimeError(
                f"Expected {type(self.model).__name__} to call its output head {type(self.head).__name__} once and to "
                f"return its logits for the {expected} chosen positions, got {len(seen)} calls and logits of "
                f"shape {tuple(outputs.logits.shape)}; this architecture cannot be scored."
            )
        return HeadOutput(seen[0], outputs.get("past_key_values"), outputs.logits[0], self.head)

    def probe(self) -> Probe:
        """Read one token, to see what the model returns."""
        returned: list[tuple[int, int]] = []
        handle = self.head.register_forward_hook(
            lambda module, args, logits: returned.append((logits.data_ptr(), logits._version))
        )
        try:
            one = np.zeros((1, 1), dtype=np.int64)
            output = self(one, one[0], keep_cache=True)
        finally:
            handle.remove()
        logits = output.take_logits(slice(None))
        # The very tensor, and nobody wrote into it. A sharded head has its weights only while the whole model runs.
        plain = not self.sharded and returned == [(logits.data_ptr(), logits._version)]
        return Probe(logits, is_repeatable(output.cache), plain)


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
    if isinstance(model, FullyShardedDataParallel):
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


def _device(model: nn.Module, sharded: bool) -> torch.device:
    # Offloaded shards rest on the CPU while the computation runs on the process's own device.
    return PartialState().device if sharded else next(model.parameters()).device
