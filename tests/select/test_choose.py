"""`choose`: the rule that fits what is known, the pick, what is said of it, and what is refused."""

import json
import math

import numpy as np
import pytest

from hf_coverage import BestOfNResult, CoverageProfile, SuccessProfile, choose
from hf_coverage.functional.best_of_n import best_of_blocks, pass_at_n
from hf_coverage.functional.choice import decide
from hf_coverage.functional.group_rewards import equal_reward_probability, group_signal
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


JUDGED = {name: RNG.random((60, 8)) < RNG.beta(*law, (60, 1)) for name, law in {"a": (0.2, 1), "b": (1, 3)}.items()}


def test_results_and_profiles_are_judged_samples_as_tables_are():
    results = {name: BestOfNResult.from_rewards(table.astype(float)) for name, table in JUDGED.items()}
    profiles = {name: result.success for name, result in results.items()}
    for purpose in ("best-of-n", "rl"):
        expected = choose(JUDGED, (4, 8), purpose=purpose)
        for judged in (results, profiles):
            found = choose(judged, (4, 8), purpose=purpose)
            assert found.losses == pytest.approx(expected.losses, abs=1e-12)
            assert found.within == pytest.approx(expected.within, abs=1e-9)
            assert (found.rule, found.left, found.sentence) == (expected.rule, expected.left, expected.sentence)


def test_for_rl_it_is_the_share_of_groups_without_a_signal():
    choice = choose(JUDGED, (4, 8), purpose="rl", seed=2)
    losses = {name: 1 - group_signal(table.sum(axis=1), 8, 4).mixed for name, table in JUDGED.items()}
    assert (choice.rule, choice.metric_name, choice.loss_name) == ("signal", "no_signal_4", "1 - signal_4")
    assert choice.losses == pytest.approx({name: values.mean() for name, values in losses.items()})
    decision = decide(list(losses.values()), seed=2)
    assert (choice.within, choice.probability_best) == pytest.approx((decision.within, decision.probability_best))
    assert choice.sentence.startswith(f"{choice.winner} loses least of 2 candidates on 60 prompts: 1 - signal_4 = ")
    assert "all get the same reward, so that RL learns nothing from them" in choice.sentence
    # rewards need not say what is right
    rewards = {"a": np.zeros((60, 8)), "b": RNG.choice([0.5, 0.7], (60, 8))}
    choice = choose(rewards, 2, purpose="rl")
    assert choice.losses["b"] == pytest.approx(equal_reward_probability(rewards["b"], 2).mean())
    assert (choice.winner, choice.losses["a"]) == ("b", 1.0)


def test_the_wide_one_wins_where_many_samples_are_drawn():
    choice = choose(JUDGED, (1, 8))
    by_hand = {n: min(JUDGED, key=lambda name: -pass_at_n(JUDGED[name])[:, n - 1].mean()) for n in (1, 8)}
    assert [choice.winner, choice.others[0].winner] == [by_hand[1], by_hand[8]]


def test_samples_may_be_more_of_one_candidate_and_groups_may_be_given():
    table, groups = JUDGED["a"], [row // 2 for row in range(60)]
    profile = SuccessProfile.from_counts(table[:, :4].sum(axis=1), 4)
    choice = choose({"a": profile, "b": SuccessProfile.from_counts(JUDGED["b"].sum(axis=1), 8)}, 4, groups=groups)
    losses = [1 - pass_at_n(table[:, :4])[:, 3], 1 - pass_at_n(JUDGED["b"])[:, 3]]
    assert choice.within == pytest.approx(decide(losses, groups=groups).within)
    assert choice.num_prompts == 30
    with pytest.raises(ValueError, match="up to the 4 verdicts a prompt, but is 5: beyond them Pass@N is not known"):
        choose({"a": profile, "b": JUDGED["b"]}, 5)


def test_stratified_samples_count_in_blocks():
    rewards = {name: table.astype(float) for name, table in JUDGED.items()}
    results = {name: BestOfNResult.from_rewards(own, sampling="stratified") for name, own in rewards.items()}
    choice = choose(results, 4)
    assert (choice.rule, choice.metric_name) == ("stratified pass", "stratified_fail_4")
    assert choice.losses == pytest.approx({name: 1 - best_of_blocks(own, 4).mean() for name, own in rewards.items()})
    with pytest.raises(ValueError, match="a signal is of independent ones"):
        choose(results, 4, purpose="rl")
    with pytest.raises(ValueError, match="sampled in one way, but those of 'a' and 'b' are not"):
        choose({"a": results["a"], "b": rewards["b"] > 0}, 4)


def test_adaptively_for_rl():
    rng = np.random.default_rng(0)
    verdicts = {name: rng.random((600, 4)) < share for name, share in (("hopeless", 0.001), ("even", 0.5))}
    choice = choose(verdicts, 4, purpose="rl", adaptive=True)
    assert (choice.rule, choice.winner, choice.scored_rows["hopeless"]) == ("signal", "even", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": TABLE}, r'`purpose="rl"` is decided by rewards of samples'),
        ({"candidates": JUDGED, "samples": 1}, "`samples` must be groups of at least 2 for RL"),
        ({"candidates": JUDGED, "samples": 9}, "up to the 8 verdicts a prompt, but is 9: beyond them the signal"),
        ({"candidates": JUDGED, "samples": 2.5}, "whole number"),
        ({"candidates": JUDGED, "purpose": "sft"}, '`purpose` must be "best-of-n" or "rl", got \'sft\''),
        (
            {"candidates": {"a": JUDGED["a"], "b": JUDGED["b"][:9]}},
            "verdicts on the same prompts in the same order, .* but those of 'a' and 'b' are not",
        ),
        ({"candidates": JUDGED, "groups": [1]}, "one label a row"),
    ],
)
def test_what_is_refused_for_rl(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(**{"samples": 4, "purpose": "rl"} | arguments)


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
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["mean", "wide", "one-sided interval"]


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
