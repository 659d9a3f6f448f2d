# SPDX-License-Identifier: Apache-2.0
"""Few blocks of rows and many keys: threads share a block's keys, and no bit tells of it.

The softmax begins anew at each multiple of SPAN keys; what several threads have of a block is
merged in order. And whose work is counted where threads are chosen.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

from fastattn import attention, attention_statistics, explain, varlen_attention
from tests.attention.problems import (
    assert_chunks_have_the_bits,
    every_arithmetic,
    with_lse,
)
from tests.support.correctness import assert_same_bits, assert_within_gate
from tests.support.problems import make_problem

pytestmark = pytest.mark.usefixtures("isa")

SPAN = 4096
LENGTHS = (SPAN, SPAN + 1, 2 * SPAN - 1, 2 * SPAN, 3 * SPAN + 100)


def everything(q_len, kv_len, dtype):
    """Return a problem of three batch elements, the second of which has no keys, and options."""
    operands = make_problem(
        q_len, kv_len, 24, 20, heads=2, kv_heads=1, batch=(3,), dtype=dtype, mean=1.0
    )
    rng = np.random.default_rng(4)
    mask = rng.random((3, 1, q_len, kv_len)) < 0.8
    mask[0, :, 5:, : SPAN + 50] = False  # spans that no row sees, that some rows see
    mask[2, :, 7] = False
    options = {
        "mask": mask,
        "bias": rng.normal(size=(2, q_len, kv_len)).astype(np.float32),
        "query_offset": np.array([kv_len - q_len, kv_len, SPAN - 9]),
        "is_causal": True,
        "window": (kv_len - 200, 0),
        "alibi_slopes": rng.random((3, 2)) / kv_len,
        "sinks": rng.normal(size=2),
        "kv_lengths": np.array([kv_len, 0, kv_len - 70]),
        "softcap": 20.0,
        "dropout_p": 0.2,
        "seed": 3,
    }
    return operands, options


def options_in_turn(options):
    """Return them one by one, and all together."""
    yield {}
    for name in ("mask", "bias", "alibi_slopes", "sinks", "kv_lengths", "softcap"):
        yield {name: options[name]} | (
            {"query_offset": options["query_offset"]} if name == "alibi_slopes" else {}
        )
    yield {name: options[name] for name in ("dropout_p", "seed")}
    for names in itertools.combinations(("is_causal", "window"), 1):
        yield {name: options[name] for name in (*names, "query_offset")}
    yield options


@pytest.mark.promise("bitwise-threads")
@every_arithmetic
@pytest.mark.parametrize("kv_len", LENGTHS)
def test_threads_that_share_keys_change_no_bit(kv_len, dtype, threads):
    operands, everything_else = everything(19, kv_len, dtype)
    for options in options_in_turn(everything_else):
        threads(1)
        expected = with_lse(*operands, **options)
        for count in (7, 40):
            threads(count)
            assert_same_bits(with_lse(*operands, **options), expected)


@pytest.mark.promise("bitwise-threads", "forward-memory")
def test_keys_are_shared(threads):
    """One block has work for many threads, also beyond the memory of one wave of partials."""
    for q_len, kv_len, dim in ((17, 3 * SPAN, 16), (40, 600 * SPAN, 64)):
        query = np.zeros((1, q_len, dim), np.float32)
        key = np.broadcast_to(query[:, :1], (1, kv_len, dim))
        for count in (1, 2, 3, 32, 96):
            threads(count)
            report = explain(query, key, key)
            assert report["threads"] <= count
            assert report["scratch_bytes"] <= 16 * 2**20
            if count <= kv_len // SPAN:
                assert report["threads"] == count


def test_work_of_all_batch_elements_counts(threads):
    """Also where the first one has no keys, or sees none."""
    query, key, value = make_problem(64, 512, heads=2, batch=(3,))
    for options in (
        {},
        {"kv_lengths": [0, 512, 512]},
        {"is_causal": True, "query_offset": [-600, 448, 448]},
    ):
        for count in (2, 4):
            threads(count)
            assert explain(query, key, value, **options)["threads"] == count
    threads(4)
    assert explain(query, key, value, kv_lengths=0)["threads"] == 1


@pytest.mark.promise("bitwise-threads")
def test_partials_beyond_one_wave_change_no_bit(threads):
    """What waits to be merged is bounded; a block may go on in the next wave."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 130, 8), np.float32)
    key = np.tile(rng.standard_normal((1, SPAN, 8), np.float32), (1, 3, 1))
    value = np.broadcast_to(rng.standard_normal((1, 3 * SPAN, 1), np.float32), (1, 3 * SPAN, 1500))
    threads(1)
    expected = with_lse(query, key, value)
    for count in (3, 20):
        threads(count)
        assert_same_bits(with_lse(query, key, value), expected)


