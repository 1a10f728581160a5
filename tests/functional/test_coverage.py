import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.functional.coverage_profile import (
    coverage,
    log_ratios,
    smallest_n,
    stopped_kl,
)
from tests import reference

ratios = st.lists(st.floats(-5, 12) | st.just(math.inf), min_size=1, max_size=40)
ns = st.floats(1, 1e5)


@given(ratios, ns)
def test_coverage_equals_its_definition(values, n):
    assert coverage(values, n) == reference.coverage(values, n)


@given(st.data(), ratios, ns)
def test_weighted_coverage_equals_its_definition(data, values, n):
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(values), max_size=len(values)))
    assert coverage(values, n, weights=weights) == pytest.approx(reference.coverage(values, n, weights), abs=1e-12)


@given(ratios, st.lists(ns, min_size=2, max_size=8))
def test_coverage_falls_in_n_and_many_n_equal_one_by_one(values, grid):
    grid = sorted(grid)
    many = coverage(values, grid)
    assert many.tolist() == [coverage(values, n) for n in grid]
    assert (np.diff(many) <= 0).all()


@given(ratios, st.floats(0, 1))
def test_smallest_n_is_enough_and_nothing_less_is(values, eps):
    n = smallest_n(values, eps)
    if math.isinf(n):
        assert sum(math.isinf(value) for value in values) > eps * len(values)
        return
    assert coverage(values, n) <= eps + 1e-12
    if n > 1:
        assert coverage(values, max(1.0, n * (1 - 1e-5))) > eps


def test_a_tie_with_log_n_counts():
    # 0.3 and 0.3/7: the difference of the logarithms is one rounding error below log 7
    assert coverage(log_ratios([math.log(0.3)], [math.log(0.3 / 7)]), 7) == 1.0


@pytest.mark.parametrize("q", [0.5, 0.3, 0.01])
@pytest.mark.parametrize("n", [2, 5.7, 16, 1000])
def test_the_bernoulli_pair_has_coverage_exactly_q(q, n):
    responses = log_ratios(np.log([q, 1 - q]), np.log([q / n, 1 - q / n]))
    assert coverage(responses, n, weights=[q, 1 - q]) == pytest.approx(q, abs=1e-15)


@given(st.lists(st.lists(st.floats(0, 3), min_size=1, max_size=5), min_size=1, max_size=10), st.floats(1, 100))
def test_stopped_kl_equals_its_definition(rows, n):
    expected = sum(min(math.log(n), sum(row)) for row in rows) / len(rows)
    assert stopped_kl(rows, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [-1.0]), r"`reference_logprobs` .*row 0 is 0.5"),
        (([-1.0, -math.inf], [-1.0, -1.0]), r"`reference_logprobs` .*finite.*row 1 is -inf"),
        (([-1.0, -1.0], [-1.0, math.nan]), r"`logprobs` .*row 1 is nan"),
        (([-1.0, -1.0], [-1.0]), r"same rows, but have 2 and 1"),
        (([], []), r"non-empty"),
    ],
)
def test_bad_log_probabilities_are_refused_by_row(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_ratios(*arguments)


@pytest.mark.parametrize("n", [0.5, math.nan, math.inf, -1])
def test_an_n_below_one_is_refused(n):
    with pytest.raises(ValueError, match=r"`n` must be a finite number >= 1"):
        coverage([0.0], n)


def test_ratios_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="row 1 is -inf"):
        coverage([0.0, -math.inf], 2)
    with pytest.raises(ValueError, match=r"`eps`"):
        smallest_n([0.0], 1.5)
    with pytest.raises(ValueError, match="row 1 sums to -1"):
        stopped_kl([[0.0], [-1.0]], 4)
