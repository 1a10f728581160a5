import math

import numpy as np
import pytest

from hf_coverage import CoverageProfile
from hf_coverage.functional.paired import paired_coverage_difference, paired_miss_difference
from hf_coverage.report.summary import (
    comparison_table,
    paired_differences,
    paired_miss_differences,
    profile_table,
    summarize_profiles,
)
from hf_coverage.report.table import Interval

RNG = np.random.default_rng(0)
REFERENCE = -RNG.exponential(5, 200)
GROUPS = [row // 4 for row in range(200)]


def profile(name, loss, rows=200, reference=True):
    logprobs = (REFERENCE - loss)[:rows]
    return CoverageProfile.from_logprobs(
        logprobs, REFERENCE[:rows] if reference else None, groups=GROUPS[:rows], name=name
    )


GOOD = profile("good", 0.1)
BAD = profile("bad", np.where(np.arange(200) % 7 == 0, 4.0, 0.0))


def test_the_table_holds_the_profile_s_own_numbers():
    table = profile_table([GOOD, BAD], [2, 5.7], regret=0.3)
    assert [column.title for column in table.headers][3:8] == ["Cov_2", "Cov_5.7", "miss_2", "miss_5.7", "KL (nats)"]
    row = table.rows[1]
    assert row[:3] == ["bad", 200, 50]
    assert row[4] == Interval(BAD.cov(5.7), *BAD.interval(5.7))
    assert row[6] == Interval(BAD.miss(5.7), *BAD.miss_interval(5.7))
    assert row[7].value == BAD.kl
    assert row[7].low < BAD.kl < row[7].high
    assert row[8].value == BAD.cross_entropy
    budget = BAD.best_of_n_budget(0.3)
    assert row[9:] == [budget.n, budget.guaranteed_n]
    assert [table.best(column) for column in (3, 4)] == [0, 0]


def test_a_plain_corpus_has_no_kl_and_its_bound_keeps_its_name():
    titles = [column.title for column in profile_table([profile("plain", 0.0, reference=False)], [2]).headers]
    assert "upper bound on Cov_2" in titles
    assert not [title for title in titles if title.startswith(("Cov", "KL"))]


def test_bounds_and_estimates_do_not_share_a_table():
    with pytest.raises(ValueError, match="`profiles` must all show the same quantity, but there are Cov_N, upper"):
        profile_table([GOOD, profile("plain", 0.0, reference=False)], [2])
    with pytest.raises(ValueError, match="at least one coverage profile"):
        profile_table([], [2])


def test_differences_are_other_minus_baseline_and_worse_is_said():
    (difference,) = paired_differences(GOOD, BAD, [8])
    assert difference == paired_coverage_difference(BAD.log_ratios, GOOD.log_ratios, 8, groups=GROUPS)
    assert difference.difference == BAD.cov(8) - GOOD.cov(8) > 0
    (missed,) = paired_miss_differences(GOOD, BAD, [8])
    assert missed == paired_miss_difference(BAD.log_ratios, GOOD.log_ratios, 8, groups=GROUPS)
    assert missed.difference == pytest.approx(BAD.miss(8) - GOOD.miss(8))
    assert [row[1] for row in comparison_table(GOOD, [BAD], [8]).rows] == ["Cov_8", "miss_8"]
    assert [row[-1] for row in comparison_table(GOOD, [BAD], [8]).rows] == ["worse", "worse"]
    assert [row[-1] for row in comparison_table(BAD, [GOOD], [8]).rows] == ["better", "better"]
    assert [row[-1] for row in comparison_table(BAD, [BAD], [8]).rows] == ["no clear difference"] * 2
    assert "not corrected for there being 2" in comparison_table(GOOD, [BAD], [8]).caption


def test_profiles_of_other_rows_are_not_compared():
    with pytest.raises(ValueError, match="must describe the same rows"):
        comparison_table(GOOD, [profile("short", 0.1, rows=100)], [8])


def test_sentences_rank_compare_and_plan():
    ranking, difference, *budgets = summarize_profiles([BAD, GOOD], [2, 8], regret=0.3, baseline=True)
    assert ranking == f"Cov_8 from best to worst: good (0), bad ({BAD.cov(8):.3f}). Lower is better."
    assert "good covers more than bad on the same rows" in difference
    assert budgets[1].startswith("good: Best-of-N with ")


def test_no_budget_is_said_plainly():
    lost = CoverageProfile.from_logprobs([-math.inf, -1.0], [-1.0, -1.0], name="lost")
    assert summarize_profiles([lost], [2])[1] == (
        "lost: no number of samples is sure to be enough so that Best-of-N loses at most 0.1 of expected reward "
        "against the reference, whatever the reward in [0, 1]: too many responses are out of reach."
    )


def test_a_budget_says_what_is_estimated_and_what_is_sure():
    few, many = (summarize_profiles([profile("good", 0.1, rows=rows)], [2])[1] for rows in (20, 200))
    assert "by the estimate; these 5 prompts are too few to say it with 95 % confidence of any number" in few
    assert "by the estimate; with 2 it is guaranteed with 95 % confidence" in many


def test_an_upper_bound_is_said_to_be_one():
    sentence = summarize_profiles([profile("plain", 0.0, reference=False)], [2])[0]
    assert sentence.startswith("At most ")
    assert "the upper bound on Cov_2 is" in sentence
