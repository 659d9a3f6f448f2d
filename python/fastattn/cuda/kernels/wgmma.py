# SPDX-License-Identifier: Apache-2.0
"""Attention on Hopper (sm_90a): warpgroups that multiply, and one that only loads.

The form of FlashAttention-3 [1]_. A block has a loading warpgroup, of which one thread asks for
tiles (TMA), and two or three multiplying ones, each with 64 rows of the query tile. They tell each
other through barriers in shared memory: `full` when a tile has come, `empty` when it has been read.
A multiplying warpgroup starts S = Q K^T of the next key tile and O += P V of this one together, and
does the softmax of the next while the latter still runs; named barriers make the warpgroups take
turns, so that one multiplies while the others are at their softmax.

The grid is one block per multiprocessor. Each takes one tile after the other; stages and phases of
the barriers go on from tile to tile, so that the next tile's loads run while this one ends.

Read `mma.py` first. Called by `_forward.py`; `rows.py` has the softmax, `ptx_sm90.py` the
statements.

.. [1] J. Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
   Low-precision", 2024, https://arxiv.org/abs/2407.08608
"""

from __future__ import annotations

import functools
from collections import namedtuple  # Numba does not know typing.NamedTuple
from typing import NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels import BOX_COLUMNS, HOPPER, MOST_OFFSET, Kernel
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
    packed,
    row_sum,
    scores,
    sums,
)
from fastattn.cuda.kernels.tiles import WGMMA as TILES
from fastattn.cuda.ptx import (
    both,
    elect,
    exchange_int32,
    lg2,
    minimum,
    product,
    quotient,
    rcp,
    select,
    shared_address,
    store_16_if,
    store_float32_if,
    store_int32,
    store_shared_int32,
    uniform,
)
from fastattn.cuda.ptx_sm90 import (
    add_shared_int32,
    descriptor,
    fence_mbarrier_init,
    give_registers,
    mbarrier_arrive,
    mbarrier_expect,
    mbarrier_init,
    mbarrier_wait,
    named_arrive,
    named_or,
    named_sync,
    take_registers,
    tma_load_4d,
    tma_prefetch,
    wgmma_registers,
    wgmma_shared,
    wgmma_wait,
)

STAGE_BITS = 1
STAGES = 2**STAGE_BITS  # of key tiles, and of value tiles, in shared memory
L2_BYTES = 32 * 2**20  # of keys and values that stay in the L2 cache of 50 MiB

# What all threads know: the call, its results, and where a block begins its walk over the tiles.
Call = namedtuple(
    "Call",
    "lengths offsets q_len kv_len heads group left right length offset pairs section "
    "scale cap_factor",
)
Results = namedtuple("Results", "out lse flags o_batch o_head o_row")
Walk = namedtuple("Walk", "tile to_next tiles q_tiles blocks")
# A tile of queries, its first and its last tile of keys, and what one row knows of its softmax.
QueryTile = namedtuple("QueryTile", "pair number batch head first_row length offset begin last")
Rows = namedtuple("Rows", "highest total rescale first last")

SIGNATURE = (*(i64,) * 8, *(i32,) * 8, *(i64,) * 3, i32, i32, f32, f32)


class Plan(NamedTuple):
    """The grid of a call, and the arguments that say how it is walked."""

    blocks: int
    pairs: int
    section: int


