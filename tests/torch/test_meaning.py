# SPDX-License-Identifier: Apache-2.0
"""`scaled_dot_product_attention` means torch's; `attention` takes every argument in tensors."""

import inspect

import numpy as np
import pytest
import torch

import fastattn
import fastattn.torch as ft
from tests.torch.problems import DTYPES, EXACT, close, operands, plain_with_dropout, rand

# Torch's meaning.


@pytest.mark.promise("sdpa-is-torchs")
def test_signature():
    ours = inspect.signature(ft.scaled_dot_product_attention)
    numpy = inspect.signature(fastattn.scaled_dot_product_attention)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in numpy.parameters.values()
    ]


SHAPES = [
    ((5, 4), (7, 4), (7, 3)),
    ((2, 5, 4), (2, 7, 4), (2, 7, 4)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((6, 2, 3, 5, 4), (6, 2, 3, 7, 4), (6, 2, 3, 7, 4)),
    ((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 3)),
    ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((2, 3, 1, 64), (2, 3, 300, 64), (2, 3, 300, 64)),
    ((1, 2, 200, 64), (1, 2, 200, 64), (1, 2, 200, 64)),
]


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.1}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes(shapes, options, dtype):
    tensors = [rand(*shape, dtype=dtype) for shape in shapes]
    ours = ft.scaled_dot_product_attention(*tensors, **options)
    theirs = EXACT(*(x.double() for x in tensors), **options)
    assert ours.dtype == dtype
    close(ours.double(), theirs, dtype)


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_enable_gqa(kv_heads, is_causal):
    tensors = operands(kv_heads=kv_heads)
    options = {"enable_gqa": True, "is_causal": is_causal}
    close(ft.scaled_dot_product_attention(*tensors, **options), EXACT(*tensors, **options))


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (4, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
def test_masks(kind, shape, dtype):
    tensors = operands(dtype=dtype)
    mask = rand(*shape, dtype=dtype)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True
    if kind == "-inf":
        mask[..., 1] = -torch.inf
    ours = ft.scaled_dot_product_attention(*tensors, attn_mask=mask)
    wide = mask if kind == "bool" else mask.double()
    close(ours.double(), EXACT(*(x.double() for x in tensors), attn_mask=wide), dtype)


@pytest.mark.promise("empty-rows-are-zero-everywhere", "empty-row-has-gradient-zero")
@pytest.mark.parametrize("fill", [False, -torch.inf])
def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients(fill):
    tensors = operands(grad=True)
    mask = torch.zeros(5, 7, dtype=torch.float64) if fill else torch.ones(5, 7, dtype=torch.bool)
    mask[2] = fill
    out = ft.scaled_dot_product_attention(*tensors, attn_mask=mask)
    out.sum().backward()
    assert (out[:, :, 2] == 0).all()
    assert (tensors[0].grad[:, :, 2] == 0).all()
    assert all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.promise("sdpa-is-torchs")
def test_strides():
    """Views are read where they lie, and the result is laid out like torch's own."""
    tensors = operands(kv_len=5)
    views = {
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors],
        "last axis": [x.mT.contiguous().mT for x in tensors],
        "slice": [torch.cat([x, x], -1)[..., :8] for x in tensors],
        "every other": [x.repeat_interleave(2, 2)[:, :, ::2] for x in tensors],
        "expanded": [x[:1].expand(2, -1, -1, -1) for x in tensors],
        "negative bit": [torch._neg_view(-x) for x in tensors],
    }
    for name, views_of in views.items():
        ours, theirs = ft.scaled_dot_product_attention(*views_of), EXACT(*views_of)
        close(ours, theirs)
        if name not in ("last axis", "expanded"):
            assert ours.stride() == theirs.stride(), name


@pytest.mark.promise("foreign-arrays-are-read-in-place")
def test_nothing_is_copied(monkeypatch):
    seen = []
    attention = fastattn.attention

    def spy(*arrays, **options):
        seen.extend([*arrays, options["mask"], options["out"]])
        return attention(*arrays, **options)

    monkeypatch.setattr(fastattn, "attention", spy)
    for dtype in DTYPES:
        tensors = operands(dtype=dtype)
        mask = rand(5, 7, dtype=dtype)
        out = ft.scaled_dot_product_attention(*tensors, attn_mask=mask)
        for array, tensor in zip(seen, [*tensors, mask, out], strict=True):
            assert array.ctypes.data == tensor.data_ptr()
        seen.clear()


