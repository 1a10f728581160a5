"""Models that are not what scoring takes them for: read in the way that is right for them, or refused."""

import logging

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from transformers import LlamaForCausalLM

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.fingerprint import weight_fingerprint
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.inference.self_check import Reading, Readout, agree, find_reading, ignores_left_padding, rounding
from hf_coverage.measure.scoring import score_encoded
from tests.inference.odd_models import (
    SMALL,
    VOCABULARY,
    ForgetsItsCache,
    alone,
    bart,
    bert,
    llama,
    quantised,
    shaken,
    subclass,
)


def corpus(shortest=9, longest=40):
    generator = np.random.default_rng(0)

    def tokens(length):
        return generator.integers(3, VOCABULARY, length).tolist()

    shared = tokens(12)
    prompts = [shared, shared, shared, tokens(shortest - 4), tokens(shortest - 3), tokens(longest - 8)]
    return EncodedCorpus(prompts, [tokens(length) for length in (5, 8, 3, 4, 3, 8)])


class FailsOnACache(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        if kwargs.get(CACHE) is not None:
            raise IndexError("list index out of range")
        return super().forward(input_ids=input_ids, **kwargs)


class DependsOnLength(LlamaForCausalLM):
    """Scales its embeddings by the length of the pass, as rotary embeddings that switch do."""

    def forward(self, input_ids=None, **kwargs):
        cache = kwargs.get(CACHE)
        seen = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        embeds = self.get_input_embeddings()(input_ids) * (1.0 if seen <= 20 else 1.5)
        return super().forward(inputs_embeds=embeds, **kwargs)


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **(SMALL | {"max_position_embeddings": 64}),
        original_max_position_embeddings=24,
        rope_parameters=factors
        | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, "factor": 4.0},
    )
    return shaken(transformers.Phi3ForCausalLM(config))


# What each model allows at most; where more is allowed, sharing is decided by the model itself.
ODD = {
    "plain": (llama, Reading.SHARED),
    "no named outputs": (lambda: llama(return_dict=False), Reading.SHARED),
    "replaces the cache": (lambda: subclass(ForgetsItsCache), Reading.PADDED),
    "fails on a cache": (lambda: subclass(FailsOnACache), Reading.PADDED),
    "longrope": (longrope, Reading.EQUAL),
    "depends on the length": (lambda: subclass(DependsOnLength), Reading.EQUAL),
    "scale of the batch": (lambda: quantised(0, 2), Reading.ALONE),
}


def reading_of(model, encoded, fastest=Reading.SHARED, most=64):
    with inference(model):
        return find_reading([HeadForward(model)], encoded, vocab_size=VOCABULARY, fastest=fastest, most_positions=most)


@pytest.mark.parametrize("name", ODD)
def test_each_row_gets_the_score_that_it_has_alone(name):
    build, expected = ODD[name]
    model, encoded = build(), corpus()
    assert reading_of(model, encoded) is expected
    for arguments in ({}, {"batch_tokens": 40}, {"logits_memory": 5 * VOCABULARY * 8}, {"batch_invariant": True}):
        scores = score_encoded(model, encoded, **arguments).logprob
        np.testing.assert_allclose(scores, alone(model, encoded), atol=1e-4, err_msg=f"{name} {arguments}")


@pytest.mark.parametrize("name", [name for name, (_, reading) in ODD.items() if reading > Reading.SHARED])
def test_without_the_check_the_score_would_be_another(name, monkeypatch):
    model, encoded = ODD[name][0](), corpus()
    monkeypatch.setattr("hf_coverage.inference.forward_batches.find_reading", lambda *args, fastest, **kwargs: fastest)
    if name == "fails on a cache":
        with pytest.raises(IndexError):
            score_encoded(model, encoded)
    else:
        assert np.abs(score_encoded(model, encoded).logprob - alone(model, encoded)).max() > 0.01


def uncausal_llama():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "eager"
    model.model.config._attn_implementation = "eager"
    for layer in model.model.layers:  # every token sees all
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda hidden_states, attend=attend, **kwargs: attend(
            hidden_states, **(kwargs | {"attention_mask": None})
        )
    return model


