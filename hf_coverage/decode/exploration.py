"""Representation-based exploration: which responses of a prompt differ, by a model's own hidden states.

To choose k of many samples before a costly verifier sees them, or as a bonus in reinforcement learning.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.exploration import elliptical_bonus, elliptical_selection, sparse_projection
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward import HeadForward, HeadOutput, inference
from hf_coverage.inference.forward_batches import Batch, Limits, Step, build_step, passes_missed, plan_batches
from hf_coverage.inference.prefix_cache import continue_lines
from hf_coverage.inference.processes import map_over_processes
from hf_coverage.inference.sampler import require_room
from hf_coverage.inference.self_check import Reading, find_reading
from hf_coverage.measure.corpus import encode_corpus, encode_prompts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["ExplorationReward", "response_features", "select_diverse"]


def response_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    *,
    dim: int | None = 512,
    append_eos: bool = False,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> FloatArray:
    """Represent each response by the mean of the model's last hidden states at its tokens, projected sparsely.

    The hidden states are those that the output head gets. Equal rows are run once, the responses of one prompt
    continue from one run of it where the architecture allows that, and the processes of a job share the work and all
    return the same.

    Args:
        model: Any causal language model with an output head.
        tokenizer: Its tokenizer; may be None for token ids.
        corpus: Dataset with `prompt` and `completion`: text, chat messages or token ids.
        dim: Dimensions to project to; None, or at least the hidden size: not projected.
        append_eos: End every response with the EOS token, which then counts as one of its tokens; for text only.
        batch_tokens: Token positions computed in one forward pass, padding included; a longer row runs alone.
        progress: Whether to show a progress bar on the main process.

    Returns:
        `(R, dim)` float64.

    Raises:
        TypeError: If the corpus is no `datasets.Dataset`.
        ValueError: If a row or a size does not fit, or the model gives NaN; names the row.
        RuntimeError: If the architecture has no single output head over its hidden states.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2], [1, 2]], "completion": [[3, 4, 5], [6]]})
        >>> response_features(model, None, corpus, progress=False).shape
        (2, 8)

    References:
        arXiv 2510.11686, Section 3.
    """
    encoded = encode_corpus(corpus, tokenizer, append_eos=append_eos)
    return _features(model, encoded, dim, batch_tokens, progress=progress)[0]


def select_diverse(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: Dataset,
    *,
    k: int,
    lam: float = 1.0,
    dim: int | None = 512,
    center: bool = False,
    append_eos: bool = False,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Dataset:
    """Choose, of the sampled responses to each prompt, the k that differ most, without asking a verifier.

    Greedily the largest elliptical bonus `f^T S^-1 f` beside the responses already chosen, `S = lambda I + sum f f^T`.

    Args:
        model: Any causal language model; usually the one that gave the responses.
        tokenizer: Its tokenizer; may be None for token ids.
        samples: Dataset with `prompt` and `completion`, each prompt with at least k rows, in any order.
        k: Responses to choose for each prompt.
        lam: lambda > 0, in the units of a squared feature norm.
        dim: As for `response_features`.
        center: Whether to take the mean feature of a prompt's responses off all of them first.
        append_eos: As for `response_features`.
        batch_tokens: As for `response_features`.
        progress: As for `response_features`.

    Returns:
        The chosen rows with all their columns: prompts in the order of their first rows, the k of a prompt in the
        order of their choice, so that a smaller k is the beginning of each.

    Raises:
        ValueError: If a prompt has fewer than k rows, or as for `response_features`.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> samples = Dataset.from_dict({"prompt": [[1]] * 4, "completion": [[2, 3], [2, 3], [2, 3], [7]]})
        >>> sorted(select_diverse(model, None, samples, k=2, progress=False)["completion"])
        [[2, 3], [7]]

    References:
        arXiv 2510.11686, Section 3.
    """
    encoded = encode_corpus(samples, tokenizer, append_eos=append_eos)
    groups = list(_groups(encoded.prompts))
    small = next((rows for rows in groups if len(rows) < k), None)
    if k < 1 or small is not None:
        has = "" if small is None else f"; the prompt of row {small[0]} has {len(small)} responses"
        raise ValueError(f"`k` must be at least 1 and at most the responses of each prompt, but is {k}{has}.")
    features, _ = _features(model, encoded, dim, batch_tokens, progress=progress)
    chosen = [rows[elliptical_selection(_centered(features[rows], center), k, lam=lam)] for rows in groups]
    return samples.select(np.concatenate(chosen))


class ExplorationReward:
    """A reward for differing from the other responses to the same prompt, as TRL's `GRPOTrainer` takes it.

    A completion of a group gets `f_i^T (lambda I + sum_j f_j f_j^T)^-1 f_i`, j over the group with i in it, which is
    in [0, 1]. Add it to the reward of the task with `GRPOConfig(reward_weights=[1.0, beta], scale_rewards="batch")`:
    TRL's default divides by the standard deviation within a group, so that where the task rewards all completions of a
    group alike the bonus alone decides, whatever beta. Its mean in the logs times the size of a group is the effective
    number of different responses.

    A group is all completions of one prompt in a generation batch, wherever they were made: the processes of a job
    exchange features. In the rare case that two rows of the training set have the same prompt and meet in one batch,
    their completions are one group.

    Args:
        model: The causal language model whose hidden states tell responses apart: the very model that is trained, for
            its present representation, or a frozen copy on the device that it is to run on, for the pre-trained one.
            Its mode, gradients and random numbers stay as they are.
        tokenizer: Its tokenizer, with the chat template where prompts are conversations.
        lam: lambda > 0, in the units of a squared feature norm.
        dim: As for `response_features`.
        center: Whether to take the mean feature of a group off all of it first.
        batch_tokens: As for `response_features`.

    Raises:
        ValueError: When called, if there are no `completion_ids`, or as for `response_features`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> reward = ExplorationReward(model, None)
        >>> bonus = reward(prompts=[[1], [1], [1]], completion_ids=[[2, 3], [2, 3], [7]])
        >>> [round(value, 1) for value in bonus]
        [0.4, 0.4, 0.8]

    References:
        arXiv 2510.11686, Section 4.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        lam: float = 1.0,
        dim: int | None = 512,
        center: bool = False,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lam, self.dim, self.center, self.batch_tokens = lam, dim, center, batch_tokens
        self._reading: Reading | None = None
        self.__name__ = "exploration_reward"  # what TRL's logs call it

    def __call__(self, prompts: Sequence[Any], completion_ids: Sequence[list[int]], **columns: Any) -> list[float]:
        """Reward the completions that this process made.

        Args:
            prompts: Text, chat messages or token ids, one a completion.
            completion_ids: Their token ids.
            columns: Whatever else a trainer passes; not used.

        Returns:
            One reward a completion.
        """
        mine = list(zip(encode_prompts(prompts, self.tokenizer), completion_ids, strict=True))
        rank = PartialState().process_index
        everywhere = gather_object([(rank, *pair) for pair in mine])
        encoded = EncodedCorpus([row[1] for row in everywhere], [row[2] for row in everywhere])
        features, self._reading = _features(self.model, encoded, self.dim, self.batch_tokens, reading=self._reading)
        rewards = np.empty(len(encoded))
        for rows in _groups(encoded.prompts):
            rewards[rows] = elliptical_bonus(_centered(features[rows], self.center), lam=self.lam)
        return [float(reward) for reward, row in zip(rewards, everywhere) if row[0] == rank]


