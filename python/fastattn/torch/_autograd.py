# SPDX-License-Identifier: Apache-2.0
"""The way of a call through torch: straight, by an autograd function, or by an operator.

A call of which nobody wants more than the result goes straight to the kernels (`_kernel.py`); one
whose gradients are wanted, through an autograd function; one that torch.compile, torch.export or a
mode of torch watches, through an operator that torch knows (`_operator.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from fastattn._options import Options
from fastattn.torch import _cpu, _kernel, _operator
from fastattn.torch._options import BackwardCall, Gradients, joined, split
from fastattn.torch._tensors import PLAIN

if TYPE_CHECKING:
    from fastattn.torch._options import Starts


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    starts: Starts,
    return_lse: bool,
    ordinary: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute a call; ordinary: no argument is of another library.

    An operator makes a result of its own; all else writes to out, if it is given.
    """
    if torch.compiler.is_compiling():
        return _operator.attend(query, key, value, options, starts)
    if not (unobserved() and (ordinary or _are_plain(query, key, value, *options, *starts, out))):
        _refuse_transforms(query, key, value)
        return _operator.attend(query, key, value, options, starts)
    bias, sinks = options.bias, options.sinks
    if wants_grad(query, key, value, bias, sinks):
        return _Attention.apply(query, key, value, bias, sinks, options, starts, return_lse)  # type: ignore[no-any-return]
    return _kernel.forward(query, key, value, options, starts, return_lse, out)


def unobserved() -> bool:
    """Tell whether nothing in torch wants to know which operators run, or to run others."""
    return (
        _len_torch_dispatch_stack() == 0
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
    )


def wants_grad(*arguments: Any) -> bool:
    """Tell whether torch is to record a call with these arguments for its gradients."""
    return is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _are_plain(*arguments: Any) -> bool:
    return all(type(x) in PLAIN for x in arguments if isinstance(x, Tensor))


def _refuse_transforms(*tensors: Tensor) -> None:
    """Refuse what an operator would let pass without its derivatives, or fail at."""
    if _are_functorch_transforms_active():
        raise NotImplementedError(
            "fastattn.torch does not work under torch.func's transforms (grad, vmap, jvp ..): "
            "torch.nn.functional.scaled_dot_product_attention does"
        )
    _refuse_tangents(*tensors)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError("fastattn.torch has no forward-mode derivatives")


class _Attention(Function):
    """Attention that remembers what its gradients need."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        options: Options,
        starts: Starts,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = _kernel.forward(query, key, value, options, starts, True)
        tensors, ctx.others = split(options, starts)
        ctx.save_for_backward(query, key, value, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse if return_lse else None

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        options, starts = joined(tensors, ctx.others)
        _, _, _, wants_dbias, wants_dsinks, *_ = ctx.needs_input_grad
        saved = (query, key, value, out, lse)
        call = BackwardCall(grad_out, *saved, grad_lse, options, starts, wants_dbias, wants_dsinks)
        compute = _kernel.backward if _is_alone(grad_out, grad_lse) else _gradients
        return *compute(call), None, None, None


class PlainAttention(Function):
    """Attention with no option but scale and is_causal, of which a small call must be quick."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool
    ) -> Tensor:
        options = Options(scale=scale, is_causal=is_causal)
        out, lse = _kernel.forward(query, key, value, options, (), True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = ctx.saved_tensors
        options = ctx.options
        grads = None
        if _is_alone(grad_out, None):
            grads = _cpu.plain_backward(grad_out, *saved, options.scale, options.is_causal)
        if grads is None:
            grads = _gradients(BackwardCall(grad_out, *saved, None, options, (), False, False))
        return grads.query, grads.key, grads.value, None, None


class _NoSecond(Function):
    """The gradients, where their own may be wanted: there are none, and they say so."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor | None, ...]:
        return _kernel.backward(BackwardCall(*call))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError(_operator.NO_SECOND)


def _gradients(call: BackwardCall) -> Gradients:
    """Return the gradients: by the operator if torch watches, or gives many grad_out as one."""
    if unobserved() and _is_one(call.grad_out) and _is_one(call.grad_lse):
        return Gradients(*_NoSecond.apply(*call)) if is_grad_enabled() else _kernel.backward(call)
    _refuse_tangents(call.grad_out, call.grad_lse)
    return _operator.gradients(call)


def _is_alone(grad_out: Tensor, grad_lse: Tensor | None) -> bool:
    """Tell whether nothing but the gradients is wanted of a backward pass."""
    return not is_grad_enabled() and unobserved() and _is_one(grad_out) and _is_one(grad_lse)


def _is_one(grad: Tensor | None) -> bool:
    """Tell whether a gradient is one plain tensor, not many as with is_grads_batched."""
    return grad is None or (type(grad) in PLAIN and not is_legacy_batchedtensor(grad))
