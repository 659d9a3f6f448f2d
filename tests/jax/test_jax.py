# SPDX-License-Identifier: Apache-2.0
"""Does fastattn.jax mean what jax.nn means? In jit, vmap and grad, and with the kernel's bits."""
# ruff: noqa: E501 - the tables have a line per case

import concurrent.futures
import copy
import functools
import os
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn.jax import dot_product_attention, dot_product_attention_backward
from tests.support.child import run
from tests.support.correctness import assert_same_bits

jax.config.update("jax_platforms", "cpu")

BATCH, Q_LEN, KV_LEN, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 21, 37, 4, 2, 16
NAMES = ("float32", "float64", "float16", "bfloat16")


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def problem(dtype=np.float32, q_len=Q_LEN, kv_len=KV_LEN, batch=(BATCH,)):
    return (
        normal(*batch, q_len, Q_HEADS, HEAD_DIM, seed=1, dtype=dtype),
        normal(*batch, kv_len, KV_HEADS, HEAD_DIM, seed=2, dtype=dtype),
        normal(*batch, kv_len, KV_HEADS, HEAD_DIM, seed=3, dtype=dtype),
    )


def chance(*shape):
    """Return a mask that leaves each row its first key."""
    seen = np.random.default_rng(4).random(shape) < 0.7
    seen[..., 0] = True
    return jnp.asarray(seen)


WHOLE = (BATCH, Q_HEADS, Q_LEN, KV_LEN)
LENGTHS = jnp.array([9, KV_LEN], jnp.int32)
CASES = {
    "nothing": {},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.2},
    "bias": {"bias": normal(*WHOLE)},
    "bias, one of each": {"bias": normal(1, Q_HEADS, 1, KV_LEN)},
    "bias without axes": {"bias": normal(Q_LEN, KV_LEN)},
    "bias of integers": {"bias": jnp.arange(KV_LEN) % 3},
    "mask": {"mask": chance(*WHOLE)},
    "mask of keys": {"mask": chance(BATCH, 1, 1, KV_LEN)},
    "mask without axes": {"mask": chance(Q_LEN, KV_LEN)},
    "causal": {"is_causal": True},
    "key lengths": {"key_value_seq_lengths": LENGTHS},
    "query lengths": {"query_seq_lengths": jnp.array([21, 4], jnp.int32)},
    "both lengths": {"query_seq_lengths": jnp.array([21, 4], jnp.int32), "key_value_seq_lengths": LENGTHS},
    "query lengths and mask": {"query_seq_lengths": jnp.array([21, 4], jnp.int32), "mask": chance(1, 1, Q_LEN, KV_LEN)},
    "window": {"local_window_size": (4, 7)},
    "window of one number": {"local_window_size": 3},
    "window and causal": {"local_window_size": (5, 2), "is_causal": True},
    "implementation": {"implementation": "xla"},
    "all": {
        "scale": 0.2,
        "bias": normal(1, Q_HEADS, Q_LEN, KV_LEN),
        "mask": chance(BATCH, 1, Q_LEN, KV_LEN),
        "is_causal": True,
        "query_seq_lengths": jnp.array([21, 4], jnp.int32),
        "key_value_seq_lengths": LENGTHS,
        "local_window_size": (30, 30),
    },
}  # fmt: skip


def differentiable(options):
    """Return the options that have a gradient, and the others."""
    bias = options.get("bias")
    if bias is None or not jnp.issubdtype(bias.dtype, jnp.floating):
        return {}, options
    return {"bias": bias}, {k: x for k, x in options.items() if k != "bias"}


def loss(call, options, arguments):
    """Return a sum that weighs every element differently."""
    return loss_and_out(call, options, arguments)[0]


def loss_and_out(call, options, arguments):
    out = call(*arguments[0], **arguments[1], **options)
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum(), out


def close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


@pytest.mark.promise("jax-means-jax-nn")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_jax_nn(case):
    expected = jax.nn.dot_product_attention(*problem(), **CASES[case])
    out = dot_product_attention(*problem(), **CASES[case])
    assert out.dtype == expected.dtype
    close(out, expected)


