"""Token-level SGD (21) and the model that goes on so while it decodes, (22) and (23), for many runs in one array.

A prompt of the instances has features on at most two coordinates. One token's step touches these, and shrinks the
others only where the projection does, so a step costs the same whatever d.
"""

import numpy as np

from hf_coverage.functional.checks import TIE_TOLERANCE, FloatArray
from hf_coverage.tasks.linear_instances import LinearInstance
from recipes.normalized_sgd.learners import Data


def follow(
    instance: LinearInstance, theta: FloatArray, prompts: np.ndarray, tokens: np.ndarray, rates: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Take one step after each token of a sequence, in R rows of their own.

    Args:
        instance: The instance; where the theta of a row starts does not come from it.
        theta: `(R, d)`.
        prompts: `(R,)`.
        tokens: `(R, H)`.
        rates: `(R,)` step sizes.

    Returns:
        theta afterwards `(R, d)`, and `sum_h log p_{theta_h}(y_h)` `(R,)`, nats.
    """
    rows = np.arange(len(theta))
    touched = touched_coordinates(instance)[prompts]
    features = np.moveaxis(instance.features[prompts[:, None], :, touched], 1, 2)  # (R, V, 2)
    first, second = np.ascontiguousarray(features[..., 0]), np.ascontiguousarray(features[..., 1])
    one, two = theta[rows, touched[:, 0]], theta[rows, touched[:, 1]]
    others = (theta * theta).sum(-1) - one * one - two * two
    shrunk, logprob = np.ones(len(theta)), np.zeros(len(theta))
    for token in np.ascontiguousarray(tokens.T):
        logits = one[:, None] * first + two[:, None] * second
        logits -= logits.max(-1, keepdims=True)
        weights = np.exp(logits)
        total = weights.sum(-1)
        logprob += logits[rows, token] - np.log(total)
        lr = rates / total
        one = one + rates * first[rows, token] - lr * (weights * first).sum(-1)
        two = two + rates * second[rows, token] - lr * (weights * second).sum(-1)
        norm = np.sqrt(one * one + two * two + others)
        if (norm > 1).any():
            keep = 1 / np.maximum(1.0, norm)
            one, two, others, shrunk = one * keep, two * keep, others * keep * keep, shrunk * keep
    theta = theta * shrunk[:, None]
    theta[rows, touched[:, 0]], theta[rows, touched[:, 1]] = one, two
    return theta, logprob


def touched_coordinates(instance: LinearInstance) -> np.ndarray:
    """The two coordinates `(X, 2)` outside of which a prompt's features are 0."""
    used = instance.features.any(axis=1)
    if used.sum(-1).max() > 2:
        raise ValueError("`instance` must have prompts with features on at most two coordinates each.")
    return np.argsort(~used, axis=-1, kind="stable")[:, :2]


def train_tokens(data: Data, rates: FloatArray, *, seed: int) -> FloatArray:
    """Train with one step a token on the sequences of `data`, their tokens in random order, which is D's law.

    Args:
        data: S seeds of T sequences.
        rates: `(E,)` step sizes.
        seed: Of the orders.

    Returns:
        `(E, S, d)`.
    """
    num_seeds, steps = data.prompts.shape
    rng = np.random.default_rng(seed)
    theta = np.tile(data.instance.start, (len(rates) * num_seeds, 1))
    for step in range(steps):
        counts = data.counts[:, step].astype(np.int64)
        tokens = rng.permuted(np.array([np.repeat(np.arange(counts.shape[1]), row) for row in counts]), axis=1)
        prompts = np.tile(data.prompts[:, step], len(rates))
        theta, _ = follow(data.instance, theta, prompts, np.tile(tokens, (len(rates), 1)), np.repeat(rates, num_seeds))
    return theta.reshape(len(rates), num_seeds, -1)


def adapted_coverage(
    instance: LinearInstance, theta: FloatArray, rates: FloatArray, *, samples: int, log_n: float, seed: int
) -> FloatArray:
    """Cov_N of the model that is trained on while it decodes, estimated from `samples` responses to every prompt.

    Args:
        instance: The instance.
        theta: `(R, d)`.
        rates: `(R,)` step sizes while decoding.
        samples: Responses drawn from D for every prompt, the same ones for all rows.
        log_n: log N.
        seed: Of the responses.

    Returns:
        `(R,)`.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(len(theta))
    for prompt in instance.prompts:
        prompts = np.full(samples, prompt)
        tokens = instance.sample(prompts, rng)
        reference = instance.logprobs(prompts, tokens)
        every = len(theta)
        _, logprob = follow(
            instance,
            np.repeat(theta, samples, axis=0),
            np.tile(prompts, every),
            np.tile(tokens, (every, 1)),
            np.repeat(rates, samples),
        )
        missed = np.tile(reference, every) - logprob >= log_n - TIE_TOLERANCE
        total += instance.prompt_probabilities[prompt] * missed.reshape(every, samples).mean(-1)
    return total
