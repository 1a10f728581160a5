"""How often every interval that is printed with a percentage holds the truth, on one grid of simulated corpora.

Corpora are drawn cell by cell and judged all at once: an interval holds the truth where its random mean (see
`bounded_mean_interval`) lies neither above nor below it with too small a probability. That is computed here for many
corpora together, apart from the library, and compared with the library's own ends in every cell.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.functional import paired, statistics
from hf_coverage.functional.best_of_n import best_of_n_reward, pass_at_n
from hf_coverage.functional.coverage_profile import coverage_interval
from hf_coverage.functional.miss_profile import miss_interval, miss_upper_bound, sample_budget

ROWS = (50, 200, 1000, 5000)
RATES = (0.002, 0.01, 0.05, 0.2, 0.5)
CLUSTERS = ((1, 0.0), (4, 0.0), (4, 0.5), (4, 1.0), (16, 0.0), (16, 0.5), (16, 1.0))
"""Rows of a prompt, and the correlation of their values."""
WEIGHTS = ((1.0,), (0.25, 1.0, 4.0))
"""What a prompt's rows may weigh, each as often."""

UNIT = 4
"""Values are multiples of 1/4."""
FIRST, MORE = 100, 1000
"""Corpora of a cell, and others in their place where fewer than 98 % of these were right."""
SURE = 12_000
"""So many in place of `MORE` for the bounds, of which hardly any cell is near its level, and must not be below it."""


class Law(NamedTuple):
    """Values, in units, with their probabilities; the first has what is left."""

    values: tuple[int, ...]
    chances: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.dot(self.values, self.chances)) / UNIT


class Cell(NamedTuple):
    rows: int
    law: Law
    size: int
    correlation: float
    weights: tuple[float, ...]


class Corpora(NamedTuple):
    """What B corpora hold: `(K,)` kinds of prompts by mean and weight, and `(B, K)` how many there are of each."""

    means: np.ndarray
    weights: np.ndarray
    counts: np.ndarray

    def rows(self, corpus):
        """A corpus as the library takes it, one row a prompt."""
        kinds = np.repeat(np.arange(self.means.size), self.counts[corpus])
        return self.means[kinds], self.weights[kinds]


def law(values, chances):
    return Law((0, *values), (1 - sum(chances), *chances))


def hits(rate):
    return law([UNIT], [rate])


def shares(rate):
    """Values half of whose mean are 1s, the rest small."""
    return law([1, 2, UNIT], [rate, rate / 2, rate / 2])


