# SPDX-License-Identifier: Apache-2.0
"""`attention` by the signature of PyTorch's function."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import MASK_NAMES, boolean, floats, pair_array, sizes
from fastattn._arrays import NUMPY, library_of
from fastattn._attention import attention
from fastattn._options import AttentionOptions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[Any]:
    """Compute attention with the signature and meaning of PyTorch's function, on NumPy arrays.

    Parameters
    ----------
    query : array of shape (..., q_heads, q_len, head_dim)
    key : array of shape (..., heads, kv_len, head_dim)
    value : array of shape (..., heads, kv_len, value_head_dim)
        Of a dtype that `attention` takes. All axes but the last two broadcast, unless enable_gqa.
    attn_mask : array, broadcastable to (..., q_heads, q_len, kv_len), optional
        bool: True = attend. A float dtype: added to the scores. Not together with is_causal.
    dropout_p : float
        Drop each pair with this probability, and divide what is kept by 1 - dropout_p. Each call
        drops others; `attention` has a seed.
    is_causal : bool
        Query i sees key j iff j <= i, whatever the two lengths.
    scale : float, optional
        1 / sqrt(head_dim) unless given.
    enable_gqa : bool
        q_heads may be a multiple of the heads of key and value.

    Returns
    -------
    ndarray of shape (..., q_heads, q_len, value_head_dim)
        A query that sees no key gives 0.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule.

    See Also
    --------
    attention : all that the kernel can do.

    References
    ----------
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    is_causal = boolean("is_causal", is_causal)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must not be given together with is_causal=True")
    library = library_of(query)
    q = floats("query", library.array("query", query))
    k, v = floats("key", key), floats("value", value)
    heads = {x.shape[-3:-2] for x in (q, k, v)}
    if not boolean("enable_gqa", enable_gqa) and len(heads) > 1:
        wanted = with_equal_heads(q.shape, k.shape, v.shape)
        q, k, v = map(np.broadcast_to, (q, k, v), wanted)
    options: AttentionOptions = {}  # those that are given: a call without any is the quickest
    if attn_mask is not None:
        shapes = sizes(q.shape, k.shape, v.shape)
        options["mask"] = pair_array("attn_mask", attn_mask, MASK_NAMES, shapes)
    if scale is not None:
        options["scale"] = scale
    if is_causal:
        options |= {"is_causal": True, "query_offset": 0}
    if dropout_p != 0 or type(dropout_p) is bool:  # which is refused
        options |= {"dropout_p": dropout_p, "seed": int.from_bytes(os.urandom(8), "little")}
    if library is NUMPY:
        return attention(q, k, v, **options)
    out = library.empty(sizes(q.shape, k.shape, v.shape).out_shape, q.dtype)
    computed = library.compute(attention, q, k, v, out=out, **options)
    (result,) = library.to_caller(None, computed)
    return result  # type: ignore[no-any-return]


def with_equal_heads(*shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of query, key and value with their heads broadcast."""
    heads = [shape[-3] if len(shape) > 2 else 1 for shape in shapes]
    wanted = next((count for count in heads if count != 1), 1)
    if any(count not in (1, wanted) for count in heads):
        raise ValueError(
            "query, key and value must have equally many heads unless enable_gqa=True, got "
            f"query.shape={shapes[0]}, key.shape={shapes[1]}, value.shape={shapes[2]}"
        )
    return [
        shape if count == wanted or len(shape) < 2 else (*shape[:-3], wanted, *shape[-2:])
        for count, shape in zip(heads, shapes, strict=True)
    ]
