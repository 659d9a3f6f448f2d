# SPDX-License-Identifier: Apache-2.0
"""Small kernels that bring arguments into the form that the others read.

`copy` makes an array whose rows are aligned of one whose rows are not, and the other way round;
`convert` makes int64 of integers; `write` puts numbers that the host has into device memory. These
travel as arguments of the launch, so that the host need not wait and a graph may capture it.
Called by `_launch.py`.
"""

from __future__ import annotations

import functools

from numba import cuda
from numba.cuda import types

from fastattn.cuda.kernels import Kernel
from fastattn.cuda.kernels.elements import accumulator, array, element

THREADS = 128
NUMBERS = 32  # that one launch of `write` takes


def blocks(count: int) -> int:
    """Return how many blocks handle that many elements, or rows."""
    return -(-count // THREADS)


@functools.cache
def copy(stored: str) -> Kernel:
    """Return the kernel that copies source to target, (batch, heads, rows, columns).

    stored : what the elements are moved as, such as "uint16". Its grid has a block for each row.
    """
    kind = types.Array(getattr(types, stored), 4, "A")

    def copy_rows(target, source):
        heads, rows, columns = source.shape[1], source.shape[2], source.shape[3]
        row = cuda.blockIdx.x % rows
        head = cuda.blockIdx.x // rows % heads
        batch = cuda.blockIdx.x // (rows * heads)
        for column in range(cuda.threadIdx.x, columns, THREADS):
            target[batch, head, row, column] = source[batch, head, row, column]

    return Kernel(f"fastattn_copy_{stored}", copy_rows, (kind, kind), THREADS)


@functools.cache
def add(target_dtype: str, source_dtype: str) -> Kernel:
    """Return the kernel that sums source, of three axes, over the middle one, in order.

    Its grid has `blocks` for the elements of target, of two axes.
    """
    number = accumulator(source_dtype)
    zero = number(0)
    narrow, widen = element(target_dtype).narrow, element(source_dtype).widen

    def add_up(target, source):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < target.shape[0] * target.shape[1]:
            row, column = i // target.shape[1], i % target.shape[1]
            total = zero
            for n in range(source.shape[1]):
                total += number(widen(source[row, n, column]))
            target[row, column] = narrow(total)

    return Kernel(
        f"fastattn_add_{target_dtype}_{source_dtype}",
        add_up,
        (array(target_dtype, 2), array(source_dtype, 3)),
        THREADS,
    )


@functools.cache
def convert(dtype: str) -> Kernel:
    """Return the kernel that copies source, of an integer dtype, to target, int64; of one axis."""
    source_kind = types.Array(getattr(types, dtype), 1, "A")

    def convert_numbers(target, source):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < source.shape[0]:
            target[i] = types.int64(source[i])

    return Kernel(
        f"fastattn_convert_{dtype}",
        convert_numbers,
        (types.Array(types.int64, 1, "A"), source_kind),
        THREADS,
    )


@functools.cache
def write() -> Kernel:
    """Return the kernel that writes NUMBERS int64 to target from `first` on, as far as it goes."""

    def write_numbers(target, first, numbers):
        for i in range(NUMBERS):
            if cuda.threadIdx.x == i and first + i < target.shape[0]:
                target[first + i] = numbers[i]

    return Kernel(
        "fastattn_write",
        write_numbers,
        (types.Array(types.int64, 1, "A"), types.int64, types.UniTuple(types.int64, NUMBERS)),
        THREADS,
    )