def test_empty():
    for shapes in [((2, 3, 0, 4), (2, 3, 7, 4)), ((0, 3, 5, 4), (0, 3, 7, 4))]:
        q, k = (rand(*shape, seed=0) for shape in shapes)
        assert ft.scaled_dot_product_attention(q, k, k).shape == EXACT(q, k, k).shape
    q, k = rand(2, 3, 5, 4, grad=True), rand(2, 3, 0, 4)
    out = ft.scaled_dot_product_attention(q, k, k)
    out.sum().backward()
    assert (out == 0).all()
    assert (q.grad == 0).all()


def test_autocast():
    tensors = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = ft.scaled_dot_product_attention(*tensors), EXACT(*tensors)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert ft.attention(*tensors).dtype == torch.bfloat16
        wide = operands()
        assert ft.scaled_dot_product_attention(*wide).dtype == EXACT(*wide).dtype
    close(ours.float(), theirs.float(), torch.bfloat16)


@pytest.mark.promise("torch-has-every-argument")
def test_every_argument():
    """`attention` is fastattn.attention, given arrays, tensors or numbers."""
    q, k, v = operands(q_len=3, kv_heads=2)
    options = {
        "mask": rand(3, 7) > -1,
        "bias": rand(4, 1, 7),
        "scale": 0.3,
        "is_causal": True,
        "query_offset": torch.tensor([4, 2]),
        "window": (5, None),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(4),
        "sinks": rand(4),
        "kv_lengths": torch.tensor([7, 6]),
    }
    arrays = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    expected = fastattn.attention(q.numpy(), k.numpy(), v.numpy(), return_lse=True, **arrays)
    for given in (options, options | {"query_offset": [4, 2], "kv_lengths": np.array([7, 6])}):
        out, lse = ft.attention(q, k, v, return_lse=True, **given)
        np.testing.assert_array_equal(out.numpy(), expected[0])
        np.testing.assert_array_equal(lse.numpy(), expected[1])
    whole = torch.empty(2, 4, 3, 8, dtype=torch.float64)
    for out in (whole, torch.empty(2, 3, 4, 8, dtype=torch.float64).transpose(1, 2)):
        version = out._version
        assert ft.attention(q, k, v, out=out, **options) is out
        np.testing.assert_array_equal(out.numpy(), expected[0])
        assert out._version > version
    narrow = options | {name: options[name].bfloat16() for name in ("bias", "sinks")}
    close(ft.attention(q, k, v, **narrow).bfloat16(), out.bfloat16(), torch.bfloat16)
    with pytest.raises(ValueError, match="query_offset must be given"):
        ft.attention(q, k, v, is_causal=True)


@pytest.mark.promise("out-is-written-in-place")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_is_written_where_it_lies(dtype, core_addresses):
    tensors = operands(dtype=dtype)
    whole = torch.empty(2, 4, 2 * tensors[0].shape[-2], 8, dtype=dtype)
    out = whole[..., ::2, :]
    for options in ({}, {"mask": torch.tensor(True)}, {"is_causal": True, "query_offset": 0}):
        core_addresses.clear()
        assert ft.attention(*tensors, out=out, **options) is out
        assert core_addresses[-1] == out.data_ptr()
        assert torch.equal(out, ft.attention(*tensors, **options))


def test_half_precision_keys_beside_float32_queries():
    q, k, v = operands(dtype=torch.float32)
    out = ft.attention(q, k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.float32
    close(out, ft.attention(q, k.bfloat16().float(), v.bfloat16().float()))


# Dropout.


@pytest.mark.promise("dropout-repeats-with-torch", "gradients-drop-the-same-pairs")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": rand(5, 7)}], ids=str)
def test_dropout(options):
    leaves = operands(grad=True)
    grad = rand(2, 4, 5, 8)
    results = []
    for call in (ft.scaled_dot_product_attention, plain_with_dropout):
        torch.manual_seed(1)
        for _ in range(2):  # two draws
            out = call(*leaves, dropout_p=0.3, **options)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        for our, their in zip(ours, theirs, strict=True):
            close(our, their)
    assert not torch.allclose(results[0][0], results[1][0])
    assert not ft.scaled_dot_product_attention(*leaves, dropout_p=1.0, **options).any()
