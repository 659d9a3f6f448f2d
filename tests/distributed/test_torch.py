# SPDX-License-Identifier: Apache-2.0
"""Tensors over ranks: gradients by autograd, and models under context_parallel."""

import runpy

import numpy as np
import pytest

import fastattn.distributed as fd
from fastattn.distributed._comm import engine_of
from tests.distributed.cases import SINKS, Case
from tests.distributed.launch import ROOT, values
from tests.distributed.threads import Threads, World

pytest.importorskip("torch", exc_type=ImportError)
TOTAL = 101


def test_gradients(torch):
    import fastattn.torch.distributed as over_ranks

    case = Case({"is_causal": True, "sinks": SINKS}, TOTAL)
    *_, dq, dk, dv, dsinks = case.one_process()
    layout = fd.zigzag(TOTAL, 3)

    def rank(comm):
        operands = [
            torch.from_numpy(layout.take(x, comm.rank)).requires_grad_()
            for x in (case.query, case.key, case.value)
        ]
        sinks = torch.from_numpy(SINKS.copy()).requires_grad_()
        how = {"is_causal": True, "sinks": sinks, "return_lse": True}
        out, lse = over_ranks.attention(*operands, group=comm, layout=layout, **how)
        grads = (layout.take(case.grad_out, comm.rank), layout.take(case.grad_lse, comm.rank, -1))
        torch.autograd.backward((out, lse), tuple(map(torch.from_numpy, grads)))
        return [x.grad.numpy() for x in (*operands, sinks)]

    parts = World(3).run(rank)
    for i, expected in enumerate((dq, dk, dv)):
        found = layout.join([part[i] for part in parts])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(sum(part[3] for part in parts), dsinks, rtol=0, atol=2e-4)


def test_gradcheck(torch):
    """By differences, of each rank in turn: the others stand still."""
    import fastattn.torch.distributed as over_ranks

    layout = fd.zigzag(10, 2)
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, 10, 3, dtype=torch.float64, generator=generator) for _ in range(3)]
    weights = torch.randn(2, 10, 3, dtype=torch.float64, generator=generator)

    def loss(change):
        def rank(comm):
            rows = torch.from_numpy(layout.positions(comm.rank))
            operands = [
                (x + y)[:, rows].requires_grad_() for x, y in zip(wholes, change, strict=True)
            ]
            out = over_ranks.attention(*operands, group=comm, layout=layout, is_causal=True)
            (out * weights[:, rows]).sum().backward()
            return (out * weights[:, rows]).sum().item(), [x.grad for x in operands]

        found = World(2).run(rank)
        return sum(x for x, _ in found), [grads for _, grads in found]

    _, grads = loss([torch.zeros_like(x) for x in wholes])
    for i in range(3):
        whole = layout.join([grads[rank][i].numpy() for rank in range(2)])
        step = torch.randn(2, 10, 3, dtype=torch.float64, generator=generator)
        ends = []
        for sign in (1e-6, -1e-6):
            change = [torch.zeros_like(x) for x in wholes]
            change[i] = sign * step
            ends.append(loss(change)[0])
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / 2e-6, (whole * step.numpy()).sum(), rtol=1e-6
        )


def test_bfloat16(torch):
    import fastattn.torch.distributed as over_ranks

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 16, generator=generator).bfloat16()
    layout = fd.contiguous(64, 2)

    def rank(comm):
        own = x[:, :, layout.positions(comm.rank)].requires_grad_()
        out = over_ranks.attention(own, own, own, group=comm, layout=layout, is_causal=True)
        out.sum().backward()
        assert own.grad.dtype == torch.bfloat16
        return out.detach().float().numpy()

    expected = torch.nn.functional.scaled_dot_product_attention(*[x.float()] * 3, is_causal=True)
    found = layout.join(World(2).run(rank))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=0.02)


def test_errors(torch):
    import fastattn.torch.distributed as over_ranks

    layout = fd.contiguous(4, 1)
    x = torch.ones(1, 4, 2)

    def raised(kind, *given, **named):
        with pytest.raises(kind, match="must") as error:
            World(1).run(
                lambda comm: over_ranks.attention(*given, group=comm, layout=layout, **named)
            )
        return str(error.value)

    bias = torch.zeros(4, 4, requires_grad=True)
    assert raised(NotImplementedError, x, x, x, bias=bias) == (
        "bias must not require grad over ranks: pass bias.detach()"
    )
    assert raised(TypeError, x, x.numpy(), x) == "key must be a tensor, not ndarray"
    assert raised(TypeError, x.to("meta"), x, x) == (
        "query must hold numbers, got a tensor on the device meta"
    )


