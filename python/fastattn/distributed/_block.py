# SPDX-License-Identifier: Apache-2.0
"""One block of keys: added to attention so far, and its gradients to gradients so far.

Both are in the dtype of the arithmetic, float32 for half precision: rounding each part would make
errors that grow with the number of ranks. The kernel adds as it goes, without other arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import fastattn
from fastattn._arrays import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn._options import Options

    Array = NDArray[Any]
    Starts = tuple[Array, Array] | None  # cu_seqlens of queries and of keys


MANY_ROWS = 17  # of fewer, other kernels compute the rows, with other last bits


def as_of_many(total: int) -> int:
    """Return how many rows make a call take the kernel that one with all queries takes."""
    return min(total, MANY_ROWS)


class Operands(NamedTuple):
    """Queries, keys and values, or their gradients."""

    query: Array
    key: Array
    value: Array

    def at(self, rows: slice, columns: slice) -> Operands:
        """Return those of some queries and some keys."""
        query, key, value = self
        return Operands(query[..., rows, :], key[..., columns, :], value[..., columns, :])


class Results(NamedTuple):
    """What queries have got over all keys, and the gradients by it."""

    out: Array
    lse: Array
    grad_out: Array
    grad_lse: Array | None

    def at(self, rows: slice) -> Results:
        """Return those of some queries."""
        out, lse, grad_out, grad_lse = self
        of_lse = None if grad_lse is None else grad_lse[..., rows]
        return Results(out[..., rows, :], lse[..., rows], grad_out[..., rows, :], of_lse)


def attend(
    operands: Operands, options: Options, starts: Starts, least: int = 0
) -> tuple[Array, Array]:
    """Return out and lse of a call; of packed documents, if starts are given.

    least: fewer queries than these are computed as if they were so many. A row's bits depend on
    whether it is one of few.
    """
    query, key, value = operands
    rows = query.shape[-2]
    if rows < least and starts is None:
        query, options = _padded(query, least), _padded_pairs(options, rows, least)
    named: dict[str, Any] = options._asdict() | {"return_lse": True}
    call: Any = fastattn.attention
    if starts is None:
        out, lse = call(query, key, value, **named)
        return out[..., :rows, :], lse[..., :rows]
    call = fastattn.varlen_attention
    out, lse = call(*map(_rows_first, operands), *starts, **named)
    shape = (*query.shape[:-1], value.shape[-1])
    return out.swapaxes(0, 1).reshape(shape), lse.reshape(shape[:-1])


def add_keys(out: Array, lse: Array, operands: Operands, options: Options, starts: Starts) -> None:
    """Make attention over some keys, out and lse, that over these keys too; without sinks."""
    named: dict[str, Any] = options._asdict() | {"sinks": None, "accumulate": True}
    call: Any = fastattn.attention
    if starts is None:
        call(*operands, out=out, lse=lse, **named)
        return
    call = fastattn.varlen_attention
    packed = (*map(_rows_first, operands), *starts)
    call(*packed, out=_rows_first(out), lse=_by_head(lse), **named)


def add(out: Array, lse: Array, more_out: Array, more_lse: Array) -> None:
    """Make out and lse, over some keys, those over other keys too, whose own are given."""
    with np.errstate(all="ignore"):
        both = np.logaddexp(lse, more_lse)
        for x, of_x in ((out, lse), (more_out, more_lse)):
            x *= np.where(of_x == -np.inf, 0, np.exp(of_x - both))[..., None]
    out += more_out
    lse[...] = both


def add_sinks(out: Array, lse: Array, sinks: Array) -> None:
    """Let each head's sink take its share of what its rows give; once, not for each block."""
    logits = widened(sinks).astype(np.float64)
    with np.errstate(all="ignore"):
        share = 1 / (1 + np.exp((logits[:, None] if lse.ndim > 1 else logits) - lse))
    out *= np.where(lse == -np.inf, 0, share)[..., None]


def add_gradients(
    sums: Operands, operands: Operands, results: Results, options: Options, starts: Starts
) -> None:
    """Add the gradients of a block of keys; the results are those over all keys."""
    named: dict[str, Any] = {"grads": tuple(sums), "accumulate": True}
    if starts is not None:
        named["grads"] = tuple(map(_rows_first, sums))
    _backward(operands, results, options, starts, named)


def gradients(operands: Operands, results: Results, options: Options, starts: Starts) -> Operands:
    """Return the gradients of a call, in the dtypes of the operands."""
    grads = _backward(operands, results, options, starts, {})
    if starts is None:
        return Operands(*grads)
    pairs = zip(grads, operands, strict=True)
    return Operands(*(grad.swapaxes(0, 1).reshape(x.shape) for grad, x in pairs))


def _backward(
    operands: Operands, results: Results, options: Options, starts: Starts, named: dict[str, Any]
) -> tuple[Array, ...]:
    out, lse, grad_out, grad_lse = results
    arrays = [grad_out, *operands, out]
    if starts is not None:
        arrays, lse = [_rows_first(x) for x in arrays], _by_head(lse)
        grad_lse = None if grad_lse is None else _by_head(grad_lse)
        named |= dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), starts, strict=True))
    named |= options._asdict() | {"grad_lse": grad_lse}
    call: Any = fastattn.attention_backward
    grads: tuple[Array, ...] = call(*arrays, lse, **named)
    return grads


def _by_head(lse: Array) -> Array:
    """Return the sums of packed rows."""
    return lse.reshape(lse.shape[-2:] if lse.ndim > 1 else (1, *lse.shape))


def _rows_first(x: Array) -> Array:
    """Return the rows of one batch element packed, heads behind them."""
    return x.reshape(x.shape[-3:] if x.ndim > 2 else (1, *x.shape)).swapaxes(0, 1)


def wide(x: Array) -> Array:
    """Return half precision as float32."""
    x = widened(x)
    return x if x.dtype.itemsize > 2 else x.astype(np.float32)


def _padded(x: Array, rows: int) -> Array:
    """Return an array with its last row repeated."""
    more = x[..., -1:, :].repeat(rows - x.shape[-2], axis=-2)
    return np.concatenate([x, more], axis=-2)


def _padded_pairs(options: Options, rows: int, least: int) -> Options:
    """Return options whose mask and bias have the rows of a padded query."""
    padded = {
        name: _padded(x, least)
        for name, x in (("mask", options.mask), ("bias", options.bias))
        if x is not None and x.ndim > 1 and x.shape[-2] == rows > 1
    }
    return options._replace(**padded)