NOT_CAUSAL = {
    "BERT without is_decoder": bert,
    "masked language model": lambda: bert("BertForMaskedLM"),
    "attention to all": uncausal_llama,
    "encoder-decoder": bart,
    "scale of the whole pass": lambda: quantised(0, 1, 2),
    "scale of the row": lambda: quantised(1, 2),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_sees_later_tokens_is_refused(name, batch_invariant):
    model = NOT_CAUSAL[name]()
    with pytest.raises(ValueError, match="is not causal: log p of a token changes with the tokens after it"):
        score_encoded(model, corpus(), batch_invariant=batch_invariant)


def test_a_teacher_is_asked_too():
    with pytest.raises(ValueError, match="`model` BertLMHeadModel is not causal"):
        score_encoded(llama(), corpus(), teacher=bert())


def test_a_decoder_of_bert_is_scored():
    model = bert(is_decoder=True)
    np.testing.assert_allclose(score_encoded(model, corpus()).logprob, alone(model, corpus()), atol=1e-4)


def test_one_line_says_what_is_done_without(caplog):
    with caplog.at_level(logging.DEBUG, logger="hf_coverage.inference.self_check"):
        score_encoded(quantised(0, 2), corpus())
        score_encoded(llama(), corpus())
    assert [record.getMessage() for record in caplog.records] == [
        "Rows are read one by one: read otherwise, this model gives them other numbers."
    ]


def test_a_sound_model_is_asked_in_five_small_passes(monkeypatch):
    model, encoded, passes = llama(), corpus(), []
    forward = LlamaForCausalLM.forward

    def counted(self, input_ids, **kwargs):
        passes.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    assert reading_of(model, encoded) is Reading.SHARED
    longest, shared, response = 39, 12, 7
    assert sum(passes) == 16 + 2 * longest + (shared + response) + shared + 2 * response
    assert len(passes) == 5


def test_doubles_are_compared_as_what_log_p_is_taken_in():
    model = llama().double()
    assert reading_of(model, corpus()) is Reading.SHARED
    assert rounding(model, torch.full((1, 1), 1 / 3, dtype=torch.float64)) == torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "rows", [([[5]], [[6]]), ([[5], [7]], [[6], [8]]), ([[5, 6]], [[7]]), ([[5] * 3] * 2, [[7]] * 2)]
)
def test_the_smallest_corpora_can_be_asked(rows):
    encoded = EncodedCorpus(*rows)
    assert reading_of(llama(), encoded) is Reading.SHARED
    with pytest.raises(ValueError, match="not causal") if len(rows[0][0]) > 1 else pytest.raises(AssertionError):
        assert reading_of(bert(), encoded) > Reading.SHARED


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_no_fault(kind):
    model = llama().to(kind)
    assert reading_of(model, corpus()) is Reading.SHARED
    with pytest.raises(ValueError, match="not causal"):
        reading_of(bert().to(kind), corpus())


def test_scores_of_their_own_passes_depend_on_no_other_row():
    model, encoded = llama().to(torch.bfloat16), corpus()
    every = score_encoded(model, encoded, batch_invariant=True).logprob
    for row in range(len(encoded)):
        one = EncodedCorpus(encoded.prompts[row : row + 1], encoded.completions[row : row + 1])
        assert score_encoded(model, one, batch_invariant=True).logprob[0] == every[row]


@pytest.mark.parametrize("epsilon", [2.0**-23, 2.0**-8])
def test_tolerance(epsilon):
    zeros = torch.zeros(64, dtype=torch.float64)
    excluded = torch.full((64,), -torch.inf, dtype=torch.float64)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=64)) * epsilon**0.5 / 3

    def same(first, second):
        return agree(Readout(first, epsilon), Readout(second, epsilon))

    assert same(zeros, zeros + noise)
    assert same(excluded, excluded)
    assert same(zeros + torch.nan, zeros + torch.nan)  # damaged weights are refused by what comes after
    assert not same(zeros, excluded)
    assert not same(zeros, zeros + torch.nan)
    assert not same(zeros, zeros + 3 * epsilon**0.5)


def test_left_padding():
    def ignores(model):
        with inference(model):
            return ignores_left_padding(HeadForward(model), corpus(), vocab_size=VOCABULARY, most_positions=64)

    torch.manual_seed(0)
    sizes = SMALL | {"is_decoder": True, "embedding_size": 16}
    roformer = shaken(transformers.RoFormerForCausalLM(transformers.RoFormerConfig(**sizes)))
    assert ignores(llama())
    assert not ignores(roformer)


def test_offloaded_models_are_scored_and_known_by_their_weights():
    model, encoded = llama(), corpus()
    expected, weights = score_encoded(model, encoded).logprob, weight_fingerprint(model)
    cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).is_meta
    np.testing.assert_allclose(score_encoded(model, encoded).logprob, expected, atol=1e-6)
    assert weight_fingerprint(model) == weights
