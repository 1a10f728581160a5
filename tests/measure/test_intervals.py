"""Where responses' intervals of arithmetic codes begin, by scoring: against all responses, and what follows of it."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_coverage import CoverageProfile, ScoreTable, choose, score_responses
from hf_coverage.functional.arithmetic_codes import stratified_pass_probabilities
from hf_coverage.functional.bounds import exact_pass_at_n
from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.inference.code_choice import CodeChoice
from hf_coverage.report.results import coverage_results
from hf_coverage.report.summary import pass_table
from tests.decode.best_of_n_runs import build
from tests.decode.test_best_of_n import PROMPTS, peaked

RESPONSES = [list(response) for response in itertools.product(range(11), repeat=2)]


def score(model, corpus, **options):
    return score_responses(model, None, corpus, intervals=True, progress=False, **options)


@pytest.mark.parametrize(
    "options", [{}, {"share_prefixes": False}, {"logits_memory": 11 * 4 * 8}, {"batch_invariant": True}]
)
def test_intervals_of_all_responses_partition_the_unit_interval(options):
    corpus = Dataset.from_dict({"prompt": [PROMPTS[1]] * 121 + [PROMPTS[2]] * 121, "completion": RESPONSES * 2})
    scored = score(peaked(), corpus, **options)
    for rows in (slice(0, 121), slice(121, 242)):
        low, p = np.array(scored["interval_low"][rows]), np.exp(scored["logprob"][rows])
        assert p.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(low, np.concatenate([[0.0], np.cumsum(p)[:-1]]), atol=1e-6)


def test_pass_at_n_is_how_often_a_code_of_the_n_strata_names_the_answer():
    """A fine grid of codes in each stratum, decoded by the model, for one answer a prompt."""
    model, grid, n = peaked(2), 2000, 4
    codes = torch.arange(n * grid, dtype=torch.float64) / (n * grid) + 0.5 / (n * grid)
    answers, found = [[5, 3], [0, 9], [7, 7]], []
    for prompt, answer in zip(PROMPTS, answers):
        choice, ids = CodeChoice(codes, lambda: torch.zeros_like(codes)), torch.tensor([prompt]).expand(n * grid, -1)
        for _ in range(2):
            with torch.no_grad():
                tokens = choice(ids, model(ids).logits[:, -1]).argmax(-1, keepdim=True)
            ids = torch.cat([ids, tokens], dim=1)
        named = (ids[:, -2:] == torch.tensor(answer)).all(-1).view(n, grid).double().mean(1)
        found.append(1 - (1 - named).prod().item())
    corpus = Dataset.from_dict({"prompt": PROMPTS[:3], "completion": answers})
    scored = score(model, corpus)
    exact = stratified_pass_probabilities(scored["interval_low"], scored["logprob"], n)
    np.testing.assert_allclose(found, exact, atol=2 * n / grid)
    assert max(exact) > 0.05


def test_half_precision_gives_intervals():
    corpus = Dataset.from_dict({"prompt": [PROMPTS[1]] * 121, "completion": RESPONSES})
    scored = score(peaked().to(torch.bfloat16), corpus)
    profile = CoverageProfile.from_logprobs(scored["logprob"], np.zeros(121), interval_lows=scored["interval_low"])
    assert profile.pass_at(8, "stratified") >= profile.pass_at(8)


def test_tables_without_intervals_go_on_and_are_no_tables_with_them(tmp_path):
    corpus = Dataset.from_dict({"prompt": PROMPTS, "completion": [[3, 4]] * len(PROMPTS)})
    options = {"output_dir": tmp_path / "plain", "shard_rows": 2, "progress": False}
    plain = score_responses(build(), None, corpus, **options)
    assert "intervals" not in ScoreTable.open(tmp_path / "plain").metadata["options"]
    (tmp_path / "plain" / "scores-00001.safetensors").unlink()
    assert score_responses(build(), None, corpus, **options)[:] == plain[:]
    assert ScoreTable.open(tmp_path / "plain").interval_low is None
    with pytest.raises(ValueError, match=r"something else \(options.intervals None, now True\)"):
        score(build(), corpus, output_dir=tmp_path / "plain", shard_rows=2)
    kept = score(build(), corpus, output_dir=tmp_path / "intervals", shard_rows=4)
    assert ScoreTable.open(tmp_path / "intervals").interval_low.tolist() == kept["interval_low"][:]
    assert kept["logprob"][:] == plain["logprob"][:]
    with pytest.raises(ValueError, match="`intervals` are those of a model that stays what it is"):
        score(build(), corpus, ttt=StepRule(0.1))


@pytest.fixture(scope="module")
def answers():
    """Profiles of two models on 60 single answers, of which neither covers all."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 11, (60, 3)).tolist()
    corpus = Dataset.from_dict({"prompt": prompts, "completion": rng.integers(0, 11, (60, 1)).tolist()})
    profiles = []
    for seed in (0, 1):
        scored = score(peaked(seed), corpus)
        profiles.append(
            CoverageProfile.from_logprobs(
                scored["logprob"],
                np.zeros(60),
                groups=map(str, prompts),
                name=f"model-{seed}",
                interval_lows=scored["interval_low"],
            )
        )
    return profiles


