"""Text that every machine with the packages of this recipe has, of four kinds."""

import importlib.metadata
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_coverage.measure.builders import windows_corpus

__all__ = ["KINDS", "texts_of", "windows_of"]

KINDS = ("tables", "code", "documentation", "mixed lines")
"""Much repetition, some, some, and none: the last one shows lines of other texts beside each other."""

LINES = 120
"""Lines of a document of mixed ones."""


def texts_of(kind: str) -> list[str]:
    """Texts of one kind, in a fixed order.

    Args:
        kind: `tables`, the character tables of Python's codecs, whose lines all look alike; `code`, Python's standard
            library; `documentation`, Python's language reference and the descriptions of the installed packages;
            `mixed lines`, lines of the latter two in random order, so that nothing recurs.

    Raises:
        ValueError: if there is no such kind.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    match kind:
        case "tables":
            return _read(sorted((library / "encodings").glob("*.py")))
        case "code":
            return _read(sorted(library.glob("*.py")))
        case "documentation":
            return [*pydoc_data.topics.topics.values(), *_descriptions()]
        case "mixed lines":
            return _mixed([*texts_of("code"), *texts_of("documentation")])
    raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")


def windows_of(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int,
    response_tokens: int,
    documents: int,
    seed: int,
) -> Dataset:
    """One window of each of so many documents, both drawn at random, as a corpus of token ids.

    Args:
        kind: See `texts_of`.
        tokenizer: The tokenizer.
        prompt_tokens: Tokens of a prompt.
        response_tokens: Tokens of a response.
        documents: How many.
        seed: Of the draws.

    Raises:
        ValueError: if there are not so many documents of that length.
    """
    size = prompt_tokens + response_tokens
    windows = windows_corpus(
        texts_of(kind), tokenizer, prompt_tokens=prompt_tokens, response_tokens=response_tokens, stride=size
    )
    order = np.random.default_rng(seed).permutation(len(windows))
    labels = np.array(windows["document"][:])[order]
    _, first = np.unique(labels, return_index=True)  # one window a document, at random
    if len(first) < documents:
        raise ValueError(
            f"`documents` must be at most {len(first)}, so many {kind} have {size} tokens here, got {documents}."
        )
    return windows.select(order[np.sort(first)[:documents]])


def _read(files: Iterable[Path]) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in files]


def _descriptions() -> list[str]:
    """What the installed packages say of themselves, but for this one."""
    found = {
        package.metadata["Name"].lower().replace("_", "-"): package.metadata.get_payload() or ""
        for package in importlib.metadata.distributions()
    }
    found.pop("hf-coverage", None)
    return [text for _, text in sorted(found.items())]


def _mixed(texts: Iterable[str]) -> list[str]:
    lines = [line for text in texts for line in text.splitlines() if len(line.strip()) > 20]
    order = np.random.default_rng(0).permutation(len(lines))
    return ["\n".join(lines[index] for index in part) for part in np.array_split(order, len(lines) // LINES)]
