"""The soft tournament by slow loops, with zeros and duplicates, and its guarantee on enumerated instances."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.miss_profile import miss
from hf_coverage.functional.tournament_soft import envelope, envelope_losses, soft_challenge_rates, soft_losses

LOGPROBS = st.floats(-40, 0) | st.just(-math.inf)


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 8))
    table = draw(st.lists(st.lists(LOGPROBS, min_size=rows, max_size=rows), min_size=1, max_size=5))
    return [*table, table[0]]  # a duplicate


def slow(challenger, defender, n):
    if challenger == -math.inf:
        return 0.0
    if defender == -math.inf:
        return 1.0
    exponent = math.log(n) + defender - challenger
    return math.exp(-math.exp(exponent)) if exponent < 300 else 0.0


@given(tables(), st.floats(1, 1000))
def test_matrix_envelope_and_winner_equal_slow_loops(table, n):
    rates, losses = soft_challenge_rates(table, n), envelope_losses(table, n)
    highest = [max(column) for column in zip(*table)]
    assert envelope(table).tolist() == highest
    for b, defender in enumerate(table):
        assert losses[b].tolist() == pytest.approx([slow(a, p, n) for a, p in zip(highest, defender)], abs=1e-12)
        for a, challenger in enumerate(table):
            expected = np.mean([slow(x, y, n) for x, y in zip(challenger, defender)]) if a != b else 0.0
            assert rates[a, b] == pytest.approx(expected, abs=1e-12)


def test_against_the_density_itself_it_bounds_miss_and_coverage():
    rng = np.random.default_rng(0)
    reference = -rng.exponential(3, 500)
    model = np.minimum(reference - rng.normal(1, 2, 500), 0)
    for n in (1, 4, 16, 100):
        level = soft_losses(reference, model, n).mean()
        assert miss(reference - model, n) <= level
        assert coverage(reference - model, n) <= math.e * level


def test_the_guarantee_holds_on_enumerated_instances():
    # expectations in place of samples: E_{N^(1+a)}(pick) <= 2 min Cov_{N^a} + M N^-(1-a) / e
    rng = np.random.default_rng(1)
    for _ in range(300):
        size, count = int(rng.integers(2, 40)), int(rng.integers(2, 5))
        law = rng.dirichlet(np.full(size, 0.4)) + 1e-12
        models = [rng.dirichlet(np.full(size, 0.4)) + 1e-12 for _ in range(count)]
        n, a = float(rng.uniform(2, 200)), float(rng.uniform(0, 1))
        highest = np.max(models, axis=0)
        scores = [law @ np.exp(-n * model / highest) for model in models]
        pick = models[int(np.argmin(scores))]
        found = law @ np.exp(-(n ** (1 + a)) * pick / law)
        best = min(law @ (law / model >= n**a) for model in models)
        assert found <= 2 * best + count * n ** -(1 - a) / math.e + 1e-9
