"""Tokens chosen by arithmetic codes, as the last of a model's processors, and the codes of numbered samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_coverage.functional.arithmetic_codes import CodeState, decode_token, nested_codes

__all__ = ["CodeChoice", "code_device", "placed_codes"]


class CodeChoice(LogitsProcessor):
    """The last of the processors in one call of `generate`: it chooses the tokens, and makes them the largest scores.

    Args:
        codes: One a row `(B,)`, float64, where `code_device` has them.
        digits: Gives fresh numbers for a step, uniform on [0, 1) `(B,)`, float64.
    """

    supports_continuous_batching = False

    def __init__(self, codes: Tensor, digits: Callable[[], Tensor]) -> None:
        self._digits = digits
        self._state = CodeState(codes, torch.ones_like(codes))
        self._sound = torch.ones_like(codes, dtype=torch.bool)
        self._changed: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(B, V)`, +inf at the chosen tokens."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.to(self._state.codes.device).softmax(-1, dtype=precise)
        tokens, self._state, own = decode_token(probabilities, self._state, self._digits())
        self._sound &= own.isfinite()
        places = tokens[:, None].to(scores.device)
        changed = scores.clone()
        self._changed = changed, places, scores.gather(-1, places)
        return changed.scatter_(-1, places, torch.inf)

    def restore(self) -> None:
        """Put the scores back that the last tokens were chosen from: they may be part of the result."""
        if self._changed is not None:
            changed, places, before = self._changed
            changed.scatter_(-1, places, before)
            self._changed = None

    def refuse_nan(self) -> None:
        """Raise ValueError if scores were such that no token could be chosen."""
        if not self._sound.all():
            row = int((~self._sound).nonzero()[0])
            raise ValueError(
                f"The scores of row {row} became NaN, or ruled out all tokens, so that none could be sampled: load "
                "the model in float32 or bfloat16, and look at what `logits_processor` and the configuration ask for."
            )


def code_device(device: torch.device) -> torch.device:
    """Where codes are read for scores on a device: Apple's accelerator has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def placed_codes(seed: int, places: Sequence[tuple[int, int]], steps: int) -> tuple[Tensor, Tensor]:
    """The codes of numbered samples and the digits that follow them, which depend on seed, prompt and number alone.

    The samples of a prompt have nested codes: more of them leave those that are there as they are.

    Args:
        seed: What all of them follow from.
        places: Prompt and number of each sample.
        steps: Tokens of a response.

    Returns:
        Codes `(B,)` and digits `(B, steps)`, float64, on the CPU.

    Example:
        >>> codes, _ = placed_codes(0, [(5, number) for number in range(4)], steps=1)
        >>> sorted((4 * codes).long().tolist()), bool((placed_codes(0, [(5, 2)], steps=1)[0] == codes[2]).all())
        ([0, 1, 2, 3], True)
    """
    books: dict[int, Tensor] = {}
    for prompt in dict.fromkeys(prompt for prompt, _ in places):
        size = 1 + max(number for other, number in places if other == prompt)
        books[prompt] = nested_codes(torch.from_numpy(_generator(seed, prompt, 0).random(size)))
    codes = torch.stack([books[prompt][number] for prompt, number in places])
    digits = [_generator(seed, prompt, 1 + number).random(steps) for prompt, number in places]
    return codes, torch.from_numpy(np.stack(digits))


def _generator(seed: int, *key: int) -> np.random.Generator:
    # `spawn_key`, because entropy that ends in zeros is that without them.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
