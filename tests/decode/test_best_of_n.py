"""Sampling, judging and what follows from it: against enumeration, killed, in two processes, and with a real model."""

import datetime
import decimal
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
import torch
from datasets import Dataset

from hf_coverage import BestOfNResult, CoverageProfile, evaluate_best_of_n, judge_best_of_n, sample_corpus
from hf_coverage.decode.verifiers import ExactMatch, ReasoningGym
from hf_coverage.inference.folder_lock import LOCK_FILES
from hf_coverage.measure.scoring import score_responses
from tests import reference
from tests.decode.bad_verifiers import share_of_even
from tests.decode.best_of_n_runs import K, build, evaluate, make_corpus
from tests.processes import Job, run

PROMPTS = [[2], [3, 4], [5, 6, 7], [8], [9, 2], [10, 10, 3]]


def peaked(seed=0):
    """A model whose responses differ much in probability."""
    model = build(seed)
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim == 2 else 1)
    return model


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_rows(folder, name):
    return [json.loads(line) for path in sorted(folder.glob(f"{name}-*")) for line in path.read_text().splitlines()]


def within(observed, expected, p, n, k):
    """Whether an estimate of Pass@N from k samples is within 4 standard errors (delta method) of what it should be."""
    errors = n * (1 - p) ** (n - 1) * np.sqrt(p * (1 - p) / k)
    return abs(observed - expected) <= 4 * np.sqrt((errors**2).sum()) / len(p) + 1e-9


def worth(response):
    return float(sum(response) % 7) / 6


def test_pass_at_n_and_best_of_n_are_those_of_all_responses():
    """Over all 121 responses of two tokens to each prompt, whose probabilities the definition gives."""
    model, k = peaked(), 600

    def verifier(completions):
        return [worth(response) for response in completions]

    corpus = Dataset.from_dict({"prompt": PROMPTS})
    result = evaluate_best_of_n(
        model, None, corpus, verifier, k=k, max_new_tokens=2, eos_token_id=[], batch_size=600, timeout=None, seed=1
    )
    probabilities, rewards = [], None
    for prompt in PROMPTS:
        responses, logprobs, _ = reference.enumerate_responses(model, prompt, 2)
        probabilities.append(np.exp(logprobs))
        rewards = np.array([worth(response) for response in responses])
    solved = np.array([p[rewards >= 1].sum() for p in probabilities])
    assert 0.02 < solved.mean() < 0.5
    for n in (1, 2, 4, 8, 16):
        assert within(result.pass_at(n), np.mean(1 - (1 - solved) ** n), solved, n, k)
        order = np.argsort(rewards)
        best = [np.diff(np.append(0.0, np.cumsum(p[order])) ** n) @ rewards[order] for p in probabilities]
        assert result.best_of(n).value == pytest.approx(np.mean(best), abs=0.02)
        assert result.best_of(n).low <= np.mean(best) <= result.best_of(n).high


@pytest.fixture(scope="module")
def one_answer():
    """A tiny model, a corpus with one right answer a prompt (some likely, some not), its profile, and samples."""
    model = peaked(2)
    answers = []
    for row, prompt in enumerate(PROMPTS):
        responses, logprobs, _ = reference.enumerate_responses(model, prompt, 2)
        answers.append(list(responses[np.argsort(logprobs)[-1 - row]]))
    corpus = Dataset.from_dict({"prompt": PROMPTS, "completion": answers, "reference_logprob": [0.0] * len(PROMPTS)})
    scored = score_responses(model, None, corpus, progress=False)
    profile = CoverageProfile.from_logprobs(scored["logprob"], corpus["reference_logprob"], groups=corpus["prompt"])
    result = evaluate_best_of_n(model, None, corpus, k=400, max_new_tokens=2, eos_token_id=[], batch_size=400)
    return profile, result


def test_what_is_sampled_agrees_with_what_is_exact(one_answer):
    profile, result = one_answer
    predicted = result.predict(profile)
    solved = np.exp(profile.logprobs)
    assert predicted.n.tolist() == list(range(1, 401))
    for n in (1, 2, 4, 8, 32):
        exact = np.mean(1 - (1 - solved) ** n)
        assert predicted.exact[n - 1] == pytest.approx(exact)
        assert within(result.pass_at(n), exact, solved, n, 400)
        low, high = result.interval(n)
        assert low <= exact <= high


def test_what_is_guaranteed_is_achieved_and_becomes_worth_something(one_answer):
    profile, result = one_answer
    guaranteed = result.predict(profile).guaranteed
    assert (guaranteed <= result.predict(profile).exact + 1e-9).all()
    assert guaranteed[0] < 0.5 < guaranteed[-1]
    halved = result.predict(profile, comparator_reward=0.5).guaranteed
    np.testing.assert_allclose(halved, np.maximum(guaranteed - 0.5, 0))


