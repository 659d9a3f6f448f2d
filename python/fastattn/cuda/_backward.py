# SPDX-License-Identifier: Apache-2.0
"""The launches that compute a call's gradients, in each of the forms that `_choose.py` knows.

Called by `_attention.py`; calls the kernels' factories, `_parameters.py` and `_launch.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastattn.cuda import _choose
from fastattn.cuda._arrays import DeviceArray
from fastattn.cuda._launch import Place, add, aligned, clear, launch, problems_on, scratch
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
from fastattn.cuda._problem import (
    DeviceOptions,
    Problem,
    Shape,
    question,
    wide_dtype,
    with_heads,
    with_row_heads,
)
from fastattn.cuda.kernels import padded
from fastattn.cuda.kernels.tiles import WGMMA_GRADIENT_KEYS, WGMMA_GRADIENT_QUERIES


class Call(NamedTuple):
    """The arguments, with the axes that they came with."""

    place: Place
    options: DeviceOptions
    query: DeviceArray
    key: DeviceArray
    value: DeviceArray
    out: DeviceArray
    lse: DeviceArray
    grad_out: DeviceArray
    grad_lse: DeviceArray | None
    return_dbias: bool
    dsinks_dtype: str  # empty: dsinks is not wanted
    deterministic: bool


class Gradients(NamedTuple):
    """What gradients need beside a problem's other arrays: `Problem.more`."""

    grad_out: DeviceArray
    grad_lse: DeviceArray | None
    dq: DeviceArray
    dk: DeviceArray
    dv: DeviceArray
    dbias: DeviceArray | None  # of (batch, heads, q_len, kv_len), 1 where it was broadcast
    delta: DeviceArray  # of each row, as `simt_backward.prepare` defines it
    lse2: DeviceArray
    sink_terms: DeviceArray | None


def gradients(call: Call) -> list[DeviceArray]:
    """Return dq, dk and dv, and what else is wanted."""
    place, shapes, bias = call.place, call.options.shapes, call.options.bias
    ndim = len(shapes.batch_shape)
    inputs = (call.query, call.key, call.value)
    # Where batch axes broadcast, gradients are first made in full.
    targets = [x.shape for x in inputs]
    wholes = [
        scratch(
            place,
            (*shapes.batch_shape, *with_heads(x).shape[-3:]) if shapes.batch_shape else x.shape,
            x.dtype,
        )
        for x in inputs
    ]
    if call.return_dbias:
        assert bias is not None
        targets.append(bias.shape)
        own = (1,) * (ndim + 3 - len(bias.shape)) + bias.shape
        is_shared = ndim < 2 and own[:ndim] == (1,) * ndim
        batch = own[:ndim] if is_shared else shapes.batch_shape
        wholes.append(scratch(place, (*batch, *own[ndim:]), bias.dtype))
    dsinks = []
    if call.dsinks_dtype:
        dsinks.append(scratch(place, (shapes.q_heads,), call.dsinks_dtype))
    if shapes.has_pairs:
        _fill(call, wholes, dsinks)
    else:
        for x in (*wholes, *dsinks):
            clear(place, x)
    return [*(summed(place, x, shape) for x, shape in zip(wholes, targets, strict=True)), *dsinks]


def _fill(call: Call, wholes: list[DeviceArray], dsinks: list[DeviceArray]) -> None:
    """Compute all of the gradients before they are summed over what was broadcast."""
    place, options = call.place, call.options
    shapes, wide = options.shapes, wide_dtype(call.query.dtype)
    rows = (*shapes.batch_shape, max(shapes.q_heads, 1), padded(shapes.q_len))
    dq, dk, dv = map(with_heads, wholes[:3])
    more = Gradients(
        with_heads(call.grad_out),
        None if call.grad_lse is None else with_row_heads(call.grad_lse),
        dq,
        dk,
        dv,
        wholes[3] if wholes[3:] else None,
        delta=scratch(place, rows, wide),
        lse2=scratch(place, rows, wide),
        sink_terms=scratch(place, rows, wide) if dsinks else None,
    )
    inputs = (call.query, call.key, call.value)
    asks = question(*inputs, options, place.device.capability)
    choice = _choose.backward(asks, call.deterministic)
    compute = {"simt": simt, "mma": mma, "wgmma": wgmma}[choice.form]
    for problem in problems_on(place, *inputs, call.out, call.lse, options, more):
        prepare(problem, place)
        compute(problem, place, call.deterministic)
        if more.dbias is not None:
            simt_dbias(problem, place)
    if more.sink_terms is not None:
        add_sinks(place, dsinks[0], more.sink_terms)


# --- What all forms begin with -------------------------------------------------------------------


