"""The scores of checkpoints on one corpus, kept in a folder: each row is scored once, one model at a time."""

from collections.abc import Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.commands.console import is_main_process
from hf_coverage.commands.inputs import decided_by_main_process, read_dataset
from hf_coverage.commands.made_of import checkpoint_facts, folder_names, made_otherwise, write_made_of
from hf_coverage.commands.options import CorpusOptions
from hf_coverage.commands.score import load, score_into
from hf_coverage.commands.score_folder import is_score_folder
from hf_coverage.inference.files import read_facts
from hf_coverage.inference.loading import ModelOptions, is_served

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.measure.reference import Reference

__all__ = ["CheckpointScores", "kept_scores"]

_KEPT = "checkpoint.json"
"""Beside a checkpoint's scores: what they were made of."""


class CheckpointScores:
    """The scores of some checkpoints; every process of a job makes one, and calls the same methods.

    Args:
        sources: Checkpoint folders, Hub ids or score folders.
        names: What to call them.
        scores: Where their scores go.
        data: The corpus; None where all are score folders.
        reading: How it is read.
        loading: How models are loaded.
        scoring: How they are scored, see `score_responses`.

    Raises:
        ValueError: If there is a checkpoint and no corpus.
    """

    def __init__(
        self,
        sources: Sequence[str],
        names: Sequence[str],
        scores: Path,
        data: str | None,
        reading: CorpusOptions,
        loading: ModelOptions,
        **scoring: Any,
    ) -> None:
        self._sources, self._names, self._data = sources, names, data
        self._reading, self._loading, self._scoring = reading, loading, scoring
        self._done = [is_score_folder(source) for source in sources]
        own = [scores / folder for folder in folder_names(sources)]
        self.folders = [Path(source) if done else folder for source, done, folder in zip(sources, self._done, own)]
        self._loaded: tuple[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None
        if data is None and not all(self._done):
            source = sources[self._done.index(False)]
            raise ValueError(f"{source} is no score folder: give the corpus to score it on, `--data`.")

    @cached_property
    def reference(self) -> "Reference":
        """What the corpus knows of its rows."""
        from hf_coverage.measure.reference import load_reference, read_reference

        if self._data is None:
            return load_reference(self.folders[0])[0]
        return read_reference(read_dataset(self._data, self._reading.split), self._reading.group_by)

    def score_all(self) -> list[Path]:
        """Score those checkpoints whose scores are not there, and give the score folder of each."""
        for place in range(len(self._sources)):
            self._score(place, None)
        self._loaded = None
        return self.folders

    def load(self, place: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """One of the checkpoints and its tokenizer, which stay in memory until another one is asked for."""
        source = self._sources[place]
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None  # before another one takes its place
            self._loaded = source, load(source, self._loading)
        return self._loaded[1]

    def logprobs(self, place: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log p(y|x) of some rows under one of the checkpoints, in nats; those are scored that were not."""
        from hf_coverage.inference.processes import on_main_process

        self._score(place, rows)
        return on_main_process(partial(_look_up, self.folders[place], rows))

    def _score(self, place: int, rows: NDArray[np.int64] | None) -> None:
        source, folder = self._sources[place], self.folders[place]
        if self._done[place]:
            return
        made_of = self._facts | checkpoint_facts(source, served=is_served(self._loading))
        if decided_by_main_process(partial(_is_kept, folder, made_of, rows), self._loading.device):
            return
        score_into(
            folder,
            source,
            str(self._data),
            name=self._names[place],
            reading=self._reading,
            loading=self._loading,
            loaded=self.load(place),
            rows=None if rows is None else rows.tolist(),
            **self._scoring,
        )
        if is_main_process():
            write_made_of(folder / _KEPT, made_of)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What decides all scores but for the checkpoint."""
        reference = self.reference
        corpus = blake2b(b"".join(part.tobytes() for part in (reference.rows, reference.groups)), digest_size=16)
        corpus.update(b"" if reference.logprob is None else reference.logprob.tobytes())
        options = {"split": self._reading.split, "tokenizer": self._loading.tokenizer}
        options |= self._reading.key() | self._scoring
        return {"corpus": corpus.hexdigest(), "loading": self._loading.key(), "options": options}


def kept_scores(scores: Path, run: Path) -> dict[str, Path]:
    """Where finished scores of a run's checkpoints are, by the checkpoint's name; it may itself be gone."""
    from hf_coverage.measure.score_table import ScoreTable

    found = {}
    for record in sorted(scores.glob(f"*/{_KEPT}")):
        model = Path(
            read_facts(record, "Remove the folder that it is in, and run the same command again.", model=str)["model"]
        )
        if model.parent == run.absolute() and ScoreTable.open_sample(record.parent).is_whole:
            found[model.name] = record.parent
    return found


def _is_kept(folder: Path, made_of: dict[str, Any], rows: NDArray[np.int64] | None) -> bool:
    """Whether a folder holds the scores of this very checkpoint on this very corpus: all, or those of some rows."""
    if not made_of["files"] or made_otherwise(folder / _KEPT, made_of) != []:
        return False
    from hf_coverage.measure.score_table import ScoreTable

    table = ScoreTable.open_sample(folder)
    return table.is_whole if rows is None else bool(table.look_up(rows)[0].all())


def _look_up(folder: Path, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    from hf_coverage.measure.score_table import ScoreTable

    return ScoreTable.open_sample(folder).read_some(rows).logprob
