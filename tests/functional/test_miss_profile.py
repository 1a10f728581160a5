"""The miss profile: Theorem M by enumeration, its relations to Cov_N, its interval, its bound and the budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.miss_profile import (
    coverage_bound_from_miss,
    miss,
    miss_bound_from_coverage,
    miss_interval,
    miss_upper_bound,
    miss_values,
    sample_budget,
)
from hf_coverage.functional.paired import paired_miss_difference, rows_to_tell_apart
from hf_coverage.functional.statistics import bounded_mean_upper_bound
from tests import reference

RATIOS = st.lists(st.floats(-30, 40) | st.just(math.inf), min_size=1, max_size=12)
LEVELS = st.floats(1, 1e6)


def exact_miss(reference, model, n):
    """miss_N of two distributions over a finite set, by summation."""
    return math.fsum(d * (1 - min(1.0, p / d)) ** n for d, p in zip(reference, model) if d > 0)


@st.composite
def pairs(draw):
    """A reference and a model over a few responses, zeros among them."""
    size = draw(st.integers(1, 6))
    masses = st.lists(st.integers(0, 30), min_size=size, max_size=size).filter(any)
    return tuple(np.asarray(draw(masses), dtype=float) for _ in range(2))


@settings(max_examples=500)
@given(pairs(), st.integers(1, 40), st.randoms(use_true_random=False))
def test_no_reward_makes_best_of_n_lose_more(pair, n, random):
    good, model = (masses / masses.sum() for masses in pair)
    bound = exact_miss(good, model, n)
    for reward in ([random.random() for _ in good], [random.randint(0, 1) for _ in good]):
        lost = good @ reward - reference.best_of_n_reward(model, reward, n)
        assert lost <= bound + 1e-12


def test_no_reward_among_ten_thousand_instances_and_the_worst_comes_close():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(10_000):
        size, n = rng.integers(1, 6), int(rng.integers(1, 30))
        good, model = rng.dirichlet(np.full(size, 0.5)), rng.dirichlet(np.full(size, 0.3))
        sets = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
        lost = sets @ good - 1 + (1 - np.minimum(sets @ model, 1)) ** n
        bound = exact_miss(good, model, n)
        assert lost.max() <= bound + 1e-12
        if bound > 1e-3:
            shares.append(lost.max() / bound)
    assert np.mean(shares) > 0.7  # it is not a loose bound


@given(st.floats(1e-9, 1), LEVELS)
def test_of_one_right_answer_it_is_what_pass_at_n_lacks(p, n):
    assert miss([-math.log(p)], n) == pytest.approx((1 - p) ** n, rel=1e-6, abs=1e-12)


@given(RATIOS, LEVELS)
def test_equal_to_the_definition_row_by_row(ratios, n):
    slow = [0.0 if r <= 0 else 1.0 if r == math.inf else (-math.expm1(-r)) ** n for r in ratios]
    assert miss_values(ratios, n) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    assert miss(ratios, n) == pytest.approx(math.fsum(slow) / len(slow), rel=1e-9, abs=1e-12)
    assert miss(ratios, [n, 1])[0] == miss(ratios, n)


def test_tiny_ratios_and_large_n_do_not_cancel():
    # 1 - exp(-r) of a tiny r, and a tiny exp(-r) beside 1, are lost in plain arithmetic
    assert miss([1e-20], 1) == pytest.approx(1e-20)
    assert miss([60.0], 1e26) == pytest.approx(math.exp(-1e26 * math.exp(-60.0)), rel=1e-9)
    assert miss([math.inf, 800.0], 1e300) == 1.0


@settings(max_examples=40)
@given(RATIOS, st.floats(1, 200))
def test_it_is_the_mean_of_the_coverage_profile_under_a_beta_law(ratios, n):
    # Cov_M is a step function of 1/M: piece by piece, the law's own distribution function is the integral
    edges = np.unique(np.clip(np.exp(-np.asarray(ratios)), 0, 1))
    law = stats.beta(1, n)
    total = 0.0
    grid = np.concatenate([[0.0], edges, [1.0]])
    for low, high in itertools.pairwise(grid):
        if high > low:
            inside = (low + high) / 2
            total += np.mean([math.exp(-r) <= inside for r in ratios]) * (law.cdf(high) - law.cdf(low))
    assert miss(ratios, n) == pytest.approx(total, abs=1e-9)


def test_the_beta_law_by_numerical_integration():
    ratios = np.random.default_rng(0).normal(2, 2, 50)
    for n in (1, 3.5, 16):
        found, _ = integrate.quad(
            lambda u, n=n: coverage(ratios, 1 / u) * stats.beta.pdf(u, 1, n),
            0,
            1,
            limit=500,
            points=np.exp(-ratios[ratios > 0]),
        )
        assert miss(ratios, n) == pytest.approx(found, abs=1e-5)


@given(RATIOS, LEVELS, LEVELS)
def test_what_it_says_of_cov_n_and_cov_n_of_it(ratios, n, m):
    slack = 1e-5  # Cov_N counts what rounding puts a hair below N
    assert miss(ratios, n) <= miss_bound_from_coverage(coverage(ratios, m), m, n) + slack
    assert coverage(ratios, n + 1) <= coverage_bound_from_miss(miss(ratios, n), n) + slack
    assert coverage_bound_from_miss(miss(ratios, n), n) <= math.e * miss(ratios, n) + 1e-12


@given(RATIOS, LEVELS, LEVELS)
def test_it_falls_in_n_and_so_do_the_ends_of_its_interval(ratios, n, m):
    n, m = sorted((n, m))
    assert miss(ratios, m) <= miss(ratios, n)
    for later, before in zip(miss_interval(ratios, m), miss_interval(ratios, n)):
        assert later <= before + 1e-9
    assert miss_upper_bound(ratios, m) <= miss_upper_bound(ratios, n) + 1e-9


@given(st.lists(st.tuples(st.floats(-5, 20), st.integers(0, 4), st.sampled_from("abcd")), min_size=2, max_size=20))
def test_weights_are_repetitions(rows):
    ratios, weights, _ = map(list, zip(*rows))
    if not any(weights):
        return
    repeated = [ratio for ratio, weight in zip(ratios, weights) for _ in range(weight)]
    assert miss(ratios, 8, weights=weights) == pytest.approx(miss(repeated, 8))


class TestUpperBound:
    def test_it_is_the_best_bet_found_by_a_slow_search(self):
        values = np.random.default_rng(1).beta(0.3, 3, 30)
        found = bounded_mean_upper_bound(values)

        def log_capital(mean):
            rate = math.log(20) / values.size
            seen = 0.0
            if -math.log(1 - mean) > rate:
                seen = optimize.brentq(lambda a: stats.entropy([a, 1 - a], [mean, 1 - mean]) - rate, 1e-300, mean)
            stake, money, total = 1 - seen / mean, 0.5, 0.0
            while stake < 1:
                total += money * math.prod(1 + stake * (mean - x) / (1 - mean) for x in values)
                stake, money = 2 * stake, money / 2
            total += 2 * money * math.prod(1 + (mean - x) / (1 - mean) for x in values)
            return math.log(total)

        assert log_capital(found) == pytest.approx(math.log(20), abs=1e-6)
        assert log_capital(found - 1e-3) < math.log(20) < log_capital(found + 1e-3)

    @pytest.mark.parametrize("rate", [0.002, 0.02, 0.3])
    @pytest.mark.parametrize("prompts", [50, 400])
    def test_it_holds_at_least_as_often_as_it_says(self, rate, prompts):
        rng = np.random.default_rng(prompts)
        held = [bounded_mean_upper_bound((rng.random(prompts) < rate).astype(float)) >= rate for _ in range(300)]
        assert np.mean(held) >= 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / 300)

    def test_it_holds_for_groups_of_unequal_weight(self):
        rng = np.random.default_rng(5)
        held = []
        for _ in range(300):
            groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
            values = (rng.random(60) < 0.1)[groups].astype(float)  # all rows of a prompt alike
            held.append(bounded_mean_upper_bound(values, groups=groups.tolist()) >= 0.1)
        assert np.mean(held) >= 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / 300)

    def test_many_values_are_rounded_up_and_hardly(self):
        values = np.random.default_rng(0).beta(0.5, 5, 40_000)
        several = np.array_split(np.sort(values), 4)
        merged = bounded_mean_upper_bound(np.concatenate(several))
        weighted = bounded_mean_upper_bound(values, weights=np.append(np.ones(values.size - 1), 1.0 + 1e-9))
        assert weighted <= merged <= weighted + 2e-4

    def test_ends(self):
        assert bounded_mean_upper_bound([1.0] * 5) == 1.0
        assert bounded_mean_upper_bound([0.0]) == pytest.approx(0.95)
        assert bounded_mean_upper_bound([0.0] * 20) == pytest.approx(1 - 0.05 ** (1 / 20), abs=0.02)
        with pytest.raises(ValueError, match=r"row 1 is 1\.5"):
            bounded_mean_upper_bound([0.0, 1.5])


class TestBudget:
    def test_one_answer_log_normal(self):
        # the example of a log-normal law of D/p, with quantiles in place of draws
        ratios = 1 + 1.5 * stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
        budget = sample_budget(ratios, 0.1)
        assert miss(ratios, budget.n) <= 0.1 < miss(ratios, budget.n - 1)
        assert budget.necessary_n <= budget.n <= budget.guaranteed_n <= budget.paper_n

    @settings(max_examples=50, deadline=None)
    @given(RATIOS, st.floats(0.01, 0.9))
    def test_least_whole_number(self, ratios, regret):
        n = sample_budget(ratios, regret).n
        if math.isinf(n):
            assert coverage(ratios, 1e15) > regret or max(ratios) > 30
        elif n < 1e12:
            assert n == int(n)
            assert miss(ratios, n) <= regret
            assert n == 1 or miss(ratios, n - 1) > regret

    def test_no_number_of_samples_reaches_what_has_probability_0(self):
        budget = sample_budget([0.0, math.inf], 0.2)
        assert budget.n == budget.guaranteed_n == math.inf

    def test_few_rows_guarantee_nothing(self):
        budget = sample_budget([0.0] * 10, 0.05)
        assert (budget.n, budget.guaranteed_n) == (1.0, math.inf)

    def test_the_guarantee_is_wrong_as_rarely_as_it_says(self):
        rng = np.random.default_rng(2)
        wrong = 0
        for _ in range(150):
            # a tenth of the responses need thousands of samples
            hard = rng.random(150) < 0.1
            budget = sample_budget(np.where(hard, 9.0, 0.5), 0.12)
            truth = 0.1 * miss([9.0], budget.guaranteed_n) + 0.9 * miss([0.5], budget.guaranteed_n)
            wrong += truth > 0.12 + 1e-12
        assert wrong <= 150 * 0.05 + 2.6 * math.sqrt(150 * 0.05 * 0.95)


class TestPairs:
    def test_neighbours_need_far_fewer_rows_than_by_cov_n(self):
        rng = np.random.default_rng(0)
        first = rng.normal(1.5, 1.5, 4000)
        second = first + 0.05 + 0.02 * rng.normal(size=4000)
        by_miss = rows_to_tell_apart(miss_values(first, 16), miss_values(second, 16))
        by_cov = rows_to_tell_apart(first >= math.log(16), second >= math.log(16))
        assert by_miss < by_cov / 10

    def test_no_difference_leaves_what_was_not_seen(self):
        result = paired_miss_difference([1.0] * 50, [1.0] * 50, 4)
        assert result.difference == 0.0
        assert result.p_value == 1.0
        assert -0.1 < result.low < -0.02 < 0.02 < result.high < 0.1

    @pytest.mark.parametrize(("rare", "rows"), [(0.005, 400), (0.05, 200), (0.3, 100)])
    def test_the_interval_holds_the_truth_as_often_as_it_says(self, rare, rows):
        rng = np.random.default_rng(rows)
        held = 0
        for _ in range(100):
            lost, noise = rng.random(rows) < rare, 0.1 * rng.normal(size=rows)
            result = paired_miss_difference(np.where(lost, 9.0, 1.0) + noise, np.full(rows, 1.0), 8)
            grid = stats.norm.ppf((np.arange(400) + 0.5) / 400) * 0.1
            truth = rare * miss(9 + grid, 8) + (1 - rare) * miss(1 + grid, 8) - miss([1.0], 8)
            held += result.low <= truth <= result.high
        assert held >= 100 * 0.93 - 2.6 * math.sqrt(100 * 0.93 * 0.07)
