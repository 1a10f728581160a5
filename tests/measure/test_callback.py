"""CoverageCallback in real Trainer runs of one process: its numbers, reporters, schedule, warnings and resumption."""

import gc
import json
import logging
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_coverage.inference import evaluation_callback
from hf_coverage.measure import callback as callback_module
from hf_coverage.measure import corpus_callback
from hf_coverage.measure.callback import CoverageCallback, CoverageWarning
from hf_coverage.measure.scoring import Scores
from tests.measure.callback_runs import (
    StopAt,
    coverage_history,
    make_trainer,
    metrics_by_definition,
    reference_corpus,
    tiny_model,
    token_rows,
)

N = (2, 5.7)


def test_values_are_those_of_the_definition(tmp_path):
    callback = CoverageCallback(reference_corpus(), N)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    expected = metrics_by_definition(trainer.model, reference_corpus(), N)
    last = coverage_history(trainer)[-1]
    assert last["step"] == 8
    assert {key: last[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert last["eval_cov_2_stderr"] == pytest.approx(callback.profile.metrics(N)["cov_2_stderr"])
    assert callback.profile.num_groups == 4
    assert callback.profile.cov(2) == last["eval_cov_2"]


def test_plain_corpus_reports_bounds_under_their_own_name(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus("samples"), N))
    metrics = trainer.evaluate()
    assert "eval_cov_upper_2" in metrics
    assert not any(key.startswith(("eval_cov_2", "eval_kl")) for key in metrics)


def test_tensorboard_has_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N), report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.glob("runs/*/events*")
    reader = EventAccumulator(str(events)).Reload()
    for name in ("cov_2", "cov_5.7", "kl", "sequence_cross_entropy"):
        written = [(event.step, event.value) for event in reader.Scalars(f"eval/{name}")]
        expected = [(entry["step"], entry[f"eval_{name}"]) for entry in coverage_history(trainer)]
        assert [step for step, _ in written] == [2, 4, 6, 8]
        np.testing.assert_allclose(np.array(written), np.array(expected), rtol=1e-6)


# trackio opens the database of a run that is being written, and leaves it to the garbage collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_trackio_has_the_values(tmp_path, monkeypatch):
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = make_trainer(
        tmp_path, CoverageCallback(reference_corpus(), N), report_to="trackio", project="coverage", run_name="watched"
    )
    trainer.train()
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("coverage", "watched")
    written = [row["eval/cov_2"] for row in rows if "eval/cov_2" in row]
    assert written == [entry["eval_cov_2"] for entry in coverage_history(trainer)]


def test_infinite_kl_is_reported_and_breaks_nothing(tmp_path, monkeypatch):
    scores = crafted_scores([[-math.inf, -1.0, -2.0]] * 4)
    monkeypatch.setattr(corpus_callback, "score_encoded", scores)
    trainer = make_trainer(
        tmp_path,
        CoverageCallback(reference_corpus(rows=3), N),
        report_to="tensorboard",
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=False,
    )
    trainer.train()
    assert coverage_history(trainer)[0]["eval_kl"] == math.inf
    assert "eval_kl_stderr" not in coverage_history(trainer)[0]
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["log_history"][0]["eval_kl"] == math.inf
    assert saved["best_model_checkpoint"] is None


def test_text_is_tokenised_by_the_processing_class_or_the_given_tokenizer(tmp_path):
    pairs = Dataset.from_dict({"prompt": ["a b"], "completion": [" c d"], "reference_logprob": [-4.0]})
    tokenizer = word_tokenizer()
    given = make_trainer(tmp_path, CoverageCallback(pairs, N, tokenizer=tokenizer)).evaluate()
    found = make_trainer(tmp_path, CoverageCallback(pairs, N), processing_class=tokenizer).evaluate()
    ids = Dataset.from_dict({"prompt": [[2, 3]], "completion": [[4, 5]], "reference_logprob": [-4.0]})
    assert given["eval_kl"] == found["eval_kl"]
    assert found["eval_kl"] == pytest.approx(metrics_by_definition(tiny_model(), ids, N)["kl"], rel=1e-5)
    ended = make_trainer(tmp_path, CoverageCallback(pairs, N, tokenizer=tokenizer, append_eos=True)).evaluate()
    ids = Dataset.from_dict({"prompt": [[2, 3]], "completion": [[4, 5, 1]], "reference_logprob": [-4.0]})
    assert ended["eval_kl"] == pytest.approx(metrics_by_definition(tiny_model(), ids, N)["kl"], rel=1e-5)
    with pytest.raises(ValueError, match="`tokenizer` must be given for a corpus of text"):
        make_trainer(tmp_path, CoverageCallback(pairs, N))


