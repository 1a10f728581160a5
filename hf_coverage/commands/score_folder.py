"""Score folders: a score table and, beside it, what it takes to make a profile of it without the corpus.

`reference.safetensors` holds one code for each row's prompt group and one for the row itself, so that models with
different tokenizers can be compared on the same rows, and log D(y|x) where it is known. `reference.json` says where
they came from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import ReferenceKind

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_coverage.measure.profile import CoverageProfile

__all__ = ["Measured", "Reference", "check_same_rows", "read_measured", "read_reference", "write_reference"]

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


@dataclass(frozen=True)
class Measured:
    """A model's profile, the rows it is of, and where both came from."""

    profile: "CoverageProfile"
    reference: Reference
    facts: dict[str, Any] = field(default_factory=dict)


def read_reference(corpus: "Dataset", group_by: str | None = None) -> Reference:
    """What a corpus knows of its rows.

    Args:
        corpus: A reference corpus, or the rows of `score_answers`.
        group_by: The column whose equal values make rows dependent; None: `document` where there is one, or `prompt`.

    Raises:
        ValueError: If the corpus is not valid, or has no such column.
    """
    from hf_coverage.functional.statistics import group_codes
    from hf_coverage.measure.corpus import reference_kind, validate_corpus

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
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {"rows": reference.rows, "groups": reference.groups}
    if reference.logprob is not None:
        arrays["reference_logprob"] = reference.logprob
    # in one step: a killed run leaves no half-written file that would pass for a reference
    save_file(arrays, Path(folder) / f".{_ARRAYS}.part")
    (Path(folder) / f".{_ARRAYS}.part").replace(Path(folder) / _ARRAYS)
    text = json.dumps({"kind": reference.kind} | facts, indent=2, ensure_ascii=False)
    (Path(folder) / _FACTS).write_text(text + "\n", encoding="utf-8")


def read_measured(source: str, group_by: str | None = None) -> Measured:
    """A model's profile from a score folder, or from a data set with the column `logprob` or `answer_logprob`.

    Args:
        source: Folder that `hf-coverage score` wrote, or a file or folder with the rows of `score_responses` or
            `score_answers`.
        group_by: For a data set: the column whose equal values make rows dependent.

    Raises:
        ValueError: If the table is not complete, a file of it is missing, or there are no scores.
    """
    if (Path(source) / "metadata.json").is_file():
        return _read_folder(Path(source))
    from hf_coverage.commands.inputs import read_dataset

    rows = read_dataset(source)
    scores = "answer_logprob" if "answer_logprob" in rows.column_names else "logprob"
    if scores not in rows.column_names:
        raise ValueError(
            f"{source} has no scores: there is no column `logprob` among {rows.column_names}; "
            f"write them with `hf-coverage score MODEL {source} --output-dir scores/MODEL`."
        )
    return _measured(rows[scores][:], read_reference(rows, group_by), Path(source).stem, {"scores": source})


def check_same_rows(measured: Sequence[Measured]) -> None:
    """Refuse profiles that are not of the same rows in the same order with the same log D(y|x)."""
    first = measured[0]
    for other in measured[1:]:
        names = f"{first.profile.name} and {other.profile.name}"
        if not np.array_equal(first.reference.rows, other.reference.rows):
            raise ValueError(
                f"{names} were scored on different rows ({first.reference.rows.size:,} and "
                f"{other.reference.rows.size:,}): score both on the same corpus to compare them."
            )
        if not np.array_equal(_or_empty(first.reference.logprob), _or_empty(other.reference.logprob)):
            raise ValueError(f"{names} were scored with different `reference_logprob` of the same rows; score again.")


def _read_folder(folder: Path) -> Measured:
    from safetensors.numpy import load_file

    from hf_coverage.measure.score_table import ScoreTable

    table = ScoreTable.open(folder)
    if not ((folder / _ARRAYS).is_file() and (folder / _FACTS).is_file()):
        raise ValueError(
            f"{folder} has no {_ARRAYS}, so it is not known what its rows are: run `hf-coverage score` into it once "
            "more with the same model and corpus; nothing is scored twice."
        )
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    arrays = load_file(folder / _ARRAYS)
    reference = Reference(arrays["rows"], arrays["groups"], arrays.get("reference_logprob"), facts["kind"])
    facts |= {
        "scores": str(folder),
        "fingerprint": table.metadata["corpus"],
        "weights": table.metadata["model"]["weights"],
    }
    return _measured(table.logprob, reference, facts["name"], facts)


def _measured(logprob: Any, reference: Reference, name: str, facts: dict[str, Any]) -> Measured:
    from hf_coverage.measure.profile import CoverageProfile

    profile = CoverageProfile.from_logprobs(
        logprob, reference.logprob, groups=reference.groups, kind=reference.kind, name=name
    )
    return Measured(profile, reference, facts)


def _or_empty(array: NDArray[np.float64] | None) -> NDArray[np.float64]:
    return np.empty(0) if array is None else array
