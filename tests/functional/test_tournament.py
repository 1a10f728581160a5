import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.functional import tournament_challenges
from hf_coverage.functional.tournament import OnPolicy, challenge_rates, hold_tournament, separating_n
from hf_coverage.functional.tournament_challenges import count_challenges, row_layout
from hf_coverage.functional.tournament_guarantee import offset_guarantee, simple_guarantee
from hf_coverage.functional.tournament_racing import _kl, _kl_bound, race

LOG_2 = math.log(2)


def challenge(challenger, defender, n):
    """One row's challenge by its definition."""
    if challenger == -math.inf:
        return False
    return defender == -math.inf or challenger - defender >= math.log(n) - 2e-6


def slow_tournament(table, n, offsets=None):
    """Rates, scores, ranking and the tied by the definitions, one comparison at a time."""
    size, rows = len(table), len(table[0])
    rates = [[0.0] * size for _ in range(size)]
    for a, b in itertools.permutations(range(size), 2):
        rates[a][b] = sum(challenge(table[a][i], table[b][i], n) for i in range(rows)) / rows
    against = [[rates[a][b] - (offsets[a][b] if offsets else 0.0) for a in range(size)] for b in range(size)]
    scores = [max(values) for values in against]
    means = [sum(column) / max(1, size - 1) for column in zip(*rates)]
    entropies = [-sum(row) / rows for row in table]
    keys = [(round(s, 12), round(m, 12), round(e, 9), b) for b, (s, m, e) in enumerate(zip(scores, means, entropies))]
    ranking = sorted(range(size), key=keys.__getitem__)
    tied = [b for b in ranking if keys[b][0] == keys[ranking[0]][0]]
    return rates, scores, ranking, tied


# Multiples of log 2 meet the thresholds exactly.
values = st.one_of(
    st.integers(-8, 0).map(lambda power: power * LOG_2), st.floats(-9, 0, allow_nan=False), st.just(-math.inf)
)


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 12))
    distinct = draw(st.lists(st.lists(values, min_size=rows, max_size=rows), min_size=1, max_size=5))
    return distinct + draw(st.lists(st.sampled_from(distinct), max_size=2))


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from([1, 2, 2.5, 4, 16]))
def test_tournament_is_the_slow_loop_s(table, n):
    rates, scores, ranking, tied = slow_tournament(table, n)
    (standing,) = hold_tournament(table, n, replicates=0)
    np.testing.assert_allclose(standing.rates, rates, rtol=0, atol=1e-15)
    np.testing.assert_allclose(standing.scores, scores, rtol=0, atol=1e-15)
    assert (standing.ranking, standing.tied) == (tuple(ranking), tuple(tied))
    assert (standing.decided_by is None) == (len(tied) == 1)


@settings(deadline=None, max_examples=20)
@given(tables(), st.integers(0, 3))
def test_scores_fall_in_n_and_do_not_depend_on_the_order_of_rows_and_candidates(table, seed):
    n = [1, 2, 4, 64]
    standings = hold_tournament(table, n, replicates=0)
    assert all((one.scores >= other.scores).all() for one, other in itertools.pairwise(standings))
    rng = np.random.default_rng(seed)
    order, rows = rng.permutation(len(table)), rng.permutation(len(table[0]))
    shuffled = hold_tournament(np.array(table)[order][:, rows], n, replicates=0)
    for one, other in zip(standings, shuffled):
        np.testing.assert_allclose(other.scores, one.scores[order], atol=1e-15)


def random_table(candidates, rows, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.normal(-20, 3, rows) + rng.normal(0, spread, (candidates, rows)), 0.0)


