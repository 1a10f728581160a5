"""Stratified sampling in `generate`: the host's own choice in every mode, the law of each sample, refusals."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig, GRPOTrainer

import hf_coverage
from hf_coverage.decode.stratified import StratifiedSamplingMixin, stratified_generate
from hf_coverage.functional.arithmetic_codes import response_intervals, stratified_codes, token_parts
from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.ttt.generate import ttt_generate
from tests.inference.odd_models import SMALL
from tests.ttt.head_reference import tiny_llama
from tests.ttt.test_generate_contract import EOS, PROMPTS, REFUSED, RIGHT, STEPS, Words

FOLDER = Path(hf_coverage.__file__).parent / "generate_modules" / "stratified_sampling"


def sample(model, *, rows=3, behind=(), **settings):
    """Generate from the prompts, padded on the left."""
    width = max(map(len, PROMPTS[:rows]))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in PROMPTS[:rows]])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS[:rows]])
    if settings.get("assistant_model") == "itself":
        settings["assistant_model"] = model
    torch.manual_seed(3)
    return model.generate(
        ids,
        **{"attention_mask": mask, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": EOS}
        | {"return_dict_in_generate": True, "output_scores": True, "do_sample": True, "num_return_sequences": 4}
        | {"logits_processor": list(behind)}
        | settings,
    )


def stratified(model, **settings):
    return sample(model, custom_generate=stratified_generate, **settings)


class Decoder:
    """What takes the place of the host's draw: one cumulative sum without blocks, and fresh numbers from 2^-16 on."""

    def __init__(self, size):
        self.size, self.codes, self.lengths = size, None, 1.0

    def __call__(self, probabilities):
        rows = len(probabilities)
        if self.codes is None:
            draws = torch.rand(2, rows // self.size, self.size, dtype=torch.float64)
            self.codes = stratified_codes(*draws).flatten()
        digits = torch.rand(rows, dtype=torch.float64)
        ends = probabilities.double().cumsum(-1)
        places = self.codes[:, None] * ends[:, -1:]
        tokens = torch.searchsorted(ends, places, right=True)
        own = probabilities.double().gather(-1, tokens)
        self.codes = ((places - ends.gather(-1, tokens) + own) / own)[:, 0]
        self.lengths = self.lengths * (own / ends[:, -1:])[:, 0]
        self.codes = self.codes.where(self.lengths >= 2**-16, digits)
        return tokens


def by_the_host(model, monkeypatch, size=4, **settings):
    decoder = Decoder(size)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda probabilities, num_samples: decoder(probabilities))
        return sample(model, **settings)


def settings_of(mode):
    several = 1 if mode in ("streamer", "rows that end") else 4  # a streamer takes one row, the criterion three
    return {"num_return_sequences": several} | RIGHT[mode]() | {"do_sample": True, "output_logits": True}


