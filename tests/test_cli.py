"""The command line, from prompts to a model card, on models that fit in a test."""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_coverage
from hf_coverage import CoverageProfile, sample_corpus, score_responses
from hf_coverage.cli import app
from hf_coverage.functional.paired import paired_coverage_difference

ROOT = Path(hf_coverage.__file__).parents[1]
WORDS = ["<s>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", ".", "red", "blue"]
PROMPTS = ["the cat", "a dog", "red mat", "blue cat sat", "the red dog"]
COMMANDS = ["sample", "score", "profile", "compare", "report"]


def invoke(command, code=0):
    """What a command prints, after checking its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/bin/hf-coverage", *shlex.split(command)])
        result = CliRunner().invoke(app, sys.argv[1:])
    assert result.exit_code == code, result.output
    return result.output


def error_line(command, code=1):
    """The one line that a failing command prints, after what progress bars left."""
    *before, last = re.split(r"[\r\n]+", invoke(command, code).strip())
    assert last.startswith("Error: ")
    assert not [line for line in before if "Error" in line or "Traceback" in line]
    return last


def results_in(folder):
    (path,) = Path(folder).glob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """A teacher, two students and their tokenizer, as folders."""
    folder = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    config = {"vocab_size": len(WORDS), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2}
    for seed, name in enumerate(["teacher", "student", "other"]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0, initializer_range=0.3))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def measured_folder(models_folder, tmp_path_factory):
    """Prompts, the corpus sampled for them, and the scores of both students: what most commands begin with."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name in ("teacher", "student", "other"):
            (folder / name).symlink_to(models_folder / name)
        Dataset.from_dict({"prompt": PROMPTS}).to_json(folder / "prompts.jsonl")
        (folder / "text.txt").write_text("the cat sat on the mat .\na dog ran on the red mat and sat .\n" * 4)
        invoke("sample prompts.jsonl --teacher teacher --k 6 --max-new-tokens 5 --seed 3 --output-dir corpus")
        for name in ("student", "other"):
            invoke(f"score {name} corpus --output-dir scores/{name} --shard-rows 8")
    return folder


@pytest.fixture
def work(measured_folder, tmp_path, monkeypatch):
    """An empty working folder from which the measured things can be reached."""
    for path in measured_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder, name):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "teacher")
    return GPT2LMHeadModel.from_pretrained(folder / name).eval(), tokenizer


def library_profile(folder, name):
    """The profile that the library gives without the command line."""
    corpus = load_from_disk(folder / "corpus")
    scores = score_responses(*load(folder, name), corpus, progress=False)
    return CoverageProfile.from_logprobs(
        scores["logprob"], corpus["reference_logprob"], groups=corpus["prompt"], name=name
    )


def test_sample_is_the_library_s_corpus(work):
    model, tokenizer = load(work, "teacher")
    expected = sample_corpus(model, tokenizer, PROMPTS, k=6, max_new_tokens=5, seed=3, progress=False)
    corpus = load_from_disk(work / "corpus")
    assert corpus.to_dict() == expected.to_dict()
    origin = json.loads((work / "corpus" / "origin.json").read_text())
    assert (origin["seed"], origin["teacher"], origin["temperature"]) == (3, "teacher", 1.0)


