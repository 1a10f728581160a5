"""Verifiers by the names that stand on a command line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_coverage.decode.verifiers import ExactMatch, MathVerify, ReasoningGym, RewardModel

__all__ = ["named_verifier"]


def named_verifier(name: str, *, column: str = "answer", device: str | None = None) -> Callable[..., Any]:
    """The verifier of a name.

    Args:
        name: `exact-match`, `math-verify`, `reasoning-gym:TASK`, `reward-model:FOLDER_OR_ID`, or one's own callable as
            `module:function` or `file.py:function`.
        column: the column that holds the answer, for the first two.
        device: where a reward model runs; None: an accelerator if there is one.

    Raises:
        ValueError: if there is no such verifier, or its module has no such callable.
        ImportError: if the package or module it needs cannot be imported.

    Example:
        >>> named_verifier("exact-match", column="completion").columns
        ('completion',)
        >>> named_verifier("math:sqrt")(4.0)
        2.0
    """
    kind, _, rest = name.rpartition(":") if name.rpartition(":")[0].endswith(".py") else name.partition(":")
    if name == "exact-match":
        return ExactMatch(column)
    if name == "math-verify":
        return MathVerify(column)
    if kind == "reasoning-gym" and rest:
        return ReasoningGym(rest)
    if kind == "reward-model" and rest:
        return RewardModel(rest, device=device)
    if not rest:
        raise ValueError(
            f"`verifier` {name!r} is not known: give exact-match, math-verify, reasoning-gym:TASK, "
            "reward-model:MODEL, or your own callable as module:function or file.py:function."
        )
    module = _import_file(Path(kind)) if kind.endswith(".py") else _import(kind, Path.cwd())
    verifier = vars(module).get(rest)
    if not callable(verifier):
        raise ValueError(f"`verifier` {name!r}: {kind} has no callable {rest!r}.")
    return verifier


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"`verifier`: there is no file {path}.")
    module = _import(path.stem, path.resolve().parent)
    if Path(str(module.__file__)).resolve() != path.resolve():
        raise ValueError(f"`verifier`: {path.stem} is another module, {module.__file__}; rename the file {path}.")
    return module


def _import(name: str, folder: Path) -> Any:
    # The process that judges is given this path too, and imports the module by the same name.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
