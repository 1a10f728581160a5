"""A model that a server has: what its completions endpoint samples and scores, in token ids, and whether that is so.

Any server that speaks vLLM's dialect of the protocol, 0.32 or later: `token_ids`, `prompt_logprobs`, `stop_token_ids`.
All that decides a distribution is sent with every request, so that a server's own defaults do not count, and before a
number is believed the server is asked a few questions whose answers have to agree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedConfig

from hf_coverage.functional.checks import check_count
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.inference.fingerprint import vocabulary_fingerprint
from hf_coverage.inference.forward import inference, input_device
from hf_coverage.inference.processes import split_over_processes
from hf_coverage.inference.sampler import Sample, Sampler, Sampling, Stop, require_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RemoteModel", "RemoteSampler", "require_its_tokenizer", "sampler_of"]

_R = TypeVar("_R")

# What a request leaves out, a server fills in from its model's generation configuration.
_PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,  # what ends a response are the tokens that are named
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
_EXCLUDED = -9999.0  # what vLLM writes for -inf
_TOP = 20  # likeliest tokens that a server gives unless it is told to give more
_TRIED = 16  # tokens of a response that the server is tried with
_MAY_PASS = (408, 409, 429)  # with all from 500: what the client tries again
_LIKELY = 1e-6  # least probability of what is put down to chance
_PROBES = (
    "The coverage of a model is the share of good answers that it still reaches within N attempts.",
    "def mean(values):\n    return sum(values) / len(values)  # 3.14, 2,718 and 0x1F\n",
    "Ça dépend : 東京 was Edo once, Αθήνα is Athens, and 🙂 is a face.",
)


class RemoteModel:
    """A server's model in the place of one in memory, wherever that only samples or scores.

    `sample_corpus`, `teacher_scored_corpus`, `score_responses`, `score_answers` and `evaluate_best_of_n` take it. They
    send token ids and get token ids; what they keep in a folder goes on after an interruption, the server's own
    included. Test-time training, stratified samples and statistics of hidden states need the model itself.

    Before it is believed, the server answers a few requests: whether its tokenizer is this one; whether it samples
    from what it reports; whether a response has the same log-probability when it is sampled, when it is scored, and
    after other requests; and, where a local copy is given, the copy's. Where a temperature or a truncation is asked
    for, whether what it reports is of that distribution (`--logprobs-mode processed_logprobs`). Its answers on three
    short texts are its fingerprint: they are asked for again after each part of the work, and kept with it.

    Args:
        base_url: Where the server is, such as `http://127.0.0.1:8000/v1`.
        model: The model's name at the server; None: its only one.
        tokenizer: The model's tokenizer.
        api_key: What the server asks for; None: the environment variable `OPENAI_API_KEY`, or else none.
        check_with: The same model in memory, to compare with.
        tolerance: Nats by which two readings of a response of 16 tokens may differ: 1e-3 is for float32; a server in
            bfloat16 needs some tenths, which is then how exact its numbers are.
        concurrency: Requests at once.
        max_retries: How often a request is repeated that failed for a reason that may pass (no connection, 408, 409,
            429, 5xx), after .5, 1, 2, 4, 8, 8, ... seconds, or as long as the server says.
        timeout: Seconds that an answer may take.

    Attributes:
        name: The model's name at the server.

    Raises:
        ImportError: If `openai` is not installed.
        ConnectionError: If the server does not answer.
        ValueError: If there is no such model, or the server's answers do not agree; says which, and what to do.

    Example:
        >>> RemoteModel("http://127.0.0.1:9/v1", tokenizer=None, max_retries=0)
        Traceback (most recent call last):
        TypeError: `tokenizer` must be the tokenizer of the server's model, got None; a server is sent token ids.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        api_key: str | None = None,
        check_with: PreTrainedModel | None = None,
        tolerance: float = 1e-3,
        concurrency: int = 64,
        max_retries: int = 8,
        timeout: float = 600.0,
    ) -> None:
        if tokenizer is None:
            raise TypeError(
                "`tokenizer` must be the tokenizer of the server's model, got None; a server is sent token ids."
            )
        if not tolerance > 0:
            raise ValueError(f"`tolerance` must be positive, in nats, got {tolerance}.")
        check_count(concurrency, "concurrency")
        check_count(max_retries, "max_retries", least=0)
        try:
            import openai
        except ImportError as error:
            raise ImportError("`RemoteModel` needs openai: `pip install hf-coverage[server]`.") from error
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout)
        self.base_url = base_url
        self.tokenizer = tokenizer
        self.tolerance = tolerance
        self.concurrency = concurrency
        self.check_with = check_with
        self.name, self._root, self._length = self._find(model)
        # What is asked of a model in memory by those who put prompts before it.
        self.config = PreTrainedConfig(name_or_path=self.name, max_position_embeddings=self._length)
        self.generation_config = GenerationConfig()
        rows = [tokenizer(text)["input_ids"][:24] for text in _PROBES]
        self._rows = [row if len(row) > 1 else sorted(tokenizer.get_vocab().values())[:8] for row in rows]
        self._prove()
        self._probes = self._read_probes()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a server's model samples and scores, and has no `{name}`: load the model itself for this, with "
            "`AutoModelForCausalLM.from_pretrained`."
        )

    def facts(self, place: str | PathLike[str] | None = None) -> dict[str, Any]:
        """What is known of the model, as it is kept with what it wrote.

        Args:
            place: JSON file that may hold the same, or the folder of a table or of samples: the fingerprint there is
                taken for this one if they agree, as they do to rounding.
        """
        held = None if place is None else _held_probes(Path(place))
        same = held is not None and self._agree(held, self._probes)
        named = {"id": self.name, "root": self._root, "max_model_len": self._length}
        return named | {"probes": held if same else [round(value, 6) for value in self._probes]}

    def token_logprobs(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        advance: Callable[[int], Any] = lambda row: None,
    ) -> list[NDArray[np.float32]]:
        """Log p of each completion's tokens after its prompt, nats.

        Args:
            prompts: Token ids, never empty.
            completions: As many, never empty.
            advance: Called with the number of each row that is done, in any order.

        Raises:
            ConnectionError: If the server does not answer.
            ValueError: If it refuses a row, its answer is not whole, or its model is another one than before.
        """
        found = self._read(prompts, completions, advance)
        self._require_same_model()
        return found

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        advance: Callable[[int], Any] = lambda row: None,
    ) -> list[tuple[list[int], NDArray[np.float64]]]:
        """Draw a response to each prompt: its tokens, and their log-probabilities under what they were drawn from.

        Args:
            prompts: Token ids, never empty.
            sampling: The distribution.
            seeds: One for each; the same seed and prompt give the same response, to rounding.
            advance: See `token_logprobs`.

        Raises:
            ConnectionError: If the server does not answer.
            ValueError: If it refuses a prompt, its answer is not whole, or its model is another one than before.
        """
        found = self._draw(prompts, sampling, seeds, advance)
        self._require_same_model()
        return found

    def require_law(self, sampling: Sampling) -> None:
        """Refuse a distribution whose density the server does not report.

        Raises:
            ValueError: See `RemoteModel`.
        """
        if _is_plain(sampling):
            return
        asked = f"`temperature` {sampling.temperature:g}, `top_k` {sampling.top_k}, `top_p` {sampling.top_p}"
        if not self._scales_with(2.0):
            raise ValueError(
                f"{self._place} reports log-probabilities of its model as it is, not of the distribution that is "
                f"sampled from with {asked}, so no log D(y|x) would be known: start vLLM with `--logprobs-mode "
                "processed_logprobs`, or sample at temperature 1 without truncation."
            )
        if not self._scales_with(sampling.temperature):
            raise ValueError(
                f"{self._place} does not sample at `temperature` {sampling.temperature:g}: the log-probabilities that "
                "it reports are not those of logits divided by it. vLLM lifts temperatures below .01."
            )
        if self.check_with is not None:
            self._compare_with_copy(self._tried(sampling), sampling)

    @property
    def _place(self) -> str:
        return f"The server's model {self.name} at {self.base_url}"

    def _find(self, name: str | None) -> tuple[str, str | None, int | None]:
        """Name, root and length of the model, as the server gives them."""
        with self._telling():
            answer = self._client.get("/models", cast_to=object)
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise ValueError(f"{self.base_url}/models does not list models: give the address that ends in /v1.")
        known = {str(one["id"]): one for one in listed}
        chosen = next(iter(known)) if name is None and len(known) == 1 else str(name)
        if chosen not in known:
            raise ValueError(f"`model` must be one of the server's, {', '.join(sorted(known))}, got {name!r}.")
        return chosen, known[chosen].get("root"), known[chosen].get("max_model_len")

    def _prove(self) -> None:
        """Ask the server what has to agree, see `RemoteModel`."""
        self._require_tokenizer()
        self._require_samples_of_what_is_reported()
        sampling = Sampling(_TRIED)
        drawn = self._tried(sampling)
        responses = [ids for ids, _ in drawn]
        together = self._read(self._rows, responses)
        for (_, sampled), scored in zip(drawn, together):
            self._require_near(
                sampled.sum(),
                scored.sum(),
                "when it is sampled and when it is scored, so one of them is not log p. A server that reports logits "
                "(`--logprobs-mode raw_logits`) does this, and one that decodes speculatively may",
            )
        alone = [self._read([row], [ids])[0] for row, ids in zip(self._rows[::-1], responses[::-1])][::-1]
        for first, again in zip(together, alone):
            self._require_near(
                first.sum(),
                again.sum(),
                "before and after other requests. Start vLLM with `--no-enable-prefix-caching`",
            )
        if self.check_with is not None:
            self._compare_with_copy(drawn, sampling)

    def _require_tokenizer(self) -> None:
        for text in _PROBES:
            own = self.tokenizer(text)["input_ids"]
            if len(own) > 1 and (found := self._choices(text, max_tokens=1)[0].get("prompt_token_ids")) != own:
                raise ValueError(
                    f"`tokenizer` is another one than the server's: it makes {_begin(own)} of {text[:20]!r} ..., and "
                    f"{self.base_url} {_begin(found)}; give the tokenizer of {self.name}. A server that returns no "
                    "`prompt_token_ids` does not do; vLLM 0.32 and later return them."
                )

    def _require_samples_of_what_is_reported(self) -> None:
        """Draw many first tokens at once, and compare how often each comes with how likely it is said to be.

        A default of the server's own, such as `top_k`, that is at work in spite of the request shows here alone.
        """
        from scipy.stats import chisquare

        size = 128
        choices = self._choices(self._rows[0][:2], n=size, max_tokens=1, logprobs=_TOP, seed=1)
        law = self._likeliest(choices[0])
        known = dict(sorted(law.items(), key=lambda item: -item[1])[:_TOP])  # without what is there for being drawn
        drawn = [self._sampled(choice)[0][0] for choice in choices]
        expected = np.array([*known.values(), max(0.0, 1 - sum(known.values()))]) * size
        places = {token: place for place, token in enumerate(known)}
        observed = np.bincount([places.get(token, len(known)) for token in drawn], minlength=len(known) + 1)
        if observed[expected == 0].any():
            chance = 0.0
        else:
            # Cells of five or more, as the test wants them; those of the rare tokens are together.
            cells = np.minimum(np.cumsum(expected) // 5, expected.sum() // 5 - 1).astype(int)
            counts = [np.bincount(cells, weights=values) for values in (observed, expected)]
            seen, due = (values[counts[1] > 0] for values in counts)
            chance = 1.0 if len(due) < 2 else float(chisquare(seen, due * seen.sum() / due.sum()).pvalue)
        if chance < _LIKELY:
            raise ValueError(
                f"{self._place} does not sample from what it reports: how often {size} first tokens came has "
                f"probability {chance:.1g} under the log-probabilities beside them. A default of its own is at work, "
                "such as `top_k` or a penalty of the model's generation configuration: start vLLM with "
                "`--generation-config vllm`; a server that ignores what it is sent does not do."
            )

    def _scales_with(self, temperature: float) -> bool:
        """Whether log-probabilities that are reported at a temperature are those of logits that are divided by it."""
        for row in self._rows:
            plain, heated = (
                self._likeliest(self._choices(row, max_tokens=1, logprobs=_TOP, temperature=one, seed=1)[0])
                for one in (1.0, temperature)
            )
            common = [token for token in plain if plain[token] > 0 and heated.get(token, 0.0) > 0]
            before, after = (np.log([law[token] for token in common]) for law in (plain, heated))
            if np.abs((after - after[:1]) * temperature - (before - before[:1])).max(initial=0.0) > self.tolerance:
                return False
        return True

    def _tried(self, sampling: Sampling) -> list[tuple[list[int], NDArray[np.float64]]]:
        law = Sampling(_TRIED, sampling.temperature, sampling.top_k, sampling.top_p)
        return self._draw(self._rows, law, range(len(self._rows)))

    def _compare_with_copy(self, drawn: Sequence[tuple[list[int], NDArray[np.float64]]], sampling: Sampling) -> None:
        for row, (ids, reported) in zip(self._rows, drawn):
            own = _read_locally(self.check_with, row, ids, sampling)
            self._require_near(
                reported.sum(),
                own.sum(),
                "at the server and under the local copy `check_with`: these are two models, or one computes in "
                "another number format",
            )

    def _require_near(self, first: float, second: float, where: str) -> None:
        if not abs(first - second) <= self.tolerance:
            raise ValueError(
                f"{self._place} is not believed: log p of a response of at most {_TRIED} tokens differs by "
                f"{abs(first - second):.2g} nats, {first:.6g} and {second:.6g}, {where}. What rounding may make is "
                f"{self.tolerance:g} here (`tolerance`): some tenths are usual for a server in bfloat16."
            )

    def _read_probes(self) -> list[float]:
        read = self._read([row[:1] for row in self._rows], [row[1:] for row in self._rows])
        return [float(values.sum(dtype=np.float64)) for values in read]

    def _agree(self, before: Sequence[float], now: Sequence[float]) -> bool:
        return len(before) == len(now) and all(abs(a - b) <= 2 * self.tolerance for a, b in zip(before, now))

    def _require_same_model(self) -> None:
        now = self._read_probes()
        if not self._agree(self._probes, now):
            raise ValueError(
                f"{self._place} has changed while it was at work: log p of the same three texts was "
                f"{_shown(self._probes)}, and is {_shown(now)}. What it answered last is not kept: serve the model "
                "that was served before, and run the same command again."
            )

    def _draw(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        advance: Callable[[int], Any] = lambda row: None,
    ) -> list[tuple[list[int], NDArray[np.float64]]]:
        law = {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.eos_token_ids),
        }

        def draw(row: int) -> tuple[list[int], NDArray[np.float64]]:
            with self._naming("Prompt", row):
                (choice,) = self._choices(prompts[row], logprobs=0, seed=seeds[row], **law)
                ids, values = self._sampled(choice)
                ends = (place for place, token in enumerate(ids, 1) if token in sampling.eos_token_ids)
                length = next(ends, len(ids))
                if length < sampling.max_new_tokens and ids[length - 1] not in sampling.eos_token_ids:
                    raise ValueError(
                        f"{self._place} ended a response of its own accord, after {length} of "
                        f"{sampling.max_new_tokens} tokens ({choice.get('finish_reason')}): its generation "
                        "configuration has a length or stop tokens. Start vLLM with `--generation-config vllm`."
                    )
            return ids[:length], np.array(values[:length])

        return self._each(draw, len(prompts), advance)

    def _read(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        advance: Callable[[int], Any] = lambda row: None,
    ) -> list[NDArray[np.float32]]:
        def read(row: int) -> NDArray[np.float32]:
            ids = [*prompts[row], *completions[row]]
            with self._naming("Row", row):
                (choice,) = self._choices(ids, max_tokens=1, prompt_logprobs=0)
                lines = choice.get("prompt_logprobs")
                if not isinstance(lines, list) or len(lines) != len(ids):
                    raise self._not_whole("`prompt_logprobs` of every token that it was sent", lines)
                start = len(prompts[row])
                return np.array(
                    [self._value(line, token) for line, token in zip(lines[start:], ids[start:])], dtype=np.float32
                )

        return self._each(read, len(prompts), advance)

    def _each(self, function: Callable[[int], _R], size: int, advance: Callable[[int], Any]) -> list[_R]:
        """What a function gives for each number below `size`, many at once; its first error ends it."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(function, row): row for row in range(size)}
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(futures[future])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _choices(self, prompt: list[int] | str, **asked: Any) -> list[dict[str, Any]]:
        """What the server makes of a prompt, in the order of its own numbers."""
        body = {"model": self.name, "prompt": prompt, **_PLAIN, **asked}
        with self._telling():
            answer = self._client.post("/completions", cast_to=object, body=body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        count = asked.get("n", 1)
        if not isinstance(choices, list) or len(choices) != count or not all(isinstance(one, dict) for one in choices):
            raise self._not_whole(f"a list of {count} `choices`", answer)
        for choice in choices:
            if not isinstance(prompt, str) and choice.get("prompt_token_ids") != prompt:
                raise self._not_whole("the `prompt_token_ids` that it was sent", choice.get("prompt_token_ids"))
        return choices

    def _sampled(self, choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """Tokens of a response and their log-probabilities."""
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if (
            not isinstance(ids, list)
            or not isinstance(values, list)
            or not ids
            or len(ids) != len(values)
            or not all(type(token) is int for token in ids)
            or not all(isinstance(value, (int, float)) and _EXCLUDED < value <= 1e-4 for value in values)
        ):
            raise self._not_whole("`token_ids` and as many `token_logprobs`", choice)
        return ids, values

    def _likeliest(self, choice: Mapping[str, Any]) -> dict[int, float]:
        """The probabilities of the likeliest first tokens, and of the one that was drawn."""
        try:
            first: dict[str, float] = dict(choice)["logprobs"]["top_logprobs"][0]
            return {int(name.removeprefix("token_id:")): math.exp(value) for name, value in first.items()}
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._not_whole(f"the {_TOP} likeliest tokens as `top_logprobs`, by their ids", choice) from error

    def _value(self, line: Any, token: int) -> float:
        """Log p of a prompt's token."""
        try:
            value = float(line[str(token)]["logprob"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._not_whole(f"the `logprob` of token {token} among `prompt_logprobs`", line) from error
        if not value <= 1e-4:
            raise self._not_whole(f"a `logprob` of token {token}", value)
        return -math.inf if value <= _EXCLUDED else value

    def _not_whole(self, wanted: str, found: Any) -> ValueError:
        shown = json.dumps(found, default=repr)
        return ValueError(
            f"{self._place} answered without {wanted}: {shown if len(shown) < 200 else f'{shown[:200]} ...'}. It has "
            "to offer log-probabilities and token ids, as vLLM 0.32 and later do."
        )

    @contextmanager
    def _naming(self, what: str, row: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{what} {row}: {error}") from error

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say what a request failed of, and what to do next."""
        import openai

        kept = "What is kept in `output_dir` stays: run the same again when it is back."
        try:
            yield
        except openai.AuthenticationError as error:
            raise PermissionError(
                f"{self.base_url} refuses the key ({_message(error)}): set OPENAI_API_KEY, or give `api_key`."
            ) from error
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"{self.base_url} does not answer ({error.__cause__ or error}), {self._tries}. {kept}"
            ) from error
        except openai.APIStatusError as error:
            if error.status_code in _MAY_PASS or error.status_code >= 500:
                raise ConnectionError(
                    f"{self.base_url} goes on failing ({_message(error)}), {self._tries}. {kept}"
                ) from error
            raise ValueError(f"{self.base_url} refuses this: {_message(error)}") from error
        except (openai.APIError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.base_url} does not answer as a server of models: {error}") from error

    @property
    def _tries(self) -> str:
        return f"after {self._client.max_retries + 1} tries"


class RemoteSampler:
    """Draws responses from a server's model: what `Sampler` is for one in memory.

    A response depends on the seed, its prompt and its number, and on nothing else but by rounding.

    Args:
        model: The server's model.
        sampling: The distribution.
        batch_size: What is kept together, see `kept_samples`; how many requests there are at once is the model's.
        seed: What all random numbers follow from.

    Raises:
        ValueError: If a number is out of range, or the server does not report this distribution's density.
    """

    stratified = False

    def __init__(self, model: RemoteModel, sampling: Sampling, *, batch_size: int, seed: int) -> None:
        check_count(batch_size, "batch_size")
        check_count(seed, "seed", least=0)
        model.require_law(sampling)
        self.model = model
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed

    def model_facts(self, folder: str | PathLike[str] | None) -> dict[str, Any]:
        """What is known of the model, as it is kept with its samples."""
        return {"served": self.model.facts(folder)}

    def draw(
        self,
        prompts: Sequence[list[int]],
        *,
        places: Sequence[tuple[int, int]] | None = None,
        stop: Stop | None = None,
        first_batch: int = 0,
        known: Mapping[int, list[Sample]] | None = None,
        progress: bool = False,
    ) -> list[Sample]:
        """Draw one response to each prompt, see `Sampler.draw`.

        A server cannot ask `stop`: each response is drawn to its end, and cut where it would have ended.

        Args:
            prompts: Token ids, never empty.
            places: Of which prompt each response is a sample, and which one; None: each of a prompt of its own.
            stop: Tells from the tokens of a response so far whether it ends here.
            first_batch: Without meaning here.
            known: Without meaning here.
            progress: Whether to show a progress bar on the main process.

        Returns:
            One sample per prompt, in their order, on every process.
        """
        require_room(self.model, prompts, [self.sampling.max_new_tokens] * len(prompts))
        places = [(row, 0) for row in range(len(prompts))] if places is None else places
        seeds = [_seed(self.seed, *place) for place in places]
        size = PartialState().num_processes
        hidden = not (progress and PartialState().is_main_process)
        with tqdm(total=len(prompts), desc="Sampling", unit="response", disable=hidden) as bar:

            def draw(own: Sequence[int]) -> list[Sample]:
                if not own:
                    return []
                asked, own_seeds = [prompts[row] for row in own], [seeds[row] for row in own]
                drawn = self.model.sample(asked, self.sampling, own_seeds, lambda row: bar.update(size))
                return [self._sample(ids, values, stop) for ids, values in drawn]

            return split_over_processes(draw, range(len(prompts)))

    def settle(
        self,
        prompts: Sequence[list[int]],
        *,
        places: Sequence[tuple[int, int]] | None = None,
        stop: Stop | None = None,
        first_batch: int = 0,
    ) -> dict[int, list[Sample]]:
        """Nothing is to be settled: how prompts are laid out is the server's business."""
        return {}

    def _sample(self, ids: list[int], values: NDArray[np.float64], stop: Stop | None) -> Sample:
        length = len(ids)
        if stop is not None:
            length = next((end for end in range(1, length) if stop(ids[:end])), length)
        return Sample(ids[:length], float(values[:length].sum()), ids[length - 1] in self.sampling.eos_token_ids)


def sampler_of(
    model: PreTrainedModel | RemoteModel, sampling: Sampling, *, batch_size: int, seed: int, stratified: bool = False
) -> Sampler | RemoteSampler:
    """What draws from a model, in memory or at a server; see `Sampler`.

    Raises:
        ValueError: If stratified samples of a server's model are asked for.
    """
    if not isinstance(model, RemoteModel):
        return Sampler(model, sampling, batch_size=batch_size, seed=seed, stratified=stratified)
    if stratified:
        raise ValueError(
            "Stratified samples choose each token by a code that they share, which a server cannot be told: draw "
            "independent ones from it, or load the model itself."
        )
    return RemoteSampler(model, sampling, batch_size=batch_size, seed=seed)


def require_its_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse token ids of another tokenizer than that of a server's model.

    Raises:
        ValueError: If `tokenizer` is another one.
    """
    if not isinstance(model, RemoteModel) or tokenizer is None:
        return
    if vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(model.tokenizer):
        raise ValueError(
            f"`tokenizer` is not the one that the server's model {model.name} was given: its token ids mean something "
            "else there; pass `model.tokenizer`."
        )


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature == 1 and sampling.top_k is None and sampling.top_p in (None, 1)


def _seed(*entropy: int) -> int:
    """63 bits, which a server takes for a seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _held_probes(path: Path) -> list[float] | None:
    """The fingerprint of a server's model in a record or in the metadata of a folder, or None."""
    try:
        path = path / "metadata.json" if path.is_dir() else path
        held = json.loads(path.read_text(encoding="utf-8"))
        probes = (held.get("served") or held["model"]["served"])["probes"]
        return probes if all(isinstance(value, float) for value in probes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever opens the folder says what is wrong
        return None


def _read_locally(model: Any, prompt: list[int], response: list[int], sampling: Sampling) -> NDArray[np.float64]:
    """Log D of a response's tokens under a model in memory, nats."""
    processors = LogitsProcessorList(sampling.processors())
    with inference(model):
        ids = torch.tensor([[*prompt, *response]], device=input_device(model))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        logits = processors(ids, logits[len(prompt) - 1 : -1])
        return token_logprobs(logits, ids[0, len(prompt) :]).double().cpu().numpy()


def _begin(ids: list[int] | None) -> str:
    return "no ids" if ids is None else f"{str(ids[:6]).rstrip(']')} ...]"


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _message(error: Any) -> str:
    """What a server says, in one line."""
    text = " ".join(str(error.message).split())
    return text if len(text) < 400 else f"{text[:400]} ..."
