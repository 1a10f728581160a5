"""Pass@N and the signal for RL beside the loss: samples of the model in training, judged by a verifier."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import ProcessorMixin, TrainerControl, TrainerState, TrainingArguments

from hf_coverage.decode.best_of_n import check_threshold, evaluate_best_of_n
from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.decode.sample_verdicts import Judging
from hf_coverage.decode.verifier_runner import check_timeout
from hf_coverage.functional.checks import check_count
from hf_coverage.functional.statistics import clustered_mean
from hf_coverage.inference.evaluation_callback import CoverageWarning, EvaluationCallback
from hf_coverage.inference.fingerprint import digest
from hf_coverage.inference.sampler import Sampler, Sampling, require_room

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_coverage.decode.best_of_n_result import BestOfNResult

__all__ = ["SuccessCallback"]

logger = logging.getLogger(__name__)


class SuccessCallback(EvaluationCallback):
    """Report Pass@1 to Pass@k of the model in training, and the share of groups that give RL a signal.

    Each time it samples k responses to every prompt and judges them, and reports `eval_pass@<N>` for the powers of 2
    up to k and k, and `eval_signal_<G>`, the share of prompts whose group of G samples does not get one reward for
    all: what GRPO and its kin learn from, 1 - `frac_reward_zero_std` in TRL's words. All are without bias, and better
    when they are higher; each has its standard error over prompts, `<metric>_stderr`. `eval_unjudged` is the share of
    responses that the verifier failed on, which count as unsolved; if it is 1 the others are left out. The values are
    in the log history, in every reporter, and in the metrics that `trainer.evaluate` returns. Beside
    `CoverageCallback` they say whether RL widens or narrows what the model covers.

    Samples are drawn with the same seed every time, so that differences between steps are the model's, and a run that
    is resumed reports the same figures. Training is not changed: a run ends with the same weights, bit for bit, as one
    without the callback. In a job of several processes each samples and judges its part; the figures are those of one
    process. What an evaluation costs is logged before the training begins.

    Args:
        prompts: Dataset with `prompt` (text, chat messages or token ids) and the columns that the verifier reads, such
            as held-out rows of what RL trains on.
        verifier: A callable like TRL's reward functions, or one of `hf_coverage.decode.verifiers`; None: exact match
            with the column `answer`, or else `completion`. See `evaluate_best_of_n`.
        k: Responses to each prompt.
        group_size: G; None: `num_generations` of the Trainer's arguments, or else k.
        max_new_tokens: Most tokens of a response; None: `max_completion_length` of the Trainer's arguments.
        temperature: What logits are divided by; None: `temperature` of the Trainer's arguments, or else 1, the model
            itself.
        top_k: Keep the k likeliest tokens of every step; None: `top_k` of the Trainer's arguments, or else all.
        top_p: Keep the likeliest tokens that together reach this mass; None: `top_p` of the Trainer's arguments, or
            else all.
        eos_token_id: The tokens that end a response; None: those of the model's generation config, or else the
            tokenizer's.
        tokenizer: Tokenises prompts of text or chat; None: the Trainer's `processing_class`.
        threshold: Least reward that solves a prompt; None where rewards do not say that: then `eval_best_of_<N>`, the
            mean reward of the best of N, is reported instead.
        timeout: Seconds for one response, after which its verifier is killed; None runs it in this process.
        batch_size: Responses drawn at once.
        seed: What all samples follow from.
        every_n_steps: Report at the training steps that n divides; None: at every evaluation.
        name: Report as `eval_<name>_pass@<N>` and so on: one for each callback, where a run has several.

    Attributes:
        result: The `BestOfNResult` of the latest evaluation; None before the first.

    Raises:
        TypeError: If the prompts are no `datasets.Dataset`.
        ValueError: If an argument is out of its range, the prompts have no column `prompt`, or the verifier needs a
            column that is not there.

    Example:
        >>> from datasets import Dataset
        >>> sums = Dataset.from_dict({"prompt": ["1+1=", "1+2="], "answer": ["2", "3"]})
        >>> SuccessCallback(sums, k=6, max_new_tokens=4, every_n_steps=50).metric_names()
        ['pass@1', 'pass@2', 'pass@4', 'pass@6', 'signal_6']
    """

    greater_is_better = True

    def __init__(
        self,
        prompts: Dataset,
        verifier: Callable[..., Any] | None = None,
        *,
        k: int = 16,
        group_size: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        threshold: float | None = 1.0,
        timeout: float | None = 10.0,
        batch_size: int = 16,
        seed: int = 0,
        every_n_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, name=name)
        check_count(k, "k")
        check_count(batch_size, "batch_size")
        check_count(seed, "seed", least=0)
        check_threshold(threshold)
        check_timeout(timeout)
        self._asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        _sampling(self._asked, {"max_new_tokens": 1})
        self.prompts, self.verifier, self.tokenizer = prompts, verifier, tokenizer
        self.k, self.group_size = k, _check_group(k, group_size, "group_size")
        self.eos_token_id, self.threshold, self.timeout = eos_token_id, threshold, timeout
        self.batch_size, self.seed = batch_size, seed
        self.result: BestOfNResult | None = None
        self._table = PromptTable.from_corpus(prompts)
        self._of_trainer: int | None = None

    def metric_names(self) -> list[str]:
        """The names of the metrics, without prefix; their standard errors end in `_stderr`."""
        sizes = sorted({2**power for power in range(self.k.bit_length())} | {self.k})
        return [*(f"{self._quantity}{n}" for n in sizes), f"signal_{self._groups_of}"]

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be sampled for before the training, not in it."""
        self._prepare(args, processing_class)
        super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say what an evaluation costs."""
        sampling, prompts = self._prepare(args, processing_class)
        judging = Judging.prepare(self.verifier, self._table, self.timeout, self.batch_size)
        self.require_the_same(
            {"prompts": digest(prompts), "verifier": judging.fingerprint or judging.name, "k": self.k}
            | {"group_size": self._groups_of, "seed": self.seed, "batch_size": self.batch_size}
            | {"every_n_steps": self.every_n_steps, "name": self.name, "threshold": self.threshold}
            | {"sampling": repr(sampling)}
        )
        super().on_train_begin(args, state, control, **kwargs)
        self.evaluations, self.last_step = 0, None
        if model is not None:
            Sampler(model, sampling, batch_size=self.batch_size, seed=self.seed)  # it says which models it cannot run
            require_room(model, prompts, [sampling.max_new_tokens] * len(prompts))
        if state.is_world_process_zero:
            logger.warning(self._cost(sampling, state))

    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """Sample and judge with the model as it is now; called by all processes, equal on all of them."""
        sampling, _ = self._prepare(args, processing_class)
        with _generators_kept():
            self.result = self.sample(model, sampling, self._tokenizer(processing_class))
        if self.result.errors and state.is_world_process_zero:
            warnings.warn(self.result.sentence, CoverageWarning, stacklevel=2)
        unjudged = float(self.result.failed.mean())
        if unjudged == 1:
            return {"unjudged": unjudged}  # zeros would look like a model that solves nothing
        known = self.result.metrics()
        signal = clustered_mean(self.result.mixed(self._groups_of))
        found = {key: value for key, value in known.items() if key.startswith(self._quantity)}
        found |= {f"signal_{self._groups_of}": signal.mean, f"signal_{self._groups_of}_stderr": signal.standard_error}
        # A standard error of one prompt is NaN, and NaN is no measurement to plot.
        return {key: value for key, value in found.items() if not math.isnan(value)} | {"unjudged": unjudged}

    def sample(self, model: Any, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> BestOfNResult:
        """Sample k responses to each prompt and judge them."""
        return evaluate_best_of_n(
            model,
            tokenizer,
            self.prompts,
            self.verifier,
            k=self.k,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_id=self.eos_token_id,
            batch_size=self.batch_size,
            seed=self.seed,
            threshold=self.threshold,
            timeout=self.timeout,
            progress=False,
        )

    @property
    def _quantity(self) -> str:
        return "best_of_" if self.threshold is None else "pass@"

    @property
    def _groups_of(self) -> int:
        return self.group_size or self._of_trainer or self.k

    def _prepare(self, args: TrainingArguments, processing_class: Any) -> tuple[Sampling, list[list[int]]]:
        """What responses are drawn from, as far as this Trainer decides it, and the prompts' token ids."""
        if self.group_size is None:
            self._of_trainer = _check_group(self.k, getattr(args, "num_generations", None), "num_generations")
        told = {name: getattr(args, name, None) for name in ("temperature", "top_k", "top_p")}
        sampling = _sampling(self._asked, told | {"max_new_tokens": getattr(args, "max_completion_length", None)})
        return sampling, self._table.encode(self._tokenizer(processing_class))

    def _tokenizer(self, processing_class: Any) -> Any:
        given = self.tokenizer or processing_class
        return given.tokenizer if isinstance(given, ProcessorMixin) else given

    def _cost(self, sampling: Sampling, state: TrainerState) -> str:
        responses = len(self._table) * self.k
        every = self.every_n_steps
        times = f", {state.max_steps // every:,} times in this training" if every and state.max_steps > 0 else ""
        return (
            f"Each evaluation of the {type(self).__name__} samples {responses:,} responses, {self.k:,} to each of "
            f"{len(self._table):,} prompts, and at most {responses * sampling.max_new_tokens:,} new tokens{times}."
        )


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Give the training's generators back: a verifier that runs in this process may draw from them."""
    plain, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, it is what trainings draw from
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)  # noqa: NPY002, as above


def _sampling(asked: dict[str, Any], told: dict[str, Any]) -> Sampling:
    """What is asked for, or else what a Trainer's arguments say, in which a `top_k` of 0 means all tokens."""
    told = {name: None if (name, value) in (("top_k", 0), ("top_p", 1.0)) else value for name, value in told.items()}
    chosen = {name: told.get(name) if value is None else value for name, value in asked.items()}
    if chosen["max_new_tokens"] is None:
        raise ValueError(
            "`max_new_tokens` must be given to the SuccessCallback: this Trainer's arguments do not say how long a "
            "response may be, as `max_completion_length` of TRL's do."
        )
    return Sampling(**chosen | {"temperature": 1.0 if chosen["temperature"] is None else chosen["temperature"]})


def _check_group(k: int, group_size: int | None, name: str) -> int | None:
    if group_size is not None and (type(group_size) is not int or not 2 <= group_size <= k):
        raise ValueError(
            f"`{name}` must be samples of a prompt that can be compared, from 2 to `k` = {k}, but is {group_size!r}: "
            "give the SuccessCallback a `k` that is larger, or a smaller `group_size`."
        )
    return group_size
