# SPDX-License-Identifier: Apache-2.0
"""Do the functions of flash-attn mean what flash-attn's do? Beside the plain formula in float64."""

import functools
import inspect
import itertools
import re

import pytest
import torch

import fastattn
from fastattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from tests.flash_attn.problems import (
    CASES,
    DIM,
    HEADS,
    KV_HEADS,
    SLOPES,
    close,
    in_words,
    plain,
    plain_batch,
    problem,
    tensors,
)
from tests.support.child import run
from tests.support.threads import tasks


@pytest.mark.promise("flash-attn-means-flash-attn")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [(9, 14), (14, 9), (1, 20), (12, 12)], ids=str)
def test_flash_attn_func(case, lengths):
    arrays = problem(*lengths)
    expected = plain_batch(*arrays, **in_words(CASES[case]))
    close(flash_attn_func(*arrays, **CASES[case]), torch.stack(expected[0]))
    out, lse, probs = flash_attn_func(*arrays, **CASES[case], return_attn_probs=True)
    close(out, torch.stack(expected[0]))
    close(lse, torch.stack(expected[1]))
    assert probs.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_bits_are_the_kernels(dtype):
    arrays = problem(dtype=dtype)
    out, lse, _ = flash_attn_func(*arrays, causal=True, return_attn_probs=True)
    swapped = [x.transpose(1, 2) for x in arrays]
    expected = fastattn.attention(*swapped, is_causal=True, query_offset=5, return_lse=True)
    assert out.dtype == dtype
    assert torch.equal(out.transpose(1, 2), expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.promise("flash-attn-means-flash-attn")
@pytest.mark.parametrize("case", ["nothing", "window and causal", "softcap", "slopes of each"])
def test_gradients(case):
    arrays = [x.requires_grad_() for x in problem(14, 9)]
    grad = tensors((2, 14, HEADS, DIM), seed=1)[0]
    actual = torch.autograd.grad(flash_attn_func(*arrays, **CASES[case]), arrays, grad)
    outs, _ = plain_batch(*arrays, **in_words(CASES[case]))
    for a, b in zip(actual, torch.autograd.grad(torch.stack(outs), arrays, grad), strict=True):
        close(a, b)


@pytest.mark.promise("flash-attn-means-flash-attn")
def test_packed():
    qkv = tensors((2, 11, 3, HEADS, DIM))[0].requires_grad_()
    options = {"causal": True, "window_size": (5, -1), "softmax_scale": 0.2}
    expected = flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), expected)
    actual = flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (actual, expected)]
    assert torch.equal(*grads)


# Dropout.


def kept_of(q, k, dropout_p, index):
    """Return what is kept of one sequence, 1 / (1 - dropout_p) or 0, by the generator's state."""
    seed = int(torch.randint(2**63 - 1, ()))
    kept = fastattn.dropout_mask(
        *(x.detach().transpose(0, 1) for x in (q, k)),
        dropout_p=dropout_p,
        seed=seed,
        query_offset=len(k) - len(q),
        batch_index=index,
    )
    return torch.as_tensor(kept).double() / (1 - dropout_p)


