"""The step size that a model allows, beside loops over its gradients."""

import copy

import numpy as np
import pytest
import torch

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.select.ttt_step_size import measure_step_size
from hf_coverage.ttt.row_networks import RowAdapters
from tests.ttt.head_reference import tiny_llama
from tests.ttt.network_reference import RANK, with_adapters


def draw(rows, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 6, (rows, 2))
    tokens = np.random.default_rng(seed + 1)
    return EncodedCorpus(*([tokens.integers(0, 13, length).tolist() for length in column] for column in lengths.T))


def squared_ratio(model, encoded):
    """Of gradients of log p to those of its logits, over the first tokens of responses."""
    gradients = errors = 0.0
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        logits = model(torch.tensor([prompt])).logits[0, -1]
        logits.retain_grad()
        model.zero_grad()
        logits.log_softmax(-1)[completion[0]].backward()
        gradients += sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        errors += float(logits.grad.square().sum())
    return gradients / errors


def test_of_the_head():
    model, encoded = tiny_llama(head_bias=True), draw(5)
    norms = []
    for prompt, completion in zip(encoded.prompts, encoded.completions):
        states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[-1][0]
        norms += (states[len(prompt) - 1 : -1].square().sum(-1) + 1).tolist()  # the 1 is the bias's input
    assert measure_step_size(model, encoded, TTTConfig(0.0)) == pytest.approx(0.5 / max(norms), rel=0.05)


def test_of_all_parameters():
    model, encoded = tiny_llama(), draw(5)
    found = measure_step_size(model, encoded, TTTConfig(0.0, scope="all"))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == pytest.approx(0.5 / squared_ratio(copy.deepcopy(model), encoded), rel=0.05)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_of_adapters():
    model, encoded = tiny_llama(), draw(5)
    found = measure_step_size(model, encoded, TTTConfig(0.0, scope="lora", rank=RANK))
    adapted = with_adapters(model, RowAdapters(model, RANK).start[::2])
    assert found == pytest.approx(0.5 / squared_ratio(adapted, encoded), rel=0.05)


def test_it_reads_a_few_rows_of_many():
    model, encoded = tiny_llama(), draw(40)
    some = [round(place) for place in np.linspace(0, 39, 16)]
    few = EncodedCorpus([encoded.prompts[row] for row in some], [encoded.completions[row] for row in some])
    for scope in ("head", "all"):
        sizes = [measure_step_size(model, corpus, TTTConfig(0.0, scope=scope)) for corpus in (encoded, few)]
        assert sizes[0] == sizes[1] == float(f"{sizes[0]:.1e}")


def test_a_model_without_gradients_is_refused():
    model = tiny_llama()
    torch.nn.init.zeros_(model.model.norm.weight)
    with pytest.raises(ValueError, match=r"gradients of squared norm 0\.0"):
        measure_step_size(model, draw(2), TTTConfig(0.0))
