"""TournamentCallback in real trainings: what it reports, whom it keeps and loads, and how it goes on."""

import copy
import json
import re
import shlex
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_coverage import CoverageWarning, ScoreTable, score_responses, tournament
from hf_coverage.cli import app
from hf_coverage.inference.folder_lock import LOCK_FILES
from hf_coverage.measure.callback import CoverageCallback
from hf_coverage.select import callback as callback_module
from hf_coverage.select.callback import TournamentCallback
from hf_coverage.select.checkpoints import load_weights
from tests.measure.callback_runs import (
    StopAt,
    coverage_history,
    make_trainer,
    reference_corpus,
    tiny_model,
    without_times,
)
from tests.processes import Job
from tests.select import callback_runs
from tests.select.callback_runs import SetWeights, giving_up, rows_in, steps_in, train

N = (2, 8)
CORPUS = reference_corpus("samples", rows=40)
HALF, QUARTER, TENTH = slice(0, 20), slice(20, 30), slice(30, 34)

# The second gives least up; at first the others look better, for lack of a challenger.
SECOND_WINS = {2: giving_up(HALF), 4: giving_up(TENTH), 6: giving_up(HALF, TENTH), 8: giving_up(QUARTER, TENTH)}
BY_TOURNAMENT = {"load_best_model_at_end": True, "metric_for_best_model": "tournament_8", "greater_is_better": False}


def scores_of(trainer, key="eval_tournament_8"):
    return {entry["step"]: entry[key] for entry in coverage_history(trainer, key)}


def best_of(folder):
    return json.loads((folder / "tournament" / "best_checkpoint.json").read_text())


def by_marks(monkeypatch, marks):
    """Settings under which evaluations are given these marks, and the one with the lowest is the Trainer's best."""
    left, made = iter(marks), callback_runs.make_trainer

    def trainer_with_marks(*arguments, **settings):
        trainer = made(*arguments, **settings)
        trainer.compute_metrics = lambda predictions: {"mark": next(left)}
        return trainer

    monkeypatch.setattr(callback_runs, "make_trainer", trainer_with_marks)
    return {"metric_for_best_model": "mark", "greater_is_better": False}


def weights_of(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def has_weights(model, weights):
    state = model.state_dict()
    return all(torch.equal(weight, state[name]) for name, weight in weights.items())


def test_each_evaluation_is_a_tournament_over_the_checkpoints_so_far(tmp_path):
    callback = TournamentCallback(CORPUS, (8, 2))
    trainer = make_trainer(tmp_path, callback, SetWeights())
    trainer.train()
    rows = {}
    for step in (2, 4, 6, 8):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / f"checkpoint-{step}")
        rows[step] = np.array(score_responses(model, None, CORPUS, progress=False)["logprob"][:])
        np.testing.assert_array_equal(ScoreTable.open(tmp_path / "tournament" / f"step-{step}").logprob, rows[step])
        for n in (8, 2):
            worst = max(np.mean(other - rows[step] >= np.log(n)) for other in rows.values())
            assert scores_of(trainer, f"eval_tournament_{n}")[step] == pytest.approx(worst, abs=1e-12)
        expected = tournament({str(step): row for step, row in rows.items()}, 8, bootstrap=0)
        assert scores_of(trainer, "eval_tournament_winner_step")[step] == float(expected.winner)
    final = tournament({f"step-{s}": row for s, row in rows.items()}, 8, sweep=[2], groups=map(str, CORPUS["prompt"]))
    assert callback.result.scores == final.scores
    assert callback.result.sweep == final.sweep
    assert callback.result.win_rates == final.win_rates
    assert len(set(final.scores.values())) >= 3
    assert scores_of(trainer)[2] == 0 < final.scores["step-2"]  # the log is of its time
    assert best_of(tmp_path)["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{final.winner[5:]}")
    assert best_of(tmp_path)["sentence"] == final.sentence


