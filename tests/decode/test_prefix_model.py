"""Logits after prefixes, whatever is kept of them, against one row at a time read as a whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel

from hf_coverage.decode import prefix_model
from hf_coverage.decode.prefix_model import PrefixReader
from hf_coverage.inference.forward import inference
from tests.inference.odd_models import ForgetsItsCache, llama, quantised, subclass
from tests.measure.test_scoring_architectures import ARCHITECTURES, VOCABULARY, build

PROMPT = [5, 4, 9, 30, 12, 7, 21, 8, 3]
# As a walk asks: down, up again, beside, and a long one of which nothing is known.
ASKED = [
    [()],
    [(7,), (8,), ()],
    [(7, 3), (8, 4), (9,), (7,)],
    [(7, 3, 11), (10, 4, 5, 6, 12, 30, 3), (8,)],
    [(10, 4, 5, 6, 12, 30, 3, 3), (7, 3, 11, 12), (10, 4, 5, 9), (10,)],
    [tuple(range(20, 36)), (7, 3, 11, 12, 13), (), (10, 4, 5, 9)],
]


@torch.no_grad()
def expected(model, prompt, prefixes):
    return torch.cat([model(torch.tensor([[*prompt, *prefix]]), use_cache=False).logits[:, -1] for prefix in prefixes])


@pytest.fixture
def read(monkeypatch):
    """Shapes of what models were given to read."""
    shapes = []
    call = torch.nn.Module.__call__

    def counting(self, *args, **arguments):
        if isinstance(self, GenerationMixin) and "input_ids" in arguments:
            shapes.append(tuple(arguments["input_ids"].shape))
        return call(self, *args, **arguments)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    monkeypatch.setattr(prefix_model, "_PROOFS", 0)  # what is read again, to see that it is the same, is not counted
    return shapes


@pytest.mark.parametrize("size", [0, 3, 1000])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_says_the_same(name, size, read):
    model = build(name)
    reader = PrefixReader(model, PROMPT, size=size)
    for prefixes in ASKED:
        torch.testing.assert_close(reader.logits(prefixes), expected(model, PROMPT, prefixes), atol=1e-4, rtol=1e-4)
    if ARCHITECTURES[name][2] and size == 1000:
        read.clear()
        reader.logits([(7, 3, 11, 12, 13, 14), (10, 4, 5, 9, 9), (9, 9)])
        assert read == [(3, 1)]  # the last token of each


def tiny(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=24, bos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([0, 1, 2, 5, 100]), st.integers(1, 4))
def test_what_was_asked_before_changes_nothing(data, size, prompt_length):
    """Any prefixes over two tokens, in any order: many share what is kept, and with little room much is forgotten."""
    model, prompt = tiny(), PROMPT[:prompt_length]
    reader = PrefixReader(model, prompt, size=size)
    prefix = st.lists(st.sampled_from([1, 2]), max_size=6).map(tuple)
    for prefixes in data.draw(st.lists(st.lists(prefix, min_size=1, max_size=5), min_size=1, max_size=5)):
        torch.testing.assert_close(reader.logits(prefixes), expected(model, prompt, prefixes), atol=1e-5, rtol=1e-5)


def test_the_prompt_is_read_once_and_each_token_once(read):
    reader = PrefixReader(tiny(), PROMPT, size=100)
    reader.logits([()])
    for length in range(1, 8):
        reader.logits([(1,) * length, (2,) * length])
    assert read == [(1, 1), (1, 9), (1, 1), *[(2, 1)] * 7]
    read.clear()
    reader.logits([(1,) * 5, (2, 2, 2, 1), (3, 3, 3)])
    assert sorted(read) == [(1, 3), (2, 1)]


def test_what_others_begin_with_is_forgotten_last(read):
    reader = PrefixReader(tiny(), PROMPT, size=3)
    for prefix in [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 9)]:
        reader.logits([prefix])
    read.clear()
    reader.logits([(1, 2, 8)])
    assert read == [(1, 1)]


def test_a_response_may_end_at_the_last_position():
    model = tiny()
    reader = PrefixReader(model, PROMPT, size=100)
    longest = tuple(range(24 - len(PROMPT)))
    for prefixes in ([longest[:4]], [longest, longest[:5]], [longest, (3,)]):
        torch.testing.assert_close(reader.logits(prefixes), expected(model, PROMPT, prefixes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_and_either_attention(attention):
    model = tiny().to(torch.bfloat16)
    model.set_attn_implementation(attention)
    reader = PrefixReader(model, PROMPT, size=100)
    for prefixes in ASKED[:4]:
        torch.testing.assert_close(reader.logits(prefixes), expected(model, PROMPT, prefixes), atol=0.03, rtol=0.03)


@pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("adapter", "shapes"),
    [
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True), [(3, 1)]),
        # Its virtual tokens are in a cache of its own.
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), [(3, 13)]),
    ],
)
def test_adapters_take_part(adapter, shapes, read):
    model = get_peft_model(tiny(), adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "prompt" in name:
                parameter.normal_()
    reader = PrefixReader(model, PROMPT, size=100)
    for prefixes in ASKED[:4]:
        torch.testing.assert_close(reader.logits(prefixes), expected(model, PROMPT, prefixes), atol=1e-5, rtol=1e-5)
    read.clear()
    reader.logits([(7, 3, 11, 12), (10, 4), (9, 9)])
    assert read == shapes


def test_a_model_in_training_stays_so_and_keeps_no_gradients():
    model = tiny().train()
    reader = PrefixReader(model, PROMPT, size=100)
    logits = reader.logits([(1,), (2, 3)])
    assert model.training
    assert not logits.requires_grad
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, reader.logits([(1,), (2, 3)]))


@pytest.mark.parametrize(
    ("build_odd", "kept", "together"),
    [
        (lambda: subclass(ForgetsItsCache), False, True),
        (lambda: quantised(0, 2), False, False),
        (llama, True, True),
    ],
    ids=["replaces its cache", "scale of the batch", "plain"],
)
def test_a_model_that_says_something_else_in_company_is_read_alone(build_odd, kept, together):
    model = build_odd()
    prompt, prefixes = [5, 9, 4, 7], [(3,), (3, 8), (6, 4, 11), (6, 4, 11, 30, 2)]
    reader = PrefixReader(model, prompt, size=64)
    for _ in range(2):
        found = reader.logits(prefixes)
        for prefix, logits in zip(prefixes, found):
            with inference(model):
                expected = model(input_ids=torch.tensor([[*prompt, *prefix]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (reader._kept is not None, reader._together) == (kept, together)
