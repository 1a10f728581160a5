"""The offset tournament on the command line: what candidates write, what is kept of it, and what it decides."""

import json
import shlex
import shutil

import numpy as np
import pytest
from datasets import load_from_disk

from hf_coverage import ScoreTable, sample_corpus, score_responses, tournament
from hf_coverage.commands import on_policy
from tests import processes
from tests.commands.shell import error_line, invoke, load

NAMES = ("teacher", "student", "other")
COMMAND = "tournament teacher student other --data corpus --n 2 --bootstrap 40 --shard-rows 8 --output-dir out"


def folder(name, scored_by=None):
    base = f"out/on_policy/work__{name}"
    return base if scored_by is None else f"{base}/scores/work__{scored_by}"


@pytest.fixture
def run(work, monkeypatch):
    """A working folder whose name does not change from test to test."""
    inner = work / "work"
    inner.mkdir()
    for path in list(work.iterdir()):
        if path.name not in ("work", "datasets"):
            (inner / path.name).symlink_to(path.resolve())
    monkeypatch.chdir(inner)
    return inner


def test_it_decides_as_the_library_on_what_the_candidates_wrote(run):
    output = invoke(f"{COMMAND} --on-policy --gamma 0.7 --sweep 4")
    corpus = load_from_disk("corpus")
    written = {name: load_from_disk(folder(name)) for name in NAMES}
    for name, rows in written.items():
        assert rows["prompt"][:] == corpus["prompt"][:]
        assert max(map(len, rows["completion"][:])) <= max(map(len, corpus["completion"][:]))
        # drawn from the candidate itself: its density is the one that scoring gives
        own = score_responses(*load(run, name), rows, progress=False)
        assert own["logprob"][:] == pytest.approx(rows["reference_logprob"][:], abs=1e-4)
    assert written["student"]["completion"][:] != written["other"]["completion"][:]
    scores = {
        b: {a: score_responses(*load(run, a), written[b], progress=False)["logprob"][:] for a in NAMES} for b in NAMES
    }
    candidates = {a: score_responses(*load(run, a), corpus, progress=False)["logprob"][:] for a in NAMES}
    expected = tournament(
        candidates,
        2,
        groups=[str(p) for p in corpus["prompt"]],
        sweep=[4],
        on_policy=scores,
        on_policy_groups={b: [str(p) for p in written[b]["prompt"]] for b in NAMES},
        gamma=0.7,
        bootstrap=0,
    )
    facts = json.loads((run / "out/tournament.json").read_text())
    assert facts["gamma"] == 0.7
    assert np.array(facts["offsets"]) == pytest.approx(expected.offsets)
    assert np.count_nonzero(expected.offsets) > 0
    assert facts["scores"] == pytest.approx(expected.scores)
    assert facts["ranking"] == list(expected.ranking)
    assert "less the offset" in output
    assert "Theorem 6.4" in output


def test_what_is_there_is_used_again_and_a_further_candidate_costs_its_own_part(run, monkeypatch):
    loaded = []
    original = on_policy.load_model
    monkeypatch.setattr(on_policy, "load_model", lambda name, how: (loaded.append(name), original(name, how))[1])
    fewer = COMMAND.replace(" other ", " ")
    invoke(f"{fewer} --on-policy --generations 10")
    assert loaded == ["teacher", "student"] * 2  # to write, and to score
    before = (run / "out/tournament.json").read_text()
    (run / "out/tournament.json").unlink()
    invoke(f"{fewer} --on-policy --generations 10")
    assert len(loaded) == 4
    assert (run / "out/tournament.json").read_text() == before
    rows = load_from_disk(folder("teacher"))
    assert len(rows) == 10
    kept = {path: path.read_bytes() for path in run.glob("out/on_policy/**/scores-*.safetensors")}
    invoke(f"{COMMAND} --on-policy --generations 10")
    assert loaded[4:] == ["other", "teacher", "student", "other"]
    assert all(path.read_bytes() == content for path, content in kept.items())
    # what was lost is made again, to the byte
    shutil.rmtree(folder("student", "teacher"))
    shutil.rmtree(folder("other"))
    whole = (run / "out/tournament.json").read_text()
    invoke(f"{COMMAND} --on-policy --generations 10")
    assert loaded[8:] == ["other", "teacher", "student"]
    assert (run / "out/tournament.json").read_text() == whole
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_an_interrupted_scoring_goes_on(run, monkeypatch):
    original = ScoreTable.write

    def stop(self, index, scores):
        if "on_policy" in str(self.folder) and index == 2:
            raise KeyboardInterrupt
        original(self, index, scores)

    monkeypatch.setattr(ScoreTable, "write", stop)
    invoke(f"{COMMAND} --on-policy", code=130)
    begun = sorted(path.name for path in run.glob("out/on_policy/**/scores-*"))
    assert begun == ["scores-00000.safetensors", "scores-00001.safetensors"]
    monkeypatch.setattr(ScoreTable, "write", original)
    invoke(f"{COMMAND} --on-policy")
    interrupted = json.loads((run / "out/tournament.json").read_text())
    invoke(f"{COMMAND.replace('--output-dir out', '--output-dir whole')} --on-policy")
    assert json.loads((run / "whole/tournament.json").read_text()) == interrupted


@pytest.mark.slow
def test_two_processes_end_the_same(run):
    command = f"-m hf_coverage {COMMAND} --on-policy --device cpu --generations 12"
    for ranks, out in ((None, "one"), (2, "two")):
        processes.run(*shlex.split(command.replace("--output-dir out", f"--output-dir {out}")), ranks=ranks)
    one, two = (json.loads((run / out / "tournament.json").read_text()) for out in ("one", "two"))
    assert np.array(one.pop("offsets")) == pytest.approx(np.array(two.pop("offsets")))
    assert one["ranking"] == two["ranking"]
    assert one["scores"] == pytest.approx(two["scores"])


def test_what_is_refused(run):
    assert "is for the simple tournament" in invoke(f"{COMMAND} --on-policy --race 0.9", code=2)
    assert "must be positive" in invoke(f"{COMMAND} --on-policy --gamma 0", code=2)
    assert not (run / "out").exists()
    assert "scores/student is a score folder" in error_line(
        "tournament scores/student other --data corpus --on-policy --output-dir out"
    )
    assert "`--data` is not given" in error_line("tournament student other --on-policy --output-dir out")
    invoke(f"{COMMAND} --on-policy --generations 4")
    assert "was made otherwise (max_new_tokens changed)" in error_line(
        f"{COMMAND} --on-policy --generations 4 --max-new-tokens 2"
    )
    shutil.copytree("other", "third")
    settings = json.loads((run / "third/tokenizer.json").read_text())
    words = settings["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (run / "third/tokenizer.json").write_text(json.dumps(settings))
    line = error_line(f"{COMMAND.replace(' other ', ' third ')} --on-policy")
    assert "third and teacher have different tokenizers" in line


def test_responses_to_a_prompt_that_comes_again_can_be_stratified(run):
    assert "give both, or neither" in invoke(f"{COMMAND} --stratified", code=2)
    invoke(f"{COMMAND} --on-policy --stratified")
    corpus = load_from_disk("corpus")
    model, tokenizer = load(run, "teacher")
    longest = max(map(len, corpus["completion"][:]))
    options = {"k": 1, "max_new_tokens": longest, "progress": False}
    expected = sample_corpus(model, tokenizer, corpus["prompt"][:], stratified=True, **options)
    assert load_from_disk(folder("teacher"))["completion"][:] == expected["completion"][:]
    assert "stratified changed" in error_line(f"{COMMAND} --on-policy")
