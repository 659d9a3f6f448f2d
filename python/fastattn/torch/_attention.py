# SPDX-License-Identifier: Apache-2.0
"""The calls on tensors, and which way one takes.

A call that nothing but its result is asked of goes straight to the kernel; one whose gradients are
wanted, through an autograd function; one that torch.compile, torch.export or a mode of torch looks
at, through an operator that it knows (`_operator.py`). All three end in `_kernel.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _get_flash_sdp_enabled,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch._C._nn import scaled_dot_product_attention as torchs_own
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from fastattn._arguments import MASK_NAMES, pair_array, sizes
from fastattn._arrays import overridden
from fastattn.torch import _kernel, _operator, _tensors
from fastattn.torch._tensors import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from fastattn.torch._kernel import Options

MOST_SEEDS = 2**63 - 1  # of those that torch's generator draws from


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch.nn.functional.scaled_dot_product_attention computes.

    Parameters
    ----------
    query : Tensor of shape (..., q_heads, q_len, head_dim)
        float16, bfloat16, float32 or float64, on the CPU, or on a GPU (see `fastattn.cuda`); key
        and value share the dtype.
    key : Tensor of shape (..., heads, kv_len, head_dim)
    value : Tensor of shape (..., heads, kv_len, value_head_dim)
        All axes but the last two broadcast, unless enable_gqa.
    attn_mask : Tensor, broadcastable to (..., q_heads, q_len, kv_len), optional
        bool: True = attend. A float dtype: added to the scores; it may require grad. A
        torch.nn.attention.bias.CausalBias for q_len and kv_len. Not together with is_causal.
    dropout_p : float
        Drop probabilities with this probability; the seed is drawn from torch's default generator.
    is_causal : bool
        Query i sees key j iff j <= i, whatever the two lengths.
    scale : float, optional
        1 / sqrt(head_dim) unless given.
    enable_gqa : bool
        q_heads may be a multiple of the heads of key and value.

    Returns
    -------
    Tensor of shape (..., q_heads, q_len, value_head_dim)
        Laid out in memory like query. A query that sees no key gives 0. Where torch's switches turn
        its flash attention off, as sdpa_kernel(SDPBackend.MATH) does, torch's own function answers.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.

    References
    ----------
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if not torch.compiler.is_compiling():
        out = quickly(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if out is not None:
            return out
        seen = overridable(query, key, value, attn_mask)
        if has_torch_function(seen):
            call = (query, key, value, attn_mask, dropout_p, is_causal)
            named = {"scale": scale, "enable_gqa": enable_gqa}
            return handle_torch_function(scaled_dot_product_attention, seen, *call, **named)
    if not _get_flash_sdp_enabled():
        if _tensors.is_causal_bias(attn_mask):
            attn_mask, is_causal = _tensors.causal_mask(attn_mask, is_causal, query.device)
        call = (query, key, value, attn_mask, dropout_p, is_causal)
        return torchs_own(*call, scale=scale, enable_gqa=enable_gqa)
    return called_as_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def overridable(*tensors: Any) -> tuple[Any, ...]:
    """Return those whose class may have its say: not a CausalBias, which ours does itself."""
    return tuple(x for x in tensors if not _tensors.is_causal_bias(x))


def quickly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """Do what torch's function is asked for, where nothing is special; return None where it is.

    A small call must not spend its time on questions.
    """
    if (
        attn_mask is not None
        or dropout_p != 0
        or type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or query.is_cuda
        or not unobserved()
        or _is_torch_function_mode_enabled()
        or not _get_flash_sdp_enabled()
        or is_autocast_enabled("cpu")
    ):
        return None
    if not (
        (query.requires_grad or key.requires_grad or value.requires_grad) and is_grad_enabled()
    ):
        return _kernel.plain(query, key, value, None, scale, is_causal, enable_gqa)
    if not query.shape == key.shape == value.shape:
        return None
    return _PlainAttention.apply(query, key, value, scale, is_causal)


def called_as_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Say in the words of `attention` what torch's function is asked for."""
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must not be given together with is_causal=True")
    for name, x in (("query", query), ("key", key), ("value", value)):
        _tensors.check(name, x)
    query_offset = 0 if is_causal else None
    if attn_mask is not None and _tensors.is_causal_bias(attn_mask):
        query_offset = _fitting_offset(attn_mask, query, key)
        attn_mask, is_causal = None, True
    if not enable_gqa:
        query, key, value = _equal_heads(query, key, value)
    if attn_mask is not None and not torch.compiler.is_compiling():
        _tensors.check("attn_mask", attn_mask)
        if not (query.is_cuda or overridden(torch, type(attn_mask))):
            known = sizes(query.shape, key.shape, value.shape)
            pair_array("attn_mask", _tensors.array_of("attn_mask", attn_mask), MASK_NAMES, known)
    out: Tensor = attention(
        query,
        key,
        value,
        mask=attn_mask,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        dropout_p=dropout_p,
        seed=drawn_seed(dropout_p),
    )
    return out


