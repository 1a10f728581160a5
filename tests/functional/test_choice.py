"""Decisions between candidates: the formulas by slow loops, and what is stated counted over simulated choices."""

import functools
import math

import numpy as np
import pytest
from scipy import signal, special, stats

from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.choice import decide
from hf_coverage.functional.group_rewards import group_signal

KINDS = ("nearly equal", "close", "distinct", "heavy-tailed", "class-dropping")
_SPREAD = {"nearly equal": 0.01, "close": 0.1, "distinct": 0.6, "heavy-tailed": 0.1, "class-dropping": 0.05}


def lost(ratios):
    """The loss of Best-of-16 at a log ratio."""
    with np.errstate(divide="ignore"):
        return np.exp(16 * np.log(-np.expm1(-np.maximum(ratios, 0.0))))


@functools.cache
def law_of_ratios(heavy):
    """A grid of log ratios about their shift, and the law of a row's common part and a candidate's own on it."""
    grid, step = np.linspace(-40, 40, 8001, retstep=True)
    own = stats.t(2, scale=0.5) if heavy else stats.norm(scale=0.4)
    law = signal.fftconvolve(stats.norm(scale=1.5).pdf(grid), own.pdf(grid), mode="same") * step**2
    law[-1] += (1 - law.sum()) / 2  # what lies above the grid; below it nothing is lost
    return grid, law


def candidates(kind, size, rng):
    """A law of the losses of Best-of-16 of `size` candidates on common rows, and its true means."""
    shifts = 1 + rng.normal(0, _SPREAD[kind], size)
    given_up = rng.uniform(0, 0.03, size) if kind == "class-dropping" else np.zeros(size)

    def draw(rows):
        own = 0.5 * rng.standard_t(2, (size, rows)) if kind == "heavy-tailed" else 0.4 * rng.normal(size=(size, rows))
        ratios = rng.normal(0, 1.5, rows) + shifts[:, None] + own
        if given_up.any():  # a class of prompts that some candidates have given up
            ratios = np.where(rng.random(rows) < given_up[:, None], 12.0, ratios)
        return lost(ratios)

    grid, law = law_of_ratios(kind == "heavy-tailed")
    return draw, (1 - given_up) * (lost(grid + shifts[:, None]) @ law) + given_up * lost(12.0)


