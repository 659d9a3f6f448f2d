# SPDX-License-Identifier: Apache-2.0
"""The gradients of the attention calls.

As `_attention.py`: the rules are in `_arguments.py`, the meaning in `reference.py`, the work in
`_core` (src/bindings.cpp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    arithmetic,
    boolean,
    check,
    check_packed,
    floats,
)
from fastattn._arrays import answer, as_numpy, is_cuda_array, rounded_to, widened

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Array = NDArray[Any]


def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_kv: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
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
        What the call returned.
    mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, dropout_p, seed
        Those of the call.
    cu_seqlens_q, cu_seqlens_kv : array of int, shape (sequences + 1,), optional
        Those of a call of `varlen_attention`; both or neither.
    grad_lse : array of the shape and dtype of lse, optional
        The gradient with respect to lse; 0 unless given.
    return_dbias : bool
        Return the gradient of bias, which must be given.
    return_dsinks : bool
        Return the gradient of sinks, which must be given.

    Returns
    -------
    dq, dk, dv : ndarray
        Of the shapes and dtypes of query, key and value: summed over the query heads that share a
        key head, and over batch axes that were broadcast.
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
    if type(query) is not np.ndarray and is_cuda_array(query):
        from fastattn import cuda

        if cu_seqlens_q is not None or cu_seqlens_kv is not None:
            raise NotImplementedError("cu_seqlens_q, cu_seqlens_kv have no kernel for GPUs")
        return cuda.attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
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
            grad_lse=grad_lse,
            return_dbias=return_dbias,
            return_dsinks=return_dsinks,
        )
    given: Any = query
    rest = (
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
    )
    starts: tuple[Array, ...] = ()
    if cu_seqlens_q is None and cu_seqlens_kv is None:
        query, key, value, known, arguments = check(query, key, value, *rest)
    elif cu_seqlens_q is None or cu_seqlens_kv is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_kv"
        raise ValueError(f"{missing} must be given with the other of cu_seqlens_q, cu_seqlens_kv")
    else:
        query, key, value, known, arguments, starts = check_packed(
            query, key, value, cu_seqlens_q, cu_seqlens_kv, *rest
        )
    wide = arithmetic(query.dtype)
    grad_out = _like("grad_out", grad_out, known.out_shape, query.dtype)
    out = _like("out", out, known.out_shape, query.dtype)
    lse = _like("lse", lse, known.lse_shape, wide)
    if grad_lse is not None:
        grad_lse = _like("grad_lse", grad_lse, known.lse_shape, wide)
    return_dbias, return_dsinks = (
        boolean(name, wanted) and _given(name, of, array)
        for name, wanted, of, array in (
            ("return_dbias", return_dbias, "bias", bias),
            ("return_dsinks", return_dsinks, "sinks", sinks),
        )
    )

    given_bias = np.asarray(as_numpy("bias", bias))
    given_sinks = np.asarray(as_numpy("sinks", sinks))
    dbias = np.zeros(given_bias.shape, wide) if return_dbias else None
    one_column = dbias is not None and dbias.shape[-1:] in ((), (1,)) and known.kv_len > 1
    delta = np.zeros(known.lse_shape, wide) if one_column or return_dsinks else None
    inputs = [_heads_first(x, starts) for x in (query, key, value)]
    wholes = [
        np.zeros(packed.shape if starts else known.batch_shape + x.shape[-3:], x.dtype)
        for packed, x in zip((query, key, value), inputs, strict=True)
    ]
    dq, dk, dv = (_heads_first(x, starts) for x in wholes)
    # In the core's order: out, lse, grad_out, grad_lse; and what it fills, which comes as zeros.
    arrays = [_heads_first(out, starts), lse, _heads_first(grad_out, starts), grad_lse]
    arrays += [dq, dk, dv, None if one_column else dbias, delta]
    if known.has_pairs and dq.size + dv.size:
        call: Any = _core.varlen_attention_backward if starts else _core.attention_backward
        call(*inputs, None, None, known.batch_shape, *arguments, *starts, arrays)
    grads: list[Array] = []
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is passed on
        for whole, x in zip(wholes, (query, key, value), strict=True):
            grads.append(_summed_to(whole, x.shape, x.dtype))
        of_sinks = None
        if delta is not None:
            share = _share_of_sinks(lse, given_sinks if sinks is not None else None)
            of_sinks = np.where(lse == -np.inf, 0, share * delta)
        if dbias is not None:
            if one_column and of_sinks is not None:  # a row's sum needs no scores
                of_rows = of_sinks if grad_lse is None else of_sinks + grad_lse
                of_rows = np.where(lse == -np.inf, 0, of_rows)[..., None]
                dbias = _summed_to(of_rows, dbias.shape, wide)
            grads.append(rounded_to(given_bias.dtype, dbias))
        if return_dsinks and of_sinks is not None:
            heads = _summed_to(of_sinks[..., None], (len(given_sinks), 1, 1), wide)
            grads.append(rounded_to(given_sinks.dtype, -heads[:, 0, 0]))
    return answer(given, None, *grads)  # type: ignore[no-any-return]


def _like(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return an array that belongs to the call's result."""
    array = floats(name, x)
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {name}.shape={array.shape}")
    return array


def _given(name: str, of: str, array: Any) -> bool:
    if array is None:
        raise ValueError(f"{name} needs {of}, got {of}=None")
    return True


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
