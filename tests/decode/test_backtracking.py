"""Decoding under a process verifier: against enumeration, under budgets, with and without what it remembers."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.decode import prefix_model
from hf_coverage.decode.backtracking import ValueGuidedDecoder
from hf_coverage.decode.prefix_walkers import CallBudget
from hf_coverage.functional.prefix_tree import PrefixTree, leaf_target, total_variation
from hf_coverage.functional.random_walk import guided_law, output_law, visit_law

EOS, LENGTH, PROMPT = 2, 3, [1, 0, 3]


@pytest.fixture(scope="module")
def model():
    """Four tokens, one of them the end, and next-token distributions that are far from uniform."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim == 2 else 1)
    return model


def worth(response):
    return 0.5 + sum(response) % 5


def whole(prefix):
    return len(prefix) == LENGTH or prefix[-1:] == (EOS,)


def wrong_by_two(prefix):
    """V: right at whole responses, and off by a factor of two, up or down, before them."""
    return worth(prefix) if whole(prefix) else 2.5 * (2.0 if sum(prefix) % 2 else 0.5)


def verifier(completion_ids):
    return [wrong_by_two(tuple(ids)) for ids in completion_ids]


def decoder(model, check=verifier, **settings):
    settings = {"max_new_tokens": LENGTH, "progress": False} | settings
    return ValueGuidedDecoder(model, None, settings.pop("prompt", PROMPT), check, **settings)


def next_logprobs(model, prefix, prompt=PROMPT):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def tree(model):
    """All prefixes, with probabilities from plain forward passes."""
    return PrefixTree.grow(
        lambda prefix: [] if whole(prefix) else list(enumerate(next_logprobs(model, prefix).tolist())), wrong_by_two
    )


def frequencies(found, tree):
    counts = Counter(map(tuple, found.responses))
    assert found.finished.all()
    assert not found.exhausted.any()
    return np.array([counts[prefix] for prefix in tree.prefixes])


def fits(found, law, tree, least=0.001):
    """Whether responses can have been drawn from a law over leaves (chi-square, rare leaves taken together)."""
    counts, total = frequencies(found, tree), len(found.responses)
    common = law * total >= 5
    assert counts[law == 0].sum() == 0
    observed, expected = [*counts[common], counts[~common].sum()], [*law[common], law[~common].sum()]
    if expected[-1] * total < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    return chisquare(observed, np.array(expected) / sum(expected) * total).pvalue > least


def test_the_walk_ends_at_leaves_in_the_right_proportion_and_guidance_does_not(model, tree):
    target = leaf_target(tree)
    deciding = decoder(model)
    walked = deciding.backtrack(2000, steps=60)
    assert total_variation(output_law(tree, 60), target) < 0.005
    assert fits(walked, output_law(tree, 60), tree)
    assert fits(walked, target, tree)
    visited = deciding.backtrack(2000, visits=15, seed=7)
    assert total_variation(visit_law(tree, 15), target) < 0.005
    assert fits(visited, target, tree)
    guided = deciding.guide(3000)
    assert fits(guided, guided_law(tree), tree)
    assert not fits(guided, target, tree)
    assert total_variation(frequencies(guided, tree) / 3000, target) > 0.1


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({"steps": 7}, partial(output_law, steps=7)),
        ({"steps": 5, "laziness": 0.0}, partial(output_law, steps=5, laziness=0.0)),
        ({"steps": 6, "restart": False}, partial(output_law, steps=6, otherwise="continue")),
        ({"steps": 9, "block_size": 1}, partial(output_law, steps=9, judged="one")),
        ({"visits": 1}, partial(visit_law, visits=1)),
        ({"visits": 2, "laziness": 0.0}, partial(visit_law, visits=2)),
        ({"visits": 2, "block_size": 1}, partial(visit_law, visits=2, judged="one")),
    ],
)
def test_short_walks_have_the_law_of_their_steps(model, tree, settings, law):
    assert fits(decoder(model).backtrack(2000, seed=1, **settings), law(tree), tree)
    assert total_variation(law(tree), leaf_target(tree)) > 0.02


@pytest.mark.parametrize("block_size", [1, 2, LENGTH])
def test_blocks_have_the_same_law(model, tree, block_size):
    assert fits(decoder(model).backtrack(1200, steps=60, block_size=block_size, seed=2), leaf_target(tree), tree)


def test_rejection_is_exact_and_refuses_a_bound_that_is_none(model, tree):
    assert fits(decoder(model).reject(3000, bound=4.5), leaf_target(tree), tree)
    with pytest.raises(ValueError, match=r"`bound` must be at least the largest value .* has 4.5"):
        decoder(model).reject(500, bound=4.0)


