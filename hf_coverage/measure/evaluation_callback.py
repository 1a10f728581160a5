"""Callbacks whose numbers are part of the Trainer's evaluation, as if `compute_metrics` had returned them.

The Trainer logs an evaluation, then tells its callbacks, then decides on the best model, all with one dict. A value
added to that dict by the first callback of the list in `on_log` therefore reaches every reporter, the history, early
stopping and the choice of the best checkpoint. Callbacks that users pass come last in the list, after the reporters;
so a callback of this kind moves itself to the front.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy

from hf_coverage.inference.call_stack import callers

__all__ = ["CoverageWarning", "EvaluationCallback", "evaluation_prefix"]

_T = TypeVar("_T")


class CoverageWarning(UserWarning):
    """Something about the coverage of a training run that its owner should know."""


class EvaluationCallback(TrainerCallback, ABC):
    """Base of the callbacks that add metrics to an evaluation; lower is better for all of them.

    Args:
        every_n_evals: Report at the first evaluation of the training and at every n-th after it.
        every_n_steps: Instead, report at the training steps that n divides, whether or not an evaluation falls there.
        name: Put between prefix and metric, `eval_<name>_<metric>`, to tell several callbacks of a run apart.

    Raises:
        ValueError: If an interval is below 1, or both are set.
    """

    def __init__(self, *, every_n_evals: int = 1, every_n_steps: int | None = None, name: str | None = None) -> None:
        for argument, value in (("every_n_evals", every_n_evals), ("every_n_steps", every_n_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{argument}` must be a whole number >= 1, but is {value!r}.")
        if every_n_steps is not None and every_n_evals != 1:
            raise ValueError("`every_n_evals` and `every_n_steps` are two ways to say when: give only one of them.")
        if name is not None and (not name or not name.replace("_", "").replace("-", "").isalnum()):
            raise ValueError(f"`name` becomes part of metric names: use letters, digits, `_` and `-`, not {name!r}.")
        self.every_n_evals = every_n_evals
        self.every_n_steps = every_n_steps
        self.name = name
        self.evaluations = 0
        self.last_step: int | None = None
        self._training = False
        self._computed: tuple[tuple[Any, ...], dict[str, float]] | None = None
        self._reported: dict[str, float] = {}

    @abstractmethod
    def metric_names(self) -> list[str]:
        """The names of the metrics, without prefix."""

    @abstractmethod
    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """The metrics of the model as it is now, the same Python floats on every process."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before the reporters."""
        self._take_the_lead()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before the reporters, also where a resumed run has just put its callbacks in another order."""
        self._take_the_lead()
        self._training = True
        self._check_best_metric(args, state)
        if args.eval_strategy == IntervalStrategy.NO and self.every_n_steps is None and state.is_world_process_zero:
            warnings.warn(
                f"This {type(self).__name__} reports at evaluations, and this training has none: set `eval_strategy` "
                "in TrainingArguments, or `every_n_steps` in the callback.",
                CoverageWarning,
                stacklevel=2,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on every evaluation is one that somebody asked for, and is answered in full."""
        self._training = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before the reporters when `trainer.add_callback` was followed by `trainer.evaluate`."""
        self._take_the_lead()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log entry at the callback's own steps."""
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            control.should_log = True
        return control

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
        """Add the metrics to what is being logged."""
        self._reported = {}
        prefix = evaluation_prefix(logs or {})
        due = self._due_at_evaluation(state) if prefix else self._due_at_own_step(state, control)
        if logs is None or model is None or not due:
            return
        prefix = (prefix or "eval_") + (f"{self.name}_" if self.name else "")
        metrics = self._current_metrics(args, state, model, processing_class)
        self._reported = {prefix + key: value for key, value in metrics.items()}
        taken = sorted(self._reported.keys() & logs.keys())
        if taken:
            raise ValueError(
                f"`{taken[0]}` is already among the values of this evaluation: give the {type(self).__name__} a "
                "`name` to report under."
            )
        logs.update(self._reported)
        # The history's entry is a copy that the Trainer made just before this event.
        state.log_history[-1].update(self._reported)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics for early stopping and the best model where a Trainer logs a copy of its metrics."""
        if metrics is not None:
            metrics.update(self._reported)
        self._reported = {}

    def _take_the_lead(self) -> None:
        """Move before all callbacks of other kinds; refuse another one that reports the same metrics."""
        callbacks = _calling_handler(self).callbacks
        position = callbacks.index(self)
        front = next((i for i, item in enumerate(callbacks) if not isinstance(item, EvaluationCallback)), position)
        if front < position:
            # The handler is looping over this list. Moving the element that a loop has reached to the front makes it
            # neither skip nor repeat another one.
            callbacks.insert(front, callbacks.pop(position))
        for other in callbacks:
            if isinstance(other, EvaluationCallback) and other is not self and other.name == self.name:
                shared = sorted(set(self.metric_names()) & set(other.metric_names()))
                if shared:
                    raise ValueError(
                        f"Two callbacks would both report `{shared[0]}`: give one of them a `name`, which makes it "
                        f"`<name>_{shared[0]}`."
                    )

    def _due_at_evaluation(self, state: TrainerState) -> bool:
        if not self._training:
            return True
        # A dict of evaluation datasets logs once for each of them: that is one evaluation.
        if state.global_step != self.last_step:
            self.evaluations += 1
            self.last_step = state.global_step
        if self.every_n_steps is not None:
            return state.global_step % self.every_n_steps == 0
        return (self.evaluations - 1) % self.every_n_evals == 0

    def _due_at_own_step(self, state: TrainerState, control: TrainerControl) -> bool:
        if not self._training or self.every_n_steps is None or state.global_step % self.every_n_steps:
            return False
        # Where an evaluation has just been, or is about to follow, the values belong to its log entry.
        if control.should_evaluate or state.global_step == self.last_step:
            return False
        self.last_step = state.global_step
        return True

    def _current_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """The metrics, computed once for unchanged weights at one step: a dict of datasets asks several times."""
        stamp = (state.global_step, *_weight_sums(model.parameters()))
        unchanged = self._computed is not None and self._computed[0] == stamp
        if _on_all_processes(unchanged) and self._computed is not None:
            return self._computed[1]
        metrics = self.compute_metrics(args, state, model, processing_class)
        self._computed = (stamp, metrics)
        return metrics

    def _check_best_metric(self, args: TrainingArguments, state: TrainerState) -> None:
        metric = args.metric_for_best_model
        names = [f"{self.name}_{name}" if self.name else name for name in self.metric_names()]
        if metric is None or not any(f"_{metric}".endswith(f"_{name}") for name in names):
            return
        if self.every_n_steps is not None or self.every_n_evals != 1:
            raise ValueError(
                f'`metric_for_best_model="{metric}"` is read at every evaluation, but this {type(self).__name__} '
                "reports it at some only; leave `every_n_evals` and `every_n_steps` at their defaults."
            )
        if args.greater_is_better and state.is_world_process_zero:
            warnings.warn(
                f'`metric_for_best_model="{metric}"` is better when it is lower, but `greater_is_better` is True '
                "(the default of TrainingArguments for names that do not end in `loss`): the run would keep its worst "
                "checkpoint. Set `greater_is_better=False`.",
                CoverageWarning,
                stacklevel=2,
            )


def evaluation_prefix(logs: dict[str, Any]) -> str | None:
    """The prefix of an evaluation's log entry; None for any other entry.

    Every evaluation reports its runtime: `eval_runtime`, `test_runtime`, `eval_<dataset>_runtime`. `train_runtime` is
    the end of a training.

    Example:
        >>> evaluation_prefix({"eval_code_loss": 1.0, "eval_code_runtime": 0.5}), evaluation_prefix({"loss": 1.0})
        ('eval_code_', None)
    """
    # A metric of the user's own may end in `_runtime` too, behind the same prefix.
    prefixes = sorted((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), key=len)
    return prefixes[0] if prefixes and prefixes[0] != "train_" else None


def _calling_handler(callback: TrainerCallback) -> CallbackHandler:
    """The handler that is calling an event of this callback: the Trainer offers no way to place one in its list."""
    for handler in callers(CallbackHandler):
        if any(item is callback for item in handler.callbacks):
            return handler
    raise RuntimeError(
        f"{type(callback).__name__} must be called by the `CallbackHandler` of a Trainer that holds it: pass it in "
        "`callbacks=[...]` or to `trainer.add_callback`, not inside another callback."
    )


def _weight_sums(parameters: Iterable[torch.nn.Parameter]) -> list[float]:
    """One number for each parameter (of this process's shard) that changes when the parameter does."""
    with torch.no_grad():
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        return [float(p.sum(dtype=torch.float32)) for p in local]


def _on_all_processes(condition: bool) -> bool:
    """Whether a condition holds on every process of the job, which all of them must ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return condition
    answers: list[bool] = [condition] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, condition)
    return all(answers)
