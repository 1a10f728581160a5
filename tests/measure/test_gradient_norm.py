"""Norms of sequence-level gradients against autograd on one sequence at a time, in float64."""

import copy

import numpy as np
import pytest
import torch

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.inherent_variance import gradient_norms

ENCODED = EncodedCorpus(
    prompts=[[1, 2], [3], [1, 2], [4, 5, 6], [1, 2]],
    completions=[[3, 4, 5], [6], [3, 4, 5], [7, 8, 9, 10, 2], [3, 9]],
)


def slow_norms(model, batch_size, num_batches, seed=0):
    """The same draws, the gradient summed up a sequence at a time."""
    exact, rng = copy.deepcopy(model).double().eval(), np.random.default_rng(seed)
    norms = []
    for _ in range(num_batches):
        exact.zero_grad()
        for row in rng.choice(len(ENCODED), batch_size, replace=False):
            prompt, completion = ENCODED.prompts[row], ENCODED.completions[row]
            logits = exact(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)[range(len(completion)), completion]
            (logprobs.sum() / batch_size).backward()
        squares = [p.grad.square().sum() for p in exact.parameters() if p.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    return norms


@pytest.mark.parametrize("batch_tokens", [1, 12, 1024])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_equal_to_the_slow_gradient(tiny_gpt2, batch_size, batch_tokens):
    found = gradient_norms(
        tiny_gpt2.train(), ENCODED, batch_size=batch_size, num_batches=3, seed=4, batch_tokens=batch_tokens
    )
    assert found == pytest.approx(slow_norms(tiny_gpt2, batch_size, 3, seed=4), rel=1e-5)
    assert (np.ptp(found) < 1e-4) == (batch_size == 5)  # the whole corpus has but one gradient


def test_frozen_parameters_do_not_count(tiny_gpt2):
    whole = gradient_norms(tiny_gpt2, ENCODED, batch_size=5, num_batches=1)
    tiny_gpt2.transformer.h.requires_grad_(False)
    part = gradient_norms(tiny_gpt2, ENCODED, batch_size=5, num_batches=1)
    assert 0 < part < whole
    assert part == pytest.approx(slow_norms(tiny_gpt2, 5, 1), rel=1e-5)
    with pytest.raises(ValueError, match="no trainable parameters"):
        gradient_norms(tiny_gpt2.requires_grad_(False), ENCODED, batch_size=1)


def test_the_model_comes_back_as_it_was(tiny_gpt2):
    tiny_gpt2.train()
    tiny_gpt2.lm_head.weight.grad = torch.ones_like(tiny_gpt2.lm_head.weight)
    state, rng = copy.deepcopy(tiny_gpt2.state_dict()), torch.get_rng_state()
    gradient_norms(tiny_gpt2, ENCODED, batch_size=2, num_batches=1)
    assert tiny_gpt2.training
    assert (tiny_gpt2.lm_head.weight.grad == 1).all()
    assert all(p.grad is None for p in tiny_gpt2.transformer.h.parameters())
    assert all(torch.equal(value, state[name]) for name, value in tiny_gpt2.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_half_precision_gradients_are_summed_in_float32(tiny_gpt2):
    encoded = EncodedCorpus([[1, 2]] * 64, [[3, 4, 5]] * 63 + [[6]])
    model = tiny_gpt2.to(torch.bfloat16)
    found = gradient_norms(model, encoded, batch_size=64, num_batches=1, batch_tokens=1)
    total = None
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        logprob = logits.log_softmax(-1)[range(len(completion)), completion].sum() / 64
        parts = [part.float() for part in torch.autograd.grad(logprob, list(model.parameters()))]
        total = parts if total is None else [a + b for a, b in zip(total, parts)]
    expected = torch.cat([part.flatten() for part in total]).norm().item()
    assert found == pytest.approx(expected, rel=1e-4)  # bfloat16 sums would lose 1 in 256 at a time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 6}, "`batch_size` must be at most the 5 rows"),
        ({"batch_size": 1, "num_batches": 0}, "`num_batches` must be at least 1"),
        ({"batch_size": 1, "batch_tokens": 0}, "`batch_tokens` must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tiny_gpt2, arguments, message):
    with pytest.raises(ValueError, match=message):
        gradient_norms(tiny_gpt2, ENCODED, **arguments)