@pytest.mark.promise("dropout-repeats-with-torch", "gradients-drop-the-same-pairs")
@pytest.mark.parametrize("varlen", [False, True])
def test_dropout(varlen):
    if varlen:
        arrays = [x.requires_grad_() for x in packed_problem()]
        sequences = list(zip(*map(split, arrays, (Q_STARTS, KV_STARTS, KV_STARTS)), strict=True))
    else:
        arrays = [x.requires_grad_() for x in problem()]
        sequences = list(zip(*arrays, strict=True))
    options = {"dropout_p": 0.3, "causal": True}

    def dropped(state):
        torch.manual_seed(state)
        if varlen:
            return flash_attn_varlen_func(*arrays, Q_STARTS, KV_STARTS, 11, 9, **options)
        return flash_attn_func(*arrays, **options)

    outs = []
    for i, (q, k, v) in enumerate(sequences):
        torch.manual_seed(1)
        outs.append(plain(q, k, v, causal=True, kept=kept_of(q, k, 0.3, i))[0])
    out, expected = dropped(1), torch.cat(outs) if varlen else torch.stack(outs)
    close(out, expected)
    weights = tensors(out.shape, seed=3)[0]
    grads = [torch.autograd.grad(x, arrays, weights) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        close(a, b)
    assert torch.equal(dropped(1), out)
    assert not torch.equal(dropped(2), out)
    with pytest.raises(ValueError, match="dropout_p must be within"):
        flash_attn_func(*problem(), dropout_p=-0.1)


# Packed sequences.


Q_STARTS = torch.tensor([0, 4, 4, 15, 20], dtype=torch.int32)
KV_STARTS = torch.tensor([0, 9, 12, 19, 20], dtype=torch.int32)


def packed_problem(dtype=torch.float64):
    return tensors((20, HEADS, DIM), (20, KV_HEADS, DIM), (20, KV_HEADS, DIM), dtype=dtype)


def split(x, starts):
    return x.split(starts.diff().tolist())


VARLEN = {k: x for k, x in CASES.items() if k != "slopes of each"} | {
    "slopes of each": {"alibi_slopes": torch.stack([SLOPES * i for i in range(4)])}
}


@pytest.mark.promise("flash-attn-means-flash-attn")
@pytest.mark.parametrize("case", VARLEN)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_varlen(case, grad):
    q, k, v = (x.requires_grad_(grad) for x in packed_problem())
    out, lse, probs = flash_attn_varlen_func(
        q, k, v, Q_STARTS, KV_STARTS, 11, 9, **VARLEN[case], return_attn_probs=True
    )
    sequences = (split(q, Q_STARTS), split(k, KV_STARTS), split(v, KV_STARTS))
    outs, lses = plain_batch(*sequences, **in_words(VARLEN[case]))
    close(out, torch.cat(outs))
    close(lse, torch.cat(lses, dim=1))
    assert probs.numel() == 0
    if grad:
        weights = tensors(out.shape, seed=3)[0]
        actual = torch.autograd.grad(out, (q, k, v), weights)
        for a, b in zip(
            actual, torch.autograd.grad(torch.cat(outs), (q, k, v), weights), strict=True
        ):
            close(a, b)


def test_softmax_lse_has_a_gradient():
    arrays = [x.requires_grad_() for x in packed_problem()]
    given = (*arrays, Q_STARTS, KV_STARTS, 11, 9)
    actual = flash_attn_varlen_func(*given, return_attn_probs=True)[1]
    sequences = map(split, arrays, (Q_STARTS, KV_STARTS, KV_STARTS))
    expected = torch.cat(plain_batch(*sequences)[1], dim=1)
    grads = [torch.autograd.grad(x.sin().sum(), arrays[:2]) for x in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.promise("rows-of-no-sequence-are-zero")
@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_no_sequence(grad):
    q, k, v = (x.requires_grad_(grad) for x in packed_problem())
    starts = torch.tensor([2, 7, 15])
    out, lse, _ = flash_attn_varlen_func(q, k, v, starts, starts, 8, 8, return_attn_probs=True)
    rows = [0, 1, *range(15, 20)]
    assert not out[rows].any()
    assert (lse[:, rows] == -torch.inf).all()
    close(out[2:7], flash_attn_func(*(x[None, 2:7] for x in (q, k, v)))[0])


def test_varlen_packed():
    qkv = tensors((20, 3, HEADS, DIM))[0]
    expected = flash_attn_varlen_func(*qkv.unbind(1), Q_STARTS, Q_STARTS, 11, 11, causal=True)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, Q_STARTS, 11, causal=True), expected)
    actual = flash_attn_varlen_kvpacked_func(
        qkv[:, 0], qkv[:, 1:], Q_STARTS, Q_STARTS, 11, 11, causal=True
    )
    assert torch.equal(actual, expected)


