# SPDX-License-Identifier: Apache-2.0
"""Decoding, few queries against long keys: the kernel for it takes the keys in splits."""

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from fastattn import PagedKVCache, attention, explain
from tests.attention.problems import every_arithmetic, laid_out, with_lse
from tests.support.correctness import assert_same_bits, assert_within_gate, attend_within_gate
from tests.support.problems import both_dtypes, every_dtype, make_problem

pytestmark = pytest.mark.usefixtures("isa")


def decoding(dtype, q_len=2, kv_len=2700):
    operands = make_problem(
        q_len, kv_len, 40, 24, heads=6, kv_heads=2, batch=(3,), dtype=dtype, mean=1
    )
    rng = np.random.default_rng(6)
    options = {
        "mask": rng.random((3, 1, q_len, kv_len)) < 0.8,
        "bias": rng.normal(size=(6, q_len, kv_len)).astype(np.float32),
        "query_offset": np.array([kv_len - q_len, 700, 1030]),
        "window": (2000, 20),
        "alibi_slopes": rng.random((3, 6)) / 100,
        "sinks": rng.normal(size=6),
        "kv_lengths": np.array([kv_len, 1024, 0]),
        "softcap": 20.0,
    }
    return operands, options


@pytest.mark.promise("result-is-the-definition", "accuracy-gate")
@every_dtype
@pytest.mark.parametrize("q_len", [1, 2])
def test_decode(q_len, dtype):
    operands, options = decoding(dtype, q_len)
    assert explain(*operands)["kernel"] == "decode"
    attend_within_gate(*operands)
    attend_within_gate(*operands, **options)
    for name, value in options.items():
        positions = {"query_offset": options["query_offset"]}
        attend_within_gate(*operands, **(positions | {name: value}))


@pytest.mark.promise(
    "bitwise-threads",
    "bitwise-batch-neighbours",
    "bitwise-padding",
    "bitwise-strides",
    "masked-pair-contributes-nothing",
)
@every_arithmetic
def test_bits(dtype, threads):
    """Threads, batch neighbours, padding, strides and other keys' poison change none."""
    operands, options = decoding(dtype)
    for extra in (options, {}):
        threads(1)
        expected = with_lse(*operands, **extra)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(with_lse(*operands, **extra), expected)
        for b in range(3):
            each = ("mask", "query_offset", "alibi_slopes", "kv_lengths")
            alone = {name: x[b] if name in each else x for name, x in extra.items()}
            got = with_lse(*[x[b] for x in operands], **alone)
            assert_same_bits(got, (expected[0][b], expected[1][b]))
        assert_same_bits(with_lse(*[laid_out(x, "reversed") for x in operands], **extra), expected)
    query, key, value = operands
    expected = with_lse(query, key, value)
    for padding in (1, 300, 5000):
        longer = [
            np.concatenate([x, np.full((3, 2, padding, x.shape[-1]), np.nan, dtype)], axis=2)
            for x in (key, value)
        ]
        assert_same_bits(with_lse(query, *longer, kv_lengths=2700), expected)
        assert_same_bits(with_lse(query, *longer, mask=np.arange(2700 + padding) < 2700), expected)


@pytest.mark.promise("bitwise-batch-neighbours")
@both_dtypes
def test_partials_that_wait(dtype):
    """More partials than may wait at once are merged wave by wave."""
    query, key, _ = make_problem(1, 30000, 2, heads=16, kv_heads=2, dtype=dtype)
    buffer = np.random.default_rng(7).normal(size=(2, 35000)).astype(dtype)
    value = as_strided(buffer, (2, 30000, 4096), (buffer.strides[0], *[buffer.itemsize] * 2))
    parts = [slice(8 * i, 8 * i + 8) for i in (0, 1)]
    expected = [attention(query[part], key[i], value[i]) for i, part in enumerate(parts)]
    assert_same_bits(attention(query, key, value), np.concatenate(expected))
    attend_within_gate(query, key, value[..., :3])


