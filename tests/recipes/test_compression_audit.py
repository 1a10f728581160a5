"""The compressions are what their names say, and an audit says what its numbers say."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_coverage import CoverageProfile, sample_corpus, score_responses
from hf_coverage.functional.paired import paired_kl_difference
from hf_coverage.inference.fingerprint import weight_fingerprint
from recipes.compression_audit import audit, compress, findings
from recipes.settings import parse_section, read_settings

RECIPE = Path(audit.__file__).parent
CONFIG = ["--config", str(RECIPE / "small.yaml")]
CALIBRATION = torch.arange(2, 34).reshape(4, 8)
NAMES = [
    "bfloat16",
    "int8-dynamic",
    "int4-rtn-16",
    "int2-rtn-8",
    "without-least-layer",
    "without-layer-1",
    "pruned-50",
]


@pytest.fixture(scope="module")
def tiny():
    """A random Llama whose weights are large enough for its distributions to have a shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<s>", "</s>", "the", "a", "of", "is", "an", "to", "in", "object", "user", ":", "What", "Write"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<s>", chat_template=template
    )


@pytest.fixture(scope="module")
def corpus(tiny):
    prompts = [[index, index + 1, 2] for index in range(2, 26)]
    return sample_corpus(tiny, None, prompts, k=4, max_new_tokens=6, seed=0, progress=False)


def text(windows=4):
    generator = np.random.default_rng(0)
    ids = generator.integers(2, 48, (windows, 12)).tolist()
    columns = {"prompt": [row[:4] for row in ids], "completion": [row[4:] for row in ids]}
    return Dataset.from_dict(columns | {"document": list(range(windows))})


def scored(model, corpus, **options):
    return score_responses(model, None, corpus, progress=False, **options)


def settings(**changed):
    return audit.AuditArguments(n=[1, 2, 16], headline_n=2, **changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_compression_changes_the_model_and_leaves_the_original_alone(tiny, corpus, name):
    before = weight_fingerprint(tiny)
    compressed = compress.compression(name, calibration=CALIBRATION)(tiny)
    assert weight_fingerprint(tiny) == before
    assert weight_fingerprint(compressed) != before
    assert not compressed.training
    reference = np.array(corpus["reference_logprob"][:])
    assert np.abs(np.array(scored(compressed, corpus)["logprob"][:]) - reference).max() > 1e-3


def test_the_original_against_itself_loses_nothing(tiny, corpus):
    scores = {audit.ORIGINAL: scored(tiny, corpus), "bfloat16": scored(compress.to_bfloat16(tiny), corpus)}
    texts = {name: scored(tiny, text()) for name in scores}
    made = audit.audit_of(scores, texts, settings())
    original, other = made.profiles
    assert original.cov([1, 2, 16]).tolist() == [1, 0, 0]
    assert original.kl == 0
    assert original.num_groups == 24
    assert 0 < abs(other.kl) < 1
    assert made.response_perplexities()[0] == pytest.approx(
        math.exp(-sum(scores[audit.ORIGINAL]["logprob"][:]) / made.response_tokens)
    )


def test_the_sampler_and_the_scorer_know_the_same_density(tiny, corpus):
    np.testing.assert_allclose(scored(tiny, corpus)["logprob"][:], corpus["reference_logprob"][:], atol=1e-4)


def test_worse_compressions_of_one_kind_lose_more(tiny, corpus):
    reference = corpus["reference_logprob"][:]

    def kl(name):
        compressed = compress.compression(name, calibration=CALIBRATION)(tiny)
        return CoverageProfile.from_logprobs(scored(compressed, corpus)["logprob"][:], reference).kl

    assert kl("int8-rtn-16") < kl("int4-rtn-16") < kl("int2-rtn-16")
    assert kl("pruned-10") < kl("pruned-60")


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]), st.sampled_from([4, 8]))
def test_rounding_to_nearest_takes_the_nearest_value_of_each_groups_grid(seed, bits, group_size):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rounded = compress.round_to_nearest(weight, bits=bits, group_size=group_size)
    for row, new_row in zip(weight.tolist(), rounded.tolist()):
        for start in range(0, 16, group_size):
            group, new = row[start : start + group_size], new_row[start : start + group_size]
            step = (max(*group, 0) - min(*group, 0)) / (2**bits - 1)
            zero = round(-min(*group, 0) / step)
            grid = [(level - zero) * step for level in range(2**bits)]
            for value, approximation in zip(group, new):
                nearest = min(abs(value - point) for point in grid)
                assert abs(value - approximation) == pytest.approx(nearest, abs=1e-12)
                assert min(abs(approximation - point) for point in grid) < 1e-12


