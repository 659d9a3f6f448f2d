# SPDX-License-Identifier: Apache-2.0
"""What does a layer know of which token? Attention, followed through all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

import fastattn
from fastattn._arguments import arithmetic, as_array, floats
from fastattn._arrays import widened
from fastattn._options import WeightOptions, options_of, takes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


@takes(WeightOptions, is_causal=None)
def rollout(
    layers: Iterable[tuple[ArrayLike, ArrayLike]] | Any,
    *,
    tokens: int | ArrayLike | None = None,
    direction: Literal["backward", "forward"] = "backward",
    **options: Unpack[WeightOptions],
) -> Array:
    """Follow attention through all layers, from chosen tokens.

    In each layer half of a token goes on as it is, and half is what the layer's heads, on average,
    bring from the tokens that it looks at [1]_. No array of tokens x tokens is made: a token costs
    one pass over each layer, and memory grows with the number of tokens alone.

    Parameters
    ----------
    layers : sequence of (query, key), or a capture of both
        The lowest first: arrays of floats of the shapes (heads, tokens, head_dim) and (kv_heads,
        tokens, head_dim), as `fastattn.attention` takes them. Or what a model's
        ``capture(what=("query", "key"))`` gave: its heads and layers, lowest first.
    tokens : int or sequence of int, optional
        From which tokens; -1 is the last one. By default from the last one backward, from the first
        one forward.
    direction : {"backward", "forward"}
        "backward": of which tokens of the text the token consists behind the top layer.
        "forward": how much of the token is in each one behind the top layer.
    is_causal : bool
        Must be given with pairs: True for a decoder, False for an encoder.
    mask, bias, scale, query_offset, window, softcap, alibi_slopes, sinks, kv_lengths, key_offset
        As for `fastattn.attention`, the same in each layer. None may be given with a capture, which
        knows those of each layer.

    Returns
    -------
    ndarray of shape (tokens,), or (chosen tokens, tokens) for a sequence of them
        float64 if the queries are, else float32. Backward, the shares of a token add up to 1, less
        what sinks took and what a token was not brought that sees none.

    Raises
    ------
    TypeError, ValueError
        An argument is no such thing, with what was given.

    Notes
    -----
    With P the mean of a layer's `fastattn.attention_weights` over its heads, the layers multiply to
    ``R = A_n @ ... @ A_1``, where ``A = 0.5 * P + 0.5 * I``. Backward gives rows of R and forward
    columns of it.

    References
    ----------
    .. [1] S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", 2020,
       https://arxiv.org/abs/2005.00928

    Examples
    --------
    >>> import numpy as np, fastattn.maps
    >>> layer = np.zeros((1, 4, 8)), np.zeros((1, 4, 8))
    >>> fastattn.maps.rollout([layer], tokens=1, is_causal=True)
    array([0.25, 0.75, 0.  , 0.  ])
    """
    asked = options_of(rollout, options)
    given: dict[str, Any] = {name: getattr(asked, name) for name in WeightOptions.__annotations__}
    is_captured = hasattr(layers, "query") and hasattr(layers, "key")
    pairs = _pairs(layers)
    if is_captured and options:
        raise ValueError(f"{next(iter(options))} must not be given with a capture, which knows it")
    if not is_captured and asked.is_causal is None:
        raise ValueError("is_causal must be given: True for a decoder, False for an encoder")
    of_layers: list[dict[str, Any]] = [given] * len(pairs)
    if is_captured:
        capture: Any = layers
        order = np.argsort(capture.layers, kind="stable")
        pairs, of_layers = [pairs[i] for i in order], [capture.options[i] for i in order]
    if direction not in ("backward", "forward"):
        raise ValueError(f'direction must be "backward" or "forward", got {direction!r}')
    is_backward, count = direction == "backward", pairs[0][0].shape[1]
    chosen = _chosen((-1 if is_backward else 0) if tokens is None else tokens, count)
    step = _backward if is_backward else _forward
    shares = np.zeros((chosen.size, count))
    shares[np.arange(chosen.size), chosen.ravel()] = 1
    each = list(zip(pairs, of_layers, strict=True))
    for (query, key), how in reversed(each) if is_backward else each:
        dtype = arithmetic(query.dtype)
        q, k = (widened(x).astype(dtype, copy=False) for x in (query, key))
        shares = shares / 2 + step(shares.astype(dtype), q, k, how) / 2
    return shares.astype(dtype).reshape(*chosen.shape, count)


def _backward(shares: Array, query: Array, key: Array, options: dict[str, Any]) -> Array:
    """Return what the tokens that are looked at get of each row of shares: P.T @ row."""
    sums = [
        fastattn.attention_statistics(
            query, key, column_sums=True, row_weights=row, **options
        ).column_sums
        for row in shares
    ]
    mean: Array = np.reshape(sums, (len(shares), *query.shape[:2])).mean(axis=1)
    return mean


def _forward(shares: Array, query: Array, key: Array, options: dict[str, Any]) -> Array:
    """Return what the tokens that look get of each row of shares: P @ row."""
    value = np.broadcast_to(shares.T, (len(key), *shares.T.shape))
    mean: Array = fastattn.attention(query, key, value, **options).mean(axis=0)
    return mean.T


def _pairs(layers: Any) -> list[tuple[Array, Array]]:
    """Return the layers' queries and keys."""
    rule = 'layers must be pairs (query, key), or a capture with what=("query", "key")'
    if hasattr(layers, "query") and hasattr(layers, "key"):
        query, key = layers.query, layers.key
        if query is None or key is None:
            missing = "query" if query is None else "key"
            raise ValueError(f"{rule}, got a capture without {missing}")
        layers = zip(query, key, strict=True)
    try:
        layers = [tuple(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"{rule}, not {type(layers).__name__}") from None
    pairs: list[tuple[Array, Array]] = []
    for i, layer in enumerate(layers):
        if len(layer) != 2:
            raise ValueError(f"{rule}, got {len(layer)} arrays in layer {i}")
        query, key = floats(f"query of layer {i}", layer[0]), floats(f"key of layer {i}", layer[1])
        if query.ndim != 3 or 0 in query.shape:
            raise ValueError(
                f"query of layer {i} must have shape (heads, tokens, head_dim), without 0, "
                f"got {query.shape}"
            )
        heads, *rest = query.shape
        if key.ndim != 3 or [*key.shape[1:]] != rest or not key.shape[0] or heads % key.shape[0]:
            raise ValueError(
                f"key of layer {i} must have shape (kv_heads, {rest[0]}, {rest[1]}), like its "
                f"query, with kv_heads a divisor of {heads}, got {key.shape}"
            )
        if pairs and rest[0] != pairs[0][0].shape[1]:
            raise ValueError(
                f"layers must have equally many tokens, got {pairs[0][0].shape[1]} in layer 0 and "
                f"{rest[0]} in layer {i}"
            )
        pairs.append((query, key))
    if not pairs:
        raise ValueError(f"{rule}, got none")
    return pairs


def _chosen(tokens: Any, count: int) -> Array:
    """Return the numbers of the chosen tokens, from 0 on; of no axis for one number."""
    array = as_array("tokens", tokens, "integers, or an int")
    if array.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, or an int, not {array.dtype.name}")
    if array.ndim > 1:
        raise ValueError(f"tokens must be an int or have one axis, got tokens.shape={array.shape}")
    for token in array[(array < -count) | (array >= count)][:1]:
        raise ValueError(f"tokens must be within {-count}..{count - 1}, got {token}")
    return np.where(array < 0, array.astype(np.int64) + count, array.astype(np.int64))
