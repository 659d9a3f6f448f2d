# SPDX-License-Identifier: Apache-2.0
"""Method ring: queries stay, blocks of keys come by, and each is added to attention so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.distributed._block import Operands, add_gradients, add_keys, add_sinks
from fastattn.distributed._blocks import blocks, homeward

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn.distributed._block import Results
    from fastattn.distributed._engine import Peers
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]


def forward(peers: Peers, problem: Problem) -> tuple[Array, Array]:
    """Return out and lse of this rank's queries over all keys, sinks included."""
    shapes = problem.shapes
    out = np.zeros(shapes.out_shape, problem.wide)
    lse = np.full(shapes.lse_shape, -np.inf, problem.wide)
    for source, key, value, poll in blocks(peers, problem):
        operands = Operands(problem.query, key, value)
        for rows, columns, options, starts in problem.blocks(source):
            here = operands.at(rows, columns)
            add_keys(out[..., rows, :], lse[..., rows], here, options, starts)
            poll()
    if problem.options.sinks is not None:
        add_sinks(out, lse, problem.options.sinks)
    return out, lse


def backward(peers: Peers, problem: Problem, results: Results) -> Operands:
    """Return the gradients of this rank's rows."""
    dq = np.zeros(problem.query.shape, problem.wide)
    home = homeward(peers, problem)
    for source, key, value, poll in blocks(peers, problem):
        operands = Operands(problem.query, key, value)
        sums = Operands(dq, *home.sums(source))
        for rows, columns, options, starts in problem.blocks(source):
            here = operands.at(rows, columns)
            add_gradients(sums.at(rows, columns), here, results.at(rows), options, starts)
            poll()
            home.poll()
        home.send(source)
    return Operands(dq, *home.arrived())
