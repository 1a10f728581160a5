"""The distinct prompts of a corpus, with what the corpus knows of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.statistics import group_codes
from hf_coverage.measure.corpus import encode_prompts
from hf_coverage.measure.corpus_columns import read_prompts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptTable"]


@dataclass(frozen=True)
class PromptTable:
    """Distinct prompts in the order of their first rows.

    Attributes:
        rows: `(P,)` the first row of each prompt in the corpus.
        codes: `(P,)` code of each prompt, as `CoverageProfile.groups` has it.
        prompts: The prompts as the corpus holds them.
        kind: "text", "chat messages" or "token ids".
        columns: Values of the other columns, one a prompt.
        varying: Columns left out, since they differ between rows of one prompt.
    """

    rows: NDArray[np.int64]
    codes: NDArray[np.uint64]
    prompts: list[Any]
    kind: str
    columns: dict[str, list[Any]]
    varying: tuple[str, ...]

    @classmethod
    def from_corpus(cls, corpus: Dataset) -> PromptTable:
        """Read a corpus.

        Raises:
            TypeError: If it is no `datasets.Dataset`, or a prompt has the wrong type.
            ValueError: If it has no rows or no column `prompt`, or mixes kinds of prompts.

        Example:
            >>> from datasets import Dataset
            >>> corpus = Dataset.from_dict({"prompt": ["a", "b", "a"], "answer": [1, 2, 1], "completion": [3, 4, 5]})
            >>> table = PromptTable.from_corpus(corpus)
            >>> table.rows.tolist(), table.columns, table.varying
            ([0, 1], {'answer': [1, 2]}, ('completion',))
        """
        kind, prompts = read_prompts(corpus)
        codes = group_codes(prompts)
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        first_of_row = first[inverse]
        rows = np.sort(first)
        columns, varying, plain = {}, [], corpus.with_format(None)
        for name in corpus.column_names:
            if name == "prompt":
                continue
            values = plain[name][:]
            if all(value == values[first] for value, first in zip(values, first_of_row.tolist())):
                columns[name] = [values[row] for row in rows.tolist()]
            else:
                varying.append(name)
        distinct = [prompts[row] for row in rows.tolist()]
        return cls(rows, codes[rows], distinct, "token ids" if kind == "empty" else kind, columns, tuple(varying))

    def __len__(self) -> int:
        return len(self.prompts)

    def encode(self, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
        """Token ids of the prompts."""
        reading = {"chat messages": "chat_template_kwargs", "token ids": "tokenizer_fingerprint"}.get(self.kind)
        if reading in self.varying:
            raise ValueError(
                f"`{reading}` differs between rows of one prompt, which are then not one prompt: keep one row of each."
            )
        own = {reading: self.columns[reading]} if reading in self.columns else {}
        return encode_prompts(self.prompts, tokenizer, **own)

    def completion(self, sample: dict[str, Any]) -> Any:
        """A sample as verifiers get it, of the kind that the prompts are."""
        if self.kind == "text":
            return sample["text"]
        return [{"role": "assistant", "content": sample["text"]}] if self.kind == "chat messages" else sample["ids"]

    def arguments(self, sample: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """What a verifier is given with a sample, by name."""
        prompt = sample["prompt"]
        everything = {name: values[prompt] for name, values in self.columns.items()} | {
            "prompts": self.prompts[prompt],
            "completions": self.completion(sample),
            "completion_ids": sample["ids"],
        }
        return {name: everything[name] for name in names}

    @property
    def available(self) -> list[str]:
        """Names of what a verifier may be given."""
        return ["prompts", "completions", "completion_ids", *self.columns]
