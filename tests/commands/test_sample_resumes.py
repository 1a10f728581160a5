"""An interrupted `sample` goes on where it was: the corpus is that of a run that was not interrupted, to the byte."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import GPT2Config, GPT2LMHeadModel

from hf_coverage import sample_corpus
from hf_coverage.inference.sampler import Sampler
from hf_coverage.measure.engine import ScoringEngine
from tests.commands.shell import PROMPTS, error_line, invoke, load

SAMPLED = "sample prompts.jsonl --teacher teacher --k 4 --max-new-tokens 3 --batch-size 2 --shard-rows 4"
WINDOWS = "sample text.txt --from texts --teacher teacher --prompt-tokens 3 --response-tokens 2"
PAIRS = "sample pairs.jsonl --from pairs --teacher teacher"


def interrupt_after(monkeypatch, owner, name, calls):
    """Let a method be interrupted as by Ctrl-C after some calls."""
    original, done = getattr(owner, name), []

    def method(*arguments, **options):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, method)


def corpus_files(folder):
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    origin = json.loads(files.pop("origin.json"))
    return files, origin | {"command": None}


@pytest.mark.parametrize(("calls", "how"), [(0, ""), (1, ""), (3, ""), (1, " --stratified")])
def test_an_interrupted_sampling_goes_on(work, monkeypatch, calls, how):
    sampled = SAMPLED + how
    invoke(f"{sampled} -o whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, Sampler, "draw", calls)
        assert "Run the same command again to go on" in invoke(f"{sampled} -o out", code=130)
    assert Path("out").exists() == bool(calls)
    if calls:
        assert [path.name for path in Path("out").iterdir()] == [".unfinished"]
        assert "seed was 0, now 1" in error_line(f"{sampled} --seed 1 -o out")
        assert "something else" in error_line(f"{WINDOWS.replace('--teacher', '--tokenizer')} -o out")
        assert "must be of format" in error_line(f"{WINDOWS} -o out")
    with monkeypatch.context() as patch:
        interrupt_after(patch, Sampler, "draw", 5 - calls)  # no more than what is missing is drawn
        invoke(f"{sampled} -o out")
    assert corpus_files("out") == corpus_files("whole")
    assert "is not empty" in error_line(f"{sampled} -o out")


def test_stratified_responses_are_the_library_s(work):
    invoke(f"{SAMPLED} --stratified -o out")
    model, tokenizer = load(work, "teacher")
    options = {"k": 4, "max_new_tokens": 3, "batch_size": 2, "progress": False}
    expected = sample_corpus(model, tokenizer, PROMPTS, stratified=True, **options)
    assert load_from_disk("out")["completion"][:] == expected["completion"][:]
    assert expected["completion"][:] != sample_corpus(model, tokenizer, PROMPTS, **options)["completion"][:]
    assert json.loads(Path("out/origin.json").read_text())["stratified"] is True
    assert "`--from texts` has none: leave it out" in invoke(f"{WINDOWS} --stratified -o windows", code=2)


@pytest.mark.parametrize("command", [WINDOWS, PAIRS])
def test_an_interrupted_teacher_goes_on(work, monkeypatch, command):
    (work / "pairs.jsonl").write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 3)
    invoke(f"{command} -o whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, ScoringEngine, "score_rules", 0)
        invoke(f"{command} -o out", code=130)
    assert not Path("out").exists()
    invoke(f"{command} -o out")
    assert corpus_files("out") == corpus_files("whole")


def test_a_run_that_broke_off_while_it_put_the_corpus_in_its_place_goes_on(work, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    for command in (SAMPLED, WINDOWS.replace("--teacher", "--tokenizer")):
        monkeypatch.setattr("hf_coverage.commands.sample.Path.rmdir", fail, raising=False)
        assert "No space left" in error_line(f"{command} -o out")
        monkeypatch.undo()
        monkeypatch.chdir(work)
        invoke(f"{command} -o out")
        invoke(f"{command} -o whole")
        assert corpus_files("out") == corpus_files("whole")
        for folder in ("out", "whole"):
            for path in Path(folder).iterdir():
                path.unlink()


class PadsWrong(GPT2LMHeadModel):
    """Takes padding for text, so that prompts of unequal length may not stand side by side."""

    def forward(self, *arguments, attention_mask=None, **options):
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, PadsWrong])
def test_shards_and_what_was_kept_of_them_do_not_change_the_samples(tmp_path, model_class):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32, initializer_range=0.5)
    prompts = [[1, 2], [3, 4], [5, 6], [7], [2, 3, 4], [5, 6, 7, 8], [1, 1, 1]]
    options = {"k": 2, "max_new_tokens": 4, "eos_token_id": 0, "batch_size": 4, "progress": False}

    def sample(**more):
        return sample_corpus(model_class(config).eval(), None, prompts, **options, **more)[:]

    state = torch.get_rng_state()

    def again(**more):
        torch.set_rng_state(state)
        return sample(**more)

    whole = again()
    kept = {"output_dir": tmp_path / "kept", "shard_rows": 4}
    assert again(**kept) == whole
    for index in (0, 2):
        (tmp_path / "kept" / f"samples-{index:05d}.jsonl").unlink()
        assert again(**kept) == whole
    assert Dataset.from_dict(whole).num_rows == 14
