"""What every callback that adds metrics to an evaluation owes its Trainer; a new one joins by a line in FACTORIES."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import default_compute_objective

from hf_coverage.decode.success_callback import SuccessCallback
from hf_coverage.measure.callback import CoverageCallback, CoverageWarning
from hf_coverage.select.callback import TournamentCallback
from tests.measure.callback_runs import (
    VOCABULARY,
    StopAt,
    coverage_history,
    make_trainer,
    reference_corpus,
    tiny_model,
    token_rows,
    without_times,
)

N = (2, 4)

QUESTIONS = Dataset.from_dict({"prompt": [[2 + row % 10, 2 + row // 2] for row in range(16)]})


def begins_even(completions):
    return [float(completion[0] % 2 == 0) for completion in completions]


def success(**options):
    return SuccessCallback(QUESTIONS, begins_even, k=4, max_new_tokens=2, timeout=None, **options)


# Those that count evaluations, and so have something to remember in a checkpoint.
COUNTING = {
    "coverage": lambda **options: CoverageCallback(reference_corpus(), N, **options),
    "coverage, plain corpus": lambda **options: CoverageCallback(reference_corpus("samples"), N, **options),
    "tournament": lambda **options: TournamentCallback(reference_corpus("samples"), N, **options),
}
FACTORIES = COUNTING | {"success": success}


@pytest.fixture(params=FACTORIES.values(), ids=FACTORIES.keys())
def make_callback(request):
    return request.param


@pytest.fixture(params=COUNTING.values(), ids=COUNTING.keys())
def make_counting(request):
    return request.param


class Recorder(TrainerCallback):
    """Stands for a reporter: remembers the keys that were there when its turn came."""

    def __init__(self):
        self.logged, self.evaluated = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluated.append(dict(metrics))


def is_evaluation(logs):
    return any(key.endswith("_runtime") and not key.startswith("train") for key in logs)


@pytest.mark.parametrize("ours_first", [True, False])
def test_values_reach_history_reporters_and_other_callbacks(tmp_path, make_callback, ours_first):
    callback, recorder = make_callback(), Recorder()
    order = (callback, recorder) if ours_first else (recorder, callback)
    trainer = make_trainer(tmp_path, *order)
    trainer.train()
    wanted = {f"eval_{name}" for name in callback.metric_names()}
    evaluations = [entry for entry in trainer.state.log_history if is_evaluation(entry)]
    logged = [logs for logs in recorder.logged if is_evaluation(logs)]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6, 8]
    for entry, logs, metrics in zip(evaluations, logged, recorder.evaluated, strict=True):
        assert wanted <= entry.keys()
        assert {key: entry[key] for key in wanted} == {key: logs[key] for key in wanted}
        assert {key: entry[key] for key in wanted} == {key: metrics[key] for key in wanted}
        assert all(type(entry[key]) is float for key in wanted)
    others = [logs for logs in recorder.logged if not is_evaluation(logs)]
    assert any("train_loss" in logs for logs in others)
    assert not any(key.endswith(name) for name in callback.metric_names() for logs in others for key in logs)


# Its new name, `activation_checkpointing_enable`, is not yet in all versions of transformers that are supported.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_training_is_not_changed(tmp_path, make_callback):
    def checkpointed():
        model = tiny_model()
        model.gradient_checkpointing_enable()
        return model

    plain = make_trainer(tmp_path / "plain", model=checkpointed(), gradient_accumulation_steps=2)
    plain.train()
    ours = (make_callback(), make_callback(every_n_steps=1, name="own"))
    watched = make_trainer(tmp_path / "watched", *ours, model=checkpointed(), gradient_accumulation_steps=2)
    watched.train()
    untrained = tiny_model().state_dict()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    assert not torch.equal(untrained["transformer.wte.weight"], plain.model.state_dict()["transformer.wte.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_are_left_as_they_were(tmp_path, make_callback, training):
    trainer = make_trainer(tmp_path, callback := make_callback())
    model = trainer.model.train(training)
    model.transformer.h[0].train(not training)
    before = [module.training for module in model.modules()]
    generator, config = torch.get_rng_state(), model.config.to_dict()
    callback.compute_metrics(trainer.args, trainer.state, model, None)
    assert before == [module.training for module in model.modules()]
    assert torch.equal(generator, torch.get_rng_state())
    assert config == model.config.to_dict()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_best_model_is_the_one_with_the_best_value(tmp_path, make_callback):
    metric, greater = make_callback().metric_names()[-1], make_callback().greater_is_better
    trainer = make_trainer(
        tmp_path,
        make_callback(),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=greater,
        learning_rate=0.3,
    )
    trainer.train()
    assert trainer.evaluate()[f"eval_{metric}"] == trainer.state.best_metric
    values = values_of_checkpoints(trainer, f"eval_{metric}")
    best, worst = (max, min) if greater else (min, max)
    assert trainer.state.best_metric == best(values.values()) != worst(values.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best(values, key=values.get)}")


def test_best_model_of_a_trainer_that_logs_a_copy_of_its_metrics(tmp_path, make_callback):
    metric, greater = make_callback().metric_names()[0], make_callback().greater_is_better
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
    trainer = make_trainer(tmp_path, make_callback(), **best)
    log = trainer.log
    trainer.log = lambda logs, *args: log({**logs, "extra": 1.0}, *args)
    trainer.train()
    best = max if greater else min
    assert trainer.state.best_metric == best(values_of_checkpoints(trainer, f"eval_{metric}").values())


@pytest.mark.parametrize("ours_first", [True, False])
def test_early_stopping_sees_the_metric(tmp_path, make_callback, ours_first):
    ours, stopping = make_callback(), EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(
        tmp_path,
        *((ours, stopping) if ours_first else (stopping, ours)),
        load_best_model_at_end=True,
        metric_for_best_model=ours.metric_names()[0],
        greater_is_better=ours.greater_is_better,
        learning_rate=0.0,
    )
    trainer.train()
    # With a rate of zero the second evaluation cannot be better than the first.
    assert trainer.state.global_step == 4


def test_evaluation_without_training(tmp_path, make_callback):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder)
    trainer.add_callback(callback := make_callback())
    metrics = trainer.evaluate(metric_key_prefix="test")
    wanted = {f"test_{name}" for name in callback.metric_names()}
    assert wanted <= metrics.keys()
    assert wanted <= recorder.logged[0].keys()
    assert wanted <= trainer.state.log_history[-1].keys()
    assert not wanted & trainer.predict(token_rows(4)).metrics.keys()


def test_dict_of_datasets(tmp_path, make_callback):
    callback = make_callback()
    metric = callback.metric_names()[0]
    trainer = make_trainer(
        tmp_path,
        callback,
        eval_dataset={"code": token_rows(4, seed=6), "prose": token_rows(4, seed=7)},
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_code_{metric}",
        greater_is_better=callback.greater_is_better,
    )
    calls = []
    compute = callback.compute_metrics
    callback.compute_metrics = lambda args, state, *rest: (
        calls.append(state.global_step) or compute(args, state, *rest)
    )
    trainer.train()
    assert calls == [2, 4, 6, 8]  # the corpus is scored once, not once a dataset
    for dataset in ("code", "prose"):
        assert len(coverage_history(trainer, f"eval_{dataset}_{metric}")) == 4
    assert trainer.state.best_metric is not None


def test_the_order_of_several_is_settled_once(tmp_path, make_callback):
    first, second = make_callback(), make_callback(name="second")
    trainer = make_trainer(tmp_path, Recorder(), first, second)
    assert trainer.callback_handler.callbacks[:2] == [first, second]
    trainer.train()
    assert trainer.callback_handler.callbacks[:2] == [first, second]
    name = first.metric_names()[0]
    assert all(
        entry[f"eval_second_{name}"] == entry[f"eval_{name}"] for entry in coverage_history(trainer, f"eval_{name}")
    )


def test_two_that_report_the_same_are_refused(tmp_path, make_callback):
    with pytest.raises(ValueError, match=r"Two callbacks would both report .*: give one of them a `name`"):
        make_trainer(tmp_path, make_callback(), make_callback())


def test_a_metric_that_is_already_there_is_refused(tmp_path, make_callback):
    callback = make_callback()
    metric = callback.metric_names()[0]
    trainer = make_trainer(tmp_path, callback)
    trainer.compute_metrics = lambda predictions: {metric: 0.0}
    with pytest.raises(ValueError, match=rf"`eval_{metric}` is already among the values of this evaluation"):
        trainer.evaluate()


def test_a_training_without_evaluations_is_warned_of(tmp_path, make_callback):
    trainer = make_trainer(tmp_path, make_callback(), eval_strategy="no", max_steps=1)
    with pytest.warns(CoverageWarning, match="this training has none: set `eval_strategy`"):
        trainer.train()


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, make_counting, restore):
    settings = {"eval_steps": 1, "save_steps": 1, "restore_callback_states_from_checkpoint": restore}
    whole = make_trainer(tmp_path / "whole", make_counting(every_n_evals=3), **settings)
    whole.train()
    folder = tmp_path / "parts"
    # Stop after evaluation 5, which an uncounted restart would take for the first one.
    make_trainer(folder, make_counting(every_n_evals=3), StopAt(5), **settings).train()
    moved = folder.rename(tmp_path / "moved")
    resumed = make_trainer(moved, Recorder(), make_counting(every_n_evals=3), **settings)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-5"))
    key = f"eval_{make_counting().metric_names()[0]}"
    assert [entry["step"] for entry in coverage_history(whole, key)] == [1, 4, 7]
    assert without_times(coverage_history(whole, key)) == without_times(coverage_history(resumed, key))
    ours = type(make_counting())
    assert isinstance(resumed.callback_handler.callbacks[0], ours)
    assert saved_state(tmp_path / "whole", ours) == saved_state(moved, ours)


@pytest.mark.parametrize("restore", [False, True])
def test_several_are_resumed_each_from_its_own_state(tmp_path, make_counting, restore):
    settings = {"eval_steps": 1, "save_steps": 1, "restore_callback_states_from_checkpoint": restore}

    def callbacks():
        return make_counting(every_n_evals=3), make_counting(every_n_steps=2, name="own")

    make_trainer(tmp_path, *callbacks(), StopAt(5), **settings).train()
    resumed = make_trainer(tmp_path, *callbacks(), **settings)
    resumed.train(resume_from_checkpoint=True)
    metric = make_counting().metric_names()[0]
    assert [entry["step"] for entry in coverage_history(resumed, f"eval_{metric}")] == [1, 4, 7]
    assert [entry["step"] for entry in coverage_history(resumed, f"eval_own_{metric}")] == [2, 4, 6, 8]
    first, second = resumed.callback_handler.callbacks[:2]
    assert (first.name, second.name) == (None, "own")


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_begun_without_the_callback_goes_on_with_it(tmp_path, make_counting, restore):
    make_trainer(tmp_path, StopAt(2)).train()
    trainer = make_trainer(tmp_path, make_counting(), restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=True)
    key = f"eval_{make_counting().metric_names()[0]}"
    assert [entry["step"] for entry in coverage_history(trainer, key)] == [4, 6, 8]
    assert saved_state(tmp_path, type(make_counting()))["attributes"]


def values_of_checkpoints(trainer, key: str) -> dict[int, float]:
    """What evaluating each checkpoint after the training gives, which need not be what the log of its step says."""
    values = {}
    for step in (2, 4, 6, 8):
        weights = Path(trainer.args.output_dir) / f"checkpoint-{step}" / "model.safetensors"
        trainer.model.load_state_dict(load_file(weights), strict=False)  # tied weights are saved once
        values[step] = trainer.evaluate()[key]
    return values


def saved_state(folder: Path, callback_class: type) -> dict:
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    return state["stateful_callbacks"][callback_class.__name__]


def spied(callback):
    """Count what a callback computes."""
    calls, compute = [], callback.compute_metrics
    callback.compute_metrics = lambda args, state, *rest: (
        calls.append(state.global_step) or compute(args, state, *rest)
    )
    return calls


class Doubling(torch.nn.Module):
    """An adapter: what it does is in no parameter, and only a switch says whether it does it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.active_adapters = inner, []
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden):
        return self.inner(hidden) * (3.0 if self.active_adapters else 1.0) + self.shift * torch.arange(VOCABULARY)


