"""Fingerprints: short names for weights and tokenizers that change when, and only when, the scores may."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from hf_coverage.inference.forward import is_sharded, unwrap

__all__ = [
    "TOKENIZER_COLUMN",
    "config_fingerprint",
    "digest",
    "tokenizer_fingerprint",
    "vocabulary_fingerprint",
    "weight_fingerprint",
]

# Where a model came from, how it is trained and how it generates: none of it changes what it predicts.
_VOLATILE = (
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
)


# What modules of PEFT say of the adapters at work in them.
_SWITCHES = ("_adapters_disabled", "active_adapters", "disable_adapters", "merged_adapters", "scaling")
# Where an adapter came from, and which names it was looked for by: the names of its weights say where it is.
_ADAPTER_VOLATILE = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "peft_version",
    "revision",
    "target_modules",
}

TOKENIZER_COLUMN = "tokenizer_fingerprint"
"""Beside token ids, in every row: the `vocabulary_fingerprint` of the tokenizer that they are of.

A column, because it goes wherever rows go: through `select`, `concatenate_datasets`, folders and files of any format.
"""


def weight_fingerprint(model: nn.Module) -> str:
    """Hash a model's weights: every name, shape, dtype and byte of its state dict.

    The same on every device and under DDP, FSDP and `torch.compile`. When the model is sharded this is a collective
    operation: all processes have to call it.

    Args:
        model: Any module.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.Linear(2, 2)
        >>> before = weight_fingerprint(layer)
        >>> _ = nn.init.zeros_(layer.bias)
        >>> before == weight_fingerprint(layer)
        False
    """
    model = unwrap(model)
    if is_sharded(model):  # one at a time: a model that had to be sharded may not fit in one place
        digests = dict(map(_digest_entry, _entries(model)))
    else:  # hashlib releases the GIL
        with ThreadPoolExecutor(max_workers=2) as pool:
            digests = dict(pool.map(_digest_entry, _entries(model)))
    return _digest(json.dumps(digests, sort_keys=True).encode())


def config_fingerprint(model: nn.Module) -> str:
    """Hash what a model's configuration adds to its weights (attention windows, scaling, soft-caps, ...).

    Where a model has adapters, their settings and which of them are at work are part of it.

    Args:
        model: A model of transformers.

    Returns:
        32 hexadecimal digits.
    """
    model = unwrap(model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    adapters = _adapters(model)
    if adapters:
        config["adapters"] = adapters
    return _digest(json.dumps(config, sort_keys=True, default=repr).encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary, special tokens and chat template.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        32 hexadecimal digits.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [type(tokenizer).__name__, tokenizer.get_vocab(), special, tokenizer.chat_template]
    return _digest(json.dumps(content, sort_keys=True).encode())


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """Hash which token each id is: what ids that were written with one tokenizer mean to another one.

    Template, special roles and the rules that cut a text are left out, which change no id that is there already.

    Args:
        tokenizer: A tokenizer of transformers.
        size: Leave out ids from here on, such as tokens that were added later; None: all are hashed.

    Returns:
        One more than the largest id, a dash, and 32 hexadecimal digits.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
        >>> before = vocabulary_fingerprint(words)
        >>> _ = words.add_tokens(["c"])
        >>> before == vocabulary_fingerprint(words), before == vocabulary_fingerprint(words, size=2)
        (False, True)
    """
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items() if size is None or index < size)
    return f"{entries[-1][0] + 1 if entries else 0}-{_digest(json.dumps(entries).encode())}"


def digest(content: Any) -> str:
    """16 hexadecimal digits of what JSON makes of something."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Settings of PEFT's adapters, and what each part of a model says of those that are at work in it."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = type(module).__module__.partition(".")[0] == "peft"
        known = {*module.__dict__, *dir(type(module))}  # what wraps a model passes on all that it has not
        state = {switch: getattr(module, switch) for switch in _SWITCHES if own and switch in known}
        settings = {
            adapter: {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in config.to_dict().items()
                if key not in _ADAPTER_VOLATILE
            }
            for adapter, config in (
                module.__dict__.get("peft_config") or module.__dict__.get("_peft_config") or {}
            ).items()
        }
        if state or settings:
            found[name] = [state, settings]
    return found


def _entries(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(model, FullyShardedDataParallel):
        yield from get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)).items()
        return
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    for name, value in (get_state_dict_offloaded_model(model) if offloaded else model.state_dict()).items():
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def _digest_entry(entry: tuple[str, Any]) -> tuple[str, str]:
    name, value = entry
    return name, _digest_value(value)


def _digest_value(value: Any) -> str:
    if not isinstance(value, Tensor):  # packed parameters of a quantised layer, or their settings
        parts = [_digest_value(part) for part in value] if isinstance(value, tuple) else [repr(value)]
        return _digest("".join(parts).encode())
    if hasattr(value, "__tensor_flatten__"):  # of a library that quantises: tensors, and how they are read
        names, settings = value.__tensor_flatten__()
        parts = [_digest_value(getattr(value, name)) for name in names]
        return _digest("".join([type(value).__name__, *names, *parts, repr(settings)]).encode())
    header = f"{tuple(value.shape)} {value.dtype}"
    if value.is_quantized:
        value = value.dequantize()
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _digest(header.encode(), content)


def _digest(*parts: Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
