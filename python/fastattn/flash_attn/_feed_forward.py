# SPDX-License-Identifier: Apache-2.0
"""flash_attn.ops.fused_dense and flash_attn.modules.mlp, by torch's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Linear, Module, functional

from fastattn.flash_attn._activations import gelu_fwd, sqrelu_fwd, swiglu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ACTIVATIONS: dict[str, Any] = {
    "gelu_approx": gelu_fwd,
    "relu": functional.relu,
    "sqrelu": sqrelu_fwd,
}


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """Return x @ weight.T + bias, and x if return_residual."""
    _refuse(process_group)
    out = functional.linear(x, weight, bias)
    return (out, x) if return_residual else out


class FusedDense(Linear):
    """torch.nn.Linear that can return its input, too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """Return x @ weight.T + bias, and x if return_residual."""
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """Return activation(x @ weight1.T + bias1) @ weight2.T + bias2, and x if return_residual.

    activation is "gelu_approx", "relu" or "sqrelu". save_pre_act, checkpoint_lvl and heuristic
    change nothing.
    """
    _refuse(process_group)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, not {activation!r}")
    hidden = ACTIVATIONS[activation](functional.linear(x, weight1, bias1))
    out = functional.linear(hidden, weight2, bias2)
    return (out, x) if return_residual else out


class FusedMLP(Module):
    """`fused_mlp_func` with weights and biases."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Any = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, not {activation!r}")
        hidden = in_features * 4 if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation = activation
        self.return_residual = return_residual
        self.fc1 = Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """Return the result, and x if return_residual."""
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            return_residual=self.return_residual,
            process_group=process_group,
        )


class Mlp(Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[..., Any] = functional.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = in_features * 4 if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.activation = activation
        self.fc1 = Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """Return the result, and x if return_residual."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(Module):
    """Two linear layers; half of the first one's result is a gate for the other half."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[..., Any] = functional.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.activation = activation
        self.fc1 = Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """Return the result, and x if return_residual."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        silu = self.activation is functional.silu
        y = self.fc2(swiglu(gate, y) if silu else y * self.activation(gate))
        return (y, x) if self.return_residual else y


def _refuse(process_group: Any) -> None:
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        raise NotImplementedError(
            "process_group is not supported: fastattn has no tensor parallelism"
        )