def test_a_group_of_zeros_stays_zero_and_a_bad_group_size_is_refused():
    assert compress.round_to_nearest(torch.zeros(2, 8), bits=4, group_size=4).abs().sum() == 0
    with pytest.raises(ValueError, match="`group_size` must divide the 8 inputs of a layer, but is 3"):
        compress.round_to_nearest(torch.zeros(2, 8), bits=4, group_size=3)


def test_dynamic_int8_is_integer_arithmetic():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 5)
    activations = torch.randn(3, 64)
    quantized = compress.DynamicInt8Linear(layer)
    weight, inputs = layer.weight.detach().double().numpy(), activations.double().numpy()
    for row, output in zip(inputs, quantized(activations).detach().numpy()):
        step = np.abs(row).max() / 127
        integers = np.rint(row / step).astype(np.int64)
        for channel, value in enumerate(output):
            scale = np.abs(weight[channel]).max() / 127
            whole = int(integers @ np.rint(weight[channel] / scale).astype(np.int64))
            assert value == pytest.approx(whole * step * scale + layer.bias[channel].item(), abs=1e-5)


def test_dynamic_int8_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    quantized = compress.DynamicInt8Linear(torch.nn.Linear(32, 8, bias=False))
    row = torch.randn(1, 32)
    together = quantized(torch.cat([row, 100 * torch.randn(1, 32), torch.zeros(1, 32)]))
    torch.testing.assert_close(together[:1], quantized(row))
    assert together[2].abs().sum() == 0


def test_pruning_takes_the_smallest_weights_of_every_layer(tiny):
    pruned = compress.prune_magnitude(tiny, share=0.25)
    for name, before in tiny.model.layers.named_modules():
        if isinstance(before, torch.nn.Linear):
            after = pruned.model.layers.get_submodule(name).weight
            gone = after == 0
            assert gone.sum() == round(0.25 * after.numel())
            assert before.weight[gone].abs().max() <= before.weight[~gone].abs().min()
            assert torch.equal(after[~gone], before.weight[~gone])
    assert torch.equal(pruned.lm_head.weight, tiny.lm_head.weight)


def test_a_removed_layer_is_skipped_and_the_cache_still_works(tiny, corpus):
    shorter = compress.remove_layer(tiny, 1)
    skipped = []

    def skip(module, arguments, output):
        skipped.append(module)
        return arguments[0]

    hook = tiny.model.layers[1].register_forward_hook(skip)
    expected = scored(tiny, corpus, share_prefixes=False)["logprob"][:]
    hook.remove()
    assert skipped
    np.testing.assert_allclose(scored(shorter, corpus, share_prefixes=False)["logprob"][:], expected, atol=1e-5)
    np.testing.assert_allclose(scored(shorter, corpus, share_prefixes=True)["logprob"][:], expected, atol=1e-4)


def test_there_is_no_layer_beyond_the_last(tiny):
    with pytest.raises(ValueError, match="`index` must name one of 4 layers, 0 to 3, but is 4"):
        compress.remove_layer(tiny, 4)


@pytest.mark.parametrize("idle", [0, 2])
def test_the_least_influential_layer_is_the_one_that_does_nothing(tiny, idle):
    lazy = compress.to_bfloat16(tiny).float()
    with torch.no_grad():
        lazy.model.layers[idle].self_attn.o_proj.weight.zero_()
        lazy.model.layers[idle].mlp.down_proj.weight.zero_()
    assert compress.least_influential_layer(lazy, torch.randint(2, 48, (2, 9))) == idle