@pytest.mark.parametrize("block_size", [1, LENGTH])
def test_the_best_of_two_blocks_is_that_of_all_pairs(model, tree, block_size):
    """Every pair of blocks with its probability, block by block."""
    law = np.zeros(len(tree))
    law[0] = 1.0
    index = {prefix: node for node, prefix in enumerate(tree.prefixes)}
    chances = np.exp(tree.path_logprobs)
    for start in range(0, LENGTH, block_size):
        for node in np.flatnonzero((law > 0) & ~tree.is_leaf):
            prefix = tree.prefixes[node]
            ends = [p for p in tree.prefixes if p[: len(prefix)] == prefix and len(p) > len(prefix)]
            ends = [p for p in ends if len(p) == start + block_size or (whole(p) and len(p) < start + block_size)]
            for first, second in itertools.product(ends, ends):
                chance = law[node] * chances[index[first]] * chances[index[second]] / chances[node] ** 2
                values = wrong_by_two(first), wrong_by_two(second)
                law[index[first]] += chance * ((values[0] > values[1]) + 0.5 * (values[0] == values[1]))
                law[index[second]] += chance * ((values[1] > values[0]) + 0.5 * (values[0] == values[1]))
            law[node] = 0
    found = decoder(model).block_best_of_n(3000, candidates=2, block_size=block_size)
    assert law.sum() == pytest.approx(1)
    assert fits(found, law, tree)


def test_one_candidate_is_the_model_and_many_are_guidance(model, tree):
    chances = np.where(tree.is_leaf, np.exp(tree.path_logprobs), 0.0)
    assert fits(decoder(model).guide(2000, candidates=1, block_size=2), chances, tree)
    many = decoder(model).guide(1000, candidates=60, seed=3)
    assert total_variation(frequencies(many, tree) / 1000, guided_law(tree)) < 0.06


METHODS = {
    "walk": lambda one, **rest: one.backtrack(16, steps=30, **rest),
    "visits": lambda one, **rest: one.backtrack(16, visits=3, **rest),
    "blocks": lambda one, **rest: one.backtrack(16, steps=30, block_size=2, **rest),
    "guide": lambda one, **rest: one.guide(16, **rest),
    "candidates": lambda one, **rest: one.guide(16, candidates=3, **rest),
    "best": lambda one, **rest: one.block_best_of_n(16, candidates=3, block_size=2, **rest),
    "reject": lambda one, **rest: one.reject(16, bound=4.5, **rest),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_remembered_changes_nothing_but_the_work(model, name):
    whole_batch, one_by_one = decoder(model), decoder(model, cache_size=0, batch_size=1)
    found, slow = METHODS[name](whole_batch), METHODS[name](one_by_one)
    few = METHODS[name](decoder(model, cache_size=5, batch_size=3))
    for other in (slow, few):
        assert found.responses == other.responses
        np.testing.assert_allclose(found.logprobs, other.logprobs, atol=1e-5)
        for same in ("values", "steps", "starts", "model_calls", "verifier_calls"):
            np.testing.assert_array_equal(getattr(found, same), getattr(other, same))
    assert slow.computed_model_calls >= few.computed_model_calls >= found.computed_model_calls
    assert found.computed_model_calls <= 1 + 3 + 9
    assert METHODS[name](whole_batch).computed_model_calls == 0  # everything is known by now


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_kept(model, name):
    for limit in (1, 2, 5, 9):
        found = METHODS[name](decoder(model), budget=CallBudget(model_calls=limit))
        assert found.model_calls.max() <= limit
        found = METHODS[name](decoder(model), budget=CallBudget(verifier_calls=limit))
        assert found.verifier_calls.max() <= limit
        assert found.exhausted[~found.finished].all()
        found = METHODS[name](decoder(model), budget=CallBudget(steps=limit))
        assert found.steps.max() <= limit
        assert (found.steps[found.exhausted] == limit).all()
    free, paid = METHODS[name](decoder(model)), METHODS[name](decoder(model), budget=CallBudget(9, 9))
    within = (free.model_calls <= 9) & (free.verifier_calls <= 9)
    np.testing.assert_array_equal(paid.exhausted, ~within)  # a budget that is large enough changes nothing
    assert all(one == other for one, other, same in zip(free.responses, paid.responses, within) if same)
    assert not free.exhausted.any()


@pytest.mark.parametrize("block_size", [1, LENGTH])
def test_candidates_are_drawn_together(model, monkeypatch, block_size):
    """Eight blocks for one response take as many passes as one of them."""
    passes = []
    logits = prefix_model.PrefixReader.logits
    monkeypatch.setattr(
        prefix_model.PrefixReader, "logits", lambda self, prefixes: passes.append(prefixes) or logits(self, prefixes)
    )
    decoder(model, eos_token_id=[]).block_best_of_n(1, candidates=8, block_size=block_size)
    assert len(passes) == LENGTH
    assert block_size == 1 or max(map(len, passes)) > 1


def test_a_walk_without_budget_gives_the_last_whole_response_it_was_at(model):
    found = decoder(model).backtrack(60, steps=10_000, budget=CallBudget(steps=200))
    assert found.exhausted.all()
    assert found.finished.mean() > 0.9
    for response, logprob, value in zip(found.responses, found.logprobs, found.values):
        if whole(tuple(response)):
            terms = [next_logprobs(model, response[:at])[token] for at, token in enumerate(response)]
            assert logprob == pytest.approx(float(sum(terms)), abs=1e-5)
            assert value == worth(response)


def test_calls_are_the_distinct_prefixes_asked_for(model):
    asked = Counter()

    def counting(completion_ids, finished):
        assert finished == [whole(tuple(ids)) for ids in completion_ids]
        asked.update(map(tuple, completion_ids))
        return verifier(completion_ids)

    found = decoder(model, counting).backtrack(1, steps=200)
    assert max(asked.values()) == 1
    assert found.verifier_calls[0] == len(asked) == found.computed_verifier_calls
    assert found.model_calls[0] == found.computed_model_calls


def test_a_response_does_not_depend_on_the_others(model):
    many, few = decoder(model).backtrack(30, steps=20, seed=4), decoder(model).backtrack(7, steps=20, seed=4)
    assert many.responses[:7] == few.responses
    np.testing.assert_array_equal(many.verifier_calls[:7], few.verifier_calls)
    assert many.responses != decoder(model).backtrack(30, steps=20, seed=5).responses


@pytest.mark.parametrize("prompt", [[1], PROMPT])
@pytest.mark.parametrize("shares", [True, False])
def test_logprobs_are_those_of_the_model(model, prompt, shares, monkeypatch):
    if not shares:
        monkeypatch.setattr(prefix_model, "is_repeatable", lambda cache: False)
    was_training = model.training
    found = decoder(model, prompt=prompt, top_k=3, temperature=0.7).backtrack(50, steps=20)
    assert model.training == was_training
    for response, logprob in zip(found.responses, found.logprobs):
        total = 0.0
        for at, token in enumerate(response):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response[:at]]])).logits[0, -1].double() / 0.7
            logits[logits < logits.topk(3).values[-1]] = -torch.inf
            total += float(logits.log_softmax(-1)[token])
        assert logprob == pytest.approx(total, abs=1e-5)


