"""Steps of an output head in closed form against autograd on copied heads, one row and one token at a time."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from hf_coverage.functional.fast_weights import (
    fast_error_bound,
    fast_logits,
    fast_step,
    grow_fast_weights,
    new_fast_weights,
)
from hf_coverage.functional.head_training import (
    adapt_head,
    apply_fast_weights,
    branch_fast_weights,
    follow_tokens,
    squared_head_norm,
)
from hf_coverage.functional.ttt_config import StepRule


def slow_head(hidden, tokens, weight, bias, *, rule, mask):
    """One row by autograd, in float64; the bias is the last column."""
    start = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    around = start if rule.center == "start" else torch.zeros_like(start)
    head, logprobs = start, []
    for h, y, counts in zip(hidden, tokens, mask):
        if not counts:
            logprobs.append(torch.zeros((), dtype=torch.float64))
            continue
        inputs = h if bias is None else torch.cat([h, h.new_ones(1)])
        logprobs.append((head @ inputs).log_softmax(-1)[y])
        for _ in range(rule.num_steps):
            head = head.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((head @ inputs).log_softmax(-1)[y], head)
            if rule.lam is not None:
                gradient = gradient / (rule.lam + gradient.norm())
            head = (start + (1 - rule.decay) * (head - start) + rule.lr * gradient).detach()
            if rule.radius is not None:
                head = around + (head - around) * min(1.0, rule.radius / max(float((head - around).norm()), 1e-300))
    return head.detach(), torch.stack(logprobs).detach()


def draw_problem(seed, *, has_bias=False, rows=3, length=5, size=4, vocabulary=6):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, size, generator=draw, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (rows, length), generator=draw)
    weight = 0.3 * torch.randn(vocabulary, size, generator=draw, dtype=torch.float64)
    bias = 0.3 * torch.randn(vocabulary, generator=draw, dtype=torch.float64) if has_bias else None
    mask = torch.rand(rows, length, generator=draw) < 0.7
    return hidden, tokens, weight, bias, mask


@st.composite
def rules(draw):
    radius, center = draw(st.sampled_from([None, 0.05, 0.5, 1.0, 3.0])), draw(st.sampled_from(["zero", "start"]))
    return StepRule(
        lr=draw(st.sampled_from([0.0, 0.1, 2.0])),
        radius=radius,
        center=center,
        decay=0.0 if radius is not None and center == "zero" else draw(st.sampled_from([0.0, 0.2, 1.0])),
        lam=draw(st.sampled_from([None, 0.0, 0.5])),
        num_steps=draw(st.sampled_from([1, 1, 3])),
    )


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**16), has_bias=st.booleans(), rule=rules())
def test_closed_form_equals_autograd(seed, has_bias, rule):
    hidden, tokens, weight, bias, mask = draw_problem(seed, has_bias=has_bias)
    state, logprobs = adapt_head(hidden, tokens.where(mask, -100), weight, bias, rule=rule, mask=mask)
    for row in range(len(hidden)):
        head, expected = slow_head(hidden[row], tokens[row], weight, bias, rule=rule, mask=mask[row])
        written = [weight.clone(), None if bias is None else bias.clone()]
        apply_fast_weights(state, *written, row=row)
        together = written[0] if bias is None else torch.cat([written[0], written[1][:, None]], dim=1)
        torch.testing.assert_close(logprobs[row], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(together, head, rtol=0, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    has_bias=st.booleans(),
    top_k=st.integers(1, 12),
    lr=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    decay=st.sampled_from([0.0, 0.3]),
    num_steps=st.sampled_from([1, 2]),
)
def test_a_cut_step_stays_within_its_bound(seed, has_bias, top_k, lr, decay, num_steps):
    vocabulary, length = 12, 9
    hidden, tokens, weight, bias, mask = draw_problem(seed, has_bias=has_bias, length=length, vocabulary=vocabulary)
    weight = 3 * weight  # some distributions peaked, some not
    rules = [StepRule(lr, decay=decay, num_steps=num_steps, top_k=kept) for kept in (None, top_k)]
    start = hidden @ weight.T + (0 if bias is None else bias)
    exact, cut = (
        new_fast_weights(hidden[:, 0], start[:, 0], rule=rule, capacity=2 * length, has_bias=has_bias)
        for rule in rules
    )
    for t in range(length):
        h, active = hidden[:, t], mask[:, t]
        bound = fast_error_bound(cut, h)
        wanted, found = (fast_logits(state, h, start[:, t]) for state in (exact, cut))
        assert ((wanted - found).abs().amax(-1) <= bound + 1e-12).all()
        moved = wanted.log_softmax(-1) - found.log_softmax(-1)
        assert (moved.abs().amax(-1) <= 2 * bound + 1e-12).all()
        if top_k >= vocabulary:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        exact = fast_step(exact, h, start[:, t], tokens[:, t], logits=wanted, active=active)
        cut = fast_step(cut, h, start[:, t], tokens[:, t], active=active)


def test_the_bound_of_a_single_step_is_what_was_cut():
    hidden, start = torch.tensor([[2.0]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]).double().log_softmax(-1)
    state = new_fast_weights(hidden, start, rule=StepRule(0.5, top_k=2), capacity=2)
    assert float(fast_error_bound(state, hidden)) == 0.0
    state = fast_step(state, hidden, start, torch.tensor([3]))
    # Kept: the two likeliest and y; cut: the third, of probability e^1 / Z, by 0.5 * <2, 2>.
    assert float(fast_error_bound(state, hidden)) == pytest.approx(2 * float(start[0, 2].exp()))
    found = fast_logits(state, hidden, start) - start
    expected = 2 * (torch.tensor([0.0, 0, 0, 1]) - start.exp())
    torch.testing.assert_close(found[0, [0, 1, 3]], expected[0, [0, 1, 3]], check_dtype=False)
    assert float(found[0, 2]) == 0.0


def test_a_cut_head_is_written_into_its_parameters():
    hidden, tokens, weight, bias, _ = draw_problem(0, has_bias=True, vocabulary=8)
    state, _ = adapt_head(hidden, tokens, weight, bias, rule=StepRule(0.4, top_k=3))
    probe = torch.randn(3, 4, dtype=torch.float64)
    logits = fast_logits(state, probe, probe @ weight.T + bias)
    for row in range(3):
        written = weight.clone(), bias.clone()
        apply_fast_weights(state, *written, row=row)
        torch.testing.assert_close(probe[row] @ written[0].T + written[1], logits[row])


def test_a_cut_head_does_not_grow_with_the_vocabulary():
    hidden, logits = torch.zeros(2, 3), torch.zeros(2, 1000)
    state = new_fast_weights(hidden, logits, rule=StepRule(0.1, top_k=4), capacity=7)
    assert state.errors.shape == state.cut.tokens.shape == (2, 7, 5)


@pytest.mark.parametrize("top_k", [None, 2])
def test_more_room_changes_nothing_and_nothing_is_moved_without_need(top_k):
    hidden, tokens, weight, _, _ = draw_problem(1)
    start = hidden @ weight.T
    state = new_fast_weights(hidden[:, 0], start[:, 0], rule=StepRule(0.5, top_k=top_k), capacity=5)
    small = new_fast_weights(hidden[:, 0], start[:, 0], rule=StepRule(0.5, top_k=top_k), capacity=1)
    for t in range(5):
        logits = fast_logits(state, hidden[:, t], start[:, t])
        torch.testing.assert_close(fast_logits(small, hidden[:, t], start[:, t]), logits, rtol=0, atol=0)
        before = state.errors.data_ptr()
        state = fast_step(state, hidden[:, t], start[:, t], tokens[:, t], logits=logits)
        assert state.errors.data_ptr() == before
        if small.length == small.capacity:
            small = grow_fast_weights(small, 2 * small.capacity)
        small = fast_step(small, hidden[:, t], start[:, t], tokens[:, t])
    assert small.capacity == 8
    with pytest.raises(ValueError, match="at least the 5 steps that were made, got 4"):
        grow_fast_weights(state, 4)


def test_every_row_may_have_its_own_step_size():
    torch.manual_seed(0)
    hidden, tokens, weight = torch.randn(2, 4, 3), torch.randint(5, (2, 4)), torch.randn(5, 3)
    _, together = adapt_head(hidden, tokens, weight, rule=StepRule(torch.tensor([0.1, 1.0])))
    for row, lr in enumerate([0.1, 1.0]):
        _, alone = adapt_head(hidden[[row]], tokens[[row]], weight, rule=StepRule(lr))
        torch.testing.assert_close(together[row], alone[0])


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    hidden, tokens, weight = torch.randn(2, 4, 3), torch.randint(5, (2, 4)), torch.randn(5, 3).bfloat16()
    half, exact = hidden.bfloat16(), hidden.bfloat16().float()
    state, logprobs = adapt_head(half, tokens, weight, rule=StepRule(0.5))
    _, expected = adapt_head(exact, tokens, weight.float(), rule=StepRule(0.5))
    assert logprobs.dtype == state.errors.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)


def test_long_sequences_are_followed_in_parts():
    hidden, tokens, weight, bias, mask = draw_problem(3, has_bias=True, rows=2, length=71)
    rule = StepRule(0.2, radius=2.0)
    _, logprobs = adapt_head(hidden, tokens, weight, bias, rule=rule, mask=mask)
    for row in range(2):
        _, expected = slow_head(hidden[row], tokens[row], weight, bias, rule=rule, mask=mask[row])
        torch.testing.assert_close(logprobs[row], expected, rtol=0, atol=1e-11)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.one_of(rules(), st.just(StepRule(1.0, top_k=2, decay=0.1))), st.integers(1, 4))
def test_branches_go_on_as_whole_sequences_do(seed, rule, cut):
    """One after the other, over the same buffers, whatever the last one left there."""
    hidden, tokens, weight, bias, mask = draw_problem(seed, has_bias=True)
    head = partial(linear, weight=weight, bias=bias)
    follow = partial(follow_tokens, head=head, rule=rule, has_bias=True, squared_norm=squared_head_norm(weight, bias))
    stem, _ = follow(hidden[:, :cut], tokens[:, :cut], mask=mask[:, :cut], room=5 - cut)
    for branch, rows in enumerate((3, 3, 2)):
        own = torch.cat([tokens[:rows, :cut], (tokens[:rows, cut:] + branch) % 6], dim=1)
        _, expected = follow(hidden[:rows], own, mask=mask[:rows])
        state = branch_fast_weights(stem, rows)
        _, found = follow(hidden[:rows, cut:], own[:, cut:], mask=mask[:rows, cut:], state=state)
        torch.testing.assert_close(found, expected[:, cut:], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"lr": -1.0}, "`lr` must be finite and at least 0, got -1.0"),
        ({"lr": math.inf}, "`lr` must be finite"),
        ({"lr": torch.tensor([0.1, -0.5])}, "`lr` must be finite and at least 0, got -0.5"),
        ({"lr": 0.1, "radius": 0.0}, "`radius` must be positive"),
        ({"lr": 0.1, "center": "origin"}, '`center` must be "zero" or "start", got \'origin\''),
        ({"lr": 0.1, "decay": 1.5}, r"`decay` must be in \[0, 1\], got 1.5"),
        ({"lr": 0.1, "decay": 0.1, "radius": 1.0, "center": "zero"}, "goes back to the start"),
        ({"lr": 0.1, "lam": -1.0}, "`lam` must be finite and at least 0"),
        ({"lr": 0.1, "num_steps": 0}, "`num_steps` must be a whole number, at least 1, got 0"),
        ({"lr": 0.1, "num_steps": 1.5}, "`num_steps` must be a whole number, at least 1, got 1.5"),
        ({"lr": 0.1, "top_k": 0}, "`top_k` must be a whole number, at least 1, or None, got 0"),
        ({"lr": 0.1, "top_k": 2.0}, "`top_k` must be a whole number, .* got 2.0"),
        ({"lr": 0.1, "top_k": 5, "radius": 1.0}, "must not be combined"),
        ({"lr": 0.1, "top_k": 5, "lam": 1.0}, "must not be combined"),
    ],
)
def test_rules_that_are_none(settings_, message):
    with pytest.raises(ValueError, match=message):
        StepRule(**settings_)


def test_refusals():
    hidden, logits, token = torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    state = new_fast_weights(hidden, logits, rule=StepRule(1.0), capacity=0)
    with pytest.raises(ValueError, match="room for 0 steps and has made 0; see `grow_fast_weights`"):
        fast_step(state, hidden, logits, token)
    state = new_fast_weights(hidden, logits, rule=StepRule(1.0, num_steps=3), capacity=5)
    state = fast_step(state, hidden, logits, token)
    with pytest.raises(ValueError, match="room for 5 steps and has made 3"):
        fast_step(state, hidden, logits, token)
    with pytest.raises(ValueError, match="`squared_norm` of the head must be given for a ball around zero"):
        new_fast_weights(hidden, logits, rule=StepRule(1.0, radius=1.0, center="zero"), capacity=5)