def test_varlen_of_pages():
    q, k, v = packed_problem()
    table = torch.tensor([[5, 0, 3], [1, -1, -1], [4, 2, -1], [6, -1, -1]], dtype=torch.int32)
    pages = [torch.full((7, 4, KV_HEADS, DIM), torch.nan, dtype=q.dtype) for _ in range(2)]
    for i, (begin, end) in enumerate(itertools.pairwise(KV_STARTS)):
        for j in range(end - begin):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[i, j // 4], j % 4] = x[begin + j]
    expected = flash_attn_varlen_func(q, k, v, Q_STARTS, KV_STARTS, 11, 9, causal=True)
    given = (q, *pages, Q_STARTS, KV_STARTS, 11, 9)
    assert torch.equal(flash_attn_varlen_func(*given, causal=True, block_table=table), expected)
    table[0, 2] = 7
    with pytest.raises(ValueError, match=r"^block_table must be within 0..6, the pages of k, got"):
        flash_attn_varlen_func(*given, block_table=table)


@pytest.mark.filterwarnings("ignore")
def test_compile():
    def both(q, k, v, starts):
        rows = (x.flatten(0, 1) for x in (q, k, v))
        packed = flash_attn_varlen_func(*rows, starts, starts, 9, 9, causal=True)
        return flash_attn_func(q, k, v, window_size=(3, -1)).flatten(0, 1) + packed

    arrays = [x.requires_grad_() for x in problem(9, 9)]
    starts = torch.tensor([0, 9, 18], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for call in (both, compiled):
        out = call(*arrays, starts)
        results.append((out, *torch.autograd.grad(out.sin().sum(), arrays)))
    for a, b in zip(*results, strict=True):
        close(a, b)
    torch._dynamo.reset()


# Padding.


def test_errors():
    q, k, v = problem()
    with pytest.raises(TypeError, match=r"^k must be a tensor, not ndarray$"):
        flash_attn_func(q, k.numpy(), v)
    with pytest.raises(ValueError, match=r"^kv must have 2 entries along axis 2, got kv.shape="):
        flash_attn_kvpacked_func(q, torch.ones(2, 14, 3, KV_HEADS, DIM))
    with pytest.raises(
        ValueError, match=r"^qkv must have shape \(total, 3, heads, head_dim\), got"
    ):
        flash_attn_varlen_qkvpacked_func(q[0], Q_STARTS, 11)
    q, k, v = packed_problem()
    with pytest.raises(ValueError, match=r"^cu_seqlens_q and cu_seqlens_k must be equally long"):
        flash_attn_varlen_func(q, k, v, Q_STARTS, KV_STARTS[:-1], 11, 9)
    bad = torch.tensor([0, 9, 4])
    for x in (q, q.clone().requires_grad_()):
        with pytest.raises(ValueError, match="cu_seqlens_q must ascend"):
            flash_attn_varlen_func(x, k, v, bad, KV_STARTS[:3], 11, 9)


OFF = [{"softcap": None}, {"window_size": None}, {"window_size": [None, -1]}]
WRONG = {
    "softcap must be a number, not str": {"softcap": "30"},
    "softcap must be finite, got softcap=nan": {"softcap": float("nan")},
    "window_size must be a pair (left, right), not -1": {"window_size": -1},
    "window_size must be a pair of integers, not (2.0, 0.5)": {"window_size": (2.0, 0.5)},
}


@pytest.mark.promise("flash-attn-means-flash-attn")
def test_what_is_off_and_what_is_wrong_in_every_function():
    q, k, v = (x.detach().float() for x in packed_problem())
    kv, rows = torch.stack([k, v], 1), [x[None] for x in (q, k, v)]
    qkv = torch.stack([k, k, v], 1)
    starts = Q_STARTS, KV_STARTS
    calls = [
        functools.partial(flash_attn_func, *rows),
        functools.partial(flash_attn_kvpacked_func, rows[0], kv[None]),
        functools.partial(flash_attn_qkvpacked_func, qkv[None]),
        functools.partial(flash_attn_varlen_func, q, k, v, *starts, 11, 9),
        functools.partial(flash_attn_varlen_kvpacked_func, q, kv, *starts, 11, 9),
        functools.partial(flash_attn_varlen_qkvpacked_func, qkv, KV_STARTS, 9),
        functools.partial(flash_attn_with_kvcache, *rows),
    ]
    assert {call.func.__name__ for call in calls} == set(SIGNATURES) | {"flash_attn_with_kvcache"}
    for call in calls:
        expected = call()
        for options in OFF:
            assert torch.equal(call(**options), expected)
        for message, options in WRONG.items():
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
                call(**options)


def count_threads():
    """Return the threads that torch's operators add, and those that ours add to these."""
    torch.set_num_threads(2)
    before = tasks()
    q, k, v = (torch.randn(2, 512, 8, 64).requires_grad_() for _ in range(3))
    q.sqrt()
    torch_has = tasks() - before
    flash_attn_func(q, k, v, dropout_p=0.1).sum().backward()
    starts = torch.tensor([0, 300, 1024])
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    flash_attn_varlen_func(*rows, starts, starts, 724, 724).sum().backward()
    with torch.no_grad():
        flash_attn_varlen_func(*rows, starts, starts, 724, 724)
        flash_attn_with_kvcache(q, k, v)
        flash_attn_with_kvcache(q, k, v, cache_batch_idx=torch.tensor([1, 0]))
        pages = [x.reshape(8, 128, 8, 64) for x in (k, v)]
        flash_attn_with_kvcache(q, *pages, block_table=torch.arange(8).reshape(2, 4))
    ours = tasks() - before - torch_has
    fastattn.attention(*(x.detach().numpy() for x in (q, k, v)))
    return [torch_has, ours, tasks() - before - torch_has > ours]


@pytest.mark.promise("torchs-pool-is-shared")
def test_torchs_pool_is_ours():
    # Its threads never sleep, unless there are more of them than CPUs.
    env = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}
    assert run(count_threads, env=env) == [1, 0, True]


def test_padding():
    hidden = tensors((3, 5, 2))[0].requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    unpad_input, pad_input = fastattn.flash_attn.unpad_input, fastattn.flash_attn.pad_input
    tokens, indices, cu_seqlens, longest, used = unpad_input(hidden, mask)
    assert torch.equal(tokens, hidden[mask.bool()])
    assert cu_seqlens.tolist() == [0, 2, 7, 9]
    assert cu_seqlens.dtype == torch.int32
    assert (longest, used.tolist()) == (5, [2, 5, 2])
    padded = pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, hidden * mask[..., None])
    assert torch.equal(
        torch.autograd.grad(padded.sum(), hidden)[0], mask[..., None].expand(3, 5, 2).double()
    )
    unused = torch.tensor([[0, 0, 1, 0, 0], [0] * 5, [0] * 5])
    tokens, _, cu_seqlens, _, used = unpad_input(hidden, mask, unused)
    assert (len(tokens), cu_seqlens.tolist(), used.tolist()) == (10, [0, 3, 8, 10], [2, 5, 2])


SIGNATURES = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}
OPTIONS = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs"
)
DEFAULTS = [0.0, None, False, (-1, -1), 0.0, None, False, False]


@pytest.mark.promise("flash-attn-means-flash-attn")
@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(fastattn.flash_attn, name)).parameters
    expected = f"{SIGNATURES[name]} {OPTIONS}".split()
    if name == "flash_attn_varlen_func":
        expected.append("block_table")
    assert list(parameters) == expected
    assert [parameters[x].default for x in OPTIONS.split()] == DEFAULTS


@pytest.mark.promise("flash-attn-means-flash-attn")
def test_signature_of_the_cache():
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse"
    )
    assert list(inspect.signature(flash_attn_with_kvcache).parameters) == names.split()
