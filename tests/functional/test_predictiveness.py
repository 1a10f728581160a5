"""Rank correlations over checkpoints, against slow loops, closed cases and a simulated run whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_coverage.functional import predictiveness
from hf_coverage.functional.predictiveness import rank_correlations


def spearman(first, second):
    """Spearman's correlation by its definition: Pearson's, of ranks that equal values share."""

    def ranks(values):
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    a, b = ranks(list(first)), ranks(list(second))
    mean = (len(a) + 1) / 2
    product = sum((x - mean) * (y - mean) for x, y in zip(a, b))
    lengths = [sum((x - mean) ** 2 for x in side) for side in (a, b)]
    return product / (lengths[0] * lengths[1]) ** 0.5


def rising(num_checkpoints=5, num_rows=40, seed=0):
    """Log p of a right answer that grows at every checkpoint and on every row."""
    base = np.random.default_rng(seed).uniform(-3, -2, size=num_rows)
    return base + 0.3 * np.arange(num_checkpoints)[:, None]


def test_values_are_spearmans_of_weighted_means():
    rng = np.random.default_rng(0)
    guides = {"a": rng.integers(0, 3, size=(7, 12)), "b": rng.normal(size=(7, 12))}
    outcomes = {"c": rng.integers(0, 2, size=(7, 12)), "d": rng.normal(size=(7, 12))}
    weights = rng.integers(0, 3, size=12)
    found = rank_correlations(guides, outcomes, weights=weights)
    for k, guide in enumerate(guides.values()):
        for j, outcome in enumerate(outcomes.values()):
            means = [
                [sum(w * v for w, v in zip(weights, row)) / sum(weights) for row in table]
                for table in (guide, outcome)
            ]
            assert found.values[k, j] == pytest.approx(spearman(*means))
            assert found.guide_values[k] == pytest.approx(means[0])
            assert found.outcome_values[j] == pytest.approx(means[1])
            assert -1 <= found.low[k, j] <= found.values[k, j] <= found.high[k, j] <= 1


def slow_margin(guide, outcome, prompts, outcome_prompts, replicates, seed, confidence):
    """The interval's half width by drawing prompts one resample at a time, each a row of weights."""
    kinds = [
        sorted(set(prompts) & set(outcome_prompts)),
        sorted(set(prompts) - set(outcome_prompts)),
        sorted(set(outcome_prompts) - set(prompts)),
    ]
    rng = np.random.default_rng(seed)
    times = np.zeros((replicates, 1 + max(*prompts, *outcome_prompts)))
    for kind in kinds:
        if kind:
            times[:, kind] = rng.multinomial(len(kind), np.full(len(kind), 1 / len(kind)), size=replicates)

    def value(drawn):
        means = [
            [sum(drawn[p] * v for p, v in zip(ps, row)) / sum(drawn[p] for p in ps) for row in table]
            for table, ps in ((guide, prompts), (outcome, outcome_prompts))
        ]
        means = np.round(means, 12)
        return 0.0 if len(set(means[0])) == 1 or len(set(means[1])) == 1 else spearman(*means)

    center = value(np.ones(times.shape[1]))
    return np.quantile([abs(value(drawn) - center) for drawn in times], confidence)


@pytest.mark.parametrize(
    ("prompts", "outcome_prompts"),
    [([0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 3, 3]), ([0, 0, 1, 2], [3, 4, 5]), ([0, 1, 1, 2], [2, 1, 3, 3])],
    ids=["joint", "apart", "in part"],
)
def test_the_interval_draws_prompts_and_shared_ones_once(prompts, outcome_prompts):
    rng = np.random.default_rng(1)
    guide, outcome = rng.normal(size=(5, len(prompts))), rng.normal(size=(5, len(outcome_prompts)))
    arguments = {"groups": np.array(prompts, np.uint64), "outcome_groups": np.array(outcome_prompts, np.uint64)}
    found = rank_correlations({"g": guide}, {"o": outcome}, replicates=60, confidence=0.8, seed=3, **arguments)
    margin = slow_margin(guide, outcome, prompts, outcome_prompts, 60, 3, 0.8)
    assert found.high[0, 0] == pytest.approx(min(1.0, found.values[0, 0] + margin))
    assert found.low[0, 0] == pytest.approx(max(-1.0, found.values[0, 0] - margin))
    assert found.num_prompts == len({*prompts, *outcome_prompts})


