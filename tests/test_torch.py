# SPDX-License-Identifier: Apache-2.0
"""fastattn.torch: torch's meaning, gradients, torch.compile and export, patch, threads, errors."""

import doctest
import inspect
import itertools
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from child import run, start

import fastattn

torch = pytest.importorskip("torch", exc_type=ImportError)

import fastattn.torch as ft  # noqa: E402

F = torch.nn.functional
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = F.scaled_dot_product_attention  # torch's own, whatever a test patches


def rand(*shape, dtype=torch.float64, grad=False, seed=None):
    rng = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return torch.randn(shape, dtype=torch.float64, generator=rng).to(dtype).requires_grad_(grad)


def operands(q_len=5, kv_len=7, heads=4, kv_heads=None, dim=8, dtype=torch.float64, grad=False):
    kv = (2, kv_heads or heads, kv_len, dim)
    shapes = ((2, heads, q_len, dim), kv, kv)
    return [rand(*s, dtype=dtype, grad=grad, seed=i) for i, s in enumerate(shapes)]


def close(ours, theirs, dtype=None):
    eps = torch.finfo(dtype or theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)


# Torch's meaning.


@pytest.mark.promise("sdpa-is-torchs", "torch-has-every-argument")
def test_signature():
    ours = inspect.signature(ft.scaled_dot_product_attention)
    numpy = inspect.signature(fastattn.scaled_dot_product_attention)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in numpy.parameters.values()
    ]
    numpy = inspect.signature(fastattn.attention)
    ours = inspect.signature(ft.attention)
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
    out = torch.empty(2, 4, 3, 8, dtype=torch.float64)
    assert ft.attention(q, k, v, out=out, **options) is out
    np.testing.assert_array_equal(out.numpy(), expected[0])
    narrow = options | {name: options[name].bfloat16() for name in ("bias", "sinks")}
    close(ft.attention(q, k, v, **narrow).bfloat16(), out.bfloat16(), torch.bfloat16)
    with pytest.raises(ValueError, match="query_offset must be given"):
        ft.attention(q, k, v, is_causal=True)


def test_half_precision_keys_beside_float32_queries():
    q, k, v = operands(dtype=torch.float32)
    out = ft.attention(q, k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.float32
    close(out, ft.attention(q, k.bfloat16().float(), v.bfloat16().float()))


# Gradients.


@pytest.mark.promise("torch-gradients")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "bias", "causal"])
def test_gradients_are_torchs(mask, dtype):
    leaves = [x.requires_grad_() for x in operands(kv_len=5, dtype=dtype)]
    options = {"is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = rand(5, 5) > -1
    if mask == "bias":
        options["attn_mask"] = rand(4, 1, 5, dtype=dtype, grad=True)
        leaves.append(options["attn_mask"])
    grad = rand(2, 4, 5, 8, dtype=dtype)
    ours = torch.autograd.grad(
        ft.scaled_dot_product_attention(*leaves[:3], **options), leaves, grad
    )
    wide = [x.detach().to(torch.float64).requires_grad_() for x in leaves]
    if mask == "bias":
        options["attn_mask"] = wide[3]
    theirs = torch.autograd.grad(EXACT(*wide[:3], **options), wide, grad.double())
    for our, their, leaf in zip(ours, theirs, leaves, strict=True):
        assert our.dtype == leaf.dtype
        assert our.shape == leaf.shape
        eps = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(our.double(), their, rtol=eps, atol=eps * their.abs().max())


@pytest.mark.promise("torch-gradients")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", [(5, 700), (700, 5), (300, 700)], ids=str)
def test_plain_gradients_leave_no_row_as_it_was(lengths, kv_heads, is_causal):
    """Where nothing is special, the kernel writes into memory that nobody has cleared."""
    leaves = operands(*lengths, kv_heads=kv_heads, grad=True)
    options = {"is_causal": is_causal, "query_offset": 0 if is_causal else None}
    out = ft.attention(*leaves, **options)
    grad = rand(*out.shape)
    expected = torch.autograd.grad(
        EXACT(*leaves, is_causal=is_causal, enable_gqa=True), leaves, grad
    )
    for given in (grad, grad.mT.contiguous().mT):
        dirty = [torch.full_like(x, torch.nan) for x in leaves for _ in range(2)]
        del dirty
        ours = torch.autograd.grad(out, leaves, given, retain_graph=True)
        for our, their in zip(ours, expected, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


GRADIENTS = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 2},
    "softcap, window": {"softcap": 1.5, "window": (3, 1), "query_offset": torch.tensor([2, 0])},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.3, 0.2, 0.4]), "query_offset": 1},
    "lengths": {"kv_lengths": torch.tensor([5, 3])},
    "mask": {"mask": torch.tensor([True, False, True, True, True])},
}


