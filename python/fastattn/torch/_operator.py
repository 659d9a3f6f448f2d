# SPDX-License-Identifier: Apache-2.0
"""The calls as operators of torch, for what looks at operators: torch.compile, torch.export, modes.

Every option is an argument of the operator, numbers per batch element as tensors. An operator
costs more than a small call (16 us), so that nobody else goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn._options import Options
from fastattn.torch import _kernel
from fastattn.torch._options import STARTS, BackwardCall, Gradients
from fastattn.torch._tensors import lse_dtype, result_like

if TYPE_CHECKING:
    from fastattn.torch._options import Starts

# The operators' arguments beside query, key and value. Their order stays: saved programs have it.
TENSORS = ("mask", "bias", "sinks", "alibi_slopes", "query_offset", "kv_lengths", "seed", *STARTS)
ARGUMENTS = dict.fromkeys(TENSORS, "Tensor?") | {
    "scale": "float?",
    "is_causal": "bool",
    "has_window": "bool",
    "left": "SymInt?",
    "right": "SymInt?",
    "softcap": "float?",
    "dropout_p": "float",
    "key_offset": "Tensor?",
    "head_offset": "SymInt",
    "batch_offset": "SymInt",
}
OPTIONS = ", ".join(f"{kind} {name}" for name, kind in ARGUMENTS.items())
OPERANDS = "Tensor query, Tensor key, Tensor value"
SIGNED = 2**63
NO_SECOND = (
    "fastattn.torch has no second derivatives: torch's own function has them, which answers under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), where fastattn.torch.patch and "
    "fastattn.torch.scaled_dot_product_attention leave the call to it"
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: Options, starts: Starts
) -> tuple[Tensor, Tensor | None]:
    """Return out and lse, by the operator."""
    out, lse = torch.ops.fastattn.attention(query, key, value, *_arguments(options, starts))
    return out, lse


def gradients(call: BackwardCall) -> Gradients:
    """Return what `_kernel.backward` does, by the operator."""
    *arrays, options, starts, wants_dbias, wants_dsinks = call
    dq, dk, dv, dbias, dsinks = torch.ops.fastattn.attention_backward(
        *arrays, *_arguments(options, starts), wants_dbias, wants_dsinks
    )
    return Gradients(dq, dk, dv, dbias if wants_dbias else None, dsinks if wants_dsinks else None)


def _arguments(options: Options, starts: Starts) -> list[Any]:
    """Return the options and the starts as the operators take them."""
    named = dict(zip(STARTS, starts or (None, None), strict=True)) | options._asdict()
    left, right = (None, None) if options.window is None else options.window
    named |= {"has_window": options.window is not None, "left": left, "right": right}
    if isinstance(options.seed, int) and options.seed >= SIGNED:
        named["seed"] = options.seed - 2 * SIGNED
    if type(named["key_offset"]) is int and named["key_offset"] == 0:
        named["key_offset"] = None
    named["key_offset"] = _as_tensor(named["key_offset"])
    tensors = [_as_tensor(named[name]) for name in TENSORS]
    return tensors + [named[name] for name in ARGUMENTS if name not in TENSORS]


def _named(arguments: tuple[Any, ...]) -> tuple[Options, Starts]:
    """Return the options and the starts that the operators were given."""
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    starts = tuple(named.pop(name) for name in STARTS)
    has_window, left, right = (named.pop(name) for name in ("has_window", "left", "right"))
    if named["key_offset"] is None:
        named["key_offset"] = 0
    options = Options(**named, window=(left, right) if has_window else None)
    return options, starts if any(x is not None for x in starts) else ()


def _backward_call(arguments: tuple[Any, ...]) -> BackwardCall:
    """Return by name what the operator of the gradients was given."""
    first = BackwardCall._fields.index("options")
    last = first + len(ARGUMENTS)
    options, starts = _named(arguments[first:last])
    return BackwardCall._make((*arguments[:first], options, starts, *arguments[last:]))


def _as_tensor(x: Any) -> Tensor | None:
    """Return numbers as a tensor on the CPU, whatever torch's default device and dtype are."""
    if x is None or isinstance(x, Tensor):
        return x
    numbers = torch.as_tensor(x, device="cpu")
    if numbers.is_floating_point() and not hasattr(x, "dtype"):
        return torch.as_tensor(x, dtype=torch.float64, device="cpu")
    return numbers


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _kernel.forward(query, key, value, *_named(options), return_lse=True)
    assert lse is not None
    return out, lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _backward_call(arguments)
    grads = _kernel.backward(call)
    return tuple(call.query.new_empty(0) if x is None else x.contiguous() for x in grads)


# What the operators return, without their values.


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _, starts = _named(options)
    if starts:
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
    return result_like(query, shape), query.new_empty(rows, dtype=lse_dtype(query.dtype))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _backward_call(arguments)
    bias = call.options.bias if call.wants_dbias else None
    sinks = call.options.sinks if call.wants_dsinks else None
    wanted = (call.query, call.key, call.value, bias, sinks)
    return tuple(call.query.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


# Autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *options = inputs
    ctx.save_for_backward(query, key, value, *output, *options[: len(TENSORS)])
    ctx.numbers = options[len(TENSORS) :]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    names = ("query", "key", "value", *ARGUMENTS)
    wanted = dict(zip(names, ctx.needs_input_grad, strict=True))
    grads = torch.ops.fastattn.attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        *tensors,
        *ctx.numbers,
        wanted["bias"],
        wanted["sinks"],
    )
    found = dict(zip(Gradients._fields, grads, strict=True))
    return tuple(found[name] if wanted[name] and name in found else None for name in names)


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
    schema=f"({OPERANDS}, {OPTIONS}) -> (Tensor, Tensor)",
)
attention_operator.register_fake(_forward_fake)
attention_operator.register_autograd(_autograd, setup_context=_setup_context)

backward_operator = torch.library.custom_op(
    "fastattn::attention_backward",
    _backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"(Tensor grad_out, {OPERANDS}, Tensor out, Tensor lse, Tensor? grad_lse, {OPTIONS}, "
    "bool wants_dbias, bool wants_dsinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
backward_operator.register_fake(_backward_fake)
backward_operator.register_autograd(_no_autograd)
backward_operator.register_vmap(_backward_vmap)
