# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export, and what torch asks of an operator."""

import pytest
import torch

import fastattn.torch as ft
from tests.torch.problems import STARTS, close, operands, packed, rand


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


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
def test_out_compiled(fresh_compiler):
    q, k, v = operands()
    out = torch.empty_like(q)
    compiled = torch.compile(
        lambda out: ft.attention(q, k, v, out=out), fullgraph=True, backend="aot_eager"
    )
    assert compiled(out) is out
    assert torch.equal(out, ft.attention(q, k, v))


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
    options = (*[None] * 7, *STARTS, 0.3, False, False, None, None, 2.0, 0.0, None, 0, 0)
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
    plain = (None, False, False, None, None, None, 0.0, None, 0, 0)
    torch.library.opcheck(torch.ops.fastattn.attention.default, (*leaves, *[None] * 9, *plain))
    bias, sinks = rand(4, 5, 7, grad=grad), rand(4, grad=grad, seed=9)
    some = (None, bias, sinks, None, torch.tensor(2), torch.tensor([7, 5]), *[None] * 3)
    numbers = (0.3, True, True, 3, None, 2.0, 0.0, torch.tensor(1), 2, 3)
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
