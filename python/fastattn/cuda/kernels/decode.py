# SPDX-License-Identifier: Apache-2.0
"""Few queries over long keys: the keys are cut over the whole chip, and memory is read once.

Two kernels, one after the other. `split` gives each block SPLIT keys of one KV head and all rows
that share that head; it leaves a partial result, normalised, with its lse. `combine` merges the
partial results of a row in a fixed order. Called by `_forward.py`; the form of FlashDecoding
[1]_. Read `mma.py` first: products and softmax are as there, `rows.py` has the softmax.

Rows are the queries times the heads of a KV head's group: row r is query r // group and head
r % group. Rows of a query are neighbours, so that a tile of 16 rows spans few queries and a causal
edge cuts few keys off it. A block takes up to 64 rows, as the registers allow; further rows are
the next blocks of the grid, to which the L2 cache serves the same keys.

SPLIT is 256: one sequence of 4096 keys and 8 KV heads is then 128 blocks, about one for each
multiprocessor; 512 would leave half of them idle, and save no more than 3 % of the traffic for 8
rows, which is what partial results then cost. Of a split, tile t of 16 keys is warp t % 4's. So a
key's position alone decides who adds it and when: keys that a row does not see change no bit of it.

Each warp has a ring of buffers of its own, and waits for its own copies only: no barrier of the
block in the loop. Up to 64 KiB of copies (48 for head_dim 96) are in flight for each block, and a
multiprocessor has room for two blocks or more (sm_89: one); an H200 needs 36 KiB on each to read
memory at full speed, if the answer takes a microsecond. Every tile is masked: next to waiting for
memory that costs nothing, and a row's bits come from a single path through the arithmetic whatever
its neighbours see.

.. [1] T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference", 2023,
   https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import functools
import math

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
from fastattn.cuda.kernels.tiles import DECODE_ROW_TILES as ROW_TILES
from fastattn.cuda.kernels.tiles import SPLIT
from fastattn.cuda.ptx import (
    both,
    commit_copies,
    copy_16,
    ex2,
    exchange,
    lg2,
    load_float32_if,
    load_matrices,
    load_matrices_transposed,
    load_shared_float32,
    load_shared_float32_4,
    maximum,
    minimum,
    product,
    quotient,
    rcp,
    select,
    shared_address,
    store_float32_4_if,
    store_float32_if,
    store_int32_if,
    store_shared_float32,
    store_shared_float32_2,
    sync_warp,
    uniform,
)

KEYS = 16  # of a tile: the depth of one product
WARPS = 4
THREADS = 32 * WARPS
FLAG_ROWS = 16  # queries that share a flag
SPLIT_SIGNATURE = (*(i64,) * 8, *(i32,) * 8, *(i64,) * 9, f32, f32)
COMBINE_SIGNATURE = (*(i64,) * 5, *(i32,) * 3, *(i64,) * 3)


def row_tiles_for(q_len: int, group: int, head_dim: int) -> int:
    """Return the `row_tiles` of the split kernel to use."""
    rows = q_len * group
    return min(1 if rows <= 16 else 2 if rows <= 32 else 4, ROW_TILES[head_dim])


def splits_of(kv_len: int) -> int:
    """Return how many partial results a row has; one if there are no keys."""
    return max(1, -(-kv_len // SPLIT))


def split_blocks(
    batch: int, kv_heads: int, q_len: int, kv_len: int, group: int, row_tiles: int
) -> int:
    """Return how many blocks `split` is launched with."""
    return batch * kv_heads * splits_of(kv_len) * -(-q_len * group // (16 * row_tiles))


def combine_blocks(batch: int, heads: int, q_len: int) -> int:
    """Return how many blocks `combine` is launched with."""
    return batch * heads * q_len


def workspace(batch: int, heads: int, q_len: int, kv_len: int, head_dim: int) -> tuple[int, int]:
    """Return how many float32 partial_out and partial_lse have; the former 16-byte aligned."""
    results = batch * heads * q_len * splits_of(kv_len)
    return results * head_dim, results


@functools.cache
def split(dtype: str, head_dim: int, row_tiles: int, softcapped: bool = False) -> Kernel:
    """Return the kernel that computes partial results of SPLIT keys each.

    Its grid has `split_blocks` blocks. Arguments, strides in elements, addresses and strides of
    query, key and value such that every row is 16-byte aligned:

    query, key, value
        Addresses, of arrays of the dtype.
    partial_out, partial_lse
        Addresses of float32 (batch, heads, q_len, splits, head_dim) and (batch, heads, q_len,
        splits), which are written. A split that no row of its block sees has lse -inf and its
        partial_out is left as it is.
    flags
        Address of int32 (batch, heads, ceil(q_len / FLAG_ROWS)), which become 0, or 0 for none.
    lengths, offsets
        Addresses of int64 (batch,), or 0: then the numbers length and offset count.
    q_len, kv_len, heads, group
        Sizes; heads counts query heads, group those that share a KV head.
    left, right, length, offset
        Query i sees the keys from i + offset - left to i + offset + right, below length.
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row
        Strides.
    scale_log2, cap_factor
        scale * log2(e) > 0, and 0. softcapped: softcap * log2(e), and 2 * log2(e) * scale /
        softcap.

    Parameters
    ----------
    dtype : {"float16", "bfloat16"}
        Of query, key and value.
    head_dim : {64, 96, 128, 256}
        Of query, key and value.
    row_tiles : {1, 2, 4}
        Tiles of 16 rows in a block, at most ROW_TILES[head_dim]: see `row_tiles_for`.
    softcapped : bool
        Whether scores are capped.

    Returns
    -------
    Kernel
    """
    if row_tiles not in (1, 2, 4) or row_tiles > ROW_TILES[head_dim]:
        raise ValueError(f"row_tiles must be 1, 2 or 4 and at most {ROW_TILES[head_dim]}")
    rows_at_once = 16 * row_tiles
    stages = ROW_TILES[head_dim]
    steps = head_dim // 16  # of both products, over head_dim
    # 16 bytes more than a row has: eight rows of a matrix then lie in different banks.
    row_bytes = 2 * head_dim + 16
    tile_bytes = KEYS * row_bytes
    stage_bytes = 2 * tile_bytes  # keys, then values
    ring_bytes = stages * stage_bytes
    query_at = WARPS * ring_bytes
    # Copies: lanes side by side in a row, 16 bytes each, so that whole lines of 128 bytes are read.
    lane_bits = 3 if head_dim % 64 == 0 else 2
    copy_lanes = 1 << lane_bits
    copy_rows = 32 >> lane_bits
    row_copies = 16 // copy_rows
    column_copies = head_dim // (8 * copy_lanes)
    # Merging: sums lie in place of the rings, padded; maxima and totals in place of the queries.
    sum_bytes = 4 * head_dim + 32
    merge_bytes = rows_at_once * sum_bytes
    quads = head_dim // 4
    merge_steps = rows_at_once * quads // THREADS
    sum_count, s_count, row_count = row_tiles * head_dim // 2, row_tiles * 8, row_tiles * 2
    probs_count = row_tiles * 4
    multiply, pair = ptx.multiply[dtype], ptx.pack[dtype]
    s_do, o_do = scores(row_tiles, 2), sums(row_tiles, head_dim // 8)
    mask, softcap, softmax, scale_sums = s_do.mask, s_do.softcap, s_do.softmax, o_do.multiply
    # One commit for each tile of keys and each of values: all but the oldest may be away.
    wait_oldest, wait_all = ptx.wait_copies[2 * stages - 1], ptx.wait_copies[0]

    @device_function
    def copy_row(target, source):
        for i in range(column_copies):
            copy_16(target + i32(i * copy_lanes * 16), source + i64(i * copy_lanes * 16), i32(16))

    @device_function
    def copy_tile(target, source, stride, key, first, end):
        """Copy this lane's columns of rows key, key + copy_rows, ...

        Instead of those before first and from end on, which no row of the block sees, the nearest
        that one does: what is hidden may be NaN, and 0 * NaN would be seen.
        """
        for i in range(row_copies):
            row = maximum(first, minimum(key + i32(i * copy_rows), end - i32(1)))
            copy_row(target + i32(i * copy_rows * row_bytes), source + i64(row) * stride * i64(2))

    @device_function
    def place(row, head, q_len, group, splits, own_split):
        """Return where the partial result of a row is, `head` being the first of its group."""
        query_number = quotient(row, group)
        own_head = head + i64(row - query_number * group)
        return (own_head * i64(q_len) + i64(query_number)) * i64(splits) + i64(own_split)

    def attend(
        query, key, value, partial_out, partial_lse, flags, lengths, offsets,
        q_len, kv_len, heads, group, left, right, length, offset,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        scale, cap_factor,
    ):  # fmt: skip
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        warp = uniform(thread >> i32(5))
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))

        # ---- which rows, which keys of which head
        rows = q_len * group
        row_blocks = quotient(rows + i32(rows_at_once - 1), i32(rows_at_once))
        splits = maximum(i32(1), quotient(kv_len + i32(SPLIT - 1), i32(SPLIT)))
        kv_heads = quotient(heads, group)
        block = i32(cuda.blockIdx.x)
        number = quotient(block, row_blocks)
        row_begin = (block - number * row_blocks) * i32(rows_at_once)
        row_end = minimum(row_begin + i32(rows_at_once), rows)
        block = quotient(number, splits)
        own_split = number - block * splits
        batch = quotient(block, kv_heads)
        kv_head = block - batch * kv_heads
        head = i64(batch) * i64(heads) + i64(kv_head * group)
        length = own_number(lengths, batch, length, i32(0), kv_len)
        offset = own_number(offsets, batch, offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))
        first_query = quotient(row_begin, group)
        last_query = quotient(row_end - i32(1), group)
        # Keys of this split that some row may see.
        first = maximum(first_key(first_query, offset, left), own_split * i32(SPLIT))
        end = minimum(end_key(last_query, offset, right, length), (own_split + i32(1)) * i32(SPLIT))

        if flags != i64(0) and both(own_split == i32(0), row_begin == i32(0)):
            # Here, so that `combine`, a block per row, need only set them.
            flag_tiles = quotient(q_len + i32(FLAG_ROWS - 1), i32(FLAG_ROWS))
            flag = flags + head * i64(flag_tiles) * i64(4)
            at = i32(0)
            while at < group * flag_tiles:
                own = at + thread
                store_int32_if(own < group * flag_tiles, flag + i64(own) * i64(4), i32(0))
                at += i32(THREADS)
        if first >= end:
            row = minimum(row_begin + thread, row_end - i32(1))
            at = place(row, head, q_len, group, splits, own_split)
            writes = row_begin + thread < row_end
            store_float32_if(writes, partial_lse + at * i64(4), f32(LOWEST))
            return

        # ---- copies begin: a tile of rows by each of the first warps, then the warp's own keys
        copy_lane = lane & i32(copy_lanes - 1)
        copy_from = i64(copy_lane) * i64(16)
        copy_to = i32((lane >> i32(lane_bits)) * i32(row_bytes) + (copy_lane << i32(4)))
        if warp < i32(row_tiles):
            q_from = query + (i64(batch) * q_batch + i64(kv_head * group) * q_head) * i64(2)
            q_to = shared + i32(query_at) + warp * i32(16 * row_bytes) + copy_to
            for i in range(row_copies):
                row = row_begin + warp * i32(16) + (lane >> i32(lane_bits)) + i32(i * copy_rows)
                row = minimum(row, row_end - i32(1))
                query_number = quotient(row, group)
                own_head = row - query_number * group
                at = i64(query_number) * q_row + i64(own_head) * q_head
                copy_row(q_to + i32(i * copy_rows * row_bytes), q_from + at * i64(2) + copy_from)
        k_from = key + (i64(batch) * k_batch + i64(kv_head) * k_head) * i64(2) + copy_from
        v_from = value + (i64(batch) * v_batch + i64(kv_head) * v_head) * i64(2) + copy_from
        ring = i32(shared + warp * i32(ring_bytes))
        tile = first >> i32(4)
        tile = tile + ((warp - tile) & i32(WARPS - 1))
        # Numba makes int64 of a sum of int32; what lives through the loop is to take one register.
        start = i32(tile * i32(KEYS))
        copy_key = i32(start + (lane >> i32(lane_bits)))
        for i in range(stages):
            k_to = ring + i32(i * stage_bytes) + copy_to
            ahead = i32(i * WARPS * KEYS)
            if start + ahead < end:
                copy_tile(k_to, k_from, k_row, copy_key + ahead, first, end)
            commit_copies()
            if start + ahead < end:
                copy_tile(k_to + i32(tile_bytes), v_from, v_row, copy_key + ahead, first, end)
            commit_copies()
        copy_key = i32(copy_key + i32(stages * WARPS * KEYS))

        s = cuda.local.array(s_count, dtype=np.float32)
        acc = cuda.local.array(sum_count, dtype=np.float32)
        factor = cuda.local.array(4, dtype=np.int32)
        other = cuda.local.array(4, dtype=np.int32)
        probs = cuda.local.array(probs_count, dtype=np.int32)
        highest = cuda.local.array(row_count, dtype=np.float32)
        total = cuda.local.array(row_count, dtype=np.float32)
        rescale = cuda.local.array(row_count, dtype=np.float32)
        row_first = cuda.local.array(row_count, dtype=np.int32)
        row_last = cuda.local.array(row_count, dtype=np.int32)
        for i in range(sum_count):
            acc[i] = f32(0)
        for i in range(row_count):
            highest[i] = f32(LOWEST)
            total[i] = f32(0)
            row = minimum(row_begin + i32(i * 8) + (lane >> i32(2)), row_end - i32(1))
            query_number = quotient(row, group)
            row_first[i] = first_key(query_number, offset, left)
            row_last[i] = end_key(query_number, offset, right, length)

        # ---- where this thread's addresses for ldmatrix begin
        left_at = i32((lane & i32(15)) * i32(row_bytes) + ((lane >> i32(4)) << i32(4)))
        right_row = (lane & i32(7)) + ((lane >> i32(4)) << i32(3))
        right_at = i32(right_row * i32(row_bytes) + (((lane >> i32(3)) & i32(1)) << i32(4)))
        q_read = i32(shared + i32(query_at) + left_at)
        own_column = i32((lane & i32(3)) << i32(1))
        wait_oldest()
        cuda.syncthreads()  # the queries are here, for all warps

        stage = ring
        while start < end:
            wait_oldest()
            sync_warp()  # the keys are here
            for i in range(s_count):
                s[i] = f32(0)
            for k in range(steps):
                load_matrices(other, 0, stage + right_at + i32(k * 32))
                for m in range(row_tiles):
                    load_matrices(factor, 0, q_read + i32(m * 16 * row_bytes + k * 32))
                    multiply(s, m * 8, factor, 0, other[0], other[1])
                    multiply(s, m * 8 + 4, factor, 0, other[2], other[3])
            sync_warp()  # and have been read
            following = i32(start + i32(stages * WARPS * KEYS))
            if following < end:
                copy_tile(stage + copy_to, k_from, k_row, copy_key, first, end)
            commit_copies()

            if softcapped:
                softcap(s, cap_factor)
            mask(s, row_first, row_last, start + own_column)
            softmax(s, highest, total, rescale, scale)
            scale_sums(acc, rescale)

            wait_oldest()
            sync_warp()  # the values are here
            for m in range(row_tiles):
                for j in range(4):
                    probs[m * 4 + j] = pair(s[m * 8 + j * 2], s[m * 8 + j * 2 + 1])
            for k in range(steps):
                load_matrices_transposed(other, 0, stage + left_at + i32(tile_bytes + k * 32))
                for m in range(row_tiles):
                    here = (m * steps + k) * 8
                    multiply(acc, here, probs, m * 4, other[0], other[1])
                    multiply(acc, here + 4, probs, m * 4, other[2], other[3])
            sync_warp()  # and have been read
            if following < end:
                copy_tile(stage + i32(tile_bytes) + copy_to, v_from, v_row, copy_key, first, end)
            commit_copies()
            copy_key = i32(copy_key + i32(WARPS * KEYS))
            start = i32(start + i32(WARPS * KEYS))
            stage = i32(stage + i32(stage_bytes))
            stage = select(stage == ring + i32(ring_bytes), ring, stage)
        wait_all()
        cuda.syncthreads()  # rings and queries have been read

        # ---- the warps meet: each leaves its sums, maxima and totals
        stats = shared + i32(query_at)
        for i in range(row_count):
            row = i32(i * 8) + (lane >> i32(2))
            top = select(highest[i] == f32(LOWEST), f32(LOWEST), product(highest[i], scale))
            store_shared_float32_2(
                stats + (warp * i32(rows_at_once) + row) * i32(8), top, row_sum(total[i])
            )
            sum_to = shared + warp * i32(merge_bytes) + row * i32(sum_bytes) + own_column * i32(4)
            for j in range(2 * steps):
                at = (i // 2) * 8 * steps + j * 4 + (i % 2) * 2
                store_shared_float32_2(sum_to + i32(j * 32), acc[at], acc[at + 1])
        cuda.syncthreads()

        tops = cuda.local.array(WARPS, dtype=np.float32)
        terms = cuda.local.array(4, dtype=np.float32)
        result = cuda.local.array(4, dtype=np.float32)
        for i in range(merge_steps):
            if row_begin + i32(i * THREADS // quads) < row_end:
                own = thread + i32(i * THREADS)
                row = quotient(own, i32(quads))
                quad = own - row * i32(quads)
                stat = stats + row * i32(8)
                top = f32(LOWEST)
                for w in range(WARPS):
                    tops[w] = load_shared_float32(stat + i32(w * rows_at_once * 8))
                    top = maximum(top, tops[w])
                level = select(top == f32(LOWEST), f32(0), top)
                whole = f32(0)
                for e in range(4):
                    result[e] = f32(0)
                for w in range(WARPS):
                    weight = ex2(tops[w] - level)
                    whole += weight * load_shared_float32(stat + i32(w * rows_at_once * 8 + 4))
                    at = shared + i32(w * merge_bytes) + row * i32(sum_bytes)
                    load_shared_float32_4(terms, 0, at + (quad << i32(4)))
                    for e in range(4):
                        result[e] += weight * terms[e]
                inverse = select(whole == f32(0), f32(0), rcp(whole))
                for e in range(4):
                    result[e] = result[e] * inverse
                writes = row_begin + row < row_end
                row = minimum(row_begin + row, row_end - i32(1))
                at = place(row, head, q_len, group, splits, own_split)
                out_to = partial_out + (at * i64(head_dim) + i64(quad << i32(2))) * i64(4)
                store_float32_4_if(writes, out_to, result, 0)
                logarithm = (level + lg2(whole)) * f32(LN2)
                writes = both(writes, quad == i32(0))
                store_float32_if(writes, partial_lse + at * i64(4), logarithm)

    return Kernel(
        name=f"fastattn_decode_split_{dtype}_{head_dim}_{row_tiles}"
        + ("_softcap" if softcapped else ""),
        function=attend,
        signature=SPLIT_SIGNATURE,
        threads=THREADS,
        shared_bytes=query_at + rows_at_once * row_bytes,
        blocks_per_sm=3 if row_tiles == 1 and head_dim <= 128 else 2,
        needs=TENSOR_CORES,
    )


@functools.cache
def combine(dtype: str, head_dim: int) -> Kernel:
    """Return the kernel that merges the partial results of each row.

    Warp w adds splits w, w + 4, w + 8, ... in this order, then the four sums are added in order: a
    row's bits depend on its own partial results alone, and those with lse -inf change none.

    Its grid has `combine_blocks` blocks, a row each. Arguments, strides in elements:

    partial_out, partial_lse
        Addresses of what `split` left; of a split with lse -inf, partial_out is not read.
    out
        Address of an array of the dtype, of which every row is 4-byte aligned.
    lse
        Address of float32 (batch, heads, q_len).
    flags
        Address of int32 (batch, heads, ceil(q_len / FLAG_ROWS)), 0 before; they become 1 where a
        row is not finite. Or 0 for none.
    q_len, heads, splits
        Sizes: splits is `splits_of(kv_len)`.
    o_batch, o_head, o_row
        Strides of out.

    Parameters
    ----------
    dtype : {"float16", "bfloat16"}
        Of out.
    head_dim : {64, 96, 128, 256}
        Of out.

    Returns
    -------
    Kernel
    """
    pair = ptx.pack[dtype]
    columns = head_dim // 32  # of a lane: its number, and each 32nd from there
    ahead = 4  # splits that a warp reads at once
    read_count = ahead * columns
    warp_bytes = 4 * (head_dim + 2)  # sums, and the sum of weights

    def merge(
        partial_out, partial_lse, out, lse, flags, q_len, heads, splits, o_batch, o_head, o_row
    ):
        thread = i32(cuda.threadIdx.x)
        lane = thread & i32(31)
        warp = uniform(thread >> i32(5))
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))
        number = i32(cuda.blockIdx.x)
        head = quotient(number, q_len)  # of all batch elements
        row = number - head * q_len
        batch = quotient(head, heads)
        lse_from = partial_lse + i64(number) * i64(splits) * i64(4)
        out_from = partial_out + (i64(number) * i64(splits) * i64(head_dim) + i64(lane)) * i64(4)

        top = f32(LOWEST)
        begin = i32(0)
        while begin < splits:
            own = begin + lane
            found = load_float32_if(own < splits, lse_from + i64(own) * i64(4), f32(LOWEST))
            top = maximum(top, found)
            begin += i32(32)
        for i in range(5):
            top = maximum(top, exchange(top, 1 << i))
        level = select(top == f32(LOWEST), f32(0), top)

        acc = cuda.local.array(columns, dtype=np.float32)
        weights = cuda.local.array(ahead, dtype=np.float32)
        terms = cuda.local.array(read_count, dtype=np.float32)
        for j in range(columns):
            acc[j] = f32(0)
        whole = f32(0)
        begin = warp
        while begin < splits:
            for i in range(ahead):
                own = begin + i32(i * WARPS)
                found = load_float32_if(own < splits, lse_from + i64(own) * i64(4), f32(LOWEST))
                weights[i] = ex2((found - level) * f32(1 / LN2))
                at = out_from + i64(own) * i64(head_dim * 4)
                for j in range(columns):
                    terms[i * columns + j] = load_float32_if(
                        found != f32(LOWEST), at + i64(j * 128), f32(0)
                    )
            for i in range(ahead):
                whole += weights[i]
                for j in range(columns):
                    acc[j] += weights[i] * terms[i * columns + j]
            begin += i32(ahead * WARPS)
        sum_to = shared + warp * i32(warp_bytes) + (lane << i32(2))
        for j in range(columns):
            store_shared_float32(sum_to + i32(j * 128), acc[j])
        store_shared_float32(shared + warp * i32(warp_bytes) + i32(4 * head_dim), whole)
        cuda.syncthreads()

        own = minimum(thread, i32(head_dim // 2 - 1))  # a pair of columns
        low = f32(0)
        high = f32(0)
        whole = f32(0)
        for w in range(WARPS):
            at = shared + i32(w * warp_bytes)
            low += load_shared_float32(at + (own << i32(3)))
            high += load_shared_float32(at + (own << i32(3)) + i32(4))
            whole += load_shared_float32(at + i32(4 * head_dim))
        inverse = select(whole == f32(0), f32(0), rcp(whole))
        low = low * inverse
        high = high * inverse
        out_to = out + (i64(batch) * o_batch + i64(head - batch * heads) * o_head) * i64(2)
        out_to += i64(row) * o_row * i64(2) + i64(own) * i64(4)
        store_int32_if(thread < i32(head_dim // 2), out_to, pair(low, high))
        logarithm = level + lg2(whole) * f32(LN2)
        store_float32_if(thread == i32(0), lse + i64(number) * i64(4), logarithm)
        if flags != i64(0):
            flag_tiles = quotient(q_len + i32(FLAG_ROWS - 1), i32(FLAG_ROWS))
            flag = i64(head) * i64(flag_tiles) + i64(quotient(row, i32(FLAG_ROWS)))
            finite = both(abs(low) < f32(math.inf), abs(high) < f32(math.inf))
            store_int32_if(select(finite, i32(0), i32(1)), flags + flag * i64(4), i32(1))

    return Kernel(
        name=f"fastattn_decode_combine_{dtype}_{head_dim}",
        function=merge,
        signature=COMBINE_SIGNATURE,
        threads=THREADS,
        shared_bytes=WARPS * warp_bytes,
        needs=TENSOR_CORES,
    )
