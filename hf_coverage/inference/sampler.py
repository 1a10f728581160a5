"""Sampling from a model through its own `generate`, with the exact density that every token was sampled from.

Where `generate` gives a model something else than its plain passes do (positions, a cache that an adapter takes for
its own, an adapter's tokens once more in every step), responses are written by plain passes instead, each over all
tokens so far.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from numbers import Integral
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_coverage.functional.checks import check_count
from hf_coverage.functional.logprobs import token_logprobs
from hf_coverage.inference.code_choice import CodeChoice, code_device, placed_codes
from hf_coverage.inference.fingerprint import config_fingerprint, weight_fingerprint
from hf_coverage.inference.forward import (
    inference,
    input_device,
    is_out_of_memory,
    is_sharded,
    is_split,
    refuse_zero3,
    unwrap,
)
from hf_coverage.inference.prefix_cache import CACHE, is_repeatable
from hf_coverage.inference.processes import map_over_processes
from hf_coverage.inference.self_check import Reading, Readout, agree, rounding

__all__ = ["Sample", "Sampler", "Sampling", "end_token_ids", "own_config", "pad_left", "read_prompts", "require_room"]


logger = logging.getLogger(__name__)

_SHARDED = (
    "It may keep something between passes, or take padding or a cache for something else; a model that is spread over "
    "processes can be answered in one way only: load it whole."
)
_NOT_CAUSAL = (
    "So it is by passes over all tokens so far, one prompt at a time: what it says of a token changes with the tokens "
    "after it, or from one pass to the next. Load it as a decoder (`is_decoder=True`, `is_causal=True`, `causal=True` "
    "in its configuration), and merge an adapter that looks at a whole sequence or draws random numbers, or leave it "
    "out."
)

_HOTTEST = 1e6
"""The highest temperature, and one over the lowest: logits divided by more say nothing in float32, or overflow."""

Stop = Callable[[list[int]], bool]
"""Tells from the tokens of a response so far whether it ends here."""


@dataclass(frozen=True)
class Sampling:
    """The distribution D(.|x) that responses are drawn from, and nothing else: a model's own defaults do not count.

    Args:
        max_new_tokens: Most tokens H of a response.
        temperature: What logits are divided by; 1 is the model itself.
        top_k: Keep the k likeliest tokens of every step, renormalised; None: all.
        top_p: Keep the likeliest tokens that together reach this mass, renormalised; None: all.
        eos_token_ids: Tokens that end a response, as its last one; without any, all responses have H tokens.

    Raises:
        ValueError: If a number is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count(self.max_new_tokens, "max_new_tokens")
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive, got {self.temperature}; greedy decoding has one response of density "
                "1: give that to `single_answer_corpus`."
            )
        if not 1 / _HOTTEST <= self.temperature <= _HOTTEST:
            raise ValueError(
                f"`temperature` must be from {1 / _HOTTEST:g} to {_HOTTEST:g}, as far as float32 can divide logits by "
                f"it, got {self.temperature}."
            )
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise ValueError(f"`top_k` must be at least 1, or None to keep all tokens, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], or None to keep all tokens, got {self.top_p}.")

    def processors(self) -> list[LogitsProcessor]:
        """What turns a model's logits into those of the distribution, in the order of `generate`."""
        steps: list[LogitsProcessor] = []
        if self.temperature != 1:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            steps.append(TopPLogitsWarper(self.top_p))
        return steps


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Args:
        ids: Its tokens, the end-of-sequence token included where it was sampled.
        logprob: Log D(ids|x) in nats, the float64 sum over its tokens; where it was cut at H tokens, of the event
            that a response begins with them.
        finished: Whether it ends with an end-of-sequence token.
    """

    ids: list[int]
    logprob: float
    finished: bool


class _Layout(NamedTuple):
    """How prompts are answered.

    Attributes:
        reading: What may stand side by side.
        generated: Whether by the model's own `generate`, with a cache, or by plain passes.
    """

    reading: Reading
    generated: bool


_LAYOUTS = [
    *(_Layout(reading, True) for reading in Reading),
    _Layout(Reading.EQUAL, False),
    _Layout(Reading.ALONE, False),
]
"""From the fastest to the one that takes least for granted."""


class _Row(NamedTuple):
    """The ids of a prompt that is answered, and which prompt and sample that is, where that decides its codes."""

    ids: list[int]
    place: tuple[int, int] | None


class _Drawn(NamedTuple):
    """A sample, and log p of its tokens `(T,)` under the model itself, before anything is done to its logits."""

    sample: Sample
    plain: Tensor


class Sampler:
    """Draws responses on all processes of a job; the result depends on the seed and the batch size alone.

    A stratified sample depends on the seed, its prompt and its number, and on the batch size by rounding alone.

    Args:
        model: Any causal language model; may be wrapped by DDP, sharded by FSDP2, or compiled.
        sampling: The distribution.
        batch_size: Responses drawn at once.
        seed: What all random numbers follow from; the global generators stay as they are.
        stratified: Whether the samples of a prompt share nested codes; see `functional.arithmetic_codes`.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3.
        TypeError: If the model is wrapped by FSDP1.
        ValueError: If `batch_size` is not positive, or the model is an encoder-decoder.
    """

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, *, batch_size: int, seed: int, stratified: bool = False
    ) -> None:
        check_count(batch_size, "batch_size")
        check_count(seed, "seed", least=0)
        refuse_zero3()
        self.model: PreTrainedModel = unwrap(model)
        if isinstance(self.model, FullyShardedDataParallel):
            raise TypeError("The model is wrapped by FSDP1, through which `generate` does not run; shard it by FSDP2.")
        if self.model.config.is_encoder_decoder:
            raise ValueError(
                f"`model` {type(self.model).__name__} is an encoder-decoder, whose responses do not go on from their "
                "prompts; load a decoder with `AutoModelForCausalLM.from_pretrained`."
            )
        self.sharded, self.split = is_sharded(self.model), is_split(self.model)
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed
        self.stratified = stratified
        # How prompts are laid out side by side, and what of it was tried so far. Some recurrent models read padding as
        # they read any token.
        stateful = self.model._is_stateful and not self.sharded
        self._layout = _Layout(Reading.EQUAL if stateful else Reading.SHARED, True)
        self._tried: set[str] = set()

    def model_facts(self, folder: str | PathLike[str] | None) -> dict[str, str]:
        """What is known of the model, as it is kept with its samples; `folder`, where they are, says nothing of it."""
        return {
            "weights": weight_fingerprint(self.model),
            "config": config_fingerprint(self.model),
            "dtype": str(self.model.dtype),
        }

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
        """Draw one response to each prompt; prompts that come again in a batch are read once.

        Some responses of the first batch of each kind (with padding, with a prompt that comes again, with the longest
        prompt) are read again, one by one. Where the model then says something else than it did when it wrote them,
        prompts stand side by side only where they are equally long, or each is answered alone, or responses are
        written by plain passes over all tokens so far, which reads as many times more tokens as there are steps.

        Args:
            prompts: Token ids, never empty; repeat a prompt for several responses.
            places: Of which prompt each response is a sample, and which one; needed where samples are stratified.
            stop: Tells from the tokens of a response so far whether it ends here; None: only EOS ends it early.
            first_batch: Number of the first batch: prompts in ascending order of length, drawn in parts of whole
                batches, get the samples that they get in one call if `settle` was given all of them.
            known: What `settle` returned.
            progress: Whether to show a progress bar on the main process.

        Returns:
            One sample per prompt, in their order, on every process.

        Raises:
            RuntimeError: If what the model says of its responses is not what it wrote them from, however they are laid
                out.
        """
        asked = self._asked(prompts, places)
        # Prompts of like length share a batch, which pads little; a stable sort is the same on every process.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        numbered = list(enumerate(batches, first_batch))
        hidden = not (progress and PartialState().is_main_process)
        with inference(self.model), tqdm(total=len(order), desc="Sampling", unit="response", disable=hidden) as bar:
            known = {**(known or {}), **self._find_reading(numbered, asked, stop)}

            def draw(batch: tuple[int, list[int]]) -> list[Sample]:
                if batch[0] in known:
                    return known[batch[0]]
                return [drawn.sample for drawn in self._draw_batch([asked[row] for row in batch[1]], batch[0], stop)]

            def keep_pace(together: Sequence[tuple[int, list[int]]], own: tuple[int, list[int]] | None) -> None:
                idle = own is None or own[0] in known
                # The others cannot run the model without this process.
                if self.sharded and idle and any(index not in known for index, _ in together):
                    self._draw_batch([asked[order[0]]], 0, stop)
                bar.update(sum(len(rows) for _, rows in together))

            drawn = map_over_processes(draw, numbered, after_round=keep_pace, together=self.split)
        samples = dict(zip(chain.from_iterable(batches), chain.from_iterable(drawn)))
        return [samples[row] for row in range(len(prompts))]

    def settle(
        self,
        prompts: Sequence[list[int]],
        *,
        places: Sequence[tuple[int, int]] | None = None,
        stop: Stop | None = None,
        first_batch: int = 0,
    ) -> dict[int, list[Sample]]:
        """Settle how prompts are laid out before parts of them are drawn; see `draw`, which does it for what it gets.

        Then a part's samples do not depend on which others were drawn before it.

        Args:
            prompts: All prompts, in ascending order of length.
            places: See `draw`.
            stop: See `draw`.
            first_batch: See `draw`.

        Returns:
            The samples of those batches that were drawn for it, by their number.

        Raises:
            RuntimeError: See `draw`.
        """
        asked = self._asked(prompts, places)
        rows = range(len(prompts))
        batches = [list(rows[start : start + self.batch_size]) for start in rows[:: self.batch_size]]
        with inference(self.model):
            return self._find_reading(list(enumerate(batches, first_batch)), asked, stop)

    def _asked(self, prompts: Sequence[list[int]], places: Sequence[tuple[int, int]] | None) -> list[_Row]:
        """The prompts with their places, where these decide anything."""
        require_room(self.model, prompts, [self.sampling.max_new_tokens] * len(prompts))
        if not self.stratified:
            return [_Row(prompt, None) for prompt in prompts]
        if places is None or len(places) != len(prompts):
            raise ValueError(
                "`places` must say of each prompt which one it is, and which of its samples this is, as stratified "
                f"samples share codes: expected {len(prompts)} pairs, got {None if places is None else len(places)}."
            )
        return [_Row(prompt, place) for prompt, place in zip(prompts, places)]

    def _find_reading(
        self, batches: list[tuple[int, list[int]]], asked: Sequence[_Row], stop: Stop | None
    ) -> dict[int, list[Sample]]:
        """Settle how prompts are laid out, by reading some responses again; all processes do this, and draw the same.

        Returns:
            The samples of the batches that were drawn for it.
        """
        kinds = _kinds(batches, asked)
        chosen = dict(batch for kind, batch in kinds.items() if kind not in self._tried)
        self._tried |= kinds.keys()
        found: dict[int, list[Sample]] = {}
        for layout in _LAYOUTS[_LAYOUTS.index(self._layout) :] if chosen else ():
            self._layout = layout
            # The passes of a sharded model must be the same in number on all processes: there is one layout.
            last = layout is _LAYOUTS[-1] or self.sharded
            found, gap = self._try(chosen, asked, stop, last=last)
            if gap is None:
                break
            if last:
                raise RuntimeError(
                    f"`model` {type(self.model).__name__} does not write from the distribution that its passes give: "
                    f"log p of a response that it wrote differs by {gap:.2g} nats when it reads it again, so no "
                    f"log D(y|x) is known of its samples. {_SHARDED if self.sharded else _NOT_CAUSAL}"
                )
            logger.debug("Prompts are answered otherwise than so: %s. The model's passes differ.", layout)
        return found

    def _try(
        self, batches: dict[int, list[int]], asked: Sequence[_Row], stop: Stop | None, *, last: bool
    ) -> tuple[dict[int, list[Sample]], float | None]:
        """Draw batches and read some responses of each again: the samples, and the largest gap beyond rounding."""
        found: dict[int, list[Sample]] = {}
        gaps = []
        try:
            for index, rows in batches.items():
                drawn = self._draw_batch([asked[row] for row in rows], index, stop)
                found[index] = [one.sample for one in drawn]
                for place in sorted({0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1}):
                    again = self._read(asked[rows[place]].ids, drawn[place].sample.ids)
                    if not agree(Readout(drawn[place].plain, again.epsilon), again):
                        gaps.append(float((drawn[place].plain - again.logprobs).abs().sum()))
        except Exception as error:  # a layout that the model cannot run is done without, as one that changes numbers
            if is_out_of_memory(error):
                raise
            if last:
                raise RuntimeError(
                    f"`model` {type(self.model).__name__} cannot answer a prompt by itself: {str(error).rstrip('.')}. "
                    "Here a model is given token ids and nothing else: give it a `forward` that fills in what it "
                    "wants beside them (`functools.partial`), or merge the adapter that wants it (`merge_and_unload`)."
                ) from error
            logger.debug("The model cannot answer prompts laid out so: %s: %s", type(error).__name__, error)
            gaps.append(math.inf)
        return found, max(gather_object(gaps), default=None)

    def _read(self, prompt: list[int], response: list[int]) -> Readout:
        """What the model says of the tokens of a response when it reads them alone."""
        ids = torch.tensor([[*prompt, *response[:-1]]], device=input_device(self.model))
        logits = self._logits(ids, len(response))[0]
        values = token_logprobs(logits, torch.tensor(response, device=logits.device))
        return Readout(values.double().cpu(), rounding(self.model, logits))

    def _logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits `(B, last, V)` at the last tokens, of a plain pass."""
        trims = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        keep = {"logits_to_keep": last} if trims else {}
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits
        return logits[:, -last:]  # from the end: some adapters put tokens of their own before the prompt

    def _draw_batch(self, rows: list[_Row], index: int, stop: Stop | None) -> list[_Drawn]:
        if self._layout.reading < Reading.EQUAL:
            return self._draw_together(rows, (index,), stop)
        if self._layout.reading is Reading.EQUAL:
            lengths = sorted({len(row.ids) for row in rows})
            groups = [[row for row in rows if len(row.ids) == length] for length in lengths]
        else:
            groups = [[row] for row in rows]
        return [
            one for number, group in enumerate(groups) for one in self._draw_together(group, (index, number), stop)
        ]

    def _draw_together(self, rows: list[_Row], entropy: tuple[int, ...], stop: Stop | None) -> list[_Drawn]:
        device, eos = input_device(self.model), self.sampling.eos_token_ids
        prompts = [row.ids for row in rows]
        ids, mask = (part.to(device) for part in pad_left(prompts))
        processors, stopper = self.sampling.processors(), _Stopper(ids.shape, stop)
        plain, sampled = _DensityRecorder(), _DensityRecorder()
        chain_of = LogitsProcessorList([plain, *processors, sampled] if processors else [plain])
        choice = self._code_choice(rows, device) if self.stratified else None
        if choice is not None:
            chain_of.append(choice)  # behind what takes down the scores that it chooses from
        write = self._generate if self._layout.generated else self._write
        # The passes of a sharded model must be the same in number on all processes, whatever their prompts.
        share = self._layout.reading is Reading.SHARED and not self.sharded
        cache = read_prompts(self.model, prompts) if share else None
        with _seeded(device, (self.seed, *entropy)):
            sequences = write(ids, mask, cache, chain_of, None if stop is None else stopper)
        if choice is not None:
            choice.refuse_nan()
        before = plain.finish(sequences, start=ids.shape[1])
        logprobs = sampled.finish(sequences, start=ids.shape[1]) if processors else before
        responses = sequences[:, ids.shape[1] :].tolist()
        found = []
        for response, terms, own, limit in zip(responses, logprobs, before, stopper.lengths):
            length = next((at for at, token in enumerate(response[:limit], 1) if token in eos), limit or len(response))
            sample = Sample(response[:length], float(terms[:length].sum()), response[length - 1] in eos)
            found.append(_Drawn(sample, own[:length]))
        return found

    def _code_choice(self, rows: list[_Row], device: torch.device) -> CodeChoice:
        """What chooses the tokens of stratified samples, whatever stands beside them."""
        places = [row.place for row in rows if row.place is not None]
        # One step more, which `generate` may take, and take back.
        parts = placed_codes(self.seed, places, self.sampling.max_new_tokens + 1)
        codes, digits = (part.to(code_device(device)) for part in parts)
        return CodeChoice(codes, partial(next, iter(digits.unbind(-1))))

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        processors: LogitsProcessorList,
        stopper: StoppingCriteria | None,
    ) -> Tensor:
        """Prompts and responses `(B, L + T)`, by the model's own `generate`."""
        # What stratified samples are chosen by leaves one token, for which `generate` need not draw.
        drawing = {} if self.stratified else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            do_sample=not self.stratified,
            **drawing,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=list(self.sampling.eos_token_ids) or None,
            pad_token_id=0,
            use_cache=True,
        )
        with own_config(self.model, config):
            return self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=None if stopper is None else StoppingCriteriaList([stopper]),
                synced_gpus=self.sharded and PartialState().num_processes > 1,
                **{CACHE: cache},
            )

    def _write(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        processors: LogitsProcessorList,
        stopper: StoppingCriteria | None,
    ) -> Tensor:
        """Prompts of one length and responses `(B, L + T)`, each token by a pass like those that `_read` makes."""
        eos = torch.tensor(self.sampling.eos_token_ids, dtype=ids.dtype, device=ids.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(self.sampling.max_new_tokens):
            scores = processors(ids, self._logits(ids, 1)[:, -1].float())
            tokens = scores.argmax(-1, keepdim=True) if self.stratified else torch.multinomial(scores.softmax(-1), 1)
            tokens = tokens.to(ids.device)
            ids = torch.cat([ids, tokens], dim=-1)
            ended |= torch.isin(tokens[:, 0], eos)
            if stopper is not None:
                ended |= stopper(ids, scores)
            if ended.all():
                break
        return ids


def _kinds(batches: list[tuple[int, list[int]]], asked: Sequence[_Row]) -> dict[str, tuple[int, list[int]]]:
    """The first batch of each kind that a model may go wrong on, and the one with the longest prompt."""
    kinds: dict[str, tuple[int, list[int]]] = {}
    for batch in batches:
        lines = [tuple(asked[row].ids) for row in batch[1]]
        kinds.setdefault("any", batch)
        if len(set(map(len, lines))) > 1:
            kinds.setdefault("padded", batch)
        if len(set(lines)) < len(lines):
            kinds.setdefault("shared", batch)
    return kinds | ({"longest": batches[-1]} if batches else {})


class _DensityRecorder(LogitsProcessor):
    """Notes the log-probability of each token under the scores that come by; the last processor's are sampled from."""

    def __init__(self) -> None:
        self._pending: Tensor | None = None
        self._settled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids[:, -1])
        self._pending = scores
        return scores

    def _settle(self, tokens: Tensor) -> None:
        # A step's token is known when the next step begins, so one (B, V) tensor is alive and not one per step.
        if self._pending is not None:
            self._settled.append(token_logprobs(self._pending, tokens))

    def finish(self, sequences: Tensor, *, start: int) -> Tensor:
        """Log-probabilities (B, T) of the tokens after `start`, float64 on the CPU."""
        steps = sequences.shape[1] - start
        if len(self._settled) < steps:
            self._settle(sequences[:, -1])
        # `generate` may see one step late that all rows have ended, and take that step back.
        return torch.stack(self._settled[:steps], dim=1).double().cpu()


