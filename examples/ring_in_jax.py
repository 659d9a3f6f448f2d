#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ring attention in JAX: a sequence over devices that each have some rows of it, with gradients.

    pip install jax==0.10.2
    python examples/ring_in_jax.py --devices 4

`ring_attention` is called in `jax.shard_map`. Keys and values go from device to device by
`jax.lax.ppermute`, and each device attends to those that it has. The backward pass sends them round
again, with their gradients, so that a device keeps its own rows alone between the two. For causal
attention each device has an early and a late chunk of the rows (`zigzag`), and so as much work as
the others. What is printed is how far results and gradients are from those of one device.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fastattn.jax import dot_product_attention, dot_product_attention_backward

LENGTH, Q_HEADS, KV_HEADS, HEAD_DIM = 1024, 8, 2, 64


def zigzag(length: int, devices: int) -> jax.Array:
    """Return the positions of all rows, in the order in which the devices have them.

    Of 2 * devices chunks, device i has those with the numbers i and 2 * devices - 1 - i.
    """
    if length % (2 * devices):
        raise ValueError(f"length must be a multiple of 2 * devices = {2 * devices}, got {length}")
    numbers = [(i, 2 * devices - 1 - i) for i in range(devices)]
    return jnp.arange(length).reshape(2 * devices, -1)[jnp.array(numbers)].ravel()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ring_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, axis: str, is_causal: bool
) -> jax.Array:
    """Attend to the keys of all devices along an axis of the mesh, in `jax.shard_map`.

    Parameters
    ----------
    query, key, value : array of shape (batch, rows, heads, head_dim)
        This device's rows; those of `zigzag` if is_causal.
    axis : str
        The name of the mesh's axis.
    is_causal : bool
        Query i sees key j iff j <= i, in the whole sequence.

    Returns
    -------
    out : array of the shape and dtype of query
    """
    return _forward(query, key, value, axis, is_causal)[0]


def _forward(query: Any, key: Any, value: Any, axis: str, is_causal: bool) -> Any:
    """Return the result, and what the backward pass needs: it is all of this device's rows."""
    block = (key, value)
    out, lse = _part(query, *block, is_causal)
    for step in range(1, jax.lax.axis_size(axis)):
        block = _to_next_device(block, axis)
        if is_causal:
            part, part_lse = jax.lax.cond(
                _is_earlier(step, axis), _early_keys, _late_queries, query, *block
            )
        else:
            part, part_lse = _part(query, *block, False)
        both = jnp.logaddexp(lse, part_lse)  # the own keys came first, so it is finite
        out = out * jnp.exp(lse - both)[..., None] + part * jnp.exp(part_lse - both)[..., None]
        lse = both
    return out.astype(query.dtype), (query, key, value, out, lse)


def _backward(axis: str, is_causal: bool, saved: Any, grad_out: Any) -> Any:
    """Return dq, dk and dv; dk and dv go round with their keys, and come home at the end."""
    query, key, value, *results = saved
    rows = (_wide(grad_out), query, *results)
    block = (key, value)
    dq, *of_block = _part_backward(rows, *block, is_causal)
    for step in range(1, jax.lax.axis_size(axis)):
        block, of_block = _to_next_device((block, of_block), axis)
        if is_causal:
            part, *of_part = jax.lax.cond(
                _is_earlier(step, axis), _early_keys_backward, _late_queries_backward, rows, *block
            )
        else:
            part, *of_part = _part_backward(rows, *block, False)
        dq = dq + part
        of_block = [a + b for a, b in zip(of_block, of_part, strict=True)]
    dk, dv = _to_next_device(of_block, axis)
    return tuple(x.astype(query.dtype) for x in (dq, dk, dv))


ring_attention.defvjp(_forward, _backward)


def _to_next_device(arrays: Any, axis: str) -> Any:
    devices = jax.lax.axis_size(axis)
    return jax.lax.ppermute(arrays, axis, [(i, (i + 1) % devices) for i in range(devices)])