@pytest.mark.promise("torch-gradients")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name):
    leaves = [*operands(3, 5, kv_heads=2, dim=3, grad=True), rand(4, 1, 5, grad=True)]
    leaves.append(rand(4, grad=True, seed=9))

    def both(query, key, value, bias, sinks):
        return ft.attention(
            query, key, value, bias=bias, sinks=sinks, return_lse=True, **GRADIENTS[name]
        )

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(lambda *x: both(*x)[1], leaves)
    views = [x.detach().mT.contiguous().mT.requires_grad_() for x in leaves[:3]]
    assert torch.autograd.gradcheck(lambda *x: both(*x, *leaves[3:])[0], views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_of_one_number(dtype):
    query, key, value = rand(4, 5, 8), rand(4, 7, 8), rand(4, 7, 8)
    bias = torch.zeros((), dtype=dtype, requires_grad=True)
    ft.attention(query, key, value, bias=bias).square().sum().backward()
    assert bias.grad.dtype == dtype
    assert bias.grad.shape == ()
    assert abs(bias.grad) < 1e-5  # the probabilities stay as they are


@pytest.mark.promise("torch-gradients")
def test_a_mask_that_requires_grad_is_a_bias():
    query, key, value = operands()
    mask, bias = rand(5, 7, grad=True), rand(4, 1, 7, grad=True)
    assert torch.autograd.gradcheck(
        lambda m, b: ft.attention(query, key, value, mask=m, bias=b), (mask, bias)
    )
    sinks = rand(4, dtype=torch.bfloat16, grad=True)
    ft.attention(query, key, value, sinks=sinks).sum().backward()
    assert sinks.grad.dtype == torch.bfloat16


def test_only_what_is_needed_is_differentiated():
    query, key, value = operands()
    query.requires_grad_()
    with torch.no_grad():
        assert not ft.scaled_dot_product_attention(query, key, value).requires_grad
    with torch.inference_mode():
        close(ft.scaled_dot_product_attention(query, key, value), EXACT(query, key, value))
    out = ft.scaled_dot_product_attention(query, key, value)
    out.sum().backward()
    assert query.grad is not None
    assert key.grad is None
    out = ft.scaled_dot_product_attention(torch.nn.Parameter(query.detach()), key, value)
    assert out.requires_grad
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.promise("missing-derivatives-are-errors")
@pytest.mark.filterwarnings("ignore")
def test_derivatives_that_are_not_there():
    query = rand(1, 2, 3, 4, grad=True)
    out = ft.scaled_dot_product_attention(query, query, query)
    (grad,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    x = query.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ft.scaled_dot_product_attention(dual, x, x)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda q: ft.scaled_dot_product_attention(q, x, x).sum())(x)


def test_an_exception_inside_backward_leaves_torch_usable(monkeypatch):
    query, key, value = operands(grad=True)
    mask = rand(5, 7)
    out = ft.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def fail(*arrays, **options):
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(fastattn, "attention_backward", fail)
        with pytest.raises(MemoryError, match="none left"):
            out.sum().backward(retain_graph=True)
    out.sum().backward()
    expected = torch.autograd.grad(
        EXACT(query, key, value, attn_mask=mask).sum(), (query, key, value)
    )
    for leaf, grad in zip((query, key, value), expected, strict=True):
        close(leaf.grad, grad)


# Dropout.


def plain_with_dropout(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Compute torch's formula with the pairs that ours drops under torch's generator as it is."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    probs = scores.softmax(-1)
    if dropout_p > 0:
        seed = int(torch.randint(2**63 - 1, ()))
        pairs = (query.detach(), key.detach())
        kept = fastattn.dropout_mask(*pairs, dropout_p=dropout_p, seed=seed)
        probs = probs * torch.as_tensor(kept).to(probs.dtype) / (1 - dropout_p)
    return probs @ value


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


# Packed sequences.

STARTS = (torch.tensor([0, 4, 4, 15, 20]), torch.tensor([0, 9, 12, 19, 20]))


def packed(factor=1, dtype=torch.float64, grad=False):
    return [rand(20 * factor, heads, 8, dtype=dtype, grad=grad) for heads in (4, 2, 2)]


@pytest.mark.promise("torch-has-every-argument")
def test_every_argument_of_packed_sequences():
    tensors = packed()
    offsets, lengths = torch.tensor([5, 3, -4, -4]), torch.tensor([9, 1, 0, 1])
    options = {
        "mask": rand(4, 1, 9) > -1,
        "bias": rand(20, 9),
        "scale": 0.3,
        "is_causal": True,
        "query_offset": offsets,
        "window": (5, None),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(4, 4),
        "sinks": rand(4),
        "kv_lengths": lengths,
        "dropout_p": 0.2,
    }
    arrays = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    expected = fastattn.varlen_attention(
        *(x.numpy() for x in (*tensors, *STARTS)), return_lse=True, seed=3, **arrays
    )
    for starts in (STARTS, [x.tolist() for x in STARTS], [x.int().numpy() for x in STARTS]):
        out, lse = ft.varlen_attention(*tensors, *starts, return_lse=True, seed=3, **options)
        np.testing.assert_array_equal(out.numpy(), expected[0])
        np.testing.assert_array_equal(lse.numpy(), expected[1])
    out = torch.empty(20, 4, 8, dtype=torch.float64)
    assert ft.varlen_attention(*tensors, *STARTS, out=out, seed=3, **options) is out
    np.testing.assert_array_equal(out.numpy(), expected[0])


@pytest.mark.promise("packed-gradients-are-alone", "rows-of-no-sequence-are-zero")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_are_attended_alone(dtype):
    """Forward and backward, to the bit; rows of no sequence give 0."""
    leaves = packed(dtype=dtype, grad=True)
    q_starts, kv_starts = torch.tensor([1, 5, 16]), torch.tensor([2, 11, 19])
    out = ft.varlen_attention(*leaves, q_starts, kv_starts, softcap=3.0)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    alone = [torch.zeros_like(x) for x in (out, *leaves)]
    for rows, keys in ((slice(1, 5), slice(2, 11)), (slice(5, 16), slice(11, 19))):
        own = [leaves[0][rows], *(x[keys] for x in leaves[1:])]
        own = [x.detach().transpose(0, 1).requires_grad_() for x in own]
        result = ft.attention(*own, softcap=3.0)
        own_grads = torch.autograd.grad(result, own, torch.ones_like(result))
        where = (rows, rows, keys, keys)
        for x, i, part in zip(alone, where, (result, *own_grads), strict=True):
            x[i] = part.detach().transpose(0, 1)
    assert all(map(torch.equal, (out, *grads), alone))


@pytest.mark.promise("torch-gradients")
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "query_offset": torch.tensor([5, 3, -4, -4])},
        {"kv_lengths": torch.tensor([7, 2, 7, 0]), "softcap": 1.5},
        {"dropout_p": 0.3, "seed": 7},
    ],
)
def test_gradcheck_of_packed_sequences(options):
    leaves = [*packed(grad=True), rand(4, 1, 9, grad=True), rand(4, grad=True, seed=9)]

    def both(query, key, value, bias, sinks):
        out, lse = ft.varlen_attention(
            query, key, value, *STARTS, bias=bias, sinks=sinks, return_lse=True, **options
        )
        return out, lse.clamp(min=-99)

    assert torch.autograd.gradcheck(both, leaves)


