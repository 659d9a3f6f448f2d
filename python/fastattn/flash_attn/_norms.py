# SPDX-License-Identifier: Apache-2.0
"""flash_attn.ops.triton.layer_norm, ops.layer_norm and ops.rms_norm, by torch's operators.

What is normalised is x, scaled and with some of it dropped, plus what is added to it; it is summed
and normalised in float32, or float64 if x is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Normalise x + x1 + residual over the last axis.

    Parameters
    ----------
    x : tensor of shape (..., hidden)
    weight, bias : tensor of shape (hidden,)
    residual, x1 : tensor of the shape of x, optional
    weight1, bias1 : tensor of shape (hidden,), optional
        Make a second result of the same sum.
    eps : float
    dropout_p : float
        Drop entries of x and of x1, with torch's default generator.
    rowscale : tensor of shape (...), optional
        What the rows of x are multiplied by first.
    prenorm : bool
        Return the sum, too, in the dtype of residual; without one in float32 if residual_in_fp32,
        else in that of x.
    zero_centered_weight : bool
        weight + 1 is meant.
    is_rms_norm : bool
        Do not subtract the mean.
    return_dropout_mask : bool
        Return what was kept of x and of x1, too; None where nothing can be dropped.
    out_dtype : torch.dtype, optional
        Of the result; that of x unless given.
    out, residual_out : tensor of the shape of x, optional
        Written to.

    Returns
    -------
    out, or a tuple of those asked for: out, that of weight1, the sum, the two masks.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale must not be given together with x1")
    wide = torch.promote_types(x.dtype, torch.float32)
    total, kept = _dropped(x.to(wide) if rowscale is None else x * rowscale[..., None], dropout_p)
    kept1 = None
    if x1 is not None:
        more, kept1 = _dropped(x1.to(wide), dropout_p)
        total = total + more
    if residual is not None:
        total = total + residual
    pairs = [(weight, bias)] if weight1 is None else [(weight, bias), (weight1, bias1)]
    results: list[Any] = [
        _normalised(total, w + 1.0 if zero_centered_weight else w, b, eps, is_rms_norm).to(
            out_dtype or x.dtype
        )
        for w, b in pairs
    ]
    if out is not None:
        results[0] = out.copy_(results[0])
    if prenorm:
        results.append(total.to(_sum_dtype(x, residual, residual_in_fp32)))
        if residual_out is not None:
            results[-1] = residual_out.copy_(results[-1])
    if return_dropout_mask:
        results += [kept, kept1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Do what `layer_norm_fn` does, without subtracting the mean."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(torch.nn.Module):
    """`rms_norm_fn` with a weight: the RMSNorm of ops.triton.layer_norm and of ops.rms_norm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that it changes nothing."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Normalise x + residual."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Normalise x over the last axis."""
    result: Tensor = layer_norm_fn(x, weight, bias, eps=epsilon)
    return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise x over the last axis, without subtracting the mean."""
    result: Tensor = rms_norm_fn(x, weight, None, eps=epsilon)
    return result


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Normalise dropout(x0 * rowscale * layerscale) + residual over the last axis.

    layerscale has shape (hidden,); the others are as for `layer_norm_fn`. Returns out, the sum if
    prenorm, and what was kept, uint8, if return_dropout_mask.
    """
    options = (rowscale, layerscale, prenorm, residual_in_fp32, return_dropout_mask)
    return _dropout_add(x0, residual, weight, bias, dropout_p, epsilon, *options, False)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Do what `dropout_add_layer_norm` does, without subtracting the mean."""
    options = (rowscale, layerscale, prenorm, residual_in_fp32, return_dropout_mask)
    return _dropout_add(x0, residual, weight, bias, dropout_p, epsilon, *options, True)


class DropoutAddLayerNorm(torch.nn.Module):
    """`dropout_add_layer_norm` with a weight and a bias."""

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            None
            if self.is_rms_norm
            else torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)),
        )

    def reset_parameters(self) -> None:
        """Set weight and bias so that they change nothing."""
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise dropout(x0) + residual."""
        call = dropout_add_rms_norm if self.is_rms_norm else dropout_add_layer_norm
        return call(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """`dropout_add_rms_norm` with a weight."""

    is_rms_norm = True


def _dropout_add(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    """Do what `dropout_add_layer_norm` and `dropout_add_rms_norm` do."""
    total = x0.to(torch.promote_types(x0.dtype, torch.float32))
    for scale in (None if rowscale is None else rowscale[..., None], layerscale):
        total = total if scale is None else total * scale
    total, kept = _dropped(total, dropout_p)
    if residual is not None:
        total = total + residual
    results = [_normalised(total, weight, bias, epsilon, is_rms_norm).to(x0.dtype)]
    if prenorm:
        results.append(total.to(_sum_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        mask = torch.ones_like(x0, dtype=torch.bool) if kept is None else kept
        results.append(mask.to(torch.uint8))
    return results[0] if len(results) == 1 else tuple(results)


def _dropped(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Return what dropout leaves of x, and which entries; None if nothing can be dropped."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be within 0..1, and less than 1, got {dropout_p}")
    if dropout_p == 0:
        return x, None
    kept = torch.rand_like(x) >= dropout_p
    return torch.where(kept, x / (1 - dropout_p), 0.0), kept


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool
) -> Tensor:
    centered = x if is_rms_norm else x - x.mean(-1, keepdim=True)
    scaled = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    out = scaled * weight.to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


def _sum_dtype(x: Tensor, residual: Tensor | None, in_float32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if in_float32 else x.dtype