def prepare(problem: Problem, place: Place) -> None:
    """Fill delta, lse2 and sink_terms."""
    from fastattn.cuda.kernels import simt_backward as kernels

    p, more = problem, problem.more
    kernel = kernels.prepare(
        p.query.dtype,
        sinks=p.sinks and p.sinks.dtype,
        grad_lse=more.grad_lse is not None,
        dsinks=more.sink_terms is not None,
    )
    batch, heads, q_len, _ = p.query.shape
    blocks = kernels.prepare_blocks(batch, heads, q_len)
    written = (more.delta, more.lse2, more.sink_terms)
    launch(kernel, place, blocks, *written, p.out, more.grad_out, p.lse, more.grad_lse, p.sinks)


# --- The forms -----------------------------------------------------------------------------------


def simt(problem: Problem, place: Place, _deterministic: bool) -> None:
    """Compute dq, dk and dv by the kernels that know every argument."""
    simt_dq(problem, place)
    simt_dkdv(problem, place)


def simt_dq(
    problem: Problem, place: Place, flags: DeviceArray | None = None, rows_per_flag: int = 1
) -> None:
    """Compute dq; with flags, its rows that are not finite."""
    from fastattn.cuda.kernels import simt as forward
    from fastattn.cuda.kernels import simt_backward as kernels

    p = problem
    batch, heads, q_len, head_dim = p.query.shape
    kernel = kernels.query_gradient(given(p), head_dim, flags=flags is not None)
    blocks = forward.forward_blocks(p.query.dtype, batch, heads, q_len, head_dim)
    launch(kernel, place, blocks, p.more.dq, flags, rows_per_flag, *simt_inputs(p))


def simt_dkdv(
    problem: Problem, place: Place, flags: DeviceArray | None = None, rows_per_flag: int = 1
) -> None:
    """Compute dk and dv; with flags, their rows that are not finite."""
    from fastattn.cuda.kernels import simt_backward as kernels

    p, more = problem, problem.more
    head_dim, value_head_dim = p.key.shape[-1], p.value.shape[-1]
    kernel = kernels.key_value_gradients(
        given(p), head_dim, value_head_dim, flags=flags is not None
    )
    blocks = kernels.key_blocks(*p.key.shape[:3])
    launch(kernel, place, blocks, more.dk, more.dv, flags, rows_per_flag, *simt_inputs(p))


def simt_inputs(problem: Problem) -> tuple[Any, ...]:
    """Return what the simt kernels read."""
    from fastattn.cuda.kernels.simt_backward import Inputs

    p, more = problem, problem.more
    inputs = Inputs(p.query, p.key, p.value, more.grad_out, more.delta, more.lse2)
    return inputs, simt_call(p)


def mma(problem: Problem, place: Place, _deterministic: bool) -> None:
    """Compute dq, dk and dv by warps that multiply."""
    p = ready(problem, place)
    mma_dq(p, place)
    mma_dkdv(p, place)


def ready(problem: Problem, place: Place) -> Problem:
    """Return the problem with rows aligned as the tensor-core kernels need them."""
    p, more = problem, problem.more
    return p._replace(
        query=aligned(place, p.query),
        key=aligned(place, p.key),
        value=aligned(place, p.value),
        more=more._replace(grad_out=aligned(place, more.grad_out)),
    )


