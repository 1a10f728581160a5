"""The main job at a size of seconds: from the command line to the report, killed and resumed, on two processes."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from hf_coverage import CoverageProfile
from hf_coverage.tasks.graph_search import GraphSearch
from recipes import pretrain
from recipes.checkpoint_report import pass_at_n
from recipes.settings import parse_section, read_settings, refuse_other_settings
from tests.processes import Job, run, run_by_torchrun

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "recipes" / "graph_search" / "small.yaml"
TINY = {
    "threads": 1,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "measure.rows": 100,
    "measure.n": (2, 5.7),
    "measure.pass_at": 4,
    "pretrain.max_steps": 24,
    "pretrain.save_steps": 4,
    "pretrain.per_device_train_batch_size": 16,
    "finetune.max_steps": 24,
    "finetune.save_steps": 4,
    "finetune.eval_steps": 4,
    "finetune.per_device_train_batch_size": 16,
}


def command(output: Path, *more: str) -> list[str]:
    words = ["-m", "recipes.pretrain", "--config", str(SMALL), "--output_dir", str(output)]
    for name, value in TINY.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return [*words, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run that nothing interrupted: its folder and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, run(*command(output))


def profiles(output: Path) -> dict[str, CoverageProfile]:
    return {file.stem: CoverageProfile.from_json(file) for file in (output / "profiles").iterdir()}


def test_run_ends_with_table_figures_page_and_results(finished):
    output, printed = finished
    assert sorted(profiles(output)) == sorted(f"step-{step}" for step in range(0, 25, 4))
    for title in ("step", "cross entropy", "KL", "Cov_2", "Cov_5.7", "Pass@4"):
        assert title in (output / "table.md").read_text()
    assert "Rank correlation" in printed
    assert "Pass@4 is" in printed
    assert "report.html" in printed
    for name in ("figure_1_left.png", "figure_1_right.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["']?https?:""", page)

    card = ModelCard.load(output / "card" / "README.md")
    assert {entry.metric_type for entry in card.data.eval_results} >= {"cov_2", "cov_5.7", "kl"}
    assert "Pass@4" in card.text

    (file,) = output.glob("results_*.json")
    results = json.loads(file.read_text())
    last = profiles(output)["step-24"]
    row = results["results"]["step 24"]
    assert row["kl,none"] == last.kl
    assert row["cov_5.7,none"] == last.cov(5.7)
    assert row["pass@4,none"] == pass_at_n(last, 4)
    assert results["higher_is_better"]["step 24"] == {
        "cov_2": False, "cov_5.7": False, "miss_2": False, "miss_5.7": False,
        "kl": False, "sequence_cross_entropy": False, "pass@4": True,
    }  # fmt: skip
    assert results["config"]["finetune"]["max_steps"] == 24


def test_evaluations_in_the_log_are_the_profiles(finished):
    output, _ = finished
    state = json.loads((output / "finetune" / "checkpoint-24" / "trainer_state.json").read_text())
    logged = {entry["step"]: entry for entry in state["log_history"] if "eval_kl" in entry}
    for name, profile in profiles(output).items():
        entry = logged[int(name.removeprefix("step-"))]
        assert entry["eval_kl"] == profile.kl
        assert entry["eval_cov_5.7"] == profile.cov(5.7)


def test_training_learns_and_only_responses_count(finished):
    output, _ = finished
    state = json.loads((output / "finetune" / "checkpoint-24" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "eval_kl" in entry]
    assert logged[-1]["eval_kl"] < logged[0]["eval_kl"]
    # six tokens a response: the loss of the Trainer is the cross-entropy of responses, a token
    for entry in logged:
        assert entry["eval_loss"] * 6 == pytest.approx(entry["eval_sequence_cross_entropy"], rel=0.02)


@pytest.mark.parametrize(
    "moments",
    [
        ["finetune/checkpoint-12/model.safetensors"],  # in the middle of writing a checkpoint
        pytest.param(["pretrain/checkpoint-8", "pretrain/checkpoint-20", "finetune"], marks=pytest.mark.slow),
    ],
    ids=["once", "in both phases"],
)
def test_killed_at_any_point_the_same_command_goes_on(finished, tmp_path, moments):
    output = tmp_path / "run"
    for moment in (output / name for name in moments):
        job = Job(*command(output))
        while job.poll() is None and not moment.exists():
            time.sleep(0.002)
        job.kill()
        assert job.poll() == -signal.SIGKILL, "the run ended before it could be killed"
    whole_checkpoints = [file.with_name("model.safetensors") for file in output.glob("*/*/trainer_state.json")]
    written = {file: file.stat().st_mtime_ns for file in whole_checkpoints}
    run(*command(output))
    assert written
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in written.items()), "it began again, not went on"
    whole, _ = finished
    for name in profiles(whole):
        file = Path("profiles") / f"{name}.json"
        assert (output / file).read_bytes() == (whole / file).read_bytes()
    for step in (4, 24):
        file = Path("finetune") / f"checkpoint-{step}" / "model.safetensors"
        ours, theirs = load_file(output / file), load_file(whole / file)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_two_processes_take_the_same_steps(finished, tmp_path):
    output = tmp_path / "run"
    half = [f"--{phase}.per_device_train_batch_size" for phase in ("pretrain", "finetune")]
    printed = run_by_torchrun(*command(output, half[0], "8", half[1], "8")).stdout
    assert printed.count("Written:") == 1
    assert len(list(output.glob("results_*.json"))) == 1
    whole, alone = profiles(output), profiles(finished[0])
    assert whole.keys() == alone.keys()
    for name, profile in alone.items():
        np.testing.assert_allclose(whole[name].log_ratios, profile.log_ratios, atol=1e-3)


