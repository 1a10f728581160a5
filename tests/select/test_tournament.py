import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_coverage
from hf_coverage.functional.tournament import hold_tournament
from hf_coverage.functional.tournament_soft import envelope_losses, soft_challenge_rates
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores
from hf_coverage.select.checkpoints import (
    checkpoint_signature,
    distinct_names,
    link_checkpoint,
    write_best_checkpoint,
)
from hf_coverage.select.result import TournamentResult
from hf_coverage.select.tournament import tournament


def random_candidates(number=4, rows=60, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(-15, 3, rows)
    return {f"step-{m}": np.minimum(base + rng.normal(0, 2, rows), 0.0) for m in range(number)}


def write_table(folder, logprob, corpus="c0ffee", shard_rows=7):
    table = ScoreTable.begin(
        folder, {"rows": len(logprob), "shard_rows": shard_rows, "corpus": corpus, "model": {"weights": folder.name}}
    )
    for index in range(table.num_shards):
        part = logprob[table.shard_rows(index).start : table.shard_rows(index).stop]
        table.write(index, Scores(part, np.ones(len(part), np.int64)))
    return table


def test_the_lines_of_the_design_run(tmp_path):
    candidates = random_candidates(2)
    result = hf_coverage.tournament(candidates, n=16)
    assert result.winner == min(result.scores, key=result.scores.get)
    assert result.matrix.shape == (2, 2)
    result.plot(tmp_path / "tournament.png")
    assert (tmp_path / "tournament.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(result, hf_coverage.TournamentResult)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([1, 2, 16]))
def test_the_result_speaks_of_candidates_by_name(seed, number, n):
    candidates = random_candidates(number, 30, seed)
    result = tournament(candidates, n, bootstrap=20)
    (standing,) = hold_tournament(list(candidates.values()), n, replicates=20)
    names = list(candidates)
    assert result.winner == names[standing.ranking[0]]
    assert list(result.scores.values()) == standing.scores.tolist()
    assert (result.matrix == standing.rates).all()
    assert sum(result.win_rates.values()) == pytest.approx(1)
    assert result.ranking == tuple(names[m] for m in standing.ranking)
    assert result.sentence.startswith(f"{result.winner} wins")
    assert ("Tied with it" in result.sentence) == (len(standing.tied) > 1) == bool(result.ties)


def test_arrays_tables_and_folders_give_the_same_result(tmp_path):
    candidates = random_candidates(3)
    expected = tournament(candidates, 4)
    tables = {name: write_table(tmp_path / name, values) for name, values in candidates.items()}
    mixed = {"step-0": candidates["step-0"], "step-1": tables["step-1"], "step-2": str(tmp_path / "step-2")}
    for other in (tables, {name: tmp_path / name for name in candidates}, mixed):
        assert tournament(other, 4).to_json() == expected.to_json()


def test_tables_of_another_corpus_are_refused_by_file(tmp_path):
    candidates = random_candidates(3)
    for name, values in candidates.items():
        write_table(tmp_path / name, values, corpus="other" if name == "step-2" else "c0ffee")
    with pytest.raises(ValueError, match=r"step-2/metadata.json says .*its fingerprint is other, expected c0ffee"):
        tournament({name: tmp_path / name for name in candidates})


def test_unfinished_tables_are_refused(tmp_path):
    table = write_table(tmp_path / "a", random_candidates(1)["step-0"])
    table.shard_path(1).unlink()
    with pytest.raises(ValueError, match="lacks 1 of 9 shards"):
        tournament({"a": tmp_path / "a"})


def test_groups_are_what_is_drawn_anew():
    candidates = random_candidates(3, 60)
    repeated = {name: np.repeat(values, 5) for name, values in candidates.items()}
    alone = tournament(candidates, 2, bootstrap=4000)
    grouped = tournament(repeated, 2, groups=np.repeat(np.arange(60), 5), bootstrap=4000)
    assert (grouped.num_rows, grouped.num_prompts) == (300, 60)
    assert grouped.scores == pytest.approx(alone.scores)
    for name in candidates:
        assert grouped.win_rates[name] == pytest.approx(alone.win_rates[name], abs=0.04)
    assert "300 responses to 60 prompts" in grouped.sentence
    assert f"{math.log(3 / 0.05) / 60:.3g} (log(M/delta)/n)" in grouped.guarantee()


def test_a_sweep_holds_the_tournament_at_every_n():
    candidates = random_candidates(4)
    result = tournament(candidates, 4, sweep=[2, 4, 8])
    assert [point.n for point in result.sweep] == [2, 8]
    for point in result.sweep:
        alone = tournament(candidates, point.n)
        assert (point.winner, point.scores, point.ties) == (alone.winner, alone.scores, alone.ties)


def test_too_large_an_n_is_said_to_be_so_and_another_one_proposed():
    candidates = random_candidates(4)
    result = tournament(candidates, 1e9)
    assert set(result.ties) == set(candidates)
    assert result.decided_by == "cross-entropy"
    assert "is so large that 4 of 4 scores are 0" in result.sentence
    assert f"n={result.suggested_n:.12g} separates them" in result.sentence
    assert not tournament(candidates, result.suggested_n).ties
    # one that was asked for anyway is proposed first
    assert tournament(candidates, 1e9, sweep=[2, 3]).suggested_n == 3
    same = tournament({"a": candidates["step-0"], "b": candidates["step-0"]}, 4)
    assert same.suggested_n is None
    assert "no smaller N that was tried does" in same.sentence
    assert "the order in which they were given" in same.sentence


def test_cross_entropy_s_choice_stands_beside_the_tournament_s():
    rows = np.full(100, -5.0)
    careful, bold = rows - 1.0, rows.copy()
    bold[:8] = -16.0
    result = tournament({"careful": careful, "bold": bold}, 16)
    assert (result.winner, result.cross_entropy_choice) == ("careful", "bold")
    assert "Cross-entropy would choose bold (5.88 nats a response against 6), whose score is 8 %." in result.sentence
    assert result.win_rates["careful"] > 0.99
    assert "more than 99.9 %" in result.sentence or "100 %" in result.sentence


def test_the_offset_tournament_takes_generations_by_name():
    n, outcomes = 16, np.arange(64)
    good = np.full(64, math.log(1 / 64))
    staked = np.where(outcomes < 4, math.log(1 / 4), -math.inf)
    holed = np.where(outcomes < 4, math.log(2 / 64), np.where(outcomes < 6, -math.inf, math.log(56 / 64 / 58)))
    candidates = {"good": good, "staked": staked, "holed": holed}
    rng = np.random.default_rng(0)
    drawn = {name: rng.choice(64, 3_000, p=np.exp(values)) for name, values in candidates.items()}
    on_policy = {b: {a: candidates[a][drawn[b]] for a in reversed(list(candidates))} for b in candidates}
    assert tournament(candidates, n).winner == "holed"
    result = tournament(candidates, n, on_policy=on_policy)
    assert (result.winner, result.gamma) == ("good", 1.0)
    assert "less the offset" in result.sentence
    assert "Theorem 6.4" in result.guarantee()
    with pytest.raises(ValueError, match=r"`on_policy\['good'\]` must have an entry for each candidate"):
        tournament(candidates, n, on_policy=on_policy | {"good": {}})


def test_racing_finds_the_same_winner_and_says_who_was_dropped():
    candidates = {f"c{m}": values - 0.7 * m for m, values in enumerate(random_candidates(10, 6_000).values())}
    full = tournament(candidates, 4, bootstrap=100)
    raced = tournament(candidates, 4, bootstrap=100, race_confidence=0.99)
    assert raced.winner == full.winner
    assert raced.dropped
    assert all(rows < 6_000 for rows in raced.dropped.values())
    assert raced.ranking[-len(raced.dropped) :][-1] in raced.dropped
    kept = set(candidates) - set(raced.dropped)
    assert all(raced.scores[name] == full.scores[name] for name in kept)
    assert set(raced.win_rates) == kept
    assert f"Racing dropped {len(raced.dropped)} of 10" in raced.sentence
    with pytest.raises(ValueError, match="`race_confidence` is for one N"):
        tournament(candidates, 4, sweep=[2], race_confidence=0.99)


def test_a_race_proposes_an_n_among_all_and_not_among_its_survivors():
    # At N = 1000 only "late" is worse than others anywhere; at smaller N it is the best of all, after "early" and
    # "even", which nothing tells apart, give up a third of the responses against it.
    rng = np.random.default_rng(0)
    rows = np.full(20_000, -20.0)
    hole, third = rng.random(20_000) < 0.2, rng.random(20_000) < 0.33
    late = np.where(hole, rows - 8.0, rows)
    candidates = {"early": np.where(third, rows - 3.0, rows), "even": np.where(third, rows - 3.0, rows), "late": late}
    raced = tournament(candidates, 1000, race_confidence=0.99, bootstrap=0)
    full = tournament(candidates, 1000, bootstrap=0)
    assert set(raced.dropped) == {"late"}
    assert raced.suggested_n == full.suggested_n
    assert tournament(candidates, full.suggested_n, bootstrap=0).winner == "late"
    assert f"n={full.suggested_n:.12g} separates them" in raced.sentence


def results():
    candidates = random_candidates(4, 2_000)
    yield tournament({"a": [-1.0, -math.inf], "b": [-2.0, -3.0]}, 4, sweep=[2, 3])
    yield tournament({"only": [-1.0]}, bootstrap=0)
    yield tournament(
        {name: values - 4.0 * m for m, (name, values) in enumerate(candidates.items())}, 4, race_confidence=0.9
    )
    drawn = {b: {a: candidates[a][:50] for a in candidates} for b in candidates}
    yield tournament(candidates, 1e9, on_policy=drawn, gamma=2.0, bootstrap=10)


@pytest.mark.parametrize("result", list(results()), ids=["sweep", "one", "race", "offset"])
def test_json_reads_back_as_it_was(result, tmp_path):
    text = result.to_json(tmp_path / "result.json")
    for source in (text, tmp_path / "result.json", str(tmp_path / "result.json")):
        read = TournamentResult.from_json(source)
        for name, value in vars(result).items():
            assert type(getattr(read, name)) is type(value), name
            np.testing.assert_equal(getattr(read, name), value, name)
        assert read.to_json() == text
    assert read.sentence == result.sentence
    assert read.plot().axes[0].get_title() == result.plot().axes[0].get_title()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 is not 1"),
        ({"format": None}, "format None is not 1"),
        ({"extra": 1}, "'extra'"),
        ({"winner": "b"}, "its winner 'b' is not the first of its ranking, 'a'"),
        ({"rates": [[0.0]]}, r"`rates` and `offsets` must have shape \(2, 2\)"),
        ({"scores": {"a": 0.0}}, "`scores` must have an entry for each of"),
        ({"ties": ["c"]}, "`ties` must be of"),
        ({"sweep": [{"n": 2}]}, "KeyError"),
    ],
)
def test_json_of_something_else_is_refused(change, message):
    facts = json.loads(tournament({"a": [-1.0, -2.0], "b": [-2.0, -3.0]}, 4).to_json())
    with pytest.raises(ValueError, match=f"`source` is not a tournament written by `to_json`.*{message}"):
        TournamentResult.from_json(json.dumps(facts | change))
    del facts["names"]
    with pytest.raises(ValueError, match="'names'"):
        TournamentResult.from_json(json.dumps(facts))
    with pytest.raises(ValueError, match="`source` is not a tournament"):
        TournamentResult.from_json("{")


