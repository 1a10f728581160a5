"""Best-of-N from stratified samples: unbiased in blocks, extended, killed, and refused where it must be."""

import itertools
import json
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_coverage import BestOfNResult, evaluate_best_of_n, judge_best_of_n, sample_corpus
from hf_coverage.decode.sample_verdicts import Judging
from hf_coverage.functional.arithmetic_codes import response_intervals, token_parts
from hf_coverage.functional.best_of_n import best_of_blocks, best_of_n_reward, pass_at_n
from hf_coverage.inference.sampler import Sampler
from tests.decode.bad_verifiers import share_of_even
from tests.decode.best_of_n_runs import K, build, evaluate, make_corpus
from tests.decode.test_best_of_n import contents, no_generation, peaked, read_rows
from tests.processes import Job

LEVELS = (1, 2, 4, 8, 16)


def stratified(folder, **options):
    return evaluate(folder, sampling="stratified", **options)


def exact_passes(model, prompts, accept):
    """Pass@N of each prompt `(P, 5)`, the product over strata, and p(accepted), over all responses of two tokens."""
    responses = list(itertools.product(range(11), repeat=2))
    accepted = np.array([accept(response) for response in responses])
    passes, solved = [], []
    for prompt in prompts:
        ids = torch.tensor([[*prompt, *response] for response in responses])
        with torch.no_grad():
            logits = model(ids).logits[:, len(prompt) - 1 : -1]
        low, log_length = (part.numpy() for part in response_intervals(token_parts(logits, torch.tensor(responses))))
        p, strata = np.exp(log_length), [np.arange(n)[:, None] / n for n in LEVELS]
        held = [
            (np.minimum(low + p, starts + 1 / n) - np.maximum(low, starts)).clip(0) @ accepted
            for n, starts in zip(LEVELS, strata)
        ]
        passes.append([1 - np.prod(1 - n * parts) for n, parts in zip(LEVELS, held)])
        solved.append(p[accepted].sum())
    return np.array(passes), np.array(solved)


def test_blocks_are_unbiased_and_the_formula_for_independent_samples_is_not():
    """Over 216 prompts whose responses are all enumerated: the expected Pass@N of a block is the product formula."""
    model = peaked(1)
    prompts = [list(prompt) for prompt in itertools.product(range(2, 8), repeat=3)]
    exact, solved = exact_passes(model, prompts, lambda response: response[0] == 5)

    def verifier(completions):
        return [float(response[0] == 5) for response in completions]

    result = evaluate_best_of_n(
        model,
        None,
        Dataset.from_dict({"prompt": prompts}),
        verifier,
        k=16,
        max_new_tokens=2,
        sampling="stratified",
        eos_token_id=[],
        batch_size=1000,
        timeout=None,
        progress=False,
    )
    assert (exact[:, 1:] - (1 - (1 - solved[:, None]) ** LEVELS[1:]) > -1e-6).all()
    from_counts = pass_at_n(result.rewards >= 1)
    for place, n in enumerate(LEVELS):
        differences = best_of_blocks(result.rewards, n) - exact[:, place]
        assert result.pass_at(n) == pytest.approx(best_of_blocks(result.rewards, n).mean())
        assert result.best_of(n).value == result.pass_at(n)
        assert abs(differences.mean()) < 4 * differences.std() / np.sqrt(len(prompts)) + 1e-3
        low, high = result.interval(n)
        assert low <= exact[:, place].mean() <= high
    # Of 4 among 16 it says what 4 independent samples achieve, and less.
    error = (from_counts[:, 3] - exact[:, 2]).mean()
    assert error < -0.02
    assert result.pass_at(4) > (1 - (1 - solved) ** 4).mean() + 0.02


def test_blocks_are_means_over_aligned_ones():
    rewards = np.random.default_rng(0).random((3, 13))
    for n, blocks in {1: 13, 2: 6, 4: 3, 8: 1, 13: 1}.items():
        expected = [np.mean([max(row[b * n : b * n + n]) for b in range(blocks)]) for row in rewards]
        np.testing.assert_allclose(best_of_blocks(rewards, n), expected)
    np.testing.assert_allclose(best_of_blocks(rewards, 13), best_of_n_reward(rewards)[:, -1])
    result = BestOfNResult.from_rewards(rewards, sampling="stratified", threshold=None)
    assert result.levels() == [1, 2, 4, 8, 13]
    assert list(result.metrics())[::2] == [f"best_of_{n}" for n in (1, 2, 4, 8, 13)] + ["failed"]
    assert "the best of 13 stratified ones" in result.sentence
    assert result.plot().axes[0].lines[0].get_xdata().tolist() == [1, 2, 4, 8, 13]


@pytest.mark.parametrize("n", [3, 6, 0, 16, 2.5])
def test_other_numbers_of_stratified_samples_are_refused(n):
    result = BestOfNResult.from_rewards(np.eye(13), sampling="stratified")
    for ask in (result.pass_at, result.interval, result.best_of, lambda n: result.metrics([n])):
        with pytest.raises(ValueError, match=r"a power of two up to k = 13, or k itself, .* aligned blocks"):
            ask(n)


