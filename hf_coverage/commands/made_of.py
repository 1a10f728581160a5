"""What finished work was made of, written beside it: the same is used again, and nothing else in its place."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_coverage.inference.files import read_facts, write_atomically

__all__ = ["checkpoint_facts", "folder_names", "made_otherwise", "write_made_of"]


def write_made_of(record: Path, made_of: dict[str, Any]) -> None:
    """Write down what finished work was made of."""
    write_atomically(record, (json.dumps(made_of, indent=2) + "\n").encode())


def made_otherwise(record: Path, made_of: dict[str, Any]) -> list[str] | None:
    """What finished work was made of otherwise than `made_of`, by name; None where nothing is finished."""
    if not record.is_file():
        return None
    before = read_facts(record, "Remove the folder that it is in, and run the same command again.")
    return sorted(name for name in before | made_of if before.get(name) != made_of.get(name))


def checkpoint_facts(source: str, *, served: bool = False) -> dict[str, Any]:
    """Where a checkpoint is, and what tells whether it was touched since; nothing does for a Hub id, or a server's."""
    if served:
        return {"model": source, "files": []}
    from hf_coverage.select.checkpoints import checkpoint_signature

    return {"model": str(Path(source).absolute()), "files": checkpoint_signature(source)}


def folder_names(sources: Sequence[str]) -> list[str]:
    """What to call the folders of what is made of checkpoints.

    By two parts of the path at least: the checkpoints of another run can join later under the same names.
    """
    from hf_coverage.select.checkpoints import distinct_names

    return [name.replace("/", "__") for name in distinct_names(sources, parts=2)]
