# SPDX-License-Identifier: Apache-2.0
"""The layers of a Transformer, as functions of float32 arrays of NumPy.

The tokens of all sequences stand one after the other, each a row of an array of shape (total, dim).
A weight is stored as PyTorch stores it, (out, in). What a row gives does not depend on the others
by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn import _core
from fastattn._arguments import FLOAT32, as_array, finite_number, name_of, of_dtypes
from fastattn._attention import varlen_attention
from fastattn._quantised import Quantised

__all__ = [
    "Quantised",
    "embedding",
    "feed_forward",
    "gated_feed_forward",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "multi_head_attention",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "softmax",
    "swiglu",
]

Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
Weight: TypeAlias = NDArray[Any] | Quantised  # of one of these dtypes, or small integers


def linear(x: Floats, weight: Weight, bias: Floats | None = None) -> Floats:
    """Return ``x @ weight.T + bias``.

    A weight is read as it is stored, and each of its numbers is exact: x is not rounded.

    Parameters
    ----------
    x : array of shape (total, in)
    weight : array of float32, float16 or bfloat16, or Quantised, of shape (out, in)
    bias : array of shape (out,), optional

    Returns
    -------
    ndarray of shape (total, out)
    """
    x = _floats("x", x)
    weight, stored, kind = _stored(weight)
    if x.ndim != 2 or len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        got = f"x.shape={x.shape}, weight.shape={weight.shape}"
        raise ValueError(f"x and weight must have shapes (total, in) and (out, in), got {got}")
    if bias is not None:
        bias = _floats("bias", bias)
        if bias.shape != weight.shape[:1]:
            got = f"bias.shape={bias.shape}, weight.shape={weight.shape}"
            raise ValueError(f"bias must have shape (out,), got {got}")
    if stored.strides[1] != stored.itemsize:
        stored = np.ascontiguousarray(stored)
    return _core.linear(x, stored, kind, bias)


def embedding(ids: Integers, weight: Weight) -> Floats:
    """Return the rows of a table that ids name.

    Parameters
    ----------
    ids : array of int, shape (total,)
    weight : array of float32, float16 or bfloat16, or Quantised, of shape (vocabulary, dim)

    Returns
    -------
    ndarray of shape (total, dim)
    """
    ids = _integers("ids", ids)
    weight, _, _ = _stored(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape (vocabulary, dim), got {weight.shape}")
    rows = weight.shape[0]
    if ids.size and not 0 <= (least := ids.min()) <= (most := ids.max()) < rows:
        raise ValueError(f"ids must be within 0..{rows - 1}, got {least if least < 0 else most}")
    found = weight[ids] if isinstance(weight, np.ndarray) else weight.rows(ids)
    return found.astype(np.float32, copy=False)


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Return the rows with mean 0 and variance 1, times a weight, plus a bias.

    Parameters
    ----------
    x : array of shape (..., dim)
    weight, bias : array of shape (dim,)
    eps : float
        What is added to the variance.

    Returns
    -------
    ndarray of x's shape
    """
    x, weight, bias = (
        _floats("x", x),
        _of_columns("weight", weight, x),
        _of_columns("bias", bias, x),
    )
    out = np.empty(x.shape, FLOAT32)
    _core.layer_norm(x, weight, bias, finite_number("eps", eps), out)
    return out


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Return the rows with a mean square of 1, times a weight.

    Parameters
    ----------
    x : array of shape (..., dim)
    weight : array of shape (dim,)
    eps : float
        What is added to the mean square.

    Returns
    -------
    ndarray of x's shape
    """
    x, weight = _floats("x", x), _of_columns("weight", weight, x)
    out = np.empty(x.shape, FLOAT32)
    _core.rms_norm(x, weight, finite_number("eps", eps), out)
    return out


def gelu(x: Floats, approximate: Literal["none", "tanh"] = "none") -> Floats:
    """Return x times the share of a normal distribution below x.

    Parameters
    ----------
    x : array
    approximate : {"none", "tanh"}
        Compute the share by the error function, or by the formula with tanh.

    Returns
    -------
    ndarray of x's shape
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    x = _floats("x", x)
    out = np.empty(x.shape, FLOAT32)
    _core.gelu(x, approximate == "tanh", out)
    return out


