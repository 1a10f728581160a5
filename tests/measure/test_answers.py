"""p(ans|x) = E_{cot ~ p} p(ans|x, cot), against all reasonings written out."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_coverage.measure.answers import score_answers
from hf_coverage.measure.corpus import reference_kind
from hf_coverage.measure.profile import CoverageProfile
from tests.measure.small_tokenizers import llama_like

PROMPT = [2, 3]


def next_logprobs(model: GPT2LMHeadModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()


def logprob(model: GPT2LMHeadModel, context: list[int], response: list[int]) -> float:
    return sum(float(next_logprobs(model, context + response[:at])[token]) for at, token in enumerate(response))


def reasonings(
    model: GPT2LMHeadModel, context: list[int], length: int, ends: Callable[[list[int]], bool], so_far: tuple = ()
) -> Iterator[tuple[float, list[int]]]:
    """Every reasoning of at most `length` tokens, cut where it ends, with its log-probability."""
    ids = list(so_far)
    if ids and (len(ids) == length or ends(ids)):
        yield 0.0, ids
        return
    step = next_logprobs(model, context + ids)
    for token, value in enumerate(step):
        for rest, whole in reasonings(model, context, length, ends, (*so_far, token)):
            yield float(value) + rest, whole


def copies(count: int, **columns: object) -> Dataset:
    """Identical rows: as many independent estimates of one number."""
    return Dataset.from_dict({name: [value] * count for name, value in columns.items()})


def estimates(model, tokenizer, corpus, **arguments) -> np.ndarray:
    arguments = {"samples": 4, "batch_size": 2000, "seed": 11, "progress": False} | arguments
    return np.exp(score_answers(model, tokenizer, corpus, **arguments)["answer_logprob"][:])


def assert_unbiased(values: np.ndarray, exact: float) -> None:
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * error
    assert error < 0.1 * exact  # or else the line above says nothing


class TestAgainstEnumeration:
    def test_fixed_length(self, tiny_gpt2):
        tiny_gpt2.generation_config.eos_token_id = None
        exact = sum(
            math.exp(weight + logprob(tiny_gpt2, PROMPT + cot, [4, 5]))
            for weight, cot in reasonings(tiny_gpt2, PROMPT, 2, lambda ids: False)
        )
        corpus = copies(300, prompt=PROMPT, answer=[4, 5])
        assert_unbiased(estimates(tiny_gpt2, None, corpus, separator=None, max_reasoning_tokens=2), exact)

    def test_fixed_length_with_an_end_before_it(self, tiny_gpt2):
        tiny_gpt2.generation_config.eos_token_id = 1
        exact = sum(
            math.exp(weight + logprob(tiny_gpt2, PROMPT + cot, [4]))
            for weight, cot in reasonings(tiny_gpt2, PROMPT, 2, lambda ids: ids[-1] == 1)
            if 1 not in cot
        )
        corpus = copies(400, prompt=PROMPT, answer=[4])
        assert_unbiased(estimates(tiny_gpt2, None, corpus, separator=None, max_reasoning_tokens=2), exact)

    @pytest.mark.parametrize("separator", [[4], [5, 4]])
    def test_token_separator(self, tiny_gpt2, separator):
        def ends(ids):
            return ids[-1] == 1 or ids[-len(separator) :] == separator

        tiny_gpt2.lm_head.bias = torch.nn.Parameter(torch.zeros(11).index_fill(0, torch.tensor([4, 5]), 1.5))
        tiny_gpt2.generation_config.eos_token_id = 1
        reached = [
            (weight, cot)
            for weight, cot in reasonings(tiny_gpt2, PROMPT, 3, ends)
            if cot[-len(separator) :] == separator
        ]
        exact = sum(math.exp(weight + logprob(tiny_gpt2, PROMPT + cot, [4, 6])) for weight, cot in reached)
        corpus = copies(1000, prompt=PROMPT, answer=[4, 6])
        arguments = {"separator": separator, "max_reasoning_tokens": 3}
        assert_unbiased(estimates(tiny_gpt2, None, corpus, **arguments), exact)
        scored = score_answers(tiny_gpt2, None, corpus, samples=4, progress=False, batch_size=2000, **arguments)
        rate = sum(math.exp(weight) for weight, _ in reached)
        assert np.mean(scored["answer_reached"][:]) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / 4000))

    @pytest.mark.parametrize("append_eos", [False, True])
    @pytest.mark.parametrize("separator", ["#", "# "])
    def test_text_separator_with_tokens_across_it(self, tiny_gpt2, append_eos, separator):
        tokenizer = hashes()
        tiny_gpt2.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tiny_gpt2.generation_config.eos_token_id = tokenizer.eos_token_id
        prompt, answer = tokenizer("ba")["input_ids"], "ab"
        target = separator[1:] + answer

        def ends(ids):
            return ids[-1] == tokenizer.eos_token_id or "#" in tokenizer.decode(ids)

        exact, across = 0.0, 0
        for weight, cot in reasonings(tiny_gpt2, prompt, 3, ends):
            _, found, overflow = tokenizer.decode(cot).partition("#")
            if found and target.startswith(overflow):
                rest = tokenizer(target[len(overflow) :])["input_ids"] + [tokenizer.eos_token_id] * append_eos
                exact += math.exp(weight + logprob(tiny_gpt2, prompt + cot, rest))
                across += bool(overflow)
        assert across > 0
        values = estimates(
            tiny_gpt2,
            tokenizer,
            copies(600, prompt="ba", answer=answer),
            separator=separator,
            max_reasoning_tokens=3,
            append_eos=append_eos,
            samples=16,
        )
        assert_unbiased(values, exact)

    def test_the_standard_error_is_that_of_the_logarithm(self, tiny_gpt2):
        scored = score_answers(
            tiny_gpt2,
            None,
            copies(300, prompt=PROMPT, answer=[4, 5]),
            separator=None,
            samples=64,
            max_reasoning_tokens=2,
            batch_size=5000,
            progress=False,
        )
        spread = np.std(scored["answer_logprob"][:], ddof=1)
        assert np.mean(scored["answer_logprob_stderr"][:]) == pytest.approx(spread, rel=0.2)


def hashes() -> PreTrainedTokenizerFast:
    """Nine tokens, some of which reach across the separator "#"."""
    vocabulary = {token: index for index, token in enumerate(["</s>", "a", "b", "#", "Ġ", "#a", "ab", "b#", "#Ġ"])}
    merges = [("a", "b"), ("#", "a"), ("b", "#"), ("#", "Ġ")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


class TestResult:
    def test_columns_and_profile(self, tiny_gpt2):
        corpus = Dataset.from_dict(
            {"prompt": [[2], [3]], "reasoning": [[5, 6], [7]], "answer": [[4], [5, 6]], "tag": ["a", "b"]}
        )
        arguments = {"separator": None, "samples": 8, "max_reasoning_tokens": 2, "progress": False}
        scored = score_answers(tiny_gpt2, None, corpus, **arguments)
        assert scored.select_columns(corpus.column_names)[:] == corpus[:]
        assert scored["reference_answer_logprob"][:] == [0.0, 0.0]
        assert reference_kind(scored) == "answer"
        profile = CoverageProfile.from_logprobs(
            scored["answer_logprob"], scored["reference_answer_logprob"], kind="answer"
        )
        assert profile.kind == "answer"
        assert profile.kl == pytest.approx(-np.mean(scored["answer_logprob"][:]))

    def test_a_given_reference_is_kept(self, tiny_gpt2):
        corpus = Dataset.from_dict({"prompt": [[2]], "answer": [[4]], "reference_answer_logprob": [-0.5]})
        arguments = {"separator": None, "samples": 2, "max_reasoning_tokens": 2, "progress": False}
        assert score_answers(tiny_gpt2, None, corpus, **arguments)["reference_answer_logprob"][:] == [-0.5]
        wrong = corpus.remove_columns("reference_answer_logprob").add_column("reference_answer_logprob", [0.5])
        with pytest.raises(ValueError, match=r"Row 0, column `reference_answer_logprob`: expected log D <= 0"):
            score_answers(tiny_gpt2, None, wrong, **arguments)

    def test_a_separator_that_is_never_reached(self, tiny_gpt2):
        tiny_gpt2.lm_head.bias = torch.nn.Parameter(torch.zeros(11).index_fill(0, torch.tensor(4), -math.inf))
        scored = score_answers(
            tiny_gpt2,
            None,
            copies(2, prompt=PROMPT, answer=[5]),
            separator=[4],
            samples=3,
            max_reasoning_tokens=2,
            progress=False,
        )
        assert scored["answer_logprob"][:] == [-math.inf] * 2
        assert scored["answer_logprob_stderr"][:] == [math.inf] * 2
        assert scored["answer_reached"][:] == [0.0, 0.0]

    def test_a_space_mark_tokenizer(self, tiny_gpt2):
        """The answer's tokens are those it has after the separator, where no space is put before a text."""
        tokenizer = llama_like()
        tiny_gpt2.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        newline = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
        bias = torch.full((len(tokenizer),), -60.0).index_fill(0, torch.tensor(newline), 60.0)
        tiny_gpt2.lm_head.bias = torch.nn.Parameter(bias)
        scored = score_answers(
            tiny_gpt2,
            tokenizer,
            copies(1, prompt="one", answer="two"),
            separator="\n",
            samples=2,
            max_reasoning_tokens=1,
            progress=False,
        )
        expected = tokenizer("\ntwo", add_special_tokens=False)["input_ids"]
        expected = expected[expected.index(newline) + 1 :]
        context = [*tokenizer("one")["input_ids"], newline]
        assert scored["answer_reached"][:] == [1.0]
        assert scored["answer_logprob"][0] == pytest.approx(logprob(tiny_gpt2, context, expected), abs=1e-3)

    @pytest.mark.parametrize(
        ("columns", "arguments", "error", "message"),
        [
            ({}, {"samples": 1}, ValueError, "`samples` must be at least 2"),
            ({"answer": "a"}, {"separator": None}, ValueError, "`tokenizer` must be given for text"),
            ({"answer": "a"}, {"separator": "#"}, ValueError, "`tokenizer` must be given for text"),
            ({"answer": "a"}, {"separator": [4]}, TypeError, r"must be text as the column `answer` is, got \[4\]"),
            ({}, {"separator": "#"}, TypeError, "must be token ids as the column `answer` is, got '#'"),
            ({}, {"separator": []}, ValueError, "`separator` must not be empty; pass None"),
            ({}, {"append_eos": True}, ValueError, "`tokenizer` must be given for `append_eos=True`"),
            ({"answer": []}, {}, ValueError, "Row 0, column `answer`: expected at least one token id"),
            ({"answer": ""}, {}, ValueError, "Row 0, column `answer`: expected an answer, got an empty one"),
            ({"answer": [{"role": "a", "content": "b"}]}, {}, TypeError, "Row 0, column `answer`: .* chat messages"),
            ({}, {"max_reasoning_tokens": 0}, ValueError, "`max_reasoning_tokens` must be at least 1"),
            ({}, {"max_reasoning_tokens": 62}, ValueError, "Prompt 0 has 2 tokens, and with 63 new ones"),
        ],
    )
    def test_errors(self, tiny_gpt2, columns, arguments, error, message):
        corpus = copies(1, **({"prompt": PROMPT, "answer": [4]} | columns))
        arguments = {"separator": [4], "samples": 2, "max_reasoning_tokens": 2, "progress": False} | arguments
        with pytest.raises(error, match=message):
            score_answers(tiny_gpt2, None, corpus, **arguments)

    def test_a_missing_column(self, tiny_gpt2):
        corpus = Dataset.from_dict({"prompt": [[1]], "completion": [[2]]})
        with pytest.raises(ValueError, match="must have a column `answer`"):
            score_answers(tiny_gpt2, None, corpus, separator=None, samples=2, max_reasoning_tokens=1)
