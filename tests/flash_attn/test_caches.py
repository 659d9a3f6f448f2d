# SPDX-License-Identifier: Apache-2.0
"""Does `flash_attn_with_kvcache` mean what flash-attn's does? And what is refused."""
# ruff: noqa: E501 - the tables have a line per case

import pytest
import torch

from fastattn.flash_attn import flash_attn_with_kvcache
from tests.flash_attn.problems import (
    CASES,
    DIM,
    HEADS,
    KV_HEADS,
    close,
    in_words,
    plain_batch,
    tensors,
)

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
    "rotary alone": ({"rotary_cos": torch.ones(256, 4)}, ValueError, "rotary_cos and rotary_sin must be given together, and with k and v"),
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
    "full": ({"cache_seqlens": 255}, ValueError, "cache_seqlens and the new keys must be within 256, the keys that there is room for, got 255 + 2"),
    "negative": ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be >= 0, got -1"),
    "new": ({"k": torch.ones(3, 2, 1, DIM)}, ValueError, "k must have shape (3, 2, 2, 16) and dtype torch.float32, got k.shape=(3, 2, 1, 16) and"),
    "row": ({"cache_batch_idx": torch.tensor([0, 1, 3])}, ValueError, "cache_batch_idx must be within 0..2, the rows of k_cache, got 3"),
    "float row": ({"cache_batch_idx": torch.ones(3)}, ValueError, "cache_batch_idx must be integers of shape (3,), got cache_batch_idx.shape=(3,) and torch.float32"),
    "page": ({"block_table": torch.tensor([[0], [1], [-1]])}, ValueError, "block_table must be within 0..2, the rows of k_cache, got -1"),
    "padding": ({"cache_leftpad": torch.ones(2, dtype=torch.int32)}, ValueError, "cache_leftpad must be integers of shape (3,), got cache_leftpad.shape=(2,) and"),
    "window": ({"window_size": 3}, TypeError, "window_size must be a pair (left, right), not 3"),
    "window of fractions": ({"window_size": (1.5, 0)}, TypeError, "window_size must be a pair of integers, not (1.5, 0)"),
    "device": ({"q": torch.ones(3, 2, HEADS, DIM, device="meta")}, TypeError, "q must be on the CPU, got a tensor on meta: q.cpu()"),
    "both": ({"block_table": torch.zeros(3, 1), "cache_batch_idx": torch.arange(3)}, ValueError, "block_table must be given without cache_batch_idx and cache_leftpad"),
    "axes": ({"q": torch.ones(2, 3, 4)}, ValueError, "q must have shape (batch, length, heads, head_dim), got q.shape=(2, 3, 4)"),
}  # fmt: skip


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
