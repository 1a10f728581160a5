"""What every statistic owes its rows: weights of 0, their order, the names of groups, ties and degenerate data.

A new statistic joins by a line in `WEIGHTED` or `GROUPED`.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.evaluate_modules.coverage.coverage import Coverage
from hf_coverage.evaluate_modules.coverage_comparison.coverage_comparison import CoverageComparison
from hf_coverage.functional import bounds, gradients, paired, row_steps, statistics
from hf_coverage.functional.choice import decide
from hf_coverage.functional.coverage_profile import (
    coverage,
    coverage_interval,
    log_ratios,
    reached,
    smallest_n,
    stopped_kl,
)
from hf_coverage.functional.coverage_watch import WatchState, update_watch
from hf_coverage.functional.miss_profile import miss, miss_interval, miss_upper_bound, sample_budget
from hf_coverage.functional.objectives import distillation_weights
from hf_coverage.functional.predictiveness import rank_correlations
from hf_coverage.functional.tournament import OnPolicy, challenge_rates, hold_tournament
from hf_coverage.functional.tournament_racing import race
from hf_coverage.functional.tournament_soft import hold_soft_tournament
from hf_coverage.inference.files import strict_json
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.optim.objectives import log_linear_n
from hf_coverage.report.results import coverage_results, write_results
from hf_coverage.report.summary import comparison_table, paired_differences, profile_table, summarize_profiles
from hf_coverage.select.choose import choose
from hf_coverage.select.predictiveness import predictiveness
from hf_coverage.select.tournament import tournament

N = 4.0


class Rows(NamedTuple):
    """Log ratios of two models on the same rows, prompts and weights."""

    a: np.ndarray
    b: np.ndarray
    groups: list
    weights: np.ndarray

    def of(self, index):
        return Rows(self.a[index], self.b[index], [self.groups[i] for i in index], self.weights[index])

    def profile(self, ratios=None):
        ratios = self.a if ratios is None else ratios
        return CoverageProfile.from_logprobs(
            -np.abs(ratios), -np.abs(ratios) + ratios, groups=self.groups, weights=self.weights, kind="density"
        )


def rows_of(seed=0, size=40, prompts=12):
    rng = np.random.default_rng(seed)
    groups = [f"prompt {code}" for code in rng.integers(prompts, size=size)]
    return Rows(rng.exponential(2, size), rng.exponential(1.5, size), groups, rng.integers(1, 4, size).astype(float))


def mean(values):
    return lambda rows: statistics.clustered_mean(values(rows), groups=rows.groups, weights=rows.weights)


def of_profile(profile):
    budget = profile.best_of_n_budget(0.3)
    found = (
        profile.cov(N),
        *profile.interval(N),
        profile.miss(N),
        *profile.miss_interval(N),
        profile.kl,
        profile.kl_standard_error,
        profile.cross_entropy,
    )
    return *found, profile.n_for(0.2), profile.num_groups, *budget, *profile.metrics([N]).values()


def cells(table):
    return [cell for row in table.rows for cell in row if isinstance(cell, (float, tuple))]


WEIGHTED = {
    "clustered_mean": mean(lambda rows: rows.a),
    "mean_interval": lambda rows: statistics.mean_interval(mean(lambda rows: rows.a)(rows)),
    "bounded_mean_interval": lambda rows: statistics.bounded_mean_interval(
        np.exp(-rows.a), groups=rows.groups, weights=rows.weights
    ),
    "proportion_interval": lambda rows: statistics.proportion_interval(
        rows.a > 1, groups=rows.groups, weights=rows.weights
    ),
    "proportion_interval, no groups": lambda rows: statistics.proportion_interval(rows.a > 1, weights=rows.weights),
    "coverage": lambda rows: coverage(rows.a, [1, N, 16], weights=rows.weights),
    "coverage_interval": lambda rows: coverage_interval(rows.a, N, groups=rows.groups, weights=rows.weights),
    "bounded_mean_upper_bound": lambda rows: statistics.bounded_mean_upper_bound(
        np.exp(-rows.a), groups=rows.groups, weights=rows.weights
    ),
    "miss": lambda rows: miss(rows.a, [1, N, 16], weights=rows.weights),
    "miss_interval": lambda rows: miss_interval(rows.a, N, groups=rows.groups, weights=rows.weights),
    "miss_upper_bound": lambda rows: miss_upper_bound(rows.a, N, groups=rows.groups, weights=rows.weights),
    "sample_budget": lambda rows: sample_budget(rows.a, 0.4, groups=rows.groups, weights=rows.weights),
    "smallest_n": lambda rows: [smallest_n(rows.a, eps, weights=rows.weights) for eps in (0.0, 0.2, 1.0)],
    "stopped_kl": lambda rows: stopped_kl([[value] for value in rows.a], N, weights=rows.weights),
    "squared_hellinger": lambda rows: bounds.squared_hellinger(rows.a, weights=rows.weights),
    "largest_coverage_rate": lambda rows: bounds.largest_coverage_rate(rows.a, weights=rows.weights),
    "best_of_n_regret_floor": lambda rows: bounds.best_of_n_regret_floor(rows.a, N, weights=rows.weights),
    "best_of_n_budget": lambda rows: bounds.best_of_n_budget(rows.a, 0.3, weights=rows.weights),
    "exact_pass_at_n": lambda rows: bounds.exact_pass_at_n(-rows.a, N, weights=rows.weights),
    "least_regret_bound": lambda rows: bounds.least_regret_bound(rows.a, N, weights=rows.weights),
    "paired_coverage_difference": lambda rows: paired.paired_coverage_difference(
        rows.a, rows.b, N, groups=rows.groups, weights=rows.weights
    ),
    "paired_miss_difference": lambda rows: paired.paired_miss_difference(
        rows.a, rows.b, N, groups=rows.groups, weights=rows.weights
    ),
    "paired_loss_difference": lambda rows: paired.paired_loss_difference(
        np.exp(-rows.a), np.exp(-rows.b), groups=rows.groups, weights=rows.weights
    ),
    "paired_kl_difference": lambda rows: paired.paired_kl_difference(
        rows.a, rows.b, groups=rows.groups, weights=rows.weights
    ),
    "rank_correlations": lambda rows: _correlations(rows, rows.weights),
    "CoverageProfile": lambda rows: of_profile(rows.profile()),
    "paired_differences": lambda rows: paired_differences(rows.profile(), rows.profile(rows.b), [N]),
    "comparison_table": lambda rows: cells(comparison_table(rows.profile(), [rows.profile(rows.b)], [N])),
    "profile_table": lambda rows: cells(profile_table([rows.profile()], [N])),
}
"""All that take weights."""

GROUPED = WEIGHTED | {
    "hold_tournament": lambda rows: _standing(hold_tournament([-rows.a, -rows.b], N, groups=rows.groups)[0]),
    "offset tournament": lambda rows: _standing(
        hold_tournament([-rows.a, -rows.b], N, on_policy=[OnPolicy([-rows.a, -rows.b], rows.groups)] * 2)[0]
    ),
    "challenge_rates": lambda rows: challenge_rates([-rows.a, -rows.b], N),
    "race": lambda rows: race([-rows.a, -rows.b], N).survivors,
    "decide": lambda rows: _decided(decide([np.exp(-rows.a), np.exp(-rows.b)], groups=rows.groups)),
    "choose": lambda rows: list(choose({"a": -rows.a, "b": -rows.b}, N, groups=rows.groups).losses.values()),
    "hold_soft_tournament": lambda rows: _standing(hold_soft_tournament([-rows.a, -rows.b], N, groups=rows.groups)[0]),
    "update_watch": lambda rows: _watched(rows),
    "coverage, evaluate": lambda rows: Coverage()._compute(-rows.a, np.zeros(len(rows.a)), [N], rows.groups),
    "comparison, evaluate": lambda rows: CoverageComparison()._compute(
        -rows.a, -rows.b, np.zeros(len(rows.a)), [N], rows.groups
    ),
}
"""All that take groups."""


def _correlations(rows, weights):
    guides = {"KL": np.stack([rows.a, rows.b, rows.a + rows.b])}
    outcomes = {"Pass@2": np.exp(-np.stack([rows.b, rows.a, rows.a * rows.b]))}
    found = rank_correlations(guides, outcomes, groups=rows.groups, weights=weights, replicates=20)
    return found.values, found.guide_values, found.outcome_values, found.num_prompts


def _standing(standing):
    return standing.scores, standing.mean_challenges, standing.cross_entropies, standing.ranking, standing.num_groups


def _decided(decision):
    return decision.pick, decision.losses, decision.within, decision.left


def _watched(rows):
    state, _ = update_watch(WatchState(), step=1, log_ratios=rows.a, cross_entropy=9.0, n=N, groups=rows.groups)
    state, worsening = update_watch(state, step=2, log_ratios=rows.b, cross_entropy=8.0, n=N, groups=rows.groups)
    return state.best.miss, state.warned, () if worsening is None else worsening.test


def numbers(value):
    """All numbers in what a statistic gave, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if value is None:
        return []
    if isinstance(value, (tuple, list)):
        return [number for part in value for number in numbers(part)]
    return [] if isinstance(value, str) else np.asarray(value, dtype=float).ravel().tolist()