@pytest.mark.promise("jax-means-jax-nn")
@pytest.mark.parametrize(
    ("case", "transform"),
    [(case, jax.jit) for case in CASES] + [("all", lambda f: f)],
    ids=[*CASES, "all, eager"],
)
def test_out_and_gradients_agree_with_jax_nn(case, transform):
    with_gradient, options = differentiable(CASES[case])
    arguments = (problem(), with_gradient)
    results = []
    for call in (dot_product_attention, jax.nn.dot_product_attention):
        function = functools.partial(loss_and_out, call, options)
        (_, out), grads = transform(jax.value_and_grad(function, has_aux=True))(arguments)
        results.append((out, grads))
    close(*results)


@pytest.mark.promise("jax-means-jax-nn")
@pytest.mark.parametrize("case", [case for case in CASES if "lengths" not in case])
def test_residual_agrees_with_jax_nn(case):
    options = CASES[case] | {"return_residual": True}
    if case == "all":
        del options["query_seq_lengths"]  # jax.nn has its large number for lse there
    close(
        dot_product_attention(*problem(), **options),
        jax.nn.dot_product_attention(*problem(), **options),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_residual_of_padding(masked):
    options = {"query_seq_lengths": LENGTHS.at[1].set(5), "key_value_seq_lengths": LENGTHS}
    if masked:
        options["mask"] = chance(1, 1, Q_LEN, KV_LEN)
    out, lse = dot_product_attention(*problem(), **options, return_residual=True)
    expected = jax.nn.dot_product_attention(*problem(), **options, return_residual=True)
    seen = np.arange(Q_LEN) < np.array([9, 5])[:, None]
    close(out, expected[0])
    close(lse[seen], expected[1][seen])
    assert np.all(lse[~seen] == -np.inf)


def test_residual_has_no_gradient():
    query, key, value = problem()
    grad = jax.grad(lambda x: dot_product_attention(x, key, value, return_residual=True)[1].sum())(
        query
    )
    assert not np.any(grad)


@pytest.mark.parametrize("return_residual", [False, True])
def test_without_batch(return_residual):
    query, key, value = problem(batch=())
    bias, mask = normal(Q_HEADS, Q_LEN, KV_LEN), chance(Q_LEN, KV_LEN)
    options = {"bias": bias, "mask": mask, "return_residual": return_residual}
    close(
        dot_product_attention(query, key, value, **options),
        jax.nn.dot_product_attention(query, key, value, **options),
    )


def heads_first(x):
    return np.asarray(x).swapaxes(-3, -2)


@pytest.mark.promise("jax-has-the-kernels-bits")
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_the_kernels(name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    with jax.enable_x64(name == "float64"):
        arrays = problem(dtype)
        bias, mask = normal(Q_HEADS, 1, KV_LEN, dtype=dtype), chance(BATCH, 1, Q_LEN, KV_LEN)
        kernel = {"bias": np.asarray(bias), "mask": np.asarray(mask)}
        inputs = [heads_first(x) for x in arrays]
        out, lse = fastattn.attention(*inputs, **kernel, return_lse=True)
        call = jax.jit(lambda *x: dot_product_attention(*x, mask=mask, return_residual=True))
        (actual, residual), backward = jax.vjp(call, *arrays, bias)
        assert_same_bits(heads_first(actual), out)
        assert_same_bits(np.asarray(residual).swapaxes(-2, -1), lse.astype(dtype))

        grad_out = normal(*actual.shape, seed=5, dtype=dtype)
        expected = fastattn.attention_backward(
            heads_first(grad_out), *inputs, out, lse, **kernel, return_dbias=True
        )
        grads = backward((grad_out, jnp.zeros_like(residual)))
        for grad, x, right in zip(grads, (*arrays, bias), expected, strict=True):
            assert grad.dtype == x.dtype
            assert_same_bits(np.asarray(grad) if x is bias else heads_first(grad), right)


def test_a_traced_scale():
    def scaled(call, scale):
        return loss(lambda *x: call(*x, scale=scale), {}, (problem(), {}))

    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(scaled, call)))(0.3)
        for call in (dot_product_attention, jax.nn.dot_product_attention)
    )
    close(actual, expected)
    with pytest.raises(ValueError, match=r"^scale must be a number, got scale.shape=\(2,\)"):
        jax.jit(lambda x: dot_product_attention(*problem(), scale=x))(jnp.ones(2))


