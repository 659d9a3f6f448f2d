# SPDX-License-Identifier: Apache-2.0
"""flash_attn.ops.activations: activations and their gradients, by torch's operators.

gelu is its approximation by tanh. Half precision is computed in float32, and the result rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def gelu_fwd(x: Tensor) -> Tensor:
    """Return gelu(x)."""
    return functional.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return g times the derivative of gelu at x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad: Tensor = torch.ops.aten.gelu_backward(g.to(wide), x.to(wide), approximate="tanh")
    return grad.to(x.dtype)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(y + bias), in the dtype of y."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `bias_gelu` by y, of shape (rows, columns), and by bias."""
    grad = gelu_bwd(g, y + bias)
    return grad.to(y.dtype), grad.sum(dim=0, dtype=bias.dtype)


bias_gelu_impl = bias_gelu
fast_gelu_impl = gelu_fwd


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return g where x >= 0, else 0."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """Return relu(x) squared."""
    return functional.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return g times the derivative of relu(x) squared."""
    return (2.0 * g * functional.relu(x)).to(x.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """Return silu(x) * y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (functional.silu(x.to(wide)) * y).to(x.dtype)


swiglu_fwd = swiglu


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return g times the derivatives of `swiglu` by x and by y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, of_sigmoid = g.to(wide), torch.sigmoid(x.to(wide))
    dx = of_sigmoid * (1 + x * (1 - of_sigmoid)) * grad * y
    return dx.to(x.dtype), (x * of_sigmoid * grad).to(y.dtype)
