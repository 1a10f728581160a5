"""Score tables: the scores of one model on one corpus, in a folder of safetensors shards.

A shard holds consecutive rows and says in its header what it belongs to. It appears under its name complete or not at
all, so whatever a killed run left behind is either right or missing, and the next run fills in what is missing.

Rows that are scored in another order, as those of a random sample, are in files of their own, `rows-<digest>.
safetensors`, until all of the table is there: then they become its shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hf_coverage.inference.files import begun_with, write_atomically
from hf_coverage.measure.scores import PER_TOKEN_COLUMNS, Scores

__all__ = ["ScoreTable"]

_FORMAT = "hf-coverage scores"
_FORMAT_VERSION = 1
_METADATA = "metadata.json"
# One header key: safetensors writes several in an order that changes from process to process.
_HEADER = "hf_coverage"
_LOOSE = "rows-*.safetensors"
_ROWS = "rows"
# A model may have moved since: these say where it was found, its fingerprints say what it is.
_DESCRIPTIVE = ("model.name", "model.revision", "teacher.name", "teacher.revision")


class ScoreTable:
    """Scores on disk, `metadata.json` and `scores-00000.safetensors`, ...; get one with `open` or `begin`.

    Args:
        folder: Where the table is.
        metadata: What it holds: `rows`, `shard_rows`, `model`, `corpus`, `tokenizer`, `options`, `versions`, ...

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> table = ScoreTable.begin(folder, {"rows": 3, "shard_rows": 2})
        >>> table.write(0, Scores(np.array([-1.0, -2.0]), np.array([1, 2])))
        >>> table.missing()
        [1]
        >>> table.write(1, Scores(np.array([-3.0]), np.array([1])))
        >>> ScoreTable.open(folder).logprob
        array([-1., -2., -3.])
    """

    def __init__(self, folder: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.metadata = metadata

    @classmethod
    def begin(cls, folder: str | os.PathLike[str], metadata: dict[str, Any]) -> ScoreTable:
        """Start a table, or go on with one that holds the same thing.

        Args:
            folder: Where the table is or will be; made with its first shard.
            metadata: What the table holds, JSON-serialisable, with `rows` and `shard_rows`.

        Returns:
            The table, some of whose shards may be there already.

        Raises:
            ValueError: If the folder holds a table of something else.
        """
        path = Path(folder)
        metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **metadata}
        # What is compared later is what JSON made of it.
        metadata = json.loads(json.dumps(metadata))
        if not (path / _METADATA).exists():
            if any(path.glob("scores-*.safetensors")):  # shards that lost it, and say themselves what they are of
                write_atomically(path / _METADATA, json.dumps(metadata, indent=2) + "\n")
            return cls(path, metadata)
        existing = _read_metadata(path)
        before, now = _identity(existing), _identity(metadata)
        changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        if changed:
            differences = "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise ValueError(
                f"`output_dir` {path} holds the scores of something else ({differences}). "
                "Score into a new folder, or remove this one if it is no longer needed."
            )
        return cls(path, existing)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ScoreTable:
        """Open a complete table, checking each of its shards.

        Args:
            folder: Where the table is.

        Returns:
            The table.

        Raises:
            FileNotFoundError: If there is no table.
            ValueError: If the table is not complete, or a shard is damaged or does not belong to it.
        """
        table = cls(folder, _read_metadata(Path(folder)))
        missing = table.missing()
        if missing:
            raise ValueError(
                f"The score table {table.folder} lacks {len(missing)} of {table.num_shards} shards, the first is "
                f"{table.shard_path(missing[0]).name}; run the same scoring again to finish it."
            )
        return table

    @classmethod
    def open_sample(cls, folder: str | os.PathLike[str]) -> ScoreTable:
        """Open a table that may hold some rows only, those of `write_rows`; see `open`."""
        table = cls(folder, _read_metadata(Path(folder)))
        return table if not table.is_whole and any(table.folder.glob(_LOOSE)) else cls.open(folder)

    @property
    def is_whole(self) -> bool:
        """Whether all shards are there; they are not looked into."""
        return all(self.shard_path(index).exists() for index in range(self.num_shards))

    @property
    def num_shards(self) -> int:
        """How many shards the complete table has."""
        return -(-self.metadata["rows"] // self.metadata["shard_rows"])

    def shard_path(self, index: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"scores-{index:05d}.safetensors"

    def shard_rows(self, index: int) -> range:
        """Rows of the corpus that a shard holds."""
        size = self.metadata["shard_rows"]
        return range(index * size, min((index + 1) * size, self.metadata["rows"]))

    def missing(self) -> list[int]:
        """Shards still to be scored, after checking those that are there.

        Returns:
            Their indices, ascending.

        Raises:
            ValueError: If a shard is damaged or does not belong to this table.
        """
        present = [index for index in range(self.num_shards) if self.shard_path(index).exists()]
        for index in present:
            self.read(index)
        return sorted(set(range(self.num_shards)) - set(present))

    def require_there(self) -> None:
        """Raise FileNotFoundError, naming the shard, if one that was written or read is not there any more."""
        gone = next((path for path in map(self.shard_path, range(self.num_shards)) if not path.exists()), None)
        if gone is not None:
            raise FileNotFoundError(
                f"{gone} was removed while the others were written: run the same scoring again to finish it."
            )

    def write(self, index: int, scores: Scores) -> None:
        """Write a shard, whole or not at all.

        Args:
            index: Which shard.
            scores: Scores of its rows.

        Raises:
            ValueError: If there are more or fewer rows than the shard has.
        """
        if len(scores) != len(self.shard_rows(index)):
            raise ValueError(
                f"`scores` must have {len(self.shard_rows(index))} rows for shard {index}, got {len(scores)}."
            )
        self._save(self.shard_path(index), _arrays(scores), self._header(self.shard_rows(index)))

    def write_rows(self, rows: NDArray[np.int64], scores: Scores) -> None:
        """Write rows that make no shard, whole or not at all.

        Args:
            rows: Which rows of the corpus.
            scores: Their scores.
        """
        path = self.folder / f"rows-{_checksum({'rows': rows})[:16]}.safetensors"
        self._save(path, {_ROWS: rows} | _arrays(scores), self._header(None))

    def read_rows(self) -> tuple[NDArray[np.int64], Scores | None]:
        """All that `write_rows` wrote and is not yet part of a whole table.

        Returns:
            The rows, and their scores; None where there are none.

        Raises:
            ValueError: If a file is damaged or does not belong to this table.
        """
        rows, parts = [np.empty(0, np.int64)], []
        for path in sorted(self.folder.glob(_LOOSE)):
            arrays = self._load(path, self._header(None))
            rows.append(arrays.pop(_ROWS))
            parts.append(_scores(arrays))
        return np.concatenate(rows), Scores.concatenate(parts) if parts else None

    def look_up(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Scores | None]:
        """What is known of some rows, from shards or files of rows.

        Returns:
            `(R,)` of which of them something is known, and the scores of these, in their order; None for none.
        """
        found, loose = self.read_rows()
        parts = [] if loose is None else [loose]
        present = np.unique(np.asarray(rows) // self.metadata["shard_rows"])
        for index in (index for index in present.tolist() if self.shard_path(index).exists()):
            found = np.append(found, np.asarray(self.shard_rows(index)))
            parts.append(self.read(index))
        places = np.full(self.metadata["rows"], -1)
        places[found] = np.arange(found.size)
        own = places[rows]
        known = own >= 0
        return known, Scores.concatenate(parts).take(own[known]) if known.any() else None

    def read_some(self, rows: NDArray[np.int64]) -> Scores:
        """The scores of some rows, in their order.

        Raises:
            ValueError: If some are not there.
        """
        known, scores = self.look_up(rows)
        if scores is None or not known.all():
            raise ValueError(
                f"The score table {self.folder} has scores of {known.sum():,} of {known.size:,} rows that are needed; "
                "score the checkpoint on the others."
            )
        return scores

    def finish(self) -> None:
        """Make shards of rows that `write_rows` wrote, as soon as these are all that was missing; else do nothing."""
        if not any(self.folder.glob(_LOOSE)):
            return
        every = np.arange(self.metadata["rows"])
        known, scores = self.look_up(every)
        if scores is None or not known.all():
            return
        for index in self.missing():
            self.write(index, scores.take(every[self.shard_rows(index).start : self.shard_rows(index).stop]))
        for path in self.folder.glob(_LOOSE):
            path.unlink()

    def read(self, index: int) -> Scores:
        """Read a shard back.

        Args:
            index: Which shard.

        Returns:
            Scores of its rows.

        Raises:
            ValueError: If the shard is damaged or does not belong to this table.
        """
        return _scores(self._load(self.shard_path(index), self._header(self.shard_rows(index))))

    def iter_shards(self) -> Iterator[Scores]:
        """Read shard after shard, in the order of the rows, holding one at a time."""
        return map(self.read, range(self.num_shards))

    @property
    def logprob(self) -> NDArray[np.float64]:
        """Log p(y|x) of all rows `(R,)`, nats."""
        return np.concatenate([scores.logprob for scores in self.iter_shards()])

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """Response tokens of all rows `(R,)`."""
        return np.concatenate([scores.num_tokens for scores in self.iter_shards()])

    @property
    def interval_low(self) -> NDArray[np.float64] | None:
        """Where the responses' intervals of arithmetic codes begin `(R,)`; None where it was not asked for."""
        parts = [scores.interval_low for scores in self.iter_shards()]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None

    def _header(self, rows: range | None) -> dict[str, Any]:
        """What a file has to say of itself, the most telling first; its rows, if they are consecutive."""
        identity = _identity(self.metadata)
        return {
            "corpus": identity.get("corpus"),
            "weights": identity.get("model.weights"),
            "rows": None if rows is None else [rows.start, rows.stop],
            "table": _checksum({"identity": np.frombuffer(json.dumps(identity, sort_keys=True).encode(), np.uint8)}),
        }

    def _save(self, path: Path, arrays: dict[str, NDArray], header: dict[str, Any]) -> None:
        header = header | {"checksum": _checksum(arrays)}
        with begun_with(self.folder / _METADATA, json.dumps(self.metadata, indent=2) + "\n"):
            write_atomically(path, save(arrays, {_HEADER: json.dumps(header, sort_keys=True)}))

    def _load(self, path: Path, expected: dict[str, Any]) -> dict[str, NDArray]:
        remedy = "Move the file away and run the same scoring again; only its rows will be scored anew."
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                # SIM118: a safetensors file is no mapping and cannot be iterated over itself
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or is no safetensors file ({error}). {remedy}") from error
        wrong = [name for name in expected if header.get(name) != expected[name]]
        if wrong:
            raise ValueError(
                f"{path} does not belong to this table: its {wrong[0]} is {header.get(wrong[0])!r}, "
                f"expected {expected[wrong[0]]!r}. {remedy}"
            )
        if header.get("checksum") != _checksum(arrays):
            raise ValueError(f"{path} is damaged: its content does not match its checksum. {remedy}")
        return arrays