@pytest.mark.parametrize("mode", RIGHT)
def test_in_every_mode_what_the_host_would_choose_by_the_same_codes(mode, monkeypatch):
    model = tiny_llama(head_bias=True)
    size = settings_of(mode)["num_return_sequences"]
    expected = by_the_host(model, monkeypatch, size, **settings_of(mode))
    found = stratified(model, **settings_of(mode))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip((*found.scores, *found.logits), (*expected.scores, *expected.logits), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", RIGHT)
def test_the_models_own_log_probabilities_come_along(mode):
    settings = settings_of(mode)
    result = stratified(tiny_llama(head_bias=True), **settings)
    new = result.sequences[:, -result.token_logprobs.shape[1] :]
    logits = torch.stack(result.logits, dim=1)
    expected = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
    ended = settings.get("eos_token_id") or []
    for row, response in enumerate(new.tolist()):
        length = next((at for at, token in enumerate(response, 1) if token in ended), len(response))
        if mode == "rows that end":
            length = min(length, [2, 5, STEPS][row])
        torch.testing.assert_close(result.token_logprobs[row, :length], expected[row, :length], rtol=0, atol=1e-5)
        assert not result.token_logprobs[row, length:].any()


@pytest.mark.parametrize("mode", REFUSED)
def test_other_modes_are_refused(mode):
    settings = REFUSED[mode][0]() | {"num_return_sequences": 1}
    works = {"repetition penalty", "sequence bias", "guidance", "length penalty"}  # what changes scores acts first
    if mode in works:
        assert stratified(tiny_llama(), **settings).sequences.shape[1] > STEPS
        return
    if mode == "contrastive search":
        settings |= {"do_sample": False}
    with pytest.raises(ValueError, match=r"Stratified sampling works for sampling alone, got [a-z ]+: generate with"):
        stratified(tiny_llama(), **settings)


def test_greedy_decoding_is_refused():
    with pytest.raises(ValueError, match="is sampling, got greedy search: generate with `do_sample=True`"):
        stratified(tiny_llama(), do_sample=False, num_return_sequences=1)


def law_of(model, prompt, change=lambda logits: logits):
    """Low ends and probabilities of all responses of two tokens, by the model's own passes."""
    vocabulary = model.config.vocab_size
    responses = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt).expand(len(responses), -1), responses], dim=1)
        logits = change(model(ids).logits[:, len(prompt) - 1 : -1].flatten(0, 1)).view(len(responses), 2, -1)
    low, log_length = response_intervals(token_parts(logits, responses))
    return low.numpy(), log_length.exp().numpy()


def cut(logits):
    """Temperature 0.8 and the 5 likeliest tokens."""
    logits = logits / 0.8
    return logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)


@pytest.mark.parametrize("n", [1, 6, 8])
@pytest.mark.parametrize(
    ("warpers", "change"), [({"top_k": 0}, lambda logits: logits), ({"temperature": 0.8, "top_k": 5}, cut)]
)
def test_each_sample_is_one_of_the_model_and_hits_are_the_product_over_strata(n, warpers, change):
    model, groups = tiny_llama(), 1000
    low, law = law_of(model, [5, 3], change)
    torch.manual_seed(n)
    settings = {"do_sample": True, "num_return_sequences": n, "max_new_tokens": 2, "eos_token_id": None}
    ids = model.generate(
        torch.tensor([[5, 3]]).expand(groups, -1),
        custom_generate=stratified_generate,
        pad_token_id=EOS,
        **settings,
        **warpers,
    )
    drawn = (ids[:, 2] * 13 + ids[:, 3]).view(groups, n).numpy()
    for place in {0, n - 1}:
        counts = np.bincount(drawn[:, place], minlength=len(law))
        assert not counts[law == 0].any()
        often = law * groups > 5
        assert stats.chisquare(*(np.append(x[often], x[~often].sum()) for x in (counts, law * groups))).pvalue > 1e-4
    accepted = np.random.default_rng(0).random(len(law)) < 0.15
    strata = np.arange(n)[:, None] / n
    parts = np.minimum(low + law, strata + 1 / n) - np.maximum(low, strata)
    exact = 1 - np.prod(1 - n * (parts.clip(0) * accepted).sum(axis=1))
    hits = int(accepted[drawn].any(axis=1).sum())
    assert stats.binomtest(hits, groups, exact).pvalue > 1e-4
    assert exact >= 1 - (1 - law[accepted].sum()) ** n - 1e-9


