# SPDX-License-Identifier: Apache-2.0
"""The gradients of the attention call on arrays of a GPU.

As `_attention.py` and `_forward.py`, in one: `attention_backward` checks and makes room, and each
form has a function with its launches. `fastattn.attention_backward` comes here with arrays that lie
on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn._arguments import boolean, name_of, whole_number
from fastattn._arrays import as_numpy
from fastattn.cuda import _arrays, _choose
from fastattn.cuda._arrays import DeviceArray, answer, device_array
from fastattn.cuda._attention import arrays, question
from fastattn.cuda._forward import (
    addresses,
    counts,
    factors,
    given,
    new_flags,
    on_device,
    simt_options,
    strides,
    tensor_map,
)
from fastattn.cuda._launch import Place, add, aligned, as_int64, clear, launch, place_of, scratch
from fastattn.cuda._problem import (
    Options,
    Problem,
    options,
    problems,
    wide_dtype,
    with_heads,
    with_row_heads,
)

Shape = tuple[int, ...]


def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    grad_lse: Any = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    deterministic: bool = False,
    stream: int | None = None,
) -> tuple[Any, ...]:
    """Compute the gradients of `attention`, as `fastattn.attention_backward` defines them.

    Parameters
    ----------
    grad_out, query, key, value, out, lse : arrays
        On one GPU: the gradient of a loss with respect to out, and the call's arguments and
        results.
    mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, dropout_p, seed
        Those of the call.
    grad_lse : array of the shape and dtype of lse, optional
        The gradient with respect to lse; 0 unless given.
    return_dbias, return_dsinks : bool
        Return the gradient of bias, or sinks, which must be given.
    deterministic : bool
        Add up dq in a fixed order. Without it, dq of a Hopper GPU's kernel may differ in the last
        bits from run to run; all else is bitwise repeatable in any case.
    stream : int, optional
        As for `attention`.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and dtypes of query, key and value
    dbias : array, only if return_dbias
    dsinks : array, only if return_dsinks

    Raises
    ------
    TypeError, ValueError, ImportError, RuntimeError, MemoryError
        As for `attention`.

    Notes
    -----
    Memory beside inputs and results: two float32 for each query and head, and q_len x head_dim
    float32 for each head where dq is not added up in a fixed order.
    """
    given = None if stream is None else whole_number("stream", stream)
    with _arrays.working_on(query, given) as stream:
        q, k, v = arrays(query, key, value, stream)
        asked = options(
            q,
            k,
            v,
            stream,
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            query_offset=query_offset,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_lengths=kv_lengths,
            dropout_p=dropout_p,
            seed=seed,
        )
        known, wide = asked.known, wide_dtype(q.dtype)
        if grad_lse is not None:
            grad_lse = _like("grad_lse", grad_lse, known.lse_shape, wide, q, stream)
        call = Call(
            place_of(q, stream),
            asked,
            q,
            k,
            v,
            _like("out", out, known.out_shape, q.dtype, q, stream),
            _like("lse", lse, known.lse_shape, wide, q, stream),
            _like("grad_out", grad_out, known.out_shape, q.dtype, q, stream),
            grad_lse,
            _wanted("return_dbias", return_dbias, "bias", bias),
            _sinks_dtype(asked, sinks)
            if _wanted("return_dsinks", return_dsinks, "sinks", sinks)
            else "",
            boolean("deterministic", deterministic),
        )
        grads = gradients(call)
        _arrays.keep(stream, [x for x in (*call, *asked) if isinstance(x, DeviceArray)])
        return tuple(answer(q, grad) for grad in grads)


def _like(
    name: str, x: Any, shape: Shape, dtype: str, query: DeviceArray, stream: int
) -> DeviceArray:
    """Return an array that belongs to the call's result."""
    array = device_array(name, x, stream, query)
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {name}.shape={array.shape}")
    return array


def _wanted(name: str, wanted: Any, of: str, array: Any) -> bool:
    if not boolean(name, wanted):
        return False
    if array is None:
        raise ValueError(f"{name} needs {of}, got {of}=None")
    return True


def _sinks_dtype(asked: Options, sinks: Any) -> str:
    """Return the dtype that sinks were given in; on the host they have become float64 since."""
    if isinstance(asked.sinks, DeviceArray):
        return asked.sinks.dtype
    return name_of(np.asarray(as_numpy("sinks", sinks)).dtype)


class Call(NamedTuple):
    """The arguments, with the axes that they came with."""

    place: Place
    asked: Options
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
    """What a problem has more of than the call's result needs: `Problem.more`."""

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
    place, asked, known = call.place, call.asked, call.asked.known
    ndim = len(known.batch_shape)
    inputs = (call.query, call.key, call.value)
    # Where batch axes broadcast, gradients are first made in full.
    shapes = [x.shape for x in inputs]
    wholes = [
        scratch(
            place,
            (*known.batch_shape, *with_heads(x).shape[-3:]) if known.batch_shape else x.shape,
            x.dtype,
        )
        for x in inputs
    ]
    if call.return_dbias:
        assert asked.bias is not None
        shapes.append(asked.bias.shape)
        own = (1,) * (ndim + 3 - len(asked.bias.shape)) + asked.bias.shape
        is_shared = ndim < 2 and own[:ndim] == (1,) * ndim
        batch = own[:ndim] if is_shared else known.batch_shape
        wholes.append(scratch(place, (*batch, *own[ndim:]), asked.bias.dtype))
    dsinks = []
    if call.dsinks_dtype:
        dsinks.append(scratch(place, (known.q_heads,), call.dsinks_dtype))
    if known.has_pairs:
        _fill(call, wholes, dsinks)
    else:
        for x in (*wholes, *dsinks):
            clear(place, x)
    return [*(summed(place, x, shape) for x, shape in zip(wholes, shapes, strict=True)), *dsinks]


