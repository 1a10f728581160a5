import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_coverage.functional import bounds
from hf_coverage.functional.coverage_profile import coverage
from tests import reference

ns = st.floats(1, 1e4)


@st.composite
def distributions(draw, count=2, size=6):
    """Random distributions over a small set, far apart as well as close, some with atoms of probability 0."""
    rows = []
    for _ in range(count):
        logits = np.asarray(draw(st.lists(st.floats(-12, 3), min_size=size, max_size=size)))
        rows.append(np.exp(logits) / np.exp(logits).sum())
    if draw(st.booleans()):
        rows[1][draw(st.integers(0, size - 1))] = 0.0
        rows[1] /= rows[1].sum()
    return rows


def ratios(d, p):
    with np.errstate(divide="ignore"):
        return np.log(d) - np.log(p)


@given(distributions(), ns)
def test_kl_bounds_coverage(pair, n):
    d, p = pair
    assert reference.exact_coverage(d, p, n) <= bounds.coverage_bound_from_kl(reference.exact_kl(d, p), n) + 1e-9


@given(distributions(), ns)
def test_hellinger_bounds_coverage_and_is_read_off_log_ratios(pair, n):
    d, p = pair
    exact = reference.exact_hellinger(d, p)
    assert bounds.squared_hellinger(ratios(d, p), weights=d) == pytest.approx(exact, abs=1e-9)
    assert reference.exact_coverage(d, p, n) <= bounds.coverage_bound_from_hellinger(exact, n) + 1e-9


@given(distributions())
def test_coverage_bounds_kl(pair):
    d, p = pair
    assume((p > 0).all())
    rate = bounds.largest_coverage_rate(ratios(d, p), weights=d)
    grid = np.exp(np.linspace(0, ratios(d, p).max(), 500))
    assert rate >= max(reference.exact_coverage(d, p, n) * math.log(n) for n in grid) - 1e-6
    assert reference.exact_kl(d, p) <= bounds.kl_bound_from_coverage(rate, max(0.0, ratios(d, p).max())) + 1e-9


@given(distributions(count=3), ns, ns)
def test_the_chain_rule(trio, m1, m2):
    t, p, d = trio
    assume(m1 >= m2)
    assume((d > 0).all())
    bound = bounds.chain_rule_bound(
        reference.exact_coverage(d, p, m1 / m2), reference.exact_coverage(t, d, m2 * (1 + 1e-6)), m2
    )
    # the event splits at T/D >= M2 or D/p >= M1/M2, so equality at both thresholds has to be kept apart
    assert reference.exact_coverage(t, p, m1 * (1 + 1e-6)) <= bound + 1e-9


@given(distributions(), st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(1, 200), ns)
def test_best_of_n_never_loses_more_than_its_bound(pair, reward, n, m):
    t, p = pair
    loss = math.fsum(t * reward) - reference.best_of_n_reward(p, reward, n)
    assert loss <= bounds.best_of_n_regret_bound(reference.exact_coverage(t, p, m), m, n) + 1e-9


@given(distributions(), st.integers(2, 64))
def test_some_reward_makes_best_of_n_lose_its_floor(pair, n):
    t, p = pair
    reward = [float(q == 0 or d / q >= 2 * n * (1 - 1e-9)) for d, q in zip(t, p)]
    loss = math.fsum(t * reward) - reference.best_of_n_reward(p, reward, n)
    assert loss >= bounds.best_of_n_regret_floor(ratios(t, p), n, weights=t) - 1e-9


@given(distributions(), st.floats(0.02, 0.9), st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_the_budget_keeps_its_promise_and_is_the_least_over_m(pair, regret, reward):
    d, p = pair
    budget = bounds.best_of_n_budget(ratios(d, p), regret, weights=d)
    if math.isinf(budget.n):
        return
    assert budget.coverage <= 0.5 + 1e-12
    n = math.ceil(budget.n)
    if n < 1e6:
        loss = math.fsum(d * reward) - reference.best_of_n_reward(p, reward, n)
        assert loss <= regret + 1e-9
    for m in np.exp(np.linspace(0, math.log(1e4), 400)):
        c = reference.exact_coverage(d, p, m)
        if c <= 0.5 and c < regret:
            assert budget.n <= max(1.0, 2 * m * math.log(1 / (regret - c))) * (1 + 1e-6)


def test_a_coverage_of_one_half_may_be_used_however_it_is_rounded():
    weights = [1 / 6] * 6
    assert sum(weights[:3]) / sum(weights) > 0.5
    budget = bounds.best_of_n_budget([math.inf, math.log(4), math.log(2), 0.0, -1.0, -2.0], 0.75, weights=weights)
    assert (budget.m, budget.n) == pytest.approx((1.0, 2 * math.log(4)), rel=1e-5)


@given(distributions(), st.floats(0.02, 0.45))
def test_fewer_samples_than_necessary_lose_more_than_asked(pair, regret):
    d, p = pair
    necessary = bounds.best_of_n_budget(ratios(d, p), regret, weights=d).necessary_n
    assume(2.01 < necessary < 1e6)
    assert bounds.best_of_n_regret_floor(ratios(d, p), necessary * (1 - 1e-5), weights=d) > regret
    assert bounds.best_of_n_regret_floor(ratios(d, p), necessary, weights=d) <= regret


@given(distributions(), st.integers(3, 1000), st.integers(1, 3))
def test_the_stopped_kl_bounds_coverage(pair, n, horizon):
    """Independent tokens: D and p repeat one next-token distribution `horizon` times; every response is enumerated."""
    d, p = pair
    joint_d, joint_p, sums = np.ones(1), np.ones(1), np.zeros(1)
    for _ in range(horizon):
        joint_d, joint_p = np.outer(joint_d, d).ravel(), np.outer(joint_p, p).ravel()
        sums = np.repeat(sums, d.size) + reference.exact_kl(d, p)
    stopped = float(joint_d @ np.minimum(math.log(n), sums))
    assert reference.exact_coverage(joint_d, joint_p, n) <= bounds.coverage_bound_from_stopped_kl(stopped, n) + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 64))
def test_exact_pass_at_n_equals_its_definition(probabilities, n):
    with np.errstate(divide="ignore"):
        observed = bounds.exact_pass_at_n(np.log(probabilities), n)
    assert observed == pytest.approx(np.mean([1 - (1 - p) ** n for p in probabilities]), abs=1e-12)


def test_a_hopeless_model_has_no_budget():
    budget = bounds.best_of_n_budget([math.inf, math.inf, 0.0], regret=0.2)
    assert budget.n == math.inf
    assert budget.necessary_n == math.inf
    assert bounds.best_of_n_budget([math.inf], regret=0.2).n == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.best_of_n_budget([0.0], 1.0), "`regret` must lie strictly between 0 and 1"),
        (lambda: bounds.coverage_bound_from_kl(-0.1, 4), "`kl` must be >= 0"),
        (lambda: bounds.coverage_bound_from_stopped_kl(0.1, 2), "`n` must be above e"),
        (lambda: bounds.best_of_n_regret_floor([0.0], 1), "`n` must be at least 2"),
        (lambda: bounds.kl_bound_from_coverage(2.0, 1.0), "`rate`"),
    ],
)
def test_bounds_refuse_what_they_do_not_hold_for(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bounds_say_nothing_rather_than_something_wrong():
    assert bounds.coverage_bound_from_kl(0.1, 1) == 1.0
    assert bounds.coverage_bound_from_hellinger(0.1, 1) == 1.0
    assert bounds.best_of_n_regret_bound(0.6, 2, 1000) == 1.0
    assert coverage([1.0], 1) == 1.0