def test_errors_of_packed_sequences():
    query, key, value = packed()
    q_starts, kv_starts = STARTS
    for wrong, message in (
        ((query[0], key, value, *STARTS), r"query must have 3 axes, .* got query.shape=\(4, 8\)"),
        ((query, key, value, q_starts, None), "cu_seqlens_kv must be .* not None"),
        ((query, key, value, q_starts.double(), kv_starts), "cu_seqlens_q must be .* not float64"),
        ((query, key, value, q_starts, kv_starts + 1), "cu_seqlens_kv must "),
        ((query, key, value, q_starts[1:], kv_starts), "must be equally long, got 4 and 5 entries"),
        ((query.numpy(), key, value, *STARTS), "query must be a tensor, not ndarray"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ft.varlen_attention(*wrong)
    with pytest.raises(ValueError, match="query_offset must be given"):
        ft.varlen_attention(query, key, value, *STARTS, is_causal=True)
    with pytest.raises(ValueError, match="out must not be given where an argument requires grad"):
        ft.varlen_attention(
            query, key.requires_grad_(), value, *STARTS, out=torch.empty_like(query)
        )


# torch.compile, torch.export.


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # of an operator that has changed
        yield
    torch._dynamo.reset()


@pytest.mark.promise("dropout-repeats-with-torch", "gradients-drop-the-same-pairs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_compiled(backend, fresh_compiler):
    @torch.compile(fullgraph=True, backend=backend)
    def attend(query, key, value):
        return ft.scaled_dot_product_attention(query, key, value, dropout_p=0.4)

    leaves = operands(grad=True)
    value, weight = leaves[2], rand(2, 4, 5, 8)
    outs = []
    for state in (1, 1, 2):
        torch.manual_seed(state)
        outs.append(attend(*leaves))
        # The result is linear in value: so backward drops the same pairs.
        (grad,) = torch.autograd.grad(outs[-1], value, weight)
        assert torch.allclose((grad * value).sum(), (outs[-1] * weight).sum(), rtol=1e-12)
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    assert not torch.allclose(outs[0], attend(*leaves))


def everything(query, key, value, bias, sinks):
    out, lse = ft.attention(
        query,
        key,
        value,
        bias=bias,
        sinks=sinks,
        is_causal=True,
        query_offset=key.shape[2] - query.shape[2],
        window=(4, None),
        softcap=3.0,
        kv_lengths=torch.tensor([6, 7]),
        return_lse=True,
    )
    return out.sin().sum() + lse.clamp(min=-9).cos().sum()


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend, fresh_compiler):
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for q_len, kv_len in ((5, 7), (6, 7), (6, 9)):  # another shape compiles a dynamic graph
        leaves = [*operands(q_len, kv_len, kv_heads=2, grad=True), rand(4, 1, kv_len, grad=True)]
        leaves.append(rand(4, grad=True, seed=9))
        expected = torch.autograd.grad(everything(*leaves), leaves)
        for ours, theirs in zip(
            torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True
        ):
            close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_compile_of_torchs_signature(fresh_compiler):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = operands(kv_len=5, dtype=dtype)
        compiled = torch.compile(ft.scaled_dot_product_attention, fullgraph=True)
        for options in ({"is_causal": True}, {"attn_mask": rand(5, 5) > -1}):
            assert torch.equal(
                compiled(*tensors, **options), ft.scaled_dot_product_attention(*tensors, **options)
            )


class Attend(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return ft.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path, fresh_compiler):
    length, keys = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Attend(),
        (*operands(), rand(5, 7) > -1),
        strict=strict,
        dynamic_shapes={
            "query": {2: length},
            "key": {2: keys},
            "value": {2: keys},
            "mask": {0: length, 1: keys},
        },
    )
    torch.export.save(program, tmp_path / "attend.pt2")
    module = torch.export.load(tmp_path / "attend.pt2").module()
    example = (*operands(9, 11), rand(9, 11) > -1)
    assert torch.equal(module(*example), Attend()(*example))


def packed_loss(query, key, value, starts, kv_starts, bias):
    out, lse = ft.varlen_attention(
        query,
        key,
        value,
        starts,
        kv_starts,
        bias=bias,
        is_causal=True,
        query_offset=kv_starts.diff() - starts.diff(),
        return_lse=True,
    )
    return out.sin().sum() + lse.clamp(min=-9).cos().sum()


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_packed_sequences(backend, fresh_compiler):
    compiled = torch.compile(packed_loss, fullgraph=True, backend=backend)
    for factor in (1, 2, 3):  # another total compiles a dynamic graph
        leaves, starts = packed(factor, grad=True), [x * factor for x in STARTS]
        leaves.append(rand(4, 1, 9 * factor, grad=True))
        results = [
            torch.autograd.grad(loss(*leaves[:3], *starts, leaves[3]), leaves)
            for loss in (compiled, packed_loss)
        ]
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


class AttendPacked(torch.nn.Module):
    def forward(self, query, key, value, starts, kv_starts):
        return ft.varlen_attention(query, key, value, starts, kv_starts, softcap=2.0)


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
def test_export_of_packed_sequences(fresh_compiler):
    total, keys, count = [torch.export.Dim.DYNAMIC] * 3
    module = torch.export.export(
        AttendPacked(),
        (*packed(), *STARTS),
        dynamic_shapes=({0: total}, {0: keys}, {0: keys}, {0: count}, {0: count}),
    ).module()
    example = (*packed(2), *(x[[0, 1, 3]] * 2 for x in STARTS))
    assert torch.equal(module(*example), AttendPacked()(*example))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_packed_sequences(grad):
    leaves = packed(grad=grad)
    options = (*[None] * 7, *STARTS, 0.3, False, False, None, None, 2.0, 0.0)
    torch.library.opcheck(torch.ops.fastattn.attention.default, (*leaves, *options))
    views = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in leaves]
    torch.library.opcheck(torch.ops.fastattn.attention.default, (*views, *options))
    out, lse = ft.varlen_attention(*leaves, *STARTS, scale=0.3, softcap=2.0, return_lse=True)
    saved = [x.detach() for x in (out, *leaves, out, lse)]
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward.default, (*saved, None, *options, False, False)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    leaves = operands(kv_heads=2, grad=grad)
    plain = (None, False, False, None, None, None, 0.0)
    torch.library.opcheck(torch.ops.fastattn.attention.default, (*leaves, *[None] * 9, *plain))
    bias, sinks = rand(4, 5, 7, grad=grad), rand(4, grad=grad, seed=9)
    some = (None, bias, sinks, None, torch.tensor(2), torch.tensor([7, 5]), *[None] * 3)
    numbers = (0.3, True, True, 3, None, 2.0, 0.0)
    torch.library.opcheck(torch.ops.fastattn.attention.default, (*leaves, *some, *numbers))
    out, lse = ft.attention(*leaves, return_lse=True)
    saved = [x.detach() for x in (out, *leaves, out, lse)]
    for tensors in (
        saved,
        [x.mT.contiguous().mT for x in saved],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in saved],
    ):
        torch.library.opcheck(
            torch.ops.fastattn.attention_backward.default,
            (*tensors, None, *[None] * 9, *plain, False, False),
        )


