# SPDX-License-Identifier: Apache-2.0
"""What of arrays of other libraries? They are read in place and answered in kind, or refused."""
# ruff: noqa: E501 - the tables of errors have a line per error

import array
import ctypes
import sys
import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from child import run
from conftest import assert_same_bits, make_problem

import fastattn
from fastattn import _dlpack, reference

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
    if type(x).__module__.startswith("jax") or isinstance(x, np.ndarray):
        return np.asarray(x)
    if isinstance(x, Exported):
        return x.array
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


@pytest.mark.promise("answered-in-kind")
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


@pytest.mark.promise("foreign-arrays-are-read-in-place")
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


@pytest.mark.promise("out-is-written-in-place")
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


@pytest.mark.promise("nothing-is-detached-silently", "error-says-which-rule-and-what")
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


@pytest.mark.promise("nothing-is-detached-silently")
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


# Others, by DLPack.


class Exported:
    """An array of a library that has DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return _dlpack.CPU, 0

    def __dlpack__(self, **wanted):
        return _dlpack.exporter(self.array).__dlpack__(**wanted)


class BeforeVersions(Exported):
    def __dlpack__(self, stream=None):
        return super().__dlpack__()


class InNamespace(Exported):
    """An array of a library that follows the array API standard."""

    device = "cpu"

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(from_dlpack=lambda x: InNamespace(view(x)))


class OnDevice(InNamespace):
    device = "accelerator whose memory is the CPU's"

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(from_dlpack=lambda x: Movable(view(x)))


class Movable(InNamespace):
    def to_device(self, device):
        assert device == OnDevice.device
        return OnDevice(self.array)


class Altered(Exported):
    """What an exporter says of its tensor, with some of it replaced."""

    def __init__(self, array, **fields):
        super().__init__(array)
        self.fields = fields

    def __dlpack__(self, **wanted):
        capsule = super().__dlpack__(**wanted)
        for name, value in self.fields.items():
            if name == "major":
                _dlpack.ManagedVersioned.from_address(
                    _dlpack.pointer_in(capsule, _dlpack.DLTENSOR_VERSIONED)
                ).major = value
            else:
                setattr(_dlpack._contents(capsule)[0], name, value)
        return capsule


class Raises(Exported):
    """An exporter that says no, with what it raises."""

    def __dlpack__(self, **wanted):
        raise self.array


# As the exporter of these tests.
numpy_has_versions = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy exports no versions of DLPack"
)


def view(x):
    """Return what a library's from_dlpack would give, by NumPy's if it can."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        return _dlpack.array_of(x).view(ml_dtypes.bfloat16)


def addresses_of_core(monkeypatch):
    """Return a list, which will hold the addresses of query, key, value and out in the core."""
    seen = []
    core = fastattn._attention._core.attention
    monkeypatch.setattr(
        fastattn._attention._core,
        "attention",
        lambda *given: (seen.extend(x.ctypes.data for x in given[:4]), core(*given)),
    )
    return seen


@pytest.mark.promise("foreign-arrays-are-read-in-place", "answered-in-kind")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Exported, BeforeVersions, InNamespace])
def test_exported_arrays_are_read_where_they_lie(name, kind, monkeypatch):
    arrays = problem(name)
    arrays = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in arrays]  # of other strides
    expected = fastattn.attention(*arrays, return_lse=True)
    seen = addresses_of_core(monkeypatch)
    results = fastattn.attention(*map(kind, arrays), return_lse=True)
    answers = tuple(map(numpy_of, results))
    assert {type(x) for x in results} == {InNamespace if kind is InNamespace else np.ndarray}
    assert seen == [x.ctypes.data for x in (*arrays, answers[0])]
    assert_same_bits(answers, expected)


@pytest.mark.parametrize("kind", [Exported, BeforeVersions])
def test_all_arguments_may_be_exported(kind):
    arrays, given = problem(), options()
    results = fastattn.attention(*map(kind, arrays), **converted(kind, given))
    assert_same_bits(results, fastattn.attention(*arrays, **given))


