# SPDX-License-Identifier: Apache-2.0
"""What lies between `fastattn.torch` and `fastattn.cuda`, with tensors that say they are on a GPU.

`fastattn.cuda` is what the CPU computes, and must be asked for exactly the same call.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
import fastattn.torch as drop_in
from fastattn import cuda
from fastattn._options import NO_OPTIONS
from fastattn.torch import _operator


def numbers(x):
    return x.numpy() if isinstance(x, torch.Tensor) else x


def tensors(results):
    if isinstance(results, tuple):
        return tuple(map(torch.from_numpy, results))
    return torch.from_numpy(results)


@pytest.fixture
def asked(monkeypatch):
    """Let tensors be on a GPU, and return the names and options of the calls made there."""
    calls = []

    def attention(query, key, value, *, out=None, **options):
        calls.append(("attention", options))
        arrays = map(numbers, (query, key, value))
        results = fastattn.attention(*arrays, **{n: numbers(x) for n, x in options.items()})
        results = tensors(results)
        if out is None:
            return results
        first = results[0] if isinstance(results, tuple) else results
        out.copy_(first)
        return (out, *results[1:]) if isinstance(results, tuple) else out

    def attention_backward(*, deterministic, **named):
        calls.append(("attention_backward", named | {"deterministic": deterministic}))
        return tensors(fastattn.attention_backward(**{n: numbers(x) for n, x in named.items()}))

    monkeypatch.setattr(cuda, "attention", attention)
    monkeypatch.setattr(cuda, "attention_backward", attention_backward)
    monkeypatch.setattr(drop_in._tensors, "check", lambda name, x: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False, raising=False)

    def on_gpu():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        return calls

    return on_gpu


def leaves(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def gradients(inputs, **options):
    """Return out, lse and the gradients by the inputs: query, key, value, bias, sinks."""
    query, key, value, bias, sinks = inputs
    out, lse = drop_in.attention(
        query, key, value, bias=bias, sinks=sinks, return_lse=True, **options
    )
    weight = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape) / out.numel()
    loss = (out * weight).sum() + lse.sum()
    return [out, lse, *torch.autograd.grad(loss, inputs)]


SHAPES = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (5, 7), (4,))
OPTIONS = {"is_causal": True, "query_offset": 2, "softcap": 4.0, "kv_lengths": [7, 3]}


@pytest.mark.parametrize("deterministic", [False, True])
def test_results_and_gradients_are_those_of_the_call(asked, deterministic):
    inputs = leaves(*SHAPES)
    expected = gradients(inputs, **OPTIONS)
    calls = asked()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = gradients(inputs, **OPTIONS)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)
    assert [name for name, _ in calls] == ["attention", "attention_backward"]
    assert calls[1][1]["deterministic"] is deterministic
    assert calls[1][1]["return_dbias"] is calls[1][1]["return_dsinks"] is True


def test_tensors_of_options_are_passed_on_where_they_lie(asked):
    query, key, value, *_ = leaves(*SHAPES)
    lengths, offset = torch.tensor([7, 3]), torch.tensor([1, 2])
    calls = asked()
    drop_in.attention(query, key, value, is_causal=True, query_offset=offset, kv_lengths=lengths)
    given = calls[0][1]
    assert given["kv_lengths"].data_ptr() == lengths.data_ptr()
    assert given["query_offset"].data_ptr() == offset.data_ptr()


def test_torchs_own_signature(asked):
    query, key, value = (x.detach() for x in leaves(*((2, 3, 5, 8),) * 3))
    mask = torch.from_numpy(np.tril(np.ones((5, 5), bool)))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    calls = asked()
    found = drop_in.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(found, expected)
    assert [name for name, _ in calls] == ["attention"]


def test_packed_sequences_have_no_kernel(asked):
    query = torch.zeros(5, 2, 8)
    starts = torch.tensor([0, 5])
    asked()
    with pytest.raises(NotImplementedError, match="varlen_attention has no kernel for GPUs: pad"):
        drop_in.varlen_attention(query, query, query, starts, starts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operators_know_the_shapes_on_a_gpu(dtype):
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, device="cuda", dtype=dtype)
        key = torch.empty(2, 2, 7, 8, device="cuda", dtype=dtype)
        out, lse = drop_in.attention(query, key, key, return_lse=True)
        assert out.shape == query.shape
        assert out.dtype == dtype
        assert out.device.type == lse.device.type == "cuda"
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        options = _operator._arguments(NO_OPTIONS, ())
        grads = torch.ops.fastattn.attention_backward(
            out, query, key, key, out, lse, None, *options, False, False
        )
        assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, key.shape]
        assert all(grad.device.type == "cuda" for grad in grads[:3])


def test_patch_leaves_a_gpu_to_torch():
    with FakeTensorMode(), drop_in.patch() as patched:
        x = torch.empty(1, 2, 5, 8, device="cuda")
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert patched.report()["answered"] == 0
