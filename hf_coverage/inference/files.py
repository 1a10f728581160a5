"""Files that are there whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "begun_with",
    "made_folder",
    "read_facts",
    "read_json",
    "reading",
    "refuse_constant",
    "strict_json",
    "write_atomically",
    "written_whole",
]


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Give a file its content, text in UTF-8, in one step that survives a crash of the machine.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, "whole")
        >>> path.read_text(encoding="utf-8")
        'whole'
    """
    with written_whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: str | PathLike[str]) -> Iterator[Path]:
    """Let something be written elsewhere, and put it in its place when it is all there.

    For what writes files or folders by their path, such as `Dataset.save_to_disk`; where the content is at hand, see
    `write_atomically`. If the block raises, nothing is left of it, and what was there before stays. If the process is
    killed, a hidden `.<name>.part` is left, which the next one writes over.

    Args:
        path: The file or folder to be; its parent exists. A link is followed, and a device or pipe written to as it
            is. A folder that is there already must be empty: it stays the one it is, and gets the files one by one.

    Yields:
        Where to write.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "corpus"
        >>> with written_whole(path) as part:
        ...     part.mkdir()
        ...     print(part.name, path.exists())
        .corpus.part False
        >>> path.exists()
        True
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    # Always the same name: what a killed run left half-written is overwritten by the next one, not left behind.
    part = (target if target.is_dir() else target.parent) / f".{target.name}.part"
    _remove(part)
    try:
        yield part
        _settle(part, target)
    except BaseException:
        _remove(part)
        raise


def _settle(part: Path, target: Path) -> None:
    """Put what is written in its place, and wait until the disk has it."""
    for path in (part, *part.rglob("*")):
        _sync(path)
    if target.is_dir():  # not replaced: it may be a mounted disk, or where somebody stands
        for path in sorted(part.iterdir()):
            path.replace(target / path.name)
        part.rmdir()
        _sync(target)
        return
    if target.exists():
        shutil.copymode(target, part)
    part.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def begun_with(record: Path, text: str) -> Iterator[None]:
    """Let a block write the first file of a folder, with the record of what the folder is to hold before it.

    Where nothing was written, no record says that something was begun.

    Args:
        record: The file; its folder is made. If it is there already, the folder was begun before.
        text: Its content.
    """
    begins = not record.exists()
    if not begins:
        yield
        return
    with made_folder(record.parent):
        write_atomically(record, text)
        try:
            yield
        except BaseException:
            # a file may be in its place, and the error come after
            if all(path == record or path.name.startswith(".") for path in record.parent.iterdir()):
                record.unlink()
            raise


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for a block, and take away what was made if the block leaves nothing in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "a" / "b"
        >>> with made_folder(folder):
        ...     folder.is_dir()
        True
        >>> folder.parent.exists()
        False
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # something is in it
                path.rmdir()


def strict_json(facts: Mapping[str, Any], path: str | PathLike[str] | None = None) -> str:
    """JSON text of mappings, sequences, arrays, text and numbers; NaN and infinities become null.

    Args:
        facts: What to write.
        path: File to write it to as well, whole or not at all.

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
        write_atomically(path, text + "\n")
    return text


def read_json(source: str | PathLike[str], *, version: int) -> dict[str, Any]:
    """Read a JSON object with a `format` from its text, or from the file that a path leads to.

    Raises:
        ValueError: If it is no such object, or of another format than `version`.

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


@contextmanager
def reading(what: str | PathLike[str], remedy: str) -> Iterator[None]:
    """Say of what cannot be read which file it is and what to do.

    Args:
        what: The file or folder.
        remedy: A sentence on what to do next.

    Raises:
        ValueError: In place of whatever the reader raises; that there is no file, or no library, is said as it is.

    Example:
        >>> with reading("notes.json", "Remove it."):
        ...     json.loads("{")
        Traceback (most recent call last):
        ValueError: notes.json is damaged or was edited (JSONDecodeError: Expecting property name ...). Remove it.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # parsers raise what they like: safetensors and tokenizers bare exceptions
        kind, message = type(error).__name__, " ".join(str(error).split())
        raise ValueError(f"{what} is damaged or was edited ({kind}: {message}). {remedy}") from error


def read_facts(path: Path, remedy: str, **types: type) -> dict[str, Any]:
    """The JSON object in a file, with at least the named entries, each of its type.

    Raises:
        ValueError: If it is something else, see `reading`.
    """
    with reading(path, remedy):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError(f"a {type(facts).__name__} instead of an object")
        for name, kind in types.items():
            if not isinstance(facts.get(name), kind) or isinstance(facts[name], bool):
                raise ValueError(f"{name!r} must be of type {kind.__name__}, not {facts.get(name)!r}")
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
