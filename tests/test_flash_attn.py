# SPDX-License-Identifier: Apache-2.0
"""Do the functions of flash-attn mean what flash-attn's do? Beside the plain formula in float64."""

import inspect
import itertools
from pathlib import Path

import pytest
from child import run

import fastattn

torch = pytest.importorskip("torch", exc_type=ImportError)

from fastattn.flash_attn import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def problem(q_len=9, kv_len=14, batch=2, dtype=torch.float64):
    keys = (batch, kv_len, KV_HEADS, DIM)
    return tensors((batch, q_len, HEADS, DIM), keys, keys, dtype=dtype)


def plain(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, kept=1.0):
    """Return out and lse of one sequence, of shapes (length, heads, dim) and (heads, length)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[0] - q.shape[0]
    distance = torch.arange(k.shape[0]) - (torch.arange(q.shape[0])[:, None] + shift)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    unseen = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        unseen |= distance > 0
    if window[0] >= 0:
        unseen |= distance < -window[0]
    if window[1] >= 0:
        unseen |= distance > window[1]
    scores = scores.masked_fill(unseen, -torch.inf)
    blind = unseen.all(dim=1)[:, None]
    probs = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hqk,khd->qhd", probs * kept, v), scores.logsumexp(-1)


def plain_batch(q, k, v, slopes=None, **options):
    """Return out and lse of sequences of any lengths, as lists."""
    results = [
        plain(
            *x, slopes=slopes[i] if slopes is not None and slopes.ndim == 2 else slopes, **options
        )
        for i, x in enumerate(zip(q, k, v, strict=True))
    ]
    return [list(x) for x in zip(*results, strict=True)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float32)
CASES = {
    "nothing": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left alone": {"window_size": (3, -1)},
    "right alone": {"window_size": (-1, 1)},
    "window and causal": {"window_size": (4, 4), "causal": True},
    "softcap": {"softcap": 1.5},
    "softcap off": {"softcap": -1.0},
    "None is off": {"softcap": None, "window_size": None},
    "None is unlimited": {"window_size": (None, 1)},
    "slopes": {"alibi_slopes": SLOPES},
    "slopes of each": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "causal": True},
    "deterministic": {"deterministic": True},
}
WORDS = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes"}


def in_words(options):
    words = {
        WORDS.get(k, k): x for k, x in options.items() if k != "deterministic" and x is not None
    }
    if "window" in words:
        words["window"] = tuple(-1 if side is None else side for side in words["window"])
    return words


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


# Caches.


BATCH, CACHE_LEN = 3, 256
LENGTHS = torch.tensor([200, 17, 0], dtype=torch.int32)


def cache_problem(new, q_len=None, rows=BATCH, dtype=torch.float32):
    shape = (BATCH, new, KV_HEADS, DIM)
    caches = (rows, CACHE_LEN, KV_HEADS, DIM)
    q_len = new if q_len is None else q_len
    return tensors((BATCH, q_len, HEADS, DIM), caches, caches, shape, shape, dtype=dtype)


def expected_of(q, caches, new, rows, lengths, **options):
    """Return what a call gives, and the caches that it leaves."""
    after = [x.clone() for x in caches]
    for cache, x in zip(after, new, strict=True):
        for i, row in enumerate(rows):
            cache[row, lengths[i] : lengths[i] + x.shape[1]] = x[i]
    ends = [int(n) + new[0].shape[1] for n in lengths]
    held = [[x[row, :end].double() for row, end in zip(rows, ends, strict=True)] for x in after]
    outs, lses = plain_batch(q.double(), *held, **options)
    return torch.stack(outs), torch.stack(lses), after


def nearly(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


CACHED = {k: CASES[k] for k in ("nothing", "causal", "window", "softcap", "slopes")}


@pytest.mark.promise("flash-attn-caches-in-place", "flash-attn-means-flash-attn")
@pytest.mark.parametrize("case", CACHED)
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("rows", [None, [4, 0, 2]], ids=["all", "some"])
def test_cache(case, new, rows):
    q, k_cache, v_cache, k, v = cache_problem(new, rows=3 if rows is None else 5)
    index = rows or range(BATCH)
    out, lse, after = expected_of(
        q, (k_cache, v_cache), (k, v), index, LENGTHS, **in_words(CACHED[case])
    )
    batch_idx = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    actual = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=LENGTHS,
        cache_batch_idx=batch_idx,
        return_softmax_lse=True,
        **CACHED[case],
    )
    assert torch.equal(k_cache, after[0])
    assert torch.equal(v_cache, after[1])
    nearly(actual[0], out)
    nearly(actual[1], lse)


@pytest.mark.promise("flash-attn-caches-in-place", "flash-attn-means-flash-attn")
@pytest.mark.parametrize("case", CACHED)
@pytest.mark.parametrize("new", [1, 5])
def test_cache_of_pages(case, new):
    q, k_cache, v_cache, k, v = cache_problem(new)
    out, lse, after = expected_of(
        q, (k_cache, v_cache), (k, v), range(BATCH), LENGTHS, **in_words(CACHED[case])
    )
    order = torch.tensor([4, 1, 0, 3, 6, 2])  # page 5 is no one's
    paged = [torch.zeros(7, 128, KV_HEADS, DIM) for _ in range(2)]
    for pages, cache in zip(paged, (k_cache, v_cache), strict=True):
        pages[order] = cache.reshape(6, 128, KV_HEADS, DIM)
    actual = flash_attn_with_kvcache(
        q,
        *paged,
        k,
        v,
        cache_seqlens=LENGTHS,
        block_table=order.reshape(3, 2).to(torch.int32),
        return_softmax_lse=True,
        **CACHED[case],
    )
    for pages, cache in zip(paged, after, strict=True):
        assert torch.equal(pages[order].reshape(cache.shape), cache)
    nearly(actual[0], out)
    nearly(actual[1], lse)


def test_cache_that_is_read_alone():
    q, k_cache, v_cache, _, _ = cache_problem(0, q_len=3, dtype=torch.float64)
    none = k_cache[:, :0], v_cache[:, :0]
    for lengths, given in (([CACHE_LEN] * 3, None), ([40] * 3, 40), ([40, 3, 0], [40, 3, 0])):
        seqlens = torch.tensor(given, dtype=torch.int32) if isinstance(given, list) else given
        expected = expected_of(q, (k_cache, v_cache), none, range(3), lengths, causal=True)
        actual = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=seqlens, causal=True, return_softmax_lse=True
        )
        close(actual[0], expected[0])
        close(actual[1], expected[1])


@pytest.mark.parametrize("rows", [None, [2, 2, 0]])
def test_left_padding(rows):
    q, k_cache, v_cache, _, _ = cache_problem(0, q_len=3, dtype=torch.float64)
    first = torch.tensor([10, 0, 60], dtype=torch.int32)
    ends = torch.tensor([200, 17, 60], dtype=torch.int32)
    index = rows or range(3)
    held = [
        [x[row, a:b] for row, a, b in zip(index, first, ends, strict=True)]
        for x in (k_cache, v_cache)
    ]
    expected = plain_batch(q, *held, causal=True)
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=ends,
        cache_leftpad=first,
        cache_batch_idx=None if rows is None else torch.tensor(rows),
        causal=True,
    )
    close(out, torch.stack(expected[0]))


ROTARY = {
    "together": ({}, False),
    "causal": ({"causal": True}, True),
    "window": ({"window_size": (8, -1)}, True),
    "a window as long as the cache": ({"window_size": (CACHE_LEN, -1)}, False),
}


@pytest.mark.parametrize("case", ROTARY)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_rotary_embedding_in_a_cache(case, interleaved, paged):
    options, in_turn = ROTARY[case]
    q, k_cache, v_cache, k, v = cache_problem(5)
    angles = tensors((CACHE_LEN, 4), seed=7, dtype=torch.float32)[0]

    def at(x, steps):  # a pair (a, b) as the complex number a + ib
        kept = x[..., 8:]
        pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
        pairs = torch.complex(*pairs.unbind(-1 if interleaved else -2))
        turn = torch.polar(torch.ones_like(angles), angles)[LENGTHS[:, None].long() + steps]
        pairs = torch.view_as_real(pairs * turn[:, :, None])
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        return torch.cat((pairs.flatten(-2), kept), dim=-1)

    steps = torch.arange(5)
    expected = expected_of(
        at(q, steps if in_turn else 0 * steps),
        (k_cache, v_cache),
        (at(k, steps), v),
        range(BATCH),
        LENGTHS,
        **in_words(options),
    )
    caches, table = (k_cache, v_cache), None
    if paged:
        caches = [x.reshape(6, 128, KV_HEADS, DIM) for x in caches]
        table = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    out = flash_attn_with_kvcache(
        q,
        *caches,
        k,
        v,
        angles.cos(),
        angles.sin(),
        cache_seqlens=LENGTHS,
        rotary_interleaved=interleaved,
        block_table=table,
        **options,
    )
    nearly(out, expected[0])
    nearly(k_cache, expected[2][0].double())


def test_a_cache_has_no_gradient():
    q, k_cache, v_cache, k, v = cache_problem(2)
    out = flash_attn_with_kvcache(q.requires_grad_(), k_cache, v_cache, k, v, cache_seqlens=3)
    assert not out.requires_grad


BAD = {
    "rotary alone": (
        {"rotary_cos": torch.ones(256, 4)},
        ValueError,
        "rotary_cos and rotary_sin must be given together, and with k and v",
    ),
    "rotary without keys": (
        {"k": None, "v": None, "rotary_cos": torch.ones(256, 4), "rotary_sin": torch.ones(256, 4)},
        ValueError,
        "rotary_cos and rotary_sin must be given together, and with k and v",
    ),
    "short rotary": (
        {"rotary_cos": torch.ones(255, 4), "rotary_sin": torch.ones(255, 4)},
        ValueError,
        "rotary_cos and rotary_sin must have a row for each of the 256 keys that there is room "
        "for, and at most head_dim / 2 columns, got rotary_cos.shape=(255, 4), ",
    ),
    "wide rotary": (
        {"rotary_cos": torch.ones(256, 9), "rotary_sin": torch.ones(256, 9)},
        ValueError,
        "rotary_cos and rotary_sin must have a row for each of the 256 keys that there is room "
        "for, and at most head_dim / 2 columns, got rotary_cos.shape=(256, 9), ",
    ),
    "alone": ({"v": None}, ValueError, "k and v must be given together"),
    "lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k"),
    "full": (
        {"cache_seqlens": 255},
        ValueError,
        "cache_seqlens and the new keys must be within 256, the keys that there is room for, got "
        "255 + 2",
    ),
    "negative": ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be >= 0, got -1"),
    "new": (
        {"k": torch.ones(3, 2, 1, DIM)},
        ValueError,
        "k must have shape (3, 2, 2, 16) and dtype torch.float32, got k.shape=(3, 2, 1, 16) and",
    ),
    "row": (
        {"cache_batch_idx": torch.tensor([0, 1, 3])},
        ValueError,
        "cache_batch_idx must be within 0..2, the rows of k_cache, got 3",
    ),
    "float row": (
        {"cache_batch_idx": torch.ones(3)},
        ValueError,
        "cache_batch_idx must be integers of shape (3,), got cache_batch_idx.shape=(3,) and "
        "torch.float32",
    ),
    "page": (
        {"block_table": torch.tensor([[0], [1], [-1]])},
        ValueError,
        "block_table must be within 0..2, the rows of k_cache, got -1",
    ),
    "padding": (
        {"cache_leftpad": torch.ones(2, dtype=torch.int32)},
        ValueError,
        "cache_leftpad must be integers of shape (3,), got cache_leftpad.shape=(2,) and",
    ),
    "window": (
        {"window_size": 3},
        TypeError,
        "window_size must be a pair (left, right), not 3",
    ),
    "window of fractions": (
        {"window_size": (1.5, 0)},
        TypeError,
        "window_size must be a pair of integers, not (1.5, 0)",
    ),
    "device": (
        {"q": torch.ones(3, 2, HEADS, DIM, device="meta")},
        TypeError,
        "q must be on the CPU, got a tensor on meta: q.cpu()",
    ),
    "both": (
        {"block_table": torch.zeros(3, 1), "cache_batch_idx": torch.arange(3)},
        ValueError,
        "block_table must be given without cache_batch_idx and cache_leftpad",
    ),
    "axes": (
        {"q": torch.ones(2, 3, 4)},
        ValueError,
        "q must have shape (batch, length, heads, head_dim), got q.shape=(2, 3, 4)",
    ),
}


@pytest.mark.promise("flash-attn-caches-in-place", "errors-come-before-writing")
@pytest.mark.parametrize("case", BAD)
def test_cache_errors_before_anything_is_written(case):
    arguments, kind, message = BAD[case]
    q, k_cache, v_cache, k, v = cache_problem(2)
    before = k_cache.clone()
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": 7}
    with pytest.raises(kind) as error:
        flash_attn_with_kvcache(**given | arguments)
    assert str(error.value).startswith(message)
    assert torch.equal(k_cache, before)


def count_threads():
    """Return the threads that torch's operators add, and those that ours add to these."""

    def tasks():
        return len(list(Path("/proc/self/task").iterdir()))

    torch.set_num_threads(3)
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
    assert run(count_threads, env={"OMP_NUM_THREADS": "3"}) == [2, 0, True]


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


# Padding.


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