def attended(comm):
    """Return how far torch's function under context_parallel is from itself on one rank."""
    import torch
    from torch.nn import functional

    import fastattn.torch

    rank, size = engine_of(comm).rank, engine_of(comm).size
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, TOTAL, 3, 4, 16, generator=generator)
    mask = torch.rand(TOTAL, TOTAL, generator=generator) < 0.8
    layout, errors = fd.zigzag(TOTAL, size), []
    own = torch.from_numpy(layout.positions(rank))
    torchs_own = functional.scaled_dot_product_attention
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.5}):
        whole = packed.clone().requires_grad_()
        out = torchs_own(*whole.permute(2, 0, 3, 1, 4), **options)
        (out**2).sum().backward()
        x, rows = packed.clone(), torch.arange(TOTAL)
        with fastattn.torch.context_parallel(comm, buffers=[x, rows], buffer_seq_dims=[1, 0]):
            assert torch.equal(rows, own)
            leaf = x.detach().requires_grad_()
            if "attn_mask" in options:
                options = {"attn_mask": mask[rows]}
            found = functional.scaled_dot_product_attention(*leaf.permute(2, 0, 3, 1, 4), **options)
            (found**2).sum().backward()
        assert functional.scaled_dot_product_attention is torchs_own
        assert torch.equal(x, packed)
        errors.append((found - out[:, :, own]).abs().max().item())
        errors.append((leaf.grad - whole.grad[:, own]).abs().max().item())
    return max(errors)


def test_context_parallel(torch, tmp_path):
    assert max(World(1).run(attended)) < 1e-4
    assert max(values("gloo", 3, attended, folder=tmp_path)) < 1e-4


def dropped(comm):
    """Return this rank's rows under dropout, and what one process gives for the first seed."""
    import torch
    from torch.nn import functional

    import fastattn.torch

    rank, size = engine_of(comm).rank, engine_of(comm).size
    x = torch.randn(1, 2, TOTAL, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(rank)  # ranks draw other numbers
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)))
    whole = fastattn.attention(x, x, x, dropout_p=0.4, seed=seed, is_causal=True)
    own = x.clone()
    with fastattn.torch.context_parallel(comm, buffers=[own], buffer_seq_dims=[2]):
        out = functional.scaled_dot_product_attention(own, own, own, dropout_p=0.4, is_causal=True)
    positions = fd.zigzag(TOTAL, size).positions(rank)
    return (out - whole[:, :, positions]).abs().max().item()


def test_dropout(torch, tmp_path):
    """All ranks take the seed that the first one draws."""
    assert max(values("gloo", 2, dropped, folder=tmp_path)) < 1e-5


def test_buffers(torch):
    """Views of one tensor are cut each for itself; some stay cut; an error restores them too."""
    import fastattn.torch

    data = torch.arange(9)
    tokens, targets = data[:-1], data[1:]
    comm = World(2)

    def rank(engine):
        own = [data[:-1].clone(), targets.clone()]
        seen = []

        def fail():
            with fastattn.torch.context_parallel(
                engine, buffers=own, buffer_seq_dims=[0, 0], no_restore_buffers={own[1]}
            ):
                seen.extend(own[0].tolist())
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert seen == fd.zigzag(8, 2).positions(engine.rank).tolist()
        assert own[0].tolist() == tokens.tolist()
        return own[1].tolist()

    assert rank(Threads(comm, 0)) == [1, 2, 7, 8]
    with fastattn.torch.context_parallel(
        Threads(comm, 1), buffers=[tokens, targets], buffer_seq_dims=[0, -1]
    ):
        assert tokens.tolist() == [2, 3, 4, 5]
        assert targets.tolist() == [3, 4, 5, 6]
    assert data.tolist() == list(range(9))


def test_errors_of_context_parallel(torch):
    import fastattn.torch

    comm, x = Threads(World(2), 0), torch.zeros(4, 4)

    def raised(kind, **given):
        with (
            pytest.raises(kind) as error,
            fastattn.torch.context_parallel(comm, **given),
        ):
            pass
        return str(error.value)

    assert raised(ValueError, buffers=[x]) == (
        "buffer_seq_dims must have an axis for each of buffers, got 0 for 1"
    )
    assert raised(TypeError, buffers=[3], buffer_seq_dims=[0]) == (
        "buffers[0] must be a tensor, not int"
    )
    assert raised(TypeError, buffers=[torch.nn.Parameter(x)], buffer_seq_dims=[0]) == (
        "buffers[0] must be no parameter of a model"
    )
    assert raised(ValueError, buffers=[x], buffer_seq_dims=[2]) == (
        "buffer_seq_dims[0] must be an axis of buffers[0], got 2 for shape (4, 4)"
    )
    assert raised(ValueError, buffers=[x], buffer_seq_dims=[0], no_restore_buffers={x + 1}) == (
        "no_restore_buffers must be among buffers"
    )
    with (
        pytest.raises(ValueError, match="rows") as error,
        fastattn.torch.context_parallel(comm, buffers=[x], buffer_seq_dims=[0]),
    ):
        torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 3, 4)] * 3)
    assert str(error.value) == (
        "query must have as many rows as this rank has of one of the buffers, 2, got "
        "query.shape=(1, 3, 4)"
    )


def trained(comm):
    """Return the losses of the example."""
    train = runpy.run_path(str(ROOT / "examples" / "train_over_ranks.py"))["train"]
    return train(length=256, steps=4)


def test_a_model_that_is_trained_over_ranks(torch, tmp_path):
    """FSDP2 and context_parallel together: the losses are those of one process."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        found += values("gloo", ranks, trained, folder=folder, timeout=100)
    assert found[0][-1] < found[0][0] - 0.5
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=0, atol=1e-5)
