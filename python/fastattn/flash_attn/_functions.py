# SPDX-License-Identifier: Apache-2.0
"""The attention functions of flash-attn, their signatures and meaning, on tensors on the CPU.

Each says what its layout and its words mean to `fastattn.torch`, which has the gradients, or to the
kernel for pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fastattn
import fastattn.torch
from fastattn._arrays import as_numpy
from fastattn.flash_attn._arguments import (
    check_axes,
    indices_of,
    kernel_options,
    unpacked,
    window_sides,
)
from fastattn.flash_attn._calls import dense, packed, packed_arguments
from fastattn.flash_attn._rotary import rows_at, turned
from fastattn.torch._tensors import drawn_dropout, lse_dtype

if TYPE_CHECKING:
    from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute attention of tensors of shape (batch, length, heads, head_dim), with gradients.

    Parameters
    ----------
    q : tensor of shape (batch, q_len, heads, head_dim)
        float16, bfloat16, float32 or float64, on the CPU.
    k, v : tensor of shape (batch, kv_len, kv_heads, head_dim)
        heads is a multiple of kv_heads.
    dropout_p : float
        Drop each pair with this probability, and divide what is kept by 1 - dropout_p. The seed is
        drawn from torch's default generator; `fastattn.dropout_mask` says which pairs it keeps.
    softmax_scale : float, optional
        1 / sqrt(head_dim) unless given.
    causal : bool
        Query i sees key j iff ``j <= i + kv_len - q_len``: the last query sees the last key.
    window_size : (left, right)
        Key j is seen iff ``-left <= j - (i + kv_len - q_len) <= right``; negative or None is
        unlimited.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0 or None is off.
    alibi_slopes : tensor of shape (heads,) or (batch, heads), optional
        Adds ``-slope * |i + kv_len - q_len - j|``.
    deterministic : bool
        It is always so.
    return_attn_probs : bool
        Return (out, softmax_lse, S_dmask).

    Returns
    -------
    out : tensor of shape (batch, q_len, heads, head_dim)
        A query that sees no key gives 0.
    softmax_lse : tensor of shape (batch, heads, q_len), only if return_attn_probs
        -inf where no key is seen.
    S_dmask : tensor, only if return_attn_probs
        Empty: there is no array of probabilities.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule.

    References
    ----------
    https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py

    Examples
    --------
    >>> import torch, fastattn.flash_attn
    >>> x = torch.ones(1, 5, 2, 8)
    >>> fastattn.flash_attn.flash_attn_func(x, x, x, causal=True).shape
    torch.Size([1, 5, 2, 8])
    """
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _results(dense(q, k, v, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_func` does, with kv of shape (batch, kv_len, 2, kv_heads, head_dim)."""
    check_axes(5, "(batch, length, 2, heads, head_dim)", kv=kv)
    k, v = unpacked("kv", kv, 2, 2)
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _results(dense(q, k, v, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_func` does, with qkv of shape (batch, length, 3, heads, head_dim)."""
    check_axes(5, "(batch, length, 3, heads, head_dim)", qkv=qkv)
    q, k, v = unpacked("qkv", qkv, 2, 3)
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _results(dense(q, k, v, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Compute attention over sequences of different lengths, packed one after the other.

    Parameters
    ----------
    q : tensor of shape (total_q, heads, head_dim)
    k, v : tensor of shape (total_k, kv_heads, head_dim)
        With block_table (pages, page_size, kv_heads, head_dim), which is copied.
    cu_seqlens_q, cu_seqlens_k : tensor of int, shape (batch + 1,)
        Where each sequence starts, and the last one ends.
    max_seqlen_q, max_seqlen_k : int
        Not needed here, and not read.
    block_table : tensor of int, shape (batch, columns), optional
        Key j of sequence b lies in page ``block_table[b, j // page_size]``.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, \
return_attn_probs
        As for `flash_attn_func`; positions are those within a sequence.

    Returns
    -------
    out : tensor of shape (total_q, heads, head_dim)
    softmax_lse : tensor of shape (heads, total_q), only if return_attn_probs
    S_dmask : tensor, only if return_attn_probs
        Empty.
    """
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = packed_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
    return _results(packed(q, *call, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_varlen_func` does, with kv of shape (total_k, 2, kv_heads, head_dim)."""
    check_axes(4, "(total, 2, heads, head_dim)", kv=kv)
    k, v = unpacked("kv", kv, 1, 2)
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = packed_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, None)
    return _results(packed(q, *call, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_varlen_func` does, with qkv of shape (total, 3, heads, head_dim)."""
    check_axes(4, "(total, 3, heads, head_dim)", qkv=qkv)
    q, k, v = unpacked("qkv", qkv, 1, 3)
    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = packed_arguments(q, k, v, cu_seqlens, cu_seqlens, None)
    return _results(packed(q, *call, options | drawn_dropout(dropout_p)), return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append to a cache, in place, and compute the attention of queries over all it then holds.

    Parameters
    ----------
    q : tensor of shape (batch, q_len, heads, head_dim)
    k_cache, v_cache : tensor of shape (cache_batch, cache_len, kv_heads, head_dim)
        With block_table (pages, page_size, kv_heads, head_dim), page_size a multiple of 128.
    k, v : tensor of shape (batch, new, kv_heads, head_dim), optional
        Written to the cache from cache_seqlens on.
    rotary_cos, rotary_sin : tensor of shape (positions, rotary_dim / 2), optional
        The new keys are turned, the i-th of a sequence as position cache_seqlens + i; so are the
        queries if causal or with a window that the cache is longer than, else all of them as
        position cache_seqlens. Only with k and v; positions is at least the keys that there is
        room for.
    rotary_interleaved : bool
        The pairs that are turned are neighbours, not the two halves of rotary_dim numbers.
    cache_seqlens : int, or tensor of int of shape (batch,), optional
        How many keys each sequence has in the cache, before the new ones; all that fit unless
        given.
    cache_batch_idx : tensor of int of shape (batch,), optional
        Which row of the cache each sequence has; 0, 1, ... unless given. Not with block_table.
    cache_leftpad : tensor of int of shape (batch,), optional
        Keys before it are not seen. Not with block_table.
    block_table : tensor of int of shape (batch, columns), optional
        Key j of sequence b lies in page ``block_table[b, j // page_size]``.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As for `flash_attn_func`, the last query standing at the last key of its sequence.
    num_splits : int
        Not read: the kernel splits long sequences by itself, always alike.
    return_softmax_lse : bool
        Return (out, softmax_lse).

    Returns
    -------
    out : tensor of shape (batch, q_len, heads, head_dim)
        Without a gradient.
    softmax_lse : tensor of shape (batch, heads, q_len), only if return_softmax_lse

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule. What is wrong with k, v, lengths or indices is found before
        anything is written.
    """
    check_axes(4, "(batch, length, heads, head_dim)", q=q, k_cache=k_cache, v_cache=v_cache)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            "k_cache and v_cache must be equally large, got "
            f"k_cache.shape={tuple(k_cache.shape)}, v_cache.shape={tuple(v_cache.shape)}"
        )
    batch, page_size = len(q), k_cache.shape[1]
    if block_table is None:
        rows = torch.arange(batch, device="cpu") if cache_batch_idx is None else cache_batch_idx
        table = indices_of("cache_batch_idx", rows, (batch,))[:, None]
    else:
        if cache_batch_idx is not None or cache_leftpad is not None:
            raise ValueError("block_table must be given without cache_batch_idx and cache_leftpad")
        table = indices_of("block_table", block_table, (batch, block_table.shape[-1]))
    most = table.shape[1] * page_size
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens must be given with k")
    lengths = torch.as_tensor(most if cache_seqlens is None else cache_seqlens, device="cpu")
    lengths = indices_of(
        "cache_seqlens", lengths.expand(batch) if lengths.ndim == 0 else lengths, (batch,)
    )
    if batch and int(lengths.min()) < 0:
        raise ValueError(f"cache_seqlens must be >= 0, got {int(lengths.min())}")
    new = 0
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is not None and v is not None:
        new = k.shape[1] if k.ndim > 1 else 0
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            shape = (batch, new, *cache.shape[2:])
            if x.shape != shape or x.dtype != cache.dtype:
                raise ValueError(
                    f"{name} must have shape {shape} and dtype {cache.dtype}, got "
                    f"{name}.shape={tuple(x.shape)} and {x.dtype}"
                )
    if batch and int(lengths.max()) + new > most:
        raise ValueError(
            f"cache_seqlens and the new keys must be within {most}, the keys that there is room "
            f"for, got {int(lengths.max())} + {new}"
        )
    ends = lengths + new
    used = torch.arange(table.shape[1], device="cpu") * page_size < ends[:, None]
    named = table[used]
    wrong = named[(named < 0) | (named >= len(k_cache))]
    if len(wrong):
        name = "cache_batch_idx" if block_table is None else "block_table"
        raise ValueError(
            f"{name} must be within 0..{len(k_cache) - 1}, the rows of k_cache, got {int(wrong[0])}"
        )

    options = kernel_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    rotary = _rotary_tables(rotary_cos, rotary_sin, q, k, most)
    if cache_leftpad is not None:
        first = indices_of("cache_leftpad", cache_leftpad, (batch,))
        options["mask"] = (torch.arange(page_size, device="cpu") >= first[:, None])[:, None, None]
    with torch.no_grad():
        if rotary is not None and k is not None:
            in_turn = causal or any(
                side is not None and side < most for side in window_sides(window_size)
            )
            steps = torch.arange(q.shape[1], device="cpu") if in_turn else 0
            q = _turned_at(q, *rotary, lengths[:, None] + steps, rotary_interleaved)
            steps = torch.arange(new, device="cpu")
            k = _turned_at(k, *rotary, lengths[:, None] + steps, rotary_interleaved)
        query = q.transpose(1, 2)
        if k is not None and v is not None and new:
            positions = lengths[:, None] + torch.arange(new, device="cpu")
            pages = table.gather(1, positions // page_size)
            k_cache[pages, positions % page_size] = k
            v_cache[pages, positions % page_size] = v
        key, value = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if block_table is not None:
            paged = fastattn.PagedKVCache.from_pages(
                as_numpy("k_cache", key), as_numpy("v_cache", value), table.numpy(), ends.numpy()
            )
            out, lse = paged.attend(query, **options, return_lse=True)
        else:
            options |= {"kv_lengths": ends, "query_offset": ends - q.shape[1]}
            if cache_batch_idx is None and len(key) == batch:
                out, lse = fastattn.torch.attention(query, key, value, **options, return_lse=True)
            else:  # row by row: to gather them would copy the cache
                out, lse = _row_by_row(query, key, value, rows, options)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _results(results: tuple[Tensor, Tensor], return_attn_probs: bool) -> Any:
    """Return out, and with it lse and an empty S_dmask if asked for."""
    out, lse = results
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def _rotary_tables(
    cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor | None, most: int
) -> tuple[Tensor, Tensor] | None:
    """Return the tables of angles, if they are given and long enough for the whole cache."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None or k is None:
        raise ValueError("rotary_cos and rotary_sin must be given together, and with k and v")
    check_axes(2, "(positions, rotary_dim / 2)", rotary_cos=cos, rotary_sin=sin)
    if cos.shape != sin.shape or len(cos) < most or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"rotary_cos and rotary_sin must have a row for each of the {most} keys that there is "
            f"room for, and at most head_dim / 2 columns, got rotary_cos.shape={tuple(cos.shape)}, "
            f"rotary_sin.shape={tuple(sin.shape)}, head_dim={q.shape[-1]}"
        )
    return cos, sin


def _turned_at(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Turn x of shape (batch, length, heads, head_dim) by its positions' angles."""
    cos, sin = (y[:, :, None] for y in rows_at(cos, sin, positions))
    return turned(x, cos, sin, interleaved, conjugate=False)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return out and lse of sequences whose keys are some rows of a cache, without a copy."""
    batch, heads, q_len, _ = query.shape
    out = query.new_empty((batch, heads, q_len, value.shape[-1]))
    lse = query.new_empty((batch, heads, q_len), dtype=lse_dtype(query.dtype))
    for i, row in enumerate(rows.tolist()):
        own = dict(options)
        for name in ("mask", "kv_lengths", "query_offset"):
            if name in own:
                own[name] = own[name][i]
        if own["alibi_slopes"] is not None and own["alibi_slopes"].ndim == 2:
            own["alibi_slopes"] = own["alibi_slopes"][i]
        out[i], lse[i] = fastattn.torch.attention(
            query[i], key[row], value[row], **own, return_lse=True
        )
    return out, lse
