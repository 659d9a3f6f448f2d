# SPDX-License-Identifier: Apache-2.0
"""What JAX users call: the fused kernel with the signature of `jax.nn.dot_product_attention`.

Arguments are checked while JAX traces. The kernel is then called with the buffers that XLA has, in
place, and writes into those that XLA wants: `fastattn.attention`, and `attention_backward` for the
gradient. No array of JAX is touched in a callback: making or reading one there may wait for the
thread that it runs on. Where arrays are sharded, each device calls the kernel with its own shards.

Differences from jax.nn, and what a call costs: docs/jax.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from jax._src.dispatch import prim_requires_devices_during_lowering
    from jax.custom_derivatives import SymbolicZero
    from jax.experimental.custom_partitioning import (
        ArrayMapping,
        SdyShardingRule,
        custom_partitioning,
    )
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir, xla
    from jax.sharding import NamedSharding, PartitionSpec
except ImportError as error:
    raise ImportError(f"fastattn.jax needs JAX ({error}): pip install jax") from error

import fastattn
from fastattn._arguments import FLOAT_NAMES, finite_number, sizes

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["dot_product_attention", "dot_product_attention_backward"]

IMPLEMENTATIONS = (None, "xla", "cudnn")  # of jax.nn: accepted, and all the same here


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: Literal[False] = False,
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute attention on the CPU with the signature and meaning of JAX's function.

    In `jax.jit`, `jax.vmap` and `jax.grad` (reverse mode, first order) too; with respect to query,
    key, value, bias and scale. Arrays that are sharded by batch or heads stay so.

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

    Warns
    -----
    UserWarning
        Arrays are sharded in another way, so every device gathers them and computes everything.

    See Also
    --------
    fastattn.attention : takes arrays of JAX too, outside of transformations.
    dot_product_attention_backward : the gradients, from an lse that is given.

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
    call, arrays = _checked(
        query, key, value, bias, mask, scale, is_causal, key_value_seq_lengths, local_window_size
    )
    query, key, value, bias, mask, kv_lengths = arrays
    q_len = query.shape[1]
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, query.shape[0], q_len)

    rows = None
    if q_lengths is not None:
        rows = (jnp.arange(q_len) < q_lengths[:, None])[:, None, :, None]
        if mask is None:  # it is never expanded, and the rows are not computed
            mask, rows = rows, None
    out, lse = _attend(call, *_varying(query, key, value, bias, mask, kv_lengths))
    if rows is not None:
        rows = rows.swapaxes(1, 2)
        out = jnp.where(rows, out, 0)
    if not return_residual:
        return out.reshape(shape)
    if rows is not None:
        lse = jnp.where(rows[..., 0], lse, -jnp.inf)
    residual = jax.lax.stop_gradient(lse.astype(key.dtype))
    return out.reshape(shape), residual.reshape(shape[:-1])


def dot_product_attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of `dot_product_attention` from what it returned.

    `jax.grad` needs no call of this. It is for keys that are a part of more, as on one of several
    devices: out and lse are then those over all keys, and the gradients of the parts add up.

    Parameters
    ----------
    grad_out : array of the shape and dtype of out
        The gradient of a loss with respect to out.
    query, key, value
        Those of the call.
    out, lse
        What the call returned with ``return_residual=True``, or over all keys.
    bias, mask, scale, is_causal, key_value_seq_lengths, local_window_size
        Those of the call. bias has no gradient here.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and dtypes of query, key and value

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule.

    Warns
    -----
    UserWarning
        As `dot_product_attention`.

    See Also
    --------
    fastattn.attention_backward : with every argument, on arrays outside of transformations.

    Examples
    --------
    >>> import jax, fastattn.jax
    >>> x = jax.numpy.eye(3)[:, None]
    >>> out, lse = fastattn.jax.dot_product_attention(x, x, x, return_residual=True)
    >>> _, dk, _ = fastattn.jax.dot_product_attention_backward(out, x, x, x, out, lse)
    >>> dk.shape
    (3, 1, 3)
    """
    shapes = [jnp.shape(x) for x in (query, key, value)]
    factor = scale if isinstance(scale, jax.core.Tracer) else None
    call, arrays = _checked(
        query, key, value, bias, mask, scale, is_causal, key_value_seq_lengths, local_window_size
    )
    query = arrays[0]
    for name, x, shape in (("grad_out", grad_out, shapes[0]), ("out", out, shapes[0])):
        if jnp.shape(x) != shape:
            raise ValueError(
                f"{name} must have query's shape, {shape}, got {name}.shape={jnp.shape(x)}"
            )
        if jnp.result_type(x) != query.dtype:
            raise TypeError(
                f"{name} must have query's dtype, {query.dtype}, not {jnp.result_type(x)}"
            )
    if jnp.shape(lse) != shapes[0][:-1]:
        raise ValueError(
            f"lse must have query's shape without head_dim, {shapes[0][:-1]}, "
            f"got lse.shape={jnp.shape(lse)}"
        )
    if not jnp.issubdtype(jnp.result_type(lse), jnp.floating):
        raise TypeError(f"lse must be an array of floats, not {jnp.result_type(lse)}")
    grad_out, out = (jnp.reshape(x, query.shape) for x in (grad_out, out))
    lse = jnp.reshape(lse, query.shape[:-1]).astype(jnp.promote_types(query.dtype, jnp.float32))
    results = _gradients(call, *_varying(grad_out, *arrays[:3], out, lse, *arrays[3:]))
    dq, dk, dv = (x.reshape(shape) for x, shape in zip(results, shapes, strict=True))
    return dq if factor is None else dq * factor.astype(dq.dtype), dk, dv


