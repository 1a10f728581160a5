"""Models that the tests share: a real one that comes as a package, and a tiny one that can be enumerated."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers share the cores, and a matrix product's rounding depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import gc

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from matplotlib.layout_engine import ConstrainedLayoutEngine
from transformers import GPT2Config, GPT2LMHeadModel

from recipes.smollm2 import load_model, load_tokenizer, reading_once

# A first example may import half of scipy, on a machine that does other things too: time is no property of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def no_old_objects():
    """Let no garbage collection, such as the Trainer calls itself, go again through the million objects of imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def figures_not_arranged():
    """Figures are drawn, but nothing is moved to make room: that takes more time than all the rest of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct in float32 and its tokenizer: decoded from its file by one worker, read by the others."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    file = place / "smollm2.pt"
    lock = FileLock(place / "smollm2.lock")
    with lock:
        if not file.exists():
            with reading_once():
                torch.save((load_model(), load_tokenizer()), file)
        shared = torch.load(file, weights_only=False, mmap=True)
    yield shared
    with lock:
        file.unlink(missing_ok=True)


@pytest.fixture
def tiny_gpt2():
    """A random GPT-2 over 11 tokens, small enough to enumerate all its responses."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=64, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return GPT2LMHeadModel(config).eval()
