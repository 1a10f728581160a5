"""SGD, its relatives and token-level SGD on instances of the theory, for many step sizes and seeds in one array.

The instances' tokens do not depend on each other given the prompt, so a sequence's gradient is a function of how often
each token occurs in it, and the law of a response's log ratio is that of a sum: a step costs the same at every H, and
Cov_N is exact. A row is one run; runs of one seed see the same data.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import multinomial

from hf_coverage.functional.checks import TIE_TOLERANCE, FloatArray
from hf_coverage.tasks.linear_instances import LinearInstance

Rule = Callable[[FloatArray, FloatArray, float], FloatArray]
"""From gradients `(R, d)`, step sizes `(R, 1)` and log N to the changes of theta `(R, d)`."""


def plain(gradient: FloatArray, lr: FloatArray, log_n: float) -> FloatArray:
    """Equation (14)."""
    return lr * gradient


def clipped(gradient: FloatArray, lr: FloatArray, log_n: float) -> FloatArray:
    """As plain, the gradient cut to norm 1 as the Trainer does by default."""
    return lr * gradient / np.maximum(1.0, norm(gradient))


def sign(gradient: FloatArray, lr: FloatArray, log_n: float) -> FloatArray:
    """Equation (20)."""
    return lr * np.sign(gradient)


def normalized(gradient: FloatArray, lr: FloatArray, log_n: float) -> FloatArray:
    """Equation (18), with the lambda that Theorem 5.1 has for a step size."""
    return lr * gradient / (log_n / (16 * lr) + norm(gradient))


def normalized_small_lambda(gradient: FloatArray, lr: FloatArray, log_n: float) -> FloatArray:
    """Equation (18) with lambda = log N."""
    return lr * gradient / (log_n + norm(gradient))


RULES: dict[str, Rule] = {
    "SGD": plain,
    "SGD, clipped": clipped,
    "sign SGD": sign,
    "normalised SGD": normalized,
    "normalised SGD, lambda = log N": normalized_small_lambda,
}


def norm(vectors: FloatArray) -> FloatArray:
    return np.sqrt((vectors * vectors).sum(-1, keepdims=True))


def project(theta: FloatArray) -> FloatArray:
    """Onto the unit ball."""
    return theta / np.maximum(1.0, norm(theta))


class Data:
    """Sequences for several seeds: prompts, and how often each token occurs.

    Args:
        instance: The instance.
        seeds: One stream of sequences each.
        steps: T, the sequences of a stream.
    """

    def __init__(self, instance: LinearInstance, seeds: Sequence[int], steps: int) -> None:
        self.instance = instance
        law = np.exp(instance.next_logprobs(instance.theta))
        prompts, counts = [], []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            drawn = rng.choice(len(law), size=steps, p=instance.prompt_probabilities)
            prompts.append(drawn)
            counts.append(rng.multinomial(instance.horizon, law[drawn]))
        self.prompts, self.counts = np.array(prompts), np.array(counts, dtype=np.float64)


def train_sequences(data: Data, rule: Rule, rates: FloatArray, *, log_n: float, marks: Sequence[int]) -> FloatArray:
    """Train with one step a sequence, for all step sizes and seeds.

    Args:
        data: S seeds of T sequences.
        rule: What a gradient does.
        rates: `(E,)` step sizes.
        log_n: log N.
        marks: Ascending numbers of steps after which theta is kept.

    Returns:
        `(marks, E, S, d)`.
    """
    instance, num_seeds = data.instance, len(data.prompts)
    theta = np.tile(instance.start, (len(rates) * num_seeds, 1))
    lr = np.repeat(rates, num_seeds)[:, None]
    kept = []
    for step in range(max(marks)):
        features = np.tile(instance.features[data.prompts[:, step]], (len(rates), 1, 1))
        counts = np.tile(data.counts[:, step], (len(rates), 1))
        errors = counts - instance.horizon * softmax((features @ theta[..., None])[..., 0])
        gradient = (errors[:, None] @ features)[:, 0]
        theta = project(theta + rule(gradient, lr, log_n))
        if step + 1 in marks:
            kept.append(theta.reshape(len(rates), num_seeds, -1))
    return np.array(kept)


def softmax(logits: FloatArray) -> FloatArray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class ResponseLaw:
    """The exact law of (x, sum_h phi(x, y_h)) under D, which is all that a log ratio depends on.

    Sums that D gives less than 1e-13 are left out.

    Args:
        instance: An instance over the tokens -1, 0, 1 whose prompts have features on one line, or a nearly sure token.
    """

    def __init__(self, instance: LinearInstance) -> None:
        self.instance = instance
        prompts, sums, weights = [], [], []
        law = np.exp(instance.next_logprobs(instance.theta))
        for prompt in instance.prompts:
            features = instance.features[prompt]
            on_a_line = np.allclose(features[0], -features[2]) and not features[1].any()
            counts, chance = (walk_law if on_a_line else few_law)(law[prompt], instance.horizon)
            prompts.append(np.full(len(chance), prompt))
            sums.append(counts @ features)
            weights.append(chance * instance.prompt_probabilities[prompt])
        self.prompts, self.sums, self.weights = map(np.concatenate, (prompts, sums, weights))
        self.log_partition = log_partition(instance, instance.theta[None])[0]

    def log_ratios(self, theta: FloatArray) -> FloatArray:
        """`(R, M)` log D - log p of every support point, for parameters `(R, d)`."""
        shift = self.instance.horizon * (log_partition(self.instance, theta) - self.log_partition)
        return (self.instance.theta - theta) @ self.sums.T + shift[:, self.prompts]

    def coverage(self, theta: FloatArray, log_n: float) -> FloatArray:
        """Cov_N `(R,)`."""
        parts = [
            (self.log_ratios(part) >= log_n - TIE_TOLERANCE) @ self.weights
            for part in np.array_split(theta, max(1, len(theta) // 200))
        ]
        return np.concatenate(parts)

    def kl(self, theta: FloatArray) -> FloatArray:
        """KL(D || p) `(R,)`, nats."""
        return self.log_ratios(theta) @ self.weights


def log_partition(instance: LinearInstance, theta: FloatArray) -> FloatArray:
    """`log sum_v exp <theta, phi(x, v)>` `(R, X)` a token."""
    return np.logaddexp.reduce(np.einsum("xvd,rd->rxv", instance.features, theta), axis=-1)


def walk_law(token_law: FloatArray, horizon: int) -> tuple[FloatArray, FloatArray]:
    """Law of S = sum of H tokens -1, 0, 1, as counts (S, 0, 0) of tokens `(M, 3)` with the features of -1, 0, 1."""
    chance, power, rest = np.ones(1), token_law, horizon
    while rest:  # by squaring
        if rest & 1:
            chance = np.convolve(chance, power)
        rest >>= 1
        if rest:
            power = np.convolve(power, power)
    total = np.arange(-horizon, horizon + 1)
    seen = chance > 1e-13
    counts = np.stack([-total, np.zeros_like(total), np.zeros_like(total)], axis=1)
    return counts[seen].astype(np.float64), chance[seen]


def few_law(token_law: FloatArray, horizon: int, most: int = 8) -> tuple[FloatArray, FloatArray]:
    """Law of the numbers of the tokens -1, 0, 1, where 0 is nearly sure: at most `most` others."""
    rare = [(low, high) for low in range(most + 1) for high in range(most + 1 - low) if low + high <= horizon]
    counts = np.array([(low, horizon - low - high, high) for low, high in rare], dtype=np.float64)
    chance = multinomial.pmf(counts, horizon, token_law / token_law.sum())
    return counts, chance