def _checked(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    scale: Any,
    is_causal: bool,
    key_value_seq_lengths: Any,
    local_window_size: Any,
) -> tuple[_Attention, tuple[Any, ...]]:
    """Return a call's static part, and its arrays: with batch, and in the dtypes of the kernel."""
    inputs = {"query": query, "key": key, "value": value}
    query, key, value = (_four_axes(name, x) for name, x in inputs.items())
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
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, kv_len)
    call = _Attention(scale, bool(is_causal), window)
    return call, (query, key, value, bias, mask, kv_lengths)


def _four_axes(name: str, x: Any) -> Any:
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
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


def _varying(*arguments: Any) -> tuple[Any, ...]:
    """Let all arguments vary over every axis of a shard_map over which one of them does."""
    traced = (x for x in arguments if isinstance(x, jax.core.Tracer))
    every = set().union(*map(_varies, traced))
    if not every:
        return arguments
    return tuple(
        x
        if x is None or _varies(x) == every
        else jax.lax.pcast(x, tuple(every - _varies(x)), to="varying")
        for x in arguments
    )


def _varies(x: Any) -> Any:
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before 0.10: vma


# A call of the kernel, one way or the other: what it takes and gives, and how it is done. Axes are
# named by letters: batch, the lengths of queries and of keys, query's heads, key's heads (n),
# head_dim. vmap puts any number of axes before these.
QUERY, KEY, LSE, PAIRS, LENGTHS = "bqhd", "bknd", "bqh", "bhqk", "b"


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The static part of a call, and the call itself: equal ones are compiled once."""

    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None

    takes = (QUERY, KEY, KEY, PAIRS, PAIRS, LENGTHS)
    gives = (QUERY, LSE)

    def results(self, query: Any, *_: Any) -> list[tuple[Any, Any]]:
        """Return, for each result, which argument has its axes, and its dtype."""
        return [(query, query.dtype), (query, jnp.promote_types(query.dtype, jnp.float32))]

    @property
    def is_positional(self) -> bool:
        """Whether what a query sees depends on where it stands among the queries."""
        return self.is_causal or self.window is not None

    def options(self, bias: Any, mask: Any, kv_lengths: Any) -> dict[str, Any]:
        """Return the arguments of `fastattn.attention` beside query, key and value."""
        return {
            "bias": bias,
            "mask": mask,
            "kv_lengths": kv_lengths,
            "scale": self.scale,
            "is_causal": self.is_causal,
            "window": self.window,
            "query_offset": 0 if self.is_positional else None,
        }

    def __call__(self, results: list[Array], *arguments: Any) -> None:
        """Fill results = (out, lse)."""
        out, lse = results
        query, key, value, bias, mask, kv_lengths = arguments
        inputs = (_heads_first(x, out.shape[:-4]) for x in (query, key, value))
        options = self.options(bias, mask, kv_lengths)
        _, heads_first = fastattn.attention(
            *inputs, **options, out=out.swapaxes(-3, -2), return_lse=True
        )
        lse[...] = heads_first.swapaxes(-2, -1)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The gradient of a call."""

    call: _Attention
    return_dbias: bool

    takes = (QUERY, QUERY, KEY, KEY, QUERY, LSE, PAIRS, PAIRS, LENGTHS)
    gives = (QUERY, KEY, KEY, PAIRS)

    def results(self, _grad_out: Any, *arguments: Any) -> list[tuple[Any, Any]]:
        """Return, for each result, which argument has its axes, and its dtype."""
        inputs = (*arguments[:3], arguments[5]) if self.return_dbias else arguments[:3]
        return [(x, x.dtype) for x in inputs]

    @property
    def is_positional(self) -> bool:
        """Whether what a query sees depends on where it stands among the queries."""
        return self.call.is_positional

    def __call__(self, results: list[Array], *arguments: Any) -> None:
        """Fill results = (dq, dk, dv), and dbias if asked for."""
        lead = results[0].shape[:-4]
        grad_out, query, key, value, out, lse, bias, mask, kv_lengths = arguments
        grad_out, query, key, value, out = (
            _heads_first(x, lead) for x in (grad_out, query, key, value, out)
        )
        if self.return_dbias:  # one for each of what vmap maps
            bias = _mapped(bias, lead, 4)
        grads = fastattn.attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            _mapped(lse, lead, 3).swapaxes(-2, -1),
            **self.call.options(bias, mask, kv_lengths),
            return_dbias=self.return_dbias,
        )
        for result, grad in zip(results[:3], grads, strict=False):
            result[...] = grad.swapaxes(-3, -2)
        if self.return_dbias:
            results[3][...] = grads[3]


