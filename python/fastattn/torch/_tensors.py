# SPDX-License-Identifier: Apache-2.0
"""Tensors as NumPy arrays, and back, without a copy, by the rules of `_arrays.py`.

Of bfloat16, the bits are passed on, so that ml_dtypes is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastattn._arrays import (
    BFLOAT16_BITS,
    array_of_tensor,
    check_tensor,
    overridden,
    tensor_of_array,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN = {Tensor, torch.nn.Parameter}  # of no other library, or mode of torch
ORDINARY = PLAIN | {type(None), int, float, list, tuple, np.ndarray}  # as arguments go
CAUSAL_BIAS = ("torch.nn.attention.bias", "CausalBias")  # a module that takes seconds to import
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKS = (torch.bool, *FLOATS)


def array_of(name: str, x: Tensor) -> NDArray[Any]:
    """Return the array that a tensor's memory is, whatever gradients it requires.

    Raises
    ------
    TypeError
        There is no such memory: the tensor is quantised, sparse, nested, without data, or not on
        the CPU.
    """
    if type(x) in PLAIN and x.dtype is not torch.bfloat16:
        try:
            whole: NDArray[Any] = x.detach().numpy()
        except (TypeError, RuntimeError):  # why is said below
            pass
        else:
            if x.data_ptr() or not whole.size:
                return whole
    check_tensor(torch, name, x)
    return array_of_tensor(torch, name, x)


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Return the tensor that an array's memory is."""
    return tensor_of_array(torch, array)


def small_array_of(name: str, x: Any) -> Any:
    """Return what is given as one number per batch element or head; float64 if it is bfloat16."""
    if not isinstance(x, Tensor):
        return x
    array = array_of(name, x)
    return array_of(name, x.double()) if array.dtype == BFLOAT16_BITS else array


def check(name: str, x: Any) -> None:
    """Accept a tensor whose values lie in the memory of the CPU, or of a GPU, as strides tell.

    One whose class overrides how operators run is accepted too: it sees ours, and knows what it is.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if type(x) not in PLAIN:
        check_class(name, x)
    check_tensor(torch, name, x, on_gpu=x.is_cuda)


def check_class(name: str, x: Tensor) -> None:
    """Refuse a tensor of a class for which functions of torch mean something else."""
    if is_causal_bias(x):
        raise TypeError(
            f"{name} must not be a CausalBias here: say is_causal=True, with query_offset=0 for an "
            "upper left one, kv_len - q_len for a lower right one"
        )
    if overridden(torch, type(x)) == "__torch_function__":
        raise TypeError(
            f"{name} must be a tensor that is its numbers, got a {type(x).__name__}: the class "
            "overrides __torch_function__, and does not know this function"
        )


def is_causal_bias(x: Any) -> bool:
    """Tell whether x is torch's own name for a causal mask: a tensor with nothing in its memory."""
    return type(x) not in PLAIN and (type(x).__module__, type(x).__name__) == CAUSAL_BIAS


def causal_offset(bias: Any) -> int:
    """Return where the first query stands, by torch's rule."""
    if bias.variant.name == "UPPER_LEFT":
        return 0
    return int(bias.seq_len_kv - bias.seq_len_q)


def causal_mask(bias: Any, is_causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """Return the attn_mask and is_causal by which torch's function is told what a CausalBias is."""
    if is_causal:
        raise ValueError("attn_mask must not be a CausalBias together with is_causal=True")
    offset = causal_offset(bias)
    if offset == 0:
        return None, True
    every = torch.ones(bias.seq_len_q, bias.seq_len_kv, dtype=torch.bool, device=device)
    return every.tril(offset), False
