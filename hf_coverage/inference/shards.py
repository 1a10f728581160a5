"""Rows kept as JSON lines in a folder, shard by shard, each there whole or not at all."""

import json
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from hf_coverage.inference.files import begun_with, read_facts, write_atomically

__all__ = ["JsonShards", "read_metadata"]

_METADATA = "metadata.json"
_DESCRIPTIVE = "about"  # the one entry of the metadata that may differ from run to run


class JsonShards:
    """Shards `<name>-00000.jsonl`, ... and what they are of, `metadata.json`.

    Args:
        folder: Where they are or will be; made with the first of them.
        name: What the files are called.
        metadata: What decides the rows, JSON-serialisable; the entry `about` only describes.
        before: What the folder may hold of it already; the first shard that is written then makes it `metadata`.

    Raises:
        ValueError: If the folder holds something else.

    Example:
        >>> import tempfile
        >>> shards = JsonShards(tempfile.mkdtemp(), "samples", {"seed": 0})
        >>> shards.write(0, [{"text": "a"}])
        >>> shards.read(0), shards.read(1)
        ([{'text': 'a'}], None)
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        name: str,
        metadata: dict[str, Any],
        *,
        before: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        path = self.folder / _METADATA
        self._grows = False
        # What is compared is what JSON makes of it.
        now, before = json.loads(json.dumps([metadata, before]))
        self._metadata: dict[str, Any] = now
        if not path.exists():
            if any(self.folder.glob(f"{name}-*.jsonl")):  # shards that lost it
                write_atomically(path, json.dumps(now, indent=2) + "\n")
            return
        held = read_metadata(self.folder)
        self._grows = before is not None and not _changed(held, before)
        changed = [] if self._grows else _changed(held, now)
        if changed:
            differences = "; ".join(f"{key} was {held.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise ValueError(
                f"{self.folder} holds {name} of something else ({differences}). Choose a new `output_dir`, or remove "
                "this one if it is no longer needed."
            )

    def read(self, index: int, names: Collection[str] = ()) -> list[dict[str, Any]] | None:
        """The rows of a shard, each with at least the named entries; None where it is not there.

        Raises:
            ValueError: If the shard is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for number, row in enumerate(rows, start=1):
                lacking = [name for name in names if name not in row] if isinstance(row, dict) else ["an object"]
                if lacking:
                    raise ValueError(f"line {number} lacks {', '.join(lacking)}")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and run the same command again.") from error
        return rows

    def write(self, index: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a shard."""
        record = json.dumps(self._metadata, indent=2) + "\n"
        if self._grows:
            write_atomically(self.folder / _METADATA, record)
            self._grows = False
        with begun_with(self.folder / _METADATA, record):
            write_atomically(self._path(index), "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.jsonl"


def read_metadata(folder: str | PathLike[str], **types: type) -> dict[str, Any]:
    """What the shards in a folder are of, with at least the named entries, each of its type.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the file is damaged.
    """
    path = Path(folder) / _METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no samples of Best-of-N: there is no {_METADATA} in it.")
    return read_facts(path, "Remove the folder, or restore the file, and run the same command again.", **types)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The entries of metadata that differ, but for what only describes.

    Example:
        >>> _changed({"k": 8, "about": 1}, {"k": 8, "about": 2}), _changed({"k": 8}, {"k": 9, "seed": 0})
        ([], ['k', 'seed'])
    """
    return [key for key in sorted(before | now) if key != _DESCRIPTIVE and before.get(key) != now.get(key)]
