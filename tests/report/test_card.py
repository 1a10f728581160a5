import math

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_coverage import CoverageProfile
from hf_coverage.report.card import TAG, coverage_eval_results, write_model_card
from hf_coverage.report.provenance import provenance
from hf_coverage.report.table import Table

N = (2, 5.7, 16)
LOGPROBS = np.asarray([-1.0, -2.0, -9.0, -1.5, -3.0, -2.5, -4.0, -1.2])
PROFILE = CoverageProfile.from_logprobs(LOGPROBS, np.full(8, -1.0), groups=list("aabbccdd"), name="org/small")


def write(folder, profile=PROFILE, **changes):
    arguments = {"corpus": "org/prompts", "provenance": provenance("hf-coverage report scores", seed=7), "n": N}
    return write_model_card(folder, profile, **(arguments | changes))


def test_the_metadata_comes_back_through_huggingface_hub(tmp_path):
    path = write(tmp_path, corpus_fingerprint="c0ffee", metadata={"license": "apache-2.0", "tags": ["gpt2"]})
    data = ModelCard.load(path).data
    assert data.tags == [TAG, "gpt2"]
    assert data.license == "apache-2.0"
    assert data.eval_results == coverage_eval_results(PROFILE, N, corpus="org/prompts", corpus_fingerprint="c0ffee")
    model_index = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(model_index)
    assert (name, results) == ("org/small", data.eval_results)


def test_every_value_is_the_profile_s(tmp_path):
    results = {entry.metric_type: entry for entry in ModelCard.load(write(tmp_path)).data.eval_results}
    assert list(results) == ["cov_2", "cov_5.7", "cov_16", "kl", "sequence_cross_entropy"]
    for n, key in zip(N, results):
        assert results[key].metric_value == pytest.approx(PROFILE.cov(n), abs=1e-6)
        assert results[key].metric_args["interval_95"] == pytest.approx(PROFILE.interval(n), abs=1e-6)
        assert results[key].metric_name == f"Cov_{n} (lower is better)"
    assert ModelCard.load(write(tmp_path, n=[2.0])).data.eval_results[0].metric_args["n"] == 2
    assert "n: 2\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert results["kl"].metric_value == pytest.approx(PROFILE.kl, abs=1e-6)
    assert results["cov_2"].verified is None
    assert results["cov_2"].dataset_args == {"num_rows": 8, "num_prompts": 4}


def test_an_upper_bound_is_never_called_cov(tmp_path):
    plain = CoverageProfile.from_logprobs(LOGPROBS, name="plain")
    entries = ModelCard.load(path := write(tmp_path, plain)).data.eval_results
    assert [entry.metric_type for entry in entries][:2] == ["cov_upper_2", "cov_upper_5.7"]
    assert entries[0].metric_name == "Upper bound on Cov_2 (lower is better)"
    assert "cannot be estimated" in path.read_text(encoding="utf-8")


def test_infinite_kl_is_left_out_of_the_metadata_and_shown_in_the_table(tmp_path):
    path = write(tmp_path, CoverageProfile.from_logprobs([-1.0, -math.inf], [-1.0, -1.0], name="zero"))
    assert "kl" not in [entry.metric_type for entry in ModelCard.load(path).data.eval_results]
    assert "∞" in path.read_text(encoding="utf-8")


def test_the_body_has_the_picture_the_command_and_the_origin(tmp_path):
    command = "hf-coverage report `ls` | cat"
    text = write(
        tmp_path, provenance={"command": command, "seed": 7}, tables=[Table(["step"], [[120]], "Checkpoints.")]
    ).read_text(encoding="utf-8")
    assert "](coverage_profile.png)" in text
    assert (tmp_path / "coverage_profile.png").read_bytes().startswith(b"\x89PNG")
    assert f"```bash\n{command}\n```" in text
    assert "| seed | 7 |" in text
    assert "Checkpoints.\n\n| step |" in text
    assert "8 responses to 4 prompts" in text


def test_names_cannot_become_markup(tmp_path):
    evil = CoverageProfile.from_logprobs(LOGPROBS, LOGPROBS, name="<script>|`x`")
    body = write(tmp_path, evil).read_text(encoding="utf-8").split("\n---\n", 1)[1]
    assert "<script" not in body


def test_a_fence_in_the_command_does_not_end_the_code_block(tmp_path):
    text = write(tmp_path, provenance={"command": "echo '```'"}).read_text(encoding="utf-8")
    assert "````bash\necho '```'\n````" in text


def test_its_own_card_is_renewed_and_a_foreign_one_is_kept(tmp_path):
    write(tmp_path)
    write(tmp_path)
    foreign = tmp_path / "foreign" / "README.md"
    foreign.parent.mkdir()
    foreign.write_text("---\ntags: [mine]\n---\n# Mine\n")
    with pytest.raises(FileExistsError, match="has a card already that hf_coverage did not write"):
        write(foreign.parent)
    assert "# Mine" in foreign.read_text()
