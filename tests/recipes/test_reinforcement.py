"""The reinforcement recipe: models side by side against each alone, objectives against enumeration, and its runs."""

import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_coverage.functional.exploration import elliptical_bonus
from hf_coverage.functional.predictiveness import rank_correlations
from hf_coverage.tasks.graph_search import GraphSearch
from recipes.reasoning.model import add_adapter
from recipes.reinforcement import course, questions, start
from recipes.reinforcement.graphs import GIVEN_UP, HALVES, MIXTURE
from recipes.reinforcement.policy_gradient import Lessons, Objective, Rows, reinforce, right_logprobs
from recipes.reinforcement.stacked import StackedGPT2

CONFIGURATION = start.__file__.replace("start.py", "small.yaml")
GRAPHS = CONFIGURATION.replace("reinforcement", "graph_search")
REASONING = CONFIGURATION.replace("reinforcement/small", "choice/reasoning")
TASK = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")


def graph_model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 30, "n_positions": 46, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 28, "initializer_range": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh",
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**settings | changes)).eval()


def some_rows(runs=2, prompts=3, group=4, length=5):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 28, (runs, prompts, 7)))
    return ids, torch.from_numpy(rng.integers(0, 28, (runs, prompts, group, length)))


def alone(model, prompts, tokens):
    """Log-probabilities of one model's responses `(P, G, T)` by transformers."""
    group, length = tokens.shape[1:]
    ids = torch.cat([prompts[:, None].expand(-1, group, -1), tokens], dim=-1).flatten(0, 1)
    logprobs = model(ids).logits[:, -length - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, tokens.reshape(-1, length, 1)).view(tokens.shape)


def test_models_side_by_side_are_each_alone_with_their_gradients():
    models, (prompts, tokens) = [graph_model(0), graph_model(1)], some_rows()
    together = StackedGPT2(models)
    past = together.read(prompts)
    found = together.token_logprobs(past, tokens)
    torch.testing.assert_close(together.token_logprobs(past, tokens, together.states(past, tokens)), found)
    (found[..., 1:] ** 2).sum().backward()
    for run, model in enumerate(models):
        expected = alone(model, prompts[run], tokens[run])
        torch.testing.assert_close(found[run], expected, rtol=1e-4, atol=1e-4)
        (expected[..., 1:] ** 2).sum().backward()
        for name, weight in model.transformer.named_parameters():
            gradient = together.weights[name.replace(".", "/")].grad[run]
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-2)


def test_samples_follow_their_codes():
    models, (prompts, _) = [graph_model(0), graph_model(1)], some_rows()
    together = StackedGPT2(models)
    codes = torch.from_numpy(np.random.default_rng(1).random((2, 3, 4, 3)))
    codes[0, 0, 0] = 1 - 2**-53
    drawn = together.sample(together.read(prompts), codes)
    for place in np.ndindex(*codes.shape):
        run, prompt, row, position = place
        ids = torch.cat([prompts[run, prompt], drawn[run, prompt, row, :position]])
        chances = models[run](ids[None]).logits[0, -1].double().softmax(-1).cumsum(-1)
        token = int(drawn[place])
        assert chances[token] > codes[place] - 1e-5
        assert token == 0 or chances[token - 1] <= codes[place] + 1e-5


def test_only_models_that_it_computes_are_taken():
    with pytest.raises(ValueError, match="`models` must have one configuration"):
        StackedGPT2([graph_model(), graph_model(n_head=1)])
    with pytest.raises(ValueError, match="the tanh GELU and no dropout"):
        StackedGPT2([graph_model(resid_pdrop=0.1)])


def test_gradients_are_clipped_model_by_model():
    together = StackedGPT2([graph_model(0), graph_model(1)])
    prompts, tokens = some_rows()
    (
        together.token_logprobs(together.read(prompts), tokens).sum((1, 2, 3)) * torch.tensor([1e-6, 1.0])
    ).sum().backward()
    before = [weight.grad.clone() for weight in together.parameters()]
    together.clip_gradients(0.5)
    norms = torch.stack([weight.grad.flatten(1).norm(dim=1) for weight in together.parameters()]).norm(dim=0)
    assert norms[1].item() == pytest.approx(0.5, rel=1e-4)
    for old, weight in zip(before, together.parameters()):
        torch.testing.assert_close(weight.grad[0], old[0])


