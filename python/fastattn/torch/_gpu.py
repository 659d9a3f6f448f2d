# SPDX-License-Identifier: Apache-2.0
"""The kernels of GPUs, called with tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.torch._options import BackwardCall, Gradients, keywords
from fastattn.torch._tensors import small_array_of

if TYPE_CHECKING:
    from fastattn._options import Options
    from fastattn.torch._options import Starts


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    starts: Starts,
    return_lse: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return out, the one that is given or a new one, and lse if asked for."""
    from fastattn import cuda

    _refuse_packed(starts)
    named = keywords(options, starts, _detached, _numbers)
    results = cuda.attention(query, key, value, **named, return_lse=return_lse, out=out)
    return results if return_lse else (results, None)


def backward(call: BackwardCall) -> Gradients:
    """Return the gradients."""
    from fastattn import cuda

    _refuse_packed(call.starts)
    named = call.keywords(_detached, _numbers)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return call.gradients(cuda.attention_backward(**named, deterministic=deterministic))


def _refuse_packed(starts: Starts) -> None:
    if starts:
        raise NotImplementedError(
            "varlen_attention has no kernel for GPUs: pad the sequences and give kv_lengths to "
            "fastattn.torch.attention, or bring the tensors to the CPU"
        )


def _detached(_name: str, x: Tensor) -> Tensor:
    return x.detach()


def _numbers(name: str, x: Any) -> Any:
    """Return a tensor on a GPU without its gradient, and one on the CPU as an array."""
    if not isinstance(x, Tensor):
        return x
    return x.detach() if x.is_cuda else small_array_of(name, x.detach())
