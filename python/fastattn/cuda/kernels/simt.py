# SPDX-License-Identifier: Apache-2.0
"""Attention in plain Numba: the kernel to read first, and the one that knows every argument.

`forward` makes a kernel for what a call has; `_forward.py` launches it for whatever the
tensor-core kernels have no room for (float32 and float64, mask, bias, dropout, ...), and once more
behind them for rows that came out not finite (see `flags`). It runs unchanged under Numba's
simulator, where tests/test_cuda_simt.py compares it with `fastattn.reference`.

The form is FlashAttention's [1]_. A block of THREADS threads owns a tile of queries of one head and
goes along the keys, KEYS at a time. The threads form a grid of DOWN x ACROSS: each has some rows of
the tile and, of these, four keys' scores, then four of every 32 columns of the output::

    scores = queries @ keys.T       both read through shared memory, a slice of head_dim at a time
    the row's maximum so far, probabilities relative to it; these go to shared memory
    sums of this tile = probabilities @ values;  sums = sums * decay + sums of this tile

Every tile's sums start from zero, and every GROUP tiles' sums do too, which keeps rounding errors
small with many keys. A probability of HIDDEN marks a pair that is masked: it is skipped, since
whatever lies in that key, 0 * NaN would be NaN.

.. [1] T. Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from fastattn.cuda.kernels import Kernel

ACROSS, DOWN = 8, 16  # threads along the keys (or columns) and along the rows of a tile
THREADS = ACROSS * DOWN
EACH = 4  # keys, or columns of a chunk, that a thread has; dropout's random numbers come in fours
KEYS = ACROSS * EACH  # of a tile
SLICE = ACROSS * EACH  # columns of queries, keys or values that shared memory holds at a time
PITCH = SLICE + 1  # of such a slice's rows: columns are then spread over the memory banks
GROUP = 32  # tiles of keys whose sums are added up before they join the others
HIDDEN = -1.0  # the probability, or the sum of the probabilities, of pairs that are all masked
FARTHEST = 2**61  # positions lie within -FARTHEST..FARTHEST
LOW_WORD = np.uint64(2**32 - 1)
WORD_BITS = np.uint64(32)

# Of up to MANY columns. float64 takes twice the room in shared memory and registers.
MANY = 64
ROWS = {"float16": 64, "bfloat16": 64, "float32": 64, "float64": 32}

# The simulator has no `forceinline`, and device functions in it must not use `cuda`.
device = functools.partial(
    cuda.jit, device=True, **({} if config.ENABLE_CUDASIM else {"forceinline": True})
)


class Element(NamedTuple):
    """How a kernel reads and writes the elements of an array."""

    stored: Any  # Numba's type of an element
    widen: Any  # stored -> float32 or float64
    narrow: Any  # float32 (of float64: float64) -> stored


@device
def _same(x):
    return x


@device
def _added_by(attend):
    """Return what a bool mask adds to a score."""
    return np.float32(0) if attend else np.float32(-math.inf)


I16, I32, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


@intrinsic
def _widen_float16(typingctx, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], HALF), FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_float16(typingctx, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], HALF), I16)

    return types.uint16(types.float32), generate


@intrinsic
def _widen_bfloat16(typingctx, bits):
    def generate(context, builder, signature, arguments):
        upper = builder.shl(builder.zext(arguments[0], I32), I32(16))
        return builder.bitcast(upper, FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_bfloat16(typingctx, x):
    """Round to nearest, ties to even; in integers, since sm_75 has no instruction for it."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], I32)
        upper = builder.lshr(bits, I32(16))
        odd = builder.and_(upper, I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, builder.or_(upper, I32(0x40)), rounded), I16)

    return types.uint16(types.float32), generate


def element(dtype: str) -> Element:
    """Return how elements of the dtype are read: of 16-bit floats, a kernel gets the bits."""
    if config.ENABLE_CUDASIM and dtype in ("float16", "bfloat16"):
        return Element(types.uint16, np.float32, _same)
    return {
        "float16": Element(types.uint16, _widen_float16, _narrow_float16),
        "bfloat16": Element(types.uint16, _widen_bfloat16, _narrow_bfloat16),
        "float32": Element(types.float32, _same, _same),
        "float64": Element(types.float64, _same, _same),
        "bool": Element(types.boolean, _added_by, None),
    }[dtype]


def accumulator(dtype: str) -> Any:
    """Return the type that everything is computed in for a query of the dtype."""
    return types.float64 if dtype == "float64" else types.float32


