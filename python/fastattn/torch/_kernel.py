# SPDX-License-Identifier: Apache-2.0
"""Where every call on tensors ends: in the kernels of the CPU, or of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastattn.torch import _cpu, _gpu

if TYPE_CHECKING:
    from torch import Tensor

    from fastattn._options import Options
    from fastattn.torch._options import BackwardCall, Gradients, Starts


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    starts: Starts,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return out, the one that is given or a new one, and lse if asked for."""
    compute = _gpu.forward if query.is_cuda else _cpu.forward
    return compute(query, key, value, options, starts, return_lse, out)


def backward(call: BackwardCall) -> Gradients:
    """Return the gradients."""
    compute = _gpu.backward if call.query.is_cuda else _cpu.backward
    return compute(call)
