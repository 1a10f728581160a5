"""What scoring gives: one number per response, and what else was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

__all__ = ["PER_TOKEN_COLUMNS", "Scores"]

PER_TOKEN_COLUMNS = ("token_logprobs", "token_kl")
"""Columns with one value per response token."""

_FEATURES = {
    "logprob": Value("float64"),
    "num_tokens": Value("int64"),
    "token_logprobs": List(Value("float32")),
    "token_kl": List(Value("float32")),
    "hidden_norm": Value("float64"),
    "inherent_variance": Value("float64"),
    "sampled_variance": Value("float64"),
    "interval_low": Value("float64"),
}


@dataclass(frozen=True)
class Scores:
    """Scores of R responses, in the order of the corpus. All in nats.

    Args:
        logprob: Log p(y|x) of each whole response `(R,)`, float64; `-inf` where the model excludes it.
        num_tokens: Response tokens `(R,)`, int64.
        token_logprobs: For each row its tokens' log-probabilities `(H_r,)`, float32.
        token_kl: For each row KL(teacher || model) of the next-token distributions at its tokens `(H_r,)`, float32.
        hidden_norm: Largest norm of the head's input h_t over the response's positions `(R,)`, float64. Here and below
            a head with a bias has one more input, which is always 1.
        inherent_variance: `sum_t ||h_t||^2 (1 - sum_v q_v^2)` `(R,)`, float64.
        sampled_variance: `sum_t ||h_t||^2 (1 - 2 q_{y_t} + sum_v q_v^2)` `(R,)`, float64.
        interval_low: Where each response's interval of arithmetic codes, of length p(y|x), begins `(R,)`, float64.

    Example:
        >>> scores = Scores(logprob=np.array([-1.5]), num_tokens=np.array([2]))
        >>> scores.to_dataset()[0]
        {'logprob': -1.5, 'num_tokens': 2}
    """

    logprob: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    token_logprobs: list[NDArray[np.float32]] | None = None
    token_kl: list[NDArray[np.float32]] | None = None
    hidden_norm: NDArray[np.float64] | None = None
    inherent_variance: NDArray[np.float64] | None = None
    sampled_variance: NDArray[np.float64] | None = None
    interval_low: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.logprob)

    def columns(self) -> dict[str, Any]:
        """The columns that were computed, by name."""
        return {name: column for name, column in vars(self).items() if column is not None}

    def to_dataset(self) -> Dataset:
        """The columns as a `datasets.Dataset`."""
        columns = self.columns()
        return Dataset.from_dict(columns, features=Features({name: _FEATURES[name] for name in columns}))

    def take(self, places: NDArray[np.int64]) -> Scores:
        """The scores of some of the rows, in the order asked for."""
        taken: dict[str, Any] = {}
        for name, column in self.columns().items():
            taken[name] = [column[place] for place in places] if name in PER_TOKEN_COLUMNS else column[places]
        return Scores(**taken)

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """Join the scores of consecutive rows."""
        joined: dict[str, Any] = {}
        for name in parts[0].columns():
            columns = [getattr(part, name) for part in parts]
            joined[name] = list(chain(*columns)) if name in PER_TOKEN_COLUMNS else np.concatenate(columns)
        return Scores(**joined)
