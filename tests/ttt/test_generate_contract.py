"""The processor in every mode of `generate`: an autograd reference's logits or a refusal, never silently wrong."""

import copy
import logging
import warnings

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from hf_coverage.inference.prefix_cache import CACHE
from hf_coverage.ttt.processor import TTTLogitsProcessor
from tests.ttt.head_reference import Recorder, reference_logits, tiny_llama

LR = 0.4
PROMPTS = [[5, 3, 9, 4], [7, 2], [3, 3, 8]]
STEPS = 9
EOS = 1


class Words(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended = True


def compiled():
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def stop_rows_early(input_ids, scores, **kwargs):
    """Ends the rows one after the other; `generate` goes on with the last one and fills the others up."""
    length = input_ids.shape[1] - max(map(len, PROMPTS))
    return torch.tensor([length >= 2, length >= 5, False])


RIGHT = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True},
    "warpers": lambda: {"do_sample": True, "temperature": 0.6, "top_k": 6, "top_p": 0.9, "min_p": 0.02},
    "other warpers": lambda: {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "several sequences": lambda: {"do_sample": True, "num_return_sequences": 3},
    "without a cache": lambda: {"use_cache": False},
    "static cache": lambda: {"cache_implementation": "static"},
    "compiled": compiled,
    "logits at all positions": lambda: {"logits_to_keep": 0},
    "the same without a cache": lambda: {"logits_to_keep": 0, "use_cache": False},
    "prefill in chunks": lambda: {"prefill_chunk_size": 2},
    "own cache": lambda: {CACHE: DynamicCache()},
    "rows that end": lambda: {
        "do_sample": True,
        "eos_token_id": [12],
        "stopping_criteria": StoppingCriteriaList([stop_rows_early]),
    },
    "end-of-sequence tokens": lambda: {"do_sample": True, "eos_token_id": [1, 4, 7]},
    "ruled out tokens": lambda: {"bad_words_ids": [[3], [5, 6]], "suppress_tokens": [8], "min_new_tokens": 4},
    "few tokens allowed": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [2, 3 + len(ids) % 4]},
    "forced end": lambda: {"forced_eos_token_id": EOS},
    "forced begin": lambda: {"begin_suppress_tokens": [3]},
    "log-softmax after": lambda: {"renormalize_logits": True},
    "watermark after": lambda: {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=2.0)},
    "all outputs": lambda: {"output_logits": True, "output_hidden_states": True, "output_scores": True},
    "penalty after": lambda: {"behind": [RepetitionPenaltyLogitsProcessor(1.3)]},
    "mask after": lambda: {"behind": [PrefixConstrainedLogitsProcessor(lambda row, ids: [2, 5, 6], 1)]},
    "streamer": lambda: {"rows": 1, "streamer": Words()},
    "time limit": lambda: {"max_time": 600.0},
}

