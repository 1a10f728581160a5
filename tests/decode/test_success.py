"""Success profiles: unbiased within the samples, honest beyond, and the same after merging, splitting and JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.decode.success import SuccessProfile
from hf_coverage.functional.binomial_mixture import fit_success_law

COUNTS = [0, 0, 0, 1, 2, 9, 16, 16]


def success(**changes):
    return SuccessProfile.from_counts(COUNTS, 16, **changes)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_n_is_unbiased(n):
    p, k = np.array([0.0, 0.03, 0.4, 1.0]), 5
    expected = 0.0
    for c in range(k + 1):
        chance = math.comb(k, c) * p**c * (1 - p) ** (k - c)
        expected = expected + chance * SuccessProfile.from_counts([c], k).pass_at(n)
    np.testing.assert_allclose(expected, 1 - (1 - p) ** n, atol=1e-12)
    assert success().miss(n) == pytest.approx(1 - success().pass_at(n))


def test_intervals_are_around_the_estimate_and_hold_with_few_prompts():
    """20 prompts, 200 draws; of a law with many hopeless prompts."""
    rng = np.random.default_rng(0)
    truth = (1 - (1 - rng.beta(0.05, 1, 400_000)) ** 8).mean()
    held = 0
    for _ in range(200):
        low, high = SuccessProfile.from_counts(rng.binomial(16, rng.beta(0.05, 1, 20)), 16).interval(8)
        held += low <= truth <= high
    assert held >= 0.93 * 200


@pytest.mark.parametrize("model", ["beta-binomial", "scaled beta-binomial", "power law", "any law"])
def test_predictions_grow_with_n_within_their_ranges(model):
    found = [success().predict(n, model=model) for n in (1, 16, 64, 1024, 10**6)]
    values, lows, highs = np.array(found).T
    assert (np.diff(values) >= -1e-9).all()
    assert (np.diff(highs) >= -1e-6).all()
    assert ((lows <= values) & (values <= highs)).all()
    assert success().predict(16).value == pytest.approx(success().pass_at(16))
    # a prompt without success in 16 samples may be hopeless or not
    assert lows[-1] < 0.625
    assert highs[-1] > 0.999


def test_coverage_in_the_verifier_s_eyes_is_the_law_s_below_one_over_n():
    value, low, high = success().cov(4)
    law = fit_success_law(COUNTS, 16, n=4)
    assert value == pytest.approx(law.masses[law.points <= 1 / 4].sum())
    assert low <= value <= high
    values = [success().cov(n).value for n in (1, 2, 8, 64, 4096)]
    assert (np.diff(values) <= 1e-6).all()
    covered = success().cover_at(0.25)
    assert covered.value == pytest.approx(1 - value, abs=1e-6)
    assert covered.low == pytest.approx(1 - high, abs=0.05)


def test_a_signal_sums_to_one_within_the_samples_and_beyond():
    for size in (1, 2, 8, 16, 64):
        signal = success().signal(size)
        assert sum(part.value for part in signal[1:]) == pytest.approx(1, abs=1e-6)
        assert all(0 <= part.low <= part.value <= part.high <= 1 for part in signal[1:])
    within = success().signal(8)
    assert within.all_wrong.value == pytest.approx(1 - success().pass_at(8))
    assert success().signal(1).mixed.value == 0


def test_the_group_size_is_the_least_that_gives_the_signal():
    shares = {size: success().signal(size).mixed.value for size in range(1, 17)}
    for mixed in (0.1, 0.2, 0.3):
        size = success().group_size_for(mixed)
        assert shares[size] >= mixed > shares[size - 1]
    assert SuccessProfile.from_counts([0, 4], 4).group_size_for(0.5) is None
    rare = SuccessProfile.from_counts([1] * 50 + [0] * 50, 16)
    beyond = rare.group_size_for(0.9)
    assert beyond > 16
    assert rare.signal(beyond).mixed.value >= 0.899


def test_posteriors_shrink_towards_the_law_and_intervals_are_of_the_counts():
    posterior = success().posterior()
    assert posterior.mean.shape == (8,)
    assert posterior.mean[0] < 0.03
    assert posterior.low[0] == 0
    assert posterior.high[-1] == 1
    assert (posterior.low <= posterior.high).all()
    assert (np.diff(posterior.mean) >= -1e-12).all()
    flat = SuccessProfile.from_counts([3, 3, 3], 4).posterior()
    np.testing.assert_allclose(flat.mean, 0.75, atol=0.02)


def test_the_mass_of_accepted_responses_bounds_from_below():
    bound = success(accepted_mass=[0.5, *[math.nan] * 6, 1.0])
    assert bound.mass_bound(1) == pytest.approx(1.5 / 8)
    assert bound.mass_bound(2) == pytest.approx(1.75 / 8)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=9), st.integers(1, 8))
def test_a_merge_is_the_whole(rows, cut):
    labels, counts = [label for label, _ in rows], [count for _, count in rows]
    cut = min(cut, len(rows) - 1)
    parts = [
        SuccessProfile.from_counts(counts[part], 5, prompts=labels[part]) for part in (slice(cut), slice(cut, None))
    ]
    merged, whole = parts[0].merge(parts[1]), SuccessProfile.from_counts(counts, 5, prompts=labels)
    assert json.loads(merged.to_json()) == json.loads(whole.to_json())
    assert merged.samples.sum() == 5 * len(rows)


def test_groups_are_profiles_of_their_own():
    found = success().by_group(["easy", "hard"] * 4)
    assert list(found) == ["easy", "hard"]
    assert found["hard"].correct.tolist() == COUNTS[1::2]
    assert list(found["hard"].prompts) == [1, 3, 5, 7]
    mean = np.mean([part.pass_at(4) for part in found.values()])
    assert mean == pytest.approx(success().pass_at(4))


def test_json_keeps_everything(tmp_path):
    whole = success(accepted_mass=[math.nan, *[0.25] * 7], prompts=list("abcdefgh"), adaptive=True, name="m")
    whole.to_json(tmp_path / "success.json")
    again = SuccessProfile.from_json(tmp_path / "success.json")
    assert again.to_json() == whole.to_json()
    assert again.adaptive
    assert math.isnan(again.accepted_mass[0])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"correct": [17] + [0] * 7},
        {"correct": [1.0] + [0] * 7},
        {"samples": [16] * 7},
        {"prompts": [0] * 8},
        {"prompts": [[0]] * 8},
        {"adaptive": 1},
        {"name": None},
        {"accepted_mass": [2] * 8},
        {"accepted_mass": ["a"] * 8},
    ],
)
def test_json_of_something_else_is_refused(change):
    facts = json.loads(success().to_json()) | change
    with pytest.raises(ValueError, match="not a profile written by `to_json`"):
        SuccessProfile.from_json(json.dumps(facts))


def test_what_outcomes_decided_is_not_called_unbiased():
    adaptive = success().merge(SuccessProfile.from_counts([1], 48, prompts=[0]), adaptive=True)
    for call in (lambda: adaptive.pass_at(1), lambda: adaptive.interval(1)):
        with pytest.raises(ValueError, match="nothing is unbiased: see `predict`"):
            call()
    low, high = adaptive.predict(64)[1:]
    assert low < high
    assert adaptive.signal(4).mixed.low <= adaptive.signal(4).mixed.value
    with pytest.raises(ValueError, match="need k samples of every prompt"):
        adaptive.predict(64, model="power law")


def test_more_samples_of_what_had_none_narrow_the_range():
    rng = np.random.default_rng(1)
    p = rng.beta(0.05, 1, 200)
    first = SuccessProfile.from_counts(rng.binomial(16, p), 16)
    plan = first.more_samples(256, budget=6400)
    assert len(plan.prompts) == 50
    assert (first.correct[plan.prompts] == 0).all()
    counts, sizes = [], []
    for prompt in plan.prompts:
        drawn = accepted = 0
        while accepted == 0 and drawn < plan.at_most - 16:
            accepted, drawn = accepted + rng.binomial(plan.batch, p[prompt]), drawn + plan.batch
        counts.append(accepted)
        sizes.append(drawn)
    more = SuccessProfile.from_counts(counts, sizes, prompts=plan.prompts.tolist())
    merged = first.merge(more, adaptive=True)
    before, after = first.predict(256), merged.predict(256)
    assert after.high - after.low < 0.75 * (before.high - before.low)
    assert after.low <= (1 - (1 - p) ** 256).mean() <= after.high


def test_the_figure_has_what_was_sampled_and_what_lies_beyond(tmp_path):
    figure = success(name="m").plot(tmp_path / "success.png")
    sampled, beyond = figure.axes[0].lines
    assert sampled.get_xdata().tolist() == list(range(1, 17))
    assert beyond.get_xdata()[[0, -1]].tolist() == [16, 1024]
    assert sampled.get_ydata()[-1] == pytest.approx(beyond.get_ydata()[0])
    assert (tmp_path / "success.png").stat().st_size > 5000
    assert len(success(adaptive=True).plot(farthest=8).axes[0].lines) == 1


def test_the_sentence_says_what_the_counts_can_and_cannot():
    assert success(name="m").sentence.startswith("m solves 62.5% of 8 prompts with 16 samples each; with 64 it would")
    assert "if success probabilities follow a Beta law" in success().sentence


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: success().pass_at(17), "from 1 to k = 16.*beyond it see `predict`"),
        (lambda: success().pass_at(0), "got 0"),
        (lambda: success().predict(0), "whole number of at least 1, got 0"),
        (lambda: success().predict(1.5), "got 1.5"),
        (lambda: success().predict(float("nan")), "got nan"),
        (lambda: success().predict(float("inf")), "got inf"),
        (lambda: success().predict(64, model="line"), "`model` must be .* got 'line'"),
        (lambda: success().cov(0), "`n` must be"),
        (lambda: success().cover_at(0), r"`tau` must be in \(0, 1\]"),
        (lambda: success().signal(0), "`group_size` must be"),
        (lambda: success().group_size_for(1.0), r"`mixed` must be in \(0, 1\)"),
        (lambda: success().posterior(1.0), "confidence"),
        (lambda: success().more_samples(16, 100), "not beyond the k = 16"),
        (lambda: SuccessProfile.from_counts([1], 1).more_samples(2, 1), "Every prompt has an accepted sample"),
        (lambda: success().by_group(["a"]), "must have 8 labels"),
        (lambda: SuccessProfile.from_counts([1], 2, prompts=[1, 2]), "a label for each of 1 rows"),
        (lambda: SuccessProfile.from_counts([1], 2, prompts=[1.5]), "integers or text, but row 0 is 1.5"),
        (lambda: SuccessProfile.from_counts([1], 2, accepted_mass=[1.5]), "row 0 is 1.5"),
        (lambda: SuccessProfile.from_counts([1], 2, accepted_mass=[0.5, 0.5]), "must have shape"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
