# SPDX-License-Identifier: Apache-2.0
"""The tiles of the simt kernels, and what forward and backward do alike with them.

A block of THREADS threads owns a tile of queries of one head, or a tile of KEYS keys, and walks the
tiles of the other. The threads form a grid of DOWN x ACROSS: each has some rows of the query tile
and, of these, EACH keys' scores, then EACH of every SLICE columns of a result. Both factors of a
product pass through shared memory, a slice of SLICE columns at a time.

Named tuples carry what belongs together through the kernels. A device function may not ask whether
a field of one is None: factories tell it, from what is `Given`.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple  # Numba does not know typing.NamedTuple
from typing import Any, NamedTuple

import numpy as np
from numba.cuda import types

from fastattn._arguments import FARTHEST
from fastattn.cuda.kernels.elements import accumulator, array, device, element, integers
from fastattn.cuda.kernels.tiles import SIMT_ROWS as ROWS

ACROSS, DOWN = 8, 16  # threads along the keys (or columns) and along the rows of a tile
THREADS = ACROSS * DOWN
EACH = 4  # keys, or columns of a chunk, that a thread has; dropout's random numbers come in fours
KEYS = ACROSS * EACH  # of a tile
SLICE = ACROSS * EACH  # columns of queries, keys or values that shared memory holds at a time
PITCH = SLICE + 1  # of such a slice's rows: columns are then spread over the memory banks
LOW_WORD = np.uint64(2**32 - 1)
WORD_BITS = np.uint64(32)
MANY = 64  # up to so many columns, a tile has all of ROWS

# The arguments that every kernel ends with. Its arrays are None where they are absent.
Call = namedtuple(
    "Call",
    [
        "mask",  # (batch, heads, q_len, kv_len), as bias
        "bias",
        "alibi_slopes",  # (batch, heads)
        "lengths",  # int64 (batch,): kv_lengths and query_offset, one for each batch element
        "offsets",
        "key_offsets",  # likewise, of the first key, for dropout
        "length",  # int64, one for all. All are clamped to what is possible
        "offset",
        "key_offset",
        "left",  # int64: the window, 2**62 if unlimited; causal is right = 0
        "right",
        "scale",  # float32, or float64 for float64
        "softcap",  # as scale, or None
        "dropped",  # int64: round(dropout_p * 2**32)
        "seed_low",  # int64: the halves of the seed, each below 2**32
        "seed_high",
        "kept_scale",  # as scale: 1 / (1 - dropout_p), or 1 if nothing is kept
        "first_head",  # int64: what is added to head and batch for dropout
        "first_batch",
    ],
)
# Which keys the rows of a batch element see; and, for dropout, what is added to positions.
Window = namedtuple("Window", "left right length offset first_key")


def bucket(head_dim: int) -> int:
    """Return the least power of 2, and multiple of SLICE, that has room for the head_dim."""
    return max(SLICE, 1 << (head_dim - 1).bit_length())


def rows_of(query_dtype: str, columns: int) -> int:
    """Return the rows of a tile: with more columns fewer, so that sums stay in registers."""
    return max(DOWN, ROWS[query_dtype] * MANY // max(columns, MANY))


class Given(NamedTuple):
    """What a call has that decides the scores: the dtype of each array, or None, and what else."""

    query: str  # float16, bfloat16, float32 or float64; of out too
    key: str  # of key and value: the same, or 16-bit beside a float32 query
    mask: str | None = None  # a dtype as of the query, or bool
    bias: str | None = None
    alibi_slopes: str | None = None
    softcap: bool = False
    dropout: bool = False
    lengths: bool = False
    offsets: bool = False
    key_offsets: bool = False

    @property
    def hides_pairs(self) -> bool:
        """Whether pairs may be hidden one by one."""
        return self.mask is not None or self.bias is not None

    @property
    def call(self) -> Any:
        """Numba's type of `Call`."""
        number, whole = accumulator(self.query), types.int64
        kinds = Call(
            array(self.mask, 4),
            array(self.bias, 4),
            array(self.alibi_slopes, 2),
            integers(self.lengths, 1),
            integers(self.offsets, 1),
            integers(self.key_offsets, 1),
            *(whole,) * 5,
            number,
            number if self.softcap else types.none,
            *(whole,) * 3,
            number,
            *(whole,) * 2,
        )
        return types.NamedTuple(kinds, Call)

    def name(self, stem: str, *sizes: int, **more: str | bool | None) -> str:
        """Return a kernel's symbol: what it is, and all that it is specialised for."""
        return symbol(stem, self.query, self.key, *sizes, **self._asdict() | more)


def symbol(*parts: object, query: object = None, key: object = None, **given: object) -> str:
    """Return the parts, and the names of what is given, as one name."""
    words = [str(part) for part in parts]
    for name, what in given.items():
        if what:
            words.append(name if what is True else f"{name}_{what}")
    return "_".join(words)


# --- Which pairs ---------------------------------------------------------------------------------


@device
def window_of(call, batch, kv_len):
    """Return what the rows of a batch element see."""
    length = one_within(call.lengths, call.length, batch, 0, kv_len)
    offset = one_within(call.offsets, call.offset, batch, -FARTHEST, FARTHEST)
    first_key = one_within(call.key_offsets, call.key_offset, batch, -FARTHEST, FARTHEST)
    return Window(call.left, call.right, length, offset, first_key)


