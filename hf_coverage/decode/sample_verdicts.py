"""Verdicts of a verifier on shards of samples, kept in a folder where one is given."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.decode.verifier_calls import Verdict
from hf_coverage.decode.verifier_key import verifier_key
from hf_coverage.decode.verifier_runner import JudgeRows, needed_arguments, open_judge, runs_in_worker
from hf_coverage.decode.verifiers import ExactMatch, Verifier
from hf_coverage.inference.fingerprint import digest
from hf_coverage.inference.kept_samples import Rows
from hf_coverage.inference.processes import on_main_process, split_over_processes
from hf_coverage.inference.shards import JsonShards, read_metadata

__all__ = ["Judging", "verifier_name"]

_VERDICT = ("prompt", "sample", "reward", "error", "message")

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 100  # of a name, in the name of a folder


@dataclass(frozen=True)
class Judging:
    """A verifier, what it is given, and how it is run; make one with `prepare`.

    Attributes:
        verifier: The verifier.
        names: Names of the arguments that it gets.
        timeout: Seconds for one response; None: no limit.
        batch_size: Responses of one call, where it runs in this process.
        fingerprint: Changes with the verifier, its settings and what it reads of the corpus; None where not all that
            decides its verdicts can be told, which are then not kept.
        untold: Why not; empty where it can.
    """

    verifier: Callable[..., Any]
    names: list[str]
    timeout: float | None
    batch_size: int
    fingerprint: str | None
    untold: str = ""

    @property
    def name(self) -> str:
        """What the verifier is called."""
        return verifier_name(self.verifier)

    @classmethod
    def prepare(
        cls, verifier: Callable[..., Any] | None, table: PromptTable, timeout: float | None, batch_size: int
    ) -> Judging:
        """Check a verifier before anything is sampled for it."""
        chosen = verifier or ExactMatch("answer" if "answer" in table.columns else "completion")
        names = needed_arguments(chosen, table.available, table.varying)
        columns = {name: table.columns[name] for name in names if name in table.columns}
        if runs_in_worker(chosen, timeout):
            _require_sendable(columns)
        key, untold = None, ""
        try:
            key = verifier_key(chosen)
        except TypeError as error:
            untold = str(error)
        made_of = None if key is None else digest([verifier_name(chosen), *key, timeout, columns])
        judging = cls(chosen, names, timeout, batch_size, made_of, untold)
        on_main_process(partial(judging.require_right, table))
        return judging

    def require_right(self, table: PromptTable) -> None:
        """Refuse a corpus with answers that the verifier does not find right as responses.

        Raises:
            ValueError: If there is one.
        """
        verifier = self.verifier
        if not isinstance(verifier, Verifier):
            return
        columns = {name: values for name, values in table.columns.items() if name in verifier.columns}
        responses = verifier.right_responses(**columns)
        samples = [{"prompt": row, "text": text, "ids": []} for row, text in enumerate(responses)]
        rows = [table.arguments(sample, self.names) for sample in samples]
        if not rows:
            return
        with open_judge(verifier, timeout=self.timeout, batch_size=self.batch_size) as judge_rows:
            verdicts = judge_rows(rows)
        wrong = [row for row, verdict in enumerate(verdicts) if verdict.reward != 1]
        if wrong:
            row, verdict = wrong[0], verdicts[wrong[0]]
            why = f"gets {verdict.reward:g}" if verdict.reward is not None else f"{verdict.error} ({verdict.message})"
            raise ValueError(
                f"`corpus` has {len(wrong):,} answers that {self.name} does not find right themselves, so that no "
                f"response could be: rows {', '.join(str(table.rows[row]) for row in wrong[:10])}"
                f"{', ...' if len(wrong) > 10 else ''}. That of row {table.rows[row]}, {responses[row]!r}, {why}. "
                "Write these answers in another way, or drop the rows."
            )

    def verdicts(
        self, samples: Iterable[Rows], table: PromptTable, sampled: str, output_dir: str | PathLike[str] | None
    ) -> Iterator[tuple[Rows, list[Verdict]]]:
        """Judge shard after shard of samples as they come; verdicts that `output_dir` keeps are read.

        A shard of which nothing could be judged is judged again: what was missing then may be there now.

        Args:
            samples: The shards.
            table: The prompts.
            sampled: Changes with the samples.
            output_dir: Folder of samples and verdicts.
        """
        shards = None
        if output_dir is not None and self.untold and PartialState().is_main_process:
            logger.warning(
                f"Verdicts of the verifier {self.name} are not kept: whether it is the same the next time cannot be "
                f"known ({self.untold})."
            )
        if output_dir is not None and self.fingerprint is not None:
            shards = on_main_process(partial(self._shards, Path(output_dir), sampled))
        with ExitStack() as stack:
            judge_rows: JudgeRows | None = None
            for index, shard in enumerate(samples):
                kept = None if shards is None else on_main_process(partial(shards.read, index, _VERDICT))
                if shards is not None and kept is not None and any(row["reward"] is not None for row in kept):
                    if list(map(_place, kept)) != list(map(_place, shard)):
                        raise ValueError(f"{shards.folder} holds verdicts on other samples than there are; remove it.")
                    yield shard, [Verdict(row["reward"], row["error"], row["message"]) for row in kept]
                    continue
                if judge_rows is None:
                    judge_rows = stack.enter_context(
                        open_judge(self.verifier, timeout=self.timeout, batch_size=self.batch_size)
                    )
                verdicts = self._judge_shard(judge_rows, shard, table)
                if shards is not None:
                    rows = [_place(sample) | verdict._asdict() for sample, verdict in zip(shard, verdicts)]
                    on_main_process(partial(shards.write, index, rows))
                yield shard, verdicts

    def _shards(self, output_dir: Path, sampled: str) -> JsonShards:
        name = re.sub(r"[^0-9A-Za-z_.-]", "_", self.name)[:_MOST_CHARACTERS]
        folder = output_dir / "judgements" / f"{name}-{self.fingerprint}"
        facts: dict[str, Any] = {"verifier": self.fingerprint, "samples": sampled}
        if (folder / "metadata.json").is_file() and "samples" not in read_metadata(folder):
            del facts["samples"]  # written before they were named; they stand where they stood
        return JsonShards(folder, "verdicts", facts | {"about": {"name": self.name, "timeout": self.timeout}})

    def _judge_shard(self, judge_rows: JudgeRows, shard: Rows, table: PromptTable) -> list[Verdict]:
        """Verdicts of a shard on every process, each of which judges its part."""
        return split_over_processes(
            lambda samples: judge_rows([table.arguments(sample, self.names) for sample in samples]), shard
        )


def verifier_name(verifier: Callable[..., Any]) -> str:
    """What a verifier is called in tables and folders.

    Example:
        >>> verifier_name(ExactMatch("answer")), verifier_name(len)
        ('exact-match', 'len')
    """
    if isinstance(verifier, Verifier):
        return verifier.name
    name = getattr(verifier, "__name__", type(verifier).__name__)  # an instance has none
    return "verifier" if name == "<lambda>" else name


def _place(row: dict[str, Any]) -> dict[str, int]:
    return {"prompt": row["prompt"], "sample": row["sample"]}


def _require_sendable(columns: dict[str, list[Any]]) -> None:
    for name, values in columns.items():
        try:
            pickle.dumps(values)
        except Exception as error:  # whatever the methods of what a column holds raise
            raise TypeError(
                f"Column `{name}` of the corpus cannot be sent to the verifier's process ({error}): make it text, "
                "drop it, or give `timeout=None`."
            ) from error
