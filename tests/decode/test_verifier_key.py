"""Verdicts are known by all that decides them: what a key changes with, what it does not, and where there is none."""

import functools
import importlib
import inspect
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_coverage import evaluate_best_of_n, judge_best_of_n
from hf_coverage.decode import verifier_key as keys
from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.decode.sample_verdicts import Judging
from hf_coverage.decode.verifier_key import verifier_key
from hf_coverage.decode.verifiers import ExactMatch, MathVerify, ReasoningGym, RewardModel
from hf_coverage.inference.fingerprint import digest
from tests.decode.best_of_n_runs import build
from tests.processes import run

ROOT = Path(__file__).parents[2]

# A verifier in a module, and what can be changed around it. Each change is one replacement in one file.
FILES = {
    "own_rewards.py": """
import functools
import numpy as np
import own_helpers
from own_package import inner
from own_package.deep import weigh

SCALE = 1.0
WORDS = {"alpha", "beta", "gamma", "delta"}


def verifier(completions, *, bonus=0.5, **columns):
    import own_late

    return [SCALE * own_helpers.count(text) + bonus + own_late.EXTRA + weigh(text) for text in completions]


class Rule:
    limit = 3

    def __init__(self, nested):
        self.nested = nested

    def __call__(self, completions):
        return [float(len(text) > self.limit + self.nested["weights"][0]) for text in completions]

    def judge(self, completions):
        return self(completions)


def closing(value):
    def verifier(completions):
        return [float(value is not None and len(text) in {"alpha": 1}.values()) for text in completions]

    return verifier


def words(completions):
    return [float(text in {"alpha", "beta", "gamma"} or text in WORDS) for text in completions]
""",
    "own_helpers.py": "import own_below\n\n\ndef count(text):\n    return len(text) + own_below.ONE\n",
    "own_below.py": "ONE = 1\n",
    "own_late.py": "EXTRA = 0.0\n",
    "own_unused.py": "NOTHING = 0\n",
    "own_package/__init__.py": "",
    "own_package/inner.py": "VALUE = 1\n",
    "own_package/deep.py": "from .deeper import factor\n\n\ndef weigh(text):\n    return factor\n",
    "own_package/deeper.py": "factor = 2\n",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the files with a change, and imports them anew."""
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]

    def fresh(file=None, before="", after=""):
        for name, text in FILES.items():
            assert name != file or before in text
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text.replace(before, after) if name == file else text)
        forget()
        importlib.invalidate_caches()
        sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
        try:
            return importlib.import_module("own_rewards")
        finally:
            sys.dont_write_bytecode = kept

    yield fresh
    forget()


@pytest.mark.parametrize(
    "change",
    [
        ("own_rewards.py", "+ bonus", "- bonus"),
        ("own_rewards.py", "bonus=0.5", "bonus=0.25"),
        ("own_rewards.py", "SCALE = 1.0", "SCALE = 2.0"),
        ("own_helpers.py", "len(text)", "2 * len(text)"),
        ("own_below.py", "ONE = 1", "ONE = 2"),
        ("own_late.py", "EXTRA = 0.0", "EXTRA = 1.0"),
        ("own_package/deep.py", "return factor", "return -factor"),
        ("own_package/deeper.py", "factor = 2", "factor = 3"),
        ("own_package/inner.py", "VALUE = 1", "VALUE = 2"),
        ("own_package/__init__.py", "", "SET = 1"),
    ],
    ids=lambda change: f"{change[0]}: {change[2]}",
)
def test_a_change_of_the_code_that_a_verifier_reaches_changes_its_key(write, change):
    before = verifier_key(write().verifier)
    assert verifier_key(write().verifier) == before
    assert verifier_key(write(*change).verifier) != before


def test_code_that_it_does_not_reach_leaves_the_key(write):
    before = verifier_key(write().verifier)
    assert verifier_key(write("own_unused.py", "NOTHING = 0", "NOTHING = 1").verifier) == before


def test_a_global_that_was_set_from_outside_changes_the_key(write):
    module = write()
    before = verifier_key(module.verifier)
    module.SCALE = 3.0
    assert verifier_key(module.verifier) != before


big = np.zeros(5000)
changed = big.copy()
changed[2500] = 1.0  # where the text of an array has dots
PAIRS = {
    "closure": (lambda m: m.closing(1), lambda m: m.closing(2)),
    "closure of an array": (lambda m: m.closing(big), lambda m: m.closing(changed)),
    "closure of a tensor": (lambda m: m.closing(torch.zeros(9)), lambda m: m.closing(torch.ones(9))),
    "closure of a set": (lambda m: m.closing({"a", "b"}), lambda m: m.closing({"a", "c"})),
    "closure of a function": (lambda m: m.closing(m.words), lambda m: m.closing(m.verifier)),
    "argument of a partial": (
        lambda m: functools.partial(m.verifier, bonus=1),
        lambda m: functools.partial(m.verifier, bonus=2),
    ),
    "instance, two levels deep": (lambda m: m.Rule({"weights": [1]}), lambda m: m.Rule({"weights": [2]})),
    "instance, an object within": (
        lambda m: m.Rule({"weights": [m.Rule(1)]}),
        lambda m: m.Rule({"weights": [m.Rule(2)]}),
    ),
    "bound instance": (lambda m: m.Rule({"weights": [1]}).judge, lambda m: m.Rule({"weights": [2]}).judge),
    "method": (lambda m: m.Rule({"weights": [1]}).judge, lambda m: m.Rule({"weights": [1]}).__call__),
    "lambda": (lambda m: lambda completions: [1.0], lambda m: lambda completions: [0.0]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_a_verifier_holds_is_in_its_key(write, name):
    one, other = PAIRS[name]
    module = write()
    assert verifier_key(one(module)) == verifier_key(one(module))
    assert verifier_key(one(module)) != verifier_key(other(module))


def test_a_key_is_the_same_in_every_process(write, tmp_path):
    """Whatever order sets have there, and for functions of a script, which are hashed by value."""
    write()
    script = tmp_path / "script.py"
    script.write_text(
        "import functools, json, own_rewards\n"
        "from hf_coverage.decode.verifier_key import verifier_key\n"
        "NAMES = {'alpha', 'beta', 'gamma', 'delta'}\n"
        "def here(completions):\n"
        "    return [float(text in NAMES or text in {'one', 'two', 'three'}) for text in completions]\n"
        "m = own_rewards\n"
        "found = [m.verifier, m.words, m.closing({'a', 'b', 'c', 'd'}), m.closing({'x': {1, 'y'}}), here,\n"
        "    functools.partial(m.verifier, bonus=1), m.Rule({'weights': [frozenset('abcdef')]}), m.Rule([1]).judge,\n"
        "    lambda completions: [float(text in NAMES) for text in completions]]\n"
        "print(json.dumps([verifier_key(one) for one in found]))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONHASHSEED": "0"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(done.stdout), json.loads(run(script))]  # the second under a seed of its own
    assert len({json.dumps(key) for key in printed[0]}) == len(printed[0])
    assert printed[0] == printed[1]


def test_versions_of_packages_that_are_reached_are_in_the_key(write, monkeypatch):
    from trl.rewards import accuracy_reward

    for verifier, package in ((write().verifier, "numpy"), (accuracy_reward, "math_verify"), (accuracy_reward, "trl")):
        before = verifier_key(verifier)
        monkeypatch.setattr(keys, "_version", lambda name, package=package: "9" if name == package else "1")
        after = verifier_key(verifier)
        assert after[0]["versions"][package] == "9"
        assert before[0]["versions"][package] not in ("", "9")
        monkeypatch.undo()


def test_keys_of_the_package_s_own_verifiers(reward_model, monkeypatch):
    model, tokenizer = reward_model
    made = [ExactMatch(), ExactMatch("other"), MathVerify(), MathVerify("other"), RewardModel(model, tokenizer)]
    made += [
        ReasoningGym("chain_sum"),
        ReasoningGym("lcm"),
        ReasoningGym("lcm", tag="a"),
        ReasoningGym("lcm", max_numbers=3),
    ]
    texts = [json.dumps(verifier_key(verifier)) for verifier in made]
    assert len(set(texts)) == len(made)
    assert json.dumps(verifier_key(RewardModel(model, tokenizer))) == texts[4]
    with torch.no_grad():
        model.score.weight[0, 0] += 1
    assert json.dumps(verifier_key(RewardModel(model, tokenizer))) != texts[4]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    for verifier, text in zip(made[2:], texts[2:]):
        assert json.dumps(verifier_key(verifier)) != text


def test_verdicts_of_exact_match_from_before_are_found():
    """The name of a folder as it always was: the class's source, its settings, the limit and the columns."""
    table = PromptTable.from_corpus(Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"]}))
    made_of = ["exact-match", inspect.getsource(ExactMatch), {"columns": ["answer"]}, 10.0, {"answer": ["1", "2"]}]
    assert Judging.prepare(None, table, 10.0, 16).fingerprint == digest(made_of) == "3a8459293865dd96"


UNKNOWABLE = {
    "a generator": lambda: (reward for reward in [1.0]),
    "a socket": socket.socket,
    "a database": lambda: sqlite3.connect(":memory:"),
}


@pytest.mark.parametrize("name", UNKNOWABLE)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_verdicts_of_what_cannot_be_hashed_are_not_kept(name, tmp_path, caplog):
    held = UNKNOWABLE[name]()
    calls = []

    def verifier(completions):
        calls.append(held)
        return [1.0] * len(completions)

    corpus = Dataset.from_dict({"prompt": [[2], [3]]})
    with caplog.at_level(logging.WARNING):
        for expected in (4, 8):
            evaluate_best_of_n(
                build(), None, corpus, verifier, k=2, max_new_tokens=2, batch_size=1, timeout=None, output_dir=tmp_path
            )
            assert len(calls) == expected
    assert not (tmp_path / "judgements").exists()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "Verdicts of the verifier verifier are not kept"
    ] * 2


def test_two_verifiers_of_one_name_have_verdicts_of_their_own(tmp_path):
    corpus = Dataset.from_dict({"prompt": [[2], [3]]})

    def giving(value):
        def verifier(completions):
            return [value] * len(completions)

        return verifier

    options = {"k": 2, "max_new_tokens": 2, "output_dir": tmp_path, "timeout": None, "progress": False}
    results = [evaluate_best_of_n(build(), None, corpus, giving(value), **options) for value in (0.0, 1.0, 0.0)]
    assert [result.pass_at(1) for result in results] == [0.0, 1.0, 0.0]
    assert len(list((tmp_path / "judgements").iterdir())) == 2
    names = [result.settings["judged"] for result in results]
    assert names[0] == names[2] != names[1]


def test_verdicts_on_samples_that_were_drawn_anew_are_not_taken_for_theirs(tmp_path):
    corpus = Dataset.from_dict({"prompt": [[2], [3]], "answer": [[1], [1]]})
    options = {"k": 2, "max_new_tokens": 2, "output_dir": tmp_path, "progress": False}
    evaluate_best_of_n(build(), None, corpus, **options)
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(ValueError, match=r"holds verdicts of something else \(samples was"):
        evaluate_best_of_n(build(), None, corpus, seed=1, **options)


def test_verdicts_from_before_samples_were_named_are_read_where_they_are_on_the_same_places(tmp_path, monkeypatch):
    corpus = Dataset.from_dict({"prompt": [[2], [3]], "answer": [[1], [1]]})
    evaluate_best_of_n(build(), None, corpus, k=2, max_new_tokens=2, output_dir=tmp_path, progress=False)
    (folder,) = (tmp_path / "judgements").iterdir()
    facts = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({name: facts[name] for name in ("verifier", "about")}))
    monkeypatch.setattr(ExactMatch, "__call__", None)
    judge_best_of_n(tmp_path, corpus, progress=False)
    lines = (folder / "verdicts-00000.jsonl").read_text().splitlines()
    (folder / "verdicts-00000.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(ValueError, match="holds verdicts on other samples"):
        judge_best_of_n(tmp_path, corpus, progress=False)


def test_where_nothing_could_be_judged_it_is_judged_again(tmp_path):
    corpus = Dataset.from_dict({"prompt": [[2], [3]]})
    there = tmp_path / "there"

    def verifier(completions):
        return [float(there.stat().st_size >= 0)] * len(completions)

    options = {"k": 2, "max_new_tokens": 2, "output_dir": tmp_path / "out", "timeout": None, "progress": False}
    assert evaluate_best_of_n(build(), None, corpus, verifier, **options).failed.all()
    there.touch()
    assert evaluate_best_of_n(build(), None, corpus, verifier, **options).pass_at(1) == 1.0