@device
def one_within(each, for_all, batch, low, high):
    """Return a batch element's own number, or the one for all, clamped."""
    x = for_all
    if each is not None:
        x = each[batch]
    return max(low, min(x, high))


@device
def keys_of_row(row, window):
    """Return the first key that a row may see, and the one behind the last."""
    position = row + window.offset
    return max(0, position - window.left), min(window.length, position + window.right + 1)


@device
def is_flagged(flags, rows_per_flag, first, end):
    """Return whether any of the rows first..end - 1 has a flag that is set."""
    any_set = 0
    for n in range(first // rows_per_flag, (end - 1) // rows_per_flag + 1):
        any_set |= flags[n]
    return any_set != 0


@device
def random_words(call, batch, head, row, key, window):
    """Return the random words of a row with a key and the three behind it."""
    position, first = row + window.offset + window.first_key, key + window.first_key
    w0, w1, w2, w3 = philox(call, batch, head, position, first >> 2)
    within = first & 3
    if within == 0:
        return w0, w1, w2, w3
    more0, more1, more2, _ = philox(call, batch, head, position, (first >> 2) + 1)
    if within == 1:
        return w1, w2, w3, more0
    if within == 2:
        return w2, w3, more0, more1
    return w3, more0, more1, more2


@device
def philox(call, batch, head, position, fours):
    """Return the random words of four keys: Philox4x32 with 7 rounds, as in reference.py."""
    x0, x1 = types.uint64(fours & 0xFFFFFFFF), types.uint64(position & 0xFFFFFFFF)
    x2 = types.uint64((head + call.first_head) & 0xFFFFFFFF)
    x3 = types.uint64((batch + call.first_batch) & 0xFFFFFFFF)
    key0, key1 = types.uint64(call.seed_low), types.uint64(call.seed_high)
    for _ in range(7):
        first = x0 * np.uint64(0xD2511F53)
        second = x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (second >> WORD_BITS) ^ x1 ^ key0, second & LOW_WORD
        x2, x3 = (first >> WORD_BITS) ^ x3 ^ key1, first & LOW_WORD
        key0 = (key0 + np.uint64(0x9E3779B9)) & LOW_WORD
        key1 = (key1 + np.uint64(0xBB67AE85)) & LOW_WORD
    return types.int64(x0), types.int64(x1), types.int64(x2), types.int64(x3)


# --- Scores --------------------------------------------------------------------------------------


@functools.cache
def loader(dtype: str, query_dtype: str) -> Any:
    """Return the function that brings a slice of an array into shared memory."""
    widen, zero = element(dtype).widen, accumulator(query_dtype)(0)

    @device
    def load(tile, source, first_row, first_column, thread):
        """Fill the tile from there on; 0 behind the ends of the source."""
        column = first_column + thread % SLICE
        for r in range(thread // SLICE, tile.shape[0], THREADS // SLICE):
            value = zero
            if first_row + r < source.shape[0] and column < source.shape[1]:
                value = widen(source[first_row + r, column])
            tile[r, thread % SLICE] = value

    return load


@device
def multiply(sums, left, right, row, key, depth):
    """Add to a thread's scores the products of its rows and its keys, over columns of a slice."""
    for column in range(depth):
        for i in range(len(sums) // EACH):
            x = left[row + i, column]
            for j in range(EACH):
                sums[i * EACH + j] += x * right[key + j, column]


class Scoring(NamedTuple):
    """Device functions for what is done to a score between the product and softmax."""

    is_hidden: Any
    with_added: Any


@functools.cache
def scoring(given: Given) -> Scoring:
    """Return the functions for these dtypes."""
    number = accumulator(given.query)
    has_mask, has_bias, has_slopes = (
        dtype is not None for dtype in (given.mask, given.bias, given.alibi_slopes)
    )
    widen_mask, widen_bias, widen_slope = (
        None if dtype is None else element(dtype).widen
        for dtype in (given.mask, given.bias, given.alibi_slopes)
    )
    minus_inf = np.float32(-math.inf)

    @device
    def is_hidden(call, batch, head, row, key):
        """Return whether the mask or the bias hides a pair."""
        hidden = False
        if has_mask:
            hidden = widen_mask(call.mask[batch, head, row, key]) == minus_inf
        if has_bias:
            hidden = hidden or widen_bias(call.bias[batch, head, row, key]) == minus_inf
        return hidden

    @device
    def with_added(score, call, batch, head, row, key, position):
        """Return the score with what bias, mask and ALiBi add to it."""
        if has_bias:
            score += number(widen_bias(call.bias[batch, head, row, key]))
        if has_mask:
            score += number(widen_mask(call.mask[batch, head, row, key]))
        if has_slopes:
            slope = number(widen_slope(call.alibi_slopes[batch, head]))
            score -= slope * number(abs(key - position))
        return score

    return Scoring(is_hidden, with_added)


# --- Results -------------------------------------------------------------------------------------


@functools.cache
def finiteness(dtype: str) -> Any:
    """Return the function that looks for what is not finite in results of the dtype."""
    widen = element(dtype).widen

    @device
    def is_part_finite(results, row, first_column):
        """Tell of the columns of a row that one thread has, from its first on."""
        for first in range(first_column, results.shape[1], SLICE):
            for column in range(first, min(first + EACH, results.shape[1])):
                if not math.isfinite(widen(results[row, column])):
                    return False
        return True

    return is_part_finite