def test_corpus_may_be_a_saved_one(tmp_path):
    reference_corpus().save_to_disk(str(tmp_path / "corpus"))
    metrics = make_trainer(tmp_path, CoverageCallback(tmp_path / "corpus", N)).evaluate()
    assert metrics["eval_kl"] == make_trainer(tmp_path, CoverageCallback(reference_corpus(), N)).evaluate()["eval_kl"]


@pytest.mark.parametrize(
    ("arguments", "settings", "steps"),
    [
        ({}, {"eval_on_start": True}, [0, 2, 4, 6, 8]),
        ({}, {"eval_strategy": "epoch", "save_strategy": "epoch"}, [8]),
        ({"every_n_evals": 3}, {}, [2, 8]),
        ({"every_n_steps": 3}, {}, [3, 6]),
        ({"every_n_steps": 3}, {"eval_strategy": "no"}, [3, 6]),
        ({"every_n_steps": 4}, {"logging_strategy": "no"}, [4, 8]),
        ({"every_n_steps": 4}, {"eval_strategy": "no", "logging_strategy": "no"}, [4, 8]),
    ],
)
def test_schedule(tmp_path, arguments, settings, steps):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N, **arguments), **settings)
    trainer.train()
    assert [entry["step"] for entry in coverage_history(trainer)] == steps
    # Where somebody asks for an evaluation after the training, the answer is complete.
    assert "eval_kl" in trainer.evaluate()


def test_own_steps_report_under_the_evaluation_prefix(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N, every_n_steps=3))
    trainer.train()
    at_three, at_six = coverage_history(trainer)
    assert "loss" in at_three
    assert "eval_loss" not in at_three
    assert "eval_loss" not in at_six  # an entry of its own: tables of evaluations want the same values in each
    assert any("eval_loss" in entry and entry["step"] == 6 for entry in trainer.state.log_history)


def test_looking_for_the_handler_keeps_no_model_alive(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N))
    gc.collect()
    gc.disable()  # so that nothing but the count of references can free it
    try:
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        handler = weakref.ref(trainer.callback_handler)
        del trainer.callback_handler
        assert handler() is None
    finally:
        gc.enable()


def test_evaluations_of_other_weights_at_one_step_are_told_apart(tmp_path):
    callback = CoverageCallback(reference_corpus(), N)
    trainer = make_trainer(tmp_path, callback)
    before = trainer.evaluate(metric_key_prefix="eval_raw")["eval_raw_kl"]
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3.0)
    after = trainer.evaluate(metric_key_prefix="eval_averaged")["eval_averaged_kl"]
    assert before != after
    assert after == pytest.approx(metrics_by_definition(trainer.model, reference_corpus(), N)["kl"], rel=1e-5)


def test_mixed_precision(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N), bf16=True)
    trainer.train()
    expected = metrics_by_definition(trainer.model, reference_corpus(), N)["kl"]
    assert coverage_history(trainer)[-1]["eval_kl"] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("metric", ["cov_2", "eval_cov_2", "eval_kl", "eval_code_sequence_cross_entropy"])
def test_wrong_direction_of_the_best_metric_is_warned_of(tmp_path, metric):
    datasets = {"code": token_rows(4)} if "code" in metric else token_rows(4)
    trainer = make_trainer(
        tmp_path,
        CoverageCallback(reference_corpus(), N),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        eval_dataset=datasets,
    )
    with pytest.warns(CoverageWarning, match=f"{metric}.* is better when it is lower.*Set `greater_is_better=False`"):
        trainer.train()


@pytest.mark.parametrize("schedule", [{"every_n_evals": 2}, {"every_n_steps": 2}])
def test_best_metric_that_would_be_missing_is_refused(tmp_path, schedule):
    trainer = make_trainer(
        tmp_path,
        CoverageCallback(reference_corpus(), N, **schedule),
        load_best_model_at_end=True,
        metric_for_best_model="cov_2",
        greater_is_better=False,
    )
    with pytest.raises(ValueError, match="read at every evaluation, but this CoverageCallback"):
        trainer.train()


