# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings turn what flash-attn's turn, by as much."""
# ruff: noqa: E501 - the tables have a line per case

import re

import pytest
import torch

from fastattn.flash_attn import _rotary as rotary
from tests.flash_attn.problems import close, gradients_agree, tensors, turned

ANGLES = tensors((20, 3), seed=5)[0]
OFFSETS = {"none": 0, "int": 4, "each": torch.tensor([7, 0], dtype=torch.int32)}
BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def positions(length, offset):
    steps = torch.arange(length)
    return steps + (offset[:, None].long() if isinstance(offset, torch.Tensor) else offset)


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved, offset, inplace):
    x = tensors((2, 9, 4, 8))[0].requires_grad_()
    expected = turned(x, ANGLES[positions(9, OFFSETS[offset])], interleaved)
    given = x * 1.0
    out = rotary.apply_rotary_emb(
        given, ANGLES.cos(), ANGLES.sin(), interleaved, inplace, OFFSETS[offset]
    )
    gradients_agree(out, expected, [x])
    close(given.detach(), (expected if inplace else x).detach())
    back = rotary.apply_rotary(
        out, ANGLES.cos(), ANGLES.sin(), OFFSETS[offset], interleaved=interleaved, conjugate=True
    )
    close(back, x)


@BOTH
@pytest.mark.parametrize("offset", [0, torch.tensor([3, 0, 9, 1])])
def test_rotary_of_packed_sequences(interleaved, offset):
    starts = torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)
    x = tensors((11, 4, 8))[0].requires_grad_()
    places = torch.cat([torch.arange(n) for n in starts.diff()])
    if isinstance(offset, torch.Tensor):
        places = places + offset.repeat_interleave(starts.diff())
    expected = turned(x, ANGLES[places], interleaved)
    out = rotary.apply_rotary_emb(
        x, ANGLES.cos(), ANGLES.sin(), interleaved, False, offset, starts, 5
    )
    gradients_agree(out, expected, [x])


