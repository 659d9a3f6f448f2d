# SPDX-License-Identifier: Apache-2.0
"""What of tensors of PyTorch and arrays of JAX? They are read in place and answered in kind."""

import sys

import ml_dtypes
import numpy as np
import pytest
from child import run
from conftest import assert_same_bits, make_problem

import fastattn

NAMES = ("float32", "float64", "float16", "bfloat16")
SHAPES = {"heads": 4, "kv_heads": 2, "batch": (2,)}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax", exc_type=ImportError)
    jax.config.update("jax_platforms", "cpu")
    return jax


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def tensor(torch, x):
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def numpy_of(x):
    """Return what a tensor or an array of JAX holds."""
    if type(x).__module__.startswith("jax"):
        return np.asarray(x)
    if str(x.dtype) == "torch.bfloat16":
        return x.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def problem(name="float32", q_len=21, kv_len=37):
    return make_problem(q_len, kv_len, dtype=dtype_of(name), **SHAPES)


def options():
    """Return every argument that may be an array, and is_causal, which needs query_offset."""
    rng = np.random.default_rng(1)
    return {
        "mask": rng.random((2, 1, 21, 37)) < 0.8,
        "bias": rng.standard_normal((4, 21, 37)).astype(np.float32),
        "query_offset": np.array([16, 9]),
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "kv_lengths": np.array([37, 30], np.int32),
        "is_causal": True,
    }


