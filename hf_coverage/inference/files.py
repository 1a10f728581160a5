"""Files that are there whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

__all__ = ["read_json", "refuse_constant", "strict_json", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` its content in one step that survives a crash of the machine."""
    # Always the same name: what a killed run left half-written is overwritten by the next one, not left behind.
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def strict_json(facts: Mapping[str, Any], path: str | PathLike[str] | None = None) -> str:
    """JSON text of mappings, sequences, arrays, text and numbers; NaN and infinities become null.

    Args:
        facts: what to write.
        path: file to write it to as well.

    Example:
        >>> print(strict_json({"kl": float("inf"), "rates": np.array([0.5, np.nan])}))
        {
          "kl": null,
          "rates": [
            0.5,
            null
          ]
        }
    """
    text = json.dumps(_strict(facts), indent=2, ensure_ascii=False, allow_nan=False)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def read_json(source: str | PathLike[str], *, version: int) -> dict[str, Any]:
    """Read a JSON object with a `format` from its text, or from the file that a path leads to.

    Raises:
        ValueError: if it is no such object, or of another format than `version`.

    Example:
        >>> read_json('{"format": 1, "name": "model"}', version=1)
        {'format': 1, 'name': 'model'}
    """
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
    facts = json.loads(text, parse_constant=refuse_constant)
    if not isinstance(facts, dict) or facts.get("format") != version or facts["format"] is True:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"format {found} is not {version}")
    return facts


def refuse_constant(name: str) -> NoReturn:
    """What `json` calls at NaN and infinities, which no file of ours has: they are not JSON."""
    raise ValueError(f"{name} is no JSON")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name.item() if isinstance(name, np.generic) else name: _strict(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _strict(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
