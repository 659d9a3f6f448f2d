# SPDX-License-Identifier: Apache-2.0
"""The gradients in plain Numba: `simt`'s kernels for `attention_backward`.

`_backward.py` launches, in this order,

- `prepare`: two numbers for each row, delta and lse2, which all others read, the tensor-core
  kernels too. Sinks are in them, so that no other kernel knows of sinks;
- `query_gradient`: a block has a tile of queries, goes along the keys, and writes dq;
- `key_value_gradients`: a block has a tile of keys of a key head, goes along the queries of all
  heads that share it, and writes dk and dv;
- if asked for, `bias_gradient`, whose blocks own tiles of dbias and go along the axes that bias
  was broadcast over, and `sinks_gradient`.

Nobody adds to what another block writes, and every sum has a fixed order: the same call gives the
same bits. What is computed is in the notes of `fastattn.reference.attention_backward`; tiles,
threads and the skipping of hidden pairs are those of `simt.py`. With s the score of a pair::

    prob = exp2(s * log2(e) - lse2)        dscore = prob * (grad_out . value - delta)

of which bias gets dscore itself, and query and key get it times the slope of softcap.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fastattn.cuda.kernels import Kernel, padded
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
    symbol,
    window_of,
)
from fastattn.cuda.kernels.tiles import SIMT_ROWS as ROWS

PREPARED_ROWS = 32  # of a block of `prepare`
LANES = SLICE  # threads of `prepare` that share a row

# What a pair is to a gradient. A pair that dropout drops still has a probability, and a dscore.
UNSEEN, DROPPED, KEPT = 0, 1, 2

# With grad_lse, a sink counts as at most this much above lse; see `prepare`.
HIGHEST_SINK = 64 * math.log(2)

# What the kernels read: of all heads, or of one; delta and lse2 always of all.
Inputs = namedtuple("Inputs", "query key value grad_out delta lse2")
Work = namedtuple("Work", "states probs dscores")  # of a thread's pairs
Tiles = namedtuple("Tiles", "queries keys")  # slices, in shared memory
Place = namedtuple("Place", "batch head first start window")  # of a tile: its first row and key


# --- What each row needs -------------------------------------------------------------------------


@functools.cache
def prepare(
    query_dtype: str, *, sinks: str | None = None, grad_lse: bool = False, dsinks: bool = False
) -> Kernel:
    """Return the kernel that makes delta and lse2 of the results and their gradients.

    Parameters
    ----------
    query_dtype : str
        Of out and grad_out.
    sinks : str, optional
        The dtype of sinks, if there are any.
    grad_lse, dsinks : bool
        Whether there is a gradient by lse; whether `sinks_gradient` will follow.

    Returns
    -------
    Kernel
        For a grid of `prepare_blocks`. Its arguments, None where absent; in float32, or float64 for
        float64, where no dtype is named::

            delta, lse2       (batch, heads, padded(q_len)), written
            sink_terms        likewise, what each row adds to dsinks
            out, grad_out     (batch, heads, q_len, value_head_dim) in query_dtype
            lse, grad_lse     (batch, heads, q_len)
            sinks             (heads,)

    Notes
    -----
    Without sinks, delta is sum(grad_out * out) - grad_lse, and lse2 is lse * log2(e); of a row that
    sees nothing, and of the padding, 0 and +inf, so that all its probabilities are 0. A sink is
    part of the softmax that lse2 stands for, but not of lse: grad_lse is then divided by the share
    of the probability that the sink leaves to the keys, since dscores are multiplied by it. Where
    that overflows, with a sink far above all scores, the share counts as no less than 2**-64.
    """
    number = accumulator(query_dtype)
    float_dtype = np.dtype(number.name)
    zero, one, infinite = number(0), number(1), number(math.inf)
    log2e, highest_sink = number(math.log2(math.e)), number(HIGHEST_SINK)
    widen = element(query_dtype).widen
    widen_sink = None if sinks is None else element(sinks).widen

    def prepare_rows(delta, lse2, sink_terms, out, grad_out, lse, grad_lse, sinks):
        partials = cuda.shared.array((PREPARED_ROWS, PITCH), float_dtype)
        heads, q_len, columns = out.shape[1], out.shape[2], out.shape[3]
        blocks = delta.shape[2] // PREPARED_ROWS
        block = cuda.blockIdx.x
        first = block % blocks * PREPARED_ROWS
        head = block // blocks % heads
        batch = block // (blocks * heads)
        thread = cuda.threadIdx.x
        lane = thread % LANES
        for r in range(thread // LANES, PREPARED_ROWS, THREADS // LANES):
            partial = zero
            if first + r < q_len:
                for column in range(lane, columns, LANES):
                    x = number(widen(grad_out[batch, head, first + r, column]))
                    partial += x * number(widen(out[batch, head, first + r, column]))
            partials[r, lane] = partial
        cuda.syncthreads()
        if thread >= PREPARED_ROWS:
            return

        row = first + thread
        row_delta, row_lse2, term = zero, infinite, zero
        if row < q_len:
            row_lse = lse[batch, head, row]
            if row_lse != -infinite:
                dot = zero
                for n in range(LANES):
                    dot += partials[thread, n]
                row_delta = dot
                share = one  # of the probability that is the keys', inverted
                if sinks is not None:
                    sink = number(widen_sink(sinks[head]))
                    above = sink - row_lse
                    of_sink = one
                    if above > zero:
                        of_sink = one / (one + number(math.exp(-above)))
                    else:
                        odds = number(math.exp(above))
                        of_sink = odds / (one + odds)
                    term = -of_sink * dot
                    if grad_lse is not None:
                        if above > highest_sink:
                            above = highest_sink
                        share = one + number(math.exp(above))
                    if above > zero:
                        row_lse += above + number(math.log1p(math.exp(-above)))
                    else:
                        row_lse += number(math.log1p(math.exp(above)))
                if grad_lse is not None:
                    row_delta -= share * grad_lse[batch, head, row]
                row_lse2 = row_lse * log2e
        delta[batch, head, row] = row_delta
        lse2[batch, head, row] = row_lse2
        if sink_terms is not None:
            sink_terms[batch, head, row] = term

    numbers = types.Array(number, 3, "A")
    return Kernel(
        name=symbol("simt_prepare", query_dtype, sinks=sinks, grad_lse=grad_lse, dsinks=dsinks),
        function=prepare_rows,
        signature=(
            numbers,
            numbers,
            numbers if dsinks else types.none,
            array(query_dtype, 4),
            array(query_dtype, 4),
            numbers,
            numbers if grad_lse else types.none,
            array(sinks, 1),
        ),
        threads=THREADS,
    )


def prepare_blocks(batch: int, heads: int, q_len: int) -> int:
    """Return how many blocks `prepare` is launched with."""
    return batch * heads * padded(q_len) // PREPARED_ROWS


@functools.cache
def sinks_gradient(query_dtype: str, sinks: str) -> Kernel:
    """Return the kernel that adds up what `prepare` wrote in sink_terms; one block per head.

    Its arguments are dsinks (heads,), of the dtype `sinks`, and sink_terms.
    """
    number = accumulator(query_dtype)
    float_dtype = np.dtype(number.name)
    zero = number(0)
    narrow = element(sinks).narrow
    stored = np.float64 if sinks == "float64" else np.float32

    def add_terms(dsinks, sink_terms):
        partials = cuda.shared.array(THREADS, float_dtype)
        head = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        partial = zero
        for batch in range(sink_terms.shape[0]):
            for row in range(thread, sink_terms.shape[2], THREADS):
                partial += sink_terms[batch, head, row]
        partials[thread] = partial
        cuda.syncthreads()
        if thread == 0:
            total = zero
            for n in range(THREADS):
                total += partials[n]
            dsinks[head] = narrow(stored(total))

    return Kernel(
        name=symbol("simt_sinks_gradient", query_dtype, sinks),
        function=add_terms,
        signature=(array(sinks, 1), types.Array(number, 3, "A")),
        threads=THREADS,
    )


# --- The gradients of the scores of a tile -------------------------------------------------------


def _inputs(given: Given) -> Any:
    """Return Numba's type of `Inputs`."""
    numbers = types.Array(accumulator(given.query), 3, "A")
    query, key = array(given.query, 4), array(given.key, 4)
    return types.NamedTuple(Inputs(query, key, key, query, numbers, numbers), Inputs)


