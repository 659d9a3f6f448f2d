# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: each is attended as if it were alone, to the bit, on every variant."""
# ruff: noqa: E501 - the tables have a line per case

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import attention, reference, varlen_attention
from tests.support.correctness import assert_same_bits
from tests.support.problems import every_dtype

pytestmark = pytest.mark.usefixtures("isa")

# Lengths on both sides of what decides how a sequence is cut, empty ones among them.
Q_LENS = (3, 0, 1, 16, 17, 60, 5, 0)
KV_LENS = (9, 4, 1300, 0, 17, 200, 5, 0)
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 6, 2, 20, 12


def starts(lens, first=0):
    return np.cumsum([first, *lens])


def packed(lens, heads, dim, dtype, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(sum(lens), heads, dim)).astype(np.float32).astype(dtype)


def problem(dtype=np.float32, q_lens=Q_LENS, kv_lens=KV_LENS):
    return (
        packed(q_lens, HEADS, HEAD_DIM, dtype, 0),
        packed(kv_lens, KV_HEADS, HEAD_DIM, dtype, 1),
        packed(kv_lens, KV_HEADS, VALUE_DIM, dtype, 2),
        starts(q_lens),
        starts(kv_lens),
    )


def one_by_one(query, key, value, q_starts, kv_starts, options_of):
    """Attend each sequence in a call of its own."""
    out = np.zeros((len(query), HEADS, VALUE_DIM), query.dtype)
    lse = np.full((HEADS, len(query)), -np.inf, np.float32)
    for b in range(len(q_starts) - 1):
        rows, keys = slice(*q_starts[b : b + 2]), slice(*kv_starts[b : b + 2])
        x = (query[rows], key[keys], value[keys])
        own = attention(*(a.swapaxes(0, 1) for a in x), return_lse=True, **options_of(b, rows))
        out[rows], lse[:, rows] = own[0].swapaxes(0, 1), own[1]
    return out, lse


longest = max(KV_LENS)
rng = np.random.default_rng(3)
MASK = rng.random((HEADS, sum(Q_LENS), longest)) < 0.7
BIAS = rng.normal(size=(sum(Q_LENS), longest)).astype(np.float16)
OFFSETS = np.array(KV_LENS) - np.array(Q_LENS)
KV_LENGTHS = np.array(KV_LENS) * 2 // 3
SLOPES = rng.random((len(Q_LENS), HEADS)).astype(np.float32)
SINKS = rng.normal(size=HEADS).astype(np.float32)

# For each: the options of the packed call, and those of sequence b alone.
OPTIONS = {
    "plain": ({}, lambda b, rows: {}),
    "causal, at the end": ({"is_causal": True, "query_offset": OFFSETS}, lambda b, rows: {"is_causal": True, "query_offset": int(OFFSETS[b])}),
    "window": ({"window": (30, 5), "query_offset": 2}, lambda b, rows: {"window": (30, 5), "query_offset": 2}),
    "mask and bias": ({"mask": MASK, "bias": BIAS}, lambda b, rows: {"mask": MASK[:, rows, : KV_LENS[b]], "bias": BIAS[rows, : KV_LENS[b]]}),
    "lengths and sinks": ({"kv_lengths": KV_LENGTHS, "sinks": SINKS}, lambda b, rows: {"kv_lengths": int(KV_LENGTHS[b]), "sinks": SINKS}),
    "slopes and softcap": (
        {"alibi_slopes": SLOPES, "query_offset": OFFSETS, "softcap": 5.0, "scale": -0.4},
        lambda b, rows: {
            "alibi_slopes": SLOPES[b],
            "query_offset": int(OFFSETS[b]),
            "softcap": 5.0,
            "scale": -0.4,
        },
    ),
}  # fmt: skip


