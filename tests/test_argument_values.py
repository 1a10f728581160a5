"""Numbers that cannot be meant are refused by every function that takes them, by name and before a model runs."""

import inspect
import math

import numpy as np
import pytest
from datasets import Dataset
from transformers import GPT2LMHeadModel

from hf_coverage import SuccessCallback, choose, evaluate_best_of_n, sample_corpus, score_responses, tournament
from hf_coverage.functional.step_sizes import TrainingPlan
from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.sampler import Sampling
from hf_coverage.measure.builders import teacher_scored_corpus
from hf_coverage.measure.inherent_variance import gradient_norms
from hf_coverage.measure.scoring import score_rules
from hf_coverage.select.tune_ttt import split_groups

ROWS = Dataset.from_dict({"prompt": [[1, 2]] * 4, "completion": [[3, 4]] * 4})
TABLE = {"a": np.full(8, -1.0), "b": np.full(8, -2.0)}
# What is called with a model and, beside the argument that is asked for, with these.
CALLS = {
    score_responses: (lambda f, m, o: f(m, None, ROWS, **o), {}),
    score_rules: (lambda f, m, o: f(m, None, ROWS, {"a": StepRule(0.1)}, **o), {}),
    sample_corpus: (lambda f, m, o: f(m, None, [[1, 2]], **o), {"k": 1, "max_new_tokens": 2}),
    teacher_scored_corpus: (lambda f, m, o: f(ROWS, m, None, **o), {}),
    evaluate_best_of_n: (lambda f, m, o: f(m, None, ROWS, **o), {"k": 1, "max_new_tokens": 2}),
    SuccessCallback: (lambda f, m, o: f(ROWS, **o), {"max_new_tokens": 2}),
    gradient_norms: (lambda f, m, o: f(m, EncodedCorpus([[1]], [[2]]), **o), {"batch_size": 1}),
    tournament: (lambda f, m, o: f(TABLE, **o), {"n": 4}),
    choose: (lambda f, m, o: f(TABLE, reference_logprobs=np.zeros(8), **o), {}),
    split_groups: (lambda f, m, o: f("abcd", **o), {}),
    Sampling: (lambda f, m, o: f(**o), {"max_new_tokens": 2}),
    StepRule: (lambda f, m, o: f(**o), {"lr": 0.1}),
    TTTConfig: (lambda f, m, o: f(**o), {"lr": 0.1, "scope": "lora"}),
    TrainingPlan: (lambda f, m, o: f(**o), {"n": 4, "steps": 10}),
}
NEVER = [math.nan, math.inf, -math.inf]
# Other names in messages than the argument's, and what has no say without something else.
NAMED = {"samples": "n", "bootstrap": "replicates", "race_confidence": "confidence"}
WITHOUT = {(tournament, "gamma"), (score_responses, "logits_memory"), (evaluate_best_of_n, "eos_token_id")}
WITHOUT |= {(SuccessCallback, "eos_token_id")}


def asked():
    for function in CALLS:
        for name, parameter in inspect.signature(function).parameters.items():
            kinds = str(parameter.annotation).replace("<class '", "").replace("'>", "").split(" | ")
            if {"int", "float"} & set(kinds) and name != "eos_token_id" and (function, name) not in WITHOUT:
                counts = [] if "float" in kinds else [1e300]
                counts += [1.5] if counts and function is not TrainingPlan else []  # which only divides by it
                yield pytest.param(function, name, [*NEVER, *counts, -1], id=f"{function.__name__}-{name}")


@pytest.mark.parametrize(("function", "name", "values"), [*asked()])
def test_what_cannot_be_meant_is_refused_by_name(tiny_gpt2, monkeypatch, function, name, values):
    monkeypatch.setattr(GPT2LMHeadModel, "forward", None)
    call, others = CALLS[function]
    for value in values:
        if (name, value) == ("threshold", -1):
            continue
        with pytest.raises(ValueError, match=f"`{NAMED.get(name, name)}`"):
            call(function, tiny_gpt2, others | {name: value})
