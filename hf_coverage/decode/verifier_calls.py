"""Calling a verifier on responses, and what becomes of an answer that is no reward.

Imported by the worker process, which is started anew after every hang: no torch, no transformers.
"""

import asyncio
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Verdict", "judge"]

_MOST_CHARACTERS = 500  # of an error's message


class Verdict(NamedTuple):
    """What a verifier said of one response.

    Attributes:
        reward: A finite number; None where the verifier gave none.
        error: Why not, in words that are counted: "raised ValueError", "returned nan", "timed out", ...
        message: The error's own text.
    """

    reward: float | None
    error: str = ""
    message: str = ""


def judge(verifier: Callable[..., Any], arguments: Mapping[str, Sequence[Any]], size: int) -> list[Verdict]:
    """Judge `size` responses with one call, or one by one where that call gives no reward for each of them.

    Args:
        verifier: Called with the arguments by name; may be a coroutine function.
        arguments: A list of `size` values for each.
        size: How many responses.

    Returns:
        One verdict a response.

    Example:
        >>> judge(lambda completions: [len(text) for text in completions], {"completions": ["a", "abc"]}, 2)[1].reward
        3.0
        >>> judge(lambda completions: [float("nan")], {"completions": ["a"]}, 1)[0].error
        'returned nan'
    """
    try:
        returned = verifier(**arguments)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        rewards = _plain(returned)
    except (Exception, SystemExit) as error:  # whatever it is, it costs these responses and not the run
        failure = Verdict(None, f"raised {type(error).__name__}", _describe(error))
    else:
        if isinstance(rewards, (list, tuple)) and len(rewards) == size:
            return [_verdict(reward) for reward in rewards]
        failure = Verdict(None, _shape_error(rewards, size), repr(rewards)[:_MOST_CHARACTERS])
    if size == 1:
        return [failure]
    single = ({name: values[row : row + 1] for name, values in arguments.items()} for row in range(size))
    return [verdict for one in single for verdict in judge(verifier, one, 1)]


def _verdict(value: Any) -> Verdict:
    number = _plain(value)
    if not isinstance(number, (bool, int, float)):
        name = "None" if number is None else type(number).__name__
        return Verdict(None, f"returned {name}", repr(number)[:_MOST_CHARACTERS])
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    return Verdict(reward) if math.isfinite(reward) else Verdict(None, f"returned {reward}")


def _plain(value: Any) -> Any:
    """Arrays and tensors as Python numbers and lists."""
    torch = sys.modules.get("torch")  # a tensor cannot be there before torch is
    is_tensor = torch is not None and isinstance(value, torch.Tensor)
    return value.tolist() if is_tensor or isinstance(value, (np.ndarray, np.generic)) else value


def _shape_error(returned: Any, size: int) -> str:
    if isinstance(returned, (list, tuple)):
        return f"returned {len(returned)} rewards for {size}"
    return f"returned {'None' if returned is None else type(returned).__name__} instead of a list"


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[:_MOST_CHARACTERS]
