"""Suites: the revisions of a repository that hold the checkpoints of one run, by a pattern."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from hf_coverage.commands.inputs import decided_by_main_process
from hf_coverage.inference.loading import require_there, some, split_revision

__all__ = ["candidate_sources", "list_revisions"]


def candidate_sources(candidates: Sequence[str], revisions: str | None, device: str | None) -> list[str]:
    """The candidates of a command line; where a pattern is given, those revisions of each that match it.

    Raises:
        ValueError: If a candidate is a folder, or has a revision already, and there is a pattern.
    """
    sources = [candidate.rstrip("/") for candidate in candidates]
    if revisions is None:
        return sources
    for source in sources:
        if Path(source).exists() or split_revision(source)[1] is not None:
            raise ValueError(f"`revisions` are those of a repository on the Hub, but {source} is one checkpoint.")
        require_there(source)
    return decided_by_main_process(
        lambda: [f"{source}@{name}" for source in sources for name in list_revisions(source, revisions)], device
    )


def list_revisions(repository: str, pattern: str) -> list[str]:
    """Branches and tags of a model on the Hub that match a pattern, by their numbers; of the local cache when offline.

    Args:
        repository: Its id.
        pattern: With `*`, `?` and `[...]`, such as `step*`.

    Raises:
        ValueError: If there are none.
    """
    names = _known(repository)
    found = sorted({name for name in names if fnmatchcase(name, pattern)}, key=_by_numbers)
    if not found:
        known = f"has {some(sorted(names, key=_by_numbers))}" if names else "is not in the local cache"
        raise ValueError(f"`revisions` {pattern!r} matches none of {repository}, which {known}.")
    return found


def _known(repository: str) -> list[str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if not constants.HF_HUB_OFFLINE:
        refs = HfApi().list_repo_refs(repository)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    refs_folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "refs"
    return [path.relative_to(refs_folder).as_posix() for path in refs_folder.rglob("*") if path.is_file()]


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
