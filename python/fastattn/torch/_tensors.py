# SPDX-License-Identifier: Apache-2.0
"""Tensors as NumPy arrays, and back, without a copy. The only place that knows how.

NumPy has no bfloat16 of its own: such a tensor is seen as its bits, in a dtype that every call of
fastattn takes for it (`_arguments.BFLOAT16_BITS`), so that ml_dtypes is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastattn._arguments import BFLOAT16_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN = {Tensor, torch.nn.Parameter}  # of no other library, or mode of torch
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
            return whole
    check(name, x)
    x = x.detach().resolve_neg()
    if x.dtype is torch.bfloat16:
        bits: NDArray[Any] = x.view(torch.int16).numpy().view(BFLOAT16_BITS)
        return bits
    try:
        array: NDArray[Any] = x.numpy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be a plain tensor: {error}") from error
    return array


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Return the tensor that an array's memory is."""
    if array.dtype == BFLOAT16_BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def small_array_of(name: str, x: Any) -> Any:
    """Return what is given as one number per batch element or head; float64 if it is bfloat16."""
    if not isinstance(x, Tensor):
        return x
    array = array_of(name, x)
    return array_of(name, x.double()) if array.dtype == BFLOAT16_BITS else array


def check(name: str, x: Any) -> None:
    """Accept a tensor whose values lie in the CPU's memory, one after the other."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.device.type != "cpu":
        raise TypeError(f"{name} must be on the CPU, got {name}.device={x.device}")
    if x.is_nested:
        raise TypeError(f"{name} must not be nested, got a nested tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {name}.layout={x.layout}")
    if x.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {name}.dtype={x.dtype}")