def swiglu(gate: Floats, up: Floats) -> Floats:
    """Return ``gate / (1 + exp(-gate)) * up``: Shazeer 2020, https://arxiv.org/abs/2002.05202.

    Parameters
    ----------
    gate, up : array
        Of one shape.

    Returns
    -------
    ndarray of their shape
    """
    gate, up = _floats("gate", gate), _of_shape("up", up, "gate", gate)
    out = np.empty(gate.shape, FLOAT32)
    _core.swiglu(gate, up, out)
    return out


def geglu(gate: Floats, up: Floats) -> Floats:
    """Return ``gelu(gate, "tanh") * up``: Shazeer 2020, https://arxiv.org/abs/2002.05202.

    Parameters
    ----------
    gate, up : array
        Of one shape.

    Returns
    -------
    ndarray of their shape
    """
    gate, up = _floats("gate", gate), _of_shape("up", up, "gate", gate)
    out = np.empty(gate.shape, FLOAT32)
    _core.geglu(gate, up, out)
    return out


def rotary_tables(positions: Integers, frequencies: Floats) -> tuple[Floats, Floats]:
    """Return the cosine and sine of each position times each frequency.

    Parameters
    ----------
    positions : array of int, shape (total,)
    frequencies : array of shape (rotary_dim / 2,)
        In radians for each position.

    Returns
    -------
    cos, sin : ndarray of shape (total, rotary_dim / 2)
    """
    places = _integers("positions", positions).astype(FLOAT32)
    angles: Floats = np.multiply.outer(places, _floats("frequencies", frequencies))
    return np.cos(angles), np.sin(angles)