def _is_earlier(step: int, axis: str) -> Any:
    """Return whether the keys that are here after so many steps are a device's before this one."""
    return step <= jax.lax.axis_index(axis)


# What a device attends to. Results and gradients are of float32 at least, also where messages are
# of half precision: what is rounded once does not get worse with more devices.


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _part(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
    """Return out and lse over one block of keys; causal over the own rows, which are in order."""
    arrays = map(_wide, (query, key, value))
    return dot_product_attention(*arrays, is_causal=is_causal, return_residual=True)


def _part_backward(rows: Any, key: Any, value: Any, is_causal: bool) -> Any:
    """Return dq, dk and dv of one block of keys, given out and lse over all keys."""
    grad_out, query, out, lse = rows
    arrays = map(_wide, (grad_out, query, key, value, out, lse))
    return dot_product_attention_backward(*arrays, is_causal=is_causal)


# Causal attention to another device's rows in zigzag. If that device is before this one, all of
# the queries see its early keys and none the late ones; if it is after, the late queries see all
# of its keys and the early ones none. Either is half of the pairs, and there is nothing to mask.


def _early_keys(query: Any, key: Any, value: Any) -> Any:
    return _part(query, _early(key), _early(value), False)


def _late_queries(query: Any, key: Any, value: Any) -> Any:
    out, lse = _part(_late(query), key, value, False)
    return _below(out, 0), _below(lse, -jnp.inf)


def _early_keys_backward(rows: Any, key: Any, value: Any) -> Any:
    dq, dk, dv = _part_backward(rows, _early(key), _early(value), False)
    return dq, _above(dk, 0), _above(dv, 0)


def _late_queries_backward(rows: Any, key: Any, value: Any) -> Any:
    dq, dk, dv = _part_backward(tuple(map(_late, rows)), key, value, False)
    return _below(dq, 0), dk, dv


def _early(x: Any) -> Any:
    return x[:, : x.shape[1] // 2]


def _late(x: Any) -> Any:
    return x[:, x.shape[1] // 2 :]


def _above(x: Any, fill: float) -> Any:
    """Return x with as many rows of another number after it."""
    return jnp.concatenate([x, jnp.full_like(x, fill)], axis=1)


def _below(x: Any, fill: float) -> Any:
    """Return x with as many rows of another number before it."""
    return jnp.concatenate([jnp.full_like(x, fill), x], axis=1)


# The functions above are the recipe; what is below runs it.


def sharded_attention(devices: int, is_causal: bool) -> Any:
    """Return a mesh of so many devices, and attention over it of whole arrays, in their order."""
    mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "sequence")

    def attend(query: Any, key: Any, value: Any) -> Any:
        return ring_attention(query, key, value, "sequence", is_causal)

    return mesh, jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)


def results_and_gradients(attend: Any, arrays: Any, grad_out: Any) -> Any:
    """Return out, dq, dk and dv."""
    out, backward = jax.vjp(attend, *arrays)
    return out, *backward(grad_out)


def main() -> None:
    """Print the largest differences from one device that has all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--length", type=int, default=LENGTH)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    order = zigzag(arguments.length, arguments.devices)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)
    *arrays, grad_out = (
        jax.random.normal(key, (1, arguments.length, n, HEAD_DIM))
        for key, n in zip(keys, heads, strict=True)
    )
    for is_causal in (False, True):
        one_device = functools.partial(dot_product_attention, is_causal=is_causal)
        expected = results_and_gradients(one_device, arrays, grad_out)
        mesh, attend = sharded_attention(arguments.devices, is_causal)
        sharding = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        *rows, of_out = (jax.device_put(x[:, order], sharding) for x in (*arrays, grad_out))
        run = jax.jit(functools.partial(results_and_gradients, attend))
        for name, x, right in zip(
            ("out", "dq", "dk", "dv"), run(rows, of_out), expected, strict=True
        ):
            difference = abs(x - right[:, order]).max()
            sys.stdout.write(f"is_causal={is_causal}, {name}: differs by {difference:.1e}\n")


if __name__ == "__main__":
    main()
