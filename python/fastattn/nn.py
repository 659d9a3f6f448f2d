# SPDX-License-Identifier: Apache-2.0
"""The layers of a Transformer, as functions of float32 arrays of NumPy.

Sequences are packed: the rows of all stand one after the other in an array of shape (total, dim),
and those of sequence b are ``cu_seqlens[b] : cu_seqlens[b + 1]``. A weight is stored as PyTorch
stores it, (out, in). What a sequence gives does not depend on the others by a bit.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastattn._attention import varlen_attention

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def linear(x: Floats, weight: Floats, bias: Floats, cu_seqlens: Integers) -> Floats:
    """Return ``x @ weight.T + bias``.

    Each sequence is a product of its own: where a row stands in a product changes its last bits.

    Parameters
    ----------
    x : array of shape (total, in)
    weight : array of shape (out, in)
    bias : array of shape (out,)
    cu_seqlens : array of int, shape (sequences + 1,)

    Returns
    -------
    ndarray of shape (total, out)
    """
    out = np.empty((len(x), len(weight)), np.float32)
    for begin, end in pairwise(cu_seqlens.tolist()):
        np.matmul(x[begin:end], weight.T, out=out[begin:end])
        out[begin:end] += bias
    return out


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Return the rows with mean 0 and variance 1, times a weight, plus a bias.

    Parameters
    ----------
    x : array of shape (total, dim)
    weight, bias : array of shape (dim,)
    eps : float
        What is added to the variance.

    Returns
    -------
    ndarray of shape (total, dim)
    """
    x = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(x).mean(axis=-1, keepdims=True)
    x /= np.sqrt(variance + np.float32(eps))
    x *= weight
    x += bias
    return x


# erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2) + e with t = 1 / (1 + p z), |e| <= 1.5e-7, z >= 0:
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
_P = 0.3275911
_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # a5 ... a1
_CHUNK = 1 << 15  # numbers, whose intermediate results stay in the cache


def gelu(x: Floats) -> Floats:
    """Return x times the share of a normal distribution below x, by the error function.

    Parameters
    ----------
    x : array

    Returns
    -------
    ndarray
        Of x's shape; off by at most 1e-6, or by 1e-6 of it.
    """
    out = np.empty(x.shape, np.float32)
    flat, result = x.reshape(-1), out.reshape(-1)
    for begin in range(0, x.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        size = np.abs(part)
        t = size * np.float32(_P * 0.5**0.5)
        t += 1
        np.divide(1, t, out=t)
        erfc = t * np.float32(_A[0])
        for a in _A[1:]:
            erfc += np.float32(a)
            erfc *= t
        np.multiply(part, part, out=t)
        t *= np.float32(-0.5)
        erfc *= np.exp(t, out=t)
        size *= np.float32(0.5)
        erfc *= size
        np.maximum(part, 0, out=size)
        np.subtract(size, erfc, out=result[begin : begin + _CHUNK])
    return out


def embedding(ids: Integers, weight: Floats) -> Floats:
    """Return the rows of a table that ids name.

    Parameters
    ----------
    ids : array of int, shape (total,)
    weight : array of shape (vocabulary, dim)

    Returns
    -------
    ndarray of shape (total, dim)
    """
    return weight[ids]


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

    Returns
    -------
    ndarray of shape (total, heads * head_dim)
        The heads side by side, before the output's projection.
    """
    q, k, v = (x.reshape(len(x), heads, -1) for x in (query, key, value))
    out: Floats = varlen_attention(q, k, v, cu_seqlens, cu_seqlens)
    return out.reshape(len(query), -1)
