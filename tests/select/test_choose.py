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
    assert ": too little to leave the others out, which takes 95 %. To decide" in choice.sentence
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


def test_adaptively_candidates_that_are_behind_are_scored_on_few_rows():
    rng = np.random.default_rng(0)
    reference, groups = -rng.exponential(3, 600), np.arange(600) // 2
    own = {"good": 0.5, "close": 0.6, "bad": 3.0}
    table = {name: np.minimum(reference - shift - 0.2 * rng.random(600), 0) for name, shift in own.items()}
    asked = {name: [] for name in table}

    def scorer(name):
        def score(rows):
            asked[name].extend(rows.tolist())
            return table[name][rows]

        return score

    arguments = {"samples": 8, "reference_logprobs": reference, "groups": groups, "adaptive": True}
    choice = choose({name: scorer(name) for name in table}, **arguments)
    assert choice.winner == "good"
    assert choice.dropped[-1] == "bad"
    assert choice.scored_rows == {name: len(rows) for name, rows in asked.items()}
    assert choice.scored_rows["bad"] == 128  # 64 prompts, of two rows each
    assert (choice.row_scorings, choice.full_row_scorings) == (sum(map(len, asked.values())), 1800)
    assert {row ^ 1 for row in asked["bad"]} == set(asked["bad"])  # with a prompt all of its rows
    # whoever was dropped is compared on the rows that it has
    rows = asked["bad"]
    misses = {name: miss_values(reference - table[name], 8) for name in table}
    behind = (misses["bad"] - misses["good"])[rows].mean()
    assert choice.losses["bad"] == pytest.approx(misses["good"][asked["good"]].mean() + behind)
    low, high = choice.intervals["bad"]
    assert low < choice.losses["bad"] < high
    entropy = (table["good"] - table["bad"])[rows].mean() - table["good"][asked["good"]].mean()
    assert choice.cross_entropies["bad"] == pytest.approx(entropy)
    assert choice.ranking[-1] == "bad"
    assert f"It took {choice.row_scorings:,} of the 1,800 row scorings of the full table" in choice.sentence
    assert "dropped on the way" in choice.sentence
    facts = json.loads(choice.to_json())
    assert facts["scored_rows"] == choice.scored_rows
    # arrays are as good as what scores on demand, and the order does not depend on where prompts stand
    assert choose(table, **arguments).to_json() == choice.to_json()
    turned = {name: values[::-1] for name, values in table.items()}
    other = choose(turned, 8, reference_logprobs=reference[::-1], groups=groups[::-1], adaptive=True)
    assert other.losses == pytest.approx(choice.losses)
    assert choice.plot() is not None


def test_adaptively_with_verdicts_and_with_one_left():
    rng = np.random.default_rng(0)
    verdicts = {name: rng.random((600, 4)) < share for name, share in (("weak", 0.05), ("strong", 0.9))}
    choice = choose(verdicts, 4, adaptive=True)
    assert (choice.rule, choice.winner, choice.left) == ("pass", "strong", ("strong",))
    assert choice.scored_rows == {"weak": 64, "strong": 64}
    assert (choice.within, choice.probability_best, choice.is_decided) == (0.0, None, True)
    assert "With 95 % confidence it is the best." in choice.sentence


def test_a_candidate_without_a_chance_is_dropped():
    dead = [-math.inf] * 300
    choice = choose({"dead": dead, "alive": [-1.0] * 300}, 4, reference_logprobs=[-1.0] * 300, adaptive=True)
    assert choice.scored_rows == {"dead": 64, "alive": 64}
    assert choice.cross_entropies == {"dead": math.inf, "alive": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_logprobs": None}, "`adaptive` needs `reference_logprobs`, or verdicts"),
        ({"candidates": {"a": lambda rows: MEAN[:3]}}, r"`candidates\['a'\]` was asked for 64 rows and gave 3"),
        (
            {"reference_logprobs": REFERENCE[1:]},
            "of the same rows as the candidates, but has 399 and 'mean' 400",
        ),
        ({"groups": [1]}, "one label a row"),
        ({"tolerance": -1}, "`tolerance` must be a loss"),
    ],
)
def test_what_is_refused_adaptively(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(**{"candidates": TABLE, "reference_logprobs": REFERENCE, "adaptive": True} | arguments)


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
