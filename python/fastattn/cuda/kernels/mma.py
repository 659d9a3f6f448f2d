# SPDX-License-Identifier: Apache-2.0
"""Attention by warps that multiply: `mma.sync`, for sm_80 and later, in float16 and bfloat16.

The form of FlashAttention-2 [1]_. A block owns a tile of queries, each warp 16 or 32 of its rows.
Tiles of keys and values pass through shared memory, two of each: while one is multiplied, the next
is on its way. A warp keeps its sums, running maxima and probabilities in registers: what one
product leaves is laid out as the other's factor, so that the scores never leave the warp.

Read `simt.py` first. Called by `_forward.py`; `rows.py` has the softmax, `ptx.py` the statements.

.. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
   2023, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda import ptx
from fastattn.cuda.kernels import MOST_OFFSET, TENSOR_CORES, Kernel
from fastattn.cuda.kernels.rows import (
    LN2,
    LOWEST,
    device_function,
    end_key,
    f32,
    first_key,
    i32,
    i64,
    own_number,
    row_sum,
    scores,
    sums,
)
from fastattn.cuda.kernels.tiles import MMA as TILES
from fastattn.cuda.ptx import (
    any_in_block,
    both,
    commit_copies,
    copy_16,
    elect,
    lg2,
    load_matrices,
    load_matrices_transposed,
    minimum,
    product,
    quotient,
    rcp,
    select,
    shared_address,
    store_float32_if,
    store_int32,
    store_int32_if,
)

SIGNATURE = (*(i64,) * 8, *(i32,) * 8, *(i64,) * 12, f32, f32)


class SharedRows(NamedTuple):
    """How rows of 16-bit numbers lie in shared memory, for ldmatrix without bank conflicts.

    Chunks of 16 bytes are exchanged within a row by XOR with bits of the row's number, so that the
    eight rows that ldmatrix reads together lie in different banks.
    """

    bytes: int  # of a row
    shift: int  # which bits of the row's number
    bits: int  # how many chunks are exchanged, less one
    threads: int  # that copy a row together
    chunks: int  # of a row that each of them copies


def shared_rows(head_dim: int) -> SharedRows:
    """Return the layout of rows of a head_dim, a multiple of 32."""
    if head_dim % 64 == 0:
        return SharedRows(head_dim * 2, 0, 7, 8, head_dim // 64)
    return SharedRows(head_dim * 2, 1, 3, 4, head_dim // 32)


@functools.cache
def forward(dtype: str, head_dim: int, softcapped: bool = False) -> Kernel:
    """Return the forward kernel.

    Its grid has a block for each query tile, head and batch element. Arguments, strides in
    elements:

    query, key, value, out, lse, flags, lengths, offsets
        Addresses. lse is float32 (batch, heads, q_len); flags is int32 (batch, heads, query tiles)
        and becomes 1 where a row is not finite, or is 0 for none; lengths and offsets are int64
        (batch,), or 0: then the numbers length and offset count.
    q_len, kv_len, heads, group, left, right, length, offset
        Row i sees the keys from i + offset - left to i + offset + right, below length.
    q_batch, q_head, q_row, k_batch, ..., v_batch, ..., o_batch, o_head, o_row
        Strides.
    scale_log2, cap_factor
        scale * log2(e), and 0. softcapped: softcap * log2(e), and 2 * log2(e) * scale / softcap.
    """
    tile = TILES[head_dim]
    threads = tile.warps * 32
    q_tile, k_tile = tile.queries, tile.keys
    row_tiles = q_tile // (16 * tile.warps)  # of 16 rows, per warp
    s_tiles, o_tiles = k_tile // 8, head_dim // 8  # of 8 columns
    s_pairs, o_pairs, pv_steps = s_tiles // 2, o_tiles // 2, k_tile // 16
    # Longer loops are not unrolled.
    qk_parts = max(1, head_dim // 128)
    qk_steps = head_dim // 16 // qk_parts
    rows = shared_rows(head_dim)
    row_bytes, row_threads, row_chunks, shift, bits = (
        rows.bytes,
        rows.threads,
        rows.chunks,
        rows.shift,
        rows.bits,
    )
    rows_at_once = threads // row_threads
    q_copies, k_copies = q_tile // rows_at_once, k_tile // rows_at_once
    k_bytes = k_tile * row_bytes
    k_at = q_tile * row_bytes
    v_at = k_at + 2 * k_bytes
    s_count, o_count, row_count = row_tiles * s_tiles * 4, row_tiles * o_tiles * 4, row_tiles * 2
    factor_count = row_tiles * 4
    multiply, pair = ptx.multiply[dtype], ptx.pack[dtype]
    s_do, o_do = scores(row_tiles, s_tiles), sums(row_tiles, o_tiles)
    mask, softcap, softmax = s_do.mask, s_do.softcap, s_do.softmax
    scale_sums, not_finite = o_do.multiply, o_do.not_finite
    wait_all_but_one, wait_all = ptx.wait_copies[1], ptx.wait_copies[0]

    def rows_copier(copies):
        @device_function
        def copy_rows(target, source, stride, row, end):
            """Copy each rows_at_once-th row from `row`, as zeros from `end`."""
            own = source + i64(row) * stride * i64(2)
            for i in range(copies):
                size = select(row + i32(i * rows_at_once) < end, i32(16), i32(0))
                for c in range(row_chunks):
                    at = i32(i * rows_at_once * row_bytes + c * row_threads * 16)
                    copy_16(target + at, own + i64(c * row_threads * 16), size)
                own += stride * i64(rows_at_once * 2)

        return copy_rows

    copy_queries, copy_keys = rows_copier(q_copies), rows_copier(k_copies)

    @device_function
    def chunk_of(address, step):
        """Return the address of the chunks 2 * step onwards, given that of the first."""
        swapped = step * 2 & bits
        return (address ^ i32(swapped * 16)) + i32((step * 2 - swapped) * 16)

    def attend(
        query, key, value, out, lse, flags, lengths, offsets,
        q_len, kv_len, heads, group, left, right, length, offset,
        q_batch, q_head, q_row, k_batch, k_head, k_row,
        v_batch, v_head, v_row, o_batch, o_head, o_row,
        scale, cap_factor,
    ):  # fmt: skip
        # ---- which rows, and which keys they see
        q_tiles = quotient(i32(q_len + i32(q_tile - 1)), q_tile)
        block = i32(cuda.blockIdx.x)
        pair_number = quotient(block, q_tiles)
        # Under a causal mask, the longest first.
        q_block = i32(q_tiles - i32(1) - (block - pair_number * q_tiles))
        batch = quotient(pair_number, heads)
        head = i32(pair_number - batch * heads)
        kv_head = quotient(head, group)
        first_row = i32(q_block * i32(q_tile))
        last_row = minimum(first_row + i32(q_tile), q_len) - i32(1)
        length = own_number(lengths, batch, length, i32(0), kv_len)
        offset = own_number(offsets, batch, offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))
        start = first_key(first_row, offset, left) & i32(-k_tile)
        end = end_key(last_row, offset, right, length)
        all_from = first_key(last_row, offset, left)  # keys that every row sees
        all_to = end_key(first_row, offset, right, length)

        # ---- what this thread copies: some chunks of a row, and of the rows that follow
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        warp = thread >> i32(5)
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))
        copy_row = thread // i32(row_threads)
        chunk = thread % i32(row_threads)
        exchanged = chunk ^ ((copy_row >> i32(shift)) & i32(bits))
        copy_to = shared + copy_row * i32(row_bytes) + (exchanged << i32(4))
        column = i64(chunk) * i64(16)
        q_from = query + (i64(batch) * q_batch + i64(head) * q_head) * i64(2) + column
        k_from = key + (i64(batch) * k_batch + i64(kv_head) * k_head) * i64(2) + column
        v_from = value + (i64(batch) * v_batch + i64(kv_head) * v_head) * i64(2) + column
        copy_queries(copy_to, q_from, q_row, first_row + copy_row, q_len)
        copy_keys(copy_to + i32(k_at), k_from, k_row, start + copy_row, end)
        commit_copies()
        copy_keys(copy_to + i32(v_at), v_from, v_row, start + copy_row, end)
        commit_copies()

        # ---- where this thread's addresses for ldmatrix begin: of row and chunk, of a left factor
        # (and of transposed values), and of keys
        swap = (lane >> i32(shift)) & i32(bits)
        left_row, left_chunk = lane & i32(15), lane >> i32(4)
        right_row, right_chunk = (lane & i32(7)) + (left_chunk << i32(3)), (lane >> i32(3)) & i32(1)
        left_at = left_row * i32(row_bytes) + ((left_chunk ^ swap) << i32(4))
        q_read = shared + warp * i32(row_tiles * 16 * row_bytes) + left_at
        k_read = shared + i32(k_at) + right_row * i32(row_bytes) + ((right_chunk ^ swap) << i32(4))
        v_read = shared + i32(v_at) + left_at

        s = cuda.local.array(s_count, dtype=np.float32)
        acc = cuda.local.array(o_count, dtype=np.float32)
        factor = cuda.local.array(factor_count, dtype=np.int32)
        other = cuda.local.array(4, dtype=np.int32)
        highest = cuda.local.array(row_count, dtype=np.float32)
        total = cuda.local.array(row_count, dtype=np.float32)
        rescale = cuda.local.array(row_count, dtype=np.float32)
        first = cuda.local.array(row_count, dtype=np.int32)
        last = cuda.local.array(row_count, dtype=np.int32)
        for i in range(o_count):
            acc[i] = f32(0)
        for i in range(row_count):
            highest[i] = f32(LOWEST)
            total[i] = f32(0)
        own_row = first_row + warp * i32(row_tiles * 16) + (lane >> i32(2))
        own_column = (lane & i32(3)) << i32(1)

        buffer = i32(0)
        while start < end:
            following = start + i32(k_tile)
            copy_next = following + copy_row
            other_buffer = i32(k_bytes) - buffer
            wait_all_but_one()  # the keys, and the queries before them, are here
            cuda.syncthreads()
            if following < end:
                copy_keys(copy_to + i32(k_at) + other_buffer, k_from, k_row, copy_next, end)
            commit_copies()

            for i in range(s_count):
                s[i] = f32(0)
            for part in range(qk_parts):
                for step in range(qk_steps):
                    k = part * qk_steps + step
                    for m in range(row_tiles):
                        at = chunk_of(q_read, k) + i32(m * 16 * row_bytes)
                        load_matrices(factor, m * 4, at)
                    for j in range(s_pairs):
                        at = chunk_of(k_read + buffer, k) + i32(j * 16 * row_bytes)
                        load_matrices(other, 0, at)
                        for m in range(row_tiles):
                            here = (m * s_tiles + j * 2) * 4
                            multiply(s, here, factor, m * 4, other[0], other[1])
                            multiply(s, here + 4, factor, m * 4, other[2], other[3])

            if softcapped:
                softcap(s, cap_factor)
            if start < all_from or following > all_to:
                for m in range(row_tiles):
                    for h in range(2):
                        row = own_row + i32(m * 16 + h * 8)
                        first[m * 2 + h] = first_key(row, offset, left)
                        last[m * 2 + h] = end_key(row, offset, right, length)
                mask(s, first, last, start + own_column)
            softmax(s, highest, total, rescale, scale)
            scale_sums(acc, rescale)

            wait_all_but_one()  # the values are here
            cuda.syncthreads()
            if following < end:
                copy_keys(copy_to + i32(v_at) + other_buffer, v_from, v_row, copy_next, end)
            commit_copies()

            for k in range(pv_steps):
                for m in range(row_tiles):
                    here = (m * s_tiles + k * 2) * 4
                    factor[m * 4] = pair(s[here], s[here + 1])
                    factor[m * 4 + 1] = pair(s[here + 2], s[here + 3])
                    factor[m * 4 + 2] = pair(s[here + 4], s[here + 5])
                    factor[m * 4 + 3] = pair(s[here + 6], s[here + 7])
                for j in range(o_pairs):
                    at = chunk_of(v_read + buffer, j) + i32(k * 16 * row_bytes)
                    load_matrices_transposed(other, 0, at)
                    for m in range(row_tiles):
                        here = (m * o_tiles + j * 2) * 4
                        multiply(acc, here, factor, m * 4, other[0], other[1])
                        multiply(acc, here + 4, factor, m * 4, other[2], other[3])
            buffer = other_buffer
            start = following
        wait_all()

        # ---- what is left: divide, and store
        o_from = out + (i64(batch) * o_batch + i64(head) * o_head + i64(own_column)) * i64(2)
        lse_from = lse + (i64(pair_number) * i64(q_len)) * i64(4)
        for m in range(row_tiles):
            for h in range(2):
                at = m * 2 + h
                whole = row_sum(total[at])
                empty = whole == f32(0)
                rescale[at] = select(empty, f32(0), rcp(whole))
                row = own_row + i32(m * 16 + h * 8)
                logarithm = (product(highest[at], scale) + lg2(whole)) * f32(LN2)
                writes = both(row < q_len, own_column == i32(0))
                store_float32_if(writes, lse_from + i64(row) * i64(4), logarithm)
        scale_sums(acc, rescale)
        for m in range(row_tiles):
            for h in range(2):
                row = own_row + i32(m * 16 + h * 8)
                for j in range(o_tiles):
                    here = (m * o_tiles + j) * 4 + h * 2
                    store_int32_if(
                        row < q_len,
                        o_from + i64(row) * o_row * i64(2) + i64(j * 16),
                        pair(acc[here], acc[here + 1]),
                    )
        if flags != i64(0):
            nothing = not_finite(acc)
            found = any_in_block(select(nothing == f32(0), i32(0), i32(1)))
            if elect(thread == i32(0)):
                store_int32(flags + i64(pair_number * q_tiles + q_block) * i64(4), found)

    return Kernel(
        name=f"fastattn_mma_{dtype}_{head_dim}" + ("_softcap" if softcapped else ""),
        function=attend,
        signature=SIGNATURE,
        threads=threads,
        shared_bytes=v_at + 2 * k_bytes,
        needs=TENSOR_CORES,
    )
