# SPDX-License-Identifier: Apache-2.0
"""What a drop-in needs to call the kernels with tensors: the door for the drop-ins beside this one.

`fastattn.flash_attn` and `fastattn.transformers` import from this module, and from no other private
one of `fastattn.torch`: tensors as NumPy arrays and back, without a copy, by the rules of
`_arrays.py`; the seed of a call's dropout; the threads that a call runs in. Arrays of bfloat16 hold
its bits, so that ml_dtypes is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

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
MOST_SEEDS = 2**63 - 1  # torch's generator draws from no more


def array_of(name: str, x: Tensor) -> NDArray[Any]:
    """Return the array that shares a tensor's memory, whether or not the tensor requires grad.

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
    """Return the tensor that shares an array's memory."""
    return tensor_of_array(torch, array)


def small_array_of(name: str, x: Any) -> Any:
    """Return a tensor of numbers per head or sequence as an array, bfloat16 as float64."""
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
    """Tell whether x is torch's CausalBias, a tensor that stands for a mask and has no numbers."""
    return type(x) not in PLAIN and (type(x).__module__, type(x).__name__) == CAUSAL_BIAS


def result_like(query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor for the result: laid out like query, as torch's own function does."""
    return torch.empty_like(query) if query.shape == shape else query.new_empty(shape)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of lse for a query of `dtype`, which is what the kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn_dropout(dropout_p: float) -> dict[str, Any]:
    """Return the options of dropout, with a seed from torch's default generator where one counts.

    Without dropout none is drawn.
    """
    seed: int | Tensor | None = None
    if dropout_p > 0:
        seed = torch.randint(MOST_SEEDS, (), device="cpu")
        if not (torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0):
            seed = int(seed)
    return {"dropout_p": dropout_p, "seed": seed}
