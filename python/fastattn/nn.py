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
from fastattn._arguments import FLOAT32, as_array, finite_number
from fastattn._arrays import widened
from fastattn._attention import varlen_attention
from fastattn._linear import Floats as Floats
from fastattn._linear import Weight as Weight
from fastattn._linear import floats, linear, linears, stored
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
    "linears",
    "log_softmax",
    "multi_head_attention",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "softmax",
    "swiglu",
]

Integers: TypeAlias = NDArray[np.int64]


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
    weight, _, _ = stored(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape (vocabulary, dim), got {weight.shape}")
    rows = weight.shape[0]
    if ids.size and not 0 <= (least := ids.min()) <= (most := ids.max()) < rows:
        raise ValueError(f"ids must be within 0..{rows - 1}, got {least if least < 0 else most}")
    found = widened(weight[ids]) if isinstance(weight, np.ndarray) else weight.rows(ids)
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
        floats("x", x),
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
    x, weight = floats("x", x), _of_columns("weight", weight, x)
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
    x = floats("x", x)
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
    gate, up = floats("gate", gate), _of_shape("up", up, "gate", gate)
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
    gate, up = floats("gate", gate), _of_shape("up", up, "gate", gate)
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
    angles: Floats = np.multiply.outer(places, floats("frequencies", frequencies))
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
    x, cos, sin = floats("x", x), floats("cos", cos), _of_shape("sin", sin, "cos", cos)
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
    gated = activation(*linears(x, (gate, gate_bias), (up, up_bias)))
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


def _of_shape(name: str, x: Any, other: str, like: Floats) -> Floats:
    """Return x as an array of the same shape as another one."""
    array = floats(name, x)
    if array.shape != like.shape:
        got = f"{name}.shape={array.shape}, {other}.shape={like.shape}"
        raise ValueError(f"{name} must have the shape of {other}, got {got}")
    return array


def _of_columns(name: str, x: Any, rows: Floats) -> Floats:
    """Return x as an array with a number for each column of the rows."""
    array = floats(name, x)
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
    x = floats("x", x)
    if not x.ndim:
        raise ValueError("x must have an axis, got x.shape=()")
    out = np.empty(x.shape, FLOAT32)
    _core.softmax(x, log, out)
    return out
