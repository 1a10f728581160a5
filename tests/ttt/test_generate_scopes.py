"""Adapters and all parameters that train while decoding: equal to plain loops in every mode, or refused."""

import copy
import gc
import itertools
import sys
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, MambaConfig, MambaForCausalLM, StoppingCriteriaList
from transformers.models.t5 import T5Config, T5ForConditionalGeneration

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.row_models import RowModels
from hf_coverage.ttt.row_networks import RowAdapters
from tests.ttt.network_reference import RANK, network_row, network_rows, tiny_model
from tests.ttt.test_generate import FOLDER, MixedLlama, decode, logprobs_of, responses_of
from tests.ttt.test_generate_contract import EOS, PROMPTS, RIGHT, STEPS, Words, run, stop_rows_early

SCOPES = [("lora", "exact"), ("lora", "stale"), ("all", "exact"), ("all", "stale")]
RATES = {"lora": 0.2, "all": 0.05}
NAMES = {"ttt_radius": "radius", "ttt_decay": "decay", "ttt_lam": "lam", "ttt_steps": "num_steps"}
NAMES |= {"ttt_on_prompt": "on_prompt"}


def settings_of(scope, cache, **settings):
    """Arguments of `generate`."""
    rank = {"ttt_rank": RANK} if scope == "lora" else {}
    return {"lr": RATES[scope], "ttt_scope": scope, "ttt_cache": cache} | rank | settings


def loop_logits(model, prompts, responses, *, scope, cache="exact", lr=None, **settings):
    """Logits `(B, T, V)` before each token of given responses, by a plain loop; the model alone without a scope."""
    starts = RowAdapters(model, RANK).start[::2] if scope == "lora" else None
    plain = {NAMES[name]: value for name, value in settings.items()} | {"stale": cache == "stale"}
    lines = []
    for row, response in zip(
        network_rows(model, scope, prompts, starts=starts, lr=lr or RATES[scope], **plain), responses
    ):
        line = []
        for token in response:
            line.append(row.logits().detach())
            row.step(token)
        lines.append(torch.stack(line))
    return torch.stack(lines)


def plain_logits(model, prompts, responses):
    with torch.no_grad():
        lines = [
            model(torch.tensor([[*prompt, *response[:-1]]])).logits[0, len(prompt) - 1 :]
            for prompt, response in zip(prompts, responses)
        ]
    return torch.stack(lines)


def single_rows(model, prompts, responses, config):
    """The same as `loop_logits`, by one object for each row, which the loops are compared with elsewhere."""
    lines = []
    for prompt, response in zip(prompts, responses):
        row, line = RowModels(model, torch.tensor([prompt]), config=config), []
        for token in response:
            line.append(row.logits()[0])
            row.step(torch.tensor([token]))
        lines.append(torch.stack(line))
    return torch.stack(lines)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ttt_on_prompt": True, "ttt_lam": 1.0}, {"ttt_steps": 2, "ttt_decay": 0.2, "ttt_radius": 0.4}],
    ids=["plain", "prompt", "steps"],
)
@pytest.mark.parametrize(("scope", "cache"), SCOPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equal_to_a_plain_loop(kind, scope, cache, settings):
    model = tiny_model(kind)
    result = decode(model, do_sample=True, **settings_of(scope, cache, max_new_tokens=6, **settings))
    tokens = responses_of(result)
    expected = loop_logits(model, PROMPTS, tokens.tolist(), scope=scope, cache=cache, **settings)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(result.token_logprobs, logprobs_of(expected, tokens), rtol=0, atol=2e-4)
    assert (expected - plain_logits(model, PROMPTS, tokens.tolist())).abs().max() > 0.2


@pytest.mark.parametrize(
    ("kind", "scope", "cache"),
    [
        ("tied", "all", "exact"),
        ("mixtral", "all", "stale"),
        ("qwen2moe", "lora", "exact"),
        ("qwen2moe", "lora", "stale"),
        ("gemma2", "lora", "stale"),
        ("gemma2", "all", "exact"),
    ],
)
def test_tied_heads_experts_windows_and_capped_logits(kind, scope, cache):
    model = tiny_model(kind)
    result = decode(model, do_sample=True, **settings_of(scope, cache, max_new_tokens=5))
    tokens = responses_of(result).tolist()
    expected = loop_logits(model, PROMPTS, tokens, scope=scope, cache=cache)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("scope", "cache"), [("lora", "stale"), ("all", "exact")])