def plan(
    batch: int, heads: int, group: int, q_len: int, kv_len: int, head_dim: int, multiprocessors: int
) -> Plan:
    """Return how many blocks to launch, and in what order they walk the tiles.

    A section is as many heads as have keys and values that fit in the L2 cache together: within it
    all heads' longest tiles come first. Neither changes results.
    """
    pairs = batch * heads
    tiles = pairs * -(-q_len // TILES[head_dim].queries)
    fitting = L2_BYTES // max(1, kv_len * head_dim * 4)
    return Plan(min(tiles, multiprocessors), pairs, min(max(1, fitting) * group, pairs))


@device_function
def placed(tile, q_tiles, pairs, section):
    """Return the head of which batch element, as one number, and the query tile that `tile` is.

    Within a section the last query tiles, under a causal mask the longest, come first.
    """
    begin = quotient(tile, section * q_tiles) * section
    width = minimum(section, pairs - begin)
    rest = i32(tile - begin * q_tiles)
    row = quotient(rest, width)
    return begin + rest - row * width, q_tiles - i32(1) - row


@device_function
def stage_of(turn):
    """Return where the tile with that number since the block began lies."""
    return i32(turn & i32(STAGES - 1))


@device_function
def parity_of(turn):
    """Return which phase of its stage's barriers the tile with that number is."""
    return i32(i32(turn >> i32(STAGE_BITS)) & i32(1))


@device_function
def quad_transposed(words, at, lane, four):
    """Exchange words in threads of four, so that each has neighbours for a store of 16 bytes.

    Of words[at], [at + 2], [at + 4] and [at + 6] of the four threads, `four` becomes what they hold
    at the one with this thread's number among them.
    """
    odd = (lane & i32(1)) != i32(0)
    high = (lane & i32(2)) != i32(0)
    x, y, z, w = words[at], words[at + 2], words[at + 4], words[at + 6]
    of_xy = exchange_int32(select(odd, x, y), 1)
    of_zw = exchange_int32(select(odd, z, w), 1)
    xy_left, xy_right = select(odd, of_xy, x), select(odd, y, of_xy)
    zw_left, zw_right = select(odd, of_zw, z), select(odd, w, of_zw)
    left = exchange_int32(select(high, xy_left, zw_left), 2)
    right = exchange_int32(select(high, xy_right, zw_right), 2)
    four[0], four[1] = select(high, left, xy_left), select(high, right, xy_right)
    four[2], four[3] = select(high, zw_left, left), select(high, zw_right, right)


@functools.cache
def forward(dtype: str, head_dim: int, softcapped: bool = False) -> Kernel:
    """Return the forward kernel.

    Its grid has any number of blocks (`plan`). Arguments, strides in elements:

    query, key, value
        Tensor maps (head_dim, rows, heads, batch) of 16-bit numbers, 128-byte swizzle, zeros
        beyond the bounds; boxes of 64 x TILES[head_dim].queries or .keys x 1 x 1.
    out, lse, flags, lengths, offsets
        Addresses. lse is float32 (batch, heads, q_len); flags is int32 (batch, heads, query tiles)
        and becomes 1 where a row is not finite, or is 0 for none; lengths and offsets are int64
        (batch,), or 0: then the numbers length and offset count.
    q_len, kv_len, heads, group, left, right, length, offset
        Row i sees the keys from i + offset - left to i + offset + right, below length.
    o_batch, o_head, o_row
        Strides of out.
    pairs, section
        batch * heads, and how many of them are walked together (`plan`).
    scale_log2, cap_factor
        scale * log2(e) > 0, and 0. softcapped: softcap * log2(e), and 2 * log2(e) * scale /
        softcap.
    """
    tile_shape = TILES[head_dim]
    q_tile, k_tile = tile_shape.queries, tile_shape.keys
    multipliers = q_tile // 64  # warpgroups
    threads = 128 * (multipliers + 1)
    boxes = head_dim // BOX_COLUMNS
    q_box, k_box = q_tile * 128, k_tile * 128
    q_bytes, k_bytes = q_box * boxes, k_box * boxes
    # ---- shared memory, from a multiple of 1024 bytes
    k_at = q_bytes
    v_at = k_at + STAGES * k_bytes
    q_full = v_at + STAGES * k_bytes
    q_empty = q_full + 8
    k_full = q_empty + 8
    k_empty = k_full + 8 * STAGES
    v_full = k_empty + 8 * STAGES
    v_empty = v_full + 8 * STAGES
    found_at = v_empty + 8 * STAGES
    shared_bytes = found_at + 8 + 1024
    # ---- named barriers: whose turn to multiply it is, and one for each warpgroup alone
    order, alone = 1, 8

    s_count, o_count, p_count = k_tile // 2, head_dim // 2, k_tile // 4
    o_tiles, o_words = head_dim // 8, head_dim // 4
    s_do, o_do = scores(1, k_tile // 8), sums(1, o_tiles)
    mask, softcap, softmax = s_do.mask, s_do.softcap, s_do.softmax
    scale_sums, not_finite = o_do.multiply, o_do.not_finite
    to_pairs, round_sums = packed(dtype, k_tile // 8), packed(dtype, o_tiles)

    kind = f"{dtype}_{head_dim}"
    multiply_keys = wgmma_shared(
        f"multiply_keys_{kind}",
        k_tile,
        dtype,
        [k // 4 * q_box + k % 4 * 32 for k in range(head_dim // 16)],
        [k // 4 * k_box + k % 4 * 32 for k in range(head_dim // 16)],
    )
    multiply_values = wgmma_registers(
        f"multiply_values_{kind}",
        head_dim,
        dtype,
        [k * 2048 for k in range(k_tile // 16)],
        b_trans=True,
    )
    wait_scores = wgmma_wait(f"wait_scores_{kind}", 0, f"f{s_count}")
    wait_scores_only = wgmma_wait(f"wait_scores_only_{kind}", 1, f"f{s_count}")
    wait_sums = wgmma_wait(f"wait_sums_{kind}", 0, f"f{o_count}", f"r{p_count}")
    rows_descriptor, values_descriptor = descriptor(), descriptor(leading=k_box)
    take, give = (
        take_registers[tile_shape.more_registers],
        give_registers[tile_shape.fewer_registers],
    )

    @device_function
    def tile_of(tile, q_tiles, call):
        """Return the query tile that a block comes to."""
        pair, number = placed(tile, q_tiles, call.pairs, call.section)
        batch = quotient(pair, call.heads)
        head = pair - batch * call.heads
        first_row = number * i32(q_tile)
        last_row = minimum(first_row + i32(q_tile), call.q_len) - i32(1)
        length = own_number(call.lengths, batch, call.length, i32(0), call.kv_len)
        offset = own_number(call.offsets, batch, call.offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))
        begin = i32(first_key(first_row, offset, call.left) // i32(k_tile))
        end = end_key(last_row, offset, call.right, length) + i32(k_tile - 1)
        last = i32(end // i32(k_tile)) - i32(1)
        return QueryTile(pair, number, batch, head, first_row, length, offset, begin, last)

    @device_function
    def prepare_barriers(shared):
        """Make the barriers; done by one thread."""
        mbarrier_init(shared + i32(q_full), 1)
        mbarrier_init(shared + i32(q_empty), multipliers)
        for i in range(STAGES):
            mbarrier_init(shared + i32(k_full + 8 * i), 1)
            mbarrier_init(shared + i32(k_empty + 8 * i), multipliers)
            mbarrier_init(shared + i32(v_full + 8 * i), 1)
            mbarrier_init(shared + i32(v_empty + 8 * i), multipliers)
        store_shared_int32(shared + i32(found_at), i32(0))
        store_shared_int32(shared + i32(found_at + 4), i32(0))
        fence_mbarrier_init()

    @device_function
    def load(shared, at, tensor_map, n, head, batch, turn, full, empty):
        """Ask for key or value tile n when its place is free."""
        stage = stage_of(turn)
        barrier = shared + i32(full) + (stage << i32(3))
        mbarrier_wait(shared + i32(empty) + (stage << i32(3)), parity_of(turn) ^ i32(1))
        mbarrier_expect(barrier, k_bytes)
        for p in range(boxes):
            target = shared + i32(at + p * k_box) + stage * i32(k_bytes)
            tma_load_4d(target, tensor_map, p * BOX_COLUMNS, n * i32(k_tile), head, batch, barrier)

    @device_function
    def load_tiles(shared, thread, query, key, value, call, walk):
        """Load what a block's tiles need: the work of the loading warpgroup."""
        turn = i32(0)  # how many key tiles there have been
        q_parity = i32(0)  # of how many query tiles there have been
        tile, to_next = walk.tile, walk.to_next
        while tile < walk.tiles:
            own = tile_of(tile, walk.q_tiles, call)
            if elect(both(thread == i32(0), own.last >= own.begin)):
                mbarrier_wait(shared + i32(q_empty), q_parity ^ i32(1))
                mbarrier_expect(shared + i32(q_full), q_bytes)
                for p in range(boxes):
                    target, column = shared + i32(p * q_box), p * BOX_COLUMNS
                    barrier = shared + i32(q_full)
                    tma_load_4d(target, query, column, own.first_row, own.head, own.batch, barrier)
                q_parity ^= i32(1)
                kv_head = quotient(own.head, call.group)
                # In the order of use: keys of tile n before values of tile n + 1.
                n = own.last
                while n >= own.begin - i32(1):
                    if n >= own.begin:
                        load(shared, k_at, key, n, kv_head, own.batch, turn, k_full, k_empty)
                    if n < own.last:
                        before = turn - i32(1)
                        following = n + i32(1)
                        load(
                            shared, v_at, value, following, kv_head, own.batch, before,
                            v_full, v_empty,
                        )  # fmt: skip
                    n = i32(n - i32(1))
                    turn = i32(turn + i32(1))
                turn = i32(turn - i32(1))
            tile = i32(tile + to_next)
            to_next = i32(walk.blocks * i32(2) - to_next)

    @device_function
    def release(shared, empty, stage, own_thread):
        """Say that this warpgroup has read what lies in a stage."""
        if elect(own_thread == i32(0)):
            mbarrier_arrive(shared + i32(empty) + (stage << i32(3)))

    @device_function
    def weigh(s, rows, n, own, own_row, own_column, all_from, all_to, call):
        """Replace the scores of key tile n by probabilities."""
        if softcapped:
            softcap(s, call.cap_factor)
        start = i32(n * i32(k_tile))
        if start < all_from or start + i32(k_tile) > all_to:
            for h in range(2):
                row = own.first_row + own_row + i32(h * 8)
                rows.first[h] = first_key(row, own.offset, call.left)
                rows.last[h] = end_key(row, own.offset, call.right, own.length)
            mask(s, rows.first, rows.last, start + own_column)
        softmax(s, rows.highest, rows.total, rows.rescale, call.scale)

    @device_function
    def store_tile(acc, rows, own, own_row, own_column, lane, call, results):
        """Divide a tile's sums by those of the probabilities, and store them and lse."""
        words = cuda.local.array(o_words, dtype=np.int32)
        four = cuda.local.array(4, dtype=np.int32)
        lse_at = results.lse + (i64(own.pair) * i64(call.q_len)) * i64(4)
        for h in range(2):
            whole = row_sum(rows.total[h])
            rows.rescale[h] = select(whole == f32(0), f32(0), rcp(whole))
            row = own.first_row + own_row + i32(h * 8)
            logarithm = (product(rows.highest[h], call.scale) + lg2(whole)) * f32(LN2)
            writes = both(row < call.q_len, own_column == i32(0))
            store_float32_if(writes, lse_at + i64(row) * i64(4), logarithm)
        scale_sums(acc, rows.rescale)
        round_sums(acc, 0, words)
        out_at = results.out
        out_at += (i64(own.batch) * results.o_batch + i64(own.head) * results.o_head) * i64(2)
        out_at += i64((lane & i32(3)) << i32(4))
        for h in range(2):
            row = own.first_row + own_row + i32(h * 8)
            row_at = out_at + i64(row) * results.o_row * i64(2)
            for j in range(0, o_tiles, 4):
                quad_transposed(words, j * 2 + h, lane, four)
                store_16_if(row < call.q_len, row_at + i64(j * 16), four, 0)

    @device_function
    def store_flag(acc, shared, sees, thread, warpgroup, q_parity, flag_at):
        """Store whether any row of the tile is not finite, once all warpgroups know."""
        if sees:
            bad = select(not_finite(acc) == f32(0), i32(0), i32(1))
            found = named_or(warpgroup - i32(1) + i32(alone), 128, bad)
            # Whoever comes last writes. Another warpgroup may be at the next tile already, which
            # counts in the other word, but not at the one after: its queries do not come before all
            # have multiplied the next one's.
            if elect((thread & i32(127)) == i32(0)):
                word = shared + i32(found_at) + (q_parity << i32(2))
                own_count = (found << i32(8)) + i32(1)
                count = add_shared_int32(word, own_count) + own_count
                if (count & i32(255)) == i32(multipliers):
                    add_shared_int32(word, -count)
                    store_int32(flag_at, minimum(count >> i32(8), i32(1)))
        elif elect(thread == i32(128)):
            store_int32(flag_at, i32(0))

    @device_function
    def multiply_tiles(shared, thread, warpgroup, call, results, walk):
        """Compute a block's tiles: the work of a multiplying warpgroup."""
        own_multiplier = warpgroup - i32(1)
        own_order = own_multiplier + i32(order)
        next_order = own_order + i32(1)
        if own_multiplier == i32(multipliers - 1):
            next_order = i32(order)
            named_arrive(next_order, 256)  # the first warpgroup begins
        own_thread = thread & i32(127)
        lane = thread & i32(31)
        multiplier_row = own_multiplier * i32(64)
        own_row = multiplier_row + ((own_thread >> i32(5)) << i32(4)) + (lane >> i32(2))
        own_column = (lane & i32(3)) << i32(1)
        s = cuda.local.array(s_count, dtype=np.float32)
        acc = cuda.local.array(o_count, dtype=np.float32)
        p = cuda.local.array(p_count, dtype=np.int32)  # s, rounded to pairs
        rows = Rows(
            cuda.local.array(2, dtype=np.float32),
            cuda.local.array(2, dtype=np.float32),
            cuda.local.array(2, dtype=np.float32),
            cuda.local.array(2, dtype=np.int32),
            cuda.local.array(2, dtype=np.int32),
        )
        q_at = i64(rows_descriptor) | i64((shared + multiplier_row * i32(128)) >> i32(4))
        keys_at = i64(rows_descriptor) | i64((shared + i32(k_at)) >> i32(4))
        values_at = i64(values_descriptor) | i64((shared + i32(v_at)) >> i32(4))

        turn = i32(0)  # how many key tiles there have been
        q_parity = i32(0)  # of how many query tiles there have been
        tile, to_next = walk.tile, walk.to_next
        while tile < walk.tiles:
            own = tile_of(tile, walk.q_tiles, call)
            n = own.last
            sees = n >= own.begin
            first_row = own.first_row + multiplier_row
            all_from = first_key(first_row + i32(63), own.offset, call.left)
            all_to = end_key(first_row, own.offset, call.right, own.length)
            for h in range(2):
                rows.highest[h] = f32(LOWEST)
                rows.total[h] = f32(0)
            for i in range(o_count):
                acc[i] = f32(0)
            if sees:
                # ---- the first key tile: there are no values to multiply yet
                mbarrier_wait(shared + i32(q_full), q_parity)
                stage = stage_of(turn)
                mbarrier_wait(shared + i32(k_full) + (stage << i32(3)), parity_of(turn))
                multiply_keys(s, 0, q_at, keys_at + i64(stage * i32(k_bytes >> 4)))
                wait_scores(s, 0)
                release(shared, k_empty, stage, own_thread)
                weigh(s, rows, n, own, own_row, own_column, all_from, all_to, call)
                to_pairs(s, 0, p)
                n = i32(n - i32(1))
                while n >= own.begin:
                    # ---- scores of this key tile, and the sums of the one before
                    v_stage, v_parity = stage, parity_of(turn)
                    turn = i32(turn + i32(1))
                    stage = stage_of(turn)
                    mbarrier_wait(shared + i32(k_full) + (stage << i32(3)), parity_of(turn))
                    named_sync(own_order, 256)
                    multiply_keys(s, 0, q_at, keys_at + i64(stage * i32(k_bytes >> 4)))
                    mbarrier_wait(shared + i32(v_full) + (v_stage << i32(3)), v_parity)
                    at = values_at + i64(v_stage * i32(k_bytes >> 4))
                    multiply_values(acc, 0, p, 0, at)
                    named_arrive(next_order, 256)
                    wait_scores_only(s, 0)
                    release(shared, k_empty, stage, own_thread)
                    weigh(s, rows, n, own, own_row, own_column, all_from, all_to, call)
                    wait_sums(acc, 0, p, 0)
                    release(shared, v_empty, v_stage, own_thread)
                    scale_sums(acc, rows.rescale)
                    to_pairs(s, 0, p)
                    n = i32(n - i32(1))
                # ---- the last values; the queries are not needed any more
                release(shared, q_empty, i32(0), own_thread)
                mbarrier_wait(shared + i32(v_full) + (stage << i32(3)), parity_of(turn))
                multiply_values(acc, 0, p, 0, values_at + i64(stage * i32(k_bytes >> 4)))
                wait_sums(acc, 0, p, 0)
                release(shared, v_empty, stage, own_thread)
                turn = i32(turn + i32(1))
            store_tile(acc, rows, own, own_row, own_column, lane, call, results)
            if results.flags != i64(0):
                flag_at = results.flags + i64(own.pair * walk.q_tiles + own.number) * i64(4)
                store_flag(acc, shared, sees, thread, warpgroup, q_parity, flag_at)
            if sees:
                q_parity ^= i32(1)
            tile = i32(tile + to_next)
            to_next = i32(walk.blocks * i32(2) - to_next)
        if own_multiplier == i32(0):
            named_sync(order, 256)  # the last warpgroup's last turn is over

    def attend(
        query, key, value, out, lse, flags, lengths, offsets,
        q_len, kv_len, heads, group, left, right, length, offset,
        o_batch, o_head, o_row, pairs, section, scale, cap_factor,
    ):  # fmt: skip
        call = Call(
            lengths, offsets, q_len, kv_len, heads, group, left, right, length, offset,
            pairs, section, scale, cap_factor,
        )  # fmt: skip
        results = Results(out, lse, flags, o_batch, o_head, o_row)
        own = shared_address(cuda.shared.array(0, dtype=np.int32))
        shared = uniform(i32(own + i32(1023)) & i32(-1024))
        thread = i32(cuda.threadIdx.x)
        warpgroup = uniform(thread >> i32(7))
        q_tiles = i32((q_len + i32(q_tile - 1)) // i32(q_tile))
        tiles = pairs * q_tiles
        # Every second round goes backwards through the blocks: tiles get shorter, and so each block
        # has some of the longer and some of the shorter ones.
        blocks = i32(cuda.gridDim.x)
        tile = i32(cuda.blockIdx.x)
        to_next = i32((blocks - tile) * i32(2) - i32(1))
        walk = Walk(tile, to_next, tiles, q_tiles, blocks)
        if elect(thread == i32(0)):
            tma_prefetch(query)
            tma_prefetch(key)
            tma_prefetch(value)
            prepare_barriers(shared)
        cuda.syncthreads()
        if warpgroup == i32(0):
            give()
            load_tiles(shared, thread, query, key, value, call, walk)
        else:
            take()
            multiply_tiles(shared, thread, warpgroup, call, results, walk)

    return Kernel(
        name=f"fastattn_wgmma_{dtype}_{head_dim}" + ("_softcap" if softcapped else ""),
        function=attend,
        signature=SIGNATURE,
        threads=threads,
        shared_bytes=shared_bytes,
        tensor_maps=(0, 1, 2),
        needs=HOPPER,
    )
