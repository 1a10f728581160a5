"""Test-time training through `custom_generate`: modes, prompts, log-probabilities, rows that end, refusals."""

import copy
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.utils import StopCheck

import hf_coverage
from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.mixin import TestTimeTrainingMixin
from hf_coverage.ttt.processor import TTTLogitsProcessor
from tests.ttt.head_reference import AutogradRow, reference_logits, tiny_llama
from tests.ttt.test_generate_contract import EOS, LR, PROMPTS, RIGHT, STEPS, Words, run, stop_rows_early

FOLDER = Path(hf_coverage.__file__).parent / "generate_modules" / "test_time_training"


def decode(model, *, lr=LR, rows=3, **settings):
    """Generate from the prompts, padded on the left."""
    width = max(map(len, PROMPTS[:rows]))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in PROMPTS[:rows]])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS[:rows]])
    torch.manual_seed(3)
    return model.generate(
        ids,
        ttt_lr=lr,
        **{
            "custom_generate": ttt_generate,
            "attention_mask": mask,
            "max_new_tokens": STEPS,
            "eos_token_id": None,
            "pad_token_id": EOS,
        }
        | {"return_dict_in_generate": True, "output_scores": True}
        | settings,
    )


def responses_of(result, rows=3):
    return result.sequences[:, max(map(len, PROMPTS[:rows])) :]


def logprobs_of(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("mode", sorted(set(RIGHT) - {"streamer", "penalty after", "mask after"}))
def test_the_same_as_the_processor_in_every_mode(mode):
    model = tiny_llama(head_bias=True)
    with TTTLogitsProcessor(model, LR) as processor:
        expected, recorder = run(model, processor, **RIGHT[mode]())
    result = decode(model, **RIGHT[mode]())
    tokens, ended = responses_of(result), RIGHT[mode]().get("eos_token_id", [])
    assert tokens.shape == expected.shape
    for row, response in enumerate(expected.tolist()):
        length = next((at for at, token in enumerate(response, 1) if token in ended), len(response))
        if mode == "rows that end":
            length = min(length, [2, 5, STEPS][row])
        assert tokens[row, :length].tolist() == response[:length]
        if "tokens" not in mode and mode not in ("forced end", "forced begin"):  # masks come first or after
            wanted = logprobs_of(recorder.stacked(), expected)[row, :length]
            torch.testing.assert_close(result.token_logprobs[row, :length], wanted, rtol=0, atol=1e-5)
        assert not result.token_logprobs[row, length:].any()


@pytest.mark.parametrize("settings", [{}, {"ttt_radius": 0.5}, {"ttt_decay": 0.2}, {"ttt_steps": 2}])
@pytest.mark.parametrize(("use_cache", "chunk"), [(True, None), (True, 2), (False, None)])
@pytest.mark.parametrize("kind", ["untied", "bias"])
def test_steps_on_the_prompt_equal_autograd(kind, use_cache, chunk, settings):
    model = tiny_llama(head_bias=kind == "bias")
    result = decode(
        model, ttt_on_prompt=True, prefill_chunk_size=chunk, use_cache=use_cache, do_sample=True, **settings
    )
    names = {"ttt_radius": "radius", "ttt_decay": "decay", "ttt_steps": "num_steps"}
    plain = {names[name]: value for name, value in settings.items()}
    tokens = responses_of(result)
    expected = reference_logits(model, PROMPTS, tokens.tolist(), lr=LR, on_prompt=True, **plain)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.token_logprobs, logprobs_of(expected, tokens), rtol=0, atol=1e-4)


def test_steps_on_the_prompt_do_something_and_long_prompts_are_taken_in_parts():
    model = tiny_llama()
    torch.manual_seed(0)
    prompt = torch.randint(2, 13, (2, 70))
    result = model.generate(
        prompt,
        custom_generate=ttt_generate,
        ttt_lr=0.2,
        ttt_on_prompt=True,
        max_new_tokens=3,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(2):
        reference = AutogradRow(model, prompt[row].tolist(), lr=0.2, on_prompt=True)
        torch.testing.assert_close(result.scores[0][row], reference.logits().detach(), rtol=0, atol=1e-3)
        plain = AutogradRow(model, prompt[row].tolist(), lr=0.2)
        assert (result.scores[0][row] - plain.logits().detach()).abs().max() > 0.5


def test_what_changes_scores_acts_on_the_adapted_ones():
    model = tiny_llama()
    result = decode(model, repetition_penalty=1.3, sequence_bias={(4,): 1.0}, do_sample=True, temperature=0.7)
    tokens = responses_of(result)
    logits = reference_logits(model, PROMPTS, tokens.tolist(), lr=LR)
    torch.testing.assert_close(result.token_logprobs, logprobs_of(logits, tokens), rtol=0, atol=1e-4)
    width = max(map(len, PROMPTS))
    padding = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    penalty = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=padding)
    for step, scores in enumerate(result.scores):
        biased = logits[:, step] + torch.eye(13)[4]  # `generate` puts the bias first
        wanted = penalty(result.sequences[:, : width + step], biased) / 0.7
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-4)


