# SPDX-License-Identifier: Apache-2.0
"""Method heads: ranks exchange rows for heads, and each computes all rows of some heads.

There are at most as many ranks as query heads. While there are no more than key heads, each rank
has some of these, with all the query heads that read them; beyond, a key head goes to several
ranks, and its gradients are summed over them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.distributed._block import Operands, Results, add_gradients, attend, gradients
from fastattn.distributed._layout import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn._options import Options
    from fastattn.distributed._block import Starts
    from fastattn.distributed._engine import Peers
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]


class Share(NamedTuple):
    """The heads of a rank."""

    query: slice
    key: slice


def shares(q_heads: int, kv_heads: int, ranks: int) -> list[Share]:
    """Return which heads each rank has; no two ranks have the same query head.

    Parameters
    ----------
    q_heads, kv_heads : int
    ranks : int
        At most q_heads.
    """
    group = q_heads // kv_heads
    if ranks <= kv_heads:
        cuts = [kv_heads * i // ranks for i in range(ranks + 1)]
        return [
            Share(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(cuts)
        ]
    found = []
    for head in range(kv_heads):
        first, end = (-(-ranks * h // kv_heads) for h in (head, head + 1))  # the ranks of this head
        cuts = [head * group + group * i // (end - first) for i in range(end - first + 1)]
        found += [Share(slice(a, b), slice(head, head + 1)) for a, b in itertools.pairwise(cuts)]
    return found


class _Exchange:
    """Arrays from rows to heads, and back."""

    def __init__(self, peers: Peers, problem: Problem) -> None:
        self._peers = peers
        kv_heads = problem.key.shape[-3] if problem.key.ndim > 2 else 1
        self.shares = shares(problem.shapes.q_heads, kv_heads, peers.size)
        self.own = self.shares[peers.rank]

    def to_heads(self, x: Array, layout: Layout, of: list[slice]) -> Array:
        """Return all rows of this rank's heads, given this rank's rows of all heads."""
        x = _with_heads(x)
        sends = [np.ascontiguousarray(x[..., heads, :, :]) for heads in of]
        mine = sends[self._peers.rank].shape
        receives = [np.empty((*mine[:-2], rows, mine[-1]), x.dtype) for rows in layout.lengths]
        self._exchange("rows for heads", sends, receives)
        return layout.join(receives)

    def to_rows(self, x: Array, layout: Layout, of: list[slice]) -> list[Array]:
        """Return this rank's rows of the heads of each rank, given all rows of its own heads."""
        sends = [layout.take(x, rank) for rank in range(self._peers.size)]
        rows = layout.lengths[self._peers.rank]
        receives = [
            np.empty((*x.shape[:-3], heads.stop - heads.start, rows, x.shape[-1]), x.dtype)
            for heads in of
        ]
        self._exchange("heads for rows", sends, receives)
        return receives

    def queries(self) -> list[slice]:
        """Return each rank's query heads."""
        return [share.query for share in self.shares]

    def keys(self) -> list[slice]:
        """Return each rank's key heads."""
        return [share.key for share in self.shares]

    def pairs(self, x: Array | None, layout: Layout) -> Array | None:
        """Return all rows of a mask or bias for this rank's heads."""
        if x is None:
            return None
        rank, size = self._peers.rank, self._peers.size
        has_rows = x.ndim > 1 and x.shape[-2] != 1
        told = self._peers.all_gather("telling of rows", np.array([has_rows], np.uint8))
        has_heads = x.ndim > 2 and x.shape[-3] != 1
        if not told.any():
            return x[..., self.own.query, :, :] if has_heads else x
        rows = (1,) * (2 - x.ndim) + x.shape
        rows = (*rows[:-2], layout.lengths[rank], rows[-1])
        of = self.queries() if has_heads else [slice(0, 1)] * size
        return self.to_heads(np.broadcast_to(x, rows), layout, of)

    def _exchange(self, step: str, sends: list[Array], receives: list[Array]) -> None:
        rank = self._peers.rank
        receives[rank][...] = sends[rank]
        others = [other for other in range(self._peers.size) if other != rank]
        self._peers.exchange(
            step, [(r, sends[r]) for r in others], [(r, receives[r]) for r in others]
        )


def forward(peers: Peers, problem: Problem) -> tuple[Array, Array]:
    """Return out and lse of this rank's queries over all keys, sinks included."""
    exchange = _Exchange(peers, problem)
    layout, shapes = problem.layout, problem.shapes
    out, lse = attend(*_call(exchange, problem))
    results = [
        np.concatenate(exchange.to_rows(x, layout, exchange.queries()), axis=-3)
        for x in (out, lse[..., None])
    ]
    return results[0].reshape(shapes.out_shape), results[1].reshape(shapes.lse_shape)


def backward(peers: Peers, problem: Problem, results: Results) -> Operands:
    """Return the gradients of this rank's rows."""
    exchange = _Exchange(peers, problem)
    layout = problem.layout
    operands, options, starts = _call(exchange, problem)

    def to_heads(x: Array) -> Array:
        return exchange.to_heads(x, layout, exchange.queries())

    out, lse, grad_out, grad_lse = results
    lse = to_heads(lse[..., None])[..., 0]
    if grad_lse is not None:
        grad_lse = to_heads(grad_lse[..., None])[..., 0]
    call = (operands, Results(to_heads(out), lse, to_heads(grad_out), grad_lse), options, starts)
    if len({share.key.start for share in exchange.shares}) == len(exchange.shares):
        of_heads = gradients(*call)
    else:  # sums over ranks, of numbers that are not rounded yet
        of_heads = Operands(*(np.zeros(x.shape, problem.wide) for x in operands))
        add_gradients(of_heads, *call)
    dq = exchange.to_rows(of_heads.query, layout, exchange.queries())
    whole = [np.concatenate(dq, axis=-3).reshape(problem.query.shape)]
    for x, like in zip(of_heads[1:], (problem.key, problem.value), strict=True):
        parts = exchange.to_rows(x, problem.kv_layout, exchange.keys())
        total = np.zeros(_with_heads(like).shape, x.dtype)
        for heads, part in zip(exchange.keys(), parts, strict=True):
            total[..., heads, :, :] += part
        whole.append(total.reshape(like.shape))
    return Operands(*whole)


def _call(exchange: _Exchange, problem: Problem) -> tuple[Operands, Options, Starts]:
    """Return the operands of this rank's heads, the options, and where documents start."""
    layout, kv_layout = problem.layout, problem.kv_layout
    query = exchange.to_heads(problem.query, layout, exchange.queries())
    key, value = (
        exchange.to_heads(x, kv_layout, exchange.keys()) for x in (problem.key, problem.value)
    )
    options, heads = problem.options, exchange.own.query
    options = options._replace(
        mask=exchange.pairs(options.mask, layout),
        bias=exchange.pairs(options.bias, layout),
        sinks=None if options.sinks is None else options.sinks[heads],
        head_offset=options.head_offset + heads.start,
        alibi_slopes=None if options.alibi_slopes is None else options.alibi_slopes[..., heads],
    )
    documents = problem.documents
    starts = None if documents is None else (documents, documents)
    return Operands(query, key, value), options, starts


def _with_heads(x: Array) -> Array:
    """Return an array that has an axis of heads."""
    return x.reshape((1,) * (3 - x.ndim) + x.shape)
