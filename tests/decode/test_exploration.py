"""Features, selection and reward on real models, against one row at a time and the full sequence at once."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_coverage.decode.exploration import ExplorationReward, response_features, select_diverse
from hf_coverage.functional.exploration import elliptical_bonus, elliptical_selection, sparse_projection
from tests.decode import exploration_ranks
from tests.decode.exploration_runs import (
    Record,
    features_by_definition,
    grpo_tokenizer,
    grpo_trainer,
    make_corpus,
    tiny_llama,
)
from tests.processes import run


def tiny_gemma2():
    """Soft-capped logits, tied head, layers with sliding windows shorter than the rows."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=6, max_position_embeddings=64, eos_token_id=1,
        bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2])
def test_features_are_those_of_one_row_at_a_time(build, batch_tokens):
    """Whatever is batched together, padded, or continued from a prompt that is run once."""
    model, corpus = build(), make_corpus()
    features = response_features(model, None, corpus, batch_tokens=batch_tokens)
    expected = [features_by_definition(model, row["prompt"], row["completion"]) for row in corpus]
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6)
    assert features.dtype == np.float64


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_features(side):
    model, corpus = tiny_llama(), make_corpus(6)
    features = response_features(model, None, corpus)
    for row, values in zip(corpus, features):
        padded = features_by_definition(model, row["prompt"], row["completion"], padding=5, side=side)
        np.testing.assert_allclose(values, padded, rtol=0, atol=2e-6)


def test_equal_rows_are_run_once_and_equal_to_the_bit(tiny_gpt2, monkeypatch):
    corpus, tokens = make_corpus(), []
    forward = type(tiny_gpt2).forward

    def counting(self, input_ids=None, **arguments):
        tokens.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(tiny_gpt2), "forward", counting)
    features = response_features(tiny_gpt2, None, corpus.select([0] * 50))
    np.testing.assert_array_equal(features, np.repeat(features[:1], 50, axis=0))
    # Once for its features, and some more to see that the model reads it the same in company.
    assert sum(tokens) <= 2 + 6 * (len(corpus[0]["prompt"]) + len(corpus[0]["completion"]))


def test_progress_counts_different_responses_on_request(tiny_gpt2, capsys):
    corpus = make_corpus()
    different = len({(tuple(row["prompt"]), tuple(row["completion"])) for row in corpus})
    response_features(tiny_gpt2, None, corpus)
    assert f"{different}/{different}" in capsys.readouterr().err
    select_diverse(tiny_gpt2, None, corpus, k=1, progress=False)
    ExplorationReward(tiny_gpt2, None)(prompts=[[1]], completion_ids=[[2]])
    assert capsys.readouterr().err == ""


def test_large_features_are_projected(tiny_gpt2):
    corpus = make_corpus()
    whole = response_features(tiny_gpt2, None, corpus, dim=None)
    assert whole.shape == (len(corpus), 16)
    np.testing.assert_array_equal(response_features(tiny_gpt2, None, corpus), whole)
    projected = response_features(tiny_gpt2, None, corpus, dim=5)
    np.testing.assert_allclose(projected, whole @ sparse_projection(16, 5), rtol=1e-12, atol=1e-12)