def test_bfloat16_of_another_exporter(torch, monkeypatch):
    """By the DLPack of PyTorch, which knows the dtype as NumPy does not."""
    arrays = problem("bfloat16")
    expected = fastattn.attention(*arrays)
    tensors = [tensor(torch, x) for x in arrays]

    class Ours(Exported):
        def __dlpack__(self, **wanted):
            return self.array.__dlpack__(**wanted)

    class OursInNamespace(Ours):
        def __array_namespace__(self):
            return torch

    assert_same_bits(fastattn.attention(*map(Ours, tensors)), expected)
    seen = addresses_of_core(monkeypatch)
    for module in ("ml_dtypes", "ml_dtypes without"):
        if module != "ml_dtypes":
            monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        result = fastattn.attention(*map(OursInNamespace, tensors))
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, tensor(torch, expected))
        assert seen[-4:] == [x.data_ptr() for x in (*tensors, result)]


def test_results_are_on_the_device_of_query():
    arrays = problem()
    result = fastattn.attention(OnDevice(arrays[0]), *arrays[1:])
    assert type(result) is OnDevice
    assert_same_bits(result.array, fastattn.attention(*arrays))


@pytest.mark.promise("answered-in-kind")
def test_arrays_of_the_array_api():
    strict = pytest.importorskip("array_api_strict", exc_type=ImportError)
    arrays = problem()
    given = [strict.asarray(x, copy=False) for x in arrays]
    results = fastattn.attention(*given, return_lse=True, kv_lengths=strict.asarray([30, 20]))
    assert all(type(x) is type(given[0]) for x in results)
    expected = fastattn.attention(*arrays, return_lse=True, kv_lengths=[30, 20])
    assert_same_bits(tuple(map(np.from_dlpack, results)), expected)
    other = strict.Device("device1")
    result = fastattn.attention(strict.asarray(arrays[0], device=other), *arrays[1:])
    assert result.device == other


def test_memory_that_is_exported_lives_as_long_as_the_view():
    class Held(np.ndarray):
        """An array that can be watched."""

    for kind in (Exported, BeforeVersions):
        memory = np.arange(6.0).view(Held)
        watched = weakref.ref(memory)
        x = _dlpack.array_of(kind(memory))
        assert x.ctypes.data == memory.ctypes.data
        del memory
        assert watched() is not None
        assert x.sum() == 15
        del x
        assert watched() is None


def test_exported_without_strides_and_with_an_offset():
    x = problem()[0]
    expected = fastattn.attention(x, x[:, :2], x[:, :2])
    plain = Altered(x, strides=None)
    assert_same_bits(fastattn.attention(plain, x[:, :2], x[:, :2]), expected)
    moved = Altered(np.concatenate([x[:1] * 7, x]), shape=(ctypes.c_int64 * 4)(*x.shape))
    moved.fields["byte_offset"] = x[:1].nbytes
    assert_same_bits(fastattn.attention(moved, x[:, :2], x[:, :2]), expected)
    strided = Exported(x[::-1, ::-1, ::-2])
    assert_same_bits(
        fastattn.attention(strided, x[:, :2], x[:, :2]),
        fastattn.attention(strided.array, x[:, :2], x[:, :2]),
    )


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@numpy_has_versions
def test_exported_memory_that_must_not_be_written_is_read():
    arrays = problem()
    result = fastattn.attention(*(Exported(read_only(x)) for x in arrays))
    assert_same_bits(result, fastattn.attention(*arrays))


def test_an_exporter_that_says_no_may_have_another_way():
    class HasArray(Raises):
        def __array__(self, dtype=None, copy=None):
            return X

    result = fastattn.attention(HasArray(BufferError("bit-packed")), X, X)
    assert_same_bits(result, fastattn.attention(X, X, X))


X = np.ones((1, 2, 3, 4), np.float32)
READ = "key must be an array that NumPy can read, got "


