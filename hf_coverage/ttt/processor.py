"""Test-time training while decoding: after every token that is sampled, one gradient step of the output head on it.

    theta <- Proj( theta + eta grad log p_theta(y_h | x, y_<h) ),    from the same theta again for the next sequence

References:
    arXiv 2510.15020, Equations (22) and (23).
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from hf_coverage.functional.fast_weights import (
    FastWeights,
    fast_error_bound,
    fast_logits,
    fast_step,
    grow_fast_weights,
    new_fast_weights,
)
from hf_coverage.functional.ttt_config import StepRule
from hf_coverage.ttt.head_tap import HeadPass, HeadTap

__all__ = ["AdaptiveHead", "TTTLogitsProcessor", "plain_logits", "refuse_nan"]

_CAPACITY = 64
"""Steps that there is room for at first; it doubles when they are made."""


class AdaptiveHead:
    """The output heads of some sequences that are being written, each moving on its own sequence's tokens.

    Args:
        rule: How they make a step.
        has_bias: Whether they have a bias.
        capacity: Steps to make room for at first.
    """

    def __init__(self, rule: StepRule, *, has_bias: bool, capacity: int = _CAPACITY) -> None:
        self._rule = rule
        self._has_bias = has_bias
        self._capacity = capacity
        self._state: FastWeights | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, state: FastWeights | None = None) -> None:
        """Go back to the head of the model, or to a state."""
        self._last = None
        self._state = None if state is None else grow_fast_weights(state, state.length + self._capacity)

    def logits(self, hidden: Tensor, plain: Tensor) -> Tensor:
        """Logits `(B, V)` of the heads as they are now, from the inputs `(B, d)` and logits of the model's own.

        Raises:
            ValueError: If steps were so large that they are NaN.
        """
        if self._state is None:
            self._state = new_fast_weights(
                hidden, plain, rule=self._rule, capacity=self._capacity, has_bias=self._has_bias
            )
        logits = fast_logits(self._state, hidden, plain)
        refuse_nan(logits, self._rule)
        self._last = hidden, plain, logits
        return logits

    def error_bound(self) -> Tensor:
        """How far the last logits can lie from those of exact steps on the same tokens `(B,)`, in any entry."""
        if self._state is None or self._last is None:
            raise RuntimeError("There are no logits yet to bound the error of.")
        return fast_error_bound(self._state, self._last[0])

    def step(self, tokens: Tensor, *, active: Tensor | None = None) -> None:
        """Move on tokens `(B,)` that followed upon the last logits."""
        if self._state is None or self._last is None:
            raise RuntimeError(
                "A step needs the logits that its tokens were chosen from; call `logits` before `step`."
            )
        if self._state.length + self._rule.num_steps > self._state.capacity:
            self._state = grow_fast_weights(self._state, 2 * self._state.capacity + self._rule.num_steps)
        hidden, plain, logits = self._last
        self._state = fast_step(self._state, hidden, plain, tokens, logits=logits, active=active)


class TTTLogitsProcessor(LogitsProcessor):
    """Test-time training of the output head, for `generate` as it is.

        W <- Proj( W + lr (1_y - p) h^T )        after every token y, in each sequence on its own

    Give it to `generate` in `logits_processor`, alone or as the first. Sampling and greedy decoding work, with
    batches, left padding, `num_return_sequences`, any cache or none, streaming, half precision, and everything that
    changes scores after it: temperature, top-k, top-p, min-p and so on. p is the model's own softmax as it is at that
    step, whatever the sampler makes of it. Beam search, assisted and prompt-lookup decoding, continuous batching,
    guidance, and models that scale or cap their logits after the head are refused.

    The model is not changed: its head is followed in closed form, beside it. A tied input embedding stays what it is.
    The next prompt begins with the model's head again; token ids that go on from the last ones by one token are the
    same sequences going on, as in one longer call. Rows that have ended are filled up by `generate`, and what their
    heads do then touches no token that it returns. Threads may generate with one model at once, each with a processor
    of its own. Closing, leaving a `with` block or dropping the last reference takes the hooks off the model.

    Args:
        model: Causal language model with a linear output head.
        lr: Step size eta, at least 0; 0 is plain `generate`, bit for bit.
        radius: R of the ball `||W - W_0||_F <= R` that every head is kept in; None: no ball.
        decay: Part of the way back to W_0 that every step begins with, in [0, 1].
        lam: Lambda of normalised steps, `lr g / (lam + ||g||)`; None: plain gradient steps.
        top_k: Cut `1_y - p` to y and the k likeliest tokens: memory and time of a step then do not grow with the
            vocabulary, and `error_bound` says what that can have changed. None: exact.
        num_steps: Steps on each token.

    Raises:
        ValueError: If the model has no linear output head or a number is out of its range; while generating, if the
            scores are not the head's logits, or steps were so large that they became NaN.
        RuntimeError: While generating, if the head's hook did not run, or the processor is closed.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=None)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> with TTTLogitsProcessor(model, lr=1.0) as processor:
        ...     ids = model.generate(torch.tensor([[1, 2]]), max_new_tokens=6, logits_processor=[processor])
        >>> ids.shape
        torch.Size([1, 8])

    References:
        arXiv 2510.15020, Equations (22) and (23), Theorem 6.1.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        radius: float | None = None,
        decay: float = 0.0,
        lam: float | None = None,
        top_k: int | None = None,
        num_steps: int = 1,
    ) -> None:
        rule = StepRule(lr, radius, decay=decay, lam=lam, top_k=top_k, num_steps=num_steps)
        self._tap = HeadTap(model)
        self._heads = AdaptiveHead(rule, has_bias=self._tap.head.bias is not None)
        self._ids: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the adapted heads `(B, V)`, -inf where `scores` are."""
        if self._tap.closed:
            raise RuntimeError("This `TTTLogitsProcessor` is closed; make a new one.")
        before, self._ids = self._ids, None  # nothing to go on from if this call fails
        hidden, plain = plain_logits(self._tap.take(), scores)
        if before is not None and _goes_on(before, input_ids):
            self._heads.step(input_ids[:, -1])
        else:
            self._heads.begin()
        self._ids = input_ids
        # A new tensor: what comes after may write into it.
        return torch.where(scores.isneginf(), scores, self._heads.logits(hidden, plain))

    def error_bound(self) -> Tensor:
        """How far the last logits can lie from those of exact steps on the same tokens `(B,)`, in any entry.

        0 without `top_k`, up to rounding; log-probabilities differ by at most twice that.
        """
        return self._heads.error_bound()

    def reset(self) -> None:
        """Begin the next sequences with the model's own head whatever they are, and free the memory of the last."""
        self._ids = None
        self._heads.begin()

    def close(self) -> None:
        """Take the hooks off the model; a second time does nothing."""
        self.reset()
        self._tap.close()

    def __enter__(self) -> TTTLogitsProcessor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def plain_logits(last: HeadPass | None, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and logits of the head that `scores` come from, once it is certain that they do.

    Args:
        last: The head's last pass.
        scores: What `generate` hands to its logits processors `(B, V)`; -inf where it rules tokens out.

    Returns:
        `(B, d)` and `(B, V)`, the latter as `scores` where these are not -inf.

    Raises:
        RuntimeError: If the head did not run.
        ValueError: If the scores are not its logits.
    """
    if last is None:
        raise RuntimeError(
            "Test-time training did not see the output head run before these scores. If another model proposes tokens "
            "(assisted decoding) or continues from candidates (prompt lookup), generate without it. If the model was "
            "compiled before, make the processor first, or pass `disable_compile=True` to `generate`."
        )
    plain = last.logits.to(scores)
    if not torch.equal(plain, scores):
        _refuse_other_scores(last, plain, scores)
    return last.hidden.to(scores.device), plain


def refuse_nan(logits: Tensor, rule: StepRule) -> None:
    """Raise ValueError if steps led to logits that are NaN, the largest of which would be a token like any other."""
    if logits.isnan().any():
        raise ValueError(
            f"Logits became NaN after steps with lr {rule.lr}; take a smaller one, or keep the parameters near their "
            "start with `radius` or `lam`."
        )


def _refuse_other_scores(last: HeadPass, plain: Tensor, scores: Tensor) -> None:
    """Raise if scores differ from the head's logits by more than tokens that are ruled out."""
    problem = "Test-time training needs the logits of the output head as they are, but "
    if plain.shape == scores.shape:
        ruled_out = scores.isneginf()
        # Where a single token is left, as at a forced end, its score does not matter.
        free = ~ruled_out & (ruled_out.sum(-1, keepdim=True) < scores.shape[-1] - 1)
        if not ((plain != scores) & free).any():
            return
        if plain.isnan().any():
            raise ValueError(f"{problem}they are NaN: load the model in float32 or bfloat16.")
        if torch.allclose(plain.log_softmax(-1), scores, atol=1e-4):
            raise ValueError(f"{problem}these are log-probabilities, as in beam search; generate with `num_beams=1`.")
    if last.returned is not None and not torch.equal(last.returned.to(plain), plain):
        raise ValueError(
            f"{problem}the model changes them afterwards (scaling or soft-capping), and with them the gradient. There "
            "is no closed form for that; use a model without it."
        )
    raise ValueError(
        f"{problem}the scores that came are others. A processor before this one changed them: `generate` puts "
        "`repetition_penalty`, `sequence_bias`, `guidance_scale` and others first, also those of the model's "
        "`generation_config`. Switch them off there and pass their processors behind this one in `logits_processor`. "
        "Or candidates are being checked (assisted decoding, prompt lookup): generate without."
    )


def _goes_on(before: Tensor, ids: Tensor) -> bool:
    """Whether these are the same rows, one token longer."""
    return ids.shape == (before.shape[0], before.shape[1] + 1) and torch.equal(ids[:, :-1], before)
