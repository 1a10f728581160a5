"""The coverage loss against arithmetic with as many digits as it takes, the distillation weights against a loop."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.functional.objectives import coverage_loss, coverage_loss_factor, distillation_weights

LOG_PROBABILITIES = [
    *[-1e5, -2e4, -800.0, -745.2, -700.0, -100.0, -40.0, -36.7, -28.0, -27.6, -20.0, -18.43, -18.42, -18.41, -10.0],
    *[-5.0, -1.0, -0.7, math.log(0.5), -0.6931, -0.5, -0.1, -1e-3, -1e-8, -1e-12, -1e-16, -1e-300],
]
NS = [1.0, 1.0 + 1e-9, 1.5, 2.0, 16.0, 1e3, 1e6, 1e8, 1e9, 1e12]
RESPONSES = st.lists(st.floats(1e-6, 50) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12)


def exact(log_p, n):
    """The loss and its factor by their formulas, in arithmetic of 60 digits that cannot underflow."""
    with mpmath.workdps(60):
        p, q, n = mpmath.exp(mpmath.mpf(log_p)), -mpmath.expm1(mpmath.mpf(log_p)), mpmath.mpf(n)
        misses = n * (mpmath.log1p(-p) if p < 0.5 else mpmath.log(q))
        hit = -mpmath.expm1(misses)
        loss = -mpmath.log(hit) if hit < 0.5 else -mpmath.log1p(-mpmath.exp(misses))
        return loss, n * p * mpmath.exp(misses) / q / hit


@pytest.mark.parametrize("n", NS)
def test_loss_and_factor_have_the_digits_of_float64(n):
    values = torch.tensor(LOG_PROBABILITIES, dtype=torch.float64)
    losses, factors = coverage_loss(values, n).tolist(), coverage_loss_factor(values, n).tolist()
    for log_p, loss, factor in zip(LOG_PROBABILITIES, losses, factors):
        true_loss, true_factor = exact(log_p, n)
        # A probability near 1 to the power n has n times the relative rounding of log p.
        assert loss == pytest.approx(float(true_loss), rel=1e-9, abs=1e-300), (log_p, n)
        assert factor == pytest.approx(float(true_factor), rel=1e-9, abs=1e-300), (log_p, n)


def test_at_one_sample_it_is_cross_entropy_to_the_bit():
    values = torch.tensor([*LOG_PROBABILITIES, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    loss = coverage_loss(values, 1)
    assert torch.equal(loss, -values)
    loss.sum().backward()
    assert torch.equal(values.grad, -torch.ones_like(values))


@pytest.mark.parametrize("n", [1.0, 2.0, 16.0, 1e6])
def test_the_gradient_is_the_factor_and_that_of_autograd(n):
    values = torch.tensor([-9.0, -3.0, -1.0, -0.2, -0.01], dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * coverage_loss(values, n)).sum(), values)
    plain = -torch.log(1 - (1 - values.exp()) ** n)
    (autograd,) = torch.autograd.grad((weights * plain).sum(), values)
    torch.testing.assert_close(ours, autograd, rtol=1e-6, atol=1e-12)
    assert torch.equal(ours, -weights * coverage_loss_factor(values.detach(), n))


@given(log_p=st.floats(-1e5, 0), log_n=st.floats(0, math.log(1e12)), further=st.floats(0, 5))
def test_laws_of_the_loss(log_p, log_n, further):
    """More samples miss less and pull less; a likelier response misses less; everything stays in its range."""
    value, n = torch.tensor(log_p, dtype=torch.float64), math.exp(log_n)
    loss, factor = coverage_loss(value, n), coverage_loss_factor(value, n)
    tolerance = 1e-9 * (1 + float(loss))
    assert -0.0 <= loss <= -log_p + tolerance
    assert loss >= -log_p - log_n - tolerance  # the union bound: p of one of N hits is at most N p
    assert 0 <= factor <= 1
    assert coverage_loss(value, n * math.exp(further)) <= loss + tolerance
    assert coverage_loss_factor(value, n * math.exp(further)) <= factor + 1e-9
    assert coverage_loss((value + further).clamp_max(0), n) <= loss + tolerance


def test_the_ends_of_the_range():
    ends = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    assert coverage_loss(ends, 16).tolist() == [math.inf, 0.0]
    assert coverage_loss_factor(ends, 16).tolist() == [1.0, 0.0]


def test_the_rounding_of_float32_above_zero_is_taken_for_certainty_but_no_more():
    values = torch.tensor([5e-7, 1e-3])
    for result in (coverage_loss(values, 4), coverage_loss_factor(values, 4)):
        assert result[0] == 0
        assert result[1].isnan()
        assert result.dtype == torch.float32


@pytest.mark.parametrize("n", [0.5, math.inf, math.nan])
@pytest.mark.parametrize("function", [coverage_loss, coverage_loss_factor])
def test_a_number_of_samples_below_one_is_refused(function, n):
    with pytest.raises(ValueError, match="`n` must be a finite number >= 1"):
        function(torch.tensor([-1.0]), n)


def weights_by_definition(token_kl, n):
    """Case by case, as the method states them."""
    budget, spent, weights = math.log(n), 0.0, []
    for e in token_kl:
        if spent + e <= budget:
            weights.append(1.0)
        elif spent > budget:
            weights.append(0.0)
        else:
            weights.append((budget - spent) / e)
        spent += e
    return weights


@given(token_kl=RESPONSES, n=st.floats(1, 1e12) | st.sampled_from([1.0, math.e, math.exp(2.0)]))
def test_weights_are_the_definition_and_stop_the_divergence(token_kl, n):
    e = torch.tensor(token_kl, dtype=torch.float64)
    weights = distillation_weights(e, torch.ones_like(e, dtype=torch.bool), n)
    torch.testing.assert_close(
        weights, torch.tensor(weights_by_definition(token_kl, n), dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert float(weights @ e) == pytest.approx(min(math.log(n), sum(token_kl)), rel=1e-12, abs=1e-12)


@given(rows=st.lists(RESPONSES, min_size=1, max_size=4), n=st.floats(1, 100), left=st.booleans())
def test_rows_and_padding_do_not_matter(rows, n, left):
    length = max(map(len, rows)) + 2
    e = torch.full((len(rows), length), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, token_kl in enumerate(rows):
        place = slice(length - len(token_kl), length) if left else slice(0, len(token_kl))
        e[row, place], mask[row, place] = torch.tensor(token_kl, dtype=torch.float64), True
    weights = distillation_weights(e, mask, n)
    assert not weights[~mask].any()
    alone = [
        distillation_weights(torch.tensor(r, dtype=torch.float64), torch.ones(len(r), dtype=torch.bool), n)
        for r in rows
    ]
    torch.testing.assert_close(weights[mask], torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_without_a_stop_all_tokens_count():
    e = torch.tensor([[1.0, math.inf, 3.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    assert distillation_weights(e, mask, math.inf).tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_an_infinite_divergence_ends_the_response():
    e = torch.tensor([[1.0, math.inf, 0.0, 1.0]])
    assert distillation_weights(e, torch.ones(1, 4, dtype=torch.bool), 8).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_weights_are_constants():
    e = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert not distillation_weights(e, torch.ones(1, 2, dtype=torch.bool), 8).requires_grad


@pytest.mark.parametrize(
    ("mask", "n", "error", "message"),
    [
        (torch.ones(1, 2), 2, TypeError, "`mask` must be boolean, got torch.float32"),
        (torch.ones(1, 3, dtype=torch.bool), 2, ValueError, r"shape of `token_kl`, \(1, 2\), got \(1, 3\)"),
        (torch.ones(1, 2, dtype=torch.bool), 0.5, ValueError, "`n` must be a finite number >= 1"),
    ],
)
def test_what_gives_no_weights_is_refused(mask, n, error, message):
    with pytest.raises(error, match=message):
        distillation_weights(torch.ones(1, 2), mask, n)
