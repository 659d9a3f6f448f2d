# SPDX-License-Identifier: Apache-2.0
"""flash_attn.modules.mha: attention as modules of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Dropout, Linear, Module
from torch.utils.checkpoint import checkpoint

import fastattn.torch
from fastattn.flash_attn._functions import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastattn.flash_attn._rotary import RotaryEmbedding
from fastattn.torch._tensors import drawn_dropout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class InferenceParams:
    """The cache of a model of `MHA`, and where its sequences stand."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0  # keys that there are
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)  # by layer_idx
    lengths_per_sample: Tensor | None = None  # instead of seqlen_offset, for each sequence

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def get_alibi_slopes(nheads: int) -> list[float]:
    """Return the slopes of ALiBi (https://arxiv.org/abs/2108.12409) for so many heads."""
    whole = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    if whole < nheads:  # those between the others, from the next power of 2
        slopes += get_alibi_slopes(2 * whole)[::2][: nheads - whole]
    return slopes


class _Attention(Module):
    """What the four modules of attention without weights share."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = Dropout(attention_dropout)

    def _dropout_p(self) -> float:
        return float(self.drop.p) if self.training else 0.0


class FlashSelfAttention(_Attention):
    """Attention of queries, keys and values in one tensor; dropout where the module is training.

    Parameters
    ----------
    causal, softmax_scale, window_size, alibi_slopes, deterministic
        As for `fastattn.flash_attn.flash_attn_func`.
    attention_dropout : float
        Its dropout_p.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self._dropout_p(),
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        """Compute attention of qkv of shape (batch, length, 3, heads, head_dim).

        With cu_seqlens of shape (total, 3, heads, head_dim). causal, if given, is meant instead of
        the module's own.
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        longest = 0 if max_seqlen is None else max_seqlen
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, **self._options(causal))


class FlashCrossAttention(FlashSelfAttention):
    """Attention of queries, and of keys and values in one tensor, as `FlashSelfAttention`."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        """Compute attention of q (batch, q_len, heads, head_dim) over kv (batch, kv_len, 2, ...).

        With cu_seqlens and cu_seqlens_k of shapes (total_q, ...) and (total_k, 2, ...).
        """
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k must be given with cu_seqlens, got None")
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, 0, 0, **self._options(causal)
        )


class SelfAttention(_Attention):
    """Attention of queries, keys and values in one tensor, with a mask of padding."""

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Compute attention of qkv of shape (batch, length, 3, heads, head_dim).

        key_padding_mask, bool of shape (batch, length), tells which keys there are.
        """
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return _masked(self, q, k, v, self.causal if causal is None else causal, key_padding_mask)


class CrossAttention(_Attention):
    """Attention of queries, and of keys and values in one tensor, with a mask of padding."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute attention of q (batch, q_len, heads, head_dim) over kv (batch, kv_len, 2, ...).

        key_padding_mask, bool of shape (batch, kv_len), tells which keys there are. If causal, the
        last query stands at the last of them.
        """
        k, v = (x.transpose(1, 2) for x in kv.unbind(2))
        offset: Any = k.shape[2] - q.shape[1]
        if key_padding_mask is not None:
            offset = key_padding_mask.sum(-1) - q.shape[1]
        causal = self.causal if causal is None else causal
        return _masked(self, q.transpose(1, 2), k, v, causal, key_padding_mask, offset)


def _masked(
    module: _Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    kept: Tensor | None,
    offset: Any = 0,
) -> Tensor:
    out = fastattn.torch.attention(
        q,
        k,
        v,
        mask=None if kept is None else kept.bool()[:, None, None],
        scale=module.softmax_scale,
        is_causal=causal,
        query_offset=offset if causal else None,
        **drawn_dropout(module._dropout_p()),
    )
    return out.transpose(1, 2)