# patch.


def state():
    return F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    before = state()
    yield
    assert state() == before


@pytest.mark.promise("patch-restores")
def test_patch():
    before = state()
    tensors = operands()
    with ft.patch() as p:
        assert F.scaled_dot_product_attention is not EXACT
        assert not torch.backends.mha.get_fastpath_enabled()
        close(F.scaled_dot_product_attention(*tensors), EXACT(*tensors))
        assert p.report() == {"active": True, "answered": 1, "left": {}}
    assert state() == before
    assert str(p.report()).startswith("fastattn.torch.patch\n")
    assert p.report()["active"] is False


def test_plain_call_and_close():
    before = state()
    p = ft.patch()
    assert state() != before
    p.close()
    assert state() == before
    p.close()
    assert state() == before


@pytest.mark.promise("patch-restores")
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_patches_nest_and_close_in_any_order(order, switch):
    torch.backends.mha.set_fastpath_enabled(switch)
    try:
        before = state()
        patches = [ft.patch() for _ in range(3)]
        for count, place in enumerate(order):
            F.scaled_dot_product_attention(*operands())
            patches[place].close()
            assert (state() == before) == (count == 2)
        assert state() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.promise("patch-restores")
def test_patch_after_an_exception():
    before = state()
    with pytest.raises(KeyError), ft.patch(), ft.patch():
        raise KeyError
    assert state() == before


