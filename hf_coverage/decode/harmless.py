"""Keeping a scorer from executing a response as Python."""

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["is_harmless", "nothing_evaluated"]

_FUNCTIONS = re.compile("a?(sin|cos|tan)h?|cot|sec|csc|exp|log|ln|sqrt|pi")
_guard = {"on": False}


def is_harmless(text: str) -> bool:
    """Whether evaluating a text can do nothing but compute: a Python literal, or arithmetic with one-letter variables.

    Example:
        >>> is_harmless("[['1', '2'], []]"), is_harmless("(3 + x)**2 / sqrt(2)"), is_harmless("exec(chr(49))")
        (True, True, False)
    """
    try:
        ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        names = re.findall(r"[^\W\d]\w*", text)
        return (
            re.fullmatch(r"[\w\s+\-*/^(),.]*", text, re.ASCII) is not None
            and "_" not in text
            and re.search(r"\.\s*[^\W\d]", text) is None  # an attribute
            and all(len(name) == 1 or _FUNCTIONS.fullmatch(name) for name in names)
        )
    return True


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    """Let every attempt to execute code from text fail, by whatever name it is called.

    Example:
        >>> with nothing_evaluated():
        ...     eval("1 + 1")
        Traceback (most recent call last):
            ...
        PermissionError: A response was about to be executed as Python, which is not allowed.
    """
    _install()
    _guard["on"] = True
    try:
        yield
    finally:
        _guard["on"] = False


@cache
def _install() -> None:
    # An audit hook sees `eval`, `exec` and what libraries build on them; once there, it stays.
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "exec" and _guard["on"]:
        raise PermissionError("A response was about to be executed as Python, which is not allowed.")
