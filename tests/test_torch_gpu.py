# SPDX-License-Identifier: Apache-2.0
"""fastattn.torch with tensors on a GPU, where there is none: what is passed on, and shapes."""

import numpy as np
import pytest

import fastattn
import fastattn.cuda

torch = pytest.importorskip("torch", exc_type=ImportError)

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import fastattn.torch  # noqa: E402
from fastattn.torch import _gpu, _kernel  # noqa: E402


@pytest.fixture
def called(monkeypatch):
    """Let fastattn.cuda's functions note what they are called with, and answer by the CPU's."""
    calls = []

    def attention(query, key, value, **options):
        calls.append(options)
        return fastattn.attention(query, key, value, **options)

    def attention_backward(*arrays, deterministic, **options):
        calls.append({"deterministic": deterministic, **options})
        return fastattn.attention_backward(*arrays, **options)

    monkeypatch.setattr(fastattn.cuda, "attention", attention)
    monkeypatch.setattr(fastattn.cuda, "attention_backward", attention_backward)
    return calls


def tensors(*shapes, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


def options_of(**given):
    """Return a call's options as `_kernel.py` has them."""
    names = ("mask", "bias", "sinks", "alibi_slopes", "query_offset", "kv_lengths", "seed")
    tensors = [given.pop(name, None) for name in names]
    starts = given.pop("starts", (None, None))
    rest = {"scale": None, "is_causal": False, "has_window": False, "left": None, "right": None}
    rest |= {"softcap": None, "dropout_p": 0.0} | given
    return (*tensors, *starts, *rest.values())


def test_every_option_is_passed_on(called):
    query, key, value, bias = tensors((2, 4, 8), (2, 6, 8), (2, 6, 8), (4, 6))
    sinks = torch.tensor([0.5, 1.0], dtype=torch.bfloat16)
    options = options_of(
        mask=torch.ones(4, 6, dtype=torch.bool),
        bias=bias.requires_grad_(),
        sinks=sinks,
        query_offset=2,
        kv_lengths=torch.tensor(5),
        seed=torch.tensor(-1),
        scale=0.3,
        is_causal=True,
        has_window=True,
        left=3,
        softcap=4.0,
        dropout_p=0.25,
    )
    out, lse = _gpu.forward(query, key, value, options, True)
    assert out.shape == query.shape
    assert lse.shape == (2, 4)
    (given,) = called
    assert given["scale"] == 0.3
    assert given["window"] == (3, None)
    assert given["seed"] == 2**64 - 1
    assert not given["bias"].requires_grad
    assert given["sinks"].dtype == np.float64  # on the CPU: as an array of the host
    assert given["kv_lengths"] == 5
    assert given["return_lse"] is True


def test_gradients_are_those_of_the_cpu(called):
    query, key, value, grad_out, bias = tensors(*[(2, 4, 8)] * 4, (4, 4))
    options = options_of(bias=bias, sinks=torch.tensor([0.5, 1.0]), is_causal=True)
    out, lse = _kernel.forward(query, key, value, options, True)
    arguments = (grad_out, query, key, value, out, lse, torch.ones_like(lse), options, True, True)
    for got, expected in zip(_gpu.backward(*arguments), _kernel.backward(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert called[0]["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    try:
        dq, *_, dbias, dsinks = _gpu.backward(*arguments[:-2], False, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert called[1]["deterministic"] is True
    assert dq.shape == query.shape
    assert dbias is dsinks is None


def test_packed_sequences_have_no_kernel():
    query, key, value = tensors(*[(5, 2, 8)] * 3)
    with pytest.raises(NotImplementedError, match="varlen_attention has no kernel for GPUs: pad"):
        _gpu.forward(query, key, value, options_of(starts=([0, 5], [0, 5])), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operators_know_the_shapes_on_a_gpu(dtype):
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, device="cuda", dtype=dtype)
        key = torch.empty(2, 2, 7, 8, device="cuda", dtype=dtype)
        out, lse = fastattn.torch.attention(query, key, key, return_lse=True)
        assert out.shape == query.shape
        assert out.dtype == dtype
        assert out.device.type == lse.device.type == "cuda"
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        options = options_of()
        grads = torch.ops.fastattn.attention_backward(
            out, query, key, key, out, lse, None, *options, False, False
        )
        assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, key.shape]
        assert all(grad.device.type == "cuda" for grad in grads[:3])
        as_torch = fastattn.torch.scaled_dot_product_attention(
            query, key, key, is_causal=True, enable_gqa=True
        )
        assert as_torch.shape == query.shape


def test_patch_leaves_a_gpu_to_torch():
    with FakeTensorMode(), fastattn.torch.patch() as patched:
        x = torch.empty(1, 2, 5, 8, device="cuda")
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert patched.report()["answered"] == 0
