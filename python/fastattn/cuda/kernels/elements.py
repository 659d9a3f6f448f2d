# SPDX-License-Identifier: Apache-2.0
"""How elements of arrays become numbers to compute with, and back: float16, bfloat16 and the rest.

Numba has no arithmetic for 16-bit floats: a kernel gets their bits, and conversions are written in
LLVM's terms. In the simulator, NumPy converts.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

I16, I32, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()

# The simulator has no `forceinline`; device functions of other modules must not use `cuda` in it.
device = functools.partial(
    cuda.jit, device=True, **({} if config.ENABLE_CUDASIM else {"forceinline": True})
)


class Element(NamedTuple):
    """How a kernel reads and writes the elements of an array."""

    stored: Any  # Numba's type of an element
    widen: Any  # stored -> float32 or float64
    narrow: Any  # float32 (of float64: float64) -> stored


@device
def _same(x):
    return x


@device
def _added_by(attend):
    """Return what a bool mask adds to a score."""
    return np.float32(0) if attend else np.float32(-math.inf)


@intrinsic
def _widen_float16(typingctx, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], HALF), FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_float16(typingctx, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], HALF), I16)

    return types.uint16(types.float32), generate


@intrinsic
def _widen_bfloat16(typingctx, bits):
    def generate(context, builder, signature, arguments):
        upper = builder.shl(builder.zext(arguments[0], I32), I32(16))
        return builder.bitcast(upper, FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_bfloat16(typingctx, x):
    """Round to nearest, ties to even; in integers, since sm_75 has no instruction for it."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], I32)
        upper = builder.lshr(bits, I32(16))
        odd = builder.and_(upper, I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, builder.or_(upper, I32(0x40)), rounded), I16)

    return types.uint16(types.float32), generate


def element(dtype: str) -> Element:
    """Return how elements of the dtype are read: of 16-bit floats, a kernel gets the bits."""
    if config.ENABLE_CUDASIM and dtype in ("float16", "bfloat16"):
        return Element(types.uint16, np.float32, _same)
    return {
        "float16": Element(types.uint16, _widen_float16, _narrow_float16),
        "bfloat16": Element(types.uint16, _widen_bfloat16, _narrow_bfloat16),
        "float32": Element(types.float32, _same, _same),
        "float64": Element(types.float64, _same, _same),
        "bool": Element(types.boolean, _added_by, None),
    }[dtype]


def accumulator(dtype: str) -> Any:
    """Return the type that everything is computed in for a query of the dtype."""
    return types.float64 if dtype == "float64" else types.float32


def array(dtype: str | None, axes: int) -> Any:
    """Return Numba's type of an array of any strides, or of an argument that is absent."""
    return types.none if dtype is None else types.Array(element(dtype).stored, axes, "A")


def integers(present: bool, axes: int, kind: Any = types.int64) -> Any:
    """Return Numba's type of an array of integers, or of an argument that is absent."""
    return types.Array(kind, axes, "A") if present else types.none
