"""`hf-coverage best-of-n`: what it prints and writes is what the library says."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from lm_eval.utils import make_table

from hf_coverage import BestOfNResult, evaluate_best_of_n
from hf_coverage.decode.verifiers import ExactMatch
from tests.commands.shell import PROMPTS, error_line, invoke, load, results_in
from tests.processes import run

ANSWERS = ["sat", "ran", ".", "on", "the"]


@pytest.fixture
def problems(work):
    """One right answer to each prompt, scored with its end as part of it."""
    columns = {"prompt": PROMPTS, "completion": [f" {word}" for word in ANSWERS], "reference_logprob": [0.0] * 5}
    Dataset.from_dict(columns | {"length": [1, 2, 3, 4, 5]}).to_json("problems.jsonl")
    invoke("score student problems.jsonl --append-eos --output-dir answer_scores")
    return Dataset.from_dict(columns)


def test_best_of_n_is_the_library_s(problems, work):
    command = (
        "best-of-n student problems.jsonl --k 6 --max-new-tokens 2 --seed 5 --n 1,6 --profile answer_scores -o out"
    )
    output = invoke(command)
    expected = evaluate_best_of_n(
        *load(work, "student"), problems, ExactMatch("completion"), k=6, max_new_tokens=2, seed=5, progress=False
    )
    result = BestOfNResult.from_json("out/best_of_n-exact-match.json")
    assert result.rewards.tolist() == expected.rewards.tolist()
    assert result.sentence.replace("student ", "") == expected.sentence.replace(f"{expected.name} ", "")
    assert result.sentence in output
    metrics = results_in("out")["results"]["student"]
    assert metrics == {"alias": "student"} | {
        f"{k},none": pytest.approx(v) for k, v in expected.metrics([1, 6]).items()
    }
    for title in ("Pass@N", "exact Pass@N", "guaranteed reward"):
        assert title in output
    assert Path("out/best_of_n-exact-match.png").read_bytes().startswith(b"\x89PNG")


def test_stratified_samples_are_the_library_s_and_a_larger_k_adds_to_them(problems, work):
    command = "best-of-n student problems.jsonl --max-new-tokens 2 --seed 5 --sampling stratified -o out"
    assert "powers of 2 or k = 6, as stratified samples count in aligned blocks" in error_line(
        f"{command} --k 6 --n 3"
    )
    assert not Path("out").exists()
    for k in (2, 6):
        output = invoke(f"{command} --k {k}")
    expected = evaluate_best_of_n(
        *load(work, "student"),
        problems,
        ExactMatch("completion"),
        k=6,
        max_new_tokens=2,
        sampling="stratified",
        seed=5,
        progress=False,
    )
    result = BestOfNResult.from_json("out/best_of_n-exact-match-2.json")
    assert result.rewards.tolist() == expected.rewards.tolist()
    assert "with 6 stratified ones, by exact-match" in output
    facts = [json.loads(path.read_text())["config"] for path in sorted(Path("out").glob("results_*.json"))]
    assert [(one["sampling"], one["k"]) for one in facts] == [("stratified", 2), ("stratified", 6)]
    output = invoke("best-of-n out problems.jsonl --n 1,2,6 --profile answer_scores")
    assert "guaranteed reward" in output


def test_kept_samples_are_judged_by_one_s_own_function(problems, work):
    invoke("best-of-n student problems.jsonl --k 4 --max-new-tokens 3 --output-dir out")
    Path("rewards.py").write_text(
        "def words(completions, length, **columns):\n"
        "    if length[0] == 2:\n"
        "        raise ValueError('two')\n"
        "    return [float(len(text.split())) for text in completions]\n"
    )
    output = invoke("best-of-n out problems.jsonl --verifier rewards.py:words --threshold 3")
    assert "4 of 20 responses could not be judged (4 raised ValueError)" in output
    assert "The first that raised ValueError: row 1, sample 0 (ValueError: two)." in output
    kept = [json.loads(line) for line in Path("out/samples-00000.jsonl").read_text().splitlines()]
    result = BestOfNResult.from_json("out/best_of_n-words.json")
    for row in kept:
        words = 0.0 if row["prompt"] == 1 else len(row["text"].split())
        assert result.rewards[row["prompt"], row["sample"]] == words
    assert result.threshold == 3.0
    assert Path("out/best_of_n-exact-match.json").is_file()


def test_a_verifier_that_fails_on_every_response_is_no_result(problems, work):
    Path("no_rewards.py").write_text("def broken(completions):\n    raise OSError('no disk')\n")
    message = error_line(
        "best-of-n student problems.jsonl --k 2 --max-new-tokens 2 --verifier no_rewards.py:broken -o out"
    )
    assert "broken judged none of 10 responses; most often, 10 times, it raised OSError (OSError: no disk)" in message
    assert not list(Path("out").glob("best_of_n-*"))


def test_results_of_two_verifiers_of_one_name_stand_beside_each_other(problems, work):
    for name, value in (("one", 0.0), ("two", 1.0)):
        Path(f"{name}.py").write_text(f"def reward(completions):\n    return [{value}] * len(completions)\n")
    command = "best-of-n student problems.jsonl --k 2 --max-new-tokens 2 -o out --verifier"
    for name in ("one", "two", "one", "two"):
        invoke(f"{command} {name}.py:reward")
    found = {path.name: BestOfNResult.from_json(path).pass_at(1) for path in Path("out").glob("best_of_n-*.json")}
    assert found == {"best_of_n-reward.json": 0.0, "best_of_n-reward-2.json": 1.0}
    assert len(list(Path("out/judgements").iterdir())) == 2


def test_an_interrupted_command_goes_on_with_what_is_there(problems, work):
    command = "best-of-n student problems.jsonl --k 4 --max-new-tokens 3 --batch-size 4 --shard-rows 8 -o"
    invoke(f"{command} whole")
    invoke(f"{command} again")
    Path("again/samples-00001.jsonl").unlink()
    kept = Path("again/samples-00002.jsonl").stat().st_mtime_ns
    invoke(f"{command} again")
    for path in Path("whole").rglob("*.jsonl"):
        assert path.read_bytes() == Path("again", path.relative_to("whole")).read_bytes()
    assert Path("again/samples-00002.jsonl").stat().st_mtime_ns == kept
    assert "holds samples of something else (seed was 0, now 1)" in error_line(f"{command} again --seed 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--verifier exact", "`verifier` 'exact' is not known"),
        (
            "--verifier math-verify --answer-column solution",
            "`--answer-column` must be one of the data's columns, ['prompt', 'completion']",
        ),
        ("--verifier absent.py:f", "there is no file absent.py"),
        ("--k 4 --n 8", "`n` must be whole numbers from 1 to k = 4"),
        ("--profile scores/student --k 2 --max-new-tokens 1", "`profile` must be of the same prompts"),
    ],
)
def test_a_failure_is_one_line(problems, options, message):
    Dataset.from_dict({"prompt": PROMPTS[:2], "completion": ["sat", "ran"]}).to_json("two.jsonl")
    assert message in error_line(f"best-of-n student two.jsonl {options} -o out")
    assert not Path("out").exists() or "profile" in options


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_speak_once(problems, work):
    options = "best-of-n student problems.jsonl --k 4 --max-new-tokens 3 --batch-size 4 --shard-rows 8"
    printed = run(*f"-m hf_coverage {options} -n 1,4 -o two".split(), ranks=2)
    assert printed.count("student solves") == 1
    invoke(f"{options} -o one")
    name = "best_of_n-exact-match.json"
    assert Path("two", name).read_text() == Path("one", name).read_text()


def test_what_rl_would_get_is_the_profile_s(problems, work):
    command = "best-of-n student problems.jsonl --k 24 --max-new-tokens 1 --seed 5 -o out --predict 64,1024"
    output = invoke(f"{command} --write-prompts keep.jsonl --group-size 4 --min-signal 0.3")
    result = BestOfNResult.from_json("out/best_of_n-exact-match.json")
    success = result.success
    facts = results_in("out")
    assert list(facts["signal"]) == ["4", "8", "16", "32"]
    for size in (4, 32):
        signal = success.signal(size)
        assert facts["signal"][str(size)]["mixed"] == pytest.approx(list(signal.mixed))
        assert facts["signal"][str(size)]["all wrong"] == pytest.approx(list(signal.all_wrong))
    value, low, high = success.predict(1024)
    assert facts["predicted"]["1024"] == pytest.approx({"at least": low, "at most": high, "Beta law": value})
    for title in ("mixed", "Beyond 24 samples, the range that they do not reject", "at least"):
        assert title in " ".join(output.split())
    chosen = result.mixed(4) >= 0.3
    assert 0 < chosen.sum() < 5
    kept = [json.loads(line) for line in Path("keep.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [prompt for prompt, keep in zip(PROMPTS, chosen) if keep]
    assert kept[0].keys() == {"prompt", "completion", "reference_logprob", "length"}
    assert f"{chosen.sum()} of 5 prompts in keep.jsonl" in output
    assert result.accepted_mass.max() <= 1
    assert ((result.accepted_mass > 0) == (success.correct > 0)).all()
    assert "0 of 5 prompts" in invoke("best-of-n out problems.jsonl --write-prompts none.jsonl --min-signal 1")
    assert Path("none.jsonl").read_text() == ""


def test_rewards_that_are_not_0_and_1_have_a_signal_where_they_differ(problems, work):
    Path("graded.py").write_text("def length(completions, **_):\n    return [len(text) / 7 for text in completions]\n")
    invoke("best-of-n student problems.jsonl --k 8 --max-new-tokens 2 --verifier graded.py:length -o out")
    result = BestOfNResult.from_json("out/best_of_n-length.json")
    facts = results_in("out")["signal"]
    assert list(facts) == ["4", "8"]
    assert facts["4"]["rewards differ"][0] == pytest.approx(result.mixed(4).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--predict 64.5", "`predict` must be whole numbers that can be drawn"),
        ("--predict 64 --sampling stratified", "need independent samples, and these are stratified"),
        ("--predict 64 --verifier reward-model:student", "needs a --threshold"),
        ("--write-prompts keep.jsonl --sampling stratified", "need independent samples"),
        ("--write-prompts keep.jsonl --min-signal 0", "`min_signal` must be above 0"),
        ("--write-prompts no/such/keep.jsonl", "a file in a folder that exists"),
        ("--write-prompts student", "a file in a folder that exists"),
        ("--write-prompts keep.jsonl --group-size 9", "`group_size` = 9 is more than the k = 8"),
    ],
)
def test_what_cannot_be_said_of_groups_is_refused_before_sampling(work, monkeypatch, options, message):
    Dataset.from_dict({"prompt": PROMPTS, "completion": ANSWERS}).to_json("problems.jsonl")
    monkeypatch.setattr("hf_coverage.commands.best_of_n.load_model", None)
    assert message in error_line(f"best-of-n student problems.jsonl --k 8 --max-new-tokens 2 -o out {options}")
    assert not Path("out").exists()
    assert not Path("keep.jsonl").exists()


@pytest.mark.usefixtures("undrawn")
def test_samples_are_logged_with_the_entries_that_lm_eval_logs(work):
    Dataset.from_dict({"prompt": PROMPTS[:3], "gold": ["cat sat", "dog", "on"]}).to_json("gold.jsonl")
    command = "best-of-n student gold.jsonl --answer-column gold --k 4 --max-new-tokens 3 --device cpu --log-samples"
    invoke(f"{command} -o out")
    (path,) = (work / "out").glob("samples_student_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    result = BestOfNResult.from_json(work / "out" / "best_of_n-exact-match.json")
    wanted = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash"}
    assert wanted | {"prompt_hash", "target_hash"} <= lines[0].keys()
    for number, line in enumerate(lines):
        assert (line["doc"]["prompt"], line["target"]) == (PROMPTS[number], line["doc"]["gold"])
        assert line["resps"] == [line["filtered_resps"]]
        assert line["reward"] == result.rewards[number].tolist()
        assert line["pass@1"] == result.rewards[number].mean()
        drawn = [json.loads(text) for text in (work / "out" / "samples-00000.jsonl").read_text().splitlines()]
        own = {row["sample"]: row["text"] for row in drawn if row["prompt"] == number}
        assert line["filtered_resps"] == [own[sample] for sample in range(4)]
    assert "org" not in (work / "out" / "best_of_n-exact-match.model-index.yaml").read_text()
    assert "pass@4" in make_table(results_in("out"))
    invoke("best-of-n out gold.jsonl --answer-column gold --log-samples -o judged")  # without the model
    (again,) = (work / "judged").glob("samples_student_*.jsonl")
    assert [json.loads(line)["resps"] for line in again.read_text().splitlines()] == [line["resps"] for line in lines]
