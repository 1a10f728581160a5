"""Stratified samples of the library's own sampling: their law, their density, and what they depend on."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from hf_coverage.functional.arithmetic_codes import response_intervals, token_parts
from hf_coverage.inference import sampler
from hf_coverage.inference.code_choice import placed_codes
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.sampler import Sampler, Sampling
from hf_coverage.inference.self_check import Reading
from tests.inference.odd_models import alone, llama, shaken
from tests.inference.test_sampler import LONG, MIDDLE, ODD, SHORT
from tests.ttt.head_reference import tiny_llama


def draw(model, prompts, places, *, batch_size=64, stop=None, seed=3, **settings):
    law = Sampling(**({"max_new_tokens": 6, "eos_token_ids": (2,)} | settings))
    return Sampler(model, law, batch_size=batch_size, seed=seed, stratified=True).draw(
        prompts, places=places, stop=stop
    )


def enumerated(model, prompt, warp):
    """Low ends and probabilities of all responses of two tokens, by the model's own passes and the warpers'."""
    vocabulary = model.config.vocab_size
    responses = torch.tensor(list(itertools.product(range(vocabulary), repeat=2)))
    ids = torch.cat([torch.tensor(prompt).expand(len(responses), -1), responses], dim=1)
    with torch.no_grad():
        logits = model(ids).logits[:, len(prompt) - 1 : -1].flatten(0, 1)
    for processor in warp.processors():
        logits = processor(ids, logits)
    low, log_length = response_intervals(token_parts(logits.view(len(responses), 2, -1), responses))
    return low.numpy(), log_length.exp().numpy()


@pytest.mark.parametrize("warpers", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}])
def test_every_sample_is_one_of_the_model_and_blocks_hit_as_their_strata_say(warpers):
    model, books, k = tiny_llama(), 600, 8
    law = Sampling(2, **warpers)
    low, p = enumerated(model, [5, 3], law)
    assert p.sum() == pytest.approx(1)
    places = [(book, number) for book in range(books) for number in range(k)]
    samples = draw(
        model, [[5, 3]] * len(places), places, batch_size=1200, max_new_tokens=2, eos_token_ids=(), **warpers
    )
    drawn = np.array([sample.ids[0] * model.config.vocab_size + sample.ids[1] for sample in samples])
    np.testing.assert_allclose([sample.logprob for sample in samples], np.log(p[drawn]), atol=1e-4)
    table = drawn.reshape(books, k)
    often = p * books > 5
    for number in range(k):
        counts = np.bincount(table[:, number], minlength=len(p))
        folded = [np.append(x[often], x[~often].sum()) for x in (counts, p * books)]
        assert stats.chisquare(*folded).pvalue > 1e-4
    accepted = (low > 0.38) & (low < 0.48)
    for n in (2, 4, 8):
        strata = np.arange(n)[:, None] / n
        parts = (np.minimum(low + p, strata + 1 / n) - np.maximum(low, strata)).clip(0)
        exact = 1 - np.prod(1 - n * (parts * accepted).sum(axis=1))
        assert exact > 1 - (1 - p[accepted].sum()) ** n
        hits = accepted[table].reshape(books, -1, n).any(axis=2)[:, 0]
        assert stats.binomtest(int(hits.sum()), books, exact).pvalue > 1e-4


def test_a_sample_depends_on_the_seed_its_prompt_and_its_number_alone():
    model = llama()
    places = [(prompt, number) for prompt in range(3) for number in range(8)]
    prompts = [[LONG, MIDDLE, SHORT][prompt] for prompt, _ in places]
    expected = dict(zip(places, (sample.ids for sample in draw(model, prompts, places))))
    assert len(set(map(tuple, expected.values()))) > 12
    order = np.random.default_rng(0).permutation(len(places))[:11]
    some = draw(model, [prompts[row] for row in order], [places[row] for row in order], batch_size=3)
    assert [sample.ids for sample in some] == [expected[places[row]] for row in order]
    more = [(1, number) for number in range(32)]
    assert [sample.ids for sample in draw(model, [MIDDLE] * 32, more)][:8] == [expected[place] for place in more[:8]]
    assert [s.ids for s in draw(model, prompts, places, seed=4)] != list(expected.values())


def test_random_numbers_of_different_places_differ():
    codes, digits = placed_codes(0, [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (256, 0)], steps=4)
    other = placed_codes(1, [(0, 0)], steps=4)
    numbers = torch.cat([codes, digits.flatten(), other[0], other[1].flatten()])
    assert len(numbers.unique()) == numbers.numel()


@pytest.mark.parametrize("name", ODD)
def test_the_recorded_density_is_that_of_the_response_alone(name):
    model, places = ODD[name](), [(prompt, number) for prompt in range(3) for number in range(4)]
    prompts = [[LONG, MIDDLE, SHORT][prompt] for prompt, _ in places]
    samples = draw(model, prompts, places, batch_size=4)
    expected = alone(model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
    np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-4)


def test_plain_passes_write_what_generate_does_and_a_rule_ends_responses():
    def stop(response):
        return len(response) >= 3 and response[-1] % 2 == 0

    places, found = [(0, number) for number in range(4)] + [(1, 0), (1, 5)], []
    for generated in (True, False):
        drawing = Sampler(llama(), Sampling(6, top_k=9), batch_size=4, seed=3, stratified=True)
        drawing._layout = sampler._Layout(Reading.EQUAL, generated)
        found.append(drawing.draw([MIDDLE] * 4 + [SHORT] * 2, places=places, stop=stop))
    assert [sample.ids for sample in found[0]] == [sample.ids for sample in found[1]]
    assert any(len(sample.ids) < 6 for sample in found[0])
    assert all(len(sample.ids) == 6 or stop(sample.ids) for sample in found[0])


def test_what_has_no_place_or_no_law_is_refused():
    with pytest.raises(ValueError, match=r"`places` must say of each prompt .* expected 1 pairs, got None"):
        draw(llama(), [LONG], None)
    with pytest.raises(ValueError, match="expected 1 pairs, got 2"):
        draw(llama(), [LONG], [(0, 0), (0, 1)])
    broken = shaken(llama())
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="The scores of row 0 became NaN"):
        draw(broken, [LONG], [(0, 0)])