def draw(cell: Cell, rng: np.random.Generator, number: int) -> Corpora:
    prompts, (values, chances) = cell.rows // cell.size, cell.law
    steps, atoms = np.cumsum(chances)[:-1], np.array(values)
    shape = (number, prompts, 1 if cell.correlation == 1 else cell.size)
    drawn = np.searchsorted(steps, rng.random(shape, dtype=np.float32), side="right")
    if 0 < cell.correlation < 1:  # rows repeat what is drawn once for the prompt with the root of the correlation
        once = np.searchsorted(steps, rng.random((number, prompts, 1), dtype=np.float32), side="right")
        drawn = np.where(rng.random(shape, dtype=np.float32) < math.sqrt(cell.correlation), once, drawn)
    least = atoms.min()
    totals = (atoms - least)[drawn].sum(2)
    most = (atoms.max() - least) * shape[2] + 1
    weighing = rng.integers(len(cell.weights), size=totals.shape)
    codes = totals + most * weighing + most * len(cell.weights) * np.arange(number)[:, None]
    counts = np.bincount(codes.ravel(), minlength=number * most * len(cell.weights)).reshape(number, -1)
    kinds = np.flatnonzero(counts.any(0))
    means = (kinds % most / shape[2] + least) / UNIT
    return Corpora(means, np.array(cell.weights)[kinds // most], counts[:, kinds])


def chance_above(corpora: Corpora, mean: float) -> np.ndarray:
    """`(B,)` probability that a corpus's random mean, one prompt of value 1 added, lies above `mean`."""
    totals = corpora.counts @ corpora.weights
    extra = corpora.counts @ corpora.weights**2 / totals
    terms = np.broadcast_to(corpora.weights * (corpora.means - mean), corpora.counts.shape)
    terms = np.hstack([terms, (extra * (1 - mean))[:, None]])
    return positive_sum(terms, np.hstack([corpora.counts, np.ones((len(extra), 1))]))


def positive_sum(terms: np.ndarray, times: np.ndarray) -> np.ndarray:
    """P(sum_k a_k Gamma(t_k) > 0) for each of B rows: the inversion of its generating function at the saddlepoint."""
    found = np.where(((terms < 0) & (times > 0)).any(1), np.nan, 1.0)
    rows = np.flatnonzero(np.isnan(found))
    scale = np.where(times > 0, terms, -np.inf)[rows].max(1, keepdims=True)
    a, t = np.where(times[rows] > 0, terms[rows] / scale, 0.0), times[rows]
    low, high = np.full(len(rows), -25.0), np.full(len(rows), 25.0)
    for _ in range(20):  # the slope rises from minus infinity at 0 to infinity at 1
        middle = (low + high) / 2
        s = 1 / (1 + np.exp(-middle))
        rises = (t * a / (1 - a * s[:, None])).sum(1) > 1 / s
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    s = 1 / (1 + np.exp(-(low + high) / 2))
    width = 1 / np.sqrt((t * (a / (1 - a * s[:, None])) ** 2).sum(1) + s**-2.0)
    area, left, step, peak = np.zeros(len(rows)), np.arange(len(rows)), 0.3, None
    for k in range(200):
        line = s[left] + 1j * width[left] * math.sinh(step * k)
        height = np.exp(-(t[left] * np.log1p(-a[left] * line[:, None])).sum(1)) / line
        height *= math.cosh(step * k) * width[left]
        peak = height.real if peak is None else peak
        area[left] += height.real / (1 if k else 2)
        left = left[np.abs(height) > 1e-6 * peak[left]]
        if not left.size:
            break
    found[rows] = step * area / math.pi
    return found


def held(corpora: Corpora, mean: float) -> np.ndarray:
    """`(B,)` whether the 95 % interval of each corpus holds the mean."""
    mirrored = corpora._replace(means=1 - corpora.means)
    return (chance_above(corpora, mean) >= 0.025) & (chance_above(mirrored, 1 - mean) >= 0.025)


def share_true(
    draw_corpora: Callable[[int], Corpora], judge: Callable[[Corpora], np.ndarray], more: int = MORE
) -> float:
    """Share of corpora of which the statement is true."""
    first = judge(draw_corpora(FIRST)).mean()
    if first >= 0.98:
        return float(first)
    return float(np.mean([judge(draw_corpora(500)).mean() for _ in range(more // 500)]))


def bets(corpora: Corpora, mean: float) -> np.ndarray:
    """`(B,)` logarithm of what the bets of `bounded_mean_upper_bound` against a mean have come to, less that of 20."""
    shares = corpora.weights / corpora.weights.max()
    sizes = corpora.counts @ shares
    rates = math.log(20) * (corpora.counts @ shares**2) / sizes**2
    gains = shares * (mean - corpora.means) / (1 - mean)
    capital = np.empty(len(rates))
    known: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    for b, (rate, count) in enumerate(zip(rates.tolist(), corpora.counts)):
        if rate not in known:
            known[rate] = statistics._stakes(mean, rate)
        stakes, money = known[rate]
        with np.errstate(divide="ignore", invalid="ignore"):
            won = np.nan_to_num(np.log1p(stakes[:, None] * gains), neginf=-1e9) @ count
        capital[b] = np.logaddexp.reduce(won + np.log(money))
    return capital - math.log(20)


def mapped(corpora: Corpora) -> Corpora:
    """Differences from -1 to 1 as values in [0, 1]."""
    return corpora._replace(means=(corpora.means + 1) / 2)


def mean_held(corpora: Corpora, one: Law) -> np.ndarray:
    return held(corpora, one.mean)


def difference_held(corpora: Corpora, one: Law) -> np.ndarray:
    return held(mapped(corpora), (one.mean + 1) / 2)


def bound_held(corpora: Corpora, one: Law) -> np.ndarray:
    return bets(corpora, one.mean) < 0


LEVELS = {f"rate {rate}": rate for rate in RATES}
DIFFERENCES = {
    "Cov_N": {
        "0.002 lost": law([UNIT], [0.002]),
        "0.002 lost, 0.002 won": law([-UNIT, UNIT], [0.002, 0.002]),
        "0.01 lost, 0.002 won": law([-UNIT, UNIT], [0.002, 0.01]),
        "0.05 lost, 0.05 won": law([-UNIT, UNIT], [0.05, 0.05]),
        "0.2 lost, 0.05 won": law([-UNIT, UNIT], [0.05, 0.2]),
        "0.5 lost": law([UNIT], [0.5]),
    },
    "miss_N": {
        "0.002 lost, 0.3 a little worse, 0.3 better": law([UNIT, 1, -1, -2], [0.002, 0.3, 0.3, 0.01]),
        "0.05 lost, 0.3 a little better": law([UNIT, -1], [0.05, 0.3]),
        "0.01 lost, 0.5 a little better": law([UNIT, -1], [0.01, 0.5]),
    },
}
PROMPTS = (2, 5, 10, 20, 50, 400, 2000)
ABILITIES = {
    "beta(0.3, 0.3)": stats.beta(0.3, 0.3),
    "beta(0.2, 5)": stats.beta(0.2, 5),
    "all 0.1": stats.uniform(0.1, 0.0),
    "0.02 can, by half": stats.bernoulli(0.02),
}


class Row(NamedTuple):
    """A line of the table: the cells of one kind of interval."""

    name: str
    found: dict[str, float]

    def __str__(self):
        where, least = min(self.found.items(), key=lambda item: item[1])
        near = sum(share < 0.98 for share in self.found.values())
        return f"{self.name:36} {len(self.found):5} {near:6} {least:.3f}  {where}"


def gridded(name, laws, judge, rng, more=MORE):
    """A row of the table over the whole grid of rows, groups and weights."""
    found = {}
    for label, one in laws.items():
        for rows in ROWS:
            for size, correlation in CLUSTERS:
                for weights in WEIGHTS:
                    cell = Cell(rows, one, size, correlation, weights)
                    where = f"{label}; {rows} rows by {size}, correlation {correlation}, {len(weights)} weights"
                    found[where] = share_true(partial(draw, cell, rng), partial(judge, one=one), more)
    return Row(name, found)


def guaranteed(corpora, one):
    """Whether budgets for 1.2 times the rate of responses that need thousands of samples are enough."""
    rate = one.chances[1]
    regret, ratios = 1.2 * rate, np.where(corpora.means > 0, 9.0, 0.5)
    true = next(n for n in range(2, 10**6) if least_miss(rate, n) <= regret)
    return bets(corpora._replace(means=np.exp((true - 1) * np.log(-np.expm1(-ratios)))), regret) < 0


def least_miss(rate, n):
    return rate * (-math.expm1(-9.0)) ** n + (1 - rate) * (-math.expm1(-0.5)) ** n


def sampled(prompts, values, chances):
    """Draw how many of B times P prompts have each value."""
    return lambda rng: lambda number: Corpora(values, np.ones(values.size), rng.multinomial(prompts, chances, number))


def passes(rng, k=16):
    table, found = pass_at_n(np.arange(k + 1), k=k), {}
    for label, ability in ABILITIES.items():
        right = ability.rvs(400_000, random_state=rng) * (0.5 if "half" in label else 1.0)
        chances = stats.binom.pmf(np.arange(k + 1)[:, None], k, right[:20_000]).mean(1)
        for prompts in PROMPTS:
            for n in (1, 4, 16):
                one = sampled(prompts, table[:, n - 1], chances / chances.sum())(rng)
                truth = float(chances @ table[:, n - 1] / chances.sum())  # unbiased
                found[f"{label}; Pass@{n}, {prompts} prompts"] = share_true(one, lambda c, truth=truth: held(c, truth))
    return Row("Pass@N of 16 samples", found)


def best_rewards(rng):
    """Rewards 0, 1/2 and 1 of 4 responses."""
    kinds = np.array(np.meshgrid(*[[0.0, 0.5, 1.0]] * 4)).reshape(4, -1).T
    best, found = best_of_n_reward(kinds), {}
    for half, whole in ((0.3, 0.2), (0.01, 0.002), (0.0, 0.95)):
        chance = np.choose((2 * kinds).astype(int), [1 - half - whole, half, whole])
        alone = chance.prod(axis=1)
        alike = np.where(
            (kinds == kinds[:, :1]).all(1),
            np.choose((2 * kinds[:, 0]).astype(int), [1 - half - whole, half, whole]),
            0,
        )
        for correlation, chances in ((0, alone), (0.5, (alone + alike) / 2), (1, alike)):
            for prompts in PROMPTS:
                for n in (1, 2, 4):
                    truth = float(chances @ best[:, n - 1])
                    one = sampled(prompts, best[:, n - 1], chances / chances.sum())(rng)
                    share = share_true(one, lambda c, truth=truth: held(c, truth))
                    found[f"{half} half, {whole} whole; Best-of-{n}, {prompts} prompts, correlation {correlation}"] = (
                        share
                    )
    return Row("reward of Best-of-N, in [0, 1]", found)


def student(name, sample, mean, rng):
    """What Student's interval holds of means of values without a bound."""
    found = {}
    for rows in ROWS:
        for size, correlation in ((1, 0), (4, 0), (4, 1), (16, 0), (16, 1)):
            prompts = rows // size
            drawn = sample((300, prompts, 1 if correlation else size)).mean(2)
            error = drawn.std(1, ddof=1) / math.sqrt(prompts)
            within = np.abs(drawn.mean(1) - mean) <= stats.t.ppf(0.975, prompts - 1) * error
            found[f"{rows} rows by {size}, correlation {correlation}"] = float(within.mean())
    return Row(f"(Student's, of {name} values)", found)


@pytest.mark.slow
def test_every_interval_holds_as_often_as_it_says(capsys):
    rng = np.random.default_rng(0)
    counts, parts = ({name: one(rate) for name, rate in LEVELS.items()} for one in (hits, shares))
    table = [gridded("Cov_N", counts, mean_held, rng), gridded("miss_N", parts, mean_held, rng)]
    for name, laws in DIFFERENCES.items():
        table.append(gridded(f"difference of {name}", laws, difference_held, rng))
    table += [passes(rng), best_rewards(rng)]
    bounds = [
        gridded("upper bound on miss_N, of 0s and 1s", counts, bound_held, rng, SURE),
        gridded("upper bound on miss_N, of shares", parts, bound_held, rng, SURE),
        gridded("guaranteed budget", counts, guaranteed, rng, SURE),
    ]
    unbounded = [
        student("normal", lambda shape: rng.normal(1, 1, shape), 1.0, rng),
        student("exponential", lambda shape: rng.exponential(1, shape), 1.0, rng),
        student("log-normal", lambda shape: rng.lognormal(0, 1, shape), math.exp(0.5), rng),
        student("rare", lambda shape: rng.normal(size=shape) + 20 * (rng.random(shape) < 0.01), 0.2, rng),
    ]
    with capsys.disabled():
        print(f"\n{'interval':36} cells < .98 least  where")
        print("\n".join(map(str, [*table, *bounds, *unbounded])))
    for row in table:
        assert min(row.found.values()) >= 0.93, row
    for row in bounds:
        assert min(row.found.values()) >= 0.95, row


CELLS = [
    Cell(rows, hits(0.1), size, correlation, weights)
    for rows in (60, 400)
    for size, correlation in ((1, 0.0), (4, 0.5))
    for weights in WEIGHTS
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_grid_judges_what_the_library_gives(cell):
    rng = np.random.default_rng(1)
    for one in (hits(0.1), shares(0.1)):
        corpora = draw(cell._replace(law=one), rng, 3)
        differences = corpora._replace(means=2 * corpora.means - 1)
        for b in range(3):
            alone = corpora._replace(counts=corpora.counts[[b]])
            values, weights = corpora.rows(b)
            low, high = statistics.bounded_mean_interval(values, weights=weights)
            for end in (low, high):
                assert bool(held(alone, end - 1e-6)[0]) == (end == high)
                assert bool(held(alone, end + 1e-6)[0]) == (end == low)
                assert statistics.bounded_mean_p_value(values, end, weights=weights) == pytest.approx(0.05, abs=1e-4)
            bound = statistics.bounded_mean_upper_bound(values, weights=weights)
            assert bets(alone, bound - 1e-6)[0] < 0 < bets(alone, bound + 1e-6)[0]
            apart = paired.paired_loss_difference(values, 1 - values, weights=weights)
            assert (apart.low, apart.high) == pytest.approx((2 * low - 1, 2 * high - 1))
            assert bool(held(mapped(differences), 0.5)[b]) == (apart.p_value >= 0.05)


def test_intervals_of_cov_n_and_miss_n_are_those_of_the_grid():
    rng = np.random.default_rng(2)
    ratios, groups = rng.normal(1, 2, 80), rng.integers(30, size=80).tolist()
    for n in (2, 16):
        expected = statistics.bounded_mean_interval(ratios >= math.log(n), groups=groups)
        assert coverage_interval(ratios, n, groups=groups) == pytest.approx(expected)
        missed = np.where(ratios > 0, -np.expm1(-np.abs(ratios)), 0.0) ** n
        assert miss_interval(ratios, n, groups=groups) == pytest.approx(
            statistics.bounded_mean_interval(missed, groups=groups)
        )
        assert miss_upper_bound(ratios, n, groups=groups) == pytest.approx(
            statistics.bounded_mean_upper_bound(missed, groups=groups)
        )
    result = BestOfNResult.from_rewards((rng.random((40, 4)) < 0.3).astype(float))
    assert result.interval(2) == pytest.approx(statistics.bounded_mean_interval(pass_at_n(result.rewards == 1)[:, 1]))


def test_a_guaranteed_budget_is_too_small_just_where_the_grid_says_so():
    one, rng = hits(0.1), np.random.default_rng(3)
    corpora = draw(Cell(150, one, 1, 0.0, (1.0,)), rng, 8)
    enough = guaranteed(corpora, one)
    true = next(n for n in range(2, 10**6) if least_miss(0.1, n) <= 0.12)
    for b in range(8):
        budget = sample_budget(np.where(corpora.rows(b)[0] > 0, 9.0, 0.5), 0.12)
        assert (budget.guaranteed_n >= true) == bool(enough[b])
    assert not enough.all() or corpora.counts.min() > 0


@pytest.mark.parametrize(
    ("cell", "judge"),
    [
        pytest.param(Cell(200, hits(0.2), 4, 1.0, (0.1, 1.0, 10.0)), mean_held, id="weights"),
        pytest.param(Cell(200, hits(0.002), 1, 0.0, (1.0,)), mean_held, id="rare"),
        pytest.param(Cell(1000, law([UNIT], [0.002]), 16, 0.5, (1.0,)), difference_held, id="rare difference"),
        pytest.param(Cell(200, law([UNIT, -1], [0.01, 0.5]), 16, 0.5, WEIGHTS[1]), difference_held, id="skew"),
    ],
)
def test_intervals_hold_where_it_is_hardest(cell, judge):
    rng = np.random.default_rng(4)
    assert judge(draw(cell, rng, 1000), cell.law).mean() >= 0.93
