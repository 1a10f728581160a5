"""The bonus and the selection against inverses recomputed in full at every step, and their closed forms and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_coverage.functional.exploration import elliptical_bonus, elliptical_selection, sparse_projection

# Small integers: equal rows, zero rows and exact ties are common.
tables = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 7), st.integers(1, 5)),
    elements=st.integers(-3, 3).map(float),
)
lambdas = st.sampled_from([1e-4, 0.1, 1.0, 50.0])


def dense_bonus(features, seen, lam):
    """The definition: S summed up response by response, and inverted."""
    covariance = lam * np.eye(features.shape[1])
    for row in seen:
        covariance = covariance + np.outer(row, row)
    inverse = np.linalg.inv(covariance)
    return np.array([row @ inverse @ row for row in features])


def dense_selection(features, count, lam):
    """The definition: the full inverse at every step; bonuses that differ by rounding are ties, for the first row."""
    chosen = []
    for _ in range(count):
        bonus = dense_bonus(features, features[chosen], lam)
        bonus[chosen] = -np.inf
        chosen.append(int(np.flatnonzero(bonus >= bonus.max() - 1e-9 * max(1.0, bonus.max()))[0]))
    return chosen


@settings(max_examples=200, deadline=None)
@given(tables, lambdas)
def test_selection_is_dense_linear_algebra_recomputed_at_every_step(features, lam):
    assert elliptical_selection(features, lam=lam).tolist() == dense_selection(features, len(features), lam)


@pytest.mark.parametrize(("rows", "size"), [(40, 12), (12, 40)])
def test_selection_of_real_numbers_is_dense_linear_algebra(rows, size):
    """More responses than dimensions, and more dimensions than responses, around a large common mean."""
    features = np.random.default_rng(rows).normal(size=(rows, size)) + 5
    assert elliptical_selection(features, lam=0.3).tolist() == dense_selection(features, rows, 0.3)


@settings(max_examples=200, deadline=None)
@given(st.data(), lambdas)
def test_bonus_is_its_definition(data, lam):
    features = data.draw(tables)
    seen = data.draw(
        arrays.arrays(
            np.float64,
            st.tuples(st.integers(1, 6), st.just(features.shape[1])),
            elements=st.integers(-3, 3).map(float),
        )
    )
    expected = dense_bonus(features, seen, lam)
    np.testing.assert_allclose(elliptical_bonus(features, seen, lam=lam), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        elliptical_bonus(features, lam=lam), dense_bonus(features, features, lam), rtol=1e-6, atol=1e-8
    )


@settings(deadline=None)
@given(tables, lambdas)
def test_the_bonus_of_a_group_is_in_the_unit_interval_and_sums_to_its_effective_dimension(features, lam):
    bonus = elliptical_bonus(features, lam=lam)
    assert (bonus >= 0).all()
    assert (bonus <= 1 + 1e-12).all()
    squared = np.linalg.svd(features, compute_uv=False) ** 2
    np.testing.assert_allclose(bonus.sum(), (squared / (squared + lam)).sum(), atol=1e-9)


def test_closed_forms():
    one = np.array([[3.0, 4.0]])
    np.testing.assert_allclose(elliptical_bonus(one, lam=5), 25 / 30)
    alike = np.repeat(one, 4, axis=0)
    np.testing.assert_allclose(elliptical_bonus(alike, lam=5), 25 / (5 + 4 * 25))
    orthogonal = np.diag([1.0, 2.0, 3.0])
    np.testing.assert_allclose(elliptical_bonus(orthogonal, lam=2), [1 / 3, 4 / 6, 9 / 11])
    np.testing.assert_allclose(elliptical_bonus(orthogonal, np.zeros((1, 3)), lam=2), [0.5, 2, 4.5])
    # where lambda is small, what points in a direction of its own has bonus 1 and two alike share one
    np.testing.assert_allclose(elliptical_bonus([[1.0, 0], [1, 0], [1, 1]], lam=1e-9), [0.5, 0.5, 1], atol=1e-6)


@settings(deadline=None)
@given(st.data(), lambdas)
def test_nothing_changes_with_the_order_the_axes_or_the_unit(data, lam):
    features = data.draw(tables)
    order = data.draw(st.permutations(range(len(features))))
    bonus = elliptical_bonus(features, lam=lam)
    np.testing.assert_allclose(elliptical_bonus(features[order], lam=lam), bonus[order], atol=1e-9)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(features.shape[1],) * 2))
    np.testing.assert_allclose(elliptical_bonus(features @ rotation, lam=lam), bonus, atol=1e-9)
    np.testing.assert_allclose(elliptical_bonus(8 * features, lam=64 * lam), bonus, atol=1e-12)
    signs = np.where(np.arange(len(features)) % 2, 1.0, -1.0)[:, None]
    np.testing.assert_allclose(elliptical_bonus(signs * features, lam=lam), bonus, atol=1e-12)
    selection = elliptical_selection(features, lam=lam)
    assert elliptical_selection(8 * features, lam=64 * lam).tolist() == selection.tolist()
    assert elliptical_selection(signs * features, lam=lam).tolist() == selection.tolist()


def test_without_ties_the_selection_follows_the_rows():
    features = np.random.default_rng(2).normal(size=(20, 6))
    order = np.random.default_rng(3).permutation(20)
    selection = elliptical_selection(features, 7)
    assert order[elliptical_selection(features[order], 7)].tolist() == selection.tolist()


def test_ties_go_to_the_earlier_row():
    assert elliptical_selection(np.ones((5, 3))).tolist() == [0, 1, 2, 3, 4]
    assert elliptical_selection(np.zeros((3, 2))).tolist() == [0, 1, 2]
    assert elliptical_selection([[0.0, 1], [1, 0], [0, 1], [1, 0]]).tolist() == [0, 1, 2, 3]
    # equal norms, whose sums round differently: the second is larger by 6e-17
    assert elliptical_selection([[0.1, 0.2, 0.5], [0.5, 0.1, 0.2]]).tolist() == [0, 1]
    # a matrix product may round equal rows differently, by their place in it
    features = np.repeat(np.random.default_rng(0).normal(size=(3, 513)), 11, axis=0)
    selection = elliptical_selection(features)
    assert sorted(selection[:3] % 11) == [0, 0, 0]
    for block in range(3):
        own = selection[selection // 11 == block]
        assert own.tolist() == sorted(own)


def test_a_smaller_k_is_the_beginning_of_a_larger_one():
    features = np.random.default_rng(4).normal(size=(15, 4))
    whole = elliptical_selection(features).tolist()
    assert sorted(whole) == list(range(15))
    assert elliptical_selection(features, 6).tolist() == whole[:6]


def test_a_duplicate_comes_after_whatever_is_new():
    features = [[5.0, 0, 0], [5, 0, 0], [0, 0.1, 0], [0, 0, 0.2]]
    assert elliptical_selection(features, lam=1e-3).tolist() == [0, 3, 2, 1]


def test_large_bonuses_do_not_cancel():
    """A bonus of 1e18 in the beginning, a tie, and of 1 and 4 once the common direction is taken."""
    features = np.array([[1e6, 0, 0], [1e6, 1e-3, 0], [1e6, 0, 2e-3]])
    assert elliptical_selection(features, lam=1e-6).tolist() == [0, 2, 1]
    np.testing.assert_allclose(elliptical_bonus([[1e6, 1e-3]], [[1e6, 0.0]], lam=1e-6), [2.0], rtol=1e-9)


def test_inputs_stay_as_they_are():
    features = np.random.default_rng(5).normal(size=(6, 4))
    before = features.copy()
    elliptical_selection(features)
    elliptical_bonus(features, features)
    np.testing.assert_array_equal(features, before)


def test_projection_keeps_norms_on_average_and_is_sparse():
    features = np.random.default_rng(6).normal(size=(200, 900)) + 1
    projection = sparse_projection(900, 300, seed=1)
    assert (projection != 0).mean() == pytest.approx(1 / 30, rel=0.05)
    assert abs((projection > 0).sum() / (projection != 0).sum() - 0.5) < 0.02
    assert np.unique(np.abs(projection)).tolist() == pytest.approx([0, np.sqrt(30 / 300)])
    ratio = np.square(features @ projection).sum(axis=1) / np.square(features).sum(axis=1)
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(projection, sparse_projection(900, 300, seed=1))
    assert (projection != sparse_projection(900, 300, seed=2)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: elliptical_bonus([[1.0]], lam=0.0), "`lam` must be a finite number above 0.*is 0.0"),
        (lambda: elliptical_selection([[1.0]], lam=np.inf), "`lam` must be a finite number above 0.*is inf"),
        (lambda: elliptical_bonus([1.0, 2.0]), r"`features` must have shape \(responses, d\).*has \(2,\)"),
        (lambda: elliptical_selection(np.ones((0, 3))), r"`features` must have shape.*has \(0, 3\)"),
        (lambda: elliptical_bonus([[1.0, 2]], [[1.0]]), r"`seen` must have shape \(responses, 2\).*has \(1, 1\)"),
        (lambda: elliptical_bonus([[1.0], [np.nan]]), "`features` must be finite, but row 1 is not"),
        (lambda: elliptical_selection([[np.inf]]), "`features` must be finite, but row 0 is not"),
        (
            lambda: elliptical_selection([[1.0], [2]], 3),
            "`k` must be between 1 and the number of responses, 2, but is 3",
        ),
        (lambda: elliptical_selection([[1.0], [2]], 0), "`k` must be between 1 .* is 0"),
        (lambda: sparse_projection(0, 3), "`size` and `dim` must be at least 1, got 0 and 3"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
