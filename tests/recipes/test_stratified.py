"""The stratified recipe at a size of seconds, and its exact formulas against codes on a fine grid."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_coverage.functional.arithmetic_codes import stratified_pass_probabilities
from hf_coverage.tasks.layered_graphs import is_valid_path
from recipes.pretrain import TaskArguments, new_task
from recipes.reasoning.model import add_adapter
from recipes.stratified import compare
from recipes.stratified.exact import INDEPENDENT, LATTICE, STRATIFIED, exact_passes, refuse_below
from recipes.stratified.graphs import ANY, EVEN_LAST, EVEN_SUM, ONE, Paths
from recipes.stratified.rivals import Rivals

CONFIGURATION = Path(compare.__file__).with_name("small.yaml")
GRAPHS = CONFIGURATION.parent.parent / "graph_search" / "small.yaml"


def intervals(rows=200, size=3, seed=0):
    """Disjoint intervals inside of [0, 1): `(R, K)` where they begin, and the logarithms of their lengths."""
    ends = np.sort(np.random.default_rng(seed).random((rows, 2 * size)), axis=1)
    return ends[:, ::2], np.log(ends[:, 1::2] - ends[:, ::2])


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_exact_passes_are_those_of_codes_on_a_grid(n):
    lows, logprobs = intervals()
    grid = (np.arange(n * 2000) + 0.5) / (n * 2000)
    inside = (grid >= lows[..., None]) & (grid < (lows + np.exp(logprobs))[..., None])
    hits = inside.any(axis=1).reshape(len(lows), n, 2000)  # stratum, offset inside of it
    passes = exact_passes(lows, logprobs, n)
    expected = {
        INDEPENDENT: 1 - (1 - hits.mean(axis=(1, 2))) ** n,
        STRATIFIED: 1 - np.prod(1 - hits.mean(axis=2), axis=1),
        LATTICE: hits.any(axis=1).mean(axis=1),
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(passes[kind], values, atol=0.01)
    refuse_below(passes, "here")


def test_of_one_right_answer_they_are_those_of_the_library():
    lows, logprobs = intervals(size=2)
    right = np.zeros(lows.shape, dtype=bool)
    right[:, 1] = True
    found = exact_passes(lows, logprobs, 4, right)
    np.testing.assert_allclose(found[STRATIFIED], stratified_pass_probabilities(lows[:, 1], logprobs[:, 1], 4))
    np.testing.assert_allclose(found[LATTICE], np.minimum(4 * np.exp(logprobs[:, 1]), 1))


def test_a_lattice_can_pass_less_than_independent_samples_and_strata_cannot():
    periodic = exact_passes(np.array([[0.0, 0.5]]), np.log([[0.25, 0.25]]), 2)
    assert [float(periodic[kind][0]) for kind in (INDEPENDENT, STRATIFIED, LATTICE)] == [0.75, 0.75, 0.5]
    with pytest.raises(AssertionError, match=r"at N = 2 they pass 0\.25 less for prompt 0"):
        refuse_below({INDEPENDENT: periodic[INDEPENDENT], STRATIFIED: periodic[LATTICE]}, "at N = 2")


def test_verifiers_take_the_paths_that_they_say():
    paths = Paths.draw(GRAPHS, 50)
    task = new_task(TaskArguments(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned"))
    drawn = task.sample(4000, [0.9, 0.1, 0.0], seed=(0, 0))
    for k in range(paths.paths.shape[1]):
        assert is_valid_path(drawn.graphs[:50], paths.paths[:, k]).all()
    np.testing.assert_array_equal(paths.paths[paths.right[ONE]], drawn.paths[:50])
    assert {name: set(right.sum(axis=1)) for name, right in paths.right.items()} == {
        ONE: {1}, ANY: {4}, EVEN_SUM: {2}, EVEN_LAST: {2}
    }  # fmt: skip
    for candidates, right in zip(paths.paths, paths.right[EVEN_LAST]):
        place = np.flatnonzero((candidates != candidates[0]).any(axis=0))[-1]
        assert (candidates[:, place] % 2 == 0).tolist() == right.tolist()


def graph_model(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=30, n_positions=46, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None,
        pad_token_id=28, initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_ways_to_spend_verifier_calls():
    answers = np.arange(5)[:, None]
    prompts = [[token, 7] for token in range(5)]
    model = graph_model()
    rivals = Rivals(model, prompts, answers, size=4, repeats=50, pool=8, draws=12, seed=0)
    with torch.inference_mode():
        p = model(torch.tensor(prompts)).logits[:, -1].double().softmax(-1).numpy()
    own = p[np.arange(5), np.arange(5)]
    low = (p.cumsum(axis=1) - p)[np.arange(5), np.arange(5)][:, None]
    exact = exact_passes(low, np.log(own)[:, None], 4)
    outcomes = {name: way() for name, way in rivals.ways([1.0])}
    for name, kind in (
        ("independent, temperature 1", INDEPENDENT), ("stratified, temperature 1", STRATIFIED), ("lattice", LATTICE)
    ):  # fmt: skip
        np.testing.assert_allclose(outcomes[name].passed, exact[kind], atol=0.25)
    beams = outcomes["beam search"]
    assert beams.passed == [float(row in np.argsort(-p[row])[:4]) for row in range(5)]
    assert beams.checked == [4.0] * 5
    assert outcomes["RepExp from 8"].tokens == [8.0] * 5
    different = outcomes["different ones of up to 12"]
    assert all(tokens == 12 or tokens >= 4 for tokens in different.tokens)
    assert all(checked == 4 or tokens == 12 for checked, tokens in zip(different.checked, different.tokens))
    with pytest.raises(ValueError, match="`prompts` must be equally long"):
        Rivals(model, [[1], [1, 2]], answers[:2], size=2, repeats=1, pool=2, draws=2, seed=0)


@pytest.fixture
def trained(tmp_path):
    """Folders of a run over graphs and of one over questions, of random models, as their recipes leave them."""
    for seed, name in enumerate(("pretrain/checkpoint-4", "finetune/checkpoint-2", "finetune/checkpoint-10")):
        graph_model(seed).save_pretrained(tmp_path / "graphs" / name)
        (tmp_path / "graphs" / name / "trainer_state.json").write_text("{}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = add_adapter(base, rank=2, alpha=4.0, dropout=0.0, seed=0)
    adapter.save_pretrained(tmp_path / "questions" / "chain_sum-seed0" / "finetune" / "checkpoint-3")
    return tmp_path


def run(monkeypatch, folder, *more):
    words = ["--config", str(CONFIGURATION), "--output_dir", str(folder / "out")]
    small = {
        "graphs.run": folder / "graphs", "graphs.rows": 6, "graphs.shown": "0 10", "graphs.step": 2,
        "graphs.sampled_rows": 4, "graphs.samples": 4, "rivals.size": 2, "rivals.repeats": 2, "rivals.pool": 4,
        "rivals.draws": 3, "rivals.temperatures": "1.0 1.3", "questions.runs": folder / "questions",
        "questions.model": folder / "base", "questions.tasks": "chain_sum", "questions.steps": "0 3",
        "questions.questions": 3, "questions.sampled_task": "chain_sum", "questions.sampled_step": 3,
        "questions.samples": 2, "questions.max_new_tokens": 2, "exact.n": "2 4",
    }  # fmt: skip
    for name, value in small.items():
        words += [f"--{name}", *str(value).split()]
    monkeypatch.setattr(sys, "argv", ["compare", *words, *more])
    compare.main()


# peft asks a model for a property that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_leaves_tables_and_goes_on_where_it_was(trained, monkeypatch):
    run(monkeypatch, trained)
    tables = (trained / "out" / "tables.md").read_text()
    for part in ("| 10 | 4 |", "| the best: ", "| chain_sum | 3 | 2 |", "| RepExp from 4 |", "| any valid path | 0 |"):
        assert part in tables
    assert (trained / "out" / "passes.png").read_bytes().startswith(b"\x89PNG")
    pieces = {file.name for file in (trained / "out" / "pieces").iterdir()}
    assert {"paths-0.json", "paths-2.json", "paths-10.json", "answers-chain_sum-3.json"} < pieces

    monkeypatch.setattr(compare, "load_graph_model", lambda _: graph_model())  # for the ways, which are not gone
    monkeypatch.setattr(compare.Questions, "_open", None)
    run(monkeypatch, trained)
    assert (trained / "out" / "tables.md").read_text() == tables

    file = trained / "out" / "pieces" / "paths-10.json"  # scores that no model gives
    file.write_text(json.dumps({name: [[np.nan] * 4] * 6 for name in ("logprob", "interval_low")}))
    with pytest.raises(AssertionError, match="must pass no less than independent ones"):
        run(monkeypatch, trained)
