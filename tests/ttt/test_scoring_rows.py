"""Scores of models whose adapters or parameters move along a response: plain loops, decoding, what is refused."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.scoring import score_encoded, score_responses
from hf_coverage.ttt import scoring
from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.row_networks import RowAdapters
from hf_coverage.ttt.scoring import RowScorer
from tests.ttt.head_reference import Recorder, tiny_llama
from tests.ttt.network_reference import RANK, network_rows, tiny_model

# peft asks a model for a property that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCOPES = [("lora", "exact"), ("lora", "stale"), ("all", "exact"), ("all", "stale")]
SETTINGS = [{}, {"radius": 0.3, "decay": 0.2}, {"lam": 0.5, "num_steps": 2}]


def config_of(scope, cache, **settings):
    return TTTConfig(0.1, scope=scope, cache=cache, rank=RANK if scope == "lora" else None, **settings)


def draw_corpus(seed=0):
    """Prompts with one and with several responses, of several lengths."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(2, 13, length).tolist() for length in (1, 4, 6)]
    rows = [(prompts[index], draw.integers(2, 13, length).tolist()) for index, length in enumerate((4, 1, 5))]
    rows += [(prompts[1], draw.integers(2, 13, length).tolist()) for length in (3, 6)]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def loop_scores(model, corpus, config, **settings):
    """Every row's token log-probabilities, from a copy of the model that really changes."""
    if config.scope == "lora":
        settings["starts"] = RowAdapters(model, RANK).start[::2]
    settings |= {"lr": config.lr, "stale": config.cache == "stale"}
    rows = network_rows(model, config.scope, corpus["prompt"], **settings)
    return [[row.step(token) for token in completion] for row, completion in zip(rows, corpus["completion"])]


def assert_equal_rows(scored, expected, atol=3e-4):  # rounding grows along a response
    for row, line in zip(scored, expected, strict=True):
        np.testing.assert_allclose(row["token_logprobs"], line, rtol=0, atol=atol)
        assert row["logprob"] == pytest.approx(sum(line), abs=1e-3)


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize(("scope", "cache"), SCOPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_equal_plain_loops(scope, cache, settings, on_prompt):
    model, corpus = tiny_llama(), draw_corpus()
    config = config_of(scope, cache, on_prompt=on_prompt, **settings)
    scored = score_responses(model, None, corpus, ttt=config, per_token=True, progress=False)
    assert_equal_rows(scored, loop_scores(model, corpus, config, on_prompt=on_prompt, **settings))


@pytest.mark.parametrize(
    ("kind", "scope", "cache"),
    [
        ("gpt2", "all", "exact"),
        ("mixtral", "all", "exact"),
        ("gemma2", "all", "exact"),
        ("gemma2", "lora", "exact"),
        ("gemma2", "lora", "stale"),
    ],
)
def test_other_architectures(kind, scope, cache):
    """Among them one that caps its logits, which the head's closed form refuses."""
    model, corpus = tiny_model(kind), draw_corpus(1)
    config = config_of(scope, cache)
    scored = score_responses(model, None, corpus, ttt=config, per_token=True, progress=False)
    assert_equal_rows(scored, loop_scores(model, corpus, config))


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize(("scope", "cache"), SCOPES)
def test_what_is_sampled_is_what_is_scored(scope, cache, on_prompt):
    model = tiny_llama(head_bias=True)
    torch.manual_seed(0)
    result = model.generate(
        torch.tensor([[3, 4, 5]]).repeat(4, 1),
        custom_generate=ttt_generate,
        ttt_lr=0.1,
        ttt_scope=scope,
        ttt_cache=cache,
        ttt_on_prompt=on_prompt,
        do_sample=True,
        max_new_tokens=8,
        return_dict_in_generate=True,
    )
    responses = []
    for row in result.sequences[:, 3:].tolist():
        responses.append(row[: row.index(1) + 1] if 1 in row else row)  # 1 ends a response
    corpus = Dataset.from_dict({"prompt": [[3, 4, 5]] * 4, "completion": responses})
    config = TTTConfig(0.1, scope=scope, cache=cache, on_prompt=on_prompt)
    scored = score_responses(model, None, corpus, ttt=config, progress=False)
    np.testing.assert_allclose(scored["logprob"], result.token_logprobs.double().sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
def test_probabilities_of_all_responses_sum_to_one(scope, cache):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=3, n_positions=16, initializer_range=0.5)
    responses = [list(response) for response in itertools.product(range(3), repeat=3)]
    encoded = EncodedCorpus([[2, 1]] * len(responses), responses)
    for on_prompt in (False, True):
        rule = TTTConfig(0.5, scope=scope, cache=cache, on_prompt=on_prompt)
        scores = score_encoded(GPT2LMHeadModel(config), encoded, ttt=rule)
        assert np.exp(scores.logprob).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
@pytest.mark.parametrize("on_prompt", [False, True])
def test_batches_do_not_matter(scope, cache, on_prompt):
    model, corpus = tiny_llama(), draw_corpus(2)
    config = config_of(scope, cache, on_prompt=on_prompt)
    found = [
        score_responses(model, None, corpus, ttt=config, batch_tokens=tokens, progress=False)["logprob"][:]
        for tokens in (1, 4096)
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 100, 300, 10_000])
@pytest.mark.parametrize("on_prompt", [False, True])
def test_every_row_is_in_one_batch_and_prompts_that_are_followed_are_together(tokens, on_prompt):
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 13, draw.integers(1, 9)).tolist() for _ in range(6)]
    rows = [(prompts[draw.integers(6)], draw.integers(0, 13, draw.integers(1, 9)).tolist()) for _ in range(30)]
    corpus = EncodedCorpus(*map(list, zip(*rows)))
    config = TTTConfig(0.1, scope="lora", on_prompt=on_prompt)
    batches = RowScorer(tiny_llama(), config, batch_tokens=tokens).plan(corpus, range(3, 27))
    assert sorted(itertools.chain.from_iterable(batch.rows for batch in batches)) == list(range(3, 27))
    for batch in batches:
        assert tuple(itertools.chain.from_iterable(batch.waves)) == batch.rows
        places = [[tuple(corpus.prompts[row]) for row in wave] for wave in batch.waves]
        assert all(wave == places[0][: len(wave)] for wave in places)
        longest = sum(
            max(map(len, part)) for part in zip(*((corpus.prompts[r], corpus.completions[r]) for r in batch.rows))
        )
        assert len(places[0]) == 1 or 16 * len(places[0]) * longest <= tokens
        if not on_prompt:
            assert len(batch.waves) == 1
    if on_prompt:
        starts = [prompt for batch in batches for prompt in {tuple(corpus.prompts[row]) for row in batch.rows}]
        assert len(starts) == len(set(starts))


