# SPDX-License-Identifier: Apache-2.0
"""The kernels, in Python: each module answers for one way to use the chip.

`simt` is the one to read first: plain Numba, every argument, any dtype. `mma` and `wgmma` use the
tensor cores of sm_80 and of sm_90a, `decode` cuts long keys into pieces for few queries. A factory
in each returns a `Kernel`, specialised for a dtype and a head_dim, which `_build.py` compiles and
`_driver.py` launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The tensor-core kernels count positions in 32 bits: their sums with a side of a window must fit.
MOST_LENGTH = 2**28  # of queries, and of keys
MOST_OFFSET = 2**29
UNLIMITED = 2**30  # a side of a window that no position reaches


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
    needs: tuple[int, int] = (7, 5)  # the least compute capability
