"""The logarithm of a mean, and its standard error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_coverage.functional.monte_carlo import log_mean_exp

LOGS = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(2, 6)), elements=st.floats(-30, 0))


@given(LOGS)
def test_against_the_definition(log_values):
    log_mean, standard_error = log_mean_exp(log_values)
    for row, mean, error in zip(log_values, log_mean, standard_error):
        values = np.exp(row)
        np.testing.assert_allclose(mean, np.log(values.mean()), atol=1e-9)
        np.testing.assert_allclose(error, values.std(ddof=1) / np.sqrt(len(row)) / values.mean(), atol=1e-9)


@given(LOGS, st.floats(-2000, 0))
def test_a_common_factor_moves_the_mean_alone(log_values, shift):
    mean, error = log_mean_exp(log_values)
    moved_mean, moved_error = log_mean_exp(log_values + shift)
    np.testing.assert_allclose(moved_mean, mean + shift, atol=1e-9)
    np.testing.assert_allclose(moved_error, error, rtol=1e-6, atol=1e-12)


def test_zeros():
    mean, error = log_mean_exp([[-np.inf, 0.0], [-np.inf, -np.inf], [-3.0, -3.0]])
    np.testing.assert_allclose(mean, [np.log(0.5), -np.inf, -3.0])
    np.testing.assert_allclose(error, [1.0, np.inf, 0.0])


@pytest.mark.parametrize("values", [[0.0], 0.0, [[0.0], [1.0]]])
def test_one_sample_has_no_error(values):
    with pytest.raises(ValueError, match="at least 2 samples"):
        log_mean_exp(values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_logarithm_of_a_probability(value):
    with pytest.raises(ValueError, match="finite or -inf"):
        log_mean_exp([0.0, value])
