"""Step sizes of the theorems: values by hand, limits, and what a change of units must do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.functional.step_sizes import (
    LinearProblem,
    TrainingPlan,
    distillation_step_sizes,
    normalized_step_sizes,
    practical_sweep,
    token_level_step_sizes,
)

ALL = (normalized_step_sizes, token_level_step_sizes, distillation_step_sizes)
LOG_16 = 2.772588722239781

positive = st.floats(1e-3, 1e3)
problems = st.builds(LinearProblem, feature_norm=positive, inherent_variance=positive, radius=positive)
plans = st.builds(
    TrainingPlan, n=st.floats(1.5, 1e4), steps=st.integers(1, 10**6), eps=st.floats(0.01, 0.9), batch_size=st.none()
)


def test_theorem_5_1_by_hand():
    short = normalized_step_sizes(LinearProblem(2.0, 10.0), TrainingPlan(16, 100, eps=0.1))
    assert short.lr == pytest.approx(1 / 256)
    assert short.lam == pytest.approx(LOG_16 * 16)  # log N / (16 / 256)
    assert short.lam >= 8 * 2.0 * LOG_16
    assert short.batch_size == 9  # 2 / 0.27726 + 1 = 8.21
    assert short.terms == pytest.approx(
        {"inherent variance": 0.1899141, "feature norm": 0.04, "minibatch": 2 / (9 * LOG_16)}
    )
    assert short.total == pytest.approx(0.1899141 + 0.04 + 0.0801497)
    assert short.dominant == "inherent variance"
    assert not short.is_vacuous
    assert short.steps_needed == pytest.approx(10 / (0.01 * LOG_16))
    long = normalized_step_sizes(LinearProblem(0.001, 10.0), TrainingPlan(16, 10**4, batch_size=3))
    assert long.lr == pytest.approx((LOG_16 / 1e5) ** 0.25)
    assert long.lam == pytest.approx(LOG_16 / (16 * (LOG_16 / 1e5) ** 0.25))
    assert long.batch_size == 3
    assert long.terms["minibatch"] == pytest.approx(0.001 / (3 * LOG_16))


def test_theorem_6_1_by_hand():
    short = token_level_step_sizes(LinearProblem(2.0, 10.0), TrainingPlan(16, 1))
    assert short.lr == 1 / 8
    assert short.terms == pytest.approx({"inherent variance": 10**0.5 / LOG_16, "feature norm": 4 / LOG_16})
    assert short.batch_size == 1
    assert short.is_vacuous
    assert token_level_step_sizes(LinearProblem(2.0, 10.0), TrainingPlan(16, 1000)).lr == pytest.approx(0.01)


def test_theorem_6_2_by_hand():
    short = distillation_step_sizes(LinearProblem(2.0, 10.0), TrainingPlan(16, 1))
    assert short.lr == pytest.approx(1 / ((64 * LOG_16 + 2) * 4))
    long = distillation_step_sizes(LinearProblem(0.1, 10.0), TrainingPlan(16, 10**5))
    assert long.lr == pytest.approx(1 / math.sqrt(1e6 * LOG_16))
    assert long.terms == pytest.approx({"inherent variance": math.sqrt(10 / (1e5 * LOG_16)), "feature norm": 1e-7})


@given(problems, plans)
def test_a_ball_of_radius_r_is_the_unit_ball_in_other_units(problem, plan):
    """Theta = R u turns a step of u into one of theta; g in u's units is R g."""
    unit = LinearProblem(problem.bound, problem.variance)
    for sizes in ALL:
        mine, theirs = sizes(problem, plan), sizes(unit, plan)
        assert mine.terms == pytest.approx(theirs.terms)
        assert mine.batch_size == theirs.batch_size
        scale = problem.radius if sizes is normalized_step_sizes else problem.radius**2
        assert mine.lr == pytest.approx(scale * theirs.lr)
    norm = 3.7  # of the gradient in theta's units
    mine, theirs = normalized_step_sizes(problem, plan), normalized_step_sizes(unit, plan)
    step = problem.radius * theirs.lr * problem.radius * norm / (theirs.lam + problem.radius * norm)
    assert mine.lr * norm / (mine.lam + norm) == pytest.approx(step)


