"""A step size to begin with for test-time training of a model, from the norm of its gradients.

References:
    arXiv 2510.15020, Theorem 6.1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hf_coverage.functional.gradients import stable_norm
from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.processes import on_main_process
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.ttt.row_networks import row_network, row_passes

__all__ = ["measure_step_size"]

_ROWS = 16
"""Rows to measure on: gradients differ much more between scopes and models than between rows."""


def measure_step_size(model: nn.Module, encoded: EncodedCorpus, config: TTTConfig) -> float:
    """Measure the step size `1 / (2 B^2)` of Theorem 6.1, with which steps on one token are as large as they may be.

        ||grad log p(y)|| <= B ||1_y - p||

    For the output head that holds of B = max ||h||, the feature's norm. What else may be trained has no such constant;
    there it is `sum ||grad log p(y)||^2 / sum ||1_y - p||^2`, over the first tokens of some responses, in its place.

    Args:
        model: Causal language model.
        encoded: What it will be used on; up to 16 of the rows are read.
        config: What is trained; its `lr` does not matter.

    Returns:
        The step size, rounded to two digits, on every process. A search should have it in its middle.

    Raises:
        ValueError: If the scope does not work with this model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11))
        >>> encoded = EncodedCorpus(prompts=[[1, 2]], completions=[[3, 4, 5]])
        >>> [measure_step_size(model, encoded, TTTConfig(0.0, scope=scope)) for scope in ("head", "all")]
        [0.063, 0.021]

    References:
        arXiv 2510.15020, Theorem 6.1.
    """
    rows = np.unique(np.linspace(0, len(encoded) - 1, _ROWS).round().astype(int))
    some = EncodedCorpus([encoded.prompts[row] for row in rows], [encoded.completions[row] for row in rows])
    if config.scope == "head":
        norms = np.array(score_encoded(model, some, head_statistics=True).hidden_norm)
        bound = float(np.square(norms).max())
    else:
        bound = on_main_process(lambda: _squared_ratio(model, some, config))
    if not 0 < bound < np.inf:
        raise ValueError(
            f"`model` has gradients of squared norm {bound} on `encoded`, from which no step size follows; choose one "
            "by hand."
        )
    return float(f"{1 / (2 * bound):.1e}")


def _squared_ratio(model: nn.Module, encoded: EncodedCorpus, config: TTTConfig) -> float:
    network = row_network(model, config)
    gradients = errors = 0.0
    with row_passes(network.model):
        for prompt, completion in zip(encoded.prompts, encoded.completions):
            theta = network.new_parameters(1)
            logprobs = log_softmax(network.logits(theta, torch.tensor([prompt], device=network.device))[0])
            chosen = logprobs[completion[0]]
            found = torch.autograd.grad(chosen, theta, materialize_grads=True)
            gradients += sum(float(stable_norm(part)) ** 2 for part in found)
            errors += float(logprobs.detach().exp().square().sum() - 2 * chosen.detach().exp() + 1)
    return gradients / errors
