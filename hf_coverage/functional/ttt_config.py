"""What test-time training trains, on which tokens, and how it makes a step.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from hf_coverage.functional.step_rule import StepRule, is_count

__all__ = ["LORA_RANK", "TTTCache", "TTTConfig", "TTTScope"]

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