def test_an_evaluation_after_the_training_meets_all_rows_and_leaves_none(tmp_path):
    callback = TournamentCallback(CORPUS, 8)
    trainer = make_trainer(tmp_path, callback, SetWeights())
    trainer.train()
    standing = dict(callback.result.scores)
    # In a process of its own, as after the training.
    for evaluating in (trainer, make_trainer(tmp_path, TournamentCallback(CORPUS, 8))):
        for step in (2, 6):
            evaluating.model.load_state_dict(weights_of(tmp_path, step), strict=False)
            metrics = evaluating.evaluate()
            assert metrics["eval_tournament_8"] == standing[f"step-{step}"]
            assert metrics["eval_tournament_winner_step"] == scores_of(trainer, "eval_tournament_winner_step")[8]
    assert steps_in(tmp_path / "tournament", "step") == [2, 4, 6, 8]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_winner_is_safe_from_the_limit_of_the_trainer(tmp_path, monkeypatch, limit):
    callback = TournamentCallback(CORPUS, 8)
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, callback, save_total_limit=limit)
    assert callback.result.winner == "step-4"
    # As with any best model, a limit of one leaves it alone.
    assert steps_in(tmp_path) == {1: [4], 2: [4, 8], 3: [4, 6, 8]}[limit]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert trainer.state.best_metric is None
    assert steps_in(tmp_path / "tournament", "step") == [2, 4, 6, 8]


@pytest.mark.parametrize(("limit", "left"), [(1, [4, 6, 8]), (3, [4, 6, 8]), (4, [2, 4, 6, 8])])
def test_both_the_winner_and_the_best_by_another_metric_are_kept(tmp_path, monkeypatch, limit, left):
    callback = TournamentCallback(CORPUS, 8, save_total_limit=limit)
    settings = by_marks(monkeypatch, [3.0, 2.0, 1.0, 4.0]) | {"load_best_model_at_end": True}
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, callback, **settings)
    assert steps_in(tmp_path) == left
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert trainer.state.best_metric == 1.0
    assert best_of(tmp_path)["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    assert has_weights(trainer.model, weights_of(tmp_path, 6))


def test_the_callbacks_own_limit_keeps_the_latest_and_the_winner(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-12").mkdir()  # left by an earlier run: older than all of this one's
    (tmp_path / "checkpoint-notes").mkdir()
    train(monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, 8, save_total_limit=3))
    (tmp_path / "checkpoint-notes").rmdir()
    assert steps_in(tmp_path) == [4, 6, 8]


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_the_training_goes_on(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    callback = TournamentCallback(CORPUS, 8, save_total_limit=1)
    with pytest.warns(CoverageWarning, match=r"checkpoint-1 is beyond `save_total_limit=1` and stays"):
        trainer = train(monkeypatch, SECOND_WINS, tmp_path / "run", callback)
    assert trainer.state.global_step == 8
    assert (tmp_path / "elsewhere").is_dir()


def test_the_trainer_chooses_by_scores_that_are_not_stale(tmp_path, monkeypatch):
    trainer = train(
        monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, N), save_total_limit=1, **BY_TOURNAMENT
    )
    # By the log the first, which nobody had challenged yet, would be the best for ever.
    assert scores_of(trainer) == {2: 0.0, 4: 0.1, 6: 0.5, 8: 0.35}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert trainer.state.best_global_step == 4
    assert trainer.state.best_metric == 0.1
    assert steps_in(tmp_path) == [4]
    assert has_weights(trainer.model, weights_of(tmp_path, 4))


def test_the_n_of_the_best_metric_decides(tmp_path, monkeypatch):
    # At N = 8 the first gives up less, at N = 2 the second does.
    near = np.full(40, -1.0)
    near[:20] = -2.5
    by_step = {2: near, 4: giving_up(TENTH), 6: giving_up(HALF, TENTH), 8: giving_up(HALF, QUARTER)}
    for n, winner in ((8, 2), (2, 4)):
        callback = TournamentCallback(CORPUS, (2, 8))
        settings = BY_TOURNAMENT | {"metric_for_best_model": f"tournament_{n}"}
        trainer = train(monkeypatch, by_step, tmp_path / str(n), callback, **settings)
        assert callback.result.n == n
        assert trainer.state.best_global_step == winner
        assert scores_of(trainer, "eval_tournament_winner_step")[8] == winner


def test_a_newcomer_that_wins_a_tie_is_the_best_model(tmp_path, monkeypatch):
    same = giving_up()
    better = np.full(40, -0.9)  # nothing at N = 8, but a better cross-entropy
    by_step = {2: same, 4: same, 6: better, 8: better}
    settings = BY_TOURNAMENT | {"save_strategy": "best"}
    trainer = train(monkeypatch, by_step, tmp_path, TournamentCallback(CORPUS, 8), **settings)
    assert set(scores_of(trainer).values()) == {0.0}
    assert steps_in(tmp_path) == [2, 6]
    assert trainer.state.best_global_step == 6
    assert trainer.state.best_metric == 0.0


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_follows_the_tournament(tmp_path, monkeypatch, patience):
    stopping = EarlyStoppingCallback(early_stopping_patience=patience)
    callback = TournamentCallback(CORPUS, 8)
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, stopping, callback, **BY_TOURNAMENT)
    assert trainer.state.global_step == {1: 6, 2: 8}[patience]