def test_the_model_and_the_global_generators_stay_as_they_are(model):
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    decoder(model).backtrack(5, steps=10)
    assert np.random.random() == expected  # noqa: NPY002
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dead_ends_are_left_again(model):
    """Only one response is worth anything, and the verifier notices a wrong token one token late."""
    goal = (3, 1, 0)

    def late(completion_ids):
        return [
            float(tuple(ids) == goal) if whole(tuple(ids)) else float(tuple(ids[:-1]) == goal[: len(ids) - 1])
            for ids in completion_ids
        ]

    for found in (decoder(model, late).backtrack(20, steps=20), decoder(model, late).guide(20)):
        assert all(tuple(response) == goal for response in found.responses)
        assert found.starts.max() > 1


def fail(completion_ids):
    raise KeyError("no such prefix")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (fail, RuntimeError, r"raised KeyError on \d+ prefixes, the first of them \[0\]: 'no such prefix'"),
        (lambda completion_ids: [float("nan")] * len(completion_ids), ValueError, r"gave nan to the prefix \[0\]"),
        (
            lambda completion_ids: [-0.5] * len(completion_ids),
            ValueError,
            r"gave -0.5 to the prefix \[0\]; turn log",
        ),
        (lambda completion_ids: np.full(len(completion_ids), np.inf), ValueError, r"gave inf to the prefix \[0\]"),
        (lambda completion_ids: [1.0], ValueError, "one value a prefix, but gave 1 for 4"),
        (lambda completion_ids: 1.0, TypeError, "must return a list of numbers, one a prefix, but returned 1.0"),
        (lambda completion_ids: ["high"] * len(completion_ids), TypeError, "must return numbers, but gave 'high' to"),
        (lambda completion_ids: [0] * len(completion_ids), ValueError, "every first token the value 0.*`finished`"),
        (lambda answer: [1.0] * len(answer), ValueError, "`verifier` needs `answer`, which is no column"),
        (3, TypeError, "`verifier` must be callable"),
    ],
)
def test_what_a_verifier_does_wrong_is_named(model, bad, error, message):
    with pytest.raises(error, match=message):
        decoder(model, bad).backtrack(2, steps=4)


