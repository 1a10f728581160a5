"""Test-time training of real heads against autograd, what is refused, and what a model is left with."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RepetitionPenaltyLogitsProcessor,
)

from hf_coverage.ttt.processor import TTTLogitsProcessor
from tests.ttt.head_reference import Recorder, reference_logits, reference_sample, tiny_llama

PLAIN = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}


def generate(model, ids, processor, *, steps, **settings):
    return model.generate(torch.as_tensor(ids), max_new_tokens=steps, logits_processor=[processor], **PLAIN | settings)


def hooks(model):
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs)
    ]


@pytest.mark.parametrize(
    ("steps", "do_sample"),
    [(10, True), pytest.param(64, True, marks=pytest.mark.slow), pytest.param(64, False, marks=pytest.mark.slow)],
)
def test_smollm2_equals_autograd(smollm2, steps, do_sample):
    model, tokenizer = smollm2
    prompt = tokenizer("A rose is a rose is a", return_tensors="pt")["input_ids"]
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": do_sample, "repetition_penalty": 1.0}
    torch.manual_seed(5)
    expected, logits = reference_sample(model, prompt.tolist(), steps=steps, do_sample=do_sample, lr=2e-4, cache=True)
    with TTTLogitsProcessor(model, 2e-4) as processor:
        torch.manual_seed(5)
        result = generate(model, prompt, processor, steps=steps, **neutral)
    assert torch.equal(result.sequences[:, prompt.shape[1] :], expected)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), logits, rtol=0, atol=1e-4)
    torch.manual_seed(5)
    plain = model.generate(prompt, max_new_tokens=steps, **PLAIN | neutral)
    assert (torch.stack(plain.scores, dim=1)[:, -1] - logits[:, -1]).abs().max() > 0.1  # it does something


@pytest.mark.parametrize(
    "settings", [{}, {"radius": 0.5}, {"decay": 0.1}, {"decay": 0.1, "radius": 0.5}, {"num_steps": 3}]
)
@pytest.mark.parametrize("kind", ["gpt2", "bias"])
def test_small_models_equal_autograd_over_64_tokens(tiny_gpt2, kind, settings):
    model = tiny_gpt2 if kind == "gpt2" else tiny_llama(head_bias=True)
    prompts, steps = ([[3]], 64) if kind == "gpt2" else ([[3, 4, 5, 2], [7, 7, 2, 9]], 64)
    torch.manual_seed(0)
    expected, logits = reference_sample(model, prompts, steps=steps, do_sample=True, lr=0.3, **settings)
    with TTTLogitsProcessor(model, 0.3, **settings) as processor:
        torch.manual_seed(0)
        result = generate(model, prompts, processor, steps=steps, do_sample=True)
    assert torch.equal(result.sequences[:, -steps:], expected)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": 0.5}, {"lr": 0.5, "radius": 0.4}, {"lr": 2.0, "decay": 0.5}])
def test_probabilities_of_all_responses_sum_to_one(settings):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=4, n_positions=16, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    length = 5
    responses = torch.tensor(list(itertools.product(range(4), repeat=length)))
    recorder = Recorder(forced=responses)
    with TTTLogitsProcessor(model, **settings) as processor:
        model.generate(
            torch.tensor([[2, 1]]).repeat(len(responses), 1),
            max_new_tokens=length,
            logits_processor=[processor, recorder],
            **PLAIN,
        )
    logprobs = recorder.stacked().double().log_softmax(-1).gather(-1, responses[..., None])[..., 0].sum(-1)
    assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    expected = reference_logits(model, [[2, 1]] * 3, responses[[0, 400, 1000]].tolist(), **settings)
    chosen = expected.log_softmax(-1).gather(-1, responses[[0, 400, 1000], :, None])[..., 0].sum(-1)
    torch.testing.assert_close(logprobs[[0, 400, 1000]].float(), chosen, rtol=0, atol=1e-4)


def test_half_precision_adapts_in_float32():
    model = tiny_llama(head_bias=True).bfloat16()
    noted = []
    with TTTLogitsProcessor(model, 0.4) as processor:
        handle = model.lm_head.register_forward_hook(lambda m, args, out: noted.append((args[0][:, -1], out[:, -1])))
        result = generate(model, [[3, 4, 5]], processor, steps=12)
    handle.remove()
    hidden = torch.stack([h for h, _ in noted], dim=1).float()
    tokens = result.sequences[:, 3:]
    for step, scores in enumerate(result.scores):
        assert scores.dtype == torch.float32
        if step == 1:  # the plain logits as bfloat16 has them, and the change in float32
            plain = noted[1][1].float()
            before = noted[0][1].float()
            error = torch.eye(13)[tokens[:, 0]] - before.softmax(-1)
            expected = plain + 0.4 * (hidden[:, 0] @ hidden[:, 1].T + 1) * error
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_cut_stays_within_its_bound_while_decoding():
    model, bounds = tiny_llama(), []

    def note(input_ids, scores):
        bounds.append(processor.error_bound())
        return scores

    with TTTLogitsProcessor(model, 0.05, top_k=8) as processor:
        with pytest.raises(RuntimeError, match="no logits yet"):
            processor.error_bound()
        settings = {"max_new_tokens": 10, "do_sample": True, "logits_processor": [processor, note]}
        cut = model.generate(torch.tensor([[3, 4, 5]]), **PLAIN | settings)
    exact = reference_logits(model, [[3, 4, 5]], cut.sequences[:, 3:].tolist(), lr=0.05)
    plain = reference_logits(model, [[3, 4, 5]], cut.sequences[:, 3:].tolist(), lr=0.0)
    differences = (torch.stack(cut.scores, dim=1) - exact).abs().amax(-1)[0]
    assert (differences <= torch.cat(bounds) + 1e-5).all()
    assert 0 < differences.max() < 0.2 * (exact - plain).abs().max()


def test_the_next_prompt_begins_anew():
    model = tiny_llama()
    with TTTLogitsProcessor(model, 0.4) as processor:
        first = generate(model, [[3, 4, 5]], processor, steps=7).scores
        for ids in ([[3, 4, 5]], [[3, 4]], [[9, 4, 5], [3, 4, 5]], [[3, 4, 5, 6, 7]], [[3, 4, 5]]):
            found = generate(model, ids, processor, steps=7)
            expected = reference_logits(model, ids, found.sequences[:, len(ids[0]) :].tolist(), lr=0.4)
            torch.testing.assert_close(torch.stack(found.scores, dim=1), expected, rtol=0, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(first, found.scores))
        generate(model, [[3, 4, 5]], processor, steps=1)
        found = generate(model, [[9, 4, 5, 6]], processor, steps=4)  # one longer, but others
        expected = reference_logits(model, [[9, 4, 5, 6]], found.sequences[:, 4:].tolist(), lr=0.4)
        torch.testing.assert_close(torch.stack(found.scores, dim=1), expected, rtol=0, atol=1e-4)


def test_embeddings_in_the_place_of_ids():
    model = tiny_llama()
    embeddings = model.get_input_embeddings()(torch.tensor([[3, 4, 5]])).detach()
    with TTTLogitsProcessor(model, 0.4) as processor:
        for _ in range(2):
            settings = {"max_new_tokens": 6, "logits_processor": [processor]}
            found = model.generate(inputs_embeds=embeddings, **PLAIN | settings)
            expected = reference_logits(model, [[3, 4, 5]], found.sequences.tolist(), lr=0.4)
            torch.testing.assert_close(torch.stack(found.scores, dim=1), expected, rtol=0, atol=1e-4)


def test_inference_mode_leaves_nothing_that_cannot_be_used_outside():
    model = tiny_llama()
    with TTTLogitsProcessor(model, 0.4) as processor:
        with torch.inference_mode():
            inside = generate(model, [[3, 4, 5]], processor, steps=5)
        outside = generate(model, [[3, 4, 5]], processor, steps=5)
    assert torch.equal(inside.sequences, outside.sequences)


@pytest.mark.parametrize("use_cache", [True, False])
def test_going_on_from_what_was_generated_is_one_longer_call_unless_reset(use_cache):
    model = tiny_llama()
    with TTTLogitsProcessor(model, 0.4) as processor:
        whole = generate(model, [[3, 4, 5]], processor, steps=9, use_cache=use_cache)
        part = generate(model, [[3, 4, 5]], processor, steps=4, use_cache=use_cache)
        rest = generate(model, part.sequences, processor, steps=5, use_cache=use_cache)
        torch.testing.assert_close(rest.scores[-1], whole.scores[-1], rtol=0, atol=1e-5)
        part = generate(model, [[3, 4, 5]], processor, steps=4)
        processor.reset()
        anew = generate(model, part.sequences, processor, steps=5)
        expected = reference_logits(model, part.sequences.tolist(), anew.sequences[:, 7:].tolist(), lr=0.4)
        torch.testing.assert_close(torch.stack(anew.scores, dim=1), expected, rtol=0, atol=1e-4)


def test_a_failure_leaves_nothing_behind():
    model = tiny_llama()
    state = copy.deepcopy(model.state_dict())
    with TTTLogitsProcessor(model, 0.4) as processor:

        def fail(input_ids, scores):
            raise KeyError("stop")

        with pytest.raises(KeyError):
            model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, logits_processor=[processor, fail])
        with pytest.raises(ValueError, match="`repetition_penalty`"):
            generate(model, [[3, 4, 5]], processor, steps=3, repetition_penalty=1.5)
        found = generate(model, [[3, 4, 5]], processor, steps=3)
        expected = reference_logits(model, [[3, 4, 5]], found.sequences[:, 3:].tolist(), lr=0.4)
        torch.testing.assert_close(torch.stack(found.scores, dim=1), expected, rtol=0, atol=1e-4)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["with", "close", "garbage", "exception"])
def test_the_hooks_are_taken_off(how):
    model = tiny_llama()
    before, keys = hooks(model), set(model.__dict__)
    processor = TTTLogitsProcessor(model, 0.4)
    assert hooks(model) != before
    generate(model, [[3, 4]], processor, steps=2)
    if how == "with":
        with processor:
            pass
    elif how == "close":
        processor.close()
        processor.close()
    elif how == "exception":
        with pytest.raises(KeyError), processor:
            raise KeyError
    else:
        gone = weakref.ref(processor)
        del processor
        gc.collect()
        assert gone() is None
    assert hooks(model) == before
    assert set(model.__dict__) == keys
    if how != "garbage":
        with pytest.raises(RuntimeError, match="is closed; make a new one"):
            generate(model, [[3, 4]], processor, steps=2)


def test_the_model_may_be_used_otherwise_meanwhile():
    model = tiny_llama()
    with TTTLogitsProcessor(model, 0.4) as processor:
        first = generate(model, [[3, 4, 5]], processor, steps=4)
        copied = copy.deepcopy(model)(torch.tensor([[3, 4, 5]])).logits
        assert torch.equal(copied, model(torch.tensor([[3, 4, 5]])).logits)
        model.train()
        model(torch.tensor([[1, 2, 3], [3, 4, 5]]), labels=torch.tensor([[1, 2, 3], [3, 4, 5]])).loss.backward()
        model.eval()
        again = generate(model, [[3, 4, 5]], processor, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(first.scores, again.scores))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_wrapped_models():
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    expected = reference_logits(base, [[3, 4, 5]], [[3, 4, 5, 6]], lr=0.4)
    peft = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    for model in (peft, torch.compile(tiny_llama(), backend="eager"), nn.DataParallel(tiny_llama())):
        recorder = Recorder(forced=torch.tensor([[3, 4, 5, 6]]))
        inner = model.module if isinstance(model, nn.DataParallel) else model
        with TTTLogitsProcessor(model, 0.4) as processor:
            inner.generate(
                input_ids=torch.tensor([[3, 4, 5]]),
                max_new_tokens=4,
                logits_processor=[processor, recorder],
                **PLAIN,
            )
        torch.testing.assert_close(recorder.stacked(), expected, rtol=0, atol=1e-4)


SMALL = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)),
    ],
    ids=["soft-capped", "scaled"],
)
def test_logits_that_are_changed_after_the_head_are_refused(make):
    torch.manual_seed(0)
    model = make().eval()
    with (
        TTTLogitsProcessor(model, 0.1) as processor,
        pytest.raises(ValueError, match=r"changes them afterwards \(scaling or soft-capping\)"),
    ):
        generate(model, [[3, 4]], processor, steps=2)


def test_a_scale_of_one_is_none():
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=1.0)).eval()
    with TTTLogitsProcessor(model, 0.1) as processor:
        found = generate(model, [[3, 4]], processor, steps=4)
    expected = reference_logits(model, [[3, 4]], found.sequences[:, 2:].tolist(), lr=0.1)
    torch.testing.assert_close(torch.stack(found.scores, dim=1), expected, rtol=0, atol=1e-4)


def test_refusals():
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="with output embeddings, got BertModel"):
        TTTLogitsProcessor(bert, 0.1)
    model = tiny_llama()
    with pytest.raises(ValueError, match="`lr` must be finite and at least 0, got -1"):
        TTTLogitsProcessor(model, -1.0)
    assert not any(hooks(model))
    with (
        TTTLogitsProcessor(model, 1e38) as processor,
        pytest.raises(ValueError, match=r"Logits became NaN after steps with lr 1e\+38; take a smaller one"),
    ):
        generate(model, [[3, 4]], processor, steps=6)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"linear output head, got Sequential; .*merge_and_unload"):
        TTTLogitsProcessor(model, 0.1)
    model = tiny_llama()
    with TTTLogitsProcessor(model, 0.1) as one, TTTLogitsProcessor(model, 0.1) as two:
        with pytest.raises(ValueError, match="A processor before this one changed them"):
            model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, logits_processor=[one, two], **PLAIN)
        with pytest.raises(ValueError, match="A processor before this one changed them"):
            model.generate(
                torch.tensor([[3, 4]]),
                max_new_tokens=3,
                logits_processor=[RepetitionPenaltyLogitsProcessor(1.2), one],
                **PLAIN,
            )
    with TTTLogitsProcessor(model, 0.1) as processor:
        with pytest.raises(RuntimeError, match="did not see the output head run"):
            processor(torch.tensor([[3]]), torch.zeros(1, 13))
        other = tiny_llama(seed=2)
        with pytest.raises(RuntimeError, match="did not see the output head run"):
            generate(other, [[3, 4]], processor, steps=2)
    with torch.no_grad():
        model.lm_head.weight[2] = torch.nan
    with TTTLogitsProcessor(model, 0.1) as processor, pytest.raises(ValueError, match="they are NaN: load the model"):
        generate(model, [[3, 4]], processor, steps=2)
