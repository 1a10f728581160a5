"""Step size, lambda and minibatch of the theorems on training for coverage, and what each promises.

The theorems are about the autoregressive linear model `p ~ exp <theta, phi>` with theta in a ball of radius 1,
`B = sup ||phi||` and the inherent variance s2 of the data. For a ball of radius R the same holds of theta / R and
R phi, which have B = R sup ||phi|| and R^2 s2; step sizes and lambda come back here in units of theta itself.

Promises are known up to constants, which are large in the proofs: they are set to 1 here. Read a sum of terms below 1
as "not excluded", and one above 1 as "the theorem says nothing".

References:
    arXiv 2510.15020, Theorems 5.1, 6.1 and 6.2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hf_coverage.functional.checks import check_n

__all__ = [
    "LinearProblem",
    "NormalizedStepSizes",
    "PracticalSweep",
    "StepSizes",
    "TrainingPlan",
    "distillation_step_sizes",
    "normalized_step_sizes",
    "practical_sweep",
    "token_level_step_sizes",
]

VARIANCE, FEATURES, MINIBATCH = "inherent variance", "feature norm", "minibatch"
"""Names of the terms of a promise."""

_LARGEST = 1e30
"""Of what is squared and divided by here; one over it is the least."""


@dataclass(frozen=True)
class LinearProblem:
    """What the theorems have to know of a model and its data.

    Args:
        feature_norm: `sup ||phi||`; for an output head `max_t ||h_t||`.
        inherent_variance: `s2 = E_D sum_h ||phi_h - E phi_h||^2` of a response, Equation (8), of the same features.
        radius: R, `||theta|| <= R`.

    Raises:
        ValueError: If a number is not positive and finite, or the inherent variance is negative.

    Example:
        >>> problem = LinearProblem(feature_norm=2.0, inherent_variance=12.0, radius=0.5)
        >>> problem.bound, problem.variance, problem.effective_length
        (1.0, 3.0, 3.0)
    """

    feature_norm: float
    inherent_variance: float
    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("feature_norm", self.feature_norm, "the largest norm of a feature vector")
        _check_positive("radius", self.radius, "the radius R of the ball that holds the parameters")
        if not 0 <= self.inherent_variance < math.inf:
            raise ValueError(
                f"`inherent_variance` must be finite and at least 0, but is {self.inherent_variance}: give the mean "
                "over responses of a sum of squares."
            )

    @property
    def bound(self) -> float:
        """B = R sup ||phi||."""
        return self.radius * self.feature_norm

    @property
    def variance(self) -> float:
        """R^2 s2, which is the s2 of the theorems."""
        return self.radius**2 * self.inherent_variance

    @property
    def effective_length(self) -> float:
        """How many tokens of the largest variance there can be, B^2, make up the inherent variance; whatever R."""
        return self.inherent_variance / self.feature_norm**2


@dataclass(frozen=True)
class TrainingPlan:
    """What is wanted of a training run, and what it may cost.

    Args:
        n: The N of Cov_N, above 1.
        steps: T, at least 1: how many minibatches; how many sequences where every token makes a step.
        eps: The coverage that minibatch and steps are to allow, in (0, 1).
        batch_size: Sequences in a minibatch, K; None: as many as `eps` needs.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> round(TrainingPlan(n=16, steps=1000).log_n, 3)
        2.773
    """

    n: float
    steps: int
    eps: float = 0.1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if check_n(self.n) == 1:
            raise ValueError("`n` must be above 1: the step sizes have log N in them, which is 0 here; take 2, say.")
        if not 1 <= self.steps <= _LARGEST:
            raise ValueError(f"`steps` must be at least 1, the number T of steps to train for, but is {self.steps}.")
        if not 1 / _LARGEST <= self.eps < 1:
            raise ValueError(
                "`eps` must lie strictly between 0 and 1, the Cov_N that is wanted, for example 0.1, but is "
                f"{self.eps}."
            )
        if self.batch_size is not None and not 1 <= self.batch_size <= _LARGEST:
            raise ValueError(
                f"`batch_size` must be at least 1 sequence, or None for what `eps` needs, but is {self.batch_size}."
            )

    @property
    def log_n(self) -> float:
        """Log N, nats."""
        return math.log(self.n)


@dataclass(frozen=True)
class StepSizes:
    """What a theorem says to train with, and what it then promises.

    Attributes:
        lr: Step size eta, in units of theta: of a normalised step (5.1), or of a plain one (6.1, 6.2).
        batch_size: Sequences in a minibatch, K.
        terms: The terms whose sum bounds Cov_N up to constants, by name.
        steps_needed: The least T with which no term that T is in exceeds eps, constants left out.
    """

    lr: float
    batch_size: int
    terms: Mapping[str, float]
    steps_needed: float

    @property
    def total(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def dominant(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=self.terms.__getitem__)

    @property
    def is_vacuous(self) -> bool:
        """Whether even with constants of 1 the sum says no more of Cov_N than that it is a probability."""
        return self.total >= 1


@dataclass(frozen=True)
class NormalizedStepSizes(StepSizes):
    """Step sizes of normalised SGD.

    Attributes:
        lam: Lambda, in units of the gradient's norm.
    """

    lam: float


def normalized_step_sizes(problem: LinearProblem, plan: TrainingPlan) -> NormalizedStepSizes:
    """Set normalised SGD (18): `theta <- Proj(theta + eta g / (lambda + ||g||))`.

        eta = min{ 1/(128 B), (log N / (s2 T))^(1/4) },    lambda = log N / (16 eta),    K = B / (eps log N) + 1,
        Cov_N <~ sqrt(s2 / (T log N)) + B^2 / T + B / (K log N)

    with R = 1; g is a mean over the K sequences of sums over their tokens. R times this eta and 1/R times this lambda
    are the ones for theta itself. There is no sequence length in any of them.

    Args:
        problem: B, s2 and R.
        plan: N, T, eps and K.

    Returns:
        The step sizes.

    Example:
        >>> found = normalized_step_sizes(LinearProblem(0.5, 4.0), TrainingPlan(n=16, steps=100_000))
        >>> round(found.lr, 5), round(found.lam, 3), found.batch_size, found.dominant
        (0.01562, 11.09, 3, 'minibatch')

    References:
        arXiv 2510.15020, Theorem 5.1 and Appendix I.5.
    """
    b, variance, log_n = problem.bound, problem.variance, plan.log_n
    eta = min(1 / (128 * b), _power(log_n / plan.steps, variance, 1 / 4))
    batch_size = plan.batch_size or math.ceil(b / (plan.eps * log_n) + 1)
    return NormalizedStepSizes(
        lr=problem.radius * eta,
        lam=log_n / (16 * eta) / problem.radius,
        batch_size=batch_size,
        terms=_terms(problem, plan) | {MINIBATCH: b / (batch_size * log_n)},
        steps_needed=_steps_needed(problem, plan),
    )


def token_level_step_sizes(problem: LinearProblem, plan: TrainingPlan) -> StepSizes:
    """Set token-level SGD (21) for a model that goes on training while it decodes (22), one sequence a step.

        eta = min{ 1/(2 B^2), (s2 T)^(-1/2) },    Cov_N(p^TTT) <~ ( sqrt(s2 / T) + B^2 / T ) / log N

    with R = 1; R^2 times this eta is the one for theta itself. The bound is not that of the trained model on its own.

    Args:
        problem: B, s2 and R.
        plan: N, T and eps; its `batch_size` has no part in it.

    Returns:
        The step sizes.

    Example:
        >>> round(token_level_step_sizes(LinearProblem(0.5, 4.0), TrainingPlan(n=16, steps=100)).lr, 5)
        0.05

    References:
        arXiv 2510.15020, Theorem 6.1.
    """
    b, variance, log_n = problem.bound, problem.variance, plan.log_n
    return StepSizes(
        lr=problem.radius**2 * min(1 / (2 * b**2), _power(1 / plan.steps, variance, 1 / 2)),
        batch_size=1,
        terms={VARIANCE: math.sqrt(variance / plan.steps) / log_n, FEATURES: b**2 / plan.steps / log_n},
        steps_needed=max(variance / (plan.eps * log_n) ** 2, b**2 / (plan.eps * log_n), 1.0),
    )


def distillation_step_sizes(problem: LinearProblem, plan: TrainingPlan) -> StepSizes:
    """Set SGD with the stopped gradient (24) to (26), for a teacher whose next-token distributions are known.

        eta = min{ 1/((64 log N + 2) B^2), (T s2 log N)^(-1/2) }

    with R = 1; R^2 times this eta is the one for theta itself. The terms are those that this step size balances,
    `sqrt(s2 / (T log N)) + B^2 / T`: Theorem 5.1's without the minibatch, which nothing has to be averaged out by.

    Args:
        problem: B, s2 and R.
        plan: N, T and eps; its `batch_size` has no part in it.

    Returns:
        The step sizes.

    Example:
        >>> round(distillation_step_sizes(LinearProblem(0.5, 4.0), TrainingPlan(n=16, steps=10_000)).lr, 6)
        0.003003

    References:
        arXiv 2510.15020, Theorem 6.2.
    """
    b, variance, log_n = problem.bound, problem.variance, plan.log_n
    eta = min(1 / ((64 * log_n + 2) * b**2), _power(1 / (plan.steps * log_n), variance, 1 / 2))
    return StepSizes(
        lr=problem.radius**2 * eta,
        batch_size=1,
        terms=_terms(problem, plan),
        steps_needed=_steps_needed(problem, plan),
    )


class PracticalSweep(NamedTuple):
    """What to try in practice: one lambda, and the step sizes to choose from on held-out data."""

    lam: float
    lrs: tuple[float, ...]


def practical_sweep(sizes: NormalizedStepSizes, gradient_norm: float) -> PracticalSweep:
    """Turn a theorem's normalised step into what practice tries: a small lambda, and step sizes from eta upwards.

    The theorem's lambda is a worst case's. Above the gradient's norm it leaves little of the normalisation: the step
    is nearly `eta / lambda` times the gradient. At a tenth of the norm, steps have length lr to within a tenth,
    whatever the gradient, and lr is all that is left to tune. Five of them, each ten times the one before, begin at
    the theorem's, which is small by the constants of its proof.

    Args:
        sizes: Of normalised SGD.
        gradient_norm: Typical `||g||` of a minibatch.

    Returns:
        Lambda, never above the theorem's, and step sizes, ascending.

    Raises:
        ValueError: If the norm is not positive.

    Example:
        >>> sizes = normalized_step_sizes(LinearProblem(60.0, 1e5, radius=700.0), TrainingPlan(n=16, steps=1000))
        >>> sweep = practical_sweep(sizes, gradient_norm=250.0)
        >>> sweep.lam, [f"{lr:.2g}" for lr in sweep.lrs]
        (25.0, ['0.00013', '0.0013', '0.013', '0.13', '1.3'])
    """
    _check_positive("gradient_norm", gradient_norm, "the norm of a minibatch's gradient")
    return PracticalSweep(min(sizes.lam, gradient_norm / 10), tuple(sizes.lr * 10.0**power for power in range(5)))


def _terms(problem: LinearProblem, plan: TrainingPlan) -> dict[str, float]:
    return {
        VARIANCE: math.sqrt(problem.variance / (plan.steps * plan.log_n)),
        FEATURES: problem.bound**2 / plan.steps,
    }


def _steps_needed(problem: LinearProblem, plan: TrainingPlan) -> float:
    return max(problem.variance / (plan.eps**2 * plan.log_n), problem.bound**2 / plan.eps, 1.0)


def _power(numerator: float, variance: float, exponent: float) -> float:
    """`(numerator / variance)^exponent`; without variance nothing limits the step from this side."""
    return (numerator / variance) ** exponent if variance > 0 else math.inf


def _check_positive(name: str, value: float, meaning: str) -> None:
    if not 1 / _LARGEST <= value <= _LARGEST:
        raise ValueError(
            f"`{name}` must be positive and finite, from {1 / _LARGEST:g} to {_LARGEST:g}, {meaning}, but is {value}."
        )
