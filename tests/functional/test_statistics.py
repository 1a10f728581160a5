import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_coverage.functional.statistics import clustered_mean, group_codes, mean_interval, proportion_interval


def test_independent_rows_give_the_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    estimate = clustered_mean(values)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.standard_error == pytest.approx(stats.sem(values))
    assert mean_interval(estimate) == pytest.approx(
        stats.t.interval(0.95, 49, loc=values.mean(), scale=stats.sem(values))
    )


def test_equal_groups_give_the_standard_error_of_their_means():
    values = np.random.default_rng(0).normal(size=(20, 5)) + np.arange(20)[:, None]
    estimate = clustered_mean(values.ravel(), groups=np.repeat(np.arange(20), 5))
    assert estimate.standard_error == pytest.approx(stats.sem(values.mean(1)))
    assert estimate.num_groups == 20


@given(st.lists(st.integers(1, 4), min_size=2, max_size=10))
def test_integer_weights_equal_repeated_rows_of_one_group(counts):
    values = np.linspace(-1, 2, len(counts))
    weighted = clustered_mean(values, weights=counts)
    repeated = clustered_mean(np.repeat(values, counts), groups=np.repeat(np.arange(len(counts)), counts))
    assert weighted == pytest.approx(repeated)


def test_infinite_values_make_the_mean_infinite_and_one_group_leaves_the_error_open():
    assert clustered_mean([1.0, math.inf]).mean == math.inf
    assert math.isnan(clustered_mean([1.0, math.inf]).standard_error)
    assert math.isnan(clustered_mean([1.0, 2.0], groups=["a", "a"]).standard_error)
    assert proportion_interval([True, False], groups=["a", "a"]) == (0.0, 1.0)


@pytest.mark.parametrize(("hits", "rows"), [(0, 30), (3, 30), (30, 30)])
def test_independent_rows_give_clopper_and_pearson_s_interval(hits, rows):
    expected = stats.binomtest(hits, rows).proportion_ci(0.9, "exact")
    observed = proportion_interval([True] * hits + [False] * (rows - hits), confidence=0.9)
    assert observed == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 1, 2, 2, 2]])
def test_nothing_hit_begins_at_exactly_zero_and_everything_ends_at_exactly_one(groups):
    assert proportion_interval([False] * 9, groups=groups)[0] == 0
    assert proportion_interval([True] * 9, groups=groups)[1] == 1


def test_copies_of_a_row_in_one_group_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.3
    once = proportion_interval(hits, groups=np.arange(60))
    copied = proportion_interval(np.repeat(hits, 8), groups=np.repeat(np.arange(60), 8))
    assert copied == pytest.approx(once)
    none = proportion_interval(np.zeros(480, bool), groups=np.repeat(np.arange(60), 8))
    assert none[1] > 0.04  # sixty prompts without a hit, not 480 rows


def test_group_codes_are_stable_and_tell_labels_apart():
    labels = ["1", 1, [1, 2], [12], [{"role": "user", "content": "1"}], "1"]
    codes = group_codes(labels)
    assert codes[0] == codes[-1]
    assert len(set(codes.tolist())) == 5
    assert group_codes(labels[:1])[0] == codes[0]
    assert group_codes(codes) is codes


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "one entry a row"), ([1.0, -1.0], "row 1 has -1.0"), ([0.0, 0.0], "all 0"), ([1.0, math.nan], "row 1")],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        clustered_mean([1.0, 2.0], weights=weights)


def test_bad_groups_and_confidence_are_refused():
    with pytest.raises(ValueError, match=r"`groups` must have one label a row, 2 in all, but has 1"):
        clustered_mean([1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match=r"`confidence`"):
        proportion_interval([True], confidence=95)
