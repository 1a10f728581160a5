"""`hf-coverage best-of-n`: what it prints and writes is what the library says."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

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
        ("--verifier math-verify --answer-column solution", "`verifier` needs `solution`, which is no column"),
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
