"""Prompts as `generate` takes them, those that come again in a batch read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from hf_coverage.measure.prefix_cache import is_repeatable

__all__ = ["own_config", "pad_left", "read_prompts"]


def read_prompts(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Cache | None:
    """Read all tokens of a batch's prompts but their last ones, equal prompts once.

    `generate` continues from what is returned as from its own: it takes the whole prompts and reads the last tokens.

    Args:
        model: any causal language model, in evaluation mode.
        prompts: token ids, never empty.

    Returns:
        A cache with a line for each prompt, as long as the longest one less one; None where it would save little, or
        where the architecture's cache cannot be repeated.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if model._is_stateful or 2 * len(distinct) > len(prompts) or min(map(len, distinct)) < 2:
        return None
    ids, mask = pad_left([list(prompt[:-1]) for prompt in distinct])
    config = GenerationConfig(max_new_tokens=1, use_cache=True, return_dict_in_generate=True, pad_token_id=0)
    with own_config(model, config):
        # By `generate` itself, which knows what each architecture wants; the token that it finds is not needed.
        read = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    cache = read.get("past_key_values")
    if not is_repeatable(cache):
        return None
    line_of = {prompt: line for line, prompt in enumerate(distinct)}
    # On the CPU, from where they index whatever device a layer is on.
    cache.batch_select_indices(torch.tensor([line_of[tuple(prompt)] for prompt in prompts]))
    return cache


def pad_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and mask (B, L)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@contextmanager
def own_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keep a model's generation defaults out of `generate`, which fills whatever is None with them."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
