"""Two gloo ranks give the bits of one process, whatever the row count, and FSDP the same numbers."""

import numpy as np
import pytest

from hf_coverage.inference.fingerprint import weight_fingerprint
from tests.measure import scoring_ranks
from tests.processes import Job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each of two ranks returned, and what the job printed."""
    folder = tmp_path_factory.mktemp("job")
    done = Job(scoring_ranks.__file__, folder, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    return folder, [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(2)], done.stdout + done.stderr


def test_several_rules_leave_the_bytes_of_one_process(job, tmp_path):
    folder, (results, _), _ = job
    expected = scoring_ranks.score_several_to(scoring_ranks.build(), tmp_path)
    assert set(expected) == {name for name in results if name.startswith("several ")}
    for name, logprob in expected.items():
        np.testing.assert_array_equal(results[name], logprob, err_msg=name)
    assert np.isnan(results["several diverging"]).any()
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*"))
    assert len(files) == 5 * (4 + 1)
    assert all((tmp_path / file).read_bytes() == (folder / "several" / file).read_bytes() for file in files)


def test_ranks_agree_with_each_other(job):
    _, (first, second), _ = job
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("rows", scoring_ranks.ROW_COUNTS)
def test_ranks_agree_with_one_process(job, rows):
    _, (result, _), _ = job
    np.testing.assert_array_equal(result[f"plain {rows}"], scoring_ranks.score(scoring_ranks.build(), rows))


@pytest.mark.parametrize("name", scoring_ranks.RULES)
def test_ranks_agree_with_one_process_on_test_time_training(job, name):
    _, (result, _), _ = job
    rule = scoring_ranks.RULES[name]
    np.testing.assert_array_equal(result[name], scoring_ranks.score(scoring_ranks.build(), 5, rule))


@pytest.mark.parametrize("setup", ["fsdp1", "fsdp2"])
def test_sharded_models_are_refused_for_test_time_training(job, setup):
    _, (result, _), _ = job
    assert "spreads its head over processes" in str(result[f"{setup} head error"])
    for scope in ("lora", "all"):
        assert "needs whole parameters, but the model is sharded" in str(result[f"{setup} {scope} error"])


@pytest.mark.parametrize("rows", scoring_ranks.ROW_COUNTS)
@pytest.mark.parametrize("setup", ["fsdp1", "fsdp2"])
def test_sharded_models_agree_with_whole_ones(job, setup, rows):
    """To rounding: a sharded head cannot be called alone, so long responses are cut differently."""
    _, (result, _), _ = job
    np.testing.assert_allclose(result[f"{setup} {rows}"], result[f"plain {rows}"], rtol=0, atol=1e-5)


def test_ddp_may_run_unequal_numbers_of_passes(job):
    _, (result, _), _ = job
    np.testing.assert_array_equal(result["ddp"], result["plain 5"])


def test_fingerprints_do_not_see_the_sharding(job):
    _, (result, _), _ = job
    expected = weight_fingerprint(scoring_ranks.build())
    assert {str(result[name]) for name in ("fingerprint", "fsdp1 fingerprint", "fsdp2 fingerprint")} == {expected}


def test_a_table_has_the_bytes_of_one_process(job, tmp_path):
    folder, (result, _), _ = job
    expected = scoring_ranks.score_to(scoring_ranks.build(), tmp_path / "table")
    np.testing.assert_array_equal(result["table"], expected)
    np.testing.assert_array_equal(result["table again"], expected)
    for path in (tmp_path / "table").iterdir():
        damaged = path.name == "scores-00001.safetensors"
        assert (folder / "table" / path.name).read_bytes() == path.read_bytes()[: -1 if damaged else None]


def test_every_rank_raises_what_the_main_one_found(job):
    _, (first, second), _ = job
    assert "scores-00001.safetensors is truncated" in str(first["error"])
    assert str(first["error"]) == str(second["error"])


def test_only_the_main_rank_shows_progress(job):
    _, _, output = job
    bars = output.split("\n\n")  # a slow machine may show the state of one more than once
    # the table, the table read back, and what was refused
    assert ["100%" in bar for bar in bars] == [True, True, False]
