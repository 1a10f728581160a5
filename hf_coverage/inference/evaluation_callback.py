"""Callbacks whose numbers are part of the Trainer's evaluation, as if `compute_metrics` had returned them.

The Trainer logs an evaluation, then tells its callbacks, then decides on the best model, all with one dict. A value
added to that dict by the first callback of the list in `on_log` therefore reaches every reporter, the history, early
stopping and the choice of the best checkpoint. Callbacks that users pass come last in the list, after the reporters;
so a callback of this kind moves itself to the front.
"""

import warnings
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, default_compute_objective

from hf_coverage.inference.call_stack import callers, frames

__all__ = ["CoverageWarning", "EvaluationCallback", "evaluation_prefix"]

_T = TypeVar("_T")

# Trainers of TRL that log a `kl` of their own, to their reference model.
_LOG_KL = {"GRPOTrainer", "KTOTrainer", "RLOOTrainer"}
_DEFAULT = " (the default of TrainingArguments for names that do not end in `loss`)"
# What modules of PEFT, and others like them, say of the part that is at work.
_SWITCHES = ("training", "disable_adapters", "active_adapters", "scaling")


class CoverageWarning(UserWarning):
    """Something about the coverage of a training run that its owner should know."""


class EvaluationCallback(TrainerCallback, ABC):
    """Base of the callbacks that add metrics to an evaluation.

    Args:
        every_n_evals: Report at the first evaluation of the training and at every n-th after it.
        every_n_steps: Instead, report at the training steps that n divides, whether or not an evaluation falls there.
        name: Put between prefix and metric, `eval_<name>_<metric>`, to tell several callbacks of a run apart.

    Attributes:
        greater_is_better: Whether higher values of the metrics are better; the same of all of a class.

    Raises:
        ValueError: If an interval is below 1, or both are set.
    """

    greater_is_better = False

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
        self._run: TrainerState | None = None
        self._computed: tuple[Any, list[Any], dict[str, float]] | None = None
        self._reported: dict[str, float] = {}

    @abstractmethod
    def metric_names(self) -> list[str]:
        """The names of the metrics, without prefix."""

    @abstractmethod
    def compute_metrics(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing_class: Any
    ) -> dict[str, float]:
        """The metrics of the model as it is now, the same Python floats on every process."""

    def require_the_same(self, own: dict[str, Any]) -> None:
        """Refuse processes whose corpora or arguments differ: their numbers would be of a mixture."""
        first, *others = gather_object([own])
        for process, other in enumerate(others, start=1):
            differing = sorted(key for key in first if first[key] != other.get(key))
            if differing:
                raise ValueError(
                    f"All processes must give the {type(self).__name__} the same, but `{differing[0]}` is "
                    f"{first[differing[0]]!r} on process 0 and {other.get(differing[0])!r} on process {process}: read "
                    "the corpus from one file, and seed what draws it."
                )

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
        self._check_best_metric(args, state)
        self._check_trainer(state)
        self._run, self._training, self._computed = state, True, None
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
        self._follow(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log entry at the callback's own steps."""
        self._follow(args, state, control, **kwargs)
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
        self._follow(args, state, control, model=model, processing_class=processing_class, **kwargs)
        prefix = evaluation_prefix(logs or {})
        due = self._due_at_evaluation(state) if prefix else self._due_at_own_step(state, control)
        if logs is None or model is None or not due:
            return
        # The model card of a Trainer wants the same values in the entries of all its evaluations.
        apart = prefix is not None and self._training and not self._at_every_evaluation
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
        entry = state.log_history[-1]
        if apart:
            times = {key: entry[key] for key in ("epoch", "step") if key in entry}
            state.log_history.insert(-1, self._reported | times)
        else:
            entry.update(self._reported)

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

    @property
    def _at_every_evaluation(self) -> bool:
        return self.every_n_evals == 1 and self.every_n_steps is None

    def _follow(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Know whether a training is running, whatever ended the one before; join one that had begun already."""
        if not any(frame.f_code.co_name == "train" for frame in frames(Trainer)):
            self._training = False
        elif self._run is not state:
            self.on_train_begin(args, state, control, **kwargs)

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
        """The metrics, computed once for one evaluation on a dict of datasets, which asks for each of them.

        What a model predicts hangs on more than can be compared, so nothing is kept from one evaluation to the next.
        """
        evaluation = _evaluation_of_several()
        stamp = [] if evaluation is None else _stamp(model)
        known = self._computed if evaluation is not None else None
        unchanged = known is not None and known[0] is evaluation and known[1] == stamp
        if _on_all_processes(unchanged) and known is not None:
            return known[2]
        metrics = self.compute_metrics(args, state, model, processing_class)
        self._computed = None if evaluation is None else (evaluation, stamp, metrics)
        return metrics

    def _check_trainer(self, state: TrainerState) -> None:
        """Refuse a Trainer to which a metric of this callback would mean something else."""
        trainer = next(callers(Trainer), None)
        if state.is_hyper_param_search and getattr(trainer, "compute_objective", None) is default_compute_objective:
            raise ValueError(
                "`hyperparameter_search` would minimise the sum of all metrics, those of this "
                f"{type(self).__name__} among them: pass it a `compute_objective`, for example "
                "`lambda metrics: metrics['eval_loss']`."
            )
        kinds = {kind.__name__ for kind in type(trainer).__mro__} & _LOG_KL
        beta = getattr(getattr(trainer, "args", None), "beta", None)  # 0: there is no reference model
        if kinds and beta != 0 and self.name is None and "kl" in self.metric_names():
            raise ValueError(
                f"`eval_kl` is what {min(kinds)} logs of its own reference model: give the {type(self).__name__} a "
                "`name` to report under."
            )

    def _check_best_metric(self, args: TrainingArguments, state: TrainerState) -> None:
        metric = args.metric_for_best_model
        names = [f"{self.name}_{name}" if self.name else name for name in self.metric_names()]
        if metric is None or not any(f"_{metric}".endswith(f"_{name}") for name in names):
            return
        if not self._at_every_evaluation:
            raise ValueError(
                f'`metric_for_best_model="{metric}"` is read at every evaluation, but this {type(self).__name__} '
                "reports it at some only; leave `every_n_evals` and `every_n_steps` at their defaults."
            )
        if bool(args.greater_is_better) != self.greater_is_better and state.is_world_process_zero:
            better, said = ("higher", "") if self.greater_is_better else ("lower", _DEFAULT)
            warnings.warn(
                f'`metric_for_best_model="{metric}"` is better when it is {better}, but `greater_is_better` is '
                f"{not self.greater_is_better}{said}: the run would keep its worst checkpoint. Set "
                f"`greater_is_better={self.greater_is_better}`.",
                CoverageWarning,
                stacklevel=2,
            )


def evaluation_prefix(logs: dict[str, Any]) -> str | None:
    """The prefix of an evaluation's log entry, `eval_`, `test_` or `eval_<dataset>_`; None for any other entry.

    An entry is an evaluation's if `Trainer.evaluate` is writing it, and it reports its runtime: a user may log
    `data_runtime` in a training, and anything in an evaluation.

    Example:
        >>> print(evaluation_prefix({"eval_runtime": 0.5}))  # no Trainer evaluates here
        None
    """
    for frame in frames(Trainer):
        if frame.f_code.co_name == "evaluate" and "metric_key_prefix" in frame.f_locals:
            prefix = f"{frame.f_locals['metric_key_prefix']}_"
            return prefix if f"{prefix}runtime" in logs else None
    return None


def _evaluation_of_several() -> Any:
    """What stands for the running evaluation on a dict of datasets, by identity; None for any other evaluation.

    It is the dict in which `Trainer.evaluate` gathers the metrics of this one call, and no other's as long as it is
    held. Where a Trainer gathers them in another way every dataset is answered on its own.
    """
    for frame in frames(Trainer):
        if frame.f_code.co_name == "evaluate" and isinstance(frame.f_locals.get("eval_dataset"), dict):
            return frame.f_locals.get("metrics")
    return None


def _calling_handler(callback: TrainerCallback) -> CallbackHandler:
    """The handler that is calling an event of this callback: the Trainer offers no way to place one in its list."""
    for handler in callers(CallbackHandler):
        if any(item is callback for item in handler.callbacks):
            return handler
    raise RuntimeError(
        f"{type(callback).__name__} must be called by the `CallbackHandler` of a Trainer that holds it: pass it in "
        "`callbacks=[...]` or to `trainer.add_callback`, not inside another callback."
    )


def _stamp(model: torch.nn.Module) -> list[Any]:
    """What changes when weights, buffers, adapters or hooks of this process's part of a model do."""
    with torch.no_grad():
        tensors = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
        local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
        sums = [float(t.sum(dtype=torch.float32)) for t in local]
    modules = list(model.modules())
    switches = [repr([getattr(module, name, None) for name in _SWITCHES]) for module in modules]
    hooks = [id(hook) for m in modules for kind in (m._forward_pre_hooks, m._forward_hooks) for hook in kind.values()]
    return [sums, switches, hooks]


def _on_all_processes(condition: bool) -> bool:
    """Whether a condition holds on every process of the job, which all of them must ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return condition
    answers: list[bool] = [condition] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, condition)
    return all(answers)
