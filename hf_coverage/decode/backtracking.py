"""Value-guided backtracking (VGB): sampling p(y|x) V(x, y) with an imperfect process verifier V on prefixes.

`backtrack` is the method; `reject`, `guide` and `block_best_of_n` are what it is compared with, under the same budget
of model and verifier calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hf_coverage.decode.prefix_methods import Backtracking, BlockBestOfN, Guidance, Rejection, Responses
from hf_coverage.decode.prefix_model import PrefixModel, PrefixVerifier, Recent
from hf_coverage.decode.prefix_walkers import CallBudget, Method, Walker, run_walkers
from hf_coverage.decode.prompt_table import PromptTable
from hf_coverage.functional.checks import FloatArray
from hf_coverage.inference.sampler import Sampling, end_token_ids, require_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GuidedResponses", "ValueGuidedDecoder"]

_OWN_NAMES = {"prompt", "prompts", "completions", "completion_ids", "finished"}


class ValueGuidedDecoder:
    """Decodes responses to one prompt under a process verifier.

    The verifier is a callable like TRL's reward functions that judges prefixes: it gets what its signature names of
    `prompts`, `completions` (text, or token ids where the prompt is), `completion_ids`, `finished` (whether a prefix
    is a whole response) and `columns`, one entry a prefix each, and returns one value V >= 0 each. It runs in this
    process. At whole responses V says what they are worth; at prefixes it should be about the mean of that over what
    may follow. A prefix of value 0 cuts off all that follows it.

    Model and verifier are asked once for each prefix while it is remembered, by whatever method and also in a later
    call, such as one after an interruption. The model reads the last token of a prefix, in batches, and continues from
    the keys and values of those before it where its cache holds them by token. Make a new decoder after the model
    changed.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer; may be None where the prompt is token ids.
        prompt: Text, chat messages or token ids.
        verifier: See above.
        max_new_tokens: Most tokens H of a response.
        temperature: What logits are divided by; 1 is the model itself.
        top_k: Keep the k likeliest tokens of every step; None: all. Methods that judge every child need it, or a small
            vocabulary.
        top_p: Keep the likeliest tokens that together reach this mass; None: all.
        eos_token_id: The tokens that end a response; None: those of the model's generation config, or else the
            tokenizer's; an empty list: none.
        columns: What else the verifier is given by name, such as an answer.
        batch_size: Prefixes that model and verifier get at once.
        cache_size: Prefixes whose next-token distributions (four bytes a token of the vocabulary), attention keys,
            values and moves are remembered; 0: none.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the verifier cannot be called, or the prompt has the wrong type.
        ValueError: If a number is out of its range, or the verifier needs something that is not there.

    Example:
        Two tokens out of four each, of which the verifier wants the larger ones:

        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=4))
        >>> def larger(completion_ids):
        ...     return [1.0 + sum(ids) for ids in completion_ids]
        >>> decoder = ValueGuidedDecoder(
        ...     model, None, [1, 2], larger, max_new_tokens=2, eos_token_id=[], progress=False
        ... )
        >>> found = decoder.backtrack(400, steps=40)
        >>> np.bincount(found.values.astype(int), minlength=8)[1:].tolist()
        [7, 32, 61, 93, 85, 74, 48]
        >>> bool(found.finished.all()), found.computed_model_calls
        (True, 5)

    References:
        arXiv 2510.03149.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Any,
        verifier: Callable[..., Any],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        columns: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        cache_size: int = 4096,
        progress: bool = True,
    ) -> None:
        if batch_size < 1 or cache_size < 0:
            raise ValueError(f"`batch_size` must be at least 1 and `cache_size` 0, got {batch_size}, {cache_size}.")
        taken = sorted(_OWN_NAMES & set(columns or {}))
        if taken:
            raise ValueError(
                f"`columns` must not have `{taken[0]}`, which the decoder gives itself; call it otherwise."
            )
        row = {"prompt": prompt, **(columns or {})}
        table = PromptTable.from_corpus(Dataset.from_dict({name: [value] for name, value in row.items()}))
        (prompt_ids,) = table.encode(tokenizer)
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, end_token_ids(eos_token_id, model, tokenizer))
        require_room(model, [prompt_ids], [max_new_tokens])
        self._responses = Responses(max_new_tokens, sampling.eos_token_ids)
        self._verifier = PrefixVerifier(
            verifier, table, tokenizer, self._responses.is_whole, batch_size=batch_size, cache_size=cache_size
        )
        self._model = PrefixModel(model, prompt_ids, sampling, batch_size=batch_size, cache_size=cache_size)
        self._tokenizer, self._cache_size, self._progress = tokenizer, cache_size, progress

    def backtrack(
        self,
        num_responses: int,
        *,
        steps: int | None = None,
        visits: int | None = None,
        restart: bool = True,
        block_size: int | None = None,
        laziness: float = 0.5,
        budget: CallBudget | None = None,
        seed: int = 0,
    ) -> GuidedResponses:
        """Walk on the tree of prefixes, back as well as forward.

        At a prefix y the walk stays with probability `laziness`; else it goes to the parent with weight V(y), or to
        the child v with weight p(v|y) V(y v). The more steps or visits, the closer is the law of the responses to p V,
        even if V is off at prefixes, by a factor that is bounded; with few it is between that and the law of `guide`.

        Args:
            num_responses: R, each decoded on its own.
            steps: T. The walk ends after T steps if it is at a whole response then, and else begins anew. With values
                that are right it is at one with probability 1 / (2 H), so there are about 2 H walks of T steps, and T
                should be some H^2. This is what the theorems are about.
            visits: K, instead of `steps`: the walk ends when it is at a whole response for the K-th time. The law
                tends to the same, with about 4 H steps a visit and no walk thrown away; `visits=1` takes the first
                one there is.
            restart: With `steps`: False goes on to the next whole response instead of beginning anew, which is biased
                however many steps were made.
            block_size: Tokens of a move. None: one, and every child is judged. A number: the block is drawn from the
                model and it alone is judged, accepted with probability min(1, V(new) / V(old)); going back is proposed
                as often (Metropolis). The same law, for any vocabulary; V at the prompt must then be above 0.
            laziness: Probability of staying.
            budget: What one response may cost; None: 100,000 steps.
            seed: What all random numbers follow from.

        Raises:
            RuntimeError: If the verifier raises.
            ValueError: If a number is out of its range, or the verifier's values are wrong or let nothing through.

        References:
            arXiv 2510.03149, Algorithm 1, Theorem 4.1.
        """
        if (steps is None) == (visits is None):
            raise ValueError(f"Either `steps` or `visits` must say when a walk ends, got {steps} and {visits}.")
        for name, value in (("steps", steps), ("visits", visits), ("block_size", block_size)):
            _at_least_one(name, 1 if value is None else value)
        if not 0 <= laziness < 1:
            raise ValueError(f"`laziness` must be in [0, 1), got {laziness}.")
        least = self._responses.least_moves(block_size or 1)
        if steps is not None and steps < least:
            raise ValueError(
                f"`steps` must be at least {least}, the moves to the shortest whole response, got {steps}: no walk "
                "would ever end at one."
            )
        method = Backtracking(
            self._responses,
            steps=steps,
            visits=visits or 1,
            restart=restart,
            block_size=block_size,
            laziness=laziness,
            cache_size=self._cache_size,
        )
        return self._run(method, num_responses, budget, seed)

    def reject(
        self, num_responses: int, *, bound: float = 1.0, budget: CallBudget | None = None, seed: int = 0
    ) -> GuidedResponses:
        """Draw whole responses from the model, and accept each with probability V / bound: exact, and costly.

        Args:
            num_responses: R.
            bound: What no V of a whole response exceeds.
            budget: What one response may cost.
            seed: What all random numbers follow from.

        Raises:
            ValueError: If a value exceeds the bound.
        """
        if not bound > 0:
            raise ValueError(f"`bound` must be positive, got {bound}.")
        return self._run(Rejection(self._responses, bound), num_responses, budget, seed)

    def guide(
        self,
        num_responses: int,
        *,
        candidates: int | None = None,
        block_size: int = 1,
        budget: CallBudget | None = None,
        seed: int = 0,
    ) -> GuidedResponses:
        """Go forward only: action-level guidance.

        Where every choice has the value 0 it begins anew.

        Args:
            num_responses: R.
            candidates: None: each token with probability proportional to p V, every one judged. A number: so many
                blocks are drawn from the model, and one is taken with probability proportional to V.
            block_size: Tokens of a block, where blocks are drawn.
            budget: What one response may cost.
            seed: What all random numbers follow from.
        """
        _at_least_one("block_size", block_size)
        if candidates is not None:
            _at_least_one("candidates", candidates)
            method: Method = BlockBestOfN(self._responses, candidates, block_size, greedy=False)
        elif block_size > 1:
            raise ValueError("`block_size` above 1 needs `candidates`, how many blocks are drawn and judged.")
        else:
            method = Guidance(self._responses, Recent(self._cache_size))
        return self._run(method, num_responses, budget, seed)

    def block_best_of_n(
        self, num_responses: int, *, candidates: int, block_size: int, budget: CallBudget | None = None, seed: int = 0
    ) -> GuidedResponses:
        """Draw some blocks from the model, take the one of the highest V (ties at random), and go on from there.

        Where all of them have the value 0 it begins anew. `block_size=max_new_tokens` is Best-of-N.

        Args:
            num_responses: R.
            candidates: N, blocks drawn for each that is taken.
            block_size: Tokens of a block.
            budget: What one response may cost.
            seed: What all random numbers follow from.
        """
        _at_least_one("candidates", candidates)
        _at_least_one("block_size", block_size)
        return self._run(
            BlockBestOfN(self._responses, candidates, block_size, greedy=True), num_responses, budget, seed
        )

    def _run(self, method: Method, num_responses: int, budget: CallBudget | None, seed: int) -> GuidedResponses:
        _at_least_one("num_responses", num_responses)
        walkers = [
            Walker(np.random.default_rng([seed, index]), budget or CallBudget()) for index in range(num_responses)
        ]
        before = self._model.computed, self._verifier.computed
        run_walkers(method, walkers, self._model, self._verifier, progress=self._progress)
        ends = [_end(walker, self._responses) for walker in walkers]
        responses = [list(prefix) for prefix, _, _ in ends]
        texts = None
        if self._tokenizer is not None:
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        return GuidedResponses(
            responses=responses,
            texts=texts,
            logprobs=np.array([logprob for _, logprob, _ in ends]),
            values=np.array([value for _, _, value in ends]),
            finished=np.array([self._responses.is_whole(prefix) for prefix, _, _ in ends]),
            exhausted=np.array([walker.exhausted for walker in walkers]),
            model_calls=np.array([len(walker.looked) for walker in walkers]),
            verifier_calls=np.array([len(walker.judged) for walker in walkers]),
            steps=np.array([walker.steps for walker in walkers]),
            starts=np.array([walker.starts for walker in walkers]),
            computed_model_calls=self._model.computed - before[0],
            computed_verifier_calls=self._verifier.computed - before[1],
        )


