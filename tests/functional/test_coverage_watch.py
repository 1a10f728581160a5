"""The watch on crafted scores: when it speaks, when it must not, and what it remembers."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from hf_coverage.functional.coverage_watch import WatchState, prompts_to_warn, update_watch


def ratios_with(covered: int, rows: int = 1000) -> np.ndarray:
    """Log ratios with this many rows out of reach."""
    return np.where(np.arange(rows) < covered, math.inf, 0.0)


def watch(evaluations, n=16, groups=None):
    """Feed (rows out of reach, or log ratios; cross-entropy) in turn; the step of the warning and the warning."""
    state, found = WatchState(), []
    for step, (ratios, cross_entropy) in enumerate(evaluations):
        ratios = ratios_with(ratios) if isinstance(ratios, int) else ratios
        # Every state goes through JSON, as it does when a run is resumed from a checkpoint.
        state = WatchState.from_dict(json.loads(json.dumps(asdict(state))))
        state, worsening = update_watch(
            state, step=step, log_ratios=ratios, cross_entropy=cross_entropy, n=n, groups=groups
        )
        if worsening is not None:
            found.append((step, worsening))
    return found


def test_falling_then_rising_coverage_is_reported_once_with_its_best_step():
    found = watch([(113, 1.3), (47, 1.2), (48, 1.1), (50, 1.0), (104, 0.9), (140, 0.8)])
    assert [step for step, _ in found] == [4]
    worsening = found[0][1]
    assert (worsening.best.step, worsening.best.miss, worsening.miss) == (1, 0.047, 0.104)
    assert (worsening.best.cross_entropy, worsening.cross_entropy) == (1.2, 0.9)
    assert worsening.test.difference == pytest.approx(0.057)
    assert worsening.test.p_value < 0.1 / (16 * 5)


@pytest.mark.parametrize(
    "evaluations",
    [
        pytest.param([(113, 1.3), (90, 1.2), (47, 1.1), (20, 1.0)], id="coverage improves"),
        pytest.param([(47, 1.0), (104, 1.1), (150, 1.2)], id="cross-entropy worsens too"),
        pytest.param([(47, 1.0), (104, 1.0)], id="cross-entropy stays"),
        pytest.param([(47, 1.3), (49, 1.2), (52, 1.1)], id="within the noise"),
        pytest.param([(47, 1.3)], id="one evaluation"),
        pytest.param([(47, math.inf), (104, math.inf)], id="infinite cross-entropy"),
    ],
)
def test_silence(evaluations):
    assert watch(evaluations) == []


def test_pairing_sees_what_two_separate_points_would_not():
    # 15 rows of 200 are lost and none is won: a certain change, though the two intervals overlap widely.
    falls = [(ratios_with(40, 200), 1.2), (ratios_with(55, 200), 1.1)]
    assert len(watch(falls)) == 1
    moved = [(ratios_with(40, 200), 1.2), (np.roll(ratios_with(55, 200), 100), 1.1)]
    assert watch(moved) == []


def test_rows_of_one_prompt_count_once():
    falls = [(ratios_with(40, 200), 1.2), (ratios_with(55, 200), 1.1)]
    assert watch(falls, groups=np.arange(200) // 50) == []


def false_alarms(runs, rows=300):
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(runs):
        # Forty checkpoints of equal coverage whose rows go in and out of reach, half by luck of the checkpoint.
        lasting = rng.normal(size=rows)
        scores = [math.sqrt(0.5) * (lasting + rng.normal(size=rows)) for _ in range(40)]
        alarms += bool(watch([(1.5 + 1.5 * score, 2.0 - 0.01 * step) for step, score in enumerate(scores)]))
    return alarms / runs


def test_a_few_runs_with_nothing_wrong_are_silent():
    assert false_alarms(6, rows=100) == 0


@pytest.mark.slow
def test_false_alarms_stay_within_alpha_however_often_one_looks():
    assert false_alarms(100) <= 0.05


def test_a_class_that_is_given_up_is_seen():
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(4):
        rare = rng.random(1000) < 0.1
        base = rng.normal(1, 1, 1000)
        # the common class improves all the while; the rare one is given up, a nat an evaluation
        run = [(base - 0.1 * step + np.where(rare, max(0, step - 3), 0), 3 - 0.1 * step) for step in range(10)]
        seen += bool(watch(run))
    assert seen == 4


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_so_many_prompts_are_enough_to_warn_of_what_is_lost_outright(share):
    rng = np.random.default_rng(0)
    prompts = prompts_to_warn(share)
    improving = [(ratios_with(10, prompts), 2.0)] * 10
    warned = [
        bool(watch([*improving, (ratios_with(10 + lost, prompts), 1.0)])) for lost in rng.binomial(prompts, share, 60)
    ]
    assert 0.8 - 2.6 * math.sqrt(0.8 * 0.2 / 60) <= np.mean(warned) < 0.95


def test_a_state_that_was_kept_by_cov_n_is_begun_anew():
    best = {"step": 1, "coverage": 0.1, "cross_entropy": 1.0, "reached": "ff"}
    state = WatchState.from_dict({"evaluations": 4, "best": best, "warned": False})
    assert (state.evaluations, state.best) == (4, None)


def test_of_equal_coverage_the_lower_cross_entropy_is_the_best():
    found = watch([(47, 1.3), (47, 1.2), (150, 1.1)])
    assert found[0][1].best.step == 1


def test_changed_rows_are_refused():
    with pytest.raises(ValueError, match="same rows at every evaluation, but now has 500"):
        watch([(47, 1.3), (ratios_with(40, 500), 1.2)])
