"""The reasoning recipe at a size of seconds: fine-tuned, sampled and compared, and what its rules choose."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from scipy.stats import spearmanr, ttest_rel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_coverage import CoverageProfile
from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.scoring import score_encoded
from recipes.choice import finetune as small_runs
from recipes.profiles import read_profiles
from recipes.reasoning import compare, finetune, sample
from recipes.reasoning.choices import Checkpoints, choice_table, choose, chosen_in_halves, matched_table, split_table
from recipes.reasoning.collator import AnswerCollator
from recipes.reasoning.model import load_base, load_checkpoint
from recipes.reasoning.reasons import area_table, concern_table, guess_table, resolution_table
from recipes.reasoning.task import draw_entries, entry_corpus
from recipes.reasoning.top_layers import LayersBelow, TopCollator, answer_logprobs
from recipes.smollm2 import SMOLLM2, load_tokenizer

RECIPE = Path(finetune.__file__).parent
TASK = {"name": "chain_sum", "max_terms": 2, "max_digits": 1}

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
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=160,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, main, model, output, *more):
    words = ["--config", str(RECIPE / "chain_sum.yaml"), "--output_dir", str(output), "--model.name", str(model)]
    small = {
        "data.train_rows": 32, "data.rows": 12, "measure.samples": 4, "measure.sample_prompts": 5,
        "measure.sample_steps": "0 2 4", "measure.max_new_tokens": 3, "measure.pass_at": "1 4",
        "measure.n": "2 16 256",
        "finetune.num_train_epochs": 2, "finetune.save_steps": 1, "finetune.logging_steps": 1,
        "finetune.learning_rate": 0.02, "finetune.report_to": "none",
    }  # fmt: skip
    for name, value in small.items():
        words += [f"--{name}", *str(value).split()]
    monkeypatch.setattr(sys, "argv", ["recipe", *words, *more])
    main()
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run through all three steps, and what it printed."""
    output = tmp_path_factory.mktemp("reasoning") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for main in (finetune.main, sample.main, compare.main):
            run(monkeypatch, main, tiny, output)
    return output


def test_a_run_leaves_profiles_samples_tables_figures_and_a_card(finished):
    steps = {f"step-{step}.json" for step in range(5)}
    assert {file.name for file in (finished / "profiles").iterdir()} == steps
    assert {file.name for file in (finished / "samples").glob("*.json")} == {f"step-{step}.json" for step in (0, 2, 4)}
    for name in ("choices.png", "correlations.png", "curves.png", "predictiveness.png", "profiles.png"):
        assert (finished / "comparison" / name).read_bytes().startswith(b"\x89PNG")
    tables = (finished / "comparison" / "tables.md").read_text()
    for part in ("Cov_256 ↓", "less cross-entropy's", "tournament, N = 16", "200 halves", "Pass@4, sampled"):
        assert part in tables
    card = ModelCard.load(finished / "comparison" / "card" / "README.md")
    assert {entry.metric_type for entry in card.data.eval_results} >= {"cov_2", "kl"}
    assert "32 questions of `reasoning_gym`'s chain_sum" in card.text
    (file,) = (finished / "comparison").glob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["step 4"]["kl,none"] < results["step 0"]["kl,none"]


def test_profiles_are_those_of_the_kept_checkpoints_with_their_end_of_sequence(finished, tiny):
    recipe = finetune.read_recipe(["--config", str(RECIPE / "chain_sum.yaml")], None)
    corpus = entry_corpus(draw_entries(recipe.task, 12, seed=recipe.data.seed))
    tokenizer = load_tokenizer(str(tiny))
    encoded = encode_corpus(corpus, tokenizer, append_eos=True)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in encoded.completions)
    model = load_checkpoint(load_base(str(tiny)), finished / "finetune" / "checkpoint-3")
    profile = CoverageProfile.from_json(finished / "profiles" / "step-3.json")
    np.testing.assert_allclose(score_encoded(model, encoded).logprob, profile.logprobs, atol=1e-4)


