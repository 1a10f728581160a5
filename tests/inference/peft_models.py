"""A model with adapters, by every method of the installed PEFT, whose weights are not those that change nothing."""

import copy

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.inference.odd_models import SMALL, shaken

# Arguments without which a configuration is refused, or fits no model as small as these.
_PROMPT = {"num_virtual_tokens": 4}
ARGUMENTS = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAMSS": {"num_subspaces": 2, "subspace_rank": 2, "r": 8},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": _PROMPT,
    "CPT": {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {**_PROMPT, "num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "P_TUNING": {**_PROMPT, "encoder_hidden_size": 16},
    "POLY": {"n_tasks": 2, "n_splits": 2, "n_skills": 2},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 2},
    "TINYLORA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 12)), "target_modules": None},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
TARGETS = ["q_proj", "v_proj", "down_proj", "fc2"]
NORMS = ["norm", "final_layer_norm"]


def llama():
    torch.manual_seed(0)
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))


def opt():
    """Learned positions, biases, and a head that is the input embedding."""
    torch.manual_seed(0)
    sizes = {"ffn_dim": 32, "word_embed_proj_dim": 16}
    return shaken(transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, **sizes)))


def mistral():
    """A window of a few tokens, and a head that is the input embedding."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 7, "tie_word_embeddings": True}
    return shaken(transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, **sizes)))


FAMILIES = {"llama": llama, "mistral": mistral, "opt": opt}


def adapted(model, method, folder, seed=1, **arguments):
    """The model with an adapter of a method, so far from where it begins that the model says something else."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    targets = {"target_modules": NORMS if method == "LN_TUNING" else TARGETS}
    arguments = (
        (targets if "target_modules" in kind.__dataclass_fields__ else {}) | ARGUMENTS.get(method, {}) | arguments
    )
    if method == "XLORA":
        loras = adapted(copy.deepcopy(model), "LORA", folder), adapted(copy.deepcopy(model), "LORA", folder, seed=2)
        for name, lora in enumerate(loras):
            lora.save_pretrained(folder / str(name))
        arguments = {"hidden_size": 16, "adapters": {name: str(folder / name) for name in "01"}}
        model.config.use_cache = False  # as it wants
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **arguments))
    return stirred(model, seed)


def stirred(model, seed=1):
    """A model whose adapters are not what they began as."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
