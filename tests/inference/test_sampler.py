"""Sampling with the prompts that come again in a batch read once, against every response with its own."""

import functools

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_coverage.inference import sampler
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.sampler import Sampler, Sampling, read_prompts
from hf_coverage.inference.self_check import Reading
from hf_coverage.measure.scoring import score_encoded
from tests.inference.odd_models import SMALL, ForgetsItsCache, alone, bart, bert, llama, quantised, shaken, subclass
from tests.measure.test_scoring_architectures import ARCHITECTURES, build, oracle

LONG, MIDDLE, SHORT = list(range(3, 20)), [5, 4, 9, 30, 12, 7, 21, 8, 3], [6, 4]


def draw(model, prompts, *, batch_size=64, **settings):
    settings = {"max_new_tokens": 6, "eos_token_ids": (2,)} | settings
    return Sampler(model, Sampling(**settings), batch_size=batch_size, seed=3).draw(prompts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_samples_the_same(name, monkeypatch):
    """The same responses as without sharing, of the log-probability that one row at a time has."""
    model, prompts = build(name), [LONG] * 5 + [MIDDLE] * 4 + [SHORT] * 3
    assert (read_prompts(model, prompts) is not None) == ARCHITECTURES[name][2]
    shared = draw(model, prompts, top_p=0.9)
    monkeypatch.setattr(sampler, "read_prompts", lambda model, prompts: None)
    alone = draw(model, prompts, top_p=0.9)
    assert [sample.ids for sample in shared] == [sample.ids for sample in alone]
    assert len({tuple(sample.ids) for sample in shared}) > 6
    np.testing.assert_allclose([s.logprob for s in shared], [s.logprob for s in alone], atol=1e-4)
    plain = draw(model, prompts)  # lengths differ within the batch, which not every recurrent model can take
    expected = oracle(model, EncodedCorpus(prompts, [sample.ids for sample in plain]))
    np.testing.assert_allclose([sample.logprob for sample in plain], expected, atol=1e-4)


def test_equal_prompts_are_read_once(tiny_gpt2, monkeypatch):
    widths = []
    forward = type(tiny_gpt2).forward

    @functools.wraps(forward)  # `generate` makes the positions that its signature asks for
    def counting(self, input_ids=None, **arguments):
        widths.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(tiny_gpt2), "forward", counting)
    prompts = [[2, 3, 4, 5, 6, 7]] * 4 + [[3, 3, 3]] * 4
    draw(tiny_gpt2, prompts, max_new_tokens=3, eos_token_ids=())
    # Then some of the responses are read again, to see that the model says the same of them.
    assert widths[:4] == [(2, 5), (8, 1), (8, 1), (8, 1)]
    assert {rows for rows, _ in widths[4:]} == {1}
    widths.clear()
    draw(tiny_gpt2, [[2, 3, 4], [5, 6, 7], [8, 9, 10], [2, 3, 4]], max_new_tokens=2, eos_token_ids=())
    assert widths[:2] == [(4, 3), (4, 1)]  # little is saved
    widths.clear()
    draw(tiny_gpt2, [[2, 3, 4]] * 3 + [[5]] * 3, max_new_tokens=2, eos_token_ids=())
    assert widths[:2] == [(6, 3), (6, 1)]  # there is nothing before the last token of [5]


def test_a_token_that_looks_like_padding_is_none(tiny_gpt2):
    """Prompts that differ by the token that pads the shorter one are two."""
    samples = draw(tiny_gpt2, [[0, 5, 6]] * 3 + [[5, 6]] * 3, eos_token_ids=(1,))
    expected = oracle(tiny_gpt2, EncodedCorpus([[0, 5, 6]] * 3 + [[5, 6]] * 3, [sample.ids for sample in samples]))
    np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-5)


def test_reading_leaves_the_model_and_the_random_numbers_as_they_are(tiny_gpt2):
    hostile = tiny_gpt2.generation_config = GenerationConfig(num_beams=3, min_new_tokens=4, eos_token_id=2)
    tiny_gpt2.config.use_cache = False
    before, state = hostile.to_dict(), torch.get_rng_state()
    with torch.no_grad():
        cache = read_prompts(tiny_gpt2, [[2, 3, 4]] * 2 + [[5, 6]] * 2)
    assert cache.get_seq_length() == 2
    assert cache.layers[0].keys.shape[0] == 4
    assert torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1])
    assert not torch.equal(cache.layers[0].keys[1], cache.layers[0].keys[2])
    assert tiny_gpt2.generation_config is hostile
    assert hostile.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_real_model_says_the_same(smollm2, monkeypatch):
    model, tokenizer = smollm2
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "def add(a, b):\n    return")]
    shared = draw(model, prompts * 3, max_new_tokens=5, eos_token_ids=(2,))
    monkeypatch.setattr(sampler, "read_prompts", lambda model, prompts: None)
    alone = draw(model, prompts * 3, max_new_tokens=5, eos_token_ids=(2,))
    assert [sample.ids for sample in shared] == [sample.ids for sample in alone]
    np.testing.assert_allclose([s.logprob for s in shared], [s.logprob for s in alone], atol=1e-3)


