# SPDX-License-Identifier: Apache-2.0
"""The gradients by warps that multiply: `mma.sync`, sm_80 and later, head_dim 64 and 128.

`dkdv` gives dk and dv of a tile of keys, `dq` gives dq of a tile of queries. Each sum has one
owner, which adds in one order: no atomics, and the same bits in every run. The price is that both
compute the probabilities: seven products instead of five.

Both have one form. A block owns 128 rows, each warp 16 of them. Two matrices of its rows, K and V
or Q and dO, stay in registers as left factors; the other two pass through shared memory in tiles,
two of each: while one is used, the next is on its way. With S' for the transposed:

    dkdv   S' = K Q', dP' = V dO', P' = exp(S' - lse), dS' = P' (dP' - delta)
           dV += P' dO, dK += dS' Q
    dq     S = Q K', dP = dO V', P = exp(S - lse), dS = P (dP - delta)
           dQ += dS K

A warp has all of P and dS of its own rows, and what one product leaves is laid out as the other's
factor: they never leave the warp. Tiles without a visible pair are not visited; where some pair is
hidden, P and dS of hidden pairs become 0, whatever their rows hold.

Read `mma.py` first. Called by `_backward.py`, once `simt_backward.prepare` has left lse2 and delta
of every row; `rows.py` says which keys a row sees, `ptx.py` has the statements.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
from numba import cuda

from fastattn.cuda import ptx
from fastattn.cuda.kernels import MOST_OFFSET, PADDING, TENSOR_CORES, Kernel
from fastattn.cuda.kernels.rows import (
    device_function,
    end_key,
    f32,
    first_key,
    i32,
    i64,
    own_number,
    scores,
    sums,
)
from fastattn.cuda.kernels.tiles import MMA_DKDV_QUERIES as QUERIES
from fastattn.cuda.kernels.tiles import MMA_DQ_KEYS as KEYS
from fastattn.cuda.ptx import (
    any_in_block,
    both,
    commit_copies,
    copy_16,
    copy_16_if,
    elect,
    ex2,
    load_float32,
    load_matrices,
    load_matrices_transposed,
    load_shared_float32_2,
    maximum,
    minimum,
    quotient,
    select,
    shared_address,
    store_int32,
    store_int32_if,
)

ROWS = PADDING  # of a block
WARPS = ROWS // 16
THREADS = WARPS * 32
DKDV_SIGNATURE = (*(i64,) * 11, *(i32,) * 8, *(i64,) * 18, *(f32,) * 3)
DQ_SIGNATURE = (*(i64,) * 10, *(i32,) * 8, *(i64,) * 15, *(f32,) * 3)


@functools.cache
def _steps(dtype: str, head_dim: int, tile_rows: int, softcapped: bool) -> SimpleNamespace:
    """Return what both kernels do with matrices of head_dim columns and tiles of so many rows.

    Rows lie in shared memory as `mma.shared_rows` says: chunk c of row r, of 16 bytes, is at place
    c ^ (r % 8).

    copy_own(shared, source, stride, first, end), copy_tile(...)
        Begin to copy ROWS or tile_rows rows of a matrix, from `first`, as zeros from `end`.
    load_left(left, shared)
        Read this warp's 16 rows as a left factor.
    multiply_transposed(result, left, shared)
        result = left tile'
    weigh(s, dp, at, lse2, delta, scale)
        Replace a score by its P, and its dP by dS; softcapped, the score is a tanh.
    hide(numbers, first, end, column)
        Replace by 0 what is not within first[h] <= column of the element < end[h].
    accumulate(acc, weights, shared)
        acc += weights tile, the weights rounded.
    store(target, stride, acc, factor, first, end)
        Store this warp's rows of the block's, acc * factor rounded.
    """
    chunks = head_dim // 8
    row_bytes = head_dim * 2
    rows_at_once = THREADS // chunks
    steps = head_dim // 16  # of 16 columns, in a product over head_dim
    tile_steps = tile_rows // 16
    s_tiles, o_tiles = tile_rows // 8, head_dim // 8  # of 8 columns
    s_pairs, o_pairs = s_tiles // 2, o_tiles // 2
    multiply, pair = ptx.multiply[dtype], ptx.pack[dtype]

    def rows_copier(copies):
        @device_function
        def copy_rows(shared, source, stride, first, end):
            thread = i32(cuda.threadIdx.x)
            row = quotient(thread, i32(chunks))
            chunk = i32(thread - row * i32(chunks))
            target = i32(shared + row * i32(row_bytes) + ((chunk ^ (row & i32(7))) << i32(4)))
            row += first
            own = source + (i64(row) * stride + i64(chunk * i32(8))) * i64(2)
            for i in range(copies):
                size = select(row + i32(i * rows_at_once) < end, i32(16), i32(0))
                copy_16(target + i32(i * rows_at_once * row_bytes), own, size)
                own += stride * i64(rows_at_once * 2)

        return copy_rows

    @device_function
    def chunk_of(address, step):
        """Return the address of the chunks 2 * step onwards, given that of the first."""
        swapped = step * 2 & 7
        return i32((address ^ i32(swapped * 16)) + i32((step * 2 - swapped) * 16))

    @device_function
    def load_left(left, shared):
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        row = (thread >> i32(5)) * i32(16) + (lane & i32(15))
        chunk = lane >> i32(4)
        own = i32(shared + row * i32(row_bytes) + ((chunk ^ (lane & i32(7))) << i32(4)))
        for k in range(steps):
            load_matrices(left, k * 4, chunk_of(own, k))

    @device_function
    def multiply_transposed(result, left, shared):
        right = cuda.local.array(4, dtype=np.int32)
        lane = i32(cuda.threadIdx.x) & i32(31)
        row, chunk = (lane & i32(7)) + ((lane >> i32(4)) << i32(3)), (lane >> i32(3)) & i32(1)
        own = i32(shared + row * i32(row_bytes) + ((chunk ^ (lane & i32(7))) << i32(4)))
        for i in range(s_tiles * 4):
            result[i] = f32(0)
        for k in range(steps):
            for j in range(s_pairs):
                load_matrices(right, 0, chunk_of(own, k) + i32(j * 16 * row_bytes))
                multiply(result, j * 8, left, k * 4, right[0], right[1])
                multiply(result, j * 8 + 4, left, k * 4, right[2], right[3])

    @device_function
    def weigh_plain(s, dp, at, lse2, delta, scale):
        s[at] = ex2(s[at] * scale - lse2)
        dp[at] = s[at] * (dp[at] - delta)

    @device_function
    def weigh_capped(s, dp, at, lse2, delta, scale):
        slope = f32(1) - s[at] * s[at]
        s[at] = ex2(s[at] * scale - lse2)
        dp[at] = s[at] * (dp[at] - delta) * slope

    @device_function
    def hide(numbers, first, end, column):
        for h in range(2):
            for j in range(s_tiles):
                for e in range(2):
                    at = j * 4 + h * 2 + e
                    here = column + i32(j * 8 + e)
                    seen = both(here >= first[h], here < end[h])
                    numbers[at] = select(seen, numbers[at], f32(0))

    @device_function
    def accumulate(acc, weights, shared):
        left = cuda.local.array(4, dtype=np.int32)
        right = cuda.local.array(4, dtype=np.int32)
        lane = i32(cuda.threadIdx.x) & i32(31)
        row, chunk = lane & i32(15), lane >> i32(4)
        own = i32(shared + row * i32(row_bytes) + ((chunk ^ (lane & i32(7))) << i32(4)))
        for k in range(tile_steps):
            for i in range(4):
                left[i] = pair(weights[k * 8 + i * 2], weights[k * 8 + i * 2 + 1])
            for j in range(o_pairs):
                load_matrices_transposed(right, 0, chunk_of(own, j) + i32(k * 16 * row_bytes))
                multiply(acc, j * 8, left, 0, right[0], right[1])
                multiply(acc, j * 8 + 4, left, 0, right[2], right[3])

    @device_function
    def store(target, stride, acc, factor, first, end):
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        for h in range(2):
            row = first + (thread >> i32(5)) * i32(16) + i32(h * 8) + (lane >> i32(2))
            own = target + (i64(row) * stride + i64((lane & i32(3)) << i32(1))) * i64(2)
            for j in range(o_tiles):
                at = j * 4 + h * 2
                rounded = pair(acc[at] * factor, acc[at + 1] * factor)
                store_int32_if(row < end, own + i64(j * 16), rounded)

    return SimpleNamespace(
        copy_own=rows_copier(ROWS // rows_at_once),
        copy_tile=rows_copier(tile_rows // rows_at_once),
        load_left=load_left,
        multiply_transposed=multiply_transposed,
        weigh=weigh_capped if softcapped else weigh_plain,
        hide=hide,
        accumulate=accumulate,
        store=store,
    )


@functools.cache
def dkdv(dtype: str, head_dim: int, softcapped: bool = False) -> Kernel:
    """Return the kernel of dk and dv.

    Its grid has a block for each 128 keys, kv head and batch element. Arguments, strides in
    elements:

    query, key, value, grad_out, lse2, delta, dk, dv, flags, lengths, offsets
        Addresses. lse2 and delta are float32 (batch, heads, q_len rounded up to 128): lse times
        log2(e), or +inf for a row that sees nothing, and the sum of grad_out * out less the
        gradient of lse. flags is int32 (batch, kv heads, key tiles) and becomes 1 where a row of dk
        or dv is not finite, or is 0 for none; lengths and offsets are int64 (batch,), or 0: then
        the numbers length and offset count.
    q_len, kv_len, heads, group, left, right, length, offset
        Row i sees the keys from i + offset - left to i + offset + right, below length. heads are
        those of query, group of them share a kv head.
    q_batch, q_head, q_row, k_batch, ..., v_batch, ..., g_batch, ..., dk_batch, ..., dv_batch, ...
        Strides; g is grad_out.
    dk_scale
        scale, which dk is multiplied by.
    scale, cap_factor
        scale * log2(e), and 0. softcapped: softcap * log2(e), and 2 * log2(e) * scale / softcap.
    """
    q_tile = QUERIES[head_dim]
    own_bytes, tile_bytes = ROWS * head_dim * 2, q_tile * head_dim * 2
    number_bytes = q_tile * 4  # of lse2, and of delta
    stage_bytes = 2 * (tile_bytes + number_bytes)
    s_tiles, o_tiles = q_tile // 8, head_dim // 8
    s_count, o_count, left_count = s_tiles * 4, o_tiles * 4, head_dim // 4
    do = _steps(dtype, head_dim, q_tile, softcapped)
    copy_own, copy_tile, load_left = do.copy_own, do.copy_tile, do.load_left
    multiply_transposed, weigh, hide = do.multiply_transposed, do.weigh, do.hide
    accumulate, store = do.accumulate, do.store
    softcap, not_finite = scores(1, s_tiles).softcap, sums(1, o_tiles).not_finite
    wait_all = ptx.wait_copies[0]

    @device_function
    def copy_stage(shared, query, q_row, grad_out, g_row, lse2, delta, row, end_row):
        """Copy a tile of rows of Q and dO, and of their lse2 and delta."""
        copy_tile(shared, query, q_row, row, end_row)
        copy_tile(shared + i32(tile_bytes), grad_out, g_row, row, end_row)
        thread = i32(cuda.threadIdx.x)
        copies = select(thread < i32(number_bytes // 16), i32(1), i32(0))
        target = shared + i32(2 * tile_bytes) + thread * i32(16)
        own = i64(row) * i64(4) + i64(thread) * i64(16)
        copy_16_if(copies, target, lse2 + own)
        copy_16_if(copies, target + i32(number_bytes), delta + own)
        commit_copies()

    def differentiate(
        query, key, value, grad_out, lse2, delta, dk, dv, flags, lengths, offsets,
        q_len, kv_len, heads, group, left, right, length, offset,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        g_batch, g_head, g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
        dk_scale, scale, cap_factor,
    ):  # fmt: skip
        # ---- which keys, and which rows see one of them
        k_tiles = quotient(kv_len + i32(ROWS - 1), i32(ROWS))
        block = i32(cuda.blockIdx.x)
        pair_number = quotient(block, k_tiles)
        k_block = i32(block - pair_number * k_tiles)  # under a causal mask, the longest first
        kv_heads = quotient(heads, group)
        batch = quotient(pair_number, kv_heads)
        kv_head = i32(pair_number - batch * kv_heads)
        start = i32(k_block * i32(ROWS))
        last_key = i32(start + i32(ROWS - 1))
        length = own_number(lengths, batch, length, i32(0), kv_len)
        offset = own_number(offsets, batch, offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))
        first_row = i32(
            quotient(maximum(i32(0), start - offset - right), i32(q_tile)) * i32(q_tile)
        )
        end_row = minimum(q_len, minimum(last_key, length - i32(1)) - offset + left + i32(1))
        head = i32(kv_head * group)
        end_head = i32(head + group)
        if start >= length or first_row >= end_row:
            end_head = head  # none does

        # ---- this thread's part of K and V
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))
        key += (i64(batch) * k_batch + i64(kv_head) * k_head) * i64(2)
        value += (i64(batch) * v_batch + i64(kv_head) * v_head) * i64(2)
        copy_own(shared, key, k_row, start, length)
        copy_own(shared + i32(own_bytes), value, v_row, start, length)
        commit_copies()
        k = cuda.local.array(left_count, dtype=np.int32)
        v = cuda.local.array(left_count, dtype=np.int32)
        wait_all()
        cuda.syncthreads()
        load_left(k, shared)
        load_left(v, shared + i32(own_bytes))
        cuda.syncthreads()  # from here on the tiles of queries lie there

        s = cuda.local.array(s_count, dtype=np.float32)
        dp = cuda.local.array(s_count, dtype=np.float32)
        dk_acc = cuda.local.array(o_count, dtype=np.float32)
        dv_acc = cuda.local.array(o_count, dtype=np.float32)
        row_lse2 = cuda.local.array(2, dtype=np.float32)
        row_delta = cuda.local.array(2, dtype=np.float32)
        first = cuda.local.array(2, dtype=np.int32)
        end = cuda.local.array(2, dtype=np.int32)
        for i in range(o_count):
            dk_acc[i] = f32(0)
            dv_acc[i] = f32(0)
        own_key = i32(start + (thread >> i32(5)) * i32(16) + (lane >> i32(2)))
        own_column = i32((lane & i32(3)) << i32(1))

        # ---- the rows of every head of the group
        number_head = i64(quotient(q_len + i32(ROWS - 1), i32(ROWS))) * i64(ROWS * 4)
        query += (i64(batch) * q_batch + i64(head) * q_head) * i64(2)
        grad_out += (i64(batch) * g_batch + i64(head) * g_head) * i64(2)
        lse2 += i64(batch * heads + head) * number_head
        delta += i64(batch * heads + head) * number_head
        row = first_row
        buffer = shared
        if head < end_head:
            copy_stage(buffer, query, q_row, grad_out, g_row, lse2, delta, row, end_row)
        while head < end_head:
            wait_all()
            cuda.syncthreads()  # this tile is here, and nobody reads the one before
            here = buffer
            this_row = row
            buffer = i32(shared + i32(stage_bytes) - (buffer - shared))
            row = i32(row + i32(q_tile))
            if row >= end_row:
                row = first_row
                head = i32(head + i32(1))
                query += q_head * i64(2)
                grad_out += g_head * i64(2)
                lse2 += number_head
                delta += number_head
            if head < end_head:
                copy_stage(buffer, query, q_row, grad_out, g_row, lse2, delta, row, end_row)

            multiply_transposed(s, k, here)
            multiply_transposed(dp, v, here + i32(tile_bytes))
            if softcapped:
                softcap(s, cap_factor)
            numbers = here + i32(2 * tile_bytes) + own_column * i32(4)
            for j in range(s_tiles):
                load_shared_float32_2(row_lse2, 0, numbers + i32(j * 32))
                load_shared_float32_2(row_delta, 0, numbers + i32(j * 32 + number_bytes))
                for h in range(2):
                    for e in range(2):
                        weigh(s, dp, j * 4 + h * 2 + e, row_lse2[e], row_delta[e], scale)
            last_row = i32(this_row + i32(q_tile - 1))
            if (
                last_row >= q_len
                or start < first_key(last_row, offset, left)
                or last_key >= end_key(this_row, offset, right, length)
            ):
                for h in range(2):
                    sees = own_key + i32(h * 8) - offset
                    first[h] = sees - right
                    end[h] = minimum(q_len, sees + left + i32(1))
                    end[h] = select(own_key + i32(h * 8) < length, end[h], i32(0))
                hide(s, first, end, this_row + own_column)
                hide(dp, first, end, this_row + own_column)
            accumulate(dv_acc, s, here + i32(tile_bytes))
            accumulate(dk_acc, dp, here)

        dk += (i64(batch) * dk_batch + i64(kv_head) * dk_head) * i64(2)
        dv += (i64(batch) * dv_batch + i64(kv_head) * dv_head) * i64(2)
        store(dk, dk_row, dk_acc, dk_scale, start, kv_len)
        store(dv, dv_row, dv_acc, f32(1), start, kv_len)
        if flags != i64(0):
            nothing = not_finite(dk_acc) + not_finite(dv_acc)
            found = any_in_block(select(nothing == f32(0), i32(0), i32(1)))
            if elect(thread == i32(0)):
                store_int32(flags + i64(pair_number * k_tiles + k_block) * i64(4), found)

    return Kernel(
        name=f"fastattn_mma_dkdv_{dtype}_{head_dim}" + ("_softcap" if softcapped else ""),
        function=differentiate,
        signature=DKDV_SIGNATURE,
        threads=THREADS,
        shared_bytes=2 * max(own_bytes, stage_bytes),
        needs=TENSOR_CORES,
    )


@functools.cache
def dq(dtype: str, head_dim: int, softcapped: bool = False) -> Kernel:
    """Return the kernel of dq.

    Its grid has a block for each 128 queries, head and batch element. Arguments, strides in
    elements:

    query, key, value, grad_out, lse2, delta, dq, flags, lengths, offsets
        Addresses. flags is int32 (batch, heads, query tiles) and becomes 1 where a row of dq is not
        finite, or is 0 for none; the others are as those of `dkdv`.
    q_len, kv_len, heads, group, left, right, length, offset
        As those of `dkdv`.
    q_batch, q_head, q_row, k_batch, ..., v_batch, ..., g_batch, ..., dq_batch, ...
        Strides; g is grad_out.
    dq_scale
        scale, which dq is multiplied by.
    scale, cap_factor
        As those of `dkdv`.
    """
    k_tile = KEYS[head_dim]
    own_bytes, tile_bytes = ROWS * head_dim * 2, k_tile * head_dim * 2
    stage_bytes = 2 * tile_bytes
    s_tiles, o_tiles = k_tile // 8, head_dim // 8
    s_count, o_count, left_count = s_tiles * 4, o_tiles * 4, head_dim // 4
    do = _steps(dtype, head_dim, k_tile, softcapped)
    copy_own, copy_tile, load_left = do.copy_own, do.copy_tile, do.load_left
    multiply_transposed, weigh, hide = do.multiply_transposed, do.weigh, do.hide
    accumulate, store = do.accumulate, do.store
    softcap, not_finite = scores(1, s_tiles).softcap, sums(1, o_tiles).not_finite
    wait_all = ptx.wait_copies[0]

    def differentiate(
        query, key, value, grad_out, lse2, delta, dq, flags, lengths, offsets,
        q_len, kv_len, heads, group, left, right, length, offset,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        g_batch, g_head, g_row, dq_batch, dq_head, dq_row,
        dq_scale, scale, cap_factor,
    ):  # fmt: skip
        # ---- which rows, and which keys they see
        q_tiles = quotient(q_len + i32(ROWS - 1), i32(ROWS))
        block = i32(cuda.blockIdx.x)
        pair_number = quotient(block, q_tiles)
        # Under a causal mask, the longest first.
        q_block = i32(q_tiles - i32(1) - (block - pair_number * q_tiles))
        batch = quotient(pair_number, heads)
        head = i32(pair_number - batch * heads)
        first_row = i32(q_block * i32(ROWS))
        last_row = i32(minimum(first_row + i32(ROWS), q_len) - i32(1))
        length = own_number(lengths, batch, length, i32(0), kv_len)
        offset = own_number(offsets, batch, offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))
        start = i32(quotient(first_key(first_row, offset, left), i32(k_tile)) * i32(k_tile))
        end_start = end_key(last_row, offset, right, length)
        all_from = first_key(last_row, offset, left)  # keys that every row sees
        all_to = end_key(first_row, offset, right, length)

        # ---- this thread's part of Q and dO
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))
        query += (i64(batch) * q_batch + i64(head) * q_head) * i64(2)
        grad_out += (i64(batch) * g_batch + i64(head) * g_head) * i64(2)
        copy_own(shared, query, q_row, first_row, q_len)
        copy_own(shared + i32(own_bytes), grad_out, g_row, first_row, q_len)
        commit_copies()
        q = cuda.local.array(left_count, dtype=np.int32)
        g = cuda.local.array(left_count, dtype=np.int32)
        row_lse2 = cuda.local.array(2, dtype=np.float32)
        row_delta = cuda.local.array(2, dtype=np.float32)
        own_row = i32(first_row + (thread >> i32(5)) * i32(16) + (lane >> i32(2)))
        own_column = i32((lane & i32(3)) << i32(1))
        own_number_at = (i64(pair_number) * i64(q_tiles * i32(ROWS)) + i64(own_row)) * i64(4)
        for h in range(2):
            row_lse2[h] = load_float32(lse2 + own_number_at + i64(h * 32))
            row_delta[h] = load_float32(delta + own_number_at + i64(h * 32))
        wait_all()
        cuda.syncthreads()
        load_left(q, shared)
        load_left(g, shared + i32(own_bytes))
        cuda.syncthreads()  # from here on the tiles of keys lie there

        s = cuda.local.array(s_count, dtype=np.float32)
        dp = cuda.local.array(s_count, dtype=np.float32)
        acc = cuda.local.array(o_count, dtype=np.float32)
        first = cuda.local.array(2, dtype=np.int32)
        end = cuda.local.array(2, dtype=np.int32)
        for i in range(o_count):
            acc[i] = f32(0)

        # ---- the keys
        kv_head = quotient(head, group)
        key += (i64(batch) * k_batch + i64(kv_head) * k_head) * i64(2)
        value += (i64(batch) * v_batch + i64(kv_head) * v_head) * i64(2)
        buffer = shared
        if start < end_start:
            copy_tile(buffer, key, k_row, start, end_start)
            copy_tile(buffer + i32(tile_bytes), value, v_row, start, end_start)
            commit_copies()
        while start < end_start:
            wait_all()
            cuda.syncthreads()  # this tile is here, and nobody reads the one before
            here = buffer
            buffer = i32(shared + i32(stage_bytes) - (buffer - shared))
            following = i32(start + i32(k_tile))
            if following < end_start:
                copy_tile(buffer, key, k_row, following, end_start)
                copy_tile(buffer + i32(tile_bytes), value, v_row, following, end_start)
                commit_copies()

            multiply_transposed(s, q, here)
            multiply_transposed(dp, g, here + i32(tile_bytes))
            if softcapped:
                softcap(s, cap_factor)
            for j in range(s_tiles):
                for h in range(2):
                    for e in range(2):
                        weigh(s, dp, j * 4 + h * 2 + e, row_lse2[h], row_delta[h], scale)
            if start < all_from or following > all_to:
                for h in range(2):
                    first[h] = first_key(own_row + i32(h * 8), offset, left)
                    end[h] = end_key(own_row + i32(h * 8), offset, right, length)
                hide(dp, first, end, start + own_column)
            accumulate(acc, dp, here)
            start = following

        dq += (i64(batch) * dq_batch + i64(head) * dq_head) * i64(2)
        store(dq, dq_row, acc, dq_scale, first_row, q_len)
        if flags != i64(0):
            nothing = not_finite(acc)
            found = any_in_block(select(nothing == f32(0), i32(0), i32(1)))
            if elect(thread == i32(0)):
                store_int32(flags + i64(pair_number * q_tiles + q_block) * i64(4), found)

    return Kernel(
        name=f"fastattn_mma_dq_{dtype}_{head_dim}" + ("_softcap" if softcapped else ""),
        function=differentiate,
        signature=DQ_SIGNATURE,
        threads=THREADS,
        shared_bytes=2 * max(own_bytes, stage_bytes),
        needs=TENSOR_CORES,
    )
