"""Choosing while scoring: the bets by slow loops and enumeration, and how often the best is dropped, counted."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.adaptive_choice import (
    Evidence,
    comparable_means,
    gather_evidence,
    prompt_order,
    race_by_loss,
    shown_within,
)
from hf_coverage.functional.choice import decide
from hf_coverage.functional.statistics import group_codes
from tests.functional.test_choice import candidates

UNITS = st.lists(st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=12)


def wealth_by_loops(losses):
    """log W after each prompt, `(M, T)`, bet by bet."""
    size, prompts = losses.shape
    found = np.zeros((size, prompts))
    for m in range(size):
        held = 1.0
        for t in range(prompts):
            best, stake, opponent = -math.inf, 0.0, None
            for j in range(size):
                if j == m:
                    continue
                differences = [losses[m, s] - losses[j, s] for s in range(t)]
                total, squares = sum(differences), sum(d * d for d in differences)
                own = min(0.99, max(0.0, total / (squares + 0.25)))
                growth = own * total - own**2 * squares / 2
                if growth > best + 1e-12:
                    best, stake, opponent = growth, own, j
            held *= 1 + stake * (losses[m, t] - losses[opponent, t])
            found[m, t] = math.log(held)
    return found


@given(UNITS, st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_bets_are_those_of_slow_loops_however_the_prompts_are_cut(rows, cut):
    losses = np.array(rows).T
    expected = wealth_by_loops(losses)
    evidence = Evidence.none(3)
    for part in (losses[:, :cut], losses[:, cut:]):
        if part.shape[1]:
            evidence = gather_evidence(evidence, (0, 1, 2), part)
    np.testing.assert_allclose(evidence.wealth, expected[:, -1], atol=1e-9)
    np.testing.assert_allclose(evidence.highest, np.maximum(expected.max(axis=1), 0), atol=1e-9)


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.02, 0.9, 0.08), (1 / 3, 1 / 3, 1 / 3)])
def test_the_wealth_against_the_best_is_expected_to_be_1_at_most_and_rarely_large(shares):
    # three kinds of prompts; the first candidate is level with the better of the others, and fails where they do not
    kinds = np.array([[1.0, 0.0, 0.3], [0.0, 0.6, 0.3], [0.2, 0.4, 1.0]])
    means = kinds @ shares
    kinds[0] *= min(1.0, means[1:].min() / means[0])
    expected, dropped = 0.0, 0.0
    for path in itertools.product(range(3), repeat=7):
        evidence = gather_evidence(Evidence.none(3), (0, 1, 2), kinds[:, path])
        chance = math.prod(shares[kind] for kind in path)
        expected += chance * math.exp(evidence.wealth[0])
        dropped += chance * evidence.against(0.5)[0]
    assert expected <= 1 + 1e-9
    assert dropped <= 0.5


def test_a_rival_that_was_not_scored_any_more_changes_nothing():
    losses = np.random.default_rng(0).random((3, 40))
    evidence = gather_evidence(Evidence.none(3), (0, 1, 2), losses[:, :20])
    two = gather_evidence(evidence, (0, 2), losses[[0, 2], 20:])
    assert two.wealth[1] == evidence.wealth[1]
    alone = gather_evidence(two, (2,), losses[[2], 20:])
    assert alone.wealth.tolist() == two.wealth.tolist()


def test_within_is_the_bet_written_out():
    rng = np.random.default_rng(1)
    pick, other = rng.random(300) * 0.3, rng.random(300) * 0.3
    held, total, squares, highest = 1.0, 0.0, 0.0, 1.0
    for p, m in zip(pick, other):
        gained = m - p + 0.1
        held *= 1 + min(0.99 / 0.9, max(0.0, total / (squares + 0.25))) * gained
        total, squares, highest = total + gained, squares + gained**2, max(highest, held)
    assert shown_within(pick, other, 0.1, 1 - 1.001 / highest)
    assert not shown_within(pick, other, 0.1, 1 - 0.999 / highest)


def race(losses, **options):
    sizes = options.pop("prompt_rows", np.ones(losses.shape[-1], int))
    return race_by_loss(lambda m, start, stop: losses[[m], start:stop], len(losses), sizes, **options)


def test_rounds_double_and_the_last_of_one_is_the_first_of_the_next():
    losses = np.random.default_rng(0).random((3, 300)) * 0.2 + [[0.0], [0.02], [0.8]]
    calls = []

    def score(m, start, stop):
        calls.append((m, start, stop))
        return losses[[m], start:stop]

    found = race_by_loss(score, 3, np.ones(300, int))
    assert calls[:5] == [(0, 0, 64), (1, 0, 64), (2, 0, 64), (1, 64, 128), (0, 64, 128)]
    assert calls[-1][1:] == (256, 300)
    assert found.rows.tolist() == [300, 300, 64]
    assert found.decisions[0].losses[2] == pytest.approx(losses[0].mean() + (losses[2] - losses[0])[:64].mean())
    # with all of the rows, what is said of those left is what `decide` says with the confidence that is left
    expected = decide(losses[:2], confidence=0.975)
    assert found.decisions[0].within == expected.within
    assert found.decisions[0].left == expected.left
    assert found.decisions[0].confidence == 0.95


def test_it_ends_when_those_left_are_within_the_tolerance():
    same = np.random.default_rng(0).random(4000)
    found = race(np.stack([same, same, np.minimum(same + 0.5, 1)]), tolerance=0.02)
    (decision,) = found.decisions
    assert found.rows.tolist() == [512, 512, 64]
    assert (decision.within, set(decision.left), decision.is_decided) == (0.02, {0, 1}, True)
    assert decision.probability_best is None


def test_a_candidate_is_scored_as_long_as_it_may_be_the_best_for_one_of_several_numbers_of_samples():
    rng = np.random.default_rng(0)
    noise = rng.random(1000) * 0.2
    levels = np.stack([[noise, noise + 0.4, noise + 0.8], [noise + 0.4, noise, noise + 0.8]])
    found = race_by_loss(lambda m, start, stop: levels[:, m, start:stop], 3, np.ones(1000, int))
    assert [decision.left for decision in found.decisions] == [(0,), (1,)]
    assert found.rows.tolist() == [64, 64, 64]


def test_rows_that_repeat_a_prompt_add_nothing():
    losses = np.random.default_rng(0).random((3, 200)) * 0.3 + [[0.0], [0.1], [0.2]]
    once = race(losses)
    thrice = race(np.repeat(losses, 3, axis=1), prompt_rows=np.full(200, 3))
    assert (thrice.rows / 3).tolist() == once.rows.tolist()
    assert thrice.decisions[0].left == once.decisions[0].left


def test_somebody_is_left_and_one_candidate_is_scored_once():
    alone = race(np.full((1, 500), 0.5))
    assert alone.rows.tolist() == [64]
    assert (alone.decisions[0].left, alone.decisions[0].probability_best) == ((0,), 1.0)
    # each is shown to be worse than the other at some time
    turn = np.r_[np.ones(32), np.zeros(32)]
    assert len(race(np.stack([turn, 1 - turn]), confidence=0.5).decisions[0].left) == 1


def test_the_order_is_one_of_the_prompts_wherever_they_stand():
    labels = np.random.default_rng(0).integers(0, 40, 200)
    codes = group_codes(labels)
    order = prompt_order(codes, seed=1)
    assert sorted(order) == list(range(200))
    kept = [key for key, _ in itertools.groupby(labels[order])]
    assert len(kept) == len(set(kept)) == len(set(labels))
    shuffled = np.random.default_rng(1).permutation(200)
    assert [key for key, _ in itertools.groupby(labels[shuffled][prompt_order(codes[shuffled], seed=1)])] == kept
    assert [key for key, _ in itertools.groupby(labels[prompt_order(codes, seed=2)])] != kept


def test_means_that_are_not_finite_stay_what_they_are():
    means = comparable_means([np.array([math.inf, 0.0]), np.array([1.0]), np.array([math.inf])], base=0)
    assert means.tolist() == [math.inf, 1.0, math.inf]


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="`tolerance` must be a loss"):
        race(np.zeros((2, 100)), tolerance=1.0)
    with pytest.raises(ValueError, match="`confidence` must lie"):
        race(np.zeros((2, 100)), confidence=1.0)


def rare(size, rng):
    """Candidates that fail wholly on prompts of their own, a few in a thousand."""
    shares = rng.uniform(0.002, 0.006, size)
    return lambda rows: (rng.random((size, rows)) < shares[:, None]).astype(float), shares


def simulate(kind, size, rows, runs, seed, tolerance=0.0):
    """Of simulated runs: best dropped; best is left; `within` holds; rows scored; probability stated, came true."""
    rng, found = np.random.default_rng(seed), []
    for run in range(runs):
        if run % 10 == 0:
            draw, truth = rare(size, rng) if kind == "rare failures" else candidates(kind, size, rng)
        result = race(draw(rows), tolerance=tolerance, seed=run)
        decision, best = result.decisions[0], int(np.argmin(truth))
        behind = truth[decision.pick] - truth[best]
        early = result.rows.max() < rows and best not in decision.left
        found.append((early or result.rows[best] < result.rows.max(), best in decision.left))
        found[-1] += (behind <= decision.within + 1e-3 / rows, result.rows.sum() / (size * rows))
        stated = decision.probability_best
        found[-1] += (math.nan, math.nan) if stated is None else (stated, decision.pick == best)
    return np.array(found, dtype=float)


@pytest.mark.slow
def test_the_best_is_dropped_as_rarely_as_stated(capsys):
    lines, found = (
        ["kind, candidates, rows, tolerance: best dropped, left; within holds; rows scored; stated, true"],
        [],
    )
    cases = [("rare failures", 4, 600, 0.0), ("rare failures", 4, 600, 0.02), ("heavy-tailed", 4, 600, 0.0)]
    cases += [("nearly equal", 2, 300, 0.0), ("nearly equal", 6, 600, 0.02), ("close", 6, 600, 0.0)]
    cases += [("class-dropping", 4, 600, 0.01), ("distinct", 6, 600, 0.0)]
    for seed, (kind, size, rows, tolerance) in enumerate(cases):
        found.append(simulate(kind, size, rows, 64, seed, tolerance))
        said = found[-1][~np.isnan(found[-1][:, 4]), 4:]  # where a probability is stated at all
        means = [*found[-1][:, :4].mean(axis=0), *(said.mean(axis=0) if len(said) else [])]
        numbers = " ".join(f"{value:.3f}" for value in means)
        lines.append(f"{kind} {size} {rows} {tolerance}: {numbers}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    dropped, left, within = np.concatenate(found)[:, :3].mean(axis=0)
    assert dropped <= 0.025
    assert min(left, within) >= 0.95
    # of no kind does chance explain it
    assert all(runs[:, 1:3].mean(axis=0).min() >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 64) for runs in found)


@pytest.mark.parametrize("kind", ["rare failures", "heavy-tailed", "nearly equal"])
def test_the_best_is_dropped_as_rarely_as_stated_in_few_runs(kind):
    dropped, left, within = simulate(kind, 3, 300, 60, 0)[:, :3].mean(axis=0)
    slack = 2.6 * math.sqrt(0.05 * 0.95 / 60)
    assert dropped <= 0.05
    assert min(left, within) >= 0.95 - slack
