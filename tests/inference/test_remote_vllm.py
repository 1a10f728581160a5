"""A real vLLM server on the CPU: what it samples and scores is what transformers does, and its death loses nothing."""

import copy
import socket
import threading
import time

import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_coverage import RemoteModel, evaluate_best_of_n, sample_corpus, score_responses
from tests.measure.small_tokenizers import gpt2_like
from tests.vllm_server import VLLMServer, install

PROMPTS = ["The capital of France is", "def fibonacci(n):\n"]
CHATS = [[{"role": "user", "content": text}] for text in ("Say hi.", "What is 2 + 2? Answer with the number alone.")]
QUIET = {"progress": False}


def save(model, tokenizer, folder):
    """SmolLM2 as any model that was saved: one that came from a GGUF file refuses."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logprobs(rows, name="logprob"):
    return np.array(rows[name][:])


def agrees(model, tokenizer, remote, prompts, **law):
    """Check that samples have the log-probabilities that both give them, to 1e-3 nats a response."""
    rows = sample_corpus(remote, tokenizer, prompts, k=8, max_new_tokens=20, **law, **QUIET)
    scored = score_responses(remote, tokenizer, rows, **QUIET)
    here = score_responses(model, tokenizer, rows, **QUIET)
    np.testing.assert_allclose(logprobs(scored), logprobs(here), atol=1e-3)
    np.testing.assert_allclose(logprobs(rows, "reference_logprob"), logprobs(here), atol=1e-3)
    return rows


@pytest.mark.slow
def test_a_vllm_server(smollm2, tmp_path):
    model, tokenizer = smollm2
    install()
    save(model, tokenizer, tmp_path / "model")
    port = free_port()
    server = VLLMServer(tmp_path / "model", tmp_path / "log", port)
    try:
        server.wait()
        remote = RemoteModel(server.url, tokenizer=tokenizer, check_with=model, max_retries=0)
        check_numbers(model, tokenizer, remote)
        server, whole = check_death(server, tokenizer, remote, tmp_path, port)
        check_a_law(model, tokenizer, RemoteModel(server.url, tokenizer=tokenizer, check_with=model), whole, tmp_path)
    finally:
        server.kill()


def check_numbers(model, tokenizer, remote):
    text = agrees(model, tokenizer, remote, PROMPTS)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert agrees(model, tokenizer, remote, ids)["completion"][:] == text["completion"][:]
    chats = agrees(model, tokenizer, remote, CHATS)
    ended = [row for row in chats if row["finished"]]
    assert ended
    assert all(row["completion"][-1] == tokenizer.eos_token_id for row in ended)
    written = Dataset.from_dict({"prompt": PROMPTS, "completion": [" Paris.", "    return n"]})
    there = score_responses(remote, tokenizer, written, append_eos=True, per_token=True, **QUIET)
    here = score_responses(model, tokenizer, written, append_eos=True, per_token=True, **QUIET)
    np.testing.assert_allclose(there["token_logprobs"][0], here["token_logprobs"][0], atol=5e-4)
    at_once = sample_corpus(remote, tokenizer, PROMPTS, k=32, max_new_tokens=2, **QUIET)  # 64 requests
    assert len({tuple(row) for row in at_once["completion"]}) > 16
    with pytest.raises(ValueError, match=r"--logprobs-mode processed_logprobs"):
        sample_corpus(remote, tokenizer, PROMPTS, k=1, max_new_tokens=2, temperature=0.7, **QUIET)
    with pytest.raises(ValueError, match="`tokenizer` is another one than the server's"):
        RemoteModel(remote.base_url, tokenizer=gpt2_like())
    theirs = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(ValueError, match="not the one that the server's model served was given"):
        score_responses(remote, gpt2_like(), theirs, **QUIET)
    full = Dataset.from_dict({"prompt": [[1] * 1000], "completion": [[2] * 23]})
    assert np.isfinite(logprobs(score_responses(remote, None, full, **QUIET))).all()  # all of its 1,024 positions


def check_death(server, tokenizer, remote, folder, port):
    """Kill the server in the middle of sampling, start it again in another mode, and go on."""
    settings = {"k": 8, "max_new_tokens": 24, "batch_size": 4, "shard_rows": 4, **QUIET}
    whole = sample_corpus(remote, tokenizer, PROMPTS, **settings)
    first = folder / "samples" / "samples-00000.jsonl"

    def kill():
        while not first.exists():
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConnectionError, match="run the same again when it is back"):
        sample_corpus(remote, tokenizer, PROMPTS, output_dir=folder / "samples", **settings)
    killer.join()
    assert 1 <= len([*(folder / "samples").glob("*.jsonl")]) < 4
    again = VLLMServer(folder / "model", folder / "log", port, "--logprobs-mode", "processed_logprobs")
    again.wait()
    back = RemoteModel(again.url, tokenizer=tokenizer)
    rows = sample_corpus(back, tokenizer, PROMPTS, output_dir=folder / "samples", **settings)
    assert rows["completion"][:] == whole["completion"][:]
    np.testing.assert_allclose(logprobs(rows, "reference_logprob"), logprobs(whole, "reference_logprob"), atol=1e-3)
    return again, whole


def check_a_law(model, tokenizer, remote, whole, folder):
    """What is processed has its own density, and at temperature 1 without truncation the same as before."""
    law = {"temperature": 0.7, "top_k": 50}
    rows = sample_corpus(remote, tokenizer, PROMPTS, k=2, max_new_tokens=8, **law, **QUIET)
    plain = score_responses(model, tokenizer, rows, **QUIET)
    assert (logprobs(rows, "reference_logprob") > logprobs(plain) + 0.1).any()  # `check_with` has compared the rest
    scored = score_responses(remote, tokenizer, whole, **QUIET)
    np.testing.assert_allclose(logprobs(scored), logprobs(whole, "reference_logprob"), atol=1e-3)
    answers = Dataset.from_dict({"prompt": PROMPTS, "answer": [" Paris", "x"]})
    result = evaluate_best_of_n(remote, tokenizer, answers, k=8, max_new_tokens=1, timeout=None, **QUIET)
    assert result.name == "served"
    assert 0 < result.pass_at(8) < 1
