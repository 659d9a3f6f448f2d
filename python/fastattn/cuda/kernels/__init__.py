# SPDX-License-Identifier: Apache-2.0
"""The kernels, in Python: each module answers for one way to use the chip.

`simt` is the one to read first: plain Numba, every argument, any dtype. `mma` and `wgmma` use the
tensor cores of sm_80 and of sm_90a, `decode` cuts long keys into splits for few queries; of the
first three, `*_backward` gives the gradients. A factory in each returns a `Kernel`, specialised for
a dtype and a head_dim, which `_build.py` compiles and `_driver.py` launches. What several kernels
share is in `elements` and `simt_tiles` (of simt) and in `rows` (of the tensor cores). How large all
tiles are is in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What the kernels can do: `_choose.py` reads it here, without importing Numba.
LEAST_CAPABILITY = (7, 5)  # Turing: CUDA 13 writes code for nothing older
TENSOR_CORES = (8, 0)  # Ampere: mma.sync of bfloat16, asynchronous copies
HOPPER = (9, 0)  # TMA and wgmma
# The tensor-core kernels count positions in 32 bits: their sums with a side of a window must fit.
MOST_LENGTH = 2**28  # of queries and of keys, and of an offset or a side that the host knows
MOST_OFFSET = 2**29
MOST_SIDE = 2**30  # of a window: no position reaches it
BOX_COLUMNS = 64  # of a tensor map's box: 128 bytes, which TMA swizzles
PADDING = 128  # what gradients read of each row is there for a multiple of so many


def padded(q_len: int) -> int:
    """Return how many rows delta and lse2 have, which `simt_backward.prepare` makes."""
    return -(-q_len // PADDING) * PADDING


@dataclass(frozen=True)
class Kernel:
    """A function in Numba's subset of Python, and what it takes to compile and launch it."""

    name: str  # of the symbol, and of what it was specialised for
    function: Callable[..., None]
    signature: tuple[Any, ...]  # Numba's types of the arguments
    threads: int  # per block
    shared_bytes: int = 0  # of dynamic shared memory
    blocks_per_sm: int = 1  # that registers must leave room for
    tensor_maps: tuple[int, ...] = ()  # which arguments are tensor maps, passed by value
    needs: tuple[int, int] = LEAST_CAPABILITY
