# SPDX-License-Identifier: Apache-2.0
"""What JAX users call: the fused kernel with the signature of `jax.nn.dot_product_attention`.

Arguments are checked while JAX traces. The kernel is then called with the buffers that XLA has, in
place, and writes into those that XLA wants: `fastattn.attention`, and `attention_backward` for the
gradient. No array of JAX is touched in a callback: making or reading one there may wait for the
thread that it runs on.

Differences from jax.nn, and what a call costs: docs/jax.md.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from jax.custom_derivatives import SymbolicZero
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as error:
    raise ImportError(f"fastattn.jax needs JAX ({error}): pip install jax") from error

import fastattn
from fastattn._arguments import FLOAT_NAMES, finite_number, sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["dot_product_attention"]

Shape: Any = jax.ShapeDtypeStruct
IMPLEMENTATIONS = (None, "xla", "cudnn")  # of jax.nn: accepted, and all the same here


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Compute attention on the CPU with the signature and meaning of JAX's function.

    In `jax.jit`, `jax.vmap` and `jax.grad` (reverse mode, first order) too; with respect to query,
    key, value, bias and scale.

    Parameters
    ----------
    query : array of shape (batch, q_len, q_heads, head_dim) or without batch
        float16, bfloat16, float32 or float64.
    key, value : array of shape (batch, kv_len, kv_heads, head_dim) or without batch
        Of query's dtype. q_heads is a multiple of kv_heads.
    bias : array, broadcastable to (batch, q_heads, q_len, kv_len), optional
        Added to the scores; -inf masks the pair.
    mask : array of bool, broadcastable to (batch, q_heads, q_len, kv_len), optional
        True = attend.
    scale : float, or traced scalar, optional
        1 / sqrt(head_dim) unless given. If it is traced, query is multiplied by it, in its dtype.
    is_causal : bool
        Query i sees key j iff j <= i, whatever the two lengths.
    query_seq_lengths, key_value_seq_lengths : array of int, shape (batch,), optional
        Queries from there on give 0; keys from there on are not seen.
    local_window_size : int or (left, right), optional
        Key j is seen iff ``-left <= j - i <= right``; an int is both.
    implementation : None, "xla" or "cudnn"
        There is one implementation here; the argument changes nothing.
    return_residual : bool
        Return (out, lse), without a gradient for lse.

    Returns
    -------
    out : array of the shape and dtype of query
        A query that sees no key gives 0.
    lse : array of shape (batch, q_len, q_heads) or without batch, of query's dtype, only if \
return_residual
        The logarithm of the sum over keys of exp(score); -inf if no key is seen.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule.

    See Also
    --------
    fastattn.attention : takes arrays of JAX too, outside of transformations.

    References
    ----------
    https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html

    Examples
    --------
    >>> import jax, fastattn.jax
    >>> x = jax.numpy.eye(3)[:, None]
    >>> jax.jit(fastattn.jax.dot_product_attention)(x, x, x).shape
    (3, 1, 3)
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None, 'xla' or 'cudnn', got {implementation!r}")
    shape = jnp.shape(query)
    query, key, value = (
        _four_axes(name, x, {3, 4})
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    batch, q_len, q_heads, _ = query.shape
    kv_len = key.shape[1]
    _check_shapes(query, key, value)
    whole = (batch, q_heads, q_len, kv_len)
    if bias is not None:
        bias = _pairs("bias", bias, whole)
        if bias.dtype == jnp.bool_ or jnp.issubdtype(bias.dtype, jnp.integer):
            bias = bias.astype(jnp.float32)
        if bias.dtype.name not in FLOAT_NAMES:
            raise TypeError(f"bias must be an array of a float dtype, not {bias.dtype.name}")
    if mask is not None:
        mask = _pairs("mask", mask, whole)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask must be an array of bool (bias is what is added), not {mask.dtype.name}"
            )
    if isinstance(scale, jax.core.Tracer):
        if scale.shape != ():
            raise ValueError(f"scale must be a number, got scale.shape={scale.shape}")
        query = query * scale.astype(query.dtype)
        scale = 1.0
    elif scale is not None:
        scale = finite_number("scale", np.asarray(scale).item() if np.ndim(scale) == 0 else scale)
    window = None if local_window_size is None else _window(local_window_size)
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, batch, q_len)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, kv_len)

    rows = None
    if q_lengths is not None:
        rows = (jnp.arange(q_len) < q_lengths[:, None])[:, None, :, None]
        if mask is None:  # it is never expanded, and the rows are not computed
            mask, rows = rows, None
    call = _Attention(scale, bool(is_causal), window)
    out, lse = _attend(call, query, key, value, bias, mask, kv_lengths)
    if rows is not None:
        out = jnp.where(rows.swapaxes(1, 2), out, 0)
    if not return_residual:
        return out.reshape(shape)
    if rows is not None:
        lse = jnp.where(rows[..., 0], lse, -jnp.inf)
    residual = jax.lax.stop_gradient(lse.astype(key.dtype).swapaxes(1, 2))
    return out.reshape(shape), residual.reshape(shape[:-1])


def _four_axes(name: str, x: Any, ndims: set[int]) -> Any:
    x = jnp.asarray(x)
    if x.ndim not in ndims:
        raise ValueError(
            f"{name} must have the axes (batch, length, heads, head_dim) or the last three, "
            f"got {name}.shape={x.shape}"
        )
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    got = f"got query.shape={query.shape}, key.shape={key.shape}, value.shape={value.shape}"
    if query.dtype.name not in FLOAT_NAMES:
        raise TypeError(
            f"query must be an array of {', '.join(FLOAT_NAMES)}, not {query.dtype.name}"
        )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, not {x.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, {got}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one batch and one head_dim, {got}")
    if query.shape[2] and (key.shape[2] == 0 or query.shape[2] % key.shape[2]):
        raise ValueError(f"query's heads must be a multiple of key's, {got}")
    sizes(*((x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)))


def _pairs(name: str, x: Any, whole: tuple[int, ...]) -> Any:
    x = jnp.asarray(x)
    full = (1,) * (4 - x.ndim) + x.shape
    if len(full) > 4 or not all(n in (1, m) for n, m in zip(full, whole, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (batch, q_heads, q_len, kv_len) = {whole}, "
            f"got {name}.shape={x.shape}"
        )
    return x.reshape(full)


def _window(sides: Any) -> tuple[int, int]:
    if isinstance(sides, numbers.Integral):
        sides = (sides, sides)
    left, right = sides
    if not all(isinstance(x, numbers.Integral) and int(x) >= 0 for x in (left, right)):
        raise ValueError(f"local_window_size must be a pair of integers >= 0, got {sides}")
    return int(left), int(right)


def _lengths(name: str, x: Any, batch: int, most: int) -> Any:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, not {x.dtype.name}")
    if x.shape != (batch,):
        raise ValueError(
            f"{name} must have shape (batch,) = {(batch,)}, got {name}.shape={x.shape}"
        )
    return jnp.clip(x, 0, most).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The static part of a call, and the call itself: equal ones are compiled once."""

    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None

    def options(self, bias: Any, mask: Any, kv_lengths: Any) -> dict[str, Any]:
        """Return the arguments of `fastattn.attention` beside query, key and value."""
        return {
            "bias": bias,
            "mask": mask,
            "kv_lengths": kv_lengths,
            "scale": self.scale,
            "is_causal": self.is_causal,
            "window": self.window,
            "query_offset": 0 if self.is_causal or self.window is not None else None,
        }

    def __call__(self, _context: Any, results: Any, *arguments: Any) -> None:
        """Fill the buffers results = (out, lse); vmap puts any number of axes before batch."""
        out, lse = map(np.asarray, results)
        query, key, value, bias, mask, kv_lengths = _arrays(arguments)
        inputs = (_heads_first(x, out.shape[:-4]) for x in (query, key, value))
        options = self.options(bias, mask, kv_lengths)
        _, lse[...] = fastattn.attention(
            *inputs, **options, out=out.swapaxes(-3, -2), return_lse=True
        )


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The gradient of a call."""

    call: _Attention
    return_dbias: bool

    def __call__(self, _context: Any, results: Any, *arguments: Any) -> None:
        """Fill the buffers results = (dq, dk, dv), and dbias if asked for."""
        results = [np.asarray(x) for x in results]
        lead = results[0].shape[:-4]
        grad_out, query, key, value, out, lse, bias, mask, kv_lengths = _arrays(arguments)
        grad_out, query, key, value, out = (
            _heads_first(x, lead) for x in (grad_out, query, key, value, out)
        )
        if self.return_dbias:  # one for each of what vmap maps
            bias = np.broadcast_to(bias, (*lead, *bias.shape[-4:]))
        grads = fastattn.attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            np.broadcast_to(lse, (*lead, *lse.shape[-3:])),
            **self.call.options(bias, mask, kv_lengths),
            return_dbias=self.return_dbias,
        )
        for result, grad in zip(results[:3], grads, strict=False):
            result[...] = grad.swapaxes(-3, -2)
        if self.return_dbias:
            results[3][...] = grads[3]


def _arrays(arguments: tuple[Any, ...]) -> list[Any]:
    """Return XLA's buffers as arrays, in place."""
    return [x if x is None else np.asarray(x) for x in arguments]


