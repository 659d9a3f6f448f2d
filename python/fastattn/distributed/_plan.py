# SPDX-License-Identifier: Apache-2.0
"""What a call over ranks will cost: a model of each rank's work, its bytes, and when it is done."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastattn._arguments import positive_number, starts, whole_number
from fastattn._options import Options
from fastattn._report import Report
from fastattn.distributed._layout import Layout
from fastattn.distributed._problem import FAR, METHODS, Reach, spans_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Method = Literal["ring", "gather", "heads"]

# Operations of a pair and a column, in halves: of scores and results; backward, of scores again,
# the gradients of scores and of the three operands.
FORWARD, BACKWARD = 2, 5
SHOWN = 8  # ranks of a report


class Plan(Report):
    """What `plan` returns: a dict whose str() is a report."""

    def __str__(self) -> str:
        """Return the report."""
        columns = {
            "rank": [f"{rank}" for rank in range(self["ranks"])],
            "rows": [f"{n}" for n in self["rows"]],
            "pairs": [f"{n:.4g}" for n in self["pairs"]],
            "received": [f"{n / 2**20:.1f} MiB" for n in self["received_bytes"]],
            "computes": [_seconds(x) for x in self["compute_seconds"]],
            "done after": [_seconds(x) for x in self["done_seconds"]],
        }
        lines = [
            f"{self.title}: {self['method']} over {self['ranks']} ranks, "
            f"{_seconds(self['seconds'])}, {self['efficiency']:.0%} of ideal"
        ]
        widths = {name: max(map(len, [name, *cells[:SHOWN]])) for name, cells in columns.items()}
        lines.append("  " + "  ".join(f"{name:>{width}}" for name, width in widths.items()))
        for rank in range(min(self["ranks"], SHOWN)):
            cells = (f"{columns[name][rank]:>{width}}" for name, width in widths.items())
            lines.append("  " + "  ".join(cells))
        if self["ranks"] > SHOWN:
            lines.append(f"  .. {self['ranks']} ranks")
        return "\n".join(lines)


def plan(
    layout: Layout,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    kv_layout: Layout | None = None,
    batch: int = 1,
    itemsize: int = 4,
    documents: ArrayLike | None = None,
    is_causal: bool = False,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    method: Method = "ring",
    backward: bool = False,
    flops: float = 1e12,
    bandwidth: float = 10e9,
    latency: float = 5e-6,
) -> Plan:
    """Return what a call over ranks costs, by a model: work, bytes and seconds of each rank.

    Parameters
    ----------
    layout, kv_layout : Layout
        As for `attention` over ranks, and so are documents, is_causal, query_offset, window and
        method.
    q_heads, kv_heads, head_dim, value_head_dim, batch : int
        Sizes; value_head_dim is head_dim unless given.
    itemsize : int
        Bytes of a number of keys and values.
    backward : bool
        The gradients, and not the call itself.
    flops : float
        Floating-point operations per second that attention reaches on one rank alone, of one call
        on as many rows: 4 * q_heads * head_dim for each pair, divided by the time that it takes.
    bandwidth : float
        Bytes per second that a rank can send, and another can receive.
    latency : float
        Seconds of a message that has no bytes.

    Returns
    -------
    dict
        ``seconds``: when the last rank is done. ``efficiency``: what equal shares of the work, and
        no messages, would take, divided by that. By rank: ``rows``, ``pairs`` of a query and a key,
        ``received_bytes``, ``compute_seconds``, ``done_seconds``. Its str() is the report.

    Notes
    -----
    Messages travel while ranks compute, without slowing them. Ranks are equally fast, and a mask or
    kv_lengths are not counted.

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> sizes = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
    >>> for layout in (fd.zigzag(2**17, 16), fd.contiguous(2**17, 16)):
    ...     f"{fd.plan(layout, **sizes, is_causal=True)['efficiency']:.0%}"
    '100%'
    '52%'
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, not {type(layout).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, x in (("flops", flops), ("bandwidth", bandwidth)):
        positive_number(name, x)
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    for name, size in (("q_heads", q_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if whole_number(name, size) < 1:
            raise ValueError(f"{name} must be 1 or more, got {name}={size}")
    kv_layout = kv_layout or layout
    cut = None if documents is None else starts("documents", documents, layout.total)
    options = Options(is_causal=is_causal, query_offset=query_offset, window=window)
    reach = Reach(options, kv_layout.total, cut)
    pairs = _pairs(layout, kv_layout, reach, cut)
    sees = reach.between(layout, kv_layout)

    ranks = layout.ranks
    products = BACKWARD if backward else FORWARD
    work = products * q_heads * batch * (head_dim + value_head_dim) / flops  # seconds of a pair
    key_row = kv_heads * batch * (head_dim + value_head_dim)
    kv_rows = np.array(kv_layout.lengths, float)
    keys, sums = kv_rows * key_row * itemsize, kv_rows * key_row * 4.0
    hop = _Hop(latency, bandwidth)
    compute = pairs.sum(axis=1) * work
    others = sees & ~np.eye(ranks, dtype=bool)
    received = others @ keys
    if backward:
        received = received + (sees.sum(axis=0) - sees.diagonal()) * sums
    if method == "heads":
        rows = np.array(layout.lengths, float)
        q_row = q_heads * batch * (head_dim + value_head_dim) * itemsize
        times = 2 if backward else 1
        received = times * (layout.total - rows + rows * (ranks - 1)) / ranks * q_row
        received = received + times * (kv_layout.total - kv_rows) / ranks * key_row * itemsize
        compute = np.full(ranks, pairs.sum() * work / ranks)
        done = compute + (ranks - 1) * times * 2 * latency + received / bandwidth
    elif method == "gather":
        done = compute + (others.sum(axis=1) * latency + received / bandwidth)
    elif sees.all():
        done = _rotating(pairs * work, keys, sums if backward else None, hop)
    else:
        done = _straight(pairs * work, sees, keys, hop)
        if backward:
            done = done + latency + sums / bandwidth
    seconds = float(done.max(initial=0))
    ideal = float(pairs.sum() * work / ranks)
    return Plan(
        "fastattn.distributed.plan",
        {
            "method": method,
            "ranks": ranks,
            "seconds": seconds,
            "efficiency": ideal / seconds if seconds else 1.0,
            "rows": layout.lengths,
            "pairs": tuple(map(int, pairs.sum(axis=1))),
            "received_bytes": tuple(map(int, received)),
            "compute_seconds": tuple(map(float, compute)),
            "done_seconds": tuple(map(float, done)),
        },
    )


class _Hop:
    """The time that bytes take from one rank to another."""

    def __init__(self, latency: float, bandwidth: float) -> None:
        self._latency, self._bandwidth = latency, bandwidth

    def __call__(self, size: Array) -> Array:
        return self._latency + size / self._bandwidth


def _rotating(compute: Array, keys: Array, sums: Array | None, hop: _Hop) -> Array:
    """Return when each rank is done with all blocks, which rotate with three buffers."""
    ranks = len(keys)
    rank = np.arange(ranks)
    done, there, link = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    free = [np.zeros(ranks) for _ in range(3)]
    summed = np.zeros(ranks)
    for step in range(ranks):
        source = (rank - step) % ranks
        end = np.maximum(done, there) + compute[rank, source]
        if sums is not None:  # those before have sent theirs
            end = np.maximum(end, summed)
        if step < ranks - 1:
            start = np.maximum.reduce([there, link, np.roll(free[(step + 1) % 3], -1)])
            arrived = start + hop(keys[source])
            link, there = arrived, np.roll(arrived, 1)
            free[step % 3] = np.maximum(end, arrived)
        if sums is not None:
            link = np.maximum(link, end) + (hop(sums[source]) if ranks > 1 else 0)
            summed = np.roll(link, 1)
        done = end
    return np.maximum(done, summed)


def _straight(compute: Array, sees: Array, keys: Array, hop: _Hop) -> Array:
    """Return when each rank is done with the blocks that it needs, which come from their owners."""
    ranks = len(keys)
    rank = np.arange(ranks)
    done, link = np.zeros(ranks), np.zeros(ranks)
    for step in range(ranks):
        source, reader = (rank - step) % ranks, (rank + step) % ranks
        if step:
            link = link + np.where(sees[reader, rank], hop(keys), 0)
            done = np.where(sees[rank, source], np.maximum(done, link[source]), done)
        done = done + compute[rank, source]
    return done


def _pairs(layout: Layout, kv_layout: Layout, reach: Reach, documents: Array | None) -> Array:
    """Return how many pairs each rank's queries make with each rank's keys."""
    rank_q, start_q, stop_q = (x[:, None] for x in spans_of(layout))
    rank_k, start_k, stop_k = spans_of(kv_layout)
    seen = np.zeros((len(rank_q), len(rank_k)))
    borders = [(0, FAR)] if documents is None else itertools.pairwise(documents)
    farthest = layout.total + kv_layout.total  # beyond it, distances make no difference
    last, before = (max(min(x, farthest), -farthest) for x in (reach.last, reach.first - 1))
    for first, end in borders:
        low, high, k_low, k_high = (
            np.clip(x, first, end) for x in (start_q, stop_q, start_k, stop_k)
        )
        seen += _below(low, high, k_low, k_high, last) - _below(low, high, k_low, k_high, before)
    pairs = np.zeros((layout.ranks, kv_layout.ranks))
    np.add.at(pairs, (rank_q, rank_k[None]), seen)
    return pairs


def _below(start: Array, stop: Array, k_start: Array, k_stop: Array, distance: int) -> Array:
    """Return how many pairs of queries start:stop and keys have key - query <= distance.

    A query has as many as a triangle's row; those of keys beyond the span are taken away.
    """
    return np.asarray(
        _triangles(start, stop, k_start, distance) - _triangles(start, stop, k_stop, distance)
    )


def _triangles(start: Array, stop: Array, key: Array, distance: int) -> Array:
    """Return the sum over queries of how many positions lie from key on up to their last one."""
    low, high = (np.maximum(x + distance - key, 0.0) for x in (start, stop))
    # high (high + 1) / 2 - low (low + 1) / 2, without the difference of two squares.
    return np.asarray((high - low) * (high + low + 1) / 2)


def _seconds(x: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if x * factor >= 1:
            return f"{x * factor:.3g} {unit}"
    return f"{x * 1e6:.3g} us"