# vmap.


ARGUMENTS = ("query", "key", "value", "bias", "mask", "key_value_seq_lengths")
MAPPED = [
    ("query",),
    ("key",),
    ("bias",),
    ("mask",),
    ("key_value_seq_lengths",),
    ("query", "value", "mask"),
    ARGUMENTS,
]


def variants(count):
    """Return values of each argument for each of `count` calls, stacked."""
    query, key, value = problem()
    factors = 1 + jnp.arange(count, dtype=jnp.float32)
    return {
        **{
            name: jnp.stack([x * f for f in factors])
            for name, x in (("query", query), ("key", key), ("value", value))
        },
        "bias": normal(count, 1, Q_HEADS, 1, KV_LEN, seed=7),
        "mask": chance(count, BATCH, 1, Q_LEN, KV_LEN),
        "key_value_seq_lengths": jnp.stack([LENGTHS, LENGTHS - 3, LENGTHS - 1])[:count],
    }


@pytest.mark.promise("jax-transforms")
@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_is_one_call_after_another(mapped):
    stacked = variants(3)
    one = {name: x if name in mapped else x[0] for name, x in stacked.items()}
    axes = {name: 0 if name in mapped else None for name in stacked}

    def value_and_grads(arguments):
        call = functools.partial(dot_product_attention, is_causal=True)
        grads = {k: x for k, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        others = {k: x for k, x in arguments.items() if k not in grads}
        return call(**arguments), jax.grad(lambda x: loss(call, others, ((), x)))(grads)

    actual = jax.jit(jax.vmap(value_and_grads, in_axes=(axes,)))(one)
    calls = [
        value_and_grads({name: x[i] if name in mapped else x for name, x in one.items()})
        for i in range(3)
    ]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    jax.tree.map(lambda a, b: assert_same_bits(np.asarray(a), np.asarray(b)), actual, expected)


@pytest.mark.promise("jax-transforms")
def test_vmap_of_vmap_and_of_other_axes():
    query, key, value = problem()
    queries = jnp.stack([query, query * 2, query * 3], axis=-1)
    values = jnp.stack([value, -value])
    both = jax.vmap(jax.vmap(dot_product_attention, (-1, None, None)), (None, None, 0), 1)
    out = both(queries, key, values)
    assert out.shape == (3, 2, *query.shape)
    for i in range(3):
        for j in range(2):
            alone = dot_product_attention(queries[..., i], key, values[j])
            assert_same_bits(np.asarray(out[i, j]), np.asarray(alone))


@pytest.mark.promise("jax-transforms")
def test_the_gradient_of_vmap_sums_over_what_is_not_mapped():
    stacked = variants(3)
    query, key, value = (stacked[name] for name in ("query", "key", "value"))

    def total(call, query, key, value):
        return loss(jax.vmap(call, (0, None, 0)), {}, ((query, key, value), {}))

    actual, expected = (
        jax.grad(functools.partial(total, call), argnums=(0, 1, 2))(query, key[0], value)
        for call in (dot_product_attention, jax.nn.dot_product_attention)
    )
    close(actual, expected)


def test_vmap_of_the_backward_pass_alone():
    out, backward = jax.vjp(dot_product_attention, *problem())
    grads = normal(3, *out.shape)
    actual = jax.vmap(backward)(grads)
    for i in range(3):
        for a, b in zip(actual, backward(grads[i]), strict=True):
            assert_same_bits(np.asarray(a[i]), np.asarray(b))


# Where it differs from jax.nn, and what it promises beyond.


@pytest.mark.promise("empty-rows-are-zero-everywhere")
def test_rows_that_see_nothing():
    options = {
        "mask": jnp.ones((1, 1, Q_LEN, 1), bool).at[:, :, 3].set(False),
        "key_value_seq_lengths": jnp.array([0, KV_LEN]),
        "bias": jnp.zeros((1, 1, Q_LEN, 1)).at[:, :, 5].set(-jnp.inf),
    }
    out, lse = dot_product_attention(*problem(), **options, return_residual=True)
    unseen = np.zeros((BATCH, Q_LEN), bool)
    unseen[0] = unseen[1, [3, 5]] = True
    assert not np.any(out[unseen])
    assert np.all(lse[unseen] == -np.inf)
    assert np.all(np.isfinite(lse[~unseen]))
    grads = jax.grad(functools.partial(loss, dot_product_attention, options))((problem(), {}))[0]
    assert all(np.all(np.isfinite(x)) for x in grads)
    assert not np.any(grads[0][unseen])
    assert not np.any(grads[1][0])


@pytest.mark.promise("masked-pair-contributes-nothing")
def test_what_is_masked_may_be_nan():
    query, key, value = problem()
    options = {"key_value_seq_lengths": LENGTHS}
    expected = dot_product_attention(query, key, value, **options)
    dirty = (query, key.at[0, 9:].set(jnp.nan), value.at[0, 9:].set(jnp.inf))
    assert_same_bits(np.asarray(dot_product_attention(*dirty, **options)), np.asarray(expected))


def test_lengths_beyond_the_array():
    lengths = {"query_seq_lengths": LENGTHS + 50, "key_value_seq_lengths": LENGTHS + 50}
    close(dot_product_attention(*problem(), **lengths), dot_product_attention(*problem()))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0)])
