"""Cov_N beside the loss: the coverage profile as part of every evaluation of a `transformers` Trainer."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_coverage.functional.checks import check_n, metric_key
from hf_coverage.measure.corpus import reference_kind, validate_corpus
from hf_coverage.measure.coverage_watch import WatchState, Worsening, update_watch
from hf_coverage.measure.engine import ScoringEngine, ScoringOptions
from hf_coverage.measure.evaluation_callback import CoverageWarning, EvaluationCallback
from hf_coverage.measure.forward import inference
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.measure.run_corpus import RunCorpus
from hf_coverage.measure.scoring import score_encoded

__all__ = ["CoverageCallback", "CoverageWarning"]


class CoverageCallback(EvaluationCallback, ExportableState):
    """Report Cov_N of the model in training at every evaluation, and say so if it worsens while the loss improves.

    Each evaluation scores the corpus and gains `eval_cov_<n>`, `eval_kl`, `eval_sequence_cross_entropy` (nats a
    response) and their standard errors `<metric>_stderr`. On a corpus without `reference_logprob` only an upper bound
    is known, and it is called `eval_cov_upper_<n>`. All are better when they are lower. They are in the log history,
    in every reporter, in the metrics that `trainer.evaluate` returns, and may be the `metric_for_best_model`, with
    `greater_is_better=False`. Evaluations with another prefix, or on several datasets, report under that prefix.

    Training is not changed: a run ends with the same weights, bit for bit, as one without the callback.

    Once in a run a `CoverageWarning` is given if cross-entropy went on improving while Cov_N is significantly worse
    than at its best evaluation (a paired test over the same rows); it names the best checkpoint.

    In a run with checkpoints the tokens of the corpus are kept in `<output_dir>/coverage`, from where a callback that
    `restore_callback_states_from_checkpoint` rebuilds takes them.

    Args:
        corpus: a reference corpus (see `validate_corpus`), or the folder of one written by `Dataset.save_to_disk`;
            None: the one that an earlier part of this run kept.
        n: the N to report, real numbers >= 1.
        tokenizer: tokenises a corpus of text or chat; None: the Trainer's `processing_class`.
        append_eos: end every text completion with the EOS token. It must be so on both sides: in `reference_logprob`
            and here.
        groups: column that says which rows are not independent of each other.
        watch_n: the N whose worsening is reported; None: the largest of `n`.
        every_n_evals: score at the first evaluation of the training and at every n-th after it.
        every_n_steps: score at the training steps that n divides instead, evaluation or not; where there is none, the
            values appear in the training log's entry of that step.
        name: report as `eval_<name>_cov_<n>` and so on: one for each callback, where a run has several.
        batch_tokens: token positions that one forward pass of the scoring computes.
        logits_memory: bytes that its logits may take.

    Attributes:
        profile: the `CoverageProfile` of the latest evaluation; None before the first.

    Raises:
        TypeError: if the corpus is not a `datasets.Dataset`, or a value in it has the wrong type.
        ValueError: if the corpus is not valid, or an argument is out of range.

    Example:
        >>> sums = {"prompt": ["1+1=", "1+2="], "completion": ["2", "3"], "reference_logprob": [0.0, 0.0]}
        >>> CoverageCallback(Dataset.from_dict(sums), n=(2, 16)).metric_names()
        ['cov_2', 'cov_16', 'kl', 'sequence_cross_entropy']

    References:
        arXiv 2510.15020, Eq. (1) and Figure 1.
    """

    def __init__(
        self,
        corpus: Dataset | str | PathLike[str] | None,
        n: Iterable[float] = (2, 4, 8, 16),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        append_eos: bool = False,
        groups: str = "prompt",
        watch_n: float | None = None,
        every_n_evals: int = 1,
        every_n_steps: int | None = None,
        name: str | None = None,
        batch_tokens: int = ScoringOptions.batch_tokens,
        logits_memory: int = ScoringOptions.logits_memory,
    ) -> None:
        super().__init__(every_n_evals=every_n_evals, every_n_steps=every_n_steps, name=name)
        self.n = tuple(check_n(value) for value in n)
        if not self.n:
            raise ValueError("`n` must name at least one N to report, for example `n=(2, 4, 8, 16)`, but is empty.")
        self.watch_n = max(self.n) if watch_n is None else watch_n
        if not 1 <= self.watch_n < math.inf:
            raise ValueError(f"`watch_n` must be a finite number >= 1, but is {watch_n}.")
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.groups = groups
        self.batch_tokens = batch_tokens
        self.logits_memory = logits_memory
        self.profile: CoverageProfile | None = None
        self._corpus = load_from_disk(corpus) if isinstance(corpus, str | PathLike) else corpus
        if self._corpus is not None:
            _check_corpus(self._corpus, groups)
        self._run_corpus: RunCorpus | None = None
        self._watch = WatchState()

    def metric_names(self) -> list[str]:
        """The names of the metrics, without prefix; their standard errors end in `_stderr`."""
        if self._run_corpus is not None:
            known = self._run_corpus.reference_logprobs is not None
        else:
            known = self._corpus is not None and "reference_logprob" in self._corpus.column_names
        names = [f"cov_{metric_key(n)}" if known else f"cov_upper_{metric_key(n)}" for n in self.n]
        return [*names, "kl", "sequence_cross_entropy"] if known else [*names, "sequence_cross_entropy"]

    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """Score the corpus under the model as it is now; called by all processes, equal on all of them."""
        corpus = self._tokens(args, processing_class)
        scores = score_encoded(model, corpus.encoded, batch_tokens=self.batch_tokens, logits_memory=self.logits_memory)
        self.profile = CoverageProfile.from_logprobs(scores.logprob, corpus.reference_logprobs, groups=corpus.groups)
        if self._training:
            self._report_worsening(args, state, self.profile)
        # A standard error is NaN where there is none (one prompt, infinite KL), and NaN is no measurement to plot.
        return {key: value for key, value in self.profile.metrics(self.n).items() if not math.isnan(value)}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Tokenise the corpus, so that one that cannot be is refused before the training, not in it."""
        super().on_init_end(args, state, control, **kwargs)
        if self._corpus is not None:
            self._tokens(args, processing_class)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin anew, or go on where the checkpoint that is being resumed from was."""
        corpus = self._tokens(args, processing_class)
        super().on_train_begin(args, state, control, **kwargs)
        if model is not None:
            self._check_fit(model, corpus)
        if args.should_save and args.save_strategy != SaveStrategy.NO:
            corpus.save(self._kept_corpus(args))
        self.progress = self._progress_in(state)
        # The Trainer saves the state of a callback only under a name that its state already holds, and fails on a
        # run that was begun without the callback.
        _saved_states(state).setdefault(type(self).__name__, self.state())

    @property
    def progress(self) -> dict[str, Any]:
        """Where the callback is in its run, in terms of JSON; what a checkpoint remembers of it."""
        return {
            "corpus": None if self._run_corpus is None else self._run_corpus.fingerprint,
            "name": self.name,
            "watch_n": self.watch_n,
            "evaluations": self.evaluations,
            "last_step": self.last_step,
            "watch": asdict(self._watch),
        }

    @progress.setter
    def progress(self, progress: dict[str, Any]) -> None:
        self.evaluations = progress["evaluations"]
        self.last_step = progress["last_step"]
        self._watch = WatchState.from_dict(progress["watch"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: how to build the callback again, and where it is in its run."""
        return {
            "args": {
                "corpus": None,
                "n": list(self.n),
                "groups": self.groups,
                "watch_n": self.watch_n,
                "every_n_evals": self.every_n_evals,
                "every_n_steps": self.every_n_steps,
                "name": self.name,
                "batch_tokens": self.batch_tokens,
                "logits_memory": self.logits_memory,
            },
            "attributes": {"progress": self.progress},
        }

    def _tokens(self, args: TrainingArguments, processing_class: Any) -> RunCorpus:
        if self._run_corpus is None:
            if self._corpus is None:
                self._run_corpus = RunCorpus.load(self._kept_corpus(args))
            else:
                tokenizer = self.tokenizer or _tokenizer_of(processing_class)
                self._run_corpus = RunCorpus.from_dataset(
                    self._corpus, tokenizer, append_eos=self.append_eos, groups=self.groups
                )
        return self._run_corpus

    def _check_fit(self, model: torch.nn.Module, corpus: RunCorpus) -> None:
        """Refuse before the training, not at its first evaluation, what the model cannot score."""
        options = ScoringOptions(batch_tokens=self.batch_tokens, logits_memory=self.logits_memory)
        with inference(model):
            ScoringEngine(model, None, options).check(corpus.encoded, range(len(corpus.encoded)))

    def _kept_corpus(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".") / "coverage" / f"{self.name or 'corpus'}.parquet"

    def _progress_in(self, state: TrainerState) -> dict[str, Any]:
        """The progress that a resumed run's checkpoint holds of this callback; a new one's where there is none.

        It is read here, and not left to `restore_callback_states_from_checkpoint`, because that is off by default and
        confuses several callbacks of one class.
        """
        fresh = self.progress | {"evaluations": 0, "last_step": None, "watch": asdict(WatchState())}
        if state.global_step == 0:
            return fresh
        stored = _saved_states(state).get(type(self).__name__, [])
        found = [entry["attributes"]["progress"] for entry in (stored if isinstance(stored, list) else [stored])]
        same = [entry for entry in found if all(entry[key] == fresh[key] for key in ("corpus", "name", "watch_n"))]
        return same[-1] if same else fresh

    def _report_worsening(self, args: TrainingArguments, state: TrainerState, profile: CoverageProfile) -> None:
        self._watch, worsening = update_watch(
            self._watch,
            step=state.global_step,
            log_ratios=profile.log_ratios,
            cross_entropy=profile.cross_entropy,
            n=self.watch_n,
            groups=profile.groups,
        )
        if worsening is not None and state.is_world_process_zero:
            message = _worsening_message(args, state.global_step, profile, self.watch_n, worsening)
            warnings.warn(message, CoverageWarning, stacklevel=2)


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks by class name: a dict, or a list of dicts for several callbacks of a class."""
    return cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list that its constructor takes


def _check_corpus(corpus: Any, groups: str) -> None:
    validate_corpus(corpus)
    if reference_kind(corpus) == "answer":
        raise ValueError(
            "`corpus` has answer-level scores (`answer_logprob`), which take sampling to obtain: use `score_answers` "
            "on checkpoints, or drop the column to watch whole responses."
        )
    if groups not in corpus.column_names:
        raise ValueError(f"`groups` must be a column of the corpus, one of {corpus.column_names}, but is {groups!r}.")


def _tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    if isinstance(processing_class, ProcessorMixin):
        return processing_class.tokenizer
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None


def _worsening_message(
    args: TrainingArguments, step: int, profile: CoverageProfile, n: float, worsening: Worsening
) -> str:
    best = worsening.best
    folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{best.step}"
    where = str(folder) if folder.is_dir() else "not saved as a checkpoint"
    what = f"the upper bound on Cov_{metric_key(n)}" if profile.is_upper_bound else f"Cov_{metric_key(n)}"
    return (
        f"Coverage is getting worse while cross-entropy improves. From step {best.step} to step {step}, {what} went "
        f"up from {best.coverage:.4g} to {worsening.coverage:.4g} (lower is better) and cross-entropy fell from "
        f"{best.cross_entropy:.4g} to {worsening.cross_entropy:.4g} nats a response (paired test over the same "
        f"{profile.num_rows} rows: p = {worsening.test.p_value:.1g}). Best-of-N and RL now find fewer of the good "
        f"responses. The best checkpoint for them so far is step {best.step} ({where})."
    )