def test_json_is_strict_and_whole(tmp_path):
    result = tournament({"a": [-1.0, -math.inf], "b": [-2.0, -3.0]}, 4, sweep=[2])
    text = result.to_json(tmp_path / "result.json")
    facts = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert json.loads((tmp_path / "result.json").read_text()) == facts
    assert facts["winner"] == result.winner
    assert facts["cross_entropies"]["a"] is None
    assert facts["rates"] == result.rates.tolist()
    assert facts["sweep"][0]["n"] == 2
    assert facts["guarantee"] == result.guarantee()


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "`candidates` must map at least one name"),
        ([[-1.0]], "`candidates` must map at least one name"),
        ({"a": [-1.0], "b": [-1.0, -2.0]}, "'a' has 1 and 'b' has 2"),
        ({"a": [0.5]}, r"`candidates\['a'\]` must hold natural-log probabilities"),
    ],
)
def test_errors_name_the_candidate(candidates, message):
    with pytest.raises(ValueError, match=message):
        tournament(candidates)


def test_names_are_as_short_as_they_can_be():
    assert distinct_names(["run/checkpoint-1", "run/checkpoint-2/"]) == ["checkpoint-1", "checkpoint-2"]
    assert distinct_names(["x/a/c", "y/a/c"]) == ["x/a/c", "y/a/c"]
    assert distinct_names(["x/a", "x/b"], parts=2) == ["x/a", "x/b"]
    with pytest.raises(ValueError, match="is given twice"):
        distinct_names(["a", "a/"])