def test_a_model_in_training_stays_as_it_was(tiny_gpt2):
    model = tiny_gpt2.train()
    model.transformer.h[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trained = response_features(model, None, make_corpus())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    np.testing.assert_array_equal(trained, response_features(model.eval(), None, make_corpus()))


@pytest.mark.parametrize("center", [False, True])
def test_each_prompt_gets_the_selection_of_its_own_rows(tiny_gpt2, center):
    corpus = make_corpus(40).add_column("id", list(range(43)))
    chosen = select_diverse(tiny_gpt2, None, corpus, k=3, lam=0.5, center=center)
    features, expected = response_features(tiny_gpt2, None, corpus), []
    prompts = [tuple(prompt) for prompt in corpus["prompt"]]
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        own = features[rows] - (features[rows].mean(axis=0) if center else 0)
        expected += [rows[index] for index in elliptical_selection(own, 3, lam=0.5)]
    assert chosen["id"][:] == expected
    assert chosen.column_names == corpus.column_names


def test_a_real_model_takes_what_differs_before_what_repeats(smollm2):
    """Text in, SmolLM2: three ways of saying one thing, and two other things."""
    model, tokenizer = smollm2
    completions = [" Paris.", " Paris.", " Paris.", " I cannot answer this question.", " 42"]
    samples = Dataset.from_dict({"prompt": ["The capital of France is"] * 5, "completion": completions})
    assert set(select_diverse(model, tokenizer, samples, k=3)["completion"]) == set(completions)
    prompt, response = (tokenizer(text)["input_ids"] for text in (samples["prompt"][0], completions[3]))
    expected = features_by_definition(model, prompt, response)
    features = response_features(model, tokenizer, samples, dim=None)[3]
    assert np.abs(features - expected).max() < 1e-4 * np.abs(expected).max()
    reward = ExplorationReward(model, tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in completions]
    bonus = np.array(reward(prompts=samples["prompt"][:], completions=completions, completion_ids=ids))
    np.testing.assert_allclose(bonus, elliptical_bonus(response_features(model, tokenizer, samples)), atol=1e-6)
    assert bonus[:3].max() < 0.4 < bonus[3:].min()


def test_rewards_are_by_prompt_wherever_its_completions_are(tiny_gpt2):
    prompts, ids = [[2, 3], [4], [2, 3], [4], [2, 3]], [[5, 1], [5, 1], [5, 1], [6, 7, 1], [8, 1]]
    rewards = ExplorationReward(tiny_gpt2, None, lam=2.0)(prompts=prompts, completion_ids=ids)
    features = response_features(tiny_gpt2, None, Dataset.from_dict({"prompt": prompts, "completion": ids}))
    for rows in ([0, 2, 4], [1, 3]):
        np.testing.assert_allclose(np.array(rewards)[rows], elliptical_bonus(features[rows], lam=2.0))
    assert [type(reward) for reward in rewards] == [float] * 5
    centered = ExplorationReward(tiny_gpt2, None, lam=2.0, center=True)(prompts=prompts, completion_ids=ids)
    own = features[[1, 3]] - features[[1, 3]].mean(axis=0)
    np.testing.assert_allclose(np.array(centered)[[1, 3]], elliptical_bonus(own, lam=2.0))


CHATS = [[{"role": "user", "content": text}] for text in ("one two", "three")]


def one_for_all(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # of TRL
@pytest.mark.parametrize("prompts", [["one two", "three"], CHATS], ids=["text", "chat"])
def test_it_is_a_reward_of_a_real_grpo_step(tmp_path, prompts):
    """The rewards TRL logs are the bonuses of the groups, added with weight beta; the step moves the weights."""
    model, tokenizer, record = tiny_llama(vocab_size=400), grpo_tokenizer(), Record()
    start = copy.deepcopy(model)
    rewards = [one_for_all, ExplorationReward(model, tokenizer, lam=0.1), record]
    trainer = grpo_trainer(tmp_path, model, rewards, prompts, reward_weights=[1.0, 0.5, 0.0], scale_rewards="batch")
    trainer.train()
    given, expected = record.given, np.empty(8)
    for prompt in prompts:
        rows = [row for row, other in enumerate(given["prompts"]) if other == prompt]
        assert len(rows) == 4
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        states = [features_by_definition(start, ids, given["completion_ids"][row]) for row in rows]
        expected[rows] = elliptical_bonus(states, lam=0.1)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(list(trainer._logs["rewards"]["exploration_reward"]), expected, atol=1e-6)
    logs = trainer.state.log_history[0]
    assert logs["rewards/exploration_reward/mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert logs["reward"] == pytest.approx(1 + 0.5 * np.mean(expected), abs=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has kept."""
    folder = tmp_path_factory.mktemp("ranks")
    run(exploration_ranks.__file__, folder, ranks=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("model", ["whole", "sharded"])
def test_two_processes_reward_a_group_as_one_does(ranks, model):
    """Groups that are split over ranks, and unequal numbers of rows."""
    alone = ExplorationReward(exploration_ranks.build(), None)
    expected = alone(prompts=exploration_ranks.PROMPTS, completion_ids=exploration_ranks.RESPONSES)
    np.testing.assert_allclose(ranks[0][model] + ranks[1][model], expected, atol=1e-6)
    assert [len(rank[model]) for rank in ranks] == [3, 5]


def test_two_processes_return_the_features_of_one(ranks):
    features = response_features(exploration_ranks.build(), None, make_corpus())
    for rank in ranks:
        np.testing.assert_allclose(rank["features"], features, atol=1e-6)


def test_a_grpo_step_of_two_processes_rewards_groups_that_lie_on_both(ranks):
    """Each rank makes two completions of the one prompt, and its group is all four."""
    prompts, ids = (ranks[0][name] + ranks[1][name] for name in ("prompts", "completion_ids"))
    assert (len(ranks[0]["prompts"]), len(set(prompts))) == (2, 1)
    expected = ExplorationReward(tiny_llama(vocab_size=400), grpo_tokenizer())(prompts=prompts, completion_ids=ids)
    np.testing.assert_allclose(ranks[0]["logged"], expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda model: select_diverse(model, None, make_corpus(4), k=3),
            ValueError,
            "`k` must .* is 3; the prompt of",
        ),
        (lambda model: select_diverse(model, None, make_corpus(4), k=0), ValueError, "`k` must be at least 1 .* is 0"),
        (lambda model: response_features(model, None, make_corpus(), dim=0), ValueError, "`dim` must be at least 1"),
        (
            lambda model: response_features(model, None, make_corpus(), batch_tokens=0),
            ValueError,
            "`batch_tokens` must",
        ),
        (
            lambda model: response_features(model, None, make_corpus(4, 50)),
            ValueError,
            r"Row \d has token id .*\[0, 11",
        ),
        (lambda model: response_features(model, None, [1]), TypeError, "datasets.Dataset"),
        (
            lambda model: ExplorationReward(model, None)(prompts=[[2] * 60], completion_ids=[[3] * 5]),
            ValueError,
            "Prompt 0 has 60 tokens, and with 5 new ones it does not fit",
        ),
        (
            lambda model: ExplorationReward(model, None)(prompts=[[2], [2]], completion_ids=[[3], []]),
            ValueError,
            "Row 1 of `completions` has no tokens",
        ),
        (
            lambda model: ExplorationReward(model, None)(prompts=["a"], completion_ids=[[3]]),
            ValueError,
            "`tokenizer` must",
        ),
        (
            lambda model: ExplorationReward(model, None, lam=0)(prompts=[[2]], completion_ids=[[3]]),
            ValueError,
            "`lam` must",
        ),
    ],
)
def test_errors_say_what_is_wrong(tiny_gpt2, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_gpt2)


def test_a_damaged_model_is_named(tiny_gpt2):
    tiny_gpt2.transformer.wte.weight.data[7] = np.nan
    corpus = Dataset.from_dict({"prompt": [[2], [2]], "completion": [[3], [7]]})
    with pytest.raises(ValueError, match="`model` gave NaN or infinite hidden states for row 1"):
        response_features(tiny_gpt2, None, corpus)
