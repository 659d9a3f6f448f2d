# SPDX-License-Identifier: Apache-2.0
"""The calls on arrays of a GPU: check, choose a kernel, launch it. Nothing waits.

The rules are in `_problem.py`, the choice in `_choose.py`, the launches in `_forward.py` and
`_backward.py`. `fastattn.attention` and its like come here with arrays that lie on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import boolean, check_like, name_of, wants_gradient
from fastattn._arrays import as_numpy
from fastattn._options import AttentionOptions, Options, options_of, takes
from fastattn._report import Report
from fastattn.cuda import _arrays, _choose, _driver
from fastattn.cuda._arrays import (
    DeviceArray,
    destination,
    device_array,
    library_name,
    operands,
    to_caller,
    working_on,
)
from fastattn.cuda._backward import Call, gradients
from fastattn.cuda._forward import attend
from fastattn.cuda._launch import ROW_BYTES, place_of, problems_on, scratch
from fastattn.cuda._problem import Shape, device_options, question, wide_dtype
from fastattn.cuda._recipe import Tape, remember, tapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack


@takes(AttentionOptions)
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    out: Any = None,
    stream: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Compute exact softmax attention of arrays on a GPU, as `fastattn.attention` defines it.

    The result is ready for what follows on the stream: the host does not wait, so that a call may
    be captured in a CUDA graph, once it has run before.

    Parameters
    ----------
    query, key, value : arrays of shape (batch, heads, length, head_dim)
        On one GPU: tensors of PyTorch, arrays of CuPy, Numba or JAX, or anything that has
        ``__cuda_array_interface__`` or DLPack. Dtypes, broadcasting and grouped heads as for
        `fastattn.attention`.
    mask, bias : arrays on that GPU, optional
    alibi_slopes, sinks, kv_lengths, query_offset : optional
        On that GPU, or of the host. On the GPU they are not looked at before the kernel runs, which
        clamps kv_lengths to 0..kv_len and query_offset to -2**29..2**29.
    scale, is_causal, window, softcap, dropout_p, seed, key_offset, head_offset, batch_offset, \
return_lse
        As for `fastattn.attention`.
    out : array of the result's shape and dtype, optional
        Of the library that query is of; it must not overlap an input.
    stream : int, optional
        The handle of the CUDA stream to launch on; PyTorch's and CuPy's current stream for their
        arrays, else the default stream, unless given. Where an array says on which stream it was
        written, the launch comes after that.

    Returns
    -------
    out : array of shape (batch, q_heads, q_len, value_head_dim)
        Of the library that query is of, on its GPU; in PyTorch, laid out in memory like query.
    lse : array of shape (batch, q_heads, q_len), only if return_lse

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.
    ImportError
        numba-cuda or cuda-bindings is missing.
    RuntimeError
        There is no GPU, or no driver that can run the kernel; the message says what to do.
    MemoryError
        The GPU has no room for the result.

    Notes
    -----
    Which kernel runs `explain` says. All are bitwise repeatable. NaN and Inf in keys and values
    that a row does not see leave it as it is; a row that they would have spoilt is computed anew by
    the simt kernel, to whose last bits it is then right.

    Examples
    --------
    >>> import torch, fastattn.cuda
    >>> query = key = value = torch.randn(2, 8, 1024, 128, device="cuda", dtype=torch.bfloat16)
    >>> out = fastattn.cuda.attention(query, key, value, is_causal=True)
    """
    asked = options_of(attention, options)
    library = library_name(query)
    with working_on(library, query, stream) as stream:
        q, k, v = operands(library, query, key, value, stream)
        tape = None
        layout = layout_of(q, k, v, asked, return_lse) if out is None else None
        if layout is not None:
            tape = tapes.get(layout)
            if tape is not None:
                result, lse, *_ = tape.play((q, k, v), stream)
                return returned(q, result, lse if return_lse else None, (q, k, v), stream)
            tape = Tape()
            q, k, v = map(tape.given, (q, k, v))
        checked = device_options(q, k, v, asked, stream)
        return_lse = boolean("return_lse", return_lse)
        shapes = checked.shapes
        place = place_of(q, stream, tape)
        inputs = [x for x in (q, k, v, *checked) if isinstance(x, DeviceArray)]
        if out is None:
            result = scratch(place, shapes.out_shape, q.dtype, is_result=True)
        else:
            result = destination(out, q, shapes.out_shape, q.dtype, inputs, stream)
        lse = scratch(place, shapes.lse_shape, wide_dtype(q.dtype))
        if 0 not in shapes.lse_shape:
            form = _choose.forward(question(q, k, v, checked, place.device.capability)).form
            for problem in problems_on(place, q, k, v, result, lse, checked):
                attend(problem, form, place)
        if tape is not None:
            remember(layout, tape)
        return returned(q, result, lse if return_lse else None, inputs, stream, out is not None)


