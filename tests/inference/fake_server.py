"""A server in this process that speaks vLLM's completions protocol, with a tiny model, and all that goes wrong."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from weakref import WeakKeyDictionary

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from hf_coverage.inference.sampler import Sampling
from tests.measure.small_tokenizers import gpt2_like

EOS = gpt2_like().eos_token_id
_SEEN = WeakKeyDictionary()


@cache
def tiny_model(seed=0):
    """A GPT-2 over the tokens of `gpt2_like` whose next tokens are neither sure nor all alike."""
    torch.manual_seed(seed)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": len(gpt2_like()), "n_positions": 128}
    config = GPT2Config(**size, initializer_range=0.3, bos_token_id=EOS, eos_token_id=EOS)
    return GPT2LMHeadModel(config).eval()


class FakeServer:
    """What is served, and what was asked.

    Attributes:
        model: What answers; another one may be put in its place.
        others: More models by their names.
        processed: Whether log-probabilities are of what is sampled from.
        defaults: What is put in the place of what a request says.
        fault: Called with the number of a completion (from 0) and what was asked; None, or `(status, body, headers)`.
        spoil: Called with the number and the answer, which it may change.
        bodies: What was asked, in the order in which it came.
        most: The most requests that were there at once.
        delay: Seconds that an answer takes.
    """

    def __init__(self, model=None, tokenizer=None, *, name="tiny", processed=False, **defaults):
        self.model, self.others = tiny_model() if model is None else model, {}
        self.tokenizer = gpt2_like() if tokenizer is None else tokenizer
        self.name, self.root = name, "a/tiny"
        self.processed, self.defaults = processed, defaults
        self.fault = self.spoil = lambda number, body: None
        self.bodies, self.most, self.delay = [], 0, 0.0
        self._lock, self._now = threading.Lock(), 0

    def _logits(self, line, name):
        """Logits `(T, V)` of a line, which the tests ask for again and again."""
        model = self.others.get(name, self.model)
        known = _SEEN.setdefault(model, {})
        if tuple(line) not in known:
            known[tuple(line)] = model(torch.tensor([line])).logits[0]
        return known[tuple(line)]

    def handle(self, body):
        """Status, JSON, headers."""
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.delay)
        try:
            wrong = self.fault(number, body)
            if wrong is not None:
                return wrong
            with self._lock:
                answer = self._complete(body | self.defaults)
            self.spoil(number, answer)
            return 200, answer, {}
        finally:
            with self._lock:
                self._now -= 1

    def models(self):
        facts = {"root": self.root, "max_model_len": self.model.config.n_positions}
        return {"data": [{"id": name} | facts for name in (self.name, *self.others)]}

    @torch.no_grad()
    def _complete(self, body):
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer(body["prompt"])["input_ids"]
        choice = {"prompt_token_ids": ids}
        if body.get("prompt_logprobs") is not None:
            plain = self._logits(ids, body["model"]).log_softmax(-1)
            lines = [{str(token): {"logprob": plain[place, token].item()}} for place, token in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *lines]
        seed, choices = body.get("seed") or 0, []
        for index in range(body.get("n", 1)):
            torch.manual_seed(seed + index)
            choices.append(choice | {"index": index} | self._write(ids, body))
        return {"choices": choices}

    def _write(self, ids, body):
        law = Sampling(1, body["temperature"], body["top_k"] or None, body["top_p"])
        steps, line, tokens, found, tops = LogitsProcessorList(law.processors()), list(ids), [], [], []
        ends = {*body.get("stop_token_ids", [])} | (set() if body["ignore_eos"] else {EOS})
        for _ in range(body["max_tokens"]):
            logits = self._logits(line, body["model"])[-1:]
            scores = steps(torch.tensor([line]), logits.clone())
            token = torch.multinomial(scores.softmax(-1), 1).item()
            shown = (scores if self.processed else logits).log_softmax(-1)[0]
            tokens.append(token)
            line.append(token)
            found.append(shown[token].item())
            best = [token, *shown.topk(min(20, len(shown))).indices.tolist()]
            tops.append({f"token_id:{one}": max(-9999.0, shown[one].item()) for one in best})
            if token in ends:
                break
        shown = {"token_logprobs": found, "top_logprobs": tops} if body.get("logprobs") is not None else None
        return {"token_ids": tokens, "logprobs": shown, "finish_reason": "stop" if tokens[-1] in ends else "length"}


@contextmanager
def serving(server, port=0):
    """The address of a server while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            self.reply(200, server.models(), {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer, headers = server.handle(body)
            if status is None:  # the server dies
                self.close_connection = True
                self.connection.close()
                return
            self.reply(status, answer, headers)

        def reply(self, status, answer, headers):
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            kinds = {"Content-Type": "text/html" if text.startswith("<") else "application/json"}
            for name, value in ({"Content-Length": str(len(text.encode()))} | kinds | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

        def finish(self):
            with suppress(OSError, ValueError):  # closed above
                super().finish()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_):  # clients that leave, and connections that were closed
            pass

    http = Quiet(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
