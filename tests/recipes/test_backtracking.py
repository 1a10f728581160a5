"""The verifiers of the recipe are right and wrong as they say, its figures are what they say, and it runs."""

import json
import sys
from itertools import product

import numpy as np
import pytest

from hf_coverage.functional.prefix_tree import leaf_target
from hf_coverage.functional.random_walk import transition_matrix
from recipes.backtracking import compare
from recipes.backtracking.verifiers import SETTINGS

ABC, PARITY, DYCK = SETTINGS
ARGUMENTS = [
    *["--config", "recipes/backtracking/small.yaml", "--responses", "12", "--mixing", "2"],
    *["--abc_horizons", "2", "3", "--parity_horizons", "3", "--parity_steps", "6", "--dyck_horizons", "4"],
]


def good(setting, response):
    if setting is ABC:
        return 2 not in response
    if setting is PARITY:
        return all((response[at] + response[at + 1] + response[at + 2]) % 2 == 0 for at in range(0, len(response), 3))
    text = "".join("([)]"[token] for token in response)
    while "()" in text or "[]" in text:
        text = text.replace("()", "").replace("[]", "")
    return text == ""


@pytest.mark.parametrize(("setting", "horizon"), [(ABC, 4), (PARITY, 6), (DYCK, 4)])
def test_what_is_right_is_the_share_of_good_responses(setting, horizon):
    responses = [(response, good(setting, response)) for response in product(range(setting.tokens), repeat=horizon)]
    for length in range(horizon + 1):
        for prefix in product(range(setting.tokens), repeat=length):
            share = np.mean([is_good for response, is_good in responses if response[:length] == prefix])
            assert setting.right(prefix, horizon) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("setting", "error"), [(ABC, 2.0), (PARITY, 1), (DYCK, 0.7)])
def test_verifiers_are_wrong_before_the_end_and_right_there(setting, error):
    value = setting.verifier(6, error)
    off = []
    for length in range(7):
        for prefix in product(range(setting.tokens), repeat=length):
            if length == 6:
                assert value(prefix) == float(good(setting, prefix))
            elif setting.right(prefix, 6) > 0:
                off.append(value(prefix) / setting.right(prefix, 6))
    if setting is ABC:
        assert {round(one, 9) for one in off} == {1.0, 2.0}
    elif setting is PARITY:
        assert {round(one, 9) for one in off} == {0.5, 1.0}
        assert value((0, 0, 1)) > 0 == value((0, 0, 1, 0))  # the wrong bit is seen one token late
    else:
        logs = np.log(off)
        assert logs.std() == pytest.approx(0.7, abs=0.1)
        assert abs(logs.mean()) < 0.15
        assert setting.verifier(6, error)((0, 1)) == value((0, 1))


@pytest.mark.parametrize(("setting", "horizon", "error"), [(ABC, 4, 2.0), (PARITY, 6, 1), (DYCK, 4, 0.7)])
def test_steps_to_a_good_response_are_those_of_walks(setting, horizon, error):
    tree = setting.tree(horizon, error)
    found = compare.steps_to_a_good_response(tree)
    goal = tree.is_leaf & (tree.values > 0)
    matrix = transition_matrix(tree, laziness=0.0).toarray()
    steps, law = 0.0, np.eye(1, len(tree))[0]
    for _ in range(20_000):
        law[goal] = 0
        steps += law.sum()
        law = law @ matrix
    assert found["VGB"] == pytest.approx(steps, rel=1e-6)

    rng, counts = np.random.default_rng(0), []
    value = setting.verifier(horizon, error)
    for _ in range(3000):
        prefix, moves = (), 0
        while len(prefix) < horizon:
            weights = np.array([value((*prefix, token)) for token in range(setting.tokens)])
            if weights.sum() == 0:
                prefix = ()
                continue
            prefix = (*prefix, int(rng.choice(len(weights), p=weights / weights.sum())))
            moves += 1
        counts.append(moves)
    assert found["guidance"] == pytest.approx(np.mean(counts), abs=4 * np.std(counts) / 3000**0.5 + 1e-9)


def test_the_distance_counts_failures_and_is_noise_for_what_is_right():
    tree = ABC.tree(2, 2.0)
    wanted = compare.feature_law(ABC, tree)
    assert wanted == pytest.approx({0: 0.25, 1: 0.5, 2: 0.25})
    assert compare.feature_distance(ABC, [(0, 0), (0, 1), (1, 0), (1, 1)], wanted, 4) == pytest.approx(0)
    assert compare.feature_distance(ABC, [(0, 0), (0, 1), (1, 0), (1, 1)], wanted, 8) == pytest.approx(0.5)
    assert compare.feature_distance(ABC, [], wanted, 8) == pytest.approx(1.0)
    assert 0 < compare.sampling_noise(ABC, tree, 1000) < 0.03


def test_guidance_gets_worse_with_the_length_and_backtracking_does_not():
    """Exactly; the README's first figure."""
    found = {h: compare.exact_errors(ABC.tree(h, 2.0), h, 4 * h**2) for h in (2, 5, 8)}
    guided, walked = [[one[key] for one in found.values()] for key in ("guidance", "T steps")]
    assert guided[0] < guided[1] < guided[2]
    assert guided[2] > 0.3
    assert max(walked) < 0.05
    assert max(one["H visits"] for one in found.values()) < 0.05
    assert all(one["stationary"] < 1e-12 for one in found.values())
    steps = {h: compare.steps_to_a_good_response(PARITY.tree(h, 1)) for h in (6, 12)}
    assert steps[12]["guidance"] / steps[6]["guidance"] > 4
    assert steps[12]["VGB"] / steps[6]["VGB"] < 4.5


def test_the_model_is_uniform():
    import torch

    logits = compare.uniform_model(3, 4)(torch.tensor([[0, 2, 1]])).logits
    assert torch.equal(logits, torch.zeros(1, 3, 3))


def test_targets_are_uniform_over_good_responses():
    for setting, horizon, error in ((ABC, 4, 2.0), (PARITY, 6, 1), (DYCK, 6, 0.7)):
        tree = setting.tree(horizon, error)
        number = sum(good(setting, response) for response in product(range(setting.tokens), repeat=horizon))
        law = leaf_target(tree)
        np.testing.assert_allclose(law[law > 0], 1 / number)
        assert (law > 0).sum() == number


def test_the_recipe_runs_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", *ARGUMENTS, "--output_dir", str(tmp_path / "out")])
    compare.main()
    text = (tmp_path / "out" / "report.md").read_text()
    for part in (
        "ABC, exactly: total variation",
        "parity, H = 3, equal budgets",
        "| VGB, T steps |",
        "| Best-of-N |",
    ):
        assert part in text
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("exact.png", "budget.png"))
    found = json.loads((tmp_path / "out" / "parts" / "abc-3.json").read_text())
    for one in found["budget"].values():
        assert one["model_calls"] <= 8 * 3
        assert one["verifier_calls"] <= 8 * 3 * 3
    capsys.readouterr()
    monkeypatch.setattr(compare, "exact_errors", None)  # nothing is computed twice
    compare.main()
    assert (tmp_path / "out" / "report.md").read_text() == text
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--budget", "4"])
    with pytest.raises(ValueError, match="holds a run with other settings"):
        compare.main()
