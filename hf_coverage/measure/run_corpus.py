"""A reference corpus as one training run uses it: tokens, log D(y|x), groups, and the file that keeps them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.statistics import group_codes
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.files import written_whole
from hf_coverage.measure.corpus import encode_corpus

__all__ = ["RunCorpus"]


@dataclass(frozen=True)
class RunCorpus:
    """A corpus that needs no tokenizer any more.

    Args:
        encoded: The token ids of prompts and completions.
        reference_logprobs: `(R,)` log D(y|x), nats; None for samples alone.
        groups: `(R,)` code of what rows share.
    """

    encoded: EncodedCorpus
    reference_logprobs: FloatArray | None
    groups: NDArray[np.uint64]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal: equal if and only if tokens, log D(y|x) and groups are."""
        digest = hashlib.sha256(self.encoded.fingerprint.encode())
        digest.update(b"" if self.reference_logprobs is None else self.reference_logprobs.tobytes())
        digest.update(self.groups.tobytes())
        return digest.hexdigest()

    @classmethod
    def from_dataset(
        cls, corpus: Dataset, tokenizer: PreTrainedTokenizerBase | None, *, append_eos: bool, groups: str
    ) -> "RunCorpus":
        """Tokenise a dataset; see `encode_corpus` for what may be wrong with it."""
        encoded = encode_corpus(corpus, tokenizer, append_eos=append_eos)
        columns = corpus.with_format(None)
        known = "reference_logprob" in corpus.column_names
        reference = np.asarray(columns["reference_logprob"][:], dtype=np.float64) if known else None
        return cls(encoded, reference, group_codes(columns[groups][:]))

    def save(self, path: Path) -> None:
        """Write one parquet file, whole or not at all."""
        columns = {
            "prompt": pa.array(self.encoded.prompts, pa.list_(pa.int64())),
            "completion": pa.array(self.encoded.completions, pa.list_(pa.int64())),
            "group": pa.array(self.groups, pa.uint64()),
        }
        if self.reference_logprobs is not None:
            columns["reference_logprob"] = pa.array(self.reference_logprobs, pa.float64())
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            pq.write_table(pa.table(columns), part)

    @classmethod
    def load(cls, path: Path) -> "RunCorpus":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If the run kept no corpus there.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"`corpus` is None, and no earlier part of this run kept one in {path}. Pass the corpus; when "
                "resuming, `restore_callback_states_from_checkpoint=False` lets the callback that you pass go on."
            )
        table = pq.read_table(path).to_pydict()
        reference = table.get("reference_logprob")
        return cls(
            EncodedCorpus(table["prompt"], table["completion"]),
            None if reference is None else np.asarray(reference, dtype=np.float64),
            np.asarray(table["group"], dtype=np.uint64),
        )
