"""The walk against its definition step by step, and what it samples against going through all leaves."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.prefix_tree import PrefixTree, leaf_target, total_variation
from hf_coverage.functional.random_walk import (
    guided_law,
    guided_probabilities,
    metropolis_acceptance,
    output_law,
    stationary_law,
    transition_matrix,
    visit_law,
    walk_probabilities,
)

VALUES = [0.0, 0.25, 1.0, 3.0]


@st.composite
def trees(draw, values=VALUES):
    """A tree of depth up to 3 with up to 3 tokens, some responses short, and any values."""
    seed, tokens, depth = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)

    def children(prefix):
        ended = len(prefix) == depth or (prefix and rng.random() < 0.2)
        return [] if ended else list(enumerate(np.log(rng.dirichlet(np.ones(tokens)))))

    return PrefixTree.grow(children, lambda prefix: rng.choice(values))


def biased(horizon, factor, tokens=2):
    """V is 1 at every leaf of a uniform tree, and wrong by `factor` at inner prefixes that end with token 1."""
    children = list(enumerate([math.log(1 / tokens)] * tokens))
    return PrefixTree.grow(
        lambda prefix: children if len(prefix) < horizon else [],
        lambda prefix: factor if len(prefix) < horizon and prefix[-1:] == (1,) else 1.0,
    )


def matrix_of_steps(tree, judged, laziness):
    """The transition matrix, one prefix at a time from what a step is said to be."""
    matrix = np.zeros((len(tree), len(tree)))
    index = {prefix: node for node, prefix in enumerate(tree.prefixes)}
    for node, prefix in enumerate(tree.prefixes):
        below = [child for child in range(1, len(tree)) if tree.prefixes[child][:-1] == prefix]
        parent = index[prefix[:-1]] if prefix else node
        if judged == "all":
            values, logprobs = tree.values[below], tree.logprobs[below]
            law = walk_probabilities(logprobs, values, tree.values[node], has_parent=node > 0, laziness=laziness)
            for target, chance in zip([node, parent, *below], law):
                matrix[node, target] += chance
            continue
        proposals = [(parent, 0.5), *((child, math.exp(tree.logprobs[child]) / 2) for child in below)]
        for target, chance in proposals:
            matrix[node, target] += (
                (1 - laziness) * chance * metropolis_acceptance(tree.values[node], tree.values[target])
            )
        matrix[node, node] += 1 - matrix[node].sum()
    return matrix


@settings(deadline=None, max_examples=60)
@given(trees(), st.sampled_from([0.0, 0.5, 0.9]))
def test_the_matrix_is_the_step_at_every_prefix(tree, laziness):
    np.testing.assert_allclose(
        transition_matrix(tree, laziness=laziness).toarray(), matrix_of_steps(tree, "all", laziness), atol=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(trees([0.25, 1.0, 3.0]), st.sampled_from([0.0, 0.5]))
def test_the_metropolis_matrix_is_the_step_at_every_prefix(tree, laziness):
    np.testing.assert_allclose(
        transition_matrix(tree, judged="one", laziness=laziness).toarray(),
        matrix_of_steps(tree, "one", laziness),
        atol=1e-12,
    )


@settings(deadline=None, max_examples=100)
@given(trees(), st.sampled_from(["all", "one"]))
def test_the_stationary_law_stays_and_is_that_of_the_leaves(tree, judged):
    if judged == "one" and tree.values[0] == 0:
        with pytest.raises(ValueError, match="root must have a value above 0"):
            stationary_law(tree, judged=judged)
        return
    law, matrix = stationary_law(tree, judged=judged), transition_matrix(tree, judged=judged)
    assert law.sum() == pytest.approx(1)
    np.testing.assert_allclose(matrix.T @ law, law, atol=1e-12)
    far = np.linalg.matrix_power(matrix.toarray(), 2**14)[0]
    np.testing.assert_allclose(far, law, atol=1e-6)  # and the walk from the root tends to it
    open_leaves = tree.is_leaf & tree.reachable
    if (tree.values[open_leaves] > 0).any():
        chances = np.exp(tree.path_logprobs) * tree.values * open_leaves
        at_leaves = np.where(tree.is_leaf, law, 0.0)
        np.testing.assert_allclose(at_leaves / at_leaves.sum(), chances / chances.sum(), atol=1e-12)


@pytest.mark.parametrize("judged", ["all", "one"])
def test_wrong_inner_values_move_guidance_and_not_the_walk(judged):
    rng = np.random.default_rng(0)
    exact = {prefix: 1.0 + sum(prefix) for prefix in product(range(3), repeat=4)}
    uniform = list(enumerate([math.log(1 / 3)] * 3))

    def expectation(prefix):
        return np.mean([value for leaf, value in exact.items() if leaf[: len(prefix)] == prefix])

    right = PrefixTree.grow(lambda y: uniform if len(y) < 4 else [], expectation)
    wrong = PrefixTree.grow(
        lambda y: uniform if len(y) < 4 else [], lambda y: exact.get(y) or expectation(y) * rng.choice([0.5, 2.0])
    )
    target = leaf_target(right)
    np.testing.assert_array_equal(target, leaf_target(wrong))
    law = np.where(wrong.is_leaf, stationary_law(wrong, judged=judged), 0.0)
    assert total_variation(law / law.sum(), target) < 1e-14
    assert total_variation(output_law(wrong, 2000, judged=judged), target) < 1e-6
    assert total_variation(guided_law(right), target) < 1e-14  # guidance needs the right values
    assert total_variation(guided_law(wrong), target) > 0.15


def test_guidance_gets_worse_with_the_length_and_the_walk_does_not():
    trees_ = [biased(horizon, 2.0) for horizon in (2, 5, 8)]
    guided, walked = ([total_variation(law(tree), leaf_target(tree)) for tree in trees_] for law in (guided_law, far))
    assert guided[0] < guided[1] < guided[2]
    assert guided[2] > 0.3
    assert max(walked) < 1e-3


far = partial(output_law, steps=2500)


def test_with_values_that_are_right_a_leaf_has_a_share_of_one_in_2h():
    for horizon in (1, 3, 6):
        law = stationary_law(biased(horizon, 1.0))
        assert law[-(2**horizon) :].sum() == pytest.approx(1 / (2 * horizon))


@settings(deadline=None, max_examples=60)
@given(trees([0.25, 1.0, 3.0]), st.integers(0, 12))
def test_what_comes_out_is_what_the_steps_and_then_the_next_leaf_give(tree, steps):
    matrix, leaf = transition_matrix(tree).toarray(), tree.is_leaf
    law = np.eye(1, len(tree))[0] @ np.linalg.matrix_power(matrix, steps)
    if law[leaf].sum() > 0:
        expected = np.where(leaf, law, 0.0)
        np.testing.assert_allclose(output_law(tree, steps), expected / expected.sum(), atol=1e-12)
    else:
        with pytest.raises(ValueError, match=f"no leaf is reached in {steps} steps"):
            output_law(tree, steps)
    stops = matrix.copy()
    stops[leaf] = np.eye(len(tree))[leaf]  # a walk that goes on ends at the first leaf
    np.testing.assert_allclose(
        output_law(tree, steps, otherwise="continue"), law @ np.linalg.matrix_power(stops, 2**16), atol=1e-9
    )


@settings(deadline=None, max_examples=60)
@given(trees([0.25, 1.0, 3.0]), st.integers(1, 5), st.sampled_from(["all", "one"]))
def test_a_visit_is_the_first_leaf_after_a_move_from_the_one_before(tree, visits, judged):
    matrix, leaf = transition_matrix(tree, judged=judged, laziness=0.0).toarray(), tree.is_leaf
    lazy = transition_matrix(tree, judged=judged).toarray()  # where it comes to is the same, and powers converge
    lazy[leaf] = np.eye(len(tree))[leaf]
    first = np.linalg.matrix_power(lazy, 2**16)
    law = first[0]
    for _ in range(visits - 1):
        law = law @ matrix @ first
    np.testing.assert_allclose(visit_law(tree, visits, judged=judged), law, atol=1e-9)


@pytest.mark.parametrize("judged", ["all", "one"])
def test_visits_tend_to_the_target_and_the_next_leaf_does_not(judged):
    tree = biased(4, 3.0)
    target = leaf_target(tree)
    errors = [total_variation(visit_law(tree, visits, judged=judged), target) for visits in (1, 3, 9, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-5
    assert total_variation(output_law(tree, 3000, otherwise="continue", judged=judged), target) > 0.05


@settings(deadline=None, max_examples=60)
@given(trees())
def test_guidance_is_the_product_of_its_steps(tree):
    chances = np.zeros(len(tree))
    for node in np.flatnonzero(tree.is_leaf):
        chance, at = 1.0, node
        while at:
            siblings = np.flatnonzero(tree.parents == tree.parents[at])
            law = guided_probabilities(tree.logprobs[siblings], tree.values[siblings])
            chance *= law[list(siblings).index(at)]
            at = tree.parents[at]
        chances[node] = chance
    if chances.sum() > 0:
        np.testing.assert_allclose(guided_law(tree), chances / chances.sum(), atol=1e-12)
    else:
        with pytest.raises(ValueError, match="dead ends only"):
            guided_law(tree)


def test_tiny_values_do_not_underflow():
    law = walk_probabilities(np.log([0.25, 0.75]), [1e-307, 1e-307], 1e-307, laziness=0.0)
    np.testing.assert_allclose(law, [0, 0.5, 0.125, 0.375])
    np.testing.assert_allclose(guided_probabilities(np.log([0.25, 0.75]), [3e-307, 1e-307]), [0.5, 0.5])


def test_a_prefix_without_a_way_out_is_stayed_at():
    assert walk_probabilities([0.0], [0.0], 1.0, has_parent=False).tolist() == [1.0, 0.0, 0.0]
    assert walk_probabilities([], [], 2.0).tolist() == [0.5, 0.5]
    assert guided_probabilities([0.0], [0.0]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: walk_probabilities([0.0], [-1.0], 1.0), "`child_values` must be finite .* number 0 is -1.0"),
        (lambda: walk_probabilities([0.0], [1.0], math.nan), "`value` must be finite .* is nan"),
        (lambda: walk_probabilities([0.0], [1.0, 2.0], 1.0), r"shapes \(1,\) and \(2,\)"),
        (lambda: walk_probabilities([0.0], [1.0], 1.0, laziness=1.0), r"`laziness` must be in \[0, 1\), got 1.0"),
        (lambda: transition_matrix(biased(1, 1.0), laziness=-0.5), r"`laziness` must be in \[0, 1\), got -0.5"),
        (lambda: guided_probabilities([0.0], [math.inf]), "`child_values` must be finite"),
        (lambda: metropolis_acceptance(1.0, -2.0), "`value` must be finite"),
        (lambda: output_law(biased(1, 1.0), -1), "`steps` must be at least 0"),
        (lambda: visit_law(biased(1, 1.0), 0), "`visits` must be at least 1"),
        (lambda: visit_law(PrefixTree.grow(lambda y: [] if y else [(0, 0.0)], lambda y: float(y == ())), 1), "none"),
        (lambda: leaf_target(PrefixTree.grow(lambda y: [], lambda y: 0.0)), "no leaf"),
        (lambda: PrefixTree.grow(lambda y: [], lambda y: math.nan), "`value` must be finite"),
    ],
)
def test_what_is_no_value_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
