# SPDX-License-Identifier: Apache-2.0
"""The attention of one layer: what transformers calls in every one.

The call itself is `fastattn.torch.attention`; `varlen_attention` where sequences are packed in a
row (`_packed.py`); under `context_parallel`, attention over ranks (`_ranks.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing

import fastattn
import fastattn.torch
from fastattn.torch._context_parallel import active
from fastattn.torch._tensors import drawn_dropout
from fastattn.transformers import _packed, _ranks
from fastattn.transformers._mask import Pattern


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of one layer, as transformers calls for it.

    Parameters
    ----------
    module : Module
        The layer; its `is_causal`, False if it has none, counts where is_causal is None.
    query : Tensor of shape (batch, q_heads, q_len, head_dim)
    key : Tensor of shape (batch, kv_heads, kv_len, head_dim)
    value : Tensor of shape (batch, kv_heads, kv_len, value_head_dim)
    attention_mask : Tensor, broadcastable to (batch, q_heads, q_len, kv_len), optional
        What `mask` has returned, or what the caller of the model gave: bool, or added. If None
        and the layer is causal, query i sees key j iff j <= i; a single query sees all keys.
    dropout, scaling, softcap
        dropout_p, scale and softcap of `fastattn.attention`; no dropout unless module.training.
    s_aux : Tensor of shape (q_heads,), optional
        Sinks.
    position_bias : Tensor, broadcastable to (batch, q_heads, q_len, kv_len), optional
        Added to the scores.
    output_attentions : bool
        Return the probabilities.
    **others
        What else the model was called with: cu_seq_lens_q and cu_seq_lens_k say where packed
        sequences start, which see themselves alone. sliding_window is in the mask already.

    Returns
    -------
    out : Tensor of shape (batch, q_len, q_heads, value_head_dim)
    weights : Tensor of shape (batch, q_heads, q_len, kv_len), or None
        Without dropout, and without a gradient.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    options: dict[str, Any] = {"bias": position_bias, "scale": scaling}
    options |= {"softcap": softcap, "sinks": s_aux}
    weighed = bool(output_attentions) or _collected()
    ranks = getattr(attention_mask, "ranks", None) or active()
    if ranks is not None:
        _refuse(module, attention_mask, s_aux, others)
        operands = (query, key, value, attention_mask, bool(is_causal))
        dropout_p = dropout if module.training else 0.0
        out = _ranks.attention(ranks, module, *operands, options, dropout_p, others, weighed)
        return out.contiguous(), None
    chunk_size = getattr(attention_mask, "chunk_size", None)
    if type(attention_mask) is Pattern and attention_mask.is_made:
        attention_mask = attention_mask.whole()
    _refuse(module, attention_mask, s_aux, others)
    seen: dict[str, Any]
    if type(attention_mask) is Pattern:
        _check_lengths(attention_mask, query, key)
        seen = attention_mask.seen()
    elif attention_mask is not None:
        seen = {"mask": attention_mask}
    else:
        seen = {"is_causal": True, "query_offset": 0} if is_causal and query.shape[2] > 1 else {}
    dropped = drawn_dropout(dropout) if dropout > 0 and module.training else {}
    if "starts" in seen or _packed.are_told(others):
        out, seen = _packed.attention(
            query, key, value, seen, options | dropped, others, weighed, chunk_size
        )
    else:
        out = fastattn.torch.attention(query, key, value, **seen, **options, **dropped)
        out = out.transpose(1, 2)
    weights = _weights(query, key, seen | options) if weighed else None
    return out.contiguous(), weights


def _refuse(
    module: torch.nn.Module,
    attention_mask: Tensor | None,
    s_aux: Tensor | None,
    others: dict[str, Any],
) -> None:
    """Refuse arguments that would change the result, and that are not supported."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, not {type(attention_mask).__name__}")
    for name, what in (
        ("indices", "sparse attention by indices of keys"),
        ("block_indices", "sparse attention by indices of blocks"),
        ("sinks", "sinks that differ from token to token"),
        ("read_index", "continuous batching"),
    ):
        if others.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation='fastattn' has no {what} ({name}), as "
                f"{type(module).__name__} asks for"
            )
    if s_aux is None and isinstance(module._parameters.get("sinks"), Tensor):
        raise NotImplementedError(
            f"{type(module).__name__} has sinks, and does not pass them to "
            "attn_implementation='fastattn' as s_aux"
        )
    if attention_mask is not None and attention_mask.dim() < 3:
        raise ValueError(
            "attention_mask must have the axes (batch, heads, q_len, kv_len) where a layer gets "
            f"it, got attention_mask.shape={tuple(attention_mask.shape)}"
        )


def _check_lengths(mask: Pattern, query: Tensor, key: Tensor) -> None:
    """Refuse a mask made for other lengths than the queries and keys that arrive."""
    batch, _, q_len, kv_len = mask.shape
    if batch not in (1, len(query)) or (q_len, kv_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            "attention_mask must have the lengths of query and key, got attention_mask.shape="
            f"{tuple(mask.shape)}, query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )


def _collected() -> bool:
    """Tell whether the model returns what its layers return as weights.

    Not every model passes output_attentions on to its layers.
    """
    if torch.compiler.is_compiling():
        return False
    collected = output_capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _weights(query: Tensor, key: Tensor, seen: dict[str, Any]) -> Tensor:
    """Return the probabilities, in the dtype of query."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "attn_implementation='fastattn' has no output_attentions under torch.compile"
        )
    exact = {
        name: _wide(x.detach()) if isinstance(x, Tensor) else x
        for name, x in (("query", query), ("key", key), *seen.items())
    }
    weights: Tensor = fastattn.attention_weights(**exact)
    return weights.to(query.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor that NumPy knows: float32 if it is of half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