def layout_of(
    query: DeviceArray, key: DeviceArray, value: DeviceArray, asked: Options, return_lse: bool
) -> Any:
    """Return all that decides what a call does but its arrays' addresses.

    Return None if a mask, array, seed or other large option decides it too.
    """
    if asked.seed is not None:  # each call has another one
        return None
    window = asked.window
    if window is not None and type(window) is not tuple:
        return None
    numbers: tuple[Any, ...] = asked if window is None else (*asked._replace(window=True), *window)
    numbers = (*numbers, return_lse)
    if not all(x is None or isinstance(x, int | float) for x in numbers):
        return None
    return (
        *(query[1:5], key[1:4], value[1:4], query.library),
        # Rows that are not aligned are copied.
        (query.pointer | key.pointer | value.pointer) % ROW_BYTES,
        numbers,
        tuple(map(type, numbers)),  # True is not 1
    )


def returned(
    query: DeviceArray,
    result: DeviceArray,
    lse: DeviceArray | None,
    inputs: Sequence[DeviceArray],
    stream: int,
    is_given: bool = False,
) -> Any:
    """Return out, or out and lse, as what query is."""
    _arrays.keep(stream, inputs)
    out = to_caller(query, result, is_given)
    return out if lse is None else (out, to_caller(query, lse))


@takes(AttentionOptions)
def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *,
    grad_lse: Any = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    deterministic: bool = False,
    stream: int | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Any, ...]:
    """Compute the gradients of `attention`, as `fastattn.attention_backward` defines them.

    Parameters
    ----------
    grad_out, query, key, value, out, lse : arrays
        On one GPU: the gradient of a loss with respect to out, and the call's arguments and
        results.
    mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, dropout_p, seed, key_offset, head_offset, batch_offset
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
    asked = options_of(attention_backward, options)
    library = library_name(query)
    with working_on(library, query, stream) as stream:
        q, k, v = operands(library, query, key, value, stream)
        checked = device_options(q, k, v, asked, stream)
        shapes, wide = checked.shapes, wide_dtype(q.dtype)

        def like(name: str, x: Any, shape: Shape, dtype: str) -> DeviceArray:
            array = device_array(name, x, stream, q)
            check_like(name, array, shape, dtype)
            return array

        if grad_lse is not None:
            grad_lse = like("grad_lse", grad_lse, shapes.lse_shape, wide)
        call = Call(
            place_of(q, stream),
            checked,
            q,
            k,
            v,
            like("out", out, shapes.out_shape, q.dtype),
            like("lse", lse, shapes.lse_shape, wide),
            like("grad_out", grad_out, shapes.out_shape, q.dtype),
            grad_lse,
            wants_gradient("return_dbias", return_dbias, "bias", asked.bias),
            sinks_dtype(checked.sinks, asked.sinks)
            if wants_gradient("return_dsinks", return_dsinks, "sinks", asked.sinks)
            else "",
            boolean("deterministic", deterministic),
        )
        grads = gradients(call)
        _arrays.keep(stream, [x for x in (*call, *checked) if isinstance(x, DeviceArray)])
        return tuple(to_caller(q, grad) for grad in grads)


def sinks_dtype(checked: Any, sinks: Any) -> str:
    """Return the dtype that sinks were given in; on the host they have become float64 since."""
    if isinstance(checked, DeviceArray):
        return checked.dtype
    return name_of(np.asarray(as_numpy("sinks", sinks)).dtype)


@takes(AttentionOptions)
def explain(query: Any, key: Any, value: Any, **options: Unpack[AttentionOptions]) -> Report:
    """Say how `attention` would compute a call, without computing it.

    Parameters
    ----------
    query, key, value, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, \
sinks, kv_lengths, dropout_p, seed, key_offset, head_offset, batch_offset
        As for `attention`.

    Returns
    -------
    dict
        Its str() is the report. `kernel` is the name of a module of fastattn.cuda.kernels, `reason`
        why it is this one, `gradients` the kernel that `attention_backward` would take.
    """
    asked = options_of(explain, options)
    library = library_name(query)
    with working_on(library, query, None) as stream:
        q, k, v = operands(library, query, key, value, stream)
        checked = device_options(q, k, v, asked, stream)
        device = _driver.device(q.device)
        asks = question(q, k, v, checked, device.capability)
        choice = _choose.forward(asks)
    return Report(
        "attention on a GPU",
        {
            "kernel": choice.form,
            "reason": choice.reason,
            "gradients": _gradients(asks),
            "device": device.name,
            "compute_capability": "{}.{}".format(*device.capability),
            "dtype": q.dtype,
        },
    )


def _gradients(asks: _choose.Question) -> str:
    try:
        return _choose.backward(asks, deterministic=False).form
    except ValueError as error:  # a kernel is forced that has none
        return f"none: {error}"


def is_available() -> bool:
    """Tell whether there is a GPU, and a driver, that fastattn.cuda can use."""
    try:
        return _driver.count() > 0
    except (ImportError, RuntimeError):
        return False
