"""Group-relative policy gradients on the graph search, many runs side by side, with what comes of each known exactly.

Every prompt has one right path of a known length, so p(right|x) is one pass of the model and no sampling: Pass@N is
`1 - (1 - p)^N`, a group of g has a signal with probability `1 - p^g - (1 - p)^g`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.exploration import elliptical_bonus
from hf_coverage.functional.group_rewards import pass_at_k_rewards
from hf_coverage.tasks.graph_search import GraphSearch
from recipes.reinforcement.stacked import StackedGPT2

__all__ = ["Lessons", "Objective", "Rows", "reinforce", "right_logprobs"]

_EPS = 1e-4
"""TRL's, beside a standard deviation."""

_LESSONS, _HELD_OUT = 0x726C, 0x7265
"""Last words of seeds: rows to learn from and to measure on are not those of a corpus or a training of that seed."""


@dataclass(frozen=True)
class Rows:
    """Prompts of one length `(B, T)` with the right path of each `(B, L)`."""

    prompts: Tensor
    paths: Tensor

    @classmethod
    def draw(cls, task: GraphSearch, weights: Sequence[float], rows: int, *, seed: Sequence[int]) -> "Rows":
        """Draw rows of a mixture of the task's classes, others than those that `Lessons` hold."""
        return cls._drawn(task, weights, rows, (*seed, _HELD_OUT))

    @classmethod
    def _drawn(cls, task: GraphSearch, weights: Sequence[float], rows: int, seed: Sequence[int]) -> "Rows":
        drawn = task.sample(rows, weights, seed=seed)
        if len({len(prompt) for prompt in drawn.prompts}) > 1:
            raise ValueError('`task` must have prompts of one length: its `prompt_format` must be "aligned".')
        return cls(torch.from_numpy(np.stack(drawn.prompts)).long(), torch.from_numpy(drawn.paths).long())


@dataclass(frozen=True)
class Lessons:
    """What R runs are given at each step: prompts `(steps, R, P, T)`, right paths `(steps, R, P, L)`, and seeds.

    Runs of one seed have the same prompts and codes, whatever they begin from.
    """

    prompts: Tensor
    paths: Tensor
    seeds: tuple[int, ...]

    @classmethod
    def draw(
        cls, task: GraphSearch, weights: Sequence[float], seeds: Sequence[int], *, steps: int, prompts: int
    ) -> "Lessons":
        """Draw prompts for each step of runs with these seeds, of a mixture of the task's classes."""
        of_seed = {seed: Rows._drawn(task, weights, steps * prompts, (seed, _LESSONS)) for seed in set(seeds)}
        tables = [
            torch.stack([getattr(of_seed[seed], name).unflatten(0, (steps, prompts)) for seed in seeds], dim=1)
            for name in ("prompts", "paths")
        ]
        return cls(*tables, tuple(seeds))


