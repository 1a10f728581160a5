"""Steps of rows of tensors against a slow float64 loop over one row at a time, and their laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.row_steps import row_norms, step_rows_
from hf_coverage.functional.ttt_config import StepRule

SHAPES = [(2, 3), (), (4,)]


def draw_problem(seed, rows=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=draw, dtype=dtype) for shape in SHAPES]
    thetas = [origin + torch.randn(rows, *origin.shape, generator=draw, dtype=dtype) for origin in start]
    gradients = [torch.randn(theta.shape, generator=draw, dtype=dtype) for theta in thetas]
    active = torch.rand(rows, generator=draw) < 0.7
    return thetas, gradients, start, active


def numbers(tensors):
    return [float(value) for tensor in tensors for value in tensor.flatten()]


def slow_step(theta, gradient, start, *, rule):
    """One row, all its tensors in one list of numbers."""
    size = rule.lr
    if rule.lam is not None:
        norm = math.sqrt(sum(g * g for g in gradient))
        size = 0.0 if norm == 0 else rule.lr / (rule.lam + norm)
    moved = [o + (1 - rule.decay) * (t - o) + size * g for t, g, o in zip(theta, gradient, start)]
    if rule.radius is not None:
        away = math.sqrt(sum((t - o) ** 2 for t, o in zip(moved, start)))
        factor = min(1.0, rule.radius / max(away, 1e-300))
        moved = [o + factor * (t - o) for t, o in zip(moved, start)]
    return moved


@st.composite
def rules(draw):
    return StepRule(
        lr=draw(st.sampled_from([0.0, 0.1, 2.0])),
        radius=draw(st.sampled_from([None, 0.05, 1.0, 5.0])),
        decay=draw(st.sampled_from([0.0, 0.3, 1.0])),
        lam=draw(st.sampled_from([None, 0.0, 1.0])),
    )


@settings(deadline=None, max_examples=60)
@given(rule=rules(), seed=st.integers(0, 1000))
def test_equal_to_a_slow_loop(rule, seed):
    thetas, gradients, start, active = draw_problem(seed)
    before = [theta.clone() for theta in thetas]
    step_rows_(thetas, gradients, rule=rule, start=start, active=active)
    for row, moves in enumerate(active.tolist()):
        old = numbers(theta[row] for theta in before)
        new = numbers(theta[row] for theta in thetas)
        if not moves:
            assert new == old
            continue
        expected = slow_step(old, numbers(gradient[row] for gradient in gradients), numbers(start), rule=rule)
        assert new == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rule", [StepRule(0.1), StepRule(0.1, radius=0.01, decay=0.5), StepRule(0.1, lam=0.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_make_no_step_keep_their_bits_whatever_their_gradients_are(rule, bad):
    thetas, gradients, start, _ = draw_problem(0, dtype=torch.float32)
    for gradient in gradients:
        gradient[1] = bad
    before = [theta.clone() for theta in thetas]
    step_rows_(thetas, gradients, rule=rule, start=start, active=torch.tensor([True, False, True]))
    for theta, old in zip(thetas, before):
        assert torch.equal(theta[1], old[1])
        assert theta.isfinite().all()
        assert not torch.equal(theta[0], old[0])


def test_rows_inside_of_their_ball_keep_their_bits():
    thetas, gradients, start, _ = draw_problem(0, dtype=torch.float32)
    expected = [theta.clone() for theta in thetas]
    step_rows_(expected, gradients, rule=StepRule(0.1), start=start)
    step_rows_(thetas, gradients, rule=StepRule(0.1, radius=100.0), start=start)
    assert all(torch.equal(theta, wanted) for theta, wanted in zip(thetas, expected))


def test_a_gradient_of_zero_moves_nothing_under_normalised_steps():
    thetas, gradients, start, _ = draw_problem(0)
    before = [theta.clone() for theta in thetas]
    step_rows_(thetas, [0 * gradient for gradient in gradients], rule=StepRule(1.0, lam=0.0), start=start)
    assert all(torch.equal(theta, old) for theta, old in zip(thetas, before))


def test_a_step_size_for_each_row_and_a_start_in_half_precision():
    thetas, gradients, _, _ = draw_problem(0, dtype=torch.float32)
    start = [torch.ones(shape, dtype=torch.bfloat16) for shape in SHAPES]
    sizes = torch.tensor([0.0, 0.1, 1.0])
    before = [theta.clone() for theta in thetas]
    step_rows_(thetas, gradients, rule=StepRule(sizes, decay=0.5), start=start)
    for theta, old, gradient in zip(thetas, before, gradients):
        for row, size in enumerate(sizes.tolist()):
            torch.testing.assert_close(theta[row], 1 + 0.5 * (old[row] - 1) + size * gradient[row])


def test_norms_are_taken_over_all_tensors_of_a_row():
    thetas, *_ = draw_problem(3)
    expected = [math.sqrt(sum(value**2 for value in numbers(theta[row] for theta in thetas))) for row in range(3)]
    assert row_norms(thetas).tolist() == pytest.approx(expected)


def test_a_ball_around_zero_is_refused():
    thetas, gradients, start, _ = draw_problem(0)
    with pytest.raises(ValueError, match="`rule` must have its ball around the start, `center=\"start\"`, got 'zero'"):
        step_rows_(thetas, gradients, rule=StepRule(0.1, radius=1.0, center="zero"), start=start)
