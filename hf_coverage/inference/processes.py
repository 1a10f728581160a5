"""What the processes of a job do together."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

__all__ = ["on_main_process"]

_T = TypeVar("_T")


def on_main_process(function: Callable[[], _T]) -> _T:
    """Call a function on the main process, and return its value, or raise its error, on all of them.

    Example:
        >>> on_main_process(lambda: 2 + 2)
        4
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on every process: the others would wait for ever
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
