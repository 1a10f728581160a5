"""Arithmetic codes: a number in [0, 1) names a response, and numbers spread over [0, 1) name responses spread over p.

The responses of a model to a prompt partition [0, 1). A token's part of its prefix's interval is as long as its
probability, in the order of token ids, so that a response's interval is as long as p(y|x). The response whose interval
holds a uniform code is a sample of p. Stratified codes, one uniform on each `[j/N, (j+1)/N)`, give N samples of p that
find more between them than independent ones.

**Theorem S.** Let N responses be drawn independently, with laws P_1 ... P_N whose mean is p. For every set A

    P(none in A) = prod_j (1 - P_j(A)) <= (1 - p(A))^N,        P(all in A) = prod_j P_j(A) <= p(A)^N,

with the right-hand sides those of N independent samples of p. *Proof:* the geometric mean of numbers in [0, 1] is at
most their arithmetic mean. So Pass@N is at least that of independent samples for every verifier and, by the sets
`{reward >= t}`, so is the expected reward of the best, for every reward. A code uniform on stratum j has
`P_j(A) = N |A_j|`, A_j being what A has of the stratum; in random order each response is a sample of p by itself.

The first N of the nested codes (Owen's scrambling of van der Corput's sequence) are never worse either, for any N:
`E prod_i g(c_i) <= (int g)^N` for every g >= 0, of which 1 - 1_A and 1_A are two. *Proof:* let `2^m <= N < 2^(m+1)`.
Each stratum of length 2^-m holds one of the first 2^m codes; the others are siblings of the first N - 2^m, in the
other halves of their strata. Given the strata, a code alone in its stratum j contributes g_j, the mean of g over it,
and two siblings the means over the halves, whose product is at most g_j^2. So the left side is at most `prod_j g_j`,
itself at most `(int g)^(2^m)`, times the same expectation for N - 2^m codes and the function that is g_j on stratum j.

References:
    arXiv 2210.15458 (arithmetic sampling, on a lattice); Owen, "Monte Carlo variance of scrambled net quadrature",
    1997. The linear scrambling of `scipy.stats.qmc.Sobol` and of torch's `SobolEngine` makes points only pairwise
    independent inside strata: the theorem does not hold for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hf_coverage.functional.checks import FloatArray, check_logprobs

__all__ = [
    "CodeState",
    "Decoded",
    "TokenParts",
    "check_intervals",
    "decode_token",
    "nested_codes",
    "response_intervals",
    "stratified_codes",
    "stratified_pass_probabilities",
    "token_parts",
]

_DIGIT = 2.0**-53
"""What the last binary digit of a code is worth: `torch.rand` and `numpy` draw multiples of it."""

_BELOW_ONE = 1.0 - _DIGIT

_NARROW = 2.0**-16
"""Length of a prefix's interval, below which a code has told all that strata are for, and each further token has a
number of its own. Reading on would make the rounding of probabilities, 1e-7, and in the end that of the code's last
digit, as large as its first: which token is chosen would hang on the batch that a row is in, or its law be lost."""


class CodeState(NamedTuple):
    """Where rows are in the intervals of their prefixes.

    Args:
        codes: The codes, the prefix's interval stretched to [0, 1) `(B,)`, float64.
        lengths: How long the interval is `(B,)`, float64; 1 before the first token.
    """

    codes: Tensor
    lengths: Tensor


class Decoded(NamedTuple):
    """A token for each row.

    Args:
        tokens: Token ids `(B,)`.
        state: Where each row is in the token's own interval.
        probabilities: The tokens' probabilities `(B,)`, float64; NaN where a row has none.
    """

    tokens: Tensor
    state: CodeState
    probabilities: Tensor


class TokenParts(NamedTuple):
    """Which parts of their prefixes' intervals tokens have.

    Args:
        below: The probability of all tokens of lower ids `(...)`, float64.
        probabilities: Their own `(...)`, float64.
    """

    below: Tensor
    probabilities: Tensor


def nested_codes(uniforms: Tensor) -> Tensor:
    """Turn independent uniform numbers into nested codes.

    The first 2^m codes lie in different strata of length 2^-m, independent and uniform inside. More codes leave those
    that are there as they are, and every aligned block of 2^m codes is stratified like the first one.

    Args:
        uniforms: Independent and uniform on [0, 1) `(..., n)`, float64; the k-th code depends on the first k.

    Returns:
        Codes `(..., n)`.

    Raises:
        TypeError: If `uniforms` are not float64.
        ValueError: If there are none.

    Example:
        >>> codes = nested_codes(torch.tensor([0.7, 0.5, 0.1, 0.6], dtype=torch.float64))
        >>> codes.tolist(), sorted((4 * codes).long().tolist())
        ([0.7, 0.25, 0.775, 0.15], [0, 1, 2, 3])
    """
    _check_uniforms(uniforms)
    codes = uniforms[..., :1]
    while codes.shape[-1] < uniforms.shape[-1]:
        size = codes.shape[-1]
        new = uniforms[..., size : 2 * size]
        # The first digit that the codes before did not share out is each one's own coin; its sibling has the other.
        halves = (codes[..., : new.shape[-1]] * (2 * size)).floor()
        siblings = halves + 1 - 2 * halves.remainder(2)
        codes = torch.cat([codes, _inside(siblings, new, 2 * size)], dim=-1)
    return codes


def stratified_codes(uniforms: Tensor, keys: Tensor) -> Tensor:
    """Turn independent uniform numbers into N codes, one in each of N strata, in random order.

    For a power of two these are nested codes, whose aligned blocks are stratified as well.

    Args:
        uniforms: Independent and uniform on [0, 1) `(..., N)`, float64.
        keys: Likewise; they decide the order where N is no power of two.

    Returns:
        Codes `(..., N)`.

    Raises:
        TypeError: If `uniforms` are not float64.
        ValueError: If there are none.

    Example:
        >>> draws = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> sorted((3 * stratified_codes(*draws)).long().tolist())
        [0, 1, 2]
    """
    _check_uniforms(uniforms)
    size = uniforms.shape[-1]
    if size & (size - 1) == 0:
        return nested_codes(uniforms)
    return _inside(keys.argsort(dim=-1).double(), uniforms, size)


def decode_token(probabilities: Tensor, state: CodeState, digits: Tensor) -> Decoded:
    """Choose the token whose part of [0, 1) holds the code, and stretch that part to [0, 1).

    Cumulative sums run in float64, first over blocks of tokens and then in the block that holds the code: an interval
    inside an interval, as tokens are inside their prefix. A token of probability 0 is never chosen.

    A double has 53 digits, and a token uses up `-log2 p` of them. Those that come into reach are drawn when they do,
    so that a token gets its share however unlikely it is. Where the prefix's interval is narrow all digits are: given
    what was read the code is uniform, so that the late tokens of long responses have their law as well. Two codes on
    either side of a stratum's end may then have the same prefix; their laws keep their mean, and Theorem S holds.

    Args:
        probabilities: `(B, V)`, non-negative; they need not sum up to 1. NaN is seen in the result.
        state: Where each row is in the interval of its prefix.
        digits: Fresh numbers, uniform on [0, 1) `(B,)`, float64.

    Returns:
        The tokens, and where each row then is.

    Example:
        >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
        >>> tokens, state, own = decode_token(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), CodeState(one / 2, one), zero)
        >>> tokens.item(), state.codes.item(), own.item()
        (2, 0.0, 0.25)
    """
    vocabulary = probabilities.shape[-1]
    size = math.isqrt(vocabulary - 1) + 1
    whole = vocabulary // size * size
    masses = probabilities[:, :whole].unflatten(-1, (-1, size)).sum(-1, dtype=torch.float64)
    if whole < vocabulary:
        rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        masses = torch.cat([masses, rest], dim=-1)
    block, codes, block_share = _decode_part(masses, state.codes)
    tokens = block[:, None] * size + torch.arange(size, device=block.device)
    members = probabilities.gather(-1, tokens.clamp(max=vocabulary - 1)).double()
    place, codes, share = _decode_part(members.masked_fill(tokens >= vocabulary, 0.0), codes)
    share = share * block_share
    lengths = state.lengths * share
    codes = torch.where(lengths < _NARROW, digits, codes + digits * (_DIGIT / share)).clamp(max=_BELOW_ONE)
    # A row of NaN or zeros ends in the padding of the last block.
    chosen = (block * size + place).clamp(max=vocabulary - 1)
    return Decoded(chosen, CodeState(codes, lengths), share)


def token_parts(logits: Tensor, labels: Tensor) -> TokenParts:
    """Say which part of its prefix's interval each of given tokens has, as `decode_token` cuts them.

    Args:
        logits: `(..., V)` of any floating dtype, at the positions that predict the labels.
        labels: Token ids `(...)`, int64.

    Returns:
        Where the parts begin, and how long they are.

    Example:
        >>> parts = token_parts(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor(1))
        >>> parts.below.item(), parts.probabilities.item()
        (0.5, 0.25)
    """
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    lower = torch.arange(logits.shape[-1], device=logits.device) < labels[..., None]
    total = probabilities.sum(-1, dtype=torch.float64)
    below = torch.where(lower, probabilities, 0.0).sum(-1, dtype=torch.float64)
    own = probabilities.gather(-1, labels[..., None])[..., 0].double()
    return TokenParts(below / total, own / total)


def response_intervals(parts: TokenParts, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the intervals of responses from the parts that their tokens have in one another.

        low = sum_h below_h prod_{i<h} p_i,        length = prod_h p_h

    The tokens of all lower ids are needed at every position, so no sum of token log-probabilities gives an interval.

    Args:
        parts: Of the tokens `(..., H)`, each given what is before it.
        mask: Boolean `(..., H)`, true at the response's tokens; None takes all.

    Returns:
        Where they begin, and the logarithm of how long they are in nats, log p(y|x): `(...)` each, float64.

    Example:
        >>> below, own = torch.tensor([[0.5, 0.0]]).double(), torch.tensor([[0.25, 0.5]]).double()
        >>> low, log_length = response_intervals(TokenParts(below, own))
        >>> low.item(), round(log_length.exp().item(), 6)
        (0.5, 0.125)
    """
    below, own = parts
    if mask is not None:
        below, own = below.where(mask, 0.0), own.where(mask, 1.0)
    before = torch.cat([torch.ones_like(own[..., :1]), own[..., :-1].cumprod(-1)], dim=-1)
    return (below * before).sum(-1), own.log().sum(-1)


