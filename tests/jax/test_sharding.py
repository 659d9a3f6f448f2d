# SPDX-License-Identifier: Apache-2.0
"""Does each device attend to its own shards in fastattn.jax? With the bits of one device.

JAX is told before it starts how many devices the CPU is: all checks run in one process with four.
"""
# ruff: noqa: E501 - the tables have a line per case

import functools
import re
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fastattn.jax import dot_product_attention
from tests.support.child import run

jax.config.update("jax_platforms", "cpu")

BATCH, Q_LEN, KV_LEN, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 12, 20, 8, 4, 8
CHECKS = {}


def check(*arguments):
    """Add one check, or one for each of the arguments, to those that the child makes."""

    def add(function):
        for given in arguments or [()]:
            given = given if isinstance(given, tuple) else (given,)
            name = ", ".join([function.__name__, *map(str, given)])
            CHECKS[name] = functools.partial(function, *given)
        return function

    return add


def findings():
    """Return what each check raised, or None."""
    warnings.simplefilter("error")
    found = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function()
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def found():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return run(findings, env=env, timeout=280)


def mesh(kind="Auto"):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)


def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh(), P(*spec)))


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(kv_heads=KV_HEADS, dtype=np.float32):
    return (
        normal(BATCH, Q_LEN, Q_HEADS, HEAD_DIM, seed=1, dtype=dtype),
        normal(BATCH, KV_LEN, kv_heads, HEAD_DIM, seed=2, dtype=dtype),
        normal(BATCH, KV_LEN, kv_heads, HEAD_DIM, seed=3, dtype=dtype),
    )


def chance(*shape):
    return jnp.asarray(np.random.default_rng(4).random(shape) < 0.7)


def everything(query, key, value, **options):
    """Return out, its residual, and gradients by the three and by bias if there is one."""
    with_gradient = {"bias": options.pop("bias")} if "bias" in options else {}
    call = functools.partial(dot_product_attention, **options, return_residual=True)

    def loss(arrays, with_gradient):
        out, residual = call(*arrays, **with_gradient)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * weights).sum(), (out, residual)

    grads, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        (query, key, value), with_gradient
    )
    return results, grads


def is_same(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected
    )


def is_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (a, b)), rtol=tolerance, atol=tolerance
        ),
        actual,
        expected,
    )


def is_sharded(actual, *spec):
    axes = tuple(actual.sharding.spec)
    assert axes == spec, (axes, spec)


