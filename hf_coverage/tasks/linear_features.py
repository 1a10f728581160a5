"""Feature maps of the autoregressive linear model: phi(x, y_1..h) for a prefix and every token that may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["FeatureMap", "TableFeatures"]


class FeatureMap(nn.Module, ABC):
    """What a user writes to make a linear model: features of every next token after every prefix.

    A module, so that constants belong into its buffers: they are saved with the model, and follow it to a device. It
    has no trainable parameters; theta is the model's only one.

    Args:
        num_tokens: V, how many tokens can come next: the ids 0 to V - 1.
        num_features: d.
    """

    def __init__(self, num_tokens: int, num_features: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.num_features = num_features

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute `phi(input_ids[b, :t + 1], v)` at `[b, t, v]`.

        Args:
            input_ids: Prompts and responses `(B, T)`, int64, without padding on the left.

        Returns:
            `(B, T, V, d)`. What stands at t may depend on the tokens up to and including t alone.
        """


class TableFeatures(FeatureMap):
    """Features read from a table: by prompt and next token, and by position where the table has that axis.

        phi(x, y_1..h) = table[x, y_h]    or    table[x, h - 1, y_h],    x the id of the first token, the prompt

    Args:
        table: `(X, V, d)` or `(X, H, V, d)`, X the size of the vocabulary. Rows of tokens that are no prompts are not
            read in practice; beyond the H-th token all features are 0, and the next token uniform.

    Raises:
        ValueError: If the table has another number of axes.

    Example:
        >>> import torch
        >>> features = TableFeatures(torch.arange(12.0).reshape(3, 2, 2))
        >>> features(torch.tensor([[2, 0]])).tolist()
        [[[[8.0, 9.0], [10.0, 11.0]], [[8.0, 9.0], [10.0, 11.0]]]]
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        if table.ndim not in (3, 4):
            raise ValueError(
                "`table` must have shape (vocabulary, tokens, features) or (vocabulary, positions, tokens, features), "
                f"got {tuple(table.shape)}."
            )
        super().__init__(table.shape[-2], table.shape[-1])
        self.register_buffer("table", table)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the features up; see the class."""
        rows = self.table[input_ids[:, 0]]
        length = input_ids.shape[1]
        if self.table.ndim == 3:
            return rows.unsqueeze(1).expand(-1, length, -1, -1)
        missing = max(0, length - self.table.shape[1])
        return nn.functional.pad(rows[:, :length], (0, 0, 0, 0, 0, missing))
