"""A server's model: real HTTP through openai's client, to a server in this process with a tiny model behind it."""

import copy
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LogitsProcessorList

from hf_coverage import (
    CoverageCallback,
    RemoteModel,
    StepRule,
    evaluate_best_of_n,
    sample_corpus,
    score_answers,
    score_responses,
    score_rules,
    teacher_scored_corpus,
)
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.inference.sampler import Sampling
from hf_coverage.measure.score_table import ScoreTable
from tests.inference.fake_server import EOS, FakeServer, serving, tiny_model
from tests.measure.small_tokenizers import CHAT_TEMPLATE, gpt2_like, llama_like

TOKENIZER = gpt2_like()
PROMPTS = ["The quick brown", "def add(a", "3.14 or"]
QUIET = {"progress": False}


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def url(server):
    with serving(server) as address:
        yield address


@pytest.fixture
def remote(url):
    return RemoteModel(url, tokenizer=TOKENIZER, max_retries=0)


def connect(url, **settings):
    return RemoteModel(url, **{"tokenizer": TOKENIZER, "max_retries": 0} | settings)


def corpus(size=6):
    texts = [" fox jumps over", " b):\n    return", "2,718!", " one two", " dog", "\t🙂 emoji."]
    return Dataset.from_dict({"prompt": (PROMPTS * 2)[:size], "completion": texts[:size]})


def density(model, row, **law):
    """Log D of a response, by the definition."""
    ids = torch.tensor([row["prompt"] + row["completion"]])
    logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1].detach()
    logits = LogitsProcessorList(Sampling(1, **law).processors())(ids, logits)
    return token_logprobs(logits, ids[0, len(row["prompt"]) :]).double().sum().item()


def test_text_chat_and_token_ids_are_scored_as_the_model_in_memory_does(server, remote):
    chat = [[{"role": "user", "content": text}] for text in PROMPTS]
    answers = [[{"role": "assistant", "content": text}] for text in corpus(3)["completion"]]
    ids = [TOKENIZER(text)["input_ids"] for text in PROMPTS]
    kinds = [corpus(), Dataset.from_dict({"prompt": ids, "completion": ids[::-1]})]
    kinds.append(Dataset.from_dict({"prompt": chat, "completion": answers}))
    TOKENIZER.chat_template, before = CHAT_TEMPLATE, TOKENIZER.chat_template
    try:
        for rows in kinds:
            here = score_responses(server.model, TOKENIZER, rows, per_token=True, **QUIET)
            there = score_responses(remote, TOKENIZER, rows, per_token=True, **QUIET)
            assert there.column_names == here.column_names
            np.testing.assert_allclose(there["logprob"], here["logprob"], atol=1e-4)
            np.testing.assert_allclose(there["token_logprobs"][0], here["token_logprobs"][0], atol=1e-5)
    finally:
        TOKENIZER.chat_template = before


def test_samples_have_the_density_that_they_were_drawn_from(server, remote):
    rows = sample_corpus(remote, TOKENIZER, PROMPTS, k=8, max_new_tokens=6, **QUIET)
    assert len(rows) == 24
    assert len({tuple(ids) for ids in rows["completion"]}) > 20
    expected = [density(server.model, row) for row in rows]
    np.testing.assert_allclose(rows["reference_logprob"], expected, atol=1e-4)
    asked = server.bodies[-1]
    for name in ("top_k", "top_p", "min_p", "temperature", "repetition_penalty", "ignore_eos"):
        assert name in asked, "what is left out is filled in from the server's own defaults"


def test_a_response_ends_with_what_ends_it_and_not_elsewhere(server, remote):
    ends = sorted(set(range(2, len(TOKENIZER), 4)))
    rows = sample_corpus(remote, TOKENIZER, PROMPTS, k=8, max_new_tokens=9, eos_token_id=ends, **QUIET)
    for row in rows:
        inside = [token in ends for token in row["completion"]]
        assert not any(inside[:-1])
        assert inside[-1] == row["finished"]
        assert row["finished"] or len(inside) == 9
    assert 0 < sum(rows["finished"]) < len(rows)
    sample_corpus(remote, TOKENIZER, PROMPTS, k=1, max_new_tokens=4, **QUIET)
    assert server.bodies[-4]["stop_token_ids"] == [EOS]  # the tokenizer's: a server says nothing of its own


