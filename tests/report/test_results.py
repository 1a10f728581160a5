import json
import math
import re
import subprocess
from datetime import datetime

import pytest
from huggingface_hub import ModelCard
from lm_eval.utils import make_table

from hf_coverage import BestOfNResult, CoverageProfile
from hf_coverage.report.card import success_eval_results, write_model_index
from hf_coverage.report.provenance import git_hash, provenance, versions
from hf_coverage.report.results import coverage_results, success_results, write_results, write_samples

PROFILE = CoverageProfile.from_logprobs([-1.0, -2.0, -9.0, -1.0], [-1.0] * 4, groups=list("aabb"), name="small")
ZERO = CoverageProfile.from_logprobs([-1.0, -math.inf], [-1.0, -1.0], groups=list("aa"), name="zero")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_every_metric_is_a_pair_under_lm_eval_s_names():
    found = coverage_results([PROFILE], [2, 16], config={"seed": 3})
    metrics = PROFILE.metrics([2, 16])
    assert {
        key.removesuffix(",none"): value for key, value in found["results"]["small"].items() if key != "alias"
    } == (metrics)
    assert found["higher_is_better"]["small"] == dict.fromkeys(
        ["cov_2", "cov_16", "miss_2", "miss_16", "kl", "sequence_cross_entropy"], False
    )
    assert found["intervals"]["small"]["cov_16,none"] == list(PROFILE.interval(16))
    assert found["intervals"]["small"]["miss_16,none"] == list(PROFILE.miss_interval(16))
    assert found["n-samples"]["small"] == {"original": 4, "effective": 4}
    assert found["configs"]["small"] == {"reference": "density", "num_rows": 4, "num_prompts": 2}
    assert found["config"] == {"seed": 3}


def test_lm_eval_s_own_table_reads_them():
    table = make_table(coverage_results([PROFILE, ZERO], [16]))
    row = next(line for line in table.splitlines() if "cov_16" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "small"
    assert "↓" in cells
    assert [float(cells[6]), float(cells[8])] == pytest.approx(list(PROFILE.metrics([16]).values())[:2], abs=1e-4)


def test_the_file_is_strict_json_with_a_date_in_its_name(tmp_path):
    path = write_results(tmp_path / "new", coverage_results([ZERO], [16]))
    stamp = re.fullmatch(r"results_(.*)\.json", path.name)[1]
    datetime.strptime(stamp, "%Y-%m-%dT%H-%M-%S.%f")
    metrics = read(path)["results"]["zero"]
    assert metrics["kl,none"] == "inf"
    assert metrics["kl_stderr,none"] == "N/A"
    assert float(metrics["kl,none"]) == math.inf


def test_samples_stand_beside_the_results_with_the_same_date(tmp_path):
    results = write_results(tmp_path, coverage_results([ZERO], [16]))
    samples = write_samples(results, ZERO)
    assert samples.name == results.name.replace("results_", "samples_zero_").replace(".json", ".jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1]
    assert [float(row["log_ratio"]) for row in rows] == ZERO.log_ratios.tolist()
    assert [float(row["logprob"]) for row in rows] == ZERO.logprobs.tolist()
    assert [row["group"] for row in rows] == ZERO.groups.tolist()
    assert "weight" not in rows[0]


def test_the_upper_bound_keeps_its_name():
    found = coverage_results([CoverageProfile.from_logprobs([-1.0, -2.0], name="plain")], [2])
    assert "cov_upper_2,none" in found["results"]["plain"]
    assert list(found["intervals"]["plain"]) == ["cov_upper_2,none", "miss_upper_2,none"]


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two are called 'small'"):
        coverage_results([PROFILE, PROFILE], [2])


def test_the_commit_is_that_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_hash() is None
    for command in ("init", "-c user.name=a -c user.email=a@b commit --allow-empty -m one"):
        subprocess.run(["git", *command.split()], check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_hash() == head


def test_provenance_has_what_is_needed_to_run_it_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/hf-coverage", "report", "a b"])
    origin = provenance(seed=3, corpus=None)
    assert origin["command"] == "hf-coverage report 'a b'"
    assert origin["seed"] == 3
    assert "corpus" not in origin
    assert all(version in origin["versions"] for version in versions().values())


def test_best_of_n_opens_in_lm_eval_s_table_and_its_entries_in_a_card(tmp_path):
    result = BestOfNResult.from_rewards([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], name="org/model", verifier="exact-match")
    read = json.loads(write_results(tmp_path, success_results(result, [1, 3])).read_text())
    table = make_table(read)
    assert "|org/model|" in table.replace(" ", "")
    for metric in ("pass@1", "pass@3", "best_of_1", "best_of_3"):
        assert f"|{metric}|↑|" in table.replace(" ", "")
    assert "|failed|↓|0.0|" in table.replace(" ", "")
    assert f"|pass@1|↑|0.5|±|{result.metrics([1])['pass@1_stderr']:.4f}|" in table.replace(" ", "")
    one = write_results(tmp_path, success_results(BestOfNResult.from_rewards([[1.0, 0.0]]), [1]))
    assert "N/A" in make_table(json.loads(one.read_text()))  # one prompt has no standard error

    entries = success_eval_results(result, [1, 3], data="org/problems")
    text = write_model_index(tmp_path / "index.yaml", "model", entries).read_text()
    card = ModelCard(f"---\n{text}---\n# Model\n")
    assert {(one.metric_type, one.metric_value) for one in card.data.eval_results} == {
        ("pass@1", 0.5), ("pass@3", 1.0), ("best_of_1", 0.5), ("best_of_3", 1.0),
    }  # fmt: skip
    assert card.data.eval_results[0].dataset_type == "org/problems"