def simulate(kind, size, rows, repetitions, rng):
    """How often the statements hold: within, left; and the mean probability stated beside how often it came true."""
    found = []
    for repetition in range(repetitions):
        if repetition % 10 == 0:
            draw, truth = candidates(kind, size, rng)
        decision = decide(draw(rows), seed=repetition)
        best = int(np.argmin(truth))
        behind = truth[decision.pick] - truth[best]
        found.append((behind <= decision.within + 1e-3 / rows, best in decision.left))
        found[-1] += (decision.probability_best, decision.pick == best)
    return np.mean(found, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stated_is_true_of_simulated_choices(kind, capsys):
    rng = np.random.default_rng(KINDS.index(kind))
    lines = [f"{kind}: candidates, rows, within holds, best is left, probability stated, came true"]
    for size, rows in ((2, 100), (2, 1000), (5, 250), (20, 100), (20, 1000)):
        within, left, stated, true = simulate(kind, size, rows, 300, rng)
        lines.append(f"{size:4} {rows:5} {within:.3f} {left:.3f} {stated:.3f} {true:.3f}")
        assert within >= 0.93
        assert left >= 0.92
        assert stated <= true + 0.12
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize(("kind", "size", "rows"), [("nearly equal", 2, 100), ("class-dropping", 2, 100)])
def test_what_is_stated_is_true_where_it_was_hardest(kind, size, rows):
    within, left, stated, true = simulate(kind, size, rows, 150, np.random.default_rng(1))
    slack = 2.6 * math.sqrt(0.05 * 0.95 / 150)
    assert within >= 0.95 - slack
    assert left >= 0.95 - slack
    assert stated <= true + 0.12 + 0.06


def test_the_pick_has_the_least_loss_and_is_left():
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = rng.random((6, 40))
        decision = decide(losses)
        assert decision.pick == int(np.argmin(losses.mean(axis=1)))
        assert decision.left[0] == decision.pick
        assert list(decision.losses[list(decision.left)]) == sorted(decision.losses[list(decision.left)])


def test_two_candidates_by_the_formulas_written_out():
    rng = np.random.default_rng(3)
    a, b = rng.random(200), np.clip(rng.random(200) + 0.02, 0, 1)
    decision = decide([a, b], tolerance=0.001)
    difference = b - a
    error, behind = difference.std(ddof=1) / math.sqrt(200), difference.mean()
    padded = math.sqrt(error**2 + 2 * (np.abs(difference).max() / 200) ** 2)
    quantile = stats.norm.ppf(0.95)
    assert decision.pick == 0
    assert decision.within == pytest.approx(quantile * padded - behind, abs=2e-3)
    signal = (behind / error) ** 2 * 198 / 200
    kept = max(0.0, 1 - 1 / signal)
    stated = stats.norm.cdf(kept * behind / (math.sqrt(kept) * error)) if kept else 0.5
    assert decision.probability_best == pytest.approx(stated, abs=0.02)
    assert decision.probability_within == pytest.approx(stats.norm.cdf((behind + 0.001) / error), abs=0.02)
    expected = 200 * ((quantile * padded / (0.001 + behind)) ** 2 - 1)
    assert decision.rows_needed == pytest.approx(expected, rel=0.05)


def test_equal_candidates_share_the_probability_and_any_is_the_best():
    row = np.random.default_rng(0).random(100)
    decision = decide([row, row, row])
    assert decision.probability_best == pytest.approx(1 / 3)
    assert set(decision.left) == {0, 1, 2}
    assert (decision.within, decision.rows_needed, decision.is_decided) == (0.0, 0.0, True)
    assert decision.probability_within == 1.0


def test_no_number_of_rows_tells_equal_means_apart():
    rng = np.random.default_rng(0)
    row = rng.random(100)
    decision = decide([row, rng.permutation(row)])
    assert decision.rows_needed == math.inf
    assert not decision.is_decided


def test_rows_that_repeat_a_prompt_add_nothing():
    losses = np.random.default_rng(0).random((3, 50))
    once = decide(losses)
    thrice = decide(np.repeat(losses, 3, axis=1), groups=[row // 3 for row in range(150)])
    assert thrice.within == pytest.approx(once.within)
    assert thrice.left == once.left
    assert thrice.probability_best == pytest.approx(once.probability_best)
    assert decide(np.repeat(losses, 3, axis=1)).within < once.within


def test_few_prompts():
    alone = decide([[0.1, 0.2], [0.3, 0.4]], groups=["a", "a"])
    assert (alone.within, alone.probability_best, alone.left) == (1.0, None, (0, 1))
    few = decide(np.random.default_rng(0).random((5, 4)))
    assert few.probability_best is None
    assert decide([[0.5, 0.5]]).left == (0,)


def test_bad_losses_are_named():
    with pytest.raises(ValueError, match=r"row 1 of candidate 0 is 1\.5"):
        decide([[0.0, 1.5]])
    with pytest.raises(ValueError, match="candidate 0 has 2 and candidate 1 has 1"):
        decide([[0.0, 1.0], [0.5]])
    with pytest.raises(ValueError, match="`tolerance` must be a loss"):
        decide([[0.0, 1.0]], tolerance=1.0)


def lost_by_law(law, n, group):
    """1 - Pass@n, or the share of groups without a signal, of prompts whose chances follow a Beta law."""
    a, b = law
    wrong = np.exp(special.betaln(a, b + (group or n)) - special.betaln(a, b))
    return wrong if group is None else wrong + np.exp(special.betaln(a + group, b) - special.betaln(a, b))


def simulate_verdicts(k, n, group, prompts, repetitions, rng):
    """As `simulate`, of four candidates that a verifier judges by k samples of each prompt."""
    found = []
    for repetition in range(repetitions):
        if repetition % 10 == 0:
            laws = np.stack([rng.uniform(0.2, 0.5, 4), rng.uniform(1, 2.5, 4)], axis=1)
            truth = np.array([lost_by_law(law, n, group) for law in laws])
        # what is hard is hard for all candidates
        places = special.ndtr(0.7 * rng.normal(size=prompts) + math.sqrt(0.51) * rng.normal(size=(4, prompts)))
        counts = rng.binomial(k, special.betaincinv(laws[:, :1], laws[:, 1:], places))
        if group is None:
            losses = [1 - pass_at_n(row, k=k)[:, n - 1] for row in counts]
        else:
            losses = [1 - group_signal(row, k, group).mixed for row in counts]
        decision = decide(losses, seed=repetition)
        best = int(np.argmin(truth))
        found.append((truth[decision.pick] - truth[best] <= decision.within, best in decision.left))
        found[-1] += (decision.probability_best, decision.pick == best)
    return np.mean(found, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 8], ids=["pass@8", "signal of 8"])
def test_what_is_stated_is_true_of_simulated_verdicts(group, capsys):
    rng = np.random.default_rng(5)
    lines = ["by verdicts on 16 samples: prompts, within holds, best is left, probability stated, came true"]
    for prompts in (60, 250):
        within, left, stated, true = simulate_verdicts(16, 8, group, prompts, 500, rng)
        lines.append(f"{prompts:5} {within:.3f} {left:.3f} {stated:.3f} {true:.3f}")
        assert within >= 0.93
        assert left >= 0.92
        assert stated <= true + 0.12
    with capsys.disabled():
        print("\n" + "\n".join(lines))
