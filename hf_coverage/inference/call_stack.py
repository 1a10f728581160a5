"""Who is calling: what a host library does not hand over stands on the call stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

__all__ = ["callers", "frames"]

_T = TypeVar("_T")


def callers(kind: type[_T]) -> Iterator[_T]:
    """Objects of a class whose methods are running now, the innermost first.

    Events of a callback carry no reference to the Trainer or its handler, so they are looked for where they are sure
    to be: among the callers of the event.
    """
    for frame in frames(kind):
        yield frame.f_locals["self"]


def frames(kind: type) -> Iterator[FrameType]:
    """The frames of running methods of a class's objects, the innermost first."""
    # From the caller on: a frame whose own locals were read refers to itself, and keeps the model alive with it.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame
        frame = frame.f_back
