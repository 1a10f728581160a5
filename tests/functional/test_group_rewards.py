"""The signal of a group and Pass@k as a reward, against enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.group_rewards import equal_reward_probability, group_signal, pass_at_k_rewards


@given(st.integers(1, 7), st.data())
def test_signal_is_that_of_all_subsets(k, data):
    c, g = data.draw(st.integers(0, k)), data.draw(st.integers(1, k))
    solved = [True] * c + [False] * (k - c)
    groups = list(itertools.combinations(solved, g))
    wrong, mixed, right = (float(part[0]) for part in group_signal([c], k, g))
    assert wrong == pytest.approx(sum(not any(one) for one in groups) / len(groups))
    assert right == pytest.approx(sum(all(one) for one in groups) / len(groups))
    assert mixed == pytest.approx(1 - wrong - right)


@pytest.mark.parametrize("p", [0.0, 0.03, 0.5, 1.0])
def test_signal_is_unbiased(p):
    for k, g in ((6, 4), (3, 1), (5, 5)):
        chances = np.array([math.comb(k, c) * p**c * (1 - p) ** (k - c) for c in range(k + 1)])
        wrong, mixed, right = (float(chances @ part) for part in group_signal(range(k + 1), k, g))
        assert wrong == pytest.approx((1 - p) ** g)
        assert right == pytest.approx(p**g)
        assert mixed == pytest.approx(1 - (1 - p) ** g - p**g, abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=7), st.data())
def test_equal_rewards_are_those_of_all_subsets(rewards, data):
    g = data.draw(st.integers(1, len(rewards)))
    groups = list(itertools.combinations(rewards, g))
    expected = sum(len(set(one)) == 1 for one in groups) / len(groups)
    assert equal_reward_probability([rewards], g)[0] == pytest.approx(expected)


@settings(max_examples=50)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.data())
def test_rewards_are_means_over_all_subsets(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    for baseline in (True, False):
        found = pass_at_k_rewards([rewards], k, baseline=baseline)[0]
        for i in range(len(rewards)):
            gains = []
            for subset in itertools.combinations(range(len(rewards)), k):
                if i in subset:
                    others = [rewards[j] for j in subset if j != i]
                    gains.append(max([*others, rewards[i]]) - (max(others) if others and baseline else 0))
            assert found[i] == pytest.approx(k * np.mean(gains), abs=1e-9)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradient_is_that_of_pass_at_k(k, baseline):
    """A policy over four responses, three samples, all 64 outcomes: nothing is sampled."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    p = logits.softmax(0)
    (expected,) = torch.autograd.grad(1 - (1 - p @ right) ** k, logits)
    logp = logits.log_softmax(0)
    estimate = torch.zeros((), dtype=torch.float64)
    for outcome in itertools.product(range(4), repeat=3):
        index = torch.tensor(outcome)
        rewards = torch.tensor(pass_at_k_rewards([right[index].tolist()], k, baseline=baseline)[0])
        chance = logp[index].sum().exp().detach()
        estimate = estimate + chance * (rewards * logp[index]).mean()
    (found,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_many_samples_do_not_overflow():
    rewards = np.zeros((1, 2000))
    rewards[0, 7] = 1
    found = pass_at_k_rewards(rewards, 1000)
    assert found[0, 7] == pytest.approx(1000)
    assert np.abs(np.delete(found[0], 7)).max() == 0
    assert equal_reward_probability(rewards, 1000)[0] == pytest.approx(0.5)
    assert group_signal([1], 2000, 1000).all_wrong[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_signal([1, 1], [4, 2], 3), "1 to the 2 samples that every prompt has, got 3"),
        (lambda: group_signal([1], 4, 0), "got 0"),
        (lambda: group_signal([1], 4, 1.5), "got 1.5"),
        (lambda: equal_reward_probability([[1.0, np.nan]], 1), "row 0, column 1 is nan"),
        (lambda: equal_reward_probability([[1.0]], 2), "got 2"),
        (lambda: pass_at_k_rewards([[1.0, 0.0]], 3), "from 1 to the 2 samples of a prompt, got 3"),
        (lambda: pass_at_k_rewards([[np.inf]], 1), "row 0, column 0 is inf"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