def test_how_samples_were_drawn_is_told_with_them(tmp_path):
    result = stratified(tmp_path)
    assert result.is_stratified
    text = result.to_json()
    again = BestOfNResult.from_json(text)
    assert again.to_json() == text
    assert again.is_stratified
    assert stratified(None).to_json() == text
    assert not evaluate(None).is_stratified
    with pytest.raises(ValueError, match=r"is not a result written by `to_json`.*settings"):
        BestOfNResult.from_json(text.replace('"sampling": "stratified"', '"sampling": "other"'))
    for make in (evaluate_best_of_n, BestOfNResult.from_rewards):
        arguments = (build(), None, make_corpus()) if make is evaluate_best_of_n else ([[1.0]],)
        more = {"k": 2, "max_new_tokens": 2} if make is evaluate_best_of_n else {}
        with pytest.raises(ValueError, match='`sampling` must be "independent" or "stratified", got \'lattice\''):
            make(*arguments, **more, sampling="lattice")


def test_responses_are_those_of_sample_corpus_whatever_the_shards_and_batches(tmp_path):
    prompts = make_corpus()["prompt"]
    expected = sample_corpus(
        build(), None, prompts, k=K, max_new_tokens=5, stratified=True, batch_size=9, seed=3, progress=False
    )
    for name, options in {"1": {"shard_rows": 1}, "1000": {"shard_rows": 1000, "batch_size": 5}}.items():
        stratified(tmp_path / name, **options)
        rows = sorted(read_rows(tmp_path / name, "samples"), key=lambda row: (row["prompt"], row["sample"]))
        assert [row["ids"] for row in rows] == expected["completion"][:]
        np.testing.assert_allclose([row["logprob"] for row in rows], expected["reference_logprob"][:], atol=1e-5)
    kept = sample_corpus(
        build(),
        None,
        prompts,
        k=K,
        max_new_tokens=5,
        stratified=True,
        batch_size=9,
        seed=3,
        progress=False,
        output_dir=tmp_path / "kept",
        shard_rows=9,
    )
    assert kept[:] == expected[:]


def test_equal_prompts_of_a_corpus_share_codes():
    options = {"max_new_tokens": 5, "eos_token_id": [], "stratified": True, "seed": 3, "progress": False}
    apart = sample_corpus(build(), None, [[2, 3], [4], [2, 3]], k=4, **options)
    together = sample_corpus(build(), None, [[2, 3]], k=8, **options)
    assert apart["completion"][:4] + apart["completion"][8:] == together["completion"][:]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A run of 4, extended to 12, and what there was before."""
    folder = tmp_path_factory.mktemp("extended")
    stratified(folder)
    before = contents(folder)
    return folder, before, stratified(folder, k=12)


def test_a_larger_k_keeps_what_is_there(extended):
    folder, before, result = extended
    after = contents(folder)
    assert len(after) > len(before)
    for name, text in before.items():
        assert name == "metadata.json" or after[name] == text
    assert json.loads(after["metadata.json"])["rounds"] == [4, 12]
    fresh = stratified(None, k=12)
    assert fresh.rewards.tolist() == result.rewards.tolist()
    assert result.rewards[:, :4].tolist() == stratified(None).rewards.tolist()
    assert fresh.settings["judged"] != result.settings["judged"]  # drawn in other batches


def test_what_is_there_is_neither_drawn_nor_judged_again(extended, tmp_path, monkeypatch):
    folder, _, result = extended
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", no_generation)
        assert stratified(folder, k=12).to_json() == result.to_json()
    judged = []
    original = Judging._judge_shard
    monkeypatch.setattr(
        Judging,
        "_judge_shard",
        lambda self, judge, rows, table: judged.extend(rows) or original(self, judge, rows, table),
    )
    sizes = []
    for k in (4, 8, 32):
        stratified(tmp_path, k=k)
        sizes.append(len(judged))
    assert sizes == [9 * 4, 9 * 8, 9 * 32]
    again = judge_best_of_n(tmp_path, make_corpus(), share_of_even, progress=False)
    assert again.rewards.shape == (9, 32)
    assert again.is_stratified


def test_samples_of_something_else_are_not_extended(extended, tmp_path):
    folder, _, _ = extended
    with pytest.raises(
        ValueError, match=r"something else \(k was 12, now 4; rounds was \[4, 12\], now \[4\]|k was 12"
    ):
        stratified(folder, k=4)
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        stratified(folder, k=16, seed=4)
    with pytest.raises(ValueError, match="stratified was True, now None"):
        evaluate(folder, k=12)
    evaluate(tmp_path)
    with pytest.raises(ValueError, match="stratified was None, now True"):
        stratified(tmp_path, k=8)
    with pytest.raises(ValueError, match="k was 4, now 8"):
        evaluate(tmp_path, k=8)


def test_a_damaged_record_of_rounds_is_refused(extended, tmp_path):
    stratified(tmp_path)
    facts = json.loads((tmp_path / "metadata.json").read_text())
    for rounds in ([], [8, 4], ["4"], 4):
        (tmp_path / "metadata.json").write_text(json.dumps(facts | {"rounds": rounds}))
        with pytest.raises(ValueError, match="`rounds` of kept samples must be ascending numbers"):
            stratified(tmp_path)
        with pytest.raises(ValueError, match="`rounds` of kept samples must be ascending numbers"):
            judge_best_of_n(tmp_path, make_corpus(), lambda completions: [0.0] * len(completions))


@pytest.mark.parametrize("number", [0, 3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_extension_goes_on_and_ends_with_the_same_bytes(extended, tmp_path, number):
    """Killed by SIGKILL in the middle of writing the metadata, samples, or verdicts; 4 of each prompt were there."""
    folder, before, expected = extended
    stratified(tmp_path)
    assert contents(tmp_path) == before
    killed = Job("-m", "tests.decode.best_of_n_runs", tmp_path, number, "stratified", 12).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert stratified(tmp_path, k=12).to_json() == expected.to_json()
    assert contents(tmp_path) == contents(folder)
