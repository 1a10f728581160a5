"""Several seeds of the main job at a size of seconds: the tournament of each, the tables over all, and going on."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_coverage import tournament
from hf_coverage.functional.predictiveness import rank_correlations
from recipes import seeds
from tests import processes

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "recipes" / "graph_search" / "small.yaml"
TINY = {
    "selection_rows": 100,
    "threads": 1,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "measure.rows": 50,
    "pretrain.max_steps": 24,
    "pretrain.save_steps": 24,
    "pretrain.per_device_train_batch_size": 16,
    "finetune.max_steps": 8,
    "finetune.save_steps": 4,
    "finetune.eval_steps": 4,
    "finetune.per_device_train_batch_size": 16,
}


def run(output: Path, *numbers: str) -> str:
    words = ["-m", "recipes.seeds", "--config", str(SMALL), "--output_dir", str(output)]
    for name, value in TINY.items():
        words += [f"--{name}", str(value)]
    return processes.run(*words, "--seeds", *numbers)


@pytest.mark.slow
def test_a_seed_is_run_judged_and_only_read_when_asked_again_and_another_can_join_later(tmp_path):
    output = tmp_path / "late"
    printed = run(output, "0")
    assert "better in" in printed
    assert (output / "seed-0" / "tournament" / "best_checkpoint.json").is_file()
    table = (output / "table.md").read_text()
    assert table.count("| tournament, N = 5.7 |") == 2
    for name in ("seeds.png", "choice.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    trained = {file: file.stat().st_mtime_ns for file in output.glob("seed-0/**/*.safetensors")}
    assert any("scores" in file.name for file in trained)
    run(output, "0")
    assert {file: file.stat().st_mtime_ns for file in trained} == trained
    assert (output / "table.md").read_text() == table

    run(output, "0", "1")
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(output / seed, tmp_path / "both" / seed)
    run(tmp_path / "both", "0", "1")
    assert {file: file.stat().st_mtime_ns for file in trained} == trained
    assert (output / "table.md").read_text() == (tmp_path / "both" / "table.md").read_text() != table


def made_up(rng, number):
    """A run of three checkpoints with a real tournament at N = 16 and 4."""
    tables = {f"checkpoint-{step}": -rng.exponential(2, size=50) for step in (24, 4, 8)}
    result = tournament(tables, 16, sweep=(4, 3), bootstrap=0)
    facts = {
        "names": list(result.names),
        "n": result.n,
        "winner": result.winner,
        "sweep": [point._asdict() for point in result.sweep],
        "cross_entropy_choice": result.cross_entropy_choice,
        "suggested_n": 3.0,
    }
    curves = {4: rng.random(3), 8: rng.random(3)}
    found = rank_correlations({"KL": rng.random((3, 9))}, {"Pass@4": rng.random((3, 9))}, replicates=0)
    return seeds.SeedRun(number, [0, 4, 8], rng.random(3), {2.0: rng.random(3)}, curves, found, facts), result


def test_rules_choose_what_the_tournament_says():
    run, result = made_up(np.random.default_rng(0), 0)
    winners = {16: result.winner} | {point.n: point.winner for point in result.sweep}
    names = list(result.names)
    assert run.choice("cross-entropy", 4) == names.index(result.cross_entropy_choice)
    assert run.choice("tournament, N = 16", 4) == names.index(winners[16])
    assert run.choice("tournament, N = samples", 4) == names.index(winners[4])
    assert run.choice("tournament, suggested N", 8) == names.index(winners[3])
    unsuggested = dataclasses.replace(run, tournament=run.tournament | {"suggested_n": None})
    assert unsuggested.choice("tournament, suggested N", 8) == names.index(winners[16])


def test_correlations_are_averaged_over_seeds():
    rng = np.random.default_rng(2)
    runs = [made_up(rng, number)[0] for number in range(3)]
    ((guide, cell),) = seeds.guide_table(runs).rows
    assert guide == "KL"
    assert cell.value == pytest.approx(np.mean([run.correlations.values for run in runs]))
    constant = dataclasses.replace(runs[0].correlations, values=np.full((1, 1), np.nan))
    assert seeds.guide_table([*runs, dataclasses.replace(runs[0], correlations=constant)]).rows == [["KL", None]]


def test_gains_are_differences_within_a_seed():
    rng = np.random.default_rng(1)
    runs = [made_up(rng, number)[0] for number in range(4)]
    rules = ["cross-entropy", "tournament, N = 16"]
    (row,) = seeds.gain_table(runs, rules).rows
    for place, n in ((1, 4), (3, 8)):
        gains = []
        for run in runs:
            names = run.tournament["names"]
            picks = [names.index(run.tournament[key]) for key in ("winner", "cross_entropy_choice")]
            gains.append(run.passes[n][picks[0]] - run.passes[n][picks[1]])
        assert row[place].value == pytest.approx(np.mean(gains))
        half_width = 3.1824463 * np.std(gains, ddof=1) / 2  # Student's t with three degrees of freedom
        assert row[place].high - row[place].value == pytest.approx(half_width)
        assert row[place + 1] == f"{sum(gain > 0 for gain in gains)} of 4"