@given(problems, plans)
def test_what_is_asked_for_is_what_comes(problem, plan):
    found = normalized_step_sizes(problem, plan)
    assert found.lam >= 8 * problem.feature_norm * plan.log_n * (1 - 1e-12)
    assert found.terms["minibatch"] <= plan.eps
    assert found.total == pytest.approx(sum(found.terms.values()))
    assert found.terms[found.dominant] == max(found.terms.values())
    for sizes in ALL:
        needed = math.ceil(sizes(problem, plan).steps_needed)
        enough = sizes(problem, TrainingPlan(plan.n, needed, plan.eps))
        assert max(value for name, value in enough.terms.items() if name != "minibatch") <= plan.eps * (1 + 1e-9)


@given(problems, plans)
def test_more_steps_and_a_larger_n_promise_more(problem, plan):
    for sizes in ALL:
        now = sizes(problem, plan)
        longer = sizes(problem, TrainingPlan(plan.n, 2 * plan.steps, plan.eps, now.batch_size))
        easier = sizes(problem, TrainingPlan(2 * plan.n, plan.steps, plan.eps, now.batch_size))
        assert longer.lr <= now.lr
        assert all(longer.terms[name] <= now.terms[name] for name in now.terms)
        assert all(easier.terms[name] <= now.terms[name] for name in now.terms)


def test_without_variance_the_feature_norm_alone_limits_the_step():
    problem, plan = LinearProblem(2.0, 0.0), TrainingPlan(16, 10**9)
    assert normalized_step_sizes(problem, plan).lr == 1 / 256
    assert token_level_step_sizes(problem, plan).lr == 1 / 8
    assert distillation_step_sizes(problem, plan).lr == pytest.approx(1 / ((64 * LOG_16 + 2) * 4))


def test_the_recipe_s_instance_has_the_step_sizes_of_its_table():
    """The expressions that `recipes/normalized_sgd` has written out for its own table."""
    b, variance, steps, log_n = 32.0, 500.0, 2000, LOG_16
    problem, plan = LinearProblem(b, variance), TrainingPlan(16, steps)
    normal = min(1 / (128 * b), (log_n / (variance * steps)) ** 0.25)
    assert normalized_step_sizes(problem, plan).lr == pytest.approx(normal)
    token = min(1 / (2 * b**2), (variance * steps) ** -0.5)
    assert token_level_step_sizes(problem, plan).lr == pytest.approx(token)


def test_practice_makes_lambda_small_and_never_larger_than_the_theorem_s():
    sizes = normalized_step_sizes(LinearProblem(2.0, 10.0), TrainingPlan(16, 100))
    sweep = practical_sweep(sizes, gradient_norm=50.0)
    assert sweep.lam == 5.0
    assert sweep.lrs == pytest.approx([sizes.lr * factor for factor in (1, 10, 100, 1000, 10_000)])
    assert practical_sweep(sizes, gradient_norm=1e6).lam == sizes.lam
    with pytest.raises(ValueError, match="`gradient_norm` must be positive and finite"):
        practical_sweep(sizes, gradient_norm=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 1}, "`n` must be above 1: the step sizes have log N in them"),
        ({"n": 0.5}, "`n` must be a finite number >= 1"),
        ({"n": math.nan}, "`n` must be a finite number >= 1"),
        ({"steps": 0}, "`steps` must be at least 1, the number T"),
        ({"eps": 0.0}, "`eps` must lie strictly between 0 and 1"),
        ({"eps": 1.0}, "`eps` must lie strictly between 0 and 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1 sequence"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingPlan(**({"n": 16, "steps": 10} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_norm": 0.0}, "`feature_norm` must be positive and finite, from 1e-30 to 1e.30, the largest norm"),
        ({"feature_norm": math.inf}, "`feature_norm` must be positive and finite"),
        ({"radius": -1.0}, "`radius` must be positive and finite, from 1e-30 to 1e.30, the radius R"),
        ({"inherent_variance": -1.0}, "`inherent_variance` must be finite and at least 0"),
        ({"inherent_variance": math.nan}, "`inherent_variance` must be finite and at least 0"),
    ],
)
def test_a_problem_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearProblem(**({"feature_norm": 1.0, "inherent_variance": 1.0} | arguments))
