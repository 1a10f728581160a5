"""The recipe on test-time training at a size of seconds, its arithmetic against the library's, and its theorem."""

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_coverage import score_responses
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.engine import ScoringEngine
from hf_coverage.measure.scoring import PLAIN
from recipes.normalized_sgd.learners import Data
from recipes.normalized_sgd.tokenwise import train_tokens
from recipes.test_time_training import compare, texts, theorem
from recipes.test_time_training.compare import follow_corpus
from recipes.test_time_training.measured import change_a_token, choose, rule_label, telling_n
from recipes.test_time_training.short_context import ShortContext

FOLDER = Path(compare.__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def tiny(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def few_texts(monkeypatch):
    """Short texts in the place of those of the machine."""

    def texts_of(kind):
        rng = np.random.default_rng(len(kind))
        words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(30)]
        return [" ".join(rng.choice(words, 60)) for _ in range(20)]

    monkeypatch.setattr(texts, "texts_of", texts_of)


def corpus_of(rows=3, prompt=40, response=50):
    ids = np.random.default_rng(1).integers(0, 256, (rows, prompt + response)).tolist()
    return Dataset.from_dict({"prompt": [row[:prompt] for row in ids], "completion": [row[prompt:] for row in ids]})


class TestTexts:
    def test_all_kinds_are_there_and_differ(self):
        found = {kind: texts.texts_of(kind) for kind in texts.KINDS}
        assert all(sum(len(text) > 2000 for text in documents) >= 30 for documents in found.values())
        assert all(found[kind] == texts.texts_of(kind) for kind in texts.KINDS)
        code = {line for text in found["code"] for line in text.splitlines()}
        mixed = found["mixed lines"][0].splitlines()
        assert 0 < sum(line in code for line in mixed) < len(mixed)

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match=r"`kind` must be one of tables, code, .*, got 'poems'"):
            texts.texts_of("poems")

    def test_windows_are_of_different_documents(self, few_texts, tokenizer):
        windows = texts.windows_of("code", tokenizer, prompt_tokens=20, response_tokens=10, documents=6, seed=0)
        assert len(set(windows["document"][:])) == len(windows) == 6
        assert {len(row) for row in windows["prompt"]} == {20}
        with pytest.raises(ValueError, match=r"`documents` must be at most 20, .*, got 21"):
            texts.windows_of("code", tokenizer, prompt_tokens=20, response_tokens=10, documents=21, seed=0)


class TestFollowing:
    RULES = (
        TTTConfig(0.01),
        TTTConfig(0.05, on_prompt=True),
        TTTConfig(0.05, top_k=8, on_prompt=True),
        TTTConfig(0.05, radius=0.5),
        TTTConfig(0.05, lam=0.0, decay=0.1),
    )

    def test_it_is_what_scoring_gives(self, tiny, tmp_path):
        corpus = corpus_of()
        found = follow_corpus(tiny, corpus, {rule_label(rule): rule for rule in self.RULES}, tmp_path)
        assert list(found) == [PLAIN, *map(rule_label, self.RULES)]
        for name, rule in zip(found, (None, *self.RULES)):
            expected = score_responses(tiny, None, corpus, ttt=rule, per_token=True, progress=False)["token_logprobs"]
            np.testing.assert_allclose(found[name], expected[:], atol=2e-4)

    def test_names_tell_rules_apart(self):
        assert len({rule_label(rule) for rule in self.RULES}) == len(self.RULES)

    def test_a_short_context_is_read_in_blocks(self, tiny):
        ids = torch.tensor([corpus_of(1)[0]["prompt"][:37], corpus_of(2)[1]["prompt"][:37]])
        with torch.no_grad():
            found = ShortContext(tiny, 8)(ids).logits
            assert found.shape[:2] == (2, 37)
            for position in range(37):
                start = 0 if position < 8 else position // 4 * 4 - 4
                alone = tiny(input_ids=ids[:, start : position + 1]).logits[:, -1]
                assert torch.allclose(found[:, position], alone, atol=1e-4), position
            assert torch.equal(ShortContext(tiny, 64)(ids).logits, tiny(ids).logits)

    def test_a_short_context_is_followed(self, tiny, tmp_path):
        """Its scores are those of the logits it gives, and known as its own."""
        corpus, rules = corpus_of(), {"rule": TTTConfig(0.01)}
        found = follow_corpus(ShortContext(tiny, 8), corpus, rules, tmp_path)
        ids = torch.tensor([prompt + completion for prompt, completion in zip(corpus["prompt"], corpus["completion"])])
        with torch.no_grad():
            logprobs = ShortContext(tiny, 8)(ids).logits.log_softmax(-1)[:, 39:-1]
        expected = logprobs.gather(-1, ids[:, 40:, None])[..., 0]
        np.testing.assert_allclose(found[PLAIN], expected, atol=1e-4)
        assert found["rule"][:, 0] == pytest.approx(found[PLAIN][:, 0], abs=1e-4)  # before any step
        for other in (tiny, ShortContext(tiny, 16)):
            with pytest.raises(ValueError, match="scores of something else"):
                follow_corpus(other, corpus, rules, tmp_path)

    def test_rows_that_are_there_are_read(self, tiny, tmp_path, monkeypatch):
        corpus, rules = corpus_of(), {"rule": TTTConfig(0.01)}
        first = follow_corpus(tiny, corpus, rules, tmp_path)
        for name in (PLAIN, "rule"):
            (tmp_path / name / "scores-00001.safetensors").unlink()
        asked, honest = [], ScoringEngine.score_rules
        monkeypatch.setattr(ScoringEngine, "score_rules", lambda *args: asked.append(args[2]) or honest(*args))
        second = follow_corpus(tiny, corpus, rules, tmp_path)
        assert asked == [range(1, 2)]
        assert first["rule"].shape == (3, 50)
        assert all(np.array_equal(first[name], second[name]) for name in first)
        with pytest.raises(ValueError, match="scores of something else"):
            follow_corpus(tiny, corpus_of(rows=2), rules, tmp_path)