def test_guidance_acts_on_the_adapted_logits():
    model = tiny_llama()
    result = decode(model, rows=1, guidance_scale=1.5, do_sample=True)
    tokens = responses_of(result, rows=1)
    logits = reference_logits(model, PROMPTS[:1], tokens.tolist(), lr=LR)
    torch.testing.assert_close(result.token_logprobs, logprobs_of(logits, tokens), rtol=0, atol=1e-4)


def test_rows_that_have_ended_make_no_steps():
    model = tiny_llama()
    criteria = StoppingCriteriaList([stop_rows_early])
    result = decode(model, do_sample=True, stopping_criteria=criteria, eos_token_id=[12])
    tokens = responses_of(result)
    assert (tokens[0, 2:] == EOS).all()
    assert not result.token_logprobs[0, 2:].any()
    assert not result.token_logprobs[1, 5:].any()
    # The head of the first row is what its last token made it, whatever `generate` fills the row up with.
    row = AutogradRow(model, PROMPTS[0], lr=LR)
    for token in tokens[0, :2].tolist():
        row.step(token)
    row.ids += tokens[0, 2:-1].tolist()
    torch.testing.assert_close(result.scores[-1][0], row.logits().detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("mode", sorted(set(RIGHT) - {"streamer", "penalty after", "mask after"}))
def test_a_step_size_of_zero_is_plain_generate_bit_for_bit(mode, on_prompt):
    model = tiny_llama(head_bias=True)
    adapted = decode(model, lr=0.0, ttt_on_prompt=on_prompt, **RIGHT[mode]())
    plain = decode(model, lr=None, custom_generate=None, **RIGHT[mode]())
    assert torch.equal(adapted.sequences, plain.sequences)
    assert len(adapted.scores) == len(plain.scores)
    assert all(torch.equal(a, b) for a, b in zip(adapted.scores, plain.scores))


def test_a_prompt_of_one_token_has_nothing_to_follow():
    model, ids = tiny_llama(), torch.tensor([[3], [4]])
    settings = {"custom_generate": ttt_generate, "ttt_lr": LR, "max_new_tokens": 5, "eos_token_id": None}
    found = [model.generate(ids, ttt_on_prompt=on_prompt, **settings) for on_prompt in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("scope", ["head", "lora", "all"])
def test_an_end_that_is_seen_one_step_late_is_taken_back(scope, monkeypatch):
    """As on devices where `generate` does not wait for what it decoded."""

    class LateStop(StopCheck):
        before, reported = False, False

        def __init__(self, input_ids, max_length, cache, cache_is_returned, streamer):
            super().__init__(streamer)

        is_supported = staticmethod(lambda *args, **kwargs: True)

        def __call__(self, unfinished, tokens, length):
            self.reported, self.before = self.before, not unfinished.any()
            return self.reported

        def finish(self):
            return 1

    settings = {"lr": 0.1, "ttt_scope": scope, "do_sample": True, "eos_token_id": [12]}
    expected = decode(tiny_llama(), stopping_criteria=StoppingCriteriaList([end_all]), **settings)
    monkeypatch.setattr("transformers.generation.utils.DeferredStopCheck", LateStop)
    found = decode(tiny_llama(), stopping_criteria=StoppingCriteriaList([end_all]), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.token_logprobs, expected.token_logprobs)
    assert found.token_logprobs.shape == (3, 5)


def end_all(input_ids, scores, **kwargs):
    return stop_rows_early(input_ids, scores) | (input_ids.shape[1] >= max(map(len, PROMPTS)) + 5)


def test_ids_alone_and_a_streamer():
    model, words = tiny_llama(), Words()
    ids = decode(model, rows=1, ttt_streamer=words, return_dict_in_generate=False, output_scores=False)
    assert words.ended
    assert torch.equal(torch.cat([token.flatten() for token in words.tokens]), ids[0])


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    state = copy.deepcopy(model.state_dict())

    def fail(input_ids, scores):
        raise KeyError("stop")

    decode(model, ttt_on_prompt=True)
    with pytest.raises(KeyError):
        decode(model, logits_processor=[fail])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ttt_scope": "tail"}, '`scope` must be "head", "lora" or "all", got \'tail\''),
        ({"num_beams": 2}, "sampling and greedy decoding, got beam search; generate with `num_beams=1`"),
        ({"num_beams": 2, "do_sample": True}, "got beam sample"),
        ({"rows": 1, "prompt_lookup_num_tokens": 2}, "got assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "got contrastive search"),
        ({"lr": -1.0}, "`lr` must be finite and at least 0"),
        ({"ttt_top_k": 3, "ttt_radius": 1.0}, "must not be combined"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        decode(tiny_llama(), **settings)


def test_a_prompt_that_a_cache_knows_cannot_be_followed():
    model, cache = tiny_llama(), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0][:2]]), **{CACHE: cache})
    with pytest.raises(ValueError, match="the prompt of 4 tokens in this call, but its head saw 2"):
        decode(model, rows=1, ttt_on_prompt=True, **{CACHE: cache})
    embeddings = model.get_input_embeddings()(torch.tensor([PROMPTS[0]])).detach()
    settings = {"custom_generate": ttt_generate, "ttt_lr": LR, "max_new_tokens": 2}
    assert model.generate(inputs_embeds=embeddings, **settings).shape == (1, 2)
    with pytest.raises(ValueError, match="the prompt of 0 tokens in this call, but its head saw 4; give token ids"):
        model.generate(inputs_embeds=embeddings, ttt_on_prompt=True, **settings)


