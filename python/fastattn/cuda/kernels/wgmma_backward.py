# SPDX-License-Identifier: Apache-2.0
"""The gradients on Hopper's tensor cores: TMA, asynchronous `wgmma`, float16 and bfloat16.

The form of FlashAttention-3 [1]_. A block owns 128 keys of a key head and visits the queries that
see any of them, 64 at a time. One warpgroup fetches: keys and values once, then queries, grad_out
and their two numbers per row, two tiles of each in shared memory. Two warpgroups compute, each for
64 of the keys; scores are taken transposed, keys down and queries across, so that P and dS leave
one product in the very registers where the next one wants its left factor::

    S' = K Q'    dP' = V dO'    P' = 2 ** (S' * scale_log2 - lse2)    dS' = P' (dP' - delta)
    dV += P' dO          dK += dS' Q          dQ += dS K

dK and dV stay in registers to the end and are added up in a fixed order, over the query heads of
the group too. dQ is the sum over blocks: its dS goes through shared memory, to be read the other
way round, and the product is added to a float32 array in device memory in whatever order blocks
come. Where the bits of dq must repeat, `with_dq=False` leaves it to another kernel; `round_dq`
makes dq of that array. Products run while the threads do something else: dP beside the exponentials
of S, dV beside dS, dK beside the sums for dQ and the wait for the next tile.

P and dS of a hidden pair are 0 whatever its key and value hold. But the last products multiply that
0 by a key, a query or a grad_out, so that what is not finite there makes rows not finite that do
not see it: these are flagged, for `simt_backward` to compute again.

Read `mma.py` first. Called by `_backward.py`; what it reads of rows, lse2 and delta, comes from
`simt_backward.prepare`. `ptx_sm90.py` says how matrices lie in shared memory.

.. [1] J. Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
   Low-precision", 2024, https://arxiv.org/abs/2407.08608
"""

from __future__ import annotations

import functools
from collections import namedtuple  # Numba does not know typing.NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda import ptx
from fastattn.cuda.kernels import (
    BOX_COLUMNS,
    HOPPER,
    MOST_OFFSET,
    PADDING,
    TENSOR_CORES,
    Kernel,
    padded,
)
from fastattn.cuda.kernels.rows import (
    LOWEST,
    device_function,
    f32,
    i32,
    i64,
    own_number,
    packed,
    scores,
    sums,
)
from fastattn.cuda.kernels.tiles import WGMMA_GRADIENT_KEYS as KEYS
from fastattn.cuda.kernels.tiles import WGMMA_GRADIENT_QUERIES as QUERIES
from fastattn.cuda.kernels.wgmma import (
    L2_BYTES,
    STAGES,
    parity_of,
    placed,
    quad_transposed,
    stage_of,
)
from fastattn.cuda.ptx import (
    any_in_block,
    both,
    elect,
    ex2,
    load_float32_4,
    load_shared_float32_2,
    maximum,
    minimum,
    quotient,
    select,
    shared_address,
    store_16_if,
    store_int32,
    store_shared_int32,
    uniform,
)
from fastattn.cuda.ptx_sm90 import (
    add_float32_2,
    bulk_load,
    descriptor,
    fence_mbarrier_init,
    fence_proxy_async,
    give_registers,
    mbarrier_arrive,
    mbarrier_expect,
    mbarrier_init,
    mbarrier_wait,
    named_or,
    named_sync,
    take_registers,
    tma_load_4d,
    tma_prefetch,
    wgmma_registers,
    wgmma_shared,
    wgmma_wait,
)

ROWS = PADDING  # of a block of `round_dq`
COMPUTING = 2  # warpgroups, KEYS / COMPUTING keys each: a product has 64 rows
# What all threads know: the call, its results, and the block's keys with the queries that see them.
Call = namedtuple(
    "Call",
    "lengths offsets q_len kv_len batch kv_heads group section left right length offset "
    "scale_log2 cap_factor scale",
)
Results = namedtuple("Results", "dq dk dv flags dk_batch dk_head dk_row dv_batch dv_head dv_row")
KeyTile = namedtuple(
    "KeyTile",
    "pair_number k_tile k_tiles item kv_head length offset first_key from_tile to_tile "
    "head end_head",
)
SIGNATURE = (*(i64,) * 12, *(i32,) * 10, *(i64,) * 6, *(f32,) * 3)
ROUND_SIGNATURE = (i64, i64, i64, i32, i32, i64, i64, i64)