def _fitting_offset(bias: Any, query: Tensor, key: Tensor) -> int:
    """Return where the first query stands by a CausalBias that was made for these lengths."""
    lengths = query.shape[-2:-1] + key.shape[-2:-1]
    if lengths != (bias.seq_len_q, bias.seq_len_kv):
        raise ValueError(
            f"attn_mask must be a CausalBias for the lengths of query and key, {tuple(lengths)}, "
            f"got one for {(bias.seq_len_q, bias.seq_len_kv)}"
        )
    return _tensors.causal_offset(bias)


def drawn_seed(dropout_p: float) -> Any:
    """Return a seed from torch's default generator; None, and draw none, without dropout."""
    if not dropout_p > 0:
        return None
    seed = torch.randint(MOST_SEEDS, (), device="cpu")
    traced = torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0
    return seed if traced else int(seed)


def _equal_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value with their heads broadcast; as they are where that is nothing."""
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in tensors]
    if heads[0] == heads[1] == heads[2]:
        return tensors
    most = max(heads)
    if any(n not in (1, most) for n in heads):
        shapes = ", ".join(
            f"{name}.shape={tuple(x.shape)}"
            for name, x in zip(("query", "key", "value"), tensors, strict=True)
        )
        raise ValueError(
            "query, key and value must have equally many heads unless enable_gqa=True, got "
            + shapes
        )
    return tuple(
        x.expand(*x.shape[:-3], most, *x.shape[-2:]) if x.dim() > 1 else x for x in tensors
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: Tensor | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | ArrayLike | None = None,
    sinks: Tensor | ArrayLike | None = None,
    kv_lengths: Tensor | ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Compute what `fastattn.attention` computes, of tensors and with their gradients.

    Parameters
    ----------
    query, key, value : Tensor
        Shapes and dtypes as for `fastattn.attention`, on the CPU, or on a GPU (see
        `fastattn.cuda`).
    mask, bias : Tensor, optional
        Likewise. A float mask that requires grad is taken for a bias, or added to it.
    query_offset, alibi_slopes, sinks, kv_lengths : Tensor, array or number, optional
        Likewise. Of them, sinks alone may require grad.
    scale, is_causal, window, softcap, dropout_p, seed, return_lse
        Likewise.
    out : Tensor of the result's shape and dtype, optional
        Where to write the result, which then has no gradient.

    Returns
    -------
    out : Tensor of shape (batch, q_heads, q_len, value_head_dim)
        Of the query's dtype, laid out in memory like query.
    lse : Tensor of shape (batch, q_heads, q_len), only if return_lse
        float32, or float64 for a float64 query. Gradients flow through it.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.

    See Also
    --------
    fastattn.attention : what the arguments mean.
    """
    return _called(
        attention,
        query,
        key,
        value,
        (),
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
        return_lse,
        out,
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | ArrayLike,
    cu_seqlens_kv: Tensor | ArrayLike,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: Tensor | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | ArrayLike | None = None,
    sinks: Tensor | ArrayLike | None = None,
    kv_lengths: Tensor | ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Compute what `fastattn.varlen_attention` computes, of tensors and with their gradients.

    Parameters
    ----------
    query : Tensor of shape (total_q, q_heads, head_dim)
        Dtypes as for `fastattn.attention`, on the CPU.
    key : Tensor of shape (total_kv, kv_heads, head_dim)
    value : Tensor of shape (total_kv, kv_heads, value_head_dim)
    cu_seqlens_q, cu_seqlens_kv : Tensor or array of int, shape (sequences + 1,)
        Where each sequence starts, and the last one ends.
    mask, bias : Tensor, optional
        Broadcastable to (q_heads, total_q, longest kv_len).
    query_offset, kv_lengths : Tensor, array or number, optional
        One per sequence.
    alibi_slopes : Tensor or array of shape (q_heads,) or (sequences, q_heads), optional
    scale, is_causal, window, softcap, sinks, dropout_p, seed, return_lse, out
        As for `attention`, and so is what may require grad.

    Returns
    -------
    out : Tensor of shape (total_q, q_heads, value_head_dim)
        Of the query's dtype, laid out in memory like query.
    lse : Tensor of shape (q_heads, total_q), only if return_lse
        Gradients flow through it.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.

    See Also
    --------
    fastattn.varlen_attention : what the arguments mean.
    """
    for name, x in zip(_kernel.STARTS_NAMES, (cu_seqlens_q, cu_seqlens_kv), strict=True):
        if x is None:
            raise TypeError(f"{name} must be a tensor or array of integers, not None")
    return _called(
        varlen_attention,
        query,
        key,
        value,
        (cu_seqlens_q, cu_seqlens_kv),
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
        return_lse,
        out,
    )


def _called(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Any, ...],
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    query_offset: Any,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    kv_lengths: Any,
    dropout_p: float,
    seed: int | None,
    return_lse: bool,
    out: Tensor | None,
) -> Any:
    """Compute a call of `attention`, or of `varlen_attention` with starts: of `function`."""
    ordinary = (  # as most calls are: a small one must not spend its time on questions
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and len(starts) == 0
        and mask is bias is alibi_slopes is sinks is kv_lengths is out is None
        and (query_offset is None or type(query_offset) is int)
    )
    small = (query_offset, alibi_slopes, sinks, kv_lengths)
    seen = (query, key, value, *starts, mask, bias, *small, out)
    ordinary = ordinary or _tensors.ORDINARY.issuperset(map(type, seen))
    compiling = torch.compiler.is_compiling()
    if not compiling and (
        _is_torch_function_mode_enabled() if ordinary else has_torch_function(seen)
    ):
        return handle_torch_function(
            function,
            seen,
            query,
            key,
            value,
            *starts,
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            query_offset=query_offset,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_lengths=kv_lengths,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=return_lse,
            out=out,
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        _tensors.check(name, x)
    if mask is not None:
        _tensors.check("mask", mask)
    if bias is not None:
        _tensors.check("bias", bias)
    if not ordinary:
        for name, numbers in zip(_kernel.SMALL_NAMES, small, strict=True):
            if isinstance(numbers, Tensor):
                _tensors.check_class(name, numbers)
    if is_autocast_enabled(query.device.type):
        query, key, value = _autocast(query, key, value)
    if mask is not None and mask.requires_grad:
        mask, bias = None, mask if bias is None else bias + mask
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require grad: they have no gradient here")
    left, right = (None, None) if window is None else window
    options = (
        mask,
        bias,
        sinks,
        alibi_slopes,
        query_offset,
        kv_lengths,
        seed,
        *(starts or (None, None)),
        scale,
        is_causal,
        window is not None,
        left,
        right,
        softcap,
        dropout_p,
    )
    if compiling:
        result, lse = _operator.attend(query, key, value, options)
    else:
        result, lse = _attend(query, key, value, options, return_lse, ordinary)
    if out is not None:
        if _wants_grad(query, key, value, bias, sinks):
            raise ValueError("out must not be given where an argument requires grad")
        if not isinstance(out, Tensor) or out.dtype != result.dtype or out.shape != result.shape:
            got = f"{out.dtype}, {tuple(out.shape)}" if isinstance(out, Tensor) else type(out)
            raise ValueError(
                "out must be a tensor of the result's dtype and shape, "
                f"{result.dtype}, {tuple(result.shape)}, got {got}"
            )
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    return_lse: bool,
    ordinary: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the call; ordinary: no argument is of another library."""
    if not (unobserved() and (ordinary or _are_plain(query, key, value, *options))):
        _refuse_transforms(query, key, value)
        return _operator.attend(query, key, value, options)
    bias, sinks = options[1:3]
    if _wants_grad(query, key, value, bias, sinks):
        return _Attention.apply(query, key, value, bias, sinks, options, return_lse)  # type: ignore[no-any-return]
    return _kernel.forward(query, key, value, options, return_lse)


def _are_plain(*arguments: Any) -> bool:
    return all(type(x) in PLAIN for x in arguments if isinstance(x, Tensor))


def unobserved() -> bool:
    """Tell whether nothing in torch wants to know which operators run, or to run others."""
    return (
        _len_torch_dispatch_stack() == 0
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
    )


def _refuse_transforms(*tensors: Tensor) -> None:
    """Refuse what an operator would let pass without its derivatives, or stumble over."""
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


def _wants_grad(*tensors: Any) -> bool:
    return is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype, as for torch's function; float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if x.dtype in _tensors.FLOATS and x.dtype != torch.float64 else x
        for x in tensors
    )