def rotary(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn the pairs (i, i + rotary_dim / 2) of each head: https://arxiv.org/abs/2104.09864.

    Parameters
    ----------
    x : array of shape (total, heads, head_dim)
    cos, sin : array of shape (total, rotary_dim / 2)
        Of the angles, as `rotary_tables` gives them. Columns beyond rotary_dim are kept.

    Returns
    -------
    ndarray of x's shape
    """
    x, cos, sin = _floats("x", x), _floats("cos", cos), _of_shape("sin", sin, "cos", cos)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (total, heads, head_dim), got x.shape={x.shape}")
    if cos.ndim != 2 or len(cos) != len(x) or 2 * cos.shape[1] > x.shape[2]:
        rule = "cos must have shape (total, rotary_dim / 2), with rotary_dim <= head_dim"
        raise ValueError(f"{rule}, got cos.shape={cos.shape}, x.shape={x.shape}")
    out = np.empty(x.shape, FLOAT32)
    _core.rotary(x, cos, sin, out)
    return out


def softmax(x: Floats) -> Floats:
    """Return ``exp(x)`` as shares of its sum over the last axis.

    Parameters
    ----------
    x : array of shape (..., dim)

    Returns
    -------
    ndarray of x's shape
        NaN in a row that is -inf everywhere, as in PyTorch.
    """
    return _softmax(x, log=False)


def log_softmax(x: Floats) -> Floats:
    """Return the logarithm of `softmax`.

    Parameters
    ----------
    x : array of shape (..., dim)

    Returns
    -------
    ndarray of x's shape
    """
    return _softmax(x, log=True)


def feed_forward(
    x: Floats,
    up: Weight,
    down: Weight,
    up_bias: Floats | None = None,
    down_bias: Floats | None = None,
    activation: Callable[[Floats], Floats] = gelu,
) -> Floats:
    """Return a projection up, an activation, and a projection down.

    Parameters
    ----------
    x : array of shape (total, dim)
    up, down : weight of shape (inner, dim), (dim, inner), as `linear` takes it
    up_bias, down_bias : array of shape (inner,), (dim,), optional
    activation : function of an array, which returns one of its shape

    Returns
    -------
    ndarray of shape (total, dim)
    """
    return linear(activation(linear(x, up, up_bias)), down, down_bias)


def gated_feed_forward(
    x: Floats,
    gate: Weight,
    up: Weight,
    down: Weight,
    gate_bias: Floats | None = None,
    up_bias: Floats | None = None,
    down_bias: Floats | None = None,
    activation: Callable[[Floats, Floats], Floats] = swiglu,
) -> Floats:
    """Return two projections up, of which one gates the other, and a projection down.

    Parameters
    ----------
    x : array of shape (total, dim)
    gate, up, down : weight of shape (inner, dim), (inner, dim), (dim, inner)
        As `linear` takes it.
    gate_bias, up_bias, down_bias : array of shape (inner,), (inner,), (dim,), optional
    activation : function of two arrays, which returns one of their shape

    Returns
    -------
    ndarray of shape (total, dim)
    """
    gated = activation(linear(x, gate, gate_bias), linear(x, up, up_bias))
    return linear(gated, down, down_bias)


def multi_head_attention(
    query: Floats, key: Floats, value: Floats, heads: int, cu_seqlens: Integers
) -> Floats:
    """Compute the attention of each sequence to itself, in several heads.

    Parameters
    ----------
    query, key, value : array of shape (total, heads * head_dim)
        After their projections. A head is head_dim columns.
    heads : int
    cu_seqlens : array of int, shape (sequences + 1,)
        The rows of sequence b are ``cu_seqlens[b] : cu_seqlens[b + 1]``.

    Returns
    -------
    ndarray of shape (total, heads * head_dim)
        The heads side by side, before the output's projection.
    """
    q, k, v = (x.reshape(len(x), heads, -1) for x in (query, key, value))
    out: Floats = varlen_attention(q, k, v, cu_seqlens, cu_seqlens)
    return out.reshape(len(query), -1)


def _stored(weight: Any) -> tuple[Weight, NDArray[Any], str]:
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


def _floats(name: str, x: Any) -> Floats:
    """Return the array that x is or stands for, contiguous."""
    if type(x) is np.ndarray and x.dtype == FLOAT32 and x.flags.c_contiguous:
        return x
    floats: Floats = np.asarray(of_dtypes(name, x, ("float32",)), FLOAT32, order="C")
    return floats


def _of_shape(name: str, x: Any, other: str, like: Floats) -> Floats:
    """Return x as an array of the same shape as another one."""
    array = _floats(name, x)
    if array.shape != like.shape:
        got = f"{name}.shape={array.shape}, {other}.shape={like.shape}"
        raise ValueError(f"{name} must have the shape of {other}, got {got}")
    return array


def _of_columns(name: str, x: Any, rows: Floats) -> Floats:
    """Return x as an array with a number for each column of the rows."""
    array = _floats(name, x)
    if array.shape != rows.shape[-1:] or not rows.ndim:
        got = f"{name}.shape={array.shape}, x.shape={rows.shape}"
        raise ValueError(f"{name} must have shape (dim,) for an x of shape (..., dim), got {got}")
    return array


def _integers(name: str, x: Any) -> NDArray[Any]:
    """Return the array of integers that x is or stands for."""
    array = as_array(name, x, "integers")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of integers, not {array.dtype.name}")
    return array


def _softmax(x: Any, log: bool) -> Floats:
    """Return the softmax over the last axis, or its logarithm."""
    x = _floats("x", x)
    if not x.ndim:
        raise ValueError("x must have an axis, got x.shape=()")
    out = np.empty(x.shape, FLOAT32)
    _core.softmax(x, log, out)
    return out