def switch(model):
    model.lm_head.active_adapters = ["on"]


def move_buffer(model):
    model.lm_head.shift += 1.0


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3.0)


def move_weights(model):
    with torch.no_grad():
        model.lm_head.inner.weight.mul_(3.0)


CHANGES = {"adapter": switch, "buffer": move_buffer, "hook": hook, "weights": move_weights}


@pytest.mark.parametrize("several", [False, True], ids=["two evaluations", "one on two datasets"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_is_remembered_of_a_model_that_predicts_something_else(tmp_path, change, several):
    model = tiny_model(dropout=0.0)
    model.config.tie_word_embeddings = False
    model.lm_head = Doubling(torch.nn.Linear(16, VOCABULARY, bias=False))

    class Switching(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            if several and not changed:
                changed.append(change(model))

    changed = []
    datasets = {"a": token_rows(4), "b": token_rows(4, seed=6)}
    trainer = make_trainer(tmp_path, FACTORIES["coverage"](), Switching(), model=model, eval_dataset=datasets)
    if several:
        metrics = trainer.evaluate()
        before, after = metrics["eval_a_kl"], metrics["eval_b_kl"]
    else:
        before = trainer.evaluate()["eval_b_kl"]
        change(model)
        after = trainer.evaluate()["eval_b_kl"]
    assert abs(after - before) > 1e-2
    assert after == pytest.approx(trainer.evaluate(token_rows(4))["eval_kl"], abs=1e-9)


def test_a_dict_of_datasets_is_answered_once_each_time(tmp_path, make_callback):
    callback = make_callback()
    calls = spied(callback)
    trainer = make_trainer(tmp_path, callback, eval_dataset={"a": token_rows(4), "b": token_rows(4)})
    trainer.evaluate()
    trainer.evaluate()
    assert calls == [0, 0]


class Interrupt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_training_that_broke_off_is_over(tmp_path, make_callback, error):
    callback = make_callback(**({"every_n_steps": 3} if make_callback is success else {"every_n_evals": 3}))
    trainer = make_trainer(tmp_path, callback, Interrupt(3, error))
    with pytest.raises(type(error)):
        trainer.train()
    rows = sorted(tmp_path.glob("tournament/step-*"))
    for _ in range(2):  # asked for, so answered, whatever the schedule
        assert f"eval_{callback.metric_names()[0]}" in trainer.evaluate()
    assert sorted(tmp_path.glob("tournament/step-*")) == rows


def test_one_instance_serves_one_trainer_after_the_other(tmp_path, make_callback):
    callback = make_callback()
    key = f"eval_{callback.metric_names()[0]}"
    histories = []
    for name in ("first", "second"):
        trainer = make_trainer(tmp_path / name, callback)
        trainer.evaluate()
        trainer.train()
        histories.append(without_times(coverage_history(trainer, key)))
        assert [entry["step"] for entry in histories[-1]] == [2, 4, 6, 8]
    assert histories[0] == histories[1]
    if isinstance(callback, TournamentCallback):
        for name in ("first", "second"):
            rows = sorted(path.name for path in (tmp_path / name / "tournament").glob("step-*"))
            assert rows == ["step-2", "step-4", "step-6", "step-8"]


def test_a_retry_with_smaller_batches_has_all_rows(tmp_path, make_callback):
    failed = []

    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not failed:
                failed.append(True)
                raise RuntimeError("CUDA out of memory.")

    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, OutOfMemory(), auto_find_batch_size=True, learning_rate=0.0)
    trainer.train()
    key = f"eval_{callback.metric_names()[0]}"
    assert failed
    assert [entry["step"] for entry in coverage_history(trainer, key)] == [2, 4, 6, 8]
    if isinstance(callback, TournamentCallback):
        assert len(list(tmp_path.glob("tournament/step-*"))) == 4


def test_one_that_joins_in_mid_run_is_saved_and_reports(tmp_path, make_callback):
    callback = make_callback()

    class Join(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.add_callback(callback)

    trainer = make_trainer(tmp_path, Join())
    trainer.train()
    key = f"eval_{callback.metric_names()[0]}"
    assert [entry["step"] for entry in coverage_history(trainer, key)] == [4, 6, 8]
    if not isinstance(callback, SuccessCallback):
        assert saved_state(tmp_path, type(callback))["attributes"]


@pytest.mark.parametrize("schedule", [{}, {"every_n_evals": 2}, {"every_n_steps": 4}, {"every_n_steps": 3}], ids=str)
def test_the_trainer_can_write_its_model_card(tmp_path, make_callback, schedule):
    if make_callback is success and "every_n_evals" in schedule:
        pytest.skip("it is at every evaluation or at steps of its own")
    trainer = make_trainer(tmp_path, make_callback(**schedule))
    trainer.train()
    trainer.create_model_card()
    assert "Validation Loss" in (tmp_path / "README.md").read_text()


def test_a_users_key_is_no_evaluation(tmp_path, make_callback):
    class Logging(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"data_runtime": 1.0, "eval_runtime": 2.0})

    callback = make_callback()
    calls = spied(callback)
    trainer = make_trainer(tmp_path, callback, Logging())
    trainer.compute_metrics = lambda predictions: trainer.log({"data_runtime": 1.0}) or {"data_runtime": 1.0}
    trainer.train()
    assert calls == [2, 4, 6, 8]
    assert not any(key.startswith("data_") and key != "data_runtime" for e in trainer.state.log_history for key in e)


@pytest.mark.parametrize("kind", ["KTOTrainer", "GRPOTrainer", "RLOOTrainer"])
def test_a_trainer_that_logs_a_kl_of_its_own_is_told_at_the_start(tmp_path, kind):
    def trainer(callback, beta=0.1):
        made = make_trainer(tmp_path, callback, max_steps=1, eval_strategy="no")
        made.__class__ = type(kind, (type(made),), {})
        made.args.beta = beta
        return made

    with pytest.raises(ValueError, match=f"`eval_kl` is what {kind} logs"):
        trainer(FACTORIES["coverage"]()).train()
    for accepted in (trainer(FACTORIES["coverage"](name="held-out")), trainer(FACTORIES["coverage"](), beta=0.0)):
        with pytest.warns(CoverageWarning, match="has none"):
            accepted.train()


def begin(self, state):
    """Begin a training as a method of the Trainer does, which callbacks find by that name."""
    self.callback_handler.on_train_begin(self.args, state, self.control)


def test_a_search_that_sums_all_metrics_is_refused(tmp_path):
    callback = FACTORIES["coverage"]()
    trainer = make_trainer(tmp_path, callback)
    trainer.compute_objective = default_compute_objective
    state = TrainerState(is_hyper_param_search=True)
    with pytest.raises(ValueError, match=r"`hyperparameter_search` would minimise the sum of all metrics"):
        begin(trainer, state)
    trainer.compute_objective = lambda metrics: metrics["eval_loss"]
    begin(trainer, state)


def test_processes_with_different_corpora_are_refused(tmp_path, make_callback, monkeypatch):
    trainer = make_trainer(tmp_path, make_callback(), max_steps=2)
    monkeypatch.setattr(
        "hf_coverage.inference.evaluation_callback.gather_object",
        lambda own: [*own, own[0] | {"corpus": "other", "prompts": "other"}],
    )
    with pytest.raises(ValueError, match=r"`(corpus|prompts)` is '.*' on process 0 and 'other' on process 1"):
        trainer.train()