def _arrays(scores: Scores) -> dict[str, NDArray]:
    """The columns of scores as a file holds them, without the borders of rows in those of tokens."""
    return {
        name: np.concatenate(column) if name in PER_TOKEN_COLUMNS else np.ascontiguousarray(column)
        for name, column in scores.columns().items()
    }


def _scores(arrays: dict[str, NDArray]) -> Scores:
    ends = np.cumsum(arrays["num_tokens"])[:-1]
    columns: dict[str, Any] = {
        name: np.split(array, ends) if name in PER_TOKEN_COLUMNS else array for name, array in arrays.items()
    }
    return Scores(**columns)


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / _METADATA
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no score table: there is no {_METADATA} in it.")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError(f"a {type(metadata).__name__} instead of an object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); score into a new folder.") from error
    found = metadata.get("format"), metadata.get("format_version")
    if found != (_FORMAT, _FORMAT_VERSION):
        raise ValueError(f"{path} must be of format {_FORMAT!r}, version {_FORMAT_VERSION}, got {found}.")
    if not all(type(metadata.get(name)) is int and metadata[name] > 0 for name in ("rows", "shard_rows")):
        raise ValueError(f"{path} is damaged (`rows` and `shard_rows` are no sizes); score into a new folder.")
    return metadata


def _identity(metadata: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Metadata as one flat dict with dotted keys, without what only describes."""
    flat: dict[str, Any] = {}
    for key, value in metadata.items():
        if isinstance(value, dict):
            flat |= _identity(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in _DESCRIPTIVE:
            flat[f"{prefix}{key}"] = value
    return flat


def _checksum(arrays: dict[str, NDArray]) -> str:
    state = blake2b(digest_size=16)
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        state.update(arrays[name].tobytes())
    return state.hexdigest()