def _heads_first(x: Array, lead: tuple[int, ...]) -> Array:
    """Return a view (..., batch, heads, length, head_dim) of (..., batch, length, heads, head_dim).

    With all the axes that vmap put before batch, which only some of the arguments have.
    """
    return np.broadcast_to(x, (*lead, *x.shape[-4:])).swapaxes(-3, -2)


def _results(call: _Attention, query: Any, *rest: Any) -> Any:
    """Return out and lse, of shape (batch, q_heads, q_len)."""
    batch, q_len, q_heads, _ = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shapes = (
        Shape(query.shape, query.dtype),
        Shape((batch, q_heads, q_len), wide),
    )
    return buffer_callback(call, shapes, vmap_method="expand_dims")(query, *rest)


def _forward(call: _Attention, *primals: Any) -> Any:
    """Return the results, and what the gradient needs of the call; None is what was not given."""
    arguments = tuple(x if x is None else x.value for x in primals)
    bias = primals[3]
    results = _results(call, *arguments)
    wants_dbias = () if bias is not None and bias.perturbed else None  # as structure: it is static
    return results, (*arguments[:3], *results, *arguments[3:], wants_dbias)


def _backward(call: _Attention, residuals: tuple[Any, ...], grads: tuple[Any, Any]) -> Any:
    """Return the gradients by what _results takes; lse has none."""
    *arguments, wants_dbias = residuals
    grad_out = grads[0]
    if isinstance(grad_out, SymbolicZero):
        grad_out = jnp.zeros(grad_out.shape, grad_out.dtype)
    return_dbias = wants_dbias is not None
    inputs = (*arguments[:3], arguments[5]) if return_dbias else arguments[:3]
    shapes = tuple(Shape(x.shape, x.dtype) for x in inputs)
    run = buffer_callback(_Backward(call, return_dbias), shapes, vmap_method="expand_dims")
    results = run(grad_out, *arguments)
    dbias = results[3] if return_dbias else None
    return (*results[:3], dbias, None, None)


_differentiable = jax.custom_vjp(_results, nondiff_argnums=(0,))
_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
_attend = jax.jit(_differentiable, static_argnums=0)  # so that a call outside of jit is quick