class MHA(Module):
    """Multi-head attention with its linear layers, rotary embedding and cache.

    Its parameters have the names and shapes of flash-attn's: Wqkv (or Wq and Wkv) and out_proj.

    Parameters
    ----------
    embed_dim, num_heads : int
    num_heads_kv : int, optional
        num_heads unless given.
    cross_attn : bool
        Keys and values are of another sequence, x_kv.
    qkv_proj_bias, out_proj_bias : bool
    dropout : float
    softmax_scale, causal, window_size
        As for `fastattn.flash_attn.flash_attn_func`.
    layer_idx : int
        The layer's key in a cache; needed for one.
    rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved
        As for `RotaryEmbedding`; dim 0 is none.
    use_alibi : bool
    use_flash_attn : bool
        Packed sequences instead of a mask of padding.
    return_residual : bool
        Return x, too.
    checkpointing : bool
        Compute attention again in the backward pass.
    dwconv : bool
        Not supported.
    fused_bias_fc : bool
        Changes nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % kv_heads or embed_dim % num_heads:
            raise ValueError(
                "num_heads must be a multiple of num_heads_kv, and divide embed_dim, got "
                f"num_heads={num_heads}, num_heads_kv={kv_heads}, embed_dim={embed_dim}"
            )
        if dwconv:
            raise NotImplementedError("dwconv is not supported: convolve x before the call")
        if not use_flash_attn and (use_alibi or tuple(window_size) != (-1, -1)):
            raise ValueError("use_alibi and window_size need use_flash_attn=True")
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("rotary_emb_dim must be 0 with cross_attn")
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.dwconv, self.rotary_emb_dim = dwconv, rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual, self.checkpointing = return_residual, checkpointing
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        where = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * kv_heads
        if cross_attn:
            self.Wq = Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **where)
            self.Wkv = Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **where)
        else:
            self.Wqkv = Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **where)
        inner: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            inner |= {"alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**inner)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**inner)
        self.out_proj = Linear(embed_dim, embed_dim, bias=out_proj_bias, **where)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> Any:
        """Return room for keys and values, of shape (batch, max_seqlen, 2, kv_heads, head_dim)."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return weight.new_empty(shape, dtype=dtype, requires_grad=False)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the layer.

        Parameters
        ----------
        x : tensor of shape (batch, length, embed_dim), or (total, embed_dim) with cu_seqlens
        x_kv : tensor, optional
            What keys and values are made of, if cross_attn.
        key_padding_mask : tensor of bool, shape (batch, length), optional
            Which keys there are; not with use_flash_attn.
        cu_seqlens, max_seqlen
            Of packed sequences; with use_flash_attn, and without a rotary embedding.
        mixer_subset : optional
            Index of the positions of x that ask, if cross_attn.
        inference_params : InferenceParams, optional
            A cache.
        **kwargs
            For the module of attention.

        Returns
        -------
        tensor of the shape of x; (that, x) if return_residual
        """
        self._check(key_padding_mask, cu_seqlens, x_kv, mixer_subset, inference_params)
        if self.use_flash_attn:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            kwargs |= {"key_padding_mask": key_padding_mask}
        q, kv = self._projected(x, x_kv, mixer_subset)
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv, *self._place(inference_params))
        if inference_params is not None:
            context = self._cached(q, kv, inference_params)
        elif self.cross_attn or self.num_heads_kv != self.num_heads:
            if cu_seqlens is not None and not self.cross_attn:
                kwargs.setdefault("cu_seqlens_k", cu_seqlens)
            context = self._run(self.inner_cross_attn, q, kv, **kwargs)
        else:
            qkv = torch.cat((q[..., None, :, :], kv), dim=-3)
            context = self._run(self.inner_attn, qkv, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check(
        self, mask: Any, cu_seqlens: Any, x_kv: Any, mixer_subset: Any, inference_params: Any
    ) -> None:
        if mask is not None and self.use_flash_attn:
            raise ValueError("key_padding_mask must not be given with use_flash_attn")
        if cu_seqlens is not None and (not self.use_flash_attn or self.rotary_emb_dim > 0):
            raise ValueError("cu_seqlens needs use_flash_attn=True and rotary_emb_dim=0")
        if inference_params is not None and (mask is not None or cu_seqlens is not None):
            raise ValueError(
                "inference_params must be given without key_padding_mask and cu_seqlens"
            )
        if not self.cross_attn and (x_kv is not None or mixer_subset is not None):
            raise ValueError("x_kv and mixer_subset need cross_attn=True")

    def _projected(self, x: Tensor, x_kv: Tensor | None, subset: Any) -> tuple[Tensor, Tensor]:
        """Return queries (..., heads, head_dim), and keys and values (..., 2, kv_heads, ...)."""
        if self.cross_attn:
            q = self.Wq(x if subset is None else x[:, subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            qkv = self.Wqkv(x)  # not split: torch refuses to write to parts made so
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

    def _place(self, params: Any) -> tuple[Any, int | None]:
        """Return where each sequence stands, and how many positions there are."""
        if params is None:
            return 0, None
        return self._lengths(params), params.max_seqlen

    def _lengths(self, params: Any) -> Any:
        per_sample = getattr(params, "lengths_per_sample", None)
        return params.seqlen_offset if per_sample is None else per_sample

    def _run(self, module: Module, *arrays: Tensor, **kwargs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(module, *arrays, use_reentrant=False, **kwargs)
            return again
        out: Tensor = module(*arrays, **kwargs)
        return out

    def _cached(self, q: Tensor, kv: Tensor, params: Any) -> Tensor:
        """Append to the cache, and return the attention over all it then holds."""
        if self.layer_idx is None:
            raise ValueError("layer_idx must be given to the constructor for a cache")
        caches = params.key_value_memory_dict
        if self.layer_idx not in caches:
            shape = (params.max_batch_size, params.max_seqlen, *kv.shape[2:])
            caches[self.layer_idx] = kv.new_zeros(shape)
        begin = getattr(params, "batch_size_offset", 0)
        cache = caches[self.layer_idx][begin : begin + len(q)]
        if self.use_flash_attn and params.seqlen_offset > 0:
            inner = self.inner_cross_attn
            out: Tensor = flash_attn_with_kvcache(
                q,
                cache[:, :, 0],
                cache[:, :, 1],
                kv[:, :, 0].to(cache.dtype),
                kv[:, :, 1].to(cache.dtype),
                cache_seqlens=self._lengths(params),
                softmax_scale=inner.softmax_scale,
                causal=inner.causal,
                window_size=inner.window_size,
                alibi_slopes=inner.alibi_slopes,
            )
            return out
        end = params.seqlen_offset + kv.shape[1]
        if end > cache.shape[1]:
            raise ValueError(
                f"the cache must have room for {end} keys, it has max_seqlen={cache.shape[1]}"
            )
        with torch.no_grad():
            cache[:, params.seqlen_offset : end] = kv
        result: Tensor = self.inner_cross_attn(q, cache[:, :end])
        return result