def stratified_pass_probabilities(low: ArrayLike, logprobs: ArrayLike, n: float) -> FloatArray:
    """Probability of each single right response to be among N stratified samples: `1 - prod_j (1 - N a_j)`.

    a_j is what its interval has of stratum j. Where the interval holds a whole stratum it is found for certain;
    otherwise it lies in one stratum or in two.

    Args:
        low: Where the intervals begin `(R,)`, see `response_intervals`.
        logprobs: The logarithms of their lengths `(R,)`, log p(y|x) in nats; -inf is legal.
        n: Number N of samples, any whole number.

    Returns:
        `(R,)`, never below `pass_probabilities` of independent samples.

    Raises:
        ValueError: If `n` is not a whole number of at least 1, or a number is none that an interval has; names the
            row.

    Example:
        >>> import math
        >>> stratified_pass_probabilities([0.0, 0.375], [math.log(0.25), math.log(0.25)], n=2).round(4)
        array([0.5   , 0.4375])

    References:
        Theorem S, in this module's docstring.
    """
    if n != int(n) or n < 1:
        raise ValueError(f"`n` must be a whole number of samples, at least 1, but is {n}.")
    begins, lengths = check_intervals(low, logprobs), np.exp(np.minimum(check_logprobs(logprobs), 0.0))
    begins, lengths = n * np.minimum(begins, 1.0), n * lengths  # strata of length 1
    first = np.minimum(lengths, np.floor(begins) + 1 - begins)
    rest = lengths - first
    # Up to two strata are touched in part where none is held whole.
    with np.errstate(divide="ignore"):
        misses = np.log1p(-np.minimum(first, 1.0)) + np.log1p(-np.minimum(rest, 1.0))
    return -np.expm1(misses)