def _fill(call: Call, wholes: list[DeviceArray], dsinks: list[DeviceArray]) -> None:
    """Compute all of the gradients before they are summed over what was broadcast."""
    place, known = call.place, call.asked.known
    asked = on_device(call.asked, place)
    rows = (*known.batch_shape, max(known.q_heads, 1), padded_rows(known.q_len))
    wide = wide_dtype(call.query.dtype)
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
    choice = _choose.backward(question(*inputs, asked, place.device), call.deterministic)
    compute = {"simt": simt, "mma": mma, "wgmma": wgmma}[choice.form]
    for problem in problems(*inputs, call.out, call.lse, asked, tuple(more)):
        p = problem._replace(
            lengths=as_int64(place, problem.lengths), offsets=as_int64(place, problem.offsets)
        )
        prepare(p, place)
        compute(p, place, call.deterministic)
        if more.dbias is not None:
            simt_dbias(p, place)
    if more.sink_terms is not None:
        add_sinks(place, dsinks[0], more.sink_terms)


def padded_rows(q_len: int) -> int:
    """Return how many rows delta and lse2 have."""
    from fastattn.cuda.kernels.simt_backward import padded

    return padded(q_len)


# --- What all forms begin with -------------------------------------------------------------------


def prepare(problem: Problem, place: Place) -> None:
    """Fill delta, lse2 and sink_terms."""
    from fastattn.cuda.kernels import simt_backward as kernels

    p, more = problem, Gradients(*problem.more)
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
    dq = Gradients(*p.more).dq
    launch(kernel, place, blocks, dq, flags, rows_per_flag, *simt_inputs(p))


def simt_dkdv(
    problem: Problem, place: Place, flags: DeviceArray | None = None, rows_per_flag: int = 1
) -> None:
    """Compute dk and dv; with flags, their rows that are not finite."""
    from fastattn.cuda.kernels import simt_backward as kernels

    p, more = problem, Gradients(*problem.more)
    head_dim, value_head_dim = p.key.shape[-1], p.value.shape[-1]
    kernel = kernels.key_value_gradients(
        given(p), head_dim, value_head_dim, flags=flags is not None
    )
    blocks = kernels.key_blocks(*p.key.shape[:3])
    launch(kernel, place, blocks, more.dk, more.dv, flags, rows_per_flag, *simt_inputs(p))


def simt_inputs(problem: Problem) -> tuple[Any, ...]:
    """Return what the simt kernels read."""
    p, more = problem, Gradients(*problem.more)
    return p.query, p.key, p.value, more.grad_out, more.delta, more.lse2, *simt_options(p)


def mma(problem: Problem, place: Place, _deterministic: bool) -> None:
    """Compute dq, dk and dv by warps that multiply."""
    p = ready(problem, place)
    mma_dq(p, place)
    mma_dkdv(p, place)


def ready(problem: Problem, place: Place) -> Problem:
    """Return the problem with rows aligned as the tensor-core kernels need them."""
    p, more = problem, Gradients(*problem.more)
    return p._replace(
        query=aligned(place, p.query),
        key=aligned(place, p.key),
        value=aligned(place, p.value),
        more=tuple(more._replace(grad_out=aligned(place, more.grad_out))),
    )


def mma_dq(problem: Problem, place: Place) -> None:
    """Compute dq, in a fixed order."""
    from fastattn.cuda.kernels import mma_backward as kernels

    p, more = problem, Gradients(*problem.more)
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

    p, more = problem, Gradients(*problem.more)
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
    more = Gradients(*p.more)
    batch, heads, q_len, head_dim = p.query.shape
    kv_heads, kv_len = p.key.shape[1:3]
    total = None
    if not deterministic:
        total = scratch(place, p.query.shape, "float32")
        clear(place, total)
    flags = new_flags(p, place, kv_heads, -(-kv_len // kernels.KEYS))
    q_len, kv_len, _, group, *spans = counts(p)
    launch(
        kernels.backward(p.query.dtype, head_dim, total is not None, p.options.softcap > 0),
        place,
        kernels.blocks(batch, kv_heads, kv_len),
        tensor_map(p.query, kernels.QUERIES),
        tensor_map(p.key, kernels.KEYS),
        tensor_map(p.value, kernels.KEYS),
        tensor_map(more.grad_out, kernels.QUERIES),
        *addresses(more.lse2, more.delta, total, more.dk, more.dv, flags, p.lengths, p.offsets),
        *(q_len, kv_len, batch, kv_heads, group),
        kernels.heads_together(batch, kv_heads, group, q_len, head_dim),
        *spans,
        *strides(more.dk, more.dv),
        *factors(p),
        p.options.scale,
    )
    if flags is not None:
        simt_dkdv(p, place, flags, kernels.KEYS)
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

    p, dbias = problem, Gradients(*problem.more).dbias
    assert dbias is not None
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
