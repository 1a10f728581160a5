"""Judged samples of checkpoints on the same prompts, kept in a folder: each is sampled once, one model at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process
from hf_coverage.commands.inputs import check_number_of_responses, decided_by_main_process
from hf_coverage.commands.made_of import checkpoint_facts, folder_names, made_otherwise, write_made_of
from hf_coverage.commands.score import load
from hf_coverage.inference.adapters import KeptBase
from hf_coverage.inference.files import read_facts
from hf_coverage.inference.loading import ModelOptions, require_gathered

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_coverage.decode.best_of_n_result import BestOfNResult

__all__ = ["CheckpointSamples", "JudgingOptions", "holds_samples", "known_samples"]

_KEPT = "checkpoint.json"
"""Beside a checkpoint's samples: what they were made of."""

_PANEL = "Judging samples"


@dataclass(frozen=True)
class JudgingOptions:
    """How responses are sampled and judged.

    Attributes:
        verifier: What judges them; None: nothing does.
        k: Responses to each prompt.
        max_new_tokens: Most tokens of a response.
        temperature: What logits are divided by.
        top_k: Keep the likeliest tokens.
        top_p: Keep the likeliest tokens up to this mass.
        batch_size: Responses sampled at once.
        threshold: Least reward that solves a prompt.
        timeout: Seconds for one response.
    """

    verifier: Annotated[
        str | None,
        typer.Option(
            help="Sample each checkpoint and judge its responses: `exact-match`, `math-verify`, `reasoning-gym:TASK`, "
            "`reward-model:MODEL`, or your own callable, as `module:function` or `file.py:function`. Its process is "
            "no sandbox.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Responses for each prompt.", rich_help_panel=_PANEL)] = 16
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.", rich_help_panel=_PANEL)] = (
        256
    )
    temperature: Annotated[float, typer.Option(help="Temperature; 1 is the model itself.", rich_help_panel=_PANEL)] = (
        1.0
    )
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep the likeliest tokens, renormalised.", rich_help_panel=_PANEL)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the likeliest tokens up to this mass, renormalised.", rich_help_panel=_PANEL),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at once.", rich_help_panel=_PANEL)] = 16
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Least reward that solves a prompt; by default 1, and none for a reward model.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    timeout: Annotated[
        float,
        typer.Option(help="Seconds for one response, after which its verifier is killed.", rich_help_panel=_PANEL),
    ] = 10

    def check(self) -> None:
        """Refuse what cannot be meant before anything is read; ValueError."""
        changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        if self.verifier is None:
            if changed:
                raise ValueError(f"{_flag(changed[0])} is of samples that are judged: give a `--verifier` too.")
            return
        from hf_coverage.decode.verifier_runner import check_timeout
        from hf_coverage.inference.sampler import Sampling

        check_timeout(self.timeout)
        Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)

    @property
    def solving(self) -> float | None:
        """The least reward that solves a prompt; None where no reward says that."""
        none = self.verifier is None or self.verifier.startswith("reward-model:")
        return 1.0 if self.threshold is None and not none else self.threshold

    def sampling(self) -> dict[str, Any]:
        """What `evaluate_best_of_n` takes of how responses are drawn."""
        names = ("k", "max_new_tokens", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names}


def holds_samples(folder: str) -> bool:
    """Whether `evaluate_best_of_n` or `hf-coverage best-of-n` kept samples in a folder."""
    return (Path(folder) / "samples-00000.jsonl").is_file()