def _heads_first(x: Array, lead: tuple[int, ...]) -> Array:
    """Return a view (..., batch, heads, length, head_dim) of (..., batch, length, heads, head_dim).

    With all the axes that vmap put before batch, which only some of the arguments have.
    """
    return _mapped(x, lead, 4).swapaxes(-3, -2)


def _mapped(x: Array, lead: tuple[int, ...], ndim: int) -> Array:
    """Return a view with all the axes that vmap put before an array's own ndim."""
    own = x.shape[-ndim:]
    return x if x.shape == lead + own else np.broadcast_to(x, lead + own)


# The primitive: a call, in jaxprs. It is lowered to what jax.experimental.buffer_callback is, which
# cannot be partitioned itself: the computation of one device is a module of its own, and a callback
# is a number in the module that is compiled. So the number is taken there, before. JAX has no
# public name for the target and for the callbacks of a module, nor for the set of primitives whose
# lowering asks for devices.

CALLBACK = "xla_buffer_python_cpu_callback"
_kernel = Primitive("fastattn")
_kernel.multiple_results = True
_kernel.def_impl(lambda *given, **how: xla.apply_primitive(_kernel, *given, **how))
prim_requires_devices_during_lowering.add(_kernel)


def _run(call: _Attention | _Backward, *arguments: Any) -> list[Any]:
    """Return the results of the call; None stands for an argument that is not given."""
    given, tree = jax.tree.flatten(arguments)
    results: list[Any] = _kernel.bind(*given, call=call, tree=tree)
    return results