def test_prompts_that_the_caller_repeats_share_codes_by_group():
    model = tiny_llama()
    expected = stratified(model)
    width = max(map(len, PROMPTS))
    ids = expected.sequences[:, :width]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    settings = {"inputs": ids, "attention_mask": mask.repeat_interleave(4, 0), "num_return_sequences": 1}
    settings |= {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": EOS, "do_sample": True}
    torch.manual_seed(3)
    assert torch.equal(model.generate(**settings, group=4, custom_generate=stratified_generate), expected.sequences)
    torch.manual_seed(3)
    twice = settings | {"inputs": ids[::2], "attention_mask": settings["attention_mask"][::2]}
    twice |= {"num_return_sequences": 2}
    assert torch.equal(model.generate(**twice, group=2, custom_generate=stratified_generate), expected.sequences)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (2, "`group` must divide the rows of `input_ids`: got 3 rows"),
        (3, "`group` must be rows of one prompt, but rows 0 to 2 have different ones"),
        (0, "`group` must be a whole number of rows, at least 1, got 0"),
        (1.5, "at least 1, got 1.5"),
    ],
)
def test_groups_that_are_none_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        stratified(tiny_llama(), group=group, num_return_sequences=1)


def test_scores_that_are_nan_are_refused():
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(0, torch.tensor([2]), torch.nan)

    with pytest.raises(ValueError, match="scores of row 2 became NaN, or ruled out all tokens"):
        stratified(tiny_llama(), behind=[Broken()], renormalize_logits=False)


