"""A verifier that fails costs a response and nothing else."""

import contextlib
import datetime
import decimal
import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_coverage.decode.verifier_calls import judge
from hf_coverage.decode.verifier_runner import needed_arguments, open_judge
from hf_coverage.decode.verifiers import ExactMatch, MathVerify, RewardModel
from tests.decode.bad_verifiers import DEADLY, EXPECTED, coroutine, leave_a_child, misbehave, pid_then_hang


def judged(verifier, responses, *, timeout=0.5, batch_size=16, **columns):
    rows = [{"completions": response} | columns for response in responses]
    with open_judge(verifier, timeout=timeout, batch_size=batch_size) as judge_rows:
        return judge_rows(rows)


def outcome(verdict):
    return verdict.error or verdict.reward


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_every_misbehaviour_has_its_name_and_costs_one_response(tmp_path):
    cases = {**EXPECTED, **DEADLY}
    order = [name for case in cases for name in (case, "good")]  # a good one after each: judged as if alone
    verdicts = judged(misbehave, order, path=str(tmp_path / "pid"))
    assert dict(zip(order[::2], map(outcome, verdicts[::2]))) == cases
    assert [verdict.reward for verdict in verdicts[1::2]] == [1.0] * len(cases)
    messages = dict(zip(order[::2], (verdict.message for verdict in verdicts[::2])))
    assert messages["raise"] == "KeyError: 'no such thing'"
    assert messages["loop"] == "no reward within 0.5 seconds"
    assert messages["exit"] == "exit code 7"
    # what a killed verifier had started is killed with it
    assert wait_until(lambda: not is_running((tmp_path / "pid").read_text()))


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("escapes", [False, True])
@pytest.mark.parametrize(
    ("response", "expected"), [("die", "ended its process"), ("hang", "timed out"), ("answer", 0.5), ("big", 0.5)]
)
def test_what_a_verifier_leaves_behind_holds_nobody_up(response, expected, escapes, tmp_path):
    """A grandchild holds both pipes open: in the worker's group it is ended too, outside nobody waits for it."""
    path = tmp_path / "pid"
    responses = [response if response != "big" else "x" * 10_000_000, "good"]
    verdicts = judged(
        leave_a_child, responses, timeout=30 if expected != "timed out" else 5, path=str(path), escapes=escapes
    )
    pid = int(path.read_text())
    try:
        assert [outcome(verdict) for verdict in verdicts] == [expected, 1.0]
        assert is_running(pid) if escapes else wait_until(lambda: not is_running(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_request_that_nobody_reads_is_no_endless_wait(tmp_path):
    """The pipe to a worker that is dead is full, and held open by what it left behind."""
    path = tmp_path / "pid"
    verdicts = judged(leave_a_child, ["die", "x" * 10_000_000, "good"], timeout=30, path=str(path), escapes=True)
    os.kill(int(path.read_text()), signal.SIGKILL)
    assert [outcome(verdict) for verdict in verdicts] == ["ended its process", 0.5, 1.0]


@pytest.mark.parametrize(
    "value",
    [
        (1, (2, 3)),
        {1: "a", (2, 3): "b"},
        float("nan"),
        float("-inf"),
        b"\x00\xff",
        np.float32(0.5),
        np.arange(3),
        {1, 2},
        datetime.date(2026, 1, 1),
        decimal.Decimal("0.1"),
        1 + 2j,
        "\ud800",
        "a\nb\r\u2028",
        2**80,
    ],
    ids=repr,
)
def test_what_a_verifier_gets_in_its_process_is_what_it_gets_here(value):
    expected = repr(value)

    def verifier(completions, held):
        return [float(repr(held[0]) == expected)]  # which tells a tuple from a list, and 1 from "1"

    for timeout in (60, None):
        assert [outcome(verdict) for verdict in judged(verifier, ["a"], timeout=timeout, held=value)] == [1.0]


@pytest.mark.parametrize("name", EXPECTED)
def test_in_this_process_the_same_has_the_same_name(name, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    (verdict,) = judged(misbehave, [name], timeout=None)
    assert outcome(verdict) == EXPECTED[name]


def test_a_batch_that_fails_is_judged_one_by_one():
    calls = []

    def verifier(completions):
        calls.append(len(completions))
        return [1.0 / float(text) for text in completions]

    verdicts = judged(verifier, ["1", "0", "4", "2", "x"], timeout=None, batch_size=3)
    assert [outcome(verdict) for verdict in verdicts] == [
        1.0,
        "raised ZeroDivisionError",
        0.25,
        0.5,
        "raised ValueError",
    ]
    assert calls == [3, 1, 1, 1, 2, 1, 1]


def test_one_bad_reward_in_a_batch_costs_itself_alone():
    calls = []

    def verifier(completions):
        calls.append(completions)
        return [None, 1.0, float("nan")]

    assert [outcome(v) for v in judge(verifier, {"completions": ["a", "b", "c"]}, 3)] == [
        "returned None",
        1.0,
        "returned nan",
    ]
    assert len(calls) == 1


def test_coroutines_lambdas_and_closures_are_verifiers():
    bonus = 3.0
    assert [v.reward for v in judged(coroutine, ["ab", "c"], timeout=60)] == [2.0, 1.0]
    assert [v.reward for v in judged(coroutine, ["ab", "c"], timeout=None)] == [2.0, 1.0]
    assert [v.reward for v in judged(lambda completions: [bonus] * len(completions), ["a"], timeout=60)] == [3.0]


def test_a_script_s_own_function_is_a_verifier_and_the_script_does_not_run_again(tmp_path):
    """Without `if __name__ == "__main__"`: the worker does not import the script."""
    script = tmp_path / "script.py"
    script.write_text(
        "from hf_coverage.decode.verifier_runner import open_judge\n"
        "print('script runs')\n"
        "FACTOR = 2.0\n"
        "def double(completions, **columns):\n"
        "    return [FACTOR * len(text) for text in completions]\n"
        "with open_judge(double, timeout=60, batch_size=1) as judge_rows:\n"
        "    print(judge_rows([{'completions': 'abc'}])[0].reward)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split("\n")[:2] == ["script runs", "6.0"], done.stderr


def test_what_cannot_be_sent_to_a_process_is_refused_with_the_way_out():
    rewards = (1.0 for _ in range(10))

    def next_one(completions):
        return [next(rewards)]

    with pytest.raises(TypeError, match=r"cannot be sent to a worker process .*`timeout=None`"):
        judged(next_one, ["a"])
    assert judged(next_one, ["a"], timeout=None)[0].reward == 1.0


def test_a_verifier_that_cannot_be_loaded_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def verifier(completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    from only_here import verifier

    (tmp_path / "only_here.py").unlink()
    with pytest.raises(RuntimeError, match="cannot be loaded in a worker process: ModuleNotFoundError"):
        judged(verifier, ["a"])


def test_the_worker_is_no_process_of_the_job(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = judged(lambda completions: [float("RANK" in __import__("os").environ)], ["a"], timeout=60)
    assert seen[0].reward == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_hanging_verifier_does_not_outlive_a_run_that_is_killed(tmp_path):
    code = (
        "from hf_coverage.decode.verifier_runner import open_judge\n"
        "from tests.decode.bad_verifiers import pid_then_hang\n"
        f"rows = [{{'completions': 'a', 'path': {str(tmp_path / 'pid')!r}}}]\n"
        "with open_judge(pid_then_hang, timeout=1000, batch_size=1) as judge_rows:\n"
        "    judge_rows(rows)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert wait_until(lambda: not is_running(pid))


def test_a_verifier_gets_what_it_names():
    available = ["prompts", "completions", "completion_ids", "answer", "level"]
    assert needed_arguments(lambda completions, answer: [], available, ()) == ["completions", "answer"]
    assert needed_arguments(lambda completions, **kwargs: [], available, ()) == available
    assert needed_arguments(lambda completions, tag="x": [], available, ()) == ["completions"]
    assert needed_arguments(ExactMatch(), available, ()) == available
    assert needed_arguments(pid_then_hang, [*available, "path"], ()) == ["completions", "path"]


def test_what_a_verifier_lacks_is_said_before_anything_is_sampled():
    available = ["prompts", "completions", "completion_ids"]
    with pytest.raises(ValueError, match="needs `solution`, which is no column of the corpus"):
        needed_arguments(lambda completions, solution, **kwargs: [], available, ())
    with pytest.raises(ValueError, match="needs `answer`, which differs between rows of one prompt"):
        needed_arguments(ExactMatch(), available, ("answer",))
    with pytest.raises(TypeError, match="takes `x` by position, and is called by names only"):
        needed_arguments(math.sqrt, [*available, "x"], ())
    with pytest.raises(TypeError, match="does not say which arguments it takes; wrap it in a function"):
        needed_arguments(max, available, ())
    with pytest.raises(TypeError, match="must be callable as TRL's reward functions are"):
        needed_arguments("exact-match", available, ())
    with pytest.raises(ValueError, match="`timeout` must be positive"):
        judged(misbehave, ["good"], timeout=0)


def test_provided_verifiers_say_where_they_run():
    assert ExactMatch.runs_here
    assert RewardModel.runs_here
    assert not MathVerify.runs_here