@pytest.mark.promise("patch-restores")
def test_a_patch_leaves_another_librarys_in_place():
    p = ft.patch()
    below = F.scaled_dot_product_attention

    def other(*tensors, **options):
        return below(*tensors, **options)

    F.scaled_dot_product_attention = other
    try:
        with ft.patch() as inner:
            F.scaled_dot_product_attention(*operands())
        assert F.scaled_dot_product_attention is other
        p.close()
        assert F.scaled_dot_product_attention is other
        close(other(*operands()), EXACT(*operands()))
        assert inner.report()["answered"] == 1
        assert p.report()["answered"] == 0
    finally:
        F.scaled_dot_product_attention = EXACT


@pytest.mark.promise("patch-restores")
def test_patch_in_threads():
    tensors = operands()
    expected = ft.scaled_dot_product_attention(*tensors)
    failures = []

    def keep_patching():
        try:
            for _ in range(50):
                with ft.patch() as p:
                    assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
                    assert p.report()["active"]
        except AssertionError as error:
            failures.append(error)

    before = state()
    threads = [threading.Thread(target=keep_patching) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state() == before


@pytest.mark.promise("patch-counts-what-it-leaves")
@pytest.mark.filterwarnings("ignore")
def test_what_is_left_to_torch_is_counted():
    x = rand(2, 3, 5, 4, dtype=torch.float32)
    meta = x.to("meta")

    class Subclass(torch.Tensor):
        pass

    cases = {
        "device meta": lambda sdpa: sdpa(meta, meta, meta).device,
        "type NestedTensor": lambda sdpa: sdpa(
            *[torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)] * 3
        ).shape[0],
        "type Subclass": lambda sdpa: type(sdpa(x.as_subclass(Subclass), x, x)),
        "a transform or mode is active": lambda sdpa: (
            torch.func.vmap(lambda y: sdpa(y, y, y))(x).shape
        ),
    }
    for why, case in cases.items():
        with ft.patch() as p:
            left = case(F.scaled_dot_product_attention)
        assert left == case(EXACT)
        assert p.report()["left"] == {why: 1}
        assert why in str(p.report())
    for bad in ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, {"dropout_p": 2.0}):
        with ft.patch() as p, pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(x, x, x, **bad)
        assert p.report()["answered"] == 0
        assert list(p.report()["left"].values()) == [1]


MODULES = (
    "MultiheadAttention",
    "padded",
    "TransformerEncoderLayer",
    "causal",
    "TransformerEncoder",
    "Transformer",
)


