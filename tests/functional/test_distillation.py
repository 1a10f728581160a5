"""Losses beside a teacher, a few tokens at a time, against all logits at once in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.functional import distillation
from hf_coverage.functional.distillation import TokenRows, distillation_losses

TOKENS, WIDTH, VOCABULARY = 7, 3, 11


@pytest.fixture
def small_chunks(monkeypatch):
    """Two tokens at a time."""
    monkeypatch.setattr(distillation, "_CPU_CHUNK", 2 * VOCABULARY)


def problem(seed=0, bias=True, dtype=torch.float64):
    """Hidden states and heads of a student and of a wider teacher."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [draw(TOKENS, WIDTH), draw(VOCABULARY, WIDTH), draw(VOCABULARY) if bias else None]
    teacher = TokenRows(draw(TOKENS, 5), draw(VOCABULARY, 5))
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    leaves = [part.requires_grad_() for part in student if part is not None]
    return TokenRows(*student), teacher, labels, leaves


def by_definition(student, teacher, labels):
    """-log p(y) and KL(q || p), with all logits and autograd."""

    def logits(rows):
        if rows.weight is None:
            return rows.values
        return rows.values @ rows.weight.T + (0 if rows.bias is None else rows.bias)

    log_p, log_q = logits(student).log_softmax(-1), logits(teacher).detach().log_softmax(-1)
    nll = -log_p[torch.arange(len(labels)), labels]
    kl = torch.stack([sum(math.exp(q) * (q - p) for q, p in zip(*row) if q > -math.inf) for row in zip(log_q, log_p)])
    return nll, kl


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("soft_targets", [False, True])
def test_losses_divergences_and_gradients_are_the_definition(soft_targets, bias):
    student, teacher, labels, leaves = problem(bias=bias)
    weights = torch.linspace(0, 1, TOKENS, dtype=torch.float64)
    losses, divergences = distillation_losses(student, teacher, labels, soft_targets=soft_targets)
    found = torch.autograd.grad((weights * losses).sum(), leaves)
    nll, kl = by_definition(student, teacher, labels)
    expected = torch.autograd.grad((weights * (kl if soft_targets else nll)).sum(), leaves)
    torch.testing.assert_close(losses, kl if soft_targets else nll)
    torch.testing.assert_close(divergences, kl)
    assert not divergences.requires_grad
    for ours, slow in zip(found, expected):
        torch.testing.assert_close(ours, slow)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("soft_targets", [False, True])
def test_logits_do_as_well_as_hidden_states(soft_targets):
    student, teacher, labels, _ = problem(bias=False)
    logits = (student.values @ student.weight.T).detach().requires_grad_()
    whole = distillation_losses(
        TokenRows(logits), TokenRows(teacher.values @ teacher.weight.T), labels, soft_targets=soft_targets
    )
    for ours, other in zip(whole, distillation_losses(student, teacher, labels, soft_targets=soft_targets)):
        torch.testing.assert_close(ours, other)
    (found,) = torch.autograd.grad(whole[0].sum(), logits)
    expected = by_definition(TokenRows(logits), teacher, labels)[int(soft_targets)]
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), logits)[0])


def test_the_expected_gradient_over_the_teachers_tokens_is_that_of_the_divergence():
    """Why the method's sampled tokens and the whole distribution train alike."""
    student, teacher, labels, leaves = problem()
    q = teacher.log_softmax(slice(None)).exp()
    total = sum(
        (q[:, token].detach() * distillation_losses(student, teacher, torch.full_like(labels, token))[0]).sum()
        for token in range(VOCABULARY)
    )
    soft = distillation_losses(student, teacher, labels, soft_targets=True)[0].sum()
    for sampled, whole in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(soft, leaves)):
        torch.testing.assert_close(sampled, whole)


@given(seed=st.integers(0, 1000), chunk=st.integers(1, 2 * TOKENS * VOCABULARY))
def test_chunks_do_not_matter(seed, chunk):
    student, teacher, labels, leaves = problem(seed)
    whole = distillation_losses(student, teacher, labels)
    expected = torch.autograd.grad(whole[0].sum(), leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_CPU_CHUNK", chunk)
        parted = distillation_losses(student, teacher, labels)
        found = torch.autograd.grad(parted[0].sum(), leaves)
    for ours, other in zip((*parted, *found), (*whole, *expected)):
        torch.testing.assert_close(ours, other)


def test_tokens_that_the_teacher_excludes_cost_nothing_and_those_the_student_excludes_everything():
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]).log()
    _, divergences = distillation_losses(TokenRows(log_p), TokenRows(log_q), torch.tensor([0, 0]))
    assert divergences.tolist() == [pytest.approx(math.log(2)), math.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    student, teacher, labels, leaves = problem(dtype=dtype)
    teacher = TokenRows(*(None if part is None else part.to(dtype) for part in teacher))
    losses, divergences = distillation_losses(student, teacher, labels)
    assert losses.dtype == divergences.dtype == torch.float32
    found = torch.autograd.grad(losses.sum(), leaves)
    nll, kl = by_definition(TokenRows(*(part.double() for part in student)), TokenRows(*map(_double, teacher)), labels)
    expected = torch.autograd.grad(nll.sum(), leaves)
    torch.testing.assert_close(losses, nll.float(), rtol=0.03, atol=0.03)
    torch.testing.assert_close(divergences, kl.float(), rtol=0.03, atol=0.03)
    for ours, exact in zip(found, expected):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.05)


def _double(part):
    return None if part is None else part.double()


def test_autocast_casts_the_heads_as_a_linear_layer_would():
    student, teacher, labels, leaves = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = distillation_losses(student, teacher, labels)
        logits = torch.nn.functional.linear(*student)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(losses, -logits.float().log_softmax(-1)[torch.arange(TOKENS), labels])
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(losses.sum(), leaves))


def test_a_frozen_head_gets_no_gradient():
    student, teacher, labels, (hidden, weight, bias) = problem()
    weight.requires_grad_(False)
    distillation_losses(student, teacher, labels)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad.any()
    assert bias.grad.any()


def test_no_tokens_have_gradients_of_zero():
    student, teacher, labels, leaves = problem()
    none = slice(0)
    rows = student._replace(values=student.values[none])
    losses, divergences = distillation_losses(rows, teacher._replace(values=teacher.values[none]), labels[none])
    assert losses.shape == divergences.shape == (0,)
    assert not any(grad.any() for grad in torch.autograd.grad(losses.sum(), leaves))


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "message"),
    [
        ((2, 4), (2, 5), 2, "`student` and `teacher` must share a vocabulary, but have 4 and 5 tokens"),
        ((2, 4), (3, 4), 2, "must be of the same tokens, but are of 2, 3 and 2"),
        ((2, 4), (2, 4), 1, "must be of the same tokens, but are of 2, 2 and 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(student, teacher, labels, message):
    with pytest.raises(ValueError, match=message):
        distillation_losses(
            TokenRows(torch.zeros(student)), TokenRows(torch.zeros(teacher)), torch.zeros(labels, dtype=torch.int64)
        )
