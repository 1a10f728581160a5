"""Corpora are built with the density they state: windows, samples, scores of a teacher, single answers."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.measure.answers import score_answers
from hf_coverage.measure.builders import sample_corpus, single_answer_corpus, teacher_scored_corpus, windows_corpus
from hf_coverage.measure.corpus import encode_corpus, reference_kind, validate_corpus
from hf_coverage.measure.scoring import score_responses
from tests.measure.small_tokenizers import gpt2_like, llama_like, with_chat, words

PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 2], [3, 3]]
HOSTILE = {
    "do_sample": False,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 4,
    "suppress_tokens": [2, 3],
    "begin_suppress_tokens": [4],
    "bad_words_ids": [[5]],
    "sequence_bias": [[[6], 5.0]],
    "forced_eos_token_id": 7,
    "num_beams": 3,
    "max_length": 3,
    "eos_token_id": 1,
    "guidance_scale": 2.0,
}


def letters(*documents: str) -> list[str]:
    return [" ".join(document) for document in documents]


class TestWindows:
    @given(
        st.lists(st.text("abcdefgh", max_size=15), min_size=1, max_size=5),
        st.integers(1, 3),
        st.integers(1, 4),
        st.none() | st.integers(1, 5),
        st.booleans(),
        st.booleans(),
    )
    @settings(max_examples=150, deadline=None)
    def test_against_slicing(self, documents, prompt_tokens, response_tokens, stride, append_eos, cross_documents):
        texts = letters(*documents)
        ids = [["abcdefgh".index(letter) + 2 for letter in document] + [1] * append_eos for document in documents]
        size, step = prompt_tokens + response_tokens, stride or response_tokens
        owner = [index for index, document in enumerate(ids) for _ in document]
        flat = [token for document in ids for token in document]
        expected = []
        if cross_documents:
            expected = [(flat[at : at + size], owner[at]) for at in range(0, len(flat) - size + 1, step)]
        else:
            for index, document in enumerate(ids):
                expected += [(document[at : at + size], index) for at in range(0, len(document) - size + 1, step)]
        arguments = {
            "prompt_tokens": prompt_tokens,
            "response_tokens": response_tokens,
            "stride": stride,
            "append_eos": append_eos,
            "cross_documents": cross_documents,
        }
        if not expected:
            with pytest.raises(ValueError, match="the longest text has"):
                windows_corpus(texts, words(), **arguments)
            return
        corpus = windows_corpus(texts, words(), **arguments)
        validate_corpus(corpus)
        assert reference_kind(corpus) == "samples"
        assert [row["prompt"] + row["completion"] for row in corpus] == [window for window, _ in expected]
        assert corpus["document"][:] == [document for _, document in expected]
        assert {len(prompt) for prompt in corpus["prompt"]} == {prompt_tokens}

    def test_a_seeded_choice_keeps_the_order(self):
        def windows(**choice):
            texts = letters("abcdefgh" * 4, "hgfedcba" * 4)
            corpus = windows_corpus(texts, words(), prompt_tokens=3, response_tokens=6, stride=1, **choice)
            return list(zip(corpus["prompt"], corpus["completion"], corpus["document"]))

        every, chosen = windows(), windows(max_windows=9, seed=3)
        remaining = iter(every)
        assert len(chosen) == 9
        assert all(window in remaining for window in chosen)  # a subsequence
        assert chosen == windows(max_windows=9, seed=3) != windows(max_windows=9, seed=4)
        assert windows(max_windows=1000) == every

    def test_bos_begins_every_window(self):
        tokenizer = llama_like()
        text = "The quick brown fox jumps over the lazy dog. one two three four"
        corpus = windows_corpus([text], tokenizer, prompt_tokens=2, response_tokens=2)
        assert len(corpus) > 1
        assert all(prompt[0] == tokenizer.bos_token_id and len(prompt) == 3 for prompt in corpus["prompt"])
        pieces = [token for row in corpus for token in row["prompt"][1:] + row["completion"]]
        assert set(pieces) <= set(tokenizer(text, add_special_tokens=False)["input_ids"])

    @pytest.mark.parametrize(
        ("texts", "arguments", "error", "message"),
        [
            ("a b c", {}, TypeError, r"pass `\[text\]`"),
            ([], {}, ValueError, "at least one text"),
            (["a b", None], {}, TypeError, "Text 1: expected a string, got NoneType"),
            (["a b"], {"prompt_tokens": 0}, ValueError, "`prompt_tokens` must be at least 1, got 0"),
            (["a b"], {"stride": 0}, ValueError, "`stride` must be at least 1"),
            (["a b"], {"max_windows": 0}, ValueError, "`max_windows` must be at least 1"),
            (["a b", "a b c"], {"response_tokens": 3}, ValueError, "= 4 tokens fits: the longest text has 3"),
        ],
    )
    def test_errors(self, texts, arguments, error, message):
        with pytest.raises(error, match=message):
            windows_corpus(texts, words(), **({"prompt_tokens": 1, "response_tokens": 1} | arguments))


def processed_logprobs(model, ids, temperature, top_k, top_p) -> np.ndarray:
    """Next-token log-probabilities after temperature, top-k and top-p, by sorting a list."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = order[:top_k]
    if top_p is not None:
        mass = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
        kept = [token for token, before in zip(kept, np.cumsum(mass) - mass) if before < top_p]
    result = np.full(len(logits), -np.inf)
    result[kept] = logits[kept] - np.log(np.exp(logits[kept]).sum())
    return result


