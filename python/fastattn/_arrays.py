# SPDX-License-Identifier: Apache-2.0
"""Whose array is this? Tensors of PyTorch and arrays of JAX, to NumPy and back.

`as_numpy` is asked by `_arguments.py` about everything that is no NumPy array, `answer` by the
calls for what they return: the result is of the kind of query, whatever the other arguments are.
Nothing is copied that NumPy can read in place. Neither framework is imported here: an array of one
cannot be met before somebody imported it.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# NumPy has no bfloat16 of its own: without ml_dtypes, its bits are passed on.
BFLOAT16_BITS = np.dtype("V2")
INTERFACE = "__cuda_array_interface__"
DLPACK_CUDA, DLPACK_CUDA_MANAGED = 2, 13  # DLPack's names of memory that a GPU reads
GPU_PLATFORMS = ("gpu", "cuda")  # of JAX
JAX_ALIGNMENT = 64  # bytes: what lies so is not copied on its way to JAX


def framework(x: Any) -> Any:
    """Return the module torch or jax if x is an array of it, else None."""
    for name, array in (("torch", "Tensor"), ("jax", "Array")):
        module = sys.modules.get(name)
        kind = getattr(module, array, None)
        if kind is not None and isinstance(x, kind):
            return module
    return None


def is_cuda_array(x: Any) -> bool:
    """Tell whether x, which is no NumPy array, is an array on a GPU, for `fastattn.cuda`."""
    module = framework(x)
    if module is None:
        if hasattr(x, INTERFACE):
            return True
        where = getattr(x, "__dlpack_device__", None)
        return where is not None and where()[0] in (DLPACK_CUDA, DLPACK_CUDA_MANAGED)
    if module.__name__ == "torch":
        return bool(x.is_cuda)
    traced = isinstance(x, module.core.Tracer)
    return not traced and any(each.platform in GPU_PLATFORMS for each in x.devices())


def as_numpy(name: str, x: Any) -> Any:
    """Return a view of a tensor or a JAX array; anything else as it is."""
    module = framework(x)
    if module is None:
        return x
    return (_of_torch if module.__name__ == "torch" else _of_jax)(module, name, x)


def destination(query: Any, out: Any) -> Any:
    """Return a view of the out that was given beside query; as it is if query is of NumPy."""
    module = framework(query)
    if module is None:
        return out
    if module.__name__ == "jax":
        raise TypeError("out must not be given if query is a JAX array: these are never written")
    if framework(out) is not module:
        raise TypeError(f"out must be a tensor, as query is, not {type(out).__name__}")
    if out.is_neg():
        raise ValueError("out must be written as it is, got a tensor whose negative bit is set")
    return _of_torch(module, "out", out)


def room(query: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array for a result that becomes what query is."""
    module = framework(query)
    if module is None or module.__name__ != "jax":
        return np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    space = np.empty(size + JAX_ALIGNMENT, np.uint8)
    start = -space.ctypes.data % JAX_ALIGNMENT
    return space[start : start + size].view(dtype).reshape(shape)


def answer(query: Any, out: Any, *results: Array | None) -> Any:
    """Return results as what query is; the first as the out that was given, unless None."""
    module = framework(query)
    if module is None:
        return results
    convert = _to_torch if module.__name__ == "torch" else _to_jax
    if out is None:
        return tuple(x if x is None else convert(module, x, query) for x in results)
    if not out.is_inference():
        module.autograd.graph.increment_version(out)  # it was written without torch's knowledge
    return out, *(x if x is None else convert(module, x, query) for x in results[1:])


def _of_torch(torch: Any, name: str, x: Any) -> Array:
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, and this call has no gradient: use fastattn.torch.attention, "
            f"or pass {name}.detach()"
        )
    check_tensor(torch, name, x)
    array = array_of_tensor(torch, name, x)
    return array.view(_bfloat16(array.dtype)) if array.dtype == BFLOAT16_BITS else array


