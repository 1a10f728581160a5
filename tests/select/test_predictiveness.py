"""Predictiveness over profiles: the right tables reach the rank correlations, and what is said of them is true."""

import json

import numpy as np
import pytest

from hf_coverage import CoverageProfile, predictiveness
from hf_coverage.functional.predictiveness import rank_correlations
from hf_coverage.functional.statistics import group_codes


def table(seed=0, shape=(6, 40)):
    return -np.random.default_rng(seed).gamma(1.0, size=shape) - 0.1 * np.arange(shape[0])[:, None]


def make(logprobs, reference=0.0, **arguments):
    reference = None if reference is None else np.full(logprobs.shape[1], reference)
    return [
        CoverageProfile.from_logprobs(row, reference, name=f"step-{place}", **arguments)
        for place, row in enumerate(logprobs)
    ]


def test_guides_and_exact_passes_are_what_they_are_by_definition():
    logprobs, weights = table(), np.arange(40)
    groups = [f"prompt {row // 2}" for row in range(40)]
    result = predictiveness(make(logprobs, groups=groups, weights=weights), [4, 12], n=[2, 5.7], seed=4)
    guides = {"cross-entropy": -logprobs, "KL": -logprobs}
    guides |= {f"Cov_{n}": -logprobs >= np.log(n) for n in (2, 5.7)}
    guides |= {f"miss_{n}": (1 - np.exp(logprobs)) ** n for n in (2, 5.7)}
    passes = {f"Pass@{n}": 1 - (1 - np.exp(logprobs)) ** n for n in (4, 12)}
    expected = rank_correlations(guides, passes, groups=groups, weights=weights, seed=4)
    found = result.correlations
    assert found.guides == ("cross-entropy", "KL", "Cov_2", "Cov_5.7", "miss_2", "miss_5.7")
    assert found.outcomes == ("Pass@4", "Pass@12")
    for name in ("values", "low", "high", "guide_values", "outcome_values"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name
    assert result.names == tuple(f"step-{place}" for place in range(6))
    assert len(result.rows) == 12
    assert result.rows[3] == {
        "guide": "KL",
        "outcome": "Pass@12",
        "rank_correlation": found.values[1, 1],
        "low": found.low[1, 1],
        "high": found.high[1, 1],
    }


@pytest.mark.parametrize(
    ("profiles", "guides"),
    [
        (make(table(), -0.1), ("cross-entropy", "KL", "Cov_2", "miss_2")),
        (make(table(), None), ("cross-entropy", "upper bound on Cov_2", "upper bound on miss_2")),
        (make(table(), -0.1, kind="answer"), ("cross-entropy", "KL", "answer-level Cov_2", "answer-level miss_2")),
        ([CoverageProfile.from_log_ratios(-row) for row in table()], ("KL", "Cov_2", "miss_2")),
    ],
    ids=["density", "samples", "answer", "ratios"],
)
def test_a_profile_gives_the_guides_it_knows(profiles, guides):
    result = predictiveness(profiles, {"reward": np.exp(table())}, n=[2], bootstrap=20)
    assert result.correlations.guides == guides
    figure = result.plot()
    assert figure.axes[1].get_xlabel().startswith(f"{'KL' if 'KL' in guides else 'cross-entropy'} in nats")
    assert figure.axes[0].get_xlabel() == guides[-2].replace("Cov_2", "Cov$_{2}$") + " (lower is better)"


def test_outcomes_of_the_same_prompts_are_drawn_with_them():
    prompts = [f"prompt {row}" for row in range(40)]
    logprobs = table()
    order = np.random.default_rng(1).permutation(40)
    profiles = make(logprobs, groups=prompts)
    outcomes = {"Pass@4": 1 - (1 - np.exp(logprobs)) ** 4}
    shuffled = {"Pass@4": outcomes["Pass@4"][:, order]}
    same = predictiveness(profiles, shuffled, n=[2], outcome_groups=[prompts[row] for row in order])
    assert same.correlations.low == pytest.approx(predictiveness(profiles, outcomes, n=[2]).correlations.low)
    assert same.correlations.num_prompts == 40
    others = predictiveness(profiles, shuffled, n=[2], outcome_groups=[f"other {row}" for row in order])
    assert others.correlations.num_prompts == 80
    codes = group_codes([prompts[row] for row in order])
    coded = predictiveness(profiles, shuffled, n=[2], outcome_groups=codes)
    assert coded.correlations.low == pytest.approx(same.correlations.low)


def test_the_figure_shows_the_correlations_beside_the_nearest_coverage(tmp_path):
    result = predictiveness(make(table()), {"Pass@16": np.exp(table(1)), "reward": np.exp(table(2))}, n=[2, 9, 64])
    figure = result.plot(tmp_path / "right.png", title="A run")
    (half, largest), found = figure.axes[:2], result.correlations
    assert half.get_xlabel().startswith("Cov$_{9}$")
    assert largest.get_xlabel().startswith("Cov$_{64}$")
    by_name = {row["guide"]: row for row in result.rows if row["outcome"] == "Pass@16"}

    def shown(guide):
        row = by_name[guide]
        return f"{row['rank_correlation']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"

    assert half.get_title().splitlines() == [
        "rank correlation with Pass@16",
        f"Cov$_{{9}}$: {shown('Cov_9')}",
        f"KL: {shown('KL')}",
    ]
    assert np.array_equal(
        half.lines[0].get_xydata(), np.column_stack([found.guide_values[3], found.outcome_values[0]])
    )
    assert (tmp_path / "right.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_said(tmp_path):
    logprobs = np.log([[0.2] * 4, [0.5, 0.5, 0.5, 0.06], [0.95, 0.95, 0.95, 0.01]])
    result = predictiveness(make(logprobs), [64], n=[32, 1000])
    assert "KL +1.00 [" in result.sentence
    assert "Cov_1000 none (no order)" in result.sentence
    assert "The same at all checkpoints, which is no order: Cov_1000." in result.sentence
    assert "miss_32 -" in result.sentence
    assert "the range of a bootstrap over the 4 prompts" in result.sentence
    assert "%" not in result.sentence
    assert "It is no confidence interval" in result.sentence
    data = json.loads(result.to_json(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == data
    assert data["checkpoints"] == ["step-0", "step-1", "step-2"]
    assert data["guides"]["KL"] == pytest.approx(list(-logprobs.mean(1)))
    last = next(row for row in data["rank_correlations"] if row["guide"] == "Cov_1000")
    assert (last["guide"], last["rank_correlation"], last["low"]) == ("Cov_1000", None, None)


@pytest.mark.parametrize(
    ("profiles", "outcomes", "arguments", "message"),
    [
        ([], [4], {}, "`profiles` must hold one profile for each checkpoint"),
        (make(table()), [4], {"n": []}, "`n` must hold at least one N"),
        (make(table())[:2], [4], {}, "at least 3"),
        (make(table(), -0.1), [4], {}, "only where one answer to each prompt is right, .* kind 'density'"),
        (
            [*make(table()), *make(table(), -0.1)[:1]],
            [4],
            {},
            "`kind` of profile 6 .'step-0'. is not that of profile 0",
        ),
        ([*make(table()), *make(table(shape=(1, 39)))], [4], {}, "`num_rows` of profile 6"),
        ([*make(table()), *make(table(), groups=["a"] * 40)], [4], {}, "`groups` of profile 6"),
        ([*make(table()), *make(table(), weights=[2] * 40)], [4], {}, "`weights` of profile 6"),
        (
            [*make(table(), -0.1), CoverageProfile.from_log_ratios(-table()[0])],
            {"reward": np.exp(table(shape=(7, 40)))},
            {},
            "all by `from_log_ratios`, but profile 6",
        ),
    ],
)
def test_what_is_refused(profiles, outcomes, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictiveness(profiles, outcomes, **arguments)