class TestSamples:
    def test_the_density_is_what_scoring_gives(self, tiny_gpt2):
        corpus = sample_corpus(
            tiny_gpt2, None, PROMPTS, k=5, max_new_tokens=6, eos_token_id=1, batch_size=3, progress=False
        )
        scored = score_responses(tiny_gpt2, None, corpus, progress=False)
        np.testing.assert_allclose(scored["logprob"][:], corpus["reference_logprob"][:], atol=1e-4)
        assert corpus["prompt"][:] == [prompt for prompt in PROMPTS for _ in range(5)]
        assert corpus["finished"][:] == [ids[-1] == 1 for ids in corpus["completion"]]
        assert 0 < sum(corpus["finished"][:]) < len(corpus)
        assert all(len(ids) == 6 or ids[-1] == 1 for ids in corpus["completion"])
        assert all(1 not in ids[:-1] for ids in corpus["completion"])
        assert reference_kind(corpus) == "density"

    @pytest.mark.parametrize(
        ("temperature", "top_k", "top_p"),
        [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.7, 6, 0.6), (1.0, None, 0.4)],
    )
    def test_truncated_densities(self, tiny_gpt2, temperature, top_k, top_p):
        corpus = sample_corpus(
            tiny_gpt2,
            None,
            PROMPTS,
            k=4,
            max_new_tokens=5,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=1,
            batch_size=7,
            progress=False,
        )
        for row in corpus:
            expected, ids = 0.0, list(row["prompt"])
            for token in row["completion"]:
                expected += processed_logprobs(tiny_gpt2, ids, temperature, top_k, top_p)[token]
                ids.append(token)
            assert row["reference_logprob"] == pytest.approx(expected, abs=1e-4)

    def test_the_samples_follow_the_density(self, tiny_gpt2):
        corpus = sample_corpus(
            tiny_gpt2,
            None,
            [[2, 3]],
            k=4000,
            max_new_tokens=2,
            top_k=3,
            eos_token_id=1,
            batch_size=500,
            progress=False,
        )
        density = {tuple(row["completion"]): row["reference_logprob"] for row in corpus}
        assert sum(math.exp(value) for value in density.values()) == pytest.approx(1, abs=1e-4)
        counts = dict.fromkeys(density, 0)
        for ids in corpus["completion"]:
            counts[tuple(ids)] += 1
        for ids, count in counts.items():
            p = math.exp(density[ids])
            assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))

    def test_a_models_own_defaults_do_not_count(self, tiny_gpt2):
        arguments = {"k": 6, "max_new_tokens": 6, "eos_token_id": 1, "batch_size": 5, "progress": False}
        plain = sample_corpus(tiny_gpt2, None, PROMPTS, **arguments)
        tiny_gpt2.generation_config = hostile = GenerationConfig(**HOSTILE)
        before = hostile.to_dict()
        assert sample_corpus(tiny_gpt2, None, PROMPTS, **arguments)[:] == plain[:]
        assert tiny_gpt2.generation_config is hostile
        assert hostile.to_dict() == before

    def test_nothing_is_changed(self, tiny_gpt2):
        tiny_gpt2.train()
        tiny_gpt2.config.use_cache = False
        tiny_gpt2.transformer.h[0].eval()
        modes = [module.training for module in tiny_gpt2.modules()]
        weights = {name: value.clone() for name, value in tiny_gpt2.state_dict().items()}
        torch.manual_seed(5)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        corpus = sample_corpus(tiny_gpt2, None, PROMPTS, k=2, max_new_tokens=3, eos_token_id=1, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
        assert [module.training for module in tiny_gpt2.modules()] == modes
        assert tiny_gpt2.config.use_cache is False
        assert all(torch.equal(value, weights[name]) for name, value in tiny_gpt2.state_dict().items())
        assert all(parameter.grad is None for parameter in tiny_gpt2.parameters())
        # Sampled in evaluation mode, whatever the mode was.
        scored = score_responses(tiny_gpt2, None, corpus, progress=False)
        np.testing.assert_allclose(scored["logprob"][:], corpus["reference_logprob"][:], atol=1e-4)

    def test_the_seed_decides(self, tiny_gpt2):
        def sample(seed, global_seed):
            torch.manual_seed(global_seed)
            return sample_corpus(
                tiny_gpt2, None, PROMPTS, k=3, max_new_tokens=4, eos_token_id=1, seed=seed, progress=False
            )[:]

        assert sample(0, 1) == sample(0, 2) != sample(1, 1)

    def test_text_and_chat(self, tiny_gpt2):
        torch.manual_seed(0)
        tokenizer = with_chat()
        tiny_gpt2.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        chat = [{"role": "user", "content": "one"}]
        corpus = sample_corpus(
            tiny_gpt2, tokenizer, [chat], k=2, max_new_tokens=3, eos_token_id=[0, 7], progress=False
        )
        assert corpus["prompt_text"][0] == "<user>one</s><assistant>"
        corpus = sample_corpus(
            tiny_gpt2, tokenizer, ["two ", ""], k=2, max_new_tokens=3, eos_token_id=[0, 7], progress=False
        )
        assert corpus["prompt_text"][:] == ["two ", "two ", "", ""]
        assert corpus["prompt"][0] == tokenizer("two ")["input_ids"]
        assert corpus["prompt"][2] == [tokenizer.eos_token_id]
        for row in corpus:
            assert row["completion_text"] == tokenizer.decode(row["completion"], skip_special_tokens=True)

    def test_end_of_sequence_is_the_models_or_else_the_tokenizers(self, tiny_gpt2):
        arguments = {"k": 30, "max_new_tokens": 8, "progress": False}
        tiny_gpt2.generation_config.eos_token_id = [4, 5]
        corpus = sample_corpus(tiny_gpt2, None, [[2]], **arguments)
        assert {ids[-1] for ids, done in zip(corpus["completion"], corpus["finished"]) if done} == {4, 5}
        tiny_gpt2.generation_config.eos_token_id = None
        assert any(sample_corpus(tiny_gpt2, words(), [[2]], **arguments)["finished"])
        endless = sample_corpus(tiny_gpt2, None, [[2]], **arguments)
        assert not any(endless["finished"])
        assert {len(ids) for ids in endless["completion"]} == {8}

    def test_a_recurrent_teacher(self):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, state_size=4)
        mamba = MambaForCausalLM(config).eval()
        corpus = sample_corpus(
            mamba, None, PROMPTS, k=2, max_new_tokens=4, eos_token_id=1, batch_size=8, progress=False
        )
        scored = score_responses(mamba, None, corpus, progress=False)
        np.testing.assert_allclose(scored["logprob"][:], corpus["reference_logprob"][:], atol=1e-4)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"k": 0}, "`k` must be at least 1"),
            ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
            ({"temperature": 0.0}, "`temperature` must be positive, got 0.0; greedy decoding"),
            ({"top_k": 0}, "`top_k` must be at least 1, or None"),
            ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
            ({"batch_size": 0}, "`batch_size` must be at least 1"),
            (
                {"max_new_tokens": 62},
                "Prompt 0 has 3 tokens, and with 62 new ones it does not fit into",
            ),
        ],
    )
    def test_errors(self, tiny_gpt2, arguments, message):
        with pytest.raises(ValueError, match=message):
            sample_corpus(tiny_gpt2, None, PROMPTS, **({"k": 1, "max_new_tokens": 2, "progress": False} | arguments))

    def test_a_real_model(self, smollm2):
        model, tokenizer = smollm2
        prompts = ["The capital of France is", "", "def add(a, b):\n"]
        corpus = sample_corpus(model, tokenizer, prompts, k=2, max_new_tokens=5, batch_size=4, progress=False)
        scored = score_responses(model, tokenizer, corpus, progress=False)
        np.testing.assert_allclose(scored["logprob"][:], corpus["reference_logprob"][:], atol=3e-4)


