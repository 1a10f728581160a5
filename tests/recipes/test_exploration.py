"""The exploration recipe at a size of seconds, and its strategies against enumeration."""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_coverage.functional.exploration import elliptical_selection
from recipes.exploration import compare
from recipes.exploration.strategies import (
    DISTINCT,
    LIKELIEST,
    RANDOM,
    Samples,
    distinct_in_order,
    distinct_in_random_subsets,
    likeliest_first,
    passes_of,
    rep_exp_orders,
)
from recipes.reasoning import finetune, sample

CONFIGURATION = Path(finetune.__file__).parent / "chain_sum.yaml"

# peft asks a model for a property that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random Llama over single characters."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, main, model, output, *more):
    words = ["--config", str(CONFIGURATION), "--output_dir", str(output), "--model.name", str(model)]
    small = {
        "data.train_rows": 32, "data.rows": 6, "measure.samples": 9, "measure.sample_prompts": 5,
        "measure.sample_steps": "0 2", "measure.max_new_tokens": 3, "measure.pass_at": "1 2 4 9",
        "finetune.num_train_epochs": 1, "finetune.save_steps": 2, "finetune.logging_steps": 1,
        "finetune.report_to": "none",
    }  # fmt: skip
    for name, value in small.items():
        words += [f"--{name}", *str(value).split()]
    monkeypatch.setattr(sys, "argv", ["recipe", *words, *more])
    main()
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run through all three steps."""
    output = tmp_path_factory.mktemp("exploration") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for main in (finetune.main, sample.main, compare.main):
            run(monkeypatch, main, tiny, output)
    return output


def test_a_run_leaves_tables_and_a_figure(finished):
    tables = (finished / "exploration" / "tables.md").read_text()
    for part in ("The model as it came: Pass@k of k chosen from 9 samples to each of 5 questions", "After 2 steps"):
        assert part in tables
    for row in ("random subset", "random, distinct", "likeliest, distinct", "RepExp, centred", "RepExp, lambda 100"):
        assert f"| {row} |" in tables
    assert "log p of the first 8" in tables
    assert "After 2 steps: Pass@k of RepExp less that of what needs no hidden states" in tables
    assert (finished / "exploration" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_samples_that_are_not_there_are_missed(finished, tiny, monkeypatch):
    with pytest.raises(ValueError, match="lacks samples of step 0 for all questions: run `recipes"):
        run(monkeypatch, compare.main, tiny, finished, "--measure.sample_prompts", "6")


def make_samples(questions=6, size=7):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (questions, size))
    labels[0], labels[1] = 0, np.arange(size)
    right = generator.random((questions, size)) < 0.4
    solved = np.take_along_axis(right, labels, axis=1)
    logprobs = np.take_along_axis(np.log(generator.random((questions, size))), labels, axis=1)
    points = generator.normal(size=(questions, size, 3))
    features = np.take_along_axis(points, labels[..., None], axis=1)
    return Samples(solved, logprobs, labels, list(features))


def test_passes_are_those_of_all_subsets():
    samples = make_samples()
    orders = {LIKELIEST: likeliest_first(samples), "RepExp": rep_exp_orders(samples, lam=0.1)}
    passes = passes_of(samples, orders)
    for question in range(6):
        solved, labels = samples.solved[question], samples.labels[question]
        kinds = {label: solved[labels == label][0] for label in labels.tolist()}
        likeliest = sorted(kinds, key=lambda label: -samples.logprobs[question][labels == label][0])
        for k in range(1, 8):
            every = [solved[list(rows)].any() for rows in combinations(range(7), k)]
            assert passes[RANDOM][question, k - 1] == pytest.approx(np.mean(every))
            few = min(k, len(kinds))
            different = [any(kinds[label] for label in chosen) for chosen in combinations(kinds, few)]
            assert passes[DISTINCT][question, k - 1] == pytest.approx(np.mean(different))
            assert passes[LIKELIEST][question, k - 1] == any(kinds[label] for label in likeliest[:few])
            chosen = elliptical_selection(samples.features[question], k, lam=0.1)
            assert passes["RepExp"][question, k - 1] == solved[chosen].any()


def test_different_responses_are_counted():
    samples = make_samples()
    random = distinct_in_random_subsets(samples)
    order = rep_exp_orders(samples, lam=0.1, center=True)
    ordered = distinct_in_order(samples, order)
    for question in range(6):
        labels = samples.labels[question]
        for k in range(1, 8):
            every = [len(set(labels[list(rows)].tolist())) for rows in combinations(range(7), k)]
            assert random[question, k - 1] == pytest.approx(np.mean(every))
            assert ordered[question, k - 1] == len(set(labels[order[question, :k]].tolist()))
        centered = samples.features[question] - samples.features[question].mean(axis=0)
        assert order[question].tolist() == elliptical_selection(centered, lam=0.1).tolist()


def test_differences_are_paired_by_question():
    passes = {RANDOM: np.full((4, 3), 0.5), "other": np.array([[0.0, 1, 1]] * 2 + [[0.0, 0.5, 1]] * 2)}
    table = compare.pass_table(passes, [2, 3], "it")
    assert [column.title for column in table.headers] == ["chosen by", "Pass@2", "less random's"]
    (_, value, change) = table.rows[1]
    assert (value, change.value) == (0.75, 0.25)
    half = 3.182446 * np.std([0.5, 0.5, 0, 0], ddof=1) / 2
    assert (change.low, change.high) == pytest.approx((0.25 - half, 0.25 + half))
    assert table.rows[0][2] is None
    mine = np.array([[1.0, 1, 1]] * 2 + [[0.0, 1, 1]] * 2)
    rivals = compare.rival_table({**passes, DISTINCT: passes["other"], LIKELIEST: mine, "RepExp": mine}, [1, 3], "it")
    assert [row[0] for row in rivals.rows] == [RANDOM, DISTINCT, LIKELIEST]
    (_, one) = rivals.rows[0]  # all three of them are no choice
    assert one.value == 0
    assert rivals.rows[1][1].value == pytest.approx(0.5)
    assert rivals.rows[2][1].value == 0
    assert np.isnan([rivals.rows[2][1].low, rivals.rows[2][1].high]).all()  # no two questions differ: nothing is known