def assert_same(found, expected, **tolerance):
    assert numbers(found) == pytest.approx(numbers(expected), nan_ok=True, **({"rel": 1e-7, "abs": 1e-9} | tolerance))


@pytest.mark.parametrize("name", WEIGHTED)
def test_rows_of_weight_0_are_not_there(name):
    rows = rows_of()
    ghosts = Rows(
        np.array([50.0, 0.0, math.inf, 3.0]),
        np.array([0.0, 50.0, 1.0, 3.0]),
        ["ghost 1", "ghost 2", "ghost 1", rows.groups[0]],
        np.zeros(4),
    )
    if name == "rank_correlations":
        ghosts = ghosts._replace(a=np.array([50.0, 0.0, 60.0, 3.0]))
    elif "rofile" in name or "table" in name or name == "paired_differences":
        ghosts = ghosts._replace(a=np.array([50.0, 0.0, 80.0, 3.0]))
    both = Rows(
        np.append(rows.a, ghosts.a),
        np.append(rows.b, ghosts.b),
        rows.groups + ghosts.groups,
        np.append(rows.weights, ghosts.weights),
    )
    assert_same(WEIGHTED[name](both), WEIGHTED[name](rows))


@pytest.mark.parametrize("name", GROUPED)
def test_the_order_of_rows_does_not_matter(name):
    rows = rows_of()
    assert_same(GROUPED[name](rows.of(np.random.default_rng(1).permutation(len(rows.a)))), GROUPED[name](rows))