def test_other_best_metrics_are_none_of_its_business(tmp_path):
    callback = CoverageCallback(reference_corpus(), N, every_n_evals=2)
    trainer = make_trainer(tmp_path, callback, load_best_model_at_end=True, metric_for_best_model="loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()


@pytest.mark.parametrize("save_only_model", [False, True])
def test_worsening_is_reported_once_and_names_the_best_checkpoint(tmp_path, monkeypatch, save_only_model):
    monkeypatch.setattr(corpus_callback, "score_encoded", crafted_scores(FALLING_THEN_RISING))
    trainer = make_trainer(tmp_path, CoverageCallback(one_answer(), (2, 16)), save_only_model=save_only_model)
    with pytest.warns(CoverageWarning) as caught:
        trainer.train()
    (message,) = [str(warning.message) for warning in caught if warning.category is CoverageWarning]
    assert "From step 4 to step 6, miss_16 went up from 0.1877 to 0.4464 (lower is better)" in message
    assert "cross-entropy fell from 2.7 to 2.44 nats a response" in message
    assert "paired test over the same 40 rows" in message
    assert f"step 4 ({tmp_path / 'checkpoint-4'})" in message


def test_worsening_is_reported_once_over_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_callback, "score_encoded", crafted_scores(FALLING_THEN_RISING[:2]))
    make_trainer(tmp_path, CoverageCallback(one_answer(), (2, 16)), StopAt(4)).train()
    monkeypatch.setattr(corpus_callback, "score_encoded", crafted_scores(FALLING_THEN_RISING[2:]))
    resumed = make_trainer(tmp_path, CoverageCallback(one_answer(), (2, 16)))
    with pytest.warns(CoverageWarning, match="From step 4 to step 6") as caught:
        resumed.train(resume_from_checkpoint=True)
    assert len([warning for warning in caught if warning.category is CoverageWarning]) == 1


def test_a_corpus_too_small_to_warn_from_is_logged_once_a_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_coverage"):
        trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N))
        trainer.evaluate()
        assert "too few to warn from" not in caplog.text  # nothing is watched outside of a training
        trainer.train()
    (record,) = [record for record in caplog.records if "too few to warn from" in record.message]
    assert record.message.startswith(
        "4 prompts are too few to warn from: that a twentieth of the responses is given up"
    )
    assert "in miss_5.7, for which it takes 361 prompts or more" in record.message


def test_a_corpus_large_enough_to_warn_from_is_not_spoken_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(callback_module, "prompts_to_warn", lambda: 4)
    with caplog.at_level(logging.WARNING, logger="hf_coverage"):
        make_trainer(tmp_path, CoverageCallback(reference_corpus(), N)).train()
    assert "too few to warn from" not in caplog.text


def test_best_evaluation_that_was_not_saved_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_callback, "score_encoded", crafted_scores(FALLING_THEN_RISING))
    trainer = make_trainer(tmp_path, CoverageCallback(one_answer(), (2, 16)), save_strategy="no")
    with pytest.warns(CoverageWarning, match=r"step 4 \(not saved as a checkpoint\)"):
        trainer.train()
    assert not (tmp_path / "coverage").exists()


def test_a_new_training_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_callback, "score_encoded", crafted_scores(FALLING_THEN_RISING[1:3]))
    trainer = make_trainer(tmp_path, CoverageCallback(one_answer(), (2, 16)), eval_steps=8, save_strategy="no")
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()  # the worsened second scores are the first of this training


def test_resuming_with_another_corpus_does_not_compare_with_the_old_one(tmp_path):
    make_trainer(tmp_path, CoverageCallback(reference_corpus(rows=24), N), StopAt(4)).train()
    other = CoverageCallback(reference_corpus(rows=16), N)
    make_trainer(tmp_path, other).train(resume_from_checkpoint=True)
    assert other.progress["watch"]["evaluations"] == 2


def test_restored_callback_needs_no_tokenizer(tmp_path):
    pairs = Dataset.from_dict(
        {"prompt": ["a b", "b"], "completion": [" c d", " a"], "reference_logprob": [-4.0, -1.0]}
    )
    settings = {"restore_callback_states_from_checkpoint": True}
    whole = make_trainer(tmp_path / "whole", CoverageCallback(pairs, N, tokenizer=word_tokenizer()))
    whole.train()
    make_trainer(tmp_path, CoverageCallback(pairs, N, tokenizer=word_tokenizer()), StopAt(4)).train()
    resumed = make_trainer(tmp_path, CoverageCallback(pairs, N, tokenizer=word_tokenizer()), **settings)
    resumed.train(resume_from_checkpoint=True)
    rebuilt = resumed.callback_handler.callbacks[0]
    assert rebuilt.tokenizer is None
    assert coverage_history(resumed)[-1]["eval_kl"] == coverage_history(whole)[-1]["eval_kl"]
    assert resumed.state.global_step == 8


