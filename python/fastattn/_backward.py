# SPDX-License-Identifier: Apache-2.0
"""The gradients of the attention calls.

As in `_attention.py`, the rules are in `_arguments.py`, the meaning in `reference.py`, the work in
`_core` (src/calls.cpp).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    accumulates,
    arithmetic,
    check,
    check_like,
    check_packed,
    floats,
    result_array,
    wants_gradient,
)
from fastattn._arrays import as_numpy, library_of, rounded_to, widened
from fastattn._options import AttentionOptions, options_of, takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastattn._arrays import Library

    Array = NDArray[Any]


class GradientArrays(NamedTuple):
    """What a backward pass reads beside the call, and what it fills, in the kernel's order."""

    out: Array
    lse: Array
    grad_out: Array
    grad_lse: Array | None
    dq: Array  # this and those below come as zeros, or with what they accumulate on
    dk: Array
    dv: Array
    dbias: Array | None  # as zeros
    delta: Array | None  # of each row, the sum over its keys of its scores' gradients


@takes(AttentionOptions)
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_kv: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    grads: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, ...]:
    """Compute the gradients of `attention`, or of `varlen_attention` if cu_seqlens_* are given.

    The probabilities are computed again, tile by tile, from lse; they are never held as a
    q_len x kv_len array [1]_.

    Parameters
    ----------
    grad_out : array of the shape and dtype of out
        The gradient of a loss with respect to out.
    query, key, value
        Those of the call.
    out, lse
        What the call returned. If key and value are a part of more, those over all keys: the
        gradients of the parts then add up to those of the whole.
    mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, dropout_p, seed, key_offset, head_offset, batch_offset
        Those of the call.
    cu_seqlens_q, cu_seqlens_kv : array of int, shape (sequences + 1,), optional
        Those of a call of `varlen_attention`; both or neither.
    grad_lse : array of the shape and dtype of lse, optional
        The gradient with respect to lse; 0 unless given.
    return_dbias : bool
        Return the gradient of bias, which must be given.
    return_dsinks : bool
        Return the gradient of sinks, which must be given. Of a part of the keys it is that of all
        of them, and so is the gradient of a bias of one column.
    grads : (dq, dk, dv), optional
        Where to write these: of the shapes of query, key and value, and of their dtypes, or
        float32 for half precision, whose gradients are then not rounded.
    accumulate : bool
        Add to what grads hold, which must be given, and be float32 (float64 for float64).

    Returns
    -------
    dq, dk, dv : ndarray
        Of the shapes and dtypes of query, key and value: summed over the query heads that share a
        key head, and over batch axes that were broadcast. Those of grads, if given.
    dbias : ndarray, only if return_dbias
        Of the shape and dtype of bias, summed over the axes that were broadcast.
    dsinks : ndarray, only if return_dsinks
        Of the shape and dtype of sinks.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As for `attention`.

    Notes
    -----
    Bitwise the same for any number of threads. Memory beside inputs and results, for each thread:
    about 2 MiB, or 3 KiB for each column of head_dim if that is more, and q_len x
    (q_heads / kv_heads) x head_dim numbers of float32 (or float64), those of all threads together
    at most 64 MiB or what one key head needs. With return_dbias and a bias that heads or batch
    elements share, those of all that share it. Some 200 bytes for each key head of a batch element.
    Gradients that are summed over broadcast batch axes are first made in full.

    A query that sees no key has gradients 0, and so has a key that no query sees. A row of query or
    grad_out that holds NaN or Inf makes the gradients of all keys that it sees NaN.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, https://arxiv.org/abs/2307.08691

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> x = np.eye(2)
    >>> out, lse = fastattn.attention(x, x, x, return_lse=True)
    >>> dq, dk, dv = fastattn.attention_backward(np.ones((2, 2)), x, x, x, out, lse)
    >>> dv.round(2)
    array([[1., 1.],
           [1., 1.]])
    """
    asked = options_of(attention_backward, options)
    library = library_of(query)
    if library.on_gpu:
        from fastattn import cuda

        if cu_seqlens_q is not None or cu_seqlens_kv is not None:
            raise NotImplementedError("cu_seqlens_q, cu_seqlens_kv have no kernel for GPUs")
        if grads is not None or accumulate is not False:
            raise NotImplementedError("grads, accumulate have no kernel for GPUs")
        return cuda.attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            grad_lse=grad_lse,
            return_dbias=return_dbias,
            return_dsinks=return_dsinks,
            **options,
        )
    q = library.array("query", query)
    starts: tuple[Array, ...] = ()
    if cu_seqlens_q is None and cu_seqlens_kv is None:
        q, k, v, shapes, checked = check(q, key, value, asked)
    elif cu_seqlens_q is None or cu_seqlens_kv is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_kv"
        raise ValueError(f"{missing} must be given with the other of cu_seqlens_q, cu_seqlens_kv")
    else:
        q, k, v, shapes, checked, starts = check_packed(
            q, key, value, cu_seqlens_q, cu_seqlens_kv, asked
        )
    wide = arithmetic(q.dtype)
    out = floats("out", out)
    of_out = wide if out.dtype == wide else q.dtype
    check_like("out", out, shapes.out_shape, of_out)
    grad_out = _like("grad_out", grad_out, shapes.out_shape, of_out)
    lse = _like("lse", lse, shapes.lse_shape, wide)
    if grad_lse is not None:
        grad_lse = _like("grad_lse", grad_lse, shapes.lse_shape, wide)
    return_dbias, return_dsinks = (
        wants_gradient(name, wanted, of, array)
        for name, wanted, of, array in (
            ("return_dbias", return_dbias, "bias", asked.bias),
            ("return_dsinks", return_dsinks, "sinks", asked.sinks),
        )
    )

    bias = np.asarray(as_numpy("bias", asked.bias))
    sinks = np.asarray(as_numpy("sinks", asked.sinks))
    dbias = np.zeros(bias.shape, wide) if return_dbias else None
    one_column = dbias is not None and dbias.shape[-1:] in ((), (1,)) and shapes.kv_len > 1
    delta = np.zeros(shapes.lse_shape, wide) if one_column or return_dsinks else None
    inputs = [_heads_first(x, starts) for x in (q, k, v)]
    adds = accumulates(accumulate, None, grads=grads)
    beside = (out, lse, grad_out, grad_lse, checked.mask, checked.bias)
    given = _places(grads, (q, k, v), library, adds, beside)
    whole_shapes = [
        packed.shape if starts else shapes.batch_shape + x.shape[-3:]
        for packed, x in zip((q, k, v), inputs, strict=True)
    ]
    in_place = bool(given) and all(
        math.prod(shape) == x.size for shape, x in zip(whole_shapes, given, strict=True)
    )
    if in_place:
        wholes = given
        for x in wholes if not adds else ():
            x[...] = np.zeros((), x.dtype)  # of bits, too
    else:
        dtypes = [x.dtype for x in given or (q, k, v)]
        wholes = [np.zeros(*each) for each in zip(whole_shapes, dtypes, strict=True)]
    dq, dk, dv = (_heads_first(x, starts) for x in wholes)
    if shapes.has_pairs and dq.size + dv.size:
        call: Any = _core.varlen_attention_backward if starts else _core.attention_backward
        arrays = GradientArrays(
            out=_heads_first(out, starts),
            lse=lse,
            grad_out=_heads_first(grad_out, starts),
            grad_lse=grad_lse,
            dq=dq,
            dk=dk,
            dv=dv,
            dbias=None if one_column else dbias,
            delta=delta,
        )
        where = (shapes.batch_shape, checked, *starts, arrays, adds and in_place)
        library.compute(call, *inputs, *where)
    results: list[Array] = []
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is passed on
        for whole, x in zip(wholes, (q, k, v), strict=True):
            results.append(_summed_to(whole, x.shape, whole.dtype))
        for array, result in zip(given, results, strict=False):
            if not in_place:
                array[...] = array + result if adds else result
        of_sinks = None
        if delta is not None:
            share = _share_of_sinks(lse, sinks if asked.sinks is not None else None)
            of_sinks = np.where(lse == -np.inf, 0, share * delta)
        if dbias is not None:
            if one_column and of_sinks is not None:  # a row's sum needs no scores
                of_rows = of_sinks if grad_lse is None else of_sinks + grad_lse
                of_rows = np.where(lse == -np.inf, 0, of_rows)[..., None]
                dbias = _summed_to(of_rows, dbias.shape, wide)
            results.append(rounded_to(bias.dtype, dbias))
        if return_dsinks and of_sinks is not None:
            heads = _summed_to(of_sinks[..., None], (len(sinks), 1, 1), wide)
            results.append(rounded_to(sinks.dtype, -heads[:, 0, 0]))
    if grads is None:
        return library.to_caller(None, *results)
    own = (library.to_caller(*pair)[0] for pair in zip(grads, results[:3], strict=True))
    return *own, *library.to_caller(None, *results[3:])


