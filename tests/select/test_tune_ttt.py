"""The choice of steps for test-time training, beside a slow loop."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import hf_coverage
from hf_coverage import CoverageProfile, StepRule, score_responses, ttt_generate
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference, paired_miss_difference
from hf_coverage.functional.statistics import group_codes
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.select.ttt_settings import check_rules, generation_settings, rule_name, ttt_grid
from hf_coverage.select.tune_ttt import split_groups, tune_ttt
from tests.ttt.head_reference import tiny_llama

RULES = (StepRule(0.1), StepRule(0.1, radius=2.0), StepRule(1.0), StepRule(1.0, radius=2.0))


def case(seed=0, prompts=12, gain=0.0):
    """Whole-number log-probabilities, so that many are tied, in groups of three rows, shuffled."""
    rng = np.random.default_rng(seed)
    groups = [f"prompt {row}" for row in rng.permutation(np.repeat(np.arange(prompts), 3))]
    plain = -rng.integers(1, 6, 3 * prompts).astype(float)
    adapted = {rule: np.minimum(plain + rng.integers(-1, 2, plain.size) + gain, 0.0) for rule in RULES}
    return plain, adapted, groups, -rng.integers(0, 2, plain.size).astype(float)


def slow_choice(adapted, n, reference, rows):
    """The first rule with the least count of covered rows, then the least sum of -log p."""
    best = None
    for rule, values in adapted.items():
        hits, loss = 0, 0.0
        for row in rows:
            hits += (0.0 if reference is None else reference[row]) - values[row] >= math.log(n) - 1e-9
            loss -= values[row]
        if best is None or (hits, loss) < best[:2]:
            best = hits, loss, rule
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([2, 4.5, 16]), st.booleans(), st.integers(0, 3))
def test_the_choice_is_the_slow_loop_s_and_the_judgement_is_on_the_rest(seed, n, known, half):
    plain, adapted, groups, reference = case(seed)
    reference = reference if known else None
    choice = tune_ttt(plain, adapted, n, reference_logprobs=reference, groups=groups, seed=half, by="coverage")
    first = split_groups(groups, half)
    hits, _, rule = slow_choice(adapted, n, reference, np.flatnonzero(first))
    assert choice.rule == rule
    assert choice.searched[1 + RULES.index(rule)].log_ratios.size == first.sum()
    assert choice.searched[1 + RULES.index(rule)].interval(n)[0] <= hits / first.sum()
    rest = np.flatnonzero(~first)
    ratios = [(0.0 if reference is None else reference[rest]) - values[rest] for values in (adapted[rule], plain)]
    codes = group_codes(groups)[rest]
    assert choice.difference == pytest.approx(paired_coverage_difference(*ratios, n, groups=codes))
    assert choice.cross_entropy_difference == pytest.approx(paired_kl_difference(*ratios, groups=codes))
    assert choice.helps == (choice.difference.high < 0)
    assert choice.plain.kind == choice.adapted.kind == ("density" if known else "samples")


def test_only_rows_of_the_choosing_half_choose():
    plain, adapted, groups, _ = case(3, prompts=40)
    before = tune_ttt(plain, adapted, 32, groups=groups)
    rest = ~split_groups(groups)
    changed = {rule: np.where(rest, -50.0 if rule == before.rule else 0.0, values) for rule, values in adapted.items()}
    after = tune_ttt(plain, changed, 32, groups=groups)
    assert after.rule == before.rule
    assert after.difference.low > 0
    assert "covers less than plain decoding, so that it does not help" in after.sentence


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(4, 30), st.integers(0, 5))
def test_halves_keep_prompts_whole_and_do_not_depend_on_the_rows_order(seed, prompts, half):
    groups = np.repeat(np.arange(prompts), 2).tolist()
    order = np.random.default_rng(seed).permutation(len(groups))
    first = split_groups(groups, half)
    assert (first[::2] == first[1::2]).all()
    assert first[::2].sum() == prompts // 2
    assert (split_groups([groups[row] for row in order], half) == first[order]).all()


def test_without_groups_every_row_is_a_prompt():
    plain, adapted, _, _ = case(1)
    first = split_groups(np.arange(plain.size, dtype=np.uint64))
    choice = tune_ttt(plain, adapted, 4)
    assert choice.searched[0].logprobs.tolist() == plain[first].tolist()
    assert choice.plain.logprobs.tolist() == plain[~first].tolist()


@pytest.mark.parametrize(
    ("gain", "helps", "words"),
    [
        (3.0, True, "covers more than plain decoding. On 20 prompts that did not choose it"),
        (-3.0, False, "covers less than plain decoding, so that it does not help"),
        (0.0, False, "the interval includes 0, so that it is not shown to help"),
    ],
)
def test_it_says_whether_it_helps(gain, helps, words):
    plain = np.tile([-2.0, -4.0], 20)
    choice = tune_ttt(plain, {RULES[0]: np.minimum(plain + gain, 0.0)}, 16)
    assert choice.helps is helps
    assert words in choice.sentence
    assert (
        f"Cross-entropy differs by {choice.cross_entropy_difference.difference:.4g} nats a response" in choice.sentence
    )
    assert ("no gain there either" in choice.sentence) == (gain <= 0)
    assert "only bounds were compared" in choice.sentence
    known = tune_ttt(plain, {RULES[0]: plain}, 16, reference_logprobs=np.full(40, -0.5))
    assert "only bounds" not in known.sentence
    assert "the miss_16 is" in known.sentence


def test_miss_n_chooses_where_the_density_is_known():
    plain, reference = np.tile([-2.0, -4.0, -6.0, -8.0], 20), np.full(80, -0.5)
    # many responses gain a little, which miss_N counts, or few gain much, which passes the edge of Cov_N
    adapted = {RULES[0]: plain + 1.0, RULES[2]: np.where(plain == -4.0, -3.2, plain)}
    known = tune_ttt(plain, adapted, 16, reference_logprobs=reference)
    assert (known.by, known.decided_by, known.rule, known.label) == ("miss", "miss", RULES[0], "miss_16")
    pair = known.adapted.log_ratios, known.plain.log_ratios
    assert known.difference == paired_miss_difference(*pair, 16)
    assert known.level(known.plain) == known.plain.miss(16)
    assert json.loads(known.to_json())["by"] == "miss"
    asked = tune_ttt(plain, adapted, 16, reference_logprobs=reference, by="coverage")
    assert (asked.by, asked.label) == ("coverage", "Cov_16")
    assert tune_ttt(plain, adapted, 16).by == "coverage"
    with pytest.raises(ValueError, match="`by` must be one of miss, coverage, but is 'kl'"):
        tune_ttt(plain, adapted, 16, by="kl")


def test_ties_are_broken_by_cross_entropy_and_then_by_order_and_it_says_so():
    plain = np.tile([-1.0, -9.0], 6)
    better = np.tile([-0.5, -9.0], 6)
    by_loss = tune_ttt(plain, {RULES[0]: plain, RULES[2]: better}, 16)
    assert (by_loss.rule, by_loss.decided_by) == (RULES[2], "cross-entropy")
    assert "the choice between them is by cross-entropy" in by_loss.sentence
    by_order = tune_ttt(plain, {RULES[2]: plain, RULES[0]: plain}, 16)
    assert (by_order.rule, by_order.decided_by) == (RULES[2], "order")
    alone = tune_ttt(plain, {RULES[0]: np.minimum(plain + 7.0, 0.0), RULES[2]: plain}, 16)
    assert (alone.rule, alone.decided_by) == (RULES[0], "coverage")


@pytest.mark.parametrize(("best", "words"), [(0, "the smallest that"), (1, None), (2, "the largest that")])
def test_it_says_when_the_grid_ends_at_the_best(best, words):
    plain = np.tile([-1.0, -4.0], 6)
    rules = [StepRule(lr) for lr in (0.1, 1.0, 10.0)]
    choice = tune_ttt(plain, {rule: plain + (k == best) * 0.5 for k, rule in enumerate(rules)}, 16)
    assert choice.rule == rules[best]
    assert (words or "the smallest that") in choice.sentence if words else "Its lr is" not in choice.sentence


def test_the_json_is_strict_and_has_what_was_decided(tmp_path):
    plain, adapted, groups, reference = case(5, gain=1.0)
    plain[0] = -math.inf  # an infinite cross-entropy
    choice = tune_ttt(plain, adapted, 4, reference_logprobs=reference, groups=groups, by="coverage")
    text = choice.to_json(tmp_path / "choice.json", seed=0)
    facts = json.loads((tmp_path / "choice.json").read_text(), parse_constant=pytest.fail)
    assert facts == json.loads(text)
    assert facts["seed"] == 0
    assert facts["generation_settings"] == generation_settings(choice.rule)
    assert facts["difference"]["low"] == choice.difference.low
    assert list(facts["choosing_half"]["results"]) == ["plain", *map(rule_name, RULES)]
    judged = facts["other_half"]["results"]
    assert judged["plain"]["cov_4"] == choice.plain.cov(4)
    assert judged[facts["chosen"]]["cov_4_interval"] == list(choice.adapted.interval(4))
    assert facts["other_half"]["num_rows"] + facts["choosing_half"]["num_rows"] == plain.size


@pytest.mark.parametrize(
    "rule",
    [
        StepRule(0.1, radius=2.0, decay=0.25, lam=1.0, num_steps=3),
        StepRule(0.1, top_k=5),
        TTTConfig(0.1, on_prompt=True),
    ],
    ids=rule_name,
)
def test_generate_follows_the_settings_as_scoring_does_the_rule(rule):
    model, ids = tiny_llama(), torch.tensor([[3, 4, 5, 6]])
    config = GenerationConfig(
        **generation_settings(rule), max_new_tokens=6, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True
    )
    result = model.generate(ids, generation_config=config, custom_generate=ttt_generate)
    corpus = Dataset.from_dict({"prompt": ids.tolist(), "completion": result.sequences[:, 4:].tolist()})
    scored = score_responses(model, None, corpus, ttt=rule, progress=False)
    assert scored["logprob"][0] == pytest.approx(float(result.token_logprobs.sum()), abs=1e-4)
    plain = score_responses(model, None, corpus, progress=False)
    assert abs(plain["logprob"][0] - scored["logprob"][0]) > 1e-2


def test_a_grid_has_every_combination_and_gives_each_scope_what_it_has():
    rules = ttt_grid({"head": [0.1, 0.2], "lora": [0.1, 0.2]}, on_prompt=True, some={"rank": 4, "top_k": 3}, decay=0.5)
    assert rules == [
        *(TTTConfig(lr, top_k=3, decay=0.5, on_prompt=prompt) for lr in (0.1, 0.2) for prompt in (False, True)),
        *(
            TTTConfig(lr, scope="lora", rank=4, decay=0.5, on_prompt=prompt)
            for lr in (0.1, 0.2)
            for prompt in (False, True)
        ),
    ]
    assert len({rule_name(rule) for rule in rules}) == len(rules)
    for scopes, some, message in (
        (["head", "tail"], {}, "`scope` must be .* got 'tail'"),
        (["head", "all"], {"rank": 4}, "`rank` is that of adapters"),
        (["head"], {"cache": "stale"}, "`cache` is exact whatever the head does"),
        (["lora"], {"top_k": 3}, "`top_k` cuts the steps of the head"),
    ):
        with pytest.raises(ValueError, match=message):
            ttt_grid({scope: [0.1] for scope in scopes}, some=some)


def test_the_end_of_a_grid_is_that_of_the_scope():
    plain = np.tile([-1.0, -4.0], 6)
    rules = [TTTConfig(0.1), TTTConfig(1.0), TTTConfig(1e-3, scope="all"), TTTConfig(10.0, scope="all")]
    choice = tune_ttt(plain, {rule: plain + (rule.lr == 1.0) * 0.5 for rule in rules}, 16)
    assert "Its lr is the largest that was tried" in choice.sentence


@pytest.mark.parametrize(
    ("rules", "n", "error", "message"),
    [
        ([], 16, ValueError, "at least one `StepRule`"),
        ([StepRule(0.0)], 16, ValueError, "`lr` must be above 0"),
        ([StepRule(torch.ones(2))], 16, ValueError, "`lr` must be one number"),
        ([StepRule(0.1, radius=1.0, center="zero")], 16, ValueError, '`center` must be "start"'),
        ([StepRule(0.1), StepRule(0.1)], 16, ValueError, "lr 0.1 is there twice"),
        ([StepRule(0.1), TTTConfig(0.1)], 16, ValueError, "lr 0.1 is there twice"),
        ([0.1], 16, TypeError, "got float"),
        ([StepRule(0.1)], 1, ValueError, "`n` must be above 1"),
        ([StepRule(0.1)], 0.5, ValueError, "`n` must be a finite number >= 1"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, n, error, message):
    with pytest.raises(error, match=message):
        check_rules(rules, n)


def test_rows_that_do_not_fit_are_refused():
    plain = np.full(8, -2.0)
    with pytest.raises(ValueError, match=r"`plain`, 8 of them, but lr 0\.1 has 7"):
        tune_ttt(plain, {RULES[0]: plain[:7]}, 16)
    with pytest.raises(ValueError, match=r"lr 0\.1: `logprobs` must hold .* row 2 is 1\.0"):
        tune_ttt(plain, {RULES[0]: [-1.0, -1.0, 1.0, *plain[3:]]}, 16)
    with pytest.raises(ValueError, match=r"plain: `logprobs` must hold .* row 2 is nan"):
        tune_ttt([-1.0, -1.0, math.nan, *plain[3:]], {RULES[0]: plain}, 16)
    # no number where plain decoding has none either: not what a step did
    with pytest.raises(ValueError, match=r"lr 0\.1: `logprobs` must hold .* row 2 is nan"):
        tune_ttt([-1.0, -1.0, -math.inf, *plain[3:]], {RULES[0]: [-1.0, -1.0, math.nan, *plain[3:]]}, 16)
    with pytest.raises(TypeError, match="got list"):
        tune_ttt(plain, [plain], 16)
    with pytest.raises(ValueError, match="at least 4 prompts"):
        tune_ttt(plain, {RULES[0]: plain}, 16, groups=[0, 1, 2, 2, 2, 2, 2, 2])


@pytest.mark.parametrize("lost", [math.nan, -math.inf])
def test_rules_that_diverge_are_named_and_the_others_chosen_among_as_without_them(lost):
    plain, adapted, groups, reference = case(7)
    known = {"reference_logprobs": reference, "groups": groups, "by": "coverage"}
    rest = {rule: adapted[rule] for rule in RULES[:2]}
    # one row is enough, in whichever half it is
    first = {rule: np.where(np.arange(plain.size) == row, lost, 0.0) for rule, row in zip(RULES[2:], (0, 30))}
    choice = tune_ttt(plain, {RULES[2]: first[RULES[2]], **rest, RULES[3]: first[RULES[3]]}, 4, **known)
    alone = tune_ttt(plain, rest, 4, **known)
    assert choice.diverged == RULES[2:]
    assert alone.diverged == ()
    assert choice.rules == (RULES[2], *RULES[:2], RULES[3])
    assert (choice.rule, choice.decided_by) == (alone.rule, alone.decided_by)
    assert (choice.difference, choice.cross_entropy_difference) == (alone.difference, alone.cross_entropy_difference)
    assert list(choice.results) == ["plain", *map(rule_name, choice.rules)]
    assert [name for name, profile in choice.results.items() if profile is None] == ["lr 1.0", "lr 1.0, radius 2.0"]
    assert "Chosen among 2 on the other" in choice.sentence
    assert "could not be chosen: lr 1.0; lr 1.0, radius 2.0. Smaller ones" in choice.sentence
    assert "diverged" not in alone.sentence
    facts = json.loads(choice.to_json(), parse_constant=pytest.fail)
    assert facts["diverged"] == ["lr 1.0", "lr 1.0, radius 2.0"]
    assert facts["choosing_half"]["results"]["lr 1.0"] is None
    assert facts["choosing_half"]["results"]["lr 0.1"] == choice.results["lr 0.1"].metrics([4])


def test_a_diverging_lr_is_no_end_of_the_grid():
    plain = np.tile([-1.0, -4.0], 6)
    lost = np.full(12, math.nan)
    choice = tune_ttt(plain, {StepRule(0.1): plain, StepRule(1.0): plain + 0.5, StepRule(10.0): lost}, 16)
    assert choice.rule == StepRule(1.0)
    assert "Its lr is" not in choice.sentence


@pytest.mark.parametrize("n", [2, 16])
def test_plain_decoding_is_the_choice_where_every_rule_diverges(n):
    plain = np.tile([-1.0, -4.0], 6)
    choice = tune_ttt(plain, {rule: np.full(12, math.nan) for rule in RULES}, n)
    assert (choice.rule, choice.adapted, choice.difference, choice.decided_by) == (None, None, None, None)
    assert not choice.helps
    assert choice.diverged == RULES
    assert choice.sentence.startswith(
        "Every setting diverged, so that plain decoding is the choice. Steps that diverged"
    )
    facts = json.loads(choice.to_json(), parse_constant=pytest.fail)
    assert (facts["chosen"], facts["helps"], facts["generation_settings"]) == ("plain", False, {})
    assert facts["difference"] is facts["cross_entropy_difference"] is facts["decided_by"] is None
    assert list(facts["other_half"]["results"]) == ["plain"]
    assert facts["choosing_half"]["results"] == {
        "plain": choice.searched[0].metrics([n]),
        **dict.fromkeys(map(rule_name, RULES)),
    }


def test_a_row_that_plain_decoding_excludes_too_is_no_divergence():
    plain = np.array([-1.0, -9.0, -math.inf, *[-4.0] * 5])
    choice = tune_ttt(plain, {RULES[0]: plain, RULES[2]: np.where(plain == -9.0, -math.inf, plain)}, 16)
    assert choice.diverged == (RULES[2],)


def test_an_n_that_tells_nothing_apart_is_refused_with_one_that_does():
    plain = -np.arange(20.0, 40.0)
    with pytest.raises(ValueError, match=r"too small to choose by: every response .* N = 3\.93e\+12") as caught:
        tune_ttt(plain, {RULES[0]: plain}, 16)
    named = float(str(caught.value).split("N = ")[1].split(" ")[0])
    assert CoverageProfile.from_logprobs(plain).cov_upper(named) == pytest.approx(0.5, abs=0.051)
    tune_ttt(plain, {RULES[0]: np.append(plain[:-1], -1.0)}, 16)  # one response is enough to tell


def test_it_is_public():
    assert hf_coverage.tune_ttt is tune_ttt
    plain, adapted, _, _ = case()
    assert isinstance(tune_ttt(plain, adapted, 4), hf_coverage.TTTChoice)