@pytest.mark.promise("sharing-changes-no-bit", "bitwise-batch-neighbours")
@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize(("q_len", "heads"), [(1, 8), (2, 6), (16, 12)])
def test_keys_that_a_batch_shares(q_len, heads, dtype):
    """A prefix that the batch repeats is read once for all; each still gets what it gets alone."""
    batch, kv_len = 21, 1100  # more rows than share a split
    query = make_problem(q_len, 1, 64, heads=heads, batch=(batch,), dtype=dtype)[0]
    _, key, value = make_problem(1, kv_len, 64, heads=2, dtype=dtype, mean=1)
    options = {"kv_lengths": np.arange(batch) * 53, "window": (900, None), "query_offset": 0}
    together = with_lse(query, key, value, **options)
    for b in range(batch):
        own = {**options, "kv_lengths": int(options["kv_lengths"][b])}
        alone = with_lse(query[b : b + 1], key, value, **own)
        assert_same_bits(tuple(x[b : b + 1] for x in together), alone)
    assert_within_gate(
        together, query, *(np.repeat(x[None], batch, 0) for x in (key, value)), **options
    )


MANY_THREADS = (2, 3, 16, 96)


@pytest.mark.promise("bitwise-threads")
@every_arithmetic
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "head_dim", "value_head_dim"),
    [
        (3, 8, 2, 1, 64, 40),  # grouped heads
        (2, 16, 1, 1, 64, 64),  # one key head for all
        (2, 128, 1, 1, 72, 64),  # and more of them than attend together
        (2, 6, 2, 16, 32, 32),
        (1, 2, 2, 3, 16, 1030),
    ],
)
def test_bits_of_many_threads(
    batch, heads, kv_heads, q_len, head_dim, value_head_dim, dtype, threads
):
    """However the rows, keys and heads are shared out, and whoever merges, no bit changes."""
    shape = {"heads": heads, "kv_heads": kv_heads, "batch": (batch,), "dtype": dtype}
    operands = make_problem(q_len, 3300, head_dim, value_head_dim, **shape)
    options = {
        "kv_lengths": np.array([3300, 0, 1500])[:batch],
        "query_offset": np.array([3200, 5, 1490])[:batch],
        "window": (2500, 40),
        "sinks": np.linspace(-1, 1, heads),
    }
    threads(1)
    expected = with_lse(*operands), with_lse(*operands, **options)
    for count in MANY_THREADS:
        threads(count)
        assert_same_bits(with_lse(*operands), expected[0])
        assert_same_bits(with_lse(*operands, **options), expected[1])


@pytest.mark.promise("bitwise-threads", "sharing-changes-no-bit")
@pytest.mark.parametrize("heads", [2, 8, 48])
@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=lambda dtype: np.dtype(dtype).name
)
def test_bits_of_many_threads_in_pages(dtype, heads, threads):
    """Nor where pages are shared, and where tokens between the first and the newest are gone."""
    shape = {"kv_heads": 2, "heads": heads, "dtype": np.float32 if dtype == np.int8 else dtype}
    query, key, value = make_problem(2, 2600, 64, batch=(5,), **shape)
    cache = PagedKVCache(2, 64, dtype=dtype)
    prompt = cache.add()
    cache.append(key[:1, :, :2300], value[:1, :, :2300])
    for _ in range(4):
        cache.add(prompt)
    cache.append(key[:, :, 2300:], value[:, :, 2300:])
    for kept in (None, 1500):
        if kept is not None:
            cache.evict(kept, keep_first=4)
        threads(1)
        expected = cache.attend(query, return_lse=True, sinks=np.ones(heads))
        for count in MANY_THREADS:
            threads(count)
            assert_same_bits(cache.attend(query, return_lse=True, sinks=np.ones(heads)), expected)


def test_a_wide_batch_is_work_for_all(threads):
    """Sequences whose keys fit a split carry nothing, so that as many as there are go at once."""
    operands = make_problem(1, 600, 64, heads=4, batch=(64,))
    threads(96)
    assert explain(*operands)["threads"] == 96


@pytest.mark.promise("no-keys-no-queries")
def test_nothing_to_do_takes_no_time():
    """A batch of 2**40 that repeats no queries, or results of no size, is done at once."""
    batch = (2**40, 2)
    for q_len, value_head_dim in ((0, 8), (1, 0)):
        shapes = [(*batch, q_len, 8), (*batch, 3, 8), (*batch, 3, value_head_dim)]
        operands = [np.broadcast_to(np.float32(1), shape) for shape in shapes]
        assert attention(*operands).shape == (*batch, q_len, value_head_dim)
