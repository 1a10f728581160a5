"""`choose`: the rule that fits what is known, the pick, what is said of it, and what is refused."""

import json
import math

import numpy as np
import pytest

from hf_coverage import CoverageProfile, choose
from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.choice import decide
from hf_coverage.functional.miss_profile import miss_values
from hf_coverage.functional.tournament_soft import envelope_losses

RNG = np.random.default_rng(0)
ROWS = 400
REFERENCE = -RNG.exponential(3, ROWS)
# one that is good on average and has given up a tenth of the responses, one that has given up nothing
MEAN = np.minimum(REFERENCE - np.where(RNG.random(ROWS) < 0.1, 9.0, 0.1), 0)
WIDE = np.minimum(REFERENCE - 1.2, 0)
TABLE = {"mean": MEAN, "wide": WIDE}
GROUPS = [row // 2 for row in range(ROWS)]


def test_with_a_density_it_is_the_least_miss():
    choice = choose(TABLE, samples=32, reference_logprobs=REFERENCE, groups=GROUPS)
    assert (choice.rule, choice.winner, choice.cross_entropy_choice) == ("miss", "wide", "mean")
    profile = CoverageProfile.from_logprobs(MEAN, REFERENCE, groups=GROUPS)
    assert choice.losses["mean"] == pytest.approx(profile.miss(32))
    assert choice.intervals["mean"] == profile.miss_interval(32)
    assert choice.is_decided
    assert choice.sentence.startswith("wide loses least of 2 candidates on 400 responses to 200 prompts: miss_32 = ")
    assert "Cross-entropy would take mean, whose loss is 0." in choice.sentence
    assert choice.cross_entropy_cost.low > 0


def test_one_right_answer_is_exact():
    logprobs = {name: -RNG.exponential(1, 50) for name in "ab"}
    choice = choose(logprobs, 4, reference_logprobs=np.zeros(50))
    expected = {name: np.mean((1 - np.exp(values)) ** 4) for name, values in logprobs.items()}
    assert choice.losses == pytest.approx(expected)


def test_without_it_is_the_soft_tournament_and_says_what_it_cannot_know():
    choice = choose(TABLE, 8)
    assert choice.rule == "soft tournament"
    assert choice.losses == pytest.approx(dict(zip(TABLE, envelope_losses([MEAN, WIDE], 8).mean(axis=1))))
    assert "the density of the corpus is not known" in choice.sentence


def test_verdicts_are_1_less_pass_at_n():
    verdicts = {name: RNG.random((60, 8)) < share for name, share in (("weak", 0.05), ("strong", 0.4))}
    choice = choose(verdicts, [4, 1, 8])
    assert (choice.rule, choice.winner, choice.cross_entropies) == ("pass", "strong", None)
    assert choice.losses["weak"] == pytest.approx(1 - pass_at_n(verdicts["weak"])[:, 3].mean())
    assert [pick.samples for pick in (choice.pick, *choice.others)] == [4, 1, 8]
    with pytest.raises(ValueError, match="up to the 8 verdicts a prompt"):
        choose(verdicts, 9)
    with pytest.raises(ValueError, match="only 'weak' has a table of verdicts"):
        choose({"weak": verdicts["weak"], "wide": WIDE[:60]}, 4)


def test_what_it_says_is_what_was_decided_on_the_losses():
    choice = choose(TABLE, 4, reference_logprobs=REFERENCE, groups=GROUPS, tolerance=0.01, seed=3)
    ratios = [REFERENCE - MEAN, REFERENCE - WIDE]
    decision = decide([miss_values(values, 4) for values in ratios], groups=GROUPS, tolerance=0.01, seed=3)
    assert choice.within == decision.within
    assert choice.probability_best == decision.probability_best
    assert choice.left == tuple(list(TABLE)[m] for m in decision.left)
    assert choice.rows_needed == decision.rows_needed


def test_several_numbers_of_samples_may_have_several_picks():
    choice = choose(TABLE, (1, 64), reference_logprobs=REFERENCE)
    assert (choice.pick.winner, choice.others[0].winner) == ("mean", "wide")
    figure = choice.plot()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["mean", "wide"]


def test_no_winner_where_chance_explains_it():
    rng = np.random.default_rng(2)
    equal = {name: np.minimum(REFERENCE - rng.normal(1, 1, ROWS), 0) for name in ("a", "b", "c")}
    choice = choose(equal, 8, reference_logprobs=REFERENCE)
    assert not choice.is_decided
    assert set(choice.left) == {"a", "b", "c"}
    assert choice.sentence.startswith("No winner: chance explains what 3 of 3 candidates")
    assert "To decide would take about" in choice.sentence
    # unless what is left does not matter
    generous = choose(equal, 8, reference_logprobs=REFERENCE, tolerance=0.2)
    assert generous.is_decided
    assert f"{generous.winner} is as good as the best of 3" in generous.sentence


def test_a_single_candidate_is_taken_without_a_word_on_chance():
    choice = choose({"only": WIDE}, 8, reference_logprobs=REFERENCE)
    assert choice.winner == "only"
    assert "confidence" not in choice.sentence


def test_json_holds_the_choice(tmp_path):
    choice = choose(TABLE, (8, 2), reference_logprobs=REFERENCE)
    facts = json.loads(choice.to_json(tmp_path / "choice.json"))
    assert facts == json.loads((tmp_path / "choice.json").read_text())
    assert facts["winner"] == choice.winner
    assert facts["losses"] == choice.losses
    assert facts["pick"]["within"] == choice.within
    assert facts["others"][0]["samples"] == 2
    assert facts["cross_entropy_cost"]["difference"] == choice.cross_entropy_cost.difference


def test_probability_zero_is_a_loss_of_one():
    choice = choose({"dead": [-math.inf] * 5, "alive": [-1.0] * 5}, 4, reference_logprobs=[-1.0] * 5)
    assert choice.losses == {"dead": 1.0, "alive": 0.0}
    assert choice.cross_entropies["dead"] == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": {}}, "at least one name"),
        ({"candidates": TABLE, "samples": []}, "`samples` must be a number of samples"),
        ({"candidates": TABLE, "samples": 0.5}, "finite number >= 1"),
        ({"candidates": {"a": MEAN, "b": WIDE[1:]}}, "same rows"),
        ({"candidates": TABLE, "reference_logprobs": REFERENCE[1:]}, "same rows"),
        ({"candidates": TABLE, "groups": [1]}, "one label a row"),
        ({"candidates": TABLE, "tolerance": -1}, "`tolerance` must be a loss"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(**arguments)