@device
def of_head(inputs, batch, head, kv_head):
    """Return the inputs, the first four of a head alone."""
    query, grad_out = inputs.query[batch, head], inputs.grad_out[batch, head]
    key, value = inputs.key[batch, kv_head], inputs.value[batch, kv_head]
    return Inputs(query, key, value, grad_out, inputs.delta, inputs.lse2)


@functools.cache
def _tile_gradients(given: Given, to_bias: bool) -> Any:
    """Return the device function for a thread's pairs of a tile of queries and keys.

    to_bias: the gradients are of what bias is added to, and not of the products query . key.
    """
    number = accumulator(given.query)
    zero, one, log2e = number(0), number(1), number(math.log2(math.e))
    hides_pairs, has_softcap, has_dropout = given.hides_pairs, given.softcap, given.dropout
    load_query, load_key = loader(given.query, given.query), loader(given.key, given.query)
    is_hidden, with_added = scoring(given)

    @device
    def tile_gradients(work, tiles, inputs, call, place):
        """Fill the work for a tile: probs as value's gradient needs them. The inputs are a head's.

        Return False if no thread of the block has a pair that is seen; then it is not filled.
        """
        states, probs, dscores = work
        queries, keys = tiles
        batch, head, first, start, window = place
        query, key, value, grad_out = inputs.query, inputs.key, inputs.value, inputs.grad_out
        thread = cuda.threadIdx.x
        rows_each = queries.shape[0] // DOWN
        row0, key0 = thread // ACROSS * rows_each, thread % ACROSS * EACH
        any_seen = 0
        for i in range(rows_each):
            row = first + row0 + i
            low, high = keys_of_row(row, window)
            words = random_words(call, batch, head, row, start + key0, window)
            for j in range(EACH):
                key_index = start + key0 + j
                state = UNSEEN
                if (
                    row < query.shape[0]
                    and low <= key_index
                    and key_index < high
                    and not is_hidden(call, batch, head, row, key_index)
                ):
                    state = KEPT
                    if has_dropout and words[j] < call.dropped:
                        state = DROPPED
                states[i * EACH + j] = state
                any_seen |= state
        if hides_pairs and cuda.syncthreads_or(types.int32(any_seen)) == 0:
            return False

        # dscores is grad_out . value until it becomes what its name says.
        for n in range(rows_each * EACH):
            probs[n] = zero
            dscores[n] = zero
        for column in range(0, query.shape[1], SLICE):
            cuda.syncthreads()
            load_query(queries, query, first, column, thread)
            load_key(keys, key, start, column, thread)
            cuda.syncthreads()
            multiply(probs, queries, keys, row0, key0, min(SLICE, query.shape[1] - column))
        for column in range(0, value.shape[1], SLICE):
            cuda.syncthreads()
            load_query(queries, grad_out, first, column, thread)
            load_key(keys, value, start, column, thread)
            cuda.syncthreads()
            multiply(dscores, queries, keys, row0, key0, min(SLICE, value.shape[1] - column))

        for i in range(rows_each):
            row = first + row0 + i
            for j in range(EACH):
                n = i * EACH + j
                if states[n] != UNSEEN:
                    score = probs[n] * call.scale
                    slope = one
                    if has_softcap:
                        tanh = number(math.tanh(score / call.softcap))
                        score = call.softcap * tanh
                        slope = one - tanh * tanh
                    key_index, position = start + key0 + j, row + window.offset
                    score = with_added(score, call, batch, head, row, key_index, position)
                    prob = number(math.exp2(score * log2e - inputs.lse2[batch, head, row]))
                    dprob = dscores[n] * call.kept_scale
                    if states[n] == DROPPED:
                        dprob = zero
                    dscore = prob * (dprob - inputs.delta[batch, head, row])
                    dscores[n] = dscore if to_bias else dscore * slope
                    probs[n] = prob * call.kept_scale
        return True

    return tile_gradients