@pytest.mark.parametrize("replicates", [0, 5])
def test_many_layers_tiles_and_threads_count_the_same(monkeypatch, replicates):
    # more than 255 layers, and one candidate so bad that its byte counters must be emptied on the way
    table = random_table(3, 300_000) + np.array([[-9.0], [0.0], [0.0]])
    expected = [[np.mean(a - b >= math.log(4) - 2e-6) if a is not b else 0.0 for b in table] for a in table]
    (standing,) = hold_tournament(table, 4, replicates=replicates)
    np.testing.assert_allclose(standing.rates, expected, rtol=0, atol=1e-15)
    monkeypatch.setattr(tournament_challenges, "_COUNTER_BYTES", 1)
    (one_by_one,) = hold_tournament(table, 4, replicates=replicates)
    assert (one_by_one.rates == standing.rates).all()
    if replicates:
        assert (one_by_one.win_rates == standing.win_rates).all()
    layout = row_layout(300_000)
    counts = [
        np.concatenate([part.counts for part in count_challenges(table, [4], layout, num_threads=threads)], axis=1)
        for threads in (1, 3)
    ]
    assert (counts[0] == counts[1]).all()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60),
    st.booleans(),
    st.sampled_from([1, 2, 4, 1024]),
    st.integers(0, 5),
)
def test_a_layout_deals_every_row_once_and_keeps_prompts_together(groups, shuffle, max_blocks, seed):
    layout = row_layout(len(groups), groups=groups, shuffle=shuffle, max_blocks=max_blocks, seed=seed)
    assert sorted(layout.order) == list(range(len(groups)))
    assert layout.widths.sum() == len(groups)
    assert (np.diff(layout.widths) <= 0).all()
    blocks = np.concatenate([layout.block[:width] for width in layout.widths])
    assert (layout.block_of_row[layout.order] == blocks).all()
    assert all(len({layout.block_of_row[i] for i, own in enumerate(groups) if own == g}) == 1 for g in set(groups))
    assert layout.num_groups == len(set(groups))
    assert layout.num_blocks == min(max_blocks, layout.num_groups) == np.unique(layout.block_of_row).size


def test_one_huge_prompt_fills_many_columns():
    layout = row_layout(50_000, groups=np.maximum(np.arange(50_000) - 49_990, 0))
    assert layout.widths.size < 60
    assert layout.num_blocks == 10


def test_win_rates_are_those_of_all_resamples_of_the_prompts():
    table = np.array([[-1, -9, -2, -2, -3.0], [-2, -2, -9, -3, -2.0], [-3, -3, -3, -6, -1.0]])
    groups = [0, 0, 1, 1, 2]
    wins = np.zeros(3)
    for drawn in itertools.product(range(3), repeat=3):
        rows = [i for g in drawn for i, own in enumerate(groups) if own == g]
        wins[slow_tournament(table[:, rows].tolist(), 4)[2][0]] += 1 / 27
    (standing,) = hold_tournament(table, 4, groups=groups, replicates=20_000)
    np.testing.assert_allclose(standing.win_rates, wins, atol=0.015)
    assert standing.num_groups == 3


def test_blocks_of_prompts_give_the_win_rates_of_prompts():
    table = random_table(4, 6_000, spread=1.0)
    rng = np.random.default_rng(1)
    hits = np.array([[a - b >= math.log(2) for b in table] for a in table])
    wins = np.zeros(4)
    for _ in range(300):
        wins[(hits @ rng.multinomial(6_000, np.full(6_000, 1 / 6_000))).max(0).argmin()] += 1 / 300
    (standing,) = hold_tournament(table, 2, replicates=2_000)
    assert 0.05 < wins.max() < 0.95
    np.testing.assert_allclose(standing.win_rates, wins, atol=0.12)


