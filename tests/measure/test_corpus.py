"""A corpus is checked by row and column, and tokenised to the ids that lm-evaluation-harness scores."""

import json
import logging
from functools import cache

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.measure.corpus import encode_corpus, encode_prompts, reference_kind, validate_corpus
from tests.measure.small_tokenizers import gpt2_like, llama_like, with_chat, words

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=5)

AWKWARD = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("Question: 1+1=\nAnswer:  \n", "2"),
    ("tabs\t\t", "\tand more"),
    ("", "nothing before"),
    ("", " a space before"),
    ("no space", "between"),
    ("1", "23456789" * 30),
    ("日本の首都は", "東京です。"),
    ("naïve café — ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🙂🇫🇷"),
    ("half an emoji 🙂", "\u200d🙂"),
    ("long " * 400, "end"),
    ("no-break\u00a0", "\u00a0spaces\u3000"),
    ("a\r\n", "\r\nb"),
    ("<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant"),
    ("<s>already begun", " here"),
    ("</s>odd", " one"),
    ("", "</s> that begins the text"),
    ("", "<s> that begins the text"),
]


class CatchingHarness(HFLM):
    """The harness, but what it would score is caught on the way to its model."""

    def _loglikelihood_tokens(self, requests: list, **kwargs: object) -> list[tuple[float, bool]]:
        self.caught = [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)


@cache
def harness(tokenizer: PreTrainedTokenizerFast) -> CatchingHarness:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer), n_positions=8))
    return CatchingHarness(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)


