# SPDX-License-Identifier: Apache-2.0
"""The linear layer, whose weights are read as they are stored.

Checks the arguments and calls src/linear.cpp, which cpp/linear.cpp does the work for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from fastattn import _core
from fastattn._arguments import FLOAT32, name_of, of_dtypes
from fastattn._arrays import NUMPY, library_of
from fastattn._quantised import Quantised

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
Floats: TypeAlias = NDArray[np.float32]
Weight: TypeAlias = NDArray[Any] | Quantised  # of one of these dtypes, or small integers


class Layer(NamedTuple):
    """A layer that was checked, as the core takes it."""

    numbers: NDArray[Any]  # in memory
    kind: str
    bias: Floats | None
    in_features: int


@overload
def linear(x: Floats, weight: Any, bias: Any = None) -> Floats: ...
@overload
def linear(x: Any, weight: Any, bias: Any = None) -> Any: ...
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return ``x @ weight.T + bias``, of float32 numbers and a weight in the form it is stored in.

    The weight is read as it lies in memory, or in a mapped file, and each of its numbers is exact:
    x is not rounded. One to four rows take the time to read the weight once. What a row gives does
    not depend on other rows, or on the number of threads, by a bit, sign and payload of NaN aside.

    Parameters
    ----------
    x : array of float32, shape (..., in)
    weight : array of float32, float16 or bfloat16, or `fastattn.nn.Quantised`; shape (out, in)
        PyTorch's order of axes. Rows that are not contiguous are copied.
    bias : array of float32, shape (out,), optional

    Returns
    -------
    array of float32, shape (..., out)
        As the library's array that x is.

    Raises
    ------
    TypeError
        A dtype is another one, or an argument is no array.
    ValueError
        Shapes do not fit.

    Examples
    --------
    >>> import fastattn, numpy as np
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> fastattn.linear(x, np.array([[3, 4], [5, 6], [7, 8]], np.float16))
    array([[11., 17., 23.]], dtype=float32)
    """
    library = NUMPY if type(x) is np.ndarray else library_of(x)
    rows = floats("x", x)
    layer = layer_of(weight, bias, rows.shape)
    table = rows
    if rows.ndim != 2:
        table = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    (out,) = library.compute(_core.linear, table, layer)
    if rows.ndim != 2:
        out = out.reshape(*rows.shape[:-1], out.shape[-1])
    return out if library is NUMPY else library.to_caller(None, out)[0]


def linears(x: Floats, *layers: tuple[Weight, Floats | None]) -> list[Floats]:
    """Return what linear layers of the same x give, computed at once: threads start once.

    Parameters
    ----------
    x : array of shape (total, in)
    layers : tuple of a weight of shape (out, in) and a bias of shape (out,) or None
        As `linear` takes them.

    Returns
    -------
    list of ndarray of shape (total, out)
        The same bits as those of `linear`.
    """
    x = floats("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (total, in), got {x.shape}")
    for layer in layers:
        if not isinstance(layer, tuple) or len(layer) != 2:
            got = f"a tuple of {len(layer)}" if isinstance(layer, tuple) else type(layer).__name__
            raise TypeError(f"a layer must be a pair of a weight and a bias or None, got {got}")
    return _core.linear(x, *[layer_of(*layer, x.shape) for layer in layers])


def through(x: Floats, *layers: Layer) -> list[Floats]:
    """Return what layers give that were checked before: a step of a loop, which must be quick."""
    x = floats("x", x)
    for layer in layers:
        if x.ndim != 2 or x.shape[1] != layer.in_features:
            raise ValueError(f"x must have shape (total, {layer.in_features}), got {x.shape}")
    return _core.linear(x, *layers)


def layer_of(weight: Any, bias: Any, x_shape: tuple[int, ...] | None = None) -> Layer:
    """Check a weight and a bias, which are for an x of that shape, if it is known."""
    weight, numbers, kind = stored(weight)
    if len(weight.shape) != 2 or (x_shape is not None and x_shape[-1:] != weight.shape[1:]):
        got = f"x.shape={x_shape}, weight.shape={weight.shape}"
        raise ValueError(f"x and weight must have shapes (..., in) and (out, in), got {got}")
    if bias is not None:
        bias = floats("bias", bias)
        if bias.shape != weight.shape[:1]:
            got = f"bias.shape={bias.shape}, weight.shape={weight.shape}"
            raise ValueError(f"bias must have shape (out,), got {got}")
    if numbers.strides[1] != numbers.itemsize:
        numbers = np.ascontiguousarray(numbers)
    return Layer(numbers, kind, bias, weight.shape[1])


def stored(weight: Any) -> tuple[Weight, NDArray[Any], str]:
    """Return the weight, what is in memory of it, and as which type."""
    if type(weight) is not np.ndarray:
        if isinstance(weight, Quantised):
            return weight, weight.blocks, weight.kind
        weight = of_dtypes("weight", weight, WEIGHT_DTYPES)
    if not weight.dtype.isnative:
        weight = weight.astype(weight.dtype.newbyteorder("="))
    if (kind := name_of(weight.dtype)) not in WEIGHT_DTYPES:
        of_dtypes("weight", weight, WEIGHT_DTYPES)
    return weight, weight, kind


def floats(name: str, x: Any) -> Floats:
    """Return the array that x is or stands for, contiguous."""
    if type(x) is np.ndarray and x.dtype == FLOAT32 and x.flags.c_contiguous:
        return x
    numbers: Floats = np.asarray(of_dtypes(name, x, ("float32",)), FLOAT32, order="C")
    return numbers