def test_the_last_layer_is_not_judged_by_the_final_norm(tiny):
    lazy = compress.to_bfloat16(tiny).float()
    with torch.no_grad():
        lazy.model.layers[3].self_attn.o_proj.weight.zero_()
        lazy.model.layers[3].mlp.down_proj.weight.zero_()
    assert compress.least_influential_layer(lazy, torch.randint(2, 48, (2, 9))) < 3


@pytest.mark.parametrize("name", ["int4", "int4-rtn-many", "int9-rtn-8", "float8", "pruned-half", "without-layer-x"])
def test_an_unknown_compression_is_refused(name):
    with pytest.raises(ValueError, match=f"`compressions` must be .*{name}"):
        compress.compression(name, calibration=CALIBRATION)


def profiles(ratios, texts):
    """An audit of models with these log ratios, and these negative log-probabilities of a text."""
    made = [
        CoverageProfile.from_logprobs([-5.0 - r for r in row], [-5.0] * len(row), kind="density", name=name)
        for name, row in ratios.items()
    ]
    read = [CoverageProfile.from_logprobs([-value for value in row], name=name) for name, row in texts.items()]
    return findings.Audit(made, read, 10, 10, (2, 16), 16, 0.1)


def test_the_pairs_that_perplexity_orders_otherwise_are_found_and_tested():
    wide, narrow = [0.0] * 20 + [4.0] * 20, [1.0] * 40
    ratios = {"original": [0.0] * 40, "wide": wide, "narrow": narrow, "gone": [9.0] * 40}
    texts = {"original": [1.0] * 40, "wide": [1.1, 1.2] * 20, "narrow": [1.3, 1.5] * 20, "gone": [9.0, 8.0] * 20}
    made = profiles(ratios, texts)
    (pair,) = findings.disagreements(made)
    assert (pair.a, pair.b) == ("wide", "narrow")
    assert pair.text == paired_kl_difference(texts["wide"], texts["narrow"])
    assert pair.coverage.difference == 0.5
    assert pair.coverage.p_value < 0.01
    sentence = findings.explain(made)[1]
    assert "orders 2 of 3 pairs of compressions as Cov_16 does, the others not: wide and narrow" in sentence
    assert "tell 1 of these 1 apart by coverage and 1 by the text" in sentence
    assert len(findings.disagreement_table(made).rows) == 1


def test_agreement_is_said_as_plainly():
    ratios = {"original": [0.0] * 8, "good": [0.1] * 8, "bad": [4.0] * 8}
    made = profiles(ratios, {"original": [1.0] * 8, "good": [1.1] * 8, "bad": [2.0] * 8})
    assert findings.explain(made)[1].endswith("orders 1 of 1 pairs of compressions as Cov_16 does: all of them.")
    assert "There is none." in findings.disagreement_table(made).caption


@pytest.mark.parametrize("kl", [0.1, 1.5, 6.0])
def test_many_small_losses_have_the_coverage_that_kl_alone_makes(kl):
    step = math.sqrt(2 * kl / 1000)  # 1000 tokens, each a little likelier or less likely, and E[exp(-r)] = 1
    rise = 1 / (1 + math.exp(step))
    falls = np.random.default_rng(0).binomial(1000, 1 - rise, 200_000)
    ratios = (2 * falls - 1000) * step
    assert np.exp(-ratios).mean() == pytest.approx(1, rel=0.1)
    assert ratios.mean() == pytest.approx(kl, rel=0.05)
    for n in (2, 16):
        assert float(findings.normal_coverage(kl, n)) == pytest.approx(np.mean(ratios >= math.log(n)), abs=0.02)


def test_where_no_number_of_samples_is_enough_the_table_says_so():
    lost = [math.inf] * 6 + [0.0] * 6
    made = profiles({"original": [0.0] * 12, "lost": lost}, {"original": [1.0] * 12, "lost": [1.0] * 12})
    table = findings.audit_table(made)
    assert table.rows[1][-2:] == ["no number of samples", "no number of samples"]
    assert table.rows[0][-2] == "5"
    assert "no number of samples is enough (the original itself: 5)" in findings.explain(made)[2]