def bucket(head_dim: int) -> int:
    """Return the least power of 2, and multiple of SLICE, that has room for the head_dim."""
    return max(SLICE, 1 << (head_dim - 1).bit_length())


def rows_of(query_dtype: str, columns: int) -> int:
    """Return the rows of a tile: with more columns fewer, so that sums stay in registers."""
    return max(DOWN, ROWS[query_dtype] * MANY // max(columns, MANY))


def array(dtype: str | None, axes: int) -> Any:
    """Return Numba's type of an array of any strides, or of an argument that is absent."""
    return types.none if dtype is None else types.Array(element(dtype).stored, axes, "A")


def integers(present: bool, axes: int, kind: Any = types.int64) -> Any:
    """Return Numba's type of an array of integers, or of an argument that is absent."""
    return types.Array(kind, axes, "A") if present else types.none


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

    @property
    def has_mask(self) -> bool:
        """Whether pairs may be hidden one by one."""
        return self.mask is not None or self.bias is not None

    @property
    def types(self) -> tuple[Any, ...]:
        """Numba's types of the arguments that every kernel ends with.

        ::

            mask, bias              (batch, heads, q_len, kv_len)
            alibi_slopes            (batch, heads)
            lengths, offsets        int64 (batch,): kv_lengths and query_offset, one by one
            length, offset          int64: one for all. Both are clamped to what is possible
            left, right             int64: the window, 2**62 if unlimited; causal is right = 0
            scale, softcap          float32, or float64 for float64
            dropped                 int64: round(dropout_p * 2**32)
            seed_low, seed_high     int64: the halves of the seed, each below 2**32
            kept_scale              as scale: 1 / (1 - dropout_p), or 1 if nothing is kept
            first_batch             int64: what is added to batch for dropout
        """
        number = accumulator(self.query)
        return (
            array(self.mask, 4),
            array(self.bias, 4),
            array(self.alibi_slopes, 2),
            integers(self.lengths, 1),
            integers(self.offsets, 1),
            *(types.int64,) * 4,
            number,
            number if self.softcap else types.none,
            *(types.int64,) * 3,
            number,
            types.int64,
        )

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


# --- What the forward and the backward kernels share ---------------------------------------------


@device
def keys_of_row(row, offset, left, right, length):
    """Return the first key that a row may see, and the one behind the last."""
    position = row + offset
    return max(0, position - left), min(length, position + right + 1)


@device
def one_within(each, for_all, batch, low, high):
    """Return a batch element's own number, or the one for all, clamped."""
    x = for_all
    if each is not None:
        x = each[batch]
    return max(low, min(x, high))


@device
def is_flagged(flags, rows_per_flag, first, end):
    """Return whether any of the rows first..end - 1 has a flag that is set."""
    any_set = 0
    for n in range(first // rows_per_flag, (end - 1) // rows_per_flag + 1):
        any_set |= flags[n]
    return any_set != 0


@device
def multiply(sums, left, right, row, key, depth):
    """Add to a thread's scores the products of its rows and its keys, over columns of a slice."""
    for column in range(depth):
        for i in range(len(sums) // EACH):
            x = left[row + i, column]
            for j in range(EACH):
                sums[i * EACH + j] += x * right[key + j, column]


@device
def random_words(fours, position, head, batch, seed_low, seed_high):
    """Return the random words of four keys: Philox4x32 with 7 rounds, as in reference.py."""
    x0, x1 = types.uint64(fours), types.uint64(position & 0xFFFFFFFF)
    x2, x3 = types.uint64(head), types.uint64(batch)
    key0, key1 = types.uint64(seed_low), types.uint64(seed_high)
    for _ in range(7):
        first = x0 * np.uint64(0xD2511F53)
        second = x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (second >> WORD_BITS) ^ x1 ^ key0, second & LOW_WORD
        x2, x3 = (first >> WORD_BITS) ^ x3 ^ key1, first & LOW_WORD
        key0 = (key0 + np.uint64(0x9E3779B9)) & LOW_WORD
        key1 = (key1 + np.uint64(0xBB67AE85)) & LOW_WORD
    return types.int64(x0), types.int64(x1), types.int64(x2), types.int64(x3)


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


class Scoring(NamedTuple):
    """Device functions for what is done to a score between the product and softmax."""

    is_hidden: Any
    with_added: Any


@functools.cache
def scoring(given: Given) -> Scoring:
    """Return the functions for these dtypes."""
    number = accumulator(given.query)
    widen_mask, widen_bias, widen_slope = (
        None if dtype is None else element(dtype).widen
        for dtype in (given.mask, given.bias, given.alibi_slopes)
    )
    minus_inf = np.float32(-math.inf)

    @device
    def is_hidden(mask, bias, batch, head, row, key):
        """Return whether the mask or the bias hides a pair."""
        hidden = False
        if mask is not None:
            hidden = widen_mask(mask[batch, head, row, key]) == minus_inf
        if bias is not None:
            hidden = hidden or widen_bias(bias[batch, head, row, key]) == minus_inf
        return hidden

    @device
    def with_added(score, mask, bias, slopes, batch, head, row, key, position):
        """Return the score with what bias, mask and ALiBi add to it."""
        if bias is not None:
            score += number(widen_bias(bias[batch, head, row, key]))
        if mask is not None:
            score += number(widen_mask(mask[batch, head, row, key]))
        if slopes is not None:
            score -= number(widen_slope(slopes[batch, head])) * number(abs(key - position))
        return score

    return Scoring(is_hidden, with_added)


# --- The forward kernel --------------------------------------------------------------------------


def forward(
    given: Given,
    value_head_dim: int,
    *,
    sinks: str | None = None,
    lse: bool = True,
    flags: bool = False,
) -> Kernel:
    """Return the kernel for calls that have these arguments.

    Parameters
    ----------
    given : Given
        What the call has, and of which dtypes.
    value_head_dim : int
        Sizes up to the next power of 2 share a kernel.
    sinks : str, optional
        The dtype of sinks, if there are any.
    lse, flags : bool
        Whether the call has these.

    Returns
    -------
    Kernel
        For a grid of `forward_blocks`. Its arguments::

            out               (batch, heads, q_len, value_head_dim) of the query's dtype, written
            lse               (batch, heads, q_len), written; float32, or float64 for float64
            flags             int32 (batch, heads, tiles of rows_per_flag rows)
            rows_per_flag     int64
            sinks             (heads,)
            query, key, value (batch, heads or kv_heads, length, dim)

        and those of `Given.types`; None for one that is absent, and each array of any strides. With
        flags, blocks whose flags are all 0 return at once, and of the others only those rows of
        out and lse are stored that are not finite in out.
    """
    return _forward(given, bucket(value_head_dim), sinks, lse, flags)


def forward_blocks(
    query_dtype: str, batch: int, heads: int, q_len: int, value_head_dim: int
) -> int:
    """Return how many blocks the forward kernel is launched with."""
    return batch * heads * -(-q_len // rows_of(query_dtype, bucket(value_head_dim)))


@functools.cache
def _forward(
    given: Given, columns: int, sinks_dtype: str | None, has_lse: bool, has_flags: bool
) -> Kernel:
    query_dtype, key_dtype = given.query, given.key
    number = accumulator(query_dtype)
    float_dtype = np.dtype(number.name)
    zero, one, nan, minus_inf, hidden = map(number, (0, 1, math.nan, -math.inf, HIDDEN))
    rows = rows_of(query_dtype, columns)
    rows_each = rows // DOWN
    scores_each = rows_each * EACH
    chunks = columns // SLICE
    sums_each = chunks * scores_each
    group_keys = GROUP * KEYS
    has_mask, has_dropout = given.has_mask, given.dropout
    load_query, load_key = loader(query_dtype, query_dtype), loader(key_dtype, query_dtype)
    narrow, is_part_finite = element(query_dtype).narrow, finiteness(query_dtype)
    widen_sink = None if sinks_dtype is None else element(sinks_dtype).widen
    is_hidden, with_added = scoring(given)

    @device
    def decay(old, new):
        """Return what sums relative to an old maximum are multiplied by; exactly 1 if it stays."""
        if old == new:
            return one
        return number(math.exp(old - new))

    def attend(
        out,
        lse,
        flags,
        rows_per_flag,
        sinks,
        query,
        key,
        value,
        mask,
        bias,
        alibi_slopes,
        lengths,
        offsets,
        length,
        offset,
        left,
        right,
        scale,
        softcap,
        dropped,
        seed_low,
        seed_high,
        kept_scale,
        first_batch,
    ):
        queries = cuda.shared.array((rows, PITCH), float_dtype)
        keys = cuda.shared.array((KEYS, PITCH), float_dtype)  # then values
        probs = cuda.shared.array((rows, KEYS), float_dtype)
        maxima = cuda.shared.array((rows, ACROSS), float_dtype)  # of each thread's part of a row
        part_sums = cuda.shared.array((rows, ACROSS), float_dtype)

        # This block's rows, and this thread's rows and keys within each tile. The last rows come
        # first: where causal, they see the most keys.
        batches, heads, q_len, head_dim = query.shape
        tiles = (q_len + rows - 1) // rows
        block = cuda.blockIdx.x
        head = block % heads
        batch = block // heads % batches
        first = (tiles - 1 - block // (heads * batches)) * rows
        end = min(first + rows, q_len)
        thread = cuda.threadIdx.x
        lane = thread % ACROSS
        row0, key0 = thread // ACROSS * rows_each, lane * EACH
        if flags is not None and not is_flagged(flags[batch, head], rows_per_flag, first, end):
            return

        kv_head = head // (heads // key.shape[1])
        q, k, v = query[batch, head], key[batch, kv_head], value[batch, kv_head]
        length = one_within(lengths, length, batch, 0, key.shape[2])
        offset = one_within(offsets, offset, batch, -FARTHEST, FARTHEST)
        first_key = keys_of_row(first, offset, left, right, length)[0]
        end_key = keys_of_row(end - 1, offset, left, right, length)[1]

        # Of each row: the maximum so far and the sum of exp(score - maximum); of each row and
        # column: the sum of these times the values. Those of whole groups are kept apart.
        saw = cuda.local.array(rows_each, np.int32)
        row_max = cuda.local.array(rows_each, float_dtype)
        row_sum = cuda.local.array(rows_each, float_dtype)
        sums = cuda.local.array(sums_each, float_dtype)
        total_max = cuda.local.array(rows_each, float_dtype)
        total_sum = cuda.local.array(rows_each, float_dtype)
        totals = cuda.local.array(sums_each, float_dtype)
        for i in range(rows_each):
            saw[i] = 0
            row_max[i] = minus_inf
            total_max[i] = minus_inf
            total_sum[i] = zero
        for n in range(sums_each):
            totals[n] = zero

        seen = cuda.local.array(scores_each, np.int32)
        scores = cuda.local.array(scores_each, float_dtype)
        tile_sums = cuda.local.array(scores_each, float_dtype)
        decays = cuda.local.array(rows_each, float_dtype)
        for group in range(first_key // group_keys * group_keys, end_key, group_keys):
            for i in range(rows_each):
                row_sum[i] = zero
            for n in range(sums_each):
                sums[n] = zero
            begin = max(group, first_key // KEYS * KEYS)
            for start in range(begin, min(group + group_keys, end_key), KEYS):
                # Which pairs are seen. Tiles without any are skipped.
                any_seen = 0
                for i in range(rows_each):
                    row = first + row0 + i
                    low, high = keys_of_row(row, offset, left, right, length)
                    for j in range(EACH):
                        key_index = start + key0 + j
                        sees = 0
                        if (
                            row < q_len
                            and low <= key_index
                            and key_index < high
                            and not is_hidden(mask, bias, batch, head, row, key_index)
                        ):
                            sees = 1
                        seen[i * EACH + j] = sees
                        any_seen |= sees
                if has_mask and cuda.syncthreads_or(types.int32(any_seen)) == 0:
                    continue

                for n in range(scores_each):
                    scores[n] = zero
                for column in range(0, head_dim, SLICE):
                    cuda.syncthreads()
                    load_query(queries, q, first, column, thread)
                    load_key(keys, k, start, column, thread)
                    cuda.syncthreads()
                    depth = min(SLICE, head_dim - column)
                    multiply(scores, queries, keys, row0, key0, depth)

                for i in range(rows_each):
                    row = first + row0 + i
                    top = minus_inf
                    for j in range(EACH):
                        n = i * EACH + j
                        if seen[n]:
                            score = scores[n] * scale
                            if softcap is not None:
                                score = softcap * number(math.tanh(score / softcap))
                            key_index = start + key0 + j
                            score = with_added(
                                score,
                                mask,
                                bias,
                                alibi_slopes,
                                batch,
                                head,
                                row,
                                key_index,
                                row + offset,
                            )
                            scores[n] = score
                            if score > top:
                                top = score
                    maxima[row0 + i, lane] = top
                cuda.syncthreads()

                # Probabilities relative to the maximum. If that is -inf (or there is none), so are
                # the scores, or NaN: exp(score) says which.
                for i in range(rows_each):
                    top = row_max[i]
                    for n in range(ACROSS):
                        top = max(top, maxima[row0 + i, n])
                    decays[i] = decay(row_max[i], top)
                    row_max[i] = top
                    shift = top
                    if top == minus_inf:
                        shift = zero
                    words = random_words(
                        (start + key0) // EACH,
                        first + row0 + i + offset,
                        head,
                        batch + first_batch,
                        seed_low,
                        seed_high,
                    )
                    part = hidden
                    for j in range(EACH):
                        n = i * EACH + j
                        prob = hidden
                        if seen[n]:
                            prob = number(math.exp(scores[n] - shift))
                            part = (zero if part == hidden else part) + prob
                            if has_dropout and words[j] < dropped:
                                prob = hidden
                        probs[row0 + i, key0 + j] = prob
                    part_sums[row0 + i, lane] = part
                cuda.syncthreads()

                for i in range(rows_each):
                    tile_sum = zero
                    for n in range(ACROSS):
                        part = part_sums[row0 + i, n]
                        if part != hidden:
                            tile_sum += part
                            saw[i] = 1
                    row_sum[i] = row_sum[i] * decays[i] + tile_sum

                for chunk in range(chunks):
                    if chunk * SLICE < v.shape[1]:
                        cuda.syncthreads()
                        load_key(keys, v, start, chunk * SLICE, thread)
                        cuda.syncthreads()
                        for n in range(scores_each):
                            tile_sums[n] = zero
                        for key_index in range(KEYS):
                            for i in range(rows_each):
                                prob = probs[row0 + i, key_index]
                                if prob != hidden:
                                    for c in range(EACH):
                                        product = prob * keys[key_index, key0 + c]
                                        tile_sums[i * EACH + c] += product
                        for n in range(scores_each):
                            to = chunk * scores_each + n
                            sums[to] = sums[to] * decays[n // EACH] + tile_sums[n]

            for i in range(rows_each):
                decays[i] = decay(total_max[i], row_max[i])
                total_max[i] = row_max[i]
                total_sum[i] = total_sum[i] * decays[i] + row_sum[i]
            for n in range(sums_each):
                totals[n] = totals[n] * decays[n % scores_each // EACH] + sums[n]

        # A row is stored if it is wanted: with flags, if what is there now is not finite.
        if flags is not None:
            cuda.syncthreads()
            for i in range(rows_each):
                row = first + row0 + i
                part_sums[row0 + i, lane] = zero
                if row < q_len and not is_part_finite(out[batch, head], row, key0):
                    part_sums[row0 + i, lane] = one
            cuda.syncthreads()
        for i in range(rows_each):
            row = first + row0 + i
            wanted = row < q_len
            if flags is not None:
                stale = zero
                for n in range(ACROSS):
                    stale += part_sums[row0 + i, n]
                wanted = wanted and stale > zero
            if wanted:
                # The sums are divided by total_sum and what the sink adds to it, both relative to
                # the larger of total_max and the sink. All scores -inf: 0 / 0.
                total = total_sum[i]
                if saw[i] and total == zero:
                    total = nan
                factor = kept_scale
                divisor = total
                if sinks is not None:
                    sink = number(widen_sink(sinks[head]))
                    if sink > total_max[i]:
                        shrunk = decay(total_max[i], sink)
                        factor = kept_scale * shrunk
                        divisor = total * shrunk + one
                    else:
                        divisor = total + decay(sink, total_max[i])
                if saw[i] == 0:
                    factor = zero
                    divisor = one
                for chunk in range(chunks):
                    for c in range(EACH):
                        column = chunk * SLICE + key0 + c
                        if column < v.shape[1]:
                            result = totals[chunk * scores_each + i * EACH + c] * factor / divisor
                            out[batch, head, row, column] = narrow(result)
                if lse is not None and lane == 0:
                    log_sum = minus_inf
                    if saw[i]:
                        log_sum = total_max[i] + number(math.log(total))
                    lse[batch, head, row] = log_sum

    numbers = types.Array(number, 3, "A")
    return Kernel(
        name=given.name("simt_forward", columns, sinks=sinks_dtype, lse=has_lse, flags=has_flags),
        function=attend,
        signature=(
            array(query_dtype, 4),
            numbers if has_lse else types.none,
            integers(has_flags, 3, types.int32),
            types.int64,
            array(sinks_dtype, 1),
            array(query_dtype, 4),
            array(key_dtype, 4),
            array(key_dtype, 4),
            *given.types,
        ),
        threads=THREADS,
    )
