"""From prompts to a model card: every number is the library's."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from huggingface_hub import ModelCard

from hf_coverage import ScoreTable, sample_corpus, score_answers, score_responses
from hf_coverage.functional.paired import paired_coverage_difference
from tests.commands.shell import PROMPTS, error_line, invoke, library_profile, load, results_in
from tests.processes import run


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


def test_many_models_get_several_pictures(work, undrawn):
    scored = score_responses(*load(work, "student"), load_from_disk("corpus"), progress=False)
    for index in range(9):
        scored.to_parquet(f"model-{index}.parquet")
    sources = " ".join(f"model-{index}.parquet" for index in range(9))
    invoke(f"profile {sources} --n 2 --output-dir out")
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["profile-2.png", "profile.png"]
    invoke(f"report {sources} --n 2 --output-dir out")
    assert "Coverage of 9 models" in Path("out/report.html").read_text(encoding="utf-8")


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


def test_answer_level_scores_keep_their_kind(work):
    corpus = Dataset.from_dict({"prompt": PROMPTS, "answer": ["sat", "ran", "red", "on", "."]})
    options = {"separator": "and", "samples": 8, "max_reasoning_tokens": 20, "progress": False}
    scores = score_answers(*load(work, "student"), corpus, **options)
    scores.to_parquet("answers.parquet")
    output = invoke("profile answers.parquet --n 2 --output-dir out")
    assert "answer-level Cov_2" in output
    expected = np.mean(-np.asarray(scores["answer_logprob"]) >= np.log(2))
    assert results_in("out")["results"]["answers"]["cov_2,none"] == expected
    assert results_in("out")["configs"]["answers"]["reference"] == "answer"


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


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_speak_once(work):
    options = "score student corpus --shard-rows 8"
    printed = run(*f"-m hf_coverage {options} -o two".split(), ranks=2)
    assert printed.count("student: 30 responses") == 1
    np.testing.assert_allclose(ScoreTable.open("two").logprob, ScoreTable.open("scores/student").logprob, atol=1e-5)
    invoke("profile two --output-dir out")