def arguments(*words):
    return parse_section(audit.AuditArguments, read_settings(words, ["audit"], description=None)["audit"])


def test_the_command_line_goes_over_the_configuration(tmp_path):
    config = tmp_path / "audit.yaml"
    config.write_text("audit:\n  responses: 3\n  n: [2, 8]\n  compressions: [bfloat16]\n")
    args = arguments("--config", str(config), "--responses", "5")
    assert (args.responses, args.n, args.compressions, args.seed) == (5, [2, 8], ["bfloat16"], 0)


def test_a_misspelt_setting_is_refused(tmp_path):
    config = tmp_path / "audit.yaml"
    config.write_text("audit:\n  response_count: 3\n")
    with pytest.raises(ValueError, match="response_count"):
        arguments("--config", str(config))


def test_the_committed_configuration_is_readable():
    args = arguments("--config", str(RECIPE / "small.yaml"))
    assert args.card_for in args.compressions
    assert args.headline_n in args.n
    for name in args.compressions:
        assert callable(compress.compression(name, calibration=CALIBRATION))


def test_the_prompts_are_of_eight_kinds_in_turn_and_none_is_twice():
    rows = [json.loads(line) for line in (RECIPE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 64
    assert len({row["kind"] for row in rows[:8]}) == 8
    assert len({row["prompt"][0]["content"] for row in rows}) == 64


def run(monkeypatch, output, *extra):
    command = ["audit.py", *CONFIG, "--output_dir", str(output), "--num_prompts", "6", "--responses", "3", *extra]
    command += ["--text_windows", "6", "--text_tokens", "16", "--max_new_tokens", "5"]
    monkeypatch.setattr(sys, "argv", [*command, "--card_for", "int4-rtn-16"])
    audit.main()


def test_an_audit_from_end_to_end_goes_on_where_it_stopped(tiny, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "load_model", lambda name: (tiny, tokenizer))
    compressions = ["int4-rtn-16", "without-least-layer", "pruned-50"]
    names = ["--compressions", *compressions]
    run(monkeypatch, tmp_path, *names)
    assert "without-least-layer" in capsys.readouterr().out
    for name in ("report.html", "audit.png", "model_card/README.md", "model_card/coverage_profile.png"):
        assert (tmp_path / name).stat().st_size > 1000
    (file,) = tmp_path.glob("results_*.json")
    first = json.loads(file.read_text())["results"]
    assert list(first) == ["original", *compressions]
    assert first["original"]["kl,none"] == 0
    file.unlink()
    # one model's scores are missing, and the corpus must not be sampled again
    for shard in (tmp_path / "scores" / "pruned-50").glob("*.safetensors"):
        shard.unlink()
    monkeypatch.setattr(audit, "sample_corpus", None)
    run(monkeypatch, tmp_path, *names)
    (file,) = tmp_path.glob("results_*.json")
    assert json.loads(file.read_text())["results"] == first
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(monkeypatch, tmp_path, *names, "--seed", "1")
    with pytest.raises(ValueError, match="`card_for` must be one of `compressions`, bfloat16, but is 'int4-rtn-16'"):
        run(monkeypatch, tmp_path, "--compressions", "bfloat16")


@pytest.mark.slow
def test_the_audit_of_smollm2_at_a_reduced_size(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "load_model", lambda name: smollm2)
    monkeypatch.setattr(sys, "argv", [
        "audit.py", *CONFIG, "--output_dir", str(tmp_path), "--num_prompts", "6", "--responses", "2",
        "--max_new_tokens", "8", "--text_windows", "2", "--compressions", "int4-rtn-64", "pruned-50",
    ])  # fmt: skip
    audit.main()
    (file,) = tmp_path.glob("results_*.json")
    results = json.loads(file.read_text())["results"]
    kl = [results[name]["kl,none"] for name in ("original", "int4-rtn-64", "pruned-50")]
    assert 0 == kl[0] < kl[1] < kl[2]
    assert results["pruned-50"]["cov_16,none"] > 0.9