def _end(walker: Walker, responses: Responses) -> tuple[tuple[int, ...], float, float]:
    """The response a walker gives, with its log-probability and value."""
    if walker.exhausted and walker.whole is not None:
        return walker.whole
    return walker.prefix, float(np.sum(walker.logprobs)), walker.values[-1]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass(frozen=True, eq=False)
class GuidedResponses:
    """R responses to one prompt, and what each of them cost.

    Attributes:
        responses: Their tokens, the end-of-sequence token included where there is one.
        texts: The same as text; None without a tokenizer.
        logprobs: `(R,)` log p(y|x) under the sampling distribution, nats.
        values: `(R,)` V; NaN for an empty response that was not judged.
        finished: `(R,)` whether it is a whole response.
        exhausted: `(R,)` whether the budget ran out before the method was done. A walk then gives the last whole
            response it was at, if there was one; other methods give what they had so far.
        model_calls: `(R,)` prefixes whose next-token distribution it asked for.
        verifier_calls: `(R,)` prefixes whose value it asked for.
        steps: `(R,)` steps or choices made.
        starts: `(R,)` how often it began at the prompt.
        computed_model_calls: Prefixes that the model did read for all of them together: what is shared or remembered
            is read once.
        computed_verifier_calls: Prefixes that the verifier did judge.
    """

    responses: list[list[int]]
    texts: list[str] | None = field(repr=False)
    logprobs: FloatArray = field(repr=False)
    values: FloatArray = field(repr=False)
    finished: NDArray[np.bool_] = field(repr=False)
    exhausted: NDArray[np.bool_] = field(repr=False)
    model_calls: NDArray[np.int64] = field(repr=False)
    verifier_calls: NDArray[np.int64] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    computed_model_calls: int
    computed_verifier_calls: int
