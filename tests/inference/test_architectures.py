"""Every causal architecture of the installed transformers: scored and sampled as each row alone is, or refused."""

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
MOST_PARAMETERS = 5_000_000

# What some architectures want beside these sizes, or instead of them; None: nothing.
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
ROUTED = {"n_group": 1, "topk_group": 1}
INDEXED = LATENT | ROUTED | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
VISION = {
    **dict.fromkeys(("num_hidden_layers", "num_global_layers", "depth", "num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "output_channels", "out_hidden_size", "vision_output_dim"), 16),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "image_size"), 32),
    "patch_size": 16,
}
FIT = {
    "axk1": LATENT | ROUTED,
    "bamba": MAMBA,
    "deepseek_v3": LATENT | ROUTED,
    "deepseek_v32": INDEXED,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "dots3_note": INDEXED | {"shared_experts_intermediate_size": 16},
    "dots3_note_text": INDEXED | {"shared_experts_intermediate_size": 16},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4},
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "hy_v4": INDEXED,
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": LATENT
    | {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "mimo_v2_flash": {"v_head_dim": 8, "head_dim": 24, "num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 1, "num_decoder_layers": 2},
    "reformer": {
        "axial_pos_embds_dim": (8, 8),
        "axial_pos_shape": (8, 16),
        "attention_head_size": 8,
        "feed_forward_size": 32,
        "attn_layers": ("local", "local"),
        "num_hidden_layers": None,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
    },
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "sarvam_mla": LATENT | ROUTED,
    "youtu": LATENT,
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 8,
        "mamba_d_state": 4,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
FIT["gemma4_unified_text"] = FIT["gemma4_text"]

# Those that are not tried, and why.
NOT_MADE = {
    "blt": "reads bytes in patches, by four models with sizes of their own",
    "dbrx": "its attention's configuration lacks what its model reads (`rope_theta`)",
    "gemma3n": "needs `timm`",
    "gemma4": "its parts for images and sound have sizes of their own; gemma4_text is here",
    "gemma4_assistant": "drafts for another model, whose keys and values it is given",
    "gemma4_unified": "its parts for images and sound have sizes of their own; gemma4_unified_text is here",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it is given",
    "mimo_v2_flash": "its layers have heads in numbers of their own",
    "musicgen": "reads four codebooks, not tokens",
    "musicgen_melody": "reads four codebooks, not tokens",
    "phi4_multimodal": "its parts for images and sound have sizes of their own",
    "zamba": "its own tied weights do not fit few layers",
}
# Why no number is given: they are not causal, some only as they are configured by default. Whatever is not here has
# to be right.
REFUSED = {"cpmant", "prophetnet", "xlm", "xlnet"}


def sizes(config, kind):
    """The small sizes that a configuration knows of."""
    known = {*dir(config), *config.attribute_map}
    chosen = {name: value for name, value in SIZES.items() if name in known} | FIT.get(kind, {})
    return {name: value for name, value in chosen.items() if value is not None}


def configuration(kind, model):
    """A small configuration of a model, as `AutoModelForCausalLM` gives it one: of its language part where it can."""
    parts = CONFIG_MAPPING[kind].sub_configs
    of_text = type(CONFIG_MAPPING[kind]().get_text_config()) if "text_config" in parts else None
    if of_text not in (None, model.config_class):
        text = sizes(of_text(), of_text.model_type)
        others = {name: VISION for name, part in parts.items() if name != "text_config"}
        return CONFIG_MAPPING[kind](text_config=text | {"model_type": of_text.model_type}, **others)
    known = model.config_class
    if "vision_config" in known.sub_configs:
        return known(vision_config=VISION, **sizes(known(), kind))
    return known(**sizes(known(), kind))


def small(kind):
    """A model of an architecture with few parameters."""
    (name,) = np.atleast_1d(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])[:1]
    if kind in NOT_MADE:
        pytest.skip(NOT_MADE[kind])
    config = configuration(kind, getattr(transformers, name))
    with torch.device("meta"):
        assert sum(part.numel() for part in getattr(transformers, name)(config).parameters()) < MOST_PARAMETERS
    torch.manual_seed(0)
    model = shaken(getattr(transformers, name)(config))
    alone(model, EncodedCorpus([[5, 6, 7]], [[8, 9]]))
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
        assert kind in REFUSED, refusal
        # One of them predicts several tokens at each position, with as many hidden states.
        causal = "is not causal: log p of a token changes with the tokens after it"
        assert ("got (1, 2, 1, 16); this architecture cannot" if kind == "prophetnet" else causal) in refusal
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
        assert kind in REFUSED, refusal
        assert "what it says of a token changes with the tokens after it" in refusal
    else:
        expected = alone(model, EncodedCorpus(prompts, [sample.ids for sample in samples]))
        np.testing.assert_allclose([sample.logprob for sample in samples], expected, atol=1e-3)