def test_exact_pass_at_n_is_within_what_sampling_shows(tiny, tmp_path, monkeypatch, finished):
    shutil.copytree(finished / "finetune", tmp_path / "run" / "finetune")
    more = ["--measure.samples", "256", "--measure.sample_steps", "4", "--measure.max_new_tokens", "5"]
    run(monkeypatch, sample.main, tiny, tmp_path / "run", *more)
    result = BestOfNResult.from_json(tmp_path / "run" / "samples" / "step-4.json")
    profile = CoverageProfile.from_json(finished / "profiles" / "step-4.json")
    p = np.exp(profile.logprobs[result.rows])
    assert not result.failed.any()
    # a sample may spell the answer with other tokens, so it may be right more often than the exact value says
    assert result.rewards.mean() > p.mean() - 4 * math.sqrt((p * (1 - p)).sum() / 256) / len(p)
    assert result.rewards.mean() < p.mean() + 0.02 + 4 * math.sqrt((p * (1 - p)).sum() / 256) / len(p)


def test_a_stopped_run_goes_on_where_it_was(finished, tiny, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for step in (3, 4):
        shutil.rmtree(output / "finetune" / f"checkpoint-{step}")
        (output / "profiles" / f"step-{step}.json").unlink()
    kept = output / "finetune" / "checkpoint-2" / "adapter_model.safetensors"
    before = kept.stat().st_mtime_ns
    run(monkeypatch, finetune.main, tiny, output)
    assert kept.stat().st_mtime_ns == before
    for step in (3, 4):
        file = Path("profiles") / f"step-{step}.json"
        assert (output / file).read_bytes() == (finished / file).read_bytes()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(monkeypatch, finetune.main, tiny, output, "--finetune.learning_rate", "0.01")


def test_the_loss_counts_answers_alone(tiny):
    model, tokenizer = load_base(str(tiny)), load_tokenizer(str(tiny))
    encoded = encode_corpus(entry_corpus(draw_entries(TASK, 6, seed=3)), tokenizer, append_eos=True)
    batch = AnswerCollator(tokenizer.pad_token_id)(list(zip(encoded.prompts, encoded.completions)))
    assert len({len(prompt) + len(answer) for prompt, answer in zip(encoded.prompts, encoded.completions)}) > 1
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss * encoded.num_completion_tokens == pytest.approx(
        -score_encoded(model, encoded).logprob.sum(), rel=1e-5
    )


@pytest.fixture(scope="module")
def deep(tiny, tmp_path_factory):
    """The folder of a random Llama with four layers."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, num_hidden_layers=4)).save_pretrained(folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)
    return folder


def test_layers_below_are_left_as_they_are_and_read_once(deep):
    tokenizer = load_tokenizer(str(deep))
    encoded = encode_corpus(entry_corpus(draw_entries(TASK, 40, seed=3)), tokenizer, append_eos=True)
    whole, top = load_base(str(deep)), load_base(str(deep))
    expected = score_encoded(whole, encoded).logprob
    below = LayersBelow(top, 2)
    rows, collate = list(zip(encoded.prompts, encoded.completions)), TopCollator(tokenizer.pad_token_id, below)
    below.read(rows)
    kept = [below.hidden(row) for row in rows]
    np.testing.assert_allclose(answer_logprobs(top, encoded, collate), expected, atol=1e-5)
    np.testing.assert_allclose(
        answer_logprobs(whole, encoded, AnswerCollator(tokenizer.pad_token_id)), expected, atol=1e-5
    )
    below.read(rows)
    assert all(below.hidden(row) is states for row, states in zip(rows, kept))
    with pytest.raises(ValueError, match="`layers` must be from 1 to 3, but is 4"):
        LayersBelow(load_base(str(deep)), 4)


def test_an_adapter_on_the_last_layers_fits_the_whole_model(deep, tmp_path, monkeypatch):
    run(monkeypatch, finetune.main, deep, tmp_path / "run", "--model.layers", "2")
    base, tokenizer = load_base(str(deep)), load_tokenizer(str(deep))
    recipe = finetune.read_recipe(["--config", str(RECIPE / "chain_sum.yaml")], None)
    encoded = encode_corpus(
        entry_corpus(draw_entries(recipe.task, 12, seed=recipe.data.seed)), tokenizer, append_eos=True
    )
    first = CoverageProfile.from_json(tmp_path / "run" / "profiles" / "step-0.json")
    np.testing.assert_allclose(score_encoded(base, encoded).logprob, first.logprobs, atol=1e-5)
    model = load_checkpoint(base, tmp_path / "run" / "finetune" / "checkpoint-4")
    last = CoverageProfile.from_json(tmp_path / "run" / "profiles" / "step-4.json")
    np.testing.assert_allclose(score_encoded(model, encoded).logprob, last.logprobs, atol=1e-4)
    assert last.kl < first.kl
    for name, weight in load_base(str(deep)).named_parameters():
        changed = not torch.equal(weight, model.get_parameter(name))
        assert changed == ("layers.2." in name or "layers.3." in name) * ("norm" not in name), name


def test_seeds_of_a_task_share_a_model_and_finished_runs_are_left_alone(deep, tmp_path, monkeypatch):
    words = ["--config", str(RECIPE.parent / "choice" / "reasoning.yaml"), "--model.name", str(deep)]
    words += ["--output_dir", str(tmp_path), "--tasks", "gcd", "--model.layers", "2", "--data.train_rows", "32"]
    words += ["--data.rows", "8", "--finetune.num_train_epochs", "2", "--finetune.save_steps", "2"]

    def profiles():
        monkeypatch.setattr(sys, "argv", ["finetune", *words, "--seeds", "0", "1"])
        small_runs.main()
        folders = [tmp_path / f"gcd-seed{seed}" / "profiles" for seed in (0, 1)]
        return np.array([[profile.logprobs for profile in read_profiles(folder).values()] for folder in folders])

    together = profiles()
    assert together.shape == (2, 3, 8)
    np.testing.assert_array_equal(*together[:, 0])  # as it came
    assert (together[0, 1:] != together[1, 1:]).all()

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "gcd-seed0").rglob("*") if file.is_file()}
    shutil.rmtree(tmp_path / "gcd-seed1")
    np.testing.assert_allclose(profiles(), together, atol=1e-6)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_steps_without_a_checkpoint_are_refused(finished, tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"must be among \[0, 1, 2, 3, 4\].* got \[7\]"):
        run(monkeypatch, sample.main, tiny, finished, "--measure.sample_steps", "0", "7")


def test_questions_are_distinct_and_not_those_of_the_training():
    held_out = draw_entries(TASK, 40, seed=0)
    train = draw_entries(TASK, 40, seed=0, besides=held_out)
    questions = [entry["question"] for entry in held_out + train]
    assert len(set(questions)) == 80
    with pytest.raises(ValueError, match="chain_sum gave 200 new questions in 6000 tries"):
        draw_entries(TASK, 300, seed=0)


def small_run(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.5, size=(6, rows)) * np.linspace(0.5, 2, 6)[:, None]
    return Checkpoints(list(range(0, 60, 10)), logprobs, n=(2, 8.5), pass_at=(1, 4))


def test_choices_are_those_of_a_slow_loop():
    run = small_run()
    chosen = choose(run)
    rows = run.logprobs.tolist()
    entropy = [-sum(row) / len(row) for row in rows]
    assert chosen["least cross-entropy"] == entropy.index(min(entropy))
    for n in (2, 8.5):
        uncovered = [(sum(-value >= math.log(n) for value in row), e) for row, e in zip(rows, entropy)]
        assert chosen[f"least Cov_{n}"] == uncovered.index(min(uncovered))
        score = [max(sum(a - b >= math.log(n) for a, b in zip(other, row)) for other in rows) for row in rows]
        assert score[chosen[f"tournament, N = {n}"]] == min(score)
    for n in (1, 4):
        passes = [sum(1 - (1 - math.exp(value)) ** n for value in row) for row in rows]
        assert chosen[f"best Pass@{n}"] == passes.index(max(passes))
    assert chosen["the last"] == 5


def test_a_choice_is_judged_on_the_other_half():
    # One checkpoint is right on one question of two, the other one on the other: whoever chooses on a half is
    # always disappointed by the other half.
    run = small_run(rows=2)
    sure, lost = math.log(0.9), math.log(0.001)
    run = Checkpoints([0, 10], np.array([[sure, lost], [lost, sure]]), n=(2,), pass_at=(1,))
    for picks in (
        chosen_in_halves(run, splits=8)[rule] for rule in ("least cross-entropy", "least Cov_2", "best Pass@1")
    ):
        assert [passes.tolist() for _, passes in picks] == [[pytest.approx(0.001)]] * 8


def test_tables_compare_with_cross_entropy():
    table = choice_table(small_run())
    assert table.rows[0][0] == "least cross-entropy"
    assert table.rows[0][3] is None
    for cells in table.rows:
        if cells[3] is not None:
            assert cells[3].value == pytest.approx(cells[2] - table.rows[0][2])
            assert cells[3].low <= cells[3].value <= cells[3].high
    halves = chosen_in_halves(small_run(), splits=3)
    split = {cells[0]: cells[2:] for cells in split_table(small_run(), halves).rows}
    assert list(split) == [cells[0] for cells in table.rows]
    one, four = matched_table(small_run(), halves).rows
    assert one[1:3] == [split["least cross-entropy"][0], split["least Cov_2"][0]]
    assert four[3:] == [split[rule][1] for rule in ("tournament, N = 2", "best Pass@4", "the last")]


def test_areas_add_up_to_kl():
    run = small_run()
    for cells, logprobs in zip(area_table(run).rows, run.logprobs):
        assert cells[1] == pytest.approx(-logprobs.mean())
        assert sum(cells[2:-1]) == pytest.approx(cells[1])
        assert cells[-1] == sum(math.exp(value) < 1 / 1024 for value in logprobs)
        # between N = 2 and 8: the integral of Cov_N over log N, by the midpoint rule
        grid = np.linspace(math.log(2), math.log(8), 20001)
        middle = (grid[1:] + grid[:-1]) / 2
        covered = [(-logprobs >= at).mean() for at in middle]
        assert cells[3] == pytest.approx(np.mean(covered) * (grid[-1] - grid[0]), abs=1e-4)


def test_the_concern_of_a_range_is_the_rank_correlation_of_its_area():
    run = small_run()
    areas = np.array([cells[2:-1] for cells in area_table(run).rows[1:]])
    passes = np.array([(1 - (1 - np.exp(row)) ** 4).mean() for row in run.logprobs[1:]])
    for column, cells in enumerate(concern_table(run).rows):
        assert cells[2].value == pytest.approx(spearmanr(areas[:, column], passes)[0])
        assert -1 <= cells[2].low <= cells[2].value <= cells[2].high <= 1


def test_a_model_that_guesses_is_found_out():
    answers = list("112223")
    guess = np.log([{"1": 0.2, "2": 0.7, "3": 0.1}[answer] for answer in answers])
    reads = np.log([0.9, 0.1, 0.9, 0.1, 0.5, 0.5])
    table = guess_table(Checkpoints([0, 10], np.array([guess, reads]), n=(2,), pass_at=(1,)), answers)
    assert table.rows[0][1] == pytest.approx(1)
    assert table.rows[1][1] < 0.1
    assert "commonest of the 3 answers would be right on 0.500" in table.caption
    assert f"on {(4 + 9 + 1) / 36:.3f}" in table.caption


def test_the_resolution_is_that_of_paired_t_statistics():
    run = small_run()
    table = {cells[0]: cells[1:] for cells in resolution_table(run).rows}
    trained = -run.logprobs[1:]
    z = [abs(ttest_rel(a, b).statistic) for place, a in enumerate(trained) for b in trained[place + 1 :]]
    assert table["cross-entropy"] == pytest.approx([np.median(z), np.mean(np.array(z) > 1.96)])
    assert table.keys() == {"cross-entropy", "Cov_2", "Cov_8.5", "Pass@1", "Pass@4"}


def test_the_committed_configurations_leave_room_for_every_answer():
    tokenizer = load_tokenizer(SMOLLM2)
    files = sorted(RECIPE.glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        recipe = finetune.read_recipe(["--config", str(file)], None)
        assert len(recipe.train_entries()) == recipe.data.train_rows
        encoded = encode_corpus(entry_corpus(recipe.held_out_entries()), tokenizer, append_eos=True)
        assert len(encoded) == recipe.data.rows
        assert max(map(len, encoded.completions)) <= recipe.measure.max_new_tokens


@pytest.mark.slow
def test_the_packaged_model_can_be_trained_and_saved(smollm2, tmp_path):
    model = load_base(SMOLLM2)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, smollm2[0](ids).logits)
    model.save_pretrained(tmp_path)