LABELS = {
    "strings": str,
    "integers": int,
    "numpy integers": np.int64,
    "small numpy integers": np.uint8,
    "numpy floats": np.float32,
    "numpy strings": lambda code: np.str_(f"p{code}"),
    "truth values of numpy's": lambda code: (np.bool_(code % 2 == 0), code),
    "tuples": lambda code: ("prompt", code),
    "arrays": lambda code: np.array([1, code]),
    "tensors": lambda code: torch.tensor([1, code]),
    "messages": lambda code: [{"role": "user", "content": str(code)}],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", ["CoverageProfile", "paired_coverage_difference", "hold_tournament", "update_watch"])
def test_the_names_of_groups_do_not_matter(name, labels):
    rows = rows_of()
    renamed = rows._replace(groups=[LABELS[labels](int(label.split()[1])) for label in rows.groups])
    assert_same(GROUPED[name](renamed), GROUPED[name](rows))


def test_a_label_of_numpy_s_is_python_s():
    given = [1, "a", [1, 2], 0.5, True, [1, 2]]
    same = [np.int32(1), np.str_("a"), np.array([1, 2]), np.float32(0.5), np.bool_(True), torch.tensor([1, 2])]
    assert statistics.group_codes(given).tolist() == statistics.group_codes(same).tolist()
    with pytest.raises(TypeError, match=r"`groups` must hold strings, numbers.*row 1 is \{1\}: a set is no label"):
        statistics.group_codes([1, {1}])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in WEIGHTED
        if not name.startswith(("paired_cov", "paired_diff", "paired_loss", "paired_miss", "comp"))
    ],
)
def test_a_row_of_weight_2_is_two_rows_of_its_group(name):
    rows = rows_of()
    if name == "proportion_interval, no groups":
        pytest.skip("without groups two rows are two prompts")
    twice = rows.of(np.repeat(np.arange(len(rows.a)), rows.weights.astype(int)))
    assert_same(WEIGHTED[name](twice._replace(weights=np.ones(len(twice.a)))), WEIGHTED[name](rows))


DEGENERATE = {
    "one row": rows_of().of([0]),
    "one group": rows_of()._replace(groups=["the same"] * 40),
    "all equal": rows_of()._replace(a=np.full(40, 2.0), b=np.full(40, 1.0)),
    "all equal, one group": rows_of()._replace(a=np.full(40, 2.0), b=np.full(40, 1.0), groups=["the same"] * 40),
    "nothing in reach": rows_of()._replace(a=np.full(40, math.inf), b=np.full(40, math.inf)),
    "one model without a chance": rows_of()._replace(a=np.full(40, math.inf)),
    "two groups, all equal": rows_of()._replace(a=np.full(40, 2.0), groups=[k % 2 for k in range(40)]),
}