class Elsewhere(Exported):
    def __dlpack_device__(self):
        return 8, 0


class OnGPU(Exported):
    def __dlpack_device__(self):
        return _dlpack.CUDA, 0


class NoCapsule(Exported):
    def __dlpack__(self, **wanted):
        return self.array


class Used(Exported):
    def __dlpack__(self, **wanted):
        capsule = self.array.__dlpack__(**wanted)
        np.from_dlpack(NoCapsule(capsule))
        return capsule


EXPORTERS = [
    (Raises(BufferError("no")), READ + "Raises: no"),
    (Raises(TypeError("never")), READ + "Raises: never"),
    (Raises(KeyError("lost")), READ + "Raises: 'lost'"),
    (BeforeVersions(read_only(X)), None),
    (Elsewhere(X), "key must be on the CPU, got Elsewhere on device 8 of DLPack"),
    (OnGPU(X), "key must be on the CPU, got OnGPU on a GPU"),
    (Altered(X, device_type=2), READ + "Altered: its memory is on DLPack's device 2"),
    (NoCapsule(7), READ + "NoCapsule: __dlpack__ must return a capsule named dltensor"),
    (Used(X), READ + "Used: __dlpack__ must return a capsule named dltensor"),
    (Altered(X, major=2), READ + "Altered: version 2 of DLPack is not understood, only 1"),
    (Altered(X, lanes=2), READ + "Altered: NumPy has no dtype for float32 in 2 lanes"),
    (Altered(X, code=10, bits=8), READ + "Altered: NumPy has no dtype for DLPack code 10, 8"),
    (Altered(X, bits=4), READ + "Altered: NumPy has no dtype for float4"),
    (Altered(X, shape=None), READ + "Altered: it has no shape of 4 axes"),
    (Altered(X, ndim=-1), READ + "Altered: it has no shape of -1 axes"),
    (Exported(X.astype(np.int32)), None),
    (Exported(X[..., :3]), "key has head_dim 3 but query has head_dim 4 (key.shape=(1, 2, 3, 3), "
                           "query.shape=(1, 2, 3, 4))"),
]  # fmt: skip


@pytest.mark.promise("error-says-which-rule-and-what")
@numpy_has_versions
@pytest.mark.parametrize("number", range(len(EXPORTERS)))
def test_exporters_that_cannot_be_read(number):
    x, message = EXPORTERS[number]
    if isinstance(x, BeforeVersions):
        with pytest.raises(BufferError) as reason:
            x.array.__dlpack__()
        message = READ + f"BeforeVersions: {reason.value}"
    elif message is None:
        message = "key must be an array of float16, bfloat16, float32 or float64, not int32"
    with pytest.raises((TypeError, ValueError)) as error:
        fastattn.attention(X, x, X)
    assert str(error.value) == message


class NoDevice(Altered):
    def __dlpack_device__(self):
        raise RuntimeError("which?")


def test_an_exporter_that_does_not_say_where_it_is():
    assert_same_bits(fastattn.attention(NoDevice(X), X, X), fastattn.attention(X, X, X))
    with pytest.raises(TypeError, match="DLPack's device 2"):
        fastattn.attention(NoDevice(X, device_type=2), X, X)


@numpy_has_versions
def test_out_may_be_exported():
    arrays = [Exported(x) for x in problem()]
    expected = fastattn.attention(*problem(), return_lse=True)
    out = Exported(np.full((2, 21, 4, 16), 7, np.float32).swapaxes(1, 2))
    result, lse = fastattn.attention(*arrays, out=out, return_lse=True)
    assert result is out
    assert_same_bits((out.array, lse), expected)
    space = np.empty_like(expected[0])
    assert fastattn.attention(*arrays, out=space) is space
    assert_same_bits(space, expected[0])
    definition = reference.attention(*arrays, out=out)
    assert definition is out
    assert_same_bits(out.array, reference.attention(*problem()))
    cache = fastattn.KVCache(2, 2, 16)
    cache.append(*arrays[1:])
    expected = cache.attend(problem()[0])
    assert cache.attend(arrays[0], out=out) is out
    assert_same_bits(out.array, expected)