def test_objectives():
    rewards, states = (
        np.array([[[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]]),
        np.random.default_rng(0).random((1, 2, 4, 3)),
    )
    np.testing.assert_allclose(Objective("mean")(rewards), [[[0.75, -0.25, -0.25, -0.25], [0.0] * 4]])
    np.testing.assert_allclose(Objective("grpo")(rewards)[0, 0], np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    np.testing.assert_allclose(Objective("pass@2")(rewards)[0], [[1.5, -0.5, -0.5, -0.5], [0.0] * 4])
    total = rewards + 0.5 * np.stack([elliptical_bonus(group) for group in states[0]])
    expected = (total - total.mean(-1, keepdims=True)) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(Objective("exploration 0.5")(rewards, states), expected)
    for name in ("ppo", "pass@0", "exploration"):
        with pytest.raises(ValueError, match="An objective must be `grpo`"):
            Objective(name)


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """One step of plain gradient: the mean over seeds of the advantage's gradient against d p(right)."""
    rows = Rows.draw(TASK, (0.0, 1.0, 0.0), 1, seed=(0,))
    together = StackedGPT2([graph_model()])
    past = together.read(rows.prompts[None])
    right = rows.paths[None, :, None, :2]  # of which the first token alone is judged
    together.token_logprobs(past, right)[..., 0].exp().sum().backward()
    expected = together.weights["ln_f/bias"].grad[0].clone()
    together.zero_grad()
    codes = torch.from_numpy(np.random.default_rng(0).random((1, 1, 20000, 2)))
    past = together.read(rows.prompts[None])
    tokens = together.sample(past.detach(), codes)
    rewards = (tokens == right)[..., 0].double().numpy()
    advantages = torch.from_numpy(Objective("mean")(rewards)).float()
    (advantages * together.token_logprobs(past, tokens)[..., 0]).mean().backward()
    torch.testing.assert_close(together.weights["ln_f/bias"].grad[0], expected, rtol=0.1, atol=0.02)


def test_a_run_does_not_depend_on_those_beside_it_and_learns():
    held_out = Rows.draw(TASK, (0.0, 1.0, 0.0), 20, seed=(0,))
    models = [graph_model(seed, initializer_range=0.02) for seed in (0, 1)]

    def run(seeds, begin):
        lessons = Lessons.draw(TASK, (0.0, 1.0, 0.0), seeds, steps=4, prompts=2)
        options = {"group_size": 8, "learning_rate": 0.01, "measure_after": (0, 4)}
        return reinforce(StackedGPT2(begin), lessons, held_out, Objective("exploration 1"), **options)

    both, single = run([5, 6], models), run([6], models[1:])
    for step, logprobs in single.items():
        np.testing.assert_allclose(both[step][1:], logprobs, rtol=1e-3)
    assert np.abs(both[4] - both[0]).max() > 0.01
    np.testing.assert_allclose(both[0], right_logprobs(StackedGPT2(models), held_out, batch=7), rtol=1e-5)


def test_lessons_are_other_rows_than_those_held_out():
    lessons = Lessons.draw(TASK, (0.5, 0.5, 0.0), [0, 1, 0], steps=2, prompts=5)
    assert torch.equal(lessons.prompts[:, 0], lessons.prompts[:, 2])
    assert not torch.equal(lessons.prompts[:, 0], lessons.prompts[:, 1])
    held_out = Rows.draw(TASK, (0.5, 0.5, 0.0), 10, seed=(0,)).prompts
    assert not (lessons.prompts[:, 0].reshape(10, 1, -1) == held_out).all(-1).any()
    with pytest.raises(ValueError, match='its `prompt_format` must be "aligned"'):
        Rows.draw(GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24), (1.0, 0.0, 0.0), 50, seed=(0,))


def test_no_signal_is_enumerated():
    p = np.array([[0.2, 0.7]])
    found = start.measures(np.log(p), 3, start.MINE)
    np.testing.assert_allclose(found[start.SIGNAL, start.MINE], p**3 + (1 - p) ** 3)
    np.testing.assert_allclose(found["miss_1", start.MINE], 1 - p)
    np.testing.assert_allclose(found["miss_3", start.MINE], (1 - p) ** 3)


@pytest.fixture
def trained(tmp_path):
    """A run over graphs, of random models."""
    for seed, name in enumerate(("pretrain/checkpoint-4", "finetune/checkpoint-2", "finetune/checkpoint-10")):
        graph_model(seed).save_pretrained(tmp_path / "graphs" / name)
        (tmp_path / "graphs" / name / "trainer_state.json").write_text("{}")
    return tmp_path


def call(monkeypatch, module, folder, *more):
    small = {
        "graphs.config": GRAPHS, "graphs.run": folder / "graphs", "learning.prompts": 1, "learning.group_size": 2,
        "learning.held_out": 4, "start.steps": "0 2 10", "start.seeds": "0 1", "start.measure_after": "1 2",
        "start.rows": 5, "course.steps": "0 10", "course.seeds": "0 1", "course.measure_after": "1 2",
        "course.tasks": HALVES, "course.objectives": "grpo pass@2",
    }  # fmt: skip
    words = ["--config", CONFIGURATION, "--output_dir", str(folder / "out")]
    for name, value in small.items():
        words += [f"--{name}", *([value] if name == "course.tasks" else str(value).split())]
    monkeypatch.setattr(sys, "argv", [module.__name__, *words, *more])
    module.main()


@pytest.mark.slow
def test_a_run_leaves_tables_and_goes_on_where_it_was(trained, monkeypatch):
    monkeypatch.setattr(start, "rank_correlations", lambda *a, **k: rank_correlations(*a, **k | {"replicates": 20}))
    for module, name in ((start, "start"), (course, "course")):
        call(monkeypatch, module, trained)
        files = [trained / "out" / f"{name}.{kind}" for kind in ("md", "json")]
        written = [file.read_text() for file in files]
        with monkeypatch.context() as patch:
            patch.setattr("recipes.reinforcement.graphs.reinforce", None)
            patch.setattr("recipes.reinforcement.graphs.right_logprobs", None)
            call(monkeypatch, module, trained)
        assert [file.read_text() for file in files] == written
    facts = json.loads((trained / "out" / "start.json").read_text())
    assert set(facts["tasks"]) == {MIXTURE, HALVES, GIVEN_UP}
    assert np.array(facts["tasks"][HALVES]["p_right"]["2"]).shape == (2, 3)
    for name in ("starts.png", "guides.png", "course_half_and_half.png"):
        assert (trained / "out" / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`steps` must be among those kept in .*\[0, 2, 10\], but has \[7\]"):
        call(monkeypatch, start, trained, "--start.steps", "0", "7")


@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_grpo_from_an_adapter_leaves_tables_and_goes_on(tmp_path, monkeypatch):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=300, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = add_adapter(base, rank=2, alpha=4.0, dropout=0.0, seed=0)
    adapter.save_pretrained(tmp_path / "runs" / "gcd-seed0" / "finetune" / "checkpoint-3")
    words = ["--config", CONFIGURATION.replace("small", "reasoning"), "--output_dir", str(tmp_path / "out")]
    small = {
        "questions.runs": tmp_path / "runs", "questions.model": tmp_path / "base", "questions.tasks": "gcd",
        "questions.steps": 3, "questions.held_out": 3, "grpo.max_steps": 1, "grpo.num_generations": 2,
        "grpo.max_completion_length": 2, "run.threads": 1, "questions.config": REASONING,
    }  # fmt: skip
    for name, value in small.items():
        words += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", ["questions", *words])
    questions.main()
    facts = json.loads((tmp_path / "out" / "questions.json").read_text())["gcd"]["3"]
    assert len(facts["silent"]) == 1
    assert 0 <= facts["after"]["Pass@1"] <= facts["after"]["Pass@32"] <= 1
    monkeypatch.setattr(questions.Study, "_learn", None)
    questions.main()
    with pytest.raises(ValueError, match=r"has no profiles of the steps \[3\]: finish it first"):
        questions.Study(_settings(tmp_path)).profiles("gcd")


def _settings(folder):
    asked = questions.QuestionArguments(REASONING, str(folder / "runs"), ["gcd"], [3], str(folder / "base"))
    return questions.Settings(questions.RunArguments(str(folder / "out")), asked, questions.GRPOArguments())


def test_verdicts_are_the_tasks_own():
    judge = questions.verdicts("gcd")
    assert judge(["4", " 5"], answer=["4", "4"], metadata=["{}", "{}"], prompts=None) == [1.0, 0.0]
