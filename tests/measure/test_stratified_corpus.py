"""How much surer Cov_N and miss_N are when the teacher's responses are stratified: 200 corpora of either kind."""

import numpy as np
import pytest
import torch

from hf_coverage.functional.coverage_profile import log_ratios, reached
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.sampler import Sampler, Sampling
from hf_coverage.measure.scoring import score_encoded
from tests.decode.test_best_of_n import PROMPTS, peaked

LEVELS, REPEATS, K = (1.5, 2, 4, 8), 200, 8


def corpora(teacher, student, *, stratified):
    """`(REPEATS, P, K)` log D - log p of responses of four tokens."""
    places = [(number, sample) for number in range(REPEATS * len(PROMPTS)) for sample in range(K)]
    prompts = [PROMPTS[number % len(PROMPTS)] for number, _ in places]
    sampler = Sampler(teacher, Sampling(4, eos_token_ids=()), batch_size=2400, seed=0, stratified=stratified)
    samples = sampler.draw(prompts, places=places)
    responses = [sample.ids for sample in samples]
    distinct = {(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, responses)}
    encoded = EncodedCorpus(*([list(part) for part in column] for column in zip(*distinct)))
    known = dict(
        zip(zip(map(tuple, encoded.prompts), map(tuple, encoded.completions)), score_encoded(student, encoded).logprob)
    )
    logprobs = [known[tuple(prompt), tuple(ids)] for prompt, ids in zip(prompts, responses)]
    return log_ratios([sample.logprob for sample in samples], logprobs).reshape(REPEATS, len(PROMPTS), K)


@pytest.mark.slow
def test_cov_and_miss_of_stratified_corpora_are_as_unbiased_and_vary_less():
    teacher, student = peaked(0), peaked(0)
    for parameter in student.parameters():
        parameter.data.add_(0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ratios = [corpora(teacher, student, stratified=kind) for kind in (False, True)]
    variances = {}
    for name, values in (("Cov", reached), ("miss", miss_values)):
        for n in LEVELS:
            means = [values(part.ravel(), n).reshape(part.shape).mean(axis=(1, 2)) for part in ratios]
            error = np.sqrt(sum(each.var(ddof=1) for each in means) / REPEATS)
            assert abs(means[0].mean() - means[1].mean()) < 4 * error + 1e-9
            variances[f"{name}_{n:g}"] = [each.var(ddof=1) for each in means]
    ratios_of = {name: stratified / independent for name, (independent, stratified) in variances.items()}
    for name, ratio in ratios_of.items():
        print(f"{name}: the variance is {ratio:.2f} of {variances[name][0]:.2e}, that of independent responses")
    assert np.mean(list(ratios_of.values())) < 0.9