def blocks(batch: int, kv_heads: int, kv_len: int) -> int:
    """Return how many blocks to launch of `backward`."""
    return batch * kv_heads * -(-kv_len // KEYS)


def heads_together(batch: int, kv_heads: int, group: int, q_len: int, head_dim: int) -> int:
    """Return the argument `section` of `backward`: how many key heads are worked on at a time.

    Blocks of a head all read its queries and grad_out, 2 bytes a number, and add to its dq, 4: a
    section is as many heads as have these in the L2 cache together.
    """
    fitting = L2_BYTES // max(1, group * q_len * head_dim * (2 + 2 + 4))
    return max(1, min(batch * kv_heads, fitting))


def round_blocks(batch: int, heads: int, q_len: int) -> int:
    """Return how many blocks to launch of `round_dq`."""
    return batch * heads * padded(q_len) // ROWS


@functools.cache
def backward(dtype: str, head_dim: int, with_dq: bool = True, softcapped: bool = False) -> Kernel:
    """Return the kernel for dk and dv, and a sum of float32 that becomes dq.

    Its grid is `blocks`. Arguments, strides in elements:

    query, key, value, grad_out
        Tensor maps of four axes: head_dim, row, head, batch; boxes of 64 columns and, for query
        and grad_out, QUERIES rows, for key and value, KEYS; 128-byte swizzle, zeros beyond.
    lse2, delta
        Addresses, float32 (batch, heads, padded(q_len)), as `simt_backward.prepare` makes them:
        lse * log2(e), +inf where a row sees nothing, and sum(grad_out * out) - grad_lse.
    dq
        Address, float32 (batch, heads, q_len, head_dim), contiguous and zero; 0 if not with_dq.
    dk, dv
        Addresses. The last axis is contiguous, rows begin on multiples of 16 bytes.
    flags
        Address, int32 (batch, kv_heads, key tiles): becomes 1 where a row of dk or dv is not
        finite, else 0; or 0 for none.
    lengths, offsets
        Addresses, int64 (batch,), or 0: then the numbers length and offset count.
    q_len, kv_len, batch, kv_heads, group
        Sizes, from 1; lengths at most MOST_LENGTH. group is query heads per key head.
    section
        How many heads of all batch elements are worked on at a time: `heads_together`.
    left, right, length, offset
        Query i sees the keys from i + offset - left to i + offset + right, below length.
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row
        Strides.
    scale_log2, cap_factor, scale
        scale * log2(e), 0 and scale. softcapped: softcap * log2(e), 2 * log2(e) * scale / softcap
        and scale.
    """
    boxes = head_dim // BOX_COLUMNS
    q_box, k_box = QUERIES * 128, KEYS * 128  # bytes
    q_bytes, k_bytes = q_box * boxes, k_box * boxes
    ds_bytes = KEYS * QUERIES * 2 if with_dq else 0
    row_bytes = QUERIES * 4  # of lse2, or delta, of a tile
    # Shared memory: keys, values, then two each of queries, grad_out, dS, the rows' numbers.
    v_at = k_bytes
    q_at = v_at + k_bytes
    do_at = q_at + STAGES * q_bytes
    ds_at = do_at + STAGES * q_bytes
    rows_at = ds_at + STAGES * ds_bytes
    keys_here = rows_at + STAGES * 2 * row_bytes  # barriers
    tile_here = keys_here + 8
    tile_free = tile_here + 8 * STAGES
    shared_bytes = tile_free + 8 * STAGES + 1024  # to begin on a multiple of 1024

    # A product for dQ has a box of columns, since half of a swizzled box is no operand: of two
    # boxes, each warpgroup takes one and all keys; of one, each takes its own 64 keys.
    own_box = boxes == COMPUTING
    dq_keys = KEYS if own_box else KEYS // COMPUTING
    own_keys_at = k_box if own_box else dq_keys * 128  # the second warpgroup's, in keys
    own_ds_at = 0 if own_box else dq_keys * 128
    own_dq_at = BOX_COLUMNS if own_box else 0  # columns
    s_count, o_count, dq_count, pair_count = (
        QUERIES // 2,
        head_dim // 2,
        BOX_COLUMNS // 2,
        QUERIES // 4,
    )
    s_tiles, o_tiles, dq_tiles = QUERIES // 8, head_dim // 8, BOX_COLUMNS // 8
    kind = f"{dtype}_{head_dim}"
    # P of capped scores takes the registers that dP would wait in.
    dp_later = softcapped and head_dim == 128

    def along(box: int) -> list[int]:
        """Return the steps over columns, in boxes of 64."""
        return [k % 4 * 32 + k // 4 * box for k in range(head_dim // 16)]

    def down(rows: int) -> list[int]:
        """Return the steps down the rows of a box."""
        return [k * 2048 for k in range(rows // 16)]

    times_queries = wgmma_shared(
        f"times_queries_{kind}", QUERIES, dtype, along(k_box), along(q_box)
    )
    add_product = wgmma_registers(
        f"add_product_{kind}", head_dim, dtype, down(QUERIES), b_trans=True
    )
    times_keys = wgmma_shared(
        f"times_keys_{kind}",
        BOX_COLUMNS,
        dtype,
        down(dq_keys),
        down(dq_keys),
        a_trans=True,
        b_trans=True,
    )
    s_array, o_array, pairs = f"f{s_count}", f"f{o_count}", f"r{pair_count}"
    wait_dk_scores = wgmma_wait(
        f"wait_dk_scores_{kind}", 0 if dp_later else 1, o_array, pairs, s_array
    )
    wait_dp = wgmma_wait(f"wait_dp_{kind}", 1, s_array)
    wait_dv_dq = wgmma_wait(f"wait_dv_dq_{kind}", 1, o_array, pairs, f"f{dq_count}")
    wait_dv = wgmma_wait(f"wait_dv_{kind}", 1, o_array, pairs)
    wait_dk = wgmma_wait(f"wait_dk_{kind}", 0, o_array, pairs)
    # K-major; MN-major with columns in boxes of queries, or of keys.
    along_rows, down_queries, down_keys = descriptor(), descriptor(q_box), descriptor(k_box)
    down_ds = descriptor()  # one box

    pair = ptx.pack[dtype]
    softcap = scores(1, s_tiles).softcap
    not_finite = sums(1, o_tiles).not_finite
    round_sums, word_count = packed(dtype, o_tiles), head_dim // 4
    give_up, take = give_registers[24], take_registers[240]

    @device_function
    def hide(x, row, first, end, hidden):
        """Replace what the queries from `row` on do not see.

        Those from `first` on, or h * 8 later, and before end[h] see the thread's keys.
        """
        for h in range(2):
            for j in range(s_tiles):
                for e in range(2):
                    at = j * 4 + h * 2 + e
                    seen = both(
                        row + i32(j * 8 + e - h * 8) >= first, row + i32(j * 8 + e) < end[h]
                    )
                    x[at] = select(seen, x[at], hidden)

    @device_function
    def store_rows(numbers, to, stride, row, end, lane):
        """Round and store two rows, as far as they come before `end`."""
        words = cuda.local.array(word_count, dtype=np.int32)
        four = cuda.local.array(4, dtype=np.int32)
        round_sums(numbers, 0, words)
        for h in range(2):
            own_row = row + i32(h * 8)
            row_to = to + i64(own_row) * stride * i64(2)
            for j in range(0, o_tiles, 4):
                quad_transposed(words, j * 2 + h, lane, four)
                store_16_if(own_row < end, row_to + i64(j * 16), four, 0)

    @device_function
    def tile_of(block, call):
        """Return a block's keys: of a section, the tiles that most queries see come first."""
        k_tiles = quotient(call.kv_len + i32(KEYS - 1), i32(KEYS))
        pair_number, k_tile = placed(block, k_tiles, call.batch * call.kv_heads, call.section)
        if call.right <= call.left:
            k_tile = k_tiles - i32(1) - k_tile
        item = quotient(pair_number, call.kv_heads)
        kv_head = pair_number - item * call.kv_heads
        length = own_number(call.lengths, item, call.length, i32(0), call.kv_len)
        offset = own_number(call.offsets, item, call.offset, i32(-MOST_OFFSET), i32(MOST_OFFSET))

        # Which tiles of queries see any of them, in each head of the group.
        first_key = k_tile * i32(KEYS)
        end_key = minimum(first_key + i32(KEYS), length)
        from_tile = quotient(maximum(first_key - offset - call.right, i32(0)), i32(QUERIES))
        last_row = maximum(minimum(end_key - offset + call.left, call.q_len), i32(0))
        to_tile = quotient(last_row + i32(QUERIES - 1), i32(QUERIES))
        head = pair_number * call.group  # counted from the first batch element's
        end_head = head + call.group
        if end_key <= first_key or to_tile <= from_tile:
            end_head = head
        return KeyTile(
            pair_number, k_tile, k_tiles, item, kv_head, length, offset, first_key,
            from_tile, to_tile, head, end_head,
        )  # fmt: skip

    @device_function
    def prepare_barriers(shared):
        """Make the barriers; done by one thread."""
        mbarrier_init(shared + i32(keys_here), 1)
        for i in range(STAGES):
            mbarrier_init(shared + i32(tile_here + 8 * i), 1)
            mbarrier_init(shared + i32(tile_free + 8 * i), COMPUTING)
        fence_mbarrier_init()

    @device_function
    def load_tiles(shared, query, key, value, grad_out, lse2, delta, call, own):
        """Load a block's keys, and the tiles of queries that see them: one thread's work."""
        tile, head = own.from_tile, own.head
        turn = i32(0)  # how many tiles there have been
        mbarrier_expect(shared + i32(keys_here), 2 * k_bytes)
        for p in range(boxes):
            to = shared + i32(p * k_box)
            here = shared + i32(keys_here)
            tma_load_4d(to, key, p * BOX_COLUMNS, own.first_key, own.kv_head, own.item, here)
            tma_load_4d(
                to + i32(v_at), value, p * BOX_COLUMNS, own.first_key, own.kv_head, own.item, here
            )
        before = own.item * call.kv_heads * call.group  # heads of other batch elements
        rows = (call.q_len + i32(PADDING - 1)) & i32(-PADDING)
        while head < own.end_head:
            stage = stage_of(turn)
            here = shared + i32(tile_here) + stage * i32(8)
            row = tile * i32(QUERIES)
            mbarrier_wait(shared + i32(tile_free) + stage * i32(8), parity_of(turn) ^ i32(1))
            mbarrier_expect(here, 2 * q_bytes + 2 * row_bytes)
            for p in range(boxes):
                to = shared + i32(q_at + p * q_box) + stage * i32(q_bytes)
                tma_load_4d(to, query, p * BOX_COLUMNS, row, head - before, own.item, here)
                to += i32(do_at - q_at)
                tma_load_4d(to, grad_out, p * BOX_COLUMNS, row, head - before, own.item, here)
            at = (i64(head) * i64(rows) + i64(row)) * i64(4)
            to = shared + i32(rows_at) + stage * i32(2 * row_bytes)
            bulk_load(to, lse2 + at, row_bytes, here)
            bulk_load(to + i32(row_bytes), delta + at, row_bytes, here)
            turn += i32(1)
            tile += i32(1)
            if tile == own.to_tile:
                tile = own.from_tile
                head += i32(1)

    @device_function
    def store_results(dk_sum, dv_sum, own_key, thread, results, call, own):
        """Scale and store a thread's sums, and the flag of the block."""
        for i in range(o_count):
            dk_sum[i] = dk_sum[i] * call.scale
        lane = thread & i32(31)
        columns_of = i64((lane & i32(3)) << i32(4))
        item, kv_head = i64(own.item), i64(own.kv_head)
        dk_to = results.dk + (item * results.dk_batch + kv_head * results.dk_head) * i64(2)
        dv_to = results.dv + (item * results.dv_batch + kv_head * results.dv_head) * i64(2)
        store_rows(dk_sum, dk_to + columns_of, results.dk_row, own_key, call.kv_len, lane)
        store_rows(dv_sum, dv_to + columns_of, results.dv_row, own_key, call.kv_len, lane)
        if results.flags != i64(0):
            nothing = not_finite(dk_sum) + not_finite(dv_sum)
            found = named_or(1, COMPUTING * 128, select(nothing == f32(0), i32(0), i32(1)))
            if elect(thread == i32(0)):
                flag = own.pair_number * own.k_tiles + own.k_tile
                store_int32(results.flags + i64(flag) * i64(4), found)

    @device_function
    def multiply_tiles(shared, thread, warpgroup, results, call, own):
        """Compute a block's dk and dv, and its share of dq: the work of a multiplying warpgroup."""
        length, offset, first_key = own.length, own.offset, own.first_key
        left, right, q_len = call.left, call.right, call.q_len
        tile, head = own.from_tile, own.head
        turn = i32(0)  # how many tiles there have been
        own_thread = thread & i32(127)
        lane = thread & i32(31)
        own_row = ((own_thread >> i32(5)) << i32(4)) + (lane >> i32(2))
        own_column = (lane & i32(3)) << i32(1)
        s = cuda.local.array(s_count, dtype=np.float32)  # then P
        dp = cuda.local.array(s_count, dtype=np.float32)  # then dS
        dk_sum = cuda.local.array(o_count, dtype=np.float32)
        dv_sum = cuda.local.array(o_count, dtype=np.float32)
        dq_partial = cuda.local.array(dq_count, dtype=np.float32)
        p_pairs = cuda.local.array(pair_count, dtype=np.int32)
        ds_pairs = cuda.local.array(pair_count, dtype=np.int32)
        two = cuda.local.array(2, dtype=np.float32)  # numbers of two queries
        end_query = cuda.local.array(2, dtype=np.int32)
        for i in range(o_count):
            dk_sum[i] = f32(0)
            dv_sum[i] = f32(0)

        own_keys = shared + warpgroup * i32(64 * 128)
        k_matrix = i64(along_rows) | i64(own_keys >> i32(4))
        v_matrix = i64(along_rows) | i64((own_keys + i32(v_at)) >> i32(4))
        q_matrix = i64(along_rows) | i64((shared + i32(q_at)) >> i32(4))
        q_down = i64(down_queries) | i64((shared + i32(q_at)) >> i32(4))
        k_down = i64(down_keys) | i64((shared + warpgroup * i32(own_keys_at)) >> i32(4))
        own_ds = shared + i32(ds_at) + warpgroup * i32(own_ds_at)
        ds_down = i64(down_ds) | i64(own_ds >> i32(4))
        to_do = i64((do_at - q_at) >> 4)  # from queries to grad_out
        in_block = warpgroup * i32(64) + own_row
        own_key = first_key + in_block
        ds_write = shared + i32(ds_at) + in_block * i32(128) + own_column * i32(2)
        ds_write += (in_block & i32(7)) << i32(4)  # swizzled: chunk j is at ds_write ^ 16 j
        dq_from = results.dq + i64(warpgroup * i32(own_dq_at) + own_column) * i64(4)

        # Which queries see this thread's keys; `row` is to count its first column as column 0.
        first_query = own_key - offset - right - own_column
        for h in range(2):
            own_end = minimum(own_key + i32(h * 8 + 1) - offset + left, q_len)
            own_end = select(own_key + i32(h * 8) < length, own_end, i32(0))
            end_query[h] = own_end - own_column
        # Tiles of queries that see all of this warpgroup's keys need no mask.
        own_first = first_key + warpgroup * i32(64)
        whole_from = maximum(own_first + i32(63 + QUERIES - 1) - offset - right, i32(0))
        whole_from = quotient(whole_from, i32(QUERIES))
        whole_to = minimum(maximum(own_first + i32(1) - offset + left, i32(0)), q_len)
        whole_to = quotient(whole_to, i32(QUERIES))
        if own_first + i32(64) > length:
            whole_to = i32(0)

        mbarrier_wait(shared + i32(keys_here), 0)
        while head < own.end_head:
            row = tile * i32(QUERIES)
            masked = tile < whole_from or tile >= whole_to
            stage = stage_of(turn)
            mbarrier_wait(shared + i32(tile_here) + stage * i32(8), parity_of(turn))
            in_stage = i64(stage * i32(q_bytes >> 4))
            times_queries(s, 0, k_matrix, q_matrix + in_stage)
            if not dp_later:
                times_queries(dp, 0, v_matrix, q_matrix + in_stage + to_do)

            # The product for dK of the tile before ran until now, and read its queries.
            wait_dk_scores(dk_sum, 0, ds_pairs, 0, s, 0)
            if elect(both(own_thread == i32(0), turn > i32(0))):
                mbarrier_arrive(shared + i32(tile_free) + (stage ^ i32(1)) * i32(8))
            numbers = shared + i32(rows_at) + stage * i32(2 * row_bytes) + own_column * i32(4)
            if softcapped:
                softcap(s, call.cap_factor)
                if masked:
                    hide(s, row, first_query, end_query, f32(LOWEST))
            for j in range(s_tiles):
                load_shared_float32_2(two, 0, numbers + i32(j * 32))
                for h in range(2):
                    at = j * 4 + h * 2
                    p0 = ex2(s[at] * call.scale_log2 - two[0])
                    p1 = ex2(s[at + 1] * call.scale_log2 - two[1])
                    if softcapped:  # P goes to dV; dS wants it times the slope of the cap
                        p_pairs[j * 2 + h] = pair(p0, p1)
                        s[at] = p0 - p0 * s[at] * s[at]
                        s[at + 1] = p1 - p1 * s[at + 1] * s[at + 1]
                    else:
                        s[at] = p0
                        s[at + 1] = p1
            if not softcapped:
                if masked:
                    hide(s, row, first_query, end_query, f32(0))
                for j in range(s_tiles):
                    for h in range(2):
                        at = j * 4 + h * 2
                        p_pairs[j * 2 + h] = pair(s[at], s[at + 1])
            if dp_later:
                times_queries(dp, 0, v_matrix, q_matrix + in_stage + to_do)
            add_product(dv_sum, 0, p_pairs, 0, q_down + in_stage + to_do)

            wait_dp(dp, 0)
            for j in range(s_tiles):
                load_shared_float32_2(two, 0, numbers + i32(row_bytes + j * 32))
                for h in range(2):
                    for e in range(2):
                        at = j * 4 + h * 2 + e
                        dp[at] = s[at] * (dp[at] - two[e])
            if masked:  # P is 0 there, but dP may be anything
                hide(dp, row, first_query, end_query, f32(0))
            for j in range(s_tiles):
                for h in range(2):
                    at = j * 4 + h * 2
                    ds_pairs[j * 2 + h] = pair(dp[at], dp[at + 1])
            if with_dq:
                # Written while the other warpgroup may still read the stage before this one.
                ds_to = ds_write + stage * i32(ds_bytes)
                for j in range(s_tiles):
                    for h in range(2):
                        at = (ds_to ^ i32(j * 16)) + i32(h * 8 * 128)
                        store_shared_int32(at, ds_pairs[j * 2 + h])
                fence_proxy_async()
                named_sync(1, COMPUTING * 128)
                times_keys(dq_partial, 0, ds_down + i64(stage * i32(ds_bytes >> 4)), k_down)
                add_product(dk_sum, 0, ds_pairs, 0, q_down + in_stage)
                wait_dv_dq(dv_sum, 0, p_pairs, 0, dq_partial, 0)
                for h in range(2):
                    # Beyond the last row lie zeros: the last one may have them too.
                    to_row = minimum(row + own_row + i32(h * 8), q_len - i32(1))
                    to = i64(head) * i64(q_len) + i64(to_row)
                    to = dq_from + to * i64(head_dim * 4)
                    for j in range(dq_tiles):
                        at = j * 4 + h * 2
                        x, y = dq_partial[at] * call.scale, dq_partial[at + 1] * call.scale
                        add_float32_2(to + i64(j * 32), x, y)
            else:
                add_product(dk_sum, 0, ds_pairs, 0, q_down + in_stage)
                wait_dv(dv_sum, 0, p_pairs, 0)
            turn += i32(1)
            tile += i32(1)
            if tile == own.to_tile:
                tile = own.from_tile
                head += i32(1)
        wait_dk(dk_sum, 0, ds_pairs, 0)

        store_results(dk_sum, dv_sum, own_key, thread, results, call, own)

    def differentiate(
        query, key, value, grad_out, lse2, delta, dq, dk, dv, flags, lengths, offsets,
        q_len, kv_len, batch, kv_heads, group, section, left, right, length, offset,
        dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
        scale_log2, cap_factor, scale,
    ):  # fmt: skip
        call = Call(
            lengths, offsets, q_len, kv_len, batch, kv_heads, group, section, left, right, length,
            offset, scale_log2, cap_factor, scale,
        )  # fmt: skip
        results = Results(dq, dk, dv, flags, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row)
        own = tile_of(i32(cuda.blockIdx.x), call)
        thread = i32(cuda.threadIdx.x)
        warpgroup = uniform(thread >> i32(7))
        shared = shared_address(cuda.shared.array(0, dtype=np.int32))
        shared = (shared + i32(1023)) & i32(-1024)
        if elect(thread == i32(0)):
            tma_prefetch(query)
            tma_prefetch(key)
            tma_prefetch(value)
            tma_prefetch(grad_out)
            prepare_barriers(shared)
        cuda.syncthreads()
        if warpgroup == i32(COMPUTING):
            give_up()
            if elect(thread == i32(COMPUTING * 128)):
                load_tiles(shared, query, key, value, grad_out, lse2, delta, call, own)
        else:
            take()
            multiply_tiles(shared, thread, warpgroup, results, call, own)

    return Kernel(
        name=f"fastattn_wgmma_backward_{dtype}_{head_dim}"
        + ("_softcap" if softcapped else "")
        + ("" if with_dq else "_without_dq"),
        function=differentiate,
        signature=SIGNATURE,
        threads=(COMPUTING + 1) * 128,
        shared_bytes=shared_bytes,
        tensor_maps=(0, 1, 2, 3),
        needs=HOPPER,
    )


@functools.cache
def round_dq(dtype: str, head_dim: int) -> Kernel:
    """Return the kernel that rounds the sum of `backward` to dq.

    Its grid is `round_blocks`. Arguments, strides in elements, multiples of 8:

    source
        Address, float32 (batch, heads, q_len, head_dim), contiguous.
    dq
        Address, on a multiple of 16 bytes. The last axis is contiguous.
    flags
        Address, int32 (batch, heads, tiles of ROWS queries): becomes 1 where a row is not finite,
        else 0; or 0 for none.
    q_len, heads
        Sizes.
    dq_batch, dq_head, dq_row
        Strides.
    """
    threads = 256
    chunks = head_dim // 8  # of a row: what a thread rounds at a time
    rows_at_once = threads // chunks
    turns = ROWS // rows_at_once
    pair = ptx.pack[dtype]

    def round_rows(source, dq, flags, q_len, heads, dq_batch, dq_head, dq_row):
        tiles = quotient(q_len + i32(ROWS - 1), i32(ROWS))
        block = i32(cuda.blockIdx.x)
        pair_number = quotient(block, tiles)
        tile = block - pair_number * tiles
        item = quotient(pair_number, heads)
        head = pair_number - item * heads
        thread = i32(cuda.threadIdx.x)
        first = quotient(thread, i32(chunks))
        column = (thread - first * i32(chunks)) * i32(8)
        first += tile * i32(ROWS)
        x = cuda.local.array(8, dtype=np.float32)
        packed = cuda.local.array(4, dtype=np.int32)
        nothing = f32(0)
        for i in range(turns):
            row = first + i32(i * rows_at_once)
            inside = minimum(row, q_len - i32(1))
            at = (i64(pair_number) * i64(q_len) + i64(inside)) * i64(head_dim) + i64(column)
            load_float32_4(x, 0, source + at * i64(4))
            load_float32_4(x, 4, source + at * i64(4) + i64(16))
            for k in range(4):
                nothing += x[2 * k] * f32(0) + x[2 * k + 1] * f32(0)
                packed[k] = pair(x[2 * k], x[2 * k + 1])
            at = i64(item) * dq_batch + i64(head) * dq_head + i64(row) * dq_row + i64(column)
            store_16_if(row < q_len, dq + at * i64(2), packed, 0)
        if flags != i64(0):
            found = any_in_block(select(nothing == f32(0), i32(0), i32(1)))
            if elect(thread == i32(0)):
                store_int32(flags + i64(block) * i64(4), found)

    return Kernel(
        name=f"fastattn_round_dq_{dtype}_{head_dim}",
        function=round_rows,
        signature=ROUND_SIGNATURE,
        threads=threads,
        needs=TENSOR_CORES,
    )
