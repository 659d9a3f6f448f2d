# SPDX-License-Identifier: Apache-2.0
"""The launches that compute a call's result, in each of the forms that `_choose.py` knows.

Called by `_attention.py`; calls the kernels' factories, `_parameters.py` and `_launch.py`.
"""

from __future__ import annotations

from fastattn.cuda._arrays import DeviceArray
from fastattn.cuda._launch import Place, aligned, copy, is_aligned, launch, scratch
from fastattn.cuda._parameters import (
    addresses,
    counts,
    factors,
    given,
    new_flags,
    simt_call,
    strides,
    tensor_map,
)
from fastattn.cuda._problem import Problem
from fastattn.cuda.kernels.tiles import MMA, WGMMA


def attend(problem: Problem, form: str, place: Place) -> None:
    """Fill the problem's out and lse."""
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
    launch(kernel, place, blocks, *written, p.query, p.key, p.value, simt_call(p))


def mma(problem: Problem, place: Place) -> None:
    """Compute by warps that multiply."""
    from fastattn.cuda.kernels import mma as kernels

    p = problem
    batch, heads, q_len, head_dim = p.query.shape
    rows = MMA[head_dim].queries
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
    tile = WGMMA[head_dim]
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
    """Compute partial results, of a split of the keys each, and merge them."""
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