def test_a_processor_that_rules_out_all_tokens_is_refused():
    with pytest.raises(ValueError, match="scores of row 0 became NaN, or ruled out all tokens"):
        stratified(tiny_llama(), behind=[lambda input_ids, scores: torch.full_like(scores, -torch.inf)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    model = tiny_llama().to(dtype)
    found, expected = stratified(model), by_the_host(model, monkeypatch)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_cache_of_the_callers_own_is_gone_on_with():
    model = tiny_llama()
    cache = DynamicCache()
    result = stratified(model, rows=1, num_return_sequences=1, **{CACHE: cache})
    assert torch.equal(result.sequences, stratified(model, rows=1, num_return_sequences=1).sequences)
    assert cache.get_seq_length() == len(PROMPTS[0]) + STEPS - 1


def test_a_streamer_gets_every_token_and_its_end():
    words = Words()
    result = stratified(tiny_llama(), rows=1, num_return_sequences=1, streamer=words)
    assert words.ended
    assert torch.equal(torch.cat([token.flatten() for token in words.tokens]), result.sequences[0])


@pytest.mark.parametrize("ttt", [{"ttt_lr": 0.4}, {"ttt_lr": 0.05, "ttt_scope": "lora", "ttt_cache": "stale"}])
@pytest.mark.parametrize("saved", [False, True])
def test_rows_that_train_while_they_are_sampled(ttt, saved, monkeypatch):
    model = tiny_llama()
    expected = by_the_host(model, monkeypatch, custom_generate=ttt_generate, **ttt)
    if saved:
        model.generation_config = GenerationConfig(**ttt)
        ttt = {}
    found = stratified(model, **ttt)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.token_logprobs, expected.token_logprobs)
    assert not torch.equal(found.sequences, stratified(tiny_llama()).sequences)
    for ours, theirs in zip(found.scores, expected.scores):
        torch.testing.assert_close(ours, theirs)


def test_settings_of_test_time_training_are_all_taken_and_checked():
    settings = {name for name in inspect.signature(ttt_generate).parameters if name.startswith("ttt_")}
    assert settings < inspect.signature(stratified_generate).parameters.keys()
    with pytest.raises(ValueError, match="`ttt_lr` must be given"):
        stratified(tiny_llama(), ttt_radius=1.0)
    with pytest.raises(ValueError, match="give it as `ttt_streamer`"):
        stratified(tiny_llama(), rows=1, num_return_sequences=1, ttt_lr=0.1, streamer=Words())


class MixedLlama(StratifiedSamplingMixin, LlamaForCausalLM):
    pass


def mixed():
    model = MixedLlama(tiny_llama().config).eval()
    model.load_state_dict(tiny_llama().state_dict())
    return model


def test_a_model_class_of_its_own():
    model, plain = mixed(), tiny_llama()
    assert torch.equal(sample(model).sequences, sample(plain).sequences)
    assert torch.equal(sample(model, stratified=True).sequences, stratified(plain).sequences)
    assert torch.equal(
        sample(model, ttt_lr=0.4).sequences, sample(plain, ttt_lr=0.4, custom_generate=ttt_generate).sequences
    )
    both = sample(model, ttt_lr=0.4, stratified=True)
    assert torch.equal(both.sequences, stratified(plain, ttt_lr=0.4).sequences)
    model.generation_config = GenerationConfig(stratified=True)
    assert torch.equal(sample(model).sequences, stratified(plain).sequences)
    assert torch.equal(sample(model, stratified=False).sequences, sample(plain).sequences)
    model.generation_config = GenerationConfig(stratified=True, group=2)
    with pytest.raises(ValueError, match="got 12 rows, with `num_return_sequences`, and groups of 8"):
        sample(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses names that transformers has given others
def test_groups_of_trl_are_stratified(tmp_path):
    """Of 8 completions as many begin below each token as a stratified sample has there, to the last one."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"eos_token_id": 1})
    model, groups = MixedLlama(config), []
    model.lm_head.weight.data.normal_(std=1.0)
    tokens = Tokenizer(models.WordLevel({f"w{token}": token for token in range(config.vocab_size)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="w0", eos_token="w1")

    def reward(prompts, completion_ids, **columns):
        groups.extend((prompts[row], completion_ids[row : row + 8]) for row in range(0, len(prompts), 8))
        return [float(row) for row in range(len(prompts))]

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=2,
        max_steps=3,
        learning_rate=1e-9,
        generation_kwargs={"stratified": True, "group": 8},
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7", "w8", "w9 w2"]})
    GRPOTrainer(model, reward, args=settings, train_dataset=data, processing_class=tokenizer).train()
    assert len(groups) == 6
    for prompt, completions in groups:
        with torch.no_grad():
            law = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].softmax(-1)
        for token in range(config.vocab_size):
            below = sum(completion[0] < token for completion in completions)
            assert abs(below - 8 * law[:token].sum().item()) < 1 + 1e-3


def test_a_mixed_model_streams_and_says_what_it_does_not_do():
    for settings in ({}, {"ttt_lr": 0.4}):
        words = Words()
        result = sample(mixed(), stratified=True, rows=1, num_return_sequences=1, streamer=words, **settings)
        assert words.ended
        assert torch.equal(torch.cat([token.flatten() for token in words.tokens]), result.sequences[0])
    with pytest.raises(ValueError, match="Stratified sampling does not work with continuous batching"):
        sample(mixed(), stratified=True, cache_implementation="paged")


def test_the_repository_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", [*sys.path])
    model, words = tiny_llama(), Words()
    expected = stratified(model, rows=1, num_return_sequences=1)
    settings = {"custom_generate": hf_coverage.generate_module("stratified_sampling"), "trust_remote_code": True}
    found = sample(model, rows=1, num_return_sequences=1, streamer=words, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.token_logprobs, expected.token_logprobs)
    assert words.ended
    assert torch.equal(sample(model, **settings).sequences, stratified(model).sequences)
    with pytest.raises(ValueError, match="Stratified sampling does not work with continuous batching"):
        sample(model, cache_implementation="paged", **settings)
    with pytest.raises(ValueError, match="works for sampling alone, got assisted generation"):
        sample(model, rows=1, num_return_sequences=1, assistant_model=tiny_llama(seed=1), **settings)


def test_the_seed_of_torch_decides():
    model = tiny_llama()
    first, again = stratified(model), stratified(model)
    assert torch.equal(first.sequences, again.sequences)
    torch.manual_seed(4)
    ids = torch.tensor([PROMPTS[0]])
    settings = {
        "do_sample": True,
        "num_return_sequences": 4,
        "max_new_tokens": STEPS,
        "custom_generate": stratified_generate,
    }
    assert not torch.equal(model.generate(ids, **settings), model.generate(ids, **settings))