def test_a_profile_of_something_else_predicts_nothing(one_answer):
    profile, result = one_answer
    other = CoverageProfile.from_logprobs(profile.logprobs, np.zeros(6), groups=list("abcdef"))
    with pytest.raises(ValueError, match="must be of the same prompts"):
        result.predict(other)
    corpus = Dataset.from_dict({"prompt": PROMPTS, "answer": PROMPTS})
    hot = evaluate_best_of_n(build(), None, corpus, k=2, max_new_tokens=2, temperature=2.0, progress=False)
    with pytest.raises(ValueError, match=r"sampled with \{'temperature': 2.0"):
        hot.predict(profile)


def test_responses_are_those_of_sample_corpus_whatever_the_shards(tmp_path):
    prompts = make_corpus()["prompt"]
    expected = sample_corpus(build(), None, prompts, k=K, max_new_tokens=5, batch_size=4, seed=3, progress=False)
    results = [evaluate(tmp_path / f"{rows}", shard_rows=rows) for rows in (1, 12, 1000)]
    results.append(evaluate(None))
    texts = {result.to_json() for result in results}
    assert len(texts) == 1
    for folder in (tmp_path / "1", tmp_path / "1000"):
        rows = read_rows(folder, "samples")
        rows.sort(key=lambda row: (row["prompt"], row["sample"]))
        assert [row["ids"] for row in rows] == expected["completion"][:]
        assert [row["logprob"] for row in rows] == expected["reference_logprob"][:]
        assert [row["finished"] for row in rows] == expected["finished"][:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, evaluate(folder)


def test_what_is_kept_is_the_result(finished):
    folder, result = finished
    (judgements,) = (folder / "judgements").iterdir()
    assert judgements.name.startswith("share_of_even-")
    rows = read_rows(judgements, "verdicts")
    table = np.full(result.rewards.shape, np.nan)
    for row in rows:
        table[row["prompt"], row["sample"]] = 0.0 if row["error"] else row["reward"]
    np.testing.assert_array_equal(result.rewards, table)
    count = sum(row["error"] == "raised ValueError" for row in rows)
    assert 0 < count <= K
    assert result.errors == {"raised ValueError": count}
    assert result.failed.sum() == result.failed[3].sum() == count
    example = result.examples["raised ValueError"]
    assert example["row"] == 3
    assert example["message"] == "ValueError: too long"
    assert len(example["response"]) > 3


@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(finished, tmp_path, number):
    """Killed by SIGKILL in the middle of writing the metadata, samples, or verdicts."""
    whole, expected = finished
    killed = Job("-m", "tests.decode.best_of_n_runs", tmp_path, number).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [name for name in contents(tmp_path) if Path(name).name not in LOCK_FILES]
    assert len([name for name in left if not name.endswith(".part")]) == number
    assert evaluate(tmp_path).to_json() == expected.to_json()
    assert contents(tmp_path) == contents(whole)


def no_generation(self, *args, **kwargs):
    raise AssertionError("samples were drawn again")


def test_kept_samples_are_judged_again_without_the_model(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("hf_coverage.inference.sampler.Sampler.draw", no_generation)
    assert evaluate(folder).to_json() == result.to_json()
    corpus = make_corpus()
    assert judge_best_of_n(folder, corpus, share_of_even, progress=False).to_json() == result.to_json()

    def length(completions):
        return [len(response) / 5 for response in completions]

    judged = judge_best_of_n(folder, corpus, length, threshold=0.5, progress=False)
    assert judged.verifier == "length"
    assert judged.pass_at(1) == (judged.rewards >= 0.5).mean()
    assert len(list((folder / "judgements").iterdir())) == 2
    with pytest.raises(ValueError, match="samples for other prompts"):
        judge_best_of_n(folder, corpus.select(range(8)), length)
    with pytest.raises(FileNotFoundError, match="holds no samples"):
        judge_best_of_n(folder / "judgements", corpus, length)


def test_a_changed_verifier_or_answer_is_judged_anew(tmp_path):
    corpus = Dataset.from_dict({"prompt": [[2], [3]], "answer": [[1], [1]]})
    options = {"k": 2, "max_new_tokens": 2, "output_dir": tmp_path, "progress": False}
    for answers, column in (([[1], [1]], "answer"), ([[1], [2]], "answer"), ([[1], [2]], "other")):
        corpus = Dataset.from_dict({"prompt": [[2], [3]], column: answers})
        evaluate_best_of_n(build(), None, corpus, ExactMatch(column), **options)
    assert len(list((tmp_path / "judgements").iterdir())) == 3


def test_samples_of_something_else_are_not_mixed_in(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"samples of something else \(seed was 3, now 4\).*new `output_dir`"):
        evaluate(folder, seed=4)
    with pytest.raises(ValueError, match="weights was"):
        evaluate_best_of_n(
            build(1),
            None,
            make_corpus(),
            share_of_even,
            k=K,
            max_new_tokens=5,
            batch_size=4,
            shard_rows=12,
            seed=3,
            output_dir=folder,
        )
    evaluate(tmp_path)
    (tmp_path / "samples-00002.jsonl").unlink()
    with pytest.raises(ValueError, match=r"first missing file is samples-00002\.jsonl"):
        judge_best_of_n(tmp_path, make_corpus(), lambda completions: [0.0] * len(completions))
    (tmp_path / "samples-00001.jsonl").write_text('{"prompt": 0')
    with pytest.raises(ValueError, match=r"samples-00001\.jsonl is damaged"):
        evaluate(tmp_path)


def test_two_processes_are_equal_to_one(tmp_path):
    run(Path(__file__).with_name("best_of_n_runs.py"), tmp_path / "two", ranks=2)
    for name in ("", "-stratified"):
        whole = tmp_path / f"one{name}"
        result = evaluate(whole, sampling="stratified" if name else "independent")
        for rank in range(2):
            assert (tmp_path / f"two/rank{rank}{name}.json").read_text().strip() == result.to_json()
        samples = {path: text for path, text in contents(whole).items() if path.startswith("samples")}
        drawn = {k: text for k, text in contents(tmp_path / f"two/shards{name}").items() if k.startswith("samples")}
        assert drawn.keys() == samples.keys()
        for path, text in samples.items():
            for one, other in zip(map(json.loads, text.splitlines()), map(json.loads, drawn[path].splitlines())):
                assert one.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-5)
                assert one == other


def test_prompts_are_taken_once_and_columns_that_vary_are_left_out():
    corpus = Dataset.from_dict({"prompt": [[2], [3], [2]], "completion": [[1], [2], [4]], "answer": [[5], [6], [5]]})
    seen = []

    def verifier(prompts, completions, answer, **columns):
        assert "completion" not in columns
        seen.extend(zip(prompts, answer))
        return [1.0] * len(completions)

    result = evaluate_best_of_n(build(), None, corpus, verifier, k=3, max_new_tokens=2, timeout=None, progress=False)
    assert result.rewards.shape == (2, 3)
    assert result.rows.tolist() == [0, 1]
    assert sorted(map(str, seen)) == sorted(map(str, [([2], [5]), ([3], [6])] * 3))
    with pytest.raises(ValueError, match="needs `completion`, which differs between rows of one prompt"):
        evaluate_best_of_n(build(), None, corpus.remove_columns("answer"), k=3, max_new_tokens=2)


def test_a_failure_is_never_chosen_for_having_failed():
    """Rewards are negative here, so that 0 would be the best of all."""
    corpus = Dataset.from_dict({"prompt": [[2]]})

    def verifier(completions, completion_ids):
        return [None if row == 0 else -1.0 - row for row, _ in enumerate(completions)]

    result = evaluate_best_of_n(
        build(), None, corpus, verifier, k=3, max_new_tokens=2, timeout=None, threshold=None, progress=False
    )
    assert result.rewards.tolist() == [[-3.0, -2.0, -3.0]]
    assert result.best_of(3).value == -2.0
    assert "1 of 3 responses could not be judged (1 returned None)" in result.sentence
    with pytest.raises(ValueError, match="needs a `threshold`"):
        result.pass_at(1)
    assert set(result.metrics([3])) == {"best_of_3", "best_of_3_stderr", "failed"}


def test_a_run_in_which_every_judgement_fails_ends_with_the_count():
    corpus = Dataset.from_dict({"prompt": [[2], [3]]})

    def verifier(completions):
        raise OSError("no disk")

    result = evaluate_best_of_n(build(), None, corpus, verifier, k=3, max_new_tokens=2, timeout=None, progress=False)
    assert result.errors == {"raised OSError": 6}
    assert (result.pass_at(3), result.failed.all()) == (0.0, True)


def test_the_model_and_the_random_state_stay_as_they_were():
    model = build().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    config = model.generation_config.to_dict()
    evaluate_best_of_n(
        model, None, Dataset.from_dict({"prompt": [[2]], "answer": [[1]]}), k=2, max_new_tokens=2, progress=False
    )
    assert model.training
    assert model.generation_config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_result_is_read_back_as_it_was_written(finished, tmp_path):
    _, result = finished
    text = result.to_json(tmp_path / "result.json")
    for source in (text, tmp_path / "result.json"):
        again = BestOfNResult.from_json(source)
        assert again.to_json() == text
        assert again.metrics() == result.metrics()
    with pytest.raises(ValueError, match="is not a result written by `to_json`"):
        BestOfNResult.from_json('{"format": 2}')


def test_numbers_have_the_names_that_people_know():
    result = BestOfNResult.from_rewards([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    metrics = result.metrics([2])
    assert metrics["pass@2"] == pytest.approx(np.mean([2 / 3, 1, 0, 0]))
    assert metrics["pass@2_stderr"] == pytest.approx(np.std([2 / 3, 1, 0, 0], ddof=1) / 2)
    assert metrics["best_of_2"] == pytest.approx(np.mean([2 / 3, 1, 0, 1 / 3]))
    assert list(result.metrics())[::2] == [
        "pass@1",
        "best_of_1",
        "pass@2",
        "best_of_2",
        "pass@3",
        "best_of_3",
        "failed",
    ]
    low, high = result.interval(3)
    assert 0 <= low < result.pass_at(3) < high <= 1
    for n in (0, 4, 1.5):
        with pytest.raises(ValueError, match="`n` must be a whole number from 1 to k = 3"):
            result.pass_at(n)
    with pytest.raises(ValueError, match="row 0, column 1 is nan"):
        BestOfNResult.from_rewards([[0.0, np.nan]])


def test_the_plot_shows_the_curve_and_the_prediction(one_answer, tmp_path):
    profile, result = one_answer
    ax = result.plot(tmp_path / "plot.png", profile=profile).axes[0]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    np.testing.assert_allclose(ax.lines[0].get_ydata()[7], result.pass_at(8))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), result.predict(profile).exact)
    (region,) = [one for one in ax.collections if one.get_hatch()]  # no line that could pass for a prediction
    ends = {float(x): float(y) for x, y in region.get_paths()[0].vertices if y > 0}
    guaranteed = result.predict(profile).guaranteed
    np.testing.assert_allclose([ends[n] for n in range(1, len(guaranteed) + 1)], guaranteed)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert result.plot().axes[0].get_ylabel() == "Pass@$N$ (higher is better)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be at least 1"),
        ({"shard_rows": 0}, "`shard_rows` must be at least 1"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"timeout": -1.0}, "`timeout` must be positive"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None, **options)


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2026, 1, 1),
        datetime.datetime(2026, 1, 1, 12, 30),
        datetime.time(12, 30),
        datetime.timedelta(seconds=5),
        decimal.Decimal("1.50"),
        b"\x00\xff",
        float("inf"),
        [[1, 2], [3]],
        {"a": [1.5, None], "b": "c"},
        None,
        2**62,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_column_reaches_the_verifier_s_process_as_it_is(value):
    corpus = Dataset.from_dict({"prompt": [[2]], "held": [value]})
    expected = repr(corpus[0]["held"])

    def verifier(completions, held):
        return [float(repr(held[0]) == expected)]

    result = evaluate_best_of_n(build(), None, corpus, verifier, k=1, max_new_tokens=1, timeout=60, progress=False)
    assert (result.errors, result.pass_at(1)) == ({}, 1.0)


