"""Several small GPT-2 models of one architecture, run side by side as one: their parameters are stacked.

A model of 100,000 parameters leaves a processor mostly idle between operations. R of them with parameters `(R, ...)`
take one operation where they would take R, and one optimiser that works elementwise trains all of them, none of which
knows of the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel

__all__ = ["Past", "StackedGPT2"]


class Past(NamedTuple):
    """What R models have read: keys and values of P prompts, and at their last tokens the final states.

    Attributes:
        layers: Keys and values of each layer, `(R, P, heads, T, d / heads)`.
        last: `(R, P, d)`.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    last: Tensor

    def detach(self) -> "Past":
        """The same without its graph."""
        return Past(tuple((keys.detach(), values.detach()) for keys, values in self.layers), self.last.detach())


class StackedGPT2(nn.Module):
    """R copies of GPT-2 with parameters of their own.

    Args:
        models: The models to begin from, of one configuration, without dropout.

    Raises:
        ValueError: If they are not.
    """

    def __init__(self, models: Sequence[GPT2LMHeadModel]) -> None:
        super().__init__()
        config = models[0].config
        others = [model.config for model in models if model.config.to_diff_dict() != config.to_diff_dict()]
        if others:
            raise ValueError(f"`models` must have one configuration, but have {config} and {others[0]}.")
        drops = (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop)
        usual = not config.scale_attn_by_inverse_layer_idx and config.scale_attn_weights and config.tie_word_embeddings
        if any(drops) or not usual or config.activation_function != "gelu_pytorch_tanh":
            raise ValueError(
                "`models` must be GPT-2 with a tied head, the tanh GELU and no dropout: see recipes.pretrain."
            )
        self.num_layers, self.num_heads, self.eps = config.n_layer, config.n_head, config.layer_norm_epsilon
        states = [dict(model.transformer.named_parameters()) for model in models]
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): torch.stack([state[name].detach() for state in states]) for name in states[0]}
        )

    def __len__(self) -> int:
        return len(self.weights["wte/weight"])

    def read(self, prompts: Tensor) -> Past:
        """Read prompts `(R, P, T)`, all of one length."""
        runs, rows, length = prompts.shape
        hidden = self._embed(prompts.flatten(1), torch.arange(length).repeat(rows))
        layers = []
        for layer in range(self.num_layers):
            queries, keys, values = (
                part.view(runs, rows, length, self.num_heads, -1).transpose(2, 3)
                for part in self._projected(layer, hidden)
            )
            layers.append((keys, values))
            if layer == self.num_layers - 1:  # of which nobody reads more than the last state
                queries, hidden = queries[..., -1:, :], hidden.view(runs, rows, length, -1)[:, :, -1]
                mixed = functional.scaled_dot_product_attention(queries, keys, values)
            else:
                mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            hidden = self._rest_of_layer(layer, hidden, mixed.transpose(2, 3).reshape(hidden.shape))
        return Past(tuple(layers), self._norm("ln_f", hidden))

    def states(self, past: Past, tokens: Tensor, kept: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Final states `(R, P, G, T, d)` at the tokens `(R, P, G, T)` of G responses to each prompt.

        Args:
            past: The prompts.
            tokens: The responses, or what comes next of them where `kept` holds their beginnings.
            kept: Keys and values of each layer for the responses, read and replaced; begin with an empty list.
        """
        runs, rows, group, length = tokens.shape
        before = kept[0][0].shape[4] if kept else 0
        start = past.layers[0][0].shape[3] + before
        hidden = self._embed(tokens.flatten(1), torch.arange(start, start + length).repeat(rows * group))
        later = torch.ones(length, before + length, dtype=torch.bool).triu(before + 1)
        for layer, of_prompts in enumerate(past.layers):
            queries, keys, values = (
                part.view(runs, rows, group, length, self.num_heads, -1).transpose(3, 4)
                for part in self._projected(layer, hidden)
            )
            if before:
                keys, values = (torch.cat([old, new], dim=4) for old, new in zip(kept[layer], (keys, values)))
            if kept is not None:
                kept[layer : layer + 1] = [(keys, values)]
            mixed = _attend(queries, of_prompts, (keys, values), later)
            hidden = self._rest_of_layer(layer, hidden, mixed.transpose(3, 4).reshape(hidden.shape))
        return self._norm("ln_f", hidden).view(runs, rows, group, length, -1)

    def logits(self, states: Tensor) -> Tensor:
        """Logits `(R, ..., V)` after final states `(R, ..., d)`."""
        flat = states.flatten(1, -2) @ self.weights["wte/weight"].transpose(1, 2)
        return flat.view(*states.shape[:-1], -1)

    def token_logprobs(self, past: Past, tokens: Tensor, states: Tensor | None = None) -> Tensor:
        """Log-probability, nats, of each token of responses `(R, P, G, T)`, in the same shape.

        Args:
            past: The prompts.
            tokens: The responses.
            states: What `states` gave for them, where it was called.
        """
        after = self.states(past, tokens[..., :-1]) if states is None else states[..., :-1, :]
        first = past.last[:, :, None, None].expand_as(after[..., :1, :])
        logprobs = self.logits(torch.cat([first, after], dim=3)).log_softmax(-1)
        return logprobs.gather(-1, tokens[..., None]).squeeze(-1)

    @torch.no_grad()
    def sample(self, past: Past, codes: Tensor) -> Tensor:
        """Draw responses `(R, P, G, T)`, each token by its own code.

        Args:
            past: The prompts.
            codes: `(R, P, G, T)`, uniform on [0, 1), float64: the part of the next token's cumulative distribution
                that holds the code is taken.
        """
        shape = codes.shape
        logits = self.logits(past.last)[:, :, None].expand(*shape[:3], -1)
        tokens = torch.empty(shape, dtype=torch.int64)
        kept: list[tuple[Tensor, Tensor]] = []
        for place in range(shape[3]):
            if place:
                logits = self.logits(self.states(past, tokens[..., place - 1, None], kept)[..., -1, :])
            cumulative = logits.double().softmax(-1).cumsum(-1)
            # the sum may round to less than a code
            code = codes[..., place, None] * cumulative[..., -1:]
            tokens[..., place] = torch.searchsorted(cumulative, code, right=True).squeeze(-1)
        return tokens

    def clip_gradients(self, limit: float) -> None:
        """Shrink the gradient of each model whose norm is above the limit to it."""
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        shrinkage = (limit / norms).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(shrinkage.view(-1, *[1] * (gradient.dim() - 1)))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings `(R, N, d)` of tokens `(R, N)` at positions `(N,)`."""
        table = self.weights["wte/weight"]
        index = tokens + torch.arange(len(tokens))[:, None] * table.shape[1]
        return functional.embedding(index, table.flatten(0, 1)) + self.weights["wpe/weight"][:, positions]

    def _projected(self, layer: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values `(R, N, d)` of a layer."""
        normed = self._norm(f"h/{layer}/ln_1", hidden)
        return self._linear(f"h/{layer}/attn/c_attn", normed).chunk(3, dim=-1)

    def _rest_of_layer(self, layer: int, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = hidden + self._linear(f"h/{layer}/attn/c_proj", mixed)
        inner = self._linear(f"h/{layer}/mlp/c_fc", self._norm(f"h/{layer}/ln_2", hidden))
        return hidden + self._linear(f"h/{layer}/mlp/c_proj", functional.gelu(inner, approximate="tanh"))

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.weights[f"{name}/bias"][:, None], inputs, self.weights[f"{name}/weight"])

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}/weight"], self.weights[f"{name}/bias"]
        shape = (len(weight), *[1] * (hidden.dim() - 2), -1)
        normed = functional.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)
        return torch.addcmul(bias.view(shape), normed, weight.view(shape))


def _attend(queries: Tensor, of_prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], later: Tensor) -> Tensor:
    """Attention of responses over their prompt, which all of a group share, and over themselves."""
    (keys, values), (own_keys, own_values) = of_prompts, own
    runs, rows, group, heads, length, size = queries.shape
    together = (runs, rows, heads, group * length, -1)
    to_prompt = queries.transpose(2, 3).reshape(together) @ keys.transpose(-1, -2)
    to_prompt = to_prompt.view(runs, rows, heads, group, length, -1).transpose(2, 3)
    to_own = (queries @ own_keys.transpose(-1, -2)).masked_fill(later, -torch.inf)
    weights = (torch.cat([to_prompt, to_own], dim=-1) / size**0.5).softmax(-1)
    to_prompt, to_own = weights.split([keys.shape[3], own_keys.shape[4]], dim=-1)
    from_prompt = to_prompt.transpose(2, 3).reshape(together) @ values
    return from_prompt.view(runs, rows, heads, group, length, size).transpose(2, 3) + to_own @ own_values
