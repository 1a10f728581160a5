"""Log-probabilities against slow float64 loops, in every dtype, across the chunks of the work space."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional import logprobs
from hf_coverage.functional.logprobs import (
    collision_probability,
    linear_head_logprobs,
    logsumexp,
    sequence_logprobs,
    token_kl,
    token_logprobs,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def log_softmax(row: torch.Tensor) -> list[float]:
    values = row.double().tolist()
    largest = max(values)
    normaliser = largest + math.log(sum(math.exp(value - largest) for value in values))
    return [value - normaliser for value in values]


def random_logits(*shape: int, seed: int = 0, scale: float = 5.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 7, 10**6], ids=lambda size: f"chunk{size}")
def _chunk(request, monkeypatch):
    """Work spaces of one row, of a few rows and of all."""
    monkeypatch.setattr(logprobs, "_CPU_CHUNK", request.param * 13)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_equal_the_loop(dtype):
    logits = random_logits(5, 4, 13).to(dtype)
    labels = torch.randint(0, 13, (5, 4), generator=torch.Generator().manual_seed(1))
    result = token_logprobs(logits, labels)
    assert result.dtype == torch.float32
    assert result.shape == (5, 4)
    for index in np.ndindex(5, 4):
        # float32 arithmetic on the half-precision logits themselves, not half-precision arithmetic.
        assert result[index].item() == pytest.approx(log_softmax(logits[index])[labels[index]], abs=2e-6)


@pytest.mark.usefixtures("_chunk")
def test_kl_and_collision_equal_the_loop():
    teacher, logits = random_logits(6, 13, seed=1), random_logits(6, 13, seed=2)
    kl, collision = token_kl(teacher, logits), collision_probability(teacher)
    for row in range(6):
        log_q, log_p = log_softmax(teacher[row]), log_softmax(logits[row])
        assert kl[row].item() == pytest.approx(sum(math.exp(q) * (q - p) for q, p in zip(log_q, log_p)), rel=1e-5)
        assert collision[row].item() == pytest.approx(sum(math.exp(2 * q) for q in log_q), rel=1e-5)


def test_excluded_tokens():
    excluded = float("-inf")
    one_left = torch.tensor([[excluded, 2.0, excluded]])
    two_left = torch.tensor([[1.0, 1.0, excluded]])
    assert token_logprobs(one_left, torch.tensor([1])).item() == 0.0
    assert token_logprobs(one_left, torch.tensor([0])).item() == excluded
    assert token_kl(one_left, two_left).item() == pytest.approx(math.log(2))  # what q excludes costs nothing
    assert token_kl(two_left, one_left).item() == math.inf  # what p excludes costs everything
    assert collision_probability(one_left).item() == 1.0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), vocabulary=st.integers(1, 40), shift=st.floats(-1e3, 1e3))
def test_laws(seed, vocabulary, shift):
    logits, teacher = random_logits(3, vocabulary, seed=seed), random_logits(3, vocabulary, seed=seed + 1)
    everything = torch.arange(vocabulary).expand(3, vocabulary)
    all_logprobs = torch.stack([token_logprobs(logits, everything[:, v]) for v in range(vocabulary)], dim=-1)
    torch.testing.assert_close(all_logprobs.exp().sum(-1), torch.ones(3))  # a distribution
    torch.testing.assert_close(logsumexp(logits + shift), logsumexp(logits) + shift, atol=1e-3, rtol=1e-6)
    assert (token_kl(teacher, logits) >= 0).all()
    torch.testing.assert_close(token_kl(logits, logits), torch.zeros(3), atol=1e-6, rtol=0)
    assert ((collision_probability(logits) >= 1 / vocabulary - 1e-6) & (collision_probability(logits) <= 1)).all()


def test_sequences_are_summed_in_float64():
    # In float32 the second term would vanish beside the first.
    values = torch.tensor([[-(2.0**24), -1.0]])
    assert sequence_logprobs(values).item() == -(2.0**24) - 1
    mask = torch.tensor([[False, True]])
    assert sequence_logprobs(torch.tensor([[math.nan, -1.0]]), mask).item() == -1.0


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_head_equals_full_logits_and_has_its_gradient(with_bias):
    hidden = random_logits(2, 5, 6, scale=1.0).requires_grad_()
    weight = random_logits(13, 6, seed=1, scale=1.0).requires_grad_()
    bias = random_logits(13, seed=2).requires_grad_() if with_bias else None
    labels = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(3))
    parameters = [hidden, weight, *([bias] if with_bias else [])]
    full = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias), dim=-1)
    expected = full.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    result = linear_head_logprobs(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
    )


def test_rounding_does_not_add_up_over_a_large_vocabulary():
    """`torch.log_softmax` fails this: on peaked logits its rounding has a sign."""
    logits = random_logits(64, 49152, scale=4.0)
    labels = torch.zeros(64, dtype=torch.int64)
    exact = logits[:, 0].double() - torch.logsumexp(logits.double(), dim=-1)
    assert abs((token_logprobs(logits, labels) - exact).mean().item()) < 5e-7
    log_q = logits.double().log_softmax(-1)
    exact_kl = (log_q.exp() * log_q).sum(-1) + math.log(49152)
    assert abs((token_kl(logits, torch.zeros_like(logits)) - exact_kl).mean().item()) < 5e-6


def test_no_full_float32_copy_is_made():
    """The largest allocation over half-precision logits stays at a chunk's size."""
    logits = torch.zeros(400, 2**12, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        token_logprobs(logits, torch.zeros(400, dtype=torch.int64))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * logprobs._CPU_CHUNK < 4 * logits.numel()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (logsumexp, (torch.zeros(2, 3, dtype=torch.int64),), TypeError, "`logits` must be floating point"),
        (token_logprobs, (torch.zeros(2, 3), torch.zeros(2)), TypeError, "`labels` must be int64"),
        (token_logprobs, (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), ValueError, "shape \\(2,\\)"),
        (token_logprobs, (torch.zeros(2, 3), torch.tensor([0, -100])), ValueError, "lie in \\[0, 3\\), got -100"),
        (token_kl, (torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "vocabulary of the model"),
        (sequence_logprobs, (torch.zeros(2, 3), torch.ones(2, 3)), TypeError, "`mask` must be boolean"),
        (sequence_logprobs, (torch.zeros(2, 3), torch.ones(2, 2) > 0), ValueError, "shape of `token_logprobs`"),
        (
            linear_head_logprobs,
            (torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "last dimension",
        ),
    ],
)
def test_wrong_arguments_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
