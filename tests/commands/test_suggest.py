"""`hf-coverage suggest`: what it prints and writes is what the library says."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_coverage import measure_inherent_variance
from hf_coverage.commands.suggest import measure
from hf_coverage.functional.step_sizes import (
    LinearProblem,
    TrainingPlan,
    distillation_step_sizes,
    normalized_step_sizes,
    token_level_step_sizes,
)
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.inherent_variance import gradient_norms
from tests.commands.shell import error_line, invoke, load
from tests.processes import run

COMMAND = "suggest student --data corpus --n 16 --steps 1000 --output-dir out"


def strict(path):
    """JSON without the numbers that JSON does not have."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def test_suggest_is_the_library_s(work):
    output = invoke(f"{COMMAND} --gradient-norms 3 --batch-size 4 --seed 5")
    found = strict("out/suggestion.json")
    model, tokenizer = load(work, "student")
    corpus = load_from_disk("corpus")
    expected = measure_inherent_variance(model, tokenizer, corpus, progress=False)
    radius = model.lm_head.weight.double().norm().item()
    problem, plan = LinearProblem(expected.feature_norm, expected.sampled.mean, radius), TrainingPlan(16, 1000, 0.1, 4)
    measured = found["measured"]
    assert measured["radius"] == pytest.approx(radius)
    assert measured["feature_bound"] == pytest.approx(radius * expected.feature_norm)
    assert measured["inherent_variance"] == measured["sample_form"]["mean"] == pytest.approx(expected.sampled.mean)
    assert measured["expectation_form"] == pytest.approx(expected.expected._asdict())
    assert measured["inherent_variance_interval"] == pytest.approx(expected.interval())
    assert measured["sample_form"]["num_groups"] == 5
    assert measured["effective_length"] == pytest.approx(problem.effective_length)
    for theorem, function in (
        ("5.1", normalized_step_sizes),
        ("6.1", token_level_step_sizes),
        ("6.2", distillation_step_sizes),
    ):
        sizes = function(problem, plan)
        entry = found["theorems"][theorem]
        assert (entry["lr"], entry["sum"]) == pytest.approx((sizes.lr, sizes.total))
        assert entry["terms"] == pytest.approx(dict(sizes.terms))
        assert (entry["batch_size"], entry["dominant"]) == (sizes.batch_size, sizes.dominant)
        assert f"{sizes.lr:.3g}" in output
    norms = gradient_norms(model, encode_corpus(corpus, tokenizer), batch_size=4, num_batches=3, seed=5)
    assert found["gradient_norms"] == pytest.approx(norms.tolist(), rel=1e-5)
    assert found["practice"]["lam"] == pytest.approx(sorted(norms)[1] / 10)
    assert found["plan"] == {"n": 16, "steps": 1000, "eps": 0.1, "batch_size": 4}
    assert found["origin"]["command"].startswith("hf-coverage suggest student")
    assert "s2 needs D's next-token distribution, which the corpus does not tell" in output
    assert "The head is the input embedding too" in output
    for text in (*found["assumptions"], found["verdict"]):
        assert text in output


def test_what_is_printed_can_be_pasted(work):
    from hf_coverage import NormalizedSGD

    output = invoke(f"{COMMAND} --gradient-norms 2")
    model, _ = load(work, "student")
    snippets = re.findall(r"NormalizedSGD\(.*?\(\), [^)]*\)", output)
    assert len(snippets) == 2
    groups = [eval(text, {"NormalizedSGD": NormalizedSGD, "model": model}).param_groups[0] for text in snippets]
    found = strict("out/suggestion.json")
    theorem, practice = found["theorems"]["5.1"], found["practice"]
    assert (groups[0]["lr"], groups[0]["lam"]) == pytest.approx((theorem["lr"], theorem["lam"]), rel=0.01)
    assert (groups[1]["lr"], groups[1]["lam"]) == pytest.approx((practice["lrs"][2], practice["lam"]), rel=0.06)


def test_without_gradients_it_says_how_to_measure_them(work):
    output = invoke(f"{COMMAND} --eps 0.05 --radius 0.5")
    found = strict("out/suggestion.json")
    assert found["practice"] is None
    assert found["gradient_norms"] == []
    assert "--gradient-norms 8" in output
    assert found["measured"]["radius"] == 0.5
    assert found["theorems"]["5.1"]["terms"]["minibatch"] <= 0.05