def modules(dropout=0.0):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": dropout}
    x, y = rand(3, 6, 16, dtype=torch.float32), rand(3, 4, 16, dtype=torch.float32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    mha = torch.nn.MultiheadAttention(16, 4, **options)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, **options)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    whole = torch.nn.Transformer(16, 4, 2, 2, 32, **options)
    return {
        "MultiheadAttention": (mha, lambda: mha(x, x, x, need_weights=False)[0], 1),
        "padded": (
            mha,
            lambda: mha(x, x, x, key_padding_mask=padding, need_weights=False)[0],
            1,
        ),
        "TransformerEncoderLayer": (layer, lambda: layer(x), 1),
        "causal": (layer, lambda: layer(x, src_mask=causal, is_causal=True), 1),
        "TransformerEncoder": (encoder, lambda: encoder(x, src_key_padding_mask=padding), 2),
        "Transformer": (whole, lambda: whole(x, y), 6),
    }


@pytest.mark.promise("patch-counts-what-it-leaves", "torch-gradients")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training):
    module, forward, calls = modules()[name]
    module.train(training)
    expected = forward()
    with ft.patch() as p:
        out = forward()
        with torch.no_grad():  # where the fast path would go around the function
            close(forward(), out)
        assert p.report() == {"active": True, "answered": 2 * calls, "left": {}}
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.sum().backward()
    ours = [x.grad.clone() for x in module.parameters()]
    module.zero_grad()
    expected.sum().backward()
    for grad, parameter in zip(ours, module.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.promise("dropout-repeats-with-torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_modules_with_dropout(name, monkeypatch):
    """Every dropout of a module in training draws what it would beside the plain formula."""
    module, forward, calls = modules(dropout=0.1)[name]

    def run():
        torch.manual_seed(3)
        module.zero_grad()
        out = forward()
        out.sin().sum().backward()
        return [out.detach(), *(x.grad.clone() for x in module.parameters())]

    with ft.patch() as p:
        ours, again = run(), run()
        assert p.report() == {"active": True, "answered": 2 * calls, "left": {}}
    assert all(map(torch.equal, ours, again))
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", plain_with_dropout)
        theirs = run()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
    module.eval()
    with ft.patch() as p:
        ours = forward()
        assert p.report()["answered"] == calls
    torch.testing.assert_close(ours, forward(), rtol=1e-5, atol=1e-5)


class Layer(torch.nn.Module):
    """A layer that calls ours by name."""

    def __init__(self, dropout_p):
        super().__init__()
        self.project, self.dropout_p = torch.nn.Linear(16, 48), dropout_p

    def forward(self, x, starts):
        query, key, value = self.project(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        heads_first = [y.transpose(1, 2) for y in (query, key, value)]
        out = ft.scaled_dot_product_attention(*heads_first, None, self.dropout_p, is_causal=True)
        out = out + ft.attention(*heads_first, window=(2, 0))
        rows = [y.flatten(0, 1) for y in (query, key, value)]
        packed = ft.varlen_attention(*rows, starts, starts).unflatten(0, x.shape[:2])
        return (out.transpose(1, 2) + packed).flatten(-2)


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_compile_of_a_module(dropout_p, fresh_compiler):
    torch.manual_seed(0)
    layer = Layer(dropout_p)
    x, starts = rand(2, 6, 16, dtype=torch.float32), torch.tensor([0, 5, 12])
    explained = torch._dynamo.explain(layer)(x, starts)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True)):
        torch.manual_seed(1)
        out = module(x, starts)
        out.sin().sum().backward()
        results.append([out, *(y.grad.clone() for y in layer.parameters())])
        layer.zero_grad()
    if dropout_p == 0:  # else inductor draws another seed
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compile_under_patch(fresh_compiler):
    _, forward, _ = modules()["TransformerEncoderLayer"]
    expected = forward()
    with ft.patch() as p:
        for backend in ("eager", "inductor"):
            out = torch.compile(forward, fullgraph=True, backend=backend)()
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            report = p.report()
            assert report["answered"]
            assert not report["left"]
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(forward, fullgraph=True, backend="eager")(), expected, rtol=1e-5, atol=1e-5
    )
    assert p.report() == report | {"active": False}


# Threads and forks: each in a process of its own.


def big(heads=8, length=512):
    return rand(1, heads, length, 64, dtype=torch.float32, seed=0)