class _Attention(torch.autograd.Function):
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
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = _kernel.forward(query, key, value, options, True)
        tensors, ctx.others = _kernel.split(options)
        ctx.save_for_backward(query, key, value, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse if return_lse else None

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wanted = ctx.needs_input_grad[3:5]
        options = _kernel.joined(tensors, ctx.others)
        compute = _kernel.backward if _is_usual(grad_out, grad_lse) else _gradients
        saved = (query, key, value, out, lse)
        grads = compute(grad_out, *saved, grad_lse, options, *wanted)
        return *grads, None, None


class _PlainAttention(torch.autograd.Function):
    """Likewise, where nothing is special: what a small call spends counts."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool
    ) -> Tensor:
        out, lse = _kernel.forward(query, key, value, _kernel.plain_options(scale, is_causal), True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = ctx.saved_tensors
        if _is_usual(grad_out, None):
            grads = _kernel.plain_backward(grad_out, *saved, ctx.scale, ctx.is_causal)
            if grads is not None:
                return *grads, None, None
        options = _kernel.plain_options(ctx.scale, ctx.is_causal)
        dq, dk, dv, *_ = _gradients(grad_out, *saved, None, options, False, False)
        return dq, dk, dv, None, None


class _Gradients(torch.autograd.Function):
    """The gradients, where somebody may want theirs: they have none, and say so."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _kernel.backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError(_operator.NO_SECOND)


def _gradients(
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
    """Return the gradients: by the operator if torch watches, or gives many grad_out as one."""
    call = (grad_out, query, key, value, out, lse, grad_lse, options, *wanted)
    if unobserved() and _is_one(grad_out) and _is_one(grad_lse):
        compute = _Gradients.apply if is_grad_enabled() else _kernel.backward
        return compute(*call)
    _refuse_tangents(grad_out, grad_lse)
    return _operator.gradients(*call)


def _is_usual(grad_out: Tensor, grad_lse: Tensor | None) -> bool:
    """Tell whether nothing but the gradients is asked of a backward pass."""
    return not is_grad_enabled() and unobserved() and _is_one(grad_out) and _is_one(grad_lse)


def _is_one(grad: Tensor | None) -> bool:
    """Tell whether a gradient is a tensor and not many, of is_grads_batched or of a class."""
    return grad is None or (type(grad) in PLAIN and not is_legacy_batchedtensor(grad))
