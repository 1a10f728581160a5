"""Models of each row's own: what adapters begin with, copies of rows, and networks that do not fit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.ttt.row_models import RowModels
from hf_coverage.ttt.row_networks import RowAdapters, RowWeights, row_passes
from tests.ttt.network_reference import tiny_model

SCOPES = [("lora", "exact"), ("lora", "stale"), ("all", "exact"), ("all", "stale")]
PROMPTS = torch.tensor([[1, 1, 5, 3], [7, 2, 4, 4], [1, 6, 6, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
TOKENS = torch.tensor([[3, 9, 4], [2, 2, 7], [5, 12, 8]])


class Small(nn.Module):
    """What a causal language model is asked for, and what its layer is made to do wrong."""

    def __init__(self, wrong=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.config, self.wrong = SimpleNamespace(is_encoder_decoder=False), wrong

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.embed(input_ids)
        if self.wrong == "not a module's call":
            hidden = nn.functional.linear(hidden, self.layer.weight)
        elif self.wrong == "positions first" and input_ids.shape[1] != 5:  # a probe has five
            hidden = self.layer(hidden.transpose(0, 1)).transpose(0, 1)
        else:
            hidden = self.layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def test_adapters_begin_as_those_of_peft_do_and_change_nothing():
    model, state = tiny_model("gpt2"), torch.get_rng_state()
    adapters = RowAdapters(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    layers = [layer for name, layer in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))]
    for layer, down, up in zip(layers, adapters.start[::2], adapters.start[1::2], strict=True):
        inputs, outputs = layer.weight.shape
        assert (down.shape, up.shape) == ((3, inputs), (outputs, 3))
        assert not up.any()
        assert 0.8 * inputs**-0.5 < down.abs().max() < inputs**-0.5
    again = RowAdapters(tiny_model("gpt2").double(), 3)
    assert all(torch.equal(one.double(), two) for one, two in zip(adapters.start, again.start))
    rows = adapters.new_parameters(2)
    assert all(torch.equal(theta[0], theta[1]) for theta in rows)
    with row_passes(model):
        found = adapters.logits(rows, PROMPTS[1:2].expand(2, -1))
    torch.testing.assert_close(found[0], model(PROMPTS[1:2]).logits[0, -1].detach(), rtol=0, atol=1e-6)


def test_tied_parameters_are_one():
    model = tiny_model("tied")
    weights = RowWeights(model)
    assert len(weights.start) == len(list(model.parameters())) < len(model.state_dict())
    theta = weights.new_parameters(1)
    moved = [
        value if name != "model.embed_tokens.weight" else value * 2
        for (name, _), value in zip(model.named_parameters(), theta)
    ]
    with row_passes(model):
        found = weights.logits(moved, PROMPTS[1:2])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
        torch.testing.assert_close(found.detach(), model(PROMPTS[1:2]).logits[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
@pytest.mark.parametrize("on_prompt", [False, True])
def test_copies_of_rows_go_on_by_themselves(scope, cache, on_prompt):
    model, config = tiny_model("llama"), TTTConfig(0.1, scope=scope, cache=cache, on_prompt=on_prompt)
    choice = torch.tensor([2, 0, 2, 1])
    some = RowModels(model, PROMPTS, config=config, mask=MASK)
    some.step(TOKENS[:, 0])
    some.logits()  # what was read belongs to the rows as they were
    copies = some.select(choice)
    whole = RowModels(model, PROMPTS[choice], config=config, mask=MASK[choice])
    whole.step(TOKENS[choice, 0])
    for models in (copies, whole):
        models.step(torch.tensor([3, 4, 5, 6]))
        models.step(torch.tensor([4, 5, 6, 7]), active=torch.tensor([1, 1, 0, 1]))
    torch.testing.assert_close(copies.logits(), whole.logits(), rtol=0, atol=2e-5)
    alone = RowModels(model, PROMPTS, config=config, mask=MASK)
    alone.step(TOKENS[:, 0])
    torch.testing.assert_close(some.logits(), alone.logits(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("scope", "cache"), SCOPES)
def test_rows_that_have_ended_stay_what_they_were(scope, cache):
    model, config = tiny_model("llama"), TTTConfig(0.1, scope=scope, cache=cache)
    models = RowModels(model, PROMPTS, config=config, mask=MASK)
    models.step(TOKENS[:, 0])
    before = models.logits()
    models.step(TOKENS[:, 1], active=torch.tensor([True, False, True]))
    after = models.logits()
    assert torch.equal(after[1], before[1])
    assert not torch.isclose(after[[0, 2]], before[[0, 2]]).all(-1).any()
    two = RowModels(model, PROMPTS[[0, 2]], config=config, mask=MASK[[0, 2]])
    for step in (0, 1):
        two.step(TOKENS[[0, 2], step])
    torch.testing.assert_close(after[[0, 2]], two.logits(), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"must be rows that have not ended, \[0, 2\], got \[1\]"):
        models.select(torch.tensor([1]))
    models.step(TOKENS[:, 2], active=torch.zeros(3))
    assert torch.equal(models.logits(), after)
    unread = RowModels(model, PROMPTS, config=config, mask=MASK)
    unread.step(TOKENS[:, 0], active=torch.zeros(3))
    with pytest.raises(RuntimeError, match="All rows ended before there were logits"):
        unread.logits()


def test_float64_stays_float64():
    model = tiny_model("llama").double()
    for scope in ("lora", "all"):
        models = RowModels(model, PROMPTS, config=TTTConfig(0.1, scope=scope), mask=MASK)
        models.step(TOKENS[:, 0])
        logits = models.logits()
        exact = RowModels(tiny_model("llama"), PROMPTS, config=TTTConfig(0.1, scope=scope), mask=MASK)
        exact.step(TOKENS[:, 0])
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), exact.logits(), rtol=0, atol=2e-5)


def test_networks_that_do_not_fit():
    ids, lora = torch.tensor([[1, 2], [3, 4]]), TTTConfig(0.1, scope="lora")
    assert RowModels(Small(), ids, config=lora).logits().shape == (2, 5)
    with pytest.raises(RuntimeError, match=r"No adapter's hook ran in a pass of Small: it does not call its layers"):
        RowModels(Small("not a module's call"), ids, config=lora).logits()
    with pytest.raises(RuntimeError, match=r"Layer layer got inputs of shape \(3, 2, 4\), expected the 2 rows"):
        RowModels(Small("positions first"), torch.tensor([[1, 2, 3], [3, 4, 0]]), config=lora).logits()
    bare = Small()
    bare.layer = nn.Identity()
    with pytest.raises(ValueError, match=r'`scope="lora"` needs linear layers .*, but Small has none but its head'):
        RowModels(bare, ids, config=lora)
    forgetful = tiny_model("llama")
    forgetful.forward = lambda input_ids, past_key_values=None, **kwargs: type(forgetful).forward(
        forgetful, input_ids=input_ids
    )
    with pytest.raises(RuntimeError, match='to keep the keys and values of 2 tokens, got 0; take `cache="exact"`'):
        RowModels(forgetful, ids, config=TTTConfig(0.1, scope="all", cache="stale")).logits()
