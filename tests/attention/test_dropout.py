# SPDX-License-Identifier: Apache-2.0
"""Dropout drops the same pairs wherever and however a call is computed, and they are random.

With an identity as values, the result shows each probability: it is 0 where a pair was dropped.
"""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fastattn
from fastattn import attention, dropout_mask, explain, varlen_attention
from tests.support.correctness import assert_same_bits, assert_within_gate, attend_within_gate
from tests.support.problems import DTYPES, every_dtype, make_problem

pytestmark = pytest.mark.usefixtures("isa")
# bfloat16 may be multiplied in pairs, which no other dtype is.
every_arithmetic = pytest.mark.parametrize(
    "dtype", [*DTYPES, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
SEED = 0x9E3779B97F4A7C15  # both of its halves count


def identity(key, columns=None):
    """Return values that are an identity for each head, or some of its columns."""
    kv_len = key.shape[-2]
    columns = slice(None) if columns is None else columns
    eye = np.eye(kv_len, dtype=np.float32)[:, columns].astype(key.dtype)
    return np.broadcast_to(eye, (*key.shape[:-1], eye.shape[-1]))


def assert_drops(query, key, **options):
    """Assert that what is seen and not dropped is what the mask and the plain call say."""
    out, lse = attention(query, key, identity(key), return_lse=True, **options)
    dropout = {name: options.pop(name) for name in ("dropout_p", "seed")}
    plain, plain_lse = attention(query, key, identity(key), return_lse=True, **options)
    kept = dropout_mask(query, key, **dropout, query_offset=options.get("query_offset"))
    assert kept.shape == out.shape
    assert_array_equal(out != 0, kept & (plain != 0))
    assert_same_bits(lse, plain_lse)


@pytest.mark.promise("dropout-follows-its-counter", "lse-is-over-keys")
@every_dtype
@pytest.mark.parametrize("q_len", [1, 4, 16, 17, 70])
@pytest.mark.parametrize("kv_len", [1, 2, 127, 301])
def test_the_mask(q_len, kv_len, dtype):
    for heads, kv_heads, head_dim, batch in [(1, 1, 32, ()), (6, 2, 32, (2, 2)), (4, 1, 7, (3,))]:
        query, key, _ = make_problem(
            q_len, kv_len, head_dim, heads=heads, kv_heads=kv_heads, batch=batch, dtype=dtype
        )
        for options in ({}, {"is_causal": True}, {"window": (40, 7)}, {"softcap": 5.0}):
            options = options | {"dropout_p": 0.4, "seed": SEED, "query_offset": -2}
            if batch:
                options["query_offset"] = np.arange(np.prod(batch)).reshape(batch) * 60 - 30
            assert_drops(query, key, **options)


@pytest.mark.promise("dropout-follows-its-counter")
@every_arithmetic
@pytest.mark.parametrize("q_len", [2, 30])
def test_many_keys(q_len, dtype):
    """Across the splits of decoding, and the sums that query tiles close."""
    query, key, _ = make_problem(q_len, 8400, 32, heads=2, kv_heads=1, dtype=dtype)
    query *= dtype(0.1)
    for columns in (slice(1000, 1064), slice(8150, 8214), slice(8368, 8400)):
        out = attention(query, key, identity(key, columns), dropout_p=0.5, seed=3)
        kept = dropout_mask(query, key, dropout_p=0.5, seed=3)
        assert_array_equal(out != 0, kept[..., columns])


@pytest.mark.promise("dropout-follows-its-counter")
@every_arithmetic
def test_edges_that_cut_a_group_of_four_keys(dtype):
    query, key, _ = make_problem(60, 140, 32, heads=2, dtype=dtype)
    for first in range(9):
        mask = (np.arange(140) >= first) & (np.arange(140) < 130 + first)
        assert_drops(query, key, mask=mask, dropout_p=0.5, seed=7)
        assert_drops(query, key, window=(first, first + 1), dropout_p=0.5, seed=7, query_offset=1)


@pytest.mark.promise("dropout-follows-its-counter")
@every_arithmetic
@pytest.mark.parametrize("q_len", [3, 60])
def test_a_batch_that_broadcasts(q_len, dtype):
    """The index is that in the whole batch, whichever operand has the axes."""
    query, key, value = make_problem(q_len, 200, 32, heads=4, kv_heads=2, dtype=dtype)
    options = {"dropout_p": 0.3, "seed": 11, "return_lse": True}
    whole = [np.broadcast_to(x, (2, 3, *x.shape)) for x in (query, key, value)]
    expected = attention(*[x.copy() for x in whole], **options)
    assert_same_bits(attention(*whole, **options), expected)
    for i in range(3):
        operands = [query, key, value]
        operands[i] = whole[i]
        assert_same_bits(attention(*operands, **options)[0], expected[0])
    assert_within_gate(expected[0], *whole, dropout_p=0.3, seed=11)
    kept = dropout_mask(*whole[:2], dropout_p=0.3, seed=11)
    for b, alone in enumerate(kept.reshape(6, 4, q_len, 200)):
        assert_array_equal(dropout_mask(query, key, dropout_p=0.3, seed=11, batch_index=b), alone)
        assert b == 0 or (alone != kept[0, 0]).any()


@pytest.mark.promise("bitwise-dropout")
@every_arithmetic
def test_threads_and_runs_change_no_bit(dtype, threads):
    options = {"dropout_p": 0.3, "seed": 1, "is_causal": True, "query_offset": 230}
    for q_len in (2, 70):
        operands = make_problem(q_len, 1500, 32, heads=4, kv_heads=2, batch=(3,), dtype=dtype)
        threads(1)
        expected = attention(*operands, **options)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(attention(*operands, **options), expected)
            assert_same_bits(attention(*operands, **options), expected)


@pytest.mark.promise("bitwise-dropout", "dropout-follows-its-counter")
@every_arithmetic
def test_query_chunks(dtype):
    """Positions count, not rows: to the bit where the form is the same, in either form the mask."""
    query, key, value = make_problem(70, 300, 32, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    options = {"dropout_p": 0.3, "seed": 1, "window": (200, 20)}
    offset = np.array([230, -20])
    for values in (value, identity(key)):
        whole = attention(query, key, values, query_offset=offset, **options)
        for rows in (slice(17), slice(17, 50), slice(50, 70), slice(5, 8), slice(69, 70)):
            part = attention(
                query[..., rows, :],
                key,
                values,
                query_offset=offset + rows.indices(70)[0],
                **options,
            )
            if part.shape[-2] > 16:
                assert_same_bits(part, whole[..., rows, :])
            elif values is not value:
                assert explain(query[..., rows, :], key, values)["kernel"] == "decode"
                assert_array_equal(part != 0, whole[..., rows, :] != 0)


@pytest.mark.promise("dropout-follows-its-counter")
@every_arithmetic
def test_far_positions(dtype):
    """Positions count modulo 2**32."""
    query, key, _ = make_problem(20, 40, 32, dtype=dtype)
    options = {"dropout_p": 0.5, "seed": 2}
    expected = attention(query, key, identity(key), query_offset=-5, **options)
    for offset in (2**32 - 5, 2**61 - 3 * 2**32 - 5):
        assert_same_bits(
            attention(query, key, identity(key), query_offset=offset, **options), expected
        )
        assert_array_equal(dropout_mask(query, key, query_offset=offset, **options), expected != 0)


@pytest.mark.promise("dropout-follows-its-counter")
@every_arithmetic
def test_packed_sequences(dtype):
    """Sequence b drops what element b of a batch does."""
    q_lens, kv_lens = (3, 0, 1, 16, 17, 60, 5), (9, 4, 1300, 0, 17, 200, 5)
    q_starts, kv_starts = np.cumsum([0, *q_lens]), np.cumsum([0, *kv_lens])
    query = make_problem(1, q_starts[-1], 32, heads=6, dtype=dtype)[1].swapaxes(0, 1)
    _, key, value = (
        x.swapaxes(0, 1) for x in make_problem(1, kv_starts[-1], 32, heads=2, dtype=dtype)
    )
    offsets = np.arange(7) * 10
    options = {"dropout_p": 0.4, "seed": SEED, "query_offset": offsets}
    columns = np.arange(kv_starts[-1]) - np.repeat(kv_starts[:-1], kv_lens)
    shown = (columns[:, None] == np.arange(200)).astype(np.float32).astype(dtype)
    shown = np.broadcast_to(shown[:, None], (len(columns), 2, 200))
    out = varlen_attention(query, key, shown, q_starts, kv_starts, **options)
    for b in range(7):
        rows = slice(*q_starts[b : b + 2])
        own = [query[rows].swapaxes(0, 1), key[slice(*kv_starts[b : b + 2])].swapaxes(0, 1)]
        kept = dropout_mask(*own, **options | {"query_offset": offsets[b], "batch_index": b})
        n = min(200, kv_lens[b])
        assert_array_equal(out[rows].swapaxes(0, 1)[..., :n] != 0, kept[..., :n])
    got = varlen_attention(query, key, value, q_starts, kv_starts, **options)
    truth = fastattn.reference.varlen_attention(query, key, value, q_starts, kv_starts, **options)
    eps = float(ml_dtypes.finfo(dtype).eps)
    difference = got.astype(np.float64) - truth.astype(np.float64)
    assert np.abs(difference).max() <= 16 * eps * np.abs(value.astype(np.float64)).max()


@pytest.mark.promise("dropout-scales-what-stays", "accuracy-gate")
@every_dtype
@pytest.mark.parametrize("q_len", [2, 50])
@pytest.mark.parametrize("kv_len", [130, 2048, 9000])
def test_accuracy(q_len, kv_len, dtype):
    query, key, value = make_problem(q_len, kv_len, 32, 8, heads=2, dtype=dtype, mean=1)
    for dropout_p in (1e-12, 0.1, 0.9):
        options = {"dropout_p": dropout_p, "seed": 4, "sinks": np.zeros(2)}
        attend_within_gate(query, key, value, **options)


@pytest.mark.promise("dropout-scales-what-stays")
@every_arithmetic
@pytest.mark.parametrize("q_len", [2, 50])
def test_all_and_nothing(q_len, dtype):
    """As few as none are dropped by a share too small for the generator, all by one of 1."""
    operands = make_problem(q_len, 300, 32, heads=2, dtype=dtype)
    expected = attention(*operands, return_lse=True)
    nothing = attention(*operands, dropout_p=0.0, seed=3, return_lse=True)
    assert_same_bits(nothing, expected)
    tiny = attention(*operands, dropout_p=2.0**-34, seed=3, return_lse=True)
    if dtype == np.float64:
        np.testing.assert_allclose(tiny[0], expected[0] / (1 - 2.0**-34), rtol=1e-15)
    else:
        assert_same_bits(tiny, expected)
    for dropout_p in (1, 1.0, np.float64(1), np.nextafter(1, 0)):
        out, lse = attention(*operands, dropout_p=dropout_p, seed=3, return_lse=True)
        assert_same_bits(out, np.zeros_like(out))
        assert_same_bits(lse, expected[1])
        assert not dropout_mask(*operands[:2], dropout_p=dropout_p, seed=3).any()


def test_kinds_that_are_allowed():
    operands = make_problem(20, 40, heads=2)
    expected = attention(*operands, dropout_p=0.25, seed=2**63)
    for dropout_p in (np.float32(0.25), Fraction(1, 4)):
        assert_same_bits(attention(*operands, dropout_p=dropout_p, seed=np.uint64(2**63)), expected)
    assert explain(*operands, dropout_p=0.25, seed=0) == explain(*operands)


@pytest.mark.promise("dropout-scales-what-stays")
def test_the_threshold():
    """The first number for seed 0 is 5f6fb709: a pair is kept iff its number is at least p."""
    one, key = np.ones((1, 1), np.float32), np.ones((4, 1), np.float32)
    for q_len in (1, 20):
        query = np.ones((q_len, 1), np.float32)
        for word, kept in ((0x5F6FB709, 1), (0x5F6FB70A, 0)):
            out = attention(query, key, identity(key), dropout_p=word / 2**32, seed=0)
            assert (out[0, 0] != 0) == kept
            assert dropout_mask(one, key, dropout_p=word / 2**32, seed=0)[0, 0] == kept


@pytest.mark.promise("dropped-value-contributes-nothing", "visible-nan-reaches-its-rows")
@every_arithmetic
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("q_len", [3, 60])
def test_poison_that_is_dropped(q_len, poison, dtype):
    """A NaN or Inf in a value reaches the rows that see it and do not drop it."""
    query, key, value = make_problem(q_len, 301, 32, heads=4, kv_heads=2, dtype=dtype)
    dropout = {"dropout_p": 0.5, "seed": 5}
    kept = dropout_mask(query, key, **dropout)
    mask = np.random.default_rng(0).random((4, q_len, 301)) < 0.8
    for bad in (0, 130, 299, 300):
        poisoned = value.copy()
        poisoned[:, bad, 13] = poison
        for options, seen in (({}, True), ({"mask": mask}, mask[..., bad])):
            expected = attention(query, key, value, **dropout, **options)
            out = attention(query, key, poisoned, **dropout, **options)
            reached = kept[..., bad] & seen
            assert_same_bits(out[~reached], expected[~reached])
            assert not np.isfinite(out[reached][:, 13]).any()
            others = np.arange(32) != 13
            assert_same_bits(out[..., others], expected[..., others])


@pytest.mark.promise("dropout-scales-what-stays")
def test_statistics():
    """The share of what is kept, and no likeness of neighbours along any axis, or between seeds."""
    shape = (4, 5, 240, 242)
    query, key = np.empty((*shape[:3], 1), np.float32), np.empty((4, 1, shape[3], 1), np.float32)
    for dropout_p in (0.5, 0.1, 0.01):
        draws = [
            dropout_mask(query, key, dropout_p=dropout_p, seed=seed) - (1 - dropout_p)
            for seed in (0, 1, 2**32, 2**63)
        ]
        variance = dropout_p * (1 - dropout_p)
        for x in draws:
            assert abs(x.mean()) < 5 * np.sqrt(variance / x.size)
            for axis, size in enumerate(shape):
                for step in (1, 2, 4):
                    if step >= size:
                        continue
                    ahead = np.take(x, range(step, size), axis)
                    product = ahead * np.take(x, range(size - step), axis)
                    assert abs(product.mean()) < 5 * variance / np.sqrt(product.size)
            for axis in range(4):  # no row, head or element has more than its share
                others = tuple(i for i in range(4) if i != axis)
                share = x.mean(axis=others)
                count = x.size // len(share)
                assert np.abs(share).max() < 5.5 * np.sqrt(variance / count)
        for other in draws[1:]:
            assert abs((draws[0] * other).mean()) < 5 * variance / np.sqrt(other.size)


@pytest.mark.promise("dropout-of-parts-is-the-wholes")
@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 5, 16, 17, 60])
@pytest.mark.parametrize("kv_len", [40, 1100])
def test_parts_of_a_whole(q_len, kv_len, dtype):
    """Keys may be cut anywhere, not at multiples of 4 alone, and so may queries and heads."""
    query, key, _ = make_problem(q_len, kv_len, 16, heads=4, kv_heads=2, batch=(3,), dtype=dtype)
    query *= dtype(0.1)
    dropout = {"dropout_p": 0.4, "seed": SEED}
    whole = dropout_mask(query, key, **dropout, query_offset=-7, key_offset=-2)
    for begin, end in ((0, 9), (9, 10), (10, 39), (3, kv_len), (kv_len - 7, kv_len)):
        part = key[..., begin:end, :]
        options = dropout | {"query_offset": -7, "key_offset": begin - 2}
        out = attention(query, part, identity(part), **options)
        assert_array_equal(out != 0, whole[..., begin:end])
        assert_array_equal(dropout_mask(query, part, **options), whole[..., begin:end])
    rows, heads, batch = slice(q_len // 2, None), slice(2, 4), slice(1, 3)
    options = dropout | {"query_offset": q_len // 2 - 7, "key_offset": -2}
    options |= {"head_offset": 2, "batch_offset": 1}
    parts = query[batch, heads, rows], key[batch, 1:]
    out = attention(*parts, identity(parts[1]), **options)
    assert_array_equal(out != 0, whole[batch, heads, rows])
    assert_array_equal(dropout_mask(*parts, **options), whole[batch, heads, rows])


@pytest.mark.promise("dropout-of-parts-is-the-wholes", "bitwise-batch-neighbours")
@every_arithmetic
@pytest.mark.parametrize("q_len", [2, 16, 30])
def test_an_offset_for_each_element(q_len, dtype):
    """Elements that share keys in memory are attended to together: each has its own positions."""
    query, key, _ = make_problem(q_len, 700, 16, heads=8, kv_heads=1, batch=(5,), dtype=dtype)
    key = np.broadcast_to(key[:1], key.shape)
    offsets = {"key_offset": np.array([0, 1, 2, 2, 2**34 - 3]), "query_offset": np.arange(5) * 90}
    dropout = {"dropout_p": 0.4, "seed": SEED}
    together = attention(query, key, identity(key), **dropout, **offsets)
    for b in range(5):
        own = {name: int(x[b]) for name, x in offsets.items()} | {"batch_offset": b}
        alone = attention(query[b], key[b], identity(key[b]), **dropout, **own)
        assert_same_bits(together[b], alone)


@pytest.mark.promise("dropout-of-parts-is-the-wholes")
def test_packed_documents_from_some_number_on():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(40, 2, 8)).astype(np.float32)
    starts = np.array([0, 5, 5, 30, 40])
    dropout = {"dropout_p": 0.5, "seed": 5}
    whole = varlen_attention(query, query, query, starts, starts, **dropout)
    some = starts[2:] - 5
    part = varlen_attention(*[query[5:]] * 3, some, some, batch_offset=2, **dropout)
    assert_same_bits(part, whole[5:])