def test_steps_on_a_prompt_are_made_once(monkeypatch):
    """Whatever the number of its responses."""
    steps = []
    honest = scoring.RowModels

    class Counting(honest):
        def __init__(self, model, ids, **settings):
            steps.append(ids.numel() - len(ids))
            super().__init__(model, ids, **settings)

        def step(self, tokens, *, active=None):
            steps.append(int(active.sum()))
            super().step(tokens, active=active)

    monkeypatch.setattr(scoring, "RowModels", Counting)
    encoded = EncodedCorpus([[2, 3, 4, 5, 6]] * 3, [[token, 1, 2] for token in range(2, 5)])
    score_encoded(tiny_llama(), encoded, ttt=TTTConfig(0.1, scope="all", on_prompt=True))
    assert steps == [4, *[1, 1] * 3]  # nothing has to be learned from a last token


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_the_model_stays_what_it_is(scope):
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    score_responses(model, None, draw_corpus(), ttt=TTTConfig(0.5, scope=scope), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_a_step_size_of_zero_is_the_model_as_it_is(scope):
    model, corpus = tiny_llama(), draw_corpus()
    plain, adapted = (
        score_responses(model, None, corpus, ttt=rule, progress=False)["logprob"]
        for rule in (None, TTTConfig(0.0, scope=scope))
    )
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=1e-5)


def test_a_table_goes_on_and_knows_its_settings(tmp_path):
    model, corpus = tiny_llama(), draw_corpus()
    config = TTTConfig(0.3, scope="lora", rank=2)
    options = {"output_dir": tmp_path, "shard_rows": 2, "progress": False}
    first = score_responses(model, None, corpus, ttt=config, **options)["logprob"][:]
    (tmp_path / "scores-00001.safetensors").unlink()
    kept = (tmp_path / "scores-00000.safetensors").stat().st_mtime_ns
    assert score_responses(model, None, corpus, ttt=config, **options)["logprob"][:] == first
    assert (tmp_path / "scores-00000.safetensors").stat().st_mtime_ns == kept
    for other in (
        TTTConfig(0.3),
        TTTConfig(0.3, scope="lora", rank=3),
        TTTConfig(0.3, scope="lora", rank=2, cache="stale"),
        TTTConfig(0.3, scope="lora", rank=2, on_prompt=True),
        TTTConfig(0.3, scope="all"),
    ):
        with pytest.raises(ValueError, match="holds the scores of something else"):
            score_responses(model, None, corpus, ttt=other, **options)


def test_refusals():
    model, corpus = tiny_llama(), draw_corpus()
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    for other, settings, message in (
        (model, {"teacher": tiny_llama(seed=1)}, "`teacher` measures a model that stays"),
        (model, {"head_statistics": True}, "`head_statistics` are those of a head that stays"),
        (get_peft_model(tiny_llama(), lora), {}, "does not train beside other adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            score_responses(other, None, corpus, ttt=TTTConfig(0.1, scope="lora"), progress=False, **settings)


def test_steps_that_lead_nowhere_are_named():
    with pytest.raises(
        ValueError, match=r"gave NaN for row \d+: its steps with lr 1e\+30 led it there; take a smaller"
    ):
        score_responses(tiny_llama(), None, draw_corpus(), ttt=TTTConfig(1e30, scope="all"), progress=False)


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_half_precision(scope):
    model, corpus = tiny_llama().bfloat16(), draw_corpus()
    config = TTTConfig(0.05, scope=scope)
    scored = score_responses(model, None, corpus, ttt=config, progress=False)["logprob"]
    exact = score_responses(model.float(), None, corpus, ttt=config, progress=False)["logprob"]
    np.testing.assert_allclose(scored, exact, rtol=0.05, atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["lora", "all"])
def test_a_real_model_is_scored_as_it_decodes(smollm2, scope):
    model, tokenizer = smollm2
    prompt = tokenizer("Water boils at a temperature of", return_tensors="pt").input_ids
    response = tokenizer(" 100 degrees Celsius.", return_tensors="pt").input_ids
    result = model.generate(
        prompt,
        custom_generate=ttt_generate,
        ttt_lr=1e-3 if scope == "lora" else 1e-5,
        ttt_scope=scope,
        max_new_tokens=response.shape[1],
        eos_token_id=None,
        logits_processor=[Recorder(forced=response)],
        return_dict_in_generate=True,
    )
    corpus = Dataset.from_dict({"prompt": prompt.tolist(), "completion": response.tolist()})
    config = TTTConfig(1e-3 if scope == "lora" else 1e-5, scope=scope)
    scored = score_responses(model, None, corpus, ttt=config, per_token=True, progress=False)
    np.testing.assert_allclose(scored["token_logprobs"][0], result.token_logprobs[0], rtol=0, atol=1e-3)
