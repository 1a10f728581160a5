"""Arithmetic codes: what they decode to, what they promise, and the digits that a double has no room for."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_coverage.functional.arithmetic_codes import (
    CodeState,
    TokenParts,
    decode_token,
    nested_codes,
    response_intervals,
    stratified_codes,
    stratified_pass_probabilities,
    token_parts,
)
from hf_coverage.functional.bounds import pass_probabilities

LARGEST = 1.0 - 2.0**-53
units = st.one_of(st.floats(0, LARGEST), st.sampled_from([0.0, 0.5, LARGEST, 2.0**-53]))


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def start(codes):
    """Where rows are before their first token."""
    return CodeState(codes, torch.ones_like(codes))


def of_strata(low, high, n):
    """What an interval has of each of n strata, times n."""
    j = np.arange(n)
    return n * np.clip(np.minimum(high, (j + 1) / n) - np.maximum(low, j / n), 0.0, None)


def shares(lengths, accepted, n):
    """N a_j of the set of accepted responses, whose intervals of these lengths follow one another."""
    ends = np.cumsum(lengths)
    parts = [of_strata(high - length, high, n) for length, high, yes in zip(lengths, ends, accepted) if yes]
    return np.sum([np.zeros(n), *parts], axis=0).clip(0.0, 1.0)


@given(st.lists(units, min_size=1, max_size=33))
def test_every_aligned_block_is_one_in_each_stratum_and_more_codes_change_none(numbers):
    codes = nested_codes(doubles(numbers))
    assert codes[0] == numbers[0]
    assert ((codes >= 0) & (codes < 1)).all()
    for fewer in range(1, len(numbers)):
        assert torch.equal(nested_codes(doubles(numbers[:fewer])), codes[:fewer])
    for size in (2**power for power in range(len(numbers).bit_length())):
        for start in range(0, len(numbers) - size + 1, size):
            strata = (codes[start : start + size] * size).long()
            assert sorted(strata.tolist()) == list(range(size))


def orders_by_definition(levels):
    """The strata of 2^levels codes, for all coins: start with [0], and `s <- [2s + flip, 2s + 1 - flip]`."""
    orders = [(0,)]
    for _ in range(levels):
        orders = [
            tuple(2 * s + flip for s, flip in zip(order, coins))
            + tuple(2 * s + 1 - flip for s, flip in zip(order, coins))
            for order in orders
            for coins in itertools.product((0, 1), repeat=len(order))
        ]
    return orders


def test_nested_codes_are_owens_scrambling():
    grid = list(itertools.product((0.125, 0.375, 0.625, 0.875), repeat=4))
    found = Counter(map(tuple, (nested_codes(doubles(grid)) * 4).long().tolist()))
    wanted = Counter(orders_by_definition(2))
    assert {order: count / len(grid) for order, count in found.items()} == {
        order: count / wanted.total() for order, count in wanted.items()
    }


@pytest.mark.parametrize("n", [1, 3, 6, 8])
def test_every_code_alone_is_uniform_and_inside_its_stratum_too(n):
    codes = stratified_codes(*uniforms(2, 20_000, n))
    assert torch.equal((codes * n).long().sort(-1).values, torch.arange(n).expand(20_000, n))
    for place in range(n):
        assert stats.kstest(codes[:, place], "uniform").pvalue > 1e-4
    assert stats.kstest((codes * n).flatten() % 1, "uniform").pvalue > 1e-4


def lower_halves(codes):
    """How often none of 8 codes lies in the lower half of its stratum: 2^-8 where they are independent in them."""
    return float(((np.asarray(codes) * 8) % 1 >= 0.5).all(axis=-1).mean())


def test_codes_are_independent_inside_their_strata_as_scrambled_sobol_points_are_not():
    ours = nested_codes(uniforms(100_000, 8))
    assert abs(lower_halves(ours) - 2**-8) < 5 * math.sqrt(2**-8 / 100_000)
    theirs = [stats.qmc.Sobol(1, scramble=True, rng=seed).random(8)[:, 0] for seed in range(1000)]
    assert lower_halves(theirs) > 8 * 2**-8
    engines = [torch.quasirandom.SobolEngine(1, scramble=True, seed=seed) for seed in range(1000)]
    assert lower_halves([engine.draw(8, dtype=torch.float64)[:, 0] for engine in engines]) > 8 * 2**-8


def test_codes_stay_in_their_strata_where_the_sum_is_rounded_up():
    largest = torch.full((1, 8), LARGEST, dtype=torch.float64)
    assert sorted((nested_codes(largest) * 8).long().flatten().tolist()) == list(range(8))
    assert (stratified_codes(largest[:, :7], largest[:, :7]) < 1).all()


def test_codes_of_few_digits_or_none_are_refused():
    with pytest.raises(TypeError, match=r"`uniforms` must be float64.*got torch.float32"):
        nested_codes(torch.rand(4))
    with pytest.raises(ValueError, match="a number for each code, got none"):
        stratified_codes(doubles([]), doubles([]))


@st.composite
def laws(draw):
    """A law of up to 12 responses, and which of them are accepted."""
    weights = np.array(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=12)), float)
    weights[draw(st.integers(0, len(weights) - 1))] += 1
    return weights / weights.sum(), draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights)))


@settings(max_examples=500)
@given(laws(), st.integers(1, 40))
def test_no_set_is_missed_more_often_or_hit_by_all_more_often(law, n):
    lengths, accepted = law
    own, p = shares(lengths, accepted, n), float(lengths[np.array(accepted)].sum())
    assert own.sum() == pytest.approx(n * p)
    assert np.prod(1 - own) <= (1 - p) ** n + 1e-12
    assert np.prod(own) <= p**n + 1e-12


@settings(max_examples=100)
@given(laws(), st.integers(1, 8), st.data())
def test_the_best_reward_is_never_less(law, n, data):
    lengths, _ = law
    rewards = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=len(lengths), max_size=len(lengths))))
    stratified = independent = float(rewards.min())
    for level in range(int(rewards.min()) + 1, int(rewards.max()) + 1):
        stratified += 1 - np.prod(1 - shares(lengths, rewards >= level, n))
        independent += 1 - (1 - lengths[rewards >= level].sum()) ** n
    assert stratified >= independent - 1e-12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(1, 8))
def test_the_first_codes_of_nested_ones_are_never_worse_whatever_their_number(values, n):
    g = np.array(values) / 9
    orders = np.array(orders_by_definition(3))
    assert g[orders[:, :n]].prod(axis=1).mean() <= g.mean() ** n + 1e-12


def tiny_tree(seed):
    """The next-token law after every prefix of less than 3 of 4 tokens, one of probability 0 here and there."""
    generator = np.random.default_rng(seed)
    tree = {}
    for prefix in (p for length in range(3) for p in itertools.product(range(4), repeat=length)):
        law = generator.dirichlet([0.5] * 4)
        law[generator.integers(4)] *= generator.integers(2)
        tree[prefix] = law / law.sum()
    return tree


def decode_all(tree, codes, seed=0):
    """The responses that codes name."""
    prefixes, state = [()] * len(codes), start(codes)
    for step in range(3):
        laws_ = torch.from_numpy(np.array([tree[prefix] for prefix in prefixes]))
        tokens, state, _ = decode_token(laws_, state, uniforms(len(codes), seed=seed + step))
        prefixes = [(*prefix, token) for prefix, token in zip(prefixes, tokens.tolist())]
    return prefixes


def intervals_of(tree):
    """The interval of every response."""
    responses = list(itertools.product(range(4), repeat=3))
    laws_ = [[tree[response[:h]] for h in range(3)] for response in responses]
    below = [[law[:token].sum() for law, token in zip(line, response)] for line, response in zip(laws_, responses)]
    own = [[law[token] for law, token in zip(line, response)] for line, response in zip(laws_, responses)]
    low, log_length = response_intervals(TokenParts(doubles(below), doubles(own)))
    return responses, low.numpy(), log_length.exp().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_intervals_partition_the_unit_interval_and_codes_in_them_name_their_responses(seed):
    tree = tiny_tree(seed)
    responses, low, length = intervals_of(tree)
    assert length.sum() == pytest.approx(1)
    np.testing.assert_allclose(low, np.concatenate([[0.0], np.cumsum(length)[:-1]]), atol=1e-12)
    there = length > 2**-16  # from there on tokens have fresh numbers
    for part in (0.001, 0.5, 0.999):
        named = decode_all(tree, torch.from_numpy((low + part * length)[there]))
        assert named == [response for response, yes in zip(responses, there) if yes]


@pytest.mark.parametrize("n", [4, 6])
def test_sampled_hits_are_the_product_over_strata_and_each_sample_is_one_of_p(n):
    tree, repeats = tiny_tree(5), 3000
    responses, _, length = intervals_of(tree)
    accepted = np.random.default_rng(0).random(len(responses)) < 0.3
    codes = stratified_codes(*uniforms(2, repeats, n, seed=7))
    index = {response: place for place, response in enumerate(responses)}
    drawn = np.array([index[response] for response in decode_all(tree, codes.flatten())]).reshape(repeats, n)
    hits, exact = accepted[drawn].any(axis=1), 1 - np.prod(1 - shares(length, accepted, n))
    assert stats.binomtest(int(hits.sum()), repeats, exact).pvalue > 1e-3
    assert exact > 1 - (1 - length[accepted].sum()) ** n + 0.05
    for place in range(n):
        counts = np.bincount(drawn[:, place], minlength=len(responses))
        assert not counts[length == 0].any()
        assert stats.chisquare(counts[length > 0], repeats * length[length > 0]).pvalue > 1e-4


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40).filter(any), units, units)
def test_a_token_of_probability_0_is_never_chosen_and_codes_stay_codes(weights, code, digit):
    probabilities = torch.tensor([weights], dtype=torch.float32) / 7  # need not sum up to 1
    tokens, state, own = decode_token(probabilities, start(doubles([code])), doubles([digit]))
    assert weights[tokens.item()] > 0
    assert 0 <= state.codes.item() < 1
    assert own.item() == pytest.approx(weights[tokens.item()] / sum(weights))
    below = sum(weights[: tokens.item()]) / sum(weights)
    assert below - 1e-6 <= code <= below + own.item() + 1e-6


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_row_without_a_law_is_seen_in_its_probability_alone(value):
    probabilities = torch.tensor([[0.25] * 4 + [0.0] * 7, [value] * 11])
    tokens, _, own = decode_token(probabilities, start(doubles([0.5, 0.5])), doubles([0.0, 0.0]))
    assert tokens[0] == 2
    assert 0 <= tokens[1] < 11
    assert own[0] == 0.25
    assert own[1].isnan()


def test_a_large_vocabulary_loses_no_token_to_rounding():
    logits = torch.randn(1, 262_144, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    probabilities = logits.softmax(-1)
    ends = probabilities.double().cumsum(-1)[0]
    chosen = torch.randint(0, 131_072, (64,), generator=torch.Generator().manual_seed(1)) * 2 + 1
    codes = (ends[chosen] - probabilities[0, chosen].double() / 2) / ends[-1]
    tokens, state, own = decode_token(probabilities.expand(64, -1), start(codes), torch.zeros(64).double())
    assert torch.equal(tokens, chosen)
    expected = torch.where(own < 2**-16, 0.0, torch.full((64,), 0.5).double())
    torch.testing.assert_close(state.codes, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(own, probabilities[0, chosen].double() / ends[-1], atol=0, rtol=1e-9)


def given_a_prefix(rows, tokens, own):
    """Where rows are whose first tokens all were the middle one of three, of p = own each.

    Of the initial codes, and of the numbers drawn afresh for each token where the interval is narrow, those are drawn
    that lead there: doubles in the interval of the tokens to come, however few there are.
    """
    law = doubles([[(1 - own) / 2, own, (1 - own) / 2]])
    span = math.floor(-16 / math.log2(own)) + 1  # tokens until the interval is narrow
    generator = torch.Generator().manual_seed(1)

    def draw(ahead=0):
        numbers = torch.rand(rows, dtype=torch.float64, generator=generator)
        low, log_length = response_intervals(TokenParts(*(part.expand(1, ahead) for part in law[:, :2].split(1, 1))))
        number = int(log_length.exp().item() * 2**53 * (1 + 1e-9))
        return low + (numbers * number).floor() * 2.0**-53

    state = start(draw(min(span, tokens)))
    for step in range(1, tokens + 1):
        digits = draw(1 if span <= step < tokens else 0)
        chosen, state, _ = decode_token(law.expand(rows, -1), state, digits)
        assert (chosen == 1).double().mean() > 0.999  # rounding of the interval's ends may cost a few
    return CodeState(state.codes[chosen == 1], state.lengths[chosen == 1])


@pytest.mark.parametrize(
    ("rows", "tokens", "own"), [(5_000, 500, 0.95), (5_000, 500, 0.5), (30_000, 16, 0.5), (30_000, 2, 2.0**-8)]
)
def test_late_tokens_have_their_law_given_the_prefix(rows, tokens, own):
    codes = given_a_prefix(rows, tokens, own).codes
    for digits in (0, 10, 17):  # as seen by tokens of p = 1, 1e-3 and 8e-6
        assert stats.kstest((codes * 2.0**digits) % 1, "uniform").pvalue > 1e-4
    # Of 1e9 equally likely tokens hardly one is seen twice, whatever few doubles the prefix left.
    assert len(codes) - len((codes * 1e9).long().unique()) < 4


def test_a_rare_token_late_in_a_response_gets_its_share_given_the_prefix():
    state = given_a_prefix(1_000_000, 2, 2.0**-8)
    law = doubles([[0.5, 1e-5, 0.49999]]).expand(len(state.codes), -1)
    tokens, _, _ = decode_token(law, state, state.codes)
    assert stats.binomtest(int((tokens == 1).sum()), len(tokens), 1e-5).pvalue > 1e-4


def test_rounding_of_the_laws_changes_few_responses():
    """A response is that of its code and its numbers, whatever batch its row is in."""
    rows, drawn = 400, []
    for noise in (0.0, 1e-7):
        generator, state = torch.Generator().manual_seed(0), start(uniforms(rows, seed=1))
        tokens = []
        for step in range(100):
            law = torch.rand(rows, 50, dtype=torch.float64, generator=generator) ** 4
            law = law * (1 + noise * torch.randn(law.shape, generator=torch.Generator().manual_seed(step)))
            token, state, _ = decode_token(law, state, uniforms(rows, seed=step + 2))
            tokens.append(token)
        drawn.append(torch.stack(tokens))
    assert (drawn[0] == drawn[1]).all(0).double().mean() > 0.98


def test_parts_of_tokens_are_those_that_decoding_cuts():
    logits = 3 * torch.randn(5, 7, 300, generator=torch.Generator().manual_seed(0))
    logits[..., :9] = -torch.inf
    labels = torch.randint(9, 300, (5, 7), generator=torch.Generator().manual_seed(1))
    below, own = token_parts(logits, labels)
    exact = logits.double().softmax(-1)
    torch.testing.assert_close(own, exact.gather(-1, labels[..., None])[..., 0], atol=0, rtol=1e-5)
    torch.testing.assert_close(
        below, (exact.cumsum(-1) - exact).gather(-1, labels[..., None])[..., 0], atol=1e-6, rtol=0
    )
    tokens, state, chosen = decode_token(
        logits.softmax(-1).flatten(0, 1), start((below + own / 3).flatten()), torch.zeros(35).double()
    )
    assert torch.equal(tokens, labels.flatten())
    expected = torch.where(chosen < 2**-16, 0.0, torch.full((35,), 1 / 3).double())
    torch.testing.assert_close(state.codes, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(chosen, own.flatten(), atol=0, rtol=1e-12)
    half = token_parts(logits.bfloat16(), labels)
    assert half.below.dtype == torch.float64


def test_positions_outside_a_response_do_not_count():
    parts = TokenParts(doubles([[0.5, 0.25, math.nan]]), doubles([[0.25, 0.5, math.nan]]))
    low, log_length = response_intervals(parts, torch.tensor([[True, True, False]]))
    assert low.item() == 0.5 + 0.25 * 0.25
    assert log_length.item() == pytest.approx(math.log(0.125))


@given(units, units, st.integers(1, 50))
def test_pass_at_n_of_one_interval_is_the_product_over_strata(low, part, n):
    length = part * (1 - low)
    logprob = -math.inf if length == 0 else math.log(length)
    (found,) = stratified_pass_probabilities([low], [logprob], n)
    assert found == pytest.approx(1 - np.prod(1 - of_strata(low, low + length, n).clip(0, 1)), abs=1e-9)
    assert found >= pass_probabilities([logprob], n)[0] * (1 - 1e-12)


def test_pass_at_n_is_exact_for_responses_that_are_hardly_ever_given():
    assert stratified_pass_probabilities([0.3], [-200.0], 8)[0] == pytest.approx(8 * math.exp(-200), rel=1e-9)


@pytest.mark.parametrize(
    ("low", "logprobs", "n", "message"),
    [
        ([0.5], [math.log(0.6)], 2, "row 0 begins at 0.5 and has length 0.6"),
        ([math.nan], [-1.0], 2, "row 0 begins at nan"),
        ([0.1, 0.2], [-1.0], 2, r"`low` must have one entry a row, \(1,\), but has shape \(2,\)"),
        ([0.1], [-1.0], 2.5, "`n` must be a whole number of samples, at least 1, but is 2.5"),
        ([0.1], [0.5], 2, "`logprobs` must hold natural-log probabilities"),
    ],
)
def test_what_is_no_interval_or_no_number_is_refused(low, logprobs, n, message):
    with pytest.raises(ValueError, match=message):
        stratified_pass_probabilities(low, logprobs, n)
