"""The `evaluate` modules through `evaluate` itself: loaded from the package's folders, offline."""

import doctest
import importlib
import inspect
import itertools
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import yaml
from scipy import stats

import hf_coverage
from hf_coverage.evaluate_modules.widget import build_widget, computation
from hf_coverage.functional.coverage_profile import coverage_interval
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference
from hf_coverage.functional.statistics import bounded_mean_interval
from tests.processes import Job

INF = math.inf
ROOT = Path(hf_coverage.__file__).parent.parent
MODULES = {"coverage": "metric", "coverage_comparison": "comparison"}


@pytest.fixture
def load(tmp_path):
    """Load a module of the package, its cache in a folder of its own."""

    def load(name="coverage", **kwargs):
        return evaluate.load(hf_coverage.evaluate_module(name), cache_dir=str(tmp_path / "cache"), **kwargs)

    return load


@pytest.fixture(scope="module")
def corpus():
    """Log-probabilities of a reference and two models on 60 rows, three responses a prompt, as Python floats."""
    rng = np.random.default_rng(0)
    reference = -rng.exponential(3.0, size=60)
    difficulty = np.repeat(rng.normal(1.0, 1.0, size=20), 3)
    models = [np.minimum(reference - difficulty - rng.normal(shift, 1.0, size=60), 0.0) for shift in (0.5, 0.0)]
    prompts = [f"prompt {i // 3}" for i in range(60)]
    return reference.tolist(), models[0].tolist(), models[1].tolist(), prompts


def test_metric_agrees_with_loops_from_the_definition(load, corpus):
    references, predictions, _, _ = corpus
    results = load().compute(predictions=predictions, references=references, n=[1, 2, 5.7, 16])
    for n in (1, 2, 5.7, 16):
        hits = [float(math.exp(d - p) >= n) for d, p in zip(references, predictions)]
        share = sum(hits) / len(hits)
        assert results[f"cov_{n}"] == pytest.approx(share, abs=1e-15)
        assert results[f"cov_{n}_stderr"] == pytest.approx(stats.sem(hits), rel=1e-12)
        exact = stats.binomtest(int(sum(hits)), len(hits)).proportion_ci(method="exact")
        assert (results[f"cov_{n}_low"], results[f"cov_{n}_high"]) == pytest.approx((exact.low, exact.high))
        missed = [(1 - min(1.0, math.exp(p - d))) ** n for d, p in zip(references, predictions)]
        assert results[f"miss_{n}"] == pytest.approx(sum(missed) / len(missed))
        assert results[f"miss_{n}_stderr"] == pytest.approx(stats.sem(missed), rel=1e-9)
        assert 0 <= results[f"miss_{n}_low"] < results[f"miss_{n}"] < results[f"miss_{n}_high"] <= 1
    for key, values in (
        ("kl", [d - p for d, p in zip(references, predictions)]),
        ("sequence_cross_entropy", [-p for p in predictions]),
    ):
        mean = sum(values) / len(values)
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        found = [results[key + suffix] for suffix in ("", "_stderr", "_low", "_high")]
        assert found == pytest.approx([mean, stats.sem(values), low, high], rel=1e-12)


def test_results_are_plain_floats_under_the_documented_keys(load, corpus):
    references, first, second, _ = corpus
    metric = load().compute(predictions=first, references=references)
    names = [f"{kind}_{n}" for kind in ("cov", "miss") for n in (2, 4, 8, 16)] + ["kl", "sequence_cross_entropy"]
    assert list(metric) == [name + end for name in names for end in ("", "_stderr", "_low", "_high")]
    comparison = load("coverage_comparison").compute(predictions1=first, predictions2=second, references=references)
    ends = ("_1", "_2", "_difference", "_difference_low", "_difference_high", "_difference_p")
    assert list(comparison) == [name + end for name in names[:-1] for end in ends]
    assert {type(value) for value in [*metric.values(), *comparison.values()]} == {float}


def test_groups_widen_the_intervals_and_confidence_sets_their_level(load, corpus):
    references, predictions, _, prompts = corpus
    independent = load().compute(predictions=predictions, references=references, n=2)
    grouped = load().compute(predictions=predictions, references=references, n=2, groups=prompts)
    generator = load().compute(predictions=predictions, references=references, n=2, groups=(p for p in prompts))
    strict = load().compute(predictions=predictions, references=references, n=2, groups=prompts, confidence=0.99)
    assert generator == grouped
    ratios = np.subtract(references, predictions)
    assert (grouped["cov_2_low"], grouped["cov_2_high"]) == coverage_interval(ratios, 2, groups=prompts)
    for key in ("cov_2", "kl"):
        assert grouped[key] == independent[key]
        assert grouped[f"{key}_stderr"] > independent[f"{key}_stderr"]
        assert strict[f"{key}_low"] < grouped[f"{key}_low"] < independent[f"{key}_low"]
        assert strict[f"{key}_high"] > grouped[f"{key}_high"] > independent[f"{key}_high"]


