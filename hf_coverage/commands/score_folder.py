"""Score folders: a score table and, beside it, what it takes to make a profile of it without the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.commands.console import say

if TYPE_CHECKING:
    from hf_coverage.measure.profile import CoverageProfile
    from hf_coverage.measure.reference import Reference

__all__ = ["Measured", "check_name", "is_score_folder", "on_same_rows", "read_measured", "require_intervals"]

_LONGEST_NAME = 200  # bytes; file systems take 255, with what is written behind the name


@dataclass(frozen=True)
class Measured:
    """A model's profile, the rows it is of, and where both came from.

    Attributes:
        profile: The profile.
        reference: What is known of its rows.
        facts: Where they came from.
        corpus: What is known of all rows of the corpus, where the model was scored on some.
        chosen: Which rows these are.
    """

    profile: "CoverageProfile"
    reference: "Reference"
    facts: dict[str, Any] = field(default_factory=dict)
    corpus: "Reference | None" = None
    chosen: NDArray[np.int64] | None = None

    def on_rows(self, rows: NDArray[np.int64]) -> "Measured":
        """The same of some rows of the corpus, ascending, all of which were scored."""
        whole = self.corpus or self.reference
        places = rows if self.chosen is None else np.searchsorted(self.chosen, rows)
        if places.size == self.reference.rows.size:
            return self
        logprobs = np.asarray(self.profile.logprobs)[places]
        some = _measured(logprobs, whole.take(rows), self.profile.name, self.facts)
        return replace(some, corpus=whole, chosen=rows)


def check_name(name: str) -> str:
    """A model's name, after checking that a folder can be called by it.

    Raises:
        ValueError: If it is empty, too long, a step up, or holds control characters.

    Example:
        >>> check_name("org/model")
        'org/model'
    """
    if name.strip(". ") == "" or len(name.encode()) > _LONGEST_NAME or not name.isprintable():
        shown = name if len(name) < 40 else f"{name[:40]}..."
        raise ValueError(
            f"a model's name must be printable, have other characters than dots and spaces, and at most "
            f"{_LONGEST_NAME} bytes, but is {shown!r} ({len(name.encode()):,} bytes): give another `--name`."
        )
    return name


def is_score_folder(source: str) -> bool:
    """Whether `hf-coverage score` wrote a folder; a model's may hold a `metadata.json` too."""
    folder = Path(source)
    return (folder / "metadata.json").is_file() and not (folder / "config.json").is_file()


def read_measured(source: str, group_by: str | None = None, *, announce: bool = True) -> Measured:
    """A model's profile from a score folder, or from a data set with the column `logprob` or `answer_logprob`.

    Args:
        source: Folder that `hf-coverage score` wrote, or a file or folder with the rows of `score_responses` or
            `score_answers`.
        group_by: For a data set: the column whose equal values make rows dependent.
        announce: Whether to say so where only some rows of the corpus were scored.

    Raises:
        ValueError: If the table is not complete, a file of it is missing, there are no scores, or `group_by` is given
            for a score folder, which knows its groups.
    """
    if is_score_folder(source):
        if group_by is not None:
            raise ValueError(
                f"`--group-by` is chosen when a model is scored, and {source} has scores and groups already: leave it "
                "out, or give it to `hf-coverage score`."
            )
        return _read_folder(Path(source), announce)
    from hf_coverage.commands.inputs import read_dataset
    from hf_coverage.measure.reference import read_reference

    rows = read_dataset(source)
    scores = "answer_logprob" if "answer_logprob" in rows.column_names else "logprob"
    if scores not in rows.column_names:
        raise ValueError(
            f"{source} has no scores: there is no column `logprob` among {rows.column_names}; "
            f"write them with `hf-coverage score MODEL {source} --output-dir scores/MODEL`."
        )
    lows = rows["interval_low"][:] if "interval_low" in rows.column_names and scores == "logprob" else None
    return _measured(rows[scores][:], read_reference(rows, group_by), Path(source).stem, {"scores": source}, lows)


def on_same_rows(measured: Sequence[Measured]) -> list[Measured]:
    """All models on the rows that all of them were scored on; says so where these are not all.

    Raises:
        ValueError: If they were scored on different corpora, or with different log D(y|x) of the same rows.
    """
    first = measured[0].corpus or measured[0].reference
    for other in measured[1:]:
        names = f"{measured[0].profile.name} and {other.profile.name}"
        whole = other.corpus or other.reference
        if not np.array_equal(first.rows, whole.rows):
            raise ValueError(
                f"{names} were scored on different rows ({first.rows.size:,} and {whole.rows.size:,}): score both on "
                "the same corpus to compare them."
            )
        if not np.array_equal(_or_empty(first.logprob), _or_empty(whole.logprob)):
            raise ValueError(f"{names} were scored with different `reference_logprob` of the same rows; score again.")
    chosen = [one.chosen for one in measured if one.chosen is not None]
    if not chosen:
        return list(measured)
    common = reduce(np.intersect1d, chosen)
    if any(one.reference.rows.size > common.size for one in measured):
        say(f"Compared on the {common.size:,} rows that all of them were scored on.")
    return [one.on_rows(common) for one in measured]


def require_intervals(measured: Sequence[Measured]) -> None:
    """Refuse `--stratified` where the intervals of single right answers are not known."""
    for one in measured:
        name = one.profile.name
        if one.profile.kind != "single_answer":
            raise ValueError(
                f"`--stratified` needs prompts with one right answer, `reference_logprob` 0, but those of {name} have "
                "other references: sample with `hf-coverage best-of-n --sampling stratified`."
            )
        if one.profile.interval_lows is None:
            raise ValueError(
                f"`--stratified` needs to know where the intervals of answers begin, and {name} was scored without: "
                "score it into a new folder with `hf-coverage score --stratified`."
            )


def _read_folder(folder: Path, announce: bool) -> Measured:
    from hf_coverage.measure.reference import load_reference
    from hf_coverage.measure.score_table import ScoreTable

    table = ScoreTable.open_sample(folder)
    reference, facts = load_reference(folder)
    facts |= {
        "scores": str(folder),
        "fingerprint": table.metadata["corpus"],
        "weights": table.metadata["model"]["weights"],
    }
    if table.is_whole:
        return _measured(table.logprob, reference, facts["name"], facts, table.interval_low)
    rows = np.sort(table.read_rows()[0])
    if announce:
        say(f"{folder} has scores of {rows.size:,} of {reference.rows.size:,} rows, of prompts drawn at random.")
    own = _measured(
        table.read_some(rows).logprob, reference.take(rows), facts["name"], facts | {"rows": int(rows.size)}
    )
    return replace(own, corpus=reference, chosen=rows)


def _measured(
    logprob: Any, reference: "Reference", name: str, facts: dict[str, Any], interval_lows: Any = None
) -> Measured:
    from hf_coverage.measure.profile import CoverageProfile

    profile = CoverageProfile.from_logprobs(
        logprob,
        reference.logprob,
        groups=reference.groups,
        kind=reference.kind,
        name=check_name(name),
        interval_lows=interval_lows,
    )
    return Measured(profile, reference, facts)


def _or_empty(array: NDArray[np.float64] | None) -> NDArray[np.float64]:
    return np.empty(0) if array is None else array