@pytest.mark.promise("packed-sequences-are-alone")
@every_dtype
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_alone(name, dtype):
    options, options_of = OPTIONS[name]
    operands = problem(dtype)
    out, lse = varlen_attention(*operands, return_lse=True, **options)
    expected = one_by_one(*operands, options_of)
    assert_same_bits(out, expected[0])
    assert_array_equal(lse, expected[1].astype(lse.dtype) if lse.dtype == np.float32 else lse)
    truth = reference.varlen_attention(*operands, return_lse=True, **options)
    rough = {"float16": 3e-3, "bfloat16": 3e-2}.get(np.dtype(dtype).name, 1e-5)
    assert_allclose(out.astype(float), truth[0].astype(float), rtol=0, atol=rough)
    assert_allclose(lse, truth[1], rtol=0, atol=1e-5)


@pytest.mark.promise("lse-is-over-keys")
def test_lse_of_float64():
    operands = problem(np.float64)
    lse = varlen_attention(*operands, return_lse=True)[1]
    assert lse.dtype == np.float64
    assert_allclose(lse, reference.varlen_attention(*operands, return_lse=True)[1], rtol=1e-13)


@pytest.mark.promise("bitwise-threads")
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_change_no_bit(threads):
    operands = problem()
    expected = varlen_attention(*operands)
    before = fastattn.get_num_threads()
    fastattn.set_num_threads(threads)
    try:
        assert_same_bits(varlen_attention(*operands), expected)
    finally:
        fastattn.set_num_threads(before)


@pytest.mark.promise("rows-of-no-sequence-are-zero")
def test_rows_of_no_sequence():
    query, key, value, q_starts, kv_starts = problem()
    q_starts[0] += 2
    q_starts[-3:] -= 4
    key[:3], key[-2:] = np.nan, np.inf  # of no sequence either
    kv_starts[0] += 3
    kv_starts[-3:] -= 2
    out, lse = varlen_attention(query, key, value, q_starts, kv_starts, return_lse=True)
    for rows in (slice(q_starts[0]), slice(q_starts[-1], None)):
        assert not out[rows].any()
        assert (lse[:, rows] == -np.inf).all()
    assert np.isfinite(out).all()
    room = np.full_like(out, np.nan)
    got = varlen_attention(query, key, value, q_starts, kv_starts, out=room)
    assert got is room
    assert_same_bits(room, out)


@pytest.mark.promise("packed-sequences-are-alone")
@pytest.mark.parametrize("q_len", [1, 8, 16])
def test_a_sequence_without_keys_before_one_with_keys(q_len):
    """Both begin at the same key."""
    lens = (q_len, q_len), (0, 2000)
    operands = problem(q_lens=lens[0], kv_lens=lens[1])
    out, lse = varlen_attention(*operands, return_lse=True)
    expected = one_by_one(*operands, lambda b, rows: {})
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


@pytest.mark.promise("rows-of-no-sequence-are-zero", "no-keys-no-queries")
def test_no_sequences_and_no_rows():
    query, key, value = problem()[:3]
    assert not varlen_attention(query, key, value, [0], [0]).any()
    empty = varlen_attention(query[:0], key[:0], value[:0], [0, 0, 0], [0, 0, 0])
    assert empty.shape == (0, HEADS, VALUE_DIM)


@pytest.mark.promise("bitwise-strides")
def test_layouts_change_no_bit():
    query, key, value, *both = problem()
    expected = varlen_attention(query, key, value, *both)
    strided = [np.asfortranarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (query, key, value)]
    assert_same_bits(varlen_attention(*strided, *both), expected)
    reverse = [x[::-1].copy()[::-1] for x in (query, key, value)]
    assert_same_bits(varlen_attention(*reverse, *(x.astype(np.int32) for x in both)), expected)


def test_it_needs_no_room_for_padding():
    """64 sequences of 1..64 and one of 4096: padded, the queries alone would take 260 MB."""
    lens = (*range(1, 65), 4096)
    x = packed(lens, 4, 64, np.float32, 0)
    out = varlen_attention(x, x, x, starts(lens), starts(lens), is_causal=True)
    tail = x[-4096:].swapaxes(0, 1)
    assert_same_bits(out[-4096:].swapaxes(0, 1), attention(tail, tail, tail, is_causal=True))
