"""What the output head of a model got and gave in its last forward pass, noted by hooks that come off again."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hf_coverage.inference.forward import unwrap
from hf_coverage.inference.output_head import find_head

__all__ = ["HeadPass", "HeadTap"]


class HeadPass(NamedTuple):
    """What a head got and gave at the last position.

    Args:
        hidden: Its inputs `(B, d)`.
        logits: Its outputs `(B, V)`.
        returned: What the model made of them `(B, V)`; None where it is gone.
    """

    hidden: Tensor
    logits: Tensor
    returned: Tensor | None


class HeadTap:
    """Notes what a model's output head gets and gives, and changes neither; taken off with `close` or when collected.

    Args:
        model: Causal language model; may be wrapped.
        keep_positions: Whether to note the inputs at all positions, in this thread, until they are taken. The head
            then sees the last position alone, so that there are never logits for all.

    Raises:
        ValueError: If the model has no linear output head.
    """

    def __init__(self, model: nn.Module, *, keep_positions: bool = False) -> None:
        self.head = find_head(unwrap(model))
        if not self.head.linear:
            raise ValueError(
                f"`model` must have a linear output head, got {self.head.description}; if that is an adapter's layer, "
                "merge it first (`merge_and_unload`)."
            )
        self._notes = notes = _Notes()
        handles = [
            self.head.module.register_forward_hook(notes.note_head),
            self.head.owner.register_forward_pre_hook(_refuse_continuous_batching, with_kwargs=True),
            self.head.owner.register_forward_hook(notes.note_model),
        ]
        if keep_positions:
            notes.last_alone, notes.positions = True, []
            handles.append(self.head.module.register_forward_pre_hook(notes.note_positions))
        # The model holds the notes and not this object, whose end therefore takes the hooks off.
        self._finalizer = weakref.finalize(self, _remove, handles)

    @property
    def closed(self) -> bool:
        """Whether the hooks are off."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Take the hooks off; a second time does nothing."""
        self._finalizer()
        self._notes.clear()

    def take(self) -> HeadPass | None:
        """The last pass since the one that was taken before, if there was any."""
        notes = self._notes
        if notes.hidden is None or notes.logits is None:
            return None
        returned = None if notes.returned is None else notes.returned()
        last = HeadPass(notes.hidden, notes.logits, None if returned is None else returned[:, -1])
        notes.clear()
        return last

    def take_positions(self) -> Tensor:
        """Inputs at all positions that were noted `(B, T, d)`; none are noted any more."""
        positions, self._notes.positions = self._notes.positions, None
        return torch.cat(positions or [], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Call the head alone `(B, m, V)`, on inputs `(B, m, d)`; nothing is noted."""
        self._notes.active = False
        try:
            return self.head.module(hidden.to(self.head.weight.device))
        finally:
            self._notes.active = True


class _Notes(threading.local):
    """What the hooks write down, for each thread what it ran itself: several may generate with one model at once.

    They run uncompiled: a compiled pass would keep what it saw to itself.
    """

    def __init__(self) -> None:
        self.active = True
        self.last_alone = False
        self.positions: list[Tensor] | None = None
        self.clear()

    def __reduce__(self) -> tuple[type[_Notes], tuple[()]]:
        return _Notes, ()  # a copy of the model, hooks and all, has nothing noted

    def clear(self) -> None:
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.returned: weakref.ref[Tensor] | None = None

    @torch.compiler.disable
    def note_positions(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not (self.active and self.last_alone and args[0].ndim == 3):
            return args
        if self.positions is not None:
            self.positions.append(args[0].detach())
        return (args[0][:, -1:],)

    @torch.compiler.disable
    def note_head(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if self.active and logits.ndim == 3:  # somebody may call it on other shapes
            # Copies: a compiled pass writes into the same memory again.
            self.hidden, self.logits = args[0][:, -1].detach().clone(), logits[:, -1].detach().clone()

    @torch.compiler.disable
    def note_model(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        # Whoever runs the model holds its logits while they matter.
        self.returned = weakref.ref(outputs[0] if isinstance(outputs, tuple) else outputs.logits)


def _refuse_continuous_batching(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`generate` drops a caller's logits processors there without a word."""
    if any(isinstance(value, PagedAttentionCache) for value in kwargs.values()):
        raise RuntimeError(
            "Test-time training does not work with continuous batching, which does not call a caller's logits "
            'processors: generate without `generate_batch` and `cache_implementation="paged"`, or `close()` the '
            "processor first."
        )


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