def _types(*given: Any, call: Any, tree: Any) -> list[Any]:
    """Return the types of the results, sharded as what they are like if shardings are explicit."""
    lead = given[0].ndim - len(QUERY)
    axes = [list(zip(x.shape, _padded(x.sharding.spec, x.ndim), strict=True)) for x in given]
    mapped = [next((x[i] for x in axes if x[i][0] != 1), (1, None)) for i in range(lead)]
    types = []
    for (like, dtype), names in zip(call.results(*tree.unflatten(given)), call.gives, strict=False):
        own = next(own for x, own in zip(given, axes, strict=True) if x is like)
        shape, spec = zip(*mapped, *own[lead:][: len(names)], strict=True)
        sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
        types.append(like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return types


def _padded(spec: Any, ndim: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (ndim - len(spec)))


def _batch(given: Any, axes: Any, **how: Any) -> tuple[list[Any], list[int]]:
    """Put the axis that vmap maps first; of size 1 where it maps none."""
    given = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(given, axes, strict=True)
    ]
    results = _kernel.bind(*given, **how)
    return results, [0] * len(results)


def _no_jvp(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "fastattn.jax has first derivatives in reverse mode alone; differentiate "
        "jax.nn.dot_product_attention for second ones, jvp, linearize and hessian"
    )


def _lower(context: Any, *operands: Any, call: Any, tree: Any) -> Any:
    """Call back with XLA's buffers: on each device with its shards, where there is a mesh."""

    def callback(_context: Any, *buffers: Any) -> tuple[()]:
        arrays = [np.asarray(x) for x in buffers]
        call(arrays[tree.num_leaves :], *tree.unflatten(arrays[: tree.num_leaves]))
        return ()

    module = context.module_context
    module.add_host_callback(callback)
    index = np.uint64(len(module.host_callbacks) - 1)

    def compute(*given: Any) -> tuple[Any, ...]:
        types = tuple(_types(*map(jax.typeof, given), call=call, tree=tree))
        results: tuple[Any, ...] = jax.ffi.ffi_call(CALLBACK, types)(*given, index=index)
        return results

    run: Any = compute
    where = module.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        _warn_of_axes(where.mesh, where.manual_axes)
    elif where.abstract_mesh is not None:
        takes, gives = _names(call, tree, context.avals_in)
        sharing = _Sharing(call.is_positional, takes, gives, compute)
        run = custom_partitioning(compute)
        run.def_partition(
            sharing.partition,
            sharing.infer_from_operands,
            decode_shardings=False,  # it may fail, and then ends the process; _spec does not
            sharding_rule=sharing.rule(context.avals_in, context.avals_out),
        )
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


_kernel.def_abstract_eval(_types)
batching.primitive_batchers[_kernel] = _batch
ad.primitive_jvps[_kernel] = _no_jvp
mlir.register_lowering(_kernel, _lower, platform="cpu")


# Sharding: which devices compute what, once XLA's partitioner, which calls back here, knows how the
# arrays of a call are sharded.

Axes = tuple[str, ...]  # of a mesh, the major one first
Names = tuple[str, ...]  # of the axes of an array
MEANING = {
    "b": "batch",
    "q": "the queries' length",
    "k": "the keys' length",
    "h": "the queries' heads",
    "n": "the keys' heads",
    "d": "head_dim",
}


def _names(call: Any, tree: Any, given: Any) -> tuple[list[Names], list[Names]]:
    """Return the names of the axes of what is given and of the results."""
    mapped = [f"vmap{i}" for i in range(given[0].ndim - len(QUERY))]
    arguments = zip(call.takes, tree.unflatten(given), strict=True)
    takes = [(*mapped, *names) for names, x in arguments if x is not None]
    return takes, [(*mapped, *names) for names in call.gives]