def mma_dq(problem: Problem, place: Place) -> None:
    """Compute dq, in a fixed order."""
    from fastattn.cuda.kernels import mma_backward as kernels

    p, more = problem, problem.more
    batch, heads, q_len, head_dim = p.query.shape
    tiles = -(-q_len // kernels.ROWS)
    flags = new_flags(p, place, heads, tiles)
    launch(
        kernels.dq(p.query.dtype, head_dim, p.options.softcap > 0),
        place,
        batch * heads * tiles,
        *addresses(p.query, p.key, p.value, more.grad_out, more.lse2, more.delta, more.dq, flags),
        *addresses(p.lengths, p.offsets),
        *counts(p),
        *strides(p.query, p.key, p.value, more.grad_out, more.dq),
        p.options.scale,
        *factors(p),
    )
    if flags is not None:
        simt_dq(p, place, flags, kernels.ROWS)


def mma_dkdv(problem: Problem, place: Place) -> None:
    """Compute dk and dv."""
    from fastattn.cuda.kernels import mma_backward as kernels

    p, more = problem, problem.more
    batch, kv_heads, kv_len, head_dim = p.key.shape
    tiles = -(-kv_len // kernels.ROWS)
    flags = new_flags(p, place, kv_heads, tiles)
    launch(
        kernels.dkdv(p.query.dtype, head_dim, p.options.softcap > 0),
        place,
        batch * kv_heads * tiles,
        *addresses(p.query, p.key, p.value, more.grad_out, more.lse2, more.delta),
        *addresses(more.dk, more.dv, flags, p.lengths, p.offsets),
        *counts(p),
        *strides(p.query, p.key, p.value, more.grad_out, more.dk, more.dv),
        p.options.scale,
        *factors(p),
    )
    if flags is not None:
        simt_dkdv(p, place, flags, kernels.ROWS)


def wgmma(problem: Problem, place: Place, deterministic: bool) -> None:
    """Compute dq, dk and dv by Hopper's warpgroups; dq apart where its order must be fixed."""
    from fastattn.cuda.kernels import wgmma_backward as kernels

    p = ready(problem, place)
    more: Gradients = p.more
    batch, heads, q_len, head_dim = p.query.shape
    kv_heads, kv_len = p.key.shape[1:3]
    total = None
    if not deterministic:
        total = scratch(place, p.query.shape, "float32")
        clear(place, total)
    flags = new_flags(p, place, kv_heads, -(-kv_len // WGMMA_GRADIENT_KEYS))
    q_len, kv_len, _, group, *spans = counts(p)
    launch(
        kernels.backward(p.query.dtype, head_dim, total is not None, p.options.softcap > 0),
        place,
        kernels.blocks(batch, kv_heads, kv_len),
        tensor_map(p.query, WGMMA_GRADIENT_QUERIES),
        tensor_map(p.key, WGMMA_GRADIENT_KEYS),
        tensor_map(p.value, WGMMA_GRADIENT_KEYS),
        tensor_map(more.grad_out, WGMMA_GRADIENT_QUERIES),
        *addresses(more.lse2, more.delta, total, more.dk, more.dv, flags, p.lengths, p.offsets),
        *(q_len, kv_len, batch, kv_heads, group),
        kernels.heads_together(batch, kv_heads, group, q_len, head_dim),
        *spans,
        *strides(more.dk, more.dv),
        *factors(p),
        p.options.scale,
    )
    if flags is not None:
        simt_dkdv(p, place, flags, WGMMA_GRADIENT_KEYS)
    if total is None:
        mma_dq(p, place)
        return
    flags = new_flags(p, place, heads, -(-q_len // kernels.ROWS))
    launch(
        kernels.round_dq(p.query.dtype, head_dim),
        place,
        kernels.round_blocks(batch, heads, q_len),
        *addresses(total, more.dq, flags),
        q_len,
        heads,
        *strides(more.dq),
    )
    if flags is not None:
        simt_dq(p, place, flags, kernels.ROWS)


def simt_dbias(problem: Problem, place: Place) -> None:
    """Compute dbias, summed over the axes that bias was broadcast over."""
    from fastattn.cuda.kernels import simt_backward as kernels

    p, dbias = problem, problem.more.dbias
    if dbias.strides[0] == 0:
        dbias = dbias._replace(shape=(1, *dbias.shape[1:]))
    batch, heads, q_len, kv_len = dbias.shape
    blocks = kernels.bias_blocks(p.query.dtype, (batch, heads, q_len, kv_len))
    launch(kernels.bias_gradient(given(p)), place, blocks, dbias, *simt_inputs(p))


# --- Sums ----------------------------------------------------------------------------------------


def add_sinks(place: Place, dsinks: DeviceArray, terms: DeviceArray) -> None:
    """Add up what each row gives to its head's sink."""
    from fastattn.cuda.kernels import simt_backward as kernels

    heads, rows = terms.shape[-2:]
    batch = math.prod(terms.shape[:-2])
    flat = terms._replace(shape=(batch, heads, rows), strides=(heads * rows, rows, 1))
    launch(
        kernels.sinks_gradient(wide_dtype(place.query.dtype), dsinks.dtype),
        place,
        heads,
        dsinks,
        flat,
    )


def summed(place: Place, array: DeviceArray, shape: Shape) -> DeviceArray:
    """Return the sums of a contiguous array over the axes that were broadcast from `shape`."""
    whole, dtype = array.shape, array.dtype
    if whole == shape:
        return array
    own = (1,) * (len(whole) - len(shape)) + shape
    # At least one step, which brings the array into its shape.
    axes = [i for i, size in enumerate(whole) if own[i] != size] or [0]
    for axis in axes:
        count = whole[axis] // own[axis]
        outer, inner = math.prod(whole[:axis]) * own[axis], math.prod(whole[axis + 1 :])
        whole = (*whole[:axis], own[axis], *whole[axis + 1 :])
        is_last = axis == axes[-1]
        target = scratch(
            place,
            shape if is_last else whole,
            dtype if is_last else wide_dtype(dtype),
        )
        add(place, target, array, (outer, count, inner))
        array = target
    return array
