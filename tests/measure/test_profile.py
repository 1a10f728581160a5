import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_coverage.measure.profile import CoverageProfile
from tests import reference

logprobs = st.lists(st.floats(-20, 0) | st.just(-math.inf), min_size=1, max_size=30)


def draw_profile(data, kind="density"):
    model = data.draw(logprobs)
    size = len(model)
    known = data.draw(st.lists(st.floats(-10, -0.1), min_size=size, max_size=size)) if kind == "density" else None
    groups = data.draw(st.lists(st.sampled_from("abcd"), min_size=size, max_size=size))
    weights = data.draw(st.none() | st.lists(st.floats(0.5, 3), min_size=size, max_size=size))
    return CoverageProfile.from_logprobs(model, known, groups=groups, weights=weights)


@given(st.data(), st.sampled_from(["density", "samples"]))
def test_merging_is_exact_and_order_free(data, kind):
    parts = [draw_profile(data, kind) for _ in range(3)]
    forth, back = parts[0] + parts[1] + parts[2], parts[2].merge(parts[0]).merge(parts[1])
    for one, other in zip(forth.metrics([1, 3, 16]).values(), back.metrics([1, 3, 16]).values()):
        assert one == pytest.approx(other, rel=1e-12, nan_ok=True)
    assert forth.interval(3) == pytest.approx(back.interval(3))
    assert forth.num_groups == len({code for part in parts for code in part.groups.tolist()})
    assert forth.n_for(0.3) == back.n_for(0.3)


@given(st.data(), st.sampled_from(["density", "samples"]))
def test_json_keeps_every_bit(data, kind):
    profile = draw_profile(data, kind)
    text = profile.to_json()
    again = CoverageProfile.from_json(text)
    assert again.to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert again.metrics() == pytest.approx(profile.metrics(), nan_ok=True, abs=0, rel=0)
    assert again.kind == profile.kind


def test_json_goes_through_files(tmp_path):
    profile = CoverageProfile.from_logprobs([-1.0, -math.inf], [-1.0, -1.0], name="step 100")
    profile.to_json(tmp_path / "profile.json")
    assert CoverageProfile.from_json(tmp_path / "profile.json").name == "step 100"
    assert CoverageProfile.from_json(str(tmp_path / "profile.json")).kl == math.inf


