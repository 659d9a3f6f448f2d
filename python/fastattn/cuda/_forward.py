# SPDX-License-Identifier: Apache-2.0
"""The launches that compute a call's result, in each of the forms that `_choose.py` knows.

Called by `_attention.py`; calls the kernels' factories and `_launch.py`.
"""

from __future__ import annotations

import math
from typing import Any

from fastattn._arguments import WIDEST
from fastattn.cuda import _driver
from fastattn.cuda._arrays import DeviceArray
from fastattn.cuda._launch import (
    Place,
    aligned,
    as_int64,
    copy,
    is_aligned,
    launch,
    scratch,
    upload,
)
from fastattn.cuda._problem import Options, Problem, within_float32
from fastattn.cuda._recipe import MapOf
from fastattn.cuda.kernels import UNLIMITED

LOG2E = math.log2(math.e)
MOST_DROPPED = 2**32


def on_device(asked: Options, place: Place) -> Options:
    """Return the options with the host's arrays in the device's memory."""

    def moved(x: Any) -> Any:
        return x if x is None or isinstance(x, DeviceArray) else upload(place, x)

    return asked._replace(
        alibi_slopes=moved(asked.alibi_slopes),
        sinks=moved(asked.sinks),
        lengths=moved(asked.lengths),
        offsets=moved(asked.offsets),
    )


def attend(problem: Problem, form: str, place: Place) -> None:
    """Fill the problem's out and lse."""
    problem = problem._replace(
        lengths=as_int64(place, problem.lengths), offsets=as_int64(place, problem.offsets)
    )
    if form == "simt":
        simt(problem, place)
        return
    out = problem.out
    ready = problem._replace(
        query=aligned(place, problem.query),
        key=aligned(place, problem.key),
        value=aligned(place, problem.value),
        out=out if is_aligned(out) else scratch(place, out.shape, out.dtype),
    )
    {"mma": mma, "wgmma": wgmma, "decode": decode}[form](ready, place)
    if ready.out is not out:
        copy(place, out, ready.out)


def simt(
    problem: Problem, place: Place, flags: DeviceArray | None = None, rows_per_flag: int = 1
) -> None:
    """Compute by the kernel that knows every argument; with flags, rows that are not finite."""
    from fastattn.cuda.kernels import simt as kernels

    p = problem
    sinks = p.sinks and p.sinks.dtype
    kernel = kernels.forward(given(p), p.value.shape[-1], sinks=sinks, flags=flags is not None)
    batch, heads, q_len, _ = p.query.shape
    blocks = kernels.forward_blocks(p.query.dtype, batch, heads, q_len, p.value.shape[-1])
    written = (p.out, p.lse, flags, rows_per_flag, p.sinks)
    launch(kernel, place, blocks, *written, p.query, p.key, p.value, *simt_options(p))


def given(problem: Problem) -> Any:
    """Return what the simt kernels are specialised for."""
    from fastattn.cuda.kernels import simt as kernels

    p = problem
    return kernels.Given(
        query=p.query.dtype,
        key=p.key.dtype,
        mask=p.mask and p.mask.dtype,
        bias=p.bias and p.bias.dtype,
        alibi_slopes=p.alibi_slopes and p.alibi_slopes.dtype,
        softcap=p.options.softcap > 0,
        dropout=p.options.dropout_p > 0,
        lengths=p.lengths is not None,
        offsets=p.offsets is not None,
    )


def simt_options(problem: Problem) -> tuple[Any, ...]:
    """Return the options as the simt kernels take them."""
    p, asked = problem, problem.options
    return (
        p.mask,
        p.bias,
        p.alibi_slopes,
        p.lengths,
        p.offsets,
        asked.length,
        asked.offset,
        asked.left,
        asked.right,
        asked.scale,
        asked.softcap or None,
        min(round(asked.dropout_p * MOST_DROPPED), MOST_DROPPED),
        asked.seed % 2**32,
        asked.seed >> 32,
        1 / (1 - asked.dropout_p) if asked.dropout_p < 1 else 1.0,
        p.first_batch,
    )


