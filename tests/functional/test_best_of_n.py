"""What Best-of-N gets out of k responses, against going through all subsets of N of them."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hf_coverage.functional.best_of_n import best_of_n_reward, pass_at_n
from hf_coverage.functional.bounds import best_of_n_budget, best_of_n_regret_bound, least_regret_bound
from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.statistics import bounded_mean_interval

tables = st.tuples(st.integers(1, 3), st.integers(1, 6))
# Few different values, so that there are ties.
rewards = tables.flatmap(lambda shape: arrays(float, shape, elements=st.sampled_from([-2.0, 0.0, 0.25, 1.0])))


def over_subsets(values, choose):
    """`(P, k)`: mean over all subsets of N of what is chosen from each."""
    k = values.shape[-1]
    means = [
        [np.mean([choose(row, list(subset)) for subset in combinations(range(k), n)]) for n in range(1, k + 1)]
        for row in range(len(values))
    ]
    return np.array(means)


@given(rewards)
def test_pass_at_n_is_the_mean_over_all_subsets(table):
    solved = table > 0
    expected = over_subsets(solved, lambda row, subset: solved[row, subset].any())
    np.testing.assert_allclose(pass_at_n(solved), expected, atol=1e-12)
    np.testing.assert_array_equal(pass_at_n(solved.sum(axis=1), k=solved.shape[1]), pass_at_n(solved))


@given(rewards)
def test_best_of_n_reward_is_the_mean_over_all_subsets(table):
    expected = over_subsets(table, lambda row, subset: table[row, subset].max())
    np.testing.assert_allclose(best_of_n_reward(table), expected, atol=1e-12)
    np.testing.assert_allclose(best_of_n_reward(table, proxy=table), expected, atol=1e-12)


@given(tables.flatmap(lambda shape: arrays(float, (2, *shape), elements=st.sampled_from([-2.0, 0.0, 1.0, 3.0]))))
def test_what_a_proxy_chooses_is_the_mean_over_all_subsets_and_over_its_ties(both):
    table, proxy = both

    def chosen(row, subset):
        scores = proxy[row, subset]
        return table[row, subset][scores == scores.max()].mean()

    np.testing.assert_allclose(best_of_n_reward(table, proxy=proxy), over_subsets(table, chosen), atol=1e-12)


@given(rewards)
def test_more_samples_are_never_worse(table):
    best = best_of_n_reward(table)
    assert (np.diff(best, axis=1) >= -1e-12).all()
    np.testing.assert_allclose(best[:, 0], table.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(best[:, -1], table.max(axis=1), atol=1e-12)


def test_many_samples_neither_overflow_nor_cancel():
    k = 5000  # C(5000, 2500) has 1,500 digits
    passes = pass_at_n([0, 1, k - 1, k], k=k)
    np.testing.assert_array_equal(passes[0], 0.0)
    np.testing.assert_allclose(passes[1], np.arange(1, k + 1) / k, rtol=1e-10)
    np.testing.assert_array_equal(passes[2], [(k - 1) / k, *[1.0] * (k - 1)])
    np.testing.assert_array_equal(passes[3], 1.0)


@given(arrays(float, st.integers(1, 30), elements=st.floats(-3, 8)), st.floats(1, 500))
@settings(max_examples=50)
def test_the_least_regret_bound_is_the_least_over_all_m(ratios, n):
    grid = np.exp(np.linspace(0, 9, 400))
    expected = min(best_of_n_regret_bound(coverage(ratios, m), m, n) for m in grid)
    bound = least_regret_bound(ratios, n)
    assert bound <= expected + 2e-6  # M lies above a ratio by the tolerance of a tie
    # and some M attains it: a grid that is this fine comes close
    assert bound >= min(best_of_n_regret_bound(coverage(ratios, m * 1.03), m, n) for m in grid) - 1e-12
    assert least_regret_bound(ratios, n + 1) <= bound


distributions = arrays(float, 12, elements=st.floats(0.001, 1)).map(lambda weights: weights / weights.sum())


@given(distributions, distributions, arrays(float, 12, elements=st.floats(0, 1)), st.integers(1, 64))
def test_best_of_n_keeps_what_the_bound_promises(target, model, worth, n):
    """Exactly, over 12 responses: what T gets and Best-of-N from p does not is within the bound."""
    order = np.argsort(worth)
    below = np.append(0.0, np.cumsum(model[order]))
    best = worth[order] @ np.diff(below**n)
    bound = least_regret_bound(np.log(target / model), n, weights=target)
    assert target @ worth - best <= bound + 1e-9


def test_the_budget_keeps_the_regret_that_was_asked_for():
    ratios = np.random.default_rng(0).normal(0.5, 1.5, 400)
    budget = best_of_n_budget(ratios, 0.2)
    assert least_regret_bound(ratios, budget.n) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: best_of_n_reward([[0.0, 1.0], [1.0, np.nan]]), ValueError, "row 1, column 1 is nan"),
        (lambda: best_of_n_reward([[0.0, np.inf]]), ValueError, "row 0, column 1 is inf"),
        (lambda: best_of_n_reward([0.0, 1.0]), ValueError, r"shape \(prompts, k\)"),
        (lambda: best_of_n_reward([[0.0, 1.0]], proxy=[[np.nan, 1.0]]), ValueError, "`proxy` must be finite"),
        (lambda: best_of_n_reward([[0.0, 1.0]], proxy=[[1.0]]), ValueError, "`proxy` must have the shape"),
        (lambda: pass_at_n([1, 2]), ValueError, "`k` is None"),
        (lambda: pass_at_n([1, 4], k=3), ValueError, "row 1 is 4"),
        (lambda: pass_at_n([-1], k=3), ValueError, "row 0 is -1"),
        (lambda: pass_at_n([0.5], k=3), TypeError, "booleans or integers"),
        (lambda: pass_at_n([[True]], k=1), ValueError, "table of booleans"),
        (lambda: pass_at_n(np.zeros((0, 4), bool)), ValueError, "table of booleans"),
    ],
)
def test_what_is_no_table_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(st.integers(2, 60), st.data())
@settings(deadline=None, max_examples=40)
def test_the_interval_of_a_bounded_mean_is_clopper_and_pearson_s_for_proportions(size, data):
    count = data.draw(st.integers(0, size))
    found = bounded_mean_interval(np.arange(size) < count)
    exact = stats.binomtest(count, size).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)


def test_the_interval_of_a_bounded_mean_narrows_with_the_spread():
    wide, narrow = (bounded_mean_interval(0.8 + np.tile([spread, -spread], 50)) for spread in (0.2, 0.05))
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1] <= 1
    assert bounded_mean_interval([0.9]) == (0.0, 1.0)
