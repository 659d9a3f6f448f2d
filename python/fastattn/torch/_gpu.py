# SPDX-License-Identifier: Apache-2.0
"""The kernels of `fastattn.cuda`, called with tensors: where `_kernel.py` sends those on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.torch import _kernel, _tensors

if TYPE_CHECKING:
    from fastattn.torch._kernel import Options


def forward(
    query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out, and lse if asked for."""
    from fastattn import cuda

    results = cuda.attention(query, key, value, **_keywords(options), return_lse=return_lse)
    return results if return_lse else (results, None)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    wants_dbias: bool,
    wants_dsinks: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by query, key, value, bias and sinks; None for what is not wanted."""
    from fastattn import cuda

    dq, dk, dv, *rest = cuda.attention_backward(
        *(x.detach() for x in (grad_out, query, key, value, out, lse)),
        **_keywords(options),
        grad_lse=None if grad_lse is None else grad_lse.detach(),
        return_dbias=wants_dbias,
        return_dsinks=wants_dsinks,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    dsinks = rest.pop().to(options[2]) if wants_dsinks else None
    return dq, dk, dv, rest.pop() if wants_dbias else None, dsinks


def _keywords(options: Options) -> dict[str, Any]:
    """Return the options as fastattn.cuda's functions take them."""
    if _kernel.is_packed(options):
        raise NotImplementedError(
            "varlen_attention has no kernel for GPUs: pad the sequences and give kv_lengths to "
            "fastattn.torch.attention, or bring the tensors to the CPU"
        )
    return _kernel.keywords(options, lambda _name, x: x.detach(), _small)


def _small(name: str, x: Any) -> Any:
    """Return numbers without their gradient; those on the CPU as an array."""
    if not isinstance(x, Tensor):
        return x
    return x.detach() if x.is_cuda else _tensors.small_array_of(name, x.detach())
