"""What finished work was made of, written beside it: the same is used again, and nothing else in its place."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hf_coverage.inference.files import read_facts, write_atomically
from hf_coverage.inference.loading import ModelOptions, commit_of, is_served, resolve_base

SINCE = ("adapter", "base", "commit", "own_tokenizer")
"""What `checkpoint_facts` says since it was asked for more than files."""

__all__ = ["SINCE", "checkpoint_facts", "folder_names", "made_otherwise", "write_made_of"]


def write_made_of(record: Path, made_of: dict[str, Any]) -> None:
    """Write down what finished work was made of."""
    write_atomically(record, (json.dumps(made_of, indent=2) + "\n").encode())


def made_otherwise(record: Path, made_of: dict[str, Any], *, since: Collection[str] = ()) -> list[str] | None:
    """What finished work was made of otherwise than `made_of`, by name; None where nothing is finished.

    Args:
        record: What `write_made_of` wrote.
        made_of: What it would write now.
        since: Names that older records lack, which are then taken for the same.
    """
    if not record.is_file():
        return None
    before = read_facts(record, "Remove the folder that it is in, and run the same command again.")
    made_of = {name: value for name, value in made_of.items() if name in before or name not in since}
    return sorted(name for name in before | made_of if before.get(name) != made_of.get(name))


def checkpoint_facts(source: str, loading: ModelOptions) -> dict[str, Any]:
    """Where a checkpoint is, and what tells whether it was touched since: its files, or on the Hub the commit.

    The same of the base of an adapter, and of what is put on it. Of a server's model nothing tells.
    """
    if is_served(loading):
        return {"model": source, "files": []}
    facts = _place_facts(source, loading)
    base = resolve_base(source, loading)
    facts |= {} if base is None else {"base": _place_facts(*base)}
    others = {"adapter": loading.adapter, "own_tokenizer": loading.tokenizer}
    return facts | {name: _place_facts(other, ModelOptions()) for name, other in others.items() if other is not None}


def _place_facts(source: str, loading: ModelOptions) -> dict[str, Any]:
    from hf_coverage.select.checkpoints import checkpoint_signature

    facts = {
        "model": str(Path(source).absolute()),
        "files": checkpoint_signature(Path(source) / (loading.subfolder or "")),
    }
    commit = commit_of(source, loading)
    return facts if commit is None else facts | {"commit": commit}


def folder_names(sources: Sequence[str]) -> list[str]:
    """What to call the folders of what is made of checkpoints.

    By two parts of the path at least: the checkpoints of another run can join later under the same names.
    """
    from hf_coverage.select.checkpoints import distinct_names

    return [name.replace("/", "__") for name in distinct_names(sources, parts=2)]
