import numpy as np
import pytest
from scipy import stats

from hf_coverage.functional.coverage_profile import coverage_interval
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference


def test_paired_difference_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(0)
    b = rng.choice([0.0, 5.0], p=[0.6, 0.4], size=400)
    a = b.copy()
    a[np.flatnonzero(b == 0)[:20]] = 5.0
    paired = paired_coverage_difference(a, b, 8)
    assert paired.difference == pytest.approx(0.05)
    assert paired.low > 0
    assert paired.p_value < 1e-3
    assert coverage_interval(a, 8)[0] < coverage_interval(b, 8)[1]


def test_paired_difference_is_antisymmetric_and_uncertain_without_disagreement():
    a, b = [0.0, 3.0, 3.0, 0.0, 3.0], [3.0, 3.0, 0.0, 0.0, 0.0]
    forth, back = paired_coverage_difference(a, b, 4), paired_coverage_difference(b, a, 4)
    assert forth.difference == -back.difference
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    same = paired_coverage_difference(a, a, 4)
    assert same.difference == 0
    assert same.p_value == 1
    assert same.low < 0 < same.high


def test_kl_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40) + 0.3, rng.normal(size=40)
    expected = stats.ttest_rel(a, b)
    observed = paired_kl_difference(a, b)
    assert observed.difference == pytest.approx((a - b).mean())
    assert observed.p_value == pytest.approx(expected.pvalue)
    assert (observed.low, observed.high) == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("compare", [lambda a, b: paired_coverage_difference(a, b, 4), paired_kl_difference])
def test_comparisons_refuse_different_rows(compare):
    with pytest.raises(ValueError, match="same rows, but have 2 and 1"):
        compare([0.0, 0.0], [0.0])