@dataclasses.dataclass(frozen=True)
class _Sharing:
    """A call whose arrays are yet to be sharded."""

    is_positional: bool
    takes: list[Names]
    gives: list[Names]
    compute: Any

    def rule(self, given: Any, results: Any) -> Any:
        """Return which axes Shardy shards alike; those of size 1 stay whole."""

        def mapping(array: str, x: Any, names: Names) -> Any:
            axes = zip(x.shape, names, strict=True)
            return ArrayMapping(*(name if n > 1 else f"one_{array}_{name}" for n, name in axes))

        return SdyShardingRule(
            tuple(mapping(f"in{i}", x, self.takes[i]) for i, x in enumerate(given)),
            tuple(mapping(f"out{i}", x, self.gives[i]) for i, x in enumerate(results)),
        )

    def infer_from_operands(self, mesh: Any, given: Any, results: Any) -> tuple[Any, ...]:
        """Return how the results are sharded, for the partitioner before Shardy."""
        plan = self._plan(mesh, zip(given, self.takes, strict=True))
        gives = zip(results, self.gives, strict=False)
        return tuple(_named(mesh, _kept(plan, *x)) for x in gives)

    def partition(self, mesh: Any, given: Any, results: Any) -> tuple[Any, ...]:
        """Return what each device computes, and how arguments and results are to be sharded."""
        taken = list(zip(given, self.takes, strict=True))
        gives = list(zip(results, self.gives, strict=False))
        plan = self._plan(mesh, taken + gives)
        _warn_of_gathers(mesh, plan, taken)
        in_specs = [_kept(plan, *x) for x in taken]
        out_specs = [_kept(plan, *x) for x in gives]
        used = [axis for axis in mesh.axis_names if any(axis in axes for axes in plan.values())]

        def compute(*shards: Any) -> tuple[Any, ...]:
            """Add up what is a sum over an axis that is sharded, as dk is over query's heads."""
            summed = (tuple(a for a in used if not any(a in x for x in s)) for s in out_specs)
            return tuple(
                jax.lax.psum(x, axes) if axes else x
                for x, axes in zip(self.compute(*shards), summed, strict=True)
            )

        results, given = ([_named(mesh, x) for x in specs] for specs in (out_specs, in_specs))
        return mesh, compute, tuple(results), tuple(given)

    def _plan(self, mesh: Any, arrays: Any) -> dict[str, Axes]:
        """Return over which axes of the mesh each axis of the call is to be sharded.

        Where arrays disagree, the first one counts.
        """
        whole = {"k", "d", "q"} if self.is_positional else {"k", "d"}
        sizes: dict[str, int] = {}
        asked: dict[str, Axes] = {}
        for x, names in arrays:
            for name, size, axes in zip(names, x.shape, _spec(mesh, x), strict=True):
                sizes[name] = max(size, sizes.get(name, 1))
                name = "h" if name == "n" else name  # key's heads go with query's
                free = not any(axis in other for other in asked.values() for axis in axes)
                if size > 1 and axes and free and name not in whole:
                    asked.setdefault(name, axes)

        def fit(axes: Axes, size: int) -> Axes:
            """Return the longest beginning of the axes that divides the size."""
            counts = range(len(axes), -1, -1)
            return next(axes[:n] for n in counts if size % _count(mesh, axes[:n]) == 0)

        plan = {name: fit(axes, sizes[name]) for name, axes in asked.items() if name != "h"}
        heads = asked.get("h", ())
        plan["n"] = fit(heads, sizes["n"])
        plan["h"] = plan["n"]
        if _count(mesh, plan["n"]) == sizes["n"]:  # one of key's each: query's may be split further
            plan["h"] += fit(heads[len(plan["n"]) :], sizes["h"] // sizes["n"])
        return plan


def _count(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _spec(mesh: Any, x: Any) -> list[Axes]:
    """Return the axes of the mesh over which each axis of an array is sharded.

    Nothing if they cannot say it, as where one axis of the mesh shards two of the array, or if no
    sharding is known yet.
    """
    ndim = len(x.shape)
    if x.sharding is None:
        return [()] * ndim
    slices = x.sharding.devices_indices_map((mesh.size,) * ndim)  # which every sharding divides
    starts = np.array([[part.start or 0 for part in slices[one]] for one in mesh.devices.flat])
    starts = starts.reshape(*mesh.devices.shape, ndim)
    steps = {  # by which the first index of a shard differs from one device to the next
        axis: starts.take(1, at).reshape(-1, ndim)[0]
        for at, (axis, size) in enumerate(mesh.shape.items())
        if size > 1
    }
    spec = [
        tuple(sorted((axis for axis in steps if steps[axis][i]), key=lambda axis: -steps[axis][i]))
        for i in range(ndim)
    ]
    return spec if _named(mesh, spec).is_equivalent_to(x.sharding, ndim) else [()] * ndim


def _named(mesh: Any, spec: list[Axes]) -> Any:
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))


