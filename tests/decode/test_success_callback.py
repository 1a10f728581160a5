"""SuccessCallback in real Trainers, its own numbers, and what it says; `test_callback_contract` has what all owe."""

import json
import logging
import math
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_coverage import SuccessCallback, evaluate_best_of_n
from hf_coverage.measure.callback import CoverageWarning
from tests.decode import success_ranks
from tests.decode.success_ranks import PROMPTS, begins_even, callback
from tests.measure.callback_runs import StopAt, coverage_history, make_trainer, tiny_model
from tests.measure.test_callback import word_tokenizer
from tests.processes import run

# TRL uses names that transformers has given others.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WORDS = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abcd" for b in "abcd"], "answer": [*"abcd"] * 4})


def holds_answer(completions, answer, **kwargs):
    return [float(right in completion) for completion, right in zip(completions, answer)]


def watching(**options):
    return SuccessCallback(WORDS, holds_answer, timeout=None, **options)


def grpo(folder, *callbacks, model=None, **settings):
    """A GRPOTrainer of 6 steps on 16 prompts of two words."""
    defaults = {"max_steps": 6, "num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 3}
    defaults |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "gradient_checkpointing": False}
    return GRPOTrainer(
        model=model or tiny_model(dropout=0.0),
        reward_funcs=holds_answer,
        args=GRPOConfig(output_dir=str(folder), **(defaults | settings)),
        train_dataset=WORDS,
        eval_dataset=WORDS,
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
    )


def test_the_metrics_are_those_of_best_of_n_with_the_model_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, ours := callback(group_size=3))
    trainer.train()
    logged = coverage_history(trainer, "eval_signal_3")[-1]
    sampling = {"k": 5, "max_new_tokens": 2, "timeout": None, "batch_size": 4, "progress": False}
    expected = evaluate_best_of_n(trainer.model, None, PROMPTS, begins_even, **sampling)
    assert ours.result.rewards.tolist() == expected.rewards.tolist()
    assert {n: logged[f"eval_pass@{n}"] for n in (1, 2, 4, 5)} == {n: expected.pass_at(n) for n in (1, 2, 4, 5)}
    signal = expected.success.signal(3).mixed.value
    assert logged["eval_signal_3"] == pytest.approx(signal)
    share = expected.mixed(3)
    assert logged["eval_signal_3_stderr"] == pytest.approx(share.std(ddof=1) / math.sqrt(len(share)))
    assert logged["eval_unjudged"] == 0.0
    assert ours.metric_names() == ["pass@1", "pass@2", "pass@4", "pass@5", "signal_3"]


def test_rewards_that_solve_nothing_have_the_best_of_n(tmp_path):
    metrics = make_trainer(tmp_path, ours := callback(threshold=None)).evaluate()
    assert ours.metric_names() == ["best_of_1", "best_of_2", "best_of_4", "best_of_5", "signal_5"]
    assert metrics["eval_best_of_4"] == ours.result.best_of(4).value
    assert not any("pass@" in key for key in metrics)


class Watch(TrainerCallback):
    """Notes whether the cost had been logged when the first step began."""

    def __init__(self, caplog):
        self.caplog, self.said = caplog, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.said = self.said if self.said is not None else self.caplog.text