def test_empty(q_len, kv_len):
    arrays = problem(q_len=q_len, kv_len=kv_len)
    out, grads = jax.value_and_grad(lambda x: dot_product_attention(*x).sum())(arrays)
    assert out == 0
    assert not any(np.any(x) for x in grads)


@pytest.mark.promise("jax-has-the-kernels-bits")
def test_buffers_are_used_in_place(monkeypatch):
    seen = []
    core = fastattn._attention._core.attention

    def spy(*given):
        seen.append([x.ctypes.data for x in given[:4]])
        return core(*given)

    monkeypatch.setattr(fastattn._attention._core, "attention", spy)
    query, key, value = problem()
    for call in (dot_product_attention, jax.jit(dot_product_attention)):
        out = call(query, key, value)
        pointers = [x.unsafe_buffer_pointer() for x in (query, key, value, out)]
        assert seen.pop() == pointers


@pytest.mark.promise("jax-transforms")
def test_other_transformations():
    query, key, value = problem(q_len=KV_LEN)

    @jax.checkpoint
    def layer(x, scale):
        return dot_product_attention(x, key * scale, value, is_causal=True), None

    def total(query, layers):
        return layers(query).sum()

    scales = jnp.arange(1.0, 5.0)
    expected, actual = (
        jax.jit(jax.value_and_grad(functools.partial(total, layers=layers)))(query)
        for layers in (
            lambda x: functools.reduce(lambda y, scale: layer(y, scale)[0], scales, x),
            lambda x: jax.lax.scan(layer, x, scales)[0],
        )
    )
    close(actual, expected)


def test_an_equal_call_is_not_compiled_again():
    attend = fastattn.jax._attend
    attend.clear_cache()
    for _ in range(3):
        dot_product_attention(*problem(), is_causal=True, scale=0.5)
    assert attend._cache_size() == 1


def test_without_compilation():
    arrays = problem()
    expected = jax.grad(lambda x: (dot_product_attention(*x) ** 2).sum())(arrays)
    with jax.disable_jit():
        actual = jax.grad(lambda x: (dot_product_attention(*x) ** 2).sum())(arrays)
    close(actual, expected)
    shapes = jax.eval_shape(
        functools.partial(dot_product_attention, return_residual=True), *problem(np.float16)
    )
    assert [(x.shape, x.dtype) for x in shapes] == [
        (arrays[0].shape, np.float16),
        (arrays[0].shape[:-1], np.float16),
    ]


@pytest.mark.promise("missing-derivatives-are-errors")
def test_what_has_no_derivative_says_so():
    def loss(x):
        return dot_product_attention(x, x, x).sum()

    x = problem()[0]
    for transform in (jax.hessian, lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())):
        with pytest.raises(
            NotImplementedError, match=r"^fastattn\.jax has first derivatives in rev"
        ):
            transform(loss)(x)
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
        jax.jvp(loss, (x,), (x,))


