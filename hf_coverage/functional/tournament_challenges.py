"""Counting challenges: on how many rows each candidate gives the response at least N times another's probability.

The count over M candidates and R rows takes M^2 R comparisons, so they run on parts that stay in the processor's
cache, into byte counters, on several threads. Rows are dealt into columns at random, all rows of a prompt into one
*block* of columns: the counters of the columns are then all that resampling prompts needs, at no further cost.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_coverage.functional.checks import TIE_TOLERANCE, FloatArray, check_n
from hf_coverage.functional.statistics import group_codes

__all__ = ["ChallengeCounts", "RowLayout", "count_challenges", "row_layout"]

_COLUMNS = 1024
_RUN = 32
"""Neighbouring rows that are read together."""
_AT_ONCE = 16
"""Defenders compared in one call: fewer calls, so that the comparisons take the time."""
_COUNTER_BYTES = 64 * 2**20
"""Memory of one thread's counters."""


class RowLayout(NamedTuple):
    """Rows dealt into columns at random, layer upon layer; the rows of a prompt are in columns of one block.

    Attributes:
        order: `(R,)` rows, layer after layer.
        widths: `(H,)` columns that each layer fills, from the first column on; they never grow.
        block: `(C,)` the block of each column.
        block_of_row: `(R,)` the block of each row.
        num_blocks: G, the units that a bootstrap resamples.
        num_groups: Distinct prompts.
    """

    order: NDArray[np.intp]
    widths: NDArray[np.intp]
    block: NDArray[np.intp]
    block_of_row: NDArray[np.uint16]
    num_blocks: int
    num_groups: int


class ChallengeCounts(NamedTuple):
    """Counts against a few defenders.

    Attributes:
        defenders: T indices of candidates.
        counts: `(K, T, M, C)` how often, for each N, each candidate challenges each defender within each column.
    """

    defenders: Sequence[int]
    counts: NDArray[np.int32]


