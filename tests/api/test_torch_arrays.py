# SPDX-License-Identifier: Apache-2.0
"""Tensors of PyTorch as arrays are read in place and answered in kind, or refused."""
# ruff: noqa: E501 - the tables have a line per case

import sys

import pytest

import fastattn
from tests.api.arrays import NAMES, converted, dtype_of, numpy_of, options, problem, tensor
from tests.support.correctness import assert_same_bits


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
def test_tensors_are_read_where_they_lie(torch, name, core_addresses):
    """Strides of other layouts included; memory that is the same is the same in the core."""
    arrays = [tensor(torch, x) for x in problem(name)]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    out = fastattn.attention(*swapped)
    assert core_addresses == [x.data_ptr() for x in (*swapped, out)]
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
        "grad": (parameter, "key requires grad, and this call has no gradient: use fastattn.torch.attention, or pass key.detach()"),
        "meta": (x.to("meta"), "key must hold numbers, got a tensor on the device meta"),
        "sparse": (x.to_sparse(), f"key {dense}, got one of layout torch.sparse_coo: key.to_dense()"),
        "nested": (
            torch.nested.nested_tensor([x[0]], layout=torch.jagged),
            f"key {dense}, not a nested one (fastattn.varlen_attention takes the values and "
            "offsets of jagged ones)",
        ),
        "quantised": (
            torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.qint8),
            "key must not be quantised, got a tensor of torch.qint8: key.dequantize()",
        ),
        "dtype": (x.to(torch.int32), "key must be an array of float16, bfloat16, float32 or float64, not int32"),
        "float8": (x.to(torch.float8_e4m3fn), "key must be a tensor that NumPy can read, got torch.float8_e4m3fn in a Tensor: "),
    }  # fmt: skip


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
            out, *arrays, out, lse, bias=bias, sinks=sinks, return_dbias=True, return_dsinks=True
        )
        return (out, lse, *grads)

    usual = results()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for x, expected in zip(results(), usual, strict=True):
        assert x.dtype == expected.dtype
        assert torch.equal(x, expected)
