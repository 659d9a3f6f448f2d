# SPDX-License-Identifier: Apache-2.0
"""Attention in plain Numba: the kernel to read first, and the one that knows every argument.

`forward` makes a kernel for what a call has; `_forward.py` launches it for whatever the
tensor-core kernels have no room for (float32 and float64, mask, bias, dropout, ...), and once more
behind them for rows that came out not finite (see `flags`). It runs unchanged under Numba's
simulator, where tests/cuda/test_simt.py compares it with `fastattn.reference`.

The form is FlashAttention's [1]_. A block of THREADS threads owns a tile of queries of one head and
goes along the keys, KEYS at a time; simt_tiles.py has the tiles, elements.py the dtypes::

    scores = queries @ keys.T       both read through shared memory, a slice of head_dim at a time
    the row's maximum so far, probabilities relative to it; these go to shared memory
    sums of this tile = probabilities @ values;  sums = sums * rescale + sums of this tile

The sums of every tile start from zero, and so do those of every segment of SEGMENT tiles: rounding
errors stay small with many keys. A probability of HIDDEN marks a pair that is masked: it is
skipped, since whatever lies in that key, 0 * NaN would be NaN.

.. [1] T. Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import cuda
from numba.cuda import types

from fastattn.cuda.kernels import Kernel
from fastattn.cuda.kernels.elements import accumulator, array, device, element, integers
from fastattn.cuda.kernels.simt_tiles import (
    ACROSS,
    DOWN,
    EACH,
    KEYS,
    PITCH,
    SLICE,
    THREADS,
    Given,
    bucket,
    finiteness,
    is_flagged,
    keys_of_row,
    loader,
    multiply,
    random_words,
    rows_of,
    scoring,
    window_of,
)

SEGMENT = 32  # tiles of keys whose sums are added up before they join the totals
HIDDEN = -1.0  # the probability, or the sum of the probabilities, of pairs that are all masked


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

        and a `Call`; None for one that is absent, and each array of any strides. With flags, blocks
        whose flags are all 0 return at once, and of the others only those rows of out and lse are
        stored that are not finite in out.
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
    segment_keys = SEGMENT * KEYS
    hides_pairs, has_softcap, has_dropout = given.hides_pairs, given.softcap, given.dropout
    load_query, load_key = loader(query_dtype, query_dtype), loader(key_dtype, query_dtype)
    narrow, is_part_finite = element(query_dtype).narrow, finiteness(query_dtype)
    widen_sink = None if sinks_dtype is None else element(sinks_dtype).widen
    is_hidden, with_added = scoring(given)

    @device
    def rescaling(old, new):
        """Return what sums relative to an old maximum are multiplied by; exactly 1 if it stays."""
        if old == new:
            return one
        return number(math.exp(old - new))

    def attend(out, lse, flags, rows_per_flag, sinks, query, key, value, call):
        queries = cuda.shared.array((rows, PITCH), float_dtype)
        keys = cuda.shared.array((KEYS, PITCH), float_dtype)  # then values
        probs = cuda.shared.array((rows, KEYS), float_dtype)
        maxima = cuda.shared.array((rows, ACROSS), float_dtype)  # of each thread's keys of a row
        partial_sums = cuda.shared.array((rows, ACROSS), float_dtype)

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
        window = window_of(call, batch, key.shape[2])
        first_key = keys_of_row(first, window)[0]
        end_key = keys_of_row(end - 1, window)[1]

        # Of each row: the maximum so far and the sum of exp(score - maximum); of each row and
        # column: the sum of these times the values. Those of whole segments are kept apart.
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
        rescale = cuda.local.array(rows_each, float_dtype)
        for segment in range(first_key // segment_keys * segment_keys, end_key, segment_keys):
            for i in range(rows_each):
                row_sum[i] = zero
            for n in range(sums_each):
                sums[n] = zero
            begin = max(segment, first_key // KEYS * KEYS)
            for start in range(begin, min(segment + segment_keys, end_key), KEYS):
                # Which pairs are seen. Tiles without any are skipped.
                any_seen = 0
                for i in range(rows_each):
                    row = first + row0 + i
                    low, high = keys_of_row(row, window)
                    for j in range(EACH):
                        key_index = start + key0 + j
                        sees = 0
                        if (
                            row < q_len
                            and low <= key_index
                            and key_index < high
                            and not is_hidden(call, batch, head, row, key_index)
                        ):
                            sees = 1
                        seen[i * EACH + j] = sees
                        any_seen |= sees
                if hides_pairs and cuda.syncthreads_or(types.int32(any_seen)) == 0:
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
                            score = scores[n] * call.scale
                            if has_softcap:
                                score = call.softcap * number(math.tanh(score / call.softcap))
                            key_index = start + key0 + j
                            position = row + window.offset
                            score = with_added(score, call, batch, head, row, key_index, position)
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
                    rescale[i] = rescaling(row_max[i], top)
                    row_max[i] = top
                    shift = top
                    if top == minus_inf:
                        shift = zero
                    words = random_words(call, batch, head, first + row0 + i, start + key0, window)
                    partial = hidden
                    for j in range(EACH):
                        n = i * EACH + j
                        prob = hidden
                        if seen[n]:
                            prob = number(math.exp(scores[n] - shift))
                            partial = (zero if partial == hidden else partial) + prob
                            if has_dropout and words[j] < call.dropped:
                                prob = hidden
                        probs[row0 + i, key0 + j] = prob
                    partial_sums[row0 + i, lane] = partial
                cuda.syncthreads()

                for i in range(rows_each):
                    tile_sum = zero
                    for n in range(ACROSS):
                        partial = partial_sums[row0 + i, n]
                        if partial != hidden:
                            tile_sum += partial
                            saw[i] = 1
                    row_sum[i] = row_sum[i] * rescale[i] + tile_sum

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
                            sums[to] = sums[to] * rescale[n // EACH] + tile_sums[n]

            for i in range(rows_each):
                rescale[i] = rescaling(total_max[i], row_max[i])
                total_max[i] = row_max[i]
                total_sum[i] = total_sum[i] * rescale[i] + row_sum[i]
            for n in range(sums_each):
                totals[n] = totals[n] * rescale[n % scores_each // EACH] + sums[n]

        # A row is stored if it is wanted: with flags, if what is there now is not finite.
        if flags is not None:
            cuda.syncthreads()
            for i in range(rows_each):
                row = first + row0 + i
                partial_sums[row0 + i, lane] = zero
                if row < q_len and not is_part_finite(out[batch, head], row, key0):
                    partial_sums[row0 + i, lane] = one
            cuda.syncthreads()
        for i in range(rows_each):
            row = first + row0 + i
            wanted = row < q_len
            if flags is not None:
                stale = zero
                for n in range(ACROSS):
                    stale += partial_sums[row0 + i, n]
                wanted = wanted and stale > zero
            if wanted:
                # The sums are divided by total_sum and what the sink adds to it, both relative to
                # the larger of total_max and the sink. All scores -inf: 0 / 0.
                total = total_sum[i]
                if saw[i] and total == zero:
                    total = nan
                factor = call.kept_scale
                divisor = total
                if sinks is not None:
                    sink = number(widen_sink(sinks[head]))
                    if sink > total_max[i]:
                        rescaled = rescaling(total_max[i], sink)
                        factor = call.kept_scale * rescaled
                        divisor = total * rescaled + one
                    else:
                        divisor = total + rescaling(sink, total_max[i])
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
            given.call,
        ),
        threads=THREADS,
    )
