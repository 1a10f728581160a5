"""Cov_N and miss_N beside the loss: the coverage profile as part of every evaluation of a `transformers` Trainer."""

import logging
import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_coverage.functional.checks import check_n, coverage_key, miss_key
from hf_coverage.functional.coverage_watch import WatchState, Worsening, prompts_to_warn, update_watch
from hf_coverage.inference.evaluation_callback import CoverageWarning
from hf_coverage.measure.corpus_callback import CorpusCallback
from hf_coverage.measure.engine import ScoringOptions
from hf_coverage.measure.profile import CoverageProfile

__all__ = ["CoverageCallback", "CoverageWarning"]

logger = logging.getLogger(__name__)


class CoverageCallback(CorpusCallback):
    """Report Cov_N of the model in training at every evaluation, and say so if it worsens while the loss improves.

    Each evaluation scores the corpus and gains `eval_cov_<n>`, `eval_miss_<n>` (no reward makes Best-of-N with n
    samples lose more), `eval_kl`, `eval_sequence_cross_entropy` (nats a response) and their standard errors
    `<metric>_stderr`. On a corpus without `reference_logprob` only upper bounds are known, and they are called
    `eval_cov_upper_<n>` and `eval_miss_upper_<n>`. All are better when they are lower. They are in the log history,
    in every reporter, in the metrics that `trainer.evaluate` returns, and may be the `metric_for_best_model`, with
    `greater_is_better=False`. Evaluations with another prefix, or on several datasets, report under that prefix.

    Training is not changed: a run ends with the same weights, bit for bit, as one without the callback.

    Once in a run a `CoverageWarning` is given if cross-entropy went on improving while miss_N is significantly worse
    than at its best evaluation (a paired test over the same rows); it names the best checkpoint. With a few hundred
    prompts it can hardly see a worsening, and the log says so once; a thousand see one of a few hundredths.

    In a run with checkpoints the tokens of the corpus are kept in `<output_dir>/coverage`, from where a callback that
    `restore_callback_states_from_checkpoint` rebuilds takes them.

    Args:
        corpus: A reference corpus (see `validate_corpus`), or the folder of one written by `Dataset.save_to_disk`;
            None: the one that an earlier part of this run kept.
        n: The N to report, real numbers >= 1.
        tokenizer: Tokenises a corpus of text or chat; None: the Trainer's `processing_class`.
        append_eos: End every text completion with the EOS token. It must be so on both sides: in `reference_logprob`
            and here.
        groups: Column that says which rows are not independent of each other.
        watch_n: The N whose worsening is reported; None: the largest of `n`.
        every_n_evals: Score at the first evaluation of the training and at every n-th after it.
        every_n_steps: Score at the training steps that n divides instead, evaluation or not; where there is none, the
            values appear in the training log's entry of that step.
        name: Report as `eval_<name>_cov_<n>` and so on: one for each callback, where a run has several.
        batch_tokens: Token positions that one forward pass of the scoring computes.
        logits_memory: Bytes that its logits may take.

    Attributes:
        profile: The `CoverageProfile` of the latest evaluation; None before the first.

    Raises:
        TypeError: If the corpus is not a `datasets.Dataset`, or a value in it has the wrong type.
        ValueError: If the corpus is not valid, or an argument is out of range.

    Example:
        >>> sums = {"prompt": ["1+1=", "1+2="], "completion": ["2", "3"], "reference_logprob": [0.0, 0.0]}
        >>> CoverageCallback(Dataset.from_dict(sums), n=(2, 16)).metric_names()
        ['cov_2', 'cov_16', 'miss_2', 'miss_16', 'kl', 'sequence_cross_entropy']

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
        self.n = tuple(check_n(value) for value in n)
        if not self.n:
            raise ValueError("`n` must name at least one N to report, for example `n=(2, 4, 8, 16)`, but is empty.")
        self.watch_n = max(self.n) if watch_n is None else watch_n
        if not 1 <= self.watch_n < math.inf:
            raise ValueError(f"`watch_n` must be a finite number >= 1, but is {watch_n}.")
        self.profile: CoverageProfile | None = None
        self._watch = WatchState()

    def metric_names(self) -> list[str]:
        """The names of the metrics, without prefix; their standard errors end in `_stderr`."""
        if self._run_corpus is not None:
            known = self._run_corpus.reference_logprobs is not None
        else:
            known = self._corpus is not None and "reference_logprob" in self._corpus.column_names
        names = [key(n, upper_bound=not known) for key in (coverage_key, miss_key) for n in self.n]
        return [*names, "kl", "sequence_cross_entropy"] if known else [*names, "sequence_cross_entropy"]

    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """Score the corpus under the model as it is now; called by all processes, equal on all of them."""
        corpus = self.tokens(args, processing_class)
        logprobs = self.score(model, corpus).logprob
        self.profile = CoverageProfile.from_logprobs(logprobs, corpus.reference_logprobs, groups=corpus.groups)
        if self._training:
            self._report_worsening(args, state, self.profile)
        # A standard error is NaN where there is none (one prompt, infinite KL), and NaN is no measurement to plot.
        return {key: value for key, value in self.profile.metrics(self.n).items() if not math.isnan(value)}

    @property
    def progress(self) -> dict[str, Any]:
        """See `CorpusCallback`."""
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

    def begin(self) -> None:
        """See `CorpusCallback`."""
        self.evaluations, self.last_step, self._watch = 0, None, WatchState()

    def arguments(self) -> dict[str, Any]:
        """See `CorpusCallback`."""
        return {"n": list(self.n), "watch_n": self.watch_n}

    def kept_corpus(self, args: TrainingArguments) -> Path:
        """See `CorpusCallback`."""
        return Path(args.output_dir or ".") / "coverage" / f"{self.name or 'corpus'}.parquet"

    def _is_own(self, progress: dict[str, Any]) -> bool:
        return super()._is_own(progress) and progress["watch_n"] == self.watch_n

    def _report_worsening(self, args: TrainingArguments, state: TrainerState, profile: CoverageProfile) -> None:
        if not self._watch.evaluations and state.is_world_process_zero and profile.num_groups < prompts_to_warn():
            logger.warning(_small_message(profile, self.watch_n))
        self._watch, worsening = update_watch(
            self._watch,
            step=state.global_step,
            log_ratios=profile.log_ratios,
            cross_entropy=profile.cross_entropy,
            n=self.watch_n,
            groups=profile.groups,
        )
        if worsening is not None and state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{worsening.best.step}"
            where = str(folder) if folder.is_dir() else "not saved as a checkpoint"
            message = worsening_message(where, state.global_step, profile, self.watch_n, worsening)
            warnings.warn(message, CoverageWarning, stacklevel=2)


def _small_message(profile: CoverageProfile, n: float) -> str:
    prompts = "1 prompt is" if profile.num_groups == 1 else f"{profile.num_groups:,} prompts are"
    return (
        f"{prompts} too few to warn from: that a twentieth of the responses is given up while the loss improves would "
        f"hardly be told from chance in {profile.miss_label(n)}, for which it takes {prompts_to_warn():,} prompts or "
        "more. The metrics are reported all the same."
    )


def worsening_message(where: str, step: int, profile: CoverageProfile, n: float, worsening: Worsening) -> str:
    """What the watch has seen at a step, in plain words, and where the best checkpoint is."""
    best = worsening.best
    what = f"the {profile.miss_label(n)}" if profile.is_upper_bound else profile.miss_label(n)
    return (
        f"Coverage is getting worse while cross-entropy improves. From step {best.step} to step {step}, {what} went "
        f"up from {best.miss:.4g} to {worsening.miss:.4g} (lower is better) and cross-entropy fell from "
        f"{best.cross_entropy:.4g} to {worsening.cross_entropy:.4g} nats a response (paired test over the same "
        f"{profile.num_rows} rows: p = {worsening.test.p_value:.1g}). Best-of-N and RL now find fewer of the good "
        f"responses. The best checkpoint for them so far is step {best.step} ({where})."
    )
