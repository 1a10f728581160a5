"""Log-probabilities of responses under many rules of test-time training, from one reading of each.

The steps change the head alone, so that one forward pass serves all rules: `score_responses(ttt=rule)` gives the same
numbers, with a pass for each.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_coverage.functional.fast_weights import fast_error_bound
from hf_coverage.functional.head_training import POSITIONS, follow_tokens
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.corpus import encode_corpus
from recipes.settings import refuse_other_settings

__all__ = ["PLAIN", "Followed", "follow_corpus", "follow_row", "read_hidden", "rule_label"]

PLAIN = "plain"
"""The model as it is, among the rules."""

Followed = dict[str, NDArray[np.float32]]
"""For each rule, and `plain`, the log-probability of each response token `(R, H)`, nats."""


def rule_label(rule: TTTConfig) -> str:
    """A name for a rule, in files and tables: another one for every rule that this recipe tries."""
    words = [] if rule.scope == "head" else [rule.scope, f"{rule.cache} cache"]
    words += [f"lr {rule.lr:g}"]
    words += ["prompt too"] if rule.on_prompt else []
    words += [] if rule.radius is None else [f"radius {rule.radius:g}"]
    words += [] if rule.decay == 0 else [f"decay {rule.decay:g}"]
    words += [] if rule.lam is None else [f"normalised, lambda {rule.lam:g}"]
    return ", ".join(words + ([] if rule.top_k is None else [f"top {rule.top_k}"]))


def follow_corpus(
    model: PreTrainedModel,
    corpus: Dataset,
    rules: Mapping[str, TTTConfig],
    folder: Path,
    *,
    context: int | None = None,
) -> Followed:
    """Score all responses of a corpus, which must be equally long; rows that `folder` has are read.

    Args:
        model: A causal language model whose head gives the logits as they are.
        corpus: `prompt` and `completion` as token ids.
        rules: What the head does, by name.
        folder: A file a row, and in each an array a rule.
        context: Tokens that a block of the text may be read with, see `read_hidden`; None: all.

    Raises:
        ValueError: when the folder holds another corpus.
    """
    refuse_other_settings(folder, {"corpus": {"fingerprint": encode_corpus(corpus, None).fingerprint}})
    rows = []
    for index in tqdm(range(len(corpus)), desc=f"{folder.parent.name}, {folder.name}", unit="text"):
        file = folder / f"{index:04}.safetensors"
        if not file.exists():
            row = corpus[index]
            found = follow_row(model, row["prompt"], row["completion"], rules, context=context)
            save_file(found, file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").rename(file)
        rows.append(load_file(file))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@torch.inference_mode()
def follow_row(
    model: PreTrainedModel,
    prompt: list[int],
    completion: list[int],
    rules: Mapping[str, TTTConfig],
    *,
    context: int | None = None,
) -> Followed:
    """Log-probabilities `(H,)` of one response under every rule; `<rule>, error` bounds what cutting steps changes."""
    ids = torch.tensor([prompt + completion], device=model.device)
    hidden, tokens = read_hidden(model, ids[:, :-1], context=context), ids[:, 1:]
    logits, length = model.get_output_embeddings()(hidden), len(completion)
    found = {PLAIN: logits[:, -length:].log_softmax(-1).gather(-1, tokens[:, -length:, None])[0, :, 0]}
    for name, rule in rules.items():
        start = 0 if rule.on_prompt else len(prompt) - 1
        blocks = iter(logits[:, start:].split(POSITIONS, dim=1))  # what the head would give, block after block
        given = partial(_next_of, blocks)
        state, logprobs = follow_tokens(hidden[:, start:], tokens[:, start:], given, rule=rule)
        found[name] = logprobs[0, -length:]
        if rule.top_k is not None:
            found[f"{name}, error"] = 2 * fast_error_bound(state, hidden[:, -1])
    return {name: values.float().cpu().numpy() for name, values in found.items()}


@torch.inference_mode()
def read_hidden(model: PreTrainedModel, ids: Tensor, *, context: int | None = None) -> Tensor:
    """Inputs of the head `(1, T, d)` at every position of token ids `(1, T)`.

    Args:
        model: The model.
        ids: The tokens.
        context: An even number w: the text is read in blocks of w / 2, each with the w / 2 tokens before it, so that a
            token is predicted from at least w / 2 (as far as there are any) and at most w. None: from all before it.
    """
    if context is None or ids.shape[1] <= context:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    half = context // 2
    parts = [model.base_model(input_ids=ids[:, :context], use_cache=False).last_hidden_state]
    for start in range(half, ids.shape[1] - half, half):
        read = model.base_model(input_ids=ids[:, start : start + context], use_cache=False).last_hidden_state
        parts.append(read[:, half:])
    return torch.cat(parts, dim=1)


def _next_of(blocks: Iterator[Tensor], hidden: Tensor) -> Tensor:
    return next(blocks)