class TestTeacher:
    def test_scores_become_the_reference(self, tiny_gpt2):
        tiny_gpt2.resize_token_embeddings(len(gpt2_like()), mean_resizing=False)
        corpus = Dataset.from_dict({"prompt": ["one ", "two"], "completion": ["three", " four"], "tag": [1, 2]})
        for append_eos in (False, True):
            scored = teacher_scored_corpus(corpus, tiny_gpt2, gpt2_like(), append_eos=append_eos, progress=False)
            again = score_responses(tiny_gpt2, gpt2_like(), corpus, append_eos=append_eos, progress=False)
            assert scored.column_names == ["prompt", "completion", "tag", "reference_logprob"]
            assert scored["reference_logprob"][:] == again["logprob"][:]
            assert scored.remove_columns("reference_logprob")[:] == corpus[:]

    def test_errors(self, tiny_gpt2):
        corpus = Dataset.from_dict({"prompt": [[2], [2]], "completion": [[3], [4]]})
        scored = corpus.add_column("reference_logprob", [0.0, 0.0])
        with pytest.raises(ValueError, match="has a `reference_logprob` already"):
            teacher_scored_corpus(scored, tiny_gpt2, None)
        tiny_gpt2.lm_head.bias = torch.nn.Parameter(torch.zeros(11).index_fill(0, torch.tensor(4), -math.inf))
        with pytest.raises(ValueError, match="Row 1, column `completion`: the teacher gives it probability 0"):
            teacher_scored_corpus(corpus, tiny_gpt2, None, progress=False)