def test_small_and_large_portions_of_resamples_are_as_good(monkeypatch):
    logprobs = rising(4, 30) + np.random.default_rng(0).normal(size=(4, 30))
    given_ = {"KL": -logprobs}, {"Pass@2": 1 - (1 - np.exp(np.minimum(logprobs, 0))) ** 2}
    whole = rank_correlations(*given_)
    monkeypatch.setattr(predictiveness, "_DRAWN", 100)
    assert np.array_equal(rank_correlations(*given_).low, whole.low)


def test_perfect_misleading_and_constant_guides():
    logprobs = rising()
    guides = {"KL": -logprobs, "wrong": logprobs, "Cov_1": -logprobs >= 0, "Cov_9": -logprobs >= np.log(9)}
    found = rank_correlations(guides, {"Pass@2": 1 - (1 - np.exp(logprobs)) ** 2, "none": np.zeros((5, 40))})
    # every checkpoint is better on every prompt, so no draw of prompts can change the order
    assert found.values[:2, 0].tolist() == [-1.0, 1.0]
    assert found.low[:2, 0].tolist() == found.high[:2, 0].tolist() == [-1.0, 1.0]
    assert np.isnan([found.values[2], found.low[2], found.high[2]]).all()
    assert np.isnan([found.values[:, 1], found.low[:, 1], found.high[:, 1]]).all()
    assert found.constant == ("Cov_1", "none")
    assert -1 <= found.values[3, 0] < -0.5


def test_a_response_of_probability_zero_puts_a_checkpoint_last():
    logprobs = rising()
    guide = -logprobs.copy()
    guide[2, 7] = np.inf
    found = rank_correlations({"KL": guide}, {"Pass@2": 1 - (1 - np.exp(logprobs)) ** 2})
    assert found.guide_values[0, 2] == np.inf
    assert found.values[0, 0] == pytest.approx(spearman([5, 4, 6, 2, 1], [1, 2, 3, 4, 5]))
    # drawn without the row in one resample of three, the checkpoint is where it belongs
    assert found.low[0, 0] == -1.0


def test_weights_reach_the_rows_that_are_shared():
    logprobs = rising(4, 6)
    logprobs[:, 0] = -logprobs[:, 0] - 6
    shared = {"Pass": np.exp(logprobs)}
    weights = np.array([0, 1, 1, 1, 1, 1])
    found = rank_correlations({"KL": -logprobs}, shared, weights=weights)
    without = rank_correlations({"KL": -logprobs[:, 1:]}, {"Pass": np.exp(logprobs[:, 1:])})
    assert found.outcome_values == pytest.approx(without.outcome_values)
    assert found.low.tolist() == without.low.tolist()
    assert found.num_prompts == without.num_prompts == 5


def test_one_prompt_has_no_interval():
    found = rank_correlations({"KL": -rising(4, 3)}, {"Pass": np.exp(rising(4, 3))}, groups=["a", "a", "a"])
    assert found.values.tolist() == [[-1.0]]
    assert np.isnan([found.low, found.high]).all()
    assert found.num_prompts == 1


@given(arrays(np.int8, (5, 6), elements=st.integers(0, 4)), arrays(np.int8, (5, 6), elements=st.integers(0, 4)))
@settings(max_examples=60, deadline=None)
def test_laws(guide, outcome):
    def found(g, o, **arguments):
        return rank_correlations({"g": g}, {"o": o}, replicates=0, **arguments).values

    value = found(guide, outcome)
    # only the order of the means counts
    means = outcome.mean(1, keepdims=True)
    assert found(guide, np.exp(means / 4), outcome_groups=["all"]) == pytest.approx(value, nan_ok=True)
    assert found(guide, 100.0 - 3 * outcome) == pytest.approx(-value, nan_ok=True)
    # neither the order of the checkpoints nor that of the rows does
    rng = np.random.default_rng(0)
    checkpoints, rows = rng.permutation(5), rng.permutation(6)
    assert found(guide[checkpoints], outcome[checkpoints]) == pytest.approx(value, nan_ok=True)
    assert found(guide[:, rows], outcome[:, rng.permutation(6)]) == pytest.approx(value, nan_ok=True)
    assert found(outcome, guide) == pytest.approx(value, nan_ok=True)