def harness_ids(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    harness(tokenizer).loglikelihood(requests, disable_tqdm=True)
    return harness(tokenizer).caught


def text_corpus(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def joined(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> bool:
    """Whether a token spans the end of the prompt."""
    head, whole = (tokenizer(text)["input_ids"] for text in (prompt.rstrip(), prompt + completion))
    return bool(prompt) and whole[: len(head)] != head


def assert_same_ids(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> None:
    """The harness's ids, where they spell the text; or else others that do, or a refusal."""
    clean = [pair for pair in pairs if not joined(tokenizer, *pair)]
    if clean:
        encoded = encode_corpus(text_corpus(clean), tokenizer)
        assert list(zip(encoded.prompts, encoded.completions)) == harness_ids(tokenizer, clean)
    for prompt, completion in pairs:
        if joined(tokenizer, prompt, completion):
            assert_spelled(tokenizer, prompt, completion)


def assert_spelled(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> None:
    corpus = text_corpus([(prompt, completion)])
    head, whole = (tokenizer(text)["input_ids"] for text in (prompt.rstrip(), prompt + completion))
    tail = tokenizer((prompt + completion)[len(prompt.rstrip()) :], add_special_tokens=False)["input_ids"]
    if tokenizer.decode(head + tail) == tokenizer.decode(whole):
        encoded = encode_corpus(corpus, tokenizer)
        assert (encoded.prompts, encoded.completions) == ([head], [tail])
    else:
        with pytest.raises(ValueError, match="a token spans the end of `prompt`"):
            encode_corpus(corpus, tokenizer)


def scorable(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs that the harness takes: it stops at a response without tokens, and at a blank prompt without any."""
    kept = []
    for prompt, completion in pairs:
        bare = not prompt.strip() and not tokenizer(prompt.rstrip())["input_ids"]
        if completion and not (prompt and bare):
            ((_, continuation),) = harness_ids(tokenizer, [(prompt, completion)])
            if continuation:
                kept.append((prompt, completion))
    return kept


class TestTextAsTheHarnessReadsIt:
    def test_smollm2(self, smollm2):
        assert_same_ids(smollm2[1], AWKWARD)

    @pytest.mark.parametrize("make", [gpt2_like, llama_like])
    def test_small_tokenizers(self, make):
        assert_same_ids(make(), scorable(make(), AWKWARD))

    @given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=4))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    def test_any_text(self, pairs):
        for tokenizer in (gpt2_like(), llama_like()):
            kept = scorable(tokenizer, pairs)
            if kept:
                assert_same_ids(tokenizer, kept)

    def test_a_prompt_without_tokens_is_bos_or_else_eos(self):
        corpus = text_corpus([("", "one"), ("  ", "one")])
        assert encode_corpus(corpus, llama_like()).prompts == [[1], [1]]
        assert encode_corpus(corpus, gpt2_like()).prompts == [[0], [0]]
        bare = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer)
        with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
            encode_corpus(corpus, bare)

    def test_batches_do_not_change_ids(self):
        pairs = [(f"{i} {text} ", f"{text}{i}") for i in range(5) for text in ("a b", "café", "\n")]
        together = encode_corpus(text_corpus(pairs), llama_like())
        apart = [encode_corpus(text_corpus([pair]), llama_like()) for pair in pairs]
        assert together.prompts == [one.prompts[0] for one in apart]
        assert together.completions == [one.completions[0] for one in apart]

    def test_the_tokenizer_stays_as_it_is(self):
        tokenizer = gpt2_like()
        tokenizer.backend_tokenizer.enable_truncation(3)
        try:
            before = tokenizer.backend_tokenizer.truncation
            encoded = encode_corpus(text_corpus([("one two three", " four five six")]), tokenizer)
            assert len(encoded.completions[0]) > 3
            assert before["max_length"] == 3
        finally:
            tokenizer.backend_tokenizer.no_truncation()

    @pytest.mark.parametrize("append_eos", [False, True])
    def test_a_token_across_the_border_is_not_made(self, append_eos, caplog):
        tokenizer, pair = gpt2_like(), ("The qui", "ck brown fox jumps over")
        with caplog.at_level(logging.WARNING, logger="hf_coverage"):
            encoded = encode_corpus(text_corpus([("the", " dog"), pair]), tokenizer, append_eos=append_eos)
        assert "In 1 of 2 rows (the first is row 1)" in caplog.text
        text = [tokenizer.decode(ids) for ids in (encoded.prompts[1], encoded.completions[1])]
        assert text == [pair[0], pair[1] + "</s>" * append_eos]
        ((_, harness_completion),) = harness_ids(tokenizer, [pair])
        assert tokenizer.decode(harness_completion) != pair[1]

    def test_a_completion_that_cannot_be_spelled_apart_is_refused(self):
        with pytest.raises(
            ValueError, match=r"Row 1: a token spans the end of `prompt`.*are another text, '<s> The qui ck"
        ):
            encode_corpus(text_corpus([("the", " dog"), ("The qui", "ck brown")]), llama_like())

    def test_a_tokenizer_that_ends_every_text_is_refused(self):
        with pytest.raises(ValueError, match="`add_eos_token=False`"):
            encode_corpus(text_corpus([("a", "b")]), llama_like(add_eos=True))


class TestEndOfSequence:
    def test_append_eos(self):
        corpus = text_corpus([("a b", " c"), ("a", "")])
        assert encode_corpus(corpus, words(), append_eos=True).completions == [[4, 1], [1]]

    def test_no_second_end(self):
        with pytest.raises(ValueError, match=r"Row 1, column `completion`: ends with the EOS token already"):
            encode_corpus(text_corpus([("a", " b"), ("a", " b </s>")]), words(), append_eos=True)

    @pytest.mark.parametrize("append_eos", [False, True])
    def test_a_token_that_holds_prompt_and_completion_is_not_made(self, append_eos):
        pair = next(
            (token[:cut], token[cut:])
            for token in gpt2_like().get_vocab()
            for cut in range(1, len(token))
            if token.isascii() and token.isalpha() and len(gpt2_like()(token[:cut])["input_ids"]) == 1
        )
        encoded = encode_corpus(text_corpus([("a", " b"), pair]), gpt2_like(), append_eos=append_eos)
        assert gpt2_like().decode(encoded.completions[1]) == pair[1] + "</s>" * append_eos

    def test_needs_an_eos_token(self):
        bare = PreTrainedTokenizerFast(tokenizer_object=words().backend_tokenizer)
        with pytest.raises(ValueError, match=r"set `tokenizer.eos_token`"):
            encode_corpus(text_corpus([("a", " b")]), bare, append_eos=True)

    def test_refused_where_the_end_is_given(self):
        ids = Dataset.from_dict({"prompt": [[1]], "completion": [[2]]})
        with pytest.raises(ValueError, match="text only, got token ids: they are final"):
            encode_corpus(ids, words(), append_eos=True)
        with pytest.raises(ValueError, match="text only, got chat messages: the chat template ends them"):
            encode_corpus(chat_corpus("hi", "yo"), with_chat(), append_eos=True)


def chat_corpus(question: str, answer: str, **columns: list) -> Dataset:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
    return Dataset.from_dict(
        {"prompt": [prompt], "completion": [[{"role": "assistant", "content": answer}]], **columns}
    )


class TestChat:
    def test_the_template_writes_both_sides(self):
        tokenizer = with_chat()
        encoded = encode_corpus(chat_corpus("one", " two"), tokenizer)
        assert tokenizer.decode(encoded.prompts[0]) == "<system>Be kind.</s><user>one</s><assistant>"
        assert tokenizer.decode(encoded.completions[0]) == " two</s>"

    def test_smollm2(self, smollm2):
        tokenizer = smollm2[1]
        encoded = encode_corpus(chat_corpus("one", "two"), tokenizer)
        assert tokenizer.decode(encoded.prompts[0]).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(encoded.completions[0]) == "two<|im_end|>\n"

    def test_a_template_that_rewrites_the_prompt_is_refused(self):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer, eos_token="</s>")
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(ValueError, match="Row 0: the chat template renders `prompt`"):
            encode_corpus(chat_corpus("one", "two"), tokenizer)

    def test_keys_that_arrow_fills_with_none_are_not_seen(self):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer, eos_token="</s>")
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'NAMED' if m.name is defined else '' }}{{ m['content'] }};{% endfor %}"
        )
        rows = [
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            {"prompt": [{"role": "user", "content": "a", "name": "x"}], "completion": [{"role": "a", "content": "b"}]},
        ]
        encoded = encode_corpus(Dataset.from_list(rows), tokenizer)
        assert [tokenizer.decode(ids) for ids in encoded.prompts] == ["a;", "NAMEDa;"]

    def test_errors(self):
        with pytest.raises(ValueError, match="has no chat template"):
            encode_corpus(chat_corpus("one", "two"), gpt2_like())
        with pytest.raises(ValueError, match="`tools` is not rendered"):
            encode_corpus(chat_corpus("one", "two", tools=["[]"]), with_chat())
        no_content = Dataset.from_dict({"prompt": [[{"role": "user"}]], "completion": [[{"role": "assistant"}]]})
        with pytest.raises(TypeError, match=r"Row 0, column `prompt`: expected messages such as"):
            validate_corpus(no_content)
        messages = [{"role": "user", "content": "a"}]
        empty = Dataset.from_dict({"prompt": [messages, []], "completion": [messages, messages]})
        with pytest.raises(ValueError, match="Row 1, column `prompt`: expected at least one chat message"):
            validate_corpus(empty)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def turns(body: str, head: str = "") -> str:
    """A template that writes `body` for each message, and nothing to ask for an answer."""
    return head + "{% for m in messages %}" + body + "{% endfor %}"


ASKED = [{"role": "user", "content": "q"}]
REASONED = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
PARTS = {"role": "assistant", "content": [{"type": "text", "text": "four"}, {"type": "text", "text": "five"}]}


class TestTheCompletionSurvivesTheTemplate:
    @pytest.mark.parametrize(
        ("body", "completion", "lost"),
        [
            ("[{{ m.content }}]", [REASONED], "two and two"),
            ("[{{ m.content }}]", [CALLED], "add"),
            ("[{{ m.content[:3] }}]", [{"role": "assistant", "content": "four"}], "four"),
            ("[{{ m.content | lower }}]", [{"role": "assistant", "content": "Four"}], "Four"),
            ("[{{ m.content.split('</t>')[-1] }}]", [{"role": "a", "content": "<t>why</t>four"}], "<t>why</t>four"),
            ("[{{ m.content if m.content is string else m.content[0].text }}]", [PARTS], "five"),
            (
                "{{ '' if m.role == 'tool' else m.content }}",
                [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "a"}],
                "a",
            ),
        ],
    )
    def test_a_part_left_out_is_refused(self, body, completion, lost):
        corpus = Dataset.from_list([{"prompt": ASKED, "completion": completion}])
        with pytest.raises(ValueError, match=r"Row 0, column `completion`: the chat template leaves out") as caught:
            encode_corpus(corpus, chat_tokenizer(turns(body)))
        assert repr(lost) in str(caught.value)

    @pytest.mark.parametrize(
        ("body", "completion"),
        [
            ("[{{ m.content | trim }}]", [{"role": "assistant", "content": " four\n"}]),
            ("[{{ m.reasoning_content }}|{{ m.content }}]", [REASONED]),
            ("[{{ m.content | tojson }}]", [{"role": "assistant", "content": 'a "b"\nc é'}]),
            ("[{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}]", [CALLED]),
        ],
    )
    def test_what_is_written_another_way_passes(self, body, completion):
        corpus = Dataset.from_list([{"prompt": ASKED, "completion": completion}])
        assert encode_corpus(corpus, chat_tokenizer(turns(body))).completions[0]

    def test_none_is_no_key_at_any_depth(self):
        first = {"name": "f", "arguments": {"x": 1}}
        second = {"name": "g", "arguments": {"y": [{"z": 2}, {"w": 3}]}}
        rows = [
            {
                "prompt": ASKED,
                "completion": [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]}],
            }
            for call in (first, second)
        ]
        tokenizer = chat_tokenizer(turns("{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"))
        encoded = encode_corpus(Dataset.from_list(rows), tokenizer)
        for ids, call in zip(encoded.completions, (first, second)):
            assert json.loads(tokenizer.decode(ids)) == [{"function": call}]


class TestArgumentsOfTheTemplate:
    TEMPLATE = turns("{{ m.content }};", "{{ 'think;' if thinking else '' }}{{ 'NONE' if other is none else '' }}")

    def corpus(self, arguments):
        return chat_corpus("one", "two").select([0] * len(arguments)).add_column("chat_template_kwargs", arguments)

    def test_each_row_has_its_own(self):
        arguments = [{"thinking": True, "other": None}, {"thinking": False, "other": "x"}, {"thinking": None}, None]
        tokenizer = chat_tokenizer(self.TEMPLATE)
        corpus = self.corpus(arguments)
        starts = [tokenizer.decode(ids).startswith("think;") for ids in encode_corpus(corpus, tokenizer).prompts]
        assert starts == [True, False, False, False]
        prompts = encode_prompts(corpus["prompt"], tokenizer, chat_template_kwargs=corpus["chat_template_kwargs"])
        assert prompts == encode_corpus(corpus, tokenizer).prompts
        assert not any("NONE" in tokenizer.decode(ids) for ids in prompts)

    def test_what_is_not_theirs_to_decide(self):
        with pytest.raises(ValueError, match="Row 0, column `chat_template_kwargs`: `tokenize` is decided"):
            encode_corpus(self.corpus([{"tokenize": False}]), with_chat())
        with pytest.raises(TypeError, match="Row 0, column `chat_template_kwargs`: expected a dict"):
            encode_corpus(self.corpus(["thinking"]), with_chat())

    @pytest.mark.parametrize(("head", "told"), [("{{ strftime_now('%d %b %Y') }}", True), ("{{ 'strftime' }}", False)])
    def test_the_day_is_told_once(self, head, told, caplog):
        tokenizer = chat_tokenizer(turns("{{ m.content }};", head))
        for _ in range(2):
            encode_corpus(chat_corpus("one", "two"), tokenizer)
        assert caplog.text.count("prints today's date") == told

    def test_a_date_that_the_row_gives_is_no_news(self, caplog):
        template = turns("{{ m.content }};", "{{ date_string if date_string is defined else strftime_now('%d %b') }}")
        encode_corpus(self.corpus([{"date_string": "26 Jul"}]), chat_tokenizer(template))
        assert "today" not in caplog.text


class TestTokenIds:
    @given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6))
    @settings(max_examples=40, deadline=None)
    def test_pass_as_they_are(self, pairs):
        corpus = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
        encoded = encode_corpus(corpus, None, vocab_size=10)
        assert list(zip(encoded.prompts, encoded.completions)) == pairs
        assert len(encoded) == len(pairs)
        assert encoded.num_completion_tokens == sum(len(c) for _, c in pairs)

    def test_an_empty_prompt_gets_the_prefix(self):
        corpus = Dataset.from_dict({"prompt": [[], [3]], "completion": [[4], [5]]})
        assert encode_corpus(corpus, llama_like()).prompts == [[1], [3]]
        only_empty = Dataset.from_dict({"prompt": [[]], "completion": [[4]]})
        assert encode_corpus(only_empty, words()).prompts == [[1]]
        with pytest.raises(ValueError, match="give a `tokenizer`"):
            encode_corpus(corpus, None)

    @pytest.mark.parametrize(
        ("prompt", "completion", "error", "message"),
        [
            (
                [[1]],
                [[2, 10]],
                ValueError,
                r"Row 0, column `completion`: token id 10 is outside the model's vocabulary",
            ),
            ([[1], [11]], [[2], [3]], ValueError, r"Row 1, column `prompt`: token id 11 is outside"),
            ([[1], [-1]], [[2], [3]], ValueError, r"Row 1, column `prompt`: expected token ids >= 0, got -1"),
            ([[1], [1]], [[2], []], ValueError, r"Row 1, column `completion`: expected at least one token id"),
            ([[1], [1]], [[2], [3, None]], TypeError, r"Row 1, column `completion`: .* got None among them"),
            ([[1.5]], [[2]], TypeError, r"Row 0, column `prompt`: .* got list of float"),
            ([[True]], [[2]], TypeError, r"Row 0, column `prompt`: .* got list of bool"),
            ([[1], None], [[2], [3]], TypeError, r"Row 1, column `prompt`: .* got a missing value; drop the row"),
        ],
    )
    def test_errors(self, prompt, completion, error, message):
        corpus = Dataset.from_dict({"prompt": prompt, "completion": completion})
        with pytest.raises(error, match=message):
            encode_corpus(corpus, None, vocab_size=10)

    def test_the_format_of_the_dataset_does_not_matter(self):
        corpus = Dataset.from_dict({"prompt": [[1, 2]], "completion": [[3]]}).with_format("torch")
        assert encode_corpus(corpus, None).completions == [[3]]
        assert corpus.format["type"] == "torch"


class TestChecks:
    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (float("nan"), ValueError, "Row 1, column `reference_logprob`: expected a finite log D, got nan"),
            (-np.inf, ValueError, "expected a finite log D, got -inf"),
            (0.1, ValueError, "expected log D <= 0 .* is it a probability, or a negated one"),
            (2e-6, ValueError, "expected log D <= 0"),
            (None, TypeError, "Row 1, .* got None; drop the row, or the whole column"),
        ],
    )
    def test_reference_logprob(self, value, error, message):
        corpus = Dataset.from_dict(
            {"prompt": ["a", "b"], "completion": ["c", "d"], "reference_logprob": [-1.0, value]}
        )
        for check in (validate_corpus, reference_kind, lambda corpus: encode_corpus(corpus, words())):
            with pytest.raises(error, match=message):
                check(corpus)

    def test_rounding_above_one_passes(self):
        corpus = Dataset.from_dict({"prompt": ["a"], "completion": ["c"], "reference_logprob": [1e-7]})
        validate_corpus(corpus)
        assert reference_kind(corpus) == "density"

    def test_other_types_of_reference_logprob(self):
        corpus = Dataset.from_dict({"prompt": ["a"], "completion": ["c"], "reference_logprob": ["-1"]})
        with pytest.raises(TypeError, match=r"Row 0, column `reference_logprob`: .* got '-1'"):
            validate_corpus(corpus)
        validate_corpus(corpus.remove_columns("reference_logprob").add_column("reference_logprob", [-1]))

    @pytest.mark.parametrize(
        ("corpus", "error", "message"),
        [
            ([{"prompt": "a"}], TypeError, r"got list; make one with `Dataset.from_list`"),
            (DatasetDict(train=Dataset.from_dict({"a": [1]})), TypeError, r"one split .* choose one of \['train'\]"),
            ({"prompt": [], "completion": []}, ValueError, "got an empty dataset"),
            ({"prompt": ["a"], "text": ["b"]}, ValueError, r"a column `completion`, got \['prompt', 'text'\]; rename"),
            ({"prompt": ["a"], "completion": [1]}, TypeError, "Row 0, column `completion`: .* got int"),
            ({"prompt": ["a"], "completion": [[1]]}, ValueError, "of one kind, got text and token ids"),
            ({"prompt": ["a"], "completion": [[]]}, ValueError, "Row 0, column `completion`: .* at least one"),
            ({"prompt": [[]], "completion": ["a"]}, ValueError, "of one kind, got empty and text"),
            ({"prompt": ["a", None], "completion": ["b", "c"]}, TypeError, "Row 1, column `prompt`: .* missing"),
        ],
    )
    def test_what_is_no_corpus(self, corpus, error, message):
        with pytest.raises(error, match=message):
            validate_corpus(Dataset.from_dict(corpus) if type(corpus) is dict else corpus)

    def test_a_stream_is_refused_with_the_way_out(self):
        stream = text_corpus([("a", "b")]).to_iterable_dataset()
        with pytest.raises(TypeError, match=r"Dataset.from_list\(list\(corpus.take\(1000\)\)\)"):
            validate_corpus(stream)
        validate_corpus(Dataset.from_list(list(stream.take(1000))))

    def test_a_completion_without_tokens_names_its_row(self):
        with pytest.raises(ValueError, match=r"Row 1, column `completion`: .* `append_eos=True`"):
            encode_corpus(text_corpus([("a", " b"), ("a", "")]), words())

    def test_text_needs_a_tokenizer(self):
        with pytest.raises(ValueError, match="`tokenizer` must be given for a corpus of text, got None"):
            encode_corpus(text_corpus([("a", "b")]), None)

    def test_kinds_of_reference(self):
        pairs = {"prompt": ["a", "b"], "completion": ["c", "d"]}
        kinds = {
            "samples": {},
            "single_answer": {"reference_logprob": [0.0, 0.0]},
            "density": {"reference_logprob": [0.0, -1.0]},
            "answer": {"answer_logprob": [-1.0, -2.0]},
        }
        for kind, columns in kinds.items():
            assert reference_kind(Dataset.from_dict(pairs | columns)) == kind


class TestEncodedCorpus:
    def test_the_fingerprint_is_of_the_ids_in_their_rows(self):
        corpora = [
            EncodedCorpus([[1, 2], [3]], [[4], [5, 6]]),
            EncodedCorpus([[1], [2, 3]], [[4], [5, 6]]),
            EncodedCorpus([[1, 2], [3]], [[4, 5], [6]]),
            EncodedCorpus([[3], [1, 2]], [[5, 6], [4]]),
            EncodedCorpus([[1, 2], [3], [4]], [[4], [5], [6]]),
        ]
        assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
        assert corpora[0].fingerprint == EncodedCorpus([[1, 2], [3]], [[4], [5, 6]]).fingerprint

    def test_errors(self):
        with pytest.raises(ValueError, match="one entry per row each, got 1 and 2"):
            EncodedCorpus([[1]], [[2], [3]])
        with pytest.raises(ValueError, match="Row 1 of `completions` has no tokens"):
            EncodedCorpus([[1], [1]], [[2], []])


class TestPrompts:
    def test_kinds(self):
        assert encode_prompts(["a b", "", "c "], words()) == [[2, 3], [1], [4]]
        assert encode_prompts(["a"], llama_like())[0][0] == 1
        tokenizer = with_chat()
        ids = encode_prompts([[{"role": "user", "content": "one"}]], tokenizer)
        assert tokenizer.decode(ids[0]) == "<user>one</s><assistant>"
        assert encode_prompts(Dataset.from_dict({"prompt": [[3], [4]]})["prompt"], None) == [[3], [4]]

    @pytest.mark.parametrize(
        ("prompts", "error", "message"),
        [
            ("one string", TypeError, r"pass `\[prompt\]`"),
            ([], ValueError, "got none"),
            (["a", [1]], ValueError, "Row 1, column `prompt`: expected text as in the rows before, got token ids"),
            ([[1, "a"]], TypeError, "got 'a' among them"),
            (["a"], ValueError, "`tokenizer` must be given for prompts of text"),
        ],
    )
    def test_errors(self, prompts, error, message):
        with pytest.raises(error, match=message):
            encode_prompts(prompts, None)