REFUSED = {
    "beam search": (lambda: {"num_beams": 2}, "log-probabilities, as in beam search; generate with `num_beams=1`"),
    "beam sampling": (lambda: {"num_beams": 2, "do_sample": True}, "as in beam search"),
    "beams and sequences": (lambda: {"num_beams": 3, "num_return_sequences": 2}, "as in beam search"),
    "prompt lookup": (lambda: {"rows": 1, "prompt_lookup_num_tokens": 2}, r"prompt lookup\)"),
    "assistant": (lambda: {"rows": 1, "assistant_model": tiny_llama(seed=1)}, r"\(assisted decoding\)"),
    "itself as assistant": (lambda: {"rows": 1, "assistant_model": "itself"}, r"\(assisted decoding"),
    "early exit": (lambda: {"rows": 1, "assistant_early_exit": 1}, r"\(assisted decoding"),
    "repetition penalty": (lambda: {"repetition_penalty": 1.2}, "pass their processors behind this one"),
    "sequence bias": (lambda: {"sequence_bias": {(3,): 2.0}}, "`sequence_bias`"),
    "guidance": (lambda: {"rows": 1, "guidance_scale": 1.5}, "`guidance_scale`"),
    "length penalty": (
        lambda: {"eos_token_id": 4, "exponential_decay_length_penalty": (2, 1.5)},
        "`repetition_penalty`",
    ),
    "contrastive search": (lambda: {"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
    "group beam search": (
        lambda: {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "trust_remote_code",
    ),
    "constrained beams": (lambda: {"force_words_ids": [[5]], "num_beams": 2}, "trust_remote_code"),
    "DoLa": (lambda: {"dola_layers": "high"}, "trust_remote_code"),
}


@pytest.fixture(params=["untied", "tied", "bias"])
def model(request):
    return tiny_llama(head_bias=request.param == "bias", tie=request.param == "tied")


def run(model, processor, *, rows=3, behind=(), **settings):
    """Generate from the prompts, padded on the left, and note what the processor gave."""
    recorder = Recorder()
    width = max(map(len, PROMPTS[:rows]))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in PROMPTS[:rows]])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS[:rows]])
    if settings.get("assistant_model") == "itself":
        settings["assistant_model"] = model
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(
            ids,
            **{"attention_mask": mask, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": EOS}
            | {"return_dict_in_generate": True, "logits_processor": [processor, recorder, *behind]}
            | settings,
        )
    return result.sequences[:, width:], recorder


@pytest.mark.parametrize("mode", RIGHT)
def test_right(mode, model):
    settings = RIGHT[mode]()
    with TTTLogitsProcessor(model, LR) as processor:
        tokens, recorder = run(model, processor, **settings)
    repeats = settings.get("num_return_sequences", 1)
    prompts = [prompt for prompt in PROMPTS[: settings.get("rows", 3)] for _ in range(repeats)]
    expected = reference_logits(model, prompts, tokens.tolist(), lr=LR)
    found = recorder.stacked()
    assert found.dtype == torch.float32
    ended = settings.get("eos_token_id", [])
    for row, response in enumerate(tokens.tolist()):
        length = next((at for at, token in enumerate(response, 1) if token in ended), len(response))
        allowed = found[row, :length] > -torch.inf
        assert allowed.any(-1).all()
        if mode == "forced end":
            length -= 1
        torch.testing.assert_close(
            found[row, :length][allowed[:length]], expected[row, :length][allowed[:length]], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("mode", REFUSED)
def test_refused(mode, model):
    make, message = REFUSED[mode]
    weights = copy.deepcopy(model.state_dict())
    with (
        TTTLogitsProcessor(model, LR) as processor,
        pytest.raises((ValueError, RuntimeError), match=message),
    ):
        run(model, processor, **make())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not model.lm_head._forward_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("mode", RIGHT)
def test_a_step_size_of_zero_is_plain_generate_bit_for_bit(mode):
    model = tiny_llama(head_bias=True)
    with TTTLogitsProcessor(model, 0.0, radius=1.0) as processor:
        tokens, recorder = run(model, processor, **RIGHT[mode]())
    plain, expected = run(model, lambda input_ids, scores: scores, **RIGHT[mode]())
    assert torch.equal(tokens, plain)
    for found, wanted in zip(recorder.scores, expected.scores):
        assert found.isneginf().sum() == wanted.isneginf().sum()
        if mode != "forced end":
            assert torch.equal(found, wanted)


def test_continuous_batching_is_refused(caplog):
    # The host runs it in a thread, logs what that raises, and returns the prompt alone.
    model = tiny_llama()
    prompt = torch.tensor([[5, 3, 9]])
    little = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # or it takes most of the memory there is
    paged = {"cache_implementation": "paged", "continuous_batching_config": little}
    with TTTLogitsProcessor(model, LR) as processor, caplog.at_level(logging.ERROR):
        logger = logging.getLogger("ContinuousBatchingLogger")
        logger.addHandler(caplog.handler)
        try:
            ids = model.generate(prompt, max_new_tokens=3, logits_processor=[processor], **paged)
        finally:
            logger.removeHandler(caplog.handler)
    assert ids.flatten().tolist() == [5, 3, 9]
    assert "Test-time training does not work with continuous batching" in caplog.text


def test_a_streamer_gets_every_token_and_its_end():
    model, words = tiny_llama(), Words()
    with TTTLogitsProcessor(model, LR) as processor:
        tokens, _ = run(model, processor, rows=1, streamer=words)
    assert words.ended
    assert torch.equal(torch.cat([token.flatten() for token in words.tokens])[len(PROMPTS[0]) :], tokens[0])
