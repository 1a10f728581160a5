"""What the theorems need to know of a model and a corpus: B and the inherent variance of its output head, and the norm
of the gradients that training steps along.

For logits `W h_t` the features of the linear model are `phi(x, y_1..t) = e_{y_t} (x) h_t`, of norm ||h_t||, and

    s2 = E_D sum_t ||h_t||^2 (1 - sum_v q_v^2)                      expectation form
       = E_D sum_t ||h_t||^2 (1 - 2 q_{y_t} + sum_v q_v^2)          sample form, y_t ~ q

with q = D(. | x, y_<t). Where D's q is not known, the model's own p takes its place, and the two forms come apart.
The expectation form is then the variance that the model believes in. The sample form stays a mean over D's tokens, and
is too large on average, never too small: it measures the spread around the model's mean in place of D's own,

    E_{y ~ D} ||e_y - p||^2 = E_{y ~ D} ||e_y - q||^2 + ||q - p||^2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_coverage.functional.checks import check_count
from hf_coverage.functional.gradients import global_norm
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.functional.statistics import MeanEstimate, clustered_mean, mean_interval, row_weights
from hf_coverage.functional.step_sizes import LinearProblem
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, inference
from hf_coverage.inference.forward_batches import Limits, build_step, plan_batches
from hf_coverage.inference.output_head import OutputHead
from hf_coverage.inference.processes import map_over_processes
from hf_coverage.inference.self_check import Reading
from hf_coverage.measure.reference import read_reference
from hf_coverage.measure.scoring import score_responses

__all__ = [
    "COLUMNS",
    "InherentVariance",
    "estimate_inherent_variance",
    "gradient_norms",
    "measure_inherent_variance",
    "require_linear_head",
]

COLUMNS = ("hidden_norm", "inherent_variance", "sampled_variance", "num_tokens")
"""What the constants are computed from, one number a row."""


@dataclass(frozen=True)
class InherentVariance:
    """What a corpus shows of the constants of an output head.

    Attributes:
        feature_norm: `max_t ||h_t||` over the response positions of the corpus; with a bias, of (h_t, 1).
        expected: s2 of a response in the expectation form, with its standard error over groups of rows.
        sampled: s2 in the sample form.
        has_teacher: Whether q is a teacher's, which is D's, or the model's own.
        num_rows: Responses.
        mean_length: Their mean number of tokens.
    """

    feature_norm: float
    expected: MeanEstimate
    sampled: MeanEstimate
    has_teacher: bool
    num_rows: int
    mean_length: float

    @property
    def estimate(self) -> MeanEstimate:
        """The inherent variance: the expectation form where q is D's, or else the sample form, which is cautious."""
        return self.expected if self.has_teacher else self.sampled

    @property
    def per_token(self) -> float:
        """The inherent variance divided by the mean number of tokens of a response."""
        return self.estimate.mean / self.mean_length

    def interval(self, form: MeanEstimate | None = None, *, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided Student-t interval of a form of s2, by default of `estimate`, not below 0; NaN with one group."""
        low, high = mean_interval(form or self.estimate, confidence)
        return float(np.maximum(low, 0.0)), float(high)

    def problem(self, radius: float) -> LinearProblem:
        """What the theorems need, for a head that stays in a ball of this radius."""
        return LinearProblem(self.feature_norm, self.estimate.mean, radius)


def measure_inherent_variance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    *,
    teacher: nn.Module | None = None,
    group_by: str | None = None,
    **scoring: Any,
) -> InherentVariance:
    """Measure `max_t ||h_t||` and the inherent variance of a model's output head on a corpus.

    One scoring pass, see `score_responses`: response tokens alone count, the logits are taken in chunks, a job of
    several processes shares the rows, and with an `output_dir` an interrupted one goes on. Values of tokens are
    float32, sums float64.

    Args:
        model: Causal language model with a linear output head, tied or not.
        tokenizer: Its tokenizer; may be None for a corpus of token ids.
        corpus: Dataset with `prompt` and `completion`.
        teacher: Causal language model of the same vocabulary that the responses were sampled from: q is its
            distribution. None: q is the model's own.
        group_by: Column whose equal values make rows dependent; None: `document` where there is one, or `prompt`.
        scoring: As for `score_responses`: `append_eos`, `batch_tokens`, `output_dir`, `progress`, ...

    Returns:
        The constants.

    Raises:
        ValueError: If the model has no linear output head or changes its logits afterwards, or as for
            `score_responses`.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2], [3, 4]], "completion": [[3, 4, 5], [6]]})
        >>> found = measure_inherent_variance(model, None, corpus, progress=False)
        >>> round(found.feature_norm, 2), round(found.estimate.mean, 1), found.mean_length
        (2.81, 14.2, 2.0)

    References:
        arXiv 2510.15020, Equation (8).
    """
    require_linear_head(model)
    reference = read_reference(corpus, group_by)
    scored = score_responses(model, tokenizer, corpus, teacher=teacher, head_statistics=True, **scoring)
    columns = {name: np.asarray(scored[name][:]) for name in COLUMNS}
    return estimate_inherent_variance(columns, groups=reference.groups, has_teacher=teacher is not None)


def estimate_inherent_variance(
    columns: Mapping[str, ArrayLike],
    *,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    weights: ArrayLike | None = None,
    has_teacher: bool = False,
) -> InherentVariance:
    """Put the constants together from what `score_responses(..., head_statistics=True)` adds to each row.

    Args:
        columns: `hidden_norm`, `inherent_variance`, `sampled_variance` and `num_tokens`, `(R,)` each.
        groups: `(R,)` labels; rows that share one are not independent. None takes every row as its own group.
        weights: `(R,)` non-negative row weights.
        has_teacher: Whether a teacher was given.

    Returns:
        The constants.

    Example:
        >>> columns = {"hidden_norm": [2.0, 3.0], "inherent_variance": [4.0, 8.0], "num_tokens": [2, 4]}
        >>> found = estimate_inherent_variance(columns | {"sampled_variance": [5.0, 9.0]})
        >>> found.feature_norm, found.estimate.mean, found.per_token
        (3.0, 7.0, 2.3333333333333335)
    """
    norms, expected, sampled, tokens = (np.asarray(columns[name], dtype=np.float64) for name in COLUMNS)
    return InherentVariance(
        feature_norm=float(norms.max()),
        expected=clustered_mean(expected, groups=groups, weights=weights),
        sampled=clustered_mean(sampled, groups=groups, weights=weights),
        has_teacher=has_teacher,
        num_rows=len(norms),
        mean_length=float(np.average(tokens, weights=row_weights(weights, len(tokens)))),
    )


def require_linear_head(model: nn.Module) -> OutputHead:
    """Find the output head of a model whose logits are `W h_t`, plus a bias where there is one.

    Raises:
        ValueError: If the model has no output head, its head is not linear, or its logits are not the head's.
    """
    forward = HeadForward(model)
    name = type(forward.model).__name__
    if not forward.head.linear:
        raise ValueError(
            f"`model` must have a linear output head, whose features are e_y (x) h_t, but that of {name} is a "
            f"{forward.head.description}. Merge adapters first (`merge_and_unload`)."
        )
    with inference(forward.model):
        if not forward.probe().plain_head:
            raise ValueError(
                f"`model` must return its logits as its output head gives them, but {name} changes them afterwards "
                "(scaling or soft-capping) or spreads its head over processes: its features are not known. Turn that "
                "off in its configuration, or load it whole."
            )
    return forward.head


def gradient_norms(
    model: nn.Module,
    encoded: EncodedCorpus,
    *,
    batch_size: int,
    num_batches: int = 8,
    seed: int = 0,
    batch_tokens: int = 1024,
) -> NDArray[np.float64]:
    """Measure `||g||` of some minibatches: `g = 1/K sum_i sum_h grad log p(y_ih | x_i, y_i<h)`.

    One Euclidean norm over all trainable parameters, as `NormalizedSGD` takes it: what lambda is to be compared with.
    Dropout is off. A job of several processes shares the minibatches. The model comes back as it was, its gradients
    too; this one takes as much memory as the parameters, in float32 at least.

    Args:
        model: Causal language model, whole on each process.
        encoded: Token ids.
        batch_size: K, sequences in a minibatch, drawn without replacement.
        num_batches: How many minibatches.
        seed: Of the draws.
        batch_tokens: Token positions in one backward pass, padding included; a longer row runs alone.

    Returns:
        The norms `(num_batches,)`, on every process.

    Raises:
        ValueError: If a number is below 1, `batch_size` exceeds the rows, nothing can be trained, or the model's
            parameters are spread over processes.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> encoded = EncodedCorpus(prompts=[[1, 2], [3]], completions=[[3, 4, 5], [6, 7]])
        >>> gradient_norms(model, encoded, batch_size=2, num_batches=1).round(1)
        array([4.9])

    References:
        arXiv 2510.15020, Equations (14), (17).
    """
    for name, value in (("batch_size", batch_size), ("num_batches", num_batches), ("batch_tokens", batch_tokens)):
        check_count(value, name)
    check_count(seed, "seed", least=0)
    if batch_size > len(encoded):
        raise ValueError(
            f"`batch_size` must be at most the {len(encoded)} rows of the corpus, but is {batch_size}: give more "
            "rows, or a smaller minibatch."
        )
    forward = HeadForward(model)
    if forward.sharded:
        raise ValueError("`model` must be whole on each process, but it is sharded: load it without FSDP.")
    parameters = [parameter for parameter in forward.model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`model` has no trainable parameters; set `requires_grad_(True)` on those to train.")
    rng = np.random.default_rng(seed)
    minibatches = [rng.choice(len(encoded), batch_size, replace=False).tolist() for _ in range(num_batches)]

    def norm(rows: list[int]) -> float:
        return float(global_norm(_gradient(forward, parameters, encoded, rows, batch_tokens)))

    with inference(forward.model), torch.enable_grad():
        return np.array(map_over_processes(norm, minibatches))


def _gradient(
    forward: HeadForward, parameters: list[Tensor], encoded: EncodedCorpus, rows: Sequence[int], batch_tokens: int
) -> list[Tensor]:
    """Gradient of the mean log-probability of some sequences."""
    gradient = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    # Without a bound on positions no row is cut: its segments would need one another's gradients.
    limits = Limits(batch_tokens, sys.maxsize)
    for batch in plan_batches(encoded, rows, limits, reading=Reading.PADDED):
        first = np.cumsum([0, *(len(encoded.completions[row]) for row in batch.rows[:-1])])
        step = build_step(encoded, batch.rows, first, 0, batch.cuts[0], context=0)
        logits = forward(step.ids, step.positions).take_logits(slice(None))
        pick, labels = (torch.from_numpy(part).to(logits.device) for part in (step.pick, step.labels))
        logprob = token_logprobs(logits[pick], labels).sum() / len(rows)
        parts = torch.autograd.grad(logprob, parameters, allow_unused=True)
        for total, part in zip(gradient, parts):
            if part is not None:
                total += part
    return gradient
