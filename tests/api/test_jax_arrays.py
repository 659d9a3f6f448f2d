# SPDX-License-Identifier: Apache-2.0
"""Arrays of JAX are read and returned where they lie, or refused."""

import numpy as np
import pytest

import fastattn
from tests.api.arrays import NAMES, converted, options, problem
from tests.support.child import run
from tests.support.correctness import assert_same_bits


@pytest.mark.promise("answered-in-kind")
@pytest.mark.parametrize("name", NAMES)
def test_jax_arrays_are_answered_with_jax_arrays(jax, name):
    arrays = problem(name)
    expected = fastattn.attention(*arrays, return_lse=True)
    with jax.enable_x64(name == "float64"):
        given = [jax.numpy.asarray(x) for x in arrays]
    results = fastattn.attention(*given, return_lse=True)  # float64 outside its scope too
    assert all(isinstance(x, jax.Array) for x in results)
    assert results[0].sharding == given[0].sharding
    assert_same_bits(tuple(map(np.asarray, results)), expected)


def test_all_arguments_may_be_jax_arrays(jax):
    arrays, given = problem(), options()
    results = fastattn.attention(
        *map(jax.numpy.asarray, arrays), **converted(jax.numpy.asarray, given)
    )
    assert_same_bits(np.asarray(results), fastattn.attention(*arrays, **given))


@pytest.mark.promise("foreign-arrays-are-read-in-place")
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("call", [fastattn.attention, fastattn.scaled_dot_product_attention])
def test_jax_arrays_are_read_and_returned_where_they_lie(jax, name, call, core_addresses):
    query = jax.numpy.asarray(problem(name)[0])
    out = call(query, query, query)
    assert core_addresses == [x.unsafe_buffer_pointer() for x in (query, query, query, out)]


def test_jax_results_outlive_the_call(jax):
    query = jax.numpy.asarray(problem()[0])
    kept = fastattn.attention(query, query, query)
    expected = np.array(kept)
    for _ in range(20):
        fastattn.attention(query * 2, query, query)
    assert_same_bits(np.asarray(kept), expected)


@pytest.mark.promise("nothing-is-detached-silently")
def test_tracers_are_refused(jax):
    query = jax.numpy.ones((2, 2, 3, 4))
    for transform in (jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())):
        with pytest.raises(TypeError) as error:
            transform(lambda x: fastattn.attention(x, x, x))(query)
        assert str(error.value) == (
            "query is traced by JAX (in jit, grad or vmap): use "
            "fastattn.jax.dot_product_attention there"
        )


def test_jax_arrays_that_cannot_be_read(jax):
    query = jax.numpy.ones((2, 2, 3, 4))
    gone = query + 1
    gone.delete()
    with pytest.raises(ValueError, match="key must hold numbers, got an array that was deleted"):
        fastattn.attention(query, gone, query)
    with pytest.raises(TypeError, match="key must be an array that NumPy can read: "):
        fastattn.attention(query, jax.random.key(0), query)
    with pytest.raises(TypeError, match="out must not be given if query is a JAX array"):
        fastattn.attention(query, query, query, out=np.empty(query.shape, np.float32))


def attends_on_two_devices():
    import jax

    mesh = jax.sharding.Mesh(jax.devices(), ("heads",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("heads"))
    query = jax.device_put(jax.numpy.ones((2, 3, 4)), spread)
    try:
        fastattn.attention(query, query, query)
    except TypeError as error:
        message = str(error)
    query = jax.device_put(query, jax.devices()[1])
    return message, fastattn.attention(query, query, query).devices() == query.devices()


def test_a_jax_array_on_two_devices():
    pytest.importorskip("jax", exc_type=ImportError)
    flags = "--xla_force_host_platform_device_count=2"
    message, same = run(attends_on_two_devices, env={"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    assert message == (
        "query must be on one CPU device, got an array on cpu:0, cpu:1: "
        "jax.device_put(query, jax.devices('cpu')[0])"
    )
    assert same