def test_profile_prints_and_writes_the_library_s_numbers(work):
    output = invoke("profile scores/student scores/other --n 2,5.7 --log-samples --output-dir out")
    found = results_in("out")
    for name in ("student", "other"):
        profile = library_profile(work, name)
        expected = {f"{key},none": value for key, value in profile.metrics([2, 5.7]).items()}
        assert found["results"][name] == pytest.approx(expected | {"alias": name})
        low, high = profile.interval(5.7)
        assert f"{profile.cov(5.7):.3f} [{low:.3f}, {high:.3f}]" in output
    assert "Lower is better" in output
    assert len(list(Path("out").glob("samples_*.jsonl"))) == 2
    assert (work / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert found["config"]["models"]["student"]["corpus"] == "corpus"


def test_compare_prints_and_writes_paired_differences(work):
    output = invoke("compare scores/student scores/other --n 4 --output-dir out")
    student, other = (library_profile(work, name) for name in ("student", "other"))
    expected = paired_coverage_difference(other.log_ratios, student.log_ratios, 4, groups=student.groups)
    found = results_in("out")["comparisons"]["other"]
    assert found["baseline"] == "student"
    assert found["cov_4,none"] == pytest.approx(expected._asdict())
    assert f"[{expected.low:.3f}, {expected.high:.3f}]" in output


def test_report_writes_a_page_and_cards(work):
    invoke("report scores/student scores/other --card --license mit --title 'Two students' --output-dir out")
    page = (work / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>Two students</h1>" in page
    assert "Paired differences to student" in page
    for command in ("sample prompts.jsonl", "score student corpus", "score other corpus", "report scores/student"):
        assert f"hf-coverage {command}" in page
    data = ModelCard.load(work / "out" / "cards" / "other" / "README.md").data
    values = {entry.metric_type: entry.metric_value for entry in data.eval_results}
    assert data.license == "mit"
    assert values["cov_16"] == pytest.approx(library_profile(work, "other").cov(16), abs=1e-6)
    fingerprint = json.loads((work / "scores" / "other" / "metadata.json").read_text())["corpus"]
    assert data.eval_results[0].dataset_args["fingerprint"] == fingerprint


def test_models_are_scored_on_the_way_where_a_corpus_is_given(work):
    invoke("profile student --corpus corpus --device cpu --dtype float32 --output-dir out")
    assert results_in("out")["results"]["student"]["kl,none"] == pytest.approx(library_profile(work, "student").kl)
    assert (work / "out" / "scores" / "student" / "scores-00000.safetensors").is_file()


def test_scored_rows_from_a_file_are_profiled(work):
    corpus = load_from_disk(work / "corpus")
    scores = score_responses(*load(work, "student"), corpus, progress=False)
    scores.to_parquet(work / "student.parquet")
    invoke("profile student.parquet --output-dir out")
    assert results_in("out")["results"]["student"]["kl,none"] == pytest.approx(library_profile(work, "student").kl)


def test_an_interrupted_score_goes_on_and_ends_with_the_same_bytes(work):
    invoke("score student corpus --output-dir again --shard-rows 8")
    whole = {path.name: path.read_bytes() for path in (work / "again").glob("*")}
    assert len([name for name in whole if name.startswith("scores-")]) == 4
    for name in ("scores-00001.safetensors", "reference.json", "reference.safetensors"):
        (work / "again" / name).unlink()
    kept = (work / "again" / "scores-00002.safetensors").stat().st_mtime_ns
    assert "lacks 1 of 4 shards" in error_line("profile again --output-dir out")
    invoke("score student corpus --output-dir again --shard-rows 8")
    assert {path.name: path.read_bytes() for path in (work / "again").glob("*")} == whole
    assert (work / "again" / "scores-00002.safetensors").stat().st_mtime_ns == kept


def test_scores_of_another_model_are_not_mixed_in(work):
    invoke("score student corpus --output-dir again")
    assert "holds the scores of something else (model.weights" in error_line("score other corpus --output-dir again")


def test_a_score_table_without_its_reference_says_how_to_get_it(work):
    corpus = load_from_disk(work / "corpus")
    score_responses(*load(work, "student"), corpus, output_dir=work / "bare", progress=False)
    assert "run `hf-coverage score` into it once more" in error_line("profile bare")
    invoke("score student corpus --output-dir bare")
    invoke("profile bare")


def test_plain_text_gives_an_upper_bound_under_its_own_name(work):
    output = invoke(
        "sample text.txt --from texts --tokenizer teacher --prompt-tokens 3 --response-tokens 2 --output-dir windows"
    )
    assert "upper bound" in output
    invoke("score student windows --output-dir plain")
    output = invoke("profile plain --output-dir out")
    metrics = results_in("out")["results"]["student"]
    assert "cov_upper_16,none" in metrics
    assert not [key for key in metrics if key.startswith(("cov_1", "kl"))]
    assert "upper bound on Cov_16" in output
    # every window comes from the one document, so there is one independent draw only
    assert results_in("out")["configs"]["student"]["num_prompts"] == 1


def test_pairs_are_scored_by_the_teacher_and_the_end_of_sequence_is_on_both_sides(work):
    Dataset.from_dict({"prompt": ["the cat", "a dog"], "completion": [" sat", " ran on"]}).to_json("pairs.jsonl")
    invoke("sample pairs.jsonl --from pairs --teacher teacher --append-eos --output-dir pairs")
    assert "`append_eos` must be True" in error_line("score student pairs --output-dir pair_scores")
    invoke("score teacher pairs --append-eos --output-dir pair_scores")
    invoke("profile pair_scores --output-dir out")
    assert results_in("out")["results"]["teacher"]["kl,none"] == pytest.approx(0.0, abs=1e-5)


def test_models_on_other_rows_are_not_compared(work):
    invoke("sample prompts.jsonl --teacher teacher --k 2 --max-new-tokens 5 --output-dir small")
    invoke("score other small --output-dir small_scores")
    assert "student and other were scored on different rows (30 and 10)" in error_line(
        "compare scores/student small_scores"
    )


def test_the_configuration_file_gives_defaults_and_the_command_line_wins(work):
    (work / "run.yaml").write_text("sources: [scores/student, scores/other]\nn: [3, 5.7]\noutput-dir: from_file\n")
    invoke("profile --config run.yaml")
    assert list(results_in("from_file")["intervals"]["other"]) == ["cov_3,none", "cov_5.7,none"]
    invoke("profile scores/student --config run.yaml --n 7 --output-dir from_line")
    found = results_in("from_line")
    assert list(found["results"]) == ["student"]
    assert list(found["intervals"]["student"]) == ["cov_7,none"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("levels: 3", "unknown key `levels`"),
        ("- n", "must hold `option: value` lines"),
        ("n: [", "cannot be read"),
    ],
)
def test_a_wrong_configuration_file_is_a_usage_error(work, content, message):
    (work / "run.yaml").write_text(content)
    output = invoke("profile scores/student --config run.yaml", code=2)
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        "profile",
        "profile scores/student --n 0.5",
        "profile scores/student --n many",
        "compare scores/student",
        "sample prompts.jsonl --output-dir new",
        "sample text.txt --from texts --output-dir new",
        "score student corpus --output-dir new --dtype int8",
        "unknown",
    ],
)
def test_a_wrong_command_line_exits_with_2(work, command):
    assert "Usage" in invoke(command, code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score student missing.jsonl --output-dir new", "there is no file missing.jsonl"),
        ("sample prompts.jsonl --teacher teacher --output-dir corpus", "`output_dir` corpus is not empty"),
        ("sample prompts.jsonl --teacher teacher --column x --output-dir new", "`column` must be one of"),
        ("sample prompts.jsonl --teacher teacher --temperature 0 --output-dir new", "`temperature` must be positive"),
        ("profile prompts.jsonl", "there is no column `logprob`"),
        ("profile scores/student --regret 2", "`regret` must lie strictly between 0 and 1"),
        ("report scores/student scores/student", "two are called 'student'"),
        ("score student corpus --group-by x --output-dir new", "`group_by` must be a column of the corpus"),
        ("score student README --output-dir new", "must be .jsonl, .json, .parquet, .csv or .txt"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(work, command, message):
    (work / "README").write_text("no data")
    assert message in error_line(command)
    assert not (work / "new").exists()


def test_debug_shows_the_error_itself(work):
    result = CliRunner().invoke(app, shlex.split("--debug score student missing.jsonl --output-dir new"))
    assert isinstance(result.exception, FileNotFoundError)


def test_help_teaches_and_loads_no_heavy_library():
    done = subprocess.run([sys.executable, "-m", "hf_coverage", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(f"hf-coverage {command}" in done.stdout for command in COMMANDS)
    check = (
        "import sys, hf_coverage.cli; print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_an_example(command):
    assert f"hf-coverage {command} " in invoke(f"{command} --help").replace("\n", " ")


def test_the_version_is_the_package_s():
    assert invoke("--version") == f"hf-coverage {hf_coverage.__version__}\n"


def test_hf_runs_it_as_an_extension(tmp_path):
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    name = extensions._get_executable_name("coverage")
    assert f'\n[project.scripts]\n{name} = "hf_coverage.cli:app"\n' in (ROOT / "pyproject.toml").read_text()
    program = tmp_path / name
    program.write_text(f"#!{sys.executable}\nfrom hf_coverage.cli import app\napp()\n")
    program.chmod(0o755)
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / name
    extensions.ExtensionManifest(
        owner="org",
        repo=name,
        repo_id=f"org/{name}",
        short_name="coverage",
        executable_path=str(program),
        type="python",
        installed_at=datetime.now(timezone.utc),
    ).save(folder)
    environment = os.environ | {"HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "coverage", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"hf-coverage {hf_coverage.__version__}\n"


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_speak_once(work):
    command = "-m torch.distributed.run --nproc_per_node 2 -m hf_coverage score student corpus -o two --shard-rows 8"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student: 30 responses") == 1
    one, two = (np.concatenate([_logprobs(path) for path in _shards(name)]) for name in ("scores/student", "two"))
    np.testing.assert_allclose(two, one, atol=1e-5)
    invoke("profile two --output-dir out")


def _shards(folder):
    return sorted(Path(folder).glob("scores-*.safetensors"))


def _logprobs(path):
    from safetensors.numpy import load_file

    return load_file(path)["logprob"]
