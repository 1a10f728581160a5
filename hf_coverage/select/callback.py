"""The tournament during training: which checkpoint covers best so far, kept from rotation and loaded at the end."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from os import PathLike, fspath
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from hf_coverage import __version__
from hf_coverage.functional.checks import FloatArray, check_n, metric_key
from hf_coverage.inference.call_stack import callers
from hf_coverage.inference.evaluation_callback import CoverageWarning
from hf_coverage.inference.processes import on_main_process, writing_to
from hf_coverage.measure.corpus_callback import CorpusCallback
from hf_coverage.measure.engine import ScoringOptions
from hf_coverage.measure.reference import Reference, load_reference, read_reference, write_reference
from hf_coverage.measure.run_corpus import RunCorpus
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores
from hf_coverage.select.checkpoints import (
    check_arguments,
    checkpoint_folder,
    delete_old_checkpoints,
    distinct_names,
    load_weights,
    write_best_checkpoint,
)
from hf_coverage.select.result import Edge, TournamentResult
from hf_coverage.select.tournament import tournament

__all__ = ["TournamentCallback"]

_WINNER = "tournament_winner_step"
_LAST_WRITTEN = "reference.json"


class TournamentCallback(CorpusCallback):
    """Hold a tournament over the checkpoints of a training while it runs, and keep the winner.

    Each evaluation scores the corpus, keeps the row of `log p(y_i|x_i)` in `<output_dir>/tournament/step-<k>` (a score
    table, which `hf-coverage tournament` reads), and gains

    - `eval_tournament_<n>`, the score of the model as it is now: the largest share of responses that another step, or
      one of `others`, makes at least N times as likely. Lower is better: it says how much the model has given up of
      what it, or another run, once covered. The first of a run is 0, there being nobody to challenge it.
    - `eval_tournament_winner_step`, the evaluated step of this run that stands best now.

    Scores of earlier steps can only rise as challengers arrive, so those in the log are not comparable with each
    other: `result` has all of them as they stand now. As `metric_for_best_model="tournament_<n>"` (with
    `greater_is_better=False`) it is right nevertheless: before the Trainer compares, the callback gives it the best
    saved step as it stands now, step, score and folder (and no score to beat where the new step wins a tie).
    Best-model loading, `save_strategy="best"` and early stopping follow the tournament then.

    Only saved steps can be loaded. A step that was evaluated and not saved, or whose checkpoint is gone, still
    challenges, but the best of those that are there is kept: its folder is in `best_checkpoint.json` beside the rows,
    and it is safe from `save_total_limit`:

    - without `metric_for_best_model`, or with the tournament's, as the Trainer's `best_model_checkpoint`;
    - with another `metric_for_best_model` the Trainer protects that one's best only. Leave `save_total_limit` out of
      TrainingArguments and give it to the callback, which then deletes old checkpoints but neither of both.

    Training is not changed, and a run that is killed and resumed ends with the same rows, log and winner. Resumed from
    an older checkpoint it drops the rows of later steps; a training that begins anew drops all. After a training,
    `trainer.evaluate()` scores against all rows and keeps none. While it trains, no other process may train into the
    same folder.

    Args:
        corpus: Held-out prompts and responses, no density needed: a reference corpus (see `validate_corpus`), or the
            folder of one; None: the one that an earlier part of this run kept.
        n: N of the challenges, one or several; the first decides who wins, unless `metric_for_best_model` names
            another one.
        edge: `"hard"`, the paper's challenges, or `"soft"`, which never tie; see `tournament`.
        others: Score tables of other runs on the same corpus, or folders of them such as `RUN/tournament`: they
            challenge, but cannot win.
        load_winner_at_end: Load the winner's weights at the end of the training, as `load_best_model_at_end` does.
        save_total_limit: How many checkpoints to keep, instead of the one of TrainingArguments; the latest, the winner
            and the best by another metric are kept in any case.
        tokenizer: Tokenises a corpus of text or chat; None: the Trainer's `processing_class`.
        append_eos: End every text completion with the EOS token.
        groups: Column that says which rows are not independent of each other, for the win rates.
        every_n_evals: Enter the first evaluation of the training and every n-th after it.
        every_n_steps: Enter the training steps that n divides instead.
        name: Report as `eval_<name>_tournament_<n>`, and keep rows in `<output_dir>/tournament-<name>`.
        batch_tokens: Token positions that one forward pass of the scoring computes.
        logits_memory: Bytes that its logits may take.

    Attributes:
        result: The latest `TournamentResult`, candidates named `step-<k>`; None before the first evaluation. After a
            training it has win rates.

    Raises:
        TypeError: If the corpus is not a `datasets.Dataset`, or a value in it has the wrong type.
        ValueError: If the corpus is not valid, an argument is out of range or does not go with TrainingArguments, or
            rows of another corpus are there.

    Example:
        >>> sums = {"prompt": ["1+1=", "1+2="], "completion": ["2", "3"]}
        >>> TournamentCallback(Dataset.from_dict(sums), n=(16, 4)).metric_names()
        ['tournament_16', 'tournament_4']

    References:
        arXiv 2510.15020, Section 6.3, Eq. (28) and (29).
    """

    def __init__(
        self,
        corpus: Dataset | str | PathLike[str] | None,
        n: float | Iterable[float] = 16,
        *,
        edge: Edge = "hard",
        others: Sequence[str | PathLike[str]] = (),
        load_winner_at_end: bool = False,
        save_total_limit: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        append_eos: bool = False,
        groups: str = "prompt",
        every_n_evals: int = 1,
        every_n_steps: int | None = None,
        name: str | None = None,
        batch_tokens: int = ScoringOptions.batch_tokens,
        logits_memory: int = ScoringOptions.logits_memory,
    ) -> None:
        super().__init__(
            corpus,
            tokenizer=tokenizer,
            append_eos=append_eos,
            groups=groups,
            batch_tokens=batch_tokens,
            logits_memory=logits_memory,
            every_n_evals=every_n_evals,
            every_n_steps=every_n_steps,
            name=name,
        )
        self.n = tuple(check_n(value) for value in (n if isinstance(n, Iterable) else [n]))
        if not self.n:
            raise ValueError("`n` must name at least one N, for example `n=16`, but is empty.")
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"`save_total_limit` must be at least 1, or None to keep all, but is {save_total_limit}.")
        if edge not in get_args(Edge):
            raise ValueError(f"`edge` must be 'hard' or 'soft', but is {edge!r}.")
        self.edge = edge
        self.others = [fspath(path) for path in others]
        self.load_winner_at_end = load_winner_at_end
        self.save_total_limit = save_total_limit
        self.result: TournamentResult | None = None
        self._steps: list[int] = []
        self._saved: list[int] = []
        self._rows: _RunRows | None = None  # on the main process alone
        self._lock = ExitStack()  # keeps other processes out of the folder while it trains

    def metric_names(self) -> list[str]:
        """The names of the scores, without prefix; beside them `tournament_winner_step` is reported."""
        return [f"tournament_{metric_key(n)}" for n in self.n]

    def folder(self, args: TrainingArguments) -> Path:
        """Where the rows and `best_checkpoint.json` are."""
        return Path(args.output_dir or ".") / (f"tournament-{self.name}" if self.name else "tournament")

    def kept_corpus(self, args: TrainingArguments) -> Path:
        """See `CorpusCallback`."""
        return self.folder(args) / "corpus.parquet"

    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """Score the corpus and hold the tournament; called by all processes, equal on all of them."""
        corpus = self.tokens(args, processing_class)
        scores = self.score(model, corpus)
        step = state.global_step if self._training else None
        self._steps, self.result = on_main_process(lambda: self._enter(args, corpus, step, scores))
        points = {self.result.n: self.result.scores} | {point.n: point.scores for point in self.result.sweep}
        now = "model" if step is None else _name(step)
        metrics = {f"tournament_{metric_key(n)}": points[n][now] for n in self.n}
        standing = self._standing()
        return metrics | ({_WINNER: float(standing[0])} if standing else {})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin anew, or take up the rows that the checkpoint knows which is being resumed from."""
        self._refuse(args, state)
        corpus = self.tokens(args, processing_class)
        self._lock.close()  # of a training that failed
        with ExitStack() as stack:
            stack.enter_context(writing_to(self.folder(args)))
            on_main_process(lambda: self._check_rows(args, corpus))
            super().on_train_begin(args, state, control, model, processing_class, **kwargs)
            self._steps, self.result = on_main_process(lambda: self._take_up(args, corpus))
            self._lock = stack.pop_all()
        if state.global_step:
            self._saved = sorted({*self._saved, state.global_step})
            self._tell_trainer(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: torch.nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the scores, and let the Trainer compare with the best saved step as it stands now."""
        super().on_log(args, state, control, logs, model, processing_class, **kwargs)
        if self._reported and self._training:
            self._tell_trainer(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the winner where tools find it, and delete what is beyond the callback's limit."""
        self._saved = sorted({*self._saved, state.global_step})
        best = self._tell_trainer(args, state)
        if self.save_total_limit is not None and args.should_save:
            kept = {checkpoint_folder(args, step) for step in (best, state.global_step) if step is not None}
            kept |= {Path(path) for path in (state.best_model_checkpoint,) if path is not None}
            delete_old_checkpoints(Path(args.output_dir or "."), self.save_total_limit, kept, state.global_step)
        self._write(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say who won and how sure it is, and load it if asked to."""
        super().on_train_end(args, state, control, **kwargs)
        self.result = on_main_process(lambda: self._hold(args, bootstrap=1000))
        best = self._tell_trainer(args, state)
        self._write(args, state)
        if state.is_world_process_zero:
            self._report_loss(args, best)
        if best is not None and self.load_winner_at_end:
            trainers = (t for t in callers(Trainer) if any(c is self for c in t.callback_handler.callbacks))
            load_weights(next(trainers), checkpoint_folder(args, best))
        self._lock.close()

    @property
    def progress(self) -> dict[str, Any]:
        """See `CorpusCallback`."""
        return {
            "corpus": None if self._run_corpus is None else self._run_corpus.encoded.fingerprint,
            "name": self.name,
            "evaluations": self.evaluations,
            "last_step": self.last_step,
            "steps": self._steps,
            "saved": self._saved,
        }

    @progress.setter
    def progress(self, progress: dict[str, Any]) -> None:
        self.evaluations, self.last_step = progress["evaluations"], progress["last_step"]
        self._steps, self._saved = list(progress["steps"]), list(progress["saved"])

    def begin(self) -> None:
        """See `CorpusCallback`."""
        self.evaluations, self.last_step, self._steps, self._saved, self.result = 0, None, [], [], None

    def arguments(self) -> dict[str, Any]:
        """See `CorpusCallback`."""
        return {
            "n": list(self.n),
            "edge": self.edge,
            "others": self.others,
            "load_winner_at_end": self.load_winner_at_end,
            "save_total_limit": self.save_total_limit,
        }

    def _refuse(self, args: TrainingArguments, state: TrainerState) -> None:
        """What would lose the winner, or make something else of it."""
        metric = args.metric_for_best_model
        ours = [c for c in next(callers(CallbackHandler)).callbacks if isinstance(c, TournamentCallback)]
        if state.is_hyper_param_search:
            raise ValueError(
                "`hyperparameter_search` puts the checkpoints of each trial in a folder that callbacks do not get to "
                "know: start each run with its own `output_dir`, and let the runs meet through `others`, or in "
                "`hf-coverage tournament RUN_1/tournament/step-* RUN_2/tournament/step-*`."
            )
        if metric is not None and metric.endswith(_WINNER):
            raise ValueError(
                f'`metric_for_best_model="{metric}"` is a step, not a score: use "{self.metric_names()[0]}".'
            )
        if len(ours) > 1 and (args.save_total_limit or any(c.save_total_limit for c in ours)):
            raise ValueError(
                "`save_total_limit` can spare the winner of one TournamentCallback, and this Trainer has "
                f"{len(ours)}: keep all checkpoints, or use one callback with several `n`."
            )
        if sum(c._metric_n(args) is not None for c in ours) > 1:
            raise ValueError(f'`metric_for_best_model="{metric}"` fits several TournamentCallbacks: name all of them.')
        check_arguments(
            args,
            metric=self.metric_names()[0],
            is_best_metric=self._metric_n(args) is not None,
            save_total_limit=self.save_total_limit,
            load_winner=self.load_winner_at_end,
        )

    def _metric_n(self, args: TrainingArguments) -> float | None:
        """The N by which the Trainer chooses its best model, if it does so by a score of this callback."""
        prefix = f"{self.name}_" if self.name else ""
        metric = f"_{args.metric_for_best_model}"
        return next((n for n in self.n if metric.endswith(f"_{prefix}tournament_{metric_key(n)}")), None)

    def _deciding_n(self, args: TrainingArguments) -> float:
        return self._metric_n(args) or self.n[0]

    def _check_rows(self, args: TrainingArguments, corpus: RunCorpus) -> None:
        """Refuse rows of another corpus before anything of this run is written."""
        self._rows = None  # those of an earlier training of this callback, in this folder or another
        self._open(args, corpus)

    def _open(self, args: TrainingArguments, corpus: RunCorpus) -> _RunRows:
        """The rows on disk, read once for each run."""
        fingerprint = corpus.encoded.fingerprint
        if self._rows is None or (self._rows.folder, self._rows.corpus) != (self.folder(args), fingerprint):
            known = self._corpus is not None
            reference = (
                read_reference(self._corpus, self.groups)
                if known
                else load_reference(self.folder(args), corpus=fingerprint)[0]
            )
            self._rows = _RunRows(self.folder(args), fingerprint, reference, self.others)
        return self._rows

    def _take_up(self, args: TrainingArguments, corpus: RunCorpus) -> tuple[list[int], TournamentResult | None]:
        """Drop all rows but those that the checkpoint knows, and hold the tournament over them."""
        rows = self._open(args, corpus)
        rows.keep(self._steps)
        lost = sorted(set(self._steps) - set(rows.by_step))
        if lost:
            warnings.warn(
                f"The scores of {len(lost)} evaluated steps ({lost[:8]}) are not in {self.folder(args)} any more: the "
                "tournament goes on without them.",
                CoverageWarning,
                stacklevel=2,
            )
        return sorted(rows.by_step), self._hold(args)

    def _enter(
        self, args: TrainingArguments, corpus: RunCorpus, step: int | None, scores: Scores
    ) -> tuple[list[int], TournamentResult]:
        """Hold the tournament with a newcomer, who stays if it is a step of the training."""
        rows = self._open(args, corpus)
        if step is not None:
            options = ScoringOptions(batch_tokens=self.batch_tokens, logits_memory=self.logits_memory)
            rows.add(step, scores, checkpoint_folder(args, step), options)
        newcomer = scores.logprob if step is None else None
        return sorted(rows.by_step), rows.hold(self._deciding_n(args), self.n, newcomer, edge=self.edge)

    def _hold(self, args: TrainingArguments, *, bootstrap: int = 0) -> TournamentResult | None:
        if self._rows is None or not self._rows.by_step:
            return None
        return self._rows.hold(self._deciding_n(args), self.n, edge=self.edge, bootstrap=bootstrap)

    def _standing(self) -> list[int]:
        """The steps of this run, best first."""
        by_name = {_name(step): step for step in self._steps}
        return [] if self.result is None else [by_name[name] for name in self.result.ranking if name in by_name]

    def _loadable(self, args: TrainingArguments) -> list[int]:
        """The steps whose checkpoints were saved and are there, best first."""
        return [s for s in self._standing() if s in self._saved and checkpoint_folder(args, s).is_dir()]

    def _tell_trainer(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """Give the Trainer the best step that can be loaded, unless its best is by another metric; return the step."""
        best = next(iter(on_main_process(lambda: self._loadable(args))), None)
        ours = self._metric_n(args) is not None
        if self.result is None or (args.metric_for_best_model is not None and not ours):
            return best
        state.best_model_checkpoint = None if best is None else str(checkpoint_folder(args, best))
        if ours:
            state.best_global_step = best
            state.best_metric = None if best is None else self.result.scores[_name(best)]
            if best is not None and self._wins_a_tie(state.global_step, best):
                state.best_metric = None  # the Trainer takes only what is below the score to beat
        return best

    def _wins_a_tie(self, step: int, best: int) -> bool:
        standing = self._standing()
        if self.result is None or step not in standing or standing.index(step) >= standing.index(best):
            return False
        return not self.result.scores[_name(step)] < self.result.scores[_name(best)]

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero and self.result is not None and self._loadable(args):
            checkpoints = {_name(step): checkpoint_folder(args, step) for step in self._loadable(args)}
            write_best_checkpoint(self.folder(args) / "best_checkpoint.json", self.result, checkpoints)

    def _report_loss(self, args: TrainingArguments, best: int | None) -> None:
        """Say so if the step that stands best cannot be loaded, where checkpoints are saved at all."""
        first = next(iter(self._standing()), None)
        if args.save_strategy == SaveStrategy.NO or (first == best and not (best is None and self.load_winner_at_end)):
            return
        stands = "no step was evaluated" if first is None else f"step {first} stands best, but has no checkpoint"
        there = "no evaluated step has one" if best is None else f"the best step that has one is {best}"
        warnings.warn(
            f"The winner of the tournament cannot be loaded: {stands}; {there}. Save the steps that are evaluated "
            "(`save_steps` as `eval_steps`), and keep all checkpoints if an early one may still win.",
            CoverageWarning,
            stacklevel=2,
        )


def _name(step: int) -> str:
    return f"step-{step}"


class _RunRows:
    """Log p(y_i|x_i) of the steps that a run evaluated, in memory and on disk; for the main process.

    A row is there whole or not at all: what a killed run left unfinished is not read, and written anew.

    Args:
        folder: Where the rows are, or will be.
        corpus: The fingerprint of the encoded corpus that they are of.
        reference: What is known of its rows.
        others: Score tables of other runs, or folders of them, that challenge.

    Attributes:
        by_step: `(R,)` log p of each step, nats.

    Raises:
        ValueError: If there are scores of another corpus.
    """

    def __init__(
        self, folder: Path, corpus: str, reference: Reference, others: Sequence[str | PathLike[str]] = ()
    ) -> None:
        self.folder = folder
        self.corpus = corpus
        self.reference = reference
        remedy = f"give the TournamentCallback another `name`, or remove {folder} if its scores are no longer needed"
        self.by_step = {_step_of(path): _row(path, corpus, remedy) for path in _steps_in(folder)}
        self.challengers = _read_challengers(others, corpus)

    def keep(self, steps: Collection[int]) -> None:
        """Remove all rows but those of some steps, and leave what `hf-coverage` wants to know of the corpus."""
        for path in self.folder.glob("step-*"):
            if _step_of(path) not in steps:
                shutil.rmtree(path)
        self.by_step = {step: row for step, row in self.by_step.items() if step in steps}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_reference(self.folder, self.reference, {"name": self.folder.name}, corpus=self.corpus)

    def add(self, step: int, scores: Scores, checkpoint: Path, options: ScoringOptions) -> None:
        """Keep the row of a step, in the place of one that is there.

        Args:
            step: The training step.
            scores: Of the corpus under the model of this step.
            checkpoint: Where the model of this step is saved, if it is saved.
            options: How it was scored.
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
        self,
        n: float,
        sweep: Sequence[float],
        newcomer: FloatArray | None = None,
        *,
        edge: Edge,
        bootstrap: int = 0,
    ) -> TournamentResult:
        """The tournament over all rows, `step-<k>`, the challengers, and a newcomer named `model`."""
        own = {f"step-{step}": row for step, row in sorted(self.by_step.items())}
        more = {} if newcomer is None else {"model": newcomer}
        candidates = own | self.challengers | more
        groups = self.reference.groups
        return tournament(candidates, n, edge=edge, sweep=sweep, groups=groups, bootstrap=bootstrap)


def _read_challengers(sources: Sequence[str | PathLike[str]], corpus: str) -> dict[str, FloatArray]:
    """Log p(y_i|x_i) of candidates of other runs.

    Args:
        sources: Folders, each a score table or full of `step-<k>` tables.
        corpus: The fingerprint of the encoded corpus that they must be of.

    Returns:
        By name, parts of the path, `(R,)` log p, nats.

    Raises:
        ValueError: If a folder is of another corpus, or there are no scores in it.
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
