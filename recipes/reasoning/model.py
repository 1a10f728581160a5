"""The model that is fine-tuned: loaded whole, with a low-rank adapter, and with an adapter that was saved."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.smollm2 import SMOLLM2, load_model

__all__ = ["SMOLLM2_HUB_ID", "add_adapter", "load_base", "load_checkpoint"]

SMOLLM2_HUB_ID = f"HuggingFaceTB/{SMOLLM2}"


def load_base(name: str) -> PreTrainedModel:
    """Load a model by `load_model`, as one that can be trained."""
    logging.disable_progress_bar()
    loaded = load_model(name)
    if name != SMOLLM2:
        return loaded
    # A model that came from GGUF counts as quantised for ever: it can be neither trained nor saved.
    config = type(loaded.config).from_dict(loaded.config.to_dict() | {"quantization_config": None})
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config._name_or_path = SMOLLM2_HUB_ID  # what the adapter's configuration names as its base
    return model


def add_adapter(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, seed: int, layers: int | None = None
) -> PeftModel:
    """Put a new adapter on all linear layers but the head; it changes nothing until it is trained.

    Args:
        model: Whose weights stay as they are.
        rank: Of the adapter.
        alpha: Its scale, times the rank.
        dropout: On what it reads.
        seed: Of its weights.
        layers: Adapt the last so many layers alone; None: all.
    """
    torch.manual_seed(seed)
    where: dict[str, Any] = {"target_modules": "all-linear"}
    if layers is not None:
        body = model.model.layers
        linear = {name.rpartition(".")[2] for name, part in body[-1].named_modules() if isinstance(part, nn.Linear)}
        where = {"target_modules": sorted(linear), "layers_to_transform": list(range(len(body)))[-layers:]}
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, **where)
    return get_peft_model(model, lora)


def load_checkpoint(base: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """Merge the adapter of a checkpoint into a copy of the model that it was trained on."""
    merged: PreTrainedModel = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint).merge_and_unload()
    return merged.eval()