def check_tensor(torch: Any, name: str, x: Any, on_gpu: bool = False) -> None:
    """Accept a tensor whose values lie, as strides tell, in the memory of the CPU, or of a GPU."""
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, not a nested one (fastattn.varlen_attention takes the "
            "values and offsets of jagged ones)"
        )
    if x.device.type == "meta":
        raise TypeError(f"{name} must hold numbers, got a tensor on the device meta")
    if x.device.type != ("cuda" if on_gpu else "cpu"):
        raise TypeError(f"{name} must be on the CPU, got a tensor on {x.device}: {name}.cpu()")
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {x.layout}: {name}.to_dense()"
        )
    if x.is_quantized:
        raise TypeError(
            f"{name} must not be quantised, got a tensor of {x.dtype}: {name}.dequantize()"
        )


def array_of_tensor(torch: Any, name: str, x: Any) -> Array:
    """Return the array that such a tensor's memory is; of bfloat16, its bits."""
    try:
        x = x.detach().resolve_neg()
        if x.dtype == torch.bfloat16:
            bits: Array = x.view(torch.int16).numpy().view(BFLOAT16_BITS)
            return bits
        array: Array = x.numpy()
    except (RuntimeError, TypeError) as error:  # wrapped, faked, or of a dtype that NumPy lacks
        raise TypeError(
            f"{name} must be a tensor that NumPy can read, got {x.dtype} in a "
            f"{type(x).__name__}: {error}"
        ) from error
    return array


def tensor_of_array(torch: Any, x: Array) -> Any:
    """Return the tensor that an array's memory is."""
    if x.dtype == BFLOAT16_BITS or x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def rounded_to(dtype: np.dtype[Any], x: Array) -> Array:
    """Return float32 or float64 numbers in a narrower dtype, if it is one; bits too."""
    if dtype != BFLOAT16_BITS:
        return x.astype(dtype, copy=False)
    single = x.astype(np.float32)
    bits = single.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)  # of a NaN, it might be Inf
    kept = np.where(np.isnan(single), bits | 0x400000, nearest)
    return (kept >> 16).astype(np.uint16).view(BFLOAT16_BITS)


def widened(x: Array) -> Array:
    """Return numbers that NumPy can add: float32 if they are bits of bfloat16."""
    if x.dtype != BFLOAT16_BITS:
        return x
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_torch(torch: Any, x: Array, _query: Any) -> Any:
    return tensor_of_array(torch, x)


def _bfloat16(bits: np.dtype[Any]) -> np.dtype[Any]:
    """Return NumPy's name for bfloat16, if it has one."""
    try:
        import ml_dtypes
    except ImportError:
        return bits
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _of_jax(jax: Any, name: str, x: Any) -> Array:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced by JAX (in jit, grad or vmap): use "
            "fastattn.jax.dot_product_attention there"
        )
    if x.is_deleted():
        raise ValueError(f"{name} must hold numbers, got an array that was deleted or donated")
    if not x.is_fully_addressable:
        raise TypeError(
            f"{name} must be in this process, got an array that is partly in others: "
            f"jax.experimental.multihost_utils.process_allgather({name})"
        )
    devices = sorted(map(str, x.devices()))
    if len(devices) != 1 or next(iter(x.devices())).platform != "cpu":
        raise TypeError(
            f"{name} must be on one CPU device, got an array on {', '.join(devices)}: "
            f"jax.device_put({name}, jax.devices('cpu')[0])"
        )
    try:
        return np.asarray(x)
    except (RuntimeError, TypeError) as error:  # the keys of random numbers, for one
        raise TypeError(f"{name} must be an array that NumPy can read: {error}") from error


def _to_jax(jax: Any, x: Array, query: Any) -> Any:
    if x.dtype == np.float64:
        with jax.enable_x64(True):  # the query may outlive the scope in which it was made
            return jax.device_put(x, query.sharding)
    return jax.device_put(x, query.sharding)