def roformer():
    """Takes padding on the left for text."""
    torch.manual_seed(0)
    config = transformers.RoFormerConfig(**SMALL, is_decoder=True, embedding_size=16)
    return shaken(transformers.RoFormerForCausalLM(config))


def roberta():
    """Its positions begin behind that of its padding token; `generate` counts them from 0."""
    torch.manual_seed(0)
    return shaken(transformers.RobertaForCausalLM(transformers.RobertaConfig(**SMALL, is_decoder=True)))


class AnotherEachTime(LlamaForCausalLM):
    """Says something else in every pass."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.passes = getattr(self, "passes", 0) + 1
        return output | {"logits": output.logits * (1 + self.passes % 3)}


class OneAtATime(LlamaForCausalLM):
    """Cannot read more than one prompt, as some vision-language models cannot."""

    def forward(self, input_ids=None, **kwargs):
        if len(input_ids) > 1:
            raise IndexError("index 1 is out of bounds for dimension 0 with size 1")
        return super().forward(input_ids=input_ids, **kwargs)


ODD = {
    "left padding is text": roformer,
    "scale of the batch": lambda: quantised(0, 2),
    "one prompt at a time": lambda: subclass(OneAtATime),
    "replaces the cache": lambda: subclass(ForgetsItsCache),
    "counts positions from elsewhere": roberta,
    "plain": llama,
}


@pytest.mark.parametrize("name", ODD)
def test_the_recorded_density_is_that_of_the_response_alone(name):
    model, prompts = ODD[name](), [LONG] * 3 + [MIDDLE] * 4 + [SHORT] * 3
    # Small batches: the first has prompts of one length.
    for batch_size in (4, 64):
        samples = draw(model, prompts, batch_size=batch_size)
        expected = alone(model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
        np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-4)


def test_what_writes_from_another_distribution_is_refused():
    for model in (subclass(AnotherEachTime), bert()):
        with pytest.raises(RuntimeError, match="does not write from the distribution that its passes give: log p"):
            draw(model, [LONG, SHORT])


@pytest.mark.parametrize("settings", [{}, {"eos_token_ids": ()}, {"top_k": 3, "temperature": 0.8}])
def test_plain_passes_write_what_generate_does(settings, monkeypatch):
    model, found = llama(), []
    for generated in (True, False):
        drawing = Sampler(
            model, Sampling(**({"max_new_tokens": 6, "eos_token_ids": (2,)} | settings)), batch_size=4, seed=3
        )
        drawing._layout = sampler._Layout(Reading.EQUAL, generated)
        found.append(drawing.draw([LONG] * 3 + [MIDDLE] * 2 + [SHORT]))
    assert [sample.ids for sample in found[0]] == [sample.ids for sample in found[1]]
    np.testing.assert_allclose(*[[sample.logprob for sample in samples] for samples in found], atol=1e-4)


def test_a_rule_ends_responses_of_plain_passes():
    def stop(response):
        return len(response) >= 3 and response[-1] % 2 == 0

    prompts = [LONG] * 6 + [SHORT] * 6
    drawing = Sampler(roberta(), Sampling(max_new_tokens=12), batch_size=4, seed=3)
    samples = drawing.draw(prompts, stop=stop)
    assert not drawing._layout.generated
    assert len({len(sample.ids) for sample in samples}) > 1
    for sample in samples:
        assert len(sample.ids) == 12 or stop(sample.ids)
        assert not any(stop(sample.ids[:length]) for length in range(1, len(sample.ids)))
    expected = alone(drawing.model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
    np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-4)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        draw(bart(), [LONG])


def test_a_model_does_not_differ_from_its_own_samples():
    """Rounding has no sign: peaked logits over a large vocabulary show one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 50_000})).eval()
    model.lm_head.weight.data.normal_(std=3.0)
    prompts = [[3 + row, 4, 5] for row in range(64)]
    samples = draw(model, prompts, max_new_tokens=8, eos_token_ids=())
    scores = score_encoded(model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
    ratios = np.array([sample.logprob for sample in samples]) - scores.logprob
    assert abs(ratios.mean()) < 3 * ratios.std() / 8
    assert abs(ratios.mean()) < 2e-6