@pytest.mark.promise("bitwise-query-chunks")
@every_arithmetic
@pytest.mark.parametrize("kv_len", [SPAN + 1, 2 * SPAN])
def test_query_chunks_change_no_bit(kv_len, dtype, threads):
    operands, options = everything(60, kv_len, dtype)
    threads(1)
    expected = with_lse(*operands, **options)
    threads(30)
    assert_chunks_have_the_bits(expected, operands, options, (17, 40, 60))


@pytest.mark.promise("bitwise-padding")
@every_arithmetic
def test_keys_that_are_not_seen_change_no_bit(dtype, threads):
    """A row has the bits of its own keys: fewer spans, hidden ones of NaN, empty ones."""
    query, key, value = make_problem(20, 3 * SPAN, heads=1, dtype=dtype)
    threads(1)
    few = SPAN + 300
    expected = with_lse(query, key[:, :few], value[:, :few])
    for x in (key, value):
        x[:, few:] = np.nan
    for count in (1, 9):
        threads(count)
        assert_same_bits(with_lse(query, key, value, kv_lengths=few), expected)
        assert_same_bits(with_lse(query, key, value, mask=np.arange(3 * SPAN) < few), expected)
        out, lse = with_lse(query, key, value, is_causal=True, query_offset=few - 20)
        assert np.isfinite(out.astype(float)).all()
        assert_same_bits((out[:, -1:], lse[:, -1:]), (expected[0][:, -1:], expected[1][:, -1:]))


@pytest.mark.promise("visible-nan-reaches-its-rows")
def test_a_nan_reaches_the_rows_that_see_it(threads):
    query, key, value = make_problem(24, 2 * SPAN, heads=1)
    value[0, SPAN + 5, 3] = np.nan
    for count in (1, 5):
        threads(count)
        out = attention(query, key, value, is_causal=True, query_offset=SPAN - 7)
        nan = np.isnan(out)
        assert nan[0, 12:, 3].all()
        assert nan.sum() == 12


@pytest.mark.promise("bitwise-threads")
def test_packed_sequences_share_keys(threads):
    """One long sequence among short ones, some without queries or keys."""
    q_lens, kv_lens = np.array([3, 0, 20, 17, 30]), np.array([9, 30, 3 * SPAN + 1, 0, 64])
    starts = [np.cumsum([0, *lens]) for lens in (q_lens, kv_lens)]
    rng = np.random.default_rng(0)
    query = rng.standard_normal((starts[0][-1], 2, 16), np.float32)
    key, value = rng.standard_normal((2, starts[1][-1], 1, 16), np.float32)
    expected = None
    for count in (1, 2, 8, 64):
        threads(count)
        got = varlen_attention(query, key, value, *starts, return_lse=True)
        expected = expected or got
        assert_same_bits(got, expected)
    for b in range(5):
        (q0, q1), (k0, k1) = (x[b : b + 2] for x in starts)
        alone = [x[a:z].swapaxes(0, 1) for x, a, z in ((query, q0, q1), (key, k0, k1))]
        out, lse = with_lse(*alone, value[k0:k1].swapaxes(0, 1))
        if q1 - q0 > 16:
            assert_same_bits((expected[0][q0:q1].swapaxes(0, 1), lse), (out, lse))


@pytest.mark.promise("bitwise-threads")
def test_statistics_of_shared_keys(threads):
    query, key, _ = make_problem(20, 2 * SPAN + 9, heads=2)
    threads(1)
    expected = attention_statistics(query, key, column_sums=True, entropy=True)
    threads(12)
    got = attention_statistics(query, key, column_sums=True, entropy=True)
    assert_same_bits((got.column_sums, got.entropy), (expected.column_sums, expected.entropy))


@pytest.mark.promise("accuracy-gate")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_accuracy(dtype, threads):
    """Scores whose maximum lies in another span for each row."""
    query, key, value = make_problem(33, 3 * SPAN + 11, 16, heads=1, dtype=dtype, mean=1.0)
    threads(16)
    assert_within_gate(with_lse(query, key, value, scale=1.0), query, key, value, scale=1.0)
