"""The whole way from token ids to the profile, against sums over all V^H responses of tiny models."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_coverage.functional import bounds
from hf_coverage.functional.coverage_profile import stopped_kl
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.measure.scoring import score_encoded
from tests import reference

PROMPT, HORIZON = [0, 3, 7], 3
NS = (1.0, 1.5, 3.0, 5.7, 16.0)


@pytest.fixture(scope="module")
def pair():
    """D and p: two peaked random GPT-2 over eight tokens, all 512 responses scored by the definition and by us."""

    def make(seed):
        torch.manual_seed(seed)
        config = GPT2LMHeadModel.config_class(n_layer=2, n_embd=16, n_head=2, vocab_size=8, n_positions=16)
        model = GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(6 if parameter.ndim == 2 else 1)
        return model

    reference_model, model = make(0), make(1)
    responses, known, reference_tokens = reference.enumerate_responses(reference_model, PROMPT, HORIZON)
    _, exact, model_tokens = reference.enumerate_responses(model, PROMPT, HORIZON)
    encoded = EncodedCorpus([PROMPT] * len(responses), [list(response) for response in responses])
    scores = score_encoded(model, encoded, teacher=reference_model, head_statistics=True)
    divergences = (reference_tokens.exp() * (reference_tokens - model_tokens)).sum(-1).numpy()
    return np.exp(known), np.exp(exact), known, scores, divergences, reference_tokens


def test_scores_are_the_distribution(pair):
    _, p, _, scores, _, _ = pair
    assert np.exp(scores.logprob).sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(np.exp(scores.logprob), p, rtol=1e-4)


def test_profile_equals_the_sums_over_all_responses(pair):
    d, p, known, scores, _, _ = pair
    profile = CoverageProfile.from_logprobs(scores.logprob, known, weights=d)
    assert profile.kl == pytest.approx(reference.exact_kl(d, p), abs=1e-5)
    assert 0.05 < profile.cov(3) < 0.95
    for n in NS:
        assert profile.cov(n) == pytest.approx(reference.exact_coverage(d, p, n), abs=1e-6)


def test_stopped_kl_equals_the_sum_and_bounds_coverage(pair):
    d, p, _, scores, divergences, _ = pair
    for n in NS:
        expected = float(d @ np.minimum(math.log(n), divergences.sum(1)))
        observed = stopped_kl(scores.token_kl, n, weights=d)
        assert observed == pytest.approx(expected, abs=1e-5)
        if n > math.e:
            assert reference.exact_coverage(d, p, n) <= bounds.coverage_bound_from_stopped_kl(observed, n)


def test_sequence_kl_is_the_sum_of_token_divergences(pair):
    d, p, _, _, divergences, _ = pair
    assert reference.exact_kl(d, p) == pytest.approx(float(d @ divergences.sum(1)), abs=1e-9)


def test_every_bound_holds_between_the_models(pair):
    d, p, _, scores, _, _ = pair
    ratios = np.log(d) - scores.logprob
    kl, hellinger = reference.exact_kl(d, p), reference.exact_hellinger(d, p)
    assert bounds.squared_hellinger(ratios, weights=d) == pytest.approx(hellinger, abs=1e-6)
    for n in NS:
        covered = reference.exact_coverage(d, p, n)
        assert covered <= bounds.coverage_bound_from_kl(kl, n)
        assert covered <= bounds.coverage_bound_from_hellinger(hellinger, n)
    rate = bounds.largest_coverage_rate(ratios, weights=d)
    assert kl <= bounds.kl_bound_from_coverage(rate, ratios.max()) + 1e-6


def test_inherent_variance_is_that_of_the_reference(pair):
    d, _, _, scores, _, reference_tokens = pair
    spread = 1 - reference_tokens.exp().square().sum(-1)
    assert (scores.inherent_variance <= scores.hidden_norm**2 * spread.sum(-1).numpy() + 1e-4).all()
    assert float(d @ scores.inherent_variance) > 0