# --- dq ------------------------------------------------------------------------------------------


def query_gradient(given: Given, head_dim: int, *, flags: bool = False) -> Kernel:
    """Return the kernel for dq.

    Parameters
    ----------
    given : Given
        What the call has.
    head_dim : int
        Sizes up to the next power of 2 share a kernel.
    flags : bool
        Whether only rows are stored that are not finite, of tiles that are flagged.

    Returns
    -------
    Kernel
        For a grid of `simt.forward_blocks`. Its arguments::

            dq                       (batch, heads, q_len, head_dim), written
            flags, rows_per_flag     as in `simt.forward`
            inputs                   `Inputs`: query, key and value as in `simt.forward`, grad_out
                                     like out, delta and lse2 as `prepare` wrote them
            call                     `Call`
    """
    return _query_gradient(given, bucket(head_dim), flags)


@functools.cache
def _query_gradient(given: Given, columns: int, has_flags: bool) -> Kernel:
    number = accumulator(given.query)
    float_dtype = np.dtype(number.name)
    zero = number(0)
    rows = rows_of(given.query, columns)
    rows_each = rows // DOWN
    scores_each = rows_each * EACH
    chunks = columns // SLICE
    sums_each = chunks * scores_each
    load_key, narrow = loader(given.key, given.query), element(given.query).narrow
    is_part_finite = finiteness(given.query)
    tile_gradients = _tile_gradients(given, False)

    def add_keys(dq, flags, rows_per_flag, inputs, call):
        tiles = Tiles(
            cuda.shared.array((rows, PITCH), float_dtype),
            cuda.shared.array((KEYS, PITCH), float_dtype),
        )
        tile_dscores = cuda.shared.array((rows, KEYS), float_dtype)
        tile_states = cuda.shared.array((rows, KEYS), np.uint8)
        stale = cuda.shared.array((rows, ACROSS), np.uint8)

        batches, heads, q_len, head_dim = inputs.query.shape
        row_tiles = (q_len + rows - 1) // rows
        block = cuda.blockIdx.x
        head = block % heads
        batch = block // heads % batches
        first = (row_tiles - 1 - block // (heads * batches)) * rows
        end = min(first + rows, q_len)
        thread = cuda.threadIdx.x
        lane = thread % ACROSS
        row0, key0 = thread // ACROSS * rows_each, lane * EACH
        if flags is not None and not is_flagged(flags[batch, head], rows_per_flag, first, end):
            return

        own = of_head(inputs, batch, head, head // (heads // inputs.key.shape[1]))
        window = window_of(call, batch, inputs.key.shape[2])
        first_key = keys_of_row(first, window)[0]
        end_key = keys_of_row(end - 1, window)[1]

        work = Work(
            cuda.local.array(scores_each, np.int32),
            cuda.local.array(scores_each, float_dtype),
            cuda.local.array(scores_each, float_dtype),
        )
        tile_sums = cuda.local.array(scores_each, float_dtype)
        sums = cuda.local.array(sums_each, float_dtype)
        for n in range(sums_each):
            sums[n] = zero
        for start in range(first_key // KEYS * KEYS, end_key, KEYS):
            place = Place(batch, head, first, start, window)
            if tile_gradients(work, tiles, own, call, place):
                for n in range(scores_each):
                    tile_dscores[row0 + n // EACH, key0 + n % EACH] = work.dscores[n]
                    tile_states[row0 + n // EACH, key0 + n % EACH] = work.states[n]
                for chunk in range(chunks):
                    if chunk * SLICE < own.key.shape[1]:
                        cuda.syncthreads()
                        load_key(tiles.keys, own.key, start, chunk * SLICE, thread)
                        cuda.syncthreads()
                        for n in range(scores_each):
                            tile_sums[n] = zero
                        for key_index in range(KEYS):
                            for i in range(rows_each):
                                if tile_states[row0 + i, key_index] != UNSEEN:
                                    dscore = tile_dscores[row0 + i, key_index]
                                    for c in range(EACH):
                                        product = dscore * tiles.keys[key_index, key0 + c]
                                        tile_sums[i * EACH + c] += product
                        for n in range(scores_each):
                            sums[chunk * scores_each + n] += tile_sums[n]

        if flags is not None:
            for i in range(rows_each):
                row = first + row0 + i
                stale[row0 + i, lane] = 0
                if row < q_len and not is_part_finite(dq[batch, head], row, key0):
                    stale[row0 + i, lane] = 1
            cuda.syncthreads()
        for i in range(rows_each):
            row = first + row0 + i
            wanted = row < q_len
            if flags is not None:
                any_stale = 0
                for n in range(ACROSS):
                    any_stale |= stale[row0 + i, n]
                wanted = wanted and any_stale != 0
            if wanted:
                for chunk in range(chunks):
                    for c in range(EACH):
                        column = chunk * SLICE + key0 + c
                        if column < head_dim:
                            total = sums[chunk * scores_each + i * EACH + c] * call.scale
                            dq[batch, head, row, column] = narrow(total)

    return Kernel(
        name=given.name("simt_query_gradient", columns, flags=has_flags),
        function=add_keys,
        signature=(
            array(given.query, 4),
            integers(has_flags, 3, types.int32),
            types.int64,
            _inputs(given),
            given.call,
        ),
        threads=THREADS,
    )


# --- dk and dv -----------------------------------------------------------------------------------


def key_value_gradients(
    given: Given, head_dim: int, value_head_dim: int, *, flags: bool = False
) -> Kernel:
    """Return the kernel for dk and dv.

    Parameters
    ----------
    given : Given
        What the call has.
    head_dim, value_head_dim : int
        Sizes up to the next power of 2 share a kernel.
    flags : bool
        As for `query_gradient`.

    Returns
    -------
    Kernel
        For a grid of `key_blocks`. Its arguments::

            dk, dv                (batch, kv_heads, kv_len, dim), written
            flags                 int32 (batch, kv_heads, tiles of rows_per_flag keys)
            rows_per_flag         int64

        and the inputs and call of `query_gradient`. With flags, a row of dk, and one of dv, is
        stored if it is not finite.
    """
    return _key_value_gradients(given, bucket(head_dim), bucket(value_head_dim), flags)


def key_blocks(batch: int, kv_heads: int, kv_len: int) -> int:
    """Return how many blocks `key_value_gradients` is launched with."""
    return batch * kv_heads * -(-kv_len // KEYS)


@functools.cache
def _key_value_gradients(given: Given, columns: int, value_columns: int, has_flags: bool) -> Kernel:
    number = accumulator(given.query)
    float_dtype = np.dtype(number.name)
    zero = number(0)
    rows = rows_of(given.query, max(columns, value_columns))
    rows_each = rows // DOWN
    scores_each = rows_each * EACH
    keys_each = KEYS // DOWN
    tile_sums_each = keys_each * EACH  # of a chunk of dk or dv
    chunks, value_chunks = columns // SLICE, value_columns // SLICE
    dk_each, dv_each = chunks * tile_sums_each, value_chunks * tile_sums_each
    load_query, narrow = loader(given.query, given.query), element(given.key).narrow
    is_part_finite = finiteness(given.key)
    tile_gradients = _tile_gradients(given, False)

    @device
    def multiply_transposed(tile_sums, factors, states, least_state, row_slice, key0, column0):
        """Set a thread's sums to those of factors.T @ row_slice, over pairs of such states."""
        for n in range(tile_sums_each):
            tile_sums[n] = zero
        for r in range(rows):
            for i in range(keys_each):
                if states[r, key0 + i] >= least_state:
                    factor = factors[r, key0 + i]
                    for c in range(EACH):
                        tile_sums[i * EACH + c] += factor * row_slice[r, column0 + c]

    def add_queries(dk, dv, flags, rows_per_flag, inputs, call):
        tiles = Tiles(
            cuda.shared.array((rows, PITCH), float_dtype),
            cuda.shared.array((KEYS, PITCH), float_dtype),
        )
        tile_probs = cuda.shared.array((rows, KEYS), float_dtype)
        tile_dscores = cuda.shared.array((rows, KEYS), float_dtype)
        tile_states = cuda.shared.array((rows, KEYS), np.uint8)
        stale = cuda.shared.array((2, KEYS, ACROSS), np.uint8)  # of dk and of dv

        batches, kv_heads, kv_len, head_dim = inputs.key.shape
        q_len, value_head_dim = inputs.query.shape[2], inputs.value.shape[3]
        group = inputs.query.shape[1] // kv_heads
        block = cuda.blockIdx.x
        kv_head = block % kv_heads
        batch = block // kv_heads % batches
        start = block // (kv_heads * batches) * KEYS
        thread = cuda.threadIdx.x
        lane = thread % ACROSS
        row0, pair_key0 = thread // ACROSS * rows_each, lane * EACH  # of this thread's pairs
        key0, column0 = thread // ACROSS * keys_each, lane * EACH  # of its sums of dk and dv
        if flags is not None:
            end = min(start + KEYS, kv_len)
            if not is_flagged(flags[batch, kv_head], rows_per_flag, start, end):
                return

        window = window_of(call, batch, kv_len)
        # The rows whose windows reach the tile.
        first_row = max(0, start - window.offset - window.right)
        end_row = min(q_len, start + KEYS - window.offset + window.left)
        if start >= window.length:
            end_row = 0

        work = Work(
            cuda.local.array(scores_each, np.int32),
            cuda.local.array(scores_each, float_dtype),
            cuda.local.array(scores_each, float_dtype),
        )
        tile_sums = cuda.local.array(tile_sums_each, float_dtype)
        dk_sums = cuda.local.array(dk_each, float_dtype)
        dv_sums = cuda.local.array(dv_each, float_dtype)
        for n in range(dk_each):
            dk_sums[n] = zero
        for n in range(dv_each):
            dv_sums[n] = zero
        for head in range(kv_head * group, kv_head * group + group):
            own = of_head(inputs, batch, head, kv_head)
            for first in range(first_row // rows * rows, end_row, rows):
                place = Place(batch, head, first, start, window)
                if tile_gradients(work, tiles, own, call, place):
                    for n in range(scores_each):
                        i, j = row0 + n // EACH, pair_key0 + n % EACH
                        tile_probs[i, j] = work.probs[n]
                        tile_dscores[i, j] = work.dscores[n]
                        tile_states[i, j] = work.states[n]
                    for chunk in range(chunks):
                        if chunk * SLICE < head_dim:
                            cuda.syncthreads()
                            load_query(tiles.queries, own.query, first, chunk * SLICE, thread)
                            cuda.syncthreads()
                            multiply_transposed(
                                tile_sums,
                                tile_dscores,
                                tile_states,
                                DROPPED,
                                tiles.queries,
                                key0,
                                column0,
                            )
                            for n in range(tile_sums_each):
                                dk_sums[chunk * tile_sums_each + n] += tile_sums[n]
                    for chunk in range(value_chunks):
                        if chunk * SLICE < value_head_dim:
                            cuda.syncthreads()
                            load_query(tiles.queries, own.grad_out, first, chunk * SLICE, thread)
                            cuda.syncthreads()
                            multiply_transposed(
                                tile_sums,
                                tile_probs,
                                tile_states,
                                KEPT,
                                tiles.queries,
                                key0,
                                column0,
                            )
                            for n in range(tile_sums_each):
                                dv_sums[chunk * tile_sums_each + n] += tile_sums[n]

        if flags is not None:
            for i in range(keys_each):
                row = start + key0 + i
                stale[0, key0 + i, lane] = 0
                stale[1, key0 + i, lane] = 0
                if row < kv_len:
                    if not is_part_finite(dk[batch, kv_head], row, column0):
                        stale[0, key0 + i, lane] = 1
                    if not is_part_finite(dv[batch, kv_head], row, column0):
                        stale[1, key0 + i, lane] = 1
            cuda.syncthreads()
        for i in range(keys_each):
            row = start + key0 + i
            dk_wanted = row < kv_len
            dv_wanted = row < kv_len
            if flags is not None:
                dk_stale, dv_stale = 0, 0
                for n in range(ACROSS):
                    dk_stale |= stale[0, key0 + i, n]
                    dv_stale |= stale[1, key0 + i, n]
                dk_wanted = dk_wanted and dk_stale != 0
                dv_wanted = dv_wanted and dv_stale != 0
            if dk_wanted:
                for chunk in range(chunks):
                    for c in range(EACH):
                        column = chunk * SLICE + column0 + c
                        if column < head_dim:
                            total = dk_sums[chunk * tile_sums_each + i * EACH + c] * call.scale
                            dk[batch, kv_head, row, column] = narrow(total)
            if dv_wanted:
                for chunk in range(value_chunks):
                    for c in range(EACH):
                        column = chunk * SLICE + column0 + c
                        if column < value_head_dim:
                            total = dv_sums[chunk * tile_sums_each + i * EACH + c]
                            dv[batch, kv_head, row, column] = narrow(total)

    return Kernel(
        name=given.name("simt_key_value_gradients", columns, value_columns, flags=has_flags),
        function=add_queries,
        signature=(
            array(given.key, 4),
            array(given.key, 4),
            integers(has_flags, 3, types.int32),
            types.int64,
            _inputs(given),
            given.call,
        ),
        threads=THREADS,
    )


# --- dbias ---------------------------------------------------------------------------------------


@functools.cache
def bias_gradient(given: Given) -> Kernel:
    """Return the kernel for dbias, summed over the axes that bias was broadcast over.

    Parameters
    ----------
    given : Given
        What the call has; a bias, too.

    Returns
    -------
    Kernel
        For a grid of `bias_blocks`. Its arguments are dbias, of bias's dtype, with 4 axes that are
        1 where they were broadcast (bias itself is passed with strides of 0), and
        `query_gradient`'s inputs and call.
    """
    number = accumulator(given.query)
    float_dtype = np.dtype(number.name)
    zero = number(0)
    rows = ROWS[given.query]
    rows_each = rows // DOWN
    scores_each = rows_each * EACH
    assert given.bias is not None
    narrow = element(given.bias).narrow
    stored = np.float64 if given.bias == "float64" else np.float32
    tile_gradients = _tile_gradients(given, True)

    def add_pairs(dbias, inputs, call):
        tiles = Tiles(
            cuda.shared.array((rows, PITCH), float_dtype),
            cuda.shared.array((KEYS, PITCH), float_dtype),
        )
        tile_sums = cuda.shared.array((rows, KEYS), float_dtype)

        batches, heads, q_len, _ = inputs.query.shape
        kv_len, group = inputs.key.shape[2], heads // inputs.key.shape[1]
        own_batches, own_heads, own_rows, own_keys = dbias.shape
        row_tiles = (own_rows + rows - 1) // rows
        key_tiles = (own_keys + KEYS - 1) // KEYS
        block = cuda.blockIdx.x
        own_start = block % key_tiles * KEYS
        own_first = block // key_tiles % row_tiles * rows
        own_head = block // (key_tiles * row_tiles) % own_heads
        own_batch = block // (key_tiles * row_tiles * own_heads)
        thread = cuda.threadIdx.x
        row0, key0 = thread // ACROSS * rows_each, thread % ACROSS * EACH

        # What the block walks: its own tile of an axis, or all of one that was broadcast.
        end_batch = own_batch + 1 if own_batches == batches else batches
        end_head = own_head + 1 if own_heads == heads else heads
        end_row = min(own_first + rows, q_len) if own_rows == q_len else q_len
        end_start = min(own_start + KEYS, kv_len) if own_keys == kv_len else kv_len

        work = Work(
            cuda.local.array(scores_each, np.int32),
            cuda.local.array(scores_each, float_dtype),
            cuda.local.array(scores_each, float_dtype),
        )
        sums = cuda.local.array(scores_each, float_dtype)
        for n in range(scores_each):
            sums[n] = zero
        for batch in range(own_batch, end_batch):
            window = window_of(call, batch, kv_len)
            for head in range(own_head, end_head):
                own = of_head(inputs, batch, head, head // group)
                for first in range(own_first, end_row, rows):
                    first_key = keys_of_row(first, window)[0]
                    end_key = keys_of_row(min(first + rows, q_len) - 1, window)[1]
                    for start in range(own_start, end_start, KEYS):
                        place = Place(batch, head, first, start, window)
                        reached = start < end_key and start + KEYS > first_key
                        if reached and tile_gradients(work, tiles, own, call, place):
                            for n in range(scores_each):
                                if work.states[n] != UNSEEN:
                                    sums[n] += work.dscores[n]

        # Of an axis that was broadcast, the tile's rows or columns become one.
        for n in range(scores_each):
            tile_sums[row0 + n // EACH, key0 + n % EACH] = sums[n]
        cuda.syncthreads()
        depth = 1 if own_rows == q_len else rows
        width = 1 if own_keys == kv_len else KEYS
        for n in range(thread, rows // depth * (KEYS // width), THREADS):
            row, column = n // (KEYS // width), n % (KEYS // width)
            if own_first + row < own_rows and own_start + column < own_keys:
                total = zero
                for i in range(row, row + depth):
                    for j in range(column, column + width):
                        total += tile_sums[i, j]
                to_row, to_column = own_first + row, own_start + column
                dbias[own_batch, own_head, to_row, to_column] = narrow(stored(total))

    return Kernel(
        name=given.name("simt_bias_gradient"),
        function=add_pairs,
        signature=(array(given.bias, 4), _inputs(given), given.call),
        threads=THREADS,
    )


def bias_blocks(query_dtype: str, shape: tuple[int, int, int, int]) -> int:
    """Return how many blocks `bias_gradient` is launched with for a dbias of that shape."""
    batch, heads, q_len, kv_len = shape
    return batch * heads * -(-q_len // ROWS[query_dtype]) * -(-kv_len // KEYS)