def _places(
    grads: Any,
    of: tuple[Array, Array, Array],
    library: Library,
    adds: bool,
    inputs: tuple[Any, ...],
) -> list[Array]:
    """Return the arrays that were given for dq, dk and dv: none, or three."""
    if grads is None:
        return []
    if not isinstance(grads, tuple | list) or len(grads) != 3:
        got = f"{len(grads)} of them" if isinstance(grads, tuple | list) else type(grads).__name__
        raise TypeError(f"grads must be three arrays (dq, dk, dv), not {got}")
    arrays: list[Array] = []
    for name, array, x in zip(("dq", "dk", "dv"), grads, of, strict=True):
        if array is None:
            raise TypeError(f"{name} must be a NumPy array, not NoneType")
        others = (*of, *inputs, *arrays)
        arrays.append(result_array(name, array, library, x.shape, x.dtype, others))
        wide = arithmetic(x.dtype)
        if adds and arrays[-1].dtype != wide:
            raise TypeError(
                f"{name} must have dtype {wide} with accumulate=True, not {arrays[-1].dtype}"
            )
    _, dk, dv = arrays
    if dv.dtype != dk.dtype:
        raise TypeError(f"dv must have the dtype of dk, {dk.dtype}, not {dv.dtype}")
    return arrays


def _like(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return an array that belongs to the call's result."""
    array = floats(name, x)
    check_like(name, array, shape, dtype)
    return array


def _heads_first(array: Array, starts: tuple[Array, ...]) -> Array:
    """Return the array as (..., heads, rows, columns)."""
    if starts:
        return array.swapaxes(0, 1)
    return array.reshape((1,) * (3 - array.ndim) + array.shape) if array.ndim < 3 else array


def _summed_to(array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return the sums over the axes that were broadcast from `shape`, in that shape."""
    whole = (1,) * (array.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(array.shape) if whole[i] == 1 and n != 1)
    if not axes:
        return array.reshape(shape)
    array = widened(array)
    sums: Array = array.sum(axis=axes, dtype=arithmetic(array.dtype), keepdims=True)
    return rounded_to(np.dtype(dtype), sums.reshape(shape))


def _share_of_sinks(lse: Array, sinks: Array | None) -> Array:
    """Return the probability that each row gives to its head's sink, in float64."""
    if sinks is None:
        return np.zeros(lse.shape)
    sink, lse = widened(sinks).astype(np.float64)[:, None], lse.astype(np.float64)
    share: Array = np.exp(sink - np.logaddexp(lse, sink))
    return np.where(sink == -np.inf, 0, share)
