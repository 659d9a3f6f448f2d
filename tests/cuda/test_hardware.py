# SPDX-License-Identifier: Apache-2.0
"""Calls with tensors of PyTorch against float64, on the GPU that is here; on the CPU too.

The one file that runs machine code on a GPU: the first to run on a new one.
"""

import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch", exc_type=ImportError)

import fastattn.torch  # noqa: E402
from fastattn import cuda, reference  # noqa: E402

DTYPES = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6}  # and how far off a result may be
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CALLS = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 40},
    "window": {"window": (70, 9), "query_offset": 20},
    "lengths": {"kv_lengths": [333, 70]},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": [0.5, -1.0, 0.0, 2.0]},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request):
    return request.param


def tensors(device, dtype, q_len=300, kv_len=340, head_dim=64, grad=False):
    """Return fresh random query, key and value of 4 and 2 heads."""
    shapes = ((2, 4, q_len, head_dim), (2, 2, kv_len, head_dim), (2, 2, kv_len, head_dim))
    made = (torch.randn(s, device=device).to(getattr(torch, dtype)) for s in shapes)
    return [x.requires_grad_(grad) for x in made]


def wide(x):
    return x.detach().double().cpu().numpy()


def assert_close(x, expected, dtype):
    np.testing.assert_allclose(
        wide(x), expected, rtol=0, atol=DTYPES[dtype] * np.abs(expected).max()
    )


@pytest.mark.promise("gpu-means-the-same", "gpu-bitwise")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "q_len"),
    [
        ("bfloat16", 64, 300),
        ("float16", 128, 300),
        ("bfloat16", 96, 300),
        ("float16", 256, 130),
        ("bfloat16", 128, 3),
        ("float16", 40, 100),
        ("float32", 64, 100),
    ],
)
def test_results(device, dtype, head_dim, q_len, name):
    arrays = tensors(device, dtype, q_len, head_dim=head_dim)
    out, lse = fastattn.attention(*arrays, return_lse=True, **CALLS[name])
    truth = reference.attention(*map(wide, arrays), return_lse=True, **CALLS[name])
    assert out.device.type == device
    assert_close(out, truth[0], dtype)
    seen = np.isfinite(truth[1])
    np.testing.assert_allclose(wide(lse)[seen], truth[1][seen], rtol=0, atol=1e-5)
    again = fastattn.attention(*arrays, **CALLS[name])
    assert torch.equal(again, out)


@pytest.mark.promise("gpu-means-the-same", "gpu-bitwise")
@pytest.mark.parametrize("name", ["plain", "causal", "lengths"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128), ("float16", 40), ("float32", 64)]
)
def test_gradients(device, dtype, head_dim, name):
    arrays = tensors(device, dtype, head_dim=head_dim, grad=True)
    out = fastattn.torch.attention(*arrays, **CALLS[name])
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, arrays, grad_out, retain_graph=True)
    plain = [wide(x) for x in arrays]
    truth = reference.attention(*plain, return_lse=True, **CALLS[name])
    expected = reference.attention_backward(wide(grad_out), *plain, *truth, **CALLS[name])
    for grad, right in zip(grads, expected, strict=True):
        assert_close(grad, right, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(out, arrays, grad_out, retain_graph=True) for _ in "12"
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


@pytest.mark.promise("gpu-masked-pair-contributes-nothing")
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("q_len", [4, 300])
def test_what_is_hidden_may_hold_anything(device, q_len, head_dim):
    query, key, value = tensors(device, "bfloat16", q_len, head_dim=head_dim)
    options = {"is_causal": True, "query_offset": 0}
    expected = fastattn.attention(query, key, value, **options)
    key[:, :, q_len:] = value[:, :, q_len:] = torch.nan
    value[:, :, q_len - 1] = torch.inf  # which the last query alone sees
    out = fastattn.attention(query, key, value, **options)
    assert_close(out[:, :, :-1], wide(expected[:, :, :-1]), "bfloat16")
    assert not torch.isfinite(out[:, :, -1]).any()


@pytest.mark.promise("gpu-streams-and-graphs")
@NEEDS_GPU
def test_streams_and_graphs():
    query, key, value = tensors("cuda", "bfloat16")
    expected = cuda.attention(query, key, value)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda.attention(query, key, value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = cuda.attention(query, key, value)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
