"""The scores that a training run keeps of its evaluated steps: one score table a step, `step-<k>`, in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from hf_coverage import __version__
from hf_coverage.functional.checks import FloatArray
from hf_coverage.measure.engine import ScoringOptions
from hf_coverage.measure.reference import Reference, write_reference
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores
from hf_coverage.select.checkpoints import distinct_names
from hf_coverage.select.result import TournamentResult
from hf_coverage.select.tournament import tournament

__all__ = ["RunRows", "read_challengers"]

_LAST_WRITTEN = "reference.json"


class RunRows:
    """Log p(y_i|x_i) of the steps that a run evaluated, in memory and on disk; for the main process.

    A row is there whole or not at all: what a killed run left unfinished is not read, and written anew.

    Args:
        folder: where the rows are, or will be.
        corpus: the fingerprint of the encoded corpus that they are of.
        reference: what is known of its rows.
        others: score tables of other runs, or folders of them, that challenge.

    Attributes:
        by_step: `(R,)` log p of each step, nats.

    Raises:
        ValueError: if there are scores of another corpus.
    """

    def __init__(
        self, folder: Path, corpus: str, reference: Reference, others: Sequence[str | os.PathLike[str]] = ()
    ) -> None:
        self.folder = folder
        self.corpus = corpus
        self.reference = reference
        remedy = f"give the TournamentCallback another `name`, or remove {folder} if its scores are no longer needed"
        self.by_step = {_step_of(path): _row(path, corpus, remedy) for path in _steps_in(folder)}
        self.challengers = read_challengers(others, corpus)

    def keep(self, steps: Collection[int]) -> None:
        """Remove all rows but those of some steps, and leave what `hf-coverage` wants to know of the corpus."""
        for path in self.folder.glob("step-*"):
            if _step_of(path) not in steps:
                shutil.rmtree(path)
        self.by_step = {step: row for step, row in self.by_step.items() if step in steps}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_reference(self.folder, self.reference, {"name": self.folder.name})

    def add(self, step: int, scores: Scores, checkpoint: Path, options: ScoringOptions) -> None:
        """Keep the row of a step, in the place of one that is there.

        Args:
            step: the training step.
            scores: of the corpus under the model of this step.
            checkpoint: where the model of this step is saved, if it is saved.
            options: how it was scored.
        """
        path = self.folder / f"step-{step}"
        if path.exists():
            shutil.rmtree(path)
        metadata = {
            "rows": len(scores),
            "shard_rows": len(scores),
            "options": asdict(options),
            "model": {"name": str(checkpoint), "step": step, "weights": None},  # the model may never be on disk
            "corpus": self.corpus,
            "versions": {"hf_coverage": __version__},
        }
        ScoreTable.begin(path, metadata).write(0, scores)
        # relative, for a run may be moved
        where = {"model": str(checkpoint), "checkpoint": os.path.relpath(checkpoint, path)}
        write_reference(path, self.reference, {"name": path.name} | where)
        self.by_step[step] = scores.logprob

    def hold(
        self, n: float, sweep: Sequence[float], newcomer: FloatArray | None = None, *, bootstrap: int = 0
    ) -> TournamentResult:
        """The tournament over all rows, `step-<k>`, the challengers, and a newcomer named `model`."""
        own = {f"step-{step}": row for step, row in sorted(self.by_step.items())}
        more = {} if newcomer is None else {"model": newcomer}
        return tournament(
            own | self.challengers | more, n, sweep=sweep, groups=self.reference.groups, bootstrap=bootstrap
        )


def read_challengers(sources: Sequence[str | os.PathLike[str]], corpus: str) -> dict[str, FloatArray]:
    """Log p(y_i|x_i) of candidates of other runs.

    Args:
        sources: folders, each a score table or full of `step-<k>` tables.
        corpus: the fingerprint of the encoded corpus that they must be of.

    Returns:
        By name, parts of the path, `(R,)` log p, nats.

    Raises:
        ValueError: if a folder is of another corpus, or there are no scores in it.
    """
    tables: list[Path] = []
    for source in map(Path, sources):
        found = [source] if (source / "metadata.json").is_file() else list(_steps_in(source))
        if not found:
            raise ValueError(
                f"`others` must be score folders, or the `tournament` folders of other runs, but {source} holds no "
                "scores: there is neither a metadata.json nor a `step-<k>` folder in it."
            )
        tables += found
    # by three parts at least, which no step of the run itself has
    remedy = "score that model on this run's corpus, or leave it out of `others`"
    return {name: _row(path, corpus, remedy) for name, path in zip(distinct_names(tables, parts=3), tables)}


def _row(path: Path, corpus: str, remedy: str) -> FloatArray:
    table = ScoreTable.open(path)
    if table.metadata["corpus"] != corpus:
        raise ValueError(
            f"{path} holds scores of another corpus, or of the same one under another tokenizer (fingerprint "
            f"{table.metadata['corpus']}, this run's is {corpus}), and a tournament compares scores of the same rows: "
            f"{remedy}."
        )
    return table.logprob


def _steps_in(folder: Path) -> Iterable[Path]:
    """The finished rows of a folder, by step."""
    return sorted((path for path in folder.glob("step-*") if (path / _LAST_WRITTEN).is_file()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
