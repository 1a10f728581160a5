"""The autoregressive linear model in transformers' hands, and against enumeration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_coverage import CoverageProfile, score_responses
from hf_coverage.tasks.linear import AutoregressiveLinearForCausalLM
from hf_coverage.tasks.linear_features import FeatureMap, TableFeatures
from hf_coverage.tasks.linear_instances import (
    hard_instance,
    large_step_instance,
    small_step_instance,
    variance_instance,
)
from tests import reference
from tests.tasks.linear_exact import enumerate_responses, feature_bound, inherent_variance, response_logprobs


class BigramFeatures(FeatureMap):
    """Features that depend on the last token, the next one and the length of the prefix."""

    def __init__(self, num_tokens=3, num_features=4, seed=0):
        super().__init__(num_tokens, num_features)
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("pairs", torch.randn(num_tokens + 2, num_tokens, num_features, generator=draw))

    def forward(self, input_ids):
        length = torch.arange(1, input_ids.shape[1] + 1)[:, None, None]
        return self.pairs[input_ids] / length.sqrt()


@pytest.fixture
def bigram():
    torch.manual_seed(0)
    model = AutoregressiveLinearForCausalLM.from_features(BigramFeatures(), vocab_size=5, pad_token_id=4)
    model.theta.data.normal_()
    return model.eval()


@torch.no_grad()
def test_logits_are_inner_products_and_prompt_tokens_have_no_probability(bigram):
    ids = torch.tensor([[3, 0, 2, 1]])
    logits = bigram(ids).logits[0]
    features = bigram.feature_map(ids)[0]
    for position in range(4):
        for token in range(3):
            inner = float(features[position, token] @ bigram.theta)
            assert float(logits[position, token]) == pytest.approx(inner, abs=1e-5)
    assert torch.isneginf(logits[:, 3:]).all()


def test_enumeration_sums_to_one_and_equals_the_forward_pass(bigram):
    responses, logprobs = enumerate_responses(bigram, [3], 4)
    listed, expected, _ = reference.enumerate_responses(bigram, [3], 4)
    rows = [listed.index(tuple(response.tolist())) for response in responses]
    assert len(set(rows)) == 3**4
    assert logprobs.dtype == torch.float64
    assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(logprobs, np.array(expected)[rows], atol=1e-5)


def test_the_scorer_takes_it_as_any_causal_model(bigram):
    import datasets

    responses, logprobs = enumerate_responses(bigram, [3, 0], 3)
    corpus = datasets.Dataset.from_dict(
        {"prompt": [[3, 0]] * 27, "completion": responses.tolist(), "reference_logprob": logprobs.tolist()}
    )
    scored = score_responses(bigram, None, corpus, progress=False)
    np.testing.assert_allclose(scored["logprob"][:], logprobs, atol=1e-5)
    assert CoverageProfile.from_logprobs(scored["logprob"], corpus["reference_logprob"]).cov(1.01) == 0


@torch.no_grad()
def test_inherent_variance_and_bound_by_their_definitions(bigram):
    responses, logprobs = enumerate_responses(bigram, [3], 3)
    total, largest = 0.0, 0.0
    for response, logprob in zip(responses, logprobs):
        ids = torch.cat([torch.tensor([3]), response])[None]
        for h in range(3):
            phi = bigram.feature_map(ids[:, : h + 1])[0, -1].double()
            p = (phi @ bigram.theta.double()).softmax(-1)
            here = phi[response[h]] - sum(p[v] * phi[v] for v in range(3))
            total += float(logprob.exp() * here.square().sum())  # the definition: the drawn token's own spread
            largest = max(largest, float(phi.norm(dim=-1).max()))
    assert inherent_variance(bigram, [3], 3) == pytest.approx(total, rel=1e-10)
    assert feature_bound(bigram, [3], 3) == pytest.approx(largest)


def test_generate_samples_from_the_enumerated_distribution(bigram):
    torch.manual_seed(1)
    prompt = torch.tensor([[3]]).repeat(4000, 1)
    drawn = bigram.generate(prompt, do_sample=True, max_new_tokens=2, top_k=0)[:, 1:]
    responses, logprobs = enumerate_responses(bigram, [3], 2)
    shares = (drawn[:, None] == responses).all(-1).double().mean(0)
    assert float((shares - logprobs.exp()).abs().max()) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("extra", [{}, {"use_cache": True}, {"num_beams": 3}], ids=["plain", "use_cache", "beams"])
def test_left_padding_changes_nothing(bigram, extra):
    alone = bigram.generate(torch.tensor([[3, 1]]), max_new_tokens=4, do_sample=False, **extra)
    ids, mask = torch.tensor([[4, 4, 3, 1], [3, 0, 0, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    together = bigram.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **extra)
    assert together[0, 2:].tolist() == alone[0].tolist()


def test_beam_search_finds_the_most_likely_response(bigram):
    found = bigram.generate(torch.tensor([[3]]), max_new_tokens=3, num_beams=27, do_sample=False)
    responses, logprobs = enumerate_responses(bigram, [3], 3)
    assert found[0, 1:].tolist() == responses[logprobs.argmax()].tolist()


def test_padding_between_tokens_is_refused(bigram):
    with pytest.raises(ValueError, match="one stretch of each row"):
        bigram(torch.tensor([[3, 0, 1]]), attention_mask=torch.tensor([[1, 0, 1]]))


@pytest.mark.parametrize("auto", [False, True])
def test_a_table_is_saved_with_the_model(tmp_path, auto):
    torch.manual_seed(0)
    model = AutoregressiveLinearForCausalLM.from_features(TableFeatures(torch.randn(5, 3, 2)))
    model.theta.data.normal_()
    model.save_pretrained(tmp_path)
    again = (AutoModelForCausalLM if auto else AutoregressiveLinearForCausalLM).from_pretrained(tmp_path)
    ids = torch.tensor([[3, 0, 1], [4, 2, 2]])
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("auto", [False, True])
def test_code_has_to_be_given_again(bigram, tmp_path, auto):
    bigram.save_pretrained(tmp_path)
    load = (AutoModelForCausalLM if auto else AutoregressiveLinearForCausalLM).from_pretrained
    with pytest.raises(ValueError, match=r"BigramFeatures`, and code is not imported"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"the one the model was made with, .*BigramFeatures, got table"):
        load(tmp_path, feature_map=TableFeatures(torch.zeros(5, 3, 4)))
    again = load(tmp_path, feature_map=BigramFeatures(seed=1))  # its buffers come from the file
    ids = torch.tensor([[3, 0, 1]])
    assert torch.equal(bigram(ids).logits, again(ids).logits)


def test_what_cannot_be_saved_is_refused():
    class Local(BigramFeatures):
        pass

    with pytest.raises(ValueError, match=r"can be imported, got .*<locals>.Local"):
        AutoregressiveLinearForCausalLM.from_features(Local())
    with pytest.raises(ValueError, match="at least 3, the tokens with features, got 2"):
        AutoregressiveLinearForCausalLM.from_features(BigramFeatures(), vocab_size=2)
    trainable = BigramFeatures()
    trainable.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="no trainable parameters"):
        AutoregressiveLinearForCausalLM.from_features(trainable)
    config = AutoregressiveLinearForCausalLM.from_features(BigramFeatures(), vocab_size=5).config
    with pytest.raises(TypeError, match="must be a `FeatureMap`, got Linear"):
        AutoregressiveLinearForCausalLM(config, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must have shape"):
        TableFeatures(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="sample longer ones"):
        enumerate_responses(AutoregressiveLinearForCausalLM(config, BigramFeatures()), [3], 20)


def test_the_trainer_learns_the_truth(tmp_path):
    instance = small_step_instance(8, rare_probability=0.5, n=16)
    corpus = instance.corpus(512, seed=0)
    rows = [
        {"input_ids": prompt + response, "labels": [-100, *response]}
        for prompt, response in zip(corpus["prompt"], corpus["completion"])
    ]
    model = instance.model()
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=5, learning_rate=0.05, per_device_train_batch_size=32, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()
    np.testing.assert_allclose(model.theta.detach(), instance.theta, atol=0.1)


INSTANCES = {
    "large": lambda: large_step_instance(4, feature_norm=3.0, step_size=1.0),
    "large, any step": lambda: large_step_instance(4, feature_norm=3.0),
    "small": lambda: small_step_instance(5, rare_probability=0.25, n=4),
    "hard": lambda: hard_instance(5, feature_norm=20.0, n=2, num_rare=2, margin=1.5),
    "variance": lambda: variance_instance(4, feature_norm=2.0, probability=0.3),
    "pivotal": lambda: variance_instance(5, feature_norm=2.0, probability=0.3, num_pivotal=2),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_agrees_with_its_model(name):
    instance = INSTANCES[name]()
    assert np.linalg.norm(instance.theta) <= 1 + 1e-12
    assert np.linalg.norm(instance.start) <= 1 + 1e-12
    model = instance.model(instance.theta)
    truth = instance.model(instance.theta)
    variance = 0.0
    for prompt in instance.prompts:
        responses, logprobs = enumerate_responses(truth, [int(prompt)], instance.horizon)
        exact = instance.logprobs(np.full(len(responses), prompt), responses.numpy())
        np.testing.assert_allclose(logprobs, exact, atol=1e-4)
        assert np.exp(exact).sum() == pytest.approx(1, abs=1e-12)
        chance = instance.prompt_probabilities[prompt]
        variance += chance * inherent_variance(truth, [int(prompt)], instance.horizon)
    assert instance.inherent_variance == pytest.approx(variance, rel=1e-4)
    bounds = [feature_bound(truth, [int(prompt)], instance.horizon) for prompt in instance.prompts]
    assert instance.feature_norm == pytest.approx(max(bounds), rel=1e-6)
    corpus = instance.corpus(64, seed=3)
    scored = score_responses(model, None, corpus, progress=False)
    np.testing.assert_allclose(scored["logprob"][:], corpus["reference_logprob"][:], atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_samples_follow_the_truth(seed):
    instance = small_step_instance(3, rare_probability=0.5, n=2)
    responses = instance.sample(np.full(4000, 3), np.random.default_rng(seed))
    assert set(np.unique(responses)) <= {0, 1, 2}
    q = np.exp(instance.next_logprobs(instance.theta)[3])
    np.testing.assert_allclose(np.bincount(responses.ravel(), minlength=3) / responses.size, q, atol=0.03)


def test_the_jump_of_the_large_step_is_exact():
    step = 16 / (64 * 40)
    instance = large_step_instance(64, feature_norm=40.0, step_size=step)
    theta = instance.start
    answer = np.ones(64, dtype=int)
    for sign in (-1, 1, -1):
        q = np.exp(instance.next_logprobs(theta)[3])
        gradient = (instance.features[3][answer] - q @ instance.features[3]).sum(0)
        theta = theta + step * gradient
        theta = theta / max(1.0, np.linalg.norm(theta))
        np.testing.assert_allclose(theta, instance.start * [1, sign], atol=1e-6)
    # D answers 0 ... 0, which the model finds hopeless at either end
    assert instance.logprobs(np.array([3]), answer[None])[0] > -1e-5
    assert instance.logprobs(np.array([3]), answer[None], theta)[0] < -64 * 40 * 0.4


def test_a_rare_prompt_carries_the_same_information_at_every_horizon():
    for horizon in (8, 64, 512):
        instance = small_step_instance(horizon, rare_probability=0.1, n=16, margin=2.0)
        q = instance.next_logprobs(instance.theta)[3]
        assert horizon * np.exp(q) @ (q + math.log(3)) == pytest.approx(2 * math.log(16))


def test_instances_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match="`step_size` must be above"):
        large_step_instance(4, feature_norm=2.0, step_size=0.1)
    with pytest.raises(ValueError, match="`horizon` is too short"):
        small_step_instance(2, rare_probability=0.1, n=16)
    with pytest.raises(ValueError, match="`feature_norm` must be at least"):
        hard_instance(16, feature_norm=1.0, n=16)
    with pytest.raises(ValueError, match="between 1 and the horizon 4, got 5"):
        variance_instance(4, feature_norm=1.0, probability=0.1, num_pivotal=5)


def test_response_logprobs_refuses_an_empty_prompt(bigram):
    with pytest.raises(ValueError, match="`prompt` must have at least one token"):
        response_logprobs(bigram, [], torch.zeros(1, 2, dtype=torch.int64))