def test_duplicates_share_wins_and_are_reported_as_ties():
    best = random_table(1, 40)[0]
    (standing,) = hold_tournament([best - 5, best, best], 4, replicates=200)
    assert standing.ranking == (1, 2, 0)
    assert (standing.tied, standing.decided_by) == ((1, 2), "order")
    np.testing.assert_allclose(standing.win_rates, [0.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("table", "rule", "winner"),
    [
        # each is challenged on one row: 0 and 2 by both others, 1 by 2 alone
        ([[-9, -3, -1.0], [-1, -5, -1.0], [-1, -2.9, -4.0]], "mean challenge", 1),
        ([[-1, -2.0], [-1, -1.5]], "cross-entropy", 1),
    ],
)
def test_ties_are_broken_by_the_stated_rules(table, rule, winner):
    (standing,) = hold_tournament(table, 8, replicates=0)
    assert len(standing.tied) > 1
    assert (standing.decided_by, standing.ranking[0]) == (rule, winner)


def test_infinite_against_infinite_is_no_challenge_and_finite_against_infinite_is_one():
    rates = challenge_rates([[-math.inf, -math.inf, -700.0], [-math.inf, -1.0, -math.inf]], 16)
    np.testing.assert_allclose(rates, [[0, 1 / 3], [1 / 3, 0]])


def test_the_n_that_separates_is_the_largest_tried():
    table = random_table(5, 500, spread=0.5)
    assert len(hold_tournament(table, 1e6, replicates=0)[0].tied) == 5
    n = separating_n(table, 1e6)
    tried = [float(f"{1e6 / math.sqrt(2) ** step:.3g}") for step in range(1, 40)]
    separating = [level for level in tried if level > 1 and len(slow_tournament(table.tolist(), level)[3]) == 1]
    assert n == max(separating) == separating_n(iter(table), 1e6, race_confidence=0.99)
    assert separating_n([table[0], table[0]], 16) is None


def test_maximum_likelihood_takes_the_bad_model_of_e1_and_the_tournament_the_good_one():
    """One model is off by alpha everywhere; the other is perfect but gives up the answers to a rare prompt."""
    rows, rare, n, given_up = 2_000, 0.01, 16, 64
    alpha = rare * math.log(given_up)  # both have the same KL, so that chance decides what maximum likelihood takes
    by_likelihood, by_tournament = 0, 0
    for seed in range(200):
        is_rare = np.random.default_rng(seed).random(rows) < rare
        close = np.full(rows, -alpha)
        holed = np.where(is_rare, -math.log(given_up), 0.0)
        (standing,) = hold_tournament([close, holed], n, replicates=0)
        by_likelihood += holed.mean() > close.mean()
        by_tournament += standing.ranking[0] == 1
    assert by_likelihood / 200 >= 0.25
    assert by_tournament == 0


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_the_bound_of_theorem_6_3_holds_on_simulated_classes(a):
    """On rows that are all outcomes of a uniform D, nothing is sampled: the constants are then 2 and 1."""
    outcomes, n = 64, 8
    tight = 0.0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        models = rng.dirichlet(np.full(outcomes, rng.choice([0.1, 0.5, 2.0])), size=6)
        with np.errstate(divide="ignore"):
            logprobs = np.log(models)
        ratios = -math.log(outcomes) - logprobs
        pick = hold_tournament(logprobs, n, replicates=0)[0].ranking[0]
        got = np.mean(ratios[pick] >= (1 + a) * math.log(n))
        best = (ratios >= a * math.log(n)).mean(1).min()
        bound = 2 * best + n ** (a - 1)
        assert got <= bound + 1e-12
        tight = max(tight, got / bound)
    assert tight > 0.1


def misleading_instance():
    """A perfect model, a challenger that stakes all on an event of probability 1/16, and a model that misses 1/32."""
    uniform = np.full(64, 1 / 64)
    staked = np.where(np.arange(64) < 4, 1 / 4, 0.0)
    holed = uniform.copy()
    holed[:4], holed[4:6], holed[6:] = 2 / 64, 0.0, (1 - 8 / 64) / 58
    return uniform, [uniform, staked, holed]


def test_the_offset_is_right_where_the_simple_tournament_is_misled():
    data, models = misleading_instance()
    n = 16
    with np.errstate(divide="ignore"):
        logprobs = np.log(models)
    coverage = [np.mean(np.log(data) - values >= math.log(n)) for values in logprobs]
    assert coverage[0] == 0 < coverage[2]
    simple = hold_tournament(logprobs, n, replicates=0)[0]
    assert simple.ranking[0] == 2
    np.testing.assert_allclose(simple.scores, [4 / 64, 60 / 64, 2 / 64])
    rng = np.random.default_rng(0)
    generations = [OnPolicy(logprobs[:, rng.choice(64, size=4_000, p=model)]) for model in models]
    offset = hold_tournament(logprobs, n, on_policy=generations, replicates=200)[0]
    assert offset.ranking[0] == 0
    assert offset.win_rates[0] > 0.8  # where the offset draws level, the mean challenge decides, and for the other
    assert offset.offsets[1, 0] == pytest.approx(2 * 4 / 64, abs=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([1, 1.5]))
def test_the_offset_tournament_is_the_slow_loop_s(size, seed, gamma):
    table = random_table(size, 9, seed, spread=3)
    sets = [random_table(size, 7 + b, seed + b + 1, spread=3) for b in range(size)]
    offsets = [
        [
            2 * gamma * np.mean([challenge(*pair, 4) for pair in zip(sets[b][a], sets[b][b])]) * (a != b)
            for b in range(size)
        ]
        for a in range(size)
    ]
    _, scores, ranking, tied = slow_tournament(table.tolist(), 4, offsets)
    generations = [OnPolicy(values) for values in sets]
    (standing,) = hold_tournament(table, 4, on_policy=generations, gamma=gamma, replicates=0)
    np.testing.assert_allclose(standing.scores, scores, atol=1e-12)
    np.testing.assert_allclose(standing.offsets, offsets, atol=1e-12)
    assert (standing.ranking, standing.tied) == (tuple(ranking), tuple(tied))


def test_a_race_keeps_the_best_and_drops_the_hopeless_early():
    for seed in range(5):
        table = random_table(12, 20_000, seed, spread=0.5)
        table[4:] -= np.linspace(1, 9, 8)[:, None]
        result = race(list(table), 4, confidence=0.99, seed=seed)
        assert hold_tournament(table, 4, replicates=0)[0].ranking[0] in result.survivors
        dropped = sorted(set(range(12)) - set(result.survivors))
        assert len(dropped) >= 4
        assert (result.rows[dropped] < 20_000).all()
        if len(result.survivors) > 1:
            full = challenge_rates(table, 4)
            np.testing.assert_allclose(result.rates[:, result.survivors], full[:, result.survivors])


def test_a_race_does_not_drop_the_best_for_a_bad_start():
    rng = np.random.default_rng(0)
    for seed in range(20):
        table = np.where(rng.random((10, 5_000)) < 0.02, -9.0, -1.0)
        best = hold_tournament(table, 16, replicates=0)[0].tied
        assert set(best) <= set(race(list(table), 16, confidence=0.9, seed=seed).survivors)


def test_a_race_among_equals_drops_nobody():
    table = [random_table(1, 5_000)[0]] * 4
    assert race(table, 2).survivors == (0, 1, 2, 3)


@pytest.mark.parametrize("upper", [False, True])
def test_the_bounds_of_a_race_are_chernoff_s(upper):
    mean = np.array([0.0, 0.01, 0.3, 0.99, 1.0])
    bound = _kl_bound(mean, 0.05, upper=upper)
    assert ((bound >= mean) if upper else (bound <= mean)).all()
    inner = (bound > 0) & (bound < 1)
    np.testing.assert_allclose(_kl(mean[inner], bound[inner]), 0.05, atol=1e-9)
    assert (inner | (mean == float(upper))).all()


def test_guarantees_carry_their_numbers():
    text = simple_guarantee(16, 20, 1000, a=0.0, delta=0.1)
    assert "with probability 90 %" in text
    assert "Cov_16 of the pick is at most the least Cov_1 of the 20 candidates + 0.0625" in text
    assert f"+ {math.log(20 / 0.1) / 1000:.3g} (log" in text
    assert "promises nothing" in offset_guarantee(16, 20, 1000, gamma=2)
    assert "meet it" in offset_guarantee(32, 20, 1000, gamma=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hold_tournament([], 4), "`logprobs` must hold at least one candidate"),
        (lambda: hold_tournament([[-1.0], [-1.0, -2.0]], 4), "candidate 0 has 1 and candidate 1 has 2"),
        (lambda: hold_tournament([[-1.0], [math.nan]], 4), r"`logprobs\[1\]` .* row 0 is nan"),
        (lambda: hold_tournament([[-1.0]], 0.5), "`n` must be a finite number >= 1"),
        (lambda: hold_tournament([[-1.0, -1.0]], 4, groups=[1]), "`groups` must have one label a row, 2"),
        (lambda: hold_tournament([[-1.0]], 4, gamma=0), "`gamma` must be finite and > 0"),
        (lambda: hold_tournament([[-1.0]], 4, on_policy=[]), "each of the 1 candidates, but holds 0"),
        (lambda: hold_tournament([[-1.0]], 4, on_policy=[OnPolicy([[-1.0]] * 2)]), "all 1 candidates, but has 2"),
        (lambda: hold_tournament([[-1.0]], 4, on_policy=[OnPolicy([[-math.inf]])]), "row 0 has probability 0"),
        (lambda: simple_guarantee(4, 2, 10, a=2), r"`a` must lie in \[0, 1\]"),
        (lambda: simple_guarantee(4, 2, 10, delta=0), "`delta` must lie strictly between"),
        (lambda: race([np.zeros(3)], 4, confidence=1), "`confidence` must lie strictly between"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