def row_layout(
    num_rows: int,
    *,
    groups: Iterable[Any] | None = None,
    seed: int | Sequence[int] = 0,
    shuffle: bool = False,
    max_blocks: int = _COLUMNS,
) -> RowLayout:
    """Deal rows into columns at random, keeping the rows of a prompt in one block.

    Up to `max_blocks` prompts make a block each. More prompts are gathered at random into `max_blocks` blocks of
    (nearly) equally many: the variance between random blocks is the variance between prompts, only estimated from
    fewer numbers.

    Args:
        num_rows: R.
        groups: `(R,)` the prompt of each row; None takes every row as its own.
        seed: Seed of the deal.
        shuffle: Whether the layers come in random order too, so that the first ones are a random sample of the rows.
            Otherwise rows that are neighbours come in layers that are neighbours, which is faster to read.
        max_blocks: Most blocks to make.

    Returns:
        The layout.

    Raises:
        ValueError: If there is not one group a row.
    """
    rng = np.random.default_rng(seed)
    group = np.arange(num_rows) if groups is None else _group_of_row(groups, num_rows)
    num_groups = int(group.max()) + 1
    num_blocks = min(num_groups, max_blocks)
    sequence = rng.permutation(num_groups) if shuffle else _random_nearby(num_groups, num_blocks, rng)
    turn = np.empty_like(sequence)
    turn[sequence] = np.arange(num_groups)
    rows = sequence if groups is None else np.argsort(turn[group], kind="stable")
    # 16 bits: a stable sort of them is a radix sort
    block = (turn % num_blocks).astype(np.uint16)[group]
    rows = rows[np.argsort(block[rows], kind="stable")]
    sizes = np.bincount(block, minlength=num_blocks)
    # A block of many rows gets several columns: layers that are wide and few make the comparisons long and few.
    columns = np.maximum(1, np.rint(sizes * min(1.0, _COLUMNS / num_rows)).astype(np.intp))
    place = np.arange(num_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    layer, inside = np.divmod(place, np.repeat(columns, sizes))
    column = np.repeat(np.cumsum(columns) - columns, sizes) + inside
    heights = np.bincount(column, minlength=columns.sum())
    tallest_first = np.argsort(-heights, kind="stable")
    position = np.empty_like(tallest_first)
    position[tallest_first] = np.arange(tallest_first.size)
    widths = np.bincount(layer)
    order = np.empty_like(rows)
    order[(np.cumsum(widths) - widths)[layer] + position[column]] = rows
    block_of_column = np.repeat(np.arange(num_blocks), columns)[tallest_first]
    return RowLayout(order, widths, block_of_column, block, num_blocks, num_groups)


def count_challenges(
    table: Sequence[FloatArray],
    n: Sequence[float],
    layout: RowLayout,
    *,
    defenders: Sequence[int] | None = None,
    layers: range | None = None,
    num_threads: int | None = None,
) -> Iterator[ChallengeCounts]:
    """Count, for every N, on how many rows `L[a,i] - L[b,i] >= log N`, by columns of the layout.

    A finite challenger beats -inf; -inf against -inf is no challenge. A difference within `TIE_TOLERANCE` counts as
    reached. The memory beyond the table is 64 MiB and two layers of rows a thread.

    Args:
        table: M arrays `(R,)`, log p of each candidate, nats.
        n: K real numbers >= 1.
        layout: The column of each row.
        defenders: Candidates b to count against; None takes all.
        layers: Layers of the layout to read; None reads all.
        num_threads: Threads; None takes one for each processor, at most 8.

    Yields:
        Counts for some defenders at a time, in order.
    """
    chosen = list(range(len(table)) if defenders is None else defenders)  # a list also indexes an array
    reading = range(layout.widths.size) if layers is None else layers
    threads = max(1, min(8, _num_processors(), len(reading)) if num_threads is None else num_threads)
    # one byte and one 32-bit counter for each N, challenger and column
    at_once = max(1, _COUNTER_BYTES // (5 * len(n) * len(table) * layout.block.size))
    thresholds = np.log([check_n(value) for value in n]) - TIE_TOLERANCE
    # Threads share the layers and not the defenders, so that each row is gathered once.
    shares = [reading[len(reading) * i // threads : len(reading) * (i + 1) // threads] for i in range(threads)]
    # numpy copies an operand that it broadcasts through a buffer wherever it fits one: a smaller buffer saves a third
    # of the time. The setting belongs to the threads of the pool.
    with ThreadPoolExecutor(threads, initializer=np.setbufsize, initargs=(512,)) as pool:
        for start in range(0, len(chosen), at_once):
            tile = chosen[start : start + at_once]
            parts = pool.map(partial(_count_tile, table, thresholds, layout, tile), shares)
            yield ChallengeCounts(tile, reduce(np.add, parts))


def _count_tile(
    table: Sequence[FloatArray], thresholds: FloatArray, layout: RowLayout, defenders: Sequence[int], layers: range
) -> NDArray[np.int32]:
    shape = (len(thresholds), len(defenders), len(table), layout.block.size)
    totals, bytes_ = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    reached = np.empty((min(_AT_ONCE, len(defenders)), *shape[-2:]), bool)
    starts = np.cumsum(layout.widths) - layout.widths
    for done, layer in enumerate(layers, start=1):
        width = layout.widths[layer]
        rows = layout.order[starts[layer] : starts[layer] + width]
        if (np.diff(rows) == 1).all():  # in their own order they need no gathering
            block = np.stack([values[rows[0] : rows[-1] + 1] for values in table])
        else:
            block = np.stack([np.take(values, rows) for values in table])
        for k, threshold in enumerate(thresholds):
            # Adding to the defender differs from subtracting it by rounding, far below the tolerance. The lowest
            # float in place of -inf lets every finite challenger reach it, and no infinite one.
            bars = np.maximum(block[defenders] + threshold, np.finfo(np.float64).min)
            for first in range(0, len(defenders), _AT_ONCE):
                counters = bytes_[k, first : first + _AT_ONCE, :, :width]
                hits = reached[: len(counters), :, :width]
                np.greater_equal(block, bars[first : first + _AT_ONCE, None], out=hits)
                np.add(counters, hits.view(np.uint8), out=counters)
        if done % 255 == 0:
            totals += bytes_
            bytes_[:] = 0
    totals += bytes_
    for place, defender in enumerate(defenders):
        totals[:, place, defender] = 0
    return totals


def _group_of_row(groups: Iterable[Any], num_rows: int) -> NDArray[np.intp]:
    """Number the groups in the order in which they first appear."""
    codes = group_codes(groups)
    if codes.shape != (num_rows,):
        raise ValueError(f"`groups` must have one label a row, {num_rows} in all, but has {codes.size}.")
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    number = np.empty_like(first)
    number[np.argsort(first)] = np.arange(first.size)
    return number[inverse]


def _random_nearby(count: int, window: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """A random order of `count` numbers in which neighbours stay within `window` places of each other.

    Runs of neighbours are put in random order, and the numbers are shuffled within windows of it. Reading in this
    order uses a cache line while it is there; a block gets one number of each window, hence of different runs.
    """
    if window == 1:
        return np.arange(count)
    runs = rng.permutation(-(-count // _RUN))
    order = (runs[:, None] * _RUN + np.arange(_RUN)).ravel()
    order = order[order < count]
    return order[np.argsort(np.arange(count) // window + rng.random(count))]


def _num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