def test_corpus_none_without_a_kept_one(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(None, N))
    with pytest.raises(FileNotFoundError, match="`corpus` is None, and no earlier part of this run kept one"):
        trainer.train()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [2] * 10, "completion": [3] * 10}, r"Row 1 has 10 prompt and 10 response tokens.*takes 16"),
        ({"prompt": [2], "completion": [12]}, r"Row 1 has token id 12, expected ids in \[0, 12\)"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused_before_the_training(tmp_path, row, message):
    corpus = Dataset.from_list([{"prompt": [2], "completion": [3]}, row])
    trainer = make_trainer(tmp_path, CoverageCallback(corpus, N))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# TRL sets `gradient_checkpointing`, whose new name is not yet in all versions of transformers that it supports.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trl_trainer(tmp_path):
    trl = pytest.importorskip("trl")

    rows = Dataset.from_dict({"text": ["a b c d", "d c b a"] * 4})
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True, "report_to": "none"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": False, "save_steps": 1}
    trainer = trl.SFTTrainer(
        model=tiny_model(),
        args=trl.SFTConfig(str(tmp_path), dataset_text_field="text", bf16=False, max_length=8, **settings, **best),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
        callbacks=[CoverageCallback(reference_corpus(), N)],
    )
    trainer.train()
    assert trainer.state.best_metric == min(entry["eval_kl"] for entry in coverage_history(trainer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": ()}, "`n` must name at least one N"),
        ({"n": (0.5,)}, "`n` must be a finite number >= 1"),
        ({"watch_n": 0}, "`watch_n` must be a finite number >= 1"),
        ({"every_n_evals": 0}, "`every_n_evals` must be a whole number >= 1"),
        ({"every_n_steps": 2.5}, "`every_n_steps` must be a whole number >= 1"),
        ({"every_n_evals": 2, "every_n_steps": 2}, "give only one of them"),
        ({"name": "a b"}, "`name` becomes part of metric names"),
        ({"groups": "document"}, r"`groups` must be a column of the corpus, one of \['prompt', 'completion'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoverageCallback(reference_corpus(), **arguments)


def test_answer_level_scores_are_refused():
    scored = reference_corpus().add_column("answer_logprob", [-1.0] * 24)
    with pytest.raises(ValueError, match="use `score_answers`"):
        CoverageCallback(scored)


def test_being_called_by_something_else_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="must be called by the `CallbackHandler` of a Trainer that holds it"):
        CoverageCallback(reference_corpus()).on_init_end(trainer.args, trainer.state, trainer.control)


# log p of 40 rows with one right answer each; those below -log 16 = -2.77 are out of reach of 16 samples.
FALLING_THEN_RISING = [
    [-9.0] * 12 + [-2.0] * 28,
    [-9.0] * 4 + [-2.0] * 36,
    [-4.0] * 24 + [-0.1] * 16,
    [-3.0] * 28 + [-0.1] * 12,
]


def one_answer():
    columns = {"prompt": [[2 + i % 9, 2 + i // 9] for i in range(40)], "completion": [[3]] * 40}
    return Dataset.from_dict(columns | {"reference_logprob": [0.0] * 40})


def crafted_scores(evaluations):
    """A stand-in for `score_encoded` that gives these log-probabilities, one list an evaluation."""
    left = iter(evaluations)

    def score(model, encoded, **options):
        return Scores(logprob=np.array(next(left)), num_tokens=np.ones(len(encoded), dtype=np.int64))

    return score


def word_tokenizer():
    """Words a, b, c, d are tokens 2 to 5, spaces only part them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(("name", "other"), [("corpus", "another"), ("n", [4.0])])
def test_processes_that_were_given_different_things_are_refused_when_training_begins(
    tmp_path, monkeypatch, name, other
):
    monkeypatch.setattr(evaluation_callback, "gather_object", lambda own: [*own, own[0] | {name: other}])
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus("samples"), n=(2,)))
    with pytest.raises(
        ValueError, match=rf"CoverageCallback the same, but `{name}` is .* on process 1: read the corpus"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
