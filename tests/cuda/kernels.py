# SPDX-License-Identifier: Apache-2.0
"""What tests of building and keeping kernels share: a small kernel, and a binary that is known."""

import dataclasses
from pathlib import Path

import numpy as np

from fastattn.cuda import _build
from fastattn.cuda._build import Binary

PACKAGE = Path(_build.__file__).parent
KNOWN = Binary(
    name="known",
    cubin=bytes(range(256)) * 5,
    threads=128,
    shared_bytes=70_000,
    parameters=("int64", "tensor_map", "float32"),
    architecture="sm_90a",
    registers=168,
    spill_stores=4,
    spill_loads=8,
    stack_bytes=16,
    static_shared_bytes=1024,
    log="ptxas info",
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of a kernel before Numba sees it."""

    name: str = "asked"
    signature: tuple = ("int64", "int32")
    tensor_maps: tuple = ()
    needs: tuple = (7, 5)
    threads: int = 64
    shared_bytes: int = 0
    blocks_per_sm: int = 1


def small(**fields):
    """Return a kernel that copies a number through shared memory, for two arguments of addresses.

    The first may be a tensor map: then it is the map's first number.
    """
    from numba import cuda
    from numba.cuda import types

    from fastattn.cuda.kernels import Kernel
    from fastattn.cuda.ptx import load_int64, store_int32

    @cuda.jit(device=True, forceinline=True)
    def doubled(number):
        return number * types.int32(2)

    def copy(source, target, count, factor):
        numbers = cuda.shared.array(0, dtype=np.int32)
        numbers[cuda.threadIdx.x] = types.int32(load_int64(source))
        cuda.syncthreads()
        if factor > types.float32(0):
            store_int32(target, doubled(numbers[count]))

    signature = (types.int64, types.int64, types.int32, types.float32)
    known = {"name": "small", "function": copy, "signature": signature, "threads": 64}
    return Kernel(**known | {"shared_bytes": 256} | fields)
