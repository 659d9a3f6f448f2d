# SPDX-License-Identifier: Apache-2.0
"""What tests of fastattn.torch share: torch, tensors, and torch's own function."""

import functools

import torch

import fastattn
import fastattn.torch as ft

F = torch.nn.functional
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = F.scaled_dot_product_attention  # torch's own, whatever a test patches
DIRECT = ft.scaled_dot_product_attention


def rand(*shape, dtype=torch.float64, grad=False, seed=None):
    rng = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return torch.randn(shape, dtype=torch.float64, generator=rng).to(dtype).requires_grad_(grad)


def operands(
    q_len=5, kv_len=7, heads=4, kv_heads=None, dim=8, dtype=torch.float64, grad=False, batch=2
):
    kv = (batch, kv_heads or heads, kv_len, dim)
    shapes = ((batch, heads, q_len, dim), kv, kv)
    return [rand(*s, dtype=dtype, grad=grad, seed=i) for i, s in enumerate(shapes)]


def close(ours, theirs, dtype=None, *, tolerance=None):
    tolerance = tolerance or 8 * torch.finfo(dtype or theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


near = functools.partial(close, tolerance=1e-12)
small_operands = functools.partial(operands, heads=2, batch=1)


def by_name(*arguments, **options):
    """Call torch's function by its name, which `patch` changes."""
    return F.scaled_dot_product_attention(*arguments, **options)


def both(check, answered=1, left=None):
    """Check the direct call, and the one under patch with what its report says."""
    check(DIRECT)
    patched(check, answered, left)


def patched(check, answered=1, left=None):
    with ft.patch() as p:
        check(by_name)
    assert (p.report()["answered"], p.report()["left"]) == (answered, left or {})


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


STARTS = (torch.tensor([0, 4, 4, 15, 20]), torch.tensor([0, 9, 12, 19, 20]))


def packed(factor=1, dtype=torch.float64, grad=False):
    return [rand(20 * factor, heads, 8, dtype=dtype, grad=grad) for heads in (4, 2, 2)]


def state():
    return F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
