import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.gradients import (
    global_norm,
    normalize_,
    normalize_coordinates_,
    project_,
    tensor_norms,
)

SHAPES = ((3,), (2, 4), (), (1, 5), (0,))


def draw(seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in SHAPES]


def numbers(tensors):
    return [float(number) for tensor in tensors for number in tensor.double().flatten()]


def norm_by_definition(tensors):
    return math.sqrt(sum(number * number for number in numbers(tensors)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_norms_are_accumulated_in_float32_at_least(dtype, tolerance):
    tensors = draw(0, dtype)
    norms = tensor_norms(tensors)
    assert norms.tolist() == pytest.approx([norm_by_definition([tensor]) for tensor in tensors], rel=tolerance)
    assert float(global_norm(tensors)) == pytest.approx(norm_by_definition(tensors), rel=tolerance)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_half_precision_gradients_may_have_a_norm_beyond_its_largest_number():
    assert float(global_norm([torch.full((100,), 60000.0, dtype=torch.float16)])) == pytest.approx(6e5, rel=1e-3)


def test_mixed_dtypes_are_normed_together():
    tensors = [*draw(0, torch.float32), *draw(1, torch.bfloat16), *draw(2)]
    assert float(global_norm(tensors)) == pytest.approx(norm_by_definition(tensors), rel=1e-6)
    before = numbers(tensors)
    norm = normalize_(tensors, lam=0.5)
    assert numbers(tensors) == pytest.approx([number / (0.5 + float(norm)) for number in before], rel=1e-2)


def test_nothing_has_norm_zero():
    assert float(global_norm([])) == 0
    assert float(normalize_([], lam=0.0)) == 0


@given(st.integers(0, 10**6), st.floats(0, 10), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_normalising_equals_its_definition_in_float64(seed, lam, scale):
    gradients = draw(seed, scale=scale)
    before = numbers(gradients)
    norm = norm_by_definition(gradients)
    assert float(normalize_(gradients, lam)) == pytest.approx(norm, rel=1e-14)
    assert numbers(gradients) == pytest.approx([number / (lam + norm) for number in before], rel=1e-13)


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(1e-9, 1e-3))
@settings(max_examples=50, deadline=None)
def test_the_scale_of_the_gradient_stops_mattering_as_lam_goes_to_zero(seed, scale, lam):
    """g/(lam + ||g||) and cg/(lam + c||g||) differ by at most lam/||g|| + lam/(c||g||), and not at all at lam = 0."""
    plain, scaled = draw(seed), [scale * gradient for gradient in draw(seed)]
    bound = lam / norm_by_definition(plain) + lam / norm_by_definition(scaled)
    normalize_(plain, lam)
    normalize_(scaled, lam)
    difference = norm_by_definition([a - b for a, b in zip(plain, scaled)])
    assert difference <= bound + 1e-13
    normalize_(plain, lam=0.0)
    normalize_(scaled, lam=0.0)
    assert numbers(scaled) == pytest.approx(numbers(plain), rel=1e-12)
    assert norm_by_definition(plain) == pytest.approx(1.0)


def test_each_tensor_may_be_divided_by_its_own_norm():
    gradients, expected = draw(0), draw(0)
    normalize_(gradients, 0.5, norm=tensor_norms(gradients))
    for gradient, before in zip(gradients, expected):
        torch.testing.assert_close(gradient, before / (0.5 + norm_by_definition([before])), rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", [None, torch.zeros(2)])
def test_a_zero_gradient_stays_zero_even_at_lam_zero(norm):
    gradients = [torch.zeros(3), torch.zeros(2)]
    normalize_(gradients, lam=0.0, norm=norm)
    normalize_coordinates_(gradients, lam=0.0)
    assert numbers(gradients) == [0.0] * 5


def test_coordinates_are_divided_by_their_own_size_and_become_signs_at_lam_zero():
    gradients, before = draw(0), numbers(draw(0))
    normalize_coordinates_(gradients, lam=0.5)
    assert numbers(gradients) == pytest.approx([number / (0.5 + abs(number)) for number in before], rel=1e-14)
    normalize_coordinates_(gradients, lam=0.0)
    assert numbers(gradients) == [math.copysign(1.0, number) for number in before]


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.booleans())
@settings(max_examples=50, deadline=None)
def test_projecting_finds_the_nearest_point_of_the_ball(seed, radius, around_a_center):
    point, center = draw(seed), draw(seed + 1) if around_a_center else None
    middle = numbers(center) if around_a_center else [0.0] * len(numbers(point))
    before = numbers(point)
    distance = math.dist(before, middle)
    project_(point, radius, center=center)
    shrink = min(1.0, radius / distance)
    assert numbers(point) == pytest.approx(
        [c + shrink * (p - c) for p, c in zip(before, middle)], rel=1e-12, abs=1e-14
    )
    if distance <= radius:
        assert numbers(point) == before


def test_projecting_leaves_the_center_where_it_is():
    point, center = [torch.zeros(2)], [torch.zeros(2)]
    project_(point, 1.0)
    project_(point, 1.0, center=center)
    assert numbers(point) == numbers(center) == [0.0, 0.0]
    center = [torch.full((2,), 0.1)]
    point = [torch.tensor([5.0, 7.0])]
    project_(point, 1.0, center=center)
    assert center[0].tolist() == torch.full((2,), 0.1).tolist()


def test_parameters_that_require_gradients_are_changed_without_a_graph():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    project_([parameter], 1.0)
    assert parameter.is_leaf
    assert parameter.tolist() == pytest.approx([0.6, 0.8])