def collectives(function, *arguments, **options):
    """Return the names of what moves data between devices in a function that is compiled."""
    text = function.lower(*arguments, **options).compile().as_text()
    return set(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute)\(", text))


OPTIONS = {  # whose arrays are not summed over what the shardings below shard
    "nothing": {},
    "causal, window": {"is_causal": True, "local_window_size": (5, 3)},
    "full": {"bias": normal(BATCH, Q_HEADS, Q_LEN, KV_LEN, seed=5), "mask": chance(BATCH, Q_HEADS, Q_LEN, KV_LEN), "scale": 0.3},
    "lengths": {"query_seq_lengths": jnp.array([12, 5, 0, 7]), "key_value_seq_lengths": jnp.array([20, 3, 9, 0])},
    "lengths and mask": {"query_seq_lengths": jnp.array([12, 5, 0, 7]), "mask": chance(1, 1, Q_LEN, KV_LEN), "is_causal": True},
}  # fmt: skip
SHARDINGS = {
    "batch": ("x",),
    "batch over both": (("y", "x"),),
    "heads": (None, None, "y"),
    "heads over both": (None, None, ("x", "y")),
    "batch and heads": ("y", None, "x"),
}


@check(
    *(("full", sharding) for sharding in SHARDINGS),
    *((options, "batch and heads") for options in OPTIONS if options != "full"),
)
def bits_and_shardings(options, sharding):
    options, spec = OPTIONS[options], SHARDINGS[sharding]
    expected = everything(*problem(), **options)
    batch, heads = (*spec, None, None, None)[:3:2]
    of_options = {  # pairs have the axes (batch, heads, length, length)
        name: put(x, batch, heads) if np.ndim(x) == 4 and len(x) > 1 else x
        for name, x in options.items()
    }
    arrays = [put(x, *spec) for x in problem()]
    static = {"is_causal", "local_window_size", "scale"} & set(options)
    function = jax.jit(everything, static_argnames=static)
    actual = function(*arrays, **of_options)
    is_same(actual, expected)
    (out, residual), ((*grads,), of_bias) = actual
    for x in (out, *grads):
        is_sharded(x, *spec)
    is_sharded(residual, *spec)
    if of_bias:
        assert np.size(of_bias["bias"].addressable_shards[0].data) < of_bias["bias"].size
    assert not collectives(function, *arrays, **of_options)


@check("batch", "batch and heads")
def gspmd(sharding):
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        bits_and_shardings("full", sharding)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


@check(("Auto", "batch and heads"), ("Explicit", "batch"), ("Explicit", "heads"))
def calls_outside_of_jit(kind, sharding):
    spec = SHARDINGS[sharding]
    expected = everything(*problem(), is_causal=True)
    with jax.set_mesh(mesh(kind)):
        actual = everything(*(jax.device_put(x, P(*spec)) for x in problem()), is_causal=True)
    is_same(actual, expected)
    for x in (*actual[0], *actual[1][0]):
        is_sharded(x, *spec, *(None,) * (x.ndim - len(spec)) * (kind == "Explicit"))


@check("batch", "batch and heads")
def explicit_types(sharding):
    spec = SHARDINGS[sharding]
    expected = everything(*problem(), **OPTIONS["lengths"], scale=0.2)
    with jax.set_mesh(mesh("Explicit")):
        arrays = [jax.device_put(x, P(*spec)) for x in problem()]
        lengths = {k: jax.device_put(x, P(spec[0])) for k, x in OPTIONS["lengths"].items()}
        function = jax.jit(functools.partial(everything, scale=0.2))
        actual = function(*arrays, **lengths)
        assert not collectives(function, *arrays, **lengths)
        mapped = jax.jit(jax.vmap(functools.partial(dot_product_attention, is_causal=True)))
        of_mapped = mapped(*(x[:, None] for x in arrays))
    is_same(actual, expected)
    is_same(of_mapped[:, 0], dot_product_attention(*problem(), is_causal=True))
    for x in (*actual[0], *actual[1][0]):
        assert jax.typeof(x).sharding.spec == P(*spec, *(None,) * (x.ndim - len(spec)))


@check()
def sums_over_what_is_sharded():
    """Devices add up dbias, over batch, and dk, over the heads of one key."""
    options = {"bias": normal(1, Q_HEADS, 1, KV_LEN, seed=5), "is_causal": True}
    for dtype, tolerance in ((np.float32, 1e-5), (jnp.bfloat16, 0.05), (np.float16, 0.01)):
        expected = everything(*problem(1, dtype), **options)
        query, key, value = problem(1, dtype)
        arrays = [put(query, "x", None, "y"), put(key, "x"), put(value, "x")]
        function = jax.jit(everything, static_argnames="is_causal")
        actual = function(*arrays, **options)
        is_same(actual[0], expected[0])
        is_close(actual[1], expected[1], tolerance)
        is_sharded(actual[0][0], "x", None, "y")
        assert collectives(function, *arrays, **options) == {"all-reduce"}


@check()
def heads_of_one_key_on_two_devices():
    query, key, value = arrays = problem(2)
    expected = everything(*arrays)
    sharded = [put(query, None, None, ("x", "y")), put(key, None, None, "x"), value]
    actual = jax.jit(everything)(*sharded)
    is_same((actual[0], actual[1][0][0]), (expected[0], expected[1][0][0]))
    is_close(actual[1], expected[1])
    is_sharded(actual[0][0], None, None, ("x", "y"))
    assert collectives(jax.jit(everything), *sharded) == {"all-reduce"}


@check()
def arrays_that_disagree():
    query, key, value = problem()
    options = OPTIONS["full"]
    expected = everything(query, key, value, **options)
    bias = put(options["bias"], "y")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = jax.jit(functools.partial(everything, scale=0.3))(
            put(query, "x"), put(key), put(value, None, None, "x"), mask=options["mask"], bias=bias
        )
    is_close(actual, expected)


@check()
def queries_length():
    expected = everything(*problem(), mask=chance(BATCH, 1, Q_LEN, KV_LEN))
    query, key, value = problem()
    arrays, mask = [put(query, None, "x"), key, value], chance(BATCH, 1, Q_LEN, KV_LEN)
    function = jax.jit(everything)
    actual = function(*arrays, mask=mask)
    is_close(actual, expected)
    is_sharded(actual[0][0], None, "x")
    assert collectives(function, *arrays, mask=mask) == {"all-reduce"}  # dk and dv


GATHERED = {
    "the queries' length": ((None, "x"), (), {"is_causal": True}),
    "the keys' length": (("y",), ("y", "x"), {}),
    "head_dim": ((None, None, None, "x"), (None, None, None, "x"), {}),
    "the queries' heads": ((None, None, "x"), (), {}),  # 6, and 3 of the keys
}


@check(*GATHERED)
def warns(what):
    spec, of_keys, options = GATHERED[what]
    query, key, value = problem(3)
    query = query[:, :, :6]
    expected = dot_product_attention(query, key, value, **options)
    arrays = [put(query, *spec), put(key, *of_keys), put(value, *of_keys)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        function = jax.jit(functools.partial(dot_product_attention, **options))
        actual = function(*arrays)
    is_same(actual, expected)
    is_sharded(actual, *spec)  # it stays where it was, although each device has computed it
    messages = [str(x.message) for x in caught]
    assert len(messages) == 1, messages
    assert messages[0].startswith(f"fastattn.jax gathers {what}, sharded over ('x',"), messages


@check()
def what_a_mesh_cannot_say():
    flat = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    x = normal(4, 10, Q_HEADS * HEAD_DIM)

    def halves(x):  # devices 0 and 1 have the first two of batch, by half of the length
        return dot_product_attention(*[x.reshape(2, 20, Q_HEADS, HEAD_DIM)] * 3)

    expected = halves(x)
    for shardy in (True, False):
        jax.config.update("jax_use_shardy_partitioner", shardy)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                actual = jax.jit(halves)(jax.device_put(x, NamedSharding(flat, P("x"))))
        finally:
            jax.config.update("jax_use_shardy_partitioner", True)
        is_same(actual, expected)
        assert ["no axes of the mesh express" in str(x.message) for x in caught] == [True]


@check(1, 3)
def what_devices_do_not_divide(count):
    query, key, value = (x[:count] for x in problem())
    arrays = [put(x, None, None, "x") for x in (query, key, value)]

    @jax.jit
    def function(*arrays):
        return dot_product_attention(*(jnp.pad(x, ((0, 1), *[(0, 0)] * 3))[:-1] for x in arrays))

    is_same(function(*arrays), dot_product_attention(query, key, value))


@check()
def a_warning_that_is_an_error():
    query, key, value = problem()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"fastattn\.jax gathers head_dim"):
        jax.jit(dot_product_attention)(put(query, None, None, None, "x"), key, value)


@check()
def transformations():
    """Compose jit, vmap, scan, checkpoint and grad over arrays that are sharded by batch."""
    stacked = [jnp.stack([x, 2 * x, -x]) for x in problem()]
    call = functools.partial(dot_product_attention, is_causal=True)

    def vmaps(query, key, value):
        one = jax.vmap(call, (0, None, 0))(query, key[0], value)
        return one, jax.vmap(jax.vmap(call, (0, None, None)), (None, 0, 0), 1)(query, key, value)

    @jax.checkpoint
    def layer(x, arrays):
        return x + jax.jit(call)(x, *arrays), None

    def scans(query, key, value):
        return [jax.lax.scan(layer, query[0], (key, value))[0]]

    for function in (vmaps, scans):

        def loss(arrays, function=function):
            outs = function(*arrays)
            return sum((x**2).sum() for x in outs), outs

        compiled = jax.jit(jax.grad(loss, has_aux=True))
        arrays = [put(x, None, "x") for x in stacked]
        actual, expected = compiled(arrays), compiled(stacked)
        is_same(actual[1], expected[1])
        is_close(actual[0], expected[0])
        assert all("x" in x.sharding.spec for x in jax.tree.leaves(actual))
        assert not collectives(compiled, arrays)


@check()
def the_axis_that_vmap_maps():
    stacked = [jnp.stack([x, -x]) for x in problem()]
    arrays = [put(x, "x", "y") for x in stacked]
    bias = normal(1, Q_HEADS, 1, KV_LEN, seed=6)

    def loss(arrays, bias, **how):
        call = jax.vmap(lambda arrays: dot_product_attention(*arrays, bias), **how)
        return (call(arrays) ** 2).sum(), call(arrays)

    expected, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(stacked, bias)
    for how in ({}, {"spmd_axis_name": "x"}):
        function = jax.jit(jax.grad(functools.partial(loss, **how), argnums=(0, 1), has_aux=True))
        grads, sharded = function(arrays, bias)
        is_same((grads[0], sharded), (expected[0], out))
        is_close(grads[1], expected[1])
        is_sharded(sharded, "x", "y")
        assert collectives(function, arrays, bias) == {"all-reduce"}


@check()
def out_shardings_and_constraints():
    arrays, sharding = problem(), NamedSharding(mesh(), P(None, None, "y"))
    expected = dot_product_attention(*arrays)
    function = jax.jit(dot_product_attention, out_shardings=sharding)
    is_same(function(*arrays), expected)
    is_sharded(function(*arrays), None, None, "y")
    inside = jax.jit(
        lambda *x: dot_product_attention(
            *(jax.lax.with_sharding_constraint(y, sharding) for y in x)
        )
    )
    is_same(inside(*arrays), expected)
    is_sharded(inside(*arrays), None, None, "y")
    assert not collectives(inside, *arrays)


@check()
def a_mesh_in_another_order():
    devices = np.array(jax.devices())[[2, 0, 3, 1]].reshape(2, 2)
    other = jax.sharding.Mesh(devices, ("x", "y"))
    expected = everything(*problem(2), bias=normal(1, Q_HEADS, 1, KV_LEN))
    for spec in (("y", None, "x"), (("y", "x"),), ("x", None, "y")):
        arrays = [jax.device_put(x, NamedSharding(other, P(*spec))) for x in problem(2)]
        actual = jax.jit(everything)(*arrays, bias=normal(1, Q_HEADS, 1, KV_LEN))
        is_same((actual[0], actual[1][0]), (expected[0], expected[1][0]))
        is_close(actual, expected)
        is_sharded(actual[0][0], *spec)


@check()
def without_batch():
    query, key, value = (x[0] for x in problem())
    arrays = [put(x, None, "x") for x in (query, key, value)]
    actual = everything(*arrays)
    is_same(actual, everything(query, key, value))
    is_sharded(actual[0][0], None, "x")


@check(True, False)
def shard_map(check_vma):
    query, key, value = problem()

    def each(query, key, value):  # the keys of the one batch are on all devices
        key, value = (jnp.broadcast_to(x, (len(query), *x.shape[1:])) for x in (key, value))
        return dot_product_attention(query, key, value)

    specs = {"in_specs": (P("x"), P(), P()), "out_specs": P("x")}
    call = jax.shard_map(each, mesh=mesh(), **specs, check_vma=check_vma)

    def loss(call, *arrays):
        return (call(*arrays) ** 2).sum()

    arrays = (query, key[:1], value[:1])
    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2)))(*arrays)
        for f in (call, each)
    )
    is_close(actual, expected)