def test_the_root_needs_a_value_where_blocks_are_drawn(model):
    with pytest.raises(ValueError, match="the empty response, which it must be able to go back to, the value 0"):
        decoder(model, lambda completion_ids: [float(bool(ids)) for ids in completion_ids]).backtrack(
            1, steps=3, block_size=1
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.backtrack(0, steps=1), "`num_responses` must be at least 1, got 0"),
        (lambda one: one.backtrack(1, steps=0), "`steps` must be at least 1, got 0"),
        (lambda one: one.backtrack(1, visits=0), "`visits` must be at least 1, got 0"),
        (lambda one: one.backtrack(1), "Either `steps` or `visits` must say when a walk ends, got None and None"),
        (lambda one: one.backtrack(1, steps=1, visits=1), "Either `steps` or `visits`"),
        (lambda one: one.backtrack(1, steps=3, laziness=1.0), r"`laziness` must be in \[0, 1\)"),
        (lambda one: one.backtrack(1, steps=1, block_size=0), "`block_size` must be at least 1"),
        (lambda one: one.reject(1, bound=0.0), "`bound` must be positive"),
        (lambda one: one.guide(1, block_size=2), "`block_size` above 1 needs `candidates`"),
        (lambda one: one.guide(1, candidates=0), "`candidates` must be at least 1"),
        (lambda one: one.block_best_of_n(1, candidates=1, block_size=0), "`block_size` must be at least 1"),
        (lambda one: CallBudget(model_calls=0), "`model_calls` must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(decoder(model))


@pytest.mark.parametrize(("block_size", "least"), [(None, 3), (2, 2)])
def test_walks_too_short_for_any_response_are_refused(model, block_size, least):
    with pytest.raises(
        ValueError, match=f"`steps` must be at least {least}, the moves to the shortest .* got {least - 1}"
    ):
        decoder(model, eos_token_id=[]).backtrack(1, steps=least - 1, block_size=block_size)
    decoder(model, eos_token_id=[]).backtrack(1, steps=least, block_size=block_size)
    decoder(model).backtrack(1, steps=1, budget=CallBudget(steps=5))  # a response may end early


@pytest.mark.parametrize("name", ["prompt", "completions", "finished"])
def test_a_column_cannot_take_the_place_of_the_decoders_own(model, name):
    with pytest.raises(ValueError, match=f"`columns` must not have `{name}`, which the decoder gives itself"):
        decoder(model, columns={name: [1]})


def test_what_was_interrupted_goes_on_from_what_it_knows(model):
    """Ctrl-C, or a verifier that raises now and then: the same responses in the end, and nothing asked twice."""
    asked, left = Counter(), [4]

    def interrupted(completion_ids):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        asked.update(map(tuple, completion_ids))
        return verifier(completion_ids)

    one = decoder(model, interrupted, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        one.backtrack(5, steps=20)
    assert one.backtrack(5, steps=20).responses == decoder(model).backtrack(5, steps=20).responses
    assert max(asked.values()) == 1


def test_columns_reach_the_verifier(model):
    def near(completion_ids, goal, prompts):
        assert prompts == [PROMPT] * len(goal)
        return [1.0 + (ids[:1] == [g]) for ids, g in zip(completion_ids, goal)]

    assert set(decoder(model, near, columns={"goal": 3}).guide(5).values) <= {1.0, 2.0}


def few_es(completions):
    return [0.2 ** text.lower().count("e") for text in completions]


def test_a_real_model_avoids_a_letter(smollm2):
    model, tokenizer = smollm2
    prompt, settings = "My grandmother told me that", {"max_new_tokens": 5, "eos_token_id": [], "progress": False}
    one = ValueGuidedDecoder(model, tokenizer, prompt, few_es, top_k=4, **settings)
    walked = one.backtrack(8, visits=2)
    plain = one.guide(8, candidates=1, block_size=5)
    assert walked.finished.all()
    assert walked.values.tolist() == few_es(walked.texts)
    assert walked.texts == tokenizer.batch_decode(walked.responses, skip_special_tokens=True)
    assert np.log(walked.values).mean() > np.log(plain.values).mean()
    (ids,) = tokenizer([prompt])["input_ids"]
    for response, logprob in zip(walked.responses[:3], walked.logprobs):
        with torch.no_grad():
            logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].double()
        kept = logits.topk(4)
        terms = kept.values.log_softmax(-1)[kept.indices == torch.tensor(response)[:, None]]
        assert logprob == pytest.approx(float(terms.sum()), abs=1e-3)
    whole_vocabulary = ValueGuidedDecoder(model, tokenizer, prompt, few_es, **settings)
    blocks = whole_vocabulary.backtrack(2, visits=2, block_size=2)
    assert blocks.values.tolist() == few_es(blocks.texts)
    assert {len(response) for response in blocks.responses} == {5}