@pytest.mark.parametrize("data", DEGENERATE)
@pytest.mark.parametrize("name", GROUPED)
def test_degenerate_rows_have_an_answer(name, data):
    rows = DEGENERATE[data]
    if not np.isfinite(rows.a).all() and name in ("stopped_kl", "rank_correlations"):
        rows = rows._replace(a=np.full(len(rows.a), 1e3), b=np.where(np.isfinite(rows.b), rows.b, 1e3))
    if not np.isfinite(rows.a).all() and ("rofile" in name or "table" in name or name == "paired_differences"):
        made = [CoverageProfile.from_log_ratios(r, groups=rows.groups, weights=rows.weights) for r in (rows.a, rows.b)]
        _ = made[0].metrics([N]), profile_table(made, [N]), comparison_table(made[0], made[1:], [N])
        return
    if name == "offset tournament" and not np.isfinite(rows.a).all():
        return  # what has probability 0 under its own model is refused
    numbers(GROUPED[name](rows))


@pytest.mark.parametrize("data", ["one row", "one group", "all equal, one group"])
def test_one_group_is_no_certainty(data):
    rows = DEGENERATE[data]
    assert WEIGHTED["coverage_interval"](rows) == WEIGHTED["proportion_interval"](rows) == (0.0, 1.0)
    assert coverage_interval(rows.a[:1], N) == (0.0, 1.0)
    assert all(map(math.isnan, WEIGHTED["mean_interval"](rows)))
    test = WEIGHTED["paired_coverage_difference"](rows)
    assert test.difference == pytest.approx(
        float(rows.weights @ ((rows.a > math.log(N)) * 1.0 - (rows.b > math.log(N)))) / rows.weights.sum()
    )
    assert (test.low, test.high) == (-1.0, 1.0)
    assert math.isnan(test.p_value)
    assert all(map(math.isnan, WEIGHTED["paired_kl_difference"](rows)[1:]))
    assert hold_tournament([-rows.a, -rows.b], N, groups=rows.groups)[0].win_rates is None
    assert "wins" not in tournament({1: -rows.a, 2: -rows.b}, N, groups=rows.groups).sentence.split("Tied")[0][8:]


def test_groups_that_are_all_alike_are_no_certainty():
    rows = DEGENERATE["all equal"]
    estimate = mean(lambda rows: rows.a)(rows)
    assert all(map(math.isnan, statistics.mean_interval(estimate)))
    assert all(map(math.isnan, statistics.mean_interval(replace_error(estimate, 1e-17))))
    assert all(map(math.isnan, WEIGHTED["paired_kl_difference"](rows)[1:]))
    test = WEIGHTED["paired_coverage_difference"](rows._replace(a=np.full(40, 1.0)))
    assert test.low < 0 < test.high


def replace_error(estimate, error):
    return estimate._replace(standard_error=error)


def test_one_group_does_not_end_a_training():
    rows = rows_of()
    state, found = WatchState(), []
    for step, ratios in enumerate((rows.a, rows.a + 9)):
        state, worsening = update_watch(
            state, step=np.int64(step), log_ratios=ratios, cross_entropy=np.float32(9 - step), n=N, groups=["x"] * 40
        )
        found.append(worsening)
    assert found == [None, None]
    assert type(state.best.step) is int
    assert type(state.best.cross_entropy) is float


def test_a_watch_sees_that_a_row_came_or_went():
    rows = rows_of()
    state, _ = update_watch(WatchState(), step=0, log_ratios=rows.a, cross_entropy=9.0, n=N)
    for ratios in (rows.a[:-1] + 1, np.append(rows.a, 0.0) + 1):
        with pytest.raises(ValueError, match=f"same rows at every evaluation, but now has {len(ratios)}"):
            update_watch(state, step=1, log_ratios=ratios, cross_entropy=8.0, n=N)


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_intervals_rise_with_every_hit_and_fall_in_n(prompts, seed, weighted, grouped):
    rng = np.random.default_rng(seed)
    size = prompts * int(rng.integers(1, 5))
    groups = rng.integers(prompts, size=size).tolist() if grouped else None
    weights = rng.lognormal(size=size) if weighted else None
    hits, last = np.zeros(size, bool), (0.0, 0.0)
    ratios = np.zeros(size)
    for count, row in enumerate(rng.permutation(size)[:6]):
        hits[row], ratios[row] = True, math.log(100.0 - count)
        low, high = statistics.proportion_interval(hits, groups=groups, weights=weights)
        assert low >= last[0] - 1e-8
        assert high >= last[1] - 1e-8
        last = low, high
    ends = np.array([coverage_interval(ratios, n, groups=groups, weights=weights) for n in (1, 95, 97, 99)])
    assert (np.diff(ends, axis=0) <= 1e-8).all()


