"""Test-time training of adapters and of all parameters by definition: one row, a copy of the model, autograd."""

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_coverage.inference.prefix_cache import CACHE
from tests.ttt.head_reference import tiny_llama

RANK = 3
SMALL = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_model(kind):
    """A random model over 13 tokens, of an architecture that has something of its own."""
    torch.manual_seed(0)
    if kind in ("llama", "tied"):
        return tiny_llama(tie=kind == "tied")
    if kind == "gpt2":  # `Conv1D`, a tied head, dropout
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=13, n_positions=128, initializer_range=0.3)
        model = GPT2LMHeadModel(config)
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SMALL))
    elif kind == "qwen2moe":  # linear layers that get the tokens of all rows in one list
        config = Qwen2MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, **SMALL
        )
        model = Qwen2MoeForCausalLM(config)
    elif kind == "gemma2":  # a sliding window and soft-capped logits
        config = Gemma2Config(head_dim=8, sliding_window=4, final_logit_softcapping=2.0, **SMALL)
        model = Gemma2ForCausalLM(config)
    return model.eval()


def with_adapters(model, starts):
    """A copy of the model with PEFT's own adapters, which start as given, layer after layer."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks the host by an old name, and says what it does about `Conv1D`
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
    layers = [
        module for module in adapted.modules() if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict)
    ]
    assert len(layers) == len(starts)
    for layer, start in zip(layers, starts):
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(start)
    return adapted


class NetworkRow:
    """One sequence and its own network.

    Args:
        model: The network, which is changed; its parameters that need gradients are trained.
        prompt: Token ids, without padding.
        lr: Step size.
        radius: R of the ball around the start.
        decay: Part of the way back to the start before every step.
        lam: Lambda of normalised steps.
        num_steps: Steps on each token.
        on_prompt: Whether to take steps after every token of the prompt as well.
        stale: Whether keys and values stay what they were, or the whole prefix is read again for every step.
    """

    def __init__(
        self, model, prompt, *, lr, radius=None, decay=0.0, lam=None, num_steps=1, on_prompt=False, stale=False
    ):
        self.model, self.lr, self.radius, self.decay, self.lam = model, lr, radius, decay, lam
        self.num_steps, self.stale = num_steps, stale
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.cache = DynamicCache(config=model.config)
        self.kept = self.seen = None
        self.ids = list(prompt[:1]) if on_prompt else list(prompt)
        if stale and len(self.ids) > 1:
            with torch.no_grad():
                self.model(torch.tensor([self.ids[:-1]]), use_cache=True, **{CACHE: self.cache})
        for token in prompt[len(self.ids) :]:
            self.step(token)

    def logits(self):
        """Of the next token; read once for parameters and tokens as they are."""
        if self.seen is None:
            self.seen = self._read()
        return self.seen

    def _read(self):
        if not self.stale:
            return self.model(torch.tensor([self.ids]), use_cache=False).logits[0, -1].float()
        cache = copy.deepcopy(self.cache)
        logits = self.model(torch.tensor([self.ids[-1:]]), use_cache=True, **{CACHE: cache}).logits[0, -1]
        if self.kept is None:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            self.kept = cache
        return logits.float()

    def step(self, token):
        """Move on a token, and return its log-probability before."""
        before = float(self.logits().detach().log_softmax(-1)[token])
        for _ in range(self.num_steps):
            logprob = self.logits().log_softmax(-1)[token]
            gradients = torch.autograd.grad(logprob, self.parameters, allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients)]
            norm = norm_of(gradients)
            size = self.lr if self.lam is None else self.lr / (self.lam + norm)
            with torch.no_grad():
                for parameter, start, gradient in zip(self.parameters, self.start, gradients):
                    parameter.copy_(start + (1 - self.decay) * (parameter - start) + size * gradient)
                if self.radius is not None:
                    away = norm_of([parameter - start for parameter, start in zip(self.parameters, self.start)])
                    for parameter, start in zip(self.parameters, self.start):
                        parameter.copy_(start + min(1.0, self.radius / max(away, 1e-30)) * (parameter - start))
            self.seen = None
        self.ids.append(int(token))
        self.cache, self.kept, self.seen = self.kept, None, None
        return before


def norm_of(tensors):
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def own_network(model, scope, starts=None):
    """A copy of the model, to be trained: of its adapters, or of all parameters."""
    return with_adapters(model, starts) if scope == "lora" else copy.deepcopy(model).requires_grad_(True)


def network_row(model, scope, prompt, *, starts=None, **settings):
    """A row of its own, which leaves the model as it is."""
    return NetworkRow(own_network(model, scope, starts), prompt, **settings)


def network_rows(model, scope, prompts, *, starts=None, **settings):
    """One row after the other in the same copy of the model, which is put back to where it began behind each."""
    own = own_network(model, scope, starts)
    for prompt in prompts:
        row = NetworkRow(own, prompt, **settings)
        yield row
        with torch.no_grad():
            for parameter, start in zip(row.parameters, row.start):
                parameter.copy_(start)
