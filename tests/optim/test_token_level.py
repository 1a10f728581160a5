"""One update a token: against equation (21) in float64, autograd on real models, and what cannot be done."""

import copy

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_coverage.optim.token_level import token_level_sgd
from hf_coverage.tasks.linear_instances import small_step_instance


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(13, (3, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :2] = labels[1, 6:] = -100
    labels[2, 0] = labels[2, 4] = -100
    return ids, labels


@pytest.mark.parametrize("radius", [None, 0.3, 0.9])
def test_a_linear_model_follows_equation_21(radius):
    instance = small_step_instance(6, rare_probability=0.5, n=4)
    rng = np.random.default_rng(0)
    prompts = np.array([3, 4, 3, 4, 3])
    responses = instance.sample(prompts, rng)
    theta, expected, lr = instance.start.copy(), [], 0.05
    for prompt, response in zip(prompts, responses):
        for token in response:  # by the definition, in float64
            phi = instance.features[prompt]
            p = np.exp(phi @ theta) / np.exp(phi @ theta).sum()
            expected.append(np.log(p[token]))
            theta = theta + lr * (phi[token] - p @ phi)
            if radius is not None:
                theta = theta * min(1.0, radius / np.linalg.norm(theta))
    model = instance.model()
    ids = torch.tensor(np.concatenate([prompts[:, None], responses], axis=1))
    labels = ids.clone()
    labels[:, 0] = -100
    found = token_level_sgd(model, ids, labels, lr=lr, radius=radius)
    np.testing.assert_allclose(model.theta.detach(), theta, atol=1e-5)
    np.testing.assert_allclose(found[:, 1:].ravel(), expected, atol=1e-5)
    assert not found[:, 0].any()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("radius", [None, 2.0])
def test_the_head_in_closed_form_equals_autograd(llama, batch, has_bias, radius):
    if has_bias:
        head = torch.nn.Linear(16, 13)
        head.weight.data.copy_(llama.lm_head.weight)
        llama.lm_head = head
    other = copy.deepcopy(llama)
    other.requires_grad_(False)
    other.lm_head.requires_grad_(True)
    fast = token_level_sgd(llama, *batch, lr=0.3, radius=radius, scope="head")
    slow = token_level_sgd(other, *batch, lr=0.3, radius=radius, scope="all")
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-4)
    for (name, mine), theirs in zip(llama.named_parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert llama.lm_head.weight.grad is None


def test_a_real_model_learns_a_text_by_its_head_alone(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("the cat sat on the mat. the cat sat on the mat. the cat sat", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, 0] = -100
    with pytest.raises(ValueError, match=r"also model.embed_tokens.weight, whose change would change"):
        token_level_sgd(model, ids, labels, lr=0.1, scope="head")
    tied, head = model.lm_head, torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight.data.copy_(tied.weight)
    model.lm_head = head
    try:
        plain = token_level_sgd(model, ids, labels, lr=0.0, scope="head")
        adapted = token_level_sgd(model, ids, labels, lr=1e-4, scope="head")
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]  # of the head as it is now, after all steps
    finally:
        model.lm_head = tied
    assert adapted.sum() > plain.sum() + 0.1
    again = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    assert again > adapted.sum()


def test_the_model_comes_back_in_its_mode(llama, batch):
    llama.train()
    llama.model.layers[0].eval()
    token_level_sgd(llama, *batch, lr=0.1, scope="head")
    assert llama.training
    assert not llama.model.layers[0].training
    assert llama.model.layers[1].training


def test_a_row_without_labels_changes_nothing(llama, batch):
    before = copy.deepcopy(llama.state_dict())
    for scope in ("head", "all"):
        assert not token_level_sgd(llama, batch[0], torch.full_like(batch[0], -100), lr=1.0, scope=scope).any()
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


def test_refusals(llama, batch):
    ids, labels = batch
    with pytest.raises(ValueError, match=r"must have one shape \(B, T\)"):
        token_level_sgd(llama, ids, labels[:, 1:], lr=0.1)
    with pytest.raises(ValueError, match="but row 2 has a label there"):
        token_level_sgd(llama, ids, torch.where(torch.arange(3)[:, None] == 2, ids, labels), lr=0.1)
    with pytest.raises(ValueError, match='`scope` must be "all" or "head", got \'lora\''):
        token_level_sgd(llama, ids, labels, lr=0.1, scope="lora")
    with pytest.raises(ValueError, match="no trainable parameters"):
        token_level_sgd(copy.deepcopy(llama).requires_grad_(False), ids, labels, lr=0.1)
    linear = small_step_instance(6, rare_probability=0.5, n=4).model()
    with pytest.raises(ValueError, match="needs a linear output head, got _LinearHead"):
        token_level_sgd(linear, ids, labels, lr=0.1, scope="head")
    tied = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=13, n_positions=16))
    with pytest.raises(ValueError, match=r"also transformer.wte.weight"):
        token_level_sgd(tied, ids, labels, lr=0.1, scope="head")


def test_soft_capped_logits_are_refused(batch):
    config = Gemma2Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        final_logit_softcapping=5.0,
    )
    with pytest.raises(ValueError, match="scaling or soft-capping"):
        token_level_sgd(Gemma2ForCausalLM(config), *batch, lr=0.1, scope="head")
