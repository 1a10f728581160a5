"""The instances of the theory: small linear models, and the data they are to learn, that tell estimators apart.

Each is an [`LinearInstance`]: prompts of one token, responses of H tokens, features in a table, and the truth
theta* in the unit ball. Response tokens a = -1, 0, 1 have the ids 0, 1, 2.

References:
    arXiv 2510.15020, Appendices I.4 and I.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import brentq

from hf_coverage.functional.checks import FloatArray, check_n
from hf_coverage.tasks.linear import AutoregressiveLinearForCausalLM
from hf_coverage.tasks.linear_features import TableFeatures

if TYPE_CHECKING:
    import datasets

__all__ = [
    "LinearInstance",
    "hard_instance",
    "large_step_instance",
    "small_step_instance",
    "variance_instance",
]

_TOKENS = np.array([-1.0, 0.0, 1.0])


@dataclass(frozen=True)
class LinearInstance:
    """A truth to learn: D(y|x) = p_theta*(y|x) of an autoregressive linear model, and a distribution over prompts.

    Args:
        features: `(X, V, d)`, or `(X, H, V, d)` where they depend on the position, by the prompt's token id.
        prompt_probabilities: `(X,)`; the ids of response tokens have 0.
        theta: theta* `(d,)`, in the unit ball.
        start: Where training begins `(d,)`, in the unit ball.
        horizon: H.

    Example:
        >>> instance = large_step_instance(64, feature_norm=32.0, step_size=0.1)
        >>> instance.feature_norm, instance.prompts.tolist()
        (32.0, [3])
    """

    features: FloatArray
    prompt_probabilities: FloatArray
    theta: FloatArray
    start: FloatArray
    horizon: int

    @property
    def prompts(self) -> np.ndarray:
        """Token ids of the prompts that occur."""
        return np.flatnonzero(self.prompt_probabilities)

    @property
    def feature_norm(self) -> float:
        """B: the largest norm of a feature vector."""
        return float(np.linalg.norm(self.features[self.prompts], axis=-1).max())

    @property
    def inherent_variance(self) -> float:
        """s2 = E_D sum_h ||phi - E phi||^2, exactly; Equation (8)."""
        q = np.exp(self.next_logprobs(self.theta))[..., None]
        spread = self.features - (q * self.features).sum(-2, keepdims=True)
        variance = (q * spread**2).sum((-1, -2))
        per_prompt = variance * self.horizon if variance.ndim == 1 else variance.sum(-1)
        return float(self.prompt_probabilities @ per_prompt)

    def next_logprobs(self, theta: FloatArray) -> FloatArray:
        """Log-probabilities of the next token, `(X, V)` or `(X, H, V)`, nats: no earlier token matters."""
        logits = self.features @ theta
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def model(self, theta: FloatArray | None = None) -> AutoregressiveLinearForCausalLM:
        """Make the float32 model with these parameters, by default where training begins."""
        table = torch.tensor(self.features, dtype=torch.float32)
        model = AutoregressiveLinearForCausalLM.from_features(TableFeatures(table))
        model.theta.data.copy_(torch.tensor(self.start if theta is None else theta))
        model.generation_config.max_new_tokens = self.horizon
        return model

    def sample(self, prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a response to each prompt `(R,)` from D: token ids `(R, H)`."""
        cumulative = self._cumulative[prompts]
        if cumulative.ndim == 2:
            cumulative = cumulative[:, None]
        return (rng.random((len(prompts), self.horizon))[..., None] > cumulative[..., :-1]).sum(-1)

    def logprobs(self, prompts: np.ndarray, responses: np.ndarray, theta: FloatArray | None = None) -> FloatArray:
        """Log-probability `(R,)` of responses `(R, H)` under theta, by default the truth; float64, nats."""
        table = self.next_logprobs(self.theta if theta is None else theta)[prompts]
        if table.ndim == 2:
            table = np.broadcast_to(table[:, None], (len(table), self.horizon, table.shape[-1]))
        return np.take_along_axis(table, responses[..., None], axis=-1).sum((-1, -2))

    def corpus(self, num_rows: int, *, seed: int) -> datasets.Dataset:
        """Draw a reference corpus of token ids: `prompt`, `completion`, `reference_logprob` (nats)."""
        import datasets

        rng = np.random.default_rng(seed)
        prompts = rng.choice(len(self.prompt_probabilities), size=num_rows, p=self.prompt_probabilities)
        responses = self.sample(prompts, rng)
        return datasets.Dataset.from_dict(
            {
                "prompt": prompts[:, None].tolist(),
                "completion": responses.tolist(),
                "reference_logprob": self.logprobs(prompts, responses),
            }
        )

    @cached_property
    def _cumulative(self) -> FloatArray:
        return np.exp(self.next_logprobs(self.theta)).cumsum(-1)


