"""Rules of choice on made-up runs: what they choose, what it is worth on other rows, and what is read and written."""

import json
import math
import sys

import numpy as np
import pytest
from datasets import Dataset

from hf_coverage import CoverageProfile, ScoreTable, choose, tournament
from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.tournament import OnPolicy
from hf_coverage.measure.scores import Scores
from recipes.choice import compare
from recipes.choice.rules import RULES, SAMPLES, Run, judge, pooled, stated, take_splits
from recipes.profiles import write_profile


def made_up(seed=0, rows=80, steps=(0, 5, 10, 15)):
    """Checkpoints that get surer of most answers and give others up."""
    rng = np.random.default_rng(seed)
    hard, base = rng.random(rows) < 0.2, -rng.exponential(1.5, rows)
    logprobs = [base * (1 - 0.04 * step) - hard * 0.5 * step * rng.random(rows) for step in steps]
    return Run(steps, np.array(logprobs))


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Choices without the curves that are drawn of them, which take most of the time."""
    monkeypatch.setattr("hf_coverage.select.choose._curves", lambda *_: ())


def picks(table, reference):
    """What the library picks for each number of samples."""
    choice = choose(table, SAMPLES, reference_logprobs=reference)
    return [choice.pick, *choice.others]


def test_rules_choose_what_the_library_chooses():
    run, rows = made_up(), np.arange(3, 70, 2)
    table = {str(step): run.logprobs[m, rows] for m, step in enumerate(run.steps)}
    chosen, known, unknown = run.choose(rows), picks(table, np.zeros(len(rows))), picks(table, None)
    for k, n in enumerate(SAMPLES):
        edge = max(n, 2)
        expected = {
            "choose, log D known": known[k].winner,
            "choose, log D unknown": unknown[k].winner,
            "hard tournament": tournament(table, edge, bootstrap=0).winner,
            "least Cov_N": min(table, key=lambda name: (coverage(-table[name], edge), -table[name].mean())),
            "cross-entropy": max(table, key=lambda name: table[name].mean()),
            "the last": "15",
        }
        assert {rule: str(run.steps[picks[k]]) for rule, picks in chosen.items()} == expected
    assert len({tuple(picks) for picks in chosen.values()}) > 3


def test_the_offset_tournament_is_held_where_there_are_responses():
    run, rng = made_up(), np.random.default_rng(1)
    own = [OnPolicy(-rng.exponential(2, (4, 30))) for _ in run.steps]
    with_offset = Run(run.steps, run.logprobs, own)
    rows = np.arange(40)
    table = {str(step): run.logprobs[m, rows] for m, step in enumerate(run.steps)}
    on_policy = {b: dict(zip(table, generations.logprobs)) for b, generations in zip(table, own)}
    for n, pick in zip(SAMPLES, with_offset.choose(rows)["offset tournament"]):
        assert str(run.steps[pick]) == tournament(table, max(n, 2), on_policy=on_policy, bootstrap=0).winner
    assert "offset tournament" not in run.choose(rows)


def test_splits_share_no_row_and_leave_none_out():
    splits = take_splits(50, 20, 3, seed=0)
    assert len({tuple(split.mine) for split in splits}) == 3
    for split in splits:
        assert len(split.mine) == 20
        assert sorted([*split.mine, *split.others]) == list(range(50))
    with pytest.raises(ValueError, match="must leave some of 50 rows to judge on, but is 50"):
        take_splits(50, 50, 1, seed=0)


def test_losses_are_against_the_best_on_the_rows_to_judge_on():
    run, (split,) = made_up(), take_splits(80, 30, 1, seed=0)
    judged = judge(run, [split])
    for k, n in enumerate(SAMPLES):
        worth = [np.mean([1 - (1 - math.exp(run.logprobs[m, i])) ** n for i in split.others]) for m in range(4)]
        assert judged["best"][0][k] == pytest.approx(max(worth))
        assert judged["best_steps"][0][k] == run.steps[int(np.argmax(worth))]
        for rule in judged["losses"]:
            pick = run.steps.index(judged["steps"][rule][0][k])
            assert judged["losses"][rule][0][k] == pytest.approx(max(worth) - worth[pick])


def test_what_choose_states_is_held_against_other_rows():
    run, splits = made_up(), take_splits(80, 30, 8, seed=1)
    said = stated(run, splits)
    for rule, reference in (("choose, log D known", np.zeros(30)), ("choose, log D unknown", None)):
        table = {str(m): run.logprobs[m, splits[0].mine] for m in range(4)}
        for k, pick in enumerate(picks(table, reference)):
            losses = run.losses[rule][k] if reference is None else 1 - run.passes[k]
            means = losses[:, splits[0].others].mean(axis=1)
            behind = means - means.min()
            expected = {
                "within": pick.within,
                "left": len(pick.left) / 4,
                "decided": float(len(pick.left) == 1 or pick.within == 0),
                "probability": pick.probability_best,
                "within_holds": float(behind[int(pick.winner)] <= pick.within),
                "left_holds": float(str(means.argmin()) in pick.left),
                "is_best": float(behind[int(pick.winner)] < 1e-12),
            }
            assert {name: said[rule][name][0][k] for name in expected} == pytest.approx(expected)
    by_pass = pooled([said["choose, log D unknown"]], "pass_is_best")
    assert by_pass.shape == (8, len(SAMPLES))
    assert (by_pass != pooled([said["choose, log D unknown"]], "is_best")).any()
    with pytest.raises(ValueError, match="must be more than the 4 candidates, but are 3"):
        stated(run, take_splits(80, 3, 1, seed=0))


def write_run(folder, seed):
    run = made_up(seed)
    for step, logprobs in zip(run.steps, run.logprobs):
        write_profile(CoverageProfile.from_logprobs(logprobs, np.zeros(80)), folder / "profiles", step)
    return run


def write_responses(folder, run, rng):
    """What an offset tournament leaves of its candidates' responses."""
    names = ["pretrain__checkpoint-9", *(f"finetune__checkpoint-{step}" for step in run.steps[1:])]
    table = -rng.exponential(2, (4, 4, 6))
    for b, name in enumerate(names):
        Dataset.from_dict({"prompt": list("aabbcc"), "reference_logprob": table[b, b]}).save_to_disk(folder / name)
        for a, other in enumerate(names):
            if a != b:
                scores = ScoreTable.begin(folder / name / "scores" / other, {"rows": 6, "shard_rows": 6})
                scores.write(0, Scores(logprob=table[b, a], num_tokens=np.ones(6, dtype=np.int64)))
    return table


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one experiment and one of another, that with responses."""
    for seed in (0, 1):
        write_run(tmp_path / f"first-{seed}", seed)
    run = write_run(tmp_path / "second-0", 2)
    table = write_responses(tmp_path / "second-0" / "offset" / "on_policy", run, np.random.default_rng(3))
    config = {"rows": [10, 20, 30, 41], "splits": 4, "stated_splits": 1, "shown": 20}
    patterns = {"first": f"{tmp_path}/first-*", "second": f"{tmp_path}/second-*", "third": f"{tmp_path}/third-*"}
    settings = {"run": config | {"output_dir": str(tmp_path / "out")}, "runs": patterns}
    (tmp_path / "compare.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return tmp_path, table


def test_runs_are_judged_once_and_compared_in_tables(runs, monkeypatch):
    folder, _ = runs
    monkeypatch.setattr(sys, "argv", ["compare", "--config", str(folder / "compare.yaml")])
    compare.main()
    tables = (folder / "out" / "tables.md").read_text()
    assert "mean over 2 experiments" in tables
    assert (folder / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results) == ["first", "second"]
    assert all(list(found) == ["10", "20", "30"] for found in results.values())
    assert list(results["second"]["20"]["loss"]) == list(RULES)
    assert "offset tournament" not in results["first"]["20"]["loss"]
    seeds = []
    for seed in (0, 1):
        run = made_up(seed)
        seeds.append(judge(run, take_splits(80, 20, 4, seed=0)))
    for rule, losses in results["first"]["20"]["loss"].items():
        expected = np.mean([judged["losses"][rule] for judged in seeds], axis=(0, 1))
        assert list(losses.values()) == pytest.approx(expected.tolist())
        assert f"| first | {rule} |" in tables

    monkeypatch.setattr(compare, "judge", None)  # what was judged is read again
    compare.main()
    assert (folder / "out" / "tables.md").read_text() == tables
    write_run(folder / "first-0", 7)  # another run in its place is judged anew
    with pytest.raises(TypeError):
        compare.main()


def test_responses_are_read_in_the_order_of_the_steps(runs):
    folder, table = runs
    run = compare.read_run(folder / "second-0")
    np.testing.assert_array_equal([own.logprobs for own in run.on_policy], table)
    with pytest.raises(ValueError, match=r"holds responses of the steps \[0, 5, 10, 15\], but the run has \[0, 5\]"):
        compare.read_on_policy(folder / "second-0" / "offset" / "on_policy", [0, 5])


def test_runs_that_are_not_finished_are_refused(runs, monkeypatch):
    folder, _ = runs
    (folder / "first-1" / "profiles" / "step-15.json").unlink()
    monkeypatch.setattr(sys, "argv", ["compare", "--config", str(folder / "compare.yaml")])
    with pytest.raises(ValueError, match=r"runs of first must have the same steps.*\(0, 5, 10\).*finish them first"):
        compare.main()


def test_without_runs_there_is_nothing_to_compare(runs, monkeypatch):
    folder, _ = runs
    words = ["--config", str(folder / "compare.yaml"), "--output_dir", str(folder / "none")]
    for name in ("first", "second"):
        words += [f"--runs.{name}", str(folder / "nowhere")]
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    with pytest.raises(ValueError, match=r"None of the runs .* is there: train one first"):
        compare.main()
