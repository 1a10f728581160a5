"""A language model that forgets: what is left of it with a short context."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

__all__ = ["ShortContext"]


class ShortContext(nn.Module):
    """A causal language model that reads a text in blocks of w / 2 tokens, each with the w / 2 before it alone.

    A token is predicted from at least w / 2 others, as far as there are any, and from at most w.

    Args:
        model: The model.
        context: w, an even number.
    """

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.model, self.context = model, context
        self.config = copy.deepcopy(model.config)
        self.config.short_context = context  # part of what its scores are known by

    def get_output_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits `(B, T, V)` of token ids `(B, T)`."""
        half, length = self.context // 2, input_ids.shape[1]
        parts = [self._read(input_ids[:, : self.context])]
        for start in range(half, length - half, half):
            parts.append(self._read(input_ids[:, start : start + self.context])[:, half:])
        return CausalLMOutput(logits=self.get_output_embeddings()(torch.cat(parts, dim=1)))

    def _read(self, ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