def test_a_hit_among_rows_of_one_prompt_does_not_lower_the_upper_end():
    groups = np.arange(96) // 4
    none, one = (statistics.proportion_interval(np.arange(96) < hits, groups=groups) for hits in (0, 1))
    assert none[1] == pytest.approx(1 - 0.025 ** (1 / 24))
    assert one[1] > none[1]


def test_pass_at_n_rises_with_its_interval():
    result = BestOfNResult.from_rewards(np.eye(24, 4))
    ends = np.array([(result.pass_at(n), *result.interval(n)) for n in (1, 2, 3, 4)])
    assert (np.diff(ends, axis=0) >= -1e-9).all()


def test_the_interval_is_the_quantile_of_its_random_mean():
    rng = np.random.default_rng(0)
    values, weights = rng.random(30) ** 3, rng.lognormal(size=30)
    drawn = rng.exponential(size=(100_000, 31)) * np.append(weights, weights @ weights / weights.sum())
    low, high = statistics.bounded_mean_interval(values, weights=weights)
    for end, extra, quantile in ((low, 0.0, 0.025), (high, 1.0, 0.975)):
        means = drawn @ np.append(values, extra) / drawn.sum(1)
        assert (means <= end).mean() == pytest.approx(quantile, abs=0.002)


def test_many_different_weights_are_taken_together_without_harm(monkeypatch):
    rng = np.random.default_rng(0)
    hits, weights = rng.random(4000) < 0.1, rng.lognormal(sigma=2, size=4000)
    together = statistics.proportion_interval(hits, weights=weights)
    monkeypatch.setattr(statistics, "_ENDS", {})
    monkeypatch.setattr(statistics, "_DISTINCT", 4001)
    assert together == pytest.approx(statistics.proportion_interval(hits, weights=weights), abs=1e-5)


LEVELS = [*range(2, 65), 1.5, 2.5, 5.7, 4.6, 10.1, 33.3, math.e, math.pi]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.3, 1e-3, 1e-8])
def test_a_ratio_of_exactly_n_is_reached(density, dtype):
    known, half = np.log(np.full(2, density, dtype)), np.float64(0.5)
    for n in LEVELS:
        model = np.log(np.array([density / n, density / (n * 0.9999)], dtype))
        ratios = log_ratios(known, model)
        profile = CoverageProfile.from_logprobs(model, known)
        found = [coverage(ratios, n), profile.cov(n), profile.metrics([n])[f"cov_{n:.12g}"]]
        found += [reached(ratios, n).mean(), coverage(ratios, [n])[0]]
        found += [challenge_rates([known, model], n)[0, 1]]
        found += [Coverage()._compute(model.tolist(), known.tolist(), n)[f"cov_{n:.12g}"]]
        assert found == [half] * len(found), n
        assert n * (1 - 1e-5) < smallest_n(ratios[:1], 0.5) <= n * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_of_exactly_log_n_stops_after_it(dtype):
    for n in LEVELS:
        token_kl = torch.tensor([[math.log(n), 0.0, 0.1]], dtype=dtype)
        found = distillation_weights(token_kl, torch.ones(1, 3, dtype=torch.bool), n)
        assert found[0, 0].item() == pytest.approx(1.0, abs=1e-6)
        assert found[0, 1].item() == 1.0
        assert found[0, 2].item() == pytest.approx(0.0, abs=3e-5)


def test_the_rounding_of_a_divergence_is_no_divergence():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert distillation_weights(torch.tensor([[-1e-9, 0.5, -1e-7]]), mask, 8.0).tolist() == [[1.0, 1.0, 1.0]]
    assert distillation_weights(torch.tensor([[0.1, -0.5, 0.1]]), mask, 8.0).isnan()[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-25, 1e-3, 1.0, 1e25, 1e30])
