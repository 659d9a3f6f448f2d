# SPDX-License-Identifier: Apache-2.0
"""Device functions that the tensor-core kernels share: which keys a row sees, and its softmax.

A tile of scores lies in the registers of a warp as `mma.sync` and `wgmma` leave it: the thread with
number `lane` holds, of each 16 rows x 8 columns, elements (row, column), (row, column + 1), (row +
8, column) and (row + 8, column + 1), where row is lane // 4 and column is 2 * (lane % 4). Element
``(m * tiles + j) * 4 + h * 2 + e`` of its array is that of rows 16 m + 8 h and columns 8 j + e.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda import types

from fastattn.cuda.ptx import (
    both,
    ex2,
    exchange,
    load_int64,
    maximum,
    minimum,
    pack,
    product,
    rcp,
    select,
    uniform,
)

f32, i32, i64 = types.float32, types.int32, types.int64

LOWEST = float("-inf")
LN2 = float(np.log(2))

device_function = cuda.jit(device=True, forceinline=True)


@device_function
def own_number(numbers, batch, given, least, most):
    """Return the number of a batch element, at most so far from what is legal; or the one given."""
    number = given
    if numbers != i64(0):
        own = load_int64(numbers + i64(batch) * i64(8))
        number = uniform(i32(minimum(maximum(own, i64(least)), i64(most))))
    return number


@device_function
def first_key(row, offset, left):
    """Return the first key that a row sees, if it sees that far."""
    return maximum(i32(0), row + offset - left)


@device_function
def end_key(row, offset, right, length):
    """Return the first key after those that a row sees; not after first_key if it sees none."""
    return minimum(length, row + offset + right + i32(1))


@functools.cache
def scores(row_tiles: int, tiles: int) -> SimpleNamespace:
    """Return what is done with a thread's scores of 16 * row_tiles rows and 8 * tiles columns.

    mask(s, first, end, column)
        Hide what is not within first[r] <= column of the element < end[r], r = m * 2 + h.
    softcap(s, factor)
        Replace s by tanh(s * scale / softcap), factor being 2 * log2(e) * scale / softcap.
    softmax(s, highest, total, rescale, scale)
        Replace s by 2 ** (s * scale - highest * scale) for a running maximum, of s, and sum;
        rescale becomes what earlier sums must be multiplied by. scale > 0.
    """

    @device_function
    def mask(s, first, end, column):
        for m in range(row_tiles):
            for h in range(2):
                # 32 bits: Numba's sums of int32 have 64.
                low = i32(first[m * 2 + h] - column)
                high = i32(end[m * 2 + h] - column)
                for j in range(tiles):
                    for e in range(2):
                        at = (m * tiles + j) * 4 + h * 2 + e
                        own = i32(j * 8 + e)
                        s[at] = select(both(own >= low, own < high), s[at], f32(LOWEST))

    @device_function
    def softcap(s, factor):
        for i in range(row_tiles * tiles * 4):
            # tanh(x) = 1 - 2 / (1 + exp(2 x)); near 0, where that cancels, its series.
            x = s[i] * factor * f32(LN2 / 2)
            y = x * x
            series = f32(-17 / 315) + y * f32(62 / 2835)
            series = f32(-1 / 3) + y * (f32(2 / 15) + y * series)
            series = x + x * y * series
            far = f32(1) - f32(2) * rcp(f32(1) + ex2(s[i] * factor))
            s[i] = select(y < f32(0.1), series, far)

    @device_function
    def softmax(s, highest, total, rescale, scale):
        for m in range(row_tiles):
            for h in range(2):
                top = highest[m * 2 + h]
                # Not fused: where the maximum stays, the difference must be exactly 0.
                before = product(top, scale)
                for j in range(tiles):
                    at = (m * tiles + j) * 4 + h * 2
                    top = maximum(top, maximum(s[at], s[at + 1]))
                top = maximum(top, exchange(top, 1))
                top = maximum(top, exchange(top, 2))
                highest[m * 2 + h] = top
                after = select(top == f32(LOWEST), f32(0), product(top, scale))
                rescale[m * 2 + h] = ex2(before - after)
                tile_total = f32(0)
                for j in range(tiles):
                    for e in range(2):
                        at = (m * tiles + j) * 4 + h * 2 + e
                        s[at] = ex2(s[at] * scale - after)
                        tile_total += s[at]
                total[m * 2 + h] = total[m * 2 + h] * rescale[m * 2 + h] + tile_total

    return SimpleNamespace(mask=mask, softcap=softcap, softmax=softmax)


@functools.cache
def sums(row_tiles: int, tiles: int) -> SimpleNamespace:
    """Return what is done with a thread's sums of 16 * row_tiles rows and 8 * tiles columns.

    multiply(acc, factors)
        Multiply row m * 2 + h by factors[m * 2 + h].
    not_finite(acc, h)
        Return 0 if rows 8 h onwards of each 16 are finite, else NaN.
    """

    @device_function
    def multiply(acc, factors):
        for m in range(row_tiles):
            for h in range(2):
                for j in range(tiles):
                    for e in range(2):
                        at = (m * tiles + j) * 4 + h * 2 + e
                        acc[at] = acc[at] * factors[m * 2 + h]

    @device_function
    def not_finite(acc):
        nothing = f32(0)
        for i in range(row_tiles * tiles * 4):
            nothing += acc[i] * f32(0)
        return nothing

    return SimpleNamespace(multiply=multiply, not_finite=not_finite)


@functools.cache
def packed(dtype: str, tiles: int):
    """Return a function that rounds a row tile's numbers to pairs: the left factor of a product.

    Elements 4 k .. 4 k + 3 of the result are the factor's 16 columns from 16 k, beginning with
    tile `first` of the source.
    """
    pair = pack[dtype]

    @device_function
    def to_pairs(numbers, first, pairs):
        for j in range(tiles):
            at = (first + j) * 4
            pairs[j * 2] = pair(numbers[at], numbers[at + 1])
            pairs[j * 2 + 1] = pair(numbers[at + 2], numbers[at + 3])

    return to_pairs


@device_function
def row_sum(x):
    """Return the sum over the four threads that share a row."""
    x = x + exchange(x, 1)
    return x + exchange(x, 2)
