"""Verdicts of a verifier on shards of samples, kept in a folder where one is given."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from hf_coverage.decode.prompt_table import PromptTable, digest
from hf_coverage.decode.shards import JsonShards
from hf_coverage.decode.verifier_calls import Verdict
from hf_coverage.decode.verifier_runner import JudgeRows, needed_arguments, open_judge, runs_in_worker
from hf_coverage.decode.verifiers import ExactMatch, Verifier
from hf_coverage.inference.processes import on_main_process, split_over_processes

__all__ = ["Judging", "Rows", "verifier_name"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Judging:
    """A verifier, what it is given, and how it is run; make one with `prepare`.

    Attributes:
        verifier: the verifier.
        names: names of the arguments that it gets.
        timeout: seconds for one response; None: no limit.
        batch_size: responses of one call, where it runs in this process.
        fingerprint: changes with the verifier, its settings and what it reads of the corpus.
    """

    verifier: Callable[..., Any]
    names: list[str]
    timeout: float | None
    batch_size: int
    fingerprint: str

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
            _require_json(columns)
        made_of = [verifier_name(chosen), _source(chosen), _settings(chosen), timeout, columns]
        return cls(chosen, names, timeout, batch_size, digest(made_of))

    def verdicts(
        self, samples: Iterable[Rows], table: PromptTable, output_dir: str | PathLike[str] | None
    ) -> Iterator[tuple[Rows, list[Verdict]]]:
        """Judge shard after shard of samples as they come; verdicts that `output_dir` keeps are read."""
        shards = None
        if output_dir is not None:
            folder = (
                Path(output_dir) / "judgements" / f"{re.sub(r'[^0-9A-Za-z_.-]', '_', self.name)}-{self.fingerprint}"
            )
            facts = {"verifier": self.fingerprint, "about": {"name": self.name, "timeout": self.timeout}}
            shards = on_main_process(partial(JsonShards, folder, "verdicts", facts))
        with ExitStack() as stack:
            judge_rows: JudgeRows | None = None
            for index, shard in enumerate(samples):
                kept = None if shards is None else on_main_process(partial(shards.read, index))
                if kept is not None:
                    yield shard, [Verdict(row["reward"], row["error"], row["message"]) for row in kept]
                    continue
                if judge_rows is None:
                    judge_rows = stack.enter_context(
                        open_judge(self.verifier, timeout=self.timeout, batch_size=self.batch_size)
                    )
                verdicts = self._judge_shard(judge_rows, shard, table)
                if shards is not None:
                    places = [{"prompt": sample["prompt"], "sample": sample["sample"]} for sample in shard]
                    rows = [place | verdict._asdict() for place, verdict in zip(places, verdicts)]
                    on_main_process(partial(shards.write, index, rows))
                yield shard, verdicts

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


def _require_json(columns: dict[str, list[Any]]) -> None:
    for name, values in columns.items():
        try:
            json.dumps(values)
        except TypeError as error:
            raise TypeError(
                f"Column `{name}` of the corpus cannot be sent to the verifier's process ({error}): make it text, "
                "drop it, or give `timeout=None`."
            ) from error


def _source(verifier: Callable[..., Any]) -> str:
    """The source code that a verifier is made of, which tells when it was changed; none where there is none."""
    try:
        return inspect.getsource(verifier if inspect.isroutine(verifier) else type(verifier))
    except (OSError, TypeError):
        return ""


def _settings(verifier: Callable[..., Any]) -> Any:
    """What an instance was made with, without the addresses of what it holds."""
    if inspect.isroutine(verifier):
        return None
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    return {name: value for name, value in vars(verifier).items() if isinstance(value, plain)}
