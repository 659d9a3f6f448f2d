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
NO_SECOND = (
    "fastattn.torch has no second derivatives: torch's own function has them, which answers under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), where fastattn.torch.patch and "
    "fastattn.torch.scaled_dot_product_attention leave the call to it"
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return out and lse, by the operator."""
    out, lse = torch.ops.fastattn.attention(query, key, value, *_arguments(options))
    return out, lse


def gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    *wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Return what `_kernel.backward` does, by the operator."""
    saved = (grad_out, query, key, value, out, lse, grad_lse)
    *grads, dbias, dsinks = torch.ops.fastattn.attention_backward(
        *saved, *_arguments(options), *wanted
    )
    return *grads, dbias if wanted[0] else None, dsinks if wanted[1] else None


def _arguments(options: Options) -> Options:
    """Return the options as the operators take them."""
    mask, bias, sinks, slopes, offset, lengths, seed, *starts = options[: _kernel.MAY_BE_TENSORS]
    if isinstance(seed, int) and seed >= SIGNED:
        seed -= 2 * SIGNED
    small = (sinks, slopes, offset, lengths, seed, *starts)
    return (mask, bias, *map(_as_tensor, small), *options[_kernel.MAY_BE_TENSORS :])


def _as_tensor(x: Any) -> Tensor | None:
    """Return numbers as a tensor on the CPU, whatever torch's default device and dtype are."""
    if x is None or isinstance(x, Tensor):
        return x
    numbers = torch.as_tensor(x, device="cpu")
    if numbers.is_floating_point() and not hasattr(x, "dtype"):
        return torch.as_tensor(x, dtype=torch.float64, device="cpu")
    return numbers


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


def _no_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise NotImplementedError(NO_SECOND)


# Many grad_out at once.


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Compute one gradient after the other."""
    each = [
        torch.ops.fastattn.attention_backward(
            *(
                x if dim is None else x.select(dim, i)
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    grads = tuple(map(torch.stack, zip(*each, strict=True)))
    return grads, (0,) * len(grads)


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
backward_operator.register_autograd(_no_autograd)
backward_operator.register_vmap(_backward_vmap)
