# SPDX-License-Identifier: Apache-2.0
"""The attention call on arrays of a GPU: check, choose a kernel, launch it. Nothing waits.

The rules are in `_problem.py`, the choice in `_choose.py`, the launches in `_forward.py`.
`fastattn.attention` comes here with arrays that lie on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn._arguments import WIDEST, boolean, whole_number
from fastattn._report import Report
from fastattn.cuda import _arrays, _choose, _driver
from fastattn.cuda._arrays import DeviceArray, answer, current_stream, destination, device_array
from fastattn.cuda._forward import attend, on_device
from fastattn.cuda._launch import ROW_BYTES, place_of, scratch
from fastattn.cuda._problem import Options, options, problems, wide_dtype
from fastattn.cuda._recipe import Tape, remember, tapes

if TYPE_CHECKING:
    from collections.abc import Sequence

FAR = 2**28  # positions and sides beyond are only for kernels that count in 64 bits


def attention(
    query: Any,
    key: Any,
    value: Any,
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
    return_lse: bool = False,
    out: Any = None,
    stream: int | None = None,
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
    scale, is_causal, window, softcap, dropout_p, seed, return_lse
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
    given = None if stream is None else whole_number("stream", stream)
    with _arrays.working_on(query, given) as stream:
        q, k, v = arrays(query, key, value, stream)
        tape = layout = None
        if out is None and not any(x is not None for x in (mask, bias, alibi_slopes, sinks, seed)):
            numbers = (scale, is_causal, query_offset, softcap, kv_lengths, dropout_p, return_lse)
            layout = layout_of(q, k, v, numbers, window)
        if layout is not None:
            known_tape = tapes.get(layout)
            if known_tape is not None:
                result, lse, *_ = known_tape.play((q, k, v), stream)
                return answered(q, result, lse if return_lse else None, (q, k, v), stream)
            tape = Tape()
            q, k, v = map(tape.given, (q, k, v))
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
        return_lse = boolean("return_lse", return_lse)
        known = asked.known
        place = place_of(q, stream, tape)
        inputs = [x for x in (q, k, v, *asked) if isinstance(x, DeviceArray)]
        if out is None:
            result = scratch(place, known.out_shape, q.dtype, is_result=True)
        else:
            result = destination(out, q, known.out_shape, q.dtype, inputs, stream)
        lse = scratch(place, known.lse_shape, wide_dtype(q.dtype))
        if 0 not in known.lse_shape:
            form = _choose.forward(question(q, k, v, asked, place.device)).form
            ready = on_device(asked, place)
            for problem in problems(q, k, v, result, lse, ready):
                attend(problem, form, place)
        if tape is not None:
            remember(layout, tape)
        return answered(q, result, lse if return_lse else None, inputs, stream, out is not None)


def layout_of(
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    numbers: tuple[Any, ...],
    window: tuple[Any, ...] | None,
) -> Any:
    """Return all that decides what a call does but its arrays' addresses; None if that is much."""
    if window is not None:
        if type(window) is not tuple:
            return None
        numbers = (*numbers, *window)
    if not all(x is None or isinstance(x, int | float) for x in numbers):
        return None
    return (
        *(query[1:5], key[1:4], value[1:4], query.library),
        # Rows that are not aligned are copied.
        (query.pointer | key.pointer | value.pointer) % ROW_BYTES,
        numbers,
        tuple(map(type, numbers)),  # True is not 1
    )


def answered(
    query: DeviceArray,
    result: DeviceArray,
    lse: DeviceArray | None,
    inputs: Sequence[DeviceArray],
    stream: int,
    is_given: bool = False,
) -> Any:
    """Return out, or out and lse, as what query is."""
    _arrays.keep(stream, inputs)
    out = answer(query, result, is_given)
    return out if lse is None else (out, answer(query, lse))


def arrays(query: Any, key: Any, value: Any, stream: int) -> tuple[DeviceArray, ...]:
    """Return where query, key and value lie, if their dtypes go together."""
    q = device_array("query", query, stream)
    k, v = device_array("key", key, stream, q), device_array("value", value, stream, q)
    return q, k, v


def question(
    query: DeviceArray, key: DeviceArray, value: DeviceArray, asked: Options, device: Any
) -> _choose.Question:
    """Return what the choice of a kernel depends on."""
    kv_heads = key.shape[-3] if len(key.shape) > 2 else 1
    sides = [side for side in (asked.left, asked.right) if side != WIDEST]
    far = abs(asked.offset) > FAR or max(sides, default=0) > FAR
    return _choose.Question(
        query.dtype,
        key.dtype,
        query.shape[-1],
        value.shape[-1],
        asked.known.q_len,
        asked.known.kv_len,
        max(1, asked.known.q_heads // max(1, kv_heads)),
        asked.only_simt,
        asked.scale,
        far,
        device.capability,
    )


def explain(query: Any, key: Any, value: Any, **given: Any) -> Report:
    """Say how `attention` would compute a call, without computing it.

    Parameters
    ----------
    query, key, value, **given
        As for `attention`.

    Returns
    -------
    dict
        Its str() is the report. `kernel` is the name of a module of fastattn.cuda.kernels, `reason`
        why it is this one, `gradients` the kernel that `attention_backward` would take.
    """
    stream = current_stream(query)
    q, k, v = arrays(query, key, value, stream)
    asked = options(q, k, v, stream, **given)
    device = _driver.device(q.device)
    asks = question(q, k, v, asked, device)
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