def test_a_profile_has_pass_at_n_of_both_kinds(answers):
    first, second = answers
    for n in (1, 3, 8):
        assert first.pass_at(n) == pytest.approx(exact_pass_at_n(first.logprobs, n))
        assert first.pass_at(n) == pytest.approx(1 - first.miss(n))
        stratified = stratified_pass_probabilities(first.interval_lows, first.logprobs, n)
        assert first.pass_at(n, "stratified") == pytest.approx(stratified.mean())
        low, high = first.pass_interval(n, "stratified")
        assert low < first.pass_at(n, "stratified") < high
    assert first.pass_at(8, "stratified") > first.pass_at(8) + 0.02
    again = CoverageProfile.from_json(first.to_json())
    assert again.to_json() == first.to_json()
    assert again.pass_at(8, "stratified") == first.pass_at(8, "stratified")
    both = first + second
    assert both.pass_at(8, "stratified") == pytest.approx(
        (first.pass_at(8, "stratified") + second.pass_at(8, "stratified")) / 2
    )
    plain = CoverageProfile.from_logprobs(first.logprobs, np.zeros(60), groups=first.groups)
    assert "interval_lows" not in plain.to_json()
    with pytest.raises(ValueError, match="must agree on whether `interval_lows` are known"):
        first.merge(plain)


def test_what_pass_at_n_cannot_be_of_is_refused(answers):
    first, _ = answers
    plain = CoverageProfile.from_logprobs(first.logprobs, np.zeros(60))
    with pytest.raises(ValueError, match="needs `interval_lows`: score with `intervals=True`"):
        plain.pass_at(8, "stratified")
    with pytest.raises(ValueError, match='must be "independent" or "stratified", got \'lattice\''):
        first.pass_at(8, "lattice")
    with pytest.raises(ValueError, match="must be a whole number of samples"):
        first.pass_at(1.5, "stratified")
    with pytest.raises(
        ValueError, match="exact where each prompt has one right answer, and the reference here is 'den"
    ):
        CoverageProfile.from_logprobs([-1.0], [-1.0]).pass_at(2)
    with pytest.raises(ValueError, match=r"row 1 begins at 0\.99"):
        CoverageProfile.from_logprobs([-1.0, -1.0], [0.0, 0.0], interval_lows=[0.0, 0.99])


def test_tables_and_results_have_both_kinds_side_by_side(answers):
    table = pass_table(answers, [2, 5.7, 8])
    assert [row[:2] for row in table.rows] == [[f"model-{m}", n] for m in (0, 1) for n in ("2", "8")]
    assert table.rows[1][2].value == answers[0].pass_at(8)
    assert table.rows[1][3].value == answers[0].pass_at(8, "stratified")
    results = coverage_results(answers, [2, 5.7, 8])
    assert results["results"]["model-1"]["pass@8,stratified"] == answers[1].pass_at(8, "stratified")
    assert results["higher_is_better"]["model-1"]["pass@8"] is True
    plain = CoverageProfile.from_logprobs(answers[0].logprobs, np.zeros(60), name="plain")
    assert pass_table([*answers, plain], [2]) is None
    assert not any(key.startswith("pass") for key in coverage_results([plain], [2])["results"]["plain"])


def test_another_candidate_may_be_best_with_stratified_samples():
    """One model gives all answers 0.2; the other knows 70 % of them, and the rest never."""
    sure = np.log(np.where(np.arange(100) < 70, 0.999, 1e-9))
    candidates = {"broad": np.full(100, np.log(0.2)), "sure": sure}
    lows = {"broad": np.full(100, 0.4), "sure": np.zeros(100)}
    options = {"reference_logprobs": np.zeros(100)}
    assert choose(candidates, 5, **options).winner == "sure"
    choice = choose(candidates, (5, 2), interval_lows=lows, **options)
    assert (choice.winner, choice.rule) == ("broad", "stratified pass")
    assert choice.losses["broad"] == pytest.approx(0.0, abs=1e-9)
    assert choice.losses["sure"] == pytest.approx(0.3, abs=1e-3)
    assert choice.others[0].winner == "sure"
    assert choice.metric_name == "stratified_fail_5"
    assert "1 - Pass@5 of stratified samples" in choice.sentence
    assert "stratified samples" in choice.plot().axes[0].get_ylabel()
    assert '"stratified pass"' in choice.to_json()
    for change, message in (
        ({"reference_logprobs": None}, "are of single right answers: give log-probabilities"),
        ({"reference_logprobs": np.full(100, -1.0)}, "and `reference_logprobs` of 0"),
        ({"interval_lows": {"broad": lows["broad"]}}, r"must have the names of the candidates, \['broad', 'sure'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(candidates, 5, **{"interval_lows": lows} | options | change)
    with pytest.raises(ValueError, match=r"must be a whole number of stratified samples, but is 2\.5"):
        choose(candidates, 2.5, interval_lows=lows, **options)
