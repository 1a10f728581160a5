"""Steps of an output head in closed form against autograd on copied heads, one row and one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional.fast_weights import adapt_head, apply_fast_weights, fast_step, new_fast_weights


def slow_head(hidden, tokens, weight, bias, *, lr, radius, center, mask):
    """One row by autograd, in float64; the bias is the last column."""
    start = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    around = start if center == "start" else torch.zeros_like(start)
    head, logprobs = start, []
    for h, y, counts in zip(hidden, tokens, mask):
        if not counts:
            logprobs.append(torch.zeros((), dtype=torch.float64))
            continue
        head = head.detach().requires_grad_(True)
        inputs = h if bias is None else torch.cat([h, h.new_ones(1)])
        logprobs.append((head @ inputs).log_softmax(-1)[y])
        (gradient,) = torch.autograd.grad(logprobs[-1], head)
        moved = (head + lr * gradient).detach() - around
        head = around + moved * (1.0 if radius is None else min(1.0, radius / max(float(moved.norm()), 1e-300)))
    return head.detach(), torch.stack(logprobs).detach()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    has_bias=st.booleans(),
    center=st.sampled_from(["zero", "start"]),
    radius=st.sampled_from([None, 0.05, 0.5, 1.0, 3.0]),
    lr=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_closed_form_equals_autograd(seed, has_bias, center, radius, lr):
    draw = torch.Generator().manual_seed(seed)
    rows, length, size, vocabulary = 3, 5, 4, 6
    hidden = torch.randn(rows, length, size, generator=draw, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (rows, length), generator=draw)
    weight = 0.3 * torch.randn(vocabulary, size, generator=draw, dtype=torch.float64)
    bias = 0.3 * torch.randn(vocabulary, generator=draw, dtype=torch.float64) if has_bias else None
    mask = torch.rand(rows, length, generator=draw) < 0.7
    settings_ = {"lr": lr, "radius": radius, "center": center}
    state, logprobs = adapt_head(hidden, tokens.where(mask, -100), weight, bias, mask=mask, **settings_)
    for row in range(rows):
        head, expected = slow_head(hidden[row], tokens[row], weight, bias, mask=mask[row], **settings_)
        written = [weight.clone(), None if bias is None else bias.clone()]
        apply_fast_weights(state, *written, row=row)
        together = written[0] if bias is None else torch.cat([written[0], written[1][:, None]], dim=1)
        torch.testing.assert_close(logprobs[row], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(together, head, rtol=0, atol=1e-11)


def test_every_row_may_have_its_own_step_size():
    torch.manual_seed(0)
    hidden, tokens, weight = torch.randn(2, 4, 3), torch.randint(5, (2, 4)), torch.randn(5, 3)
    _, together = adapt_head(hidden, tokens, weight, lr=torch.tensor([0.1, 1.0]))
    for row, lr in enumerate([0.1, 1.0]):
        _, alone = adapt_head(hidden[[row]], tokens[[row]], weight, lr=lr)
        torch.testing.assert_close(together[row], alone[0])


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    hidden, tokens, weight = torch.randn(2, 4, 3), torch.randint(5, (2, 4)), torch.randn(5, 3)
    half, exact = hidden.bfloat16(), hidden.bfloat16().float()
    state, logprobs = adapt_head(half, tokens, weight, lr=0.5)
    _, expected = adapt_head(exact, tokens, weight, lr=0.5)
    assert logprobs.dtype == state.errors.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)


def test_refusals():
    weight = torch.zeros(3, 2)
    with pytest.raises(ValueError, match='`center` must be "zero" or "start", got \'origin\''):
        new_fast_weights(weight, rows=1, capacity=1, center="origin")
    one = (torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="room for 0 steps"):
        fast_step(new_fast_weights(weight, rows=1, capacity=0), *one, lr=1.0)
    state = new_fast_weights(weight, rows=1, capacity=1, center="start")
    with pytest.raises(ValueError, match="`start_logits` must be given"):
        fast_step(state, *one, lr=1.0, radius=1.0)
