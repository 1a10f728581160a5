"""Six ways to train a transformer, at a size of seconds: the runs, the tables, and where a stopped one goes on."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.scoring import score_encoded
from recipes.normalized_sgd import transformer
from recipes.normalized_sgd import transformer_findings as findings
from recipes.normalized_sgd import transformer_jobs as jobs
from tests.measure import small_tokenizers

RECIPE = Path(transformer.__file__).parent
RATES = {name: [0.001, 0.01] for name in transformer.METHODS}


def run(monkeypatch, config, output, **changes):
    settings = yaml.safe_load((RECIPE / config).read_text())
    settings["run"] |= {"output_dir": str(output), "rows": 16, "seeds": [0]}
    settings["train"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
    settings["rates"] = RATES
    for section, values in changes.items():
        settings[section] |= values
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["transformer.py", "--config", str(file)])
    transformer.main()
    return (output / "table.md").read_text()


@pytest.fixture
def tiny_llama(tmp_path):
    """The folder of a random Llama with three layers."""
    tokenizer = small_tokenizers.gpt2_like()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("job", ["graph", "text"])
def test_every_method_is_trained_and_a_stopped_run_goes_on(tmp_path, monkeypatch, tiny_llama, job):
    model = {"n_layer": 1, "n_head": 2, "n_embd": 8}
    changes = {"model": model, "pretrain": {"max_steps": 2, "per_device_train_batch_size": 2}}
    if job == "text":
        changes = {"text": {"name": str(tiny_llama), "last_layers": 1, "train_rows": 4, "max_documents": 4}}
    output = tmp_path / "run"
    table = run(monkeypatch, f"transformer_{job}.yaml", output, **changes)
    assert all(table.count(f"| {name} |") == 2 for name in [findings.START, *transformer.METHODS])
    assert (output / "transformer.png").stat().st_size > 10_000
    files = {file: file.stat().st_mtime_ns for file in (output / "runs").glob("*.json")}
    assert len(files) == 1 + 2 * len(RATES)
    untrained = (output / "runs" / "start.json").read_text()
    assert [file.name for file in files if file.read_text() == untrained] == ["start.json"]
    gone = output / "runs" / "normalised-SGD-0.01-0.json"
    kept = gone.read_text()
    gone.unlink()
    del files[gone]
    assert run(monkeypatch, f"transformer_{job}.yaml", output, **changes) == table
    assert gone.read_text() == kept
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in files.items())
    with pytest.raises(ValueError, match="other settings"):
        run(monkeypatch, f"transformer_{job}.yaml", output, **changes | {"train": {"max_steps": 3}})


def test_rates_are_as_many_for_each_method():
    with pytest.raises(ValueError, match="as many learning rates for each method, got SGD 1, AdamW 2"):
        transformer.checked_rates({"SGD": [1], "AdamW": [1, 2]})
    with pytest.raises(ValueError, match="got 'Adam'"):
        transformer.checked_rates({"Adam": [1]})


def test_the_last_layers_go_on_as_the_whole_model_would(tmp_path, tiny_llama):
    args = jobs.TextArguments(str(tiny_llama), last_layers=2, train_rows=4, max_documents=4)
    job = jobs.text_job(tmp_path, args, rows=6)
    ids = [row.tolist() for _, row in job.held_out]
    cut = args.prompt_tokens
    encoded = EncodedCorpus(prompts=[row[:cut] for row in ids], completions=[row[cut:] for row in ids])
    whole = LlamaForCausalLM.from_pretrained(tiny_llama)
    np.testing.assert_allclose(jobs.score(job, job.new_model()), score_encoded(whole, encoded).logprob, atol=1e-4)
    trained = {name.split(".")[2] for name, weight in job.new_model().named_parameters() if weight.requires_grad}
    assert trained == {"0", "1"}
    training = [row.tolist() for _, row in job.train_rows(None)]
    assert not [row for row in training if row in ids]


def test_hidden_states_of_other_texts_are_refused(tmp_path, tiny_llama):
    args = jobs.TextArguments(str(tiny_llama), train_rows=4, max_documents=4)
    kept = jobs.text_job(tmp_path, args, rows=4).held_out[0][0]
    with pytest.raises(ValueError, match="is of other weights or texts than this run's"):
        jobs.text_job(tmp_path, replace(args, max_documents=6), rows=4)
    file = tmp_path / "hidden_states.safetensors"
    save_file(load_file(file), file)  # as it was written before there was a key
    assert torch.equal(jobs.text_job(tmp_path, args, rows=4).held_out[0][0], kept)


def test_what_diverged_covers_nothing(tmp_path, tiny_llama):
    job = jobs.text_job(tmp_path, jobs.TextArguments(str(tiny_llama), train_rows=4, max_documents=4), rows=4)
    model = job.new_model()
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, torch.nan)
    half = findings.Half(np.arange(4), job.groups)
    assert half.of(findings.Run(0.1, jobs.score(job, model)[None])).cov(1e9) == 1


def test_learning_rates_are_chosen_on_one_half_and_reported_on_the_other(tmp_path):
    measure = SimpleNamespace(n=[2.0], pass_at=[4], choose_n=2.0)
    even, odd = np.log([[0.9, 0.1] * 20]), np.log([[0.1, 0.9] * 20])
    rates = [findings.Run(0.1, even), findings.Run(0.2, odd), findings.Run(0.3, odd)]
    runs = {findings.START: [findings.Run(None, odd)], findings.BASELINE: rates}
    findings.report(tmp_path, measure, SimpleNamespace(groups=np.arange(40)), runs)
    for table in (tmp_path / "table.md").read_text().split("\n\n")[1::2]:
        *_, start, baseline = (line.split(" | ") for line in table.strip().splitlines())
        assert baseline[1] == "0.1 ↓"
        assert baseline[3].startswith("1 [")  # the odd rows have p = 0.1
        assert baseline[4].strip("*").startswith(f"{1 - 0.9**4:.3f} [")
        assert start[5].startswith("-1 [")  # and 0.9 before
