"""The distillation recipe end to end on a tiny teacher, and a student that is what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.distillation import distill, student
from recipes.settings import parse_section, read_settings
from recipes.smollm2 import SMOLLM2

CONFIG = ["--config", str(Path(distill.__file__).with_name("small.yaml"))]
ARGUMENTS = [
    *["--drop_layers", "1", "--train_from_layer", "1", "--prompt_tokens", "3", "--response_tokens", "4"],
    *["--train_sequences", "16", "--validation_sequences", "8", "--test_sequences", "12", "--n", "1.05"],
    *["--steps", "2", "--batch_size", "4", "--learning_rates", "1e-2", "1e-3", "--seeds", "0", "1"],
    *["--report_n", "1.1", "2", "--bf16", "true"],
]


def tiny_teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A model and a tokenizer of characters, as a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(folder)
    characters = Tokenizer(models.WordLevel({"<s>": 0} | {chr(96 + i): i for i in range(1, 27)}, unk_token="<s>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<s>").save_pretrained(folder)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(
        sys,
        "argv",
        ["distill.py", *CONFIG, *map(str, arguments)],
    )
    distill.main()


def test_the_recipe_runs_and_goes_on_where_it_was(teacher_folder, tmp_path, monkeypatch, capsys):
    arguments = [*ARGUMENTS, "--model", teacher_folder, "--output_dir", tmp_path / "out"]
    run(monkeypatch, *arguments)
    capsys.readouterr()
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(files) == 1 + 2 * 2 + 2
    assert (tmp_path / "out" / "distillation.png").stat().st_size > 10_000
    found = {file.stem: json.loads(file.read_text()) for file in files}
    stopped = found["stopped-0.01-0"]["logs"]
    plain = found["plain-0.01-0"]["logs"]
    assert [row["step"] for row in stopped] == [1, 2]
    assert stopped[0]["kl"] == plain[0]["kl"] > stopped[0]["stopped_kl"] == pytest.approx(stopped[0]["loss"], rel=1e-3)
    assert plain[0]["stopped_tokens"] == 0 < stopped[0]["stopped_tokens"]
    assert found["plain-0.01-0"]["validation"]["eval_stopped_kl"] == pytest.approx(np.log(1.05), rel=0.01)
    assert found["plain-0.01-0"]["logprobs"] != found["before-training-0-0"]["logprobs"]

    report = (tmp_path / "out" / "report.md").read_text()
    for text in ("| plain, seed 1 |", "| stopped, seed 1 |", "| before training |", "Cov_1.1 ↓"):
        assert text in report
    files[-1].unlink()
    monkeypatch.setattr(distill, "sample_corpus", None)
    run(monkeypatch, *arguments)
    assert json.loads(files[-1].read_text())["logprobs"] == found[files[-1].stem]["logprobs"]
    assert capsys.readouterr().out.count(", seed 1\n") == 1
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(monkeypatch, *arguments, "--steps", "3")


def test_the_student_is_the_teacher_without_some_layers():
    teacher = tiny_teacher()
    smaller = student.without_layers(teacher, [1])
    del teacher.model.layers[1]
    teacher.model.layers[1].self_attn.layer_idx = 1
    ids = torch.randint(0, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smaller(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits)
    assert smaller.config.num_hidden_layers == 2


def test_only_the_layers_above_are_trained():
    smaller = student.without_layers(tiny_teacher(), [0])
    student.freeze_below(smaller, 1)
    trained = {name for name, parameter in smaller.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("model.layers.1.") for name in trained)


@pytest.mark.parametrize("dropped", [[3], [0, 1, 2], [-1]])
def test_layers_that_cannot_be_dropped_are_refused(dropped):
    with pytest.raises(ValueError, match="`drop_layers` must name some of 3 layers, 0 to 2"):
        student.without_layers(tiny_teacher(), dropped)


def test_the_small_configuration_is_readable():
    settings = read_settings(CONFIG, ["distillation"], description=None)
    args = parse_section(distill.DistillationArguments, settings["distillation"])
    assert args.learning_rates == [1e-4, 4e-4]
    assert args.model == SMOLLM2
