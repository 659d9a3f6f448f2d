# SPDX-License-Identifier: Apache-2.0
"""Tensors as NumPy arrays, and back, without a copy, by the rules of `_arrays.py`.

Of bfloat16, the bits are passed on, so that ml_dtypes is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn._arrays import BFLOAT16_BITS, array_of_tensor, check_tensor, tensor_of_array

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
    """Accept a tensor whose values lie in the memory of the CPU, or of a GPU, as strides tell."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    check_tensor(torch, name, x, on_gpu=x.is_cuda)