def test_a_real_model_on_a_real_task(smollm2, tmp_path):
    """SmolLM2 through its own `generate`, chat messages, reasoning_gym's scorer in its process, and TRL's protocol."""
    model, tokenizer = smollm2
    entries = list(reasoning_gym.create_dataset("chain_sum", size=3, seed=1, min_terms=2, max_terms=2, max_digits=1))
    corpus = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": entry["question"]}],
                "answer": entry["answer"],
                "metadata": json.dumps(entry["metadata"]),
            }
            for entry in entries
        ]
    )
    options = {"k": 4, "max_new_tokens": 6, "batch_size": 12, "output_dir": tmp_path, "timeout": 60, "progress": False}
    result = evaluate_best_of_n(model, tokenizer, corpus, ReasoningGym("chain_sum"), **options)
    rows = read_rows(tmp_path, "samples")
    dataset = reasoning_gym.create_dataset("chain_sum", size=3, seed=1)
    for row in rows:
        assert row["text"] == tokenizer.decode(row["ids"], skip_special_tokens=True)
        expected = dataset.score_answer(row["text"].strip(), entries[row["prompt"]])
        assert result.rewards[row["prompt"], row["sample"]] == expected
    assert result.errors == {}

    def mentions(prompts, completions, answer, **columns):  # as one writes it for GRPOTrainer
        return [float(right in given[0]["content"]) for given, right in zip(completions, answer)]

    judged = judge_best_of_n(tmp_path, corpus, mentions, timeout=60, progress=False)
    assert judged.rewards.tolist() == [
        [float(entries[row]["answer"] in one["text"]) for one in rows if one["prompt"] == row] for row in range(3)
    ]
