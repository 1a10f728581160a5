"""What was computed once is kept in the run's folder and read again, so that a stopped run goes on where it was."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from hf_coverage.inference.files import write_atomically, written_whole

__all__ = ["remember", "remember_corpus"]


def remember(folder: Path, key: Sequence[str | float], experiment: Callable[[], Any]) -> Any:
    """The result of an experiment as JSON gives it back, computed only where the folder does not hold it.

    Args:
        folder: Where it is kept, in a folder that `refuse_other_settings` keeps to one run.
        key: All that decides the result besides those settings; the file is named by it.
        experiment: What computes it.

    Raises:
        ValueError: if no settings belong to the folder.
    """
    _require_settings(folder)
    file = folder / f"{'-'.join(map(_named, key))}.json"
    if not file.exists():
        text = json.dumps(experiment())
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return json.loads(file.read_text(encoding="utf-8"))


def remember_corpus(folder: Path, sample: Callable[[], Dataset]) -> Dataset:
    """A corpus in a folder of its own, sampled only where the folder is not there, and there whole or not at all.

    Args:
        folder: Its folder, named by all that decides it besides the settings of the run.
        sample: What makes it.

    Raises:
        ValueError: if no settings belong to the folder.
    """
    _require_settings(folder.parent)
    if not folder.exists():
        corpus = sample()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(folder) as part:
            corpus.save_to_disk(part)
    return load_from_disk(folder)


def _require_settings(folder: Path) -> None:
    if not any((place / "settings.json").exists() for place in (folder, *folder.absolute().parents)):
        raise ValueError(f"{folder} belongs to no run: call `refuse_other_settings` on the run's folder first.")


def _named(part: str | float) -> str:
    """A part of a key in a file's name: another one for every number, short where it can be."""
    if isinstance(part, str):
        return part.replace(", ", "-").replace(" ", "-")
    short = f"{part:g}"
    return short if float(short) == part else repr(part)
