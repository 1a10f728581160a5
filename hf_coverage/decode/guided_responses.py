"""What decoding under a process verifier gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import FloatArray

__all__ = ["GuidedResponses"]


@dataclass(frozen=True, eq=False)
class GuidedResponses:
    """R responses to one prompt, and what each of them cost.

    Attributes:
        responses: their tokens, the end-of-sequence token included where there is one.
        texts: the same as text; None without a tokenizer.
        logprobs: `(R,)` log p(y|x) under the sampling distribution, nats.
        values: `(R,)` V; NaN for an empty response that was not judged.
        finished: `(R,)` whether it is a whole response.
        exhausted: `(R,)` whether the budget ran out before the method was done. A walk then gives the last whole
            response it was at, if there was one; other methods give what they had so far.
        model_calls: `(R,)` prefixes whose next-token distribution it asked for.
        verifier_calls: `(R,)` prefixes whose value it asked for.
        steps: `(R,)` steps or choices made.
        starts: `(R,)` how often it began at the prompt.
        computed_model_calls: prefixes that the model did read for all of them together: what is shared or remembered
            is read once.
        computed_verifier_calls: prefixes that the verifier did judge.
    """

    responses: list[list[int]]
    texts: list[str] | None = field(repr=False)
    logprobs: FloatArray = field(repr=False)
    values: FloatArray = field(repr=False)
    finished: NDArray[np.bool_] = field(repr=False)
    exhausted: NDArray[np.bool_] = field(repr=False)
    model_calls: NDArray[np.int64] = field(repr=False)
    verifier_calls: NDArray[np.int64] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    computed_model_calls: int
    computed_verifier_calls: int