def check_intervals(low: ArrayLike, logprobs: ArrayLike) -> FloatArray:
    """Where intervals in [0, 1] begin, checked with the logarithms of their lengths, nats: `(R,)` each.

    Raises:
        ValueError: If they are not of the same rows, or a number is none that an interval has; names the row.
    """
    lengths, begins = np.exp(np.minimum(check_logprobs(logprobs), 0.0)), np.asarray(low, dtype=np.float64)
    if begins.shape != lengths.shape:
        raise ValueError(f"`low` must have one entry a row, {lengths.shape}, but has shape {begins.shape}.")
    bad = np.flatnonzero(~((begins >= 0) & (begins + lengths <= 1 + _SLACK)))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"`low` must be where an interval of length exp(`logprobs`) begins in [0, 1], but row {row} begins at "
            f"{begins[row]} and has length {lengths[row]}."
        )
    return begins


_SLACK = 1e-6
"""How far beyond 1 rounding of float32 log-probabilities may bring the end of an interval."""


def _check_uniforms(uniforms: Tensor) -> None:
    if uniforms.dtype != torch.float64:
        raise TypeError(f"`uniforms` must be float64, as codes of fewer digits repeat, got {uniforms.dtype}.")
    if uniforms.shape[-1] == 0:
        raise ValueError("`uniforms` must hold a number for each code, got none.")


def _inside(strata: Tensor, uniforms: Tensor, number: int) -> Tensor:
    """Points `(strata + uniforms) / number`, held in their strata where the sum is rounded up."""
    ends = torch.nextafter((strata + 1) / number, strata.new_zeros(()))
    return torch.minimum((strata + uniforms) / number, ends)


def _decode_part(weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the parts `(B, n)` hold the codes `(B,)`, the codes inside of them, and the parts' shares `(B,)`."""
    ends = _cumulative(weights)
    total = ends[:, -1]
    places = codes * total
    positive = weights > 0
    holds = positive & (ends > places[:, None])
    # The place of a code next to 1 may be rounded up to the total, and be in the last part that is there.
    last = weights.shape[-1] - 1 - positive.flip(-1).int().argmax(-1)
    index = torch.where(holds.any(-1), holds.int().argmax(-1), last)
    own = weights.gather(-1, index[:, None])[:, 0]
    below = ends.gather(-1, index[:, None])[:, 0] - own
    return index, ((places - below) / own).clamp(0.0, _BELOW_ONE), own / total


def _cumulative(weights: Tensor) -> Tensor:
    if weights.is_cuda and torch.are_deterministic_algorithms_enabled():  # where CUDA has no cumulative sums
        return weights.cpu().cumsum(-1).to(weights.device)
    return weights.cumsum(-1)