@pytest.mark.parametrize("text", ["{}", '{"format": 2}', '{"format": 1, "log_ratios": [1.0]}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match="`source` is not a coverage profile"):
        CoverageProfile.from_json(text)


def test_the_kind_follows_from_the_reference():
    assert CoverageProfile.from_logprobs([-1.0], [-0.5]).kind == "density"
    assert CoverageProfile.from_logprobs([-1.0], [0.0]).kind == "single_answer"
    assert CoverageProfile.from_logprobs([-1.0]).kind == "samples"
    assert CoverageProfile.from_logprobs([-1.0], [0.0], kind="answer").quantity == "answer-level Cov_N"
    with pytest.raises(ValueError, match="leave `reference_logprobs` out"):
        CoverageProfile.from_logprobs([-1.0], [-0.5], kind="samples")
    with pytest.raises(ValueError, match="needs `reference_logprobs`"):
        CoverageProfile.from_logprobs([-1.0], kind="density")
    with pytest.raises(ValueError, match="`kind` must be one of density, single_answer, samples, answer"):
        CoverageProfile.from_logprobs([-1.0], [-0.5], kind="exact")


def test_an_upper_bound_never_goes_by_the_name_of_coverage():
    profile = CoverageProfile.from_logprobs([-1.0, -3.0])
    with pytest.raises(ValueError, match=r"`cov_upper\(n\)` gives the upper bound"):
        profile.cov(2)
    with pytest.raises(ValueError, match="`cross_entropy` is its upper bound"):
        _ = profile.kl
    with pytest.raises(ValueError, match=r"`miss_upper\(n\)` gives the upper bound"):
        profile.miss(2)
    assert profile.cov_upper(8) == 0.5
    assert profile.miss_upper(8) == pytest.approx(((1 - math.exp(-1)) ** 8 + (1 - math.exp(-3)) ** 8) / 2)
    assert set(profile.metrics([8])) == {
        "cov_upper_8",
        "cov_upper_8_stderr",
        "miss_upper_8",
        "miss_upper_8_stderr",
        "sequence_cross_entropy",
        "sequence_cross_entropy_stderr",
    }
    assert all("upper bound" in ax.get_ylabel() for ax in profile.plot().axes)
    assert profile.best_of_n_budget(0.2).necessary_n == 1.0


@pytest.mark.parametrize(
    ("kind", "key", "label"),
    [
        ("density", "cov_5.7", "Cov_5.7"),
        ("single_answer", "cov_5.7", "Cov_5.7"),
        ("samples", "cov_upper_5.7", "upper bound on Cov_5.7"),
        ("answer", "cov_5.7", "answer-level Cov_5.7"),
    ],
)
def test_a_profile_names_what_it_knows(kind, key, label):
    reference_logprobs = None if kind == "samples" else [0.0, 0.0]
    profile = CoverageProfile.from_logprobs([-1.0, -3.0], reference_logprobs, kind=kind)
    assert (profile.key(5.7), profile.label(5.7)) == (key, label)
    known = profile.cov_upper if kind == "samples" else profile.cov
    assert profile.level(5.7) == known(5.7) == profile.metrics([5.7])[key] == 0.5
    assert profile.level([2, 64]).tolist() == known([2, 64]).tolist() == [1.0, 0.0]


def test_the_bound_of_a_plain_corpus_lies_above_the_truth():
    rng = np.random.default_rng(0)
    known, model = -rng.exponential(2, size=200), -rng.exponential(3, size=200)
    exact, bound = CoverageProfile.from_logprobs(model, known), CoverageProfile.from_logprobs(model)
    grid = [1, 2, 8, 64]
    assert (exact.cov(grid) <= bound.cov_upper(grid)).all()
    assert (exact.cov_upper(grid) == bound.cov_upper(grid)).all()
    assert exact.n_for(0.1) <= bound.n_for(0.1)
    assert exact.kl <= bound.cross_entropy == pytest.approx(exact.cross_entropy)


def test_profiles_of_an_enumerated_model_equal_the_definitions(tiny_gpt2):
    """Every response of three tokens, weighted by D: sums over V^H instead of samples."""
    _, known, _ = reference.enumerate_responses(tiny_gpt2, [0, 3], 3)
    with_noise = type(tiny_gpt2)(tiny_gpt2.config).eval()
    for parameter in with_noise.parameters():
        parameter.data.mul_(3)
    _, model, _ = reference.enumerate_responses(with_noise, [0, 3], 3)
    d, p = np.exp(known), np.exp(model)
    assert d.sum() == pytest.approx(1)
    profile = CoverageProfile.from_logprobs(model, known, weights=d)
    assert 0 < profile.cov(1.02) < 1
    for n in (1, 1.02, 1.1, 2):
        assert profile.cov(n) == pytest.approx(reference.exact_coverage(d, p, n), abs=1e-12)
    assert profile.kl == pytest.approx(reference.exact_kl(d, p), abs=1e-12)
    assert profile.cross_entropy == pytest.approx(-float(d @ np.log(p)))


def test_repeated_prompts_widen_the_interval():
    ratios = np.repeat([0.0, 5.0, 0.0, 0.0, 0.0], 20)
    rows = CoverageProfile.from_log_ratios(ratios)
    prompts = CoverageProfile.from_log_ratios(ratios, groups=np.repeat(list("abcde"), 20))
    assert (rows.num_groups, prompts.num_groups) == (100, 5)
    assert rows.cov(8) == prompts.cov(8)
    assert prompts.interval(8)[0] < rows.interval(8)[0] < rows.interval(8)[1] < prompts.interval(8)[1]
    assert prompts.kl_standard_error > rows.kl_standard_error


def test_profiles_without_log_probabilities_say_what_they_lack():
    profile = CoverageProfile.from_log_ratios([0.0, 1.0])
    with pytest.raises(ValueError, match="`cross_entropy` needs the model's log-probabilities"):
        _ = profile.cross_entropy
    with pytest.raises(ValueError, match="`cov_upper` needs the model's log-probabilities"):
        profile.cov_upper(2)
    assert "sequence_cross_entropy" not in profile.metrics()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (CoverageProfile.from_logprobs([-1.0], groups=["a"]), "`kind`"),
        (CoverageProfile.from_log_ratios([1.0], groups=["a"]), "log p is known"),
        (CoverageProfile.from_logprobs([-1.0], [-1.0]), "`groups`"),
    ],
)
def test_parts_that_do_not_fit_are_not_merged(other, what):
    with pytest.raises(ValueError, match=f"must agree on .*{what}"):
        CoverageProfile.from_logprobs([-1.0], [-1.0], groups=["a"]).merge(other)


def test_several_models_are_drawn_in_one_picture(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (CoverageProfile.from_log_ratios(rng.normal(m, 2, 200), name=f"model {m}") for m in (1, 2))
    figure = first.plot(tmp_path / "profile.png", others=[second])
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"
    ax, of_miss = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["model 1", "model 2", "one-sided interval"]
    for line, profile in zip(ax.lines, (first, second)):
        n, values = line.get_data()
        assert values.tolist() == profile.cov(n).tolist()
    for line, profile in zip(of_miss.lines, (first, second)):
        n, values = line.get_data()
        assert values.tolist() == profile.miss(n).tolist()
    with pytest.raises(ValueError, match="same quantity"):
        first.plot(others=[CoverageProfile.from_logprobs([-1.0])])


def test_a_curve_has_the_interval_of_each_n(monkeypatch):
    """Found once for all N that the same rows reach."""
    logprobs = [-0.5, -1.0, -2.5, -2.5, -4.0, -7.0, -math.inf, -30.0]
    profile = CoverageProfile.from_logprobs(logprobs, [-1.0] * 8, groups=[0, 0, 1, 2, 2, 3, 4, 4], weights=range(8))
    found, interval = [], CoverageProfile.interval
    monkeypatch.setattr(CoverageProfile, "interval", lambda self, *args: found.append(args) or interval(self, *args))
    for grid in (None, [1e6, 1.0, math.exp(1.5), 4.4, 4.6, 4.5, 1e300]):
        curve = profile.curve(grid, confidence=0.9)
        assert list(zip(curve.low, curve.high)) == [interval(profile, n, 0.9) for n in curve.n]
    assert len(found) < 15


def test_infinite_ratios_are_counted_everywhere_and_drawn():
    profile = CoverageProfile.from_logprobs([-math.inf, -1.0], [-1.0, -1.0])
    assert profile.cov([1, 1e9]).tolist() == [1.0, 0.5]
    assert profile.kl == math.inf
    assert profile.n_for(0.4) == math.inf
    assert np.asarray(profile.curve().value)[-1] == 0.5
