"""Laws of success probabilities: equal to slow maximisation, and ranges that hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from hf_coverage.functional import binomial_mixture
from hf_coverage.functional.binomial_mixture import (
    BetaLaw,
    check_counts,
    fit_beta_law,
    fit_power_law,
    fit_success_law,
    success_range,
)

LAWS = {
    "beta": lambda rng, size: rng.beta(0.05, 1, size),
    "two points": lambda rng, size: np.where(rng.random(size) < 0.5, 0.0, 0.1),
    "power": lambda rng, size: rng.random(size) ** 5,
    "log-normal": lambda rng, size: np.minimum(np.exp(rng.normal(-5, 2, size)), 1.0),
}


def log_likelihood(points, masses, correct, samples):
    logs = special.xlogy(correct[:, None], points) + special.xlog1py((samples - correct)[:, None], -points)
    return float(np.log(np.exp(logs) @ masses).sum())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_step_of_em_makes_the_counts_likelier(data):
    """EM climbs from anywhere but the maximum; a thousand of its steps from the fit gain nothing."""
    samples = np.array(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    correct = np.array([data.draw(st.integers(0, size)) for size in samples])
    law = fit_success_law(correct, samples, n=50)
    assert law.masses.min() >= 0
    assert law.masses.sum() == pytest.approx(1)
    reached = log_likelihood(law.points, law.masses, correct, samples)
    assert law.log_likelihood == pytest.approx(reached, abs=1e-9)
    likelihoods = np.exp(
        special.xlogy(correct[:, None], law.points) + special.xlog1py((samples - correct)[:, None], -law.points)
    )
    masses = 0.9 * law.masses + 0.1 / law.masses.size
    for _ in range(1000):
        shares = likelihoods * masses
        masses = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    assert log_likelihood(law.points, masses, correct, samples) <= reached + 1e-4


def test_the_range_is_that_of_a_general_optimiser(monkeypatch):
    """On a grid of six points, where the constrained problem can be given to one."""
    points = np.array([0.0, 0.01, 0.1, 0.3, 0.7, 1.0])
    monkeypatch.setattr(binomial_mixture, "_grid", lambda n: points)
    correct, samples = np.array([0, 0, 0, 1, 2, 4, 4]), np.array([4, 8, 4, 4, 6, 4, 5])
    values = 1 - (1 - points) ** 30
    best = fit_success_law(correct, samples).log_likelihood
    low, high = success_range(correct, samples, lambda p: 1 - (1 - p) ** 30, drop=1.0)
    limits = [
        {"type": "eq", "fun": lambda masses: masses.sum() - 1},
        {"type": "ineq", "fun": lambda masses: log_likelihood(points, masses, correct, samples) - best + 1.0},
    ]
    for sign, end in ((1, low), (-1, high)):
        found = optimize.minimize(
            lambda masses, sign=sign: sign * float(masses @ values),
            np.full(6, 1 / 6),
            bounds=[(1e-9, 1)] * 6,
            constraints=limits,
            options={"maxiter": 500, "ftol": 1e-10},
        )
        assert sign * found.fun == pytest.approx(end, abs=2e-3)
        # outer: never inside what the optimiser reached
        assert sign * (sign * found.fun - end) >= -1e-6


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_law_that_is_likely_enough_leaves_the_range(data):
    samples = np.array(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=20)))
    correct = np.array([data.draw(st.integers(0, size)) for size in samples])
    n = data.draw(st.sampled_from([1, 7, 1000]))
    law = fit_success_law(correct, samples, n=n)
    values = 1 - (1 - law.points) ** n
    low, high = success_range(correct, samples, lambda p: 1 - (1 - p) ** n, n=n)
    assert 0 <= low <= law.masses @ values <= high <= 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = rng.dirichlet(np.full(law.points.size, 0.05))
        for share in (0.02, 0.1, 0.3, 1.0):
            masses = (1 - share) * law.masses + share * other
            if log_likelihood(law.points, masses, correct, samples) >= law.log_likelihood - 3:
                assert low - 1e-9 <= masses @ values <= high + 1e-9


@pytest.mark.parametrize("law", LAWS)
def test_ranges_hold_the_truth_beyond_the_samples(law):
    """25 draws of 200 prompts and 16 samples each; the benchmark counts 300, of 64 samples too."""
    rng = np.random.default_rng(0)
    p = LAWS[law](rng, 400_000)
    held = []
    for _ in range(25):
        correct = rng.binomial(16, LAWS[law](rng, 200))
        low, high = success_range(correct, 16, lambda p: 1 - (1 - p) ** 256, n=256)
        held.append(low <= (1 - (1 - p) ** 256).mean() <= high)
    assert sum(held) >= 23


def test_beta_laws_against_the_closed_form_and_a_plain_integral():
    assert BetaLaw(2.0, 3.0, 1.0).pass_at(1) == pytest.approx(0.4)
    grid = (np.arange(2_000_000) + 0.5) / 2_000_000
    for law in (BetaLaw(0.7, 3.0, 1.0), BetaLaw(0.7, 3.0, 0.2), BetaLaw(1.5, 0.8, 0.01)):
        density = grid ** (law.alpha - 1) * (1 - grid) ** (law.beta - 1)
        for n in (1, 30, 5000):
            plain = (density * (1 - (1 - law.scale * grid) ** n)).sum() / density.sum()
            assert law.pass_at(n) == pytest.approx(plain, abs=2e-3)


def test_fits_find_what_many_prompts_were_drawn_from():
    rng = np.random.default_rng(0)
    law = fit_beta_law(rng.binomial(20, rng.beta(0.5, 2, 20_000)), 20)
    assert (law.alpha, law.beta, law.scale) == (pytest.approx(0.5, rel=0.05), pytest.approx(2, rel=0.05), 1)
    law = fit_beta_law(rng.binomial(20, 0.3 * rng.beta(1, 1, 20_000)), 20, scaled=True)
    assert law.scale == pytest.approx(0.3, rel=0.1)
    n = np.arange(1, 17)
    power = fit_power_law(np.exp(-2 * n**-0.3))
    assert (power.factor, power.exponent) == (pytest.approx(2), pytest.approx(0.3))
    assert power.pass_at(1000) == pytest.approx(np.exp(-2 * 1000**-0.3))


@pytest.mark.parametrize("correct", [[0, 0, 0], [4, 4, 4], [0, 4, 4], [2, 2, 2]])
def test_counts_without_variety_have_laws_and_ranges(correct):
    law = fit_success_law(correct, 4)
    assert law.mean(lambda p: p) == pytest.approx(np.mean(correct) / 4, abs=1e-4)
    for n in (1, 4, 10**6):
        low, high = success_range(correct, 4, lambda p, n=n: 1 - (1 - p) ** n, n=n)
        assert 0 <= low <= high <= 1
    for scaled in (False, True):
        assert 0 <= fit_beta_law(correct, 4, scaled=scaled).pass_at(100) <= 1


@pytest.mark.parametrize(
    ("correct", "samples", "message"),
    [
        ([], 4, "non-empty 1-d sequence"),
        ([1, 5], 4, "between 0 and `samples` = 4, but row 1 is 5"),
        ([-1], 4, "row 0 is -1"),
        ([1, 1], [4, 0], "`samples` must be at least 1, but row 1 has 0"),
        ([1, 1.5], 4, "whole numbers, but row 1 is 1.5"),
        ([1, np.nan], 4, "whole numbers, but row 1 is nan"),
        ([1, np.inf], 4, "row 1 is inf"),
        ([1, 1], [4], "one number or one a prompt"),
        (["1"], 4, "must hold whole numbers, but holds"),
        ([True], 4, "must hold whole numbers, but holds bool"),
    ],
)
def test_what_are_no_counts_is_said(correct, samples, message):
    with pytest.raises(ValueError, match=message):
        check_counts(correct, samples)


def test_what_leaves_the_unit_interval_and_powers_without_a_slope_are_refused():
    with pytest.raises(ValueError, match=r"into \[0, 1\]"):
        success_range([1], 2, lambda p: 2 * p)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        fit_power_law([1.0, 1.0])