class TestFindings:
    def test_a_likelier_text_is_below_zero(self):
        plain = np.full((4, 3), -2.0, dtype=np.float32)
        change = change_a_token({PLAIN: plain, "rule": plain + 0.5}, "rule")
        assert change.value == -0.5
        assert np.isnan([change.low, change.high]).all()  # no two texts differ: of the spread nothing is known

    def test_half_of_the_responses_are_missed_at_the_telling_n(self):
        logprobs = -np.arange(10.0, 21.0)
        assert telling_n(logprobs) == math.exp(15)
        assert telling_n(logprobs, logprobs) == 4

    def test_the_choice_is_among_what_was_tried(self):
        rng = np.random.default_rng(0)
        plain = rng.normal(-3, 0.5, (40, 8)).astype(np.float32)
        rules = {name: TTTConfig(lr) for name, lr in (("a", 0.1), ("b", 1.0), ("not tried", 2.0))}
        choice = choose({PLAIN: plain, "a": plain - 0.1, "b": plain + 0.4}, rules)
        assert choice.rule.lr == 1.0
        assert choice.helps


class TestCompare:
    def test_a_taste_is_a_bias_of_the_logits(self, tiny):
        ids = torch.tensor([[1, 2, 3]])
        before = copy.deepcopy(tiny.state_dict())
        changed = compare.with_taste(tiny, share=0.25, strength=2.0, seed=0)
        with torch.no_grad():
            bias = changed(ids).logits - tiny(ids).logits
        assert set(bias.round(decimals=3).unique().tolist()) == {0.0, 2.0}
        assert 0.1 < (bias[0, 0] > 1).float().mean() < 0.4
        assert all(torch.equal(values, before[name]) for name, values in tiny.state_dict().items())

    def test_the_whole_recipe_runs_and_resumes(self, few_texts, tiny, tokenizer, tmp_path, monkeypatch):
        model, output = tmp_path / "model", tmp_path / "run"
        tiny.save_pretrained(model)
        tokenizer.save_pretrained(model)
        settings = {
            "output_dir": output, "run.model": model, "run.top_k": 16,
            "text.documents": 4, "text.prompt_tokens": 24, "text.response_tokens": 12, "text.lr": "0.001 0.01",
            "long.documents": 2, "long.prompt_tokens": 4, "long.response_tokens": 140, "long.lr": 0.001,
            "safety.documents": 2, "safety.lr": 0.1, "safety.radius": 0.3, "safety.decay": 0.1,
            "safety.normalised_lr": 0.1, "known.prompts": 2, "known.prompt_tokens": 16, "known.response_tokens": 12,
            "known.temperatures": "0.7 1.0", "known.lr": "0.001 0.01", "known.students": "itself pruned-20 context-8",
            "scopes.documents": 2, "scopes.kinds": "code", "scopes.prompt_tokens": 4, "scopes.response_tokens": 4,
            "scopes.rules": ["head 0.01", "lora 0.01 exact", "all 0.01 stale"],
        }  # fmt: skip
        words = ["compare", "--config", str(FOLDER / "small.yaml")]
        for name, value in settings.items():
            words += [f"--{name}", *(value if isinstance(value, list) else str(value).split())]
        monkeypatch.setattr(sys, "argv", words)
        compare.main()
        report = (output / "report.md").read_text(encoding="utf-8")
        found = json.loads((output / "findings.json").read_text(encoding="utf-8"))
        assert set(found["change_of_cross_entropy_nats_a_token"]["texts"]) == set(texts.KINDS)
        assert {"itself, D at 0.7", "itself, taste", "context-8, D at 1"} <= set(
            found["change_of_cross_entropy_nats_a_token"]["known"]
        )
        assert all((output / name).exists() for name in ("step_sizes.png", "positions.png", "known_density.png"))
        assert "| code | lora |" in report

        monkeypatch.setattr(ScoringEngine, "score_rules", lambda *_, **__: pytest.fail("no text is followed again"))
        compare.main()
        assert (output / "report.md").read_text(encoding="utf-8") == report
        monkeypatch.setattr(sys, "argv", [*words, "--known.prompts", "4"])
        with pytest.raises(ValueError, match="other settings"):
            compare.main()

    def test_an_unknown_part_is_refused(self, tiny, tokenizer, tmp_path, monkeypatch):
        tiny.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        words = ["compare", "--config", str(FOLDER / "small.yaml"), "--run.model", str(tmp_path), "--parts", "nothing"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(ValueError, match=r"`parts` must be among text, .*, got 'nothing'"):
            compare.main()


class TestTheorem:
    def test_a_response_tells_the_same_at_every_length(self):
        for horizon in (16, 256):
            instance = theorem.rare_instance(horizon, num_prompts=3, information=8.0)
            logprobs = instance.next_logprobs(instance.theta)[3]
            start = instance.next_logprobs(instance.start)[3]
            assert horizon * (np.exp(logprobs) @ (logprobs - start)) == pytest.approx(8.0)

    def test_training_is_token_level_sgd_for_each_number_of_sequences(self):
        instance = theorem.rare_instance(12, num_prompts=3, information=6.0)
        rates = np.array([0.05, 0.02])
        few, all_of_them = theorem.train(Data(instance, range(2), 9), rates, [4, 9], seed=3)
        whole = train_tokens(Data(instance, range(2), 9), rates[1:], seed=3)[0]
        np.testing.assert_allclose(all_of_them, whole)
        (alone,) = theorem.train(Data(instance, range(2), 9), rates[:1], [4], seed=3)
        np.testing.assert_allclose(few, alone)

    def test_maximum_likelihood_is_where_the_likelihood_is_largest(self):
        instance = theorem.rare_instance(12, num_prompts=4, information=6.0)
        data = Data(instance, [0], 20)
        (found,) = theorem.maximum_likelihood(data, 3)

        def loss(theta):
            rows = zip(data.prompts[0, :3], data.counts[0, :3])
            return -sum(counts @ instance.next_logprobs(theta)[prompt] for prompt, counts in rows)

        unseen = ~np.isin(instance.prompts, data.prompts[0, :3])
        assert unseen.any()
        assert not found[unseen].any()
        for k, step in itertools.product(np.flatnonzero(~unseen), (-0.01, 0.01)):
            moved = found.copy()
            moved[k] = np.clip(moved[k] + step, -1, 1)
            assert loss(moved) >= loss(found) - 1e-6

    def test_the_floor_holds_for_every_guess_and_is_reached(self):
        """Against listing all responses to an unseen prompt, for guesses on a grid and both signs of the truth."""
        instance, log_n = theorem.rare_instance(5, num_prompts=2, information=4.0), math.log(2)
        responses = np.array(list(itertools.product(range(3), repeat=5)))
        prompts = np.full(len(responses), 3)
        truths = [instance.theta * sign for sign in (1, -1)]

        def missed(guess):
            theta, total = np.array([guess, 0.0]), 0.0
            for truth in truths:
                reference = instance.logprobs(prompts, responses, truth)
                ratios = reference - instance.logprobs(prompts, responses, theta)
                total += 0.5 * np.exp(reference)[ratios >= log_n].sum()
            return total

        least = min(missed(guess) for guess in np.linspace(-1, 1, 401))
        unseen = (0.5 * 0.5**3) + (0.5 * 0.5**3)
        assert least > 0.01
        assert theorem.proper_floor(instance, 3, log_n) == pytest.approx(least * unseen, rel=0.02)

    def test_what_learns_while_it_decodes_is_below_every_proper_estimator(self):
        args = theorem.TheoremArguments(
            "unused", num_prompts=8, n=[256], headline_n=256, horizon=64, seeds=4, samples=50, multiples=[4]
        )
        found = theorem.compare(args, 64, [60])
        adapted = np.mean(found[theorem.named(theorem.TTT, 4)])
        assert adapted < 0.2 * found[theorem.FLOOR][0][0]
        assert found[theorem.FLOOR][0][0] <= np.mean(found[theorem.LIKELIHOOD])

    def test_it_writes_its_table_and_resumes(self, tmp_path, monkeypatch):
        words = ["theorem", "--config", str(FOLDER / "theorem.yaml"), "--output_dir", str(tmp_path)]
        small = {
            "horizon": 16,
            "steps": "8 16",
            "horizons": "8 16",
            "seeds": 2,
            "samples": 5,
            "n": "4 64",
            "information": 4,
        }
        for name, value in small.items():
            words += [f"--{name}", *str(value).split()]
        monkeypatch.setattr(sys, "argv", words)
        theorem.main()
        text = (tmp_path / "theorem.md").read_text(encoding="utf-8")
        assert text.count(f"| {theorem.TTT}") == 4
        assert (tmp_path / "theorem.png").exists()
        monkeypatch.setattr(theorem, "compare", lambda *_: pytest.fail("what is there is not computed again"))
        theorem.main()
        assert (tmp_path / "theorem.md").read_text(encoding="utf-8") == text
