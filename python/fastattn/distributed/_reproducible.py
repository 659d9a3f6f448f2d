# SPDX-License-Identifier: Apache-2.0
"""A ring whose bits do not depend on how many ranks there are, or on their layout.

Keys are cut at multiples of CHUNK, wherever ranks are cut, and a chunk is attended when all of it
that this rank needs has come by. Its part of a row has bits of its own; the merge has no order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.distributed import _exact_merge
from fastattn.distributed._block import Operands, add_sinks, as_of_many, attend, wide
from fastattn.distributed._blocks import blocks
from fastattn.distributed._problem import chunks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastattn.distributed._blocks import Arrived
    from fastattn.distributed._engine import Peers
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]

CHUNK = 256  # keys


def forward(peers: Peers, problem: Problem) -> tuple[Array, Array]:
    """Return out and lse of this rank's queries over all keys, sinks included."""
    shapes = problem.shapes
    *heads, rows = shapes.lse_shape
    columns = shapes.out_shape[-1]
    lines = int(np.prod(heads, dtype=int))
    flat = _exact_merge.empty(lines * rows, columns)
    state = flat.reshape(lines, rows, flat.shape[1])
    for start, key, value in _chunks(problem, blocks(peers, problem)):
        for at, part in _parts(problem, start, key, value):
            here = state[:, at]
            of_part = part.reshape(-1, part.shape[-1])
            here[...] = _exact_merge.added(here.reshape(of_part.shape), of_part).reshape(here.shape)
    out, lse = _exact_merge.result(flat)
    out, lse = out.reshape(shapes.out_shape), lse.reshape(shapes.lse_shape)
    if problem.options.sinks is not None:
        add_sinks(out, lse, problem.options.sinks)
    return out, lse.astype(problem.wide)


def _chunks(problem: Problem, arriving: Iterator[Arrived]) -> Iterator[tuple[int, Array, Array]]:
    """Yield chunks of keys and values, and where they start, when they are complete.

    Those that are not, when all has come, lack only keys that no query of this rank sees, and have
    zeros there.
    """
    total = problem.kv_layout.total
    waiting: dict[int, tuple[Array, Array]] = {}
    missing: dict[int, int] = {}
    for source, key, value, poll in arriving:
        for rows, start, stop in problem.kv_layout.pieces(source):
            for chunk in range(start // CHUNK * CHUNK, stop, CHUNK):
                end = min(chunk + CHUNK, total)
                first, last = max(chunk, start), min(end, stop)
                own = slice(rows.start + first - start, rows.start + last - start)
                pair = key[..., own, :], value[..., own, :]
                if last - first < end - chunk:
                    if chunk not in waiting:
                        waiting[chunk] = tuple(_zeros(x, end - chunk) for x in pair)  # type: ignore[assignment]
                        missing[chunk] = end - chunk
                    for whole, part in zip(waiting[chunk], pair, strict=True):
                        whole[..., first - chunk : last - chunk, :] = part
                    missing[chunk] -= last - first
                    if missing[chunk]:
                        continue
                    pair = waiting.pop(chunk)
                yield chunk, *pair
                poll()
    for chunk, pair in waiting.items():
        yield chunk, *pair


def _zeros(x: Array, rows: int) -> Array:
    return np.zeros((*x.shape[:-2], rows, x.shape[-1]), x.dtype)


def _parts(problem: Problem, start: int, key: Array, value: Array) -> Iterator[tuple[slice, Array]]:
    """Yield rows of this rank's queries, and their states over one chunk of keys."""
    stop = start + key.shape[-2]
    least = as_of_many(problem.layout.total)
    for piece in problem.layout.pieces(problem.rank):
        for rows, first, last in chunks_of(piece):
            low, high = problem.reach.keys(first, last)
            if start >= high or stop <= low:
                continue
            columns = slice(0, stop - start)
            block = problem.block(rows, (first, last), columns, (start, stop))
            options = block.options._replace(sinks=None)
            operands = Operands(wide(problem.query[..., rows, :]), key, value)
            out, lse = attend(operands, options, None, least)
            flat = _exact_merge.of_part(out.reshape(-1, out.shape[-1]), lse.reshape(-1))
            yield rows, flat.reshape(-1, last - first, flat.shape[1])