def converted(convert, arguments):
    return {k: convert(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


# PyTorch.


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_answered_with_tensors(torch, name):
    arrays = problem(name)
    expected = fastattn.attention(*arrays, return_lse=True)
    results = fastattn.attention(*(tensor(torch, x) for x in arrays), return_lse=True)
    assert [type(x) for x in results] == [torch.Tensor, torch.Tensor]
    assert results[0].dtype == getattr(torch, name)
    assert_same_bits(tuple(map(numpy_of, results)), expected)
    alone = fastattn.attention(*(tensor(torch, x) for x in arrays))
    assert_same_bits(numpy_of(alone), expected[0])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_all_arguments_may_be_tensors(torch, name):
    arrays, given = problem(name), options()
    given["bias"] = given["bias"].astype(dtype_of(name))
    given["sinks"] = given["sinks"].astype(dtype_of(name))
    results = fastattn.attention(
        *(tensor(torch, x) for x in arrays), **converted(lambda x: tensor(torch, x), given)
    )
    assert_same_bits(numpy_of(results), fastattn.attention(*arrays, **given))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_tensors_are_read_where_they_lie(torch, name, monkeypatch):
    """Strides of other layouts included; memory that is the same is the same in the core."""
    arrays = [tensor(torch, x) for x in problem(name)]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    seen = []
    core = fastattn._attention._core.attention
    monkeypatch.setattr(
        fastattn._attention._core,
        "attention",
        lambda *given: (seen.extend(x.ctypes.data for x in given[:4]), core(*given)),
    )
    out = fastattn.attention(*swapped)
    assert seen == [x.data_ptr() for x in (*swapped, out)]
    assert_same_bits(numpy_of(out), fastattn.attention(*problem(name)))


def test_a_repeated_tensor_is_not_expanded(torch):
    query, key, value = (tensor(torch, x) for x in problem())
    expected = fastattn.attention(query, key[:1], value[:1])
    out = fastattn.attention(query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_out_may_be_a_tensor(torch, name):
    arrays = [tensor(torch, x) for x in problem(name)]
    space = torch.full((2, 21, 4, 16), 7, dtype=arrays[0].dtype)
    out = space.transpose(1, 2)
    version = out._version
    result, lse = fastattn.attention(*arrays, out=out, return_lse=True)
    assert result is out
    assert out._version > version, "autograd would not notice that the tensor was written"
    expected = fastattn.attention(*arrays, return_lse=True)
    assert torch.equal(space.transpose(1, 2), expected[0])
    assert torch.equal(lse, expected[1])
    with torch.inference_mode():
        out = torch.empty_like(expected[0])
        assert fastattn.attention(*arrays, out=out) is out
    assert torch.equal(out, expected[0])


def test_a_parameter_without_a_gradient(torch):
    query, key, value = (tensor(torch, x) for x in problem())
    expected = fastattn.attention(query, key, value)
    parameter = torch.nn.Parameter(query.clone())
    with torch.no_grad():
        result = fastattn.attention(parameter, key, value)
    assert torch.equal(result, expected)
    assert not result.requires_grad
    assert torch.equal(fastattn.attention(parameter.detach(), key, value), expected)


def test_a_negative_bit_is_read(torch):
    query, key, value = (tensor(torch, x) for x in problem())
    negative = torch.complex(query, -query).conj().imag
    assert negative.is_neg()
    assert torch.equal(
        fastattn.attention(negative, key, value), fastattn.attention(query, key, value)
    )
    with pytest.raises(ValueError, match="out must be written as it is, got a tensor whose neg"):
        fastattn.attention(query, key, value, out=negative)


def tensor_errors(torch):
    x = torch.ones(1, 2, 3, 4)
    parameter = torch.nn.Parameter(x)
    dense = "must be a dense tensor"
    return {
        "grad": (
            parameter,
            "key requires grad, and this call has no gradient: use fastattn.torch.attention, or "
            "pass key.detach()",
        ),
        "meta": (x.to("meta"), "key must hold numbers, got a tensor on the device meta"),
        "sparse": (
            x.to_sparse(),
            f"key {dense}, got one of layout torch.sparse_coo: key.to_dense()",
        ),
        "nested": (
            torch.nested.nested_tensor([x[0]], layout=torch.jagged),
            f"key {dense}, not a nested one (fastattn.varlen_attention takes the values and "
            "offsets of jagged ones)",
        ),
        "quantised": (
            torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.qint8),
            "key must not be quantised, got a tensor of torch.qint8: key.dequantize()",
        ),
        "dtype": (
            x.to(torch.int32),
            "key must be an array of float16, bfloat16, float32 or float64, not int32",
        ),
        "float8": (
            x.to(torch.float8_e4m3fn),
            "key must be a tensor that NumPy can read, got torch.float8_e4m3fn in a Tensor: ",
        ),
    }


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "kind", ["grad", "meta", "sparse", "nested", "quantised", "dtype", "float8"]
)
def test_tensors_that_cannot_be_read(torch, kind):
    x, message = tensor_errors(torch)[kind]
    query = torch.ones(1, 2, 3, 4)
    with pytest.raises(TypeError) as error:
        fastattn.attention(query, x, query)
    assert str(error.value).startswith(message)


def test_a_tensor_on_another_device(torch, monkeypatch):
    class Elsewhere(torch.Tensor):  # as if on a device that this machine need not have
        device = torch.device("cuda:1")

    query = torch.ones(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"^mask must be on the CPU, got a tensor on cuda:1: mask"):
        fastattn.attention(query, query, query, mask=query[0, 0].as_subclass(Elsewhere))


def test_transformed_tensors_are_refused(torch):
    query = torch.ones(2, 2, 3, 4)
    with pytest.raises(TypeError, match="query must be a tensor that NumPy can read"):
        torch.func.vmap(lambda x: fastattn.attention(x, x, x))(query)
    with pytest.raises(TypeError, match="query requires grad"):
        torch.func.grad(lambda x: fastattn.attention(x, x, x).sum())(query)


def test_bfloat16_without_ml_dtypes(torch, monkeypatch):
    query, key, value = torch.randn(3, 3, 2, 5, 4).bfloat16()
    arrays = (query, key[:1], value[0])
    sinks, bias = torch.randn(2).bfloat16(), torch.randn(5, 5).bfloat16()

    def results():
        out, lse = fastattn.attention(*arrays, bias=bias, sinks=sinks, return_lse=True)
        grads = fastattn.attention_backward(
            out,
            *arrays,
            out,
            lse,
            bias=bias,
            sinks=sinks,
            return_dbias=True,
            return_dsinks=True,
        )
        return (out, lse, *grads)

    usual = results()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for x, expected in zip(results(), usual, strict=True):
        assert x.dtype == expected.dtype
        assert torch.equal(x, expected)


# JAX.


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


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("call", [fastattn.attention, fastattn.scaled_dot_product_attention])
def test_jax_arrays_are_read_and_returned_where_they_lie(jax, name, call, monkeypatch):
    query = jax.numpy.asarray(problem(name)[0])
    seen = []
    core = fastattn._attention._core.attention
    monkeypatch.setattr(
        fastattn._attention._core,
        "attention",
        lambda *given: (seen.extend(x.ctypes.data for x in given[:4]), core(*given)),
    )
    out = call(query, query, query)
    assert seen == [x.unsafe_buffer_pointer() for x in (query, query, query, out)]


def test_jax_results_outlive_the_call(jax):
    query = jax.numpy.asarray(problem()[0])
    kept = fastattn.attention(query, query, query)
    expected = np.array(kept)
    for _ in range(20):
        fastattn.attention(query * 2, query, query)
    assert_same_bits(np.asarray(kept), expected)


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


# Both, and every call.


@pytest.fixture(params=["torch", "jax"])
def convert(request):
    """Return the function that makes arrays of one framework, the other in the tests beside."""
    module = pytest.importorskip(request.param, exc_type=ImportError)
    if request.param == "torch":
        return lambda x: tensor(module, x)
    return module.numpy.asarray


def test_the_result_is_of_the_kind_of_query(convert):
    query, key, value = problem()
    expected = fastattn.attention(query, key, value)
    assert_same_bits(fastattn.attention(query, convert(key), convert(value)), expected)
    result = fastattn.attention(convert(query), key, value)
    assert type(result) is type(convert(query))
    assert_same_bits(numpy_of(result), expected)


def test_out_is_of_the_kind_of_query(torch):
    query, key, value = problem()
    out = np.empty(query.shape, np.float32)
    with pytest.raises(TypeError, match=r"^out must be a tensor, as query is, not ndarray$"):
        fastattn.attention(tensor(torch, query), key, value, out=out)
    with pytest.raises(TypeError, match=r"^out must be a NumPy array, not Tensor$"):
        fastattn.attention(query, key, value, out=tensor(torch, out))


def test_varlen_attention(convert):
    query, key, value = (x[0].swapaxes(0, 1).copy() for x in problem(q_len=20, kv_len=20))
    starts = np.array([0, 5, 18], np.int32)
    given = {"is_causal": True, "kv_lengths": np.array([3, 9]), "return_lse": True}
    expected = fastattn.varlen_attention(query, key, value, starts, starts, **given)
    arrays = map(convert, (query, key, value, starts, starts))
    results = fastattn.varlen_attention(*arrays, **converted(convert, given))
    assert {type(x) for x in results} == {type(convert(query))}
    assert_same_bits(tuple(map(numpy_of, results)), expected)


def test_scaled_dot_product_attention(convert):
    query, key, value = problem()
    mask = options()["mask"]
    call = fastattn.scaled_dot_product_attention
    result = call(*map(convert, (query, key, value)), convert(mask), enable_gqa=True)
    assert type(result) is type(convert(query))
    assert_same_bits(numpy_of(result), call(query, key, value, mask, enable_gqa=True))
    result = call(convert(query), convert(key[:, :1]), convert(value[:, :1]), is_causal=True)
    assert_same_bits(numpy_of(result), call(query, key[:, :1], value[:, :1], is_causal=True))


def test_attention_weights_merge_and_explain(convert):
    query, key, value = problem()
    weights = fastattn.attention_weights(
        convert(query), convert(key), **converted(convert, options())
    )
    assert_same_bits(numpy_of(weights), fastattn.attention_weights(query, key, **options()))
    parts = [
        fastattn.attention(query, key[:, :, s], value[:, :, s], return_lse=True)
        for s in (slice(20), slice(20, None))
    ]
    results = fastattn.merge(*(tuple(map(convert, part)) for part in parts))
    assert type(results[0]) is type(convert(query))
    assert_same_bits(tuple(map(numpy_of, results)), fastattn.merge(*parts))
    arrays = (query, key, value)
    assert fastattn.explain(*map(convert, arrays)) == fastattn.explain(*arrays)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_cache(convert, name):
    query, key, value = problem(name, q_len=3)
    caches = [fastattn.KVCache(2, 2, 16, dtype=dtype_of(name)) for _ in range(2)]
    caches[0].append(key, value)
    caches[1].append(convert(key), convert(value))
    expected = caches[0].attend(query, return_lse=True)
    results = caches[1].attend(convert(query), return_lse=True)
    assert {type(x) for x in results} == {type(convert(query))}
    assert_same_bits(tuple(map(numpy_of, results)), expected)


def test_empty_arrays(convert):
    query, key, value = problem(q_len=0)
    out, lse = fastattn.attention(*map(convert, (query, key, value)), return_lse=True)
    assert (tuple(out.shape), tuple(lse.shape)) == ((2, 4, 0, 16), (2, 4, 0))
    query, key, value = problem(kv_len=0)
    assert not numpy_of(fastattn.attention(*map(convert, (query, key, value)))).any()
