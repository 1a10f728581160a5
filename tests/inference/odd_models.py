"""Models that are not what scoring and sampling take them for."""

import numpy as np
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_coverage.inference.forward import inference
from hf_coverage.inference.prefix_cache import CACHE

VOCABULARY = 37


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def shaken(model, seed=0):
    """The usual initialisation gives nearly uniform distributions, which hide faults."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def llama(**arguments):
    torch.manual_seed(0)
    return shaken(LlamaForCausalLM(LlamaConfig(**SMALL, **arguments)))


def alone(model, encoded):
    """One row at a time, all logits, float64 log-softmax."""
    result = []
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        ids = torch.tensor([[*prompt, *completion[:-1]]])
        with inference(model):
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 :]
        result.append(logprobs[torch.arange(len(completion)), completion].sum().item())
    return np.array(result)


class BatchScaled(nn.Module):
    """A head behind a quantisation of its inputs, whose scale is the largest one along some axes."""

    def __init__(self, inner, axes):
        super().__init__()
        self.inner, self.axes = inner, axes

    def forward(self, hidden):
        scale = hidden.abs().amax(self.axes, keepdim=True) / 7
        return self.inner((hidden / scale).round() * scale)


def quantised(*axes):
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = BatchScaled(layer.mlp.down_proj, axes)
    return model


class ForgetsItsCache(LlamaForCausalLM):
    """Replaces the cache it is given, as adapters that bring keys and values of their own do."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **(kwargs | {CACHE: None}))


def subclass(kind):
    torch.manual_seed(0)
    return shaken(kind(LlamaConfig(**SMALL)))


def bert(kind="BertLMHeadModel", **arguments):
    torch.manual_seed(0)
    return shaken(getattr(transformers, kind)(transformers.BertConfig(**SMALL, **arguments)))


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes, **tokens)
    return shaken(transformers.BartForConditionalGeneration(config))
