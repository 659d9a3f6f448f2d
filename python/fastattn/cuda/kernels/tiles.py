# SPDX-License-Identifier: Apache-2.0
"""How large are the tiles? Of each kernel, by head_dim or by dtype.

A table's keys are the head_dims that the kernel has: `_choose.py` reads them, without Numba. `simt`
has any, and a tile of it as many keys as its threads (`simt_tiles.py`).
"""

from __future__ import annotations

from typing import NamedTuple


class MmaTile(NamedTuple):
    """How `mma` cuts a head_dim."""

    queries: int
    keys: int
    warps: int


class WgmmaTile(NamedTuple):
    """How `wgmma` cuts a head_dim."""

    queries: int  # 64 per multiplying warpgroup
    keys: int
    more_registers: int  # of a thread that multiplies, and of one that loads
    fewer_registers: int


# 32 rows a warp where the registers suffice: a key tile is read from shared memory once per warp,
# and at 16 rows that takes as long as the products.
MMA = {
    64: MmaTile(128, 64, 4),
    96: MmaTile(128, 64, 4),
    128: MmaTile(128, 64, 4),
    256: MmaTile(64, 32, 4),
}
# As many registers as the sums, scores and probabilities of 64 rows need. All the threads together
# must not take more than the block starts with, 64 Ki shared out evenly.
WGMMA = {64: WgmmaTile(192, 128, 160, 32), 128: WgmmaTile(128, 128, 224, 56)}
# Rows of a tile in shared memory: as many as registers have room for scores of.
MMA_DKDV_QUERIES = {64: 64, 128: 32}
MMA_DQ_KEYS = {64: 64, 128: 64}
WGMMA_GRADIENT_KEYS = 128  # of a block
WGMMA_GRADIENT_QUERIES = 64  # of a step
SPLIT = 256  # keys of a block of `decode`
# The most row tiles of a block of `decode`, of 16 rows: their sums are 128 registers of a thread.
# As many tiles of keys and of values are in a warp's ring, whose memory is where sums are merged.
DECODE_ROW_TILES = {64: 4, 96: 2, 128: 2, 256: 1}
# Rows of a tile of `simt`. float64 takes twice the room in shared memory and registers.
SIMT_ROWS = {"float16": 64, "bfloat16": 64, "float32": 64, "float64": 32}
