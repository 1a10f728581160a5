"""Every causal architecture of the installed transformers: scored and sampled as each row alone is, or refused."""

import re

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.sampler import Sampler, Sampling
from hf_coverage.measure.scoring import score_encoded
from tests.inference.odd_models import SMALL, VOCABULARY, alone, shaken

SIZES = SMALL | {
    **dict.fromkeys(("head_dim", "num_key_value_heads"), 2),
    **dict.fromkeys(
        ("n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "dim_model", "moe_intermediate_size"), 16
    ),
    **dict.fromkeys(("n_layer", "num_layers", "n_layers", "n_head", "num_heads", "n_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 32),
    **dict.fromkeys(("decoder_layers", "decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "state_size", "rotary_dim"), 4),
    "head_dim": 8,
    "n_positions": 128,
    "encoder_layers": 1,
    "shared_expert_intermediate_size": 16,
    "is_decoder": True,
}
MOST_PARAMETERS = 3_000_000

# Why no number is given; whatever is not here has to be right.
NOT_SCORED = {
    "cpmant": "is not causal",  # its prompts are read both ways
    "xlm": "is not causal",  # unless its configuration says so
    "xlstm": "has wrong shape",  # its cache takes no single token
}
NO_CACHE = "`get_seq_length` can only be called on Attention layers"  # of few layers, none attends
NOT_SAMPLED = dict.fromkeys(("cpmant", "xlm"), "changes with the tokens after it")


def small(kind):
    """A model of an architecture with few parameters; skips those that these sizes do not fit."""
    try:
        config = CONFIG_MAPPING[kind]()
        config = type(config)(**{name: value for name, value in SIZES.items() if hasattr(config, name)})
        (name,) = np.atleast_1d(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])[:1]
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in getattr(transformers, name)(config).parameters())
        if size > MOST_PARAMETERS:
            pytest.skip(f"stays at {size:,} parameters")
        torch.manual_seed(0)
        model = shaken(getattr(transformers, name)(config))
        alone(model, EncodedCorpus([[5, 6, 7]], [[8, 9]]))
    except Exception as error:  # an architecture's own checks raise what they like
        pytest.skip(f"cannot be made so small: {type(error).__name__}")
    return model


def rows(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


def outcome(call):
    """What a call returns, or else why it refuses."""
    try:
        return call(), ""
    except (ValueError, RuntimeError) as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a hundred and fifty other people's models
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_row_has_the_score_that_it_has_alone_or_none(kind):
    model = small(kind)
    shared, *others = rows(12, 5, 6, 24)
    encoded = EncodedCorpus([shared] * 3 + others, rows(5, 8, 3, 4, 3, 8, seed=1))
    scores, refusal = outcome(lambda: score_encoded(model, encoded))
    if scores is None:
        assert re.search(NOT_SCORED.get(kind, NO_CACHE), refusal), refusal
    else:
        np.testing.assert_allclose(scores.logprob, alone(model, encoded), atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_sample_has_the_density_that_it_has_alone_or_none(kind):
    model = small(kind)
    long, middle, short = rows(17, 9, 2)
    prompts = [long] * 3 + [middle] * 2 + [short]
    sampler = Sampler(model, Sampling(max_new_tokens=6, eos_token_ids=(2,)), batch_size=4, seed=1)
    samples, refusal = outcome(lambda: sampler.draw(prompts))
    if samples is None:
        assert re.search(NOT_SAMPLED.get(kind) or NOT_SCORED.get(kind, NO_CACHE), refusal), refusal
    else:
        expected = alone(model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
        np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-3)
