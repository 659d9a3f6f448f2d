# SPDX-License-Identifier: Apache-2.0
"""What users of flash-attn call: its functions, signatures and meaning, on tensors on the CPU.

Each function says what its layout and its words mean to `fastattn.torch`, which has the gradients,
or to the kernel for pages. `install` puts them in the place of the package flash_attn.

Differences from flash-attn 2: docs/flash_attn.md.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any, Self

try:
    import torch
except ImportError as error:
    raise ImportError(f"fastattn.flash_attn needs PyTorch ({error}): pip install torch") from error

import fastattn
import fastattn.torch
from fastattn._arrays import as_numpy
from fastattn.torch._attention import drawn_seed
from fastattn.torch._kernel import pool_of_caller

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]

VERSION = "2.8.4"  # of flash-attn, whose functions these are
INTERFACE = __all__[:-1]
PADDING = ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
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
        Key j is seen iff ``-left <= j - (i + kv_len - q_len) <= right``; negative is unlimited.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0 is off.
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
    _check_axes(4, "(batch, length, heads, head_dim)", q=q, k=k, v=v)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = fastattn.torch.attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        **options,
        query_offset=k.shape[1] - q.shape[1],
        dropout_p=dropout_p,
        seed=drawn_seed(dropout_p),
        return_lse=True,
    )
    return _answer(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_func` does, with kv of shape (batch, kv_len, 2, kv_heads, head_dim)."""
    _check_axes(5, "(batch, length, 2, heads, head_dim)", kv=kv)
    k, v = _unpacked("kv", kv, 2, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_func` does, with qkv of shape (batch, length, 3, heads, head_dim)."""
    _check_axes(5, "(batch, length, 3, heads, head_dim)", qkv=qkv)
    q, k, v = _unpacked("qkv", qkv, 2, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
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
    _check_axes(3, "(total, heads, head_dim)", q=q)
    q_starts, kv_starts = (
        _starts("cu_seqlens_q", cu_seqlens_q),
        _starts("cu_seqlens_k", cu_seqlens_k),
    )
    if block_table is not None:
        lengths = kv_starts.diff()
        k, v = (_gathered(x, block_table, lengths) for x in (k, v))
        kv_starts = kv_starts - kv_starts[0]
    _check_axes(3, "(total, heads, head_dim)", k=k, v=v)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if len(q_starts) != len(kv_starts):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be equally long, got "
            f"{len(q_starts)} and {len(kv_starts)} entries"
        )
    out, lse = fastattn.torch.varlen_attention(
        q,
        k,
        v,
        q_starts,
        kv_starts,
        **options,
        query_offset=kv_starts.diff() - q_starts.diff(),
        dropout_p=dropout_p,
        seed=drawn_seed(dropout_p),
        return_lse=True,
    )
    return _answer(out, lse, return_attn_probs)


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_varlen_func` does, with kv of shape (total_k, 2, kv_heads, head_dim)."""
    _check_axes(4, "(total, 2, heads, head_dim)", kv=kv)
    k, v = _unpacked("kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Do what `flash_attn_varlen_func` does, with qkv of shape (total, 3, heads, head_dim)."""
    _check_axes(4, "(total, 3, heads, head_dim)", qkv=qkv)
    q, k, v = _unpacked("qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
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
    rotary_cos, rotary_sin, rotary_interleaved
        Not supported: must be None.
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
    NotImplementedError
        Rotary embeddings are asked for: apply them to q and k before.
    TypeError, ValueError
        An argument breaks a rule. What is wrong with k, v, lengths or indices is found before
        anything is written.
    """
    if rotary_cos is not None or rotary_sin is not None:
        raise NotImplementedError(
            "rotary_cos and rotary_sin are not supported: apply the rotary embedding to q and k "
            "before the call"
        )
    _check_axes(4, "(batch, length, heads, head_dim)", q=q, k_cache=k_cache, v_cache=v_cache)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            "k_cache and v_cache must be equally large, got "
            f"k_cache.shape={tuple(k_cache.shape)}, v_cache.shape={tuple(v_cache.shape)}"
        )
    batch, page_size = len(q), k_cache.shape[1]
    if block_table is None:
        rows = torch.arange(batch) if cache_batch_idx is None else cache_batch_idx
        table = _indices("cache_batch_idx", rows, (batch,))[:, None]
    else:
        if cache_batch_idx is not None or cache_leftpad is not None:
            raise ValueError("block_table must be given without cache_batch_idx and cache_leftpad")
        table = _indices("block_table", block_table, (batch, block_table.shape[-1]))
    most = table.shape[1] * page_size
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens must be given with k")
    lengths = torch.as_tensor(most if cache_seqlens is None else cache_seqlens)
    lengths = _indices(
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
    used = torch.arange(table.shape[1]) * page_size < ends[:, None]
    named = table[used]
    wrong = named[(named < 0) | (named >= len(k_cache))]
    if len(wrong):
        name = "cache_batch_idx" if block_table is None else "block_table"
        raise ValueError(
            f"{name} must be within 0..{len(k_cache) - 1}, the rows of k_cache, got {int(wrong[0])}"
        )

    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if cache_leftpad is not None:
        first = _indices("cache_leftpad", cache_leftpad, (batch,))
        options["mask"] = (torch.arange(page_size) >= first[:, None])[:, None, None]
    with torch.no_grad():
        query = q.transpose(1, 2)
        if k is not None and v is not None and new:
            positions = lengths[:, None] + torch.arange(new)
            pages = table.gather(1, positions // page_size)
            k_cache[pages, positions % page_size] = k
            v_cache[pages, positions % page_size] = v
        key, value = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if block_table is not None:
            paged = fastattn.PagedKVCache.from_pages(
                as_numpy("k_cache", key), as_numpy("v_cache", value), table.numpy(), ends.numpy()
            )
            with pool_of_caller:
                out, lse = paged.attend(query, **options, return_lse=True)
        else:
            options |= {"kv_lengths": ends, "query_offset": ends - q.shape[1]}
            if cache_batch_idx is None and len(key) == batch:
                out, lse = fastattn.torch.attention(query, key, value, **options, return_lse=True)
            else:  # row by row: to gather them would copy the cache
                out, lse = _row_by_row(query, key, value, rows, options)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_axes(ndim: int, axes: str, **tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.device.type != "cpu":
            raise TypeError(f"{name} must be on the CPU, got a tensor on {x.device}: {name}.cpu()")
        if x.ndim != ndim:
            raise ValueError(f"{name} must have shape {axes}, got {name}.shape={tuple(x.shape)}")


def _options(
    softmax_scale: Any, causal: bool, window_size: Any, softcap: float, alibi_slopes: Any
) -> dict[str, Any]:
    """Return flash-attn's words in those of `fastattn.attention`."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), not {window_size!r}")
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    return {
        "scale": softmax_scale,
        "is_causal": bool(causal),
        "window": None if left is right is None else (left, right),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def _unpacked(name: str, x: Tensor, axis: int, count: int) -> tuple[Tensor, ...]:
    if x.shape[axis] != count:
        raise ValueError(
            f"{name} must have {count} entries along axis {axis}, got {name}.shape={tuple(x.shape)}"
        )
    parts: tuple[Tensor, ...] = x.unbind(axis)
    return parts


def _answer(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Any:
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def _starts(name: str, starts: Any) -> Tensor:
    x: Tensor = torch.as_tensor(starts)
    if x.is_floating_point() or x.ndim != 1 or len(x) == 0:
        raise ValueError(
            f"{name} must be integers of shape (batch + 1,), got {name}.shape={tuple(x.shape)} "
            f"and {x.dtype}"
        )
    return x.long()


def _indices(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.is_floating_point() or x.dtype == torch.bool or x.shape != shape:
        raise ValueError(
            f"{name} must be integers of shape {shape}, got {name}.shape={tuple(x.shape)} "
            f"and {x.dtype}"
        )
    return x.long()


def _gathered(pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Return the keys or values of sequences, packed, from the pages that a table names."""
    _check_axes(4, "(pages, page_size, heads, head_dim) with block_table", k=pages)
    table = _indices("block_table", table, (len(lengths), table.shape[-1]))
    size = pages.shape[1]
    if len(lengths) and int(lengths.max()) > table.shape[1] * size:
        raise ValueError(
            f"cu_seqlens_k must be within the {table.shape[1]} x {size} keys that block_table "
            f"names, got a sequence of {int(lengths.max())}"
        )
    parts = [pages[:0].flatten(0, 1)]
    for row, length in zip(table, lengths.tolist(), strict=True):
        used = row[: -(-length // size)]
        if len(used) and not 0 <= int(used.min()) <= int(used.max()) < len(pages):
            raise ValueError(
                f"block_table must be within 0..{len(pages) - 1}, the pages of k, "
                f"got {used.tolist()}"
            )
        parts.append(pages[used].flatten(0, 1)[:length])
    return torch.cat(parts)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return out and lse of sequences whose keys are some rows of a cache, without a copy."""
    batch, heads, q_len, _ = query.shape
    out = query.new_empty((batch, heads, q_len, value.shape[-1]))
    lse = query.new_empty((batch, heads, q_len), dtype=_lse_dtype(query))
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


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# flash_attn.bert_padding.


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of input that indices name."""
    rows: Tensor = input[indices]
    return rows


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return a tensor of first_axis_dim rows: values where indices name them, else 0."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch.

    Parameters
    ----------
    hidden_states : tensor of shape (batch, length, ...)
    attention_mask : tensor of bool or int, shape (batch, length)
        What is a token.
    unused_mask : tensor of bool or int, shape (batch, length), optional
        What else keeps its place.

    Returns
    -------
    tokens : tensor of shape (total, ...)
    indices : tensor of int, shape (total,)
        Where they were, in the flattened batch.
    cu_seqlens : tensor of int32, shape (batch + 1,)
    max_seqlen : int
    seqused : tensor of int32, shape (batch,)
        Tokens of each sequence, without those of unused_mask.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    longest = int(lengths.max()) if len(lengths) else 0
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        longest,
        used,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return the batch of shape (batch, seqlen, ...) that `unpad_input` packed; else 0."""
    whole = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return whole.reshape(batch, seqlen, *whole.shape[1:])


# In the place of the package.


def install() -> Installed:
    """Let ``import flash_attn`` find these functions, until it is undone.

    Never done by itself. `flash_attn`, `flash_attn.flash_attn_interface` and
    `flash_attn.bert_padding` are then modules with the functions of this one.

    Returns
    -------
    Installed
        Undone by its ``close()``, or at the end of a ``with`` statement. What was imported before
        keeps the functions.

    Raises
    ------
    RuntimeError
        flash_attn was imported already, or this was called before.

    Examples
    --------
    >>> import fastattn.flash_attn
    >>> with fastattn.flash_attn.install():
    ...     from flash_attn import flash_attn_func
    >>> flash_attn_func is fastattn.flash_attn.flash_attn_func
    True
    """
    return Installed()


class Installed:
    """The modules that `install` put into sys.modules."""

    def __init__(self) -> None:
        there = sys.modules.get("flash_attn")
        if there is not None:
            which = "by install" if isinstance(there, _Module) else f"from {there.__file__}"
            raise RuntimeError(f"flash_attn must not be imported yet, it is already, {which}")
        here = globals()
        package = _Module("flash_attn", {name: here[name] for name in INTERFACE})
        package.__path__ = []
        package.__version__ = VERSION
        self.modules = {
            "flash_attn": package,
            "flash_attn.flash_attn_interface": _Module(
                "flash_attn.flash_attn_interface", {name: here[name] for name in INTERFACE}
            ),
            "flash_attn.bert_padding": _Module(
                "flash_attn.bert_padding", {name: here[name] for name in PADDING}
            ),
        }
        for name, module in self.modules.items():
            sys.modules[name] = module
            if module is not package:
                setattr(package, name.partition(".")[2], module)

    def close(self) -> None:
        """Take the modules away; those that something else has put there stay."""
        for name, module in self.modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Module(types.ModuleType):
    """A module that stands for one of flash_attn's."""

    __version__: str

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name, f"fastattn.flash_attn in the place of {name}.")
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package="." not in name)
        self.__dict__.update(names)