def in_fork(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        right = False
        try:
            right = bool(check())
        finally:
            os._exit(0 if right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "ok", 1: "wrong", -signal.SIGALRM: "hang"}.get(status, f"exit status {status}")


class Dataset(torch.utils.data.Dataset):
    def __init__(self, query, expected):
        self.query, self.expected = query, expected

    def __len__(self):
        return 4

    def __getitem__(self, index):
        signal.alarm(20)
        out = ft.scaled_dot_product_attention(*[self.query] * 3)
        return float(np.abs(out.numpy() - self.expected.numpy()).max())


def use_pool_and_fork():
    """Use torch's pool and ours on this thread, and fork: neither hangs where the other would."""
    torch.set_num_threads(4)
    fastattn.set_num_threads(4)
    query = big().requires_grad_()

    def attends():
        out = ft.scaled_dot_product_attention(query, query, query)
        return np.array_equal(out.detach().numpy(), expected.numpy())  # torch's operators hang

    def gradients_are_there():
        out = ft.scaled_dot_product_attention(query, query.detach(), query.detach())
        return np.isfinite(torch.autograd.grad(out, query, grad_out)[0].numpy()).all()

    expected = ft.scaled_dot_product_attention(query, query, query).detach()
    grad_out = torch.ones_like(expected)
    query.detach().sqrt()
    numpy = query.detach().numpy()
    report = {
        "fork": in_fork(attends),
        "twice": in_fork(lambda: attends() and attends() and in_fork(attends) == "ok"),
        "gradients": in_fork(gradients_are_there),
        "torch": in_fork(lambda: query.detach().sqrt() is not None),
        "numpy": in_fork(
            lambda: np.array_equal(fastattn.attention(numpy, numpy, numpy), expected.numpy())
        ),
    }
    loader = torch.utils.data.DataLoader(
        Dataset(query.detach(), expected), num_workers=2, multiprocessing_context="fork"
    )
    assert report.pop("torch") == "hang"  # or the rest shows nothing
    report["DataLoader"] = "ok" if sum(float(x) for x in loader) == 0 else "wrong"
    report["parent"] = "ok" if attends() else "wrong"
    return report


@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("imports", [("torch", "fastattn"), ("fastattn", "torch")], ids=str)
def test_forks(imports):
    report = run(use_pool_and_fork, imports=imports, timeout=120)
    assert set(report.values()) == {"ok"}, report


def fork_in_a_handler():
    """Fork in a signal handler during a call that runs in the calling thread's pool."""
    fastattn.set_num_threads(2)
    query = big(8, 4096)
    expected = ft.scaled_dot_product_attention(query, query, query)
    children = []

    def fork(*_):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(20)

    signal.signal(signal.SIGUSR1, fork)
    sender = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    sender.start()
    right = False
    while not children:
        out = ft.scaled_dot_product_attention(query, query, query)
        right = np.array_equal(out.numpy(), expected.numpy())  # torch's operators hang
    if children[0] == 0:
        os._exit(0 if right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    return [right, status]


@pytest.mark.promise("fork-never-hangs")
def test_fork_in_a_signal_handler():
    assert run(fork_in_a_handler) == [True, 0]


def wait_for_interrupt():
    """Start a call of minutes in this thread's pool; say when, and when it was interrupted."""
    query = rand(1, 1, 1024, 64, dtype=torch.float32).expand(1, 4096, -1, -1)
    key = rand(1, 1, 32768, 64, dtype=torch.float32).expand(1, 4096, -1, -1)
    print("ready", flush=True)
    try:
        ft.scaled_dot_product_attention(query, key, key[..., :1])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    small = big()
    assert ft.scaled_dot_product_attention(small, small, small).isfinite().all()


@pytest.mark.promise("interrupt-within-a-second")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupt(threads):
    with start(wait_for_interrupt, env={"FASTATTN_NUM_THREADS": threads}) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 1
        assert process.wait() == 0
        watchdog.cancel()


def count_pools():
    """Return the threads that torch's operators add, and those that ours adds to these."""

    def tasks():
        return len(list(Path("/proc/self/task").iterdir()))

    torch.set_num_threads(3)
    before = tasks()
    query = big()
    query.sqrt()
    torch_has = tasks() - before
    for _ in range(3):
        ft.scaled_dot_product_attention(query, query, query)
    both_have = tasks() - before
    fastattn.attention(*[query.numpy()] * 3)
    with Path("/proc/self/maps").open() as maps:
        runtimes = {line.split()[-1] for line in maps if re.search(r"lib[gi]?omp|gomp", line)}
    return [torch_has, both_have, tasks() - before > both_have, len(runtimes)]


@pytest.mark.promise("torchs-pool-is-shared", "one-openmp-runtime")
@pytest.mark.parametrize("imports", [("torch", "fastattn"), ("fastattn", "torch")], ids=str)
def test_torchs_pool_is_ours(imports):
    env = {"OMP_NUM_THREADS": "3"}
    assert run(count_pools, imports=imports, env=env) == [2, 2, True, 1]


def attend_in_threads():
    """Call and differentiate from many threads at once."""
    fastattn.set_num_threads(4)
    query = big(4, 384).requires_grad_()
    out = ft.scaled_dot_product_attention(query, query, query)
    (expected,) = torch.autograd.grad(out.sum(), query)
    wrong = []

    def keep_attending():
        for _ in range(5):
            mine = ft.scaled_dot_product_attention(query, query, query)
            (grad,) = torch.autograd.grad(mine.sum(), query)
            if not (torch.equal(mine, out) and torch.equal(grad, expected)):
                wrong.append(1)

    threads = [threading.Thread(target=keep_attending) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.mark.promise("concurrent-callers-share-one-team")
def test_threads():
    assert run(attend_in_threads) == 0


@pytest.mark.promise("bitwise-threads")
def test_thread_counts_change_no_bit(threads):
    query = big(4, 300)
    mask = rand(300, 300) > -0.5
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(ft.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    assert all(torch.equal(result, results[0]) for result in results)


# Errors.

PLAIN = rand(2, 3, 5, 4, dtype=torch.float32)
ERRORS = [
    (
        lambda x: (x.to("meta"), x, x),
        {},
        "query must hold numbers, got a tensor on the device meta",
    ),
    (
        lambda x: (x, x.to_sparse(), x),
        {},
        "key must be a dense tensor, got one of layout torch.sparse_coo",
    ),
    (lambda x: (x, x, x.double()), {}, "value must have the dtype of query, float32, not float64"),
    (lambda x: (x.bfloat16(), x, x), {}, "key must have the dtype of query, bfloat16, not float32"),
    (lambda x: (x.int(), x.int(), x.int()), {}, "query must be an array of float16, .* not int32"),
    (lambda x: (x.numpy(), x, x), {}, "query must be a tensor, not ndarray"),
    (
        lambda x: (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), x, x),
        {},
        "query must not be quantised, got a tensor of torch.qint8",
    ),
    (
        lambda x: (*[torch.nested.nested_tensor([x[0], x[1]])] * 3,),
        {},
        "query must be a dense tensor, not a nested one",
    ),
    (
        lambda x: (x.to(torch.float8_e4m3fn), x, x),
        {},
        "query must be a tensor that NumPy can read, got torch.float8",
    ),
    (lambda x: (x, x[..., :3], x), {}, "key has head_dim 3 but query has head_dim 4"),
    (lambda x: (x, x[:, :2], x), {}, "must have equally many heads unless enable_gqa=True"),
    (
        lambda x: (x, x, x),
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool, device="meta")},
        "attn_mask must hold numbers, got a tensor on the device meta",
    ),
    (
        lambda x: (x, x, x),
        {"attn_mask": torch.ones(5, 4, dtype=torch.bool)},
        r"attn_mask must broadcast to .* got attn_mask.shape=\(5, 4\)",
    ),
    (
        lambda x: (x, x, x),
        {"attn_mask": torch.ones(5, 5, dtype=torch.int32)},
        "attn_mask must be an array of bool, .* not int32",
    ),
    (
        lambda x: (x, x, x),
        {"attn_mask": torch.ones(5, 5), "is_causal": True},
        "attn_mask must not be given together with is_causal=True",
    ),
    (lambda x: (x, x, x), {"dropout_p": 1.5}, r"dropout_p must be within 0..1"),
    (lambda x: (x, x, x), {"scale": float("nan")}, "scale must be finite, got scale=nan"),
]


@pytest.mark.promise("error-says-which-rule-and-what")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tensors", "options", "message"), ERRORS)
@pytest.mark.parametrize("grad", [False, True])
def test_errors(tensors, options, message, grad):
    given = tensors(PLAIN)
    if grad and given[0] is PLAIN:
        given = (PLAIN.clone().requires_grad_(), *given[1:])
    with pytest.raises((TypeError, ValueError), match=message):
        ft.scaled_dot_product_attention(*given, **options)


def test_errors_of_attention():
    q, k, v = operands()
    with pytest.raises(ValueError, match="out must not be given where an argument requires grad"):
        ft.attention(q.clone().requires_grad_(), k, v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out must be a tensor of the result's dtype and shape"):
        ft.attention(q, k, v, out=torch.empty(3))
    with pytest.raises(ValueError, match="alibi_slopes must not require grad"):
        ft.attention(q, k, v, alibi_slopes=rand(4, grad=True), query_offset=0)
    with pytest.raises(TypeError, match="mask must be a tensor, not list"):
        ft.attention(q, k, v, mask=[[True]])
    with pytest.raises(TypeError, match="kv_lengths must hold numbers"):
        ft.attention(q, k, v, kv_lengths=torch.tensor([1, 2], device="meta"))


@pytest.mark.promise("nothing-is-detached-silently")
def test_a_tensor_that_requires_grad_is_not_silently_detached():
    x = PLAIN.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"query requires grad"):
        fastattn.attention(x, PLAIN, PLAIN)


# The page.


def test_the_page_is_right():
    page = Path(__file__).parents[1] / "docs" / "torch.md"
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted >= 12
    assert not results.failed
