"""Pass@k as the objective of reinforcement learning: a reward function for TRL that wraps another."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from hf_coverage.functional.group_rewards import pass_at_k_rewards

__all__ = ["PassAtKReward"]


class PassAtKReward:
    """A reward function made into one whose policy gradient is that of the best of k, as TRL's `GRPOTrainer` takes it.

    With rewards of 0 and 1 the objective is Pass@k: coverage itself. A group is all completions of one prompt in a
    generation batch, wherever they were made: the processes of a job exchange rewards. Use
    `GRPOConfig(scale_rewards=False)`: TRL's default divides by the standard deviation within a group, which weighs
    prompts anew. Its mean in the logs is no share of solved prompts: log the plain reward beside it with weight 0.

    Args:
        reward: Called like TRL calls it, `reward(prompts=..., completions=..., **columns)`, with a number for each
            completion; may be one of `hf_coverage.decode.verifiers`.
        k: Samples that the best is taken of.
        baseline: Whether each completion's reward is reduced by what the others have without it; see
            `pass_at_k_rewards`.

    Raises:
        TypeError: If `reward` cannot be called.
        ValueError: If `k` is below 1; when called, if a group is smaller than k, only some of its rewards are None, or
            one is NaN or infinite.

    Example:
        >>> reward = PassAtKReward(lambda prompts, completions, **_: [float(c == "4") for c in completions], k=2)
        >>> reward(prompts=["2 + 2 ="] * 3, completions=["4", "5", "6"])
        [2.0, 0.0, 0.0]

    References:
        arXiv 2505.15201.
    """

    def __init__(self, reward: Callable[..., Any], k: int, *, baseline: bool = True) -> None:
        if not callable(reward):
            raise TypeError(f"`reward` must be a reward function, got {reward!r}.")
        if inspect.iscoroutinefunction(reward):
            raise TypeError("`reward` must not be a coroutine: call it from a function that waits for it.")
        if k != int(k) or k < 1:
            raise ValueError(f"`k` must be a whole number of at least 1, got {k}.")
        self.reward, self.k, self.baseline = reward, int(k), baseline
        name = getattr(reward, "__name__", type(reward).__name__)
        self.__name__ = f"pass_at_{self.k}_{name}"  # what TRL's logs call it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Reward the completions that this process made.

        Args:
            prompts: Text or chat messages, one a completion.
            completions: What was written.
            columns: Whatever else the trainer passes.

        Returns:
            One reward a completion; None where `reward` gave None for all of a group.
        """
        given = [
            (json.dumps(prompt, sort_keys=True, default=repr), reward)
            for prompt, reward in zip(
                prompts, self.reward(prompts=prompts, completions=completions, **columns), strict=True
            )
        ]
        rank = PartialState().process_index
        everywhere = gather_object([(rank, *pair) for pair in given])
        groups: dict[str, list[int]] = {}
        for row, (_, prompt, _) in enumerate(everywhere):
            groups.setdefault(prompt, []).append(row)
        found = np.empty(len(everywhere))
        for prompt, rows in groups.items():
            rewards = [everywhere[row][2] for row in rows]
            if all(reward is None for reward in rewards):  # TRL: this reward is not for such prompts
                found[rows] = np.nan
                continue
            if any(reward is None for reward in rewards):
                raise ValueError(f"`reward` gave numbers for some completions alone of the prompt {prompt[:80]}.")
            if len(rows) < self.k:
                raise ValueError(
                    f"`k` = {self.k} is more than the {len(rows)} completions of a group: set `num_generations` to at "
                    "least k."
                )
            found[rows] = pass_at_k_rewards([rewards], self.k, baseline=self.baseline)[0]
        mine = [float(value) for value, row in zip(found, everywhere) if row[0] == rank]
        return [None if np.isnan(value) else value for value in mine]