def test_norms_are_right_at_every_size(size, dtype):
    if dtype == torch.bfloat16 and size == 1e-40:
        return
    tensors = [torch.full((5,), size, dtype=dtype), torch.full((2, 2), -size, dtype=dtype)]
    true = float(tensors[0][0].double().abs()) * 3
    assert float(gradients.global_norm(tensors)) == pytest.approx(true, rel=1e-5)
    assert gradients.tensor_norms(tensors).tolist() == pytest.approx([true / 3 * math.sqrt(5), true / 3 * 2], rel=1e-4)
    assert row_steps.row_norms([tensors[1]]).tolist() == pytest.approx([true / 3 * math.sqrt(2)] * 2, rel=1e-4)
    assert float(gradients.stable_norm(torch.tensor([size, size], dtype=torch.float64))) == pytest.approx(
        size * math.sqrt(2)
    )
    if dtype != torch.bfloat16 and size > 1e-35:
        gradients.normalize_(tensors, lam=0.0)
        assert torch.cat([tensor.flatten() for tensor in tensors]).norm().item() == pytest.approx(1.0, rel=1e-5)
        point = [torch.full((4,), size, dtype=dtype)]
        gradients.project_(point, radius=size)
        assert float(gradients.global_norm(point)) == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_norms_of_what_is_not_finite_are_not_finite(odd):
    assert not gradients.global_norm([torch.tensor([1.0, odd]), torch.ones(2)]).isfinite()
    assert gradients.global_norm([torch.zeros(3), torch.zeros(0)]) == 0


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 1))
def test_n_never_leaves_the_ends_of_its_schedule(first, last, progress):
    assert min(first, last) <= log_linear_n(first, last)(progress) <= max(first, last)
    assert log_linear_n(3.0, 1.0)(1.0) == 1.0


def test_ties_of_an_offset_tournament_are_broken_by_the_challenges_alone():
    """Two candidates with the score 0; the one with fewer challenges has the larger mean once the offset is off."""
    logprobs = [
        np.array(row) for row in ([-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -9.0, -1.0], [-1.0, -9.0, -9.0, -1.0])
    ]
    own = [OnPolicy([np.array([-1.0]), np.array([-1.0]), np.array([-1.0])]) for _ in range(3)]
    own[2] = OnPolicy([np.array([-1.0]), np.array([-1.0]), np.array([-9.0])])
    (standing,) = hold_tournament(logprobs, N, on_policy=own, gamma=4.0)
    assert standing.scores[2] == 0 == standing.scores[0]
    assert standing.mean_challenges.tolist() == pytest.approx([0, 0.125, 0.375])
    assert standing.ranking[0] == 0
    np.testing.assert_allclose(standing.mean_challenges, standing.rates.sum(0) / 2)


def test_names_may_be_numbers_and_must_differ():
    rows = rows_of()
    own = {m: {k: [-1.0, -2.0] for k in (500, 1000)} for m in (500, 1000)}
    result = tournament({500: -rows.a, 1000: -rows.b}, N, on_policy=own, on_policy_groups={500: iter(["a", "b"])})
    assert set(result.scores) == {"500", "1000"}
    with pytest.raises(ValueError, match="must have different names"):
        tournament({1: -rows.a, "1": -rows.b}, N)
    profiles = [CoverageProfile.from_log_ratios(values, name=step) for step, values in enumerate((rows.a, rows.b))]
    assert [profile.name for profile in profiles] == ["0", "1"]
    assert set(coverage_results(profiles, [N])["results"]) == {"0", "1"}
    assert CoverageProfile.from_json(profiles[1].to_json()).name == "1"
    assert "1 (" in summarize_profiles(profiles, [N])[0]
    with pytest.raises(ValueError, match="`guides` must have different names"):
        rank_correlations({1: np.eye(3), "1": np.eye(3)}, {"a": np.eye(3)})
    found = predictiveness([*profiles, profiles[0]], {8: np.eye(3, 40)}, [N], bootstrap=0)
    assert found.correlations.outcomes == ("8",)


def test_numbers_of_numpy_s_go_into_json(tmp_path):
    facts = {"a": np.float32(0.5), "b": np.int64(2), np.int64(3): np.bool_(True), "d": np.float32("nan")}
    assert strict_json(facts).split() == strict_json({"a": 0.5, "b": 2, 3: True, "d": None}).split()
    profile = CoverageProfile.from_log_ratios(np.float32([0.0, 3.0]), name=np.str_("a"))
    results = coverage_results([profile], np.array([2, 4]), config={"lr": np.float32(0.5), "steps": np.arange(2)})
    assert '"lr": 0.5' in write_results(tmp_path, results).read_text()
