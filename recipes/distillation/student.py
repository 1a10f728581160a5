"""A teacher, and a student that is the teacher without some of its layers."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from recipes.smollm2 import load_model, load_tokenizer

__all__ = ["freeze_below", "load_teacher", "without_layers"]


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the teacher, which must be Llama-like."""
    logging.disable_progress_bar()
    return load_model(name), load_tokenizer(name)


def without_layers(teacher: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """Build a model from the teacher's weights, its layers but for the dropped ones joined as they are.

    Args:
        teacher: With decoder layers at `model.layers`, as Llama has.
        dropped: Layers to leave out, counted from 0.

    Raises:
        ValueError: If there is no such layer, or none would remain.
    """
    count = teacher.config.num_hidden_layers
    kept = [index for index in range(count) if index not in dropped]
    if not kept or not set(dropped) <= set(range(count)):
        raise ValueError(f"`drop_layers` must name some of {count} layers, 0 to {count - 1}, but is {list(dropped)}.")
    # Anew from a configuration: a model that came from GGUF counts as quantised and refuses to be trained.
    settings = teacher.config.to_dict() | {"num_hidden_layers": len(kept), "quantization_config": None}
    student = type(teacher)(type(teacher.config).from_dict(settings))
    weights = {}
    for name, weight in teacher.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = weight
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(index) in kept:
            weights[f"model.layers.{kept.index(int(index))}.{rest}"] = weight
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    return student.eval()


def freeze_below(student: PreTrainedModel, layer: int) -> None:
    """Train the decoder layers from `layer` on alone: not the embedding, nor the head that shares its weights."""
    student.requires_grad_(False)
    for block in student.model.layers[layer:]:
        block.requires_grad_(True)
