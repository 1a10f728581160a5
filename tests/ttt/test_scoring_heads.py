"""Scores of the adapted model: equal to decoding step by step, whatever the batches, and what is refused."""

import copy
import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.measure.scoring import score_responses
from hf_coverage.optim.token_level import token_level_sgd
from hf_coverage.ttt import scoring
from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.processor import TTTLogitsProcessor
from tests.ttt.head_reference import Recorder, reference_logits, tiny_llama

RULES = [
    StepRule(0.4),
    StepRule(0.4, radius=0.5),
    StepRule(0.4, decay=0.2),
    StepRule(0.4, lam=0.3),
    StepRule(0.2, num_steps=2),
    StepRule(0.2, top_k=4),
]


def draw_corpus(seed=0):
    """Prompts with one and with several responses, of all lengths."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(2, 13, length).tolist() for length in (1, 4, 4, 7, 3)]
    rows = [
        (prompts[index], draw.integers(2, 13, draw.integers(1, 12)).tolist()) for index in (0, 1, 1, 1, 2, 3, 3, 4)
    ]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def scored_in_every_way(model, corpus, rule, expected):
    """Compares the scores under several options with log-probabilities, a tensor for each row."""
    for options in ({}, {"batch_tokens": 8, "logits_memory": 400}, {"share_prefixes": False}):
        scored = score_responses(model, None, corpus, ttt=rule, per_token=True, progress=False, **options)
        for row, line in zip(scored, expected, strict=True):
            np.testing.assert_allclose(row["token_logprobs"], line, rtol=0, atol=2e-5, err_msg=str(options))
            assert row["logprob"] == pytest.approx(float(line.double().sum()), abs=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["untied", "tied", "bias"])
def test_scores_equal_decoding(rule, kind):
    model, corpus = tiny_llama(head_bias=kind == "bias", tie=kind == "tied"), draw_corpus()
    settings = {"radius": rule.radius, "decay": rule.decay, "lam": rule.lam, "top_k": rule.top_k}
    settings["num_steps"] = rule.num_steps
    expected = []
    with TTTLogitsProcessor(model, rule.lr, **settings) as processor:
        for row in corpus:
            recorder = Recorder(forced=torch.tensor([row["completion"]]))
            model.generate(
                torch.tensor([row["prompt"]]),
                max_new_tokens=len(row["completion"]),
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[processor, recorder],
            )
            logprobs = recorder.stacked()[0].log_softmax(-1)
            expected.append(logprobs.gather(-1, torch.tensor(row["completion"])[:, None])[:, 0])
    scored_in_every_way(model, corpus, rule, expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_equal_decoding_that_follows_the_prompt_too(rule):
    model, corpus = tiny_llama(head_bias=True), draw_corpus()
    config = TTTConfig(**vars(rule) | {"on_prompt": True})
    settings = {f"ttt_{name}": value for name, value in vars(rule).items() if name not in ("center", "num_steps")}
    expected = []
    for row in corpus:
        forced = Recorder(forced=torch.tensor([row["completion"]]))
        result = model.generate(
            torch.tensor([row["prompt"]]),
            custom_generate=ttt_generate,
            ttt_on_prompt=True,
            ttt_steps=rule.num_steps,
            max_new_tokens=len(row["completion"]),
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[forced],
            return_dict_in_generate=True,
            **settings,
        )
        expected.append(result.token_logprobs[0])
    scored_in_every_way(model, corpus, config, expected)


def test_steps_on_a_prompt_are_made_once(monkeypatch):
    """Whatever the number of its responses, where they are scored in one batch."""
    followed = []
    honest = scoring.follow_tokens

    def counting(hidden, tokens, *args, mask, **kwargs):
        followed.append(int(mask.sum()))
        return honest(hidden, tokens, *args, mask=mask, **kwargs)

    monkeypatch.setattr(scoring, "follow_tokens", counting)
    rows = [{"prompt": [2, 3, 4, 5, 6, 7, 8], "completion": [token, 1, 2]} for token in range(2, 7)]
    corpus = Dataset.from_list(rows)
    score_responses(tiny_llama(), None, corpus, ttt=TTTConfig(0.1, on_prompt=True), progress=False)
    assert followed == [6, *[3] * 5]


@pytest.mark.parametrize("on_prompt", [False, True])
def test_scores_equal_autograd(on_prompt):
    model, corpus = tiny_llama(head_bias=True), draw_corpus(1)
    config, settings = TTTConfig(0.3, radius=1.0, on_prompt=on_prompt), {"radius": 1.0, "on_prompt": on_prompt}
    scored = score_responses(model, None, corpus, ttt=config, progress=False)
    for row in scored:
        logits = reference_logits(model, [row["prompt"]], [row["completion"]], lr=0.3, **settings)[0].log_softmax(-1)
        expected = float(logits.gather(-1, torch.tensor(row["completion"])[:, None]).sum())
        assert row["logprob"] == pytest.approx(expected, abs=1e-4)


def test_a_ball_around_zero_is_the_one_of_training():
    model, corpus = tiny_llama(head_bias=True), draw_corpus(2)
    rule = StepRule(0.3, radius=2.0, center="zero")
    scored = score_responses(model, None, corpus, ttt=rule, progress=False)
    for row in scored:
        ids = torch.tensor([row["prompt"] + row["completion"]])
        labels = ids.clone()
        labels[:, : len(row["prompt"])] = -100
        trained = token_level_sgd(copy.deepcopy(model), ids, labels, lr=0.3, radius=2.0, scope="head")
        assert row["logprob"] == pytest.approx(float(trained.sum()), abs=1e-4)


def test_a_step_size_of_zero_is_the_model_as_it_is():
    model, corpus = tiny_llama(), draw_corpus()
    plain, adapted = (
        score_responses(model, None, corpus, ttt=rule, progress=False)["logprob"] for rule in (None, StepRule(0.0))
    )
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_what_is_sampled_is_what_is_scored(on_prompt):
    model = tiny_llama(head_bias=True)
    torch.manual_seed(0)
    result = model.generate(
        torch.tensor([[3, 4, 5]]).repeat(6, 1),
        custom_generate=ttt_generate,
        ttt_lr=0.4,
        ttt_on_prompt=on_prompt,
        do_sample=True,
        max_new_tokens=12,
        return_dict_in_generate=True,
    )
    responses = []
    for row in result.sequences[:, 3:].tolist():
        responses.append(row[: row.index(1) + 1] if 1 in row else row)  # 1 ends a response
    corpus = Dataset.from_dict({"prompt": [[3, 4, 5]] * 6, "completion": responses})
    scored = score_responses(model, None, corpus, ttt=TTTConfig(0.4, on_prompt=on_prompt), progress=False)
    np.testing.assert_allclose(scored["logprob"], result.token_logprobs.double().sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_probabilities_of_all_responses_sum_to_one(on_prompt):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=4, n_positions=16, initializer_range=0.5)
    responses = [list(response) for response in itertools.product(range(4), repeat=5)]
    corpus = Dataset.from_dict({"prompt": [[2, 1]] * len(responses), "completion": responses})
    rule = TTTConfig(1.0, on_prompt=on_prompt)
    scored = score_responses(GPT2LMHeadModel(config), None, corpus, ttt=rule, progress=False)
    assert np.exp(scored["logprob"]).sum() == pytest.approx(1.0, abs=1e-5)


def test_half_precision():
    model, corpus = tiny_llama().bfloat16(), draw_corpus()
    scored = score_responses(model, None, corpus, ttt=StepRule(0.3), progress=False)["logprob"]
    exact = score_responses(model.float(), None, corpus, ttt=StepRule(0.3), progress=False)["logprob"]
    np.testing.assert_allclose(scored, exact, rtol=0.05, atol=0.3)


def test_a_table_knows_its_rule(tmp_path):
    model, corpus = tiny_llama(), draw_corpus()
    first = score_responses(model, None, corpus, ttt=StepRule(0.3), output_dir=tmp_path, progress=False)["logprob"]
    again = score_responses(model, None, corpus, ttt=StepRule(0.3), output_dir=tmp_path, progress=False)["logprob"]
    assert list(first) == list(again)
    # the head alone, on the tokens of the response, is what a rule alone means
    same = score_responses(model, None, corpus, ttt=TTTConfig(0.3), output_dir=tmp_path, progress=False)["logprob"]
    assert list(first) == list(same)
    for rule in (None, StepRule(0.2), TTTConfig(0.3, on_prompt=True)):
        with pytest.raises(ValueError, match="holds the scores of something else"):
            score_responses(model, None, corpus, ttt=rule, output_dir=tmp_path, progress=False)


def test_refusals():
    model, corpus = tiny_llama(), draw_corpus()
    for settings, message in (
        ({"head_statistics": True}, "`head_statistics` are those of a head that stays"),
        ({"teacher": tiny_llama(seed=1)}, "`teacher` measures a model that stays"),
        ({"ttt": StepRule(torch.tensor([0.1]))}, "`ttt` must have one step size"),
    ):
        with pytest.raises(ValueError, match=message):
            score_responses(model, None, corpus, progress=False, **{"ttt": StepRule(0.1)} | settings)
    config = Gemma2Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=5.0,
    )
    with pytest.raises(ValueError, match="scaling or soft-capping"):
        score_responses(Gemma2ForCausalLM(config), None, corpus, ttt=StepRule(0.1), progress=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="linear output head, got Sequential"):
        score_responses(model, None, corpus, ttt=StepRule(0.1), progress=False)