def _groups(prompts: list[list[int]]) -> Iterator[NDArray[np.int64]]:
    """Rows of each prompt, prompts in the order of their first rows."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(row)
    return map(np.array, rows.values())


def _centered(features: FloatArray, center: bool) -> FloatArray:
    return features - features.mean(axis=0) if center else features


def _features(
    model: nn.Module,
    encoded: EncodedCorpus,
    dim: int | None,
    batch_tokens: int,
    *,
    progress: bool = False,
    reading: Reading | None = None,
) -> tuple[FloatArray, Reading]:
    """Projected features of all rows, equal ones computed once, and how rows may be read, where it was not known."""
    for name, value in (("dim", dim), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    lines = [(tuple(prompt), tuple(completion)) for prompt, completion in zip(encoded.prompts, encoded.completions)]
    distinct = list(dict.fromkeys(lines))
    place = {line: index for index, line in enumerate(distinct)}
    inverse = [place[line] for line in lines]
    # One more token that nobody reads: what would predict it is the state at the last token of the response.
    read = EncodedCorpus([[*prompt] for prompt, _ in distinct], [[*response, 0] for _, response in distinct])
    with inference(model):
        forward = HeadForward(model)
        probe = forward.probe()
        _check_rows(forward.model, encoded, probe.logits.shape[-1])
        limits = Limits(batch_tokens, positions=sys.maxsize)
        if reading is None:
            reading = find_reading(
                [forward],
                read,
                vocab_size=probe.logits.shape[-1],
                fastest=Reading.SHARED if probe.repeatable else Reading.PADDED,
            )
        batches = plan_batches(read, range(len(read)), limits, reading=reading)
        hidden = not (progress and PartialState().is_main_process)
        with tqdm(total=len(read), desc="Reading", unit="response", disable=hidden) as bar:

            def keep_pace(together: Sequence[Batch], own: Batch | None) -> None:
                for _ in range(passes_missed(together, own) if forward.sharded else 0):
                    forward.run_along()
                bar.update(sum(len(batch.rows) for batch in together))

            found = map_over_processes(
                lambda batch: _mean_states(forward, read, batch).numpy(),
                batches,
                after_round=keep_pace,
                together=forward.split,
            )
    means = dict(chain.from_iterable(zip(batch.rows, values) for batch, values in zip(batches, found)))
    features = np.stack([means[index] for index in inverse])
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise ValueError(
            f"`model` gave NaN or infinite hidden states for row {bad[0]}; load it in float32 or bfloat16."
        )
    size = features.shape[1]
    return features if dim is None or dim >= size else features @ sparse_projection(size, dim), reading


def _mean_states(forward: HeadForward, corpus: EncodedCorpus, batch: Batch) -> Tensor:
    """Means `(B, d)` of the head's inputs at the response tokens of a batch's rows, on the CPU in float64."""
    lengths = [len(corpus.completions[row]) - 1 for row in batch.rows]
    ends = list(accumulate(length + 1 for length in lengths))
    first_slots = dict(zip(batch.rows, [0, *ends]))
    owner = np.repeat(np.arange(len(lengths)), np.add(lengths, 1))
    owner[list(first_slots.values())] = -1  # the state at the prompt's last token

    def run(rows: Sequence[int], start: int, stop: int, cache: Cache | None = None) -> tuple[Step, HeadOutput]:
        slots = np.array([first_slots[row] for row in rows])
        step = build_step(corpus, rows, slots, start, stop, context=start)
        return step, forward(step.ids, step.positions, first=0, cache=cache, keep_cache=bool(batch.waves))

    first, output = run(batch.rows, 0, batch.cuts[0])
    line_of = dict(zip(batch.rows, first.sequences))
    sums = _row_sums(first, output, owner, len(lengths))
    for wave in batch.waves:
        cache = continue_lines(output.cache, np.array([line_of[row] for row in wave]), last=True)
        sums = sums + _row_sums(*run(wave, batch.cuts[0], batch.cuts[1], cache), owner, len(lengths))
    return sums / torch.tensor(lengths).unsqueeze(1)


def _row_sums(step: Step, output: HeadOutput, owner: NDArray[np.int64], num_rows: int) -> Tensor:
    """Sums `(B, d)` of one pass's hidden states over the tokens of each row."""
    hidden = output.hidden.cpu().double()
    rows = owner[step.slots]
    states = hidden[torch.from_numpy(step.pick[rows >= 0])]
    return hidden.new_zeros(num_rows, hidden.shape[1]).index_add_(0, torch.from_numpy(rows[rows >= 0]), states)


def _check_rows(model: nn.Module, corpus: EncodedCorpus, vocab_size: int) -> None:
    require_room(model, corpus.prompts, [len(completion) for completion in corpus.completions])
    for row, ids in enumerate(zip(corpus.prompts, corpus.completions)):
        least, largest = min(map(min, ids)), max(map(max, ids))
        if least < 0 or largest >= vocab_size:
            raise ValueError(
                f"Row {row} has token id {largest if largest >= vocab_size else least}, expected ids in "
                f"[0, {vocab_size}); use the tokenizer of `model`."
            )
