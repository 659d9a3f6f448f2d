# SPDX-License-Identifier: Apache-2.0
"""flash_attn.layers.rotary and flash_attn.ops.triton.rotary: rotary embeddings.

A vector's numbers are turned in pairs, by angles that grow with its position: (a, b) becomes
(a cos - b sin, a sin + b cos). The pairs are the two halves of the first rotary_dim numbers, or,
interleaved, neighbours. Half precision is turned in float32, and the result rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastattn.flash_attn._arguments import indices_of, starts_of

if TYPE_CHECKING:
    from torch import Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Return each pair (a, b) as (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Turn x, in the dtypes as they are.

    Parameters
    ----------
    x : tensor of shape (batch, length, heads, head_dim)
    cos, sin : tensor of shape (length, rotary_dim / 2) or (batch, length, rotary_dim / 2)
    interleaved : bool
        The pairs are neighbours, not the two halves.

    Returns
    -------
    tensor of the shape of x
    """
    _check_rotary_dim(x, cos, sin)
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    cos, sin = (
        y.repeat_interleave(2, dim=-1) if interleaved else torch.cat((y, y), dim=-1)
        for y in (cos[..., None, :], sin[..., None, :])
    )
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, rest), dim=-1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first rotary_dim numbers of each vector by its position's angles.

    Parameters
    ----------
    x : tensor of shape (batch, length, heads, head_dim), or (total, heads, head_dim) if cu_seqlens
    cos, sin : tensor of shape (positions, rotary_dim / 2)
        Row p belongs to position p.
    seqlen_offsets : int, or tensor of int of shape (batch,)
        The position of each sequence's first vector.
    cu_seqlens : tensor of int, shape (batch + 1,), optional
        Where each packed sequence starts, and the last one ends.
    max_seqlen : int
        Not needed here, and not read.
    interleaved : bool
        The pairs are neighbours, not the two halves.
    inplace : bool
        Write the result to x, too. Its gradient flows through what is returned; torch refuses any
        further use of x, and of those beside it, if unbind, split or chunk made them.
    conjugate : bool
        Turn the other way.

    Returns
    -------
    tensor of the shape and dtype of x

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; a position has no row in cos and sin.
    """
    out = _rotated(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, conjugate)
    return _overwritten(x, out) if inplace else out


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Do what `apply_rotary` does."""
    return apply_rotary(
        x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace=inplace
    )


apply_rotary_emb_func = apply_rotary_emb


class ApplyRotaryEmb:
    """`apply_rotary_emb`, for programs that call its ``apply``."""

    apply = staticmethod(apply_rotary_emb)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn queries and keys, in place.

    Parameters
    ----------
    qkv : tensor of shape (batch, length, 3, heads, head_dim), or
        (batch, length, num_heads_q + 2 * kv_heads, head_dim)
    cos, sin : tensor of shape (positions, rotary_dim / 2)
    cos_k, sin_k : tensor of shape (positions, rotary_dim / 2), optional
        For the keys; cos and sin unless given.
    interleaved, seqlen_offsets
        As for `apply_rotary`.
    num_heads_q : int
        Needed if qkv has four axes.

    Returns
    -------
    qkv, through which its gradient flows
    """
    queries, keys, values = _parts(qkv, num_heads_q)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    queries = _rotated(queries, cos, sin, seqlen_offsets, None, interleaved)
    keys = _rotated(keys, cos_k, sin_k, seqlen_offsets, None, interleaved)
    together = torch.stack if qkv.ndim == 5 else torch.cat
    return _overwritten(qkv, together((queries, keys, values), dim=2))


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Turn the keys of kv, of shape (batch, length, 2, heads, head_dim), in place; return kv."""
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(
            "kv must have shape (batch, length, 2, heads, head_dim), got "
            f"kv.shape={tuple(kv.shape)}"
        )
    keys = _rotated(kv[:, :, 0], cos, sin, seqlen_offsets, None, interleaved)
    return _overwritten(kv, torch.stack((keys, kv[:, :, 1]), dim=2))


