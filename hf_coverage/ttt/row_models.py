"""Sequences that each have a model of their own, which makes a step after every one of their tokens.

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_coverage.functional.logprobs import log_softmax
from hf_coverage.functional.row_steps import step_rows_
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.inference.prefix_cache import copied_cache, detached_cache, new_stale_cache
from hf_coverage.ttt.row_networks import RowNetwork, row_network, row_passes

__all__ = ["RowModels"]


class RowModels:
    """What a model becomes on B sequences, each of which it goes on training on its own.

        theta <- Proj( theta_0 + (1 - decay) (theta - theta_0) + a grad log p_theta(y) )     after every token y

    theta are adapters or all parameters, as the configuration says; the gradient is the network's own, of what it
    returns as its logits. theta is kept in float32 at least, and passes and gradients are in the model's dtype. The
    model itself is not changed, and has no gradients afterwards. Passes are made without dropout, in whatever mode the
    model is, under `no_grad` and `inference_mode` as well.

    Args:
        model: Causal language model; may be wrapped by DDP or compiled.
        ids: The prompts `(B, L)`, int64.
        config: What is trained and how; its scope is `"lora"` or `"all"`. With `on_prompt` the prompts are followed
            here and now.
        mask: Boolean `(B, L)`, false at padding, which is on the left; None: there is none.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3.
        ValueError: If the scope, or the cache that is asked for, does not work with this model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)).eval()
        >>> rows = RowModels(model, torch.tensor([[1, 2], [3, 4]]), config=TTTConfig(0.5, scope="all"))
        >>> before = rows.logits()
        >>> rows.step(torch.tensor([5, 6]))
        >>> rows.logits().shape, bool((rows.logits() == before).any())
        (torch.Size([2, 11]), False)

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """

    def __init__(self, model: nn.Module, ids: Tensor, *, config: TTTConfig, mask: Tensor | None = None) -> None:
        if config.scope == "head" or isinstance(config.lr, Tensor):
            raise ValueError(
                '`config` must have `scope="lora"` or "all" and one step size for all rows, '
                f"got {config.scope!r} and {config.lr}."
            )
        self._network = row_network(model, config)
        device = self._network.device
        with row_passes(self._network.model):
            # Copies: what was made under `inference_mode` cannot take part.
            ids = ids.to(device, copy=True)
            mask = torch.ones_like(ids) if mask is None else mask.to(device, copy=True)
            _check_padding(mask.bool())
            self._lines = [
                _Lines(self._network, config, rows, ids[rows], mask[rows].bool()) for rows in self._groups(len(ids))
            ]
        self._num_rows = len(ids)
        self._logits: Tensor | None = None

    def logits(self) -> Tensor:
        """Logits of what comes next `(B, V)`, in float32 at least; those of a row that has ended are the last ones."""
        with row_passes(self._network.model):
            for lines in self._lines:
                found = lines.logits()
                if self._logits is None:
                    self._logits = found.new_zeros(self._num_rows, found.shape[-1])
                self._logits[lines.rows] = found
        if self._logits is None:
            raise RuntimeError("All rows ended before there were logits.")
        return self._logits.clone()

    def step(self, tokens: Tensor, *, active: Tensor | None = None) -> None:
        """Let every row make its steps on a token, which then is the last one of its sequence.

        Args:
            tokens: y `(B,)`, int64.
            active: Rows `(B,)` that go on; the others have ended, for good. None: all that have not ended.
        """
        with row_passes(self._network.model):
            tokens = tokens.to(self._network.device, copy=True)
            going = torch.ones_like(tokens) if active is None else active.to(tokens.device, copy=True)
            going = going.bool()
            going_on = []
            for lines in self._lines:
                places = going[lines.rows].nonzero()[:, 0]
                if len(places):
                    lines.step(tokens[lines.rows], going[lines.rows])
                    all_go_on = len(places) == len(lines.rows)
                    going_on.append(lines if all_go_on else lines.of(places, lines.rows[places]))
            self._lines = going_on

    def select(self, rows: Tensor) -> RowModels:
        """Go on with some rows as they are now, with several copies of a row that is asked for several times.

        Args:
            rows: Which ones `(C,)`, int64; none that has ended.

        Returns:
            Models of C sequences, which share nothing with each other or with these.

        Raises:
            ValueError: If a row has ended.
        """
        places = {int(row): (lines, place) for lines in self._lines for place, row in enumerate(lines.rows)}
        wanted = rows.tolist()
        if not places.keys() >= set(wanted):
            raise ValueError(f"`rows` must be rows that have not ended, {sorted(places)}, got {wanted}.")
        selected = copy.copy(self)
        selected._num_rows, selected._logits = len(wanted), None
        with row_passes(self._network.model):
            selected._lines = []
            for group in self._groups(len(wanted)):
                found = [places[wanted[new]] for new in group.tolist()]
                index = torch.tensor([place for _, place in found], device=group.device)
                selected._lines.append(found[0][0].of(index, group))  # those that share passes are together already
        return selected

    def _groups(self, num_rows: int) -> tuple[Tensor, ...]:
        """The rows that go through the network together."""
        shared = num_rows > 1 and self._network.shares_passes
        return torch.arange(num_rows, device=self._network.device).split(num_rows if shared else 1)


class _Lines:
    """Rows that go through the network together, their token ids padded on the left.

    Args:
        network: The network.
        config: How steps are made.
        rows: Which rows these are `(b,)`.
        ids: Their prompts `(b, L)`.
        mask: Where these are tokens `(b, L)`.
    """

    def __init__(self, network: RowNetwork, config: TTTConfig, rows: Tensor, ids: Tensor, mask: Tensor) -> None:
        self.rows = rows
        self._network, self._config = network, config
        self._parameters = network.new_parameters(len(rows))
        self._pending: Tensor | None = None  # logits after the last token, with their graph
        self._cache = (
            new_stale_cache(network.model.config) if config.cache == "stale" else None
        )  # all but the last token
        self._cache_after: Cache | None = None
        used = mask.any(0)
        ids, mask = ids[:, used], mask[:, used]
        begin = 1 if config.on_prompt else ids.shape[1]
        self._ids, self._mask, self._padded = ids[:, :begin], mask[:, :begin], not bool(mask.all())
        if self._cache is not None and begin > 1:
            with torch.no_grad():
                self._pass(slice(0, -1), self._cache)
        for column in range(begin, ids.shape[1]):
            # Before its prompt begins a row has nothing to make a step from.
            self.step(ids[:, column], self._mask[:, -1], real=mask[:, column])

    def logits(self) -> Tensor:
        """Logits of what comes next `(b, V)`."""
        if self._pending is None:
            self._pending = self._read()
        return self._pending.detach()

    def step(self, tokens: Tensor, active: Tensor, *, real: Tensor | None = None) -> None:
        """Make the steps of `active` rows on tokens `(b,)`, and append these; where they are not `real`, padding."""
        self.logits()
        for _ in range(self._config.num_steps):
            logits, self._pending = self._read() if self._pending is None else self._pending, None
            chosen = log_softmax(logits).gather(-1, tokens.unsqueeze(-1))
            # No row's parameters have to do with another one's tokens.
            gradients = torch.autograd.grad(chosen.sum(), self._parameters, materialize_grads=True)
            step_rows_(self._parameters, gradients, rule=self._config, start=self._network.start, active=active)
        real = torch.ones_like(active) if real is None else real
        self._ids = torch.cat([self._ids, tokens.unsqueeze(-1)], dim=1)
        self._mask = torch.cat([self._mask, real.unsqueeze(-1)], dim=1)
        self._cache, self._cache_after = self._cache_after, None

    def of(self, places: Tensor, rows: Tensor) -> _Lines:
        """Copies of the rows at some places `(c,)`, which are new `rows` `(c,)`."""
        lines = copy.copy(self)
        lines.rows, lines._ids, lines._mask = rows, self._ids[places], self._mask[places]
        lines._parameters = [theta.detach()[places].requires_grad_(True) for theta in self._parameters]
        lines._cache = None if self._cache is None else copied_cache(self._cache, places)
        lines._cache_after = lines._pending = None
        return lines

    def _read(self) -> Tensor:
        """Read on to the last token, with the graph of the whole pass or, under a stale cache, of this token."""
        if self._cache is None:
            return self._pass(slice(None), None)
        cache = copied_cache(self._cache)
        logits = self._pass(slice(-1, None), cache)
        if self._cache_after is None:  # keys and values stay what they were at first
            self._cache_after = detached_cache(cache, self._ids.shape[1])
        return logits

    def _pass(self, columns: slice, cache: Cache | None) -> Tensor:
        mask = self._mask[:, : columns.stop] if self._padded else None
        return self._network.logits(self._parameters, self._ids[:, columns], mask=mask, cache=cache)


def _check_padding(mask: Tensor) -> None:
    bad = (~mask[:, 1:] & mask[:, :-1]).any(1) | ~mask[:, -1]
    if bad.any():
        raise ValueError(
            f"`mask` must have padding on the left alone, and a token at the end, but row {int(bad.nonzero()[0])} has "
            'some elsewhere; encode with `padding_side="left"`.'
        )
