"""Maximum likelihood: its coverage does not grow with H where its KL does, and what the inherent variance is for."""

import math

import numpy as np

from hf_coverage.functional.checks import TIE_TOLERANCE, FloatArray
from hf_coverage.tasks.linear_instances import LinearInstance
from recipes.normalized_sgd.learners import ResponseLaw


def rare_prompts(horizon: int, *, num_prompts: int) -> LinearInstance:
    """Prompts of probability 1/2, 1/4, ..., a coordinate each, whose tokens carry the same information at every H.

    `phi(k, a) = a sqrt(K) e_k` for the tokens a = -1, 0, 1, theta* = [1, ..., 1] / sqrt(K): the logit of a is a.
    """
    features = np.zeros((3 + num_prompts, 3, num_prompts))
    for k in range(num_prompts):
        features[3 + k, :, k] = np.array([-1.0, 0.0, 1.0]) * math.sqrt(num_prompts)
    chances = 0.5 ** np.arange(1, num_prompts + 1)
    chances[-1] *= 2
    truth = np.full(num_prompts, 1 / math.sqrt(num_prompts))
    return LinearInstance(features, np.concatenate([np.zeros(3), chances]), truth, np.zeros(num_prompts), horizon)


def maximum_likelihood(
    instance: LinearInstance, num_rows: int, num_seeds: int, rng: np.random.Generator
) -> FloatArray:
    """Maximum-likelihood estimates `(S, K)` on `rare_prompts`, in [-1, 1]; 0 where a prompt was never seen."""
    scale = math.sqrt(len(instance.theta))
    chances = instance.prompt_probabilities[3:]
    seen = rng.multinomial(num_rows, chances, size=num_seeds) * instance.horizon
    law = np.exp(instance.next_logprobs(instance.theta))[3]
    counts = rng.multinomial(seen, law)
    with np.errstate(invalid="ignore"):
        mean = (counts[..., 2] - counts[..., 0]) / seen
    lower, upper = np.full(mean.shape, -scale), np.full(mean.shape, scale)
    for _ in range(60):  # bisection: the mean of a token grows with its logit
        logit = (lower + upper) / 2
        below = 2 * np.sinh(logit) / (1 + 2 * np.cosh(logit)) < mean
        lower, upper = np.where(below, logit, lower), np.where(below, upper, logit)
    return np.where(seen > 0, (lower + upper) / 2, 0.0) / scale


def likelihood_scaling(
    horizon: int, *, num_prompts: int, num_rows: int, num_seeds: int, log_n: float
) -> dict[str, list[float]]:
    """KL and Cov_N of maximum likelihood for each seed, exactly."""
    instance = rare_prompts(horizon, num_prompts=num_prompts)
    estimates = maximum_likelihood(instance, num_rows, num_seeds, np.random.default_rng(horizon))
    law = ResponseLaw(instance)
    return {"kl": law.kl(estimates).tolist(), "coverage": law.coverage(estimates, log_n).tolist()}


def bits_coverage(
    num_bits: int,
    *,
    probabilities: FloatArray,
    num_rows: int,
    num_seeds: int,
    samples: int,
    log_n: float,
    feature_norm: float,
) -> FloatArray:
    """Cov_N on `variance_instance` of the estimator that is best on average over all its truths, `(P, S)`.

    Positions without a feature change nothing, so H does not occur: only how many bits there are. For each position
    the estimate is the posterior mean of the next-token probability given the responses to +, with both signs alike
    beforehand. It lies in the class, and no estimator has a smaller KL on average over the truths. By symmetry the
    truth may be taken as all +. Coverage is estimated from `samples` responses.

    Args:
        num_bits: k, the pivotal positions.
        probabilities: `(P,)` probabilities of the prompt +.
        num_rows: Sequences to learn from.
        num_seeds: S.
        samples: Responses to + to judge on.
        log_n: log N.
        feature_norm: B.
    """
    rng = np.random.default_rng(num_bits)
    logit = feature_norm / math.sqrt(num_bits)
    chance = 1 / (1 + math.exp(-logit))
    seen = rng.binomial(num_rows, probabilities[:, None], size=(len(probabilities), num_seeds))
    ones = rng.binomial(seen[..., None], chance, size=(*seen.shape, num_bits))
    positive = 1 / (1 + np.exp(-np.clip(logit * (2 * ones - seen[..., None]), -700, 700)))
    guess = positive * chance + (1 - positive) * (1 - chance)
    of_one, of_zero = np.log(chance / guess), np.log((1 - chance) / (1 - guess))
    drawn = (rng.random((num_bits, samples)) < chance).astype(np.float64)
    ratios = of_one @ drawn + of_zero @ (1 - drawn)
    return probabilities[:, None] * (ratios >= log_n - TIE_TOLERANCE).mean(-1)
