# SPDX-License-Identifier: Apache-2.0
"""The kernels of the CPU, called with tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fastattn
from fastattn import _core
from fastattn._arguments import boolean, finite_number, packed_sizes, sizes
from fastattn._arrays import check_written, pool_of_caller, written
from fastattn._options import NO_OPTIONS
from fastattn.torch._options import STARTS, BackwardCall, Gradients, keywords
from fastattn.torch._tensors import (
    array_of,
    lse_dtype,
    result_like,
    small_array_of,
    tensor_of,
)

if TYPE_CHECKING:
    from torch import Tensor

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
    if out is None and _is_plain(options, starts, query, key):
        lse = None
        if return_lse:
            lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))
        result = plain(query, key, value, lse, options.scale, options.is_causal, True)
        if result is not None:
            return result, lse
    arrays = [array_of(*x) for x in (("query", query), ("key", key), ("value", value))]
    named = keywords(options, starts, array_of, small_array_of)
    call: Any = fastattn.varlen_attention if starts else fastattn.attention
    if starts:
        shapes, *checked = packed_sizes(*arrays, *(named[name] for name in STARTS))
        named.update(zip(STARTS, checked, strict=True))
    else:
        shapes = sizes(*(x.shape for x in arrays))
    given = out is not None
    if out is not None:
        check_written(out)
    else:
        if query.stride(-1) != 1:
            query = query.contiguous()
        out = result_like(query, shapes.out_shape)
    place = array_of("out", out) if given or out.numel() else None
    with pool_of_caller:
        results = call(*arrays, **named, return_lse=return_lse, out=place)
    if given:
        written(torch, out)
    return out, tensor_of(results[1]) if return_lse else None


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor | None,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
) -> Tensor | None:
    """Return out, and fill lse, without a NumPy view of each tensor; None where that cannot be.

    grouped: a key head may serve many query heads. The first query stands at the first key.
    """
    if scale is not None:
        scale = finite_number("scale", scale)
    if is_causal is not False:
        is_causal = boolean("is_causal", is_causal)
    if query.is_neg() or key.is_neg() or value.is_neg():  # the memory has the other sign
        return None
    out = torch.empty_like(query)
    done = _core.attend_plain(query, key, value, out, lse, scale, is_causal, grouped)
    return out if done else None


def backward(call: BackwardCall) -> Gradients:
    """Return the gradients."""
    options = call.options
    if call.grad_lse is None and _is_plain(options, call.starts, call.query, call.key):
        saved = (call.query, call.key, call.value, call.out, call.lse)
        grads = plain_backward(call.grad_out, *saved, options.scale, options.is_causal)
        if grads is not None:
            return grads
    with pool_of_caller:
        results = fastattn.attention_backward(**call.keywords(array_of, small_array_of))
    return call.gradients(map(tensor_of, results))


def plain_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    is_causal: bool,
) -> Gradients | None:
    """Return the gradients of what `plain` computes; None where that cannot be."""
    if grad_out.is_neg() or query.is_neg() or key.is_neg() or value.is_neg():
        return None
    if grad_out.stride(-1) != 1:  # of a sum, say: one number, repeated
        grad_out = grad_out.contiguous()
    grads = Gradients(torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    call = (grad_out, query, key, value, out, lse, *grads[:3], scale, is_causal)
    return grads if _core.attend_plain_backward(*call) else None


def _is_plain(options: Options, starts: Starts, query: Tensor, key: Tensor) -> bool:
    """Tell whether only scale and is_causal are given, and query 0 stands at key 0."""
    mask, bias, _, is_causal, offset, window, softcap, slopes, sinks, lengths, *more = options
    dropout_p, seed, *offsets = more  # of a part among the keys, heads or batch elements of a whole
    if not mask is bias is window is softcap is slopes is sinks is lengths is seed is None:
        return False
    if starts or dropout_p != 0.0 or any(x is not NO_OPTIONS.key_offset for x in offsets):
        return False
    if offset is None:
        return not is_causal or query.shape[-2:-1] == key.shape[-2:-1]
    return type(offset) is int and offset == 0