class TestSingleAnswers:
    def test_the_density_is_one(self):
        for prompts, answers in ((["a", "b"], ["c", "d"]), ([[1], [2]], [[3], [4, 5]])):
            corpus = single_answer_corpus(prompts, answers)
            assert reference_kind(corpus) == "single_answer"
            assert (corpus["prompt"][:], corpus["completion"][:]) == (prompts, answers)
        assert len(single_answer_corpus(["a", "a"], ["b", "b"])) == 2

    def test_errors(self):
        with pytest.raises(ValueError, match="must be as many, got 1 and 2"):
            single_answer_corpus(["a"], ["b", "c"])
        with pytest.raises(ValueError, match=r"Row 2, column `completion`: .* another answer in row 0"):
            single_answer_corpus(["a", "b", "a"], ["1", "2", "3"])
        with pytest.raises(ValueError, match="got an empty dataset"):
            single_answer_corpus([], [])


@cache
def wide_teacher() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=700, n_positions=32)).eval()


def shifted():
    """Another tokenizer of as many tokens as `gpt2_like`, each of them with another id."""
    vocabulary = gpt2_like().get_vocab()
    moved = {token: (index + 1) % len(vocabulary) for token, index in vocabulary.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(moved, unk_token="</s>")))


def later(**changes):
    """The tokenizer of `gpt2_like` after changes that move no id."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer, eos_token="</s>")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = changes.get("chat_template")
    tokenizer.add_tokens(changes.get("tokens", []))
    return tokenizer


MADE = {
    "windows": lambda teacher, tokenizer: windows_corpus(
        ["The quick brown fox jumps"] * 2, tokenizer, prompt_tokens=1, response_tokens=2
    ),
    "samples": lambda teacher, tokenizer: sample_corpus(
        teacher, tokenizer, ["The", "one"], k=1, max_new_tokens=2, progress=False
    ),
    "scored ids": lambda teacher, tokenizer: teacher_scored_corpus(
        Dataset.from_dict({"prompt": [[1], [2]], "completion": [[3], [4]]}), teacher, tokenizer, progress=False
    ),
}
TRAVELS = {
    "as it is": lambda corpus, folder: corpus,
    "a folder": lambda corpus, folder: corpus.save_to_disk(folder / "c") or load_from_disk(folder / "c"),
    "select": lambda corpus, folder: corpus.select([1]),
    "filter": lambda corpus, folder: corpus.filter(lambda row: True, load_from_cache_file=False),
    "concatenated": lambda corpus, folder: concatenate_datasets(
        [Dataset.from_dict({"prompt": [[9]], "completion": [[2]]}), corpus.select_columns(IDS_AND_OWNER)]
    ),
    "a file": lambda corpus, folder: (
        corpus.to_json(folder / "c.jsonl") and Dataset.from_json(str(folder / "c.jsonl"), cache_dir=str(folder))
    ),
}
IDS_AND_OWNER = ["prompt", "completion", "tokenizer_fingerprint"]


class TestIdsKnowTheirTokenizer:
    @pytest.mark.parametrize("travel", TRAVELS.values(), ids=TRAVELS.keys())
    @pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
    def test_another_tokenizer_is_refused_wherever_the_rows_went(self, tmp_path, make, travel):
        corpus = travel(make(wide_teacher(), gpt2_like()), tmp_path)
        encode_corpus(corpus, gpt2_like())
        encode_corpus(corpus, None)
        encode_corpus(corpus, later(chat_template="{{ messages }}", tokens=["[new]"]))
        for other in (shifted(), llama_like(), words()):
            with pytest.raises(ValueError, match=r"the token ids were made with another tokenizer"):
                encode_corpus(corpus, other)
            with pytest.raises(ValueError, match=r"the token ids were made with another tokenizer"):
                PromptTable.from_corpus(corpus).encode(other)
        encode_corpus(corpus.remove_columns("tokenizer_fingerprint"), shifted())

    def test_answers_and_scores_too(self):
        corpus = MADE["windows"](wide_teacher(), gpt2_like())
        with pytest.raises(ValueError, match="made with another tokenizer"):
            score_responses(wide_teacher(), shifted(), corpus, progress=False)
        with pytest.raises(ValueError, match="made with another tokenizer"):
            score_answers(
                wide_teacher(),
                shifted(),
                corpus.rename_column("completion", "answer"),
                separator=None,
                samples=2,
                max_reasoning_tokens=2,
            )

    def test_two_tokenizers_in_one_corpus(self):
        pair = [
            MADE["samples"](wide_teacher(), tokenizer).select_columns(IDS_AND_OWNER)
            for tokenizer in (gpt2_like(), llama_like())
        ]
        with pytest.raises(ValueError, match="Rows 0 and 2 hold token ids of different tokenizers"):
            encode_corpus(concatenate_datasets(pair), None)

    def test_what_is_no_fingerprint(self):
        corpus = Dataset.from_dict({"prompt": [[1]], "completion": [[2]], "tokenizer_fingerprint": ["mine"]})
        with pytest.raises(ValueError, match="expected a `vocabulary_fingerprint`, got 'mine'"):
            encode_corpus(corpus, words())
