"""What a corpus knows of its rows, kept beside their scores, so that neither model nor text is needed to judge them.

`reference.safetensors` holds one code for each row's prompt group and one for the row itself, so that models with
different tokenizers can be compared on the same rows, and log D(y|x) where it is known. `reference.json` says where
they came from, and binds both files to each other and to the score table beside them.
"""

import hashlib
import json
import logging
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
_BINDING = "binding"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What a corpus knows of its rows, without their text.

    Attributes:
        rows: `(R,)` a code of prompt and completion.
        groups: `(R,)` a code of what is one independent draw: the prompt, or the document that windows were cut from.
        logprob: `(R,)` log D(y|x), nats; None where it is not known.
        kind: What that makes of the reference.
    """

    rows: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    logprob: NDArray[np.float64] | None
    kind: ReferenceKind

    def take(self, rows: NDArray[np.int64]) -> "Reference":
        """What is known of some of the rows."""
        logprob = None if self.logprob is None else self.logprob[rows]
        return Reference(self.rows[rows], self.groups[rows], logprob, self.kind)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: equal if and only if all of it is."""
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for array in (self.rows, self.groups, self.logprob):
            digest.update(b"-" if array is None else f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


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


def write_reference(
    folder: str | Path, reference: Reference, facts: dict[str, Any], *, corpus: str | None = None
) -> None:
    """Write a reference beside a score table, to which it then belongs.

    Args:
        folder: The score folder.
        reference: What the corpus knows of its rows.
        facts: What else to write down, in terms of JSON.
        corpus: Fingerprint of the encoded corpus; None: that of the score table in the folder, if there is one.
    """
    arrays: dict[str, NDArray[Any]] = {"rows": reference.rows, "groups": reference.groups}
    if reference.logprob is not None:
        arrays["reference_logprob"] = reference.logprob
    # a killed run leaves no half-written file that would pass for a reference
    with written_whole(Path(folder) / _ARRAYS) as part:
        save_file(arrays, part)
    table = _table(Path(folder))
    binding = {"corpus": corpus or (table or {}).get("corpus"), "arrays": reference.fingerprint}
    text = json.dumps({"kind": reference.kind} | facts | {_BINDING: binding}, indent=2, ensure_ascii=False)
    write_atomically(Path(folder) / _FACTS, text + "\n")


def load_reference(folder: str | Path, *, corpus: str | None = None) -> tuple[Reference, dict[str, Any]]:
    """Read what `write_reference` wrote: the reference and the facts.

    Args:
        folder: The score folder.
        corpus: Fingerprint of the encoded corpus that it must be of; None: that of the score table in the folder.

    Raises:
        ValueError: If it is not there, or is not of this corpus: a file was changed, or is another folder's.
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
    _check_binding(path, reference, facts.pop(_BINDING, None), corpus)
    return reference, facts


def _check_binding(folder: Path, reference: Reference, binding: dict[str, Any] | None, corpus: str | None) -> None:
    """Refuse a reference that is not of the rows that were scored: it would make another number of every score."""
    table = _table(folder)
    wanted = corpus or (table or {}).get("corpus")
    remedy = "score into this folder again, same model and corpus, which writes it anew and scores nothing twice."
    shapes = {array.shape for array in (reference.rows, reference.groups, reference.logprob) if array is not None}
    rows = len(reference.rows) if table is None else table["rows"]
    if shapes != {(rows,)}:
        raise ValueError(
            f"{folder / _ARRAYS} must have one entry for each of the {rows:,} rows of its scores, but has arrays of "
            f"{sorted(shapes)}: {remedy}"
        )
    if reference.kind != "answer" and (reference.kind == "samples") != (reference.logprob is None):
        raise ValueError(f"{folder / _FACTS} is not of the {_ARRAYS} beside it (kind {reference.kind!r}): {remedy}")
    if binding is None:
        logger.warning(
            "%s was written before references were bound to their scores: that it belongs to them is known by its "
            "number of rows alone. To be sure, %s",
            folder / _ARRAYS,
            remedy,
        )
    elif binding["arrays"] != reference.fingerprint:
        raise ValueError(f"{folder / _ARRAYS} is not the one that {_FACTS} beside it was written with: {remedy}")
    elif None not in (wanted, binding["corpus"]) and binding["corpus"] != wanted:
        raise ValueError(
            f"{folder} has the reference of another corpus (fingerprint {binding['corpus']}) than its scores "
            f"({wanted}): {remedy}"
        )


def _table(folder: Path) -> dict[str, Any] | None:
    """What is said of the score table in a folder, finished or not; None where there is none."""
    path = folder / "metadata.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