def large_step_instance(horizon: int, *, feature_norm: float, step_size: float | None = None) -> LinearInstance:
    """Build the instance on which SGD with large steps jumps to and fro for ever.

    One prompt, `phi = B v(y_h)` with `v(0) = [1, 0]`, `v(+-1) = [c, +-sqrt(1 - c^2)]`; theta* = [1, 0], start v(1). D
    says 0 ... 0 nearly always; at v(1) the model says 1 ... 1, and a step takes it from there to v(-1) and back.

    Args:
        horizon: H.
        feature_norm: B. With T steps it has to be above `2.4 log(T H)`, for other responses to stay unseen.
        step_size: eta, with e = eta H B above 2; it sets `c = e / (2 (e - 1))`, for which the jump is exact. None:
            c = 1/2, the limit of long steps, where the jump is approximate and all long steps are caught alike.

    Returns:
        The instance; its prompt has the id 3.

    Raises:
        ValueError: If e is too small for there to be such a c.

    References:
        arXiv 2510.15020, Appendix I.4.
    """
    cosine = 0.5
    if step_size is not None:
        jump = step_size * horizon * feature_norm
        if jump <= 2:
            raise ValueError(
                f"`step_size` must be above 2 / (H B) = {2 / (horizon * feature_norm):.3g}: got {step_size}."
            )
        cosine = jump / (2 * (jump - 1))
    trap = _trap(cosine)
    return LinearInstance(
        features=np.concatenate([np.zeros((3, 3, 2)), feature_norm * trap[None]]),
        prompt_probabilities=np.array([0.0, 0.0, 0.0, 1.0]),
        theta=np.array([1.0, 0.0]),
        start=trap[2],
        horizon=horizon,
    )


def small_step_instance(horizon: int, *, rare_probability: float, n: float, margin: float = 2.0) -> LinearInstance:
    """Build the instance on which SGD with small steps is too slow for a rare prompt.

    Prompts + (id 3) and - (id 4), `phi(+, a) = b [a, 0]`, `phi(-, a) = b [0, a]`, theta* = [1/2, 1/2], start 0. The
    scale b falls like 1 / sqrt(H): a response to + carries `margin` log N nats of information, whatever H.

    Args:
        horizon: H.
        rare_probability: Probability of +.
        n: The N of Cov_N.
        margin: KL at the start for either prompt, in units of log N.

    Returns:
        The instance.

    References:
        arXiv 2510.15020, Appendix I.4.
    """
    scale = _scale_for(margin * math.log(check_n(n)) / horizon) / 0.5
    features = np.zeros((5, 3, 2))
    features[3, :, 0] = features[4, :, 1] = scale * _TOKENS
    chances = np.array([0.0, 0.0, 0.0, rare_probability, 1 - rare_probability])
    return LinearInstance(features, chances, np.full(2, 0.5), np.zeros(2), horizon)


