"""The recipe's fast simulations are the definitions, on the real models and optimizers; its findings stand."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hf_coverage.optim.sgd import NormalizedSGD
from hf_coverage.optim.token_level import token_level_sgd
from hf_coverage.tasks.linear_instances import hard_instance, large_step_instance
from recipes.normalized_sgd import learners, likelihood, theory, tokenwise
from recipes.normalized_sgd import theory_findings as findings
from tests import reference
from tests.tasks.linear_exact import enumerate_responses

N, LOG_N = 4.0, math.log(4.0)


@pytest.fixture
def instance():
    """Small enough to list all responses: d = 4, V^H = 729."""
    return hard_instance(6, feature_norm=20.0, n=N, num_rare=2)


@pytest.fixture
def thetas(instance):
    draws = np.random.default_rng(0).normal(size=(8, 4))
    nudged = instance.theta + 0.1 * draws[:4]
    return np.concatenate([nudged, draws[4:] / 3, [instance.theta, instance.start]])


def test_coverage_and_kl_are_those_of_the_listed_distribution(instance, thetas):
    law = learners.ResponseLaw(instance)
    assert law.weights.sum() == pytest.approx(1, abs=1e-10)
    coverage, kl = np.zeros(len(thetas)), np.zeros(len(thetas))
    for prompt in instance.prompts:
        responses = enumerate_responses(instance.model(), [int(prompt)], 6)[0].numpy()
        prompts = np.full(len(responses), prompt)
        truth = np.exp(instance.logprobs(prompts, responses))
        for row, theta in enumerate(thetas):
            model = np.exp(instance.logprobs(prompts, responses, theta))
            coverage[row] += instance.prompt_probabilities[prompt] * reference.exact_coverage(truth, model, N)
            kl[row] += instance.prompt_probabilities[prompt] * reference.exact_kl(truth, model)
    np.testing.assert_allclose(law.coverage(thetas, LOG_N), coverage, atol=1e-9)
    np.testing.assert_allclose(law.kl(thetas), kl, atol=1e-7)


@pytest.mark.parametrize("name", ["SGD", "normalised SGD", "normalised SGD, lambda = log N", "SGD, clipped"])
def test_a_run_is_that_of_the_optimizer_on_the_model(instance, name):
    rates = np.array([0.003, 0.05])
    data = learners.Data(instance, [5, 6], 30)
    found = learners.train_sequences(data, learners.RULES[name], rates, log_n=LOG_N, marks=[10, 30])
    for row, rate in enumerate(rates):
        lam = {"normalised SGD": LOG_N / (16 * rate), "normalised SGD, lambda = log N": LOG_N}.get(name)
        model = instance.model().double()
        optimizer = (
            torch.optim.SGD([model.theta], lr=rate)
            if lam is None
            else NormalizedSGD([model.theta], lr=rate, lam=lam, radius=1.0)
        )
        for prompt, counts in zip(data.prompts[1], data.counts[1].astype(int)):
            ids = torch.tensor([[prompt, *np.repeat(np.arange(3), counts)]])
            logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
            optimizer.zero_grad()
            (-logprobs.sum()).backward()
            if name == "SGD, clipped":
                torch.nn.utils.clip_grad_norm_([model.theta], 1.0)
            optimizer.step()
            if lam is None:
                model.theta.data /= max(1.0, float(model.theta.data.norm()))
        np.testing.assert_allclose(found[-1, row, 1], model.theta.detach(), atol=1e-5)


@pytest.mark.parametrize(("jump", "caught"), [(1.0, False), (1.8, False), (2.5, True), (8.0, True), (1024.0, True)])
def test_one_instance_catches_every_large_step_but_not_from_zero(jump, caught):
    instance = large_step_instance(256, feature_norm=64.0)
    for start, expected in ((instance.start, caught), (np.zeros(2), False)):
        data = learners.Data(replace(instance, start=start), [0], 100)
        rate = np.array([jump / (256 * 64.0)])
        thetas = learners.train_sequences(data, learners.plain, rate, log_n=LOG_N, marks=range(1, 101))[:, 0, 0]
        law = learners.ResponseLaw(instance)
        np.testing.assert_allclose(law.coverage(thetas[-2:], LOG_N), float(expected), atol=1e-6)
        assert law.coverage(thetas.mean(0, keepdims=True), LOG_N)[0] < 1e-6  # the mean of the iterates is good


def test_token_level_training_is_that_of_the_package(instance):
    rng = np.random.default_rng(0)
    prompts = rng.choice(instance.prompts, size=5)
    tokens = np.array([instance.sample(np.array([prompt]), rng)[0] for prompt in prompts])
    for rate in (0.002, 0.05):
        model, theta, expected = instance.model(), instance.start[None], []
        for prompt, response in zip(prompts, tokens):
            theta, logprob = tokenwise.follow(instance, theta, np.array([prompt]), response[None], np.array([rate]))
            expected.append(logprob[0])
        ids = torch.tensor(np.concatenate([prompts[:, None], tokens], axis=1))
        labels = ids.clone()
        labels[:, 0] = -100
        found = token_level_sgd(model, ids, labels, lr=rate, radius=1.0)
        np.testing.assert_allclose(found.sum(-1), expected, atol=1e-3)
        np.testing.assert_allclose(model.theta.detach(), theta[0], atol=1e-4)


def test_the_adapted_model_is_a_distribution(instance, thetas):
    for prompt in instance.prompts:
        responses = enumerate_responses(instance.model(), [int(prompt)], 6)[0].numpy()
        rows = len(responses)
        for theta in thetas:
            _, logprobs = tokenwise.follow(
                instance, np.tile(theta, (rows, 1)), np.full(rows, prompt), responses, np.full(rows, 0.02)
            )
            assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-9)


def test_without_a_step_the_adapted_model_is_the_frozen_one(instance, thetas):
    sampled = tokenwise.adapted_coverage(instance, thetas, np.zeros(len(thetas)), samples=4000, log_n=LOG_N, seed=1)
    np.testing.assert_allclose(sampled, learners.ResponseLaw(instance).coverage(thetas, LOG_N), atol=0.02)


def test_maximum_likelihood_has_the_largest_likelihood():
    instance = likelihood.rare_prompts(4, num_prompts=3)
    (found,) = likelihood.maximum_likelihood(instance, 40, 1, np.random.default_rng(0))
    rng = np.random.default_rng(0)  # the same draws
    seen = rng.multinomial(40, instance.prompt_probabilities[3:], size=1) * 4
    (counts,) = rng.multinomial(seen, np.exp(instance.next_logprobs(instance.theta))[3])
    best = minimize(lambda theta: -(counts * instance.next_logprobs(theta)[3:]).sum(), np.zeros(3)).x
    np.testing.assert_allclose(found, np.clip(best, -1, 1), atol=1e-4)


def test_bits_that_nobody_saw_cost_what_they_cost():
    settings = {"num_seeds": 2, "samples": 20000, "log_n": 1.0, "feature_norm": 4.0}
    found = likelihood.bits_coverage(4, probabilities=np.array([0.5]), num_rows=0, **settings)
    chance, exact = 1 / (1 + math.exp(-2)), 0.0
    for ones in range(5):
        ratio = ones * math.log(2 * chance) + (4 - ones) * math.log(2 * (1 - chance))
        exact += math.comb(4, ones) * chance**ones * (1 - chance) ** (4 - ones) * (ratio >= 1.0)
    np.testing.assert_allclose(found, 0.5 * exact, atol=0.01)
    assert not likelihood.bits_coverage(4, probabilities=np.array([1.0]), num_rows=10**6, **settings).any()


def test_slopes_and_step_sizes_are_found():
    x = np.array([16, 64, 256])
    values = 0.1 * x[:, None] ** 0.5 * np.exp(0.01 * np.random.default_rng(0).normal(size=(3, 8)))
    slope = findings.slope(x, values)
    assert slope.low < slope.value < slope.high
    assert slope.value == pytest.approx(0.5, abs=0.02)
    rate, reported = findings.best_rate([[0.1, 0.9, 0.1, 0.8], [0.2, 0.3, 0.2, 0.4]])
    assert (rate, reported.tolist()) == (0, [0.9, 0.8])  # chosen by the even seeds, reported on the odd ones


SMALL = {
    "horizons": [16, 32],
    "token_horizons": [16, 32],
    "token_rates": [0.001, 0.004],
    "token_seeds": 2,
    "token_samples": 10,
    "num_rates": 6,
    "seeds": 4,
    "steps": 32,
    "scaling_horizon": 16,
    "scaling_steps": [16, 32],
    "scaling_n": [4, 16],
    "likelihood_horizons": [16, 32],
    "likelihood_seeds": 4,
    "bits": [4, 8],
}


def run(monkeypatch, output, **extra):
    config = output.with_suffix(".json")  # which is YAML too
    config.write_text(json.dumps({"theory": SMALL | {"output_dir": str(output)} | extra}))
    monkeypatch.setattr(sys, "argv", ["theory.py", "--config", str(config)])
    theory.main()


def test_the_command_writes_its_findings_and_goes_on_where_it_was(tmp_path, monkeypatch):
    output = tmp_path / "run"
    run(monkeypatch, output)
    table = (output / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("SGD", "normalised SGD", findings.TTT))
    for name in ("hard_instance", "scaling", "likelihood"):
        assert (output / f"{name}.png").stat().st_size > 10_000
    kept = output / "parts" / "horizon-32.json"
    kept.rename(output / "parts" / "horizon-32.gone")
    stamps = {file: file.stat().st_mtime_ns for file in (output / "parts").glob("*.json")}
    run(monkeypatch, output)
    assert kept.read_text() == (output / "parts" / "horizon-32.gone").read_text()
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert (output / "table.md").read_text() == table
    with pytest.raises(ValueError, match="other settings"):
        run(monkeypatch, output, steps=48)
    with pytest.raises(ValueError, match=r"`token_horizons` must be among `horizons`, \[16, 32\], got \[64\]"):
        run(monkeypatch, tmp_path / "other", token_horizons=[64])


@pytest.mark.slow
def test_normalisation_takes_the_horizon_out():
    args = theory.TheoryArguments(output_dir="", seeds=32, horizons=[256, 1024, 4096])
    found = {name: [] for name in theory.SMALL}
    for horizon in args.horizons:
        part = theory.over_rates(args, horizon, rules=theory.SMALL)
        for name in theory.SMALL:
            found[name].append(findings.best_rate(part[name]["last"])[1])
    plain, normal = (np.array(found[name]) for name in theory.SMALL)
    assert findings.ratio(plain[-1], normal[-1]).low > 10
    assert findings.slope(args.horizons, plain).low > 0.8
    # 95 % interval around 0 or below: nothing grows
    assert findings.slope(args.horizons, normal).low < 0.1