def test_a_resumed_run_gives_the_same_figures_and_says_what_they_cost(tmp_path, caplog):
    settings = {"eval_strategy": "no", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    watch = Watch(caplog)
    with caplog.at_level(logging.WARNING):
        whole = make_trainer(tmp_path / "whole", callback(every_n_steps=3), watch, **settings)
        whole.train()
    assert (
        "Each evaluation of the SuccessCallback samples 35 responses, 5 to each of 7 prompts, and at most 70 new "
        "tokens, 2 times in this training." in watch.said
    )
    make_trainer(tmp_path / "parts", callback(every_n_steps=3), StopAt(5), **settings).train()
    resumed = make_trainer(tmp_path / "parts", callback(every_n_steps=3), **settings)
    resumed.train(resume_from_checkpoint=True)
    key = "eval_pass@1"
    assert [entry["step"] for entry in coverage_history(resumed, key)] == [3, 6]
    first, second = (
        [{name: value for name, value in entry.items() if name.startswith("eval_")} for entry in found]
        for found in (coverage_history(whole, key), coverage_history(resumed, key))
    )
    assert first == second
    assert first[0] != first[1]


def test_two_processes_report_what_one_does(tmp_path):
    run(success_ranks.__file__, tmp_path, ranks=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["processes"] == 2
    assert [entry["step"] for entry in ranks[0]["history"]] == [2, 4]
    assert [entry["step"] for entry in ranks[0]["every step"]] == [1, 2, 3, 4]
    alone = make_trainer(tmp_path / "alone", callback()).evaluate()
    assert len(ranks[0]["untrained"]) == 10
    assert ranks[0]["untrained"] == {key: alone[key] for key in ranks[0]["untrained"]}


def test_inside_grpo_it_takes_the_trainers_arguments_and_changes_nothing(tmp_path):
    settings = {"temperature": 0.9, "top_k": 4, "gradient_checkpointing": True, "eval_strategy": "steps"}
    settings |= {"eval_steps": 3, "num_generations_eval": 4, "per_device_eval_batch_size": 16}

    def trained(folder, *callbacks):
        trainer = grpo(folder, *callbacks, **settings)
        trainer.train()
        return trainer

    plain = trained(tmp_path / "plain")
    ours = watching(k=8, every_n_steps=2)
    watched = trained(tmp_path / "watched", ours, watching(k=4, name="own"))
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    assert not torch.equal(plain.model.lm_head.weight, tiny_model(dropout=0.0).lm_head.weight)
    assert [entry["step"] for entry in coverage_history(watched, "eval_pass@8")] == [2, 4, 6]
    assert [entry["step"] for entry in coverage_history(watched, "eval_own_signal_4")] == [3, 6]
    sampling = ours.result.settings["max_new_tokens"], ours.result.settings["temperature"]
    assert (*sampling, ours.result.settings["top_k"], ours.result.settings["top_p"]) == (3, 0.9, 4, None)
    assert ours.metric_names()[-1] == "signal_4"
    assert watched.model.is_gradient_checkpointing


def test_the_signal_is_what_trl_finds_in_its_groups(tmp_path):
    ours = watching(k=32, every_n_steps=4)
    trainer = grpo(tmp_path, ours, learning_rate=0.0, per_device_train_batch_size=64, max_steps=8)
    trainer.train()
    entries = coverage_history(trainer, "eval_signal_4")
    assert len({entry["eval_signal_4"] for entry in entries}) == 1  # of the same model, by the same seed
    mixed = [1 - entry["frac_reward_zero_std"] for entry in coverage_history(trainer, "frac_reward_zero_std")]
    assert len(mixed) == 8
    shares = ours.result.mixed(4)  # of 16 prompts, each of which TRL asks once a step
    error = math.sqrt((shares * (1 - shares)).sum() / 16**2 / len(mixed) + shares.var() / 16 / 8)
    assert 0.2 < entries[0]["eval_signal_4"] < 0.8
    assert abs(sum(mixed) / len(mixed) - entries[0]["eval_signal_4"]) < 2.6 * error
    signal = ours.result.success.signal(4).mixed
    assert signal.low < sum(mixed) / len(mixed) < signal.high


def test_inside_sft(tmp_path):
    settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(tmp_path), max_length=8, save_strategy="no", **settings),
        train_dataset=Dataset.from_dict({"text": ["a b c d", "b a"]}),
        processing_class=word_tokenizer(),
        callbacks=[SuccessCallback(WORDS, k=2, max_new_tokens=2, every_n_steps=1)],
    )
    trainer.train()
    assert [entry["step"] for entry in coverage_history(trainer, "eval_signal_2")] == [1, 2]


def test_a_verifier_that_fails_is_no_model_that_solves_nothing(tmp_path):
    def broken(completions):
        raise RuntimeError("no network")

    asked = {"k": 2, "max_new_tokens": 2, "timeout": None}
    trainer = make_trainer(tmp_path, SuccessCallback(PROMPTS, broken, **asked))
    with pytest.warns(CoverageWarning, match=r"14 of 14 responses could not be judged \(14 raised RuntimeError\)"):
        metrics = trainer.evaluate()
    assert metrics["eval_unjudged"] == 1.0
    assert not any("pass@" in key or "signal" in key for key in metrics)


def test_a_verifier_that_draws_leaves_the_trainings_generators_alone(tmp_path):
    def drawing(completions):
        return [float(random.random() + np.random.rand() + torch.rand(()).item() > 1.5) for _ in completions]  # noqa: NPY002

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    trainer = make_trainer(tmp_path, SuccessCallback(PROMPTS, drawing, k=2, max_new_tokens=2, timeout=None))
    before = states()
    trainer.callback_handler.callbacks[0].compute_metrics(trainer.args, trainer.state, trainer.model, None)
    assert states() == before


def test_the_worst_checkpoint_is_not_kept_without_a_word(tmp_path):
    best = {"metric_for_best_model": "pass@5", "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, callback(), max_steps=2, **best, greater_is_better=False)
    said = '`metric_for_best_model="pass@5"` is better when it is higher, but `greater_is_better` is False: the run'
    with pytest.warns(CoverageWarning, match=re.escape(said)):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be"),
        (
            {"group_size": 1},
            "`group_size` must be samples of a prompt that can be compared, from 2 to `k` = 5, but is 1",
        ),
        ({"group_size": 6}, "from 2 to `k` = 5, but is 6"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"seed": -1}, "`seed` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number"),
    ],
)
def test_what_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        callback(**options)


def test_what_is_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="`max_new_tokens` must be given to the SuccessCallback"):
        make_trainer(tmp_path, callback(max_new_tokens=None))
    with pytest.raises(ValueError, match=r"`num_generations` must be samples .* from 2 to `k` = 2, but is 4"):
        grpo(tmp_path, SuccessCallback(WORDS, k=2))
    trainer = make_trainer(tmp_path, callback(max_new_tokens=200))
    with pytest.raises(ValueError, match="with 200 new ones it does not fit into the model's 16 positions"):
        trainer.train()
    assert trainer.state.global_step == 0