class Copies(Exported):
    def __dlpack__(self, *, copy=None, **wanted):
        if copy is False:
            raise BufferError("only copies")
        return self.array.copy().__dlpack__(**wanted)


class FlagOnly(Exported):
    """An exporter of before versions that takes all arguments."""

    def __dlpack__(self, **wanted):
        return self.array.__dlpack__()


@pytest.mark.promise("errors-come-before-writing", "error-says-which-rule-and-what")
@numpy_has_versions
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (lambda x: Exported(read_only(x)), ValueError, "out must be writeable, got a read-only array"),
        (FlagOnly, ValueError, "out must be writeable, got a read-only array"),
        (BeforeVersions, TypeError, "out must be an array that NumPy can write, got BeforeVersions: BeforeVersions.__dlpack__() got an unexpected keyword argument 'max_version'"),
        (Copies, TypeError, "out must be an array that NumPy can write, got Copies: only copies"),
        (list, TypeError, "out must be a NumPy array, not list"),
        (lambda x: Exported(x[:, :1]), ValueError, "out must have the shape of the result, (1, 2, 3, 4), got out.shape=(1, 1, 3, 4)"),
        (lambda x: np.ma.array(x), TypeError, "out must be a NumPy array, not MaskedArray"),
        (lambda x: x.view(Unit), TypeError, "out must be a NumPy array, not Unit"),
    ],
)  # fmt: skip
def test_out_that_cannot_be_written(kind, error, message):
    query, out = Exported(X), np.full_like(X, 7)
    with pytest.raises(error) as raised:
        fastattn.attention(query, X, X, out=kind(out))
    assert str(raised.value) == message
    assert (out == 7).all()


@pytest.mark.promise("out-overlaps-no-input")
@numpy_has_versions
def test_out_must_not_overlap_an_exported_input():
    query = X.copy()
    with pytest.raises(ValueError, match="out must not overlap an input"):
        fastattn.attention(Exported(query), X, X, out=Exported(query))
    with pytest.raises(TypeError, match=r"^out must be a NumPy array, not Exported$"):
        fastattn.attention(query, X, X, out=Exported(X.copy()))


@pytest.mark.promise("answered-in-kind")
@pytest.mark.parametrize("kind", [Exported, BeforeVersions, InNamespace])
def test_every_call_takes_exported_arrays(kind):
    """What each call gives is that for NumPy arrays; exporters have no library to be given to."""
    query, key, value = arrays = problem()
    given = options()
    out, lse = fastattn.attention(*arrays, **given, return_lse=True)
    backward = {"grad_out": out, "query": query, "key": key, "value": value, "out": out, "lse": lse}
    backward |= given | {"grad_lse": lse, "return_dbias": True, "return_dsinks": True}
    plain = {"query": query, "key": key, "value": value}
    pairs = {"query": query, "key": key} | given
    packed = {name: x[0].swapaxes(0, 1) for name, x in plain.items()}
    starts = {"cu_seqlens_q": np.array([0, 9, 21]), "cu_seqlens_kv": np.array([0, 15, 37])}
    lengths = {"kv_lengths": np.array([15, 22]), "query_offset": np.array([6, 1])}
    packed |= starts | lengths | {"is_causal": True, "return_lse": True}
    torch_options = {"attn_mask": given["mask"], "enable_gqa": True}
    drop = {"query": query, "key": key, "query_offset": np.array([1, 2]), "seed": 3}
    calls = [
        (fastattn.attention_backward, backward),
        (fastattn.attention_weights, pairs),
        (fastattn.varlen_attention, packed),
        (fastattn.dropout_mask, drop | {"dropout_p": 0.5}),
        (fastattn.explain, plain | given),
        (fastattn.scaled_dot_product_attention, plain | torch_options),
        (reference.attention, plain | given | {"return_lse": True}),
        (reference.varlen_attention, packed),
        (reference.attention_backward, backward),
        (reference.attention_weights, pairs),
        (reference.dropout_mask, drop | {"dropout_p": 0.5}),
    ]  # fmt: skip
    for call, arguments in calls:
        expected = call(**arguments)
        results = call(**converted(kind, arguments))
        if isinstance(expected, dict):
            assert results == expected
            continue
        answered = kind is InNamespace and call.__module__ != reference.__name__
        several = results if isinstance(results, tuple) else (results,)
        assert {type(x) for x in several} == {InNamespace if answered else np.ndarray}
        expected = expected if isinstance(expected, tuple) else (expected,)
        for x, y in zip(map(numpy_of, several), expected, strict=True):
            assert_same_bits(x, y)


