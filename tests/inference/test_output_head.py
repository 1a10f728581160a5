"""One answer for all who treat an output head by hand: what it is, and whom it is refused to."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
)

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.inference.forward_batches import BatchPasses
from hf_coverage.inference.output_head import find_head, is_quantized, plant_logits
from hf_coverage.measure.inherent_variance import require_linear_head
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.optim.distillation import _ends_in_a_linear_layer
from hf_coverage.optim.token_level import token_level_sgd
from hf_coverage.ttt.head_tap import HeadTap
from hf_coverage.ttt.scoring import require_adaptable

SMALL = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


class OwnForward(nn.Linear):
    """The same product, written by hand."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T if self.bias is None else hidden @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class Dropping(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(hidden, 0.5, self.training))


class Tempered(nn.Linear):
    """Linear as it comes, but with one more thing to train."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) / self.temperature


class Int8(nn.Linear):
    """Keeps integers and a scale in the place of its weight, as 8-bit layers do that are linear layers by name."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        scale = self.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.to(hidden) * self.scale, self.bias)


class Posing(Tensor):
    """A weight that says it is of a floating dtype, as quantised ones do."""


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def llama(kind: type[nn.Linear] = nn.Linear, **options: Any) -> PreTrainedModel:
    model = build(LlamaConfig(**SMALL))
    if kind is not nn.Linear or options:
        model.lm_head = kind(16, 13, **{"bias": False} | options).eval()
    return model


def with_adapter(merged: bool = False) -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"], r=2)).eval()
    if merged:
        model.merge_adapter()
    return model


def with_hook() -> PreTrainedModel:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    return model


def with_parametrization() -> PreTrainedModel:
    model = llama()
    parametrize.register_parametrization(model.lm_head, "weight", Halved())
    return model


def with_posing_weight() -> PreTrainedModel:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Posing))
    return model


def with_shared_memory() -> PreTrainedModel:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    return model


def gemma(cap: float | None) -> PreTrainedModel:
    return build(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=cap))


GPTJ = GPTJConfig(vocab_size=13, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
GPT2 = GPT2Config(vocab_size=13, n_embd=16, n_layer=1, n_head=2, n_positions=32)

# name: how to make the model; linear, biased, tied, and what the model does to the head's logits afterwards
HEADS: dict[str, tuple[Callable[[], nn.Module], bool, bool, bool, str]] = {
    "plain": (llama, True, False, False, ""),
    "tied": (lambda: build(GPT2), True, False, True, ""),
    "tied by memory": (with_shared_memory, True, False, True, ""),
    "biased": (lambda: build(GPTJ), True, True, False, ""),
    "half precision": (lambda: llama().bfloat16(), True, False, False, ""),
    "scaled by a factor": (lambda: build(CohereConfig(**SMALL, logit_scale=0.5)), True, False, False, "changed"),
    "scaled by one": (lambda: build(CohereConfig(**SMALL, logit_scale=1.0)), True, False, False, "kept"),
    "scaled by a divisor": (lambda: build(GraniteConfig(**SMALL, logits_scaling=4.0)), True, False, False, "changed"),
    "soft-capped": (lambda: gemma(5.0), True, False, False, "changed"),
    "soft-capped far out": (lambda: gemma(1000.0).bfloat16(), True, False, False, "changed"),
    "not soft-capped": (lambda: gemma(None), True, False, False, ""),
    "its own forward": (lambda: llama(OwnForward), True, False, False, ""),
    "its own forward, biased": (lambda: llama(OwnForward, bias=True), True, True, False, ""),
    "twice the product": (lambda: llama(Doubled), False, False, False, ""),
    "dropout in training": (lambda: llama(Dropping), False, False, False, ""),
    "one more parameter": (lambda: llama(Tempered), False, False, False, ""),
    "changed by a hook": (with_hook, False, False, False, ""),
    "parametrised": (with_parametrization, False, False, False, ""),
    "adapted": (with_adapter, False, False, False, ""),
    "adapted, merged": (lambda: with_adapter(merged=True), False, False, False, ""),
    "8-bit": (lambda: llama(Int8), False, False, False, ""),
    "quantised in disguise": (with_posing_weight, False, False, False, ""),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
IDS, LABELS = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[-100, 4, 5, 6]])


def accepts(function: Callable[..., Any], *args: Any, **options: Any) -> bool:
    try:
        return function(*args, **options) is not False
    except ValueError as error:
        if any(words in str(error) for words in ("linear output head", "afterwards", "a head of its own")):
            return False
        raise


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_what_trying_it_shows(name):
    make, linear, biased, tied, after = HEADS[name]
    model = make()
    forward = HeadForward(model)
    head = forward.head
    assert head.module is model.get_output_embeddings()
    assert (head.linear, head.bias is not None, linear and bool(head.shared_with)) == (linear, biased, tied)
    with inference(model):
        probe = forward.probe()
    assert (probe.plain_head, probe.untouched) == (after != "changed", after == "")


