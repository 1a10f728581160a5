"""Settings of test-time training: which can be chosen among, what they are called, and how `generate` takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any, cast

from hf_coverage.functional.checks import check_n
from hf_coverage.functional.ttt_config import StepRule, TTTConfig, TTTScope

__all__ = ["STEP_SIZES", "check_rules", "generation_settings", "rule_name", "ttt_grid"]

STEP_SIZES = (0.1, 0.3, 1.0, 3.0)
"""What to try where nothing is known: multiples of `measure_step_size`."""

_BELONGS = {"top_k": {"head"}, "rank": {"lora"}, "cache": {"lora", "all"}}
"""Which scopes a setting is of, where it is not of all."""


def ttt_grid(
    lrs: Mapping[str, Iterable[float]],
    *,
    radii: Iterable[float | None] = (None,),
    on_prompt: bool = False,
    some: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[TTTConfig]:
    """All combinations of some settings of test-time training.

    Args:
        lrs: Step sizes for each scope.
        radii: Balls; None is none.
        on_prompt: Whether to have everything with steps on the prompt as well as without.
        some: Settings that not all scopes have, `top_k`, `rank` and `cache`: each scope gets its own.
        settings: Of all of them.

    Returns:
        One configuration for each combination.

    Raises:
        ValueError: If a setting is out of its range, or none of the scopes has it.

    Example:
        >>> [rule_name(rule) for rule in ttt_grid({"head": [0.1], "lora": [0.1]}, some={"rank": 4})]
        ['lr 0.1', 'lr 0.1, scope lora, rank 4']
    """
    found, radii = [], list(radii)
    for scope, sizes in lrs.items():
        own = {
            name: value
            for name, value in (some or {}).items()
            # What none of them has is for the configuration to refuse.
            if value is not None and (scope in _BELONGS[name] or not _BELONGS[name].intersection(lrs))
        }
        for lr, radius, prompt in product(sizes, radii, (False, True) if on_prompt else (False,)):
            found.append(TTTConfig(lr, radius, scope=cast(TTTScope, scope), on_prompt=prompt, **own, **settings))
    return found


def check_rules(rules: Sequence[StepRule], n: float) -> tuple[StepRule, ...]:
    """Refuse rules that `ttt_generate` cannot follow, and an N that cannot choose between them, before any scoring.

    Args:
        rules: The rules to choose from.
        n: The N of Cov_N.

    Returns:
        The rules.

    Raises:
        ValueError: If there are none, one is twice there, has an `lr` that is 0 or one for each row, or a ball around
            zero, or `n` is not above 1.
    """
    if not check_n(n) > 1:
        raise ValueError(f"`n` must be above 1, for a bound on Cov_1 is 1 whatever the rule, but is {n}.")
    if not rules:
        raise ValueError("`adapted` must have at least one `StepRule` to choose.")
    for rule in rules:
        if not isinstance(rule, StepRule):
            raise TypeError(f"`adapted` must have `StepRule`s for keys, got {type(rule).__name__}.")
        if not isinstance(rule.lr, (int, float)):
            raise ValueError("`lr` must be one number for all rows, to be chosen for decoding.")
        if not rule.lr > 0:
            raise ValueError("`lr` must be above 0: with 0 it is plain decoding, which is compared with anyway.")
        if rule.radius is not None and rule.center != "start":
            raise ValueError('`center` must be "start": `ttt_generate` knows no other ball.')
    name, times = Counter(map(rule_name, rules)).most_common(1)[0]
    if times > 1:
        raise ValueError(f"`adapted` must have each rule once, but {name} is there twice.")
    return tuple(rules)


def generation_settings(rule: StepRule) -> dict[str, Any]:
    """A rule as `generate(custom_generate=ttt_generate, ...)` and `GenerationConfig` take it, defaults left out.

    Example:
        >>> generation_settings(TTTConfig(0.1, radius=2.0, scope="lora"))
        {'ttt_lr': 0.1, 'ttt_radius': 2.0, 'ttt_scope': 'lora'}
    """
    config = TTTConfig.of(rule)
    settings: dict[str, Any] = {"ttt_lr": float(config.lr)}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name not in ("lr", "center") and value != entry.default:
            name = "ttt_steps" if entry.name == "num_steps" else f"ttt_{entry.name}"
            settings[name] = float(value) if entry.name in ("radius", "decay", "lam") else value
    return settings


def rule_name(rule: StepRule) -> str:
    """A rule in words, another one for every rule.

    Example:
        >>> rule_name(StepRule(0.1, radius=2.0)), rule_name(TTTConfig(0.1, scope="lora", on_prompt=True))
        ('lr 0.1, radius 2.0', 'lr 0.1, scope lora, on_prompt')
    """
    settings = [(name.removeprefix("ttt_"), value) for name, value in generation_settings(rule).items()]
    return ", ".join(name if value is True else f"{name} {value}" for name, value in settings)
