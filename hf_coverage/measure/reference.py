"""What a corpus knows of its rows, kept beside their scores, so that neither model nor text is needed to judge them.

`reference.safetensors` holds one code for each row's prompt group and one for the row itself, so that models with
different tokenizers can be compared on the same rows, and log D(y|x) where it is known. `reference.json` says where
they came from.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hf_coverage.functional.checks import ReferenceKind
from hf_coverage.functional.statistics import group_codes
from hf_coverage.inference.files import read_facts, reading, write_atomically, written_whole
from hf_coverage.measure.corpus import reference_kind, validate_corpus

__all__ = ["Reference", "load_reference", "read_reference", "write_reference"]

_ARRAYS = "reference.safetensors"
_FACTS = "reference.json"


@dataclass(frozen=True)
class Reference:
    """What a corpus knows of its rows, without their text.

    Attributes:
        rows: `(R,)` a code of prompt and completion.
        groups: `(R,)` a code of what is one independent draw: the prompt, or the document that windows were cut from.
        logprob: `(R,)` log D(y|x), nats; None where it is not known.
        kind: what that makes of the reference.
    """

    rows: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    logprob: NDArray[np.float64] | None
    kind: ReferenceKind


def read_reference(corpus: Dataset, group_by: str | None = None) -> Reference:
    """What a corpus knows of its rows.

    Args:
        corpus: A reference corpus, or the rows of `score_answers`.
        group_by: The column whose equal values make rows dependent; None: `document` where there is one, or `prompt`.

    Raises:
        ValueError: If the corpus is not valid, or has no such column.
    """
    kind = reference_kind(corpus)
    if kind == "answer":
        response, density = "answer", "reference_answer_logprob"
    else:
        validate_corpus(corpus)
        response, density = "completion", "reference_logprob"
    column = group_by or ("document" if "document" in corpus.column_names else "prompt")
    if column not in corpus.column_names:
        raise ValueError(
            f"`group_by` must be a column of the corpus, one of {corpus.column_names}, but is {column!r}."
        )
    plain = corpus.with_format(None)
    return Reference(
        rows=group_codes(map(list, zip(plain["prompt"][:], plain[response][:]))),
        groups=group_codes(plain[column][:]),
        logprob=np.asarray(plain[density][:], dtype=np.float64) if density in plain.column_names else None,
        kind=kind,
    )


def write_reference(folder: str | Path, reference: Reference, facts: dict[str, Any]) -> None:
    """Write a reference beside a score table."""
    arrays: dict[str, NDArray[Any]] = {"rows": reference.rows, "groups": reference.groups}
    if reference.logprob is not None:
        arrays["reference_logprob"] = reference.logprob
    # a killed run leaves no half-written file that would pass for a reference
    with written_whole(Path(folder) / _ARRAYS) as part:
        save_file(arrays, part)
    text = json.dumps({"kind": reference.kind} | facts, indent=2, ensure_ascii=False)
    write_atomically(Path(folder) / _FACTS, text + "\n")


def load_reference(folder: str | Path) -> tuple[Reference, dict[str, Any]]:
    """Read what `write_reference` wrote: the reference and the facts.

    Raises:
        ValueError: If it is not there.
    """
    path = Path(folder)
    if not ((path / _ARRAYS).is_file() and (path / _FACTS).is_file()):
        raise ValueError(
            f"{folder} has no {_ARRAYS}, so it is not known what its rows are: run `hf-coverage score` into it once "
            "more with the same model and corpus; nothing is scored twice."
        )
    remedy = "Run `hf-coverage score` into this folder once more with the same model and corpus."
    facts = read_facts(path / _FACTS, remedy, kind=str, name=str)
    with reading(path / _FACTS, remedy):
        if facts["kind"] not in get_args(ReferenceKind):
            raise ValueError(f"{facts['kind']!r} is none of {', '.join(get_args(ReferenceKind))}")
    with reading(path / _ARRAYS, remedy):
        arrays = load_file(path / _ARRAYS)
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1:
            raise ValueError(f"columns of unequal length, {sorted(sizes)}")
        reference = Reference(arrays["rows"], arrays["groups"], arrays.get("reference_logprob"), facts["kind"])
    return reference, facts