def test_a_call_is_copied_by_name():
    call = functools.partial(dot_product_attention, is_causal=True, local_window_size=(3, 0))
    expected = call(*problem())
    for other in (copy.copy(call), copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert other.func is dot_product_attention
        assert_same_bits(np.asarray(other(*problem())), np.asarray(expected))


# The backward pass alone.


@pytest.mark.promise("jax-has-the-kernels-bits")
@pytest.mark.parametrize("case", [case for case in CASES if "query_seq_lengths" not in CASES[case]])
def test_backward_is_what_grad_calls(case):
    def both(query, key, value, grad_out):
        call = functools.partial(dot_product_attention, **CASES[case], return_residual=True)
        (out, lse), backward = jax.vjp(call, query, key, value)
        given = {k: x for k, x in CASES[case].items() if k != "implementation"}
        alone = dot_product_attention_backward(grad_out, query, key, value, out, lse, **given)
        return alone, backward((grad_out, jnp.zeros_like(lse)))

    arrays, grad_out = problem(), normal(*problem()[0].shape, seed=5)
    for transform in (lambda f: f, jax.jit):
        alone, of_grad = transform(both)(*arrays, grad_out)
        jax.tree.map(lambda a, b: assert_same_bits(np.asarray(a), np.asarray(b)), alone, of_grad)
    without_batch = both(*(x[0] for x in (*arrays, grad_out))) if CASES[case] == {} else ((), ())
    for x, y in zip(*without_batch, strict=True):
        assert_same_bits(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_parts_add_up_to_those_of_the_whole(name):
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[name]
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    with jax.enable_x64(name == "float64"):
        query, key, value = problem(dtype)
        out, lse = dot_product_attention(query, key, value, return_residual=True)
        grad_out = normal(*out.shape, seed=5, dtype=dtype)
        expected = dot_product_attention_backward(grad_out, query, key, value, out, lse)
        one, other = (
            dot_product_attention_backward(grad_out, query, key[:, part], value[:, part], out, lse)
            for part in (slice(10), slice(10, None))
        )
        of_keys = (jnp.concatenate(x, axis=1) for x in zip(one[1:], other[1:], strict=True))
        for actual, right in zip((one[0] + other[0], *of_keys), expected, strict=True):
            assert actual.dtype == dtype
            np.testing.assert_allclose(
                *(np.asarray(x, np.float64) for x in (actual, right)), tolerance, tolerance
            )


def test_backward_with_a_traced_scale_and_mapped():
    arrays = problem()
    out, lse = dot_product_attention(*arrays, scale=0.3, return_residual=True)
    grads = normal(3, *out.shape)
    expected = [dot_product_attention_backward(x, *arrays, out, lse, scale=0.3) for x in grads]
    mapped = jax.vmap(
        lambda x, scale: dot_product_attention_backward(x, *arrays, out, lse, scale=scale),
        (0, None),
    )
    close(list(zip(*jax.jit(mapped)(grads, 0.3), strict=True)), expected)


# Threads.


def attends_on(cpus):
    """Return whether many calls at once, of large arrays, on few of XLA's threads, are right."""
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:cpus])
    arrays = problem(q_len=512, kv_len=512)

    @jax.jit
    def several(query, key, value):
        """Compute calls that do not wait for each other."""
        outs = [dot_product_attention(query * i, key, value) for i in range(1, 5)]
        return functools.reduce(lambda a, b: a + b, outs)

    grads = jax.jit(jax.grad(lambda *x: several(*x).sum(), argnums=(0, 1, 2)))
    expected = [several(*arrays), *grads(*arrays)]

    def once(_):
        results = [several(*arrays), *grads(*arrays)]
        return all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return all(pool.map(once, range(4)))


@pytest.mark.parametrize("cpus", [1, 2])
def test_nothing_waits_for_ever(cpus):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be kept to some CPUs here")
    assert run(attends_on, cpus, timeout=100)