def test_only_the_best_are_saved_if_so_asked(tmp_path, monkeypatch):
    settings = BY_TOURNAMENT | {"save_strategy": "best"}
    train(monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, 8), **settings)
    assert steps_in(tmp_path) == [2, 4]


def test_steps_that_were_not_saved_challenge_but_are_not_picked(tmp_path, monkeypatch):
    by_step = {step: giving_up(HALF) for step in range(1, 9)} | {
        3: giving_up(),
        4: giving_up(TENTH),
        8: giving_up(QUARTER),
    }
    callback = TournamentCallback(CORPUS, 8, load_winner_at_end=True)
    (tmp_path / "checkpoint-3").mkdir()  # of an earlier run, which is another model
    with pytest.warns(CoverageWarning, match="step 3 stands best, but has no checkpoint; the best .* one is 4"):
        trainer = train(monkeypatch, by_step, tmp_path, callback, eval_steps=1, save_steps=4, save_total_limit=5)
    assert callback.result.winner == "step-3"
    record = best_of(tmp_path)
    assert record["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    assert record["best_metric"] == 0.1
    assert "step-3 has no checkpoint to load; of the 2 that have one, step-4 is the best." in record["sentence"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert has_weights(trainer.model, weights_of(tmp_path, 4))


def test_a_training_that_saves_nothing_evaluated_says_so(tmp_path, monkeypatch):
    by_step = {step: giving_up() for step in range(9)}
    callback = TournamentCallback(CORPUS, 8, load_winner_at_end=True, every_n_steps=3)
    with pytest.warns(CoverageWarning, match="loaded: step 3 stands best, but .*; no evaluated step has one"):
        train(monkeypatch, by_step, tmp_path, callback, save_steps=4)
    assert not (tmp_path / "tournament" / "best_checkpoint.json").exists()
    assert steps_in(tmp_path / "tournament", "step") == [3, 6]


@pytest.mark.parametrize("other_best", [False, True])
def test_the_winner_is_loaded_at_the_end(tmp_path, monkeypatch, other_best):
    settings = by_marks(monkeypatch, [3.0, 2.0, 1.0, 4.0]) if other_best else {}
    callback = TournamentCallback(CORPUS, 8, load_winner_at_end=True)
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, SetWeights(), callback, **settings)
    assert has_weights(trainer.model, weights_of(tmp_path, 4))
    assert not has_weights(trainer.model, weights_of(tmp_path, 8))
    # The Trainer's own choice is left alone.
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{6 if other_best else 4}")


def test_a_winner_that_lacks_a_weight_is_not_loaded(tmp_path, monkeypatch):
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, SetWeights(), TournamentCallback(CORPUS, 8))
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    whole = load_file(path)
    load_weights(trainer, path.parent)
    for lost in whole:
        save_file({name: value for name, value in whole.items() if name != lost}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{re.escape(str(path.parent))} lacks .*{re.escape(lost)}:"):
            load_weights(trainer, path.parent)
    path.unlink()
    with pytest.raises(ValueError, match="lacks all weights"):
        load_weights(trainer, path.parent)


# peft asks by the old name, its new one not being in all versions of transformers that it supports.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_winning_adapter_is_loaded_at_the_end(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    callback = TournamentCallback(CORPUS, 8, load_winner_at_end=True)
    trainer = train(monkeypatch, SECOND_WINS, tmp_path, callback, model=model, save_total_limit=2)
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(trainer.model)
    assert saved.keys() == now.keys()
    assert all(torch.equal(weight, now[name]) for name, weight in saved.items())
    last = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    assert not all(torch.equal(weight, now[name]) for name, weight in last.items())


def outcome(trainer, folder):
    """All that a run and its callback leave, but the names of folders."""
    best = json.loads((folder / "tournament" / "best_checkpoint.json").read_text().replace(str(folder), "RUN"))
    state = str(trainer.state.best_model_checkpoint).replace(str(folder), "RUN"), trainer.state.best_metric
    return rows_in(folder), best, state, steps_in(folder), without_times(coverage_history(trainer, "eval_loss"))


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.filterwarnings("ignore:The winner of the tournament cannot be loaded")  # a step between two saves wins
@pytest.mark.parametrize(
    ("moment", "settings"),
    [
        ("row", {}),
        ("facts", {"save_total_limit": 2}),
        ("save", {}),
        ("save", BY_TOURNAMENT | {"save_total_limit": 1}),
    ],
)
def test_a_run_killed_at_any_moment_and_resumed_ends_the_same(tmp_path, monkeypatch, settings, moment):
    own = {} if settings else {"save_total_limit": 2}
    settings = settings | {"eval_steps": 1, "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", TournamentCallback(CORPUS, N, **own), SetWeights(), **settings)
    whole.train()
    calls = []

    def at(function):
        def dying(*arguments, **options):
            calls.append(moment)
            if len(calls) == 5:
                raise Killed
            return function(*arguments, **options)

        return dying

    trainer = make_trainer(tmp_path / "parts", TournamentCallback(CORPUS, N, **own), SetWeights(), **settings)
    with monkeypatch.context() as patch:
        if moment == "row":
            patch.setattr(ScoreTable, "write", at(ScoreTable.write))
        elif moment == "facts":
            patch.setattr(callback_module, "write_reference", at(callback_module.write_reference))
        else:
            calls += [moment] * 2
            trainer._save_checkpoint = at(trainer._save_checkpoint)
        with pytest.raises(Killed):
            trainer.train()
    resumed = make_trainer(tmp_path / "parts", TournamentCallback(CORPUS, N, **own), SetWeights(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed, tmp_path / "parts") == outcome(whole, tmp_path / "whole")


def test_resuming_from_an_older_checkpoint_drops_what_came_after_it(tmp_path, monkeypatch):
    make_trainer(tmp_path / "whole", TournamentCallback(CORPUS, N), SetWeights()).train()
    callback = TournamentCallback(CORPUS, N)
    trainer = make_trainer(tmp_path / "whole", callback, SetWeights(), StopAt(6))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert steps_in(tmp_path / "whole" / "tournament", "step") == [2, 4, 6]
    assert callback.result.names == ("step-2", "step-4", "step-6")
    stopped = make_trainer(tmp_path / "stopped", TournamentCallback(CORPUS, N), SetWeights(), StopAt(6))
    stopped.train()
    assert rows_in(tmp_path / "whole") == rows_in(tmp_path / "stopped")
    assert scores_of(trainer) == scores_of(stopped)


def test_a_training_that_begins_anew_takes_no_old_rows(tmp_path, monkeypatch):
    train(monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, 8), save_total_limit=1)
    again = {2: giving_up(HALF, TENTH)} | {step: giving_up(HALF) for step in (4, 6, 8)}
    callback = TournamentCallback(CORPUS, 8)
    trainer = train(monkeypatch, again, tmp_path, callback, save_steps=4)
    assert list(callback.result.scores.values()) == [0.1, 0.0, 0.0, 0.0]
    # checkpoint-4 is overwritten, and those of the old run at other steps are not this one's
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_the_winner_is_protected_before_the_first_evaluation_of_a_resumed_run(tmp_path, monkeypatch):
    by_step = {1: giving_up(HALF), 4: giving_up(), 8: giving_up(HALF)}
    settings = {"eval_steps": 4, "save_steps": 1, "save_total_limit": 1}
    train(monkeypatch, by_step, tmp_path, TournamentCallback(CORPUS, 8), StopAt(4), **settings)
    train(monkeypatch, by_step, tmp_path, TournamentCallback(CORPUS, 8), StopAt(7), resume=True, **settings)
    assert steps_in(tmp_path) == [4]


def test_rows_that_somebody_removed_are_missed(tmp_path, monkeypatch):
    train(monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, 8), StopAt(6))
    shutil.rmtree(tmp_path / "tournament" / "step-4")
    callback = TournamentCallback(CORPUS, 8)
    with pytest.warns(CoverageWarning, match=r"scores of 1 evaluated steps \(\[4\]\) are not in .* any more"):
        train(monkeypatch, SECOND_WINS, tmp_path, callback, resume=True)
    assert callback.result.names == ("step-2", "step-6", "step-8")


