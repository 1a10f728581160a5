"""Graph search at several horizons at a size of seconds: the table and figure, and a run killed half-way."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hf_coverage import CoverageProfile
from recipes import horizon
from tests.processes import Job, run

ROOT = Path(__file__).parents[2]
GRAPH_SEARCH = ROOT / "recipes" / "graph_search"
TINY = {
    "horizons": (4, 6),
    "seeds": (0, 1),
    "threads": 1,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "measure.rows": 200,
    "warm.max_steps": 4,
    "warm.save_steps": 2,
    "warm.per_device_train_batch_size": 8,
    "train.max_steps": 12,
    "train.eval_steps": 6,
    "train.save_steps": 3,
    "train.per_device_train_batch_size": 8,
}


def command(output: Path) -> list[str]:
    config = GRAPH_SEARCH / "horizon_small.yaml"
    words = ["-m", "recipes.horizon", "--config", str(config), "--output_dir", str(output)]
    for name, value in TINY.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


@pytest.mark.slow
def test_killed_half_way_it_ends_as_if_nothing_had_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "Ratios are to the least H" in run(*command(whole))
    assert "KL of a coin" in (whole / "table.md").read_text()
    assert (whole / "figure_2.png").read_bytes().startswith(b"\x89PNG")
    profiles = sorted(file.relative_to(whole) for file in whole.glob("h-*/seed-*/profiles/*.json"))
    assert len(profiles) == 2 * 2 * 2

    job = Job(*command(killed))
    while job.poll() is None and not (killed / "h-6" / "seed-0" / "train" / "checkpoint-9").exists():
        time.sleep(0.002)
    job.kill()
    assert job.poll() == -signal.SIGKILL, "the run ended before it could be killed"
    done = {file: file.stat().st_mtime_ns for file in killed.glob("h-4/**/model.safetensors")}
    assert done
    run(*command(killed))
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    for file in [Path("table.md"), *profiles]:
        assert (whole / file).read_bytes() == (killed / file).read_bytes()


def test_a_coin_loses_a_factor_of_two_at_every_fork():
    task = horizon.GraphSearch.figure_2(8, nodes_per_layer=2, num_names=40, prompt_format="aligned")
    coin = horizon.coin_profile(task, [0.94, 0.05, 0.01], 2000)
    assert coin.kind == "density"
    rows = task.sample(2000, (0.94, 0.05, 0.01), seed=0)
    forks = rows.graphs.num_wide_layers
    slow = [
        density + count * np.log(2)
        for density, count in zip(task.log_density(rows.graphs, rows.paths, (0.94, 0.05, 0.01)), forks)
    ]
    assert coin.kl == pytest.approx(np.mean(slow))
    # four forks, D = 5/6 + 1/96 along the rule: 13.5 times a coin's 1/16
    assert coin.cov(13) == pytest.approx(0.05, abs=0.015)
    assert coin.cov(14) == 0


def test_ratios_are_of_medians():
    rng = np.random.default_rng(0)
    coin = CoverageProfile.from_logprobs([-3.0, -0.1], [0.0, -0.1])
    results = [
        horizon.Measured(
            h, [5, 10], rng.random((3, 2)), {16.0: np.zeros((3, 2)) if h == 4 else rng.random((3, 2))}, coin
        )
        for h in (4, 8)
    ]
    least, row = horizon.horizon_table(results, [16.0]).rows
    assert least[2] == 1
    assert row[1].value == np.median(results[1].kl[:, 1])
    assert row[2] == pytest.approx(np.median(results[1].kl[:, 1]) / np.median(results[0].kl[:, 1]))
    assert least[5] is None  # no ratio to nothing
    assert row[5] is None


@pytest.mark.parametrize("name", ["horizon_small", "horizon_paper"])
def test_settings_are_whole(name):
    settings = horizon.read_settings(
        ["--config", str(GRAPH_SEARCH / f"{name}.yaml")], list(horizon.SECTIONS), description=None
    )
    for section, kind in horizon.SECTIONS.items():
        more = {"output_dir": "x"} if kind is horizon.TrainingArguments else {}
        horizon.parse_section(kind, settings[section] | more)
    task = settings["task"]
    for h in settings["run"]["horizons"]:
        weights = task["weights"]
        graphs = horizon.GraphSearch.figure_2(
            h, **{key: task[key] for key in ("nodes_per_layer", "num_names", "prompt_format")}
        )
        assert len(graphs.sample(4, weights, seed=0).prompts) == 4