def simulated_run(rng, num_prompts):
    """A run that learns nine tenths of its prompts at the cost of the others, as the paper's does."""
    time = np.linspace(0, 1, 11)[:, None]
    given_up = rng.random(num_prompts) < 0.1
    logits = np.where(given_up, -3 * np.maximum(0, time - 0.4), 2 * time - 1)
    logits = logits + 0.3 + rng.normal(size=num_prompts) + 0.3 * rng.normal(size=(11, num_prompts))
    return -np.log1p(np.exp(-logits))


@pytest.mark.parametrize("joint", [True, False], ids=["same prompts", "other prompts"])
def test_the_interval_holds_the_truth_as_often_as_it_says(joint):
    def measures(logprobs, others):
        guides = {"KL": -logprobs, "Cov_4": -logprobs >= np.log(4)}
        return guides, {"Pass@8": 1 - (1 - np.exp(others)) ** 8}

    population = simulated_run(np.random.default_rng(1), 300_000)
    truth = rank_correlations(*measures(population, population), replicates=0).values
    rng, held, runs = np.random.default_rng(2), np.zeros(truth.shape), 150
    for _ in range(runs):
        logprobs = simulated_run(rng, 400)
        others = logprobs if joint else simulated_run(rng, 400)
        apart = None if joint else [f"other {row}" for row in range(400)]
        found = rank_correlations(*measures(logprobs, others), outcome_groups=apart, confidence=0.9, replicates=200)
        held += (found.low <= truth) & (truth <= found.high)
    # three standard errors of a share of 150 around 0.9 are 0.07; ranks are discrete, so more is no surprise
    assert (held / runs >= 0.83).all(), held / runs


@pytest.mark.parametrize(
    ("guides", "outcomes", "arguments", "message"),
    [
        ({}, {"o": np.zeros((3, 2))}, {}, "`guides` must hold at least one table"),
        ({"g": np.zeros((3, 2))}, {}, {}, "`outcomes` must hold at least one table"),
        ({"g": np.zeros((2, 4))}, {"o": np.zeros((2, 4))}, {}, "at least 3 of them .* are of 2 and 2"),
        ({"g": np.zeros((4, 4))}, {"o": np.zeros((3, 4))}, {}, "the same checkpoints.* are of 4 and 3"),
        ({"g": np.zeros(3)}, {"o": np.zeros((3, 1))}, {}, r"`guides\['g'\]` must have .* shape \(3,\)"),
        ({"g": np.zeros((3, 2)), "h": np.zeros((3, 3))}, {"o": np.zeros((3, 2))}, {}, r"`guides\['h'\]` .*\(3, 2\)"),
        ({"g": [[0, 1], [0, np.nan], [0, 1]]}, {"o": np.zeros((3, 2))}, {}, "checkpoint 1 has nan in column 1"),
        ({"g": [[0, 1], [0, 1], [-np.inf, 1]]}, {"o": np.zeros((3, 2))}, {}, r"numbers or \+inf, but checkpoint 2"),
        (
            {"g": np.zeros((3, 2))},
            {"o": [[0, 1], [0, np.inf], [0, 1]]},
            {},
            "finite numbers, but checkpoint 1 has inf",
        ),
        ({"g": np.zeros((3, 2))}, {"o": np.zeros((3, 4))}, {}, "4 columns, `guides` 2: give `outcome_groups`"),
        (
            {"g": np.zeros((3, 2))},
            {"o": np.zeros((3, 2))},
            {"groups": "abc"},
            "`groups` must have .* 2 in all.* has 3",
        ),
        ({"g": np.zeros((3, 2))}, {"o": np.zeros((3, 2))}, {"outcome_groups": "a"}, "`outcome_groups` must have one"),
        ({"g": np.zeros((3, 2))}, {"o": np.zeros((3, 2))}, {"confidence": 95}, "`confidence` must lie"),
    ],
)
def test_what_is_refused(guides, outcomes, arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_correlations(guides, outcomes, **arguments)
