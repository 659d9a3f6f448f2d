# SPDX-License-Identifier: Apache-2.0
"""The two layouts of flash-attn, as calls of `fastattn.torch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fastattn.torch
from fastattn.flash_attn._arguments import check_axes, gathered_pages, starts_of

if TYPE_CHECKING:
    from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return out and lse of tensors of shape (batch, length, heads, head_dim)."""
    check_axes(4, "(batch, length, heads, head_dim)", q=q, k=k, v=v)
    out, lse = fastattn.torch.attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        **options,
        query_offset=k.shape[1] - q.shape[1],
        return_lse=True,
    )
    return out.transpose(1, 2), lse


def packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, kv_starts: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return out and lse of sequences, packed one after the other."""
    offset = kv_starts.diff() - q_starts.diff()
    return fastattn.torch.varlen_attention(
        q, k, v, q_starts, kv_starts, **options, query_offset=offset, return_lse=True
    )


def packed_arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, block_table: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return k, v and where each sequence starts; keys in pages are copied into one row."""
    check_axes(3, "(total, heads, head_dim)", q=q)
    q_starts = starts_of("cu_seqlens_q", cu_seqlens_q)
    kv_starts = starts_of("cu_seqlens_k", cu_seqlens_k)
    if block_table is not None:
        lengths = kv_starts.diff()
        k, v = (gathered_pages(x, block_table, lengths) for x in (k, v))
        kv_starts = kv_starts - kv_starts[0]
    check_axes(3, "(total, heads, head_dim)", k=k, v=v)
    if len(q_starts) != len(kv_starts):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be equally long, got "
            f"{len(q_starts)} and {len(kv_starts)} entries"
        )
    return k, v, q_starts, kv_starts
