# SPDX-License-Identifier: Apache-2.0
"""The calls over ranks: agree on the arguments, let the method compute, return what query is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from fastattn._arguments import (
    boolean,
    check_like,
    floats,
    result_array,
    wants_gradient,
)
from fastattn._arrays import rounded_to, widened
from fastattn._options import AttentionOptions, options_of, takes
from fastattn.distributed import _gather, _heads, _reproducible, _ring
from fastattn.distributed._agree import agreed
from fastattn.distributed._block import Results
from fastattn.distributed._comm import peers_of, seconds
from fastattn.distributed._problem import checked

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from fastattn.distributed._layout import Layout
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]
    Method = Literal["ring", "gather", "heads"]

METHODS: dict[str, Any] = {"ring": _ring, "gather": _gather, "heads": _heads}


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    comm: Any,
    layout: Layout,
    kv_layout: Layout | None = None,
    documents: ArrayLike | None = None,
    method: Method = "ring",
    reproducible: bool = False,
    timeout: float | None = None,
    return_lse: Literal[False] = False,
    out: ArrayLike | None = None,
    **options: Unpack[AttentionOptions],
) -> Array: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    comm: Any,
    layout: Layout,
    kv_layout: Layout | None = None,
    documents: ArrayLike | None = None,
    method: Method = "ring",
    reproducible: bool = False,
    timeout: float | None = None,
    return_lse: Literal[True],
    out: ArrayLike | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, Array]: ...
@takes(AttentionOptions)
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    comm: Any,
    layout: Layout,
    kv_layout: Layout | None = None,
    documents: ArrayLike | None = None,
    method: Method = "ring",
    reproducible: bool = False,
    timeout: float | None = None,
    return_lse: bool = False,
    out: ArrayLike | None = None,
    **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]:
    """Compute attention over a sequence of which each rank has some rows.

    All ranks of comm call it, each with its own rows of queries, keys and values; each gets the
    rows of the result that belong to its queries, over the keys of all.

    Parameters
    ----------
    query : array of shape (batch, q_heads, rows, head_dim)
        This rank's rows, in the order of ``layout.positions(rank)``. Dtypes and axes as for
        `fastattn.attention`.
    key : array of shape (batch, kv_heads, kv_rows, head_dim)
        This rank's rows by kv_layout.
    value : array of shape (batch, kv_heads, kv_rows, value_head_dim)
    comm : communicator of mpi4py, or ProcessGroup or DeviceMesh of torch.distributed
        The ranks. A DeviceMesh has one axis. The group needs a backend for the CPU, as gloo.
    layout : Layout
        Which rank has which queries.
    kv_layout : Layout, optional
        Which rank has which keys; layout unless given.
    documents : array of int, shape (documents + 1,), optional
        Where each document of a packed sequence starts, and the last one ends: queries see the
        keys of their own document alone. Batch axes are then of size 1.
    method : "ring", "gather" or "heads"
        ``"ring"``: keys come by rank after rank, and no rank ever has all of them. ``"gather"``:
        each rank first gets all keys that it needs; its rows are then bitwise those of one process.
        ``"heads"``: ranks exchange rows for heads and compute all rows of some heads, bitwise as
        one process; at most as many ranks as query heads.
    reproducible : bool
        The same bits over any number of ranks, any layout and every engine: keys are attended in
        fixed chunks of 256, and merged in integers, which have no order. It takes more time, and 7
        times the memory of a result in float32. ``"gather"`` and ``"heads"`` always have the same
        bits. Not with documents; gradients are never the same over other numbers of ranks.
    timeout : float, optional
        Seconds to wait for other ranks in one step. Unless given, as long as the engine does: MPI
        without end, gloo for the timeout of its group.
    mask, bias : array, broadcastable to (batch, q_heads, rows, all keys), optional
        This rank's rows; keys by position.
    scale, is_causal, window, softcap, alibi_slopes, sinks
        As for `fastattn.attention`; positions count over all ranks.
    query_offset, key_offset, kv_lengths : int, or array of int broadcastable to the batch shape
        Likewise: of position 0 of the queries and of the keys, and how many of all keys there are.
    dropout_p, seed, head_offset, batch_offset
        Likewise: the pairs that are dropped are those of one process.
    return_lse : bool
        Return (out, lse).
    out : ndarray of the result's shape and dtype, optional
        Where to write the result; it must not overlap an input.

    Returns
    -------
    out : ndarray of shape (batch, q_heads, rows, value_head_dim)
    lse : ndarray of shape (batch, q_heads, rows), only if return_lse

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule, here or on another rank, or ranks give different ones. No data
        has moved, and comm can be used further.
    TimeoutError, ConnectionError
        Another rank was late or is gone; the message says which, and in which step. comm must not
        be used for further calls.

    Notes
    -----
    All ranks give the same arguments, but for their rows; this is checked before data moves.

    Sums are taken in float32 (float64 for float64), whatever the dtype, and rounded once. The bits
    of a ring are the same each time for given ranks, layout and options.
    """
    asked = options_of(attention, options)
    peers = peers_of(comm, "attention", timeout)

    def check() -> Any:
        seconds(timeout)
        problem, terms = checked(
            peers.engine, query, key, value, layout, kv_layout, documents, method, asked
        )
        wants_lse = boolean("return_lse", return_lse)
        inputs = (problem.query, problem.key, problem.value, asked.mask, asked.bias)
        shape, dtype = problem.shapes.out_shape, problem.query.dtype
        result = result_array("out", out, problem.library, shape, dtype, inputs)
        in_grid = boolean("reproducible", reproducible) and method == "ring"
        if in_grid and problem.documents is not None:
            raise ValueError("reproducible must be False with documents and method='ring'")
        forward = _reproducible.forward if in_grid else METHODS[method].forward
        return (problem, wants_lse, result, forward), {**terms, "reproducible": in_grid}

    problem, wants_lse, result, forward = agreed(peers, check)
    found, lse = problem.library.compute(forward, peers, problem)
    result[...] = rounded_to(result.dtype, found)
    result, lse = problem.library.to_caller(out, result, lse if wants_lse else None)
    return (result, lse) if wants_lse else result


@takes(AttentionOptions)
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    comm: Any,
    layout: Layout,
    kv_layout: Layout | None = None,
    documents: ArrayLike | None = None,
    method: Method = "ring",
    timeout: float | None = None,
    grad_lse: ArrayLike | None = None,
    return_dsinks: bool = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, ...]:
    """Compute the gradients of `attention` over ranks.

    Parameters
    ----------
    grad_out : array of the shape and dtype of out
        The gradient of a loss with respect to this rank's rows of out.
    query, key, value
        Those of the call.
    out, lse
        What the call returned.
    comm, layout, kv_layout, documents, method, timeout
        As for `attention`; method need not be that of the call.
    mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, dropout_p, seed, key_offset, head_offset, batch_offset
        Those of the call.
    grad_lse : array of the shape and dtype of lse, optional
        The gradient with respect to lse; 0 unless given, and then by all ranks.
    return_dsinks : bool
        Return this rank's part of the gradient of sinks, which must be given.

    Returns
    -------
    dq, dk, dv : ndarray
        Of this rank's rows, in the shapes and dtypes of query, key and value. dk and dv are sums
        over the queries of all ranks.
    dsinks : ndarray, only if return_dsinks
        Of the shape and dtype of sinks: the sum over this rank's queries. The sum over ranks is the
        whole.

    Raises
    ------
    TypeError, ValueError, TimeoutError, ConnectionError
        As for `attention`.
    """
    asked = options_of(attention_backward, options)
    peers = peers_of(comm, "attention_backward", timeout)

    def check() -> Any:
        seconds(timeout)
        problem, terms = checked(
            peers.engine, query, key, value, layout, kv_layout, documents, method, asked
        )
        shapes, dtype, wide = problem.shapes, problem.query.dtype, problem.wide
        arrays: dict[str, Any] = {}
        for name, x, shape, of in (
            ("grad_out", grad_out, shapes.out_shape, dtype),
            ("out", out, shapes.out_shape, dtype),
            ("lse", lse, shapes.lse_shape, wide),
            ("grad_lse", grad_lse, shapes.lse_shape, wide),
        ):
            arrays[name] = None if x is None and name == "grad_lse" else floats(name, x)
            if arrays[name] is not None:
                check_like(name, arrays[name], shape, of)
        wants = wants_gradient("return_dsinks", return_dsinks, "sinks", asked.sinks)
        return (problem, Results(**arrays), wants), {
            **terms,
            "grad_lse given": grad_lse is not None,
        }

    problem, results, wants = agreed(peers, check)
    grads = problem.library.compute(METHODS[method].backward, peers, problem, results)
    operands = (problem.query, problem.key, problem.value)
    rounded = [rounded_to(x.dtype, grad) for grad, x in zip(grads, operands, strict=True)]
    if wants:
        rounded.append(_of_sinks(problem, results))
    returned: tuple[Array, ...] = problem.library.to_caller(None, *rounded)
    return returned


def _of_sinks(problem: Problem, results: Results) -> Array:
    """Return the gradient of sinks by this rank's rows.

    A sink takes its share of a row's probabilities, and gives nothing to its result.
    """
    sinks = problem.options.sinks
    logits = widened(sinks).astype(np.float64)[:, None]
    out, lse = widened(results.out), np.atleast_2d(results.lse.astype(np.float64))
    with np.errstate(all="ignore"):
        share = np.where(lse == -np.inf, 0, np.exp(logits - np.logaddexp(lse, logits)))
        share = np.where(logits == -np.inf, 0, share)
        by_row = np.einsum("...d,...d->...", widened(results.grad_out), out, dtype=np.float64)
        whole = -(share * np.atleast_2d(by_row))
    of_heads = whole.sum(axis=tuple(i for i in range(whole.ndim) if i != whole.ndim - 2))
    return rounded_to(sinks.dtype, of_heads)