class CheckpointSamples:
    """The judged samples of some checkpoints; every process of a job makes one, and calls the same methods.

    Args:
        sources: Checkpoint folders, Hub ids or folders of samples.
        names: What to call them.
        samples: Where their samples go.
        rows: The prompts, and what the verifier reads.
        answers: Its column of right answers.
        options: How they are sampled and judged.
        loading: How models are loaded.
        shard_rows: Responses between two writes.
        drawing: What else decides the samples, see `evaluate_best_of_n`.

    Raises:
        ValueError: If the verifier is not known, or the tokens to sample are absurdly many.
    """

    def __init__(
        self,
        sources: Sequence[str],
        names: Sequence[str],
        samples: Path,
        rows: "Dataset",
        answers: str,
        options: JudgingOptions,
        loading: ModelOptions,
        *,
        shard_rows: int,
        **drawing: Any,
    ) -> None:
        from hf_coverage.decode.verifiers import named_verifier

        self._sources, self._names, self._rows, self._loading = sources, names, rows, loading
        self._drawing, self._shard_rows = options.sampling() | drawing, shard_rows
        self._verifier = named_verifier(str(options.verifier), column=answers, device=loading.device)
        self._judging = {"threshold": options.solving, "timeout": options.timeout, "batch_size": options.batch_size}
        self._done = [holds_samples(source) for source in sources]
        self.folders = [
            Path(source) if done else samples / folder
            for source, done, folder in zip(sources, self._done, folder_names(sources))
        ]
        self._loaded: tuple[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None
        self._kept = KeptBase()
        for source, done in zip(sources, self._done):  # all of them, before the first is sampled
            if not done:
                require_gathered(source)
        check_number_of_responses(len(rows) * self._done.count(False), options.k, options.max_new_tokens)

    def judge_all(self) -> "dict[str, BestOfNResult]":
        """Sample those checkpoints whose samples are not there, and judge the samples of each."""
        results = {name: self._judge(place) for place, name in enumerate(self._names)}
        self._loaded = None
        self._kept.drop()
        return results

    def load(self, place: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """One of the checkpoints and its tokenizer, which stay in memory until another one is asked for."""
        source = self._sources[place]
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None  # before another one takes its place
            self._loaded = source, load(source, self._loading, self._kept)
        return self._loaded[1]

    def _judge(self, place: int) -> "BestOfNResult":
        from hf_coverage.decode.best_of_n import evaluate_best_of_n, judge_best_of_n

        source, folder = self._sources[place], self.folders[place]
        judging: dict[str, Any] = self._judging | {"progress": is_main_process()}
        if self._done[place]:
            return judge_best_of_n(folder, self._rows, self._verifier, **judging)
        made_of = {"loading": self._loading.key(), "sampling": self._drawing}
        facts = partial(checkpoint_facts, source, self._loading)
        made_of |= decided_by_main_process(facts, self._loading.device)
        if decided_by_main_process(partial(_is_kept, folder, made_of), self._loading.device):
            return judge_best_of_n(folder, self._rows, self._verifier, **judging)
        model, tokenizer = self.load(place)
        result = evaluate_best_of_n(
            model,
            tokenizer,
            self._rows,
            self._verifier,
            output_dir=folder,
            shard_rows=self._shard_rows,
            name=self._names[place],
            **judging,
            **self._drawing,
        )
        if is_main_process():
            write_made_of(folder / _KEPT, made_of)
        return result


def known_samples(samples: Path, run: Path, sampling: dict[str, Any]) -> dict[str, Path]:
    """Where finished samples of a run's checkpoints are, by the checkpoint's name; it may itself be gone.

    Raises:
        ValueError: If they were drawn otherwise.
    """
    found = {}
    for record in sorted(samples.glob(f"*/{_KEPT}")):
        facts = read_facts(
            record, "Remove the folder that it is in, and run the same command again.", model=str, sampling=dict
        )
        if Path(facts["model"]).parent != run.absolute():
            continue
        changed = sorted(name for name in sampling if sampling[name] != facts["sampling"].get(name))
        if changed:
            raise ValueError(
                f"{record.parent} holds samples that were drawn otherwise ({', '.join(changed)} changed): choose "
                "another `--output-dir`, or remove it."
            )
        found[Path(facts["model"]).name] = record.parent
    return found


def _is_kept(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether a folder holds all samples of this very checkpoint."""
    return bool(made_of["files"] or "commit" in made_of) and made_otherwise(folder / _KEPT, made_of) == []


def _flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"
