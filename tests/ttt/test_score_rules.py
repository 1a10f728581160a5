"""Several rules from one reading: to the bit what each gives alone, what is read again, and rules that diverge."""

import itertools

import numpy as np
import pytest
import torch

from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference import forward
from hf_coverage.measure.engine import ScoringEngine
from hf_coverage.measure.scoring import PLAIN, score_responses, score_rules
from tests.ttt.head_reference import tiny_llama
from tests.ttt.test_scoring_heads import draw_corpus

HEADS = {
    "small": StepRule(0.1),
    "large": StepRule(0.4),
    "prompt": TTTConfig(0.4, on_prompt=True),
    "ball": StepRule(0.4, radius=0.5),
    "zero ball": StepRule(0.3, radius=2.0, center="zero"),
    "decay": TTTConfig(0.4, decay=0.2, on_prompt=True),
    "normalised": StepRule(0.4, lam=0.3),
    "twice": StepRule(0.2, num_steps=2),
    "cut": StepRule(0.2, top_k=2),
    "cut, prompt": TTTConfig(0.3, top_k=2, on_prompt=True),
}
SLOW = {"lora": TTTConfig(0.1, scope="lora", rank=2, cache="stale"), "all": TTTConfig(0.01, scope="all")}
DIVERGING = StepRule(3e38, num_steps=3)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder):
    """When each shard was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


@pytest.fixture
def passes(monkeypatch):
    """Counts the forward passes."""
    seen = []
    honest = forward.HeadForward.__call__
    monkeypatch.setattr(forward.HeadForward, "__call__", lambda self, *a, **k: seen.append(1) or honest(self, *a, **k))
    return seen


TIGHT = {"batch_tokens": 8, "logits_memory": 400}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("untied", {}),
        ("untied", TIGHT),
        ("untied", {"logits_memory": 2000}),
        ("tied", TIGHT),
        ("tied", {"batch_invariant": True}),
        ("bias", TIGHT),
        ("bias", {"share_prefixes": False}),
    ],
    ids=str,
)
def test_each_folder_has_the_bytes_of_scoring_it_alone(kind, options, tmp_path):
    model, corpus = tiny_llama(head_bias=kind == "bias", tie=kind == "tied"), draw_corpus()
    options = options | {"per_token": True, "shard_rows": 3, "progress": False}
    together = score_rules(model, None, corpus, HEADS, output_dir=tmp_path / "together", **options)
    assert list(together) == [PLAIN, *HEADS]
    for name, rule in {PLAIN: None, **HEADS}.items():
        alone = score_responses(model, None, corpus, ttt=rule, output_dir=tmp_path / name, **options)
        assert files_in(tmp_path / "together" / name) == files_in(tmp_path / name), name
        assert together[name].logprob.tolist() == alone["logprob"][:]
        assert [line.tolist() for line in together[name].token_logprobs] == alone["token_logprobs"][:]


def test_half_precision_is_to_the_bit_the_same_too():
    model, corpus = tiny_llama().bfloat16(), draw_corpus()
    together = score_rules(model, None, corpus, HEADS, progress=False)
    for name, rule in {PLAIN: None, **HEADS}.items():
        alone = score_responses(model, None, corpus, ttt=rule, progress=False)["logprob"][:]
        assert together[name].logprob.tolist() == alone, name


def test_what_moves_more_than_the_head_is_scored_beside_it(tmp_path):
    model, corpus = tiny_llama(), draw_corpus().select(range(3))
    rules = {"lora": SLOW["lora"], "small": HEADS["small"], "all": SLOW["all"]}
    together = score_rules(model, None, corpus, rules, output_dir=tmp_path / "together", progress=False)
    assert list(together) == [PLAIN, *rules]
    for name, rule in {PLAIN: None, **rules}.items():
        rows = 16 if name in SLOW else 1024
        score_responses(model, None, corpus, ttt=rule, output_dir=tmp_path / name, shard_rows=rows, progress=False)
        assert files_in(tmp_path / "together" / name) == files_in(tmp_path / name), name


def test_heads_are_one_reading(passes):
    model, corpus = tiny_llama(), draw_corpus()
    score_rules(model, None, corpus, {"prompt": HEADS["prompt"]}, progress=False)
    one = len(passes)
    score_rules(model, None, corpus, HEADS, progress=False)
    assert len(passes) == 2 * one


def test_rules_of_one_kind_share_the_logits_as_far_as_there_is_memory():
    model, corpus = tiny_llama(), draw_corpus()
    computed = []
    model.lm_head.register_forward_hook(lambda _, args, output: computed.append(output.numel()))
    rules = {f"lr {lr}": StepRule(lr) for lr in (0.1, 0.2, 0.3, 0.4)}

    def logits_of(*names, **options):
        computed.clear()
        score_rules(model, None, corpus, {name: rules[name] for name in names}, progress=False, **options)
        return sum(computed)

    none, one, four = logits_of(), logits_of("lr 0.1"), logits_of(*rules)
    assert none < one == four
    # Lines of up to 11 tokens, and memory for the logits of two of them: a line alone is a batch.
    assert logits_of(*rules, logits_memory=110) > logits_of("lr 0.1", logits_memory=110)


def test_what_is_there_is_not_scored_again(tmp_path, monkeypatch, passes):
    model, corpus = tiny_llama(), draw_corpus()
    options = {"output_dir": tmp_path, "shard_rows": 3, "progress": False}
    first = {name: HEADS[name] for name in ("small", "cut")}
    # written before by one who scored a rule alone
    score_responses(model, None, corpus, ttt=first["cut"], **options | {"output_dir": tmp_path / "cut"})
    kept = written(tmp_path)
    before = score_rules(model, None, corpus, first, **options)
    assert kept.items() <= written(tmp_path).items()
    asked = []
    honest = ScoringEngine.score_rules

    def recording(self, corpus, rows, rules, advance):
        asked.append((rows.start, [rule.lr if rule else None for rule in rules]))
        return honest(self, corpus, rows, rules, advance)

    monkeypatch.setattr(ScoringEngine, "score_rules", recording)
    # what an interruption leaves: the shards of a round that were not written
    (tmp_path / "small" / "scores-00001.safetensors").unlink()
    (tmp_path / "cut" / "scores-00001.safetensors").unlink()
    (tmp_path / PLAIN / "scores-00002.safetensors").unlink()
    kept = written(tmp_path)
    again = score_rules(model, None, corpus, first, **options)
    assert asked == [(3, [0.1, 0.2]), (6, [None])]
    assert kept.items() <= written(tmp_path).items()
    assert all(np.array_equal(again[name].logprob, before[name].logprob) for name in before)
    asked.clear()
    passes.clear()
    score_rules(model, None, corpus, first, **options)
    assert asked == []
    assert len(passes) == 1  # to see what the model is
    score_rules(model, None, corpus, first | {"large": HEADS["large"]}, **options)
    assert asked == [(0, [0.4]), (3, [0.4]), (6, [0.4])]


@pytest.mark.parametrize("rule", [DIVERGING, TTTConfig(1e30, scope="all", num_steps=3)], ids=["head", "all"])
def test_a_rule_that_diverges_is_a_result_and_costs_no_other_its_own(rule, tmp_path):
    model, corpus = tiny_llama(), draw_corpus().select(range(3))
    options = {"shard_rows": 2, "progress": False}
    rules = {"small": HEADS["small"], "diverging": rule}
    found = score_rules(model, None, corpus, rules, output_dir=tmp_path, **options)
    assert np.isnan(found["diverging"].logprob).any()
    for name, own in ((PLAIN, None), ("small", HEADS["small"])):
        alone = score_responses(model, None, corpus, ttt=own, output_dir=tmp_path / f"{name} alone", **options)
        assert found[name].logprob.tolist() == alone["logprob"][:]
    kept = written(tmp_path)
    again = score_rules(model, None, corpus, rules, output_dir=tmp_path, **options)
    np.testing.assert_array_equal(again["diverging"].logprob, found["diverging"].logprob)
    assert written(tmp_path) == kept
    # who scores that rule alone is told, and does not get NaN, whether it is scored or read
    for folder in (tmp_path / "diverging", tmp_path / "new"):
        with pytest.raises(ValueError, match=r"`model` gave NaN for row \d: its steps with lr .* led it there"):
            score_responses(model, None, corpus, ttt=rule, output_dir=folder, **options)


@pytest.mark.parametrize("into_tables", [True, False])
def test_nan_of_the_model_itself_is_an_error_and_nothing_of_it_is_kept(into_tables, tmp_path):
    model, corpus = tiny_llama(), draw_corpus()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="`model` gave NaN for row 0: its weights are damaged"):
        score_rules(model, None, corpus, HEADS | SLOW, output_dir=tmp_path if into_tables else None, progress=False)
    assert written(tmp_path) == {}


def test_refusals(tmp_path):
    model, corpus = tiny_llama(), draw_corpus()
    with pytest.raises(ValueError, match="must not have the name 'plain'"):
        score_rules(model, None, corpus, {"plain": StepRule(0.1)}, progress=False)
    with pytest.raises(ValueError, match="`shard_rows` must be at least 1, got 0"):
        score_rules(model, None, corpus, HEADS, shard_rows=0, progress=False)
    # all of it before anything is scored
    score_responses(model, None, corpus, ttt=StepRule(0.3), output_dir=tmp_path / "large", progress=False)
    before = written(tmp_path)
    with pytest.raises(ValueError, match="holds the scores of something else"):
        score_rules(model, None, corpus, HEADS, output_dir=tmp_path, progress=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="linear output head, got Sequential"):
        score_rules(model, None, corpus, SLOW | HEADS, output_dir=tmp_path / "new", progress=False)
    assert written(tmp_path) == before


@pytest.mark.parametrize("names", list(itertools.permutations(["large", "prompt", "cut"])))
def test_the_order_of_rules_does_not_matter(names):
    model, corpus = tiny_llama(), draw_corpus()
    found = score_rules(model, None, corpus, {name: HEADS[name] for name in names}, progress=False)
    expected = score_rules(model, None, corpus, HEADS, progress=False)
    assert all(np.array_equal(found[name].logprob, expected[name].logprob) for name in found)
