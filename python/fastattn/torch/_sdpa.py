# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.scaled_dot_product_attention, in the words of `_attention.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _get_flash_sdp_enabled, _is_torch_function_mode_enabled
from torch._C._nn import scaled_dot_product_attention as torchs_own
from torch.overrides import handle_torch_function, has_torch_function

from fastattn._arguments import MASK_NAMES, pair_array, sizes
from fastattn._arrays import overridden
from fastattn._sdpa import with_equal_heads
from fastattn.torch import _cpu, _tensors
from fastattn.torch._attention import attention
from fastattn.torch._autograd import PlainAttention, unobserved
from fastattn.torch._tensors import PLAIN, array_of, drawn_dropout, is_causal_bias

if TYPE_CHECKING:
    from collections.abc import Callable


class Call(NamedTuple):
    """The arguments of torch's function."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


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
        out = fast_path(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not torch.compiler.is_compiling():
        seen = overridable(call)
        if has_torch_function(seen):
            named = {"scale": scale, "enable_gqa": enable_gqa}
            return handle_torch_function(scaled_dot_product_attention, seen, *call[:6], **named)
    if not _get_flash_sdp_enabled():
        return asked_of(torchs_own, without_causal_bias(call))
    return attended(call)


def overridable(call: Call) -> tuple[Tensor, ...]:
    """Return the tensors whose class may have its say: not a CausalBias, which is known here."""
    tensors = (call.query, call.key, call.value, call.attn_mask)
    return tuple(x for x in tensors if not is_causal_bias(x))


def asked_of(function: Callable[..., Any], call: Call) -> Any:
    """Return what a function with the signature of torch's own answers to a call."""
    return function(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)


def fast_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """Return the result of torch's function where nothing is special; None where something is.

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
        return _cpu.plain(query, key, value, None, scale, is_causal, enable_gqa)
    if not query.shape == key.shape == value.shape:
        return None
    return PlainAttention.apply(query, key, value, scale, is_causal)


def attended(call: Call) -> Tensor:
    """Return what `attention` answers to a call of torch's function."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must not be given together with is_causal=True")
    for name, x in (("query", query), ("key", key), ("value", value)):
        _tensors.check(name, x)
    query_offset = 0 if is_causal else None
    if attn_mask is not None and is_causal_bias(attn_mask):
        query_offset = _fitting_offset(attn_mask, query, key)
        attn_mask, is_causal = None, True
    if not enable_gqa:
        tensors = (query, key, value)
        wanted = zip(tensors, with_equal_heads(*(tuple(x.shape) for x in tensors)), strict=True)
        query, key, value = (x if x.shape == shape else x.expand(shape) for x, shape in wanted)
    if attn_mask is not None and not torch.compiler.is_compiling():
        _tensors.check("attn_mask", attn_mask)
        if not (query.is_cuda or overridden(torch, type(attn_mask))):
            shapes = sizes(query.shape, key.shape, value.shape)
            pair_array("attn_mask", array_of("attn_mask", attn_mask), MASK_NAMES, shapes)
    return attention(
        query,
        key,
        value,
        mask=attn_mask,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        **drawn_dropout(dropout_p),
    )


def _fitting_offset(bias: Any, query: Tensor, key: Tensor) -> int:
    """Return where the first query stands by a CausalBias that was made for these lengths."""
    lengths = query.shape[-2:-1] + key.shape[-2:-1]
    if lengths != (bias.seq_len_q, bias.seq_len_kv):
        raise ValueError(
            f"attn_mask must be a CausalBias for the lengths of query and key, {tuple(lengths)}, "
            f"got one for {(bias.seq_len_q, bias.seq_len_kv)}"
        )
    return _causal_offset(bias)


def _causal_offset(bias: Any) -> int:
    """Return where the first query stands by a CausalBias, as torch has it."""
    if bias.variant.name == "UPPER_LEFT":
        return 0
    return int(bias.seq_len_kv - bias.seq_len_q)


def without_causal_bias(call: Call) -> Call:
    """Return the call as torch's own function takes it, with a mask for a CausalBias."""
    bias: Any = call.attn_mask
    if not is_causal_bias(bias):
        return call
    if call.is_causal:
        raise ValueError("attn_mask must not be a CausalBias together with is_causal=True")
    offset = _causal_offset(bias)
    if offset == 0:
        return call._replace(attn_mask=None, is_causal=True)
    lengths = (bias.seq_len_q, bias.seq_len_kv)
    every = torch.ones(lengths, dtype=torch.bool, device=call.query.device)
    return call._replace(attn_mask=every.tril(offset))
