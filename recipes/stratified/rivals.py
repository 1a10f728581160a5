"""Ways to spend eight calls of a verifier, and what each of them generates for it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from hf_coverage.decode.exploration import select_diverse
from hf_coverage.decode.stratified import stratified_generate
from hf_coverage.functional.best_of_n import pass_at_n
from hf_coverage.functional.checks import FloatArray, IntArray
from hf_coverage.inference.code_choice import CodeChoice

__all__ = ["Outcome", "Rivals"]

_ROWS = 2048
"""Responses drawn at once."""


class Outcome(NamedTuple):
    """What one way comes to, for each prompt.

    Attributes:
        passed: `(P,)` how probably the responses that are checked hold a right one.
        tokens: `(P,)` tokens generated.
        checked: `(P,)` different responses among those checked.
    """

    passed: list[float]
    tokens: list[float]
    checked: list[float]


class Rivals:
    """The ways, on one model.

    Args:
        model: Its responses have `length` tokens, and no end.
        prompts: Token ids `(P, L)`, equally long.
        answers: The right responses `(P, T)`.
        size: Responses to be checked.
        repeats: How often each random way is gone, to tell it more exactly.
        pool: Samples that RepExp chooses from.
        draws: Most samples that different ones are looked for in.
        seed: What all random numbers follow from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        answers: IntArray,
        *,
        size: int,
        repeats: int,
        pool: int,
        draws: int,
        seed: int,
    ) -> None:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("`prompts` must be equally long: give the task `prompt_format: aligned`.")
        self._model, self._prompts, self._answers = model, torch.tensor(prompts), answers
        self._length = answers.shape[1]
        self._size, self._repeats, self._pool, self._draws, self._seed = size, repeats, pool, draws, seed

    def ways(self, temperatures: list[float]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        """All of them by name."""
        for temperature in temperatures:
            yield f"independent, temperature {temperature:g}", lambda t=temperature: self.independent(t)
        for temperature in temperatures:
            yield f"stratified, temperature {temperature:g}", lambda t=temperature: self.stratified(t)
        yield "lattice", self.lattice
        yield f"different ones of up to {self._draws}", self.different
        yield f"RepExp from {self._pool}", self.rep_exp
        yield "beam search", self.beams

    def independent(self, temperature: float) -> Outcome:
        """Samples of the model; Pass@N is unbiased from all repetitions."""
        drawn = self._sample(self._size * self._repeats, temperature=temperature)
        passed = pass_at_n(self._right(drawn))[:, self._size - 1]
        return self._outcome(passed, self._in_groups(drawn))

    def stratified(self, temperature: float) -> Outcome:
        """Samples that share a set of codes."""
        settings = {"temperature": temperature, "custom_generate": stratified_generate}
        return self._grouped([self._sample(self._size, **settings, repeat=r) for r in range(self._repeats)])

    def lattice(self) -> Outcome:
        """Samples of codes `u + i/N`, of one offset u a prompt."""
        return self._grouped([self._on_lattice(repeat) for repeat in range(self._repeats)])

    def different(self) -> Outcome:
        """Independent samples until so many differ, or there are `draws`; repetitions are not checked again."""
        drawn = self._sample(self._draws)
        passed, tokens, checked = [], [], []
        for responses, right in zip(drawn.tolist(), self._right(drawn)):
            first: dict[tuple[int, ...], int] = {}
            for place, response in enumerate(responses):
                first.setdefault(tuple(response), place)
            kept = list(first.values())[: self._size]
            passed.append(float(right[kept].any()))
            tokens.append(float(self._length * (1 + kept[-1] if len(kept) == self._size else self._draws)))
            checked.append(float(len(kept)))
        return Outcome(passed, tokens, checked)

    def rep_exp(self) -> Outcome:
        """The samples of a pool whose hidden states differ most."""
        drawn = self._sample(self._pool)
        flat = drawn.reshape(-1, self._length).tolist()
        prompts = [prompt for prompt in self._prompts.tolist() for _ in range(self._pool)]
        corpus = Dataset.from_dict({"prompt": prompts, "completion": flat})
        chosen = select_diverse(self._model, None, corpus, k=self._size, progress=False)
        kept = np.array(chosen["completion"][:]).reshape(len(self._prompts), self._size, self._length)
        return self._grouped([kept], generated=self._pool)

    def beams(self) -> Outcome:
        """The beams of beam search, all of them; a token is generated in each beam at each step."""
        return self._grouped([self._sample(self._size, do_sample=False, num_beams=self._size)])

    def _sample(self, count: int, *, repeat: int = 0, **settings: Any) -> IntArray:
        """`(P, count, T)` responses."""
        law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
        law = law if law["do_sample"] else {key: law[key] for key in law.keys() - {"temperature", "top_k", "top_p"}}
        torch.manual_seed(self._seed + 1000 * repeat)
        step = max(1, _ROWS // count)
        parts = [self._generate(part, num_return_sequences=count, **law) for part in self._prompts.split(step)]
        return np.concatenate(parts).reshape(len(self._prompts), count, self._length)

    def _on_lattice(self, repeat: int) -> IntArray:
        generator = torch.Generator().manual_seed(self._seed + 1000 * repeat)
        offsets = torch.rand(len(self._prompts), 1, dtype=torch.float64, generator=generator)
        codes = ((offsets + torch.arange(self._size)) / self._size).flatten()

        def digits() -> Tensor:
            return torch.rand(len(codes), dtype=torch.float64, generator=generator)

        rows = self._prompts.repeat_interleave(self._size, dim=0)
        found = self._generate(
            rows, do_sample=False, logits_processor=LogitsProcessorList([CodeChoice(codes, digits)])
        )
        return found.reshape(len(self._prompts), self._size, self._length)

    def _generate(self, ids: Tensor, **settings: Any) -> IntArray:
        found = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._length, eos_token_id=None, **settings
        )
        return found[:, ids.shape[1] :].numpy()

    def _right(self, drawn: IntArray) -> NDArray[np.bool_]:
        return (drawn == self._answers[:, None]).all(axis=-1)

    def _in_groups(self, drawn: IntArray) -> list[IntArray]:
        return np.split(drawn, drawn.shape[1] // self._size, axis=1)

    def _grouped(self, groups: list[IntArray], generated: int | None = None) -> Outcome:
        """Mean over repetitions of whether a group holds a right one."""
        passed = np.mean([self._right(group).any(axis=1) for group in groups], axis=0)
        return self._outcome(passed, groups, generated)

    def _outcome(self, passed: FloatArray, groups: list[IntArray], generated: int | None = None) -> Outcome:
        different = [[len(set(map(tuple, responses))) for responses in group.tolist()] for group in groups]
        tokens = float(self._length * (self._size if generated is None else generated))
        return Outcome(passed.tolist(), [tokens] * len(passed), np.mean(different, axis=0).tolist())
