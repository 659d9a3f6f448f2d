# SPDX-License-Identifier: Apache-2.0
"""Gradients are torch's, and derivatives that are missing are errors."""

import pytest
import torch

import fastattn
import fastattn.torch as ft
from tests.torch.problems import DTYPES, EXACT, close, operands, rand


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