def test_rows_of_another_corpus_are_refused_and_left(tmp_path):
    make_trainer(tmp_path, TournamentCallback(CORPUS, 8), max_steps=2).train()
    before = rows_in(tmp_path)
    changed = CORPUS.select(range(10))
    for use in ("train", "evaluate"):
        trainer = make_trainer(tmp_path, TournamentCallback(changed, 8))
        with pytest.raises(ValueError, match=r"step-2 holds scores of another corpus.*another `name`, or remove"):
            getattr(trainer, use)()
    assert rows_in(tmp_path) == before
    make_trainer(tmp_path, TournamentCallback(changed, 8, name="small"), max_steps=2).train()
    assert steps_in(tmp_path / "tournament-small", "step") == [2]
    with pytest.raises(ValueError, match=r"another corpus.*or leave it out of `others`"):
        make_trainer(tmp_path / "b", TournamentCallback(changed, 8, others=[tmp_path / "tournament"])).train()
    with pytest.raises(ValueError, match=r"`others` must be score folders.*holds no scores"):
        make_trainer(tmp_path / "b", TournamentCallback(CORPUS, 8, others=[tmp_path])).evaluate()


def test_runs_of_a_sweep_meet_in_one_tournament(tmp_path, monkeypatch):
    train(monkeypatch, SECOND_WINS, tmp_path / "first", TournamentCallback(CORPUS, 8))
    better = {step: giving_up(slice(0, step)) for step in (2, 4, 6, 8)}
    first = tmp_path / "first" / "tournament"
    callback = TournamentCallback(CORPUS, 8, others=[first / "step-2", first])
    with pytest.raises(ValueError, match="given twice"):
        train(monkeypatch, better, tmp_path / "second", callback)
    callback = TournamentCallback(CORPUS, 8, others=[first])
    trainer = train(monkeypatch, better, tmp_path / "second", callback, save_total_limit=1)
    assert callback.result.names[:5] == ("step-2", "step-4", "step-6", "step-8", "first/tournament/step-2")
    assert scores_of(trainer) == {2: 0.05, 4: 0.1, 6: 0.15, 8: 0.2}  # challenged from the first evaluation on
    assert steps_in(tmp_path / "second") == [2]
    # Another run's winner cannot be this one's.
    callback = TournamentCallback(CORPUS, 8, others=[tmp_path / "second" / "tournament" / "step-2"])
    trainer = train(monkeypatch, SECOND_WINS, tmp_path / "third", callback)
    assert callback.result.winner == "second/tournament/step-2"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "third" / "checkpoint-4")