@check()
def shard_map_refuses_what_varies():
    call = jax.shard_map(dot_product_attention, mesh=mesh(), in_specs=P("x"), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(call)(*problem())


@check()
def shard_map_over_some_axes():
    arrays = problem()
    call = jax.shard_map(
        dot_product_attention, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_same(jax.jit(call)(*arrays), dot_product_attention(*arrays))
    assert [str(x.message)[:66] for x in caught] == [
        "fastattn.jax does not share out a call over ('y',) of the mesh: in"
    ]


@check()
def pmap():
    arrays = [x[:, None] for x in problem()]
    is_same(jax.pmap(dot_product_attention)(*arrays)[:, 0], dot_product_attention(*problem()))


@check()
def one_device_that_is_not_the_first():
    expected = everything(*problem(), is_causal=True)
    arrays = [jax.device_put(x, jax.devices()[2]) for x in problem()]
    call = functools.partial(everything, is_causal=True)
    for actual in (call(*arrays), jax.jit(call)(*arrays)):
        is_same(actual, expected)
        assert actual[0][0].devices() == {jax.devices()[2]}


@check()
def compiled_ahead_and_donated():
    query, key, value = arrays = [put(x, "x") for x in problem()]
    expected = dot_product_attention(*problem())
    function = jax.jit(dot_product_attention, donate_argnums=0)
    assert function.eval_shape(*arrays).shape == expected.shape
    compiled = function.lower(*arrays).compile()
    is_same(compiled(query, key, value), expected)
    assert query.is_deleted()
    with jax.enable_x64(True):
        wide = problem(dtype=np.float64)
        is_same(jax.jit(everything)(*(put(x, "y") for x in wide)), everything(*wide))


@pytest.mark.promise("jax-shards-stay")
@pytest.mark.parametrize("name", CHECKS)
def test_sharded(found, name):
    assert found[name] is None, found[name]