def hard_instance(
    horizon: int, *, feature_norm: float, n: float, num_rare: int = 12, margin: float = 2.0
) -> LinearInstance:
    """Build one instance that is hard for every step size: both cases side by side, on different coordinates.

    The frequent prompt (id 3) is that of `large_step_instance` with c = 1/2. The k-th rare prompt has probability
    2^-(k+1), k = 1 ... K, a coordinate of its own and the features of `small_step_instance`. The norm of theta* is 1:
    0.8 for the frequent prompt, the rest in equal parts for the rare ones.

    Args:
        horizon: H.
        feature_norm: B, of the frequent prompt.
        n: The N of Cov_N.
        num_rare: K.
        margin: KL at the start for a rare prompt, in units of log N.

    Returns:
        The instance, with d = 2 + K.

    Raises:
        ValueError: If the features of the rare prompts would exceed B.
    """
    trap, share = _trap(0.5), 0.6 / math.sqrt(num_rare)
    scale = _scale_for(margin * math.log(check_n(n)) / horizon) / share
    if scale > feature_norm:
        raise ValueError(
            f"`feature_norm` must be at least {scale:.3g}, what the rare prompts need, got {feature_norm}."
        )
    features = np.zeros((4 + num_rare, 3, 2 + num_rare))
    features[3, :, :2] = feature_norm * trap
    for k in range(num_rare):
        features[4 + k, :, 2 + k] = scale * _TOKENS
    rare = 0.5 ** np.arange(2, 2 + num_rare)
    return LinearInstance(
        features=features,
        prompt_probabilities=np.concatenate([np.zeros(3), [1 - rare.sum()], rare]),
        theta=np.concatenate([[0.8, 0.0], np.full(num_rare, share)]),
        start=np.concatenate([trap[2], np.zeros(num_rare)]),
        horizon=horizon,
    )


def variance_instance(
    horizon: int, *, feature_norm: float, probability: float, num_pivotal: int | None = None, seed: int = 0
) -> LinearInstance:
    """Build the instance that shows why the inherent variance has to be in the bounds.

    Tokens 0, 1; `phi(-, .) = 0`; `phi(+, y_1..h) = B y_h e_h` at the pivotal positions h, 0 at the others. The truth
    is a corner `+-1/sqrt(k)` of the cube over the k pivotal positions: k bits to learn from responses to +.

    Args:
        horizon: H.
        feature_norm: B.
        probability: Probability of + (id 2); - has the id 3.
        num_pivotal: k, evenly spread; None: all H.
        seed: Seed of the corner.

    Returns:
        The instance, with d = k and s2 proportional to k.

    Raises:
        ValueError: If there are more pivotal positions than positions.

    References:
        arXiv 2510.15020, Appendix I.8.
    """
    k = horizon if num_pivotal is None else num_pivotal
    if not 1 <= k <= horizon:
        raise ValueError(f"`num_pivotal` must be between 1 and the horizon {horizon}, got {num_pivotal}.")
    features = np.zeros((4, horizon, 2, k))
    features[2, np.arange(k) * horizon // k, 1, np.arange(k)] = feature_norm
    corner = np.random.default_rng(seed).choice([-1.0, 1.0], size=k) / math.sqrt(k)
    return LinearInstance(features, np.array([0.0, 0.0, probability, 1 - probability]), corner, np.zeros(k), horizon)


def _trap(cosine: float) -> FloatArray:
    """`v(-1), v(0), v(1)`, the rows."""
    sine = math.sqrt(1 - cosine**2)
    return np.array([[cosine, -sine], [1.0, 0.0], [cosine, sine]])


def _scale_for(kl: float) -> float:
    """The logit x > 0 for which p(a) ~ exp(x a) on -1, 0, 1 has this divergence from the uniform distribution."""

    def divergence(x: float) -> float:
        logq = x * _TOKENS - np.logaddexp.reduce(x * _TOKENS)
        return float(np.exp(logq) @ (logq + math.log(3)))

    if not 0 < kl < math.log(3):
        raise ValueError(
            f"`horizon` is too short: {kl:.3g} nats a token are wanted, and 3 tokens hold less than 1.09."
        )
    return float(brentq(lambda x: divergence(x) - kl, 0.0, 500.0))