@pytest.mark.parametrize("name", HEADS)
def test_all_callers_agree_on_it(name):
    make, linear, _, tied, after = HEADS[name]
    model = make()
    with inference(model):
        passes = BatchPasses(model, None, batch_tokens=64, logits_memory=2**20)
        assert accepts(require_adaptable, passes) is (linear and after != "changed")
    assert accepts(require_linear_head, model) is (linear and after != "changed")
    assert accepts(lambda: HeadTap(model).close()) is linear  # what comes after the head it sees in every pass
    assert _ends_in_a_linear_layer(model) is (linear and after == "")
    trained = accepts(token_level_sgd, make(), IDS, LABELS, lr=0.1, scope="head")
    assert trained is (linear and after != "changed" and not tied)


@pytest.mark.parametrize("name", HEADS)
def test_any_head_is_scored_right(name):
    model = HEADS[name][0]()
    encoded = EncodedCorpus([[3, 4]] * 2, [[5, 6, 7], [8]])
    with torch.no_grad():
        logprobs = model(torch.tensor([[3, 4, 5, 6, 7], [3, 4, 8, 0, 0]])).logits.double().log_softmax(-1)
    expected = [logprobs[0, [1, 2, 3], [5, 6, 7]].sum().item(), logprobs[1, 1, 8].item()]
    tolerance = 0.02 if model.dtype == torch.bfloat16 else 1e-5
    found = score_encoded(model, encoded, logits_memory=13 * 8)  # a position at a time: the head is called alone
    assert found.logprob == pytest.approx(expected, abs=tolerance)


def test_descriptions_say_what_is_the_matter():
    assert find_head(llama()).description == "Linear"
    assert find_head(llama(Doubled)).description == "Doubled, whose logits are not W h + b"
    assert find_head(llama(Int8)).description == "Int8 with quantised weights (Parameter of torch.int8)"
    assert find_head(with_posing_weight()).description == "Linear with quantised weights (Posing of torch.float32)"
    assert find_head(with_adapter()).description == "Linear"  # PEFT's class of this name; callers speak of adapters


def test_trying_leaves_everything_as_it_was():
    model = llama(Dropping)
    model.lm_head.train()
    torch.manual_seed(5)
    before, expected = copy.deepcopy(model.state_dict()), torch.rand(3)
    torch.manual_seed(5)
    assert not find_head(model).linear
    assert torch.equal(torch.rand(3), expected)
    assert (model.lm_head.training, model.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (len(model.lm_head._forward_hooks), model.lm_head.weight.grad) == (0, None)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_are_linear_all_the_same(damage):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[2, 3] = damage
    assert find_head(model).linear


def test_a_tap_notes_nothing_of_a_trial():
    model = llama()
    tap = HeadTap(model, keep_positions=True)
    try:
        assert find_head(model).linear
        assert (tap.take(), tap._notes.positions) == (None, [])
    finally:
        tap.close()


def test_the_logits_of_other_threads_stay_theirs():
    model = llama()
    with torch.no_grad():
        expected = model(IDS).logits
    others: list[Tensor] = []
    thread = threading.Thread(target=lambda: others.append(model.lm_head(torch.ones(1, 1, 16)).detach()))

    def run_another(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is not thread and not others:
            thread.start()
            thread.join()

    handle = model.model.register_forward_pre_hook(run_another)
    with inference(model), plant_logits(model.lm_head) as planted:
        returned = model(IDS).logits
    handle.remove()
    assert planted.came_through(returned)
    assert not torch.equal(returned, expected)
    torch.testing.assert_close(others[0][0, 0], model.lm_head.weight.detach().sum(-1))


def test_an_offloaded_head_is_asked_its_class():
    for kind, linear in ((nn.Linear, True), (OwnForward, False)):
        model = llama(kind)
        cpu_offload(model)
        head = find_head(model)
        assert (head.weight.is_meta, head.linear) == (True, linear)


def test_the_head_of_a_model_inside_of_another():
    inner = llama()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = inner

    assert find_head(Wrapper()).owner is inner
    assert find_head(get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))).owner is inner
    with pytest.raises(ValueError, match="with output embeddings, got LlamaModel; load it with"):
        find_head(inner.model)


def test_quantised_parameters_are_known_by_dtype_and_class():
    assert not is_quantized(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    assert is_quantized(nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    assert is_quantized(torch.zeros(2).to(torch.float8_e4m3fn))
    assert is_quantized(torch.zeros(2).as_subclass(Posing))