def test_the_rows_of_runs_are_candidates_of_the_library_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for run, settings in (("a", {}), ("b", {"save_steps": 4})):
        trainer = make_trainer(tmp_path / run, TournamentCallback(CORPUS, 8), learning_rate=0.1, **settings)
        trainer.model.load_state_dict(tiny_model(seed=len(run) + (run == "b")).state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # a step that was not saved may win
            trainer.train()
    (tmp_path / "a").rename(tmp_path / "moved")
    folders = [f"{run}/tournament/step-{step}" for run in ("moved", "b") for step in (2, 4, 6, 8)]
    expected = tournament(
        {folder: tmp_path / folder for folder in folders}, 1.5, groups=[str(p) for p in CORPUS["prompt"]], bootstrap=50
    )
    result = CliRunner().invoke(app, ["tournament", *folders, *shlex.split("--n 1.5 --bootstrap 50 --link best")])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "tournament" / "tournament.json").read_text())
    assert list(facts["scores"].values()) == list(expected.scores.values())
    assert list(facts["win_rates"].values()) == list(expected.win_rates.values())
    there = [name for name in expected.ranking if name[0] == "m" or name[-1] in "48"]
    best = json.loads((tmp_path / "tournament" / "best_checkpoint.json").read_text())["best_model_checkpoint"]
    assert best == there[0].replace("tournament/step", "checkpoint")
    assert (tmp_path / "best").resolve() == tmp_path / best
    # Together with a checkpoint that the command scores itself.
    CORPUS.to_json(tmp_path / "corpus.jsonl")
    command = "--data corpus.jsonl --n 1.5 --bootstrap 0 --device cpu --tokenizer none --output-dir mixed"
    monkeypatch.setattr("hf_coverage.commands.score.load_tokenizer", lambda *_: None)
    result = CliRunner().invoke(app, ["tournament", *folders[:2], "moved/checkpoint-6", *shlex.split(command)])
    assert result.exit_code == 0, result.output
    mixed = json.loads((tmp_path / "mixed" / "tournament.json").read_text())["scores"]
    scored = tournament({f: tmp_path / f for f in folders[:3]}, 1.5, bootstrap=0).scores
    assert list(mixed.values()) == pytest.approx(list(scored.values()), abs=1e-12)