@pytest.mark.slow
def test_a_folder_keeps_one_run(finished):
    output, _ = finished
    done = Job(*command(output, "--seed", "1")).wait()
    assert done.returncode == 1
    assert "holds a run with other settings" in done.stderr


def test_cut_short_checkpoints_are_passed_over(tmp_path):
    assert pretrain.last_checkpoint(tmp_path) is None
    for step, text in ((5, "{}"), (10, "{}"), (15, '{"epoch": 0.'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert pretrain.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_pass_at_n_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logprobs = np.append(-rng.exponential(2, size=50), [0.0, -np.inf, -40.0])
    profile = CoverageProfile.from_logprobs(logprobs, np.zeros_like(logprobs))
    for n in (1, 4, 12):
        slow = np.mean([1 - (1 - np.exp(value)) ** n for value in logprobs])
        assert pass_at_n(profile, n) == pytest.approx(slow, abs=1e-14)
    with pytest.raises(ValueError, match="one right answer a prompt"):
        pass_at_n(CoverageProfile.from_logprobs([-2.0], [-1.0]), 4)


SECTIONS = ["run", "task"]


def test_command_line_lies_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("run:\n  seed: 3\n  output_dir: x\ntask:\n  weights: [0.5, 0.5]\n")
    words = ["--seed", "4", "--config", str(file), "--task.weights", "0.1", "0.9", "--task.flag", "true"]
    settings = read_settings(words, SECTIONS, description=None)
    assert settings == {
        "run": {"seed": 4, "output_dir": "x"},
        "task": {"weights": [0.1, 0.9], "flag": True},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tusk.weights", "1"], "unknown section 'tusk': expected run, task"),
        (["--seed"], "expected `--section.name value`, got '--seed'"),
        (["seed", "4"], "expected `--section.name value`, got 'seed'"),
    ],
)
def test_command_line_errors(tmp_path, capsys, words, message):
    file = tmp_path / "a.yaml"
    file.write_text("run: {}\n")
    with pytest.raises(SystemExit):
        read_settings(["--config", str(file), *words], SECTIONS, description=None)
    assert message in capsys.readouterr().err


def test_sections_are_checked_by_their_dataclass():
    assert parse_section(pretrain.MeasureArguments, {"n": [2, 5.7], "rows": "10"}).n == [2.0, 5.7]
    assert parse_section(pretrain.MeasureArguments, {"rows": None}).rows == 4000
    with pytest.raises(ValueError, match="num_layerz"):
        parse_section(pretrain.TaskArguments, {"num_layerz": 3})


def test_other_settings_are_refused(tmp_path):
    refuse_other_settings(tmp_path / "run", {"run": {"seed": 0}})
    refuse_other_settings(tmp_path / "run", {"run": {"seed": 0}})
    with pytest.raises(ValueError, match="holds a run with other settings"):
        refuse_other_settings(tmp_path / "run", {"run": {"seed": 1}})


def test_the_papers_size():
    paper = ["--config", str(ROOT / "recipes" / "graph_search" / "paper.yaml")]
    settings = read_settings(paper, list(pretrain.SECTIONS), description=None)
    parsed = {name: parse_section(pretrain.SECTIONS[name], section) for name, section in settings.items()}
    assert parsed["finetune"].max_steps == 50_000
    model = pretrain.new_model(GraphSearch.figure_1(), parsed["model"])
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    assert blocks == pytest.approx(12 * 6 * 384**2, rel=0.01)
    assert model.config.n_positions == 136