def test_minus_infinity_is_a_legal_prediction(load):
    results = load().compute(predictions=[-INF, -1.0, -1.0], references=[-1.0, -1.0, -1.0], n=[2, 1e9])
    assert results["cov_2"] == results["cov_1000000000"] == pytest.approx(1 / 3)
    assert results["kl"] == results["sequence_cross_entropy"] == INF
    assert math.isnan(results["kl_stderr"])
    assert math.isnan(results["kl_low"])


def test_float64_survives_the_cache(load):
    """In float32 the two log-probabilities would be equal and the tie would be decided the other way."""
    references = [-100.0 + math.log(2) + 1e-6]
    assert load().compute(predictions=[-100.0], references=references, n=2)["cov_2"] == 1.0
    assert load().compute(predictions=[-100.0 + 3.5e-6], references=references, n=2)["cov_2"] == 0.0


def test_comparison_agrees_with_independent_paired_tests(load, corpus):
    references, first, second, prompts = corpus
    inputs = {"predictions1": first, "predictions2": second, "references": references}
    results = load("coverage_comparison", module_type="comparison").compute(**inputs, n=[2, 16])
    ratios = [np.subtract(references, model) for model in (first, second)]
    for n in (2, 16):
        shares = [float(np.mean(ratio >= math.log(n))) for ratio in ratios]
        assert [results[f"cov_{n}_1"], results[f"cov_{n}_2"]] == pytest.approx(shares)
        assert results[f"cov_{n}_difference"] == pytest.approx(shares[0] - shares[1])
        change = (ratios[0] >= math.log(n)) * 1.0 - (ratios[1] >= math.log(n))
        ends = [2 * end - 1 for end in bounded_mean_interval((change + 1) / 2)]
        assert [results[f"cov_{n}_difference_{end}"] for end in ("low", "high")] == pytest.approx(ends)
        assert (results[f"cov_{n}_difference_p"] < 0.05) == (ends[0] > 0 or ends[1] < 0)
        assert results[f"cov_{n}_difference_low"] < shares[0] - shares[1] < results[f"cov_{n}_difference_high"]
    test = stats.ttest_rel(second, first)
    assert results["kl_difference_p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert [results["kl_difference_low"], results["kl_difference_high"]] == pytest.approx(list(interval))
    assert results["kl_difference"] == pytest.approx(results["kl_1"] - results["kl_2"])
    grouped = load("coverage_comparison").compute(**inputs, n=2, groups=prompts)
    expected = {
        "cov_2_difference": paired_coverage_difference(*ratios, 2, groups=prompts),
        "kl_difference": paired_kl_difference(*ratios, groups=prompts),
    }
    for key, values in expected.items():
        assert [grouped[key + end] for end in ("", "_low", "_high", "_p")] == pytest.approx(list(values))
    assert grouped["kl_difference_p"] != pytest.approx(results["kl_difference_p"])


def test_swapping_the_models_turns_every_difference_round(load, corpus):
    references, first, second, prompts = corpus
    module = load("coverage_comparison")
    one = module.compute(predictions1=first, predictions2=second, references=references, groups=prompts)
    two = module.compute(predictions1=second, predictions2=first, references=references, groups=prompts)
    for key in ("cov_2", "cov_16", "kl"):
        assert one[f"{key}_1"] == two[f"{key}_2"]
        assert one[f"{key}_difference"] == pytest.approx(-two[f"{key}_difference"])
        assert one[f"{key}_difference_low"] == pytest.approx(-two[f"{key}_difference_high"])
        assert one[f"{key}_difference_p"] == pytest.approx(two[f"{key}_difference_p"])


def test_comparing_a_model_with_itself_finds_nothing(load, corpus):
    references, first, _, _ = corpus
    results = load("coverage_comparison").compute(predictions1=first, predictions2=first, references=references, n=2)
    assert results["cov_2_difference"] == results["kl_difference"] == 0
    assert results["cov_2_difference_p"] == results["kl_difference_p"] == 1
    assert results["cov_2_difference_low"] < 0 < results["cov_2_difference_high"]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([-1.0, math.nan], [-1.0, -1.0], r"`predictions` must hold natural-log probabilities.*row 1 is nan"),
        ([-1.0, None], [-1.0, -1.0], r"`predictions` .*row 1 is nan"),
        ([-1.0, 0.5], [-1.0, -1.0], r"`predictions` .*\(<= 0\), but row 1 is 0.5"),
        ([-1.0, -1.0], [math.nan, -1.0], r"`references` .*row 0 is nan"),
        ([-1.0, -1.0], [None, -1.0], r"`references` .*row 0 is nan"),
        ([-1.0, -1.0], [2.0, -1.0], r"`references` .*row 0 is 2.0"),
        ([-1.0, -1.0], [-INF, -1.0], r"`references` .*\(<= 0 and finite\), but row 0 is -inf"),
        ([], [], r"must be a non-empty 1-d sequence of log-probabilities"),
        ([-1.0], [-1.0, -2.0], r"Mismatch in the number of predictions.? \(1\) and references \(2\)"),
        ([[-1.0]], [-1.0], r"match the expected format"),
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_illegal_rows_are_refused_and_the_module_stays_usable(load, name, predictions, references, message):
    module = load(name, keep_in_memory=True)

    def compute(predictions, references):
        if name == "coverage":
            return module.compute(predictions=predictions, references=references, n=2)
        inputs = {"predictions1": [-1.0] * len(predictions), "predictions2": predictions}
        return module.compute(**inputs, references=references, n=2)

    with pytest.raises(ValueError, match=message.replace("predictions", "predictions2?1?")):
        compute(predictions, references)
    after = compute([-3.0], [-1.0])
    assert after["cov_2" if name == "coverage" else "cov_2_2"] == 1.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n": 0.5}, "`n` must be a finite number >= 1"),
        ({"n": [2, INF]}, "`n` must be a finite number >= 1"),
        ({"confidence": 1}, "`confidence` must lie strictly between 0 and 1"),
        ({"groups": ["a"]}, "`groups`"),
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_illegal_arguments_are_refused(load, name, argument, message):
    rows = [-1.0, -2.0]
    inputs = dict.fromkeys(load(name).features, rows)
    with pytest.raises(ValueError, match=message):
        load(name, keep_in_memory=True).compute(**inputs, **argument)


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_rows_may_come_one_by_one_or_in_batches(load, corpus, keep_in_memory):
    references, first, second, prompts = corpus
    whole = load().compute(predictions=first, references=references, groups=prompts)
    metric = load(keep_in_memory=keep_in_memory)
    metric.add_batch(predictions=np.asarray(first[:40]), references=np.asarray(references[:40]))
    for prediction, reference in zip(first[40:], references[40:]):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(groups=prompts) == whole

    inputs = {"predictions1": first, "predictions2": second, "references": references}
    whole = load("coverage_comparison").compute(**inputs)
    comparison = load("coverage_comparison", keep_in_memory=keep_in_memory)
    comparison.add_batch(**{key: rows[:59] for key, rows in inputs.items()})
    comparison.add(predictions1=first[59], predictions2=second[59], reference=references[59])
    assert comparison.compute() == whole


def test_combining_both_modules(load, corpus):
    references, first, second, _ = corpus
    both = evaluate.combine([load(), load("coverage_comparison")])
    both.add_batch(predictions=first, predictions1=first, predictions2=second, references=references)
    results = both.compute(n=[2, 16])
    assert results["cov_16"] == results["cov_16_1"]
    assert results["kl"] == pytest.approx(results["kl_2"] + results["kl_difference"])
    two_models = evaluate.combine({"first": load(), "second": load()})
    results = two_models.compute(predictions=first, references=references, n=[16])
    assert results["first_cov_16"] == results["second_cov_16"] == load().compute(
        predictions=first, references=references, n=16
    )["cov_16"]  # fmt: skip


def test_results_can_be_saved(load, corpus, tmp_path):
    references, predictions, _, _ = corpus
    results = load().compute(predictions=predictions, references=references)
    path = evaluate.save(tmp_path / "results.json", model="tiny", **results)
    saved = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {key: saved[key] for key in results} == results


_RANK = """
import sys, evaluate, hf_coverage
rank, cache = int(sys.argv[1]), sys.argv[2]
module = evaluate.load(hf_coverage.evaluate_module("coverage"), num_process=2, process_id=rank, cache_dir=cache,
                       experiment_id="two")
rows = [[-1.0, -5.0, -2.0], [-float("inf"), -3.0]][rank]
results = module.compute(predictions=rows, references=[-1.0] * len(rows), n=[2, 16],
                         groups=["a", "b", "b", "c", "c"])
print(repr(results))
"""


def test_two_processes_share_the_rows_and_rank_0_gets_the_result(load, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    ranks = [Job(script, rank, tmp_path / "shared") for rank in range(2)]
    done = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in done] == [0, 0], done
    rows = [-1.0, -5.0, -2.0, -INF, -3.0]
    alone = load().compute(predictions=rows, references=[-1.0] * 5, n=[2, 16], groups=["a", "b", "b", "c", "c"])
    assert done[0].stdout.strip() == repr(alone)
    assert done[1].stdout.strip() == "None"


@pytest.mark.parametrize(("name", "kind"), MODULES.items())
def test_what_evaluate_asks_of_its_own_modules(name, kind):
    """No `**kwargs`, executed doctests and the right type: what the library's own test suite checks."""
    factory = evaluate.loading.evaluation_module_factory(hf_coverage.evaluate_module(name))
    module = importlib.import_module(factory.module_path)
    main = evaluate.loading.import_main_class(factory.module_path)
    parameters = inspect.signature(main._compute).parameters.values()
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    results = doctest.testmod(module, raise_on_error=True)
    assert results.failed == 0
    assert results.attempted > 1
    instance = evaluate.load(hf_coverage.evaluate_module(name), module_type=kind)
    assert (instance.name, instance.module_type) == (name, kind)
    assert all(feature == datasets.Value("float64") for feature in instance.features.values())
    with pytest.raises(TypeError, match="module type"):
        evaluate.load(hf_coverage.evaluate_module(name), module_type="measurement")


@pytest.mark.parametrize("name", MODULES)
def test_without_the_package_the_loader_names_what_to_install(name, tmp_path, monkeypatch):
    shutil.copytree(hf_coverage.evaluate_module(name), tmp_path / name)
    for loaded in [key for key in sys.modules if key.split(".")[0] == "hf_coverage"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "hf_coverage", None)
    with pytest.raises(ImportError, match=r"\['hf_coverage'\] using 'pip install hf-coverage'"):
        evaluate.load(str(tmp_path / name))


@pytest.mark.parametrize(("name", "kind"), MODULES.items())
def test_every_folder_is_a_complete_space(name, kind, monkeypatch):
    folder = Path(hf_coverage.evaluate_module(name))
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        f"{name}.py", "README.md", "app.py", "requirements.txt"
    }  # fmt: skip
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    space = yaml.safe_load(front)
    assert (space["sdk"], space["app_file"], space["pinned"]) == ("gradio", "app.py", False)
    assert {"evaluate", kind} <= set(space["tags"])
    assert space["title"].replace(" ", "_").lower() == name
    assert re.fullmatch(r"\d+\.\d+\.\d+", space["sdk_version"])
    assert (folder / "requirements.txt").read_text().split() == ["hf-coverage"]
    launched = []
    monkeypatch.setattr("hf_coverage.evaluate_modules.widget.launch_widget", launched.append)
    runpy.run_path(str(folder / "app.py"), run_name="__main__")
    assert launched == [folder / f"{name}.py"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_card_run(load, name):
    """Fenced examples with a prompt are doctests, given the module under the name that the card gives it."""
    text = (Path(hf_coverage.evaluate_module(name)) / "README.md").read_text(encoding="utf-8")
    source = "\n".join(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ">>>" in block)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    scope = {"metric": load(), "comparison": load("coverage_comparison")}
    test = doctest.DocTestParser().get_doctest(source, scope, name, "README.md", 0)
    results = doctest.DocTestRunner(optionflags=flags).run(test)
    assert results.attempted >= 1
    assert results.failed == 0


def test_computation_of_the_page_reads_its_text(load):
    rows = [["-1", "-1 ", "-1"], ["-inf", "-2.5", "-1"], ["", " ", ""]]
    results = computation(load("coverage_comparison", keep_in_memory=True))(rows, "2, 5.7,")
    assert (results["cov_5.7_1"], results["cov_5.7_2"], results["cov_2_2"]) == (0.5, 0.0, 0.5)
    with pytest.raises(ValueError, match="could not convert"):
        computation(load(keep_in_memory=True))([["minus one", "-1"]], "2")


def test_page_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install gradio"):
        build_widget(Path(hf_coverage.evaluate_module("coverage")) / "coverage.py")


def test_a_name_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="`name` must be one of coverage, coverage_comparison, but is 'perplexity'"):
        hf_coverage.evaluate_module("perplexity")


def test_folders_are_in_the_package_data():
    """What setuptools would not take by itself: the cards and requirements beside the scripts."""
    tomllib = pytest.importorskip("tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "hf_coverage"
    ]
    package = Path(hf_coverage.__file__).parent
    shipped = set(itertools.chain.from_iterable(package.glob(pattern) for pattern in patterns))
    for name in MODULES:
        folder = Path(hf_coverage.evaluate_module(name))
        assert {path for path in folder.iterdir() if path.suffix in {".md", ".txt"}} <= shipped
