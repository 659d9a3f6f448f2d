# SPDX-License-Identifier: Apache-2.0
"""How attention over parts of the keys becomes attention over all of them.

Keys may be attended in chunks, from a cache and what follows it, or on several machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import FLOAT_NAMES, filled, logits_per_head, of_dtypes
from fastattn._arrays import library_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


def merge(
    *parts: tuple[ArrayLike, ArrayLike], sinks: ArrayLike | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Merge attention over disjoint sets of keys into attention over their union.

    Parameters
    ----------
    *parts : (out, lse)
        Each as `attention` returns it with return_lse=True, for the same queries, without sinks:
        out of shape (batch, q_heads, q_len, value_head_dim), lse of shape (batch, q_heads, q_len).
    sinks : array of shape (q_heads,), optional
        As for `attention`. They count once, so they are given here and not to the parts.

    Returns
    -------
    out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
    lse : ndarray of shape (batch, q_heads, q_len)
        Without the sinks. A query that sees no key in any part has out 0 and lse -inf.

    Raises
    ------
    TypeError, ValueError
        There are no parts, or they differ in shape or dtype.

    Notes
    -----
    A prefix that a whole batch shares is a part of its own, whose keys and values have no batch
    axis: up to 16 queries then read it once for all, 64 rows (queries and heads that share a key
    head) at a time.

    With ``w[i] = exp(lse[i] - max(lse))``, out is ``sum(w[i] * out[i]) / sum(w)`` [1]_. The sums
    are taken in float64, in the order of the parts.

    References
    ----------
    .. [1] H. Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context",
       2023, https://arxiv.org/abs/2310.01889

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> x = np.eye(4)
    >>> parts = [fastattn.attention(x, x[i:i+2], x[i:i+2], return_lse=True) for i in (0, 2)]
    >>> out, lse = fastattn.merge(*parts)
    >>> np.allclose(out, fastattn.attention(x, x, x))
    True
    """
    outs, lses = _checked(parts)
    top = np.max(lses, axis=0).astype(np.float64)
    top[top == -np.inf] = 0  # nothing seen anywhere: exp(-inf - 0), not exp(-inf - -inf)
    total = np.zeros(outs[0].shape, np.float64)
    denominator = np.zeros_like(top)
    with np.errstate(all="ignore"):
        for out, lse in zip(outs, lses, strict=True):
            weight = np.exp(lse - top)
            # NumPy 1 does not take a plain 0 for bfloat16.
            total += np.where(weight == 0, 0, weight)[..., None] * np.where(
                (lse == -np.inf)[..., None], out.dtype.type(0), out
            )
            denominator += weight
        merged_lse = (np.log(denominator) + top).astype(lses[0].dtype)
        if sinks is not None:
            heads = outs[0].shape[-3] if outs[0].ndim > 2 else 1
            logits = filled(logits_per_head("sinks", sinks, heads), (heads,), np.dtype(np.float64))
            denominator += np.exp((logits[:, None] if outs[0].ndim > 2 else logits) - top)
        denominator[merged_lse == -np.inf] = 1
        total /= denominator[..., None]
    merged = total.astype(outs[0].dtype)
    return library_of(parts[0][0]).to_caller(None, merged, merged_lse)


def _checked(parts: tuple[Any, ...]) -> tuple[list[Array], list[Array]]:
    """Return the arrays of the parts, if they fit together."""
    if not parts:
        raise ValueError("parts must be one (out, lse) or more, got none")
    outs: list[Array] = []
    lses: list[Array] = []
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise TypeError(f"parts[{i}] must be a pair (out, lse), not {type(part).__name__}")
        for name, x, arrays, dtypes in (
            ("out", part[0], outs, FLOAT_NAMES),
            ("lse", part[1], lses, FLOAT_NAMES[2:]),
        ):
            name = f"{name} of parts[{i}]"
            array = of_dtypes(name, x, dtypes)
            arrays.append(array.astype(array.dtype.newbyteorder("="), copy=False))
        if outs[i].ndim < 2 or outs[i].shape[:-1] != lses[i].shape:
            raise ValueError(
                f"parts[{i}] must have an out of shape (..., q_len, value_head_dim) and an lse of "
                f"shape (..., q_len), got out.shape={outs[i].shape}, lse.shape={lses[i].shape}"
            )
        if outs[i].shape != outs[0].shape:
            raise ValueError(
                f"parts must have equal shapes, got out.shape={outs[0].shape} in parts[0], "
                f"{outs[i].shape} in parts[{i}]"
            )
        if (outs[i].dtype, lses[i].dtype) != (outs[0].dtype, lses[0].dtype):
            raise TypeError(
                f"parts must have equal dtypes, not {outs[0].dtype}, {lses[0].dtype} in parts[0] "
                f"and {outs[i].dtype}, {lses[i].dtype} in parts[{i}]"
            )
    return outs, lses
