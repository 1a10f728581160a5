"""Rows as a model reads them: the token ids of prompts, and of the responses to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

__all__ = ["EncodedCorpus"]


@dataclass(frozen=True)
class EncodedCorpus:
    """The token ids of a reference corpus: what a model is given, and what it is judged on.

    Args:
        prompts: One list of token ids per row, never empty.
        completions: One list of token ids per row, never empty; only these count towards log p(y|x).

    Raises:
        ValueError: If the two lists differ in length, or a row of either is empty.

    Example:
        >>> encoded = EncodedCorpus(prompts=[[0, 5], [0]], completions=[[6, 1], [7, 8, 1]])
        >>> len(encoded), encoded.num_completion_tokens
        (2, 5)
        >>> encoded.fingerprint[:8]
        '963765ad'
    """

    prompts: list[list[int]]
    completions: list[list[int]]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(
                f"`prompts` and `completions` must have one entry per row each, got {len(self.prompts)} and "
                f"{len(self.completions)}."
            )
        for name, rows in (("prompts", self.prompts), ("completions", self.completions)):
            empty = next((index for index, ids in enumerate(rows) if not len(ids)), None)
            if empty is not None:
                raise ValueError(f"Row {empty} of `{name}` has no tokens, expected at least one.")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_completion_tokens(self) -> int:
        """Number of tokens that count towards a log-probability, over all rows."""
        return sum(map(len, self.completions))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids in their rows, in hexadecimal: equal if and only if the tokens are."""
        digest = hashlib.sha256()
        for rows in (self.prompts, self.completions):
            lengths = np.fromiter(map(len, rows), dtype="<i8", count=len(rows))
            digest.update(lengths.tobytes())
            digest.update(np.fromiter(chain.from_iterable(rows), dtype="<i8", count=lengths.sum()).tobytes())
        return digest.hexdigest()
