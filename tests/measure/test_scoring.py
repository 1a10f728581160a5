"""Scores against lm-evaluation-harness, against slow float64 loops, and the promise to leave everything as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from hf_coverage import score_responses
from hf_coverage.inference import forward_batches
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.scoring import score_encoded

ROWS = [
    ("The capital of France is", " Paris, and the capital of Germany is Berlin."),
    ("The capital of France is", " Rome."),
    ("The capital of France is", " London, the largest city of the United Kingdom" * 5),  # long
    ("Yes or no? Answer:", " yes"),  # one token
    ("Yes or no? Answer:", " no"),
    ("Left-over spaces   ", "move to the completion"),
    ("A tab and a newline\t\n", "do so, too"),
    ("Übersetze: ", "naïve Ångström, 東京タワー, здравствуй, 🦜🦜"),  # not ASCII
    ("数学の問題です。答えは", "四十二です。"),
    ("", "A prompt without tokens."),
    ("", "x"),
]


def random_corpus(seed: int = 0, vocabulary: int = 11) -> EncodedCorpus:
    generator = np.random.default_rng(seed)

    def tokens(longest):
        return generator.integers(0, vocabulary, generator.integers(1, longest)).tolist()

    pool = [tokens(25) for _ in range(3)]
    prompts = [pool[generator.integers(3)] for _ in range(14)]
    return EncodedCorpus(prompts, [tokens(12) for _ in prompts])


@torch.no_grad()
def logits_of(model, prompt, completion):
    """Float64 logits `(H, V)` before each response token, and the head's inputs there."""
    outputs = model(torch.tensor([prompt + completion]), use_cache=False, output_hidden_states=True)
    place = slice(len(prompt) - 1, -1)
    return outputs.logits[0, place].double(), outputs.hidden_states[-1][0, place].double()


def logprobs_of(model, encoded):
    lines = []
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        logits, _ = logits_of(model, prompt, completion)
        lines.append(torch.log_softmax(logits, -1)[torch.arange(len(completion)), completion].numpy())
    return lines