def attends_on_two_devices():
    arrays = problem(batch=(4,))
    mesh = jax.make_mesh((2,), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")
    call = jax.shard_map(
        dot_product_attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    spread = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in arrays]
    results = [jax.jit(call)(*spread), jax.jit(dot_product_attention)(*spread)]
    expected = dot_product_attention(*arrays)
    return [bool(np.array_equal(x, expected)) for x in results]


def test_two_devices():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert run(attends_on_two_devices, env=env) == [True, True]


# Errors.


QUERY = jnp.ones((2, 3, 4, 8))
BAD = {
    "query of integers": ({"query": QUERY.astype(int)}, TypeError, "query must be an array of float16, bfloat16, float32, float64, not int32"),
    "dtypes": ({"key": QUERY.astype(jnp.float16)}, TypeError, "key must have the dtype of query, float32, not float16"),
    "axes": ({"value": QUERY[0, 0]}, ValueError, "value must have the axes (batch, length, heads, head_dim) or the last three, got value.shape=(4, 8)"),
    "value": ({"value": QUERY[..., :4]}, ValueError, "key and value must have one shape, got query.shape=(2, 3, 4, 8), key.shape=(2, 3, 4, 8), value.shape=(2, 3, 4, 4)"),
    "batch": ({"query": QUERY[:1]}, ValueError, "query and key must have one batch and one head_dim, got query.shape=(1, 3, 4, 8), key.shape=(2, 3, 4, 8), value.shape=(2, 3, 4, 8)"),
    "heads": ({"query": QUERY[:, :, :3]}, ValueError, "query's heads must be a multiple of key's, got query.shape=(2, 3, 3, 8), key.shape=(2, 3, 4, 8), value.shape=(2, 3, 4, 8)"),
    "bias": ({"bias": jnp.ones((2, 2, 3, 3))}, ValueError, "bias must broadcast to (batch, q_heads, q_len, kv_len) = (2, 4, 3, 3), got bias.shape=(2, 2, 3, 3)"),
    "complex bias": ({"bias": jnp.ones((3, 3), jnp.complex64)}, TypeError, "bias must be an array of a float dtype, not complex64"),
    "float mask": ({"mask": jnp.ones((3, 3))}, TypeError, "mask must be an array of bool (bias is what is added), not float32"),
    "axes of mask": ({"mask": jnp.ones((1, 1, 1, 3, 3), bool)}, ValueError, "mask must broadcast to (batch, q_heads, q_len, kv_len) = (2, 4, 3, 3), got mask.shape=(1, 1, 1, 3, 3)"),
    "scale": ({"scale": jnp.inf}, ValueError, "scale must be finite, got scale=inf"),
    "lengths": ({"query_seq_lengths": jnp.ones(2)}, TypeError, "query_seq_lengths must be an array of integers, not float32"),
    "number of lengths": ({"key_value_seq_lengths": jnp.ones(3, int)}, ValueError, "key_value_seq_lengths must have shape (batch,) = (2,), got key_value_seq_lengths.shape=(3,)"),
    "window": ({"local_window_size": (-1, 2)}, ValueError, "local_window_size must be a pair of integers >= 0, got (-1, 2)"),
    "implementation": ({"implementation": "mosaic"}, ValueError, "implementation must be None, 'xla' or 'cudnn', got 'mosaic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    arguments, kind, message = BAD[case]
    given = {"query": QUERY, "key": QUERY, "value": QUERY} | arguments
    for transform in (lambda f: f, jax.jit):  # in a trace as well
        with pytest.raises(kind) as error:
            transform(lambda: dot_product_attention(**given))()
        assert str(error.value) == message


BAD_BACKWARD = {
    "grad_out": ({"grad_out": QUERY[:1]}, ValueError, "grad_out must have query's shape, (2, 3, 4, 8), got grad_out.shape=(1, 3, 4, 8)"),
    "out": ({"out": QUERY.astype(jnp.float16)}, TypeError, "out must have query's dtype, float32, not float16"),
    "lse": ({"lse": QUERY}, ValueError, "lse must have query's shape without head_dim, (2, 3, 4), got lse.shape=(2, 3, 4, 8)"),
    "lse of integers": ({"lse": jnp.ones((2, 3, 4), int)}, TypeError, "lse must be an array of floats, not int32"),
    "mask": ({"mask": jnp.ones((3, 3))}, TypeError, "mask must be an array of bool (bias is what is added), not float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_errors_of_the_backward_pass(case):
    arguments, kind, message = BAD_BACKWARD[case]
    names = ("grad_out", "query", "key", "value", "out")
    given = dict.fromkeys(names, QUERY) | {"lse": QUERY[..., 0]} | arguments
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(kind) as error:
            transform(lambda: dot_product_attention_backward(**given))()
        assert str(error.value) == message
