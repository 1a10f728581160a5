"""B and the inherent variance of an output head, against loops, enumeration and the linear model of the theory."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_coverage.functional.statistics import clustered_mean, mean_interval
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.builders import sample_corpus
from hf_coverage.measure.inherent_variance import (
    estimate_inherent_variance,
    measure_inherent_variance,
    require_linear_head,
)
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.tasks.linear import AutoregressiveLinearForCausalLM
from hf_coverage.tasks.linear_features import FeatureMap
from hf_coverage.tasks.linear_instances import small_step_instance
from tests import reference
from tests.measure import head_ranks
from tests.processes import run
from tests.tasks.linear_exact import enumerate_responses, feature_bound, inherent_variance

PROMPT, HORIZON, VOCABULARY = [0, 3, 2], 3, 5
SMALL = {
    "vocab_size": 13,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def make_llama(*, tied):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, **SPECIAL, max_position_embeddings=64, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def make_gptj():
    """A head with a bias."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=13, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **SPECIAL)
    model = GPTJForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def make_small(seed):
    torch.manual_seed(seed)
    config = GPT2LMHeadModel.config_class(
        n_layer=1, n_embd=8, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(20 if parameter.ndim == 2 else 1)
    return model.requires_grad_(False)


def random_corpus(vocabulary=13, rows=17):
    generator = np.random.default_rng(3)
    pool = [generator.integers(0, vocabulary, length).tolist() for length in (2, 5, 9)]
    completions = [generator.integers(0, vocabulary, 1 + row % 7).tolist() for row in range(rows)]
    return Dataset.from_dict({"prompt": [pool[row % 3] for row in range(rows)], "completion": completions})


@torch.no_grad()
def slow_constants(model, corpus):
    """`max ||phi||` and both forms for each row, from the features themselves, in float64."""
    head = model.get_output_embeddings()
    weight = head.weight.double()
    norms, expected, sampled = [], [], []
    for row in corpus:
        ids = torch.tensor([row["prompt"] + row["completion"]])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        expected.append(0.0)
        sampled.append(0.0)
        for place, token in enumerate(row["completion"], start=len(row["prompt"]) - 1):
            h, logits = hidden[place], weight @ hidden[place]
            if head.bias is not None:
                h, logits = torch.cat([h, torch.ones(1)]), logits + head.bias.double()
            q = logits.softmax(-1)
            features = torch.stack([torch.outer(row, h) for row in torch.eye(len(q), dtype=torch.float64)])
            mean = torch.einsum("v,vij->ij", q, features)
            spread = (features - mean).square().sum((1, 2))
            norms.append(features[token].norm().item())
            expected[-1] += (q @ spread).item()
            sampled[-1] += spread[token].item()
    return max(norms), expected, sampled


@pytest.mark.parametrize(
    "make", [lambda: make_llama(tied=False), lambda: make_llama(tied=True), make_gptj], ids=["own", "tied", "bias"]
)
@pytest.mark.parametrize("scoring", [{}, {"batch_tokens": 40, "logits_memory": 3 * 13 * 8, "share_prefixes": False}])
def test_equal_to_the_slow_loop(make, scoring):
    model, corpus = make(), random_corpus()
    found = measure_inherent_variance(model, None, corpus, progress=False, **scoring)
    norm, expected, sampled = slow_constants(model, corpus)
    groups = [str(prompt) for prompt in corpus["prompt"]]
    assert found.feature_norm == pytest.approx(norm, rel=1e-6)
    assert found.expected == pytest.approx(clustered_mean(expected, groups=groups), rel=1e-5)
    assert found.sampled == pytest.approx(clustered_mean(sampled, groups=groups), rel=1e-5)
    assert found.estimate is found.sampled
    assert found.expected.num_groups == 3
    assert (found.num_rows, found.mean_length) == (17, np.mean([len(y) for y in corpus["completion"]]))
    assert found.per_token == pytest.approx(np.mean(sampled) / found.mean_length)
    assert found.interval() == pytest.approx(
        (max(0.0, mean_interval(found.sampled)[0]), mean_interval(found.sampled)[1])
    )
    problem = found.problem(radius=2.0)
    assert problem.bound == 2 * found.feature_norm
    assert problem.variance == pytest.approx(4 * np.mean(sampled))
    assert problem.effective_length == pytest.approx(np.mean(sampled) / norm**2)


class HeadFeatures(FeatureMap):
    """phi(x, y_1..t) = e_{y_t} (x) h_t: what makes an output head the theory's linear model."""

    def __init__(self, model):
        super().__init__(VOCABULARY, VOCABULARY * model.config.n_embd)
        self.backbone = model.transformer

    def forward(self, input_ids):
        hidden = self.backbone(input_ids).last_hidden_state
        return torch.einsum("vw,btd->btvwd", torch.eye(VOCABULARY), hidden).flatten(-2)


def test_equal_to_the_linear_model_that_a_head_is():
    model = make_small(0)
    linear = AutoregressiveLinearForCausalLM.from_features(HeadFeatures(model), vocab_size=VOCABULARY)
    linear.theta.data.copy_(model.lm_head.weight.flatten())
    responses, logprobs = enumerate_responses(linear, PROMPT, HORIZON)
    encoded = EncodedCorpus([PROMPT] * len(responses), responses.tolist())
    scores = score_encoded(model, encoded, head_statistics=True)
    np.testing.assert_allclose(scores.logprob, logprobs, atol=1e-4)
    found = estimate_inherent_variance(scores.columns(), weights=logprobs.exp().numpy())
    exact = inherent_variance(linear, PROMPT, HORIZON)
    assert exact > 1
    assert found.expected.mean == pytest.approx(exact, rel=1e-5)
    assert found.sampled.mean == pytest.approx(exact, rel=1e-5)  # over all responses the two forms are one
    assert found.feature_norm == pytest.approx(feature_bound(linear, PROMPT, HORIZON), rel=1e-6)


def test_the_model_s_own_q_makes_the_sample_form_too_large_by_its_distance_to_the_teacher_s():
    model, teacher = make_small(0), make_small(1)
    responses, logd, log_q = reference.enumerate_responses(teacher, PROMPT, HORIZON)
    _, _, log_p = reference.enumerate_responses(model, PROMPT, HORIZON)
    weights, encoded = np.exp(logd), EncodedCorpus([PROMPT] * len(responses), [list(r) for r in responses])
    known, own = (
        estimate_inherent_variance(
            score_encoded(model, encoded, teacher=other, head_statistics=True).columns(),
            weights=weights,
            has_teacher=other is not None,
        )
        for other in (teacher, None)
    )
    assert known.estimate is known.expected
    assert known.sampled.mean == pytest.approx(known.expected.mean, rel=1e-5)
    ids = torch.tensor([[*PROMPT, *response] for response in responses])
    norms = model.transformer(ids).last_hidden_state[:, len(PROMPT) - 1 : -1].double().square().sum(-1)
    distance = (norms * (log_q.exp() - log_p.exp()).square().sum(-1)).sum(-1)
    excess = float(torch.tensor(weights) @ distance)
    assert excess > 0.1 * known.expected.mean
    assert own.sampled.mean == pytest.approx(known.expected.mean + excess, rel=1e-5)
    assert own.expected.mean != pytest.approx(known.expected.mean, rel=0.05)


def test_responses_sampled_from_q_give_both_forms_one_mean(tiny_gpt2):
    for parameter in tiny_gpt2.parameters():
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    prompts = [[0, token] for token in range(2, 10)]
    corpus = sample_corpus(tiny_gpt2, None, prompts, k=40, max_new_tokens=6, seed=0, progress=False)
    found = measure_inherent_variance(tiny_gpt2, None, corpus, progress=False)
    scores = score_encoded(
        tiny_gpt2, EncodedCorpus(corpus["prompt"][:], corpus["completion"][:]), head_statistics=True
    )
    gap = clustered_mean(scores.sampled_variance - scores.inherent_variance)
    assert gap.mean == pytest.approx(found.sampled.mean - found.expected.mean)
    assert 0 < abs(gap.mean) < 3 * gap.standard_error < 0.2 * found.expected.mean


def test_one_group_has_no_interval():
    corpus = random_corpus().add_column("document", ["a"] * 17)
    found = measure_inherent_variance(make_llama(tied=False), None, corpus, progress=False)
    assert np.isnan(found.interval()).all()
    by_prompt = measure_inherent_variance(make_llama(tied=False), None, corpus, group_by="prompt", progress=False)
    assert by_prompt.sampled.num_groups == 3


def test_an_interrupted_measurement_goes_on(tmp_path):
    model, corpus = make_llama(tied=False), random_corpus()
    options = {"output_dir": tmp_path / "scores", "shard_rows": 5, "progress": False}
    whole = measure_inherent_variance(model, None, corpus, **options)
    (tmp_path / "scores" / "scores-00001.safetensors").unlink()
    kept = (tmp_path / "scores" / "scores-00002.safetensors").stat().st_mtime_ns
    assert measure_inherent_variance(model, None, corpus, **options) == whole
    assert (tmp_path / "scores" / "scores-00002.safetensors").stat().st_mtime_ns == kept


def test_the_head_is_known():
    for model, tied in ((make_llama(tied=False), False), (make_llama(tied=True), True), (make_gptj(), False)):
        head = require_linear_head(model)
        assert head.module is model.get_output_embeddings()
        assert bool(head.shared_with) is tied
        squares = sum(parameter.double().square().sum().item() for parameter in head.module.parameters())
        assert head.norm == pytest.approx(squares**0.5)


def test_heads_without_known_features_are_refused():
    corpus = random_corpus()
    capped = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0, **SPECIAL)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM changes them afterwards \(scaling or soft-capping\)"):
        measure_inherent_variance(Gemma2ForCausalLM(capped), None, corpus, progress=False)
    plain = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=None, **SPECIAL)
    assert measure_inherent_variance(Gemma2ForCausalLM(plain), None, corpus, progress=False).num_rows == 17
    linear = small_step_instance(6, rare_probability=0.5, n=4).model()
    with pytest.raises(ValueError, match=r"must have a linear output head.*_LinearHead.*`merge_and_unload`"):
        measure_inherent_variance(linear, None, corpus, progress=False)
    with pytest.raises(ValueError, match="`model` must be a causal language model with output embeddings"):
        measure_inherent_variance(make_llama(tied=False).model, None, corpus, progress=False)


def test_rows_without_a_response_are_refused_by_name():
    corpus = Dataset.from_dict({"prompt": [[1, 2], [3]], "completion": [[4], []]})
    with pytest.raises(ValueError, match=r"Row 1, column `completion`.*drop the row"):
        measure_inherent_variance(make_llama(tied=False), None, corpus, progress=False)
    with pytest.raises(ValueError, match="`completion`"):
        measure_inherent_variance(make_llama(tied=False), None, corpus.remove_columns("completion"), progress=False)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    run(head_ranks.__file__, tmp_path, ranks=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = head_ranks.measure()
    torch.set_num_threads(threads)
    for rank in range(2):
        found = np.load(tmp_path / f"rank{rank}.npz")
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