def reinforce(
    models: StackedGPT2,
    lessons: Lessons,
    held_out: Rows,
    objective: "Objective",
    *,
    group_size: int,
    learning_rate: float,
    clip: float = 1.0,
    measure_after: Iterable[int] = (),
) -> dict[int, FloatArray]:
    """Train R models in place by `E[advantage * grad log p(y|x)]`, each step on fresh samples of its own.

    A sample is taken once, so no ratio of probabilities has to be clipped; the gradient of each run is clipped alone.
    Adam, a constant step size, no penalty on leaving the model that it began from.

    Args:
        models: The models.
        lessons: A step each.
        held_out: Rows to measure on.
        objective: What makes advantages of rewards, which are 1 for the right path and 0 for all else.
        group_size: Samples of a prompt.
        learning_rate: Of Adam.
        clip: Largest norm of a run's gradient.
        measure_after: Steps after which is measured; 0 is before the first.

    Returns:
        By step `(R, B)` log p(right|x), nats.
    """
    optimizer = torch.optim.Adam(models.parameters(), lr=learning_rate)
    coins = {seed: np.random.default_rng((seed, _LESSONS)) for seed in set(lessons.seeds)}
    wanted, found = set(measure_after), {}
    if 0 in wanted:
        found[0] = right_logprobs(models, held_out)
    for step, (prompts, paths) in enumerate(zip(lessons.prompts, lessons.paths), start=1):
        shape = (prompts.shape[1], group_size, paths.shape[-1])
        drawn = {seed: torch.from_numpy(rng.random(shape)) for seed, rng in coins.items()}
        past = models.read(prompts)
        tokens = models.sample(past.detach(), torch.stack([drawn[seed] for seed in lessons.seeds]))
        rewards = (tokens == paths[:, :, None]).all(-1).double().numpy()
        states = models.states(past, tokens) if objective.reads_states else None
        logprobs = models.token_logprobs(past, tokens, states)
        means = None if states is None else states.detach().mean(-2).double().numpy()
        advantages = torch.from_numpy(objective(rewards, means)).float()
        loss = -(advantages * logprobs.mean(-1)).flatten(1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        models.clip_gradients(clip)
        optimizer.step()
        if step in wanted:
            found[step] = right_logprobs(models, held_out)
    return found


@torch.no_grad()
def right_logprobs(models: StackedGPT2, rows: Rows, *, batch: int = 125) -> FloatArray:
    """Log-probability `(R, B)` of the right path to each prompt, nats."""
    runs, found = len(models), []
    for prompts, paths in zip(rows.prompts.split(batch), rows.paths.split(batch)):
        past = models.read(prompts.expand(runs, -1, -1))
        logprobs = models.token_logprobs(past, paths[:, None].expand(runs, -1, -1, -1))
        found.append(logprobs.double().sum(-1).squeeze(-1))
    return torch.cat(found, dim=1).numpy()


@dataclass(frozen=True)
class Objective:
    """What makes advantages `(R, P, G)` of the rewards of groups `(R, P, G)`.

    The mean of a group is always taken off: nothing is learnt where all are alike.

    Attributes:
        name: `grpo`, `mean`, `pass@<k>` or `exploration <beta>`. `grpo` divides by the group's standard deviation,
            as TRL does by default, `mean` by nothing; `pass@<k>` is `mean` of what `pass_at_k_rewards` makes of the
            rewards, as with `PassAtKReward` and `scale_rewards=False`; `exploration <beta>` adds beta times
            `elliptical_bonus` and divides by the standard deviation of the batch, as with `ExplorationReward` and
            `scale_rewards="batch"`.

    Raises:
        ValueError: If there is no such objective.
    """

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"grpo|mean|pass@[1-9]\d*|exploration \d+(\.\d+)?", self.name):
            raise ValueError(
                f"An objective must be `grpo`, `mean`, `pass@<k>` or `exploration <beta>`, but is {self.name!r}."
            )

    @property
    def reads_states(self) -> bool:
        """Whether it needs the mean final states of the responses."""
        return self.name.startswith("exploration")

    def __call__(self, rewards: FloatArray, states: FloatArray | None = None) -> FloatArray:
        """Advantages of rewards, beside mean final states `(R, P, G, d)` where it reads them."""
        if self.name == "grpo":
            return _centred(rewards) / (rewards.std(axis=-1, ddof=1, keepdims=True) + _EPS)
        if states is not None:
            groups = states.reshape(-1, *states.shape[-2:])
            bonus = np.stack([elliptical_bonus(group) for group in groups]).reshape(rewards.shape)
            total = rewards + float(self.name.split()[1]) * bonus
            return _centred(total) / (total.std(axis=(1, 2), ddof=1, keepdims=True) + _EPS)
        if self.name == "mean":
            return _centred(rewards)
        k = int(self.name.removeprefix("pass@"))
        return _centred(pass_at_k_rewards(rewards.reshape(-1, rewards.shape[-1]), k).reshape(rewards.shape))


def _centred(rewards: FloatArray) -> FloatArray:
    return rewards - rewards.mean(axis=-1, keepdims=True)
