"""Every method of the installed PEFT: scored and sampled as each row alone is, or refused in words that say why."""

import copy
import re
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset

from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.inference.forward import inference
from hf_coverage.inference.output_head import find_head
from hf_coverage.measure.builders import sample_corpus
from hf_coverage.measure.inherent_variance import measure_inherent_variance
from hf_coverage.measure.scoring import score_responses
from tests.inference.odd_models import VOCABULARY
from tests.inference.peft_models import FAMILIES, TARGETS, adapted, llama, opt, stirred
from tests.optim.distillation_runs import distillation_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own: of transformers' names, tied weights, mixed dtypes

METHODS = [method.value for method in peft.PeftType]
FAST = {"LORA", "IA3", "LILY", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}
CASES = [
    pytest.param(family, method, marks=[] if family == "llama" and method in FAST else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]

# PEFT itself has no such model, or one that runs no pass.
NOT_MADE = {
    ("opt", "ADAPTION_PROMPT"): "Unsupported model type for adaption prompt",
    ("opt", "XLORA"): "doesn't match the broadcast shape",
}
# Why no number is given; whatever is not here has to be right.
TASKS = "cannot read a token by itself: task_ids"  # PEFT wants to be told the task of each row
NOT_SCORED = {
    "LILY": "is not causal",  # its router takes a mean over the whole row
    "MULTITASK_PROMPT_TUNING": TASKS,
    "POLY": TASKS,
    # another pass, head included, finds out how its adapters are mixed
    "XLORA": "got 2 calls.* load the base model with one of its adapters instead",
}
ONE_DTYPE = {"ADAMSS"}  # keeps a part in float32, and then cannot run in another
NOT_SAMPLED = {
    "LILY": "changes with the tokens after it",
    **dict.fromkeys(("MULTITASK_PROMPT_TUNING", "POLY"), "cannot answer a prompt by itself: task_ids"),
}


class Row(NamedTuple):
    hidden: torch.Tensor
    logits: torch.Tensor


def row(model, prompt, response):
    """What a model makes of one row alone at the positions that predict its response, in float64."""
    seen = []
    handle = find_head(model).module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with inference(model):
        logits = model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), use_cache=False).logits
    handle.remove()
    return Row(seen[-1][0, -len(response) :].double(), logits[0, -len(response) :].double())


def logprobs(model, corpus):
    """Log p of each token, one row at a time."""
    tables = [
        row(model, *pair).logits.log_softmax(-1)[range(len(pair[1])), pair[1]]
        for pair in zip(corpus["prompt"], corpus["completion"])
    ]
    return [table.numpy() for table in tables]


def token_rows(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


def corpus():
    shared, *others = token_rows(12, 5, 6, 24)
    return Dataset.from_dict({"prompt": [shared] * 3 + others, "completion": token_rows(5, 8, 3, 4, 3, 8, seed=1)})


def close(found, expected):
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


def outcome(call):
    """What a call returns, or else why it refuses."""
    try:
        return call(), ""
    except (ValueError, RuntimeError) as error:
        return None, str(error)


def check_scores(model, plain, reason):
    """Every way of scoring, beside a teacher too, against one row at a time; or the reason why there is none."""
    rows = corpus()
    found, refusal = outcome(lambda: score_responses(model, None, rows, per_token=True, progress=False))
    if found is None or reason:
        assert reason, refusal
        assert re.search(reason, refusal)
        return
    expected = logprobs(model, rows)
    assert max(np.abs(own - other).max() for own, other in zip(expected, logprobs(plain, rows))) > 0.01
    for settings in ({}, {"batch_tokens": 40}, {"logits_memory": 5 * VOCABULARY * 12}, {"batch_invariant": True}):
        found = score_responses(model, None, rows, per_token=True, progress=False, **settings)
        close(found["token_logprobs"], expected)
        close(found["logprob"], [line.sum() for line in expected])
    for student, teacher in ((model, plain), (plain, model)):
        found = score_responses(student, None, rows, teacher=teacher, progress=False)
        close(
            found["token_kl"],
            [divergences(student, teacher, *pair) for pair in zip(rows["prompt"], rows["completion"])],
        )


def divergences(student, teacher, prompt, response):
    own, other = (row(model, prompt, response).logits.log_softmax(-1) for model in (student, teacher))
    return (other.exp() * (other - own)).sum(-1).numpy()


def check_samples(model, reason):
    """The recorded density of samples is that of what was written, one row at a time; or there is a reason."""
    long, middle, short = token_rows(17, 9, 2)

    def draw(**settings):
        return sample_corpus(
            model, None, [long, middle, short], k=3, max_new_tokens=6, eos_token_id=2, progress=False, **settings
        )

    found, refusal = outcome(draw)
    if found is None or reason:
        assert reason, refusal
        assert re.search(reason, refusal)
        return
    assert len({len(prompt) for prompt in found["prompt"]}) == 3
    close(found["reference_logprob"], [line.sum() for line in logprobs(model, found)])
    found = draw(batch_size=2, temperature=0.7, seed=3)
    for prompt, response, logprob in zip(found["prompt"], found["completion"], found["reference_logprob"]):
        table = (row(model, prompt, response).logits / 0.7).log_softmax(-1)
        close([logprob], [table[range(len(response)), response].sum()])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_method_gives_a_row_what_it_has_alone_or_says_why_not(family, method, tmp_path):
    plain = FAMILIES[family]()
    expected = NOT_MADE.get((family, method))
    with pytest.raises((RuntimeError, ValueError), match=expected) if expected else nullcontext():
        model = adapted(copy.deepcopy(plain), method, tmp_path)
        if expected:
            row(model, [5], [6])
    if not expected:
        if method not in ONE_DTYPE:
            plain, model = plain.double(), model.double()
        check_scores(model, plain, NOT_SCORED.get(method))
        check_samples(model, NOT_SAMPLED.get(method))


def with_two_adapters():
    model = adapted(llama(), "LORA", None)
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS))
    model.set_adapter("other")
    return stirred(model, 2)