def test_a_teacher_s_distributions_are_d_s(work):
    output = invoke(f"{COMMAND} --teacher teacher")
    found = strict("out/suggestion.json")["measured"]
    assert found["inherent_variance_form"] == "expectation"
    assert found["inherent_variance"] == found["expectation_form"]["mean"]
    assert "the teacher's next-token distributions" in output
    invoke(COMMAND.replace("-dir out", "-dir own"))
    assert strict("own/suggestion.json")["measured"]["expectation_form"] != found["expectation_form"]


@pytest.mark.parametrize(
    ("options", "words"), [("--radius 100", "are vacuous"), ("--radius 0.01", "may say something")]
)
def test_it_says_whether_the_bounds_are_vacuous(work, options, words):
    output = invoke(f"{COMMAND} {options}")
    theorems = strict("out/suggestion.json")["theorems"].values()
    assert all(entry["is_vacuous"] for entry in theorems) == (words == "are vacuous")
    assert words in output


def test_one_group_gives_null_and_a_dash(work):
    Dataset.from_dict({"prompt": ["the cat"] * 2, "completion": [" sat", " ran on"]}).to_json("one.jsonl")
    output = invoke("suggest student --data one.jsonl --n 2 --steps 10 -o out")
    assert strict("out/suggestion.json")["measured"]["inherent_variance_interval"] == [None, None]
    assert "[–, –]" in output


def test_an_interrupted_command_goes_on_with_what_is_there(work):
    invoke(COMMAND)
    before, kept = (
        strict("out/suggestion.json"),
        Path("out/head_statistics/scores-00000.safetensors").stat().st_mtime_ns,
    )
    invoke(COMMAND.replace("--steps 1000", "--steps 10"))
    after = strict("out/suggestion.json")
    assert after["measured"] == before["measured"]
    assert after["theorems"] != before["theorems"]
    assert Path("out/head_statistics/scores-00000.safetensors").stat().st_mtime_ns == kept
    assert "holds the scores of something else" in error_line(COMMAND.replace("student", "other"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--n 16", "--n 1"), "`n` must be above 1: the step sizes have log N in them"),
        (("--n 16", "--n 0.5"), "`n` must be a finite number >= 1"),
        (("--steps 1000", "--steps 1 --eps 2"), "`eps` must lie strictly between 0 and 1"),
        (("--data corpus", "--data missing.jsonl"), "there is no file missing.jsonl"),
        (("--data corpus", "--data prompts.jsonl"), "`completion`"),
        (("--data corpus", "--data empty.jsonl"), "Row 1, column `completion`"),
        (("student", "capped --tokenizer teacher"), "scaling or soft-capping"),
    ],
)
def test_a_failure_is_one_line(work, changed, message):
    Dataset.from_dict({"prompt": ["the cat", "a dog"], "completion": [" sat", ""]}).to_json("empty.jsonl")
    if "capped" in changed[1]:
        small = {"vocab_size": 13, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
        Gemma2ForCausalLM(Gemma2Config(**small, pad_token_id=0, final_logit_softcapping=5.0)).save_pretrained("capped")
    assert message in error_line(COMMAND.replace(*changed))
    assert not Path("out/suggestion.json").exists()


def test_a_wrong_radius_is_a_usage_error(work):
    assert "must be from 1e-30 to 1e30" in invoke(f"{COMMAND} --radius 0", code=2)


def test_smollm2_s_bounds_are_vacuous(smollm2):
    model, tokenizer = smollm2
    pairs = [("The capital of France is", " Paris."), ("Water boils at", " 100 degrees Celsius at sea level.")]
    corpus = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    found = measure(model, corpus, TrainingPlan(16, 1000), tokenizer=tokenizer)
    assert found.tied
    assert 600 < found.radius < 800
    assert 20 < found.found.feature_norm < 200
    assert 0 < found.problem.effective_length < found.found.mean_length * 2
    assert all(sizes.is_vacuous for sizes in found.sizes.values())
    assert found.normalized.dominant == "feature norm"
    assert found.normalized.lr == pytest.approx(1 / (128 * found.found.feature_norm))
    assert "The bounds are vacuous" in found.verdict()


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_speak_once(work):
    options = "suggest student --data corpus -n 16 --steps 1000 --gradient-norms 3 --device cpu"
    printed = run(*f"-m hf_coverage {options} -o two".split(), ranks=2)
    assert printed.count("What this takes for granted") == 1
    invoke(f"{options} -o one")
    one, two = strict("one/suggestion.json"), strict("two/suggestion.json")
    assert two["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-5)
    assert two["measured"]["sample_form"] == pytest.approx(one["measured"]["sample_form"], rel=1e-5)
