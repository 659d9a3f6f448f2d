# SPDX-License-Identifier: Apache-2.0
"""The calls on tensors that have every option: what torch adds to a call is settled here.

Classes and modes of torch see the call first; autocast changes the dtype; a mask that requires grad
becomes a bias. The way of the call from here on is in `_autograd.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor, is_autocast_enabled
from torch._C import _is_torch_function_mode_enabled
from torch.overrides import handle_torch_function, has_torch_function

from fastattn._options import Options, options_of, takes
from fastattn.torch import _autograd, _tensors
from fastattn.torch._options import NUMBERS, STARTS, TensorOptions
from fastattn.torch._tensors import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from fastattn.torch._options import Starts

    Results = Tensor | tuple[Tensor, Tensor]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> tuple[Tensor, Tensor]: ...
@takes(TensorOptions)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `fastattn.attention` computes, of tensors and with their gradients.

    Parameters
    ----------
    query, key, value : Tensor
        Shapes and dtypes as for `fastattn.attention`, on the CPU, or on a GPU (see
        `fastattn.cuda`).
    mask, bias : Tensor, optional
        Likewise. A float mask that requires grad is taken for a bias, or added to it.
    query_offset, key_offset, alibi_slopes, sinks, kv_lengths : Tensor, array or number, optional
        Likewise. Of them, sinks alone may require grad.
    scale, is_causal, window, softcap, dropout_p, seed, head_offset, batch_offset, return_lse
        Likewise.
    out : Tensor of the result's shape and dtype, optional
        Where to write the result, which then has no gradient. It must not overlap an input.

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
    asked = options_of(attention, options)
    return _called(attention, query, key, value, (), asked, return_lse, out)


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | ArrayLike,
    cu_seqlens_kv: Tensor | ArrayLike,
    *,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> Tensor: ...
@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | ArrayLike,
    cu_seqlens_kv: Tensor | ArrayLike,
    *,
    return_lse: Literal[True],
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> tuple[Tensor, Tensor]: ...
@takes(TensorOptions)
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | ArrayLike,
    cu_seqlens_kv: Tensor | ArrayLike,
    *,
    return_lse: bool = False,
    out: Tensor | None = None,
    **options: Unpack[TensorOptions],
) -> Tensor | tuple[Tensor, Tensor]:
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
    query_offset, key_offset, kv_lengths : Tensor, array or number, optional
        One per sequence.
    alibi_slopes : Tensor or array of shape (q_heads,) or (sequences, q_heads), optional
    scale, is_causal, window, softcap, sinks, dropout_p, seed, head_offset, batch_offset, \
return_lse, out
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
    asked = options_of(varlen_attention, options)
    starts = (cu_seqlens_q, cu_seqlens_kv)
    for name, x in zip(STARTS, starts, strict=True):
        if x is None:
            raise TypeError(f"{name} must be a tensor or array of integers, not None")
    return _called(varlen_attention, query, key, value, starts, asked, return_lse, out)


def _called(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Starts,
    options: Options,
    return_lse: bool,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a call of `function`: of `attention`, or of `varlen_attention` with starts."""
    mask, bias, slopes, sinks = options.mask, options.bias, options.alibi_slopes, options.sinks
    offset, lengths, first_key = options.query_offset, options.kv_lengths, options.key_offset
    ordinary = (  # as most calls are: a small one must not spend its time on questions
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and len(starts) == 0
        and mask is bias is slopes is sinks is lengths is out is None
        and (offset is None or type(offset) is int)
        and type(first_key) is int
    )
    seen = (query, key, value, *starts, mask, bias, offset, first_key, slopes, sinks, lengths, out)
    ordinary = ordinary or _tensors.ORDINARY.issuperset(map(type, seen))
    if not torch.compiler.is_compiling() and (
        _is_torch_function_mode_enabled() if ordinary else has_torch_function(seen)
    ):
        named = options._asdict() | {"return_lse": return_lse, "out": out}
        return handle_torch_function(function, seen, query, key, value, *starts, **named)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _tensors.check(name, x)
    if mask is not None:
        _tensors.check("mask", mask)
    if bias is not None:
        _tensors.check("bias", bias)
    if not ordinary:
        for name in NUMBERS:
            if isinstance(getattr(options, name), Tensor):
                _tensors.check_class(name, getattr(options, name))
    query, key, value = autocast_to(query, key, value)
    if mask is not None and mask.requires_grad:
        options = options._replace(mask=None, bias=mask if bias is None else bias + mask)
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        raise ValueError("alibi_slopes must not require grad: they have no gradient here")
    if out is not None:
        _tensors.check("out", out)
        if _autograd.wants_grad(query, key, value, options.bias, sinks, out):
            raise ValueError("out must not be given where an argument requires grad")
    result, lse = _autograd.attend(query, key, value, options, starts, return_lse, ordinary, out)
    if out is not None and result is not out:  # an operator has made it
        if out.dtype != result.dtype or out.shape != result.shape:
            raise ValueError(
                "out must be a tensor of the result's dtype and shape, "
                f"{result.dtype}, {tuple(result.shape)}, got {out.dtype}, {tuple(out.shape)}"
            )
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype, as for torch's function; float64 stays."""
    device = tensors[0].device.type
    if not is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.dtype in _tensors.FLOATS and x.dtype != torch.float64 else x
        for x in tensors
    )