class _Stopper(StoppingCriteria):
    """Ends each response where `stop` says so, and notes its length: a row that has ended goes on being filled."""

    def __init__(self, shape: torch.Size, stop: Stop | None) -> None:
        rows, self._start = shape
        self._stop = stop
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self._stop is not None:
            for row, response in enumerate(input_ids[:, self._start :].tolist()):
                if self.lengths[row] is None and self._stop(response):
                    self.lengths[row] = len(response)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


@contextmanager
def _seeded(device: torch.device, entropy: tuple[int, ...]) -> Iterator[None]:
    """Seed the generators that sampling on `device` draws from, and put them back."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach the accelerators as well
            yield
    else:
        devices = range(torch.get_device_module(device).device_count())
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            torch.manual_seed(seed)
            yield


def require_room(model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> None:
    """Refuse prompts that leave a model too few positions for what is to follow them."""
    # Recurrent models have no such limit, or one of -1.
    room = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    if room is None:
        return
    for row, (prompt, new) in enumerate(zip(prompts, new_tokens)):
        if len(prompt) + new > room > 0:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens, and with {new} new ones it does not fit into the model's "
                f"{room} positions; shorten either."
            )


def end_token_ids(
    chosen: int | Sequence[int] | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The tokens that end a response: the caller's, or else the model's, or else the tokenizer's."""
    if chosen is None:
        chosen = unwrap(model).generation_config.eos_token_id
    if chosen is None and tokenizer is not None:
        chosen = tokenizer.eos_token_id
    if chosen is None:
        return ()
    return (chosen,) if isinstance(chosen, int) else tuple(chosen)