def on_the_head(build, **arguments):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
    return stirred(peft.get_peft_model(build(), config))


def invoked():
    """An adapter that some tokens of the prompt switch on, and that does nothing before them."""
    return adapted(llama(), "LORA", None, alora_invocation_tokens=INVOCATION)


def without_peft_around():
    """Adapters in a model of transformers, which stays what it is."""
    model = llama().requires_grad_(False)
    return stirred(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS), model))


def merged(*, whole):
    model = adapted(llama(), "LORA", None)
    if whole:
        return model.merge_and_unload()
    model.merge_adapter()
    return model


VARIANTS = {
    "two adapters": with_two_adapters,
    "merged in place": lambda: merged(whole=False),
    "merged": lambda: merged(whole=True),
    "without PEFT around": without_peft_around,
    "invoked by tokens": invoked,
    "weights apart": lambda: adapted(llama(), "LORA", None, use_dora=True),
    "of two kinds": lambda: stirred(
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    ),
    "a trained head": lambda: on_the_head(llama, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "an adapter on the head": lambda: on_the_head(llama, target_modules=["q_proj", "lm_head"]),
    "an adapter on a tied head": lambda: on_the_head(opt, target_modules=["q_proj", "lm_head"]),
    "new tokens": lambda: on_the_head(opt, target_modules=["q_proj"], trainable_token_indices=list(range(3, 20))),
}
INVOCATION = [4, 5]


@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_is_active_is_what_is_scored_and_sampled(name):
    model = VARIANTS[name]().double()
    plain = (opt if "OPT" in type(find_head(model).owner).__name__ else llama)().double()
    if name == "invoked by tokens":  # the longest row's prompt is not short, and ends with what invokes the adapter
        prompts = [[*prompt, *INVOCATION, 9] for prompt in token_rows(30, 40, 25)]
        rows = Dataset.from_dict(
            {"prompt": prompts[:2] * 3 + prompts[2:], "completion": token_rows(5, 8, 3, 4, 3, 8, 6)}
        )
        found = score_responses(model, None, rows, per_token=True, progress=False)
        close(found["token_logprobs"], logprobs(model, rows))
    else:
        check_scores(model, plain, None)
    check_samples(model, None)


def test_disabled_adapters_are_not_there():
    plain, model = llama().double(), adapted(llama(), "PREFIX_TUNING", None).double()
    before = score_responses(model, None, corpus(), progress=False)["logprob"]
    with model.disable_adapter():
        found = score_responses(model, None, corpus(), progress=False)["logprob"]
    close(found, [line.sum() for line in logprobs(plain, corpus())])
    assert np.abs(np.subtract(before[:], found[:])).max() > 0.1


HEADS = {
    "LORA": lambda: adapted(llama(), "LORA", None),
    "PROMPT_TUNING": lambda: adapted(opt(), "PROMPT_TUNING", None),
    "PREFIX_TUNING": lambda: adapted(llama(), "PREFIX_TUNING", None),
    "SHADOW": lambda: adapted(llama(), "SHADOW", None),
}
NOT_LINEAR = {name: VARIANTS[name] for name in ("a trained head", "an adapter on the head")}


@pytest.mark.parametrize("name", HEADS)
def test_what_is_known_of_a_head_is_what_it_gets_in_a_row_alone(name):
    model, rows = HEADS[name]().double(), corpus()
    found = measure_inherent_variance(model, None, rows, progress=False)
    norm, variance = 0.0, []
    for pair in zip(rows["prompt"], rows["completion"]):
        hidden, logits = row(model, *pair)
        norm = max(norm, hidden.norm(dim=-1).max().item())
        probabilities = logits.softmax(-1)
        squared = hidden.square().sum(-1)
        variance.append((squared * (1 - probabilities.square().sum(-1))).sum().item())
    assert found.feature_norm == pytest.approx(norm, abs=1e-5)
    assert found.expected.mean == pytest.approx(np.mean(variance), rel=1e-5)
    adapting = score_responses(model, None, rows, ttt=StepRule(0.02), per_token=True, progress=False)
    for tokens, prompt, response in zip(adapting["token_logprobs"], rows["prompt"], rows["completion"]):
        close(tokens, head_steps(model, prompt, response, lr=0.02))


def head_steps(model, prompt, response, *, lr):
    """Log p of each token, the head making a step after each."""
    head = find_head(model)
    weight, found = head.weight.detach().double().clone(), []
    for hidden, token in zip(row(model, prompt, response).hidden, response):
        logits = weight @ hidden
        found.append(logits.log_softmax(-1)[token].item())
        error = -logits.softmax(-1)
        error[token] += 1
        weight += lr * torch.outer(error, hidden)
    return found


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_head_with_adapters_is_refused_where_a_linear_one_is_needed(name):
    model = NOT_LINEAR[name]()
    with pytest.raises(
        ValueError, match=r"must have a linear output head.*Merge adapters first \(`merge_and_unload`\)"
    ):
        measure_inherent_variance(model, None, corpus(), progress=False)
    with pytest.raises(ValueError, match=r"`ttt` needs a linear output head.*merge it first"):
        score_responses(model, None, corpus(), ttt=StepRule(0.02), progress=False)


DISTILLED = HEADS | NOT_LINEAR


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize("taught", [False, True])
def test_distillation_takes_an_adapted_student_or_teacher(name, taught, tmp_path):
    student, teacher = DISTILLED[name](), llama()
    if taught:
        student, teacher = teacher, student
    trainer = distillation_trainer(tmp_path, n=np.inf, model=student, teacher=teacher)
    rows = token_rows(9, 6, 4)
    ids, labels = torch.zeros(3, 9, dtype=torch.int64), torch.full((3, 9), -100)
    for line, tokens in enumerate(rows):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        labels[line, 3 : len(tokens)] = torch.tensor(tokens[3:])
    mask = torch.tensor([[1] * len(tokens) + [0] * (9 - len(tokens)) for tokens in rows])
    loss = trainer.compute_loss(student.eval(), {"input_ids": ids, "attention_mask": mask, "labels": labels})
    expected = -np.mean(
        [
            row(student, tokens[:3], tokens[3:]).logits.log_softmax(-1)[range(len(tokens) - 3), tokens[3:]].sum()
            for tokens in rows
        ]
    )
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    kl = [divergences(student, teacher, tokens[:3], tokens[3:]).sum() for tokens in rows]
    logs = trainer._tally.means(trainer.accelerator)
    assert logs["kl"] == pytest.approx(np.mean(kl), abs=1e-4)


def test_scores_on_disk_are_those_of_the_adapters_at_work(tmp_path):
    model = adapted(llama(), "LORA", None)
    score_responses(model, None, corpus(), output_dir=tmp_path, progress=False)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"holds the scores of something else \(model.config"),
    ):
        score_responses(model, None, corpus(), output_dir=tmp_path, progress=False)
    found = score_responses(model, None, corpus(), output_dir=tmp_path, progress=False)["logprob"]
    close(found, [line.sum() for line in logprobs(model, corpus())])
