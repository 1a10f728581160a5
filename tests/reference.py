"""Slow float64 loops from the definitions: what the package's fast code must equal."""

import itertools
import math

import torch

INFINITY = math.inf


def coverage(ratios, n, weights=None):
    """Cov_N by its definition, one row at a time."""
    weights = weights if weights is not None else [1.0] * len(ratios)
    hit = sum(weight for ratio, weight in zip(ratios, weights) if ratio >= math.log(n) - 2e-6)
    return hit / sum(weights)


def exact_coverage(reference, model, n):
    """Cov_N of two distributions over the same finite set, by summation."""
    return sum(d for d, p in zip(reference, model) if d > 0 and (p == 0 or d / p >= n * (1 - 1e-9)))


def exact_kl(reference, model):
    """KL(D || p) of two distributions over the same finite set, nats."""
    terms = ((d, p) for d, p in zip(reference, model) if d > 0)
    return math.fsum(INFINITY if p == 0 else d * math.log(d / p) for d, p in terms)


def exact_hellinger(reference, model):
    """Squared Hellinger distance of two distributions over the same finite set."""
    return math.fsum((math.sqrt(d) - math.sqrt(p)) ** 2 for d, p in zip(reference, model)) / 2


def best_of_n_reward(model, reward, n):
    """Expected largest reward among n independent draws from a finite distribution."""
    levels = sorted(set(reward))
    below = [math.fsum(p for p, r in zip(model, reward) if r <= level) ** n for level in levels]
    return math.fsum(level * (upto - before) for level, upto, before in zip(levels, below, [0.0, *below]))


@torch.no_grad()
def enumerate_responses(model, prompt, length):
    """All V^H responses of `length` tokens with their log-probabilities and per-token distributions, in float64."""
    vocabulary = model.config.vocab_size
    responses = list(itertools.product(range(vocabulary), repeat=length))
    ids = torch.tensor([[*prompt, *response] for response in responses])
    logits = model(ids).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    labels = ids[:, len(prompt) :]
    logprobs = logits.gather(-1, labels[..., None])[..., 0].sum(-1)
    return responses, logprobs.tolist(), logits