def test_the_winner_is_left_where_tools_find_it(tmp_path):
    folders = {name: tmp_path / "run" / name for name in random_candidates(2)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    result = tournament(random_candidates(2), 4)
    record = json.loads(write_best_checkpoint(tmp_path / "out" / "best_checkpoint.json", result, folders).read_text())
    assert record["best_model_checkpoint"] == str(folders[result.winner])
    assert (record["metric"], record["best_metric"]) == ("tournament_4", result.scores[result.winner])
    assert record["greater_is_better"] is False
    link = link_checkpoint(tmp_path / "run" / "best", folders["step-0"])
    link = link_checkpoint(link, folders["step-1"])
    assert link.resolve() == folders["step-1"]
    assert not link.readlink().is_absolute()
    with pytest.raises(FileExistsError, match="is no symbolic link"):
        link_checkpoint(folders["step-0"], folders["step-1"])
    with pytest.raises(FileNotFoundError, match="a link needs a folder"):
        link_checkpoint(link, "org/model")


def test_a_signature_changes_with_the_model_and_not_with_the_training_state(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = checkpoint_signature(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / "trainer_state.json").write_text("{}")
    assert checkpoint_signature(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert checkpoint_signature(tmp_path) != before
    assert checkpoint_signature("org/model-on-the-hub") == {}


def test_a_soft_tournament_has_no_ties_and_says_what_it_found():
    rng = np.random.default_rng(0)
    table = {name: np.minimum(rng.normal(-3, 1, 200), 0) for name in "abc"}
    hard, soft = tournament(table, 1000), tournament(table, 1000, edge="soft", sweep=[8])
    assert len(hard.ties) == 3
    assert soft.ties == ()
    losses = envelope_losses(table.values(), 8).mean(axis=1)
    assert soft.sweep[0].scores == pytest.approx(dict(zip("abc", losses)))
    assert soft.rates == pytest.approx(soft_challenge_rates(table.values(), 1000))
    assert soft.sentence.startswith(f"{soft.winner} wins the soft tournament of 3 candidates at N = 1000")
    assert soft.guarantee().startswith("With probability 95 %, miss_3.162e+04 of the pick")


def test_a_soft_tournament_takes_no_offset_and_no_race():
    table = {"a": [-1.0, -2.0], "b": [-2.0, -1.0]}
    with pytest.raises(ValueError, match="`edge` 'soft' has no offset and no race"):
        tournament(table, 4, edge="soft", race_confidence=0.9)
    with pytest.raises(ValueError, match="`edge` must be 'hard' or 'soft'"):
        tournament(table, 4, edge="round")