# What is more than its numbers.


class Unit(np.ndarray):
    """Numbers with a unit, which NumPy's functions respect."""

    def __array_ufunc__(self, *given, **options):
        return NotImplemented


class Sub(np.ndarray):
    """Numbers, and nothing that NumPy would ask about."""


class Table:
    """Columns with names, which can be read as an array."""

    def __dataframe__(self):
        raise AssertionError

    def __array__(self, dtype=None, copy=None):
        return X


class Lazy:
    """Numbers that are still to be computed, by a library that overrides NumPy's functions."""

    def __array_function__(self, *given):
        raise AssertionError

    def __array__(self, dtype=None, copy=None):
        raise AssertionError


MORE = {
    "masked": np.ma.array(X, mask=X > 2),
    "matrix": X[0, 0].view(np.matrix),
    "unit": X.view(Unit),
    "table": Table(),
    "lazy": Lazy(),
    "in a list": [[X.view(Unit)[0, 0]] * 2],
    "masked number": [1.0, np.ma.masked],
}


@pytest.mark.promise("more-than-numbers-is-refused")
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("call", [fastattn.attention, reference.attention])
def test_what_is_more_than_its_numbers_is_refused(kind, call):
    x = MORE[kind]
    names = {"in a list": "Unit", "masked number": "MaskedConstant"}
    for name in ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks", "kv_lengths"):
        with pytest.raises(TypeError) as error:
            call(**{"query": X, "key": X, "value": X} | {name: x})
        assert str(error.value) == (
            f"{name} must be an array of numbers and nothing beside, not "
            f"{names.get(kind, type(x).__name__)}, whose mask, unit, labels or rules would be "
            f"lost: numpy.asarray({name}) is the numbers alone"
        )


class WithArray:
    __array_ufunc__ = None  # says who adds, not what is added

    def __array__(self, dtype=None, copy=None):
        return X


def test_what_is_its_numbers_is_read(tmp_path):
    expected = fastattn.attention(X, X, X)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    mapped[:] = X
    for x in (
        X.view(Sub),
        X.view(np.recarray),
        mapped,
        memoryview(X),
        SimpleNamespace(__array_interface__=X.__array_interface__),
        WithArray(),
        [[[array.array("f", row) for row in head] for head in X[0]]],
        [[Exported(head) for head in X[0]]],
    ):
        result = fastattn.attention(x, X, X)
        assert type(result) is np.ndarray
        assert_same_bits(result, expected)
        assert_same_bits(reference.attention(x, X, X), reference.attention(X, X, X))


# All of these, and every call.


@pytest.fixture(params=["torch", "jax", "namespace"])
def convert(request):
    """Return the function that makes arrays of one library."""
    if request.param == "namespace":
        return InNamespace
    module = pytest.importorskip(request.param, exc_type=ImportError)
    if request.param == "torch":
        return lambda x: tensor(module, x)
    return module.numpy.asarray


@pytest.mark.promise("answered-in-kind")
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
    assert (tuple(numpy_of(out).shape), tuple(numpy_of(lse).shape)) == ((2, 4, 0, 16), (2, 4, 0))
    query, key, value = problem(kv_len=0)
    assert not numpy_of(fastattn.attention(*map(convert, (query, key, value)))).any()