def mma(problem: Problem, place: Place) -> None:
    """Compute by warps that multiply."""
    from fastattn.cuda.kernels import mma as kernels

    p = problem
    batch, heads, q_len, head_dim = p.query.shape
    rows = kernels.TILES[head_dim].queries
    tiles = -(-q_len // rows)
    flags = new_flags(p, place, heads, tiles)
    launch(
        kernels.forward(p.query.dtype, head_dim, p.options.softcap > 0),
        place,
        batch * heads * tiles,
        *addresses(p.query, p.key, p.value, p.out, p.lse, flags, p.lengths, p.offsets),
        *counts(p),
        *strides(p.query, p.key, p.value, p.out),
        *factors(p),
    )
    if flags is not None:
        simt(p, place, flags, rows)


def wgmma(problem: Problem, place: Place) -> None:
    """Compute by Hopper's warpgroups."""
    from fastattn.cuda.kernels import wgmma as kernels

    p = problem
    batch, heads, q_len, head_dim = p.query.shape
    tile = kernels.TILES[head_dim]
    flags = new_flags(p, place, heads, -(-q_len // tile.queries))
    plan = kernels.plan(
        batch, heads, p.group, q_len, p.key.shape[2], head_dim, place.device.multiprocessors
    )
    launch(
        kernels.forward(p.query.dtype, head_dim, p.options.softcap > 0),
        place,
        plan.blocks,
        tensor_map(p.query, tile.queries),
        tensor_map(p.key, tile.keys),
        tensor_map(p.value, tile.keys),
        *addresses(p.out, p.lse, flags, p.lengths, p.offsets),
        *counts(p),
        *strides(p.out),
        plan.pairs,
        plan.section,
        *factors(p),
    )
    if flags is not None:
        simt(p, place, flags, tile.queries)


def decode(problem: Problem, place: Place) -> None:
    """Compute by blocks that have a piece of the keys each, and merge the pieces."""
    from fastattn.cuda.kernels import decode as kernels

    p = problem
    batch, heads, q_len, head_dim = p.query.shape
    kv_len = p.key.shape[2]
    splits = kernels.splits_of(kv_len)
    tiles = kernels.row_tiles_for(q_len, p.group, head_dim)
    outs, stats = kernels.workspace(batch, heads, q_len, kv_len, head_dim)
    partial_out, partial_lse = (scratch(place, (n,), "float32") for n in (outs, stats))
    flags = new_flags(p, place, heads, -(-q_len // kernels.FLAG_ROWS))
    launch(
        kernels.split(p.query.dtype, head_dim, tiles, p.options.softcap > 0),
        place,
        kernels.split_blocks(batch, heads // p.group, q_len, kv_len, p.group, tiles),
        *addresses(p.query, p.key, p.value, partial_out, partial_lse, flags, p.lengths, p.offsets),
        *counts(p),
        *strides(p.query, p.key, p.value),
        *factors(p),
    )
    launch(
        kernels.combine(p.query.dtype, head_dim),
        place,
        kernels.combine_blocks(batch, heads, q_len),
        *addresses(partial_out, partial_lse, p.out, p.lse, flags),
        q_len,
        heads,
        splits,
        *strides(p.out),
    )
    if flags is not None:
        simt(p, place, flags, kernels.FLAG_ROWS)


# --- Arguments of the tensor-core kernels --------------------------------------------------------


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
    asked = problem.options
    _, heads, q_len, _ = problem.query.shape
    left, right = (UNLIMITED if x == WIDEST else x for x in (asked.left, asked.right))
    kv_len = problem.key.shape[2]
    return q_len, kv_len, heads, problem.group, left, right, asked.length, asked.offset


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
    """Return a map of an array of (batch, heads, rows, head_dim), in tiles of 64 columns."""
    steps = zip(array.shape[2::-1], array.strides[2::-1], strict=True)
    return MapOf(
        array.pointer,
        array.shape[::-1],
        tuple(0 if size == 1 else stride for size, stride in steps),  # others may be anything
        (64, rows, 1, 1),
        array.dtype,
        _driver.device(array.device),
    )
