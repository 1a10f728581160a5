"""Test-time training by its definition: for each row alone, autograd on a copy of the head that is really changed."""

import copy

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from hf_coverage.inference.prefix_cache import CACHE


def tiny_llama(*, head_bias=False, tie=False, seed=0):
    """A random Llama over 13 tokens whose distributions are neither flat nor peaked."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    if head_bias:
        model.lm_head = nn.Linear(16, 13)
        nn.init.normal_(model.lm_head.weight, std=0.3)
        nn.init.normal_(model.lm_head.bias, std=0.3)
    return model


class AutogradRow:
    """One sequence and its own head.

    Args:
        model: A model whose last hidden state is its head's input.
        prompt: Token ids, without padding.
        lr: Step size.
        radius: R of the ball around the start.
        decay: Part of the way back to the start before every step.
        on_prompt: Whether to take a step after every token of the prompt as well.
        num_steps: Steps on each token.
        cache: Whether the backbone keeps its keys and values, or reads the whole prefix again for each token.
    """

    def __init__(self, model, prompt, *, lr, radius=None, decay=0.0, on_prompt=False, cache=False, num_steps=1):
        self.model, self.lr, self.radius, self.decay = model, lr, radius, decay
        self.num_steps = num_steps
        self.cache, self.read, self.hidden = DynamicCache() if cache else None, 0, None
        self.start = copy.deepcopy(model.get_output_embeddings()).float()
        self.head = copy.deepcopy(self.start).requires_grad_(True)
        self.ids = list(prompt)
        if on_prompt:
            self.ids = [prompt[0]]
            for token in prompt[1:]:
                self.step(token)

    def logits(self):
        if self.read < len(self.ids):
            start = self.read if self.cache is not None else 0
            with torch.no_grad():
                self.hidden = self.model(
                    torch.tensor([self.ids[start:]]),
                    use_cache=self.cache is not None,
                    output_hidden_states=True,
                    **{CACHE: self.cache},
                ).hidden_states[-1][0, -1]
            self.read = len(self.ids)
        return self.head(self.hidden.float())

    def step(self, token):
        """Move on a token, and return its log-probability before."""
        before = float(self.logits().detach().log_softmax(-1)[token])
        for _ in range(self.num_steps):
            gradients = torch.autograd.grad(self.logits().log_softmax(-1)[token], list(self.head.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(self.head.parameters(), gradients):
                    parameter.add_(gradient, alpha=self.lr)
                self.pull_back(gradients)
        self.ids.append(int(token))
        return before

    def pull_back(self, gradients):
        """Decay what was there before these gradients, and project."""
        if not self.decay and self.radius is None:
            return
        moved = [
            (1 - self.decay) * (parameter - start - self.lr * gradient) + self.lr * gradient
            for parameter, start, gradient in zip(self.head.parameters(), self.start.parameters(), gradients)
        ]
        norm = float(torch.stack([change.norm() for change in moved]).norm())
        factor = 1.0 if self.radius is None else min(1.0, self.radius / max(norm, 1e-30))
        for parameter, start, change in zip(self.head.parameters(), self.start.parameters(), moved):
            parameter.copy_(start + factor * change)


def reference_logits(model, prompts, responses, **settings):
    """Logits `(B, T, V)` before each token of given responses, all of one length."""
    lines = []
    for prompt, response in zip(prompts, responses):
        row, line = AutogradRow(model, prompt, **settings), []
        for token in response:
            line.append(row.logits().detach())
            row.step(token)
        lines.append(torch.stack(line))
    return torch.stack(lines)


def reference_sample(model, prompts, *, steps, do_sample, **settings):
    """Sample all rows together, as `generate` does without end-of-sequence tokens: ids and logits `(B, T, V)`."""
    rows, seen, chosen = [AutogradRow(model, prompt, **settings) for prompt in prompts], [], []
    for _ in range(steps):
        logits = torch.stack([row.logits().detach() for row in rows])
        tokens = torch.multinomial(logits.softmax(-1), 1)[:, 0] if do_sample else logits.argmax(-1)
        for row, token in zip(rows, tokens):
            row.step(token)
        seen.append(logits)
        chosen.append(tokens)
    return torch.stack(chosen, dim=1), torch.stack(seen, dim=1)


class Recorder(LogitsProcessor):
    """Keeps what comes out of the processor before it, and may hold the decoding to given tokens."""

    supports_continuous_batching = False

    def __init__(self, forced=None):
        self.scores, self.forced = [], forced

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        if self.forced is not None:
            token = self.forced[:, len(self.scores) - 1, None]
            return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
        return scores

    def stacked(self):
        return torch.stack(self.scores, dim=1)
