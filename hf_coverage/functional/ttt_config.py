"""What test-time training trains, on which tokens, and how it makes a step.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Literal

from torch import Tensor

__all__ = ["LORA_RANK", "Center", "StepRule", "TTTCache", "TTTConfig", "TTTScope", "is_count"]

Center = Literal["zero", "start"]
"""What a ball of parameters lies around: zero, or where the parameters started."""


@dataclass(frozen=True)
class StepRule:
    """How a head makes a step on a token y, from where it started, W_0.

        W <- Proj( W_0 + (1 - decay) (W - W_0) + a e h^T ),     e = 1_y - p,     a = lr or lr / (lam + ||e h^T||_F)

    Args:
        lr: Step size, at least 0, or one for each row `(B,)`.
        radius: R of the ball `||W - c||_F <= R` that Proj is onto, the bias a column of W; None: no ball.
        center: c of that ball: zero, or W_0.
        decay: Part of the way back to W_0 that is gone before every step, in [0, 1].
        lam: Lambda of normalised steps, at least 0; None: plain gradient steps.
        top_k: Keep e at y and at the k likeliest tokens and cut it to 0 elsewhere, for memory and time that do not
            grow with the vocabulary; `fast_error_bound` bounds what that changes. None: exact.
        num_steps: Steps on each token, one after the other.

    Raises:
        ValueError: If a number is out of its range, `top_k` is combined with `radius` or `lam`, for which no bound is
            known, or `decay` with a ball around zero.

    References:
        arXiv 2510.15020, Equation (22), and (18) for normalised steps.
    """

    lr: float | Tensor
    radius: float | None = None
    center: Center = "start"
    decay: float = 0.0
    lam: float | None = None
    top_k: int | None = None
    num_steps: int = 1

    def __post_init__(self) -> None:
        for size in (self.lr.min().item(), self.lr.max().item()) if isinstance(self.lr, Tensor) else (self.lr,):
            if not 0 <= size < math.inf:
                raise ValueError(f"`lr` must be finite and at least 0, got {size}.")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"`radius` must be positive and finite, or None for no ball, got {self.radius}.")
        if self.center not in ("zero", "start"):
            raise ValueError(f'`center` must be "zero" or "start", got {self.center!r}.')
        if not 0 <= self.decay <= 1:
            raise ValueError(f"`decay` must be in [0, 1], got {self.decay}.")
        if self.decay and self.radius is not None and self.center == "zero":
            raise ValueError('`decay` goes back to the start: give the ball the same centre, `center="start"`.')
        if self.lam is not None and not 0 <= self.lam < math.inf:
            raise ValueError(f"`lam` must be finite and at least 0, or None for plain steps, got {self.lam}.")
        if not is_count(self.num_steps):
            raise ValueError(f"`num_steps` must be a whole number, at least 1, got {self.num_steps!r}.")
        if self.top_k is not None and not is_count(self.top_k):
            raise ValueError(f"`top_k` must be a whole number, at least 1, or None, got {self.top_k!r}.")
        if self.top_k is not None and (self.radius is not None or self.lam is not None):
            raise ValueError(
                "`top_k` must not be combined with `radius` or `lam`: how far steps rescaled by the norm of a cut "
                "gradient lie from exact ones is not known. Leave it out, or them."
            )


def is_count(value: object) -> bool:
    """Whether this is a whole number, at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


TTTScope = Literal["head", "lora", "all"]
"""What is trained: the output head, low-rank adapters of all linear layers but the head, or all parameters."""

TTTCache = Literal["exact", "stale"]
"""What becomes of earlier keys and values when the backbone changes: computed again, or left as they were."""

LORA_RANK = 8
"""Rank of the adapters where none is given: PEFT's."""


@dataclass(frozen=True)
class TTTConfig(StepRule):
    """Test-time training of one sequence: a `StepRule`, what it moves and on which tokens.

        theta <- Proj( theta_0 + (1 - decay) (theta - theta_0) + a grad log p_theta(y) )     after every token y

    Args:
        scope: What theta is: `"head"`, the output head, whose steps have a closed form and leave the cache exact;
            `"lora"`, low-rank adapters that begin as those of PEFT do; `"all"`, all parameters of the model. The two
            latter follow the network's own gradient and need its backward pass for every token.
        on_prompt: Whether to take a step after each token of the prompt as well (dynamic evaluation).
        rank: Rank of the adapters; for `"lora"` alone, 8 if None.
        cache: For `"lora"` and `"all"`: `"exact"` reads the whole prefix again with the parameters of each step, and
            its gradient is that of the whole pass; `"stale"` leaves keys and values as they were computed, and takes
            the gradient through the newest token alone.

    The other arguments are those of `StepRule`; the ball and the decay are those of theta, and the centre must be its
    start unless theta is the head.

    Raises:
        ValueError: If a setting is out of its range, or none of the scope's.

    Example:
        >>> TTTConfig(0.1, scope="lora", rank=4).rank
        4

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """

    scope: TTTScope = "head"
    on_prompt: bool = False
    rank: int | None = None
    cache: TTTCache = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("head", "lora", "all"):
            raise ValueError(f'`scope` must be "head", "lora" or "all", got {self.scope!r}.')
        if self.cache not in ("exact", "stale"):
            raise ValueError(f'`cache` must be "exact" or "stale", got {self.cache!r}.')
        if self.rank is not None and self.scope != "lora":
            raise ValueError(f'`rank` is that of adapters, `scope="lora"`; leave it out for {self.scope!r}.')
        if self.rank is not None and not is_count(self.rank):
            raise ValueError(f"`rank` must be a whole number, at least 1, got {self.rank!r}.")
        if self.scope == "head" and self.cache == "stale":
            raise ValueError('`cache` is exact whatever the head does: leave it out for `scope="head"`.')
        if self.scope != "head" and self.top_k is not None:
            raise ValueError('`top_k` cuts the steps of the head: leave it out, or take `scope="head"`.')
        if self.scope != "head" and self.radius is not None and self.center != "start":
            raise ValueError(f'`center` must be "start" for `scope={self.scope!r}`, got {self.center!r}.')

    @classmethod
    def of(cls, rule: StepRule) -> TTTConfig:
        """What a rule alone means: steps of the head on the tokens of the response; a configuration is itself."""
        if isinstance(rule, cls):
            return rule
        return cls(**{entry.name: getattr(rule, entry.name) for entry in fields(rule)})