# lm-eval says so whenever it is given a model that is already loaded.
@pytest.mark.filterwarnings("ignore:.*pretrained.*")
def test_equal_to_lm_eval(smollm2):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = smollm2
    # Its float32 log-softmax alone is 9e-4 off a float64 model on the long response, so here it normalises in float64.
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float64")
    requests = [Instance("loglikelihood", {}, row, 0) for row in ROWS]
    expected = [logprob for logprob, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    corpus = Dataset.from_dict({"prompt": [row[0] for row in ROWS], "completion": [row[1] for row in ROWS]})
    for arguments in ({}, {"share_prefixes": False, "batch_tokens": 96, "logits_memory": 2**22}):
        scored = score_responses(model, tokenizer, corpus, progress=False, **arguments)
        np.testing.assert_allclose(scored["logprob"][:], expected, rtol=0, atol=1e-4, err_msg=f"{arguments}")
    assert scored.column_names == ["prompt", "completion", "logprob", "num_tokens"]
    assert scored["completion"][:] == corpus["completion"][:]


def test_every_column_equals_its_loop(tiny_gpt2):
    teacher = copy.deepcopy(tiny_gpt2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    encoded = random_corpus()
    scores = score_encoded(tiny_gpt2, encoded, teacher=teacher, per_token=True, head_statistics=True)
    alone = score_encoded(tiny_gpt2, encoded, head_statistics=True)
    assert alone.token_kl is None
    assert alone.token_logprobs is None
    for row, (prompt, completion) in enumerate(zip(encoded.prompts, encoded.completions)):
        logits, hidden = logits_of(tiny_gpt2, prompt, completion)
        log_p, log_q = (
            torch.log_softmax(values, -1) for values in (logits, logits_of(teacher, prompt, completion)[0])
        )
        own = log_p[torch.arange(len(completion)), completion]
        np.testing.assert_allclose(scores.token_logprobs[row], own, atol=1e-5)
        assert scores.logprob[row] == scores.token_logprobs[row].astype(np.float64).sum()
        assert scores.num_tokens[row] == len(completion)
        np.testing.assert_allclose(scores.token_kl[row], (log_q.exp() * (log_q - log_p)).sum(-1), atol=1e-5)
        norms = hidden.norm(dim=-1)
        assert scores.hidden_norm[row] == pytest.approx(norms.max().item(), rel=1e-5)
        for result, log_d in ((scores, log_q), (alone, log_p)):
            variance = (norms**2 * (1 - (2 * log_d).exp().sum(-1))).sum().item()
            assert result.inherent_variance[row] == pytest.approx(variance, rel=1e-4)
            spread = torch.eye(11, dtype=torch.float64)[completion] - log_d.exp()
            sampled = (norms**2 * spread.square().sum(-1)).sum().item()
            assert result.sampled_variance[row] == pytest.approx(sampled, rel=1e-4)


def test_columns_of_the_dataset(tiny_gpt2):
    encoded = random_corpus()
    corpus = Dataset.from_dict({"prompt": encoded.prompts, "completion": encoded.completions, "id": range(14)})
    corpus.set_format("torch")
    scored = score_responses(
        tiny_gpt2, None, corpus, per_token=True, teacher=tiny_gpt2, head_statistics=True, progress=False
    )
    assert {name: feature.dtype for name, feature in scored.features.items() if name in ("logprob", "num_tokens")} == {
        "logprob": "float64",
        "num_tokens": "int64",
    }
    assert [len(line) for line in scored["token_logprobs"]] == scored["num_tokens"][:]
    assert scored["id"][:] == list(range(14))
    assert max(max(line) for line in scored["token_kl"]) < 1e-6
    assert {"hidden_norm", "inherent_variance"} < set(scored.column_names)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    batch_tokens=st.integers(1, 400),
    positions=st.integers(1, 50),
    share=st.booleans(),
)
def test_neither_batches_nor_order_nor_sharing_matter(tiny_gpt2, seed, batch_tokens, positions, share):
    encoded = random_corpus(seed)
    order = np.random.default_rng(seed).permutation(len(encoded))
    shuffled = EncodedCorpus([encoded.prompts[row] for row in order], [encoded.completions[row] for row in order])
    expected = [line.sum() for line in logprobs_of(tiny_gpt2, encoded)]
    result = score_encoded(
        tiny_gpt2, shuffled, batch_tokens=batch_tokens, logits_memory=positions * 11 * 8, share_prefixes=share
    )
    np.testing.assert_allclose(result.logprob, np.array(expected)[order], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_models_alone(tiny_gpt2, dtype):
    """The half-precision model's own logits, normalised in float32 and summed in float64."""
    encoded, model = random_corpus(), tiny_gpt2.to(dtype)
    expected = [line.sum() for line in logprobs_of(model, encoded)]
    # Each row in a pass of its own, as in the loop: in half precision the shape of a product shows in its rounding.
    single = [
        score_encoded(model, EncodedCorpus([prompt], [completion]), share_prefixes=False).logprob[0]
        for prompt, completion in zip(encoded.prompts, encoded.completions)
    ]
    np.testing.assert_allclose(single, expected, atol=2e-2)
    np.testing.assert_allclose(score_encoded(model, encoded).logprob, expected, atol=1e-1)


@pytest.fixture
def head_inputs(tiny_gpt2):
    """Numbers of positions that the output head is given, call by call."""
    seen = []
    handle = tiny_gpt2.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:-1].numel()))
    yield seen
    handle.remove()


@pytest.mark.parametrize(("teacher", "bytes_a_position"), [(False, 88), (True, 176)])
def test_logits_stay_within_their_memory(tiny_gpt2, head_inputs, teacher, bytes_a_position):
    encoded = random_corpus()
    score_encoded(
        tiny_gpt2,
        encoded,
        logits_memory=7 * bytes_a_position + 3,
        teacher=copy.deepcopy(tiny_gpt2) if teacher else None,
    )
    assert 4 < max(head_inputs) <= 7