def test_the_same_seed_gives_the_same_samples_however_they_are_asked_for(url, remote, tmp_path):
    settings = {"k": 4, "max_new_tokens": 5, **QUIET}
    first = sample_corpus(remote, TOKENIZER, PROMPTS, **settings)
    alone = connect(url, concurrency=1)
    kept = sample_corpus(alone, TOKENIZER, PROMPTS, output_dir=tmp_path, batch_size=3, shard_rows=5, **settings)
    assert first["completion"][:] == kept["completion"][:]
    assert first["completion"][:] != sample_corpus(remote, TOKENIZER, PROMPTS, seed=1, **settings)["completion"][:]


def test_raw_log_probabilities_are_refused_where_they_are_not_those_of_the_samples(server, url):
    remote = connect(url, check_with=server.model)
    for law in ({"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match=r"its model as it is.*--logprobs-mode processed_logprobs"):
            sample_corpus(remote, TOKENIZER, PROMPTS, k=1, max_new_tokens=3, **law, **QUIET)
    server.processed = True
    for law in ({"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 1.5, "top_k": 30, "top_p": 0.9}):
        rows = sample_corpus(remote, TOKENIZER, PROMPTS, k=2, max_new_tokens=4, **law, **QUIET)
        expected = [density(server.model, row, **law) for row in rows]
        np.testing.assert_allclose(rows["reference_logprob"], expected, atol=1e-3)


def test_a_temperature_that_the_server_does_not_take_is_refused(server, url):
    server.processed = True
    remote = connect(url)
    server._complete, complete = (
        (lambda body: complete(body | {"temperature": max(0.5, body["temperature"])})),
        (server._complete),
    )
    with pytest.raises(ValueError, match=r"does not sample at `temperature` 0\.2"):
        sample_corpus(remote, TOKENIZER, PROMPTS, k=1, max_new_tokens=3, temperature=0.2, **QUIET)


@pytest.mark.parametrize(
    "defaults", [{"top_k": 20}, {"temperature": 0.3}, {"top_p": 0.4}, {"top_k": 1}], ids=lambda one: next(iter(one))
)
def test_defaults_of_the_server_that_are_at_work_are_found(defaults):
    with serving(FakeServer(**defaults)) as url, pytest.raises(ValueError, match="does not sample from what it rep"):
        connect(url)


def test_another_tokenizer_is_refused(server, url, remote):
    with pytest.raises(ValueError, match=r"`tokenizer` is another one than the server's.*give the tokenizer of tiny"):
        connect(url, tokenizer=llama_like())
    for call in (
        lambda: score_responses(remote, llama_like(), corpus(), **QUIET),
        lambda: sample_corpus(remote, llama_like(), PROMPTS, k=1, max_new_tokens=2, **QUIET),
        lambda: evaluate_best_of_n(remote, llama_like(), corpus(), k=1, max_new_tokens=2, **QUIET),
    ):
        with pytest.raises(ValueError, match="not the one that the server's model tiny was given"):
            call()
    theirs = sample_corpus(tiny_model(), llama_like(), [[5, 6]], k=1, max_new_tokens=2, **QUIET)
    with pytest.raises(ValueError, match="tokenizer"):
        score_responses(remote, TOKENIZER, theirs.select_columns(["prompt", "completion", "tokenizer_fingerprint"]))
    outside = Dataset.from_dict({"prompt": [[1]], "completion": [[2]]})
    server.fault = lambda number, body: (400, {"message": "Token id 2 is out of vocabulary"}, {})
    with pytest.raises(ValueError, match=r"Row 0: .* refuses this: .*out of vocabulary"):
        score_responses(remote, TOKENIZER, outside, **QUIET)


def test_a_local_copy_that_is_another_model_is_refused(server, url):
    with pytest.raises(ValueError, match=r"under the local copy `check_with`: these are two models"):
        connect(url, check_with=tiny_model(seed=1))
    connect(url, check_with=server.model)


def test_scores_that_depend_on_what_was_asked_before_are_refused(server, url):
    def spoil(number, answer):
        lines = answer["choices"][0].get("prompt_logprobs")
        if lines and number > 10:
            next(iter(lines[-1].values()))["logprob"] -= 0.01

    server.spoil = spoil
    with pytest.raises(ValueError, match=r"before and after other requests.*--no-enable-prefix-caching"):
        connect(url)
    assert connect(url, tolerance=0.2).name == "tiny"


def test_logits_in_the_place_of_log_probabilities_are_refused(server, url):
    def spoil(number, answer):
        for choice in answer["choices"]:
            if choice["logprobs"]:
                choice["logprobs"]["token_logprobs"] = [value - 0.5 for value in choice["logprobs"]["token_logprobs"]]

    server.spoil = spoil
    with pytest.raises(ValueError, match=r"when it is sampled and when it is scored.*raw_logits"):
        connect(url)


def test_a_response_that_the_server_ends_is_refused(server, remote):
    server.defaults = {"max_tokens": 2}
    with pytest.raises(ValueError, match=r"Prompt \d: .*of its own accord, after 2 of 5 tokens.*generation-config"):
        sample_corpus(remote, TOKENIZER, PROMPTS, k=1, max_new_tokens=5, **QUIET)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(server, url, status):
    remote, failed = connect(url, max_retries=3), set()

    def fault(number, body):
        key = str(sorted(body.items(), key=str))
        if len(failed) < 4 and key not in failed:
            failed.add(key)
            return status, {"message": "busy"}, {"retry-after-ms": "1"}
        return None

    first, server.fault = len(server.bodies), fault
    scored = score_responses(remote, TOKENIZER, corpus(), **QUIET)
    assert len(server.bodies) - first == 6 + 3 + 4  # rows, fingerprint, those that failed
    here = score_responses(server.model, TOKENIZER, corpus(), **QUIET)
    np.testing.assert_allclose(scored["logprob"], here["logprob"], atol=1e-4)


def test_the_end_of_tries_says_what_to_do(server, url):
    remote = connect(url, max_retries=1)
    server.fault = lambda number, body: (503, {"message": "loading"}, {"retry-after-ms": "1"})
    with pytest.raises(ConnectionError, match=r"goes on failing \(.*loading.*after 2 tries.*run the same again"):
        score_responses(remote, TOKENIZER, corpus(), **QUIET)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_does_not_pass_is_not_tried_again(server, url, status):
    remote = connect(url, max_retries=3, concurrency=1)
    first = len(server.bodies)
    server.fault = lambda number, body: (status, {"message": "too long"}, {})
    with pytest.raises(ValueError, match=r"Row 0: .* refuses this: .*too long"):
        score_responses(remote, TOKENIZER, corpus(), **QUIET)
    asked = [tuple(body["prompt"]) for body in server.bodies[first:]]
    assert len(asked) == len(set(asked))


def test_a_key_that_is_refused_and_one_that_is_sent(server, url):
    server.fault = lambda number, body: (401, {"message": "no key"}, {})
    with pytest.raises(PermissionError, match=r"refuses the key \(.*no key.*OPENAI_API_KEY"):
        connect(url)


def test_a_server_that_is_not_there(server, url):
    with serving(FakeServer()) as gone:
        pass
    with pytest.raises(ConnectionError, match=r"does not answer .*, after 1 tries"):
        connect(gone)
    with pytest.raises(ValueError, match=r"`model` must be one of the server's, tiny, got 'large'"):
        connect(url, model="large")
    server.models = lambda: "<html>welcome</html>"
    with pytest.raises(ValueError, match=r"/models does not list models: give the address that ends in /v1"):
        connect(url)


def answers(edit):
    """What puts something else into the answer to each request with `prompt_logprobs`, or to each."""

    def spoil(number, answer):
        for choice in answer["choices"]:
            edit(choice)

    return spoil


MALFORMED = {
    "no token ids": (lambda c: c.pop("token_ids"), "`token_ids` and as many `token_logprobs`"),
    "no logprobs": (lambda c: c.pop("logprobs"), "`token_ids` and as many|likeliest tokens"),
    "null logprobs": (lambda c: c.update(logprobs=None), "`token_ids` and as many|likeliest tokens"),
    "fewer logprobs": (lambda c: (c["logprobs"] or {"token_logprobs": [0]})["token_logprobs"].pop(), "as many"),
    "words": (lambda c: c.update(token_ids=["a"] * len(c["token_ids"])), "`token_ids` and as many"),
    "no prompt logprobs": (lambda c: c.pop("prompt_logprobs", None), "`prompt_logprobs` of every token"),
    "short prompt logprobs": (lambda c: c.get("prompt_logprobs", [0]).pop(), "`prompt_logprobs` of every token"),
    "other tokens": (
        lambda c: c.update(prompt_logprobs=[{"-7": {"logprob": -1.0}}] * len(c["prompt_token_ids"])),
        "`logprob` of token",
    ),
    "positive": (
        lambda c: [one.update(logprob=0.5) for line in c.get("prompt_logprobs", [])[1:] for one in line.values()],
        "`logprob` of token",
    ),
    "another prompt": (lambda c: c["prompt_token_ids"].append(3), "`prompt_token_ids` that it was sent|another one"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_an_answer_that_is_not_whole_is_refused_when_the_server_is_tried(server, url, case):
    edit, message = MALFORMED[case]
    server.spoil = answers(edit)
    with pytest.raises(ValueError, match=message):
        connect(url)


@pytest.mark.parametrize("answer", ["<html>gateway</html>", "{", '"a"', "{}", '{"choices": []}', '{"choices": [1]}'])
def test_what_is_no_answer_is_refused_in_mid_run(server, remote, answer):
    server.fault = lambda number, body: (200, answer, {})
    with pytest.raises(ValueError, match=r"Row \d: .*(a list of 1 `choices`|does not answer as a server of models)"):
        score_responses(remote, TOKENIZER, corpus(), **QUIET)


def test_answers_to_other_requests_are_refused(server, remote):
    kept = []

    def fault(number, body):  # answers the request before
        kept.append(body)
        return (200, server._complete(kept[-2]), {}) if len(kept) > 1 else None

    server.fault = fault
    with pytest.raises(ValueError, match="`prompt_token_ids` that it was sent"):
        score_responses(remote, TOKENIZER, corpus(), **QUIET)


def test_requests_are_many_at_once_and_never_more_than_asked_for(server, url):
    remote = connect(url, concurrency=8)
    server.most, server.delay = 0, 0.02
    sample_corpus(remote, TOKENIZER, PROMPTS, k=12, max_new_tokens=1, **QUIET)
    assert 4 <= server.most <= 8


def dying(after):
    """A server that is gone after some completions."""

    def fault(number, body):
        return (None, None, None) if number >= after else None

    return fault


def test_a_server_that_dies_loses_nothing_when_scored(server, url, remote, tmp_path):
    rows = corpus()
    whole = score_responses(remote, TOKENIZER, rows, output_dir=tmp_path / "whole", shard_rows=2, **QUIET)
    server.fault = dying(len(server.bodies) + 2 + 3 + 1)  # in the second shard
    with pytest.raises(ConnectionError, match="stays: run the same again when it is back"):
        score_responses(remote, TOKENIZER, rows, output_dir=tmp_path / "scores", shard_rows=2, **QUIET)
    assert [path.name for path in sorted((tmp_path / "scores").glob("scores-*"))] == ["scores-00000.safetensors"]
    server.fault = lambda number, body: None
    again = connect(url)
    first = len(server.bodies)
    scored = score_responses(again, TOKENIZER, rows, output_dir=tmp_path / "scores", shard_rows=2, **QUIET)
    assert scored["logprob"][:] == whole["logprob"][:]
    assert len(server.bodies) - first == 4 + 2 * 3  # rows of two shards, each with the fingerprint
    for name in ("scores-00000.safetensors", "scores-00002.safetensors"):
        assert (tmp_path / "scores" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_server_that_dies_loses_nothing_when_sampled_from(server, url, remote, tmp_path):
    settings = {"k": 4, "max_new_tokens": 4, "batch_size": 2, "shard_rows": 4, **QUIET}
    whole = sample_corpus(remote, TOKENIZER, PROMPTS, **settings)
    server.fault = dying(len(server.bodies) + 4 + 3 + 2)
    with pytest.raises(ConnectionError):
        sample_corpus(remote, TOKENIZER, PROMPTS, output_dir=tmp_path, **settings)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["samples-00000.jsonl"]
    server.fault = lambda number, body: None
    again = connect(url)
    first = len(server.bodies)
    rows = sample_corpus(again, TOKENIZER, PROMPTS, output_dir=tmp_path, **settings)
    assert rows.to_dict() == whole.to_dict()
    assert len(server.bodies) - first == 8 + 2 * 3


def test_another_model_at_the_same_address_is_refused(server, url, remote, tmp_path):
    settings = {"k": 2, "max_new_tokens": 3, **QUIET}
    score_responses(remote, TOKENIZER, corpus(), output_dir=tmp_path / "scores", **QUIET)
    samples = sample_corpus(remote, TOKENIZER, PROMPTS, output_dir=tmp_path / "samples", **settings)

    def verifier(prompts, completions, **columns):
        return [0.0] * len(completions)

    table = ScoreTable.open(tmp_path / "scores")
    assert table.metadata["model"]["served"] == remote.facts()
    assert {"id": "tiny", "root": "a/tiny", "max_model_len": 128}.items() < remote.facts().items()
    evaluate_best_of_n(remote, TOKENIZER, corpus(), verifier, timeout=None, output_dir=tmp_path / "best", **settings)

    server.model = tiny_model(seed=1)
    with pytest.raises(ValueError, match=r"has changed while it was at work.*same three texts was -.*, and is -"):
        score_responses(remote, TOKENIZER, corpus(), **QUIET)
    other = connect(url)
    with pytest.raises(ValueError, match=r"scores of something else \(model\.served\.probes"):
        score_responses(other, TOKENIZER, corpus(), output_dir=tmp_path / "scores", **QUIET)
    with pytest.raises(ValueError, match=r"samples of something else \(served was .*'probes'"):
        sample_corpus(other, TOKENIZER, PROMPTS, output_dir=tmp_path / "samples", **settings)
    with pytest.raises(ValueError, match=r"samples of something else \(served was"):
        evaluate_best_of_n(other, TOKENIZER, corpus(), verifier, output_dir=tmp_path / "best", **settings)

    server.model = tiny_model()
    server.root = "b/tiny"
    with pytest.raises(ValueError, match=r"something else \(model\.served\.root 'a/tiny', now 'b/tiny'"):
        score_responses(connect(url), TOKENIZER, corpus(), output_dir=tmp_path / "scores", **QUIET)
    server.root = "a/tiny"
    again = sample_corpus(connect(url), TOKENIZER, PROMPTS, output_dir=tmp_path / "samples", **settings)
    assert again.to_dict() == samples.to_dict()


def test_a_fingerprint_that_differs_by_rounding_is_the_same(server, url, remote, tmp_path):
    scored = score_responses(remote, TOKENIZER, corpus(), output_dir=tmp_path, shard_rows=4, **QUIET)
    (tmp_path / "scores-00001.safetensors").unlink()
    server.model = copy.deepcopy(server.model)
    server.model.transformer.ln_f.weight.data.mul_(1 + 1e-5)
    other = connect(url)
    assert other.facts() != remote.facts()
    assert other.facts(tmp_path) == remote.facts()
    again = score_responses(other, TOKENIZER, corpus(), output_dir=tmp_path, shard_rows=4, **QUIET)
    np.testing.assert_allclose(again["logprob"], scored["logprob"], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ttt", StepRule(0.1)),
        ("head_statistics", True),
        ("intervals", True),
        ("batch_invariant", True),
        ("teacher", tiny_model()),
    ],
)
def test_what_needs_the_model_itself_is_refused_by_name(server, remote, name, value):
    asked = len(server.bodies)
    with pytest.raises(ValueError, match=rf"`{name}` needs the model itself, and tiny is a server's"):
        score_responses(remote, TOKENIZER, corpus(), **{name: value}, **QUIET)
    assert len(server.bodies) == asked


def test_what_a_server_cannot_do_is_said(server, remote):
    with pytest.raises(ValueError, match=r"Stratified samples choose each token by a code .*draw independent ones"):
        sample_corpus(remote, TOKENIZER, PROMPTS, k=2, max_new_tokens=2, stratified=True, **QUIET)
    with pytest.raises(AttributeError, match=r"a server's model samples and scores, and has no `modules`: load the"):
        score_rules(remote, TOKENIZER, corpus(), {"a": StepRule(0.1)}, **QUIET)
    with pytest.raises(AttributeError, match=r"has no `parameters`: load the model itself"):
        remote.parameters()
    assert not hasattr(remote, "generate")
    assert CoverageCallback  # which takes its model from a Trainer
    long = Dataset.from_dict({"prompt": [[1] * 100], "completion": [[2] * 28]})
    with pytest.raises(ValueError, match=r"Row 0 has 100 prompt and 28 response tokens.*takes 128.*--max-model-len"):
        score_responses(remote, None, long, **QUIET)
    with pytest.raises(ValueError, match="does not fit into the model's 128 positions"):
        sample_corpus(remote, None, [[1] * 120], k=1, max_new_tokens=9, **QUIET)


def test_answers_and_teachers(server, remote):
    ids = [TOKENIZER(text)["input_ids"] for text in PROMPTS]
    rows = Dataset.from_dict({"prompt": ids, "answer": [[7], [8, 9], [7]]})
    first = server.model(torch.tensor([ids[0]])).logits[0, -1]
    settings = {"separator": [int(first.argmax())], "samples": 40, "max_reasoning_tokens": 4, **QUIET}
    drawn = score_answers(remote, None, rows.select([0]), **settings)
    assert 0 < drawn["answer_reached"][0] < 1
    there = score_answers(remote, None, rows, **settings | {"max_reasoning_tokens": 1, "separator": None})
    prompt = torch.tensor([ids[0]])
    first = first.softmax(-1).detach()
    chains = torch.cat([prompt.expand(len(first), -1), torch.arange(len(first))[:, None]], dim=1)
    exact = (first * server.model(chains).logits[:, -1].softmax(-1)[:, 7]).detach()[torch.arange(len(first)) != EOS]
    assert abs(there["answer_logprob"][0] - exact.sum().log()) < 5 * there["answer_logprob_stderr"][0]
    taught = teacher_scored_corpus(corpus(), remote, TOKENIZER, **QUIET)
    here = teacher_scored_corpus(corpus(), server.model, TOKENIZER, **QUIET)
    np.testing.assert_allclose(taught["reference_logprob"], here["reference_logprob"], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"tolerance": float("nan")}, "`tolerance` must be positive"),
        ({"concurrency": 0}, "`concurrency`"),
        ({"max_retries": -1}, "`max_retries`"),
        ({"tokenizer": None}, "`tokenizer` must be the tokenizer of the server's model"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        connect("http://127.0.0.1:1/v1", **settings)


def test_without_the_client_the_install_line_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=re.escape("`pip install hf-coverage[server]`")):
        connect("http://127.0.0.1:1/v1")