class RotaryEmbedding(torch.nn.Module):
    """Rotary embeddings [1]_ of queries and keys, with their table of angles.

    Parameters
    ----------
    dim : int
        rotary_dim.
    base : float
        Pair i of position p is turned by p * base**(-2 i / dim).
    interleaved : bool
        The pairs are neighbours, not the two halves.
    scale_base : float, optional
        Queries are scaled up and keys down with their distance from the middle of the table, as
        XPos does [2]_.
    pos_idx_in_fp32 : bool
        It is always so.
    device : torch.device, optional

    References
    ----------
    .. [1] Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864
    .. [2] Sun et al., "A Length-Extrapolatable Transformer", 2022, https://arxiv.org/abs/2212.10554
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        pairs = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (pairs + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (pairs / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Make the table again if it is too short, or of another device or dtype."""
        there = self._cos_cached
        if (
            there is not None
            and seqlen <= self._seq_len_cached
            and there.device == device
            and there.dtype == dtype
            and not (self.training and there.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # In float32, whatever the module was cast to: half precision cannot hold the angles.
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        frequencies = self.inv_freq
        if frequencies.dtype != torch.float32:
            frequencies = self._compute_inv_freq(device)
        angles = positions[:, None] * frequencies.to(device)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Turn queries and keys, in place.

        Parameters
        ----------
        qkv : tensor as for `apply_rotary_emb_qkv_`
            With kv: the queries, of shape (batch, length, heads, head_dim).
        kv : tensor of shape (batch, length, 2, kv_heads, head_dim), optional
        seqlen_offset : int, or tensor of int of shape (batch,)
            The position of each sequence's first vector.
        max_seqlen : int
            How many positions the table shall have; needed if seqlen_offset is a tensor.
        num_heads_q : int
            Needed if qkv has four axes, and there is no kv.

        Returns
        -------
        qkv, or (queries, kv)
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            raise ValueError("max_seqlen must be given where seqlen_offset is a tensor, got None")
        cos, sin = self._cos_cached, self._sin_cached
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        how: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, **how, num_heads_q=num_heads_q
            )
        queries = apply_rotary_emb(qkv, cos, sin, inplace=True, **how)
        return queries, apply_rotary_emb_kv_(kv, cos_k, sin_k, **how)


def rows_at(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of cos and sin at these positions; refuse a position without a row."""
    if not torch.compiler.is_compiling() and positions.numel():
        first, last = int(positions.min()), int(positions.max())
        if not 0 <= first <= last < len(cos):
            wrong = first if first < 0 else last
            raise ValueError(
                f"cos and sin must have a row for each position, got {len(cos)} rows and "
                f"position {wrong}"
            )
    return cos[positions], sin[positions]


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """Turn vectors; cos and sin broadcast to them, each row having half as many numbers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, rest = x[..., : 2 * cos.shape[-1]].to(wide), x[..., 2 * cos.shape[-1] :]
    cos, sin = cos.to(wide), sin.to(wide)
    if conjugate:
        sin = -sin
    a, b = (first[..., ::2], first[..., 1::2]) if interleaved else first.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def _rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: int | Tensor,
    starts: Tensor | None,
    interleaved: bool,
    conjugate: bool = False,
) -> Tensor:
    """Do what `apply_rotary` does, not in place."""
    axes = "(batch, length, heads, head_dim)" if starts is None else "(total, heads, head_dim)"
    if x.ndim != (4 if starts is None else 3):
        raise ValueError(f"x must have shape {axes}, got x.shape={tuple(x.shape)}")
    if cos.ndim != 2:
        raise ValueError(
            f"cos must have shape (positions, rotary_dim / 2), got cos.shape={tuple(cos.shape)}"
        )
    _check_rotary_dim(x, cos, sin)
    if starts is None:
        places, count = torch.arange(x.shape[1], device=x.device), len(x)
    else:
        starts = starts_of("cu_seqlens", starts)
        lengths, count = starts.diff(), len(starts) - 1
        if int(starts[0]) != 0 or int(starts[-1]) != len(x) or bool((lengths < 0).any()):
            raise ValueError(
                f"cu_seqlens must ascend from 0 to {len(x)}, the rows of x, got {starts.tolist()}"
            )
        places = torch.arange(len(x), device=x.device) - starts[:-1].repeat_interleave(lengths)
    if isinstance(offsets, torch.Tensor):
        offsets = indices_of("seqlen_offsets", offsets, (count,))
        offsets = offsets[:, None] if starts is None else offsets.repeat_interleave(lengths)
    cos, sin = (y[..., None, :] for y in rows_at(cos, sin, places + offsets))
    return turned(x, cos, sin, interleaved, conjugate)


def _check_rotary_dim(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            "cos and sin must be equally large, with at most head_dim / 2 columns, got "
            f"cos.shape={tuple(cos.shape)}, sin.shape={tuple(sin.shape)}, head_dim={x.shape[-1]}"
        )


def _parts(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, ...]:
    """Return queries, keys and values."""
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if qkv.ndim != 4:
        raise ValueError(
            "qkv must have shape (batch, length, 3, heads, head_dim) or (batch, length, "
            f"num_heads_q + 2 * kv_heads, head_dim), got qkv.shape={tuple(qkv.shape)}"
        )
    kv_heads = 0 if num_heads_q is None else (qkv.shape[2] - num_heads_q) // 2
    if num_heads_q is None or num_heads_q + 2 * kv_heads != qkv.shape[2] or kv_heads < 0:
        raise ValueError(
            "num_heads_q must leave as many heads for keys as for values, got "
            f"num_heads_q={num_heads_q}, qkv.shape={tuple(qkv.shape)}"
        )
    end = num_heads_q + kv_heads
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end], qkv[:, :, end:]


def _overwritten(x: Tensor, out: Tensor) -> Tensor:
    """Write out to the memory of x, and return what has its gradient."""
    if torch.is_grad_enabled() and out.requires_grad:
        # Not x.copy_(out), which torch refuses for a leaf.
        x.detach().copy_(out.detach())
        return out
    return x.copy_(out)
