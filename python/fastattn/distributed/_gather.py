# SPDX-License-Identifier: Apache-2.0
"""Method gather: each rank has all keys that it needs, and computes its rows as one process does.

So the bits of a row are those of one process, whatever the ranks and the layout are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.distributed._block import Operands, add_gradients, as_of_many, attend
from fastattn.distributed._blocks import blocks, homeward, sources

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn.distributed._block import Results
    from fastattn.distributed._engine import Peers
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]


def forward(peers: Peers, problem: Problem) -> tuple[Array, Array]:
    """Return out and lse of this rank's queries over all keys, sinks included."""
    shapes = problem.shapes
    out = np.empty(shapes.out_shape, problem.query.dtype)
    lse = np.empty(shapes.lse_shape, problem.wide)
    key, value = _all_keys(peers, problem)
    whole = slice(0, problem.kv_layout.total)
    for rows, start, stop in problem.layout.pieces(problem.rank):
        _, _, options, starts = problem.block(rows, (start, stop), whole, (0, whole.stop))
        least = as_of_many(problem.layout.total)
        here = Operands(problem.query, key, value).at(rows, whole)
        of_rows = attend(here, options, starts, least)
        out[..., rows, :], lse[..., rows] = of_rows
    return out, lse


def backward(peers: Peers, problem: Problem, results: Results) -> Operands:
    """Return the gradients of this rank's rows."""
    operands = Operands(problem.query, *_all_keys(peers, problem))
    whole = slice(0, problem.kv_layout.total)
    sums = Operands(*(np.zeros(x.shape, problem.wide) for x in operands))
    for rows, start, stop in problem.layout.pieces(problem.rank):
        _, _, options, starts = problem.block(rows, (start, stop), whole, (0, whole.stop))
        here = operands.at(rows, whole)
        add_gradients(sums.at(rows, whole), here, results.at(rows), options, starts)
    home = homeward(peers, problem)
    for source in sources(problem):
        for of_source, of_all in zip(home.sums(source), sums[1:], strict=True):
            for rows, start, stop in problem.kv_layout.pieces(source):
                of_source[..., rows, :] = of_all[..., start:stop, :]
        home.send(source)
    return Operands(sums.query, *home.arrived())


def _all_keys(peers: Peers, problem: Problem) -> tuple[Array, Array]:
    """Return keys and values by position; zeros for those that no query of this rank sees."""
    total = problem.kv_layout.total
    wholes = [
        np.zeros((*x.shape[:-2], total, x.shape[-1]), x.dtype) for x in (problem.key, problem.value)
    ]
    for source, key, value, _ in blocks(peers, problem):
        for whole, x in zip(wholes, (key, value), strict=True):
            for rows, start, stop in problem.kv_layout.pieces(source):
                whole[..., start:stop, :] = x[..., rows, :]
    return wholes[0], wholes[1]
