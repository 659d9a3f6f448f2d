# SPDX-License-Identifier: Apache-2.0
"""The calls as operators of torch, for what looks at operators: torch.compile, torch.export, modes.

Every option is an argument of the operator, numbers per batch element as tensors. An operator
costs more than a small call (16 us), so that nobody else goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.torch import _kernel

if TYPE_CHECKING:
    from fastattn.torch._kernel import Options

TENSORS = (
    "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? query_offset, "
    "Tensor? kv_lengths, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv"
)
NUMBERS = (
    "float? scale, bool is_causal, bool has_window, SymInt? left, SymInt? right, float? softcap, "
    "float dropout_p"
)
OPERANDS = "Tensor query, Tensor key, Tensor value"
SIGNED = 2**63


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return out and lse, by the operator."""
    mask, bias, sinks, slopes, offset, lengths, seed, *starts = options[: _kernel.MAY_BE_TENSORS]
    numbers = options[_kernel.MAY_BE_TENSORS :]
    if isinstance(seed, int) and seed >= SIGNED:
        seed -= 2 * SIGNED
    small = (sinks, slopes, offset, lengths, seed, *starts)
    out, lse = torch.ops.fastattn.attention(
        query, key, value, mask, bias, *map(_as_tensor, small), *numbers
    )
    return out, lse


def _as_tensor(x: Any) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.as_tensor(x)


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _kernel.forward(query, key, value, options, True)
    assert lse is not None
    return out, lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    *rest, wants_dbias, wants_dsinks = options
    grads = _kernel.backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        tuple(rest),
        wants_dbias,
        wants_dsinks,
    )
    return tuple(query.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


# What the operators return, without their values.


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    if _kernel.is_packed(options):
        total, heads, _ = query.shape
        rows, shape = (heads, total), (total, heads, value.shape[-1])
    else:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        rank = max(query.dim(), key.dim(), value.dim())
        heads = query.shape[-3:-2] if query.dim() > 2 else (1,) * (rank > 2)
        rows = (*batch, *heads, query.shape[-2])
        shape = (*rows, value.shape[-1])
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = _kernel.result_like(query, shape)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(rows, dtype=wide)


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    *rest, wants_dbias, wants_dsinks = options
    bias, sinks = rest[1:3]
    wanted = (query, key, value, bias if wants_dbias else None, sinks if wants_dsinks else None)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


# Autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *options = inputs
    ctx.save_for_backward(query, key, value, *output, *options[: _kernel.MAY_BE_TENSORS])
    ctx.numbers = options[_kernel.MAY_BE_TENSORS :]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dq, dk, dv, dbias, dsinks = torch.ops.fastattn.attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        *tensors,
        *ctx.numbers,
        needs[4],
        needs[5],
    )
    rest = (None,) * (len(tensors) + len(ctx.numbers) - 3)
    return dq, dk, dv, None, dbias if needs[4] else None, dsinks if needs[5] else None, *rest


attention_operator = torch.library.custom_op(
    "fastattn::attention",
    _forward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({OPERANDS}, {TENSORS}, {NUMBERS}) -> (Tensor, Tensor)",
)
attention_operator.register_fake(_forward_fake)
attention_operator.register_autograd(_autograd, setup_context=_setup_context)

backward_operator = torch.library.custom_op(
    "fastattn::attention_backward",
    _backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"(Tensor grad_out, {OPERANDS}, Tensor out, Tensor lse, Tensor? grad_lse, {TENSORS}, "
    f"{NUMBERS}, bool wants_dbias, bool wants_dsinks) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
backward_operator.register_fake(_backward_fake)