def read_prompts(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Cache | None:
    """Read all tokens of a batch's prompts but their last ones, equal prompts once.

    `generate` continues from what is returned as from its own: it takes the whole prompts and reads the last tokens.

    Args:
        model: Any causal language model, in evaluation mode.
        prompts: Token ids, never empty.

    Returns:
        A cache with a line for each prompt, as long as the longest one less one; None where it would save little, or
        where the architecture's cache cannot be repeated.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if model._is_stateful or 2 * len(distinct) > len(prompts) or min(map(len, distinct)) < 2:
        return None
    ids, mask = pad_left([list(prompt[:-1]) for prompt in distinct])
    config = GenerationConfig(max_new_tokens=1, use_cache=True, return_dict_in_generate=True, pad_token_id=0)
    with own_config(model, config):
        # By `generate` itself, which knows what each architecture wants; the token that it finds is not needed.
        device = input_device(model)  # `model.device` may be that of parts that are not loaded
        read = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
    cache = read.get(CACHE)
    if not is_repeatable(cache):
        return None
    line_of = {prompt: line for line, prompt in enumerate(distinct)}
    # On the CPU, from where they index whatever device a layer is on.
    cache.batch_select_indices(torch.tensor([line_of[tuple(prompt)] for prompt in prompts]))
    return cache


def pad_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and mask (B, L)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@contextmanager
def own_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keep a model's generation defaults out of `generate`, which fills whatever is None with them."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
