# SPDX-License-Identifier: Apache-2.0
"""What does a key do to a row? Its weight alone does not say; with its value, it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import FLOAT_NAMES, broadcast, of_dtypes
from fastattn._arrays import widened

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

# By the bytes of a weight: how far rounding may bring a row's sum above 1, and below it although no
# sink has a share.
MOST_ABOVE = {2: 2.0**-7, 4: 1e-4, 8: 1e-4}
MOST_BELOW = {2: 2.0**-7, 4: 4e-6, 8: 1e-14}


def value_weighted(weights: ArrayLike, value: ArrayLike) -> Array:
    """Weigh each weight by how long the value is that it brings [1]_.

    A token that is much looked at, as the first one often is, may bring next to nothing.

    Parameters
    ----------
    weights : array of shape (..., heads, q_len, kv_len)
        Probabilities, of a float dtype: not negative, and no row's sum above 1. Fewer axes, as
        (q_len, kv_len), will do.
    value : array of shape (..., kv_heads, kv_len, value_head_dim)
        Finite, of a float dtype. kv_heads divides heads; what is before it broadcasts to what is
        before heads.

    Returns
    -------
    ndarray of the shape of weights
        ``weights * norm(value)``; float64 for float64 weights, else float32.

    Raises
    ------
    TypeError, ValueError
        An argument is no such thing, with what was given.

    References
    ----------
    .. [1] G. Kobayashi et al., "Attention is Not Only a Weight: Analyzing Transformers with Vector
       Norms", 2020, https://arxiv.org/abs/2004.10102

    Examples
    --------
    >>> import fastattn.maps
    >>> fastattn.maps.value_weighted([[0.75, 0.25]], [[0.0, 0.0], [3.0, 4.0]])
    array([[0.  , 1.25]])
    """
    p, values, size = _checked(weights, value)
    weighted: Array = p * np.linalg.norm(values, axis=-1)[..., None, :]
    return weighted.astype(_dtype(size))


def removal_effect(weights: ArrayLike, value: ArrayLike) -> Array:
    """Tell how far a row's output moves if it does not see a key.

    The weights that are left grow, so that they, and the share of a sink, add up to 1 again.

    Parameters
    ----------
    weights, value
        As for `value_weighted`.

    Returns
    -------
    ndarray of the shape of weights
        ``p / (1 - p) * norm(out - v)``, with p a weight, v the value of its key and ``out = weights
        @ value`` the row's output. A row that sees nothing else gives 0 then, and moves by
        norm(out). float64 for float64 weights, else float32.

    Raises
    ------
    TypeError, ValueError
        An argument is no such thing, with what was given.

    Notes
    -----
    Without the key the output is ``(out - p * v) / (1 - p)``, which differs from out by
    ``p * (out - v) / (1 - p)``.

    Examples
    --------
    >>> import fastattn.maps
    >>> fastattn.maps.removal_effect([[0.75, 0.25]], [[0.0, 0.0], [3.0, 4.0]])
    array([[3.75, 1.25]])
    """
    p, values, size = _checked(weights, value)
    if not p.size:
        return p.astype(_dtype(size))
    out: Array = p @ values
    # The strongest key may be nearly all that a row sees, and 1 - p lost to rounding: the rest is
    # added up without it. No other weight is above one half.
    strongest = p.argmax(axis=-1)[..., None]
    others = p.copy()
    np.put_along_axis(others, strongest, 0, axis=-1)
    of_sink = 1 - p.sum(axis=-1, keepdims=True)
    of_sink[of_sink < MOST_BELOW[size]] = 0
    rest = others.sum(axis=-1, keepdims=True) + of_sink
    without = others @ values / np.where(rest > 0, rest, 1)
    squares = (out**2).sum(axis=-1)[..., None] + (values**2).sum(axis=-1)[..., None, :]
    distances = np.sqrt(np.maximum(squares - 2 * out @ values.swapaxes(-1, -2), 0))
    effect: Array = others / (1 - others) * distances
    np.put_along_axis(effect, strongest, np.linalg.norm(out - without, axis=-1)[..., None], axis=-1)
    return effect.astype(_dtype(size))


def _dtype(size: int) -> np.dtype[Any]:
    """Return the dtype of a result, by the bytes of a weight."""
    return np.dtype(np.float64 if size == 8 else np.float32)


def _checked(weights: Any, value: Any) -> tuple[Array, Array, int]:
    """Return weights, the values of each of their heads, in float64, and the bytes of a weight."""
    weights = of_dtypes("weights", weights, FLOAT_NAMES)
    value = of_dtypes("value", value, FLOAT_NAMES)
    for name, x, axes in (
        ("weights", weights, "(..., heads, q_len, kv_len)"),
        ("value", value, "(..., kv_heads, kv_len, value_head_dim)"),
    ):
        if x.ndim < 2:
            raise ValueError(f"{name} must have shape {axes}, got {name}.shape={x.shape}")
    lead, heads = weights.shape[:-2], weights.shape[-3] if weights.ndim > 2 else 1
    own, kv_heads = value.shape[:-2], value.shape[-3] if value.ndim > 2 else 1
    fits = value.shape[-2] == weights.shape[-1] and kv_heads and heads % kv_heads == 0
    if not fits or len(own) > len(lead) or broadcast(own[:-1], lead[:-1]) != lead[:-1]:
        raise ValueError(
            "value must have shape (..., kv_heads, kv_len, value_head_dim), with the kv_len of "
            "weights, kv_heads a divisor of their heads, and what is before to broadcast, "
            f"got weights.shape={weights.shape} and value.shape={value.shape}"
        )
    size = weights.dtype.itemsize
    shares, values = (widened(x).astype(np.float64) for x in (weights, value))
    wrong = shares[~(shares >= 0)]
    if wrong.size:
        raise ValueError(f"weights must be at least 0, got {wrong[0]}")
    sums = shares.sum(axis=-1)
    wrong = sums[~(sums <= 1 + MOST_ABOVE[size])]
    if wrong.size:
        raise ValueError(f"weights must add up to at most 1 in each row, got {wrong[0]}")
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(f"value must be finite, got {wrong[0]}")
    if value.ndim > 2:
        values = values.repeat(heads // kv_heads, axis=-3)
    return shares, np.broadcast_to(values, (*lead, *values.shape[-2:])), size