def test_a_soft_tournament_is_held_where_it_is_asked_for(tmp_path):
    callback = TournamentCallback(CORPUS, (8, 2), edge="soft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        make_trainer(tmp_path, callback, learning_rate=0.1).train()
    rows = {f"step-{step}": tmp_path / "tournament" / f"step-{step}" for step in (2, 4, 6, 8)}
    expected = tournament(rows, 8, edge="soft", sweep=[2])
    assert callback.result.scores == expected.scores
    assert callback.result.sweep[0].scores == expected.sweep[0].scores
    assert callback.result.sentence.startswith(f"{expected.winner} wins the soft tournament")


def test_rows_without_any_checkpoint_have_no_winner_to_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path / "run", TournamentCallback(CORPUS, 8), save_strategy="no").train()
    result = CliRunner().invoke(app, ["tournament", *[f"run/tournament/step-{step}" for step in (2, 4)]])
    assert result.exit_code == 0, result.output
    assert "No candidate has a checkpoint that is still there" in result.output
    assert not (tmp_path / "tournament" / "best_checkpoint.json").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({}, {"metric_for_best_model": "tournament_winner_step"}, 'is a step, not a score: use "tournament_8"'),
        ({}, {"metric_for_best_model": "loss", "save_total_limit": 2}, "give `save_total_limit=2` to the Tourn.*both"),
        ({"save_total_limit": 2}, {"save_total_limit": 2}, "is set in TrainingArguments and in the callback"),
        ({"load_winner_at_end": True}, {"save_strategy": "no"}, "needs checkpoints: set a `save_strategy`"),
        (
            {"load_winner_at_end": True},
            {"load_best_model_at_end": True},
            r'`load_best_model_at_end` \(by "loss"\) would load two models',
        ),
        ({"every_n_evals": 2}, BY_TOURNAMENT, "read at every evaluation, but this TournamentCallback"),
    ],
)
def test_what_would_lose_the_winner_is_refused(tmp_path, arguments, settings, message):
    trainer = make_trainer(tmp_path, TournamentCallback(CORPUS, 8, **arguments), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not (tmp_path / "tournament").exists()


def test_what_several_cannot_share_is_refused(tmp_path):
    def two(**options):
        return TournamentCallback(CORPUS, 8, **options), TournamentCallback(CORPUS, 8, name="own")

    with pytest.raises(ValueError, match="can spare the winner of one TournamentCallback, and this Trainer has 2"):
        make_trainer(tmp_path, *two(), save_total_limit=2).train()
    with pytest.raises(ValueError, match="can spare the winner of one"):
        make_trainer(tmp_path, *two(save_total_limit=2)).train()
    settings = BY_TOURNAMENT | {"metric_for_best_model": "own_tournament_8"}
    with pytest.raises(ValueError, match="fits several TournamentCallbacks: name all of them"):
        make_trainer(tmp_path, *two(), **settings).train()


def test_a_search_for_hyper_parameters_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, TournamentCallback(CORPUS, 8))
    trainer.state.is_hyper_param_search = True
    with pytest.raises(ValueError, match="start each run with its own `output_dir`"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": ()}, "`n` must name at least one"),
        ({"n": 0.5}, "`n` must be"),
        ({"save_total_limit": 0}, "at least 1"),
        ({"edge": "round"}, "'hard' or 'soft'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TournamentCallback(CORPUS, **arguments)


def test_beside_a_coverage_callback(tmp_path):
    trainer = make_trainer(tmp_path, CoverageCallback(reference_corpus(), N), TournamentCallback(CORPUS, N))
    trainer.train()
    assert {"eval_cov_2", "eval_kl", "eval_tournament_2", "eval_tournament_winner_step"} <= coverage_history(trainer)[
        -1
    ].keys()


def left_by(folder):
    """What a run of `killed_training.py` left, but the names of folders, the times, and the mean of the loss since the
    last log, which a Trainer that resumes between two logs begins anew."""
    last = steps_in(folder)[-1]
    state = json.loads((folder / f"checkpoint-{last}" / "trainer_state.json").read_text())
    best = json.loads((folder / "tournament" / "best_checkpoint.json").read_text().replace(str(folder), "RUN"))
    model = (folder / "final" / "model.safetensors").read_bytes()
    logs = [{key: value for key, value in entry.items() if key != "loss"} for entry in state["log_history"]]
    return rows_in(folder), steps_in(folder), without_times(logs), best, model


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_the_same(tmp_path):
    def start(folder):
        return Job("-m", "tests.select.killed_training", folder)

    rng = np.random.default_rng(0)
    for stop in sorted(rng.choice(np.arange(2, 29), size=5, replace=False)):
        job = start(tmp_path / "killed")
        while job.poll() is None and not (tmp_path / "killed" / "tournament" / f"step-{stop}").exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
        assert job.poll() is None, job.wait().stderr[-6000:]
        job.kill()
    for folder in ("killed", "whole"):
        done = start(tmp_path / folder).wait()
        assert done.returncode == 0, done.stderr[-6000:]
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_smollm2(tmp_path, smollm2):
    from peft import LoraConfig, PeftModel, get_peft_model

    loaded, tokenizer = smollm2

    def fresh():
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        config.name_or_path = ""  # where peft looks for a configuration
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        return model

    sums = [(f"{a} + {b} =", f" {a + b}") for a in range(2, 7) for b in range(3, 6)]
    corpus = Dataset.from_dict({"prompt": [p for p, _ in sums], "completion": [c for _, c in sums]})
    ids = [tokenizer(p + c)["input_ids"][:6] for p, c in sums]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    torch.manual_seed(0)
    model = get_peft_model(fresh(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    callback = TournamentCallback(corpus, (1.5, 2), load_winner_at_end=True)
    trainer = make_trainer(
        tmp_path, callback, model=model, eval_dataset=rows, processing_class=tokenizer, max_steps=6, learning_rate=0.01
    )
    trainer.train_dataset = rows
    trainer.train()
    logprobs = {}
    for step in (2, 4, 6):
        adapted = PeftModel.from_pretrained(fresh(), tmp_path / f"checkpoint-{step}")
        scored = score_responses(adapted.eval(), tokenizer, corpus, progress=False)
        logprobs[f"step-{step}"] = np.array(scored["logprob"][:])
        kept = ScoreTable.open(tmp_path / "tournament" / f"step-{step}").logprob
        np.testing.assert_allclose(kept, logprobs[f"step-{step}"], atol=1e-4)
    expected = tournament(logprobs, 1.5, bootstrap=0)
    assert callback.result.scores == expected.scores
    assert len(set(expected.scores.values())) > 1
    again = score_responses(trainer.model.eval(), tokenizer, corpus, progress=False)
    np.testing.assert_allclose(again["logprob"][:], logprobs[callback.result.winner], atol=1e-4)


def test_a_training_is_told_who_holds_its_folder_and_holds_it_itself(tmp_path, monkeypatch):
    folder, seen = tmp_path / "tournament", []

    class Look(SetWeights):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((folder / LOCK_FILES[0]).exists())

    folder.mkdir()
    with FileLock(folder / LOCK_FILES[0]):
        owner = {"pid": 1, "host": "elsewhere", "since": "then", "command": "another training"}
        (folder / LOCK_FILES[1]).write_text(json.dumps(owner))
        with pytest.raises(BlockingIOError, match="tournament is being written to by process 1 on elsewhere"):
            train(monkeypatch, SECOND_WINS, tmp_path, TournamentCallback(CORPUS, 8))
    assert {path.name for path in folder.iterdir()} <= {*LOCK_FILES}
    train(monkeypatch, SECOND_WINS, tmp_path, Look(), TournamentCallback(CORPUS, 8))
    assert seen == [True] * 8
    assert not {path.name for path in folder.iterdir()} & {*LOCK_FILES}


def test_a_second_and_shorter_training_knows_nothing_of_the_first(tmp_path, monkeypatch):
    used = TournamentCallback(CORPUS, 8)
    train(monkeypatch, SECOND_WINS, tmp_path / "first", used, **BY_TOURNAMENT)
    trainers = [
        train(monkeypatch, SECOND_WINS, tmp_path / name, callback, max_steps=4, **BY_TOURNAMENT)
        for name, callback in (("used", used), ("fresh", TournamentCallback(CORPUS, 8)))
    ]
    again, fresh = (
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
        for name in ("used", "fresh")
    )
    assert again["TournamentCallback"]["attributes"] == fresh["TournamentCallback"]["attributes"]
    assert scores_of(trainers[0]) == scores_of(trainers[1])
    assert [Path(one.state.best_model_checkpoint).name for one in trainers] == ["checkpoint-4"] * 2