def _kept(plan: dict[str, Axes], x: Any, names: Names) -> list[Axes]:
    """Return the axes of the mesh over which each axis of an array is to be sharded."""
    return [plan.get(name, ()) if n > 1 else () for n, name in zip(x.shape, names, strict=True)]


def _warn_of_gathers(mesh: Any, plan: dict[str, Axes], taken: list[tuple[Any, Names]]) -> None:
    gathered: set[str] = set()
    for x, names in taken:
        spec = _spec(mesh, x)
        if not any(spec) and x.sharding is not None and not x.sharding.is_fully_replicated:
            gathered.add("an array whose sharding no axes of the mesh express")
        for name, axes, kept in zip(names, spec, _kept(plan, x, names), strict=True):
            if _count(mesh, axes) > _count(mesh, kept):
                gathered.add(f"{MEANING.get(name, 'an axis of vmap')}, sharded over {axes},")
    for what in sorted(gathered):
        warnings.warn(
            f"fastattn.jax gathers {what} on every device, which then computes all of it: batch "
            "stays sharded; heads, if the devices divide key's; and the queries' length without "
            "is_causal and local_window_size",
            stacklevel=2,
        )


def _warn_of_axes(mesh: Any, manual: Any) -> None:
    """Warn where no partitioner calls back: in a shard_map over some axes of a mesh."""
    others = tuple(axis for axis, n in mesh.shape.items() if n > 1 and axis not in manual)
    if others:
        warnings.warn(
            f"fastattn.jax does not share out a call over {others} of the mesh: in a shard_map "
            f"over {tuple(manual)} alone, every device computes it all; map over all of the axes",
            stacklevel=2,
        )


def _results(call: _Attention, *arguments: Any) -> list[Any]:
    """Return out, and lse of shape (batch, q_len, q_heads)."""
    return _run(call, *arguments)


def _forward(call: _Attention, *primals: Any) -> Any:
    """Return the results and what the gradient needs; None stands for what was not given."""
    arguments = tuple(x if x is None else x.value for x in primals)
    bias = primals[3]
    results = _results(call, *arguments)
    wants_dbias = () if bias is not None and bias.perturbed else None  # as structure: it is static
    return results, (*arguments[:3], *results, *arguments[3:], wants_dbias)


def _backward(call: _Attention, residuals: tuple[Any, ...], grads: list[Any]) -> Any:
    """Return the gradients by what _results takes; lse has none."""
    *arguments, wants_dbias = residuals
    grad_out = grads[0]
    if isinstance(grad_out, SymbolicZero):
        grad_out = jnp.zeros_like(arguments[3])
    return_dbias = wants_dbias is not None
    results = _run(_Backward(call, return_dbias), grad_out, *arguments)
    dbias = results[3] if return_dbias else None
    return (*results[:3], dbias, None, None)


_differentiable = jax.custom_vjp(_results, nondiff_argnums=(0,))
_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
_attend = jax.jit(_differentiable, static_argnums=0)  # so that a call outside of jit is quick


@functools.partial(jax.jit, static_argnums=0)
def _gradients(call: _Attention, *arguments: Any) -> list[Any]:
    """Return dq, dk and dv."""
    return _run(_Backward(call, return_dbias=False), *arguments)