def test_rotary_in_place_where_torch_has_no_way():
    """The gradient flows through what is returned; torch refuses what is no longer right."""
    cos, sin = ANGLES.cos(), ANGLES.sin()
    leaf = tensors((2, 9, 4, 8))[0].requires_grad_()
    expected = turned(leaf, ANGLES[:9], False)
    grad = torch.autograd.grad(expected.sin().sum(), leaf)[0]
    values = expected.detach().clone()
    saved = torch.exp(leaf * 1.0)
    saved_out = rotary.apply_rotary_emb(saved, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(saved_out.sum(), leaf)  # exp needs its result
    out = rotary.apply_rotary_emb(leaf, cos, sin, inplace=True)
    for x in (out, leaf):
        close(x.detach(), values)
    close(torch.autograd.grad(out.sin().sum(), leaf)[0], grad)

    whole = tensors((2, 2, 9, 4, 8))[0].requires_grad_()
    first, second = (whole * 1.0).unbind(0)
    expected = turned(whole[0], ANGLES[:9], False)
    out = rotary.apply_rotary_emb(first, cos, sin, inplace=True)
    gradients_agree(out, expected, [whole])
    for x in (first, second):
        with pytest.raises(RuntimeError, match="replace the inplace operation"):
            x.sum()


@BOTH
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_of_qkv(interleaved, grouped, scaled):
    qkv = tensors((2, 9, 8, 6) if grouped else (2, 9, 3, 4, 6))[0].requires_grad_()
    q, k, v = qkv.split((4, 2, 2), dim=2) if grouped else qkv.unbind(2)
    scale = 1.5 if scaled else 1.0
    q, k = (turned(x, ANGLES[:9], interleaved) for x in (q, k))
    expected = (torch.cat if grouped else torch.stack)((q * scale, k / scale, v), dim=2)
    cos, sin = ANGLES.cos(), ANGLES.sin()
    keys = (cos / scale, sin / scale) if scaled else (None, None)
    given = qkv * 1.0
    out = rotary.apply_rotary_emb_qkv_(
        given, cos * scale, sin * scale, *keys, interleaved, num_heads_q=4 if grouped else None
    )
    gradients_agree(out, expected, [qkv])
    close(given.detach(), expected.detach())


def test_rotary_of_kv():
    kv = tensors((2, 9, 2, 4, 8))[0].requires_grad_()
    expected = torch.stack((turned(kv[:, :, 0], ANGLES[2:11], False), kv[:, :, 1]), dim=2)
    given = kv * 1.0
    out = rotary.apply_rotary_emb_kv_(given, ANGLES.cos(), ANGLES.sin(), seqlen_offsets=2)
    gradients_agree(out, expected, [kv])
    close(given.detach(), expected.detach())


@BOTH
def test_rotary_by_torch(interleaved):
    x = tensors((2, 20, 4, 8))[0].requires_grad_()
    out = rotary.apply_rotary_emb_torch(x, ANGLES.cos(), ANGLES.sin(), interleaved)
    gradients_agree(out, turned(x, ANGLES, interleaved), [x])
    angles = torch.stack((ANGLES, 2 * ANGLES))
    out = rotary.apply_rotary_emb_torch(x, angles.cos(), angles.sin(), interleaved)
    gradients_agree(out, turned(x, angles, interleaved), [x])


@BOTH
@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_rotary_embedding(interleaved, scale_base):
    module = rotary.RotaryEmbedding(6, 100.0, interleaved, scale_base).double()
    angles = torch.arange(12.0)[:, None] * 100.0 ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)
    scale = torch.ones(12, 3)
    if scale_base is not None:
        base = (torch.tensor([0.0, 2.0, 4.0]) + 0.4 * 6) / (1.4 * 6)
        scale = base ** ((torch.arange(12.0)[:, None] - 6) / scale_base)
    angles, scale = angles[3:].double(), scale[3:, None].double()
    scale = scale.repeat_interleave(2, -1) if interleaved else torch.cat((scale, scale), -1)
    q, kv = tensors((2, 9, 4, 6), (2, 9, 2, 4, 6))
    turned_q = turned(q, angles, interleaved) * scale
    turned_k = turned(kv[:, :, 0], angles, interleaved) / scale
    qkv = torch.cat((q[:, :, None], kv), dim=2)
    out = module(qkv, seqlen_offset=3)
    rest = module(q.clone(), kv.clone(), seqlen_offset=torch.tensor([3, 3]), max_seqlen=12)
    for actual, expected in (
        (out, torch.stack((turned_q, turned_k, kv[:, :, 1]), dim=2)),
        (rest[0], turned_q),
        (rest[1], torch.stack((turned_k, kv[:, :, 1]), dim=2)),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert out is qkv
    assert not module.state_dict()
    module(q.clone(), kv.clone())  # shorter: the table stays
    assert module._seq_len_cached == 12


def test_rotary_in_half_precision_is_rounded_once():
    x = tensors((1, 9, 2, 8), dtype=torch.bfloat16)[0]
    exact = turned(x.double(), ANGLES[:9], False)
    cos, sin = (y.float() for y in (ANGLES.cos(), ANGLES.sin()))
    out = rotary.apply_rotary_emb(x, cos, sin)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


ROTARY_ERRORS = {
    "rows": ({"seqlen_offsets": 12}, "must have a row for each position, got 20 rows and position"),
    "negative": ({"seqlen_offsets": -1}, "got 20 rows and position -1"),
    "each": ({"seqlen_offsets": torch.tensor([0, 12])}, "must have a row for each position, got 20 rows and position 20"),
    "offsets": ({"seqlen_offsets": torch.ones(2)}, "seqlen_offsets must be integers of shape (2,)"),
    "axes": ({"cu_seqlens": torch.tensor([0, 9])}, "x must have shape (total, heads, head_dim)"),
    "wide": ({"cos": torch.ones(20, 5), "sin": torch.ones(20, 5)}, "cos and sin must be equally large, with at most head_dim / 2 columns, got cos.shape="),
    "table": ({"cos": torch.ones(20)}, "cos must have shape (positions, rotary_dim / 2), got"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTARY_ERRORS)
def test_rotary_errors(case):
    changes, message = ROTARY_ERRORS[case]
    given = {"x": torch.ones(2, 9, 4, 8), "cos": torch.ones(20, 3), "sin": torch.ones(20, 3)}
    with pytest.raises(ValueError, match=re.escape(message)):
        rotary.apply_rotary(**given | changes, inplace=True)


def test_other_rotary_errors():
    table = torch.ones(20, 3)
    with pytest.raises(ValueError, match=r"^cu_seqlens must ascend from 0 to 9, the rows of x"):
        rotary.apply_rotary(torch.ones(9, 4, 8), table, table, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"^num_heads_q must leave as many heads for keys as"):
        rotary.apply_rotary_emb_qkv_(torch.ones(2, 9, 8, 8), table, table, num_heads_q=3)
    with pytest.raises(ValueError, match=r"^qkv must have shape"):
        rotary.apply_rotary_emb_qkv_(torch.ones(2, 9, 8), table, table)
    with pytest.raises(ValueError, match=r"^kv must have shape"):
        rotary.apply_rotary_emb_kv_(torch.ones(2, 9, 3, 4, 8), table, table)
    with pytest.raises(ValueError, match=r"^max_seqlen must be given where seqlen_offset is a"):
        rotary.RotaryEmbedding(6)(torch.ones(1, 2, 3, 4, 8), seqlen_offset=torch.tensor([0]))
