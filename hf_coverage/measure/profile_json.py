"""A coverage profile as JSON: its arrays, every number exact, and what is known of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import check_log_ratios
from hf_coverage.inference.files import read_json

__all__ = ["read_profile_fields", "write_profile_fields"]

_FORMAT = 1
_TYPES = {"log_ratios": np.float64, "logprobs": np.float64, "groups": np.uint64, "weights": np.float64}
_FIELDS = (*_TYPES, "kind", "name")


def write_profile_fields(fields: Mapping[str, Any], path: str | PathLike[str] | None = None) -> str:
    """JSON text of a profile's fields, infinities as "inf" and "-inf", which numpy reads back."""
    text = json.dumps({"format": _FORMAT} | {name: fields[name] for name in _FIELDS}, default=_encode)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def read_profile_fields(source: str | PathLike[str]) -> list[Any]:
    """The fields that `write_profile_fields` wrote, in the order of `CoverageProfile`: from its text, or its path.

    Raises:
        KeyError: if one is missing.
        TypeError: if one is of another type.
        ValueError: if the text is of another format, or an array holds no log ratios.
    """
    facts = read_json(source, version=_FORMAT)
    if not all(type(code) is int for code in facts["groups"] or ()):
        raise TypeError("its groups are not all whole numbers")
    fields = [
        facts[name] if name not in _TYPES or facts[name] is None else np.asarray(facts[name], dtype=_TYPES[name])
        for name in _FIELDS
    ]
    return [check_log_ratios(fields[0]), *fields[1:]]


def _encode(array: NDArray[Any]) -> list[Any]:
    return [str(value) if value in (math.inf, -math.inf) else value for value in array.tolist()]