def test_the_same_tokens_as_a_loop_under_the_same_seed(scope, cache):
    model = tiny_model("llama")
    result = decode(model, do_sample=True, **settings_of(scope, cache))
    starts = RowAdapters(model, RANK).start[::2] if scope == "lora" else None
    rows = [
        network_row(model, scope, prompt, starts=starts, lr=RATES[scope], stale=cache == "stale") for prompt in PROMPTS
    ]
    torch.manual_seed(3)
    for step in range(STEPS):
        logits = torch.stack([row.logits().detach() for row in rows])
        tokens = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        assert torch.equal(tokens, responses_of(result)[:, step])
        for row, token in zip(rows, tokens):
            row.step(token)


@pytest.mark.parametrize("scope", ["lora", pytest.param("all", marks=pytest.mark.slow)])
def test_smollm2_equals_a_plain_loop(smollm2, scope):
    model, tokenizer = smollm2
    prompt = tokenizer("The quick brown fox jumps over", return_tensors="pt").input_ids
    lr = 1e-2 if scope == "lora" else 1e-4
    result = model.generate(
        prompt,
        custom_generate=ttt_generate,
        ttt_lr=lr,
        ttt_scope=scope,
        ttt_rank=RANK if scope == "lora" else None,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    response = result.sequences[:, prompt.shape[1] :].tolist()
    expected = loop_logits(model, prompt.tolist(), response, scope=scope, lr=lr)
    found = torch.stack(result.scores, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found - torch.stack(result.logits, dim=1)).abs().max() > 0.05


@pytest.mark.parametrize(("scope", "cache"), [("lora", "exact"), ("all", "stale")])
def test_probabilities_of_all_responses_sum_to_one(scope, cache):
    model, length = tiny_model("llama"), 2
    responses = torch.tensor(list(itertools.product(range(13), repeat=length)))
    config = TTTConfig(0.5, scope=scope, cache=cache, on_prompt=True)
    rows = RowModels(model, torch.tensor([[2, 5, 7]]), config=config).select(torch.zeros(len(responses), dtype=int))
    total = torch.zeros(len(responses), dtype=torch.float64)
    for step in range(length):
        total += logprobs_of(rows.logits().double(), responses[:, step])
        rows.step(responses[:, step])
    assert float(total.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    plain = logprobs_of(plain_logits(model, [[2, 5, 7]] * len(responses), responses.tolist()), responses).sum(-1)
    assert (total - plain).abs().max() > 0.5


@pytest.mark.parametrize(
    ("mode", "scope", "cache"), [(mode, *way) for mode, way in zip(RIGHT, itertools.cycle(SCOPES))]
)
def test_every_mode_of_generate(mode, scope, cache):
    model, settings = tiny_model("llama"), RIGHT[mode]()
    if "behind" in settings:
        settings["logits_processor"] = settings.pop("behind")
    if "streamer" in settings:
        settings["ttt_streamer"] = settings.pop("streamer")
    given = settings_of(scope, cache, output_scores=False) | settings
    result = decode(model, **given)
    num_prompts, repeats = settings.get("rows", 3), settings.get("num_return_sequences", 1)
    prompts = [prompt for prompt in PROMPTS[:num_prompts] for _ in range(repeats)]
    tokens = responses_of(result, rows=num_prompts)
    config = TTTConfig(RATES[scope], scope=scope, cache=cache, rank=RANK if scope == "lora" else None)
    wanted = logprobs_of(single_rows(model, prompts, tokens.tolist(), config), tokens)
    ended = settings.get("eos_token_id", [])
    for row, response in enumerate(tokens.tolist()):
        length = next((at for at, token in enumerate(response, 1) if token in ended), len(response))
        if mode == "rows that end":
            length = min(length, [2, 5, STEPS][row])
        torch.testing.assert_close(
            result.token_logprobs[row, :length], wanted[row, :length], rtol=0, atol=2e-4, msg=f"row {row}"
        )
        assert not result.token_logprobs[row, length:].any()


@pytest.mark.parametrize("mode", ["sampling", "warpers", "several sequences", "rows that end", "without a cache"])
@pytest.mark.parametrize("settings", [{"ttt_scope": "lora", "ttt_on_prompt": True}, {"ttt_scope": "all"}])
def test_a_step_size_of_zero_is_plain_generate_bit_for_bit(mode, settings):
    model = tiny_model("llama")
    adapted = decode(model, lr=0.0, **settings, **RIGHT[mode]())
    plain, recorder = run(model, lambda input_ids, scores: scores, **RIGHT[mode]())
    assert torch.equal(responses_of(adapted), plain)
    logprobs = logprobs_of(recorder.stacked(), plain)
    if mode != "rows that end":
        torch.testing.assert_close(adapted.token_logprobs, logprobs, rtol=0, atol=1e-6)


def test_several_sequences_share_what_the_prompt_taught():
    model, reads = tiny_model("llama"), []
    handle = model.register_forward_pre_hook(
        lambda model, args, kwargs: reads.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    settings = settings_of("all", "exact", ttt_on_prompt=True, max_new_tokens=1)
    result = decode(model, do_sample=True, num_return_sequences=4, **settings)
    handle.remove()
    assert sum(shape == (1, 1) for shape in reads) == 3  # the first token of each prompt, once
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    expected = loop_logits(model, prompts, responses_of(result).tolist(), scope="all", ttt_on_prompt=True)
    torch.testing.assert_close(torch.stack(result.scores, dim=1), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("scope", "cache"), [("lora", "exact"), ("all", "stale")])
def test_rows_that_have_ended_are_not_read_any_more(scope, cache):
    model, rows = tiny_model("llama"), []
    handle = model.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    criteria = StoppingCriteriaList([stop_rows_early])
    decode(model, stopping_criteria=criteria, eos_token_id=[12], **settings_of(scope, cache))
    handle.remove()
    if scope == "lora":
        # The host's loop reads three rows to the end.
        assert [count for count in rows if count < 3] == [2] * 3 + [1] * 3
    else:
        # Each row reads its prompt but for the last token, and this one and all that it writes one by one.
        assert sum(count == 1 for count in rows) == sum(1 + 1 + length for length in (2, 5, STEPS - 1))


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
def test_the_model_is_left_as_it_was(scope, cache):
    model = tiny_model("gpt2").requires_grad_(False).train()
    model.transformer.h[0].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]

    def fail(input_ids, scores):
        raise KeyError("stop")

    def fail_in_own_passes(layer, args, output):
        if torch.is_grad_enabled():
            fail(args, output)

    settings = settings_of(scope, cache, ttt_on_prompt=True)
    decode(model, **settings)
    with pytest.raises(KeyError):
        decode(model, logits_processor=[fail], **settings)
    handle = model.transformer.ln_f.register_forward_hook(
        lambda *args: fail(*args[:2]) if torch.is_grad_enabled() else None
    )
    with pytest.raises(KeyError):
        decode(model, **settings)
    handle.remove()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert model.lm_head.weight is model.transformer.wte.weight
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_passes_are_without_dropout_and_leave_the_random_numbers(scope):
    model = tiny_model("gpt2")
    expected = decode(model, do_sample=False, **settings_of(scope, "exact", ttt_on_prompt=True))
    found = decode(model.train(), do_sample=False, **settings_of(scope, "exact", ttt_on_prompt=True))
    torch.testing.assert_close(found.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)
    state = torch.get_rng_state()
    rows = RowModels(model, torch.tensor([[3, 4]]), config=TTTConfig(0.1, scope=scope))
    rows.logits()
    rows.step(torch.tensor([5]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
def test_under_inference_mode(scope, cache):
    model, settings = tiny_model("llama"), settings_of(scope, cache, ttt_on_prompt=True, num_return_sequences=2)
    expected = decode(model, do_sample=True, **settings)
    with torch.inference_mode():
        found = decode(model, do_sample=True, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_autocast_sees_every_step(scope):
    model, tokens = tiny_model("llama"), torch.randint(2, 13, (1, 6), generator=torch.Generator().manual_seed(0))
    config = TTTConfig(RATES[scope] / 5, scope=scope)
    with torch.autocast("cpu", torch.bfloat16):
        found = single_rows(model, [[3, 4]], tokens.tolist(), config)
    exact = single_rows(model, [[3, 4]], tokens.tolist(), config)
    plain = plain_logits(model, [[3, 4]], tokens.tolist())
    assert (found - exact).norm() < 0.3 * (exact - plain).norm()


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_half_precision_keeps_small_steps(scope):
    # No single step is large enough for bfloat16, which has 8 bits.
    model, tokens = tiny_model("llama"), torch.full((1, 60), 5)
    config = TTTConfig(2e-4, scope=scope)
    exact = single_rows(model, [[3, 4]], tokens.tolist(), config)
    found = single_rows(model.bfloat16(), [[3, 4]], tokens.tolist(), config)
    assert found.dtype == torch.float32
    gained = [float(logits.log_softmax(-1)[0, -1, 5] - logits.log_softmax(-1)[0, 0, 5]) for logits in (exact, found)]
    assert gained[0] > 0.5
    assert gained[1] == pytest.approx(gained[0], rel=0.3)


@pytest.mark.parametrize(("scope", "cache"), [("lora", "exact"), ("lora", "stale"), ("all", "exact")])
def test_compiled_models(scope, cache):
    model, settings = tiny_model("llama"), settings_of(scope, cache)
    expected = decode(model, do_sample=True, **settings)
    model.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decode(model, do_sample=True, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)


def test_what_changes_scores_acts_on_the_adapted_ones():
    model = tiny_model("llama")
    result = decode(model, rows=1, guidance_scale=1.5, sequence_bias={(4,): 1.0}, **settings_of("all", "exact"))
    tokens = responses_of(result, rows=1)
    logits = loop_logits(model, PROMPTS[:1], tokens.tolist(), scope="all")
    torch.testing.assert_close(result.token_logprobs, logprobs_of(logits, tokens), rtol=0, atol=2e-4)


def test_nothing_is_kept_after_decoding():
    model, kept = tiny_model("llama"), []
    begin = RowModels.__init__

    def note(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        kept.extend(weakref.ref(theta) for lines in self._lines for theta in lines._parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowModels, "__init__", note)
        result = decode(model, **settings_of("all", "stale"))
    gc.collect()
    assert len(kept) == 3 * len(list(model.parameters()))
    assert not any(reference() is not None for reference in kept)
    assert not result.token_logprobs.requires_grad


def test_settings_are_saved_in_a_generation_config_and_the_folder_and_the_class_take_them(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    model, words = tiny_model("llama"), Words()
    settings = settings_of("lora", "stale", ttt_on_prompt=True)
    expected = decode(model, rows=1, do_sample=True, **settings)
    folder = {"custom_generate": str(FOLDER), "trust_remote_code": True, "streamer": words}
    found = decode(model, rows=1, do_sample=True, **settings, **folder)
    assert torch.equal(found.sequences, expected.sequences)
    assert words.ended
    saved = {name: value for name, value in settings.items() if name.startswith("ttt_")} | {"ttt_lr": settings["lr"]}
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS, **saved)
    model.save_pretrained(tmp_path / "model")
    own = MixedLlama.from_pretrained(tmp_path / "model")
    found = decode(own, lr=None, rows=1, do_sample=True, custom_generate=None)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_steps_that_are_far_too_large_are_refused(scope):
    model = tiny_model("gpt2")
    message = r"Logits became NaN after steps with lr 1e\+30; take a smaller one"
    with pytest.raises(ValueError, match=message):
        decode(model, **settings_of(scope, "exact") | {"lr": 1e30})
    decode(model, **settings_of(scope, "exact", ttt_radius=1.0) | {"lr": 1e10})


def filled_cache(model):
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0][:2]]), **{CACHE: cache})
    return cache


@pytest.mark.parametrize("scope", ["lora", "all"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "sampling and greedy decoding, got beam search"),
        ({"rows": 1, "prompt_lookup_num_tokens": 2}, "got assisted generation"),
        ({"ttt_top_k": 3}, '`top_k` cuts the steps of the head: leave it out, or take `scope="head"`'),
        ({"lr": torch.tensor([0.1, 0.2, 0.3])}, "`ttt_lr` must be one number for all rows"),
        ({"ttt_steps": 2.0}, "`num_steps` must be a whole number, at least 1, got 2.0"),
        ({"ttt_cache": "fresh"}, '`cache` must be "exact" or "stale", got \'fresh\''),
        ({"token_type_ids": torch.zeros(3, 4, dtype=int)}, "the model also gets `token_type_ids`"),
        ({"position_ids": torch.arange(4)[None] + 5}, "from position 0 on, but `position_ids` are others"),
    ],
)
def test_refusals(scope, settings, message):
    model = tiny_model("gpt2" if "token_type_ids" in settings else "llama")
    with pytest.raises(ValueError, match=message):
        decode(model, **settings_of(scope, "exact") | settings)


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_prompts_that_are_no_token_ids_are_refused(scope):
    model = tiny_model("llama")
    asked = f'`ttt_scope="{scope}"` reads token ids alone, but '
    with pytest.raises(ValueError, match=f"{asked}`{CACHE}` knows 2 of them already"):
        decode(model, rows=1, **{CACHE: filled_cache(model)}, **settings_of(scope, "exact"))
    embeddings = model.get_input_embeddings()(torch.tensor([PROMPTS[0]])).detach()
    with pytest.raises(ValueError, match=f"{asked}the model also gets `inputs_embeds`"):
        model.generate(
            inputs_embeds=embeddings, custom_generate=ttt_generate, ttt_lr=0.1, ttt_scope=scope, max_new_tokens=2
        )
    with pytest.raises(ValueError, match="padding on the left alone, and a token at the end, but row 1 has some else"):
        RowModels(
            model,
            torch.tensor([[3, 4], [5, 1]]),
            config=TTTConfig(0.1, scope=scope),
            mask=torch.tensor([[1, 1], [1, 0]]),
        )


# peft asks a model for a property that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_that_cannot_be_trained_are_refused():
    ids, lora, full = torch.tensor([[3, 4]]), TTTConfig(0.1, scope="lora"), TTTConfig(0.1, scope="all")
    model = tiny_model("llama")
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for config in (lora, full):
        with pytest.raises(ValueError, match=r"not train beside other adapters, .* merge it first"):
            RowModels(adapted.base_model.model, ids, config=config)
    merged = adapted.merge_and_unload()
    assert RowModels(merged, ids, config=lora).logits().shape == (1, 13)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got model\.norm\.weight, a Parameter of torch\.int8; load the model with"):
        RowModels(model, ids, config=full)
    with torch.inference_mode():
        frozen = tiny_model("llama")
    with pytest.raises(ValueError, match=r"was made under `torch\.inference_mode`; load the model outside"):
        RowModels(frozen, ids, config=lora)
    with torch.device("meta"):
        nowhere = tiny_model("llama")
    with pytest.raises(ValueError, match="is offloaded; load the model whole"):
        RowModels(nowhere, ids, config=full)
    encoder = T5ForConditionalGeneration(T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="works for decoders alone, got T5ForConditionalGeneration"):
        RowModels(encoder, ids, config=full)
    with pytest.raises(ValueError, match=r"`rank` must be a whole number, at least 1, got 2\.0"):
        TTTConfig(0.1, scope="lora", rank=2.0)
    with pytest.raises(ValueError, match='`config` must have `scope="lora"` or "all" and one step size'):
        RowModels(tiny_model("llama"), ids, config=TTTConfig(0.1))


def tiny_mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, state_size=4, bos_token_id=0)
    return MambaForCausalLM(config).eval()


def test_models_without_keys_and_values():
    model, ids = tiny_mamba(), torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match='`cache="stale"` needs a model that keeps keys and values'):
        RowModels(model, ids, config=TTTConfig(0.1, scope="lora", cache="stale"))
    settings = {"custom_generate": ttt_generate, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    for scope in ("lora", "all"):
        result = model.generate(
            ids, ttt_lr=0.1, ttt_scope=scope, return_dict_in_generate=True, output_scores=True, **settings
        )
        response = result.sequences[:, 2:].tolist()
        expected = single_rows(model, [[3, 4]], response, TTTConfig(0.1, scope=scope))
        torch.testing.assert_close(torch.stack(result.scores, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(CACHE != "cache", reason="a recurrent state has a name of its own before transformers 5.24")
def test_a_recurrent_state_that_knows_tokens_is_refused():
    model, ids = tiny_mamba(), torch.tensor([[3, 4]])
    with torch.no_grad():
        state = model(ids[:, :1], use_cache=True).cache
    with pytest.raises(ValueError, match="`cache` knows some of them already, under the plain model"):
        model.generate(ids, custom_generate=ttt_generate, ttt_lr=0.1, ttt_scope="lora", max_new_tokens=2, cache=state)