def test_settings_are_saved_in_a_generation_config(tmp_path):
    model = tiny_llama()
    expected = decode(model, do_sample=True, ttt_radius=0.5, ttt_on_prompt=True)
    saved = {"ttt_lr": LR, "ttt_radius": 0.5, "ttt_on_prompt": True}
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS, **saved)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    result = decode(loaded, lr=None, do_sample=True)
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(result.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)
    other = decode(loaded, lr=0.0, do_sample=True)  # what is given counts first
    plain, _ = run(model, lambda input_ids, scores: scores, do_sample=True)
    assert torch.equal(responses_of(other), plain)
    loaded.generation_config.ttt_rate = 0.1  # a slip
    with pytest.raises(ValueError, match="has a setting `ttt_rate`, expected some of `ttt_lr`, `ttt_scope`"):
        decode(loaded)


def test_the_repository_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", [*sys.path])
    model, words = tiny_llama(), Words()
    expected = decode(model, rows=1, do_sample=True, ttt_on_prompt=True)
    settings = {"custom_generate": str(FOLDER), "trust_remote_code": True, "streamer": words}
    found = decode(model, rows=1, do_sample=True, ttt_on_prompt=True, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.token_logprobs, expected.token_logprobs)
    assert words.ended
    with pytest.raises(ValueError, match="`ttt_lr` must be given"):
        decode(model, lr=None, **settings)
    with pytest.raises(ValueError, match="does not work with continuous batching, which calls no custom method"):
        decode(model, cache_implementation="paged", **settings)


def test_the_card_names_every_setting():
    card = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"^\| `(ttt_\w+)` ", card, flags=re.MULTILINE))
    assert named == {name for name in inspect.signature(ttt_generate).parameters if name.startswith("ttt_")} - {
        "ttt_streamer"
    }
    assert "- custom_generate" in card.split("---")[1]


class MixedLlama(TestTimeTrainingMixin, LlamaForCausalLM):
    pass


def test_a_model_class_of_its_own(tmp_path):
    plain_model = tiny_llama()
    plain_model.save_pretrained(tmp_path)
    model, words = MixedLlama.from_pretrained(tmp_path), Words()
    expected = decode(plain_model, do_sample=True)
    found = decode(model, do_sample=True, custom_generate=None)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.token_logprobs, expected.token_logprobs)
    ids = model.generate(torch.tensor([PROMPTS[0]]), ttt_lr=LR, streamer=words, max_new_tokens=4, eos_token_id=None)
    assert words.ended
    assert torch.equal(torch.cat([token.flatten() for token in words.tokens]), ids[0])
    model.generate(torch.tensor([PROMPTS[0]]), ttt_lr=LR, ttt_streamer=(words := Words()), max_new_tokens=4)
    assert words.ended
    plain = [
        each.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, eos_token_id=None, num_beams=2)
        for each in (model, plain_model)
    ]
    assert torch.equal(*plain)
    with pytest.raises(ValueError, match="does not work with continuous batching"):
        model.generate(torch.tensor([PROMPTS[0]]), ttt_lr=LR, cache_implementation="paged", max_new_tokens=4)
    with pytest.raises(ValueError, match="got beam search"):
        model.generate(torch.tensor([PROMPTS[0]]), ttt_lr=LR, num_beams=2, max_new_tokens=4)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS, ttt_lr=LR)
    saved = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, eos_token_id=None)
    assert torch.equal(saved, ids)
    own = GenerationConfig(max_new_tokens=4, pad_token_id=EOS, ttt_lr=0.0)
    plain_model.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    assert torch.equal(
        model.generate(torch.tensor([PROMPTS[0]]), own),
        plain_model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4),
    )


def test_a_step_size_is_needed():
    with pytest.raises(ValueError, match="`ttt_lr` must be given, the step size"):
        tiny_llama().generate(torch.tensor([[3, 4]]), custom_generate=ttt_generate, max_new_tokens=2)