def test_each_distinct_token_is_read_once_and_each_position_reaches_the_head_once(tiny_gpt2, head_inputs, monkeypatch):
    monkeypatch.setattr(forward_batches, "find_reading", lambda *args, fastest, **kwargs: fastest)
    read = []
    handle = tiny_gpt2.transformer.wte.register_forward_hook(lambda _, args, output: read.append(args[0].numel()))
    score_encoded(tiny_gpt2, EncodedCorpus([[5] * 20] * 8, [[row] * 4 for row in range(8)]))
    handle.remove()
    assert read[1:] == [20, 8 * 3]  # after the one-token probe
    assert head_inputs[1:] == [1, 8 * 3]


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "weights": [p.clone() for p in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "grad_mode": torch.is_grad_enabled(),
        "rng": (
            torch.get_rng_state(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            random.getstate(),
        ),
    }


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its successor is too new
@pytest.mark.parametrize("fail", [False, True])
def test_the_model_comes_back_as_it_was(tiny_gpt2, fail):
    model = tiny_gpt2.train()
    model.transformer.h[0].eval()  # a mixture, as with frozen layers
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    encoded = EncodedCorpus([[1]], [[99]]) if fail else random_corpus()
    before = snapshot(model)
    if fail:
        with pytest.raises(ValueError, match="token id 99"):
            score_encoded(model, encoded, head_statistics=True)
    else:
        score_encoded(model, encoded, head_statistics=True)
    after = snapshot(model)
    assert torch.equal(before.pop("rng")[0], after.pop("rng")[0])
    for key in ("gradients", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(before.pop(key), after.pop(key)))
    assert before == after
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()  # and can be trained on


def test_dropout_is_off(tiny_gpt2):
    encoded = random_corpus()
    expected = score_encoded(tiny_gpt2, encoded).logprob
    assert (score_encoded(tiny_gpt2.train(), encoded).logprob == expected).all()


def test_wrappers_are_seen_through(tiny_gpt2):
    encoded = random_corpus()
    expected = score_encoded(tiny_gpt2, encoded).logprob
    for wrapped in (torch.nn.DataParallel(tiny_gpt2), torch.compile(tiny_gpt2, backend="eager")):
        assert (score_encoded(wrapped, encoded).logprob == expected).all()


def test_an_excluded_response_has_probability_zero(tiny_gpt2):
    class Forbidding(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).index_fill(-1, torch.tensor([7]), -math.inf)

    head = Forbidding(16, 11, bias=False)
    head.weight = tiny_gpt2.lm_head.weight
    tiny_gpt2.lm_head = head
    scores = score_encoded(tiny_gpt2, EncodedCorpus([[1], [1]], [[2, 7, 3], [2, 3]]), per_token=True)
    assert scores.logprob[0] == -math.inf
    assert np.isneginf(scores.token_logprobs[0]).tolist() == [False, True, False]
    assert np.isfinite(scores.logprob[1])


def test_progress_shows_tokens_per_second_or_nothing(tiny_gpt2, capfd):
    corpus = Dataset.from_dict({"prompt": [[1, 2]], "completion": [[3]]})
    score_responses(tiny_gpt2, None, corpus, progress=False)
    assert capfd.readouterr() == ("", "")
    score_responses(tiny_gpt2, None, corpus)
    assert "tok/s" in capfd.readouterr().err


def broken(model):
    """A model with a damaged weight."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untie it from the embeddings
    model.lm_head.weight.data[3] = math.nan
    return model


class Headless(GPT2LMHeadModel):
    """A model that multiplies by its embeddings and never calls its head."""

    def forward(self, input_ids, **kwargs):
        outputs = self.transformer(input_ids, **kwargs)
        outputs["logits"] = outputs.last_hidden_state @ self.transformer.wte.weight.T
        return outputs


@pytest.mark.parametrize(
    ("change", "prompt", "completion", "arguments", "error", "message"),
    [
        (None, [1], [11], {}, ValueError, r"Row 1 has token id 11, expected ids in \[0, 11\)"),
        (None, [1] * 60, [1] * 6, {}, ValueError, "Row 1 has 60 prompt and 6 response tokens, but the model takes 64"),
        (None, [1], [1], {"logits_memory": 87}, ValueError, "`logits_memory` must hold .* 88 bytes"),
        (None, [1], [1], {"batch_tokens": 0}, ValueError, "`batch_tokens` must be at least 1, got 0"),
        (broken, [1], [1], {}, ValueError, "`model` gave NaN for row 0"),
        (
            lambda model: GPT2Model(model.config),
            [1],
            [1],
            {},
            ValueError,
            "with output embeddings, got GPT2Model.*AutoModelForCausalLM",
        ),
        (lambda model: Headless(model.config), [1], [1], {}, RuntimeError, "got 0 calls"),
    ],
    ids=["vocabulary", "length", "logits_memory", "batch_tokens", "nan", "no head", "unused head"],
)
def test_what_cannot_be_scored_is_refused(tiny_gpt2, change, prompt, completion, arguments, error, message):
    model = change(tiny_gpt2) if change else tiny_gpt2
    with pytest.raises(error, match=message):
        score_encoded(model, EncodedCorpus([[1], prompt], [[1], completion]), **arguments)


def test_a_teacher_of_another_vocabulary_is_refused(tiny_gpt2):
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=12, bos_token_id=0, eos_token_id=1))
    with pytest.raises(ValueError, match="`teacher` must have the vocabulary of `model`, 11 tokens, got 12"):
        score_encoded(tiny_gpt2, random_corpus(), teacher=teacher)


def test_columns_that_are_there_already_are_refused(tiny_gpt2):
    corpus = Dataset.from_dict({"prompt": [[1]], "completion": [[2]], "logprob": [0.0]})
    with pytest.raises(ValueError, match="must not have the column `logprob`"):
        score_responses(tiny_gpt2, None, corpus)
