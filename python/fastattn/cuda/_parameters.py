# SPDX-License-Identifier: Apache-2.0
"""What does a kernel take of a problem? Its specialisation and the arguments of its launch.

Called by `_forward.py` and `_backward.py`.
"""

from __future__ import annotations

import math
from typing import Any

from fastattn.cuda import _driver
from fastattn.cuda._arrays import DeviceArray
from fastattn.cuda._launch import Place, scratch
from fastattn.cuda._problem import Problem, within_float32
from fastattn.cuda._recipe import MapOf
from fastattn.cuda.kernels import BOX_COLUMNS, MOST_SIDE

LOG2E = math.log2(math.e)
MOST_DROPPED = 2**32


# --- The simt kernels ----------------------------------------------------------------------------


def given(problem: Problem) -> Any:
    """Return what the simt kernels are specialised for."""
    from fastattn.cuda.kernels.simt_tiles import Given

    p = problem
    return Given(
        query=p.query.dtype,
        key=p.key.dtype,
        mask=p.mask and p.mask.dtype,
        bias=p.bias and p.bias.dtype,
        alibi_slopes=p.alibi_slopes and p.alibi_slopes.dtype,
        softcap=p.options.softcap > 0,
        dropout=p.options.dropout_p > 0,
        lengths=p.lengths is not None,
        offsets=p.offsets is not None,
        key_offsets=p.key_offsets is not None,
    )


def simt_call(problem: Problem) -> Any:
    """Return the options as the simt kernels take them."""
    from fastattn.cuda.kernels.simt_tiles import Call

    p, options = problem, problem.options
    return Call(
        mask=p.mask,
        bias=p.bias,
        alibi_slopes=p.alibi_slopes,
        lengths=p.lengths,
        offsets=p.offsets,
        key_offsets=p.key_offsets,
        length=options.length,
        offset=options.offset,
        key_offset=options.key_offset,
        left=options.left,
        right=options.right,
        scale=options.scale,
        softcap=options.softcap or None,
        dropped=min(round(options.dropout_p * MOST_DROPPED), MOST_DROPPED),
        seed_low=options.seed % 2**32,
        seed_high=options.seed >> 32,
        kept_scale=1 / (1 - options.dropout_p) if options.dropout_p < 1 else 1.0,
        first_head=options.head_offset,
        first_batch=options.batch_offset + p.first_batch,
    )


# --- The tensor-core kernels ---------------------------------------------------------------------


def new_flags(problem: Problem, place: Place, heads: int, tiles: int) -> DeviceArray | None:
    """Return a flag for each tile of rows, if what is hidden from a row can spoil it."""
    if not problem.options.may_hide:
        return None
    return scratch(place, (problem.batch, heads, tiles), "int32")


def addresses(*arrays: DeviceArray | None) -> tuple[int, ...]:
    """Return where arrays begin; 0 where there is none."""
    return tuple(0 if x is None else x.pointer for x in arrays)


def counts(problem: Problem) -> tuple[int, ...]:
    """Return q_len, kv_len, heads, group, left, right, length and offset."""
    options = problem.options
    _, heads, q_len, _ = problem.query.shape
    left, right = min(options.left, MOST_SIDE), min(options.right, MOST_SIDE)
    kv_len = problem.key.shape[2]
    return q_len, kv_len, heads, problem.group, left, right, options.length, options.offset


def strides(*arrays: DeviceArray) -> tuple[int, ...]:
    """Return the strides of each array's first three axes."""
    return tuple(stride for x in arrays for stride in x.strides[:3])


def factors(problem: Problem) -> tuple[float, float]:
    """Return what scores are multiplied by, and what before they are capped."""
    scale, softcap = problem.options.scale, problem.options.softcap
    if not softcap:
        return within_float32(scale * LOG2E), 0.0
    return softcap * LOG2E, within_float32(2 * LOG2E * scale / softcap)


def tensor_map(array: DeviceArray, rows: int) -> MapOf:
    """Return a map of an array of (batch, heads, rows, head_dim), in boxes of so many rows."""
    steps = zip(array.shape[2::-1], array.strides[2::-1], strict=True)
    return MapOf(
        array.pointer,
        array.shape[::-1],
        tuple(0 if size == 1 else stride for size, stride in steps),  # others may be anything
        (BOX_COLUMNS, rows, 1, 1),
        array.dtype,
        _driver.device(array.device),
    )
